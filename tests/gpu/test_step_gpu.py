"""The two-stage step on a GPU: the numbers of the CPU, step after step, and captured those of the uncaptured."""

import json

import pytest
import torch

from bench import shapes
from bench.epochs import tiny_batch, tiny_pair
from engine.kernels.knn_product import Bank
from engine.step import updates
from tests.step import test_static as static

STEPS = 20


@pytest.fixture(autouse=True)
def float32():
    """Both devices compute in float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def trajectory(mode: str, device: str) -> list[list[float]]:
    """Losses of both stages over 20 steps; product rows are drawn by the CPU's generator, and so the same."""
    step = tiny_pair(mode, device).step
    first = tiny_batch(64, 99, device)
    with torch.no_grad():
        bank = Bank(step.forward(first, first.label)[1])
    losses = []
    for number in range(STEPS):
        batch = tiny_batch(16, number, device)
        products = step.draw_products(bank, 16)
        with torch.no_grad():
            features = step.forward(batch, batch.label)[1]
        one = step.stage1(features, products)
        two = step.stage2(batch, batch.label, products)
        losses.append([one.loss.item(), two.loss.item(), two.task.item()])
    return losses


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_eager_steps_are_those_of_the_cpu(mode):
    expected, found = trajectory(mode, "cpu"), trajectory(mode, "cuda")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)


# -- captured ---------------------------------------------------------------------------------------------------------

EPOCHS = 5  # of five batches, the last of them smaller


def epochs(graphs, change=lambda step: None, **options):
    """Every number of some epochs on the GPU, and the weights at the end."""
    step = static.make(graphs, device="cuda", **options)
    loader = [tuple(t.cuda() for t in batch) for batch in static.batches(n=static.N)]
    first = static.run(step, EPOCHS, loader)
    change(step)
    second = static.run(step, 2, loader)
    return step, ([*first[0], *second[0]], second[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": static.sgd},
        {"average": 0.98, "clip_norm": 1.0, "clip_value": 0.5},
        {"autocast": torch.bfloat16},
        {"autocast": torch.float16},
        {"settings": {"bound": "mine"}},
        {"settings": {"critic": "concat"}},
        {"settings": {"compat": "mimrl"}},
    ],
    ids=["plain", "sgd", "average and clipping", "bf16", "fp16", "mine", "concat", "mimrl"],
)
def test_graph_emulate_and_eager_give_the_same_trajectory(options):
    _, eager = epochs("off", **options)
    _, emulated = epochs("emulate", **options)
    step, captured = epochs(True, **options)
    assert len(step.static.graphs) > 0
    static.assert_equal(captured, emulated, rtol=1e-4, atol=1e-5)
    static.assert_equal(captured, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda step: step.main_optimizer.param_groups[0].update(lr=0.001),
        lambda step: step.main_optimizer.param_groups[0].update(weight_decay=0.5),
        lambda step: step.model.head.weight.requires_grad_(False),
        lambda step: setattr(step.model.head, "weight", torch.nn.Parameter(torch.zeros(1, 8, device="cuda"))),
    ],
    ids=["lr", "weight decay", "frozen", "replaced"],
)
def test_a_change_after_capture_takes_effect(change):
    (_, emulated), (_, captured) = (epochs(g, change, optimizer=static.sgd) for g in ("emulate", True))
    static.assert_equal(captured, emulated, rtol=1e-4, atol=1e-5)


def damped(parameters):
    """Without full steps of what is rounding alone, such as the gradient of a critic's last bias."""
    return torch.optim.AdamW(parameters, 1e-2, eps=1e-2, fused=True)


