"""Whole two-stage epochs: `engine.train` itself against the eager baseline, and proof that both compute the same."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import statistics
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import flops, shapes
from bench.baselines import loader as reference_loader
from bench.baselines import mimrl
from bench.runner import Setting, Work
from engine import losses
from engine.config import Config, load_config
from engine.loaders.batch import Batch
from engine.mimrl.model import build_model
from engine.mimrl.names import split_reference_state
from engine.mimrl.terms import MIMRL_ESTIMATORS, mimrl_objective
from engine.model.text_encoder import text_encoder_from_config
from engine.step import TwoStageStep
from engine.trainer import train
from engine.training.parts import parameter_groups

SAMPLES, QUICK_SAMPLES = 256, 32
HELD_OUT = 4  # samples of valid and test, which are not timed
GEMM = 2048


def config(mode: str, data: Path, setting: Setting, overrides: tuple[str, ...] = ()) -> Config:
    """The benchmark's settings: the flagship's shapes, B=32, time_len 100, dropout .1, stage1_n 2."""
    settings = [
        f"mode={mode}", "batch_size=32", "data.time_len=100", "model.dropout=0.1", "train.stage1_n=2", "train.lr=1e-3",
        "epochs=100000", "output.report=false", "output.tensorboard=false", "output.progress=false",
        f"device={setting.device}", f"threads={torch.get_num_threads()}", f"data.path={data}",
        "data.length_rule=recorded",
        "train.amp=off",  # both sides compute in float32
        *overrides,
    ]  # fmt: skip
    return load_config("mosi-paper", settings)


class _Stop(Exception):
    pass


class EngineEpochs:
    """`engine.train`, which waits at the end of every epoch until the next one is asked for.

    The time of an epoch is the trainer's own `seconds`: both stages with their loading, without evaluation and saving.
    Epoch 0, which has no bank, runs when this is constructed.
    """

    def __init__(self, settings: Config, dataset: Any = None):
        self.dataset = dataset
        self.folder = Path(tempfile.mkdtemp(prefix="bench-run-"))
        self._go: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[float | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._train, args=(settings,), daemon=True)
        self._thread.start()
        self._wait()

    def __call__(self) -> float:
        """Run one epoch; its seconds."""
        self._go.put(True)
        return self._wait()

    def close(self) -> None:
        self._go.put(False)
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self) -> float:
        item = self._done.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _train(self, settings: Config) -> None:
        try:
            train(settings, self.folder / "run", callbacks=[self], dataset=self.dataset)
        except _Stop:
            pass
        except BaseException as cause:
            self._done.put(cause)

    # the trainer's callback

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
        pass

    def on_batch(self, stage: str, number: int) -> None:
        pass

    def on_epoch(self, record: dict[str, Any], improved: bool) -> None:
        self._done.put(record["seconds"])
        if not self._go.get():
            raise _Stop

    def on_end(self) -> None:
        pass


def build_engine(
    mode: str, samples: shapes.Utterances, setting: Setting, overrides: tuple[str, ...] = (), text_encoder="minilm"
) -> Work:
    """Epochs of `engine.train` on these samples."""
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    held_out = {name: samples.part(0, HELD_OUT) for name in ("valid", "test")}
    store = shapes.write_store(folder, {"train": samples, **held_out}, text_encoder)
    epochs = EngineEpochs(config(mode, store, setting, (*overrides, f"text_encoder={text_encoder}")))

    def close() -> None:
        epochs.close()
        shutil.rmtree(folder, ignore_errors=True)

    return Work(epochs, samples=len(samples), returns_number=True, close=close)


def build_baseline(samples: shapes.Utterances, setting: Setting, text_encoder: str = "minilm", **changes: Any) -> Work:
    """Epochs of the eager baseline on ready-made batches. Its loading is not counted, which is to its advantage."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    np.random.seed(0)
    place = reference_loader.minilm_folder() if text_encoder == "minilm" else text_encoder
    encoder = AutoModel.from_pretrained(place, trust_remote_code=False)
    d_in = [encoder.config.hidden_size, samples.audio_dim, samples.vision_dim]
    settings = mimrl.settings(d_in=d_in, **changes)
    model = mimrl.MIMRL(settings, encoder).to(setting.device)
    if setting.device != "cpu":
        _products_on(model, setting.device)
    rows = [
        (([], v, a, t.split(), len(v), len(a)), label[None], "")
        for t, a, v, label in zip(samples.text, samples.audio, samples.vision, samples.label, strict=True)
    ]
    tokenizer = reference_loader.load_tokenizer(text_encoder)
    batches = [
        {k: v.to(setting.device) for k, v in batch.items()}
        for batch in reference_loader.make_loader(rows, 32, settings.time_len, tokenizer)
    ]
    trainer = mimrl.Trainer(model, stage1_n=2)

    def run() -> None:
        with _default_device(setting.device):
            trainer.epoch(batches)

    run()  # the first epoch has no bank
    return Work(run, samples=len(samples), warmups=0)


