"""A transformer layer's operations: attention; dropout, residual and LayerNorm in one; bias and GELU in one."""

import itertools

import pytest
import torch

from engine.kernels import registry
from engine.kernels.dropout import reference as masks
from engine.kernels.registry import use_backend
from engine.kernels.transformer import (
    add_norm,
    attention,
    attention_fits,
    bias_gelu,
    draw_seed,
    embed_norm,
    parts_of,
    plan,
)


def seed():
    """Made anew in every test: on the device that its tensors are made on."""
    return torch.tensor([2**62 + 12345])


PARTS = [dict(zip(("bias", "residual"), given, strict=True)) for given in itertools.product([True, False], repeat=2)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(n=5, c=7, bias=True, residual=True, low=torch.float64, full=torch.float64):
    """x, weight, shift and the optional tensors of add_norm, all with gradients."""
    tensors = {
        "x": draw(n, c, dtype=low),
        "weight": 1 + draw(c, seed=1, dtype=full),
        "shift": draw(c, seed=2, dtype=full),
    }
    if bias:
        tensors["bias"] = draw(c, seed=3, dtype=full)
    if residual:
        tensors["residual"] = draw(n, c, seed=4, dtype=full)
    return {name: t.requires_grad_() for name, t in tensors.items()}


def results(tensors, run):
    """The outputs of run(**tensors), and the gradients of a weighted sum of them."""
    outputs = [o for o in run(**tensors) if o is not None]
    loss = sum((o.double() * draw(*o.shape, seed=9 + i)).sum() for i, o in enumerate(outputs))
    return outputs + list(torch.autograd.grad(loss, list(tensors.values())))


def norm(**settings):
    return lambda **tensors: add_norm(seed=seed(), eps=1e-12, number=3, **tensors, **settings)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_kernel_equals_formula(parts, after, p):
    found, expected = [], []
    for backend, into in (("cpu", found), ("reference", expected)):
        with use_backend(backend):
            into += results(case(**parts), norm(p=p, after=after))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_what_it_computes():
    tensors = case(40, 30)
    x, weight, shift, bias, residual = tensors.values()
    kept = masks.keep(x.numel(), seed() + 3, 0.25).view(x.shape)
    assert 0.6 < kept.float().mean() < 0.9
    total = torch.where(kept, (x + bias) / 0.75, 0.0) + residual
    expected = torch.nn.functional.layer_norm(total, (30,), weight, shift, 1e-12)
    torch.testing.assert_close(norm(p=0.25)(**tensors)[0], expected)


def test_calls_that_share_a_seed_drop_different_places():
    x = torch.ones(64, 64)
    ones, zeros = torch.ones(64), torch.zeros(64)
    ramp = torch.arange(64.0)
    dropped = [
        add_norm(x + ramp, ones, zeros, seed=seed(), p=0.5, after=True, number=number)[0] == 0 for number in (0, 0, 1)
    ]
    assert torch.equal(dropped[0], dropped[1]) and 0.4 < (dropped[0] != dropped[2]).float().mean() < 0.6


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_types(low, backend):
    tensors = case(low=low, full=torch.float32)
    with use_backend(backend):
        y, small = norm(p=0.2, low=low)(**tensors)
        assert (y.dtype, small.dtype) == (torch.float32, low)
        torch.testing.assert_close(small, y.to(low))
        found = results(tensors, norm(p=0.2, low=low))[2:]
        assert bias_gelu(tensors["x"], tensors["bias"]).dtype == low
    assert [g.dtype for g in found] == [t.dtype for t in tensors.values()]
    exact = results({k: t.detach().double().requires_grad_() for k, t in tensors.items()}, norm(p=0.2, low=low))[2:]
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("p, after", [(0.0, False), (0.4, False), (0.4, True)])
def test_gradcheck(p, after):
    tensors = case(4, 5)
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *t: norm(p=p, after=after)(**dict(zip(names, t, strict=True)))[0], list(tensors.values())
    )


def test_gradcheck_of_gelu():
    assert torch.autograd.gradcheck(bias_gelu, [draw(4, 5).requires_grad_(), draw(5, seed=1).requires_grad_()])


def test_gelu_is_torchs():
    x, bias = draw(6, 9).requires_grad_(), draw(9, seed=1).requires_grad_()
    for f, e in zip(
        results({"x": x, "bias": bias}, lambda x, bias: [bias_gelu(x, bias)]),
        results({"x": x, "bias": bias}, lambda x, bias: [torch.nn.functional.gelu(x + bias)]),
        strict=True,
    ):
        torch.testing.assert_close(f, e)


