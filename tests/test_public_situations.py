"""Situations that users of multimodal, contrastive and mutual-information code have reported in public.

The inputs are made here. docs/situations.md lists the situations with what the engine does.
"""

import io
import json
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import engine
from engine import trainer
from engine.config import DataConfig
from engine.errors import ConfigError, DataError, EstimatorError
from engine.kernels import infonce
from engine.loaders import DataWarning, open_dataset
from engine.loaders.convert import convert
from engine.step import TwoStageStep
from engine.training.records import parse_line
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer
from tests.small_runs import SIZES, changed, history

PAGE = Path(__file__).resolve().parents[1] / "docs" / "situations.md"


@pytest.fixture
def tokenizer(tmp_path) -> str:
    return str(small_tokenizer(tmp_path / "tokenizer"))


def opened(path, tokenizer, **settings):
    """The data set, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        found = open_dataset(path, DataConfig(**settings), tokenizer)
    return found, [str(w.message) for w in caught if w.category is DataWarning]


def declarelab(folder: Path, sizes=SIZES, edit=lambda samples: None) -> Path:
    samples = writers.samples(sizes=sizes)
    edit(samples)
    writers.write_declarelab(folder, samples)
    return folder


def test_page_lists_every_situation():
    rows = [line.split(" | ")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if " #" in line]
    stories = [f.__doc__ for name, f in globals().items() if name.startswith("test_") and f.__doc__]
    assert len(rows) >= 15 and rows == [story.strip().splitlines()[-1].strip() for story in stories]


# -- files --


def test_git_lfs_pointer_in_place_of_a_pickle(tmp_path, tokenizer):
    """A cloned repository holds Git LFS pointers under the names of its pickles: "invalid load key, 'v'".

    amanshenoy/multilogue-net #5
    """
    path = tmp_path / "mosi.pkl"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 351921731\n")
    with pytest.raises(DataError, match=r"mosi\.pkl: found a Git LFS pointer, not the data; .* `git lfs pull`\.$"):
        opened(path, tokenizer)


def test_pickle_whose_line_ends_were_rewritten(tmp_path, tokenizer):
    """Git or an editor on Windows turned the line ends of a text pickle into CRLF: "No module named 'multiarray\\r'".

    kaniblu/pytorch-bilstmcrf #7
    """
    path = tmp_path / "mosi.pkl"
    content = pickle.dumps(writers.mmsa(writers.samples()), protocol=0)
    path.write_bytes(content.replace(b"\n", b"\r\n"))
    with pytest.raises(DataError, match=r"line ends were changed to those of Windows; .* as a binary file") as error:
        opened(path, tokenizer)
    assert "\r" not in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(content)  # as it was written, the same file is read
    assert len(opened(path, tokenizer)[0].splits["train"]) == 7


def test_label_segment_of_no_length(tmp_path, tokenizer):
    """MOSI's opinion labels skip a number, because withdrawn segments have an interval of length zero.

    A2Zadeh/CMU-MultimodalSDK #94
    """
    h5py = pytest.importorskip("h5py", reason="needs the extra csd")
    samples = writers.samples()
    folder = writers.write_csd(tmp_path / "data", samples)
    with h5py.File(folder / "labels.csd", "a") as file:
        video = file["All Labels"]["data"]["train_v_ideo0"]
        intervals = video["intervals"][:]
        intervals[1, 1] = intervals[1, 0]
        video["intervals"][...] = intervals
    whole = opened(writers.write_csd(tmp_path / "whole", samples), tokenizer)[0].splits["train"]
    found, said = opened(folder, tokenizer)
    train = found.splits["train"]
    assert train.ids == [i for i in whole.ids if i != "train_v_ideo0[1]"]  # the others keep their numbers
    kept = [row for row, name in enumerate(whole.ids) if name != "train_v_ideo0[1]"]
    assert train.label[:, 0].tolist() == whole.label[kept, 0].tolist()
    assert any("1 segments without a word are left out" in line for line in said)


def test_modality_of_no_columns(tmp_path, tokenizer):
    """A user of image and text only sets the acoustic dimension to 0.

    WasifurRahman/BERT_multimodal_transformer #15
    """
    for family in ("mmsa", "declarelab", "tuples", "magbert"):
        samples = writers.samples()
        for rows in samples.values():
            for s in rows:
                s.audio = s.audio[:, :0]
        folder = tmp_path / family
        folder.mkdir()
        writers.dump(getattr(writers, family)(samples), folder / "x.pkl")
        writers.write_csv(folder / "label.csv", writers.label_rows(samples))
        found, said = opened(folder / "x.pkl", tokenizer)
        batch = next(iter(found.loader("train", 7)))
        assert found.audio_dim == 1 and batch.audio_length.tolist() == [1] * 7 and not batch.audio.any(), family
        assert any("14 samples without audio, kept as one zero frame" in line for line in said), family
    content = writers.mmsa(writers.samples())
    content["test"]["audio"] = content["test"]["audio"][:, :, :0]  # in one split only
    found, said = opened(writers.dump(content, tmp_path / "test.pkl"), tokenizer)
    assert found.audio_dim == writers.AUDIO and not next(iter(found.loader("test", 4))).audio.any()
    assert any("4 samples without audio" in line and "(test 4)" in line for line in said)


# -- labels and features --


def test_labels_beyond_the_scale(tmp_path, config):
    """Processed MOSEI has sentiment labels up to 5, where annotators were counted wrongly.

    A2Zadeh/CMU-MultimodalSDK #101
    """

    def wrong(samples):
        samples["train"][0].label, samples["train"][1].label = 5.0, -2.0

    path = str(declarelab(tmp_path / "data", edit=wrong))
    mosei = changed(config, epochs=1, data={"path": path, "dataset": "mosei"})
    with pytest.warns(DataWarning, match=r"to 5 do not look like those of data.dataset=mosei, .*Cut the labels to \["):
        trainer.train(mosei, tmp_path / "run")
    assert {"mae", "corr"} < history(tmp_path / "run")[0]["test"].keys()
    assert "acc7" not in history(tmp_path / "run")[0]["test"]
    with pytest.raises(ConfigError, match=r"to 5; expected labels in \[-3, 3\]"):
        trainer.train(changed(mosei, data={"label_scale": "mosi"}), tmp_path / "declared")


def test_one_row_of_several_emotions_as_a_label(tmp_path, tokenizer):
    """IEMOCAP pickles hold four one-hot pairs a sample, and users do not know how to train on them.

    Justin1904/Low-rank-Multimodal-Fusion #24
    """
    samples = writers.samples()
    content = writers.declarelab(samples)
    for split in content.values():
        split["labels"] = np.eye(2, dtype=np.int64)[np.zeros((len(split["labels"]), 4), int)]
    writers.write_csv(tmp_path / "label.csv", writers.label_rows(samples))
    path = writers.dump(content, tmp_path / "iemocap_data.pkl")
    with pytest.raises(DataError, match=r"train/labels: found labels of shape \(7, 4, 2\); .* one label per row\.$"):
        opened(path, tokenizer)
    for split in content.values():  # the second of each pair says whether the emotion is there
        split["labels"] = split["labels"][:, :, 1] + np.arange(4)
    writers.dump(content, path)
    with pytest.raises(DataError, match=r"shape \(7, 4\); .*Name the column with data\.label_column\.$"):
        opened(path, tokenizer)
    assert opened(path, tokenizer, label_column=3)[0].splits["train"].label.tolist() == [[3.0]] * 7


def test_features_of_very_different_sizes(tmp_path, tokenizer):
    """OpenFace features of one frame range from fractions to 518 and more.

    thuiar/MMSA #73
    """

    def large(samples):
        for rows in samples.values():
            for s in rows:
                s.vision[:, 0] = 518.123  # a column that says nothing
                s.vision[:, 1] *= 1e5
        samples["test"][0].vision[:, 0] = 518.124

    path = declarelab(tmp_path / "data", edit=large)
    found, _ = opened(path, tokenizer, length_rule="recorded", clip=100.0)
    frames = {s: torch.cat([b.vision[i, :n] for b in found.loader(s, 4) for i, n in enumerate(b.vision_length)])
              for s in ("train", "test")}  # fmt: skip
    assert not frames["train"][:, 0].any() and not frames["test"][:, 0].any()
    real = frames["train"][frames["train"].any(1)]
    assert real[:, 1].mean().abs() < 1e-5 and abs(real[:, 1].std(correction=0) - 1) < 1e-4
    with pytest.raises(DataError, match=r"vision/values: found values beyond ±65504, the range of float16"):
        convert(path, tmp_path / "half.safetensors", text_encoder=tokenizer, dtype="float16")


# -- runs --


def test_features_of_another_extractor_at_test(tmp_path, config, data):
    """Features from other settings of the extractor are given to a model that is trained already.

    thuiar/MMSA-FET #11
    """
    trainer.train(changed(config, epochs=1), tmp_path / "run")

    def wider(samples):
        for rows in samples.values():
            for s in rows:
                s.audio = np.concatenate([s.audio, s.audio], 1)

    other = declarelab(tmp_path / "other", edit=wider)
    for use in (
        lambda: trainer.evaluate(tmp_path / "run", other),
        lambda: trainer.predict(tmp_path / "run", other, tmp_path / "p.csv"),
    ):
        with pytest.raises(ConfigError, match=r"audio: found 10 features per frame; expected 5, as the run was"):
            use()
    assert not (tmp_path / "p.csv").exists()


def test_batch_size_of_evaluation(tmp_path, config, data):
    """Accuracy at test changes with the batch size of the evaluation.

    gogyzzz/localatt_emorecog #2
    """
    trainer.train(changed(config, epochs=2), tmp_path / "run")
    alone, some, together = (trainer.evaluate(tmp_path / "run", data, batch_size=b) for b in (1, 4, 64))
    assert alone == pytest.approx(together, abs=1e-5) and some == pytest.approx(together, abs=1e-5)
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert {k: saved[k] for k in together} == pytest.approx(together, abs=1e-5)


def test_contrastive_batch_of_one(tmp_path, config):
    """With one sample in a batch, a contrastive loss is constantly 0.

    jiawei-ren/BalancedMSE #19
    """
    row = torch.randn(1, 8)
    assert infonce(row, row).item() == 0  # -log softmax of the only score
    for bound in ("infonce", "nwj", "smile", "js"):
        with pytest.raises(EstimatorError, match="found a batch of 1; expected at least 2 samples"):
            engine.MIEstimator(8, 8, bound=bound)(row, row)
    path = str(declarelab(tmp_path / "data", {"train": 19, "valid": 7, "test": 7}))
    with pytest.warns(DataWarning, match=r"19 training samples in batches of 6: a last batch of one .*left out"):
        trainer.train(changed(config, epochs=2, data={"path": path}), tmp_path / "run")
    terms = history(tmp_path / "run")[1]["valid"]["information"]  # validation ends with a batch of one, too
    assert terms and all(math.isfinite(v) for v in terms.values())


def test_schedule_after_resuming(tmp_path, config, data):
    """The learning rate's schedule starts from scratch when training is continued.

    huggingface/sentence-transformers #303
    """
    schedule = {"schedule": {"kind": "multi_step", "milestones": [1, 3], "rate": 0.1}}
    trainer.train(changed(config, epochs=5, train=schedule), tmp_path / "whole")
    trainer.train(changed(config, epochs=2, train=schedule), tmp_path / "cut")
    trainer.train(changed(config, epochs=5, train=schedule), tmp_path / "cut", resume=True)
    whole, cut = history(tmp_path / "whole"), history(tmp_path / "cut")
    assert [h["lr_main"] for h in cut] == pytest.approx([1e-2, 1e-3, 1e-3, 1e-4, 1e-4])
    assert [(h["lr_main"], h["lr_estimators"], h["train"]) for h in cut] == [
        (h["lr_main"], h["lr_estimators"], h["train"]) for h in whole
    ]


def test_validation_that_becomes_nan(tmp_path, config, data, monkeypatch):
    """Early stopping takes a validation loss of NaN for an improvement, and saves the broken model as the best.

    Bjarten/early-stopping-pytorch #16
    """
    trainer.train(changed(config, epochs=1), tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    evaluate = TwoStageStep.evaluate

    def diverged(self, *arguments, **named):
        result = evaluate(self, *arguments, **named)
        result.prediction.fill_(float("nan"))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(TwoStageStep, "evaluate", diverged)
        with pytest.raises(DataError, match=r"not finite; .*Training has diverged: lower train\.lr"):
            trainer.train(changed(config, epochs=3), tmp_path / "run", resume=True)
    for name in ("best.safetensors", "last.safetensors", "history.jsonl", "predictions_test.csv"):
        assert (tmp_path / "run" / name).read_bytes() == before[name], name
    trainer.train(changed(config, epochs=3), tmp_path / "run", resume=True)
    assert [h["epoch"] for h in history(tmp_path / "run")] == [0, 1, 2]


def test_nan_in_the_log(tmp_path, config):
    """A metric that is NaN makes the log invalid JSON, and nothing shows it any more.

    G-Research/fasttrackml #435
    """

    def strict(text):
        return json.load(io.StringIO(text), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    path = str(declarelab(tmp_path / "data", {"train": 20, "valid": 7, "test": 1}))  # no correlation of one sample
    first = changed(config, epochs=1, data={"path": path})
    trainer.train(first, tmp_path / "run")
    trainer.train(changed(first, epochs=2, output={"report": True}), tmp_path / "run", resume=True)
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [strict(line)["test"]["corr"] for line in lines] == [None, None]
    assert strict((tmp_path / "run" / "metrics.json").read_text())["test"]["corr"] is None
    assert (tmp_path / "run" / "report.html").exists()
    back = parse_line(lines[0])["test"]  # what a resumed run compares with
    assert math.isnan(back["corr"]) and math.isfinite(back["mae"])


# -- estimates and losses --


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_embedding_on_the_sphere(dtype):
    """Scaling embeddings to length 1 gives NaN in half precision where a row is zero.

    lightly-ai/lightly #1259
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(5, 8, generator=generator).to(dtype) for _ in range(2))
    q[1], k[3] = 0, 0  # two missing modalities
    q.requires_grad_()
    k.requires_grad_()
    loss = infonce(q, k, cosine=True, temperature=0.1, symmetric=True)
    loss.backward()
    exact_q, exact_k = (x.detach().double() for x in (q, k))
    scores = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            if i != 1 and j != 3:
                scores[i, j] = exact_q[i] @ exact_k[j] / exact_q[i].norm() / exact_k[j].norm() / 0.1
    expected = -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert not q.grad[1].any() and not k.grad[3].any()
    for gradient in (q.grad, k.grad):
        assert gradient.isfinite().all() and gradient.abs().max() < 10
        assert gradient[[0, 2, 4]].any(1).all()


