"""Losses and bounds over ranks equal those of one process on the joined batch, which plain formulas compute here."""

import contextlib
import math
import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from engine.errors import EngineError
from engine.kernels import infonce, mi_lower_bound, siglip
from engine.kernels.mi_bounds.reference import bound_value, update_log_ema
from engine.kernels.ranks import streaming
from engine.kernels.ranks.collectives import gather_rows, sum_over_ranks
from engine.kernels.ranks.group import find_ranks
from engine.vocabulary import BOUNDS

# Rows of every rank: as many on all, or not.
EQUAL = {2: (6, 6), 4: (4, 4, 4, 4)}
UNEQUAL = {2: (7, 4), 4: (5, 1, 3, 6)}
HOW = pytest.mark.parametrize("gather", [True, "ring"])
SIZE = pytest.mark.parametrize("size", [2, 4])


def draw(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def own(x: Tensor, rank: int, counts, dim: int = 0) -> Tensor:
    return x.split(list(counts), dim)[rank]


# -- the nine bounds -------------------------------------------------------------------------------


def bound_inputs(counts, groups: int, dtype) -> list[Tensor]:
    """q, k [G, N, d], log-baseline [G, N], temperature, log_ema [G]: of the joined batch."""
    total = sum(counts)
    q, k = (draw(groups, total, 5, seed=s, dtype=dtype) for s in (0, 1))
    return [
        q,
        k,
        0.3 * draw(groups, total, seed=2, dtype=dtype),
        torch.tensor(0.8, dtype=dtype),
        torch.full((groups,), 0.2, dtype=dtype),
    ]


def bound_on_a_rank(rank, size, cases):
    """Value, MINE's average and gradients of q, k, log-baseline and temperature for every case."""
    results = []
    for bound, gather, counts, groups, dtype, block in cases:
        streaming.BLOCK_NUMBERS = block
        q, k, a, temperature, log_ema = bound_inputs(counts, groups, dtype)
        leaves = [own(x, rank, counts, 1).contiguous().requires_grad_() for x in (q, k, a)]
        leaves.append(temperature.requires_grad_())
        value, average = mi_lower_bound(
            leaves[0], leaves[1], bound=bound, log_baseline=leaves[2], alpha=0.3, smile_tau=0.7,
            temperature=temperature, log_ema=log_ema, ema_rate=0.25, gather=gather,
        )  # fmt: skip
        gradients = torch.autograd.grad((value * torch.arange(1, groups + 1)).sum(), leaves, allow_unused=True)
        results.append(
            [
                value.detach(),
                average,
                *(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True)),
            ]
        )
    return results


def bound_of_joined_batch(bound, counts, groups, dtype) -> list[Tensor]:
    q, k, a, temperature, log_ema = bound_inputs(counts, groups, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, a, temperature)]
    values, averages = [], []
    for g in range(groups):
        scores = q[g] @ k[g].T / temperature
        average = update_log_ema(log_ema[g], scores, 0.25) if bound == "mine" else log_ema[g]
        averages.append(average)
        values.append(bound_value(scores, bound, a[g][:, None], alpha=0.3, smile_tau=0.7, log_ema=average)[1])
    value = torch.stack(values)
    gradients = torch.autograd.grad((value * torch.arange(1, groups + 1)).sum(), leaves, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True)]
    return [value.detach(), torch.stack(averages), *gradients]


