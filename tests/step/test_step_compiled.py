"""Both stages as graphs of torch.compile, in 16-bit autocast, and without waiting for a GPU."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.epochs import RATE, TINY_BERT, tiny_batch, tiny_pair
from engine.errors import EstimatorError
from engine.kernels.knn_product import Bank
from engine.kernels.recurrent import cudnn
from engine.step import TwoStageStep
from engine.step.compiled import compile_regions, compile_stages, regions

SIZES = (14, 9, 11)


def batch_of(rows):
    """Like tiny_batch, but its token tensor is as wide as its longest text, as loaders make it."""
    batch = tiny_batch(rows, rows)
    longest = int(batch.token_mask.sum(1).max())
    batch.token_ids, batch.token_mask = (t[:, :longest].contiguous() for t in (batch.token_ids, batch.token_mask))
    return batch


def step_like(step, **settings):
    """A step on a copy of another's modules, with plain SGD."""
    model, objective = copy.deepcopy(step.model), copy.deepcopy(step.objective)
    main, estimators = (torch.optim.SGD(m.parameters(), RATE) for m in (model, objective))
    return TwoStageStep(model, objective, step.task_loss, main, estimators, clip_value=1.5, **settings)


@pytest.fixture
def eager():
    return step_like(tiny_pair("fast").step)


@pytest.fixture
def bank(eager):
    rows = batch_of(40)
    with torch.no_grad():
        return Bank(eager.forward(rows, rows.label)[1])


@pytest.fixture
def graphs(monkeypatch, request):
    """torch.compile with another backend, and the graphs it has made."""
    made, compile_ = [], torch.compile
    backend = request.param

    def counted(f, mode, **settings):
        def one_more(graph, inputs):
            compiled = torch._dynamo.lookup_backend(backend)(graph, inputs)
            made.append(f.__qualname__)  # only now: a backend may have the frame traced again
            return compiled

        return compile_(f, backend=one_more, **settings)

    monkeypatch.setattr(torch, "compile", counted)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def run_both(step, other, bank, rows):
    """Both stages of two steps on one batch with the same product rows; their losses."""
    batch, results = batch_of(rows), []
    with torch.no_grad():
        features = step.forward(batch, batch.label)[1]
    products = step.draw_products(bank, rows)
    for each in (step, other):
        first = each.stage1(features, products)
        second = each.stage2(batch, batch.label, products)
        results.append([first.loss, second.loss, *first.values.values(), *second.information.values.values()])
    return results