def test_information_in_other_units():
    """An estimate of I(aX;Y) falls as the factor a grows, though the information is the same.

    gregversteeg/NPEET #19
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 2, generator=generator, dtype=torch.float64)
    y = x[:, :1] + torch.randn(1200, 1, generator=generator, dtype=torch.float64)
    z = torch.randn(1200, 1, generator=generator, dtype=torch.float64)
    settings = {"steps": 150, "batch_size": 60}
    for estimate in (
        lambda a: engine.estimate_mi(a * x, y, hidden=32, **settings)["value"],
        lambda a: engine.estimate_cmi(a * x, y, z, **settings)["dv"],
    ):
        one = estimate(1.0)
        assert 0.15 < one < 0.5  # log(2) / 2 = 0.35
        for a in (2.0**-40, 2.0**40, torch.tensor([2.0**-20, 2.0**20], dtype=torch.float64)):
            assert estimate(a) == pytest.approx(one, abs=1e-4)


def test_information_of_a_constant():
    """The estimated information of a constant feature is positive, and grows with the number of samples.

    scikit-learn/scikit-learn #30772
    """
    generator = torch.Generator().manual_seed(0)
    for count in (600, 2400):
        y, z = (torch.randn(count, 1, generator=generator) for _ in range(2))
        constant = torch.full((count, 1), 518.123)
        assert engine.estimate_mi(constant, y, steps=60, batch_size=60)["value"] == pytest.approx(0, abs=1e-3)
        assert engine.estimate_cmi(constant, y, z, steps=60, batch_size=60)["dv"] == pytest.approx(0, abs=0.02)