@SIZE
@HOW
def test_every_bound_equals_the_joined_batch(ranks, size, gather):
    """Values on every rank; gradients so that their average over ranks, as DDP takes it, is right."""
    cases = [(bound, gather, EQUAL[size], 1, torch.float32, 2**21) for bound in BOUNDS]
    # two columns at a time; several critics; ranks of unequal rows
    cases += [(bound, gather, UNEQUAL[size], 2, torch.float64, 8 * max(UNEQUAL[size])) for bound in BOUNDS]
    results = ranks(size).run(bound_on_a_rank, cases)
    for number, (bound, _, counts, groups, dtype, _) in enumerate(cases):
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
        value, average, dq, dk, da, dt = bound_of_joined_batch(bound, counts, groups, dtype)
        of_temperature = torch.stack([result[number][5] for result in results]).mean(0)
        torch.testing.assert_close(of_temperature.double(), dt, **close, msg=bound)
        for rank, result in enumerate(results):
            expected = [value, average, *(size * own(x, rank, counts, 1) for x in (dq, dk, da))]
            for found, right, what in zip(result[number], expected, ("value", "ema", "dq", "dk", "da"), strict=False):
                torch.testing.assert_close(
                    found.double(), right, **close, msg=lambda m, w=what, b=bound: f"{b} {w}: {m}"
                )
            assert torch.equal(result[number][0], results[0][number][0]), "the value has other bits on another rank"


def scores_on_a_rank(rank, size, counts):
    results = []
    for bound in BOUNDS:
        whole = draw(sum(counts), sum(counts), seed=3)
        scores = own(whole, rank, counts).requires_grad_()
        value = mi_lower_bound(scores, bound=bound, alpha=0.3, gather=True)
        results.append([value.detach(), *torch.autograd.grad(value, scores)])
    return results


