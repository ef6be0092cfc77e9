"""Objectives, estimators and modules over ranks train like one process on the joined batch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from engine.config import ObjectiveConfig
from engine.errors import ConfigError, EngineError
from engine.kernels import InfoNCE, MILowerBound, concat_infonce, grouped_infonce, registry
from engine.kernels.knn_product.op import ProductRows
from engine.mimrl.published import published_estimator
from engine.model.cmi import CMIEstimator
from engine.model.estimators import MIEstimator
from engine.objective import CMI, MI, Objective
from engine.vocabulary import BOUNDS

ROWS = {2: (7, 5), 4: (4, 2, 3, 3)}
# All four combinations are tested with every bound, below and in test_gather.py.
BOTH = pytest.mark.parametrize(("size", "gather"), [(2, "gather"), (4, "ring")])
DIMS = {"Z": 4, "Y": 2, "S": 1}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(x: Tensor, rank: int, counts) -> Tensor:
    return x.split(list(counts))[rank].clone()


# -- the objective's losses ------------------------------------------------------------------------

K = 2


class Bilinear(nn.Module):
    """A user's own estimator: DV of bilinear scores."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(draw(2, 4, seed=50) / 4)

    def forward(self, x, y):
        from engine.kernels.mi_bounds.reference import bound_value
        from engine.model.estimators import Estimate

        value, surrogate = bound_value(y @ self.weight @ x.T, "dv")
        return Estimate(value, surrogate, -surrogate)


CASES = {
    **{bound: {"bound": bound} for bound in BOUNDS},
    **{f"concat {bound}": {"bound": bound, "critic": "concat"} for bound in ("infonce", "dv", "mine", "interpolate")},
    "baseline": {"bound": "tuba", "baseline": "unnormalized"},
    "concat baseline": {"bound": "interpolate", "baseline": "unnormalized", "critic": "concat"},
    "cmi dv": {"cmi_estimator": "dv"},
    "cmi nwj": {"cmi_estimator": "nwj"},
    "published": {"published": True},
    "published concat": {"published": True, "critic": "concat"},
    "published mine": {"published": True, "bound": "mine"},
    "own": {"own": True},
    "club": {"upper": "club"},
    "leave one out": {"upper": "l1out"},
}


def build(name: str, gather: str) -> Objective:
    options = dict(CASES[name])
    published, custom = options.pop("published", False), options.pop("own", False)
    upper = options.pop("upper", None)
    settings = ObjectiveConfig(hidden=6, embed=5, ema_rate=0.3, k_neighbor=K, **options)
    torch.manual_seed(3)
    second = 0.2 * MI("Z", "S") if upper is None else -0.2 * MI("Z", "S", bound=upper)
    terms = [0.5 * MI("Z", "Y"), second, 0.3 * CMI("Z", "Y", given="S"), 0.1 * CMI("Y", "Z", given="S")]
    objective = Objective(
        terms, dims=DIMS, settings=settings, make_estimator=published_estimator if published else None, gather=gather
    ).double()
    if custom:
        objective.replace("I(Z;Y)", Bilinear())
    return objective


def batch(counts) -> dict[str, Tensor]:
    z = draw(sum(counts), 4, seed=1)
    return {"Z": z, "Y": z[:, :2] + draw(sum(counts), 2, seed=2), "S": z[:, :1] + draw(sum(counts), 1, seed=3)}


def product_rows(counts) -> list[dict[str, ProductRows]]:
    """Product rows of every rank: m_r = counts_r // K queries of its own."""
    rows = []
    for rank, count in enumerate(counts):
        m = count // K
        parts = {"Z": 4, "Y": 2}
        rows.append(
            {
                f"I({x};{y}|S)": ProductRows(
                    draw(m * K, parts[x], seed=10 + rank),
                    draw(m, parts[y], seed=20 + rank),
                    draw(m, 1, seed=30 + rank),
                    K,
                )
                for x, y in (("Z", "Y"), ("Y", "Z"))
            }
        )
    return rows


def joined_products(of_ranks) -> dict[str, ProductRows]:
    return {
        name: ProductRows(*(torch.cat([getattr(rows[name], part) for rows in of_ranks]) for part in "xyz"), K)
        for name in of_ranks[0]
    }