def _products_on(model: mimrl.MIMRL, device: str) -> None:
    """The baseline's product rows come from the host; the published code moves them to the GPU as well."""
    draw = model.draw_products
    model.draw_products = lambda bank, size: {
        name: tuple(rows.to(device) for rows in parts) for name, parts in draw(bank, size).items()
    }


def _default_device(device: str):
    """The baseline makes its small constants on torch's default device."""
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)


def build_gemm(setting: Setting) -> Work:
    """A 2048³ fp32 product: the machine's ceiling, measured among the other sides."""
    a, b, out = (torch.randn(GEMM, GEMM, device=setting.device) for _ in range(3))
    return Work(lambda: torch.mm(a, b, out=out), warmups=3)


def gemm_details(
    mode: str, samples: shapes.Utterances, setting: Setting, numbers: dict[str, list[float]]
) -> dict[str, Any]:
    """gemm_fraction with the figures it comes from, and the parts on which an epoch of the engine spends its time.

    The seconds of the parts come from the profiler, in a separate run.
    """
    settings = config(mode, Path("unused"), setting).resolve()
    from engine.loaders.text import load_tokenizer

    tokens = np.minimum(load_tokenizer("minilm").encode(samples.text).lengths, settings.data.time_len)
    audio, vision = ([len(s) for s in sequences] for sequences in (samples.audio, samples.vision))
    parts = flops.epoch(settings, tokens, audio, vision, (samples.audio_dim, samples.vision_dim), text=(6, 384, 1536))
    ceiling = 2 * GEMM**3 / statistics.median(numbers["gemm"])
    reached = sum(parts.values()) / statistics.median(numbers["engine"])
    return {
        "gemm_fraction": reached / ceiling,
        "gemm_ceiling_gflops": ceiling / 1e9,
        "necessary_gflop": {name: value / 1e9 for name, value in parts.items()},
        "part_seconds": _profiled(mode, samples, setting),
    }


def _profiled(mode: str, samples: shapes.Utterances, setting: Setting) -> dict[str, dict[str, float]]:
    """{stage: {part: seconds}} of an epoch, from the batches of each stage that `engine.profile` measures."""
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        held_out = {name: samples.part(0, HELD_OUT) for name in ("valid", "test")}
        store = shapes.write_store(Path(folder) / "data", {"train": samples, **held_out})
        train(config(mode, store, setting, ("epochs=2",)), Path(folder) / "run", profile=True)
        stages = json.loads((Path(folder) / "run" / "profile" / "shares.json").read_text(encoding="utf-8"))
    return {
        stage: {name: part["seconds"] * shares["of"] / shares["batches"] for name, part in shares["parts"].items()}
        for stage, shares in stages.items()
    }


# -- the same numbers ------------------------------------------------------------------------------

TINY = {
    "time_len": 12, "d_in": [16, 5, 20], "d_common": 16, "d_hiddens": [[6, 3, 16], [4, 3, 16]],
    "d_outs": [[6, 3, 16], [4, 3, 16]], "critic_hidden": 24, "critic_embed": 16, "cmi_embed_dim": 16,
    "dropout": [0.0] * 4,
}  # fmt: skip
TINY_BERT = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
RATE = 1e-3


