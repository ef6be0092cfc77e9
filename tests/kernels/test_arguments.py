"""What operations are called with: right in every backend, or refused in one line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import MIEstimator
from engine.errors import DataError, EngineError, EstimatorError
from engine.kernels import (
    InfoNCE,
    KeyQueue,
    MILowerBound,
    SigLIP,
    classifier_logits,
    cmi,
    concat_infonce,
    concat_scores,
    cube_mix,
    grouped_infonce,
    grouped_mlp,
    infonce,
    knn_product_samples,
    mi_lower_bound,
    siglip,
    use_backend,
)
from engine.kernels.critics.op import infonce_of_towers
from engine.kernels.dropout.op import dropout
from engine.kernels.knn_product import Bank, label_strata, product_indices, stratified_product_indices
from engine.kernels.mi_bounds import embeddings
from engine.kernels.mi_bounds.reference import BOUNDS
from engine.kernels.ragged.op import pad
from engine.kernels.recurrent.op import bidirectional, parameters
from engine.kernels.transformer.op import add_norm, attention, bias_gelu, draw_seed
from tests.kernels.critic_cases import cast, concat, draw, grouped, tensors
from tests.kernels.test_cube_mix_op import case as cube_case

Q, K = draw(8, 4, seed=0, dtype=torch.float32), draw(8, 4, seed=1, dtype=torch.float32)


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def refused(function, match: str, error: type = EstimatorError) -> None:
    with pytest.raises(error, match=match) as caught:
        function()
    assert "\n" not in str(caught.value)


class TestOwnNegatives:
    @pytest.mark.parametrize("cosine", [False, True])
    def test_is_cross_entropy(self, cosine: bool, backend: str):
        q, k, own = (t.requires_grad_() for t in (draw(8, 4, seed=0), draw(8, 4, seed=1), draw(8, 3, 4, seed=2)))
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        found = infonce(q, k, negatives=own, temperature=temperature, cosine=cosine, reduction="none")
        a, b, c = (F.normalize(t, dim=-1) if cosine else t for t in (q, k, own))
        scores = torch.cat([(a * b).sum(1, keepdim=True), torch.einsum("bd,bnd->bn", a, c)], 1) / temperature
        expected = F.cross_entropy(scores, torch.zeros(8, dtype=torch.int64), reduction="none")
        torch.testing.assert_close(found, expected)
        leaves = q, k, own, temperature
        for f, e in zip(
            torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(f, e)
        mean = infonce(q, k, negatives=own, temperature=temperature, cosine=cosine)
        torch.testing.assert_close(mean, expected.mean())

    def test_groups_and_module(self, backend: str):
        q, k, own = draw(2, 8, 4, seed=0), draw(2, 8, 4, seed=1), draw(2, 8, 3, 4, seed=2)
        found = infonce(q, k, negatives=own)
        assert found.shape == (2,)
        for g in range(2):
            torch.testing.assert_close(found[g], InfoNCE()(q[g], k[g], negatives=own[g]))

    def test_16_bits_are_summed_in_32(self, backend: str):
        q, k, own = (draw(*s, seed=0).bfloat16() for s in ((8, 64), (8, 64), (8, 3, 64)))
        found = infonce(q, k, negatives=own)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, infonce(q.float(), k.float(), negatives=own.float()))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"negatives": draw(7, 3, 4, seed=2)}, r"q \[8, 4\], k \[8, 4\] and negatives \[7, 3, 4\]"),
            ({"negatives": draw(8, 3, 5, seed=2)}, r"negatives \[8, 3, 5\]"),
            ({"negatives": draw(8, 3, 4, seed=2), "symmetric": True}, "symmetric"),
            ({"negatives": draw(8, 3, 4, seed=2), "positives": torch.arange(8)}, "positives"),
        ],
    )
    def test_refused(self, options, match: str, backend: str):
        refused(lambda: infonce(Q, K, **options), match)


WRONG_TEMPERATURES = [
    0.0, -0.1, math.nan, math.inf, True, None, "0.07", 1j, torch.tensor(0.0), torch.tensor(-0.1),
    torch.tensor(math.nan), torch.tensor(math.inf), torch.ones(8), torch.ones(8, 1), torch.empty(0),
    torch.tensor(True), torch.tensor(1j), torch.ones((), device="meta"), np.float32(-1),
]  # fmt: skip


class TestTemperature:
    @pytest.mark.parametrize("wrong", WRONG_TEMPERATURES, ids=repr)
    def test_refused(self, wrong, backend: str):
        own = draw(8, 2, 4, seed=3, dtype=torch.float32)
        for function in (
            lambda: infonce(Q, K, temperature=wrong),
            lambda: infonce(Q, K, temperature=wrong, symmetric=True),
            lambda: infonce(Q, K, temperature=wrong, negatives=own),
            lambda: mi_lower_bound(Q, K, temperature=wrong),
        ):
            refused(function, "one positive number")

    @pytest.mark.parametrize("right", [0.5, np.float32(0.5), np.array(0.5)[()], torch.tensor([0.5]), torch.tensor(0.5)])
    def test_taken(self, right, backend: str):
        for given, divisor in ((right, 0.5), (torch.tensor(2), 2)):
            expected = F.cross_entropy(Q @ K.t() / divisor, torch.arange(8))
            torch.testing.assert_close(infonce(Q, K, temperature=given), expected)

    @pytest.mark.parametrize("wrong", [0.0, -0.1, math.nan, math.inf])
    def test_not_looked_at_it_gives_nan(self, wrong: float, backend: str, monkeypatch):
        """As on a GPU, where looking would wait."""
        monkeypatch.setattr(embeddings, "looks_at", lambda tensor: False)
        wrong, right = torch.tensor(wrong), torch.tensor(0.5, requires_grad=True)
        q, k = (t.clone().requires_grad_() for t in (Q, K))
        for given in ({}, {"symmetric": True}, {"reduction": "none"}, {"negatives": K[None].expand(8, 8, 4)}):
            assert infonce(q, k, temperature=wrong, **given).isnan().all()
            assert infonce(q.detach(), k.detach(), temperature=wrong, **given).isnan().all()
            assert infonce(q, k, temperature=right, **given).isfinite().all()
        for bound in BOUNDS:
            assert mi_lower_bound(q, k, bound=bound, temperature=wrong).isnan(), bound
            assert mi_lower_bound(q.detach(), k.detach(), bound=bound, temperature=wrong).isnan(), bound
        (found,) = torch.autograd.grad(infonce(q, k, temperature=right), right)
        monkeypatch.undo()
        torch.testing.assert_close(found, torch.autograd.grad(infonce(q, k, temperature=right), right)[0])


class TestScalars:
    @pytest.mark.parametrize("name, wrong", [
        ("alpha", -0.1), ("alpha", 1.5), ("alpha", math.nan), ("smile_tau", 0.0), ("smile_tau", math.inf),
        ("ema_rate", 0.0), ("ema_rate", 2.0), ("ema_rate", "1"),
    ])  # fmt: skip
    def test_settings_of_bounds(self, name: str, wrong):
        for function in (
            lambda: mi_lower_bound(Q, K, bound="smile", **{name: wrong}),
            lambda: mi_lower_bound(Q @ K.t(), **{name: wrong}),
            lambda: MILowerBound("smile", **{name: wrong}),
        ):
            refused(function, f"{name} = ")

    def test_others(self):
        refused(lambda: cmi(Q, K, limit=-1.0), "limit = -1")
        refused(lambda: cmi(Q, K, limit=math.nan), "limit = nan")
        for p in (-0.1, 1.1, math.nan):
            refused(lambda p=p: dropout(Q, p), "dropout: found p")
            refused(lambda p=p: dropout(Q, p, training=False), "dropout: found p")

    def test_log_ema(self):
        q = draw(3, 8, 4, seed=0)
        for shape in ((2,), (3, 1), (0,)):
            refused(lambda s=shape: mi_lower_bound(q, q, bound="mine", log_ema=torch.zeros(s)), "log_ema")


POSITIVES = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])


class TestLabels:
    @pytest.mark.parametrize(("place", "value"), [(2, -1), (2, 8), (0, 1 << 40)])
    def test_positives_out_of_range(self, place: int, value: int, backend: str):
        positives = POSITIVES.clone()
        positives[place] = value
        for grad in (False, True):
            q = Q.clone().requires_grad_(grad)
            refused(lambda q=q: infonce(q, K, positives=positives), f"{value}.*expected 0 to 7")
            refused(lambda q=q: infonce(q, K, positives=positives, reduction="none"), "expected 0 to 7")

    def test_excluded_positives(self, backend: str):
        refused(lambda: infonce(Q, Q, positives=torch.arange(8), exclude_self=True), "row 0 as its own positive")

    @pytest.mark.parametrize("wrong", [-1, 8, 3], ids=["below", "above", "excluded"])
    def test_not_looked_at_they_give_nan(self, wrong: int, monkeypatch):
        monkeypatch.setattr(embeddings, "looks_at", lambda tensor: False)
        positives = POSITIVES.clone()
        positives[3] = wrong
        with use_backend("reference"):
            assert infonce(Q, Q, positives=positives, exclude_self=True).isnan()
            right = infonce(Q, Q, positives=POSITIVES, exclude_self=True)
        torch.testing.assert_close(right, infonce(Q, Q, positives=POSITIVES, exclude_self=True))

    def test_wrong_kinds_of_positives(self, backend: str):
        for wrong in (POSITIVES.int(), POSITIVES.float(), POSITIVES[1:], POSITIVES.to("meta")):
            refused(lambda w=wrong: infonce(Q, K, positives=w), "positives.*int64")

    def test_strata(self, backend: str):
        label = torch.arange(40.0) % 4
        for wrong, match in (
            (label.masked_fill(label == 2, math.nan), "NaN or infinite"),
            (label.reshape(20, 2), "one column|2 columns"),
            (torch.view_as_complex(label.reshape(20, 2)), "complex64"),
        ):
            refused(lambda w=wrong: stratified_product_indices(w, 4, 2), match)
        refused(lambda: label_strata(label.reshape(20, 2), 2), "one column")
        refused(lambda: stratified_product_indices(label, 4, 2, strata=label_strata(label[1:], 2)), "39 rows for 40")
        numbers = stratified_product_indices(label.long(), 4, 2, torch.Generator().manual_seed(0))
        floats = stratified_product_indices(label, 4, 2, torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(numbers, floats, strict=True))

    def test_lengths(self, backend: str):
        gru = torch.nn.GRU(3, 4, batch_first=True, bidirectional=True)
        x, weights = draw(2, 5, 3, seed=0, dtype=torch.float32), parameters(gru)
        for wrong in (torch.tensor([0, 5]), torch.tensor([2, 6]), torch.tensor([2, 3, 4]), torch.tensor([2.0, 3.0])):
            refused(lambda w=wrong: bidirectional(x, w, weights, "gru"), "lengths", DataError)

    def test_queries(self, backend: str):
        z = draw(20, 2, seed=0)
        for wrong in ([0, 0, 1], [0, 1, 20], [-1, 0, 1]):
            refused(lambda w=wrong: product_indices(z, 3, 2, query=torch.tensor(w)), "distinct rows from 0 to 19")
        refused(lambda: product_indices(z, 3, 2, query=torch.tensor([0.0, 1, 2])), r"int64 \[3\]")


def operations() -> dict[str, tuple]:
    """Name -> (function of a list of tensors, the tensors): every operation, in fp32."""
    single = {"dtype": torch.float32}
    towers = grouped(6, (3, 4), (2, 2), 8, 4, **single)
    split = [len(towers[0]), len(tensors(towers[1]))]

    def of_towers(function):
        def run(flat):
            inputs, rest = flat[: split[0]], flat[split[0] :]
            pairs = list(zip(rest[::2], rest[1::2], strict=True))
            return function(inputs, pairs[: split[0]], pairs[split[0] :])

        return run

    def of_pairs(function):
        return lambda t: function(t[0], t[1], list(zip(t[2::2], t[3::2], strict=True)))

    x, weights = cube_case((2, 5, 2, 3), 1, 4, 6)
    gru = torch.nn.GRU(3, 4, batch_first=True, bidirectional=True)
    rnn = [draw(2, 5, 3, seed=0, **single), *(w.detach() for w in parameters(gru))]
    norm = [draw(*s, seed=i, **single) for i, s in enumerate([(3, 4), (4,), (4,), (4,), (3, 4)])]
    heads = [draw(*s, seed=i, **single) for i, s in enumerate([(6, 12), (4,), (4,), (4,)])]
    mask = torch.zeros(2, 1, 1, 3)
    shapes = (1, 5, 9), (1, 5), (1, 1, 5), (1, 1), (6, 3), (4, 3)
    classifier = [draw(*s, seed=i, **single) for i, s in enumerate(shapes)]

    def classify(t):
        product = [(t[5], t[5], t[5])]
        return classifier_logits((t[0], t[1]), [(t[2], t[3])], [t[4]], [(0, 0, 0)], product)[1]

    return {
        "infonce": (lambda t: infonce(*t), [Q, K]),
        "infonce, negatives": (lambda t: infonce(t[0], t[1], negatives=t[2]), [Q, K, K[:3]]),
        "infonce, own negatives": (lambda t: infonce(t[0], t[1], negatives=t[2]), [Q, K, K[:, None]]),
        "infonce, labels": (lambda t: infonce(*t, labels=torch.arange(len(Q)) % 2), [Q, K]),
        "infonce, MoCo": (lambda t: infonce(t[0], t[1], negatives=t[2], in_batch=False), [Q, K, K[:3]]),
        "infonce, own and batch": (lambda t: infonce(t[0], t[1], negatives=t[2], in_batch=True), [Q, K, K[:, None]]),
        "siglip": (lambda t: siglip(*t), [Q, K]),
        "mi_lower_bound": (lambda t: mi_lower_bound(*t, bound="dv"), [Q, K]),
        "log_baseline": (lambda t: mi_lower_bound(t[0], bound="tuba", log_baseline=t[1]), [Q @ K.t(), Q[:, 0]]),
        "grouped_mlp": (of_towers(grouped_mlp), tensors(towers)),
        "grouped_infonce": (of_towers(lambda *c: grouped_infonce(*c, [0, 1], [2, 3])), tensors(towers)),
        "infonce_of_towers": (lambda t: infonce_of_towers(t[:2], t[2:], [0, 1], [2, 3]), tensors(towers)),
        "concat_scores": (of_pairs(concat_scores), tensors(concat(6, 6, (3, 2), 8, **single))),
        "concat_infonce": (of_pairs(concat_infonce), tensors(concat(6, 6, (3, 2), 8, **single))),
        "classifier_logits": (classify, classifier),
        "cmi": (lambda t: cmi(*t, "dv").value, [Q, K]),
        "cube_mix": (lambda t: cube_mix(t[0], 1, *t[1:]), [x, *weights]),
        "recurrence": (lambda t: bidirectional(t[0], torch.tensor([5, 2]), t[1:], "gru"), rnn),
        "add_norm": (lambda t: add_norm(*t[:3], bias=t[3], residual=t[4])[0], norm),
        "attention": (lambda t: attention(*t, mask, heads=2), heads),
        "bias_gelu": (lambda t: bias_gelu(*t), [norm[0], norm[1]]),
        "knn": (lambda t: knn_product_samples(*t, 3, 2, torch.Generator().manual_seed(0)).x, [Q, K, Q.flip(0)]),
    }


OPERATIONS = operations()
# weights decide the type of the result there, and x may have another one
MIXED = ("add_norm", "attention", "bias_gelu", "knn")


class TestTypesAndDevices:
    @pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in MIXED])
    def test_types_that_do_not_meet(self, name: str, backend: str):
        """float64 and float32 are computed in float64, 16 bits and float32 in float32, whichever is which."""
        function, given = OPERATIONS[name]
        exact = function(cast(given, torch.float64))
        for odd in range(len(given)):
            mixed = [t.double() if n == odd else t for n, t in enumerate(given)]
            found = function(mixed)
            wide = odd == 0 or name not in ("cube_mix", "log_baseline")  # of the type of x, or of the scores
            assert found.dtype == (torch.float64 if wide else torch.float32)
            torch.testing.assert_close(found, exact, check_dtype=False, rtol=1e-4, atol=1e-5)
            low = [t.bfloat16() if n == odd else t for n, t in enumerate(given)]
            found, rounded = function(low), function(cast(low, torch.float32))
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, rounded)

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_devices_that_do_not_meet(self, name: str, backend: str):
        function, given = OPERATIONS[name]
        for odd in range(len(given)):
            moved = [t.to("meta") if n == odd else t for n, t in enumerate(given)]
            refused(lambda m=moved: function(m), "tensors on (cpu|meta) and on (cpu|meta)")

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_complex_numbers_and_what_is_no_tensor(self, name: str, backend: str):
        function, given = OPERATIONS[name]
        refused(lambda: function([given[0].to(torch.complex64), *given[1:]]), "complex64", EngineError)
        if name != "infonce_of_towers":  # whose callers have tensors
            for wrong in (given[0].numpy(), given[0].tolist(), None):
                found = f"a {type(wrong).__name__}; expected a torch.Tensor"
                refused(lambda w=wrong: function([w, *given[1:]]), found)

    @pytest.mark.parametrize(
        "name", ["infonce", "infonce, labels", "siglip", "mi_lower_bound", "cmi", "cube_mix", "recurrence", "bias_gelu"]
    )
    def test_whole_numbers_are_refused(self, name: str, backend: str):
        function, given = OPERATIONS[name]
        refused(lambda: function([given[0].long(), *given[1:]]), "a tensor of torch.int64")

    @pytest.mark.parametrize("name", ["grouped_mlp", "grouped_infonce", "infonce_of_towers", "concat_scores"])
    def test_whole_numbers_as_features(self, name: str, backend: str):
        """Such as labels: what critics read."""
        function, (x, *rest) = OPERATIONS[name]
        whole = (3 * x).long()
        torch.testing.assert_close(function([whole, *rest]), function([whole.float(), *rest]))

    def test_seeds(self):
        x, ones, zeros = OPERATIONS["add_norm"][1][:3]
        for wrong in (torch.tensor(3), torch.tensor([3.0]), draw_seed(torch.device("cpu")).to("meta")):
            refused(lambda w=wrong: add_norm(x, ones, zeros, seed=w, p=0.5), "a seed")


class TestEmpty:
    def test_no_rows(self, backend: str):
        none, towers = Q[:0], grouped(0, (3, 4), (2, 2), 8, 4)
        for function in (
            lambda: infonce(none, none),
            lambda: infonce(none, K, reduction="none"),
            lambda: infonce(none, none, negatives=none[:, None]),
            lambda: infonce(Q[:, :0], K[:, :0]),
            lambda: mi_lower_bound(none, none),
            lambda: mi_lower_bound(torch.zeros(0, 0)),
            lambda: cmi(none[:, :0], none[:, :0]),
            lambda: grouped_infonce(*towers, [0, 1], [2, 3]),
            lambda: concat_infonce(*concat(0, 0, (3, 2), 8)),
            lambda: knn_product_samples(none, none, none, 3, 2),
        ):
            refused(function, "found")
        assert grouped_mlp(*towers).shape == (4, 0, 4)
        assert concat_scores(*concat(0, 5, (3, 2), 8)).shape == (0, 5)

    def test_activation(self):
        refused(lambda: grouped_mlp(*grouped(4, (3, 4), (2, 2), 8, 4), "swish"), "activation 'swish'")
        refused(lambda: concat_scores(*concat(4, 4, (3, 2), 8), "swish"), "activation 'swish'")


class TestGradientsWhereKernelsHaveNone:
    def test_a_mask_that_learns(self):
        x, *bias = (draw(*s, seed=i) for i, s in enumerate([(6, 12), (4,), (4,), (4,)]))
        mask = draw(2, 1, 1, 3, seed=9).requires_grad_()
        assert torch.autograd.gradcheck(lambda m: attention(x, *bias, m, heads=2), mask)

    def test_ragged_frames_that_learn(self):
        values = torch.ones(6, 2, requires_grad=True)
        out, _ = pad(values, torch.tensor([0, 2, 6]), torch.tensor([1, 1]), 3)
        out.sum().backward()
        assert torch.equal(values.grad, torch.tensor([0.0, 0, 2, 2, 2, 0])[:, None].expand(6, 2))


def test_banks():
    refused(lambda: Bank({"T": Q, "A": K[1:]}), "T 8, A 7")
    refused(lambda: Bank({"T": Q, "A": K.to("meta")}), "cpu and on meta")
    refused(lambda: knn_product_samples(Q, K, Q[1:], 2, 2), "8, 8 and 7 rows")


class Wrapper(torch.Tensor):
    """A subclass that holds another tensor, as DTensor does: its own memory is none that a kernel may read."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


