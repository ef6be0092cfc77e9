"""Whole runs on small synthetic files with a tiny BERT: files written, resuming, seeds, evaluation, bad input."""

import csv
import json
import math
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint, trainer
from engine.callbacks import TensorBoardCallback
from engine.config import Config
from engine.errors import CheckpointError, ConfigError, DataError, EstimatorError, NonFiniteError, OutputError
from engine.information.probing import probe
from engine.loaders.choice import has_dali
from engine.loaders.dataset import Dataset
from engine.model.text_encoder import TextEncoder, encode_padded
from engine.objective import Objective, Term
from engine.training import parts as made_of
from engine.training import run as training_run
from engine.training import warming
from engine.training.applying import apply, open_split
from engine.training.random_state import random_state, seed_all, set_random_state, unchanged_random_state
from engine.training.records import Selection
from engine.training.run import TrainingRun
from engine.training.saving import RunFiles
from engine.training.sharding import held_elsewhere
from engine.training.what_is_left import _reading, probe_term
from tests.loaders import writers
from tests.small_runs import DIMS, SIZES, STILL, changed, history, numbers, timeless


@pytest.mark.parametrize("mode", ["fast", "faithful"])
@pytest.mark.parametrize("kind", ["resident", "torch"])
def test_a_static_run_equals_one_without(config, tmp_path, text_encoder, mode, kind, monkeypatch):
    """Five epochs, 20 steps of stage 2.

    Without dropout, whose masks depend on widths. By plain gradients, because Adam makes a whole step out of the
    rounding of a gradient that should be 0, such as that of a key's bias. And with one way through the text encoder in
    faithful mode: a difference of 3e-7 in its output, a rounding, grows to six times the tolerance in 20 steps there.
    tests/model/test_fused_bert.py compares the two ways.
    """
    if mode == "faithful":
        monkeypatch.setattr(TextEncoder, "forward", encode_padded)
    bert = still_bert(text_encoder, tmp_path / "bert")
    settings = changed(
        config,
        mode=mode,
        text_encoder=str(bert),
        epochs=5,
        model=STILL,
        data={"loader": kind},
        train={"lr": 2e-3, "amp": "off", "optimizer": "sgd"},
    )
    for graphs in ("off", "emulate"):
        trainer.train(changed(settings, train={"graphs": graphs}), tmp_path / graphs)
    off, static = (numbers(history(tmp_path / graphs)) for graphs in ("off", "emulate"))
    assert off == pytest.approx(static, rel=1e-4, abs=1e-5, nan_ok=True)


