"""The sigmoid loss over ranks, and losses whose negatives are not the batch's: those of one process, by formulas."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

from engine.kernels import InfoNCE, KeyQueue, SigLIP, infonce, siglip
from engine.kernels.ranks import streaming

COUNTS = {2: (6, 4), 4: (4, 2, 6, 4)}
HOW = pytest.mark.parametrize("gather", [True, "ring"])
SIZE = pytest.mark.parametrize("size", [2, 4])
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-11, "atol": 1e-11}}


def draw(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def own(x: Tensor, rank: int, counts) -> Tensor:
    return x.split(list(counts))[rank].clone()


def columns_of(counts, rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


# -- the sigmoid loss ------------------------------------------------------------------------------

PLAIN = {
    "plain": {},
    "cosine": {"cosine": True},
    "queue": {"negatives": True},
    "views": {"positives": "views", "exclude_self": True},
    "in the queue": {"positives": "queue", "negatives": True},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "local": {"local_loss": True},
}
GATHERED = {
    "labels": {"labels": True},
    "labels, queue": {"labels": True, "negatives": True},
    "ids": {"row_ids": True, "negatives": True},
    "mask": {"mask": True, "negatives": True},
    "several": {"positives": "several"},
}
LABELS = torch.tensor([0, 1, 2, 0, 1, 3, 0, 0, 1, 2, 5, 1, 4, 0, 2, 2])
QUEUE_LABELS = torch.tensor([1, 3, 9])


def inputs(counts, dtype=torch.float64) -> list[Tensor]:
    """q, k, a queue, temperature and bias, of the joined batch."""
    total = sum(counts)
    tensors = [
        draw(total, 5, seed=0),
        draw(total, 5, seed=1),
        draw(3, 5, seed=2),
        torch.tensor(0.7),
        torch.tensor(-0.4),
    ]
    return [t.to(dtype) for t in tensors]


def positives_of(kind: str, count: int) -> Tensor:
    """Numbers in a rank's [k; queue]."""
    rows = torch.arange(count)
    if kind == "several":
        return torch.stack([rows, (rows + 1) % count], 1)
    found = (rows + count // 2) % count
    if kind == "queue":
        found[0] = count + 2
    return found


def whole_mask(total: int) -> Tensor:
    return torch.rand(total, total + 3, generator=torch.Generator().manual_seed(4)) < 0.3


def on_a_rank(rank, size, cases, counts):
    results = []
    for name, gather, dtype, groups in cases:
        options = dict((PLAIN | GATHERED)[name])
        leaves = inputs(counts, dtype)
        leaves[:2] = [own(x, rank, counts) for x in leaves[:2]]
        if groups:
            leaves[:3] = [torch.stack([x, 0.5 * x]) for x in leaves[:3]]
        q, k, queue, temperature, bias = (x.requires_grad_() for x in leaves)
        rows = columns_of(counts, rank)
        if "labels" in options or "row_ids" in options:
            of_columns = torch.cat([LABELS[rows], QUEUE_LABELS]) if "negatives" in options else None
            kind = "labels" if "labels" in options else "row_ids"
            options |= {kind: LABELS[rows], {"labels": "key_labels", "row_ids": "key_ids"}[kind]: of_columns}
        if "mask" in options:
            options["mask"] = whole_mask(sum(counts))[rows]
        if "negatives" in options:
            options["negatives"] = queue
        if "positives" in options:
            options["positives"] = positives_of(options["positives"], counts[rank])
        loss = siglip(q, k, temperature, bias, gather=gather, **options)
        gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True)]
        results.append([loss.detach(), *gradients])
    return results