def tiny_batch(rows: int, seed: int, device: str = "cpu") -> Batch:
    """Ragged lengths, padded on the right; some sequences are longer than the time axis."""
    g = torch.Generator().manual_seed(seed)
    cap = TINY["time_len"]
    lengths = {
        name: torch.randint(1, most + 1, (rows,), generator=g) for name, most in (("t", cap), ("a", 20), ("v", 17))
    }
    mask = {name: torch.arange(int(n.max()) if name != "t" else cap) < n[:, None] for name, n in lengths.items()}
    tokens = torch.randint(1, TINY_BERT["vocab_size"], mask["t"].shape, generator=g) * mask["t"]
    frames = {
        name: torch.randn(*mask[name].shape, width, generator=g) * mask[name][..., None]
        for name, width in (("a", TINY["d_in"][1]), ("v", TINY["d_in"][2]))
    }
    label = (1.6 * torch.randn(rows, 1, generator=g)).clamp(-3, 3)
    return Batch(
        index=torch.arange(rows), ids=[str(i) for i in range(rows)], label=label, token_ids=tokens,
        token_mask=mask["t"].long(), text=None, audio=frames["a"], audio_length=lengths["a"], vision=frames["v"],
        vision_length=lengths["v"],
    ).to(device)  # fmt: skip


def tiny_pair(mode: str, device: str = "cpu", text_padding: str = "zero") -> SimpleNamespace:
    """An engine model with its step and a baseline with its trainer, with the same weights and plain SGD."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    theirs = mimrl.MIMRL(mimrl.settings(**TINY), BertModel(BertConfig(**TINY_BERT)))
    names = ("d_common", "d_hiddens", "d_outs")
    settings = Config(
        mode=mode,
        data={"time_len": TINY["time_len"]},
        model={
            "d_common": TINY["d_common"],
            "dropout": (0.0,) * 4,
            "text_padding": text_padding,
            "modality_dropout": 0.0,
            "cubemlp": {k: TINY[k] for k in names if k != "d_common"},
        },
        objective={"hidden": TINY["critic_hidden"], "embed": TINY["critic_embed"], "c1": [1.0] * 11, "c2": [0.01] * 8},
    ).resolve()
    encoder = text_encoder_from_config({"model_type": "bert", **TINY_BERT})
    model = build_model(settings, TINY["d_in"][1], TINY["d_in"][2], encoder)
    objective = mimrl_objective(settings.objective, model.fused_dim, TINY["d_common"])
    model_state, objective_state, _ = split_reference_state(theirs.state_dict())
    model.load_state_dict(model_state)
    if mode == "faithful":
        objective.load_state_dict(objective_state)
    for module in (model, objective, theirs):
        module.to(device)
    groups = parameter_groups(model, model.text_encoder)
    main = torch.optim.SGD([{"params": groups["main"]}, {"params": groups["text"], "lr": 0.05 * RATE}], lr=RATE)
    step = TwoStageStep(
        model,
        objective,
        losses.task_loss("MAE", 1),
        main,
        torch.optim.SGD(objective.parameters(), RATE),
        clip_value=1.5,
    )
    named = dict(theirs.named_parameters())
    text = [p for n, p in named.items() if n.startswith("bertmodel")]
    rest = [p for n, p in named.items() if "mi_estimator" not in n and not n.startswith("bertmodel")]
    estimators = [p for n, p in named.items() if "mi_estimator" in n]
    trainer = mimrl.Trainer(
        theirs,
        main=torch.optim.SGD([{"params": rest}, {"params": text, "lr": 0.05 * RATE}], lr=RATE),
        estimators=torch.optim.SGD(estimators, RATE),
    )
    if device != "cpu":
        _products_on(theirs, device)
    return SimpleNamespace(step=step, trainer=trainer)


def for_baseline(batch: Batch) -> dict[str, Tensor]:
    return {
        "input_ids": batch.token_ids, "attention_mask": batch.token_mask, "audio": batch.audio, "vision": batch.vision,
        "label": batch.label,
    }  # fmt: skip


TERM = {str(t): f"{t.x}{t.y}_{t.given}".lower() for t in MIMRL_ESTIMATORS if t.given is not None}


def gate_faithful(setting: Setting, steps: int = 3, rows: int = 16) -> None:
    """Losses, estimates, features and predictions of `steps` two-stage steps equal the baseline's to rtol 1e-3."""
    pair = tiny_pair("faithful", setting.device)
    np.random.seed(0)
    first = tiny_batch(64, 99, setting.device)
    with torch.no_grad(), _default_device(setting.device):
        bank = pair.trainer.forward(for_baseline(first))[1] | {"C": first.label}
    pair.trainer.model.train()
    for number in range(steps):
        batch = tiny_batch(rows, number, setting.device)
        with _default_device(setting.device):
            products = pair.trainer.model.draw_products(bank, rows)
            first_stage = pair.trainer.stage1(for_baseline(batch), products)
            second_stage = pair.trainer.stage2(for_baseline(batch), products)
        ours = {term: products[name] for term, name in TERM.items()}
        with torch.no_grad():
            _, features = pair.step.forward(batch, batch.label)
        output = pair.step.stage1(features, ours)
        compared = [("stage 1 loss", output.loss, first_stage.total)]
        compared += [
            (f"stage 1 {term}", value, other)
            for (term, value), other in zip(output.values.items(), first_stage.values, strict=True)
        ]
        output = pair.step.stage2(batch, batch.label, ours)
        compared += [
            ("stage 2 loss", output.loss, second_stage.total),
            ("prediction", output.prediction, second_stage.prediction),
            *((f"feature {name}", output.features[name], second_stage.features[name]) for name in "FTAV"),
        ]
        for what, a, b in compared:
            torch.testing.assert_close(
                a.detach(), b.detach(), rtol=1e-3, atol=1e-5, msg=lambda t, w=what, n=number: f"step {n}, {w}: {t}"
            )