def still_bert(text_encoder: Path, folder: Path) -> Path:
    """The same model folder without dropout."""
    shutil.copytree(text_encoder, folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"encoder": "lstm"}, "train": {"schedule": {"kind": "plateau", "patience": 0}}},
        {"model": {"encoder": "conv", "fusion": "tfn"}, "train": {"amp": "bf16", "schedule": {"kind": "step"}}},
        {"mode": "faithful", "model": {"encoder": "conv"}, "data": {"augment": {"drop_audio": 0.5}}},
        {"model": {"fusion": "transformer"}, "train": {"optimizer": "sgd", "clip_norm": 1.0}},
        {"objective": {"bound": "mine", "critic": "concat"}, "train": {"stage1_features": "bank"}},
        {"objective": {"enabled": False}, "data": {"max_padding": 0.3, "drop_last": True}},
    ],
    ids=str,
)
def test_settings_that_a_static_run_takes(config, tmp_path, settings):
    """Two static runs of a seed are bit-equal, and so is one that is resumed; each with its dropout."""
    settings = changed(config, **settings)
    settings = changed(settings, train={"graphs": "emulate", "lr": 1e-3})
    for name in ("a", "b"):
        trainer.train(settings, tmp_path / name)
    trainer.train(changed(settings, epochs=2), tmp_path / "c")
    trainer.train(settings, tmp_path / "c", resume=True)
    a, b, c = (list(map(timeless, history(tmp_path / name))) for name in "abc")
    assert json.dumps(a) == json.dumps(b) == json.dumps(c)


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_a_run_folder(config, tmp_path, mode):
    settings = changed(config, mode=mode, output={"features": True, "report": True, "tensorboard": True})
    result = trainer.train(settings, tmp_path / "run")
    run = tmp_path / "run"
    written = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.metrics))
    assert set(written["test"]) >= {*("mae", "corr", "acc7", "acc5", "acc2_non0", "acc2_has0", "f1_non0", "f1_has0")}
    assert {
        "best_epoch",
        "valid",
        "test",
        "oracle_test",
        "samples_per_second",
        "peak_memory_mb",
        "wall_s",
        "data_wait_share",
    } <= set(written)
    records = history(run)
    assert [r["epoch"] for r in records] == [0, 1, 2]
    assert "information" not in records[0]["train"] and "information" not in records[0]["valid"]
    for record in records[1:]:
        assert len(record["train"]["information"]) == len(record["valid"]["information"]) == 8
        assert len(record["train"]["estimators"]) == 11
    best = min(records, key=lambda r: r["valid"]["mae"])
    seconds, waited = ([r[name] for r in records] for name in ("seconds", "waiting_seconds"))
    assert written["samples_per_second"] == pytest.approx(2 * SIZES["train"] / sum(seconds[1:]))
    assert written["data_wait_share"] == pytest.approx(sum(waited) / sum(seconds)) and written["peak_memory_mb"] > 50
    assert all(r["wall_seconds"] >= r["seconds"] >= r["waiting_seconds"] > 0 for r in records)
    assert written["best_epoch"] == best["epoch"]
    assert written["test"]["mae"] == best["test"]["mae"]
    assert written["oracle_test"]["mae"] == min(r["test"]["mae"] for r in records) <= written["test"]["mae"]
    with (run / "predictions_test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    source = writers.samples(sizes=SIZES)["test"]
    assert [r["id"] for r in rows] == [s.id for s in source]
    np.testing.assert_allclose([float(r["label"]) for r in rows], [s.label for s in source], rtol=1e-6)
    error = np.mean([abs(float(r["label"]) - float(r["prediction"])) for r in rows])
    assert error == pytest.approx(written["test"]["mae"], rel=1e-5)
    for split, size in SIZES.items():
        from safetensors.numpy import load_file as load_arrays

        features = load_arrays(run / f"features_{split}.safetensors")
        assert {k: v.shape for k, v in features.items()} == dict.fromkeys("FTAV", (size, 16)) | {"label": (size, 1)}
    assert (run / "report.html").stat().st_size > 1000
    assert list((run / "tensorboard").glob("events*"))
    assert not list(run.glob(".*.part"))


def test_a_profile_tells_where_a_few_batches_went(config, tmp_path):
    trainer.train(changed(config, batch_size=2, objective={"k_neighbor": 1}), tmp_path / "run", profile=True)
    shares = json.loads((tmp_path / "run/profile/shares.json").read_text(encoding="utf-8"))
    assert list(shares) == ["collect", "stage1", "stage2"]
    for stage, parts in {
        "collect": {"text", "audio", "vision", "fusion", "load"},
        "stage1": {"products", "estimators", "backward", "update"},
        "stage2": {"text", "audio", "vision", "fusion", "load", "products", "estimators", "backward", "update"},
    }.items():
        found = shares[stage]
        assert found["batches"] == 6 and found["of"] == (20 if stage == "stage1" else 10)
        assert set(found["parts"]) >= parts | {"other"} and (stage == "stage2") == ("average" in found["parts"])
        assert sum(part["seconds"] for part in found["parts"].values()) == pytest.approx(found["whole"]["seconds"])
        assert found["whole"]["idle"] is None, "no GPU"
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text(encoding="utf-8"))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("engine.stage1") == 1 and names.count("engine.update") == 12
    text = (tmp_path / "run/profile/shares.txt").read_text(encoding="utf-8")
    assert text.splitlines()[-1] == "batches: 6 of 10 of collect, 6 of 20 of stage1, 6 of 10 of stage2"
    with pytest.raises(ConfigError, match=r"profile.*one epoch"):
        trainer.train(changed(config, epochs=1), tmp_path / "other", profile=True)


def test_the_terms_are_read_on_all_rows_of_every_split(config, tmp_path):
    trainer.train(config, tmp_path / "run")
    first, *rest = history(tmp_path / "run")
    for split, size in SIZES.items():
        assert "bank" not in first[split]
        for record in rest:
            assert set(record[split]["bank"]) >= {*record[split]["information"], *rest[0]["train"]["estimators"]}
            ceilings = record[split]["bank_ceiling"]
            assert ceilings["I(F;T)"] == pytest.approx(np.log(size)) and ceilings["inv"] == pytest.approx(
                2 * np.log(size)
            )
            assert all(record[split]["bank"][name] <= ceiling + 1e-5 for name, ceiling in ceilings.items())


