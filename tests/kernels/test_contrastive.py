"""The contrastive losses: every backend is the reference, gradients are right, and arguments are checked."""

import logging
import math

import pytest
import torch
from torch.profiler import profile

from engine.errors import EstimatorError
from engine.kernels import infonce, registry, siglip, use_backend
from engine.kernels.contrastive import autograd, op
from engine.kernels.contrastive.losses import Options, Statistics, gradients, losses
from engine.kernels.contrastive.pairs import Pairs
from engine.kernels.mi_bounds import cpu as blocks_of
from tests.kernels.contrastive_cases import INFONCE, NAMES, contrastive_case
from tests.kernels.mi_cases import assert_as_good_as_torch, cast, draw, evaluate

LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(blocks_of, "BLOCK_BYTES", 4000)
        monkeypatch.setattr(autograd, "CHUNK_BYTES", 100)


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_is_the_reference(name, blocks):
    for rows, width, reduction in ((7, 6, "mean"), (33, 16, "mean"), (33, 16, "none"), (7, 6, "sum")):
        function, inputs = contrastive_case(name, rows, width, reduction)
        found, expected = evaluate(function, inputs, "cpu"), evaluate(function, inputs, "reference")
        torch.testing.assert_close(found.value, expected.value)
        for tensor, grad in expected.grads.items():
            torch.testing.assert_close(found.grads[tensor], grad, msg=f"{rows} {tensor}")


def by_position(function, names):
    """The function with its named arguments in this order."""
    return lambda *values: function(**dict(zip(names, values, strict=True)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, backend):
    for reduction in ("mean", "none"):
        function, inputs = contrastive_case(name, 6, 3, reduction)
        with use_backend(backend):
            tensors = [x.requires_grad_() for x in inputs.values()]
            assert torch.autograd.gradcheck(by_position(function, inputs), tensors)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_errs_no_more_than_plain_torch(name):
    for rows in (9, 65):
        function, inputs = contrastive_case(name, rows, 16)
        exact = evaluate(function, inputs, "reference")
        inputs = cast(inputs, torch.float32)
        assert_as_good_as_torch(evaluate(function, inputs, "cpu"), evaluate(function, inputs, "reference"), exact, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["labels", "queue alone", "own negatives and the batch", "siglip", "hard"])
def test_16_bits_and_autocast(name, dtype):
    """Embeddings of 16 bits are taken as they are, sums are fp32, gradients come back in the embeddings' type."""
    function, inputs = contrastive_case(name, 9, 8)
    inputs = {
        n: x.to(torch.float32 if n in ("temperature", "bias") else dtype).requires_grad_() for n, x in inputs.items()
    }
    for backend in ("cpu", "reference"):
        with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            value = function(**inputs)
        exact = function(**{n: x.detach().double() for n, x in inputs.items()})
        assert value.dtype == torch.float32 and abs(value.item() - exact.item()) < 1e-4 * (1 + abs(exact.item()))
        grads = torch.autograd.grad(value, list(inputs.values()))
        assert [g.dtype for g in grads] == [x.dtype for x in inputs.values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"decoupled": True}])
