"""Lightning, Hugging Face's Trainer and Accelerate train as the step alone does."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from engine.errors import ConfigError
from engine.objective import CMI, MI
from engine.recent import RecentFeatures
from engine.step import TwoStageStep
from tests.test_other_loops import Pair, data, objective_of, same, weights

pytestmark = pytest.mark.filterwarnings("ignore")


def dataset(n: int = 24) -> list[dict]:
    x, y, _ = data(n)
    return [{"x": x[i], "y": y[i]} for i in range(n)]


def terms():
    return objective_of(0.1 * MI("X", "Y"), -0.1 * CMI("X", "C", given="Y"))


def lightning_module(seed: int = 0, **options):
    from engine.integrations.lightning import InformationModule

    torch.manual_seed(seed)
    return InformationModule(Pair(dropout=0.2), terms(), functional.mse_loss, lr=0.01, estimator_lr=0.01, **options)


def trainer(folder, epochs: int, **options):
    from lightning import Trainer

    options = {"enable_checkpointing": False, **options}
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def test_lightning_trains_as_train_batch_does(tmp_path):
    module = lightning_module(recent=16, stage1_n=2, accumulate=2, clip_norm=0.5)
    torch.manual_seed(1)
    trainer(tmp_path, 2).fit(module, DataLoader(dataset(), 8))
    torch.manual_seed(0)
    model, objective = Pair(dropout=0.2), terms()
    optimizers = torch.optim.Adam(model.parameters(), 0.01), torch.optim.Adam(objective.parameters(), 0.01)
    step = TwoStageStep(model, objective, functional.mse_loss, *optimizers, accumulate=2, clip_norm=0.5)
    recent = RecentFeatures(16)
    torch.manual_seed(1)
    for _ in range(2):
        loader = DataLoader(dataset(), 8)
        for batch in loader:
            step.train_batch(batch, recent, stage1_n=2)
        step.flush()
    assert same(weights(step), weights(module.step))


def test_lightning_resumes_bit_equal(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    module = lightning_module(average=0.9)
    torch.manual_seed(1)
    whole = trainer(tmp_path, 3, enable_checkpointing=True, callbacks=[keep])
    whole.fit(module, DataLoader(dataset(), 8), DataLoader(dataset(), 8))
    assert whole.callback_metrics["valid_I(X;C|Y)"].isfinite()
    again = lightning_module(seed=5, average=0.9)
    trainer(tmp_path, 3).fit(
        again, DataLoader(dataset(), 8), DataLoader(dataset(), 8), ckpt_path=tmp_path / "epoch=1.ckpt",
        weights_only=True,
    )  # fmt: skip
    assert same(weights(module.step), weights(again.step))
    for name, value in module.step.average.values.items():
        assert torch.equal(value, again.step.average.values[name])


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 1.0}])
def test_lightning_leaves_no_setting_unused(tmp_path, options):
    with pytest.raises(Exception) as caught:
        trainer(tmp_path, 1, **options).fit(lightning_module(), DataLoader(dataset(), 8))
    assert isinstance(caught.value, ConfigError) or "manual optimization" in str(caught.value)


def test_lightning_is_imported_only_when_it_is_used():
    code = "import sys, engine.step, engine.recent, engine.integrations; assert 'lightning' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = """
import sys
sys.modules["lightning"] = None
try:
    import engine.integrations.lightning
except ModuleNotFoundError as error:
    raise SystemExit(f"not caught: {error}")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install lightning" in done.stdout, done.stderr


def test_accelerate_trains_as_the_step_alone_does():
    from accelerate import Accelerator

    ends = []
    for prepare in (lambda *parts: parts, Accelerator(cpu=True).prepare):
        torch.manual_seed(0)
        model, objective = Pair(), objective_of()
        parts = model, objective, torch.optim.Adam(model.parameters()), torch.optim.Adam(objective.parameters())
        model, objective, main, estimators, loader = prepare(*parts, DataLoader(dataset(), 8))
        step = TwoStageStep(model, objective, functional.mse_loss, main, estimators)
        step.backward = Accelerator(cpu=True).backward
        for batch in loader:
            step.train_batch(batch)
        ends.append(weights(step))
    assert same(*ends)