@pytest.mark.parametrize("graphs", ["off", "emulate"])
@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_reading_on_all_rows_changes_no_weight_and_no_other_number(config, tmp_path, mode, graphs, monkeypatch):
    """With dropout, so that a number drawn from a stream of the training would be seen."""
    settings = changed(config, mode=mode, train={"graphs": graphs})
    trainer.train(settings, tmp_path / "read")
    monkeypatch.setattr(TrainingRun, "_read_terms", lambda *ignored: None)
    trainer.train(settings, tmp_path / "unread")
    read, unread = (history(tmp_path / name) for name in ("read", "unread"))
    for record in read:
        for split in SIZES:
            record[split] = {k: v for k, v in record[split].items() if not k.startswith("bank")}
    assert [timeless(r) for r in read] == [timeless(r) for r in unread]
    a, b = (checkpoint.load(tmp_path / name / "last.safetensors")[0] for name in ("read", "unread"))
    for part in ("model", "objective"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
    assert all(torch.equal(v, b["bank"]["rows"][k]) for k, v in a["bank"]["rows"].items())
    assert torch.equal(a["generator"], b["generator"]) and torch.equal(a["rng"]["torch"], b["rng"]["torch"])


def test_tensorboard_holds_the_readings_and_their_ceilings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = {"loss": 0.5, "bank": {"I(F;T)": 6.5}, "bank_ceiling": {"I(F;T)": 7.157}}
    record = {"epoch": 3, "train": train, "valid": {"bank": {"I(F;T)": 4.5}}, "test": {}}
    callback = TensorBoardCallback(tmp_path)
    callback.on_start(3, 4, {})
    callback.on_epoch(record | {"lr_main": 0.1, "lr_estimators": 0.1}, True)
    callback.on_end()
    written = EventAccumulator(str(tmp_path)).Reload()
    for tag, value in (("bank/I(F;T)/train", 6.5), ("bank_ceiling/I(F;T)/train", 7.157), ("bank/I(F;T)/valid", 4.5)):
        [point] = written.Scalars(tag)
        assert (point.step, point.value) == (3, pytest.approx(value))


def test_terms_that_cannot_be_read_on_all_rows_do_not_end_a_run(config, tmp_path, monkeypatch):
    def fails(*ignored):
        raise EstimatorError("mutual information (nwj)", "the estimate inf", "a finite estimate", "Check it.")

    monkeypatch.setattr(Objective, "read", fails)
    with pytest.warns(UserWarning, match="epoch 1, valid: not read on all rows: .*the estimate inf"):
        trainer.train(changed(config, epochs=2), tmp_path / "run")
    assert all("bank" not in record[split] for record in history(tmp_path / "run") for split in SIZES)


def test_same_seed_same_run_and_another_seed_another(config, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer.train(changed(config, seed=seed), tmp_path / name)
        runs[name] = [timeless(r) for r in history(tmp_path / name)]
    assert runs["a"] == runs["b"]
    assert runs["a"] != runs["c"]


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(config, tmp_path, mode):
    class Stop:
        """Stands for a crash after the second epoch."""

        def on_start(self, first_epoch, epochs, batches): ...
        def on_batch(self, stage, number): ...
        def on_end(self): ...
        def on_epoch(self, record, improved):
            if record["epoch"] == 1:
                raise KeyboardInterrupt

    settings = changed(
        config, mode=mode, epochs=4, objective={"bound": "mine"}, train={"schedule": {"milestones": [2, 3]}}
    )
    trainer.train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(settings, tmp_path / "broken", callbacks=[Stop()])
    assert len(history(tmp_path / "broken")) == 2
    trainer.train(settings, tmp_path / "broken", resume=True)
    whole, resumed = (history(tmp_path / name) for name in ("whole", "broken"))
    assert [timeless(r) for r in whole] == [timeless(r) for r in resumed]
    a, b = (checkpoint.load(tmp_path / name / "last.safetensors")[0] for name in ("whole", "broken"))
    for part in ("model", "objective"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())


def test_resume_can_train_longer_but_not_otherwise(config, tmp_path):
    trainer.train(config, tmp_path / "run")
    trainer.train(changed(config, epochs=4), tmp_path / "run", resume=True)
    assert len(history(tmp_path / "run")) == 4
    with pytest.raises(ConfigError, match="train"):
        trainer.train(changed(config, epochs=5, train={"lr": 1e-3}), tmp_path / "run", resume=True)


def test_a_run_of_an_older_version_is_read_but_not_resumed(config, tmp_path):
    """When every estimator had parameters of its own, a run's files named them one by one."""
    trainer.train(changed(config, epochs=2), tmp_path / "run")
    run = trainer.load_run(tmp_path / "run")
    for name in ("best", "last"):
        file = tmp_path / "run" / f"{name}.safetensors"
        state, meta = checkpoint.load(file)
        run.objective.load_state_dict(state["objective"])
        state["objective"] = {k: v.clone() for k, v in run.objective.estimator_state().items()}
        if name == "last":
            parameters = [torch.zeros_like(v) for v in state["objective"].values()]
            state["optimizers"]["estimators"] = torch.optim.Adam(parameters).state_dict()
        checkpoint.save(file, state, meta)
    old = trainer.load_run(tmp_path / "run")
    for name, tensor in checkpoint.load(tmp_path / "run" / "best.safetensors")[0]["objective"].items():
        assert torch.equal(old.objective.estimator_state()[name], tensor), name
    with pytest.raises(CheckpointError, match=r"optimizer estimators.*128 parameters.*22.*older version") as caught:
        trainer.train(changed(config, epochs=3), tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)


def test_evaluate_and_predict_give_the_runs_own_numbers(config, data, tmp_path):
    result = trainer.train(config, tmp_path / "run")
    found = trainer.evaluate(tmp_path / "run", data)
    for name, value in found.items():
        assert value == pytest.approx(result.metrics["test"][name], rel=1e-4, abs=1e-5, nan_ok=True), name
    assert trainer.evaluate(tmp_path / "run", data, split="valid")["mae"] == pytest.approx(
        result.metrics["valid"]["mae"], rel=1e-4
    )
    out = trainer.predict(tmp_path / "run", data, tmp_path / "p.csv")
    expected = (tmp_path / "run" / "predictions_test.csv").read_text(encoding="utf-8").splitlines()
    lines = out.read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[:2] for line in lines] == [line.split(",")[:2] for line in expected]


def test_evaluation_asks_for_its_device(config, data, tmp_path, monkeypatch):
    """The model, the batches and the choice of auto."""
    trainer.train(config, tmp_path / "run")
    made = []
    monkeypatch.setattr(Dataset, "loader", lambda *a, f=Dataset.loader, **named: made.append(named) or f(*a, **named))
    on_cpu = trainer.evaluate(tmp_path / "run", data, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trainer.evaluate(tmp_path / "run", data) == on_cpu
    assert [named["device"] for named in made] == [torch.device("cpu")] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert trainer.choose_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("graphs", ["off", "emulate"])
def test_compiling_kernels_beforehand_changes_nothing(config, tmp_path, monkeypatch, graphs):
    config = changed(config, train={"graphs": graphs})
    trainer.train(config, tmp_path / "plain")
    tried, work = [], warming.try_out
    monkeypatch.setattr(training_run, "compiles_kernels", lambda device: True)
    monkeypatch.setattr(warming, "try_out", lambda *a: tried.append(work(*a)))
    monkeypatch.setattr(warming, "warm_up", lambda run: run())
    trainer.train(config, tmp_path / "tried")
    assert len(tried) == 1
    monkeypatch.setattr(warming, "warm_up", lambda run: 1 / 0)
    with pytest.warns(UserWarning, match="^kernels are compiled when first used: division by zero$"):
        trainer.train(config, tmp_path / "failed")
    expected = [timeless(r) for r in history(tmp_path / "plain")]
    assert [timeless(r) for r in history(tmp_path / "tried")] == expected
    assert [timeless(r) for r in history(tmp_path / "failed")] == expected


def test_fast_evaluation_does_not_depend_on_the_batch_size(config, data, tmp_path):
    trainer.train(config, tmp_path / "run")
    values = [trainer.evaluate(tmp_path / "run", data, batch_size=b)["mae"] for b in (1, 2, 4, 9)]
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


def test_evaluation_uses_the_runs_statistics(config, tmp_path):
    """Another set, shifted and scaled: its own statistics would hide that, the run's must not."""
    trainer.train(config, tmp_path / "run")
    shifted = writers.samples(sizes=SIZES)
    for rows in shifted.values():
        for sample in rows:
            sample.audio = sample.audio * 3 + 10
    writers.write_declarelab(tmp_path / "other", shifted)
    assert trainer.evaluate(tmp_path / "run", tmp_path / "other") != trainer.evaluate(
        tmp_path / "run", config.data.path
    )


def test_several_seeds(config, tmp_path):
    results = trainer.train_seeds(changed(config, epochs=2), tmp_path / "runs", [0, 1])
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text(encoding="utf-8"))
    maes = [r.metrics["test"]["mae"] for r in results]
    assert summary["test"]["mae"]["mean"] == pytest.approx(np.mean(maes))
    assert summary["test"]["mae"]["std"] == pytest.approx(np.std(maes, ddof=1))
    assert (tmp_path / "runs" / "summary.csv").exists()
    before = (tmp_path / "runs" / "seed0" / "metrics.json").stat().st_mtime_ns
    trainer.train_seeds(changed(config, epochs=2), tmp_path / "runs", [0, 1, 2], resume=True)
    assert (tmp_path / "runs" / "seed0" / "metrics.json").stat().st_mtime_ns == before
    assert (tmp_path / "runs" / "seed2" / "metrics.json").exists()


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"bound": "nwj", "critic": "concat", "cmi_estimator": "dv"}},
        {"objective": {"bound": "interpolate", "baseline": "unnormalized", "cmi_estimator": "nwj"}},
        {"objective": {"enabled": False}},
        {"model": {"encoder": "conv", "fusion": "tfn"}},
        {"model": {"encoder": "lstm", "fusion": "transformer"}},
        {"train": {"optimizer": "sgd", "stage1_features": "bank", "schedule": {"kind": "plateau"}}},
        {"train": {"loss": "CCC", "schedule": {"kind": "exp"}}, "data": {"dataset": "avec2019"}},
        {"text": {"freeze": "all"}, "train": {"stage1_features": "fresh", "schedule": {"kind": "none"}}},
    ],
    ids=lambda sections: "-".join(f"{v}" for s in sections.values() for v in s.values() if not isinstance(v, dict)),
)
def test_options_train(config, tmp_path, sections):
    result = trainer.train(changed(config, epochs=2, **sections), tmp_path / "run")
    assert all(np.isfinite(r["train"]["loss"]) for r in history(tmp_path / "run"))
    key = "ccc" if "data" in sections else "mae"
    assert np.isfinite(result.metrics["test"][key])
    trainer.evaluate(tmp_path / "run", config.data.path)


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["default", "reduce-overhead"])
def test_a_compiled_run_is_the_eager_one(config, tmp_path, compile):
    """In both modes of torch.compile; dropout is drawn alike in a graph and outside it where it is the engine's own."""
    eager = trainer.train(changed(config, epochs=2), tmp_path / "eager")
    compiled = trainer.train(changed(config, epochs=2, train={"compile": compile}), tmp_path / "compiled")
    assert compiled.metrics["test"]["mae"] == pytest.approx(eager.metrics["test"]["mae"], rel=0.05)