def test_scores_of_own_rows_against_all_columns(ranks):
    counts = UNEQUAL[4]
    results = ranks(4).run(scores_on_a_rank, counts)
    for number, bound in enumerate(BOUNDS):
        scores = draw(sum(counts), sum(counts), seed=3).requires_grad_()
        value, surrogate = bound_value(scores, bound, alpha=0.3)
        (gradient,) = torch.autograd.grad(surrogate, scores)
        for rank, result in enumerate(results):
            torch.testing.assert_close(result[number][0], value, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(result[number][1], 4 * own(gradient, rank, counts), rtol=1e-11, atol=1e-12)


# -- infonce and its options -----------------------------------------------------------------------


def infonce_inputs(counts):
    q, k = (draw(sum(counts), 5, seed=s) for s in (0, 1))
    return [q, k, torch.tensor(0.7, dtype=torch.float64), draw(3, 5, seed=2)]


def views_of(counts) -> list[Tensor]:
    """SimCLR's positives on every rank: its rows are both views of half as many samples."""
    return [(torch.arange(n) + n // 2) % n for n in counts]


INFONCE = {
    "plain": {},
    "cosine": {"cosine": True},
    "symmetric": {"symmetric": True, "cosine": True},
    "queue": {"negatives": True},
    "views": {"positives": True, "exclude_self": True},
    "in the queue": {"positives": True, "negatives": True},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "local": {"local_loss": True},
    "symmetric rows": {"symmetric": True, "reduction": "none"},
}
# With gathered keys alone.
GATHERED = {
    "labels": {"labels": True},
    "labels of views": {"labels": True, "exclude_self": True, "cosine": True},
    "labels, queue": {"labels": True, "negatives": True},
    "ids": {"row_ids": True},
    "ids, symmetric": {"row_ids": True, "symmetric": True},
    "several positives": {"positives": True},
    "decoupled": {"decoupled": True},
    "hardness": {"hardness": 0.7},
    "smoothing": {"label_smoothing": 0.2},
    "labels, local": {"labels": True, "exclude_self": True, "local_loss": True},
    "labels, rows": {"labels": True, "reduction": "none"},
}


def gathered_options(name, rows, queue) -> dict:
    """Options of a rank's rows, or with all rows those of the joined batch."""
    options = dict(GATHERED[name])
    labels = torch.tensor([0, 1, 2, 0, 1, 3, 0, 0, 1, 2, 5, 1, 4, 0, 2, 2])[rows]  # 3, 4 and 5 have one sample
    if "labels" in options:
        options["labels"] = labels
    if "row_ids" in options:
        options["row_ids"] = labels
    if "negatives" in options:
        options |= {"negatives": queue, "key_labels": torch.cat([labels, torch.tensor([1, 3, 9])])}
    if "positives" in options:  # its own and the next one of the rank; the first row has none
        own_numbers = torch.arange(len(labels))
        options["positives"] = torch.stack([own_numbers, (own_numbers + 1) % len(labels)], 1)
        options["positives"][0] = -1
    return options


def gathered_on_a_rank(rank, size, counts):
    results = []
    for name in GATHERED:
        q, k, temperature, queue = infonce_inputs(counts)
        begin = sum(counts[:rank])
        leaves = [own(q, rank, counts).clone(), own(k, rank, counts).clone(), temperature, queue]
        leaves = [x.requires_grad_() for x in leaves]
        options = gathered_options(name, slice(begin, begin + counts[rank]), leaves[3])
        loss = infonce(leaves[0], leaves[1], temperature=leaves[2], gather=True, **options)
        gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True)]
        results.append([loss.detach(), *gradients])
    return results


def test_options_of_labels_and_weights_equal_the_joined_batch(ranks):
    """One process on the joined batch computes the same options; tests/kernels compares these with formulas."""
    counts = (4, 2, 6, 4)
    parts = [slice(0, 4), slice(4, 6), slice(6, 12), slice(12, 16)]
    results = ranks(4).run(gathered_on_a_rank, counts)
    for number, name in enumerate(GATHERED):
        leaves = [x.requires_grad_() for x in infonce_inputs(counts)]
        options = gathered_options(name, slice(None), leaves[3])
        if name == "several positives":
            of_ranks = [gathered_options(name, rows, None)["positives"] for rows in parts]
            joined = [torch.where(p < 0, p, p + rows.start) for p, rows in zip(of_ranks, parts, strict=True)]
            options["positives"] = torch.cat(joined)
        local, reduction = options.pop("local_loss", False), options.pop("reduction", "mean")
        losses = infonce(leaves[0], leaves[1], temperature=leaves[2], reduction="none", **options)
        if local:
            # rows whose label is alone have no positive: 5, 10 and 12
            having = [[n for n in range(16)[rows] if n not in (5, 10, 12)] for rows in parts]
            expected = [losses[torch.tensor(numbers)].mean() for numbers in having]
            total = torch.stack(expected).mean()
        elif reduction == "none":
            expected, total = list(losses.split(list(counts))), losses.sum() / 4
        else:
            total = infonce(leaves[0], leaves[1], temperature=leaves[2], **options)
            expected = [total] * 4
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        for rank, result in enumerate(results):
            torch.testing.assert_close(result[number][0], expected[rank].detach(), msg=lambda m, n=name: f"{n}: {m}")
            for which in (0, 1):
                right = 4 * own(gradients[which], rank, counts)
                torch.testing.assert_close(result[number][1 + which], right, msg=lambda m, n=name: f"{n}: {m}")
        for which in (2, 3):
            found = torch.stack([result[number][1 + which] for result in results]).mean(0)
            right = torch.zeros_like(found) if gradients[which] is None else gradients[which]
            torch.testing.assert_close(found, right, msg=lambda m, n=name: f"{n}: {m}")


def infonce_options(name, rank, counts, queue):
    options = dict(INFONCE[name])
    if "positives" in options:
        options["positives"] = views_of(counts)[rank]
        if name == "in the queue":
            options["positives"][0] = counts[rank] + 2  # the queue's last
    if "negatives" in options:
        options["negatives"] = queue
    return options


def infonce_on_a_rank(rank, size, cases):
    results = []
    for name, gather, counts in cases:
        q, k, temperature, queue = infonce_inputs(counts)
        leaves = [own(q, rank, counts).clone(), own(k, rank, counts).clone(), temperature, queue]
        leaves = [x.requires_grad_() for x in leaves]
        options = infonce_options(name, rank, counts, leaves[3])
        loss = infonce(leaves[0], leaves[1], temperature=leaves[2], gather=gather, **options)
        gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True)]
        results.append([loss.detach(), *gradients])
    return results


