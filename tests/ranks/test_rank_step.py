"""A step on several ranks is the step of one process on the whole batch: losses, gradients, ten steps, evaluation."""

import pytest
import torch
from torch import nn

from engine.config import ObjectiveConfig
from engine.errors import ConfigError
from engine.objective import CMI, MI, Objective
from engine.ranks import Ranks
from engine.step import TwoStageStep
from engine.step.bank import FeatureBank
from engine.training.passes import Share
from engine.training.rank_step import StepOnRanks

BATCH, ROWS = 8, 44  # five batches of 8, and a tail of 4; with 4 ranks the validation's tail is of 3
CONDITIONAL = ("Z", "Y", "S")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.z, self.y = nn.Linear(6, 4), nn.Linear(5, 3)
        self.head, self.unused = nn.Linear(7, 1), nn.Linear(2, 2)

    def forward(self, x):
        z, y = torch.tanh(self.z(x[:, :6])), torch.tanh(self.y(x[:, 6:]))
        return self.head(torch.cat([z, y], 1)), {"Z": z, "Y": y, "S": z[:, :1] * y[:, :1]}


class Dealt:
    """Batches as `Passes` gives them to a rank."""

    def __init__(self, x, target, ranks, batch=BATCH, deals=True):
        self.pieces = list(torch.arange(len(x)).split(batch))
        self.x, self.target, self.ranks, self.deals = x, target, ranks, deals

    def __len__(self):
        return len(self.pieces)

    def batch_sizes(self):
        return list(map(len, self.pieces))

    def __iter__(self):
        for rows in self.pieces:
            size, over = divmod(len(rows), self.ranks.size)
            own = None if over else slice(self.ranks.rank * size, (self.ranks.rank + 1) * size)
            inputs = self.x[rows] if own is None else self.x[rows][own]
            yield Share(inputs, own) if self.deals else inputs, self.target[rows], rows

    def turns(self):
        last, rest = len(self.pieces) - 1, -len(self.pieces) % self.ranks.size
        for number, rows in enumerate(self.pieces):
            own = number % self.ranks.size == self.ranks.rank
            if own or (number == last and self.ranks.rank >= self.ranks.size - rest):
                yield number, own, (self.x[rows], self.target[rows], rows)


def step_of(ranks, bound, dtype, optimizer=torch.optim.Adam, gather="gather", k=2, **options):
    torch.manual_seed(0)
    model, terms = Model().to(dtype), [MI("Z", "Y"), -0.5 * CMI("Z", "Y", given="S")]
    settings = ObjectiveConfig(hidden=8, embed=4, bound=bound, gather=gather, k_neighbor=k)
    objective = Objective(terms, {"Z": 4, "Y": 3, "S": 1}, settings=settings).to(dtype)
    make = (lambda *a, **k: TwoStageStep(*a, **k)) if ranks.size == 1 else (lambda *a, **k: StepOnRanks(ranks, *a, **k))
    optimizers = optimizer(model.parameters(), 1e-2), optimizer(objective.parameters(), 1e-2)
    return make(model, objective, nn.functional.mse_loss, *optimizers, label=None, **options)


def rows(dtype, count=ROWS):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 11, generator=generator, dtype=dtype)
    return x, (x[:, :1] * x[:, 7:8]).tanh()


def steps(rank, size, bound, stage1_features, options):
    """Two epochs (twelve steps of stage 2): every loss, the last gradients, the weights, the bank, an evaluation."""
    ranks, dtype = Ranks(rank, size), torch.float64
    step = step_of(ranks, bound, dtype, **options)
    data = rows(dtype)
    losses, plain, gathered = [], step.stage2, set()
    step.objective.register_forward_pre_hook(lambda objective, arguments: gathered.add(objective.gather))

    def stage2(*arguments, **keywords):
        output = plain(*arguments, **keywords)
        losses.append(output.loss.item())
        return output

    step.stage2 = stage2
    bank, information = None, []
    for _ in range(2):
        result, bank = step.train_epoch(
            Dealt(*data, ranks, deals=size > 1),
            ROWS,
            bank,
            batch_size=BATCH,
            stage1_n=2,
            stage1_features=stage1_features,
        )  # fmt: skip
        information.append({**result.information, **result.estimators})
    modules = {"model": step.model, "objective": step.objective}
    return {
        "losses": losses,
        "information": information,
        "gathered": sorted(gathered),
        "gradients": {f"{m} {n}": p.grad for m, module in modules.items() for n, p in module.named_parameters()},
        "weights": {f"{m} {n}": t for m, module in modules.items() for n, t in module.state_dict().items()},
        "bank": dict(bank.rows),
    }


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