def test_classification(config, text_encoder, tmp_path):
    samples = writers.samples(sizes=SIZES)
    for rows in samples.values():
        for number, sample in enumerate(rows):
            sample.label = float(number % 3)
    writers.write_declarelab(tmp_path / "classes", samples)
    settings = changed(
        config, epochs=2, data={"path": str(tmp_path / "classes"), "dataset": "custom"},
        model={"task": "classification", "num_class": 3}, train={"loss": "CE"},
    )  # fmt: skip
    result = trainer.train(settings, tmp_path / "run")
    assert 0 <= result.metrics["test"]["acc"] <= 1
    header = (tmp_path / "run" / "predictions_test.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "id,label,prediction,score_0,score_1,score_2"


def test_the_warning_of_missing_modalities_is_given_once(config, tmp_path):
    samples = writers.samples(sizes=SIZES)
    samples["train"][0].vision[:] = 0
    writers.write_declarelab(tmp_path / "data", samples)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(changed(config, epochs=2, data={"path": str(tmp_path / "data")}), tmp_path / "run")
    assert sum("without vision" in str(w.message) for w in caught) == 1


class TestBadInput:
    def test_a_folder_that_holds_a_run(self, config, tmp_path):
        trainer.train(changed(config, epochs=1), tmp_path / "run")
        before = (tmp_path / "run" / "metrics.json").read_bytes()
        with pytest.raises(OutputError, match="another run"):
            trainer.train(config, tmp_path / "run")
        assert (tmp_path / "run" / "metrics.json").read_bytes() == before

    @pytest.mark.parametrize("seeds_first", [False, True])
    def test_a_run_among_those_of_seeds(self, config, tmp_path, seeds_first):
        out, one = tmp_path / "run", changed(config, epochs=1)
        calls = [
            lambda resume: trainer.train(one, out, resume),
            lambda resume: trainer.train_seeds(one, out, [0], resume),
        ]
        first, second = reversed(calls) if seeds_first else calls
        first(False)
        before = sorted(out.rglob("*"))
        for resume in (False, True):
            with pytest.raises(
                OutputError, match="several seeds.*--resume seeds" if seeds_first else "drop seeds= and"
            ):
                second(resume)
        assert sorted(out.rglob("*")) == before
        first(True)

    def test_an_output_folder_below_a_file(self, config, tmp_path):
        (tmp_path / "file").write_text("x", encoding="utf-8")
        with pytest.raises(OutputError, match="folder"):
            trainer.train(config, tmp_path / "file" / "run")

    def test_more_neighbours_than_the_bank_holds(self, config, tmp_path):
        trainer.train(changed(config, batch_size=20, objective={"k_neighbor": 10}, epochs=1), tmp_path / "a")
        with pytest.raises(ConfigError, match=r"objective\.k_neighbor"):
            trainer.train(changed(config, batch_size=42, objective={"k_neighbor": 21}), tmp_path / "b")

    def test_dims_that_do_not_fit_cubemlp(self, config, tmp_path):
        cube = {"d_hiddens": DIMS, "d_outs": DIMS, "res_project": [False, False]}
        with pytest.raises(ConfigError, match="cubemlp"):
            trainer.train(changed(config, model={"cubemlp": cube}), tmp_path / "run")
        assert not (tmp_path / "run" / "config.yaml").exists()

    def test_data_that_is_not_there(self, config, tmp_path):
        with pytest.raises(DataError, match="nowhere"):
            trainer.train(changed(config, data={"path": str(tmp_path / "nowhere")}), tmp_path / "run")

    def test_a_device_this_machine_lacks(self, config, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
        with pytest.raises(ConfigError, match="device"):
            trainer.train(changed(config, device="cuda"), tmp_path / "run")

    @pytest.mark.parametrize("device", ["gpu", "meta", "cuda:77"])
    def test_evaluation_on_a_device_this_machine_lacks(self, config, data, tmp_path, device):
        trainer.train(changed(config, epochs=1), tmp_path / "run")
        with pytest.raises(ConfigError, match=f"^device: found '{device}', which this machine cannot use.*Use auto"):
            trainer.evaluate(tmp_path / "run", data, device=device)
        with pytest.raises(ConfigError, match=f"^device: found '{device}'") as error:
            trainer.predict(tmp_path / "run", data, tmp_path / "p.csv", device=device)
        assert "\n" not in str(error.value) and not (tmp_path / "p.csv").exists()

    def test_no_run_in_the_folder(self, data, tmp_path):
        with pytest.raises(CheckpointError, match="run folder"):
            trainer.evaluate(tmp_path, data)

    def test_features_of_another_width(self, config, tmp_path):
        trainer.train(changed(config, epochs=1), tmp_path / "run")
        samples = writers.samples(sizes=SIZES)
        for rows in samples.values():
            for sample in rows:
                sample.audio = sample.audio[:, :3]
        writers.write_declarelab(tmp_path / "narrow", samples)
        with pytest.raises((ConfigError, DataError), match="3 feature"):
            trainer.evaluate(tmp_path / "run", tmp_path / "narrow")

    def test_disk_full_while_saving_keeps_the_last_epoch(self, config, tmp_path, monkeypatch):
        import errno

        trainer.train(changed(config, epochs=1), tmp_path / "run")
        real = checkpoint.Snapshot.save

        def full(self, path, meta=None, previous=None):
            raise OutputError(str(path), "no space left on the device", "room for the file", "Free some space.") from (
                OSError(errno.ENOSPC, "No space left on device")
            )

        monkeypatch.setattr(checkpoint.Snapshot, "save", full)
        with pytest.raises(OutputError, match="no space"):
            trainer.train(changed(config, epochs=2), tmp_path / "run", resume=True)
        monkeypatch.setattr(checkpoint.Snapshot, "save", real)
        trainer.train(changed(config, epochs=2), tmp_path / "run", resume=True)
        assert len(history(tmp_path / "run")) == 2

    def test_diverging_training_says_so(self, config, tmp_path):
        with pytest.raises(NonFiniteError, match=r"task loss.*nan in batch .*train\.lr"):
            trainer.train(
                changed(
                    config, train={"lr": 1e30, "optimizer": "sgd", "clip_value": None}, objective={"enabled": False}
                ),
                tmp_path / "run",
            )


# -- loaders and augmentation --


@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_every_loader_trains_the_same_model(config, tmp_path, mode):
    kinds = ["resident", "torch"] + ["dali"] * has_dali()
    augment = {"drop_text": 0.2, "drop_audio": 0.3, "drop_vision": 0.3, "mask_text": 0.1, "mask_audio": 0.2}
    runs = {}
    for kind in kinds:
        own = changed(config, mode=mode, epochs=2, data={"loader": kind, "augment": augment, "max_padding": 0.4})
        trainer.train(own, tmp_path / kind)
        runs[kind] = [timeless(r) for r in history(tmp_path / kind)]
    assert all(run == runs["resident"] for run in runs.values())
    plain = changed(config, mode=mode, epochs=2, data={"max_padding": 0.4})
    trainer.train(plain, tmp_path / "plain")
    assert [timeless(r) for r in history(tmp_path / "plain")] != runs["resident"]


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
@pytest.mark.parametrize("mode", ["fast", "faithful"])
def test_samples_without_a_modality_train_and_predict(config, tmp_path, mode):
    samples = writers.samples(sizes=SIZES)
    for split in ("train", "test"):
        samples[split][0].audio = samples[split][0].audio[:0]
        samples[split][1].vision = samples[split][1].vision[:0]
        samples[split][2].text = ""
        samples[split][3].audio = samples[split][3].audio[:0]
        samples[split][3].vision = samples[split][3].vision[:0]
    path = writers.dump(writers.mmsa(samples), tmp_path / "x.pkl")
    own = changed(config, mode=mode, epochs=2, data={"path": str(path)})
    result = trainer.train(own, tmp_path / "run")
    assert np.isfinite(result.metrics["test"]["mae"])
    out = trainer.predict(tmp_path / "run", path, tmp_path / "p.csv")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["id"] for r in rows] == [s.id for s in samples["test"]]
    assert all(np.isfinite(float(r["prediction"])) for r in rows)


def test_a_run_goes_on_with_another_loader(config, tmp_path):
    trainer.train(changed(config, epochs=3), tmp_path / "whole")
    trainer.train(changed(config, epochs=2), tmp_path / "run")
    trainer.train(changed(config, epochs=3, data={"loader": "torch", "workers": 1}), tmp_path / "run", resume=True)
    assert [timeless(r) for r in history(tmp_path / "run")] == [timeless(r) for r in history(tmp_path / "whole")]


# -- the parts --------------------------------------------------------------------------------------------------------


def rates(optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_optimisers_have_the_rates_and_settings_of_their_parts(kind):
    encoder, objective = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"text": encoder, "rest": torch.nn.Linear(3, 1)})
    settings = {"optimizer": kind, "lr": 0.1, "mi_lr_rate": 0.5, "weight_decay": 0.25, "momentum": 0.75}
    made = made_of._optimizers(Config(train=settings, text={"lr_rate": 0.2}), model, encoder, objective)
    assert rates(made["main"]) == pytest.approx([0.1, 0.02]) and rates(made["estimators"]) == pytest.approx([0.05])
    for optimizer in made.values():
        assert type(optimizer) is (torch.optim.SGD if kind == "sgd" else torch.optim.Adam)
        assert all(group["weight_decay"] == 0.25 for group in optimizer.param_groups)
        assert all(group.get("momentum", 0.75) == 0.75 and group["fused"] for group in optimizer.param_groups)
    sizes = [[p.numel() for p in group["params"]] for group in made["main"].param_groups]
    assert sizes == [[3, 1], [4, 2]]
    same = made_of._optimizers(Config(train=settings, text={"lr_rate": -1}), model, encoder, objective)
    assert rates(same["main"]) == pytest.approx([0.1, 0.1])
    encoder.requires_grad_(False)
    alone = made_of._optimizers(Config(train=settings), model, encoder, torch.nn.Identity())
    assert list(alone) == ["main"] and rates(alone["main"]) == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("schedule", "higher", "expected"),
    [
        ({"kind": "none"}, False, [1, 1, 1, 1, 1, 1]),
        ({"kind": "step", "step_size": 2, "rate": 0.5}, False, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"kind": "multi_step", "milestones": [1, 4], "rate": 0.5}, False, [1, 0.5, 0.5, 0.5, 0.25, 0.25]),
        ({"kind": "exp", "rate": 0.5}, False, [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        # the metric is 3, 2, 4, 4, 1: of those that are to be low the third and the fourth are no better
        ({"kind": "plateau", "patience": 1, "rate": 0.5}, False, [1, 1, 1, 1, 0.5, 0.5]),
        ({"kind": "plateau", "patience": 0, "rate": 0.5}, True, [1, 1, 0.5, 0.5, 0.25, 0.125]),
    ],
    ids=str,
)
def test_schedules(schedule, higher, expected):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 1.0)
    scheduler = made_of._scheduler(optimizer, Config(train={"schedule": schedule}).train.schedule, higher)
    found = rates(optimizer)
    for metric in (3.0, 2.0, 4.0, 4.0, 1.0):
        optimizer.step()
        run = SimpleNamespace(parts=SimpleNamespace(schedulers={"main": scheduler}, selection=Selection("m", higher)))
        TrainingRun._step_schedules(run, {"valid": {"m": metric}})
        found += rates(optimizer)
    assert found == pytest.approx(expected)