def both_stages(objective, features, products):
    """Losses, values, gradients of parameters (stage 1) and of features (stage 2), and buffers after two batches."""
    first = objective(features, products, stage="estimators")
    first.loss.backward()
    gradients = objective.estimator_state(grads=True)
    leaves = {name: value.clone().requires_grad_() for name, value in features.items()}
    second = objective(leaves, products, stage="model")
    of_features = torch.autograd.grad(second.loss, list(leaves.values()))
    buffers = {name: b.clone() for name, b in objective.named_buffers()}
    return {
        "losses": torch.stack([first.loss.detach(), second.loss.detach()]),
        "values": {**first.values, **second.values},
        "details": {n: {k: v.clone() for k, v in e.details.items()} for n, e in first.estimates.items()},
        "gradients": {n: g.clone() for n, g in gradients.items() if g is not None},
        "features": dict(zip(leaves, of_features, strict=True)),
        "buffers": buffers,
    }


def objective_on_a_rank(rank, size, gather, counts):
    features = {name: own(value, rank, counts) for name, value in batch(counts).items()}
    return {name: both_stages(build(name, gather), features, product_rows(counts)[rank]) for name in CASES}


@BOTH
def test_objective_equals_the_joined_batch(ranks, size, gather):
    counts = ROWS[size]
    results = ranks(size).run(objective_on_a_rank, gather, counts)
    close = {"rtol": 1e-9, "atol": 1e-11}
    for name in CASES:
        right = both_stages(build(name, "off"), batch(counts), joined_products(product_rows(counts)))
        for rank, result in enumerate(results):
            found = result[name]
            for part in ("losses", "values", "details", "buffers"):
                torch.testing.assert_close(
                    found[part], right[part], **close, msg=lambda m, n=name, p=part: f"{n} {p}: {m}"
                )
            expected = {n: size * own(g, rank, counts) for n, g in right["features"].items()}
            torch.testing.assert_close(found["features"], expected, **close, msg=lambda m, n=name: f"{n}: {m}")
        mean = {n: torch.stack([r[name]["gradients"][n] for r in results]).mean(0) for n in right["gradients"]}
        torch.testing.assert_close(mean, right["gradients"], **close, msg=lambda m, n=name: f"{n}: {m}")


def off_on_a_rank(rank, size, counts):
    features = {name: own(value, rank, counts) for name, value in batch(counts).items()}
    return both_stages(build("infonce", "off"), features, product_rows(counts)[rank])


def test_off_estimates_from_own_rows(ranks):
    counts = (8, 8)
    results = ranks(2).run(off_on_a_rank, counts)
    for rank, result in enumerate(results):
        features = {name: own(value, rank, counts) for name, value in batch(counts).items()}
        right = both_stages(build("infonce", "off"), features, product_rows(counts)[rank])
        torch.testing.assert_close(result["losses"], right["losses"])
    assert (results[0]["losses"] - results[1]["losses"]).abs().max() > 1e-3


# -- faults ----------------------------------------------------------------------------------------


def faults_on_a_rank(rank, size):
    """What every rank says to a value that is not finite on rank 1 alone, and to a rank without product rows."""
    counts, said = (6, 6), {}
    for name in ("infonce", "dv", "smile", "mine", "concat dv", "published mine"):
        for policy in ("raise", "skip"):
            features = {n: own(value, rank, counts) for n, value in batch(counts).items()}
            if rank == 1:
                features["Z"][0] = float("nan")
            options = {n: v for n, v in CASES[name].items() if n != "published"}
            settings = ObjectiveConfig(hidden=6, embed=5, on_degenerate=policy, **options)
            make = published_estimator if "published" in CASES[name] else None
            objective = Objective([MI("Z", "Y")], dims=DIMS, settings=settings, make_estimator=make).double()
            try:
                said[f"{name} {policy}"] = float(objective(features).loss.detach())
            except EngineError as error:
                said[f"{name} {policy}"] = str(error)
    features = {n: own(value, rank, counts) for n, value in batch(counts).items()}
    products = product_rows((6, 1) if rank else (6, 6))[rank]
    objective = build("infonce", "gather")
    said["one rank has no product rows"] = float(objective(features, products).loss.detach())
    return said


