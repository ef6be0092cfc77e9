"""What is found before the first epoch: the scale of the labels, classes, texts the encoder cannot take, disk space."""

import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine import checks, trainer
from engine.config import Config
from engine.errors import ConfigError, DataError, OutputError
from engine.loaders import DataWarning
from engine.loaders.ragged import Ragged
from engine.mimrl.task import MIMRL_TASK
from engine.step import TwoStageStep
from tests.loaders import writers
from tests.small_runs import SIZES, changed, history
from tests.warned import user_warnings


def labelled(**splits):
    """A data set of which only ids and labels matter."""
    return SimpleNamespace(
        splits={
            name: SimpleNamespace(label=torch.tensor(label)[:, None], ids=[f"{name}{i}" for i in range(len(label))])
            for name, label in splits.items()
        }
    )


def scale(labels, **settings):
    """The scale found, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checks.label_scale(Config(data=settings), labelled(train=labels[:2], test=labels[2:]))
    assert all(w.category is DataWarning for w in caught if issubclass(w.category, UserWarning))
    return found, user_warnings(caught)


class TestLabelScale:
    @pytest.mark.parametrize(
        ("dataset", "labels", "expected"),
        [
            ("mosi", [-3.0, 3.0, 0.2], "mosi"),
            ("mosei", [-1.2, 0.5, 0.2], "mosi"),
            ("sims", [-1.0, 0.2, 1.0], "sims"),
            ("avec2019", [0.0, 0.96, 0.2], "phq8"),
        ],
    )
    def test_labels_of_the_data_set_that_is_named(self, dataset, labels, expected):
        assert scale(labels, dataset=dataset) == (expected, [])

    @pytest.mark.parametrize(
        ("dataset", "labels", "said"),
        [
            ("mosi", [-1.0, 1.0, 0.2], "labels from -1 to 1 do not look like those of data.dataset=mosi"),
            ("mosi", [0.0, 3.0, 0.2], "labels from 0 to 3 do not look like those of data.dataset=mosi"),
            ("mosei", [-3.0, 5.0, 0.2], "labels from -3 to 5 do not"),
            ("sims", [-3.0, 3.0, 0.2], "on a scale of [-1, 1]"),
            ("avec2019", [3.0, 24.0, 0.0], "labels from 0 to 24 do not"),
            ("custom", [-3.0, 3.0, 0.2], "data.dataset=custom does not say what scale its labels have"),
        ],
    )
    def test_others_have_regression_metrics_only_and_it_is_said_once(self, dataset, labels, said):
        found, lines = scale(labels, dataset=dataset)
        assert found == "none" and len(lines) == 1
        assert said in lines[0] and "only MAE, Corr, CCC and RMSE are reported. " in lines[0]
        do = "Cut the labels to [-3, 3]" if labels == [-3.0, 5.0, 0.2] else "Set data.label_scale=mosi"
        assert ("Divide the scores by 25" if dataset == "avec2019" else do) in lines[0]

    def test_a_declared_scale_is_taken_where_the_labels_lie_on_it(self):
        assert scale([-1.0, 1.0, 0.2], dataset="mosi", label_scale="mosi") == ("mosi", [])
        assert scale([-1.0, 1.0, 0.2], dataset="mosi", label_scale="sims") == ("sims", [])
        assert scale([1.0, 7.0, 0.2], dataset="mosi", label_scale="none") == ("none", [])
        with pytest.raises(ConfigError, match=r"data.label_scale=sims: found labels from -3 to 3; .*\[-1, 1\]"):
            scale([-3.0, 3.0, 0.2], label_scale="sims")
        with pytest.raises(ConfigError, match=r"data\.label_scale: found sims with data\.dataset=avec2019"):
            Config(data={"dataset": "avec2019", "label_scale": "sims"})

    def test_labels_that_are_not_there_tell_nothing(self):
        assert scale([-2.0, 2.0, float("nan")], dataset="mosi") == ("mosi", [])


def test_labels_that_leave_the_scale_of_a_run_have_regression_metrics_only():
    run = Config(data={"dataset": "mosi", "label_scale": "mosi"})
    splits = labelled(mosi=[-0.2, 3.0], other=[1.0, 7.0], none=[float("nan")]).splits
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert checks.evaluated_scale(run, splits["mosi"]) == checks.evaluated_scale(run, splits["none"]) == "mosi"
    with pytest.warns(
        DataWarning, match=r"labels from 1 to 7 leave the scale .*\[-3, 3\]: only MAE, Corr, CCC and RMSE"
    ):
        assert checks.evaluated_scale(run, splits["other"]) == "none"


def test_labels_that_hardly_have_the_scale_of_a_run_are_told():
    run = Config(data={"dataset": "mosi", "label_scale": "mosi"})
    splits = labelled(classes=[0.0, 1.0] * 10, mosi=[-2.0, 1.0] * 10, few=[1.0] * 19).splits
    with pytest.warns(DataWarning, match=r"labels from 0 to 1: the accuracies are right only .* \[-3, 3\]"):
        assert checks.evaluated_scale(run, splits["classes"]) == "mosi"
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert checks.evaluated_scale(run, splits["mosi"]) == checks.evaluated_scale(run, splits["few"]) == "mosi"


def test_class_numbers_of_every_split():
    settings = Config(model={"task": "classification", "num_class": 3}, train={"loss": "CE"})
    checks.class_numbers(settings, labelled(train=[0.0, 2.0], valid=[1.0]))
    wrong = labelled(train=[0.0, 2.0], valid=[1.0, 3.0, 4.0])
    with pytest.raises(DataError, match=r"^valid, label, row 1 \(id valid1\): found class 3 \(2 of 3 labels .* 0 to 2"):
        checks.class_numbers(settings, wrong)
    with pytest.raises(DataError, match=r"found class 3 .* Subtract 1 from all labels: classes are counted from 0\.$"):
        checks.class_numbers(settings, labelled(train=[1.0, 3.0, float("nan")]))
    with pytest.raises(DataError, match=r"\(id train1\): found label -0\.5 \(2 of 4 labels are no class numbers\)"):
        checks.class_numbers(settings, labelled(train=[5.0, -0.5, 0.25, float("nan")]))
    checks.class_numbers(settings, wrong, ["train"])
    checks.class_numbers(Config(), wrong)


def encoder(vocabulary=40, positions=20):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=vocabulary, max_position_embeddings=positions, **sizes))
    return checks.TextEncoder(model)


def texts(*lengths, token=5, pad=0, draws=False):
    tokens = Ragged(np.full(sum(lengths), token, np.int32), np.cumsum([0, *lengths]))
    split = SimpleNamespace(tokens=tokens, ids=[f"t{i}" for i in range(len(lengths))], draws_words=draws)
    return SimpleNamespace(splits={"test": split}, pad_id=pad)


class TestText:
    def test_positions(self):
        settings = Config(data={"time_len": 30})
        checks.text_fits(settings, texts(20, 3), encoder())
        checks.text_fits(Config(data={"time_len": 20}), texts(50), encoder())  # cut to 20
        found = (
            r"data\.time_len=30, test split: found a text of 21 tokens \(id t1\); expected at most 20, .*time_len=20"
        )
        with pytest.raises(ConfigError, match=found):
            checks.text_fits(settings, texts(2, 21), encoder())
        for padded, draws in ((30, False), (None, True)):
            with pytest.raises(ConfigError, match="found texts of 30 tokens"):
                checks.text_fits(settings, texts(2, draws=draws), encoder(), padded)

    def test_vocabulary(self):
        checks.text_fits(Config(), texts(3, token=39), encoder())
        with pytest.raises(ConfigError, match=r"test split: found token 40 \(id t0\); expected tokens 0 to 39"):
            checks.text_fits(Config(), texts(3, token=40), encoder())
        with pytest.raises(ConfigError, match="found padding token 41; expected tokens 0 to 39"):
            checks.text_fits(Config(), texts(3, pad=41), encoder())


def test_disk_space(tmp_path, monkeypatch):
    model, objective = torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1, 1, bias=False)
    # best 4 MB, last 4 + 8 (Adam) + 4 (average), three of it
    for free, fits in ((52.1e6, True), (51.9e6, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        train = Config(train={"average": 0.9}).train
        if fits:
            checks.disk_space(tmp_path, model, objective, train, [])
        else:
            with pytest.raises(
                OutputError, match="found 52 MB of free space; expected about 52 MB for the run's check"
            ):
                checks.disk_space(tmp_path, model, objective, train, [])
    (tmp_path / "best").write_bytes(bytes(4_000_000))
    checks.disk_space(tmp_path, model, objective, train, [tmp_path / "best"])


# -- in whole runs --


def test_a_run_that_fails_before_its_first_epoch_leaves_the_folder_free(config, tmp_path, monkeypatch):
    work = TwoStageStep.train_epoch
    monkeypatch.setattr(TwoStageStep, "train_epoch", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(config, tmp_path / "run")
    monkeypatch.setattr(TwoStageStep, "train_epoch", work)
    trainer.train(changed(config, epochs=1), tmp_path / "run")
    assert len(history(tmp_path / "run")) == 1


@pytest.mark.parametrize("where", ["train", "valid", "test"])
def test_a_class_too_many_is_found_before_training(config, tmp_path, where):
    samples = writers.samples(sizes=SIZES)
    for rows in samples.values():
        for number, sample in enumerate(rows):
            sample.label = float(number % 3)
    samples[where][1].label = 3.0
    writers.write_declarelab(tmp_path / "classes", samples)
    settings = changed(
        config, data={"path": str(tmp_path / "classes")}, model={"task": "classification", "num_class": 3},
        train={"loss": "CE"},
    )  # fmt: skip
    with pytest.raises(DataError, match=rf"^{where}, label, row 1 .*class 3"):
        trainer.train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_of_an_mmsa_file(config, tmp_path):
    content = writers.mmsa(writers.samples(sizes=SIZES))
    for split in content.values():
        split["classification_labels"] = np.sign(split["regression_labels"]) + 1
    path = writers.dump(content, tmp_path / "x.pkl")
    settings = changed(
        config, epochs=1, data={"path": str(path)}, model={"task": "classification", "num_class": 3},
        train={"loss": "CE"},
    )  # fmt: skip
    trainer.train(settings, tmp_path / "run")
    rows = trainer.metrics.read_predictions(tmp_path / "run" / "predictions_test.csv")
    assert rows.label.tolist() == content["test"]["classification_labels"].tolist()


def test_metrics_of_sims(config, tmp_path):
    samples = writers.samples(sizes=SIZES)
    for rows in samples.values():
        for number, sample in enumerate(rows):
            sample.label = round(-1 + 0.2 * (number % 11), 1)
    writers.write_declarelab(tmp_path / "sims", samples)
    settings = changed(config, epochs=1, data={"path": str(tmp_path / "sims"), "dataset": "sims"})
    result = trainer.train_seeds(settings, tmp_path / "runs", [0])[0]
    assert {"acc2_sims", "acc3_sims", "acc5_sims"} < set(result.metrics["test"])
    assert "acc7" not in result.metrics["test"] and "acc5" not in result.metrics["test"]
    header = (tmp_path / "runs" / "summary.csv").read_text().splitlines()[0].split(",")
    assert {"Mult_acc_2", "Mult_acc_3", "Mult_acc_5", "F1_score"} < set(header) and "Mult_acc_7" not in header
    assert trainer.evaluate(tmp_path / "runs" / "seed0", tmp_path / "sims").keys() == {
        k for k in result.metrics["test"] if k not in ("loss", "task")
    }
    # the presets' data set, whose scale it is not
    settings.data.dataset = "mosi"
    with pytest.warns(DataWarning, match="labels from -1 to 1 do not look like those of data.dataset=mosi"):
        plain = trainer.train(settings, tmp_path / "mosi").metrics["test"]
    assert {"mae", "corr", "ccc", "rmse"} < set(plain) and not any(key.startswith(("acc", "f1")) for key in plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert "acc7" not in trainer.evaluate(tmp_path / "mosi", tmp_path / "sims")
    trainer.train(changed(settings, epochs=2), tmp_path / "mosi", resume=True)
    assert len(history(tmp_path / "mosi")) == 2


def test_a_text_too_long_for_the_encoder_is_found_in_prediction_too(config, tmp_path):
    settings = changed(config, epochs=1, data={"time_len": 600}, model={"cubemlp": {"res_project": [True, True]}})
    trainer.train(settings, tmp_path / "run")
    samples = writers.samples(sizes=SIZES)
    samples["test"][2].text = "film " * 700
    writers.write_declarelab(tmp_path / "long", samples)
    found = rf"test split: found a text of 702 tokens \(id {samples['test'][2].id}\); expected at most 512"
    with pytest.raises(ConfigError, match=found):
        trainer.evaluate(tmp_path / "run", tmp_path / "long")
    with pytest.raises(ConfigError, match=found):
        trainer.train(changed(settings, data={"path": str(tmp_path / "long")}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
def test_evaluation_without_a_modality(config, tmp_path):
    """As if every sample's vision were one frame of zeros, which the file says here."""
    samples = writers.samples(sizes=SIZES)
    trainer.train(
        changed(config, epochs=1, data={"path": str(writers.write_manifest(tmp_path / "all", samples))}),
        tmp_path / "run",
    )
    for rows in samples.values():
        for s in rows:
            s.vision = np.zeros((1, writers.VISION), np.float32)
    zeros = trainer.evaluate(tmp_path / "run", writers.write_manifest(tmp_path / "zeros", samples))
    for rows in samples.values():
        for s in rows:
            s.vision = s.vision[:0]
    none = writers.write_manifest(tmp_path / "none", samples)
    assert trainer.evaluate(tmp_path / "run", none) == zeros
    lines = trainer.predict(tmp_path / "run", none, tmp_path / "p.csv").read_text().splitlines()
    assert len(lines) == 1 + SIZES["test"]


def test_memory_is_estimated_before_it_is_taken(monkeypatch):
    """Weights four times (gradient, Adam's two) and once more averaged; eight tensors of the fusion encoder's input."""
    plain = Config(batch_size=10, data={"time_len": 100}, model={"d_common": 64}, train={"average": None}).resolve()
    model = nn.Linear(999, 1000, device="meta")
    weights, held = 4 * 4 * 10**6, 8 * 4 * 10 * 100 * 3 * 128  # the widest of d_common and CubeMLP's channels is 128
    monkeypatch.setattr(checks, "_memory_of", lambda device: weights + held)
    assert MIMRL_TASK.held_bytes(plain, 10) == held // 8
    checks.memory(plain, [model], held // 8, torch.device("cpu"))
    monkeypatch.setattr(checks, "_memory_of", lambda device: weights + held - 1)
    with pytest.raises(ConfigError, match=r"model: found settings that take about 0 GB .*batch of 10\)"):
        checks.memory(plain, [model], held // 8, torch.device("cpu"))
    monkeypatch.setattr(checks, "_memory_of", lambda device: None)
    checks.memory(plain, [model], held // 8, torch.device("cpu"))
