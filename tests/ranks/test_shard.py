"""A sharded text encoder: the run of one process, what each rank holds, checkpoints, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from engine import checkpoint, trainer
from engine.errors import EngineError
from engine.model.fused_bert import fusable
from engine.sharded import is_sharded, local
from engine.training.rank_step import StepOnRanks
from engine.training.sharding import _shard
from tests.loaders import writers
from tests.ranks.test_run import assert_same_run, close
from tests.small_runs import make_text_encoder, small_config


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("shard")
    encoder = make_text_encoder(folder / "bert", dropout=0.0)
    writers.write_declarelab(folder / "data", writers.samples(sizes={"train": 21, "valid": 6, "test": 9}))
    return str(folder / "data"), str(encoder)


def settings(place, **train):
    config = small_config(Path(place[0]), Path(place[1]))
    config.model.dropout, config.model.modality_dropout = [0.0] * 4, 0.0
    config.epochs, config.threads, config.batch_size, config.device = train.pop("epochs", 2), 1, 8, "cpu"
    config.output.features, config.text.freeze = train.pop("features", False), train.pop("freeze", "no")
    for name, value in ({"average": 0.9, "amp": "off", "optimizer": "sgd", "stage1_n": 1} | train).items():
        setattr(config.train, name, value)
    return config


def run(rank, size, out, place, resume=False, **train):
    """A run. Returns how much of the text encoder this rank held while it trained, of how much."""
    held, plain = {}, StepOnRanks.stage2

    def stage2(self, *arguments, **options):
        parameters = list(self.model.text_encoder.parameters())
        held["part"], held["whole"] = sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)
        held["sharded"] = all(map(is_sharded, parameters))
        held["fused"] = fusable(self.model.text_encoder.model)  # which would read weights past FSDP
        return plain(self, *arguments, **options)

    StepOnRanks.stage2 = stage2
    try:
        trainer.train(settings(place, **train), out, resume=resume)
    finally:
        StepOnRanks.stage2 = plain
    return held


def sharded(rank, size, out, place, train, resume=False):
    return run(rank, size, out, place, resume, shard=True, **train)


@pytest.mark.parametrize(
    "train", [{"features": True, "clip_value": 0.01}, {"clip_norm": 0.05, "clip_value": None}], ids=["value", "norm"]
)
def test_a_sharded_run_is_that_of_one_process(ranks, place, tmp_path, train):
    run(0, 1, str(tmp_path / "one"), place, **train)
    held = ranks(2).run(sharded, str(tmp_path / "two"), place, train)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    one, two = (checkpoint.load(tmp_path / n / "last.safetensors")[0]["optimizers"] for n in ("one", "two"))
    close(two, one)
    assert sum(h["part"] for h in held) == held[0]["whole"] and all(h["sharded"] and not h["fused"] for h in held)
    assert all(0.45 < h["part"] / h["whole"] < 0.55 for h in held)


class Died(EngineError):
    pass


def survived(rank, size, whole, out, place, train):
    """A whole run, and one that ends in the middle of its second epoch and goes on."""
    sharded(rank, size, whole, place, train)
    plain, steps = StepOnRanks.stage2, 0

    def stage2(self, *arguments, **options):
        nonlocal steps
        steps += 1
        if steps == 6:
            raise Died("here", "an end", "none", "")
        return plain(self, *arguments, **options)

    StepOnRanks.stage2 = stage2
    try:
        trainer.train(settings(place, shard=True, **train), out)
    except Died:
        pass
    finally:
        StepOnRanks.stage2 = plain
    within = checkpoint.load_meta(Path(out) / "last.safetensors")["within"]
    sharded(rank, size, out, place, train, resume=True)
    return within["epoch"], within["stage"]


def test_resuming_within_an_epoch_is_bit_equal(ranks, place, tmp_path):
    train = {"optimizer": "adam", "checkpoint_steps": 1, "freeze": "part"}
    ended = ranks(2).run(survived, str(tmp_path / "whole"), str(tmp_path / "parts"), place, train)
    assert ended[0] == (1, "stage2")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 0)
    parts, whole = (
        [checkpoint.load(tmp_path / run / f"{name}.safetensors")[0] for name in ("last", "best")]
        for run in ("parts", "whole")
    )
    close(parts[0]["optimizers"], whole[0]["optimizers"], 0)
    close(parts[1], whole[1], 0)


def test_a_run_goes_on_with_and_without_shards(ranks, place, tmp_path):
    """Epoch 0 in one process, epoch 1 sharded, epoch 2 in one process: all by the same sums."""
    run(0, 1, str(tmp_path / "one"), place, epochs=3)
    out = str(tmp_path / "mixed")
    run(0, 1, out, place, epochs=1)
    ranks(2).run(sharded, out, place, {"epochs": 2}, True)
    metrics = json.loads((tmp_path / "mixed" / "metrics.json").read_text())["valid"]
    found = trainer.evaluate(out, place[0], "valid", device="cpu")
    close(found, {k: metrics[k] for k in found})
    state = checkpoint.load(tmp_path / "mixed" / "last.safetensors")[0]["optimizers"]["main"]
    assert [(g["fused"], g["foreach"]) for g in state["param_groups"]] == [(True, None)] * 2
    with pytest.warns(UserWarning, match="ranks 1, not 2, shard False, not True"):
        run(0, 1, out, place, resume=True, epochs=3)
    assert_same_run(tmp_path / "mixed", tmp_path / "one")


def frozen_and_padded(rank, size, out, place):
    """An encoder that does not train, and one that other ranks would call in another number of groups of texts."""
    from engine.model import text_encoder

    sharded(rank, size, out, place, {"freeze": "all", "epochs": 1})
    before, text_encoder.PACKABLE = text_encoder.PACKABLE, ()
    try:
        sharded(rank, size, out + "-padded", place, {"epochs": 1})
    finally:
        text_encoder.PACKABLE = before


def test_a_frozen_encoder_and_one_that_cannot_be_packed(ranks, place, tmp_path):
    run(0, 1, str(tmp_path / "all"), place, freeze="all", epochs=1)
    run(0, 1, str(tmp_path / "no"), place, epochs=1)
    ranks(2).run(frozen_and_padded, str(tmp_path / "run"), place)
    assert_same_run(tmp_path / "run", tmp_path / "all")
    assert_same_run(tmp_path / "run-padded", tmp_path / "no")


# -- gradients -------------------------------------------------------------------------------------


def gradients(rank, size):
    """Clipping and the look for non-finite gradients, with a sharded and a plain layer."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    from engine.errors import NonFiniteError
    from engine.sharded import clip_norm, clip_values, gathered
    from engine.step import TwoStageStep

    model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Linear(1, 2))
    fully_shard(model[0], mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    parameters = list(model.parameters())  # of the weight [1, 3] rank 1 holds nothing

    def set_gradients(values):
        for p, value in zip(parameters, values, strict=True):
            p.grad = torch.zeros_like(p)
            local(p.grad).fill_(value)

    found = {}
    set_gradients([3.0, -4.0, 1.0, 2.0])
    clip_values(parameters, 2.5)
    found["values"] = [gathered(p.grad).flatten() for p in parameters]
    set_gradients([3.0, -4.0, 1.0, 2.0])
    clip_norm(parameters, 1.0)
    found["norm"] = [gathered(p.grad).flatten() for p in parameters]
    step = TwoStageStep(model, None, torch.nn.functional.mse_loss, torch.optim.SGD(parameters, 0.1))
    set_gradients([1.0, float("inf"), 1.0, 1.0])
    try:
        step.finite.check_gradients(step.main_optimizer)
    except NonFiniteError as problem:
        found["error"] = str(problem)
    return found


def test_clipping_and_the_look_at_gradients(ranks):
    for found in ranks(2).run(gradients):
        values = [[2.5] * 3, [-2.5], [1.0] * 2, [2.0] * 2]
        close(found["values"], [torch.tensor(v) for v in values])
        total = (3 * 9 + 16 + 2 + 8) ** 0.5
        scaled = [[3 / total] * 3, [-4 / total], [1 / total] * 2, [2 / total] * 2]
        close(found["norm"], [torch.tensor(v) for v in scaled])
        assert found["error"].startswith("gradient of 0.bias: found values that are not finite; ")


def skipped(rank, size, out, place):
    """A run whose second step has a gradient that is not finite on rank 0 alone, and is left out."""
    apply, steps = StepOnRanks._apply, 0

    def spoiled(self, optimizer, scaler):
        nonlocal steps
        if optimizer is self.main_optimizer:
            steps += 1
            if steps == 2 and rank == 0:
                bias = self.model.text_encoder.model.encoder.layer[1].output.dense.bias
                local(bias.grad)[0] = float("nan")
        return apply(self, optimizer, scaler)

    StepOnRanks._apply = spoiled
    try:
        result = trainer.train(settings(place, shard=True, epochs=1, non_finite="skip"), out)
    finally:
        StepOnRanks._apply = apply
    return result.metrics["skipped_steps"]


def test_a_step_is_left_out_on_all_ranks(ranks, place, tmp_path):
    assert ranks(2).run(skipped, str(tmp_path / "run"), place) == [1, 1]
    state = checkpoint.load(tmp_path / "run" / "last.safetensors")[0]
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


# -- what is refused -------------------------------------------------------------------------------


def refusals(rank, size, out, place):

    messages = []
    compiled = settings(place, shard=True, compile="default")
    without = settings(place, shard=True)
    without.data.modalities = "audio-vision"
    for config in (compiled, without):
        try:
            trainer.train(config, out)
        except EngineError as problem:
            messages.append(str(problem))
    tied = torch.nn.Module()
    tied.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))
    tied.layers[1][0].weight = tied.layers[0][0].weight
    try:
        _shard(tied, torch.device("cpu"))
    except EngineError as problem:
        messages.append(str(problem))
    return messages


def test_refusals(ranks, place, tmp_path):
    assert ranks(2).run(refusals, str(tmp_path / "run"), place)[0] == [
        "train.compile: found default with train.shard=true; expected off, or train.shard=false. Set "
        "train.compile=off, or train.shard=false.",
        "train.shard: found true in a run without a text encoder; expected a text encoder, which it shards. Set "
        "train.shard=false.",
        "train.shard: found a text encoder that FSDP2 cannot shard (layers that share weights); expected another one, "
        "or train.shard=false. Set train.shard=false.",
    ]
    with pytest.warns(UserWarning, match="train.shard=true changes nothing on one rank") as warned:
        run(0, 1, str(tmp_path / "one"), place, shard=True, epochs=1)
    assert sum("train.shard" in str(w.message) for w in warned) == 1