def test_the_best_epoch():
    """Of equal ones the first. One without a number is never better, and always worse."""
    low, nan, high, again = ({"valid": {"m": m}} for m in (1.0, math.nan, 2.0, 2.0))
    most, least = Selection("m", True), Selection("m", False)
    assert most.best([low, high, again], "valid") is high and least.best([high, again, low], "valid") is low
    assert least.best([high, again], "valid") is high
    for selection in (most, least):
        assert selection.best([nan, low], "valid") is low and selection.best([low, nan], "valid") is low
        assert selection.improved([], nan) and selection.improved([nan], low)
        assert not selection.improved([low], nan) and not selection.improved([nan], nan)
        assert not selection.improved([high], again)
    assert most.improved([low], high) and not most.improved([low, high, low], low)


def test_random_states_are_put_back():
    """Python's, NumPy's, torch's and a generator's own."""
    generator = torch.Generator().manual_seed(3)

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), generator=generator).item()

    seed_all(2**32 + 5)
    seeded = draw()
    state, own = random_state(), generator.get_state()
    expected = draw()
    assert len({*seeded, *expected}) == 8
    set_random_state(state)
    generator.set_state(own)
    with unchanged_random_state(generator):
        draw()
    assert draw() == expected
    seed_all(2**32 + 5)
    generator.manual_seed(3)
    assert draw() == seeded


