"""mi_bounds' Triton kernels against the reference: numbers, bounds of memory, determinism."""

import pytest
import torch

from tests.interpret.guards import BAND, Guards, require_interpreter

require_interpreter()

from engine.kernels.mi_bounds import chunked as kernels
from engine.kernels.mi_bounds.tiles import KINDS
from tests.kernels.mi_cases import (
    BOUNDS,
    INFONCE,
    assert_as_good_as_torch,
    bound_function,
    bound_inputs,
    cast,
    evaluate,
    infonce_case,
)

# below, at and past one tile; 130 is past what one program holds, so that the streaming kernels run
SIZES = (2, 17, 64, 130)


def guarded(function, inputs):
    """`evaluate` on the Triton backend, every input between bands of NaN, every allocation between canaries."""
    with Guards() as guards:
        return evaluate(function, {name: guards.input(x) for name, x in inputs.items()}, "triton")


@pytest.mark.parametrize("embeddings", [True, False], ids=["embeddings", "scores"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds(bound, embeddings):
    for count in SIZES:
        inputs, function = cast(bound_inputs(2, count, 20, embeddings), torch.float32), bound_function(bound, 2)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        plain = evaluate(function, inputs, "reference")
        assert_as_good_as_torch(guarded(function, inputs), plain, exact, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 16, 33, 128, 150, 256])
@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_at_all_sizes(bound, width):
    for count in (3, 63, 65, 100, 257):
        inputs, function = cast(bound_inputs(2, count, width, True), torch.float32), bound_function(bound, 2)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        plain = evaluate(function, inputs, "reference")
        assert_as_good_as_torch(guarded(function, inputs), plain, exact, 2e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", INFONCE)
def test_infonce(name, reduction):
    for rows in (7, 70, 130):
        function, inputs = infonce_case(name, rows, 20, reduction)
        inputs = cast(inputs, torch.float32)
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        plain = evaluate(function, inputs, "reference")
        assert_as_good_as_torch(guarded(function, inputs), plain, exact, 2e-5)


@pytest.mark.parametrize("bound", ["infonce", "tuba", "js", "interpolate"])
def test_embeddings_of_16_bits(bound):
    for count in (17, 130):
        inputs, function = bound_inputs(2, count, 20, True), bound_function(bound, 2)
        inputs = {name: x.to(torch.bfloat16 if name in "qk" else torch.float32) for name, x in inputs.items()}
        exact = evaluate(function, cast(inputs, torch.float64), "reference")
        plain = evaluate(function, inputs, "reference")
        # the interpreter truncates to 16 bits where the GPU rounds: one unit in the last place
        assert_as_good_as_torch(guarded(function, inputs), plain, exact, 2**-7)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_of_the_interpolation(alpha):
    q, k, a = bound_inputs(1, 40, 20, True)["q"], bound_inputs(1, 40, 20, True)["k"], torch.zeros(1, 40)
    scale, grad = torch.ones(()), torch.ones(1)
    from engine.kernels.mi_bounds import cpu

    mine, theirs = kernels.mixture(q.float(), k.float(), scale, a, alpha), cpu.mixture(q, k, scale, a.double(), alpha)
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    rest, weight = theirs[1], torch.full((1, 40), -1.0, dtype=torch.float64)
    mine = kernels.mixture_gradients(q.float(), k.float(), scale, a, alpha, rest.float(), weight.float(), grad)
    theirs = cpu.mixture_gradients(q, k, scale, a.double(), alpha, rest, weight, grad.double())
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [100.0, -100.0, 1e4])
@pytest.mark.parametrize("bound", BOUNDS)
def test_large_scores(bound, size):
    eye = torch.eye(16)
    inputs = {"scores": (size * eye + bound_inputs(1, 16, 4, False)["scores"][0].float())[None]}
    function = bound_function(bound, 1)
    exact = evaluate(function, cast(inputs, torch.float64), "reference")
    found = guarded(function, inputs)
    torch.testing.assert_close(found.value, exact.value, rtol=1e-5, atol=1e-5)
    # e^(S - L) of numbers of this size has a relative error of size * 2^-24
    size = max(1, abs(size)) * exact.grads["scores"].abs().max().item()
    torch.testing.assert_close(found.grads["scores"], exact.grads["scores"], rtol=1e-4, atol=max(size * 2**-23, 1e-30))


def test_bitwise_deterministic():
    for name in ("square", "symmetric", "positives and negatives"):
        for rows in (40, 130):
            function, inputs = infonce_case(name, rows, 20, "mean")
            inputs = cast(inputs, torch.float32)
            first = evaluate(function, inputs, "triton")
            for _ in range(2):
                again = evaluate(function, inputs, "triton")
                assert torch.equal(again.value, first.value)
                assert all(torch.equal(again.grads[n], g) for n, g in first.grads.items())


def test_kinds_are_the_kernels_constants():
    assert set(KINDS.values()) == {0, 1, 2}


class TestGuards:
    """The guards find what they are for."""

    def test_a_load_past_the_end_poisons(self):
        with Guards() as guards:
            x = guards.input(torch.ones(3))
            assert x.as_strided((4,), (1,)).isnan()[3] and x.as_strided((1,), (1,), BAND - 1).isnan()

    def test_gaps_between_rows_are_poisoned(self):
        with Guards() as guards:
            x = guards.input(torch.ones(3, 4)[:, :2])
            assert x.as_strided((3, 4), (4, 1), BAND)[:2, 2:].isnan().all() and torch.equal(x, torch.ones(3, 2))

    def test_what_is_not_written_is_nan(self):
        with Guards():
            assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2, 2)).isnan().all()
            assert torch.ones(1).new_empty(2, 3).isnan().all()

    def test_a_store_past_the_end_is_found(self):
        with pytest.raises(AssertionError, match="past the end of an allocation"), Guards():
            torch.empty(3).as_strided((4,), (1,), BAND)[3] = 0.0

    def test_a_store_before_the_start_is_found(self):
        with pytest.raises(AssertionError, match="before an allocation"), Guards():
            torch.empty(3).as_strided((1,), (1,), BAND - 1)[0] = 0.0

    def test_a_changed_input_is_found(self):
        with pytest.raises(AssertionError, match="an input"), Guards() as guards:
            guards.input(torch.ones(3))[1] = 2.0

    def test_torch_is_as_before_afterwards(self):
        before = torch.empty, torch.empty_like, torch.Tensor.new_empty
        with pytest.raises(ValueError), Guards():
            raise ValueError
        assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == before