SLOW_BACKENDS = [pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor")]


@pytest.mark.parametrize("graphs", ["eager", *SLOW_BACKENDS], indirect=True)
def test_compiled_stages_equal_eager_ones_in_few_graphs(eager, bank, graphs):
    compiled = step_like(eager)
    compile_stages(compiled, "default")
    for rows in SIZES:
        a, b = run_both(eager, compiled, bank, rows)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(eager.objective.parameters(), compiled.objective.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # sizes that are equal by chance in the first batch make a second graph; batches after it make none
    stages = [graphs.count(f"TwoStageStep._stage{n}_loss") for n in (1, 2)]
    assert max(stages) <= 2 and sum(stages) == len(graphs)


@pytest.mark.parametrize("graphs", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], indirect=True)
def test_layers_share_one_graph_and_equal_eager_ones(graphs, monkeypatch):
    """One graph with gradients and one without, for every layer and every size."""
    monkeypatch.setitem(TINY_BERT, "num_hidden_layers", 5)
    eager = step_like(tiny_pair("fast").step)
    compiled = step_like(eager, compile="default")
    layers = regions(compiled.model)
    assert [type(layer).__name__ for layer in layers] == ["BertLayer"] * 5
    for rows in SIZES:
        batch, results = batch_of(rows), []
        for step in (eager, compiled):
            step.model.train()
            with torch.no_grad():
                features = step.forward(batch, batch.label)[1]
            output = step.stage2(batch, batch.label, None, information=False)
            results.append((output.loss, features, [p.grad for p in step.model.parameters() if p.grad is not None]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert graphs == ["BertLayer.forward"] * 2
    batches = [batch_of(7)]
    torch.testing.assert_close(*(s.evaluate(batches).prediction for s in (eager, compiled)), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2, "evaluation runs as it does without train.compile"


@pytest.mark.parametrize("graphs", ["eager"], indirect=True)
def test_a_copy_of_a_compiled_model_runs_its_own_weights(graphs):
    model = torch.nn.Sequential(torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(2)))
    assert compile_regions(model, "reduce-overhead") == 2
    layer = copy.deepcopy(model)[0][0]
    with torch.no_grad():
        layer[0].weight.zero_()
        layer[0].bias.fill_(2.0)
    assert torch.equal(layer(torch.ones(1, 3)), torch.full((1, 3), 2.0)) and graphs == ["Sequential.forward"]
    assert torch.equal(layer.eval()(torch.ones(1, 3)), torch.full((1, 3), 2.0)) and len(graphs) == 1


def test_layers_that_differ_are_no_regions():
    linear = torch.nn.Linear
    lists = torch.nn.ModuleList
    pairs = lists(torch.nn.Sequential(linear(n, 3)) for n in (2, 4))
    assert regions(torch.nn.Sequential(pairs, lists([linear(2, 2), linear(2, 2)]))) == []


def as_fakes(mode, value):
    """The same structure with tensors that have no data."""
    if isinstance(value, torch.nn.Module):
        for module in value.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(as_fakes(mode, p.detach()), p.requires_grad)
            for name, b in list(module._buffers.items()):
                if b is not None:
                    module._buffers[name] = as_fakes(mode, b)
        return value
    if isinstance(value, torch.Tensor):
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if isinstance(value, dict):
        return {k: as_fakes(mode, v) for k, v in value.items()}
    if hasattr(value, "__slots__") or hasattr(value, "__dict__"):
        value = copy.copy(value)
        for name in getattr(value, "__slots__", None) or vars(value):
            item = getattr(value, name)
            if isinstance(item, torch.Tensor) or hasattr(item, "place"):
                setattr(value, name, as_fakes(mode, item))
    return value


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What the step decides by the device, decided as for a GPU; and no way to the host.

    A torch built without CUDA cannot index even tensors without data on such a device.
    """

    def refused(self, *args, **kwargs):
        raise AssertionError("a tensor was sent to the host")

    monkeypatch.setattr("engine.model.estimators.readable", lambda tensor: False)
    monkeypatch.setattr("engine.model.encoders.available", lambda x: True)
    monkeypatch.setattr("engine.model.encoders.bidirectional", cudnn.bidirectional)
    for name in ("cpu", "numpy", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refused)


def test_neither_stage_looks_at_values_on_a_gpu(eager, bank, request):
    """Tensors without data refuse .item(), .tolist() and masks as indices: what a GPU would be waited for."""
    batch = eager.model.prepare(batch_of(10))
    with torch.no_grad():
        features = eager.forward(batch, batch.label)[1]
    products = eager.draw_products(bank, 10)
    mode = FakeTensorMode()
    step = step_like(eager)
    for module in (step.model, step.objective):
        as_fakes(mode, module)
    batch, features, products = (as_fakes(mode, v) for v in (batch, features, products))
    step.model.train()
    request.getfixturevalue("as_on_a_gpu")
    with mode:
        first = step._stage1_loss(features, products)
        first.loss.backward()
        with step._frozen_estimators():
            second, loss = step._stage2_loss(batch, batch.label, products, True)
            loss.backward()
    assert second.prediction.shape == (10, 1)
    missing = [n for n, p in step.model.named_parameters() if p.grad is None]
    assert missing == [] and all(p.grad is not None for p in step.objective.parameters())


def test_what_the_check_for_waiting_would_find(request):
    mode = FakeTensorMode()
    x = as_fakes(mode, torch.ones(3))
    with mode, pytest.raises(Exception, match=r"item|data-dependent|_local_scalar_dense"):
        float(x.sum())
    with mode, pytest.raises(Exception, match=r"dynamic|data-dependent|nonzero"):
        x[x > 0].sum()
    request.getfixturevalue("as_on_a_gpu")
    for wait in (lambda: x.cpu(), lambda: bool(x.isfinite().all()), lambda: x.numpy()):
        with pytest.raises(AssertionError, match="sent to the host"):
            wait()


def test_bf16_changes_the_models_products_alone(eager, bank):
    half = step_like(eager, autocast=torch.bfloat16)
    dtypes = []
    half.model.text_projection.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    (_, loss, *_), (_, other, *_) = run_both(eager, half, bank, 10)
    assert dtypes == [torch.bfloat16] and other.dtype == torch.float32
    assert loss != other
    torch.testing.assert_close(loss, other, rtol=0.05, atol=0.05)
    batch = batch_of(10)
    prediction, features = half.forward(batch, batch.label)
    assert {t.dtype for t in (prediction, *features.values())} == {torch.float32}


def test_a_step_whose_gradients_overflow_in_fp16_is_left_out(eager, bank):
    step = step_like(eager, autocast=torch.float16)
    batch = batch_of(10)
    before = copy.deepcopy(step.model.state_dict())
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)
    step.stage2(batch, batch.label, None, information=False)
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert step.scaler.get_scale() == 2.0**119
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step.stage2(batch, batch.label, None, information=False)
    assert any(not torch.equal(value, before[name]) for name, value in step.model.state_dict().items())


def test_values_that_no_step_could_check_are_checked_after_the_epoch(eager, monkeypatch):
    monkeypatch.setattr("engine.model.estimators.readable", lambda tensor: False)
    batches = [tiny_batch(16, 0)]
    _, bank = eager.train_epoch(batches, 16, None, batch_size=16)
    with torch.no_grad():
        next(iter(eager.objective.estimators.values())).critic.g[0].weight.fill_(float("nan"))
    with pytest.raises(EstimatorError, match=r"I\(F;T\).*nan.*finite"):
        eager.train_epoch(batches, 16, bank, batch_size=16)