def attention_case(batch=3, length=5, heads=2, d=4, low=torch.float64, full=torch.float64):
    """qkv and the three biases, with gradients."""
    c = heads * d
    biases = {name: draw(c, seed=i, dtype=full) for i, name in enumerate(("q_bias", "k_bias", "v_bias"))}
    tensors = {"qkv": draw(batch * length, 3 * c, seed=3, dtype=low), **biases}
    return {name: t.requires_grad_() for name, t in tensors.items()}


def key_mask(batch=3, length=5, dtype=torch.float64, rows=1):
    """Texts shorter and shorter; with rows, also what queries see differs."""
    hidden = torch.arange(length) >= length - torch.arange(batch)[:, None].clamp(max=length - 1)
    if rows > 1:
        hidden = hidden[:, None] | (torch.arange(length) > torch.arange(rows)[:, None])
        hidden[..., 0] = False
    return torch.zeros(batch, 1, rows, length, dtype=dtype).masked_fill(hidden.view(batch, 1, rows, length), -30000.0)


def attend(mask, heads=2, p=0.0):
    return lambda **tensors: [attention(**tensors, mask=mask, heads=heads, seed=seed(), p=p, number=5)]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [1, 5])
def test_attention_equals_its_formula(rows, p):
    found, expected = [], []
    for backend, into in (("cpu", found), ("reference", expected)):
        with use_backend(backend):
            into += results(attention_case(), attend(key_mask(rows=rows), p=p))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("width", [4, 33])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_mask_of_integers_says_which_keys_are_seen(backend, width):
    mask = key_mask()
    with use_backend(backend):
        found = results(attention_case(d=width), attend((mask == 0).long() * 3))
        expected = results(attention_case(d=width), attend(mask))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("rows", [1, 5])
def test_attention_is_torchs(rows):
    def torchs(qkv, q_bias, k_bias, v_bias):
        x = (qkv + torch.cat([q_bias, k_bias, v_bias])).view(3, 5, 3, 2, 4)
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=key_mask(rows=rows))
        return [out.transpose(1, 2).reshape(15, 8)]

    found = results(attention_case(), attend(key_mask(rows=rows)))
    for f, e in zip(found, results(attention_case(), torchs), strict=True):
        torch.testing.assert_close(f, e)


def test_attention_drops_weights():
    """With the unit matrix as values the output is the weights: dropped ones are 0, the others larger."""
    tensors = {k: t.detach() for k, t in attention_case(200, 4, 2, 4).items()}
    tensors["qkv"][:, 16:] = torch.eye(4, dtype=torch.float64).repeat(200, 2)
    tensors["v_bias"].zero_()
    mask = torch.zeros(200, 1, 1, 4)
    (whole,), (dropped,) = attend(mask)(**tensors), attend(mask, p=0.25)(**tensors)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)
    assert 0.7 < kept.double().mean() < 0.8


def test_gradcheck_of_attention():
    tensors = attention_case(2, 3, 2, 2)
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *t: attend(key_mask(2, 3), p=0.3)(**dict(zip(names, t, strict=True)))[0], list(tensors.values())
    )


def test_what_fits_attentions_kernel():
    assert attention_fits(torch.bfloat16, 64, 64) and attention_fits(torch.float16, 1, 8)
    for dtype, length, width in ((torch.float32, 8, 8), (torch.float16, 65, 8), (torch.float16, 8, 65)):
        assert not attention_fits(dtype, length, width)


@pytest.mark.parametrize("rows", [1, 5])
def test_attention_is_registered(rows):
    tensors = [t.detach() for t in attention_case(low=torch.bfloat16, full=torch.float32).values()]
    rest = (key_mask(rows=rows, dtype=torch.bfloat16), seed(), 0.3, 2, 4)
    torch.library.opcheck(torch.ops.engine.attention.default, (*tensors, *rest))
    grad = torch.randn(15, 8).bfloat16()
    for sums in ((True, False), (True, True), (False, False)):
        torch.library.opcheck(torch.ops.engine.attention_backward.default, (grad, *tensors, *rest, *sums))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"heads": 3}, "3 heads"),
        ({"mask": torch.zeros(3, 1, 1, 4)}, "fit together"),
        ({"mask": torch.zeros(3, 1, 2, 5)}, "fit together"),
        ({"mask": torch.ones(3, 1, 5, 5, dtype=torch.int64)}, "fit together"),
        ({"k_bias": torch.zeros(3)}, "k_bias"),
        ({"p": 0.5}, "needs a seed"),
    ],
)
def test_bad_arguments_of_attention(change, words):
    arguments = {**attention_case(), "mask": key_mask(), "heads": 2, **change}
    with pytest.raises(ValueError, match=words):
        attention(**arguments)


