"""A mistake of one rank alone ends the call on all ranks at once, and they can go on together."""

import time

import pytest
import torch
import torch.distributed as dist

from engine.config import ObjectiveConfig
from engine.errors import EngineError
from engine.kernels import infonce, mi_lower_bound, siglip
from engine.kernels.ranks.agreement import LENGTH, OtherRankFailed, agree, checked
from engine.kernels.ranks.group import find_ranks
from engine.model.estimators import MIEstimator
from engine.objective import CMI, MI, Objective

SECONDS = 100.0
"""Of the clock, and far less than what an exchange waits for a rank that does not come."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mistakes(size: int) -> dict:
    """Calls that are right with bad=False, and raise an error of this rank with bad=True."""
    q, k = draw(4, 5), draw(4, 5, seed=1)
    positives, labels = torch.arange(4), torch.tensor([0, 0, 1, 1])
    columns = torch.zeros(4, 4 * size, dtype=torch.bool)
    objective = Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 2}, settings=ObjectiveConfig(hidden=4, embed=3))
    settings = ObjectiveConfig(hidden=4, embed=3, k_neighbor=2)
    conditional = Objective([CMI("Z", "Y", given="S")], dims={"Z": 4, "Y": 2, "S": 1}, settings=settings)
    features = {"Z": draw(4, 4), "Y": draw(4, 2, seed=1)}
    estimator = MIEstimator(4, 2, hidden=4, embed=3, gather=True)
    return {
        "positives": lambda bad: infonce(q, k, positives=positives + 3 * bad, gather=True),
        "positives on the ring": lambda bad: infonce(q, k, positives=positives + 3 * bad, gather="ring"),
        "own positive": lambda bad: infonce(
            q, k, positives=positives.flip(0) if not bad else positives, exclude_self=True, gather=True
        ),
        "labels": lambda bad: infonce(q, k, labels=labels[: 4 - bad], gather=True),
        "ids": lambda bad: infonce(q, k, row_ids=labels.float() if bad else labels, gather=True),
        "mask": lambda bad: infonce(q, k, mask=columns.long() if bad else columns, gather=True),
        "temperature": lambda bad: infonce(q, k, temperature=-1.0 if bad else 1.0, gather=True),
        "type": lambda bad: infonce(q.long() if bad else q, k, gather=True),
        "nothing": lambda bad: infonce(None if bad else q, k, gather="ring"),
        "reduction": lambda bad: infonce(q, k, reduction="average" if bad else "mean", gather=True),
        "negatives": lambda bad: infonce(q, k, negatives=q[:, : 5 - bad], gather=True),
        "no queue": lambda bad: infonce(q, k, negatives=None if bad else k, in_batch=False, gather=True),
        "hardness": lambda bad: infonce(q, k, hardness=-1.0 if bad else 0.5, gather=True),
        "sigmoid": lambda bad: siglip(q, k, bias=float("nan") if bad else -1.0, gather="ring"),
        "sigmoid positives": lambda bad: siglip(q, k, positives=positives + 3 * bad, gather=True),
        "bound": lambda bad: mi_lower_bound(q, k, bound="dvv" if bad else "dv", gather=True),
        "baseline": lambda bad: mi_lower_bound(q, k, bound="tuba", log_baseline=q[: 4 - bad, 0], gather="ring"),
        "average": lambda bad: mi_lower_bound(q, k, bound="mine", log_ema=torch.zeros(1 + bad), gather=True)[0],
        "scores": lambda bad: mi_lower_bound(draw(4) if bad else draw(4, 4 * size), gather=True),
        "estimator": lambda bad: estimator(features["Z"][:, : 4 - bad], features["Y"]).loss,
        "feature": lambda bad: objective({"Z": features["Z"]} if bad else features).loss,
        "rows of a feature": lambda bad: objective(features | ({"Y": draw(3, 2)} if bad else {})).loss,
        "products": lambda bad: (
            conditional(
                features | {"S": draw(4, 1)},
                None if bad else conditional.sample_products(features | {"S": draw(4, 1)}, 4),
            ).loss
        ),
    }


def mistake_of_one(rank, size, failing):
    texts = {}
    for name, call in mistakes(size).items():
        began = time.monotonic()
        try:
            call(rank == failing)
            texts[name] = "nothing was raised"
        except (EngineError, AttributeError) as error:
            texts[name] = f"{type(error).__name__} {error}"
        assert time.monotonic() - began < SECONDS
        # the ranks are in step: the next call works
        right = call(False)
        assert torch.isfinite(right), name
    return texts


@pytest.mark.parametrize(("size", "failing"), [(2, 0), (4, 2)])
def test_a_mistake_of_one_rank_is_told_to_the_others(ranks, size, failing):
    results = ranks(size).run(mistake_of_one, failing, seconds=280)
    for name, text in results[failing].items():
        kind, _, message = text.partition(" ")
        assert kind != "OtherRankFailed" and kind != "nothing", (name, text)
        message = f"{kind}: {message}" if kind == "AttributeError" else message
        for rank, others in enumerate(results):
            if rank != failing and name != "rows of a feature":  # of which all ranks see the numbers
                assert others[name] == f"OtherRankFailed rank {failing}: {message}", name


def several_mistakes(rank, size):
    group = find_ranks("test", True)
    try:
        with checked(group):
            if rank in (1, 3):
                raise ValueError(f"the one\nof rank {rank}")
        agree("test", group, torch.device("cpu"), {}, {})
    except Exception as error:
        return f"{type(error).__name__} {error}"


def test_mistakes_of_several_ranks(ranks):
    texts = ranks(4).run(several_mistakes)
    other = "OtherRankFailed rank 1 (and ranks [3]): ValueError: the one of rank 1"
    assert texts == [other, "ValueError the one\nof rank 1", other, "ValueError the one\nof rank 3"]


def different_operations(rank, size):
    q = draw(4, 5)
    calls = [lambda: infonce(q, q, gather=True), lambda: siglip(q, q, gather=True)]
    texts = []
    for call in (calls[rank], lambda: infonce(q, q, gather=(True, "ring")[rank])):
        try:
            call()
        except EngineError as error:
            texts.append(str(error))
    return texts


def test_ranks_in_different_operations(ranks):
    for texts in ranks(2).run(different_operations):
        assert len(texts) == 2 and all("ranks [1] in another operation than rank 0" in text for text in texts)


def gradients_on_one_rank(rank, size, bound):
    terms = [-1 * CMI("X", "Y", given="Z", bound=bound)]
    settings = ObjectiveConfig(hidden=4, k_neighbor=2)
    objective = Objective(terms, dims={"X": 3, "Y": 2, "Z": 1}, settings=settings, advise=False)
    objective.requires_grad_(False)
    features = {"X": draw(6, 3), "Y": draw(6, 2, seed=1), "Z": draw(6, 1, seed=2)}
    products = objective.sample_products(features, 6) if objective.needs_products else None
    if rank == 0:
        features["X"].requires_grad_()
    try:
        objective.model_loss(features, products)
    except EngineError as error:
        return str(error)


@pytest.mark.parametrize("bound", ["club", "dv"])
def test_features_with_gradients_on_one_rank_alone(ranks, bound):
    """Without an error its backward pass would wait for the others."""
    for text in ranks(2).run(gradients_on_one_rank, bound):
        assert "gradients of" in text and "on ranks [1, 0]" in text


def many_numbers(rank, size):
    group, names = find_ranks("test", True), range(3 * LENGTH)
    told = agree("test", group, torch.device("cpu"), {f"n{n}": n + rank for n in names}, {}, empty=True)
    try:
        agree("test", group, torch.device("cpu"), {}, {f"n{n}": rank * (n == 100) for n in names})
    except EngineError as error:
        return told["n0"], told["n150"], str(error)


def test_more_numbers_than_one_exchange_holds(ranks):
    for first, last, text in ranks(2).run(many_numbers):
        assert (first, last) == ([0, 1], [150, 151]) and "n100 on ranks [0, 1]" in text


def test_one_process_has_nobody_to_tell():
    with pytest.raises(ValueError, match="mine"), checked(None):
        raise ValueError("mine")
    assert not dist.is_initialized() and issubclass(OtherRankFailed, EngineError)