class Named(torch.Tensor):
    """A subclass that is a tensor as others are."""


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (Wrapper, "a Wrapper"),
        (lambda x: torch.nested.nested_tensor([x, x]), "a nested tensor"),
        (torch.Tensor.to_sparse, "a sparse_coo tensor"),
        (lambda x: x.to("meta"), "on meta"),
        (lambda x: None, "a NoneType"),
    ],
)
def test_what_holds_no_numbers_is_refused_in_one_line(made, found):
    """A wrapper's memory was read before, which ended the process."""
    x = torch.randn(6, 4)
    for loss in (infonce, siglip):
        with pytest.raises(EstimatorError, match=found):
            loss(x, made(x))
    for call in (lambda y: mi_lower_bound(x, y), lambda y: MIEstimator(4, 4)(x, y)) if found in ("a Wrapper",) else ():
        with pytest.raises(EstimatorError, match=found):
            call(made(x))


def test_plain_subclasses_and_parameters_are_tensors():
    x, y = torch.randn(2, 6, 4)
    expected = torch.nn.functional.cross_entropy(x.double() @ y.double().T, torch.arange(6))
    for made in (torch.nn.Parameter, lambda t: t.as_subclass(Named)):
        torch.testing.assert_close(infonce(x, made(y)).as_subclass(torch.Tensor).double(), expected, rtol=0, atol=1e-5)


