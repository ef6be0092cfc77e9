"""Lightning, Hugging Face's Trainer and Accelerate train as the step alone does."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from engine.errors import ConfigError
from engine.objective import CMI, MI, Objective
from engine.step import TwoStageStep
from engine.step.recent import RecentFeatures
from tests.docs import blocks
from tests.test_other_loops import SETTINGS, Pair, data, objective_of, same, weights

PAGE = blocks.PROJECT / "docs" / "other_loops.md"


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


def test_lightning_tests_and_predicts_batches_of_any_form(tmp_path):
    module = lightning_module()
    loader = DataLoader(dataset(), 8)
    found = torch.cat(trainer(tmp_path, 1).predict(module, loader))
    x = torch.stack([row["x"] for row in dataset()])
    with torch.no_grad():
        expected = module.model.eval()(x)[0]
    torch.testing.assert_close(found, expected)
    logged = trainer(tmp_path, 1).test(module, loader, verbose=False)[0]
    y = torch.stack([row["y"] for row in dataset()])
    assert logged["test_task"] == pytest.approx(functional.mse_loss(expected, y).item(), rel=1e-5)


def test_lightning_moves_schedulers_once_an_epoch(tmp_path):
    """Manual optimisation leaves them alone: a rate that should fall stayed as it was, without a word."""
    from engine.integrations.lightning import InformationModule

    class Falling(InformationModule):
        def configure_optimizers(self):
            model, estimators = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(estimators, factor=0.5, patience=0, threshold=10.0)
            return [model, estimators], [torch.optim.lr_scheduler.StepLR(model, 1, 0.1), plateau]

    torch.manual_seed(0)
    module = Falling(Pair(dropout=0.2), terms(), functional.mse_loss, lr=0.01, estimator_lr=0.01)
    loader = DataLoader(dataset(), 8)
    fitted = trainer(tmp_path, 3)
    fitted.fit(module, loader, loader)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in fitted.optimizers]
    assert rates == pytest.approx([0.01 * 0.1**3, 0.01 * 0.5**3])


def test_lightning_needs_both_optimisers(tmp_path):
    from engine.integrations.lightning import InformationModule

    class One(InformationModule):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    module = One(Pair(dropout=0.2), terms(), functional.mse_loss)
    with pytest.raises(ConfigError, match="1 optimisers; expected two"):
        trainer(tmp_path, 1).fit(module, DataLoader(dataset(), 8))


def test_lightning_in_double_precision(tmp_path):
    rows = [{name: value.double() for name, value in row.items()} for row in dataset()]
    module = lightning_module()
    before = weights(module.step)
    trainer(tmp_path, 1, precision="64-true").fit(module, DataLoader(rows, 8))
    assert next(module.parameters()).dtype == torch.float64
    assert not same(before, weights(module.step))


def test_frozen_estimators_leave_the_model_to_train(tmp_path):
    """With all of them frozen, stage 1 has nothing to differentiate."""
    torch.manual_seed(0)
    module = lightning_module()
    for term in module.objective.terms:
        module.objective.freeze(term)
    frozen, free = ([p.detach().clone() for p in part.parameters()] for part in (module.objective, module.model))
    trainer(tmp_path, 1).fit(module, DataLoader(dataset(), 8))
    assert same(frozen, list(module.objective.parameters()))
    assert not same(free, list(module.model.parameters()))


def test_estimators_that_were_frozen_stay_frozen_in_a_loop_by_hand():
    objective = objective_of(MI("X", "Y"), MI("X", "C"))
    frozen = objective.freeze("I(X;Y)")
    free = [name for name, p in objective.named_parameters() if p.requires_grad]
    for _ in range(2):
        objective.requires_grad_(False)
        assert not any(p.requires_grad for p in objective.parameters())
        objective.requires_grad_(False)
        objective.requires_grad_(True)
        assert [name for name, p in objective.named_parameters() if p.requires_grad] == free
    assert not any(p.requires_grad for p in frozen.parameters())
    objective.requires_grad_(True)
    assert all(p.requires_grad for p in objective.parameters())  # said outright


def test_lightning_is_imported_only_when_it_is_used():
    code = """
import sys, engine.step, engine.step.recent, engine.integrations
assert "lightning" not in sys.modules
sys.modules["lightning"] = None
try:
    import engine.integrations.lightning
except ModuleNotFoundError as error:
    raise SystemExit(f"not caught: {error}")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "pip install lightning" in done.stdout, done.stderr


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


def hugging_face_weights(folder, batch: int, accumulate: int) -> list[torch.Tensor]:
    """Weights after two updates of the page's Trainer on 8 rows each, with a term of weight 0."""
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    (code,) = [b.code for b in blocks.of_page(PAGE) if "class InformationTrainer" in b.code]
    scope = {"torch": torch}
    exec(code.split("torch.manual_seed")[0], scope)
    torch.manual_seed(0)
    rows = [
        {"input_ids": torch.randint(0, 50, (6,)), "attention_mask": torch.ones(6, dtype=torch.long), "labels": i % 2}
        for i in range(16)
    ]
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    bert = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        report_to="none", use_cpu=True, disable_tqdm=True, optim="sgd", learning_rate=0.5, max_grad_norm=0.0,
        lr_scheduler_type="constant", save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    objective = Objective([0.0 * MI("A", "B")], {"A": 8, "B": 8}, settings=SETTINGS)
    trainer = scope["InformationTrainer"](bert, arguments, train_dataset=rows, objective=objective)
    trainer.train()
    return [p.detach().clone() for p in bert.parameters()]


def test_hugging_face_micro_batches_are_equal_to_the_large_batch(tmp_path):
    large, small = hugging_face_weights(tmp_path, 8, 1), hugging_face_weights(tmp_path, 4, 2)
    for a, b in zip(large, small, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