def roles(name, counts) -> tuple[Tensor, Tensor]:
    """Which pairs of rows and [k; queue] are positives and which are negatives."""
    options, total = (PLAIN | GATHERED)[name], sum(counts)
    positive = torch.zeros(total, total + 3, dtype=torch.bool)
    for rank, count in enumerate(counts):
        begin = sum(counts[:rank])
        listed = torch.arange(count)[:, None]
        if "positives" in options:
            listed = positives_of(options["positives"], count).reshape(count, -1)
        listed = torch.where(listed < count, listed + begin, listed - count + total)
        positive[torch.arange(begin, begin + count)[:, None], listed] = True
    labels = torch.cat([LABELS[:total], QUEUE_LABELS])
    if "labels" in options:
        positive = LABELS[:total, None] == labels
    negative = ~positive
    if "exclude_self" in options:
        negative[torch.arange(total), torch.arange(total)] = False
    if "row_ids" in options:
        negative &= LABELS[:total, None] != labels
    if "mask" in options:
        negative &= ~whole_mask(total)
    if "negatives" not in options:
        positive[:, total:] = negative[:, total:] = False
    return positive, negative


def row_losses(name, counts, q, k, queue, temperature, bias) -> Tensor:
    if "cosine" in (PLAIN | GATHERED)[name]:
        q, k, queue = (normalize(x, dim=-1) for x in (q, k, queue))
    positive, negative = roles(name, counts)
    scores = q @ torch.cat([k, queue]).T / temperature + bias
    return (softplus(-scores) * positive + softplus(scores) * negative).sum(1)


def assert_joined(results, cases, counts, losses_of):
    size = len(counts)
    for number, (name, _, dtype, groups) in enumerate(cases):
        options = (PLAIN | GATHERED)[name]
        leaves = [x.requires_grad_() for x in inputs(counts)]
        losses = [losses_of(name, counts, *leaves)]
        if groups:
            losses.append(losses_of(name, counts, 0.5 * leaves[0], 0.5 * leaves[1], 0.5 * leaves[2], *leaves[3:]))
        losses = torch.stack(losses)
        of_ranks = losses.split(list(counts), 1)
        if "local_loss" in options:
            expected = [x.mean(1) for x in of_ranks]
            total = torch.stack(expected).mean(0)
        elif options.get("reduction") == "none":
            expected, total = of_ranks, losses.sum(1) / size
        else:
            total = losses.sum(1) if options.get("reduction") == "sum" else losses.mean(1)
            expected = [total] * size
        gradients = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves, strict=True)]
        for rank, result in enumerate(results):
            right = expected[rank].detach() if groups else expected[rank].detach()[0]
            torch.testing.assert_close(
                result[number][0].double(), right, **CLOSE[dtype], msg=lambda m, n=name: f"{n}: {m}"
            )
            for which in (0, 1):
                found = result[number][1 + which].double()
                found = found[0] + 0.5 * found[1] if groups else found
                right = size * own(gradients[which], rank, counts)
                torch.testing.assert_close(found, right, **CLOSE[dtype], msg=lambda m, n=name: f"{n}: {m}")
        for which in (2, 3, 4):  # every rank's own copies
            found = torch.stack([result[number][1 + which] for result in results]).mean(0).double()
            found = found[0] + 0.5 * found[1] if groups and which == 2 else found
            torch.testing.assert_close(found, gradients[which], **CLOSE[dtype], msg=lambda m, n=name: f"{n}: {m}")


@SIZE
@HOW
def test_siglip_equals_the_joined_batch(ranks, size, gather):
    counts = COUNTS[size]
    names = PLAIN if gather == "ring" else PLAIN | GATHERED
    cases = [(name, gather, dtype, False) for name in names for dtype in (torch.float32, torch.float64)]
    cases += [(name, gather, torch.float64, True) for name in ("plain", "queue")]
    assert_joined(ranks(size).run(on_a_rank, cases, counts), cases, counts, row_losses)


def in_narrow_blocks(rank, size, cases, counts):
    before, streaming.BLOCK_NUMBERS = streaming.BLOCK_NUMBERS, 12
    try:
        return on_a_rank(rank, size, cases, counts)
    finally:
        streaming.BLOCK_NUMBERS = before