def test_one_output_is_enough():
    tensors = case(full=torch.float32, low=torch.bfloat16)
    both = norm(low=torch.bfloat16)(**tensors)
    for part in both:
        assert torch.autograd.grad(part.sum(), tensors["residual"], retain_graph=True)[0].isfinite().all()


def test_gradients_that_nobody_wants_are_not_computed():
    tensors = case()
    for name in ("weight", "shift", "bias"):
        tensors[name].requires_grad_(False)
    asked = []

    def spy(name, *args):
        asked.append((name, registry.launches(name, *args)))
        return registry.call(name, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.kernels.transformer.op.call", spy)
        norm(p=0.1)(**tensors)[0].sum().backward()
        bias_gelu(tensors["x"], tensors["bias"]).sum().backward()
        results(case(), norm(p=0.1))
    assert asked == [
        ("add_norm", 1), ("add_norm_backward", 1), ("bias_gelu", 1), ("bias_gelu_backward", 1), ("add_norm", 1),
        ("add_norm_backward", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_registered(parts):
    tensors = {k: t.detach() for k, t in case(low=torch.bfloat16, full=torch.float32, **parts).items()}
    x, weight, shift, bias, residual = (tensors.get(k) for k in ("x", "weight", "shift", "bias", "residual"))
    ops = torch.ops.engine
    settings = (0.3, False, 1e-12, 2)
    torch.library.opcheck(ops.add_norm.default, (x, bias, residual, weight, shift, seed(), *settings, torch.bfloat16))
    for apart in (False, True):
        back = (x.float(), x, x, bias, residual, weight, seed(), *settings, True, apart)
        torch.library.opcheck(ops.add_norm_backward.default, back)
        if bias is not None:
            torch.library.opcheck(ops.bias_gelu_backward.default, (x, x, bias, True, apart))
    if bias is not None:
        torch.library.opcheck(ops.bias_gelu.default, (x, bias))


def test_embeddings_and_sums_of_parts_are_registered():
    ops, ids = torch.ops.engine, torch.tensor([[1, 3], [3, 0], [1, 2]])
    tables = [draw(size, 8, seed=size, dtype=torch.float32) for size in (5, 4, 2)]
    for position in (None, torch.tensor([[0, 1], [3, 0], [0, 1]])):
        torch.library.opcheck(ops.embed.default, (ids, position, *tables))
        arguments = (draw(6, 8, dtype=torch.float32), ids, position, draw(2, 3, 8, dtype=torch.float32), 5, 4, 2, 0)
        torch.library.opcheck(ops.embed_backward.default, arguments)
    torch.library.opcheck(ops.sum_parts.default, (draw(3, 2, 4), [draw(3, 2, 4, seed=1)]))
    assert [registry.launches("sum_parts", tables[0], tables[:1] * n) for n in (15, 16)] == [1, 2]


def with_parts(monkeypatch):
    """As if kernels ran: the CPU's host functions take their place."""
    for module in ("op", "embedding"):
        monkeypatch.setattr(f"engine.kernels.transformer.{module}.runs_kernels", lambda x: True)


@pytest.mark.parametrize("frozen", [(), ("weight", "shift"), ("weight", "shift", "bias")])
def test_sums_that_are_put_off_are_the_same(frozen):
    """Of two LayerNorms, a GELU and attention: by one launch for each shape of parts, after everything else."""
    found, expected, asked = [], [], []

    def run(put_off, into):
        n, c = 40, 8
        tensors, other = case(n, c), case(n, c, residual=False)
        tensors |= {f"{name}2": other[name] for name in ("weight", "shift", "bias")}
        biases = {f"b{i}": draw(c, seed=20 + i).requires_grad_() for i in range(3)}
        for name in frozen:
            tensors[name].requires_grad_(False)
        first, second = ([tensors[f"{k}{e}"] for k in ("weight", "shift", "bias")] for e in ("", "2"))
        gelu, given = draw(c, seed=30).requires_grad_(), [*biases.values()]
        groups = [(plan.norm_programs(n, c), first), (plan.norm_programs(n, c), second)]
        groups += [(plan.gelu_programs(n), [gelu]), (8, given)]
        parts = parts_of(groups) if put_off else [None] * 4
        more = {"seed": seed(), "p": 0.3, "number": 3}
        y, _ = add_norm(tensors["x"], *first[:2], bias=first[2], residual=tensors["residual"], parts=parts[0], **more)
        y, _ = add_norm(bias_gelu(y, gelu, parts[2]), *second[:2], bias=second[2], parts=parts[1], **more)
        qkv = torch.cat([y, y * 2, y.sin()], 1)
        y = attention(qkv, *given, torch.zeros(8, 1, 1, 5), heads=2, parts=parts[3])
        wanted = [t for t in (*tensors.values(), *given, gelu) if t.requires_grad]
        into += torch.autograd.grad((y * draw(n, c, seed=40)).sum(), wanted)

    def spy(name, *args):
        asked.append(name)
        return registry.call(name, *args)

    run(False, expected)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("op", "sums"):
            patch.setattr(f"engine.kernels.transformer.{module}.call", spy)
        run(True, found)
    # LayerNorms, GELU and attention are of three shapes
    assert asked[-3:] == ["sum_parts"] * 3 and asked.count("sum_parts") == 3
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_parts_of_what_is_frozen():
    vectors = [torch.ones(3), None]
    assert parts_of([(4, vectors), (2, ())]) == [None, None]
    moving = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert parts_of([(4, [moving])]) == [None]
    nothing, place = parts_of([(4, vectors), (5, [None, moving])])
    assert nothing is None and place.shape == (5, 2, 3)
    slope = draw(5, 2, 3, dtype=torch.float32)
    (place * slope).sum().backward()
    torch.testing.assert_close(moving.grad, slope[:, 1].sum(0))


@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_equal_their_formula(packed, monkeypatch):
    """Tables' gradients, with tokens that repeat and one that gets none; the CPU's functions in the kernels' place."""
    ids = torch.tensor([[7, 3, 3, 0], [7, 5, 0, 0], [3, 3, 9, 1]])
    position = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 0, 1]]) if packed else None
    names, sizes = ("words", "positions", "types"), (11, 6, 2)
    found, expected = [], []
    for parts, into in ((False, expected), (True, found)):
        tables = {name: draw(size, 8, seed=size).requires_grad_() for name, size in zip(names, sizes, strict=True)}
        norm = {"weight": draw(8, seed=1).requires_grad_(), "shift": draw(8, seed=2).requires_grad_()}

        def run(weight, shift, words, positions, types, parts=parts):
            places = parts_of([(plan.norm_programs(12, 8), (weight, shift, None))]) if parts else [None]
            settings = {"seed": seed(), "p": 0.3, "padding": 0, "parts": places[0]}
            return [embed_norm(ids, position, (words, positions, types), weight, shift, **settings)[0]]

        if parts:
            with_parts(monkeypatch)
        into += results(norm | tables, run)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    of_words = found[3]
    assert not of_words[[0, 2, 4]].any() and of_words[[3, 7, 9]].all()