def test_a_fault_of_one_rank_is_handled_alike_on_all(ranks):
    said = ranks(2).run(faults_on_a_rank)
    assert said[0] == said[1]
    for case, answer in said[0].items():
        if case.endswith("raise"):
            assert "expected" in str(answer) and "\n" not in answer, case
        elif case.endswith("skip"):
            assert answer == 0.0, case
    counts = (6, 6)
    only_first = {n: ProductRows(r.x, r.y, r.z, K) for n, r in product_rows((6, 6))[0].items()}
    right = build("infonce", "off")(batch(counts), only_first).loss
    assert abs(said[0]["one rank has no product rows"] - float(right.detach())) < 1e-9


def averages_on_a_rank(rank, size):
    """MINE's average after a batch whose last rank is not finite, where values cannot be read, as on a GPU."""
    counts, averages = (6, 6), {}
    good = {n: own(value, rank, counts) for n, value in batch(counts).items()}
    bad = good | ({"Z": good["Z"] * float("nan")} if rank == size - 1 else {})
    for critic in ("separate", "concat"):
        for policy in ("raise", "skip"):
            settings = {"hidden": 6, "embed": 5, "bound": "mine", "critic": critic, "on_degenerate": policy}
            torch.manual_seed(4)
            one = MIEstimator(4, 2, gather=True, **settings).double()
            several = Objective([MI("Z", "Y"), MI("Z", "S")], dims=DIMS, settings=ObjectiveConfig(**settings)).double()
            for name, module, call in (("one", one, lambda f, e=one: e(f["Z"], f["Y"])), ("group", several, several)):
                call(good)
                before = [b.clone() for n, b in module.named_buffers() if "log_ema" in n]
                with registry.static():
                    call(bad)
                after = [b.clone() for n, b in module.named_buffers() if "log_ema" in n]
                averages[f"{critic} {name} {policy}"] = torch.stack(
                    [torch.cat([b.reshape(-1) for b in before]), torch.cat([b.reshape(-1) for b in after])]
                )
    return averages


def test_a_batch_that_is_left_out_does_not_reach_mines_average(ranks):
    for averages in ranks(2).run(averages_on_a_rank):
        for case, (before, after) in averages.items():
            assert before.isfinite().all() and (before != 0).all(), case
            assert torch.equal(before, after) if case.endswith("skip") else after.isnan().all(), case


def again_on_a_rank(rank, size):
    """What a backward pass says that runs the forward pass again, of a single MINE and of a group of two."""
    features = {name: torch.randn(4, 3).requires_grad_() for name in "abc"}
    said = []
    for pairs, critic in (("b", "separate"), ("b", "concat"), ("bc", "separate")):
        objective = Objective(
            [MI("a", other, bound="mine", critic=critic) for other in pairs],
            dims=dict.fromkeys("abc", 3),
            gather="ring",
        )
        loss = checkpoint(lambda: objective(features, {}, stage="model").loss, use_reentrant=False)  # noqa: B023
        try:
            loss.backward()
            said.append("nothing")
        except ConfigError as problem:
            said.append(str(problem))
    return said


def test_mine_over_ranks_is_not_run_again_within_a_backward_pass(ranks):
    for said in ranks(2).run(again_on_a_rank):
        assert len(said) == 3 and all("while a backward pass runs" in line for line in said), said


# -- single estimators and functions ---------------------------------------------------------------