def losses_of_joined_batch(name, counts, q, k, temperature, queue) -> Tensor:
    """Cross-entropies of the joined batch, row by row."""
    total = sum(counts)
    if INFONCE[name].get("cosine"):
        q, k, queue = (normalize(x, dim=-1) for x in (q, k, queue))
    keys = torch.cat([k, queue]) if "negatives" in INFONCE[name] else k
    scores = q @ keys.T / temperature
    target = torch.arange(total)
    if "positives" in INFONCE[name]:
        begins = [sum(counts[:r]) for r in range(len(counts))]
        target = torch.cat([p + begin for p, begin in zip(views_of(counts), begins, strict=True)])
        if name == "in the queue":
            target[begins] = total + 2
    if INFONCE[name].get("exclude_self"):
        scores = scores - torch.diag(torch.full((total,), math.inf))
    losses = cross_entropy(scores, target, reduction="none")
    if INFONCE[name].get("symmetric"):
        losses = (losses + cross_entropy(scores.T, target, reduction="none")) / 2
    return losses


@SIZE
@HOW
def test_infonce_equals_the_joined_batch(ranks, size, gather):
    counts = {2: (6, 4), 4: (4, 2, 6, 4)}[size]
    cases = [(name, gather, counts) for name in INFONCE]
    results = ranks(size).run(infonce_on_a_rank, cases)
    for number, (name, _, _) in enumerate(cases):
        leaves = [x.requires_grad_() for x in infonce_inputs(counts)]
        losses = losses_of_joined_batch(name, counts, *leaves)
        reduction = INFONCE[name].get("reduction", "mean")
        of_ranks = losses.split(list(counts))
        if reduction == "none":
            expected, total = list(of_ranks), losses.sum() / size
        elif "local_loss" in INFONCE[name]:
            expected = [x.mean() for x in of_ranks]
            total = torch.stack(expected).mean()
        else:
            total = losses.mean() if reduction == "mean" else losses.sum()
            expected = [total] * size
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        for rank, result in enumerate(results):
            torch.testing.assert_close(result[number][0], expected[rank].detach(), msg=lambda m, n=name: f"{n}: {m}")
            for which in (0, 1):
                right = size * own(gradients[which], rank, counts)
                torch.testing.assert_close(result[number][1 + which], right, msg=lambda m, n=name: f"{n}: {m}")
        for which in (2, 3):  # temperature and queue are every rank's own copies
            found = torch.stack([result[number][1 + which] for result in results]).mean(0)
            right = torch.zeros_like(found) if gradients[which] is None else gradients[which]
            torch.testing.assert_close(found, right, msg=lambda m, n=name: f"{n}: {m}")


def partly_trained(rank, size, wanted):
    """Of one embedding that is trained, or of the queue: its gradient with keys that travel."""
    counts = (3, 2)
    q, k = (own(draw(5, 4, seed=seed), rank, counts).clone() for seed in (0, 1))
    tensors = {"q": q, "k": k, "negatives": draw(3, 4, seed=2)}
    loss = infonce(**{n: t.requires_grad_(n == wanted) for n, t in tensors.items()}, temperature=0.5, gather="ring")
    return torch.autograd.grad(loss, tensors[wanted])[0]


@pytest.mark.parametrize("wanted", ["q", "k", "negatives"])
def test_the_ring_where_one_tensor_alone_is_trained(ranks, wanted):
    q, k, queue = draw(5, 4, seed=0), draw(5, 4, seed=1), draw(3, 4, seed=2)
    leaf = {"q": q, "k": k, "negatives": queue}[wanted].requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(q @ torch.cat([k, queue]).T / 0.5, torch.arange(5)), leaf)
    found = ranks(2).run(partly_trained, wanted)
    mean = sum(found) / 2 if wanted == "negatives" else torch.cat(found) / 2
    torch.testing.assert_close(mean, expected)


