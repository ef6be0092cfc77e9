"""Runs on any of text, audio and vision: nothing of the others is read, built, estimated or needed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from engine import checkpoint, trainer
from engine.config import Config, DataConfig
from engine.errors import ConfigError, DataError
from engine.loaders import open_dataset
from engine.loaders.convert import convert
from engine.loaders.formats import Choice
from engine.mimrl.settings import MIMRLObjectiveConfig as ObjectiveConfig
from engine.mimrl.terms import mimrl_objective
from engine.model.fusion import TensorFusion
from tests.loaders import writers
from tests.small_runs import SIZES, STILL, changed, history, numbers, small_config, timeless
from tests.test_predict import same, table

SUBSETS = {
    ("text",): ["I(F;T)"],
    ("audio",): ["I(F;A)"],
    ("vision",): ["I(F;V)"],
    ("text", "audio"): ["I(F;T)", "I(F;A)", "inv", "spec_t", "spec_a", "comp"],
    ("text", "vision"): ["I(F;T)", "I(F;V)", "inv", "spec_t", "spec_v", "comp"],
    ("audio", "vision"): ["I(F;A)", "I(F;V)"],
}
"""The terms that each subset keeps."""


@pytest.fixture(scope="module")
def samples():
    return writers.samples(sizes=SIZES)


@pytest.fixture
def config(data, text_encoder) -> Config:
    return changed(small_config(data, text_encoder), epochs=2)


def on(config: Config, path: Path, *modalities: str, **sections) -> Config:
    own = {"path": str(path), "modalities": list(modalities)} | sections.pop("data", {})
    return changed(config, data=own, **sections)


@pytest.mark.filterwarnings("ignore:data.modalities")
@pytest.mark.parametrize("modalities", SUBSETS, ids="-".join)
def test_every_subset_trains_reports_and_predicts(config, data, samples, tmp_path, modalities):
    settings = on(config, data, *modalities, output={"features": True, "report": True})
    result = trainer.train(settings, tmp_path / "run")
    assert list(history(tmp_path / "run")[1]["train"]["information"]) == SUBSETS[modalities]
    names = checkpoint.load(tmp_path / "run" / "best.safetensors")[0]["model"]
    built = {m for m in ("text", "audio", "vision") if any(n.startswith(f"{m}_encoder.") for n in names)}
    assert built == set(modalities)
    with safe_open(tmp_path / "run" / "features_test.safetensors", "np") as file:
        assert set(file.keys()) == {"F", "label", *(m[0].upper() for m in modalities)}
    assert trainer.evaluate(tmp_path / "run", data)["mae"] == pytest.approx(result.metrics["test"]["mae"], abs=1e-5)
    found = table(trainer.predict(tmp_path / "run", data, tmp_path / "p.csv"))
    assert list(found) == [s.id for s in samples["test"]]
    assert same(found, table(tmp_path / "run" / "predictions_test.csv"))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert ("I(T;V)" in page) == ("text" in modalities and "vision" in modalities)
    assert (tmp_path / "run" / "tokenizer.json").exists() == ("text" in modalities)


@pytest.mark.filterwarnings("ignore:data.modalities")
@pytest.mark.parametrize("modalities", [("audio", "vision"), ("text",)], ids="-".join)
def test_what_is_left_out_changes_nothing(config, samples, text_encoder, tmp_path, modalities):
    """A run on whole data is that on data that never had the others, bit by bit."""
    whole = writers.dump(writers.mmsa(samples), tmp_path / "whole.pkl")
    content = writers.mmsa(samples)
    for split in content.values():
        for m in {"audio", "vision"} - set(modalities):
            del split[m], split[f"{m}_lengths"]
        if "text" not in modalities:
            del split["raw_text"]
    bare = writers.dump(content, tmp_path / "bare.pkl")
    for name, path in (("whole", whole), ("bare", bare)):
        trainer.train(on(config, path, *modalities), tmp_path / name)
    assert [timeless(r) for r in history(tmp_path / "whole")] == [timeless(r) for r in history(tmp_path / "bare")]
    assert trainer.evaluate(tmp_path / "whole", bare) == trainer.evaluate(tmp_path / "bare", whole)


def manifest(samples, folder: Path) -> Path:
    writers.write_manifest(folder, samples)
    path = folder / "manifest.csv"
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    text = rows[0].index("text")
    path.write_text("\n".join(",".join(c for i, c in enumerate(r) if i != text) for r in rows), encoding="utf-8")
    return folder


def declarelab(samples, folder: Path) -> Path:
    writers.write_declarelab(folder, samples)
    next(folder.glob("*.csv")).unlink()
    return folder


def csd(samples, folder: Path) -> Path:
    writers.write_csd(folder, samples)
    (folder / "words.csd").unlink()
    return folder


def wordless(samples, folder: Path) -> Path:
    content = {}
    for split, rows in writers.tuples(samples).items():
        content[split] = [((None, *inner[1:3], None, *inner[4:]), *rest) for inner, *rest in rows]
    return writers.dump(content, folder / "x.pkl")


CORPORA = {"manifest": manifest, "declarelab": declarelab, "csd": csd, "tuples": wordless}


@pytest.mark.parametrize("family", CORPORA)
def test_a_corpus_without_transcripts(samples, tmp_path, family):
    path = CORPORA[family](samples, tmp_path / "in")
    settings = DataConfig(modalities=["audio", "vision"], align="segments")
    opened = open_dataset(path, settings, "nowhere/no_encoder")
    for split, rows in samples.items():
        got = opened.splits[split]
        lengths = sorted(len(s.audio) for s in rows)
        assert sorted(got.lengths("audio").tolist()) == lengths
        assert sorted(got.label[:, 0].tolist()) == pytest.approx(sorted(s.label for s in rows), abs=1e-6)
    assert opened.text_dim == 0 and opened.tokenizer is None and not opened.report.missing["train"].get("text")
    with pytest.raises(DataError, match="actual_words" if family == "tuples" else "text"):
        open_dataset(path, DataConfig(align="segments"), "minilm")


def test_a_store_says_what_it_holds(samples, text_encoder, tmp_path):
    path = manifest(samples, tmp_path / "in")
    store = convert(path, tmp_path / "store", choice=Choice(modalities=("audio", "vision")))
    opened = open_dataset(store, DataConfig(modalities=["vision"]))
    assert (opened.audio_dim, opened.vision_dim) == (0, writers.VISION)
    with pytest.raises(DataError, match=r"a store of audio and vision; expected text too, as data\.modalities says"):
        open_dataset(store, DataConfig(), str(text_encoder))


@pytest.mark.filterwarnings("ignore:data.modalities")
def test_text_features_beside_audio_and_vision(config, samples, tmp_path):
    path = writers.write_manifest(tmp_path / "in", samples, features=6)
    settings = on(config, path, "text", "audio", "vision", text_encoder="features")
    result = trainer.train(settings, tmp_path / "all")
    assert trainer.evaluate(tmp_path / "all", path)["mae"] == pytest.approx(result.metrics["test"]["mae"], abs=1e-5)
    assert list(history(tmp_path / "all")[1]["train"]["information"])[:4] == ["I(F;T)", "I(F;A)", "I(F;V)", "inv"]
    assert not (tmp_path / "all" / "tokenizer.json").exists()
    trainer.train(on(settings, path, "text", "audio"), tmp_path / "two")
    weight = checkpoint.load(tmp_path / "two" / "best.safetensors")[0]["model"]["text_projection.weight"]
    assert weight.shape == (16, 6)


@pytest.mark.filterwarnings("ignore:data.modalities")
@pytest.mark.parametrize("settings", [{"fusion": "tfn"}, {"fusion": "transformer"}, {"compose_k": "cat"}], ids=str)
def test_every_fusion_takes_fewer(config, data, tmp_path, settings):
    result = trainer.train(on(config, data, "audio", "vision", model=settings), tmp_path / "run")
    assert trainer.evaluate(tmp_path / "run", data)["mae"] == pytest.approx(result.metrics["test"]["mae"], abs=1e-5)


def test_tensor_fusion_of_two_is_their_outer_product():
    torch.manual_seed(0)
    fusion = TensorFusion(4, modalities=2, factors=3)
    x, mask = torch.randn(5, 7, 2, 4), torch.ones(5, 7, 2, dtype=torch.bool)
    one = torch.ones(5, 1)
    a, b = (torch.cat([one, f(x[:, :, k].mean(1))], 1) for k, f in enumerate(fusion.factor))
    torch.testing.assert_close(fusion(x, mask), fusion.out((a[:, :, None] * b[:, None, :]).flatten(1)))


@pytest.mark.filterwarnings("ignore:data.modalities")
def test_resuming_is_bit_equal(config, data, tmp_path):
    settings = on(config, data, "audio", "vision")
    trainer.train(changed(settings, epochs=3), tmp_path / "whole")
    trainer.train(settings, tmp_path / "run")
    trainer.train(changed(settings, epochs=3), tmp_path / "run", resume=True)
    assert [timeless(r) for r in history(tmp_path / "run")] == [timeless(r) for r in history(tmp_path / "whole")]
    with pytest.raises(ConfigError, match=r"data.modalities=\[audio\], not \[audio, vision\]"):
        trainer.train(on(config, data, "audio", epochs=4), tmp_path / "run", resume=True)


@pytest.mark.filterwarnings("ignore:data.modalities")
@pytest.mark.parametrize("more", [{"loader": "torch", "workers": 1}, {"max_padding": 0.3}], ids=str)
def test_static_steps_and_loaders(config, data, tmp_path, more):
    """The static step, and workers that open the store themselves, see the same samples."""
    still = {"model": STILL, "train": {"lr": 1e-3, "amp": "off", "optimizer": "sgd"}}
    settings = on(config, data, "audio", **still)
    trainer.train(on(settings, data, "audio", data=more), tmp_path / "a")
    if "loader" in more:
        trainer.train(settings, tmp_path / "b")
        assert numbers(history(tmp_path / "a")) == pytest.approx(numbers(history(tmp_path / "b")), nan_ok=True)
    trainer.train(on(settings, data, "audio", data=more, train={"graphs": "emulate"}), tmp_path / "c")
    a, c = (numbers(history(tmp_path / name)) for name in "ac")
    assert a == pytest.approx(c, rel=1e-4, abs=1e-5, nan_ok=True)


def test_the_left_out_terms_are_named_once(config, data, tmp_path):
    with pytest.warns(UserWarning, match="data.modalities") as caught:
        trainer.train(on(config, data, "audio", "vision"), tmp_path / "run")
    (line,) = [str(w.message) for w in caught if "data.modalities" in str(w.message)]
    assert line.startswith(
        "data.modalities=[audio, vision]: the objective keeps I(F;A), I(F;V) and leaves out I(F;T), "
    )
    assert "\n" not in line and "I(T;C|V)" in line


def test_the_objective_of_text_and_audio():
    """Its terms have the values of the whole objective's, without those of vision."""
    torch.manual_seed(0)
    settings = ObjectiveConfig(compat="none", hidden=8, embed=4, c1=list(range(1, 12)), c2=list(range(1, 9)))
    two = mimrl_objective(settings, 6, 6, ("text", "audio"))
    sums = {e.name: ({str(t): c for t, c in e.coefficients}, e.weight) for e in two.expressions}
    assert sums == {
        "I(F;T)": ({"I(F;T)": 1.0}, 1.0),
        "I(F;A)": ({"I(F;A)": 1.0}, 2.0),
        "inv": ({"I(T;A)": 1.0}, 4.0),
        "spec_t": ({"I(T;C|A)": 1.0, "I(T;A|C)": -1.0}, 5.0),
        "spec_a": ({"I(A;C|T)": 1.0, "I(T;A|C)": -1.0}, 6.0),
        "comp": ({"I(T;A|C)": 1.0}, 8.0),
    }
    weights = {"I(F;T)": 1, "I(F;A)": 2, "I(T;A)": 4, "I(A;C|T)": 6, "I(T;A|C)": 7, "I(T;C|A)": 10}
    assert {str(t): w for t, w in two.stage1_weights.items()} == weights


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"mode": "faithful"}, r"data\.modalities: found \[audio, vision\] with mode=faithful"),
        ({"model": {"modality_dropout": 0.3}}, r"model\.modality_dropout: found 0\.3"),
        ({"data": {"augment": {"drop_audio": 0.2}}}, r"data\.augment\.drop_audio: found 0\.2"),
        ({"data": {"augment": {"mask_text": 0.2}}}, r"data\.augment\.mask_text: found 0\.2"),
    ],
    ids=str,
)
def test_settings_at_odds(config, data, sections, words):
    with pytest.raises(ConfigError, match=words):
        on(config, data, "audio", "vision", **sections)
    assert on(config, data, "audio", "vision").resolve().model.modality_dropout == 0
    assert on(config, data, "text", "vision").resolve().model.modality_dropout == 0.5


@pytest.mark.parametrize("written", [["vision", "audio"], "audio,vision", "vision-audio", ("audio", "vision", "audio")])
def test_how_modalities_may_be_written(written):
    assert DataConfig(modalities=written).modalities == ["audio", "vision"]


@pytest.mark.parametrize("written", [[], ["audio", "video"], "video"])
def test_names_that_are_none(written):
    with pytest.raises(ConfigError, match=r"data\.modalities"):
        Config(data={"modalities": written})


def test_a_run_without_text_predicts_a_clip_without_text(config, data, samples, tmp_path):
    with pytest.warns(UserWarning, match="leaves out"):
        trainer.train(on(config, data, "audio", "vision"), tmp_path / "run")
    one = replace(samples["test"][3], text="")
    clip = manifest({"test": [one]}, tmp_path / "clip")
    found = table(trainer.predict(tmp_path / "run", clip, tmp_path / "p.csv"))
    assert list(found) == [one.id] and same(found, table(tmp_path / "run" / "predictions_test.csv"))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["test"]["mae"] > 0
    assert np.isfinite(float(found[one.id]["prediction"]))