def test_batches_of_an_epoch_by_stage():
    def batches(informed, **train):
        config = Config(train=train).resolve()
        return made_of.Parts.batches(SimpleNamespace(config=config, loaders={"train": range(7)}, informed=informed))

    assert batches(True, stage1_n=3) == {"collect": 7, "stage1": 21, "stage2": 7}
    assert batches(True, stage1_n=0) == {"collect": 0, "stage1": 0, "stage2": 7}
    assert batches(True, stage1_features="bank") == {"collect": 0, "stage1": 14, "stage2": 7}
    assert batches(False) == {"stage2": 7}


def test_what_only_other_ranks_hold():
    encoder, three = torch.nn.Linear(4, 4), SimpleNamespace(size=3)
    shard, whole = (Config(train={"shard": shard}) for shard in (True, False))
    assert held_elsewhere(shard, encoder, three) == 20 - 7
    assert held_elsewhere(shard, encoder, SimpleNamespace(size=1)) == 0
    encoder.bias.requires_grad_(False)
    assert held_elsewhere(shard, encoder, three) == 16 - 6
    assert held_elsewhere(whole, encoder, three) == held_elsewhere(shard, None, three) == 0


def test_what_is_left_is_what_probes_find():
    """Of I(x;y|z) the chance is what z alone tells."""
    generator = torch.Generator().manual_seed(0)
    known, unseen = ({n: torch.randn(200, 2, generator=generator) for n in "XZ"} for _ in range(2))
    for rows in (known, unseen):
        rows["Y"] = rows["Z"][:, :1] + rows["X"][:, :1]
        rows["L"] = (rows["Z"][:, :1] > 0).float()

    def probed(names, target, discrete=False):
        seen, x = (torch.cat([rows[name] for name in names], 1) for rows in (known, unseen))
        return probe(x, unseen[target], known=(seen, known[target]), discrete=discrete)

    assert probe_term(Term("X", "Y"), known, unseen, {}) == probed("X", "Y")
    given, alone = probe_term(Term("X", "Y", "Z"), known, unseen, {}), probed("Z", "Y")
    assert given == replace(probed("XZ", "Y"), chance=max(alone.knn, alone.linear)) and 0.3 < given.left < 0.7
    label = probe_term(Term("X", "L", "Z"), known, unseen, {"L": 2})
    assert label.kind == "accuracy" and label.chance == max(probed("Z", "L", True).knn, probed("Z", "L", True).linear)
    assert abs(label.left) < 0.15 and probe_term(Term("Z", "L"), known, unseen, {"L": 2}).left > 0.3
    found = {"valid": {"information": {"I": 0.5, "J": 0.25}, "bank": {"I": 0.75, "J": math.nan}}}
    assert [_reading(found, name) for name in "IJK"] == [0.75, 0.25, None]