# -- what must not pass silently -------------------------------------------------------------------


def without_gather(rank, size):
    q, k = draw(8, 5, seed=0), draw(8, 5, seed=1)
    local = [own(x, rank, (4, 4)) for x in (q, k)]
    return [infonce(*local), infonce(*local, gather=True), infonce(*local, gather="ring")]


def test_without_gather_the_loss_is_another_one(ranks):
    """What users get who forget gather: a loss of fewer negatives, lower by about log 2."""
    right = cross_entropy(draw(8, 5, seed=0) @ draw(8, 5, seed=1).T, torch.arange(8))
    for local, *over_ranks in ranks(2).run(without_gather):
        for value in over_ranks:
            torch.testing.assert_close(value, right)
        assert local < right - 0.3


def refused(rank, size):
    q = draw(4, 5, seed=rank)
    wrong = {
        "width": lambda: infonce(q[:, : 3 + rank], q[:, : 3 + rank], gather=True),
        "rows": lambda: infonce(q[:rank], q[:rank], gather=True),
        "pairs": lambda: mi_lower_bound(q, q[: 3 + rank], bound="dv", gather="ring"),
        "gradients": lambda: infonce(q, q.clone().requires_grad_(rank == 0), gather="ring"),
        "gather": lambda: infonce(q, q, gather="circle"),
        "group": lambda: infonce(q, q, group=torch.distributed.group.WORLD),
        "local": lambda: infonce(q, q, local_loss=True),
        "own negatives": lambda: infonce(q, q, negatives=q[:, None], in_batch=True, gather="ring"),
        "symmetric": lambda: infonce(q, q, negatives=q, symmetric=True, gather=True),
        "scores": lambda: mi_lower_bound(q @ q.T, gather=True),
        "ring of scores": lambda: mi_lower_bound(q @ q.T, gather="ring"),
        "positives": lambda: infonce(q, q, positives=torch.full((4,), 4), gather="ring"),
        "mask": lambda: infonce(q, q, mask=torch.zeros(4, 4, dtype=torch.bool), gather=True),
        "mask of both": lambda: infonce(q, q, mask=torch.zeros(4, 8, dtype=torch.bool), symmetric=True, gather=True),
        "mask on the ring": lambda: infonce(q, q, mask=torch.zeros(4, 8, dtype=torch.bool), gather="ring"),
        "labels on the ring": lambda: infonce(q, q, labels=torch.arange(4), gather="ring"),
        "nothing without the batch": lambda: infonce(q, q, in_batch=False, gather=True),
        "sigmoid of labels on the ring": lambda: siglip(q, q, labels=torch.arange(4), gather="ring"),
        "baseline": lambda: mi_lower_bound(q, q, bound="tuba", log_baseline=q, gather=True),
    }
    texts = {}
    for name, call in wrong.items():
        try:
            call()
            texts[name] = "nothing was raised"
        except EngineError as error:
            texts[name] = str(error)
    return texts


def test_mistakes_are_one_line_on_every_rank(ranks):
    texts = ranks(2).run(refused)
    for name, text in texts[0].items():
        assert "found" in text and "expected" in text and "\n" not in text, (name, text)
        assert texts[1][name] == text or name in ("pairs", "rows"), name
    assert "width of q on ranks [3, 4]" in texts[0]["width"]
    assert texts[1]["rows"] == f"rank 0: {texts[0]['rows']}" and "embeddings [0, 5]" in texts[0]["rows"]
    assert "columns of mask on ranks [4, 4]; expected 8: the keys of all ranks" in texts[0]["mask"]
    assert "[4, 4] rows on the ranks, and [3, 4]" in texts[0]["pairs"]


