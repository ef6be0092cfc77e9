"""Prediction is not training: it needs a run folder and the samples, and nothing of where the run was trained."""

import contextlib
import csv
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from engine import checkpoint, trainer
from engine.cli import main
from engine.config import DataConfig
from engine.errors import ConfigError, DataError
from engine.loaders import DataWarning, open_dataset
from engine.loaders.inspect import inspect_path
from engine.loaders.text import load_tokenizer
from tests.loaders import writers
from tests.small_runs import SIZES, changed, history, small_config, timeless


@pytest.fixture(scope="module")
def samples():
    return writers.samples(sizes=SIZES)


@pytest.fixture(scope="module")
def trained(samples, text_encoder, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """A run, and its predictions of the test split by id."""
    folder = tmp_path_factory.mktemp("trained")
    path = writers.dump(writers.mmsa(samples), folder / "x.pkl")
    settings = small_config(path, text_encoder)
    trainer.train(changed(settings, epochs=2, data={"format": "mmsa"}), folder / "run")
    return folder / "run", table(folder / "run" / "predictions_test.csv")


def table(path: Path) -> dict[str, dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def same(found: dict[str, dict], wanted: dict[str, dict]) -> bool:
    """Equal predictions of the samples found."""
    return all(
        float(row["prediction"]) == pytest.approx(float(wanted[i]["prediction"]), abs=1e-5) for i, row in found.items()
    )


def mmsa_clip(folder: Path, one) -> Path:
    content = writers.mmsa({"test": [one]})["test"]
    del content["regression_labels"]
    return writers.dump({"test": content}, folder / "clip.pkl")


def tuple_clip(folder: Path, one) -> Path:
    (words, _, name) = writers.tuples({"test": [one]})["test"][0]
    return writers.dump([(words, None, name)], folder / "test.pkl")


def manifest_clip(folder: Path, one, columns=("id", "split", "label", "text", "audio", "vision"), label="") -> Path:
    folder.mkdir(parents=True)
    for kind in ("audio", "vision"):
        np.save(folder / f"{kind}.npy", getattr(one, kind))
    row = {
        "id": one.id,
        "split": "test",
        "label": label,
        "text": one.text,
        "audio": "audio.npy",
        "vision": "vision.npy",
    }
    writers.write_csv(folder / "manifest.csv", [{c: row[c] for c in columns}])
    return folder


CLIPS = {
    "mmsa_without_labels": mmsa_clip,
    "one_split_file": tuple_clip,
    "manifest_empty_label": manifest_clip,
    "manifest_no_label_no_split": lambda f, one: manifest_clip(f, one, ("id", "text", "audio", "vision")),
    "manifest_train": lambda f, one: renamed(manifest_clip(f, one), "test", "train"),
}


def renamed(folder: Path, old: str, new: str) -> Path:
    path = folder / "manifest.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(f",{old},", f",{new},"), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", CLIPS)
def test_one_clip_without_a_label(trained, samples, tmp_path, kind):
    """In any format, also another than the training data's, a clip gets the prediction that it had among the others."""
    run, wanted = trained
    one = samples["test"][4]
    path = CLIPS[kind](tmp_path / "clip", one)
    found = table(trainer.predict(run, path, tmp_path / "p.csv"))
    assert list(found) == [one.id] and found[one.id]["label"] == ""
    assert same(found, wanted)
    again = table(trainer.predict(run, path, tmp_path / "p.csv"))  # from the store that the first call left
    assert again == found


def kept(path: Path, *words) -> str:
    """The error of a command that must leave a file as it is."""
    before = path.read_bytes()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert main([str(word) for word in words]) == 2
    assert path.read_bytes() == before
    return errors.getvalue()


@pytest.mark.parametrize("other", ["data", "labels", "best.safetensors", "predictions_test.csv"])
def test_results_replace_only_results(trained, samples, tmp_path, other):
    run = shutil.copytree(trained[0], tmp_path / "run")
    data = mmsa_clip(tmp_path, samples["test"][0])
    labels = tmp_path / "MOSI-label.csv"
    writers.write_csv(labels, writers.label_rows(samples))
    target = {"data": data, "labels": labels}.get(other, run / other)
    said = kept(target, "predict", "--run", run, "--data", data, "--out", target)
    assert ("a file of a run" if target.parent == run else "a new name, or predictions to replace") in said
    if other != "predictions_test.csv":  # a report of the run itself may lie among its files
        assert "a new name, or a page to replace" in kept(target, "report", "--run", run, "--out", target)
    settings = ("import-command", "python Main.py --dataset mosi_Dec", "--out", target)
    for own in ("config.yaml", "report.html"):
        words = settings[:2] if own == "config.yaml" else ("report", "--run", trained[0])
        (run / "report.html").write_text("<!doctype html>")
        assert "a file of a run" in kept(run / own, *words, "--out", run / own)
    if target.parent != run:
        assert "a new name, or settings to replace" in kept(target, *settings)
    for words in (("predict", "--run", run, "--data", data), ("report", "--run", run), settings[:2]):
        for _ in range(2):  # the second time a result of the first is replaced
            assert main([str(w) for w in (*words, "--out", tmp_path / words[0])]) == 0


def with_names(folder: Path, data, names: list[str]) -> Path:
    """A manifest whose audio is in CSV files with these column names, after one of frame numbers."""
    writers.write_manifest(folder, data)
    for file in (folder / "audio").glob("*.npy"):
        values = np.load(file)
        table = np.column_stack([np.arange(len(values)), values[:, [ord(name[-1]) - ord("a") for name in names]]])
        np.savetxt(file.with_suffix(".csv"), table, "%.9g", ",", header=",".join(["frame", *names]), comments="")
        file.unlink()
    manifest = folder / "manifest.csv"
    rows = [line.split(",") for line in manifest.read_text().splitlines()]
    place = rows[0].index("audio")
    cells = [[c.replace(".npy", ".csv") if i == place else c for i, c in enumerate(row)] for row in rows]
    manifest.write_text("\n".join(map(",".join, cells)))
    return folder


def test_columns_in_another_order_than_the_run_was_trained_with(samples, text_encoder, tmp_path):
    """The width is the same, and every feature would be taken for another one."""
    names = ["F_a", "F_b", "F_c", "F_d", "F_e"]
    data = with_names(tmp_path / "data", samples, names)
    settings = changed(small_config(data, text_encoder), epochs=1, data={"skip_columns": ["frame"]})
    trainer.train(settings, tmp_path / "run")
    wanted = table(tmp_path / "run" / "predictions_test.csv")
    clip = {"test": samples["test"][2:4]}
    other = with_names(tmp_path / "other", clip, names[::-1])
    found = r"audio: found the columns in another order \('F_e' as column 1\); expected 'F_a' there, as the run was"
    for apply in (trainer.evaluate, lambda *a: trainer.predict(*a, tmp_path / "p.csv")):
        with pytest.raises(ConfigError, match=found):
            apply(tmp_path / "run", other)
    same_order = with_names(tmp_path / "same", clip, [name.lower() for name in names])
    assert same(table(trainer.predict(tmp_path / "run", same_order, tmp_path / "p.csv")), wanted)
    renamed = with_names(tmp_path / "renamed", clip, [name.replace("F", "G") for name in names])
    with pytest.warns(DataWarning, match=r"other column names .*'G_a', not 'F_a'\): columns are taken by their place"):
        assert same(table(trainer.predict(tmp_path / "run", renamed, tmp_path / "p.csv")), wanted)
    without = writers.write_manifest(tmp_path / "npy", clip)  # .npy files name no columns
    assert same(table(trainer.predict(tmp_path / "run", without, tmp_path / "p.csv")), wanted)


def test_one_clip_with_a_label(trained, samples, tmp_path):
    run, wanted = trained
    one = samples["test"][2]
    path = manifest_clip(tmp_path / "clip", one, label="0.5")
    found = table(trainer.predict(run, path, tmp_path / "p.csv"))
    assert found[one.id]["label"] == "0.5" and same(found, wanted)
    assert trainer.evaluate(run, path)["mae"] == pytest.approx(abs(float(wanted[one.id]["prediction"]) - 0.5), abs=1e-5)


def test_the_command_line_predicts_one_clip(trained, samples, tmp_path, capsys):
    run, wanted = trained
    path = manifest_clip(tmp_path / "clip", samples["test"][0])
    assert main(["predict", "--run", str(run), "--data", str(path), "--out", str(tmp_path / "p.csv")]) == 0
    assert same(table(tmp_path / "p.csv"), wanted)
    assert main(["evaluate", "--run", str(run), "--data", str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"no label for 1 of 1 samples, row 0 (id {samples['test'][0].id}) the first" in error
    assert "engine predict, which needs none" in error


def test_evaluate_names_what_it_misses(trained, samples, tmp_path):
    run, _ = trained
    content = writers.mmsa(samples)
    content["test"]["regression_labels"][[3, 5]] = np.nan
    path = writers.dump({k: content[k] for k in ("valid", "test")}, tmp_path / "x.pkl")
    with pytest.raises(
        DataError, match=rf"test: found no label for 2 of 9 samples, row 3 \(id {samples['test'][3].id}\)"
    ):
        trainer.evaluate(run, path)
    assert np.isfinite(trainer.evaluate(run, path, "valid")["mae"])
    with pytest.raises(ConfigError, match=r"'train', which .* does not have; expected one of valid, test"):
        trainer.evaluate(run, path, "train")
    assert [r["label"] == "" for r in table(trainer.predict(run, path, tmp_path / "p.csv")).values()] == [
        i in (3, 5) for i in range(9)
    ]


def test_data_that_can_only_be_predicted_is_not_trained_on(trained, config, samples, tmp_path):
    """Also after prediction has made a store of it."""
    run, _ = trained
    content = writers.mmsa(samples)
    content["train"]["regression_labels"][2] = np.nan
    path = writers.dump(content, tmp_path / "x.pkl")
    for _ in range(2):
        with pytest.raises(DataError, match=r"train, labels, row 2 \(id v_ideo0_2\).*label nan \(1 of 21 samples"):
            trainer.train(changed(config, data={"path": str(path)}), tmp_path / "run")
        trainer.predict(run, path, tmp_path / "p.csv")
    clip = mmsa_clip(tmp_path / "clip", samples["test"][0])
    trainer.predict(run, clip, tmp_path / "p.csv")
    with pytest.raises(DataError, match="splits test, no train"):
        trainer.train(changed(config, data={"path": str(clip)}), tmp_path / "run")


def held_back(samples, folder: Path, how: str) -> Path:
    content = writers.mmsa(samples)
    if how == "nan":
        content["test"]["regression_labels"][:] = np.nan
    elif how == "none":
        content["test"]["regression_labels"] = None
    else:
        del content["test"]["regression_labels"]
    return writers.dump(content, folder / "held.pkl")


@pytest.mark.parametrize("how", ["nan", "no key", "none"])
def test_a_test_split_without_labels_trains(config, samples, tmp_path, how):
    """On the same numbers of train and valid as with the labels, and with the same predictions of test."""
    path = writers.dump(writers.mmsa(samples), tmp_path / "whole.pkl")
    settings = changed(config, epochs=2, output={"features": True, "report": True})
    whole = trainer.train(changed(settings, data={"path": str(path)}), tmp_path / "whole")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        held = changed(settings, data={"path": str(held_back(samples, tmp_path, how))})
        result = trainer.train(held, tmp_path / "held")
    assert sum("the test split has no labels" in str(w.message) for w in caught) == 1
    assert result.metrics["test"] == result.metrics["oracle_test"] == {}
    assert result.metrics["valid"] == whole.metrics["valid"]
    for a, b in zip(history(tmp_path / "held"), history(tmp_path / "whole"), strict=True):
        assert a["test"] == {} and (a["train"], a["valid"]) == (b["train"], b["valid"])
    found, wanted = (table(tmp_path / name / "predictions_test.csv") for name in ("held", "whole"))
    assert {r["label"] for r in found.values()} == {""} and list(found) == list(wanted) and same(found, wanted)
    page = (tmp_path / "held" / "report.html").read_text(encoding="utf-8")
    assert "Valid split (there are no metrics of the test split)" in page and "Oracle" not in page
    trainer.train(changed(held, epochs=3), tmp_path / "held", resume=True)
    assert len(history(tmp_path / "held")) == 3


def test_seeds_without_test_labels_are_summarised_on_valid(config, samples, tmp_path):
    path = held_back(samples, tmp_path, "nan")
    results = trainer.train_seeds(changed(config, epochs=1, data={"path": str(path)}), tmp_path / "runs", [0, 1])
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text(encoding="utf-8"))
    assert summary["valid"]["mae"]["mean"] == pytest.approx(np.mean([r.metrics["valid"]["mae"] for r in results]))
    assert "test" not in summary


def test_classes_may_be_held_back_too(config, samples, tmp_path):
    content = writers.mmsa(samples)
    for split in content.values():
        split["regression_labels"] = np.arange(len(split["id"]), dtype=np.float32) % 3
    content["test"]["regression_labels"][:] = np.nan
    path = writers.dump(content, tmp_path / "x.pkl")
    settings = changed(
        config, epochs=2, data={"path": str(path), "dataset": "custom", "label_key": "regression_labels"},
        model={"task": "classification", "num_class": 3}, train={"loss": "CE"},
    )  # fmt: skip
    result = trainer.train(settings, tmp_path / "run")
    assert result.metrics["test"] == {} and 0 <= result.metrics["valid"]["acc"] <= 1
    rows = table(tmp_path / "run" / "predictions_test.csv")
    assert {r["label"] for r in rows.values()} == {""} and {r["prediction"] for r in rows.values()} <= {"0", "1", "2"}
    one = samples["test"][3]  # a label that is no class does not matter, as none does
    found = table(
        trainer.predict(tmp_path / "run", manifest_clip(tmp_path / "a", one, label="-0.7"), tmp_path / "p.csv")
    )
    assert found[one.id]["label"] == "-0.7" and found[one.id]["prediction"] == rows[one.id]["prediction"]
    assert trainer.evaluate(tmp_path / "run", settings.data.path, "valid")["acc"] == result.metrics["valid"]["acc"]


# -- a run folder elsewhere --


def test_a_run_folder_is_whole(config, samples, text_encoder, tmp_path, monkeypatch):
    """Copied away, with the encoder's folder and the training data gone, it evaluates, predicts and goes on."""
    home = tmp_path / "home"
    shutil.copytree(text_encoder, home / "models" / "bert")
    writers.dump(writers.mmsa(samples), home / "data" / "x.pkl")
    monkeypatch.chdir(home)
    settings = changed(config, epochs=2, text_encoder="models/bert", data={"path": "data/x.pkl"})
    trainer.train(settings, "run")
    trainer.train(changed(settings, epochs=3), "whole")
    wanted = trainer.evaluate("run", "data/x.pkl")
    away = tmp_path / "away"
    shutil.copytree(home / "run", away / "copied")
    shutil.copy(home / "data" / "x.pkl", away / "other.pkl")
    rest = tmp_path / "gone"
    home.rename(rest)
    monkeypatch.chdir(away)
    assert trainer.evaluate("copied", "other.pkl") == wanted
    assert same(table(trainer.predict("copied", "other.pkl", "p.csv")), table(rest / "run" / "predictions_test.csv"))
    trainer.train(changed(settings, epochs=3, data={"path": "other.pkl"}), "copied", resume=True)
    assert [timeless(r) for r in history(Path("copied"))] == [timeless(r) for r in history(rest / "whole")]
    a, b = (checkpoint.load(run / "last.safetensors")[0]["model"] for run in (Path("copied"), rest / "whole"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_seeds_go_on_without_the_encoders_folder(config, text_encoder, tmp_path):
    shutil.copytree(text_encoder, tmp_path / "bert")
    settings = changed(config, epochs=1, text_encoder=str(tmp_path / "bert"))
    trainer.train_seeds(settings, tmp_path / "runs", [0, 1])
    shutil.rmtree(tmp_path / "bert")
    results = trainer.train_seeds(settings, tmp_path / "runs", [0, 1], resume=True)
    assert [len(history(r.out)) for r in results] == [1, 1]


def test_a_saved_tokenizer_is_the_same(text_encoder, tmp_path):
    tokenizer = load_tokenizer(str(text_encoder))
    tokenizer.save(tmp_path)
    read = load_tokenizer(str(tmp_path))
    assert read.fingerprint == tokenizer.fingerprint
    assert (read.pad_id, read.closing_id, read.unknown) == (tokenizer.pad_id, tokenizer.closing_id, tokenizer.unknown)
    texts = ["the film was not good", "", "never seen"]
    assert read.encode(texts).values.tolist() == tokenizer.encode(texts).values.tolist()


def test_a_run_of_another_machines_loader_predicts_here(trained, samples, tmp_path):
    """`data.loader=dali` needs DALI where the run is trained, not where it predicts."""
    run, wanted = trained
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    text = (copied / "config.yaml").read_text(encoding="utf-8")
    assert "  loader: auto\n" in text
    (copied / "config.yaml").write_text(text.replace("  loader: auto\n", "  loader: dali\n"), encoding="utf-8")
    found = table(trainer.predict(copied, manifest_clip(tmp_path / "clip", samples["test"][1]), tmp_path / "p.csv"))
    assert same(found, wanted)


def test_opening_for_prediction_keeps_labels_that_there_are(samples, text_encoder, trained, tmp_path):
    path = writers.dump({"dev": writers.mmsa(samples)["valid"]}, tmp_path / "x.pkl")
    normalizer = trainer.load_run(trained[0]).normalizer
    opened = open_dataset(path, DataConfig(), str(text_encoder), normalizer, training=False)
    assert list(opened.splits) == ["valid"]
    assert opened.splits["valid"].label[:, 0].tolist() == pytest.approx([s.label for s in samples["valid"]], abs=1e-6)


def test_inspect_tells_labels_that_are_missing(samples, tmp_path):
    content = writers.mmsa(samples)
    content["valid"]["regression_labels"][1] = np.nan
    content["test"]["regression_labels"][:] = np.nan
    report = inspect_path(writers.dump(content, tmp_path / "x.pkl"))
    (problem,) = report.problems
    assert "valid, labels, row 1" in problem and "label nan (1 of 6 samples have none)" in problem
    assert report.splits["test"]["label"]["min"] is None and sum(report.splits["valid"]["label"]["counts"]) == 5
    console = Console(file=io.StringIO(), width=120)
    console.print(report.render())
    assert "no labels" in console.file.getvalue()
    clip = inspect_path(mmsa_clip(tmp_path / "clip", samples["test"][0]))
    assert [p.partition("found ")[2][:21] for p in clip.problems] == ["splits test, no train"]