def test_features_are_those_of_the_best_model(config, data, tmp_path, monkeypatch):
    """The first epoch stays the best, so that the last weights are others."""
    monkeypatch.setattr(Selection, "better", lambda self, a, b, split: False)
    trainer.train(changed(config, output={"features": True}), tmp_path / "run")
    run = trainer.load_run(tmp_path / "run")
    assert run.meta["epoch"] == 0
    _, dataset = open_split(run, data, "test")
    expected = apply(run, dataset, "test", None, "regression").features
    found = load_file(tmp_path / "run/features_test.safetensors")
    for name in "FTAV":
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_summary_tells_the_best_epochs_of_both_splits(tmp_path):
    history = [
        {"epoch": n, "seconds": s, "waiting_seconds": 1.0, "skipped_steps": n, "valid": {"mae": v}, "test": {"mae": t}}
        for n, (s, v, t) in enumerate([(8.0, 0.9, 0.5), (4.0, 0.6, 0.8), (4.0, 0.7, 0.7)])
    ]
    settings = Config(train={"non_finite": "skip"})
    of = SimpleNamespace(
        selection=Selection("mae", False), scored=["valid", "test"], samples=20, device=torch.device("cpu"),
        config=settings,
    )  # fmt: skip
    summary = RunFiles._write_summary(SimpleNamespace(parts=of, out=tmp_path), history, 20.0)
    assert summary["best_epoch"] == 1 and summary["test"] == {"mae": 0.8} and summary["valid"] == {"mae": 0.6}
    assert summary["oracle_test"] == {"mae": 0.5, "epoch": 0} and summary["skipped_steps"] == 3
    assert summary["data_wait_share"] == 3 / 16 and summary["samples_per_second"] == 5 and summary["wall_s"] == 20
