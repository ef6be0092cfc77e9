import math

import pytest
import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.mi_bounds import (
    BOUNDS,
    bound_value,
    leave_one_out,
    update_log_ema,
)
from engine.kernels.mi_bounds.reference import infonce_of_scores
from engine.mimrl.published import published_bound

FORMULAS = (bound_value, published_bound)
OWN_GRADIENT = ("infonce", "dv", "tuba", "nwj", "js_fgan", "interpolate")


def draw(count: int, scale: float = 1.5, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(count, count, generator=generator, dtype=torch.float64)
    return scores.to(dtype), torch.randn(count, 1, generator=generator, dtype=torch.float64).to(dtype)


def by_definition(s: Tensor, bound: str, a: Tensor, alpha: float, tau: float) -> Tensor:
    """The textbook formulas, one loop a sum, linear domain: right for small fp64 scores."""
    b = len(s)
    pairs = [(i, j) for i in range(b) for j in range(b) if i != j]
    d = s.diagonal().mean()
    mean_exp = sum(s[i, j].exp() for i, j in pairs) / len(pairs)
    if bound == "infonce":
        return sum((s[i, i].exp() / s[i].exp().mean()).log() for i in range(b)) / b
    if bound in ("dv", "mine"):
        return d - mean_exp.log()
    if bound == "nwj":
        return d - mean_exp / math.e
    if bound == "js":
        return 1 + d - mean_exp
    if bound == "tuba":
        return 1 + (s.diagonal() - a[:, 0]).mean() - sum((s[i, j] - a[i, 0]).exp() for i, j in pairs) / len(pairs)
    if bound == "js_fgan":
        joint = sum(-(1 + (-s[i, i]).exp()).log() for i in range(b)) / b
        return joint - sum((1 + s[i, j].exp()).log() for i, j in pairs) / len(pairs)
    if bound == "smile":
        return d - (sum(s[i, j].clamp(-tau, tau).exp() for i, j in pairs) / len(pairs)).log()

    def log_mixture(i: int, j: int) -> Tensor:
        others = sum(s[i, k].exp() for k in range(b) if k != j) / (b - 1)
        return (alpha * others + (1 - alpha) * a[i, 0].exp()).log()

    joint = sum(1 + s[i, i] - log_mixture(i, j) for i, j in pairs) / len(pairs)
    return joint - sum((s[i, j] - log_mixture(i, i)).exp() for i, j in pairs) / len(pairs)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("count", [2, 3, 9])
def test_value_is_the_definition(bound: str, count: int):
    scores, log_baseline = draw(count)
    value, surrogate = bound_value(scores, bound, log_baseline, alpha=0.3, smile_tau=0.7)
    expected = by_definition(scores, bound, log_baseline, 0.3, 0.7)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    assert surrogate == value and not value.requires_grad


@pytest.mark.parametrize("bound", OWN_GRADIENT)
def test_gradcheck(bound: str):
    scores, log_baseline = draw(6)
    scores.requires_grad_()
    log_baseline.requires_grad_(bound in ("tuba", "interpolate"))

    def surrogate(scores: Tensor, log_baseline: Tensor) -> Tensor:
        return bound_value(scores, bound, log_baseline, alpha=0.2)[1]

    assert torch.autograd.gradcheck(surrogate, (scores, log_baseline))


@pytest.mark.parametrize("bound", ("js", "smile"))
@pytest.mark.parametrize("formula", FORMULAS)
def test_js_and_smile_take_the_gradient_of_js_fgan(bound: str, formula):
    scores, _ = draw(6)
    scores.requires_grad_()
    own = torch.autograd.grad(formula(scores, bound)[1], scores)[0]
    fgan = torch.autograd.grad(bound_value(scores, "js_fgan")[1], scores)[0]
    torch.testing.assert_close(own, fgan)


@pytest.mark.parametrize("scale", [0.1, 3, 50, 1e4])
@pytest.mark.parametrize("count", [2, 17, 64])
def test_ceilings(scale: float, count: int):
    for seed in range(5):
        scores, log_baseline = draw(count, scale, seed, torch.float32)
        for extra in (0.0, scale):  # with dominant joint scores, and without
            raised = scores + extra * torch.eye(count)
            assert bound_value(raised, "infonce")[0] <= math.log(count) + 1e-6
            for alpha in (0.01, 0.5, 1.0):
                value = bound_value(raised, "interpolate", log_baseline, alpha=alpha)[0]
                assert value <= 1 + math.log((count - 1) / alpha) + 1e-5


def test_ceilings_are_reached():
    scores = 300 * torch.eye(16)
    assert bound_value(scores, "infonce")[0].item() == pytest.approx(math.log(16), abs=1e-6)
    value = bound_value(scores, "interpolate", torch.full((16, 1), 100.0), alpha=0.25)[0].item()
    assert value == pytest.approx(1 + math.log(15 / 0.25), abs=1e-5)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("bound", ("dv", "infonce", "mine"))
def test_shift_by_100(bound: str, formula):
    scores, _ = draw(32, dtype=torch.float32)
    value, shifted = formula(scores, bound)[0], formula(scores + 100, bound)[0]
    torch.testing.assert_close(shifted, value, rtol=0, atol=2e-5)


def test_shift_moves_nwj_to_minus_infinity_and_smile_up():
    scores, _ = draw(32, dtype=torch.float32)
    assert bound_value(scores + 100, "nwj")[0] == -math.inf
    assert bound_value(scores + 100, "js")[0] == -math.inf
    moved = bound_value(scores + 3, "smile", smile_tau=1)[0] - bound_value(scores, "smile", smile_tau=1)[0]
    assert moved > 1  # not shift invariant


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size", [1e3, 1e10, 1e30])
def test_huge_scores_give_no_nan(bound: str, size: float):
    for scores in (size * torch.eye(8), -size * torch.eye(8), size * draw(8, dtype=torch.float32)[0]):
        value, surrogate = bound_value(scores, bound, torch.zeros(8, 1))
        assert not value.isnan() and not surrogate.isnan()


@pytest.mark.parametrize("bound", BOUNDS)
def test_infinite_diagonal_gives_no_nan(bound: str):
    scores, log_baseline = draw(8, dtype=torch.float32)
    scores.diagonal().fill_(math.inf)
    expected = {"infonce": math.log(8), "js_fgan": None, "interpolate": None}.get(bound, math.inf)
    value = bound_value(scores, bound, log_baseline)[0]
    assert value.isfinite() if expected is None else value.item() == pytest.approx(expected)
    scores.diagonal().fill_(-math.inf)
    if bound != "interpolate":
        assert bound_value(scores, bound, log_baseline)[0] == -math.inf


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_order_of_samples_does_not_matter(bound: str, formula):
    scores, log_baseline = draw(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    value = formula(scores, bound, log_baseline)[0]
    permuted = formula(scores[order][:, order], bound, log_baseline[order])[0]
    torch.testing.assert_close(permuted, value)


@pytest.mark.parametrize("scale", [5.0, 20.0, 100.0])
def test_leave_one_out_keeps_its_digits(scale: float):
    scores, _ = draw(64, scale, dtype=torch.float32)
    exact = torch.stack([scores.double()[:, [k for k in range(64) if k != j]].logsumexp(1) for j in range(64)], dim=1)
    error = (leave_one_out(scores).double() - exact).abs().max().item()
    assert error < 1e-6 * scale + 1e-5
    # the usual formula loses digits here, so that this test would see it
    distance = scores.logsumexp(1, keepdim=True) - scores
    usual = scores + torch.where(distance == 0, 1.0, distance).expm1().log()
    assert not (usual.double() - exact).abs().max().item() <= 10 * error


def test_interpolate_joins_its_two_ends():
    scores, log_baseline = draw(12)
    tuba = bound_value(scores, "tuba", log_baseline)[0]
    torch.testing.assert_close(bound_value(scores, "interpolate", log_baseline, alpha=0.0)[0], tuba)
    leave_out = [
        bound_infonce_without(scores, i, j) for i in range(12) for j in range(12) if i != j
    ]  # K = B - 1: the mean over leaving each product sample out
    multi = bound_value(scores, "interpolate", log_baseline, alpha=1.0)[0]
    torch.testing.assert_close(multi, torch.stack(leave_out).mean())


def bound_infonce_without(scores: Tensor, row: int, column: int) -> Tensor:
    kept = [k for k in range(len(scores)) if k != column]
    return math.log(len(kept)) + scores[row, row] - scores[row, kept].logsumexp(0)


def test_mine_average_is_the_linear_average():
    log_ema, linear = torch.tensor(-math.inf), None
    for seed in range(6):
        scores, _ = draw(8, seed=seed, dtype=torch.float32)
        mean = scores[~torch.eye(8, dtype=torch.bool)].exp().mean().item()
        linear = mean if linear is None else 0.9 * linear + 0.1 * mean
        log_ema = update_log_ema(log_ema, scores, 0.1)
    assert log_ema.exp().item() == pytest.approx(linear, rel=1e-5)


def test_mine_gradient_uses_the_average_and_stays_bounded():
    scores, _ = draw(8)
    scores.requires_grad_()
    log_ema = update_log_ema(torch.tensor(-0.5, dtype=torch.float64), scores, 0.1)
    grad = torch.autograd.grad(bound_value(scores, "mine", log_ema=log_ema)[1], scores)[0]
    weights = scores.detach().exp() / (56 * log_ema.exp())
    torch.testing.assert_close(grad, torch.eye(8) / 8 - weights * (1 - torch.eye(8)), check_dtype=False)

    jumped = (scores.detach().float() + 500).requires_grad_()  # far beyond what e^S can hold
    log_ema = update_log_ema(torch.tensor(0.0), jumped, 0.01)
    grad = torch.autograd.grad(bound_value(jumped, "mine", log_ema=log_ema)[1], jumped)[0]
    assert grad.isfinite().all()
    assert grad.sum().item() == pytest.approx(1 - 1 / 0.01, rel=1e-4)


def test_mine_of_the_first_batch_is_dv():
    scores, _ = draw(8)
    scores.requires_grad_()
    log_ema = update_log_ema(torch.tensor(-math.inf), scores, 0.01)
    mine = torch.autograd.grad(bound_value(scores, "mine", log_ema=log_ema)[1], scores)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(bound_value(scores, "dv")[1], scores)[0])


@pytest.mark.parametrize("bound", BOUNDS)
def test_scores_of_16_bits_are_taken_in_fp32(bound: str):
    scores, log_baseline = draw(16, dtype=torch.bfloat16)
    expected = bound_value(scores.float(), bound, log_baseline.float())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = bound_value(scores, bound, log_baseline)[0]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "scores, bound, log_baseline, told",
    [
        (torch.zeros(1, 1), "dv", None, "a batch of 1"),
        (torch.zeros(3, 4), "dv", None, r"scores \[3, 4\]"),
        (torch.zeros(3, 3), "tuba", torch.zeros(3), r"log_baseline \[3\]"),
        (torch.zeros(3, 3), "kl", None, "an unknown bound"),
    ],
)
def test_misuse_is_told_in_one_line(scores, bound, log_baseline, told):
    with pytest.raises(EstimatorError, match=told) as caught:
        bound_value(scores, bound, log_baseline)
    assert "\n" not in str(caught.value)


def test_infonce_of_scores_is_the_softmax_loss():
    scores = draw(6)[0][:, :4][None].repeat(2, 1, 1) * torch.tensor([1.0, 2.0])[:, None, None]
    positives = torch.tensor([0, 1, 2, 3, 0, 2])
    losses = infonce_of_scores(scores, positives)
    log_p = scores.log_softmax(2)
    expected = torch.stack([-log_p[:, i, p] for i, p in enumerate(positives.tolist())], 1)
    torch.testing.assert_close(losses, expected)
    scores[0, 1, 1] = math.inf
    assert infonce_of_scores(scores, positives)[0, 1] == 0
    square = draw(6)[0]
    assert math.log(6) - infonce_of_scores(square).mean() == bound_value(square, "infonce")[0]