CASES = [
    (2, "infonce", "cached", {}),
    (4, "infonce", "cached", {"clip_norm": 0.05}),
    (4, "mine", "bank", {"clip_value": 0.01, "gather": "ring"}),
    (2, "nwj", "fresh", {"average": 0.9}),
    (2, "smile", "cached", {"k": 3}),  # product rows that the ranks cannot share
]


@pytest.mark.parametrize(("size", "bound", "features", "options"), CASES)
def test_twelve_steps_equal_those_of_one_process(ranks, size, bound, features, options):
    expected = steps(0, 1, bound, features, options)
    assert len(expected["losses"]) == 12 and len(set(expected["losses"])) == 12
    expected.pop("gathered")
    shared = {"off"} if "k" in options else {options.get("gather", "gather")}
    shared |= {"off"} if size == 4 else set()  # the product rows of the last batch have two queries
    for found in ranks(size).run(steps, bound, features, options):
        assert set(found.pop("gathered")) == shared
        close(found, expected, 1e-9)


def refused(rank, size):
    try:
        step_of(Ranks(rank, size), "infonce", torch.float32, gather="off")
    except ConfigError as problem:
        return str(problem)


def test_terms_of_a_ranks_own_rows_are_refused(ranks):
    assert set(ranks(2).run(refused)) == {
        "objective.gather: found off on 2 ranks; expected gather or ring. Train in one process with a smaller "
        "batch_size for terms that see fewer rows."
    }


def evaluation(rank, size, count):
    ranks, dtype = Ranks(rank, size), torch.float32
    step, (x, target) = step_of(ranks, "infonce", dtype), rows(dtype, count)
    bank = step.model(x)[1]
    known = FeatureBank(count)
    known.store(torch.arange(count), bank)
    result = step.evaluate(Dealt(x, target, ranks, deals=False), known)
    return {
        "means": {"loss": result.loss, "task": result.task, **result.information},
        "prediction": result.prediction, "target": result.target, "features": dict(result.features),
    }  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("count", [43, 8, 17])  # 6, 1 and 3 batches; the last one of 17 has no information terms
def test_an_evaluation_is_that_of_one_process_to_the_last_bit(ranks, size, count):
    expected = evaluation(0, 1, count)
    for found in ranks(size).run(evaluation, count):
        assert found["means"] == expected["means"]
        assert torch.equal(found["prediction"], expected["prediction"])
        assert torch.equal(found["target"], expected["target"])
        assert all(torch.equal(found["features"][k], v) for k, v in expected["features"].items())


def joined_gradients(rank, size):
    """A loss of all rows together that differs between the ranks: the mean of the ranks' losses is differentiated."""
    ranks = Ranks(rank, size)
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    own = torch.arange(2.0, dtype=torch.float64) + 2 * rank
    (whole,) = ranks.join([weight * own])
    ((rank + 1) * whole.pow(2).sum()).backward()
    ranks.average_gradients([weight])
    return whole.detach(), weight.grad


def test_gradients_are_those_of_the_mean_of_the_ranks_losses(ranks):
    every = torch.arange(4.0, dtype=torch.float64)
    for whole, gradient in ranks(2).run(joined_gradients):
        close(whole, 2 * every, 0)
        close(gradient, (2 * 2.0 * every.pow(2).sum() * (1 + 2) / 2).reshape(1), 0)


def averaged(rank, size):
    """Gradients that some ranks or all of them lack, of two types, in buckets of one parameter."""
    from engine import ranks as module

    module.BUCKET = 1
    given = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1).double())]
    nowhere, frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)
    given[0].grad = torch.full((3,), float(rank))
    if rank == 1:
        given[1].grad = torch.full((2, 2), 6.0)
    given[2].grad = torch.full((1,), 10.0**rank).double()
    Ranks(rank, size).average_gradients([*given, nowhere, frozen])
    return [p.grad for p in given], nowhere.grad is None, frozen.grad is None


def test_gradients_that_some_ranks_lack_count_as_zero(ranks):
    for grads, nowhere, frozen in ranks(2).run(averaged):
        close(grads, [torch.full((3,), 0.5), torch.full((2, 2), 3.0), torch.tensor([5.5]).double()], 0)
        assert nowhere and frozen


def exchanged(rank, size):
    ranks = Ranks(rank, size)
    gathered = ranks.gather({"rank": rank, "rows": torch.arange(rank), "text": ("é" * rank, None)})
    told = ranks.tell([rank, "x"])
    return gathered, told, ranks.join_rows(torch.full((rank, 2), float(rank)), [0, 1])


def test_values_travel_to_all_ranks(ranks):
    for gathered, told, joined in ranks(2).run(exchanged):
        assert [g["rank"] for g in gathered] == [0, 1] and gathered[1]["text"] == ("é", None)
        assert [len(g["rows"]) for g in gathered] == [0, 1] and told == [0, "x"]
        assert joined.tolist() == [[1.0, 1.0]]
