"""The contrastive losses against what people use, on the same inputs: their formulas, written here from the papers.

Every function of this file is a plain formula over all scores, in fp64, that calls nothing of engine. `EQUAL` is also
what the page's table names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, normalize

from engine.kernels import infonce, siglip, use_backend

# Largest difference of a value or a gradient, relative to the largest element: in fp64, and of the kernels in fp32.
TOLERANCE, TRITON_TOLERANCE = 1e-9, 2e-5
B, D, QUEUE = 12, 5, 20
T = 0.2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def open_clip(image: Tensor, text: Tensor, smoothing: float = 0.0) -> Tensor:
    """ClipLoss (Radford et al. 2021): both cross-entropies of the scores, averaged."""
    scores, target = image @ text.T / T, torch.arange(len(image))
    return sum(cross_entropy(s, target, label_smoothing=smoothing) for s in (scores, scores.T)) / 2


def open_clip_siglip(image: Tensor, text: Tensor) -> Tensor:
    """SigLipLoss (Zhai et al. 2023, algorithm 1): -sum log sigmoid(z (t x . y + b)) / B, t = 1 / T, b = -3."""
    z = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -logsigmoid(z * (image @ text.T / T - 3)).sum() / len(image)


def sup_contrast(z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor:
    """SupConLoss of SupContrast (Khosla et al. 2020, eq. 2, L_out), two views, base temperature = temperature."""
    z, y = torch.cat([z1, z2]), torch.cat([labels, labels])
    total = 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        log_sum = torch.logsumexp(torch.stack([z[i] @ z[a] / T for a in others]), 0)
        positives = [p for p in others if y[p] == y[i]]
        total = total - sum(z[i] @ z[p] / T - log_sum for p in positives) / len(positives)
    return total / len(z)


def sim_clr(z1: Tensor, z2: Tensor) -> Tensor:
    """NTXentLoss of lightly without a memory bank (Chen et al. 2020, eq. 1)."""
    z, n = torch.cat([z1, z2]), len(z1)
    scores = (z @ z.T / T).masked_fill(torch.eye(2 * n, dtype=torch.bool), -math.inf)
    return cross_entropy(scores, (torch.arange(2 * n) + n) % (2 * n))


def moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """MoCo v1 and v2 (He et al. 2020, algorithm 1): logits [q . k, q . queue], the first is right."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / T
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def lightly_memory_bank(z1: Tensor, z2: Tensor, bank: Tensor) -> Tensor:
    """NTXentLoss of lightly with a memory bank: each row's other view against the bank."""
    positive = torch.einsum("nc,nc->n", z1, z2)[:, None]
    negative = torch.einsum("nc,mc->nm", z1, bank)
    return -log_softmax(torch.cat([positive, negative], 1) / T, 1)[:, 0].mean()


def lightly_dcl(z1: Tensor, z2: Tensor) -> Tensor:
    """DCLLoss of lightly (Yeh et al. 2022, eq. 6): the positive is in no denominator; both views' mean."""
    off = ~torch.eye(len(z1), dtype=torch.bool)
    total = 0.0
    for a, b in ((z1, z2), (z2, z1)):
        across, within = a @ b.T / T, a @ a.T / T
        for i in range(len(a)):
            negatives = torch.cat([within[i][off[i]], across[i][off[i]]])
            total = total - across[i, i] + negatives.logsumexp(0)
    return total / (2 * len(z1))


def hard_negatives(z1: Tensor, z2: Tensor, beta: float = 0.7) -> Tensor:
    """HCL (Robinson et al. 2021, algorithm 1) with tau_plus = 0: negatives reweighted by e^(beta s), of mean 1."""
    z, n = torch.cat([z1, z2]), len(z1)
    total = 0.0
    for i in range(2 * n):
        positive = (z[i] @ z[(i + n) % (2 * n)] / T).exp()
        negative = torch.stack([(z[i] @ z[j] / T).exp() for j in range(2 * n) if j % n != i % n])
        importance = negative**beta
        reweighted = (importance * negative).sum() / importance.mean()
        total = total - torch.log(positive / (positive + reweighted))
    return total / (2 * n)