def singles(rank=None, size=1, counts=(), gather=False):
    """Values and gradients of parameters of estimators and of the critics' functions."""
    features, products = batch(counts), joined_products(product_rows(counts))
    if rank is not None:
        features = {name: own(value, rank, counts) for name, value in features.items()}
        products = product_rows(counts)[rank]
    results = []
    for options in ({"bound": "dv"}, {"bound": "infonce", "critic": "concat"}, {"bound": "nwj", "activation": "tanh"}):
        torch.manual_seed(4)
        estimator = MIEstimator(4, 2, hidden=6, embed=3, gather=gather, **options).double()
        estimate = estimator(features["Z"], features["Y"])
        gradients = torch.autograd.grad(estimate.loss, [p for n, p in estimator.named_parameters() if "mlp" not in n])
        results.append([estimate.value, *gradients])
    torch.manual_seed(5)
    conditional = CMIEstimator(4, hidden=6, estimator="dv", gather=gather).double()
    estimate = conditional(tuple(features[n] for n in "ZYS"), tuple(products["I(Z;Y|S)"]))
    results.append([estimate.value, *torch.autograd.grad(estimate.loss, list(conditional.parameters()))])
    x, y = features["Z"], features["Y"]
    weights = [draw(6, 6, seed=60), draw(6, seed=61), draw(1, 6, seed=62), draw(1, seed=63)]
    for transpose in (False, True):
        leaves = [w.clone().requires_grad_() for w in weights]
        pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
        value = concat_infonce(x, y, pairs, transpose=transpose, gather=gather)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    towers = [draw(1, 6, 4, seed=70), draw(1, 6, seed=71), draw(1, 6, 2, seed=72), draw(1, 6, seed=73)]
    leaves = [w.requires_grad_() for w in (*towers, draw(2, 3, 6, seed=74), draw(2, 3, seed=75))]
    pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
    value = grouped_infonce([x, y], pairs[:2], pairs[2:], rows=[1], columns=[0], gather=gather)
    results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    return results


@pytest.mark.parametrize("gather", ["gather", "ring"])
def test_single_estimators_equal_the_joined_batch(ranks, gather):
    counts = ROWS[4]
    results = ranks(4).run(singles, counts, True if gather == "gather" else gather)
    for number, (value, *gradients) in enumerate(singles(counts=counts)):
        for result in results:
            torch.testing.assert_close(result[number][0], value)
        mean = [torch.stack(parts).mean(0) for parts in zip(*(r[number][1:] for r in results), strict=True)]
        torch.testing.assert_close(mean, gradients)


# -- ten steps -------------------------------------------------------------------------------------

STEPS = 10


class Pair(nn.Module):
    """Two encoders and a loss of their embeddings."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        torch.manual_seed(6)
        self.of_y, self.of_x = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)) for _ in range(2))
        self.criterion = criterion

    def forward(self, x, y):
        value = self.criterion(self.of_y(y), self.of_x(x))
        return value if isinstance(self.criterion, InfoNCE) else -value


def criteria(gather) -> dict[str, nn.Module]:
    over = {"gather": gather}
    losses = {bound: MILowerBound(bound, alpha=0.3, smile_tau=1.0, ema_rate=0.2, **over) for bound in BOUNDS}
    losses["clip"] = InfoNCE(0.5, learnable=True, cosine=True, symmetric=True, **over)
    losses["learned"] = InfoNCE(0.5, learnable=True, **over)
    return losses


def train(model: nn.Module, rows: slice | None) -> tuple[list[float], dict[str, Tensor]]:
    inner = getattr(model, "module", model)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        x = draw(8, 4, seed=100 + step).float()
        y = x + 0.5 * draw(8, 4, seed=200 + step).float()
        loss = model(*((x, y) if rows is None else (x[rows], y[rows])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: tensor.detach().clone() for name, tensor in inner.state_dict().items()}


def trajectories_on_a_rank(rank, size, gather):
    begin = rank * 8 // size
    rows = slice(begin, begin + 8 // size)
    return {n: train(DistributedDataParallel(Pair(c)), rows) for n, c in criteria(gather).items()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("gather", [True, "ring"])
def test_ten_steps_of_ddp_equal_one_process(ranks, size, gather):
    """Every bound, MINE's average included, and learned temperatures: losses and weights of fp32 training."""
    results = ranks(size).run(trajectories_on_a_rank, gather)
    for name, criterion in criteria(False).items():
        losses, weights = train(Pair(criterion), None)
        assert losses[0] != losses[-1]
        for result in results:
            found_losses, found = result[name]
            assert found_losses == pytest.approx(losses, rel=1e-5, abs=1e-5), name
            torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def stages(objective, encoder, rows, products, wrap):
    """Ten steps of stage 1, with stage 2 after each, as two-stage training takes them."""
    trained = wrap(objective)
    first = torch.optim.Adam(objective.parameters(), lr=1e-2, eps=1e-3)
    second = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for step in range(STEPS):
        data = batch((12,))
        raw = {n: (v + 0.1 * step * draw(*v.shape, seed=300 + step))[rows] for n, v in data.items()}
        features = {"Z": encoder(raw["Z"]), "Y": raw["Y"], "S": raw["S"]}
        first.zero_grad()
        trained({n: v.detach() for n, v in features.items()}, products, stage="estimators").loss.backward()
        first.step()
        second.zero_grad()
        trained(features, products, stage="model").loss.backward()
        for p in encoder.parameters():
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(p.grad)
                p.grad /= torch.distributed.get_world_size()
        second.step()
    return {**objective.estimator_state(), **{f"encoder {n}": p.detach() for n, p in encoder.named_parameters()}}