def test_the_ring_a_few_columns_at_a_time(ranks):
    cases = [(name, "ring", torch.float64, False) for name in PLAIN]
    assert_joined(ranks(2).run(in_narrow_blocks, cases, COUNTS[2]), cases, COUNTS[2], row_losses)


def module_on_a_rank(rank, size, gather):
    counts = COUNTS[size]
    q, k = (own(draw(sum(counts), 5, seed=s).float(), rank, counts) for s in (0, 1))
    module = SigLIP(0.5, -2.0, gather=gather)
    loss = module(q, k)
    loss.backward()
    return loss.detach(), module.bias.grad, module.log_temperature.grad


@HOW
def test_the_module_learns_as_on_the_joined_batch(ranks, gather):
    q, k = (normalize(draw(10, 5, seed=s).float(), dim=1) for s in (0, 1))
    log_temperature, bias = torch.tensor(0.5).log().requires_grad_(), torch.tensor(-2.0, requires_grad=True)
    signs = 2 * torch.eye(10) - 1
    right = softplus(-signs * (q @ k.T / log_temperature.exp() + bias)).sum() / 10
    gradients = torch.autograd.grad(right, (bias, log_temperature))
    results = ranks(2).run(module_on_a_rank, gather)
    for loss, *_ in results:
        torch.testing.assert_close(loss, right.detach())
    for which, expected in enumerate(gradients):
        torch.testing.assert_close(sum(result[1 + which] for result in results) / 2, expected)


# -- negatives that are not the batch's ------------------------------------------------------------