@pytest.mark.parametrize(
    "options",
    [
        {"average": 0.98, "clip_value": 0.01},
        {"average": 0.98, "clip_norm": 0.1, "non_finite": "skip"},
        {"average": 0.98, "autocast": torch.float16},
    ],
    ids=["average and clipping", "skip", "fp16"],
)
@pytest.mark.parametrize("graphs", ["off", True])
def test_updates_in_one_pass_are_those_of_torch(options, graphs, monkeypatch):
    step, one_pass = epochs(graphs, optimizer=damped, **options)
    assert any(plan is not None for plan in step._fused._plans.values())
    monkeypatch.setattr(updates, "fuses", lambda parameter: False)
    _, apart = epochs(graphs, optimizer=damped, **options)
    static.assert_equal(one_pass, apart, rtol=1e-3, atol=1e-4)


def test_replays_draw_new_dropout_masks():
    step = static.make(True, device="cuda")
    step.model.dropout.p = 0.5
    loader = [tuple(t.cuda() for t in batch) for batch in static.batches(n=static.N)]
    step.main_optimizer.param_groups[0]["lr"] = 0.0
    losses = [step.train_epoch(loader, static.N, None, batch_size=static.BATCH)[0].loss for _ in range(6)]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("model", [static.Reads, static.Selects, static.Searches])
def test_a_model_that_cannot_be_captured_is_named(model):
    with pytest.raises(static.NotCapturable, match=r"test_static.py:\d+"):
        epochs(True, model=model)


def test_auto_goes_on_where_a_capture_fails(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory for a graph")

    _, expected = epochs("off")
    monkeypatch.setattr(torch.cuda, "graph", full)
    step, found = epochs("auto")
    assert len(step.static.graphs) == 0
    static.assert_equal(found, expected, rtol=1e-4, atol=1e-5)


class Waits(static.TwoFeatures):
    """What the watch does not see, and a capture does not bear."""

    def forward(self, inputs):
        torch.cuda.synchronize()
        return super().forward(inputs)


def test_auto_goes_on_where_a_capture_breaks():
    """A broken capture leaves neither the allocator nor the generator unusable."""
    _, expected = epochs("off", model=Waits)
    step, found = epochs("auto", model=Waits)
    assert len(step.static.graphs) == 0
    static.assert_equal(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.rand(3, device="cuda").isfinite().all()


def test_graphs_are_made_anew_after_all_were_forgotten():
    """Their memory pool is not used again: something in it may be alive."""
    step = static.make(True, device="cuda")
    loader = [tuple(t.cuda() for t in batch) for batch in static.batches(n=static.N)]
    for _ in range(3):
        static.run(step, 2, loader)
        assert len(step.static.graphs) > 0
        step.static.graphs.clear()


def test_the_dispatch_table_can_be_measured():
    from engine.kernels import dispatch

    sizes = {"groups": 1, "rows": 256, "columns": 256, "width": 64}
    (entry,) = dispatch.measure("infonce", "cuda", precisions=("bf16",), classes=[sizes], milliseconds=5)
    assert set(entry["milliseconds"]) == {"fused", "chunked", "eager"} and min(entry["milliseconds"].values()) > 0


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_a_captured_run_of_the_trainer_equals_an_emulated_one(tmp_path, mode):
    """The whole path: frames gathered in the graph, buckets, text, recurrences, fusion, evaluation."""
    from bench.guard import BATCH, SHAPE, tiny_config, tiny_text_encoder
    from engine.trainer import train

    encoder = tiny_text_encoder(tmp_path / "encoder", dropout=0.0)
    counts = {"train": 5 * BATCH + 3, "valid": 9, "test": 9}
    splits = {split: shapes.utterances(SHAPE, n, seed) for seed, (split, n) in enumerate(counts.items())}
    store = shapes.write_store(tmp_path / "data", splits, str(encoder))
    found = []
    for graphs in ("emulate", "auto"):
        config = tiny_config(mode, store, encoder)
        config.device, config.epochs, config.model.dropout, config.model.modality_dropout = "cuda", 4, (0.0,) * 4, 0.0
        config.train.optimizer, config.train.lr, config.train.graphs = "sgd", 1e-2, graphs
        train(config, tmp_path / graphs)
        lines = (tmp_path / graphs / "history.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([json.loads(line)[split]["loss"] for line in lines for split in ("train", "valid", "test")])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