def test_a_queue_under_the_autocast_of_the_other_16_bits(dtype, options):
    """torch.cat refuses to join such tensors there."""
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    q, k, queue = (draw((5, 4), seed).to(dtype) for seed in range(3))
    with torch.autocast("cpu", dtype=other):
        found = infonce(q, k, negatives=queue, **options), siglip(q, k, negatives=queue)
    assert torch.equal(found[0], infonce(q, k, negatives=queue, **options))
    assert torch.equal(found[1], siglip(q, k, negatives=queue))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_scores_are_finite(name, backend):
    function, inputs = contrastive_case(name, 9, 4, "none")
    for factor in (1e3, 1e-6, 0.0):
        scaled = {n: x if n in ("temperature", "bias") else factor * x for n, x in cast(inputs, torch.float32).items()}
        found = evaluate(function, scaled, backend)
        assert found.value.isfinite().all() and all(g.isfinite().all() for g in found.grads.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_groups_are_independent(name, backend):
    function, inputs = contrastive_case(name, 9, 4, "mean")
    shared = ("temperature", "bias")
    stacked = {n: x if n in shared else torch.stack([x, 0.5 * x, -x]) for n, x in inputs.items()}
    with use_backend(backend):
        together = function(**stacked)
        apart = [function(**{n: x if n in shared else x[g] for n, x in stacked.items()}) for g in range(3)]
    torch.testing.assert_close(together, torch.stack(apart))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_small_losses_keep_their_digits(backend):
    """Positives that are 30 above the negatives: in fp32 LSE - D would be 0."""
    q = torch.eye(4).requires_grad_()
    for options in ({"row_ids": torch.arange(4)}, {"labels": torch.arange(4)}, {"positives": torch.arange(4)[:, None]}):
        with use_backend(backend):
            loss = infonce(q, 30 * torch.eye(4), **options)
            (grad,) = torch.autograd.grad(loss, q)
        expected = 3 * math.exp(-30)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert grad[0, 0].item() == pytest.approx(-30 * expected / 4, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [Options(), Options(True), Options(False, 0.7), Options(True, 0.7), Options(False, 0.0, 0.2)],
)
def test_derivatives_of_the_losses_are_autograds(options):
    """Also of rows without positives, and without negatives."""
    count = torch.tensor([[2.0, 1, 0, 3], [1, 1, 0, 2]], dtype=torch.float64)
    others = torch.tensor([[4.0, 0, 5, 1], [3, 2, 0, 7]], dtype=torch.float64)
    none = -math.inf
    values = [draw((2, 4), seed) for seed in range(5)]
    values[0] = torch.where(count > 0, values[0], none)
    values[2], values[3] = (torch.where(others > 0, values[i], none) for i in (2, 3))
    leaves = [v.requires_grad_() for v in values]
    total = losses(Statistics(*leaves, count, others), options)[0].sum()
    expected = torch.autograd.grad(total, leaves, allow_unused=True)
    found = gradients(Statistics(*(v.detach() for v in leaves), count, others), options)
    for f, e in zip(found, expected, strict=False):
        torch.testing.assert_close(f, torch.zeros_like(f) if e is None else e)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
class TestRowsWithoutAPositive:
    def test_the_mean_leaves_them_out(self, backend):
        q, labels = draw((5, 3), 0).requires_grad_(), torch.tensor([0, 1, 0, 2, 1])  # row 3 is alone
        with use_backend(backend):
            rows = infonce(q, q, labels=labels, exclude_self=True, reduction="none")
            mean = infonce(q, q, labels=labels, exclude_self=True)
            total = infonce(q, q, labels=labels, exclude_self=True, reduction="sum")
            (grad,) = torch.autograd.grad(mean, q)
        assert rows[3] == 0 and (rows[[0, 1, 2, 4]] > 0).all() and grad.isfinite().all()
        torch.testing.assert_close(mean, rows.sum() / 4)
        torch.testing.assert_close(total, rows.sum())

    def test_they_are_counted_once_in_the_log(self, backend, caplog, monkeypatch):
        monkeypatch.setattr(op, "_told", set())
        with use_backend(backend), caplog.at_level(logging.WARNING, "engine"):
            for _ in range(3):
                infonce(draw((3, 2), 0), draw((3, 2), 1), positives=torch.tensor([[1], [-1], [0]]))
        assert [r.getMessage() for r in caplog.records if "1 of 3 rows" in r.getMessage()] and len(caplog.records) == 1

    def test_a_mean_of_none_is_refused(self, backend):
        q = draw((3, 2), 0)
        with use_backend(backend), pytest.raises(EstimatorError, match="no row with a positive"):
            infonce(q, q, labels=torch.arange(3), exclude_self=True)

    def test_not_looked_at_it_is_nan(self, backend, monkeypatch):
        monkeypatch.setattr(op, "looks_at", lambda tensor: False)
        q = draw((3, 2), 0)
        with use_backend(backend):
            assert infonce(q, q, labels=torch.arange(3), exclude_self=True).isnan()

    def test_decoupled_a_row_needs_a_negative(self, backend):
        q, ids = draw((3, 2), 0).requires_grad_(), torch.tensor([7, 7, 8])
        mask = torch.tensor([[True] * 3, [False] * 3, [False] * 3])
        with use_backend(backend):
            rows = infonce(q, q, mask=mask, row_ids=ids, decoupled=True, reduction="none")
            mean = infonce(q, q, mask=mask, row_ids=ids, decoupled=True)
            grad = torch.autograd.grad(mean, q)[0]
        assert rows[0] == 0 and grad.isfinite().all()
        torch.testing.assert_close(mean, rows.sum() / 2)

    def test_hard_negatives_of_a_row_without_any(self, backend):
        q, mask = draw((3, 2), 0).requires_grad_(), torch.zeros(3, 3, dtype=torch.bool)
        mask[0] = True
        with use_backend(backend):
            rows = infonce(q, q, mask=mask, hardness=1.0, reduction="none")
            grad = torch.autograd.grad(rows.sum(), q)[0]
        assert rows[0] == 0 and rows[1] > 0 and grad.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_not_looked_at_wrong_positives_give_nan(backend, monkeypatch):
    monkeypatch.setattr(op, "looks_at", lambda tensor: False)
    q = draw((4, 2), 0)
    for wrong in (-2, 4):
        positives = torch.tensor([[0, 1], [1, -1], [2, wrong], [3, 0]])
        with use_backend(backend):
            assert infonce(q, q, positives=positives).isnan()


def test_what_is_given_stays_as_it_is():
    q, mask = draw((6, 3), 0).requires_grad_(), torch.rand(6, 6) > 0.5
    positives, before = torch.tensor([[1, 2, -1]] * 6), mask.clone()
    infonce(q, q, mask=mask, positives=positives).backward()
    assert torch.equal(mask, before) and torch.equal(positives, torch.tensor([[1, 2, -1]] * 6))


def test_a_new_option_at_its_default_is_the_fast_path():
    q, k, queue = draw((6, 4), 0), draw((6, 4), 1), draw((5, 4), 2)
    assert torch.equal(infonce(q, k, negatives=queue), infonce(q, k, negatives=queue, in_batch=True))
    own = draw((6, 2, 4), 3)
    assert torch.equal(infonce(q, k, negatives=own), infonce(q, k, negatives=own, in_batch=False))


def test_options_that_change_nothing_are_infonce():
    q, k, queue, own = draw((6, 4), 0), draw((6, 4), 1), draw((5, 4), 2), draw((6, 2, 4), 3)
    plain = infonce(q, k)
    for same in (
        {"positives": torch.arange(6)[:, None]}, {"labels": torch.arange(6)}, {"row_ids": torch.arange(6)},
        {"mask": torch.eye(6, dtype=torch.bool)}, {"hardness": 1e-12}, {"label_smoothing": 1e-14},
    ):  # fmt: skip
        torch.testing.assert_close(infonce(q, k, **same), plain)
    masked = infonce(q, k, negatives=own, mask=torch.zeros(6, 2, dtype=torch.bool))
    torch.testing.assert_close(masked, infonce(q, k, negatives=own))
    torch.testing.assert_close(infonce(q, k, negatives=own, in_batch=False, row_ids=None), infonce(q, k, negatives=own))
    # the keys of the batch as everyone's own negatives
    others = torch.stack([torch.cat([k[:i], k[i + 1 :]]) for i in range(6)])
    torch.testing.assert_close(infonce(q, k, negatives=others), plain)
    together = infonce(q, k, negatives=queue.expand(6, 5, 4), in_batch=True)
    torch.testing.assert_close(together, infonce(q, k, negatives=queue))


REFUSED = [
    ({"labels": LABELS, "positives": LABELS}, "positives and labels"),
    ({"key_labels": LABELS}, "key_labels without labels"),
    ({"key_ids": LABELS}, "key_ids without row_ids"),
    ({"in_batch": False}, "in_batch=False without negatives"),
    ({"in_batch": False, "queue": True, "labels": LABELS}, "without the keys of the batch"),
    ({"in_batch": False, "queue": True, "symmetric": True}, "without the keys of the batch"),
    ({"in_batch": False, "own": True, "row_ids": LABELS}, "row_ids with negatives of each row's own"),
    ({"exclude_self": True, "row_ids": LABELS}, "exclude_self without positives or labels"),
    ({"symmetric": True, "queue": True, "decoupled": True}, "symmetric with negatives"),
    ({"symmetric": True, "positives": LABELS[:, None]}, "symmetric with negatives, positives"),
    ({"symmetric": True, "decoupled": True, "k": draw((7, 4), 1)}, "6 rows, 7 keys"),
    ({"symmetric": True, "labels": LABELS, "key_labels": LABELS[:5], "k": draw((5, 4), 1)}, "6 rows, 5 keys"),
    ({"label_smoothing": 0.1, "decoupled": True}, "label_smoothing with decoupled"),
    ({"label_smoothing": 0.1, "hardness": 1.0}, "label_smoothing with decoupled or hardness"),
    ({"label_smoothing": 1.5}, "label_smoothing = 1.5"),
    ({"hardness": -1.0}, "hardness = -1.0"),
    ({"hardness": math.nan}, "hardness = nan"),
    ({"hardness": torch.tensor([0.5, 1.0])}, "hardness = tensor"),
    ({"label_smoothing": torch.tensor([0.5, 1.0])}, "label_smoothing = tensor"),
    ({"labels": LABELS[:5]}, r"labels \[5\]"),
    ({"labels": LABELS.float()}, "labels .* of torch.float32"),
    ({"labels": [0, 1, 2, 3, 4, 5]}, "labels, a list"),
    ({"labels": LABELS, "queue": True}, "no key_labels"),
    ({"row_ids": LABELS, "queue": True}, "no key_ids"),
    ({"mask": torch.zeros(6, 6)}, r"mask \[6, 6\] of torch.float32"),
    ({"mask": torch.zeros(6, 5, dtype=torch.bool)}, r"mask \[6, 5\]"),
    ({"mask": torch.zeros(6, 6, dtype=torch.bool), "queue": True}, r"bool \[6, 11\]"),
    ({"positives": LABELS[:, None].int()}, "positives .* of torch.int32"),
    ({"positives": LABELS[:, None] + 4}, "positives from 4 to 6"),
    ({"positives": LABELS[:, None] - 2}, "positives from -2 to 0"),
    ({"positives": LABELS - 1, "decoupled": True}, "positives from -1 to 1"),
    ({"positives": torch.arange(6)[:, None], "exclude_self": True}, "row 0 as its own positive"),
    ({"in_batch": False, "queue": True, "k": draw((7, 4), 1)}, r"\[6, 4\] and \[7, 4\]"),
    ({"decoupled": True, "k": draw((5, 4), 1)}, "6 rows of q, 5 keys"),
    ({"decoupled": True, "negatives": draw((0, 4), 1)}, "at least one"),
    ({"decoupled": True, "reduction": "avg"}, "reduction 'avg'"),
    ({"positives": [0, 1, 2, 3, 4, 5]}, "positives, a list"),
    ({"positives": [0, 1, 2, 3, 4, 5], "gather": True}, "positives, a list"),
    ({"negatives": draw((4,), 1)}, r"\[4\] and \[6, 4\]"),
    ({"k": draw((0, 4), 1), "labels": LABELS, "key_labels": LABELS[:0]}, "at least one key"),
]


@pytest.mark.parametrize("options, match", REFUSED)
def test_refused_in_one_line(options, match):
    options = {"k": draw((6, 4), 1)} | options
    if options.pop("queue", False):
        options["negatives"] = draw((5, 4), 2)
    if options.pop("own", False):
        options["negatives"] = draw((6, 2, 4), 2)
    with pytest.raises(EstimatorError, match=match) as caught:
        infonce(draw((6, 4), 0), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("gradient", [True, False])
def test_scores_of_minus_infinity_are_not_taken_for_a_row_without_negatives(backend, reduction, gradient):
    """Embeddings that have become infinite: the row's loss was 0, or it was left out, and training went on."""
    q, k, queue = draw((4, 3), 0), draw((4, 3), 1).abs(), -draw((2, 3), 2).abs()
    q[0] = math.inf  # its positive scores inf, and all negatives -inf
    q.requires_grad_(gradient)
    with use_backend(backend):
        for options in ({}, {"decoupled": True}):
            found = infonce(q, k, negatives=queue, in_batch=False, reduction=reduction, **options)
            if reduction == "none":
                assert found.isfinite().tolist() == [False, True, True, True]
            else:
                assert not found.isfinite()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("gradient", [True, False])
def test_nan_is_not_taken_for_a_row_without_negatives(backend, reduction, gradient):
    q, k, queue = draw((4, 3), 0), draw((4, 3), 1), draw((2, 3), 2)
    one_of_each = draw((4, 1, 3), 3)
    q[0], queue[0], one_of_each[0] = math.nan, math.nan, math.nan
    q.requires_grad_(gradient)
    with use_backend(backend):
        decoupled = infonce(q, k, decoupled=True, reduction=reduction)
        own = infonce(k, k, negatives=one_of_each, in_batch=False, decoupled=True, reduction=reduction)
        moco = infonce(k, k, negatives=queue[:1], in_batch=False, hardness=0.5, reduction=reduction)
    for found in (decoupled, own):
        if reduction == "none":
            assert found.isnan().tolist() == [True, False, False, False]
        else:
            assert found.isnan()
    assert moco.isnan().all()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"bias": math.inf}, "bias inf"),
        ({"bias": torch.zeros(2)}, "bias torch.float32"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"negatives": draw((6, 2, 4), 2)}, "which all rows share"),
        ({"labels": LABELS, "positives": LABELS}, "positives and labels"),
        ({"reduction": "avg"}, "reduction 'avg'"),
        ({"positives": [0, 1, 2, 3, 4, 5]}, "positives, a list"),
    ],
)
def test_siglip_refuses_in_one_line(options, match):
    with pytest.raises(EstimatorError, match=match):
        siglip(draw((6, 4), 0), draw((6, 4), 1), **options)