def negatives_of(counts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A queue, every row's own negatives, and masks of both: of the joined batch."""
    total, generator = sum(counts), torch.Generator().manual_seed(5)
    masks = [torch.rand(total, n, generator=generator) < 0.4 for n in (6, 3)]
    return draw(6, 5, seed=2), draw(total, 3, 5, seed=3), *masks


OTHERS = ("queue", "queue, cosine, mask", "queue, ids", "own", "own, mask", "own and batch", "own, rows", "own, local")


def others_on_a_rank(rank, size, gather, counts):
    results = {}
    queue, own_negatives, of_queue, of_own = negatives_of(counts)
    rows, total = columns_of(counts, rank), sum(counts)
    for name in OTHERS:
        leaves = [own(draw(total, 5, seed=s), rank, counts) for s in (0, 1)]
        leaves += [queue.clone() if "queue" in name else own_negatives[rows].clone(), torch.tensor(0.7).double()]
        q, k, negatives, temperature = (x.requires_grad_() for x in leaves)
        options = {"in_batch": name == "own and batch"}
        if "mask" in name:
            options["mask"] = (of_queue if "queue" in name else of_own)[rows]
        if "ids" in name:
            options |= {"row_ids": LABELS[rows], "key_ids": torch.arange(6)}
        if name == "own and batch":
            if gather == "ring":  # refused
                continue
            options["mask"] = torch.cat([whole_mask(total)[:, :total], of_own], 1)[rows]
        options |= {"reduction": "none"} if "rows" in name else {"local_loss": True} if "local" in name else {}
        loss = infonce(
            q, k, negatives=negatives, temperature=temperature, gather=gather, cosine="cosine" in name, **options
        )
        results[name] = [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
    return results


@HOW
@SIZE
def test_negatives_that_are_not_the_batchs(ranks, size, gather):
    counts = COUNTS[size]
    results, total = ranks(size).run(others_on_a_rank, gather, counts), sum(counts)
    for name in OTHERS:
        if name not in results[0]:
            assert name == "own and batch" and gather == "ring"
            continue
        queue, own_negatives, of_queue, of_own = negatives_of(counts)
        leaves = [draw(total, 5, seed=0), draw(total, 5, seed=1), queue if "queue" in name else own_negatives]
        q, k, negatives, temperature = leaves = [x.requires_grad_() for x in (*leaves, torch.tensor(0.7).double())]
        if "cosine" in name:
            q, k, negatives = (normalize(x, dim=-1) for x in (q, k, negatives))
        of_negatives = q @ negatives.T if "queue" in name else torch.einsum("bd,bnd->bn", q, negatives)
        left_out = torch.zeros(of_negatives.shape, dtype=torch.bool)
        if "mask" in name or name == "own and batch":
            left_out = of_queue if "queue" in name else of_own
        if "ids" in name:
            left_out = LABELS[:total, None] == torch.arange(6)
        scores = torch.cat([(q * k).sum(1, keepdim=True), of_negatives], 1)
        left_out = torch.cat([torch.zeros(total, 1, dtype=torch.bool), left_out], 1)
        if name == "own and batch":
            others = ~torch.eye(total, dtype=torch.bool) & ~whole_mask(total)[:, :total]
            scores, left_out = torch.cat([scores, q @ k.T], 1), torch.cat([left_out, ~others], 1)
        scores = (scores / temperature).masked_fill(left_out, -torch.inf)
        losses = cross_entropy(scores, torch.zeros(total, dtype=torch.int64), reduction="none")
        of_ranks = losses.split(list(counts))
        if "rows" in name:
            expected, whole = of_ranks, losses.sum() / size
        elif "local" in name:
            expected = [x.mean() for x in of_ranks]
            whole = torch.stack(expected).mean()
        else:
            expected, whole = [losses.mean()] * size, losses.mean()
        gradients = torch.autograd.grad(whole, leaves)
        for rank, result in enumerate(results):
            found = result[name]
            torch.testing.assert_close(found[0], expected[rank].detach(), msg=lambda m, n=name: f"{n}: {m}")
            of_rows = (1, 2) if "queue" in name else (1, 2, 3)
            for which in of_rows:
                right = size * own(gradients[which - 1], rank, counts)
                torch.testing.assert_close(found[which], right, msg=lambda m, n=name: f"{n}: {m}")
        for which in (3, 4) if "queue" in name else (4,):
            mean = torch.stack([result[name][which] for result in results]).mean(0)
            torch.testing.assert_close(mean, gradients[which - 1], msg=lambda m, n=name: f"{n}: {m}")


def module_with_a_queue(rank, size):
    q, k, queue = draw(4, 5, seed=rank), draw(4, 5, seed=9 + rank), draw(6, 5, seed=2)
    return InfoNCE(0.5, gather=True)(q, k, negatives=queue, in_batch=False)


def test_moco_over_ranks(ranks):
    """The mean of the ranks' losses, on all of them."""
    queue, losses = draw(6, 5, seed=2), []
    for rank in range(2):
        q, k = draw(4, 5, seed=rank), draw(4, 5, seed=9 + rank)
        scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.5
        losses.append(cross_entropy(scores, torch.zeros(4, dtype=torch.int64)))
    for found in ranks(2).run(module_with_a_queue):
        torch.testing.assert_close(found, sum(losses) / 2)


def pushed(rank, size):
    """A queue of 8 keys after three pushes of 3 and 1 keys of the ranks."""
    torch.manual_seed(rank)
    queue = KeyQueue(8, 2, gather=True)
    start = queue.keys()
    for step in range(3):
        count = 3 - 2 * rank
        queue.push(torch.full((count, 2), 10.0 * step + rank))
    return start, queue.keys(), int(queue.position)


def test_a_queue_of_the_keys_of_all_ranks(ranks):
    for start, keys, position in ranks(2).run(pushed):
        assert torch.equal(keys[:, 0], torch.tensor([20.0, 20, 20, 21, 10, 10, 10, 11])) and position == 4
        assert torch.equal(start, KeyQueue(8, 2, gather=True).keys())  # the same on all ranks
    torch.testing.assert_close(start.norm(dim=1), torch.ones(8))