def gate_fast(setting: Setting, rows: int = 9) -> None:
    """A batch's predictions and features equal the baseline's, run on every sample alone and without padding.

    That is what mode fast promises: nothing of the padding, nothing of the batch mates. What stands in the fused cube
    beyond the end of a text is the mode's own choice: with zeros there, as the baseline has them, all is compared;
    with the default, a sample in a batch is compared with the same sample alone. And InfoNCE of the same features
    through the same critic equals the baseline's.
    """
    pair = tiny_pair("fast", setting.device)
    model, theirs = pair.step.model.eval(), pair.trainer.model.eval()
    default = tiny_pair("fast", setting.device, "mean").step.model.eval()
    batch = tiny_batch(rows, 5, setting.device)
    with torch.no_grad(), _default_device(setting.device):
        prediction, features = model(batch)
        by_default = default(batch).prediction
        for i in range(rows):
            alone = _alone(batch, i)
            expected, expected_features = theirs(alone.token_ids, alone.token_mask, alone.audio, alone.vision)
            torch.testing.assert_close(prediction[i : i + 1], expected, rtol=1e-4, atol=1e-5)
            for name in "FTAV":
                torch.testing.assert_close(features[name][i : i + 1], expected_features[name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(by_default[i : i + 1], default(alone).prediction, rtol=1e-4, atol=1e-5)
        estimator = pair.step.objective.estimators["F_T"]
        scores = estimator.critic(features["F"], features["T"])
        expected = mimrl.bound_value("infonce", scores, None, 0.01, 1.0)
        value = estimator(features["F"], features["T"]).value
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def _alone(batch: Batch, i: int) -> Batch:
    """Sample `i` as a batch of one, without padding."""
    tokens, audio, vision = int(batch.token_mask[i].sum()), int(batch.audio_length[i]), int(batch.vision_length[i])
    row = slice(i, i + 1)
    return Batch(
        batch.index[row], batch.ids[row], batch.label[row], batch.token_ids[row, :tokens],
        batch.token_mask[row, :tokens], None, batch.audio[row, :audio], batch.audio_length[row],
        batch.vision[row, :vision], batch.vision_length[row],
    )  # fmt: skip