@pytest.mark.parametrize("name", ["labels", "several positives", "queue alone, ids", "mask", "siglip, labels"])
def test_opcheck(name, monkeypatch):
    """Of the operations that the losses call, with the arguments that they are called with."""
    called, original = {}, registry._run
    names = {id(operation): n for n, operation in registry._operations.items()}

    def spy(operation, *args):
        called.setdefault(names[id(operation)], args)
        return original(operation, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run", spy)
        for reduction in ("mean", "none"):
            function, inputs = contrastive_case(name, 7, 4, reduction)
            evaluate(function, cast(inputs, torch.float32), "cpu")
    assert set(called) == {"contrastive_statistics", "contrastive_gradients", "contrastive_fused"}
    for operation, args in called.items():
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(getattr(torch.ops.engine, operation), args)


@pytest.mark.parametrize("name", ["labels", "queue alone, ids", "own negatives and the batch", "siglip"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_forward_and_backward(name, reduction):
    torch._dynamo.reset()
    function, inputs = contrastive_case(name, 9, 4, reduction)
    leaves = [x.float().requires_grad_() for x in inputs.values()]
    call = by_position(function, inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves), call(*leaves)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(v.sum(), leaves) for v in (found, expected))
    for f, e in zip(*grads, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("name", ["labels", "mask and ids", "hard", "queue alone", "siglip"])
def test_bitwise_the_same_three_times(name):
    for reduction in ("mean", "none"):
        function, inputs = contrastive_case(name, 130, 16, reduction)
        first, *others = (evaluate(function, cast(inputs, torch.float32), "cpu") for _ in range(3))
        for other in others:
            assert torch.equal(other.value, first.value)
            assert all(torch.equal(other.grads[n], g) for n, g in first.grads.items())


def largest_allocation(run) -> int:
    with profile(profile_memory=True) as found:
        run()
    return max(e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_matrix_of_scores_is_kept(reduction, monkeypatch):
    """With blocks of 16 KiB no allocation is of the order of B · M, labels and ids included."""
    monkeypatch.setattr(blocks_of, "BLOCK_BYTES", 16 << 10)
    q, k = (draw((500, 8), s).float().requires_grad_() for s in (0, 1))
    labels, ids = torch.arange(500) % 20, torch.arange(500) % 150
    for options in ({"labels": labels, "row_ids": ids}, {"decoupled": True}, {"hardness": 1.0, "labels": labels}):
        most = largest_allocation(lambda o=options: infonce(q, k, reduction=reduction, **o).sum().backward())
        assert most < 500 * 500 // 4
    assert (
        largest_allocation(lambda: siglip(q, k, labels=labels, reduction=reduction).sum().backward()) < 500 * 500 // 4
    )
    with use_backend("reference"):
        assert largest_allocation(lambda: infonce(q, k, labels=labels).backward()) >= 4 * 500 * 500


def test_own_negatives_are_not_copied(monkeypatch):
    monkeypatch.setattr(autograd, "CHUNK_BYTES", 16 << 10)
    q, k, own = draw((64, 32), 0).float(), draw((64, 32), 1).float(), draw((64, 50, 32), 2).float()
    q.requires_grad_()
    for options in ({"in_batch": True}, {"decoupled": True}):
        most = largest_allocation(lambda o=options: infonce(q, k, negatives=own, **o).backward())
        assert most < own.numel() * 4 // 4


@pytest.mark.parametrize("groups", [1, 2])
def test_many_own_negatives_are_taken_a_few_rows_at_a_time(groups, monkeypatch):
    """The plain call, too: beyond a chunk the same losses and gradients, without copies of the negatives."""
    inputs = [draw((groups, 64, 32), 0), draw((groups, 64, 32), 1), draw((groups, 64, 50, 32), 2)]
    leaves = [(x if groups > 1 else x[0]).requires_grad_() for x in inputs]
    plain = infonce(leaves[0], leaves[1], negatives=leaves[2], temperature=0.5).sum()
    monkeypatch.setattr(autograd, "CHUNK_BYTES", 16 << 10)
    monkeypatch.setattr("engine.kernels.mi_bounds.op.CHUNK_BYTES", 0)
    found = infonce(leaves[0], leaves[1], negatives=leaves[2], temperature=0.5).sum()
    torch.testing.assert_close(found, plain)
    for f, e in zip(*(torch.autograd.grad(v, leaves) for v in (found, plain)), strict=True):
        torch.testing.assert_close(f, e)
    q, k, own = (x.detach() for x in leaves)
    most = largest_allocation(lambda: infonce(q.clone().requires_grad_(), k, negatives=own).sum().backward())
    assert most < own.numel() * own.element_size() // 4


def test_every_case_of_infonce_leaves_the_fast_path(monkeypatch):
    called = []
    monkeypatch.setattr("engine.kernels.mi_bounds.op.extended_infonce", lambda *a: called.append(a) or torch.zeros(()))
    for name in INFONCE:
        function, inputs = contrastive_case(name, 7, 4)
        function(**inputs)
    assert len(called) == len(INFONCE)


def test_what_is_no_negative():
    """A row itself, a row of its id, and what the mask says: each leaves out a pair by itself."""
    ids, mask = torch.tensor([5, 6, 5]), torch.tensor([[False, True, False], [False] * 3, [False] * 3])
    same_id = [[True, False, True], [False, True, False], [True, False, True]]

    def left_out(**given):
        return Pairs(**given).left_out(0, 3, 3, torch.device("cpu"))

    assert left_out() is None and left_out(mask=mask).tolist() == mask.tolist()
    assert left_out(exclude_self=True).tolist() == torch.eye(3, dtype=torch.bool).tolist()
    assert left_out(row_ids=ids, key_ids=ids, exclude_self=True).tolist() == same_id
    same_id[0][1] = True
    assert left_out(row_ids=ids, key_ids=ids, mask=mask, exclude_self=True).tolist() == same_id
    assert Pairs(mask=mask).left_out(0, 1, 3, torch.device("cpu")).tolist() == [[False, True, False]]