def encoder_of() -> nn.Module:
    torch.manual_seed(8)
    return nn.Linear(4, 4).double()


def stages_on_a_rank(rank, size, gather, counts):
    begin = sum(counts[:rank])
    rows, products = slice(begin, begin + counts[rank]), product_rows(counts)[rank]
    states = {}
    for name in ("infonce", "mine", "concat interpolate", "cmi dv"):
        state = stages(build(name, gather), encoder_of(), rows, products, DistributedDataParallel)
        states[name] = {n: t.clone() for n, t in state.items()}
    return states


@BOTH
def test_ddp_of_an_objective_trains_like_one_process(ranks, size, gather):
    counts = ROWS[size]
    results = ranks(size).run(stages_on_a_rank, gather, counts)
    for name in results[0]:
        products = joined_products(product_rows(counts))
        right = stages(build(name, "off"), encoder_of(), slice(None), products, lambda module: module)
        for result in results:
            torch.testing.assert_close(result[name], right, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def sharded_on_a_rank(rank, size, counts):
    from torch.distributed.fsdp import fully_shard

    features = {n: own(v, rank, counts) for n, v in batch(counts).items()}
    objective = fully_shard(build("dv", "ring"))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        objective(features, product_rows(counts)[rank]).loss.backward()
        optimizer.step()
    return {n: p.full_tensor().detach() for n, p in objective.named_parameters()}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fsdp2_of_an_objective_trains_like_one_process(ranks):
    counts = ROWS[2]
    results = ranks(2).run(sharded_on_a_rank, counts)
    objective = build("dv", "off")
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        objective(batch(counts), joined_products(product_rows(counts))).loss.backward()
        optimizer.step()
    for result in results:
        torch.testing.assert_close(result, {n: p.detach() for n, p in objective.named_parameters()})


def loaded_on_a_rank(rank, size):
    from torch.distributed.fsdp import fully_shard

    objectives = [fully_shard(build("mine", "off")) for _ in range(2)]
    with torch.no_grad():
        for parameter in objectives[0].parameters():
            parameter.add_(1)
    state = objectives[0].state_dict()
    objectives[1].load_state_dict(state)
    loaded = objectives[1].state_dict()
    return [any(n.startswith("estimators.groups") for n in state), state.keys() == loaded.keys()] + [
        torch.equal(getattr(loaded[n], "full_tensor", lambda n=n: loaded[n])(), t.full_tensor())
        for n, t in state.items()
        if hasattr(t, "full_tensor")
    ]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_state_of_a_sharded_objective_is_loaded(ranks):
    for same in ranks(2).run(loaded_on_a_rank):
        assert len(same) > 6 and all(same), same


# -- one process -----------------------------------------------------------------------------------


def test_forward_is_the_loss_of_its_stage():
    objective, features, products = build("infonce", "gather"), batch((12,)), joined_products(product_rows((12,)))
    assert torch.equal(objective(features, products).loss, objective.estimator_loss(features, products).loss)
    of_model = objective(features, products, stage="model").loss
    assert torch.equal(of_model, objective.model_loss(features, products).loss)
    with pytest.raises(EngineError, match="stage 'both'"):
        objective(features, products, stage="both")
    with pytest.raises(EngineError, match="circle"):
        Objective([MI("Z", "Y")], dims=DIMS, gather="circle")
    assert copy.deepcopy(objective).gather == "gather"


def test_ranks_without_a_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    features, products = batch((12,)), joined_products(product_rows((12,)))
    with pytest.raises(EngineError, match="WORLD_SIZE=2, no process group"):
        build("infonce", "gather")(features, products)
    assert build("infonce", "off")(features, products).loss.isfinite()