def second_derivatives(rank, size):
    texts = []
    calls = (
        lambda q, k: mi_lower_bound(q, k, bound="dv", gather=True),
        lambda q, k: mi_lower_bound(q, k, bound="interpolate", gather="ring"),
        lambda q, k: infonce(q, k, gather="ring"),
        lambda q, k: infonce(q, k, gather=True),
    )
    for call in calls:
        q, k = (draw(4, 3, seed=s + rank).requires_grad_() for s in (0, 5))
        (dq,) = torch.autograd.grad(call(q, k), q, create_graph=True)
        try:
            dq.square().sum().backward()
        except EngineError as error:
            texts.append(str(error))
    return texts


def test_gradients_of_gradients_are_refused(ranks):
    for texts in ranks(2).run(second_derivatives):
        assert len(texts) == 4 and all("a gradient of its gradient" in text for text in texts)
        assert all("without gather" in text for text in texts[:3])


def twice_differentiated(rank, size):
    ranks = find_ranks("test", True)
    x = draw(2 + rank, 3, seed=rank).requires_grad_()
    rows = gather_rows(x, ranks, [2, 3])
    (first,) = torch.autograd.grad((rows**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    total = sum_over_ranks(x.sum(), ranks)
    (of_sum,) = torch.autograd.grad(total**2, x)
    return x.detach(), rows.detach(), first.detach(), second, total.detach(), of_sum


def test_collectives_have_gradients_of_every_order(ranks):
    """Both ranks compute the sum of cubes, so their sum is twice that: 6 x^2, whose own gradient is 12 x."""
    results = ranks(2).run(twice_differentiated)
    joined = torch.cat([r[0] for r in results])
    for x, rows, first, second, total, of_sum in results:
        assert torch.equal(rows, joined)
        torch.testing.assert_close(first, 2 * 3 * x**2)
        torch.testing.assert_close(second, 2 * 6 * x)
        torch.testing.assert_close(total, joined.sum())
        torch.testing.assert_close(of_sum, 2 * 2 * joined.sum() * torch.ones_like(x))


# -- one process -----------------------------------------------------------------------------------


@HOW
def test_one_process_without_a_group_computes_as_before(gather):
    q, k = draw(6, 5, seed=0).float(), draw(6, 5, seed=1).float()
    assert torch.equal(infonce(q, k, gather=gather), infonce(q, k))
    assert torch.equal(mi_lower_bound(q, k, bound="dv", gather=gather), mi_lower_bound(q, k, bound="dv"))


def test_several_ranks_without_a_group_are_refused(monkeypatch):
    q = torch.eye(4)
    for world in ("2", "no number"):
        monkeypatch.setitem(os.environ, "WORLD_SIZE", world)
        for call in (lambda: infonce(q, q, gather=True), lambda: mi_lower_bound(q, q, gather="ring")):
            with pytest.raises(EngineError, match=f"WORLD_SIZE={world}, no process group"):
                call()
    assert infonce(q, q) > 0


def accumulated(rank, size):
    """The gradient of a wrapped encoder after two micro-batches, of which the second one alone averages."""
    encoder = torch.nn.Linear(5, 3).double()
    with torch.no_grad():
        encoder.weight.copy_(draw(3, 5, seed=7))
        encoder.bias.zero_()
    wrapped = torch.nn.parallel.DistributedDataParallel(encoder)
    for number in range(2):
        q, k = (own(draw(8, 5, seed=10 * number + s), rank, (4, 4)) for s in (0, 1))
        with wrapped.no_sync() if number == 0 else contextlib.nullcontext():
            embedded = wrapped(torch.cat([q, k]))
            infonce(embedded[:4], embedded[4:], gather=True).backward()
    return encoder.weight.grad


def test_accumulated_micro_batches_equal_the_joined_ones(ranks):
    weight = draw(3, 5, seed=7).requires_grad_()
    losses = []
    for number in range(2):
        q, k = (draw(8, 5, seed=10 * number + s) @ weight.T for s in (0, 1))
        losses.append(cross_entropy(q @ k.T, torch.arange(8)))
    (right,) = torch.autograd.grad(sum(losses), weight)
    for found in ranks(2).run(accumulated):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