def multiple_negatives(anchor: Tensor, positive: Tensor, hard: Tensor) -> Tensor:
    """MultipleNegativesRankingLoss of sentence-transformers (Henderson et al. 2017), one hard negative per row, which
    all rows share; cosine, scale 1 / T."""
    scores = normalize(anchor, dim=1) @ normalize(torch.cat([positive, hard]), dim=1).T / T
    return cross_entropy(scores, torch.arange(len(anchor)))


def guided_false_negatives(anchor: Tensor, positive: Tensor, guide: Tensor) -> Tensor:
    """Its false-negative mask (GISTEmbed, Solatorio 2024): negatives that a guide finds nearer than the positive are
    left out."""
    scores = normalize(anchor, dim=1) @ normalize(positive, dim=1).T / T
    return cross_entropy(scores.masked_fill(guide > guide.diagonal()[:, None], -math.inf), torch.arange(len(anchor)))


def duplicates_left_out(anchor: Tensor, positive: Tensor, ids: Tensor) -> Tensor:
    """Rows of one id are no negatives of each other."""
    total = 0.0
    for i in range(len(anchor)):
        kept = [j for j in range(len(anchor)) if j == i or ids[j] != ids[i]]
        scores = torch.stack([anchor[i] @ positive[j] / T for j in kept])
        total = total - log_softmax(scores, 0)[kept.index(i)]
    return total / len(anchor)