def test_modules_without_data_can_be_shown():
    with torch.device("meta"):
        modules = [InfoNCE(0.1, learnable=True), SigLIP(), KeyQueue(8, 4)]
    assert "temperature=?" in repr(modules[0])
    assert "bias=?" in repr(modules[1])
    assert "temperature=0.1" in repr(InfoNCE(0.1, learnable=True))


def test_numbers_of_8_bits_are_refused(backend: str):
    eight = Q.to(torch.float8_e4m3fn)
    x, weights = cube_case((4, 9, 3, 8), 1, 5, 6)
    for call in (
        lambda: infonce(eight, K), lambda: siglip(Q, eight), lambda: mi_lower_bound(eight, eight, bound="dv"),
        lambda: concat_scores(eight, Q, concat(8, 8, (4, 4), 6)[2]), lambda: cmi(eight, eight),
        lambda: cube_mix(x.to(torch.float8_e4m3fn), 1, *weights),
    ):  # fmt: skip
        refused(call, "a tensor of torch.float8_e4m3fn; expected floating-point numbers of 16, 32 or 64 bits")


TWO = [(draw(1, 6, 4, seed=0), draw(1, 6, seed=1)), (draw(1, 6, 4, seed=2), draw(1, 6, seed=3))]
LAST = draw(2, 3, 6, seed=4), draw(2, 3, seed=5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: grouped_mlp([Q, K], [(TWO[0][0], None), TWO[1]], [LAST]), "a NoneType"),
        (lambda: grouped_mlp([Q, K], [TWO[0][0], TWO[1][0]], [LAST]), "a layer that is a Tensor"),
        (lambda: grouped_mlp([Q, K], [(*TWO[0], 1), TWO[1]], [LAST]), "a layer that is a tuple of 3"),
        (lambda: concat_scores(Q, K, torch.nn.Sequential(torch.nn.Linear(8, 1))), "a Sequential; .* pairs"),
        (lambda: concat_scores(Q, K, None), "a NoneType; .* pairs"),
        (lambda: grouped_infonce([Q, K], TWO, [LAST], 1, 0), "rows 1 and columns 0 of 2 MLPs"),
        (lambda: grouped_infonce([Q, K], TWO, [LAST], [1.0], [0.0]), r"rows \[1.0\]"),
        (lambda: classifier_logits((TWO[0][0], None), [LAST], [Q], [(0, 0, 0)], [(Q, Q, Q)]), "a NoneType"),
        (lambda: knn_product_samples(Q, Q, K, 2, 1, generator=3), "generator 3"),
        (lambda: knn_product_samples(*torch.zeros(3), 0, 1), "a number"),
        (lambda: MILowerBound("mime"), "bound 'mime'; expected one of infonce"),
        (lambda: MILowerBound("mine", groups=-1), "groups = -1"),
        (lambda: InfoNCE(reduction="avg"), "reduction 'avg'"),
        (lambda: SigLIP(reduction="avg"), "reduction 'avg'"),
        (lambda: infonce(Q, K, temperature=1e-45), "temperature 1e-45"),
    ],
)
def test_mistakes_that_ended_in_a_traceback(call, match: str):
    refused(call, match)