def test_programs_are_balanced():
    """No more rounds than the most programs would take, and no program without a row."""
    for n in (0, 1, 4, 5, 1000, 1024, 1028, 1280, 100_000):
        rows = plan.norm_blocks(384)["ROWS"]
        programs, blocks = plan.norm_programs(n, 384), -(-n // rows)
        assert programs <= min(plan.PROGRAMS, blocks)
        if n:
            rounds = -(-blocks // programs)
            assert rounds == -(-blocks // min(plan.PROGRAMS, blocks)) and (rounds - 1) * programs < blocks
    assert (plan.norm_programs(1280, 384), plan.gelu_programs(1280)) == (160, 40)


def test_compiles_without_graph_breaks():
    tensors = {k: t.detach().requires_grad_() for k, t in case(6, 8, full=torch.float32, low=torch.bfloat16).items()}

    def run(**tensors):
        y, low = norm(p=0.3, low=torch.bfloat16)(**tensors)
        x = torch.cat([low, low, low], 1)
        biases = [tensors[name] for name in ("bias", "weight", "shift")]
        seen = attention(x, *biases, torch.zeros(2, 1, 1, 3), heads=2, seed=seed(), p=0.3)
        return y, seen, bias_gelu(low, tensors["bias"])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for f, e in zip(results(tensors, compiled), results(tensors, run), strict=True):
        torch.testing.assert_close(f, e)


def test_a_seed_comes_from_torchs_generator():
    torch.manual_seed(3)
    first = draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(draw_seed(torch.device("cpu")), first) and first.dtype == torch.int64


@pytest.mark.parametrize(
    "change, words",
    [
        ({"p": 0.5}, "needs a seed"),
        ({"p": 1.0, "seed": seed()}, "p must be"),
        ({"residual": torch.zeros(3, 7)}, "residual"),
        ({"bias": torch.zeros(3)}, "bias"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        add_norm(torch.zeros(5, 7), torch.ones(7), torch.zeros(7), **change)