def own_negatives(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
    """Dense retrieval (Karpukhin et al. 2020): each row's own hard negatives beside the keys of the batch."""
    scores = torch.cat([q @ k.T, torch.einsum("bd,bnd->bn", q, negatives)], 1) / T
    return cross_entropy(scores, torch.arange(len(q)))


def sup_con_with_labels(q: Tensor, k: Tensor, labels: Tensor) -> Tensor:
    """L_out between two sets: the mean over all keys of the row's label."""
    total = 0.0
    for i in range(len(q)):
        log_p = log_softmax(q[i] @ k.T / T, 0)
        total = total - log_p[labels == labels[i]].mean()
    return total / len(q)


Z1, Z2 = normalize(draw(B, D), dim=1), normalize(draw(B, D, seed=1), dim=1)
BANK = normalize(draw(QUEUE, D, seed=2), dim=1)
OWN = normalize(draw(B, 3, D, seed=3), dim=2)
LABELS, IDS = torch.arange(B) % 4, torch.arange(B) % 5
GUIDE = draw(B, B, seed=4)
FALSE = GUIDE.diagonal()[:, None] < GUIDE
VIEWS = {"positives": (torch.arange(2 * B) + B) % (2 * B), "exclude_self": True, "temperature": T}


def both(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.cat([z1, z2])
    return z, z


@dataclass(frozen=True)
class Equal:
    """A row of the page's table.

    Attributes:
        library: whose formula it is.
        call: how the page writes it.
        theirs, ours: functions of the tensors.
        tensors: what gradients are taken of.
    """

    library: str
    call: str
    theirs: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = (Z1, Z2)


EQUAL: dict[str, Equal] = {
    "CLIP": Equal(
        "open_clip `ClipLoss`", "symmetric=True", open_clip, lambda a, b: infonce(a, b, symmetric=True, temperature=T)
    ),
    "CLIP, label smoothing": Equal(
        "`cross_entropy(label_smoothing=)` both ways", "symmetric=True, label_smoothing=.1",
        lambda a, b: open_clip(a, b, 0.1),
        lambda a, b: infonce(a, b, symmetric=True, temperature=T, label_smoothing=0.1),
    ),
    "SigLIP": Equal(
        "open_clip `SigLipLoss`", "siglip(q, k, temperature, bias)", open_clip_siglip,
        lambda a, b: siglip(a, b, T, -3.0),
    ),
    "SupCon, two views": Equal(
        "SupContrast `SupConLoss` (L_out)", "labels=y, exclude_self=True", lambda a, b: sup_contrast(a, b, LABELS),
        lambda a, b: infonce(*both(a, b), labels=torch.cat([LABELS] * 2), exclude_self=True, temperature=T),
    ),
    "SupCon, positives listed": Equal(
        "SupContrast `SupConLoss` (L_out)", "positives=[B, P]", lambda a, b: sup_contrast(a, b, LABELS),
        lambda a, b: infonce(*both(a, b), positives=listed(), exclude_self=True, temperature=T),
    ),
    "SupCon, two modalities": Equal(
        "the paper's L_out", "labels=y", lambda a, b: sup_con_with_labels(a, b, LABELS),
        lambda a, b: infonce(a, b, labels=LABELS, temperature=T),
    ),
    "SimCLR": Equal(
        "lightly `NTXentLoss`", "positives=, exclude_self=True", sim_clr, lambda a, b: infonce(*both(a, b), **VIEWS)
    ),
    "MoCo v1, v2": Equal(
        "MoCo's logits", "negatives=queue, in_batch=False", moco,
        lambda a, b, n: infonce(a, b, negatives=n, in_batch=False, temperature=T), (Z1, Z2, BANK),
    ),
    "memory bank": Equal(
        "lightly `NTXentLoss(memory_bank_size=)`", "negatives=bank, in_batch=False", lightly_memory_bank,
        lambda a, b, n: infonce(a, b, negatives=n, in_batch=False, temperature=T), (Z1, Z2, BANK),
    ),
    "decoupled (DCL)": Equal(
        "lightly `DCLLoss`", "decoupled=True", lightly_dcl, lambda a, b: infonce(*both(a, b), **VIEWS, decoupled=True)
    ),
    "hardness weights": Equal(
        "Robinson et al.'s HCL, tau_plus = 0", "hardness=.7", hard_negatives,
        lambda a, b: infonce(*both(a, b), **VIEWS, hardness=0.7),
    ),
    "hard negatives, shared": Equal(
        "sentence-transformers `MultipleNegativesRankingLoss`", "negatives=[M', d], cosine=True", multiple_negatives,
        lambda a, b, n: infonce(3 * a, b, negatives=2 * n, temperature=T, cosine=True), (Z1, Z2, BANK[:B]),
    ),
    "hard negatives, per row": Equal(
        "the same in DPR's form", "negatives=[B, n, d], in_batch=True", own_negatives,
        lambda a, b, n: infonce(a, b, negatives=n, in_batch=True, temperature=T), (Z1, Z2, OWN),
    ),
    "false negatives by a mask": Equal(
        "sentence-transformers' guided mask (GISTEmbed)", "mask=[B, M]",
        lambda a, b: guided_false_negatives(a, b, GUIDE),
        lambda a, b: infonce(a, b, mask=FALSE, temperature=T, cosine=True),
    ),
    "false negatives by ids": Equal(
        "the same mask, made of ids", "row_ids=, key_ids=", lambda a, b: duplicates_left_out(a, b, IDS),
        lambda a, b: infonce(a, b, row_ids=IDS, temperature=T),
    ),
}  # fmt: skip


def listed() -> Tensor:
    """The other samples of each row's label, of two views, and fillings."""
    y = torch.cat([LABELS] * 2)
    same = (y[:, None] == y) & ~torch.eye(2 * B, dtype=torch.bool)
    rows = [torch.cat([r.nonzero()[:, 0], torch.tensor([-1])]) for r in same]
    return torch.stack(rows)


def evaluated(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return [value, *torch.autograd.grad(value, leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for f, e in zip(found, expected, strict=True):
        assert (f.double() - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", EQUAL)
def test_equal_to(name, backend):
    case = EQUAL[name]
    expected = evaluated(case.theirs, case.tensors)
    with use_backend(backend):
        found = evaluated(case.ours, case.tensors)
    assert_equal(found, expected, TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", EQUAL)
def test_gradcheck(name, backend):
    case = EQUAL[name]
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    with use_backend(backend):
        assert torch.autograd.gradcheck(case.ours, leaves, fast_mode=True)


def test_the_formulas_differ():
    """A formula that equalled another one's by chance would show nothing."""
    values = {name: round(float(case.ours(*case.tensors)), 6) for name, case in EQUAL.items()}
    twins = {"SupCon, positives listed", "memory bank"}  # the same loss said in another way
    kept = {name: v for name, v in values.items() if name not in twins}
    assert len(set(kept.values())) == len(kept)


def test_the_pages_table_is_this_one():
    from tests.kernels import contrastive_table

    page = contrastive_table.PAGE.read_text(encoding="utf-8")
    assert contrastive_table.written(page) == page, "run python -m tests.kernels.contrastive_table --update"