def test_a_large_score_never_weighs_more_than_all():
    """Products of other shapes round otherwise: the backward pass may find scores above their log-sum-exp."""
    q, k = (draw(67, 48, seed=n, dtype=torch.float32).mul(4000).requires_grad_() for n in (0, 1))
    for options in ({"symmetric": True}, {"reduction": "sum"}, {"labels": torch.arange(67) // 2, "reduction": "none"}):
        found = torch.autograd.grad(infonce(q, k, **options).sum() / 67, (q, k))
        # absolute values of a row of dS add up to 2 at most
        for gradient, other in zip(found, (k, q), strict=True):
            assert gradient.abs().max() <= 2 * other.abs().max()


def test_scores_above_their_log_sum_exp_count_as_equal_to_it():
    """Of scores 1 with shifts 40 below them: rows and columns weigh 2 and 3, and the diagonal nothing."""
    from engine.kernels.mi_bounds.cpu import gradients

    ones, diagonal = torch.ones(1, 2, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    shift, scale = diagonal - 39, torch.ones((), dtype=torch.float64)
    both = gradients(ones, ones, scale, None, False, diagonal + 2, shift, diagonal + 3, shift, diagonal)
    assert [gradient.flatten().tolist() for gradient in both] == [[-5, -5], [-5, -5]]


def test_make_fx_records_losses_that_look_at_values():
    from torch.fx.experimental.proxy_tensor import make_fx

    def loss(q, k):
        return infonce(q, k, label_smoothing=0.1)

    graph = make_fx(loss)(Q, K)
    torch.testing.assert_close(graph(2 * Q, K), F.cross_entropy(2 * Q @ K.T, torch.arange(8), label_smoothing=0.1))
