import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.config import Config
from engine.errors import CheckpointError
from engine.files import write_json
from engine.metrics import (
    avec2019_metrics,
    classification_metrics,
    metrics_for,
    regression_metrics,
    write_predictions,
)
from engine.mimrl.report import TERMS
from engine.report import environment, read_run, render, write_report
from engine.report.charts import number, ticks
from engine.report.features import principal_plane

ESTIMATORS = (
    *("I(F;T)", "I(F;A)", "I(F;V)", "I(T;A)", "I(T;V)"),
    *("I(A;C|T)", "I(T;A|C)", "I(V;C|T)", "I(T;V|C)", "I(T;C|A)", "I(T;C|V)"),
)

# These runs are made by hand.
pytestmark = pytest.mark.filterwarnings("ignore:.*no checksums.json")


def fake_run(folder, kind="sentiment", epochs=8, features=True, truth=True, n=400, seed=0):
    """A run folder as training leaves it, with plausible numbers. kind: as `engine.report.Run.kind`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(preset="demo", epochs=max(epochs, 1))
    config.data.dataset = {"avec2019": "avec2019", "sims": "sims", "regression": "custom"}.get(kind, "mosi")
    if kind == "classification":
        config.model.task, config.model.num_class, config.train.loss = "classification", 3, "CE"
    config.save(folder / "config.yaml")

    best = max(0, epochs - 3)
    metrics, curves = {"best_epoch": best}, {}
    for split, offset in (("train", 0.0), ("valid", 0.1), ("test", 0.15)):
        ids = [f"video{i // 7}_{i % 7}" for i in range(n)]
        scores = None
        if kind == "sentiment":
            label = np.round(rng.uniform(-3, 3, n), 1).astype(np.float32)
            prediction = (0.8 * label + rng.normal(0, 0.7 + offset, n)).astype(np.float32)
            measured = regression_metrics(prediction, label)
        elif kind in ("sims", "regression"):
            low, high = (-1, 1) if kind == "sims" else (1, 7)
            label = np.round(rng.uniform(low, high, n), 1).astype(np.float32)
            prediction = (0.8 * label + rng.normal(0, 0.2 + offset, n)).astype(np.float32)
            measured = metrics_for("sims" if kind == "sims" else "custom", "regression")(prediction, label)
        elif kind == "avec2019":
            label = (rng.integers(0, 25, n) / 25).astype(np.float32)
            prediction = (0.5 * label + 0.2 + rng.normal(0, 0.12, n)).astype(np.float32)
            measured = avec2019_metrics(prediction, label)
        else:
            label = rng.integers(0, 3, n).astype(np.float32)
            scores = rng.normal(0, 1, (n, 3)) + 1.5 * np.eye(3)[label.astype(int)]
            prediction = scores.argmax(1)
            measured = classification_metrics(scores, label)
        curves[split] = measured
        if split != "train":
            metrics[split] = measured
            write_predictions(folder / f"predictions_{split}.csv", ids, label, prediction, scores)
        if features and split == "test":
            mix = rng.normal(size=(2, 64))
            tensors = {
                name: (np.stack([label * (3 - k), rng.normal(size=n)], 1) @ mix + rng.normal(0, 1, (n, 64))).astype(
                    np.float32
                )
                for k, name in enumerate("FTAV")
            }
            tensors["label"] = label[:, None]
            save_file(tensors, folder / f"features_{split}.safetensors", metadata={"ids": json.dumps(ids)})
    metrics["oracle_test"] = {**metrics["test"], "epoch": epochs - 1}
    metrics |= {"samples_per_second": 83.2, "peak_memory_mb": 2310.0, "wall_s": 192.4, "environment": environment()}
    write_json(folder / "metrics.json", metrics)

    rows = []
    for epoch in range(epochs):
        ease = np.exp(-epoch / 2.5)
        row = {"epoch": epoch, "seconds": 21 + rng.normal(), "lr_main": 1e-3, "lr_estimators": 1e-3}
        for k, split in enumerate(("train", "valid", "test")):
            part = {"loss": 0.5 + ease + 0.08 * k + rng.normal(0, 0.02), "task": 0.55 + ease + 0.08 * k}
            part |= {
                key: value * (1 + 0.6 * ease * (1 if key in ("mae",) else -1)) for key, value in curves[split].items()
            }
            if epoch:
                level = {name: (1.8 - 0.3 * i) * (1 - ease) for i, name in enumerate(TERMS)}
                part["information"] = {name: v + rng.normal(0, 0.03) for name, v in level.items()}
                if split == "train":
                    part["estimators"] = {name: rng.normal(1, 0.1) * (1 - ease) for name in ESTIMATORS}
            row[split] = part
        rows.append(json.dumps(row))
    (folder / "history.jsonl").write_text("\n".join(rows) + "\n")

    if truth:
        true = {"I(T;A)": 0.81, "I(T;V)": 0.52, "I(A;V)": 0.24, "I(T;A,V)": 4.9, "I(A;V|T)": 0.0}
        latents = [
            {
                "name": name,
                "true": value,
                "estimates": {
                    "infonce": min(value, 4.0) * 0.95,
                    "smile": value * 1.04 + 0.02,
                    "nwj": value * 0.9,
                    "dv": None if value > 4 else value * 0.99,
                },
                "ceiling": 4.159,
            }
            for name, value in true.items()
        ]
        write_json(folder / "truth.json", {"latents": latents})
    return folder


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that the tags nest."""

    VOID = ("meta", "br", "rect", "path", "circle", "link", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.scripts, self.texts, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def charts(self):
        return [json.loads(value) for _, name, value in self.attributes if name == "data-chart"]


def report(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\[\[(title|groups|body)\]\]", text)
    return Page(text)


def test_a_whole_run(tmp_path):
    folder = fake_run(tmp_path / "my run")
    page = report(folder)
    assert page.ids == ["results", "curves", "information", "truth", "predictions", "features", "run", "tip"]
    text = page.text
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"Test MAE {metrics['test']['mae']:.3f} at epoch 5, the epoch of the lowest valid MAE." in text
    for key in ("acc2_non0", "acc2_has0", "f1_non0", "f1_has0", "acc7", "acc5"):
        assert f"{100 * metrics['test'][key]:.2f} %" in text
    assert "labels of 0 dropped (non0)" in text and "all samples (has0)" in text
    assert "epoch 7, best on test: not for reporting" in text
    assert "the valid labels’ mean, on test" in text
    for name in TERMS:
        assert name in text
    for name in ESTIMATORS:
        assert name in text
    assert "The 11 estimators" in text and "log(batch size) = 3.47 nats" in text
    assert "4.159" in text and "infonce" in text  # the truth table with its ceiling
    assert "text_encoder: minilm" in text and "torch" in text and "3 min 12 s" in text and "2.26 GiB" in text
    assert "Not in this run folder" not in text
    lines = [chart for chart in page.charts() if chart["kind"] == "lines"]
    assert len(lines) == 8 + 8 + 11
    assert [s["name"] for s in lines[0]["series"]] == ["train", "valid", "test"]
    information = lines[8]  # epoch 0 has no terms
    assert [v is None for v in information["series"][0]["y"]] == [True] + [False] * 7
    points = [chart for chart in page.charts() if chart["kind"] == "points"]
    assert len(points) == 1 + 1 + 4  # truth, predictions, features
    assert points[1]["text"][0].startswith("video0_0\ntrue ")


def test_terms_on_all_rows(tmp_path):
    """Batches and all rows side by side, with the ceiling, and a mark on what is no evidence."""
    folder = fake_run(tmp_path / "run")
    rows = [json.loads(row) for row in (folder / "history.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row["train"]["information"]["I(F;T)"] = 3.2
        row["train"]["estimators"] |= {"I(A;C|T)": 0.123, "I(T;A|C)": 0.523}
        for split, ceiling in (("train", 7.157), ("valid", 5.434)):
            bank = {
                "I(F;T)": 6.543,
                "I(F;A)": 1.234,
                "I(A;C|T)": 0.112,
                "I(T;A|C)": -0.021,
                "I(T;C|A)": 0.4,
                "inv": 2.0,
            }
            if split == "valid":
                bank |= {"I(F;T)": 3.987, "I(F;A)": -0.345, "I(T;C|A)": -2.5}
            row[split]["bank"] = bank
            row[split]["bank_ceiling"] = {"I(F;T)": ceiling, "I(F;A)": ceiling, "inv": 2 * ceiling}
    (folder / "history.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    page = report(folder)
    text = page.text
    assert "The terms on all rows together, epoch 5" in text
    assert "I(F;T) 3.200 6.543 at its ceiling 7.157" in text and "3.987 5.434" in text
    assert "0.112 noise –" in text and "−0.021 noise –" in text  # shown as they are
    assert "−0.345 below 0 5.434" in text and "−2.500 below 0 –" in text
    assert "train 0.123 at last, noise" in text and "train 0.523 at last," not in text
    assert "cannot be told from 0" in text and "read .08 to .19 nats" in text and "never negative" in text
    chart = next(
        c for c in page.charts() if [s["name"] for s in c.get("series", [])][3:] == ["train rows", "valid rows"]
    )
    assert chart["series"][3]["text"][-1] == "6.5430" and chart["series"][3]["y"][0] is None
    drawn = (folder / "report.html").read_text()
    assert "ceiling, batch of 32" in drawn and "ceiling, all training rows" in drawn

    for row in rows[1:]:
        row["train"]["bank"] = {"I(F;T)": 1.0}
        row["valid"]["bank"] = {"I(F;T)": 1.0}
        row["train"]["information"]["I(F;T)"] = 1.0
        row["train"]["estimators"] = {"I(A;C|T)": 0.5}
    (folder / "history.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    report(folder)
    drawn = (folder / "report.html").read_text()
    assert "noise" not in drawn and "ceiling, all training rows" not in drawn  # too far up to be of use


def test_it_is_self_contained_light_and_the_same_each_time(tmp_path):
    folder = fake_run(tmp_path / "run", epochs=70, n=5000)
    path = write_report(folder)
    first = path.read_bytes()
    assert len(first) < 2e6
    write_report(folder)
    assert path.read_bytes() == first
    elsewhere = write_report(folder, tmp_path / "elsewhere" / "page.html")
    assert elsewhere == tmp_path / "elsewhere" / "page.html" and elsewhere.read_bytes() == first
    page = Page(first.decode())
    outside = re.compile(r"(https?:)?//\w|url\(|@import", re.IGNORECASE)
    assert not outside.search(first.decode().replace("http-equiv", ""))
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "data", "action", "poster", "xlink:href") and tag not in ("link", "iframe")
        assert name != "href" or value.startswith("#")
        assert not name.startswith("on")
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes
    assert "1500 of them drawn" in page.text


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>'\"&[[body]]</svg>"
    folder = fake_run(tmp_path / "<b>run", n=5)
    label = np.array([1, 0, -1, 2, 3], np.float32)
    write_predictions(folder / "predictions_test.csv", [evil, "b", "c", "d", "e"], label, -label)
    features = {name: np.eye(5, dtype=np.float32) for name in "FTAV"}
    features[evil] = np.eye(5, dtype=np.float32)
    save_file(
        {**features, "label": label[:, None]},
        folder / "features_test.safetensors",
        metadata={"ids": json.dumps([evil, *"bcde"])},
    )
    write_json(
        folder / "truth.json", {"latents": [{"name": evil, "true": 1.0, "estimates": {evil: 0.9}, "ceiling": None}]}
    )
    with open(folder / "history.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 8, "train": {"information": {evil: 1.0}, "estimators": {evil: 1.0}}}) + "\n")
    metrics = json.loads((folder / "metrics.json").read_text())
    write_json(folder / "metrics.json", {**metrics, "environment": {evil: evil}})
    with open(folder / "config.yaml", "a") as file:
        file.write(f"# {evil}\n")
    text = write_report(folder).read_text()
    assert text.count("<script>") == 1 and "alert(1)</script>" not in text
    page = Page(text)
    assert page.text.count("alert(1)") >= 6
    assert evil in page.charts()[-1]["text"][0]
    assert "<b>run" in page.text
    assert "Content-Security-Policy" in text


def test_a_scale_has_its_own_metrics_and_no_other(tmp_path):
    page = report(fake_run(tmp_path / "sims", "sims")).text
    test = json.loads((tmp_path / "sims" / "metrics.json").read_text())["test"]
    assert f"{100 * test['acc5_sims']:.2f} %" in page and "Confusion by class" in page and "to −0.7" in page
    assert "Acc-7" not in page and "non-negative" not in page
    page = report(fake_run(tmp_path / "custom", "regression")).text
    assert "Acc-" not in page and "Confusion" not in page and "RMSE" in page and "The largest errors" in page
    assert "1.00 to 2.20" in page  # the legend divides the labels' own range


def test_avec2019(tmp_path):
    page = report(fake_run(tmp_path / "run", "avec2019"))
    assert "the epoch of the highest valid CCC" in page.text and "PHQ-8 of 10 and more" in page.text
    assert "Acc-7" not in page.text


def test_classification(tmp_path):
    page = report(fake_run(tmp_path / "run", "classification"))
    assert "the epoch of the highest valid Accuracy" in page.text and "class 2" in page.text
    assert "the valid labels’ mean" not in page.text and "Predicted against true" not in page.text
    assert "Confusion by class" in page.text


def test_one_epoch_without_information(tmp_path):
    page = report(fake_run(tmp_path / "run", epochs=1, features=False, truth=False))
    assert "No information terms are recorded" in page.text
    assert page.ids == ["results", "curves", "information", "predictions", "run", "tip"]


def test_faithful_estimates_come_with_a_warning(tmp_path):
    folder = fake_run(tmp_path / "run")
    assert "it reads 1, not 0" not in report(folder).text
    Config(mode="faithful").save(folder / "config.yaml")
    assert "it reads 1, not 0" in report(folder).text


@pytest.mark.parametrize(
    "absent",
    ["config.yaml", "metrics.json", "history.jsonl", "predictions_valid.csv", "predictions_test.csv"],
)
def test_missing_and_damaged_pieces_are_named(tmp_path, absent):
    folder = fake_run(tmp_path / "run", epochs=3)
    path = folder / absent
    path.unlink()
    assert f"{absent} is missing" in report(folder).text
    path.write_bytes(b"\xff\xfe{: [")
    text = report(folder).text
    assert f"{absent} cannot be read" in text or f"{absent} line 1 cannot be read" in text
    path.write_text("3\n")
    assert absent in report(folder).text.partition("Not in this run folder")[2]


def test_damaged_optional_pieces(tmp_path):
    folder = fake_run(tmp_path / "run", epochs=3)
    (folder / "truth.json").write_text("[]")
    (folder / "features_test.safetensors").write_bytes(b"short")
    text = report(folder).text
    assert "truth.json cannot be read" in text and "features_test.safetensors cannot be read" in text


def test_a_run_that_was_cut_off_and_resumed(tmp_path):
    folder = fake_run(tmp_path / "run", epochs=4)
    (folder / "metrics.json").unlink()
    rows = (folder / "history.jsonl").read_text().splitlines()
    (folder / "history.jsonl").write_text("\n".join([*rows, rows[2], rows[3][:50]]) + "\n")
    page = report(folder)
    assert "history.jsonl line 6 cannot be read" in page.text and "4 epochs" in page.text
    assert "training has not finished" in page.text
    assert page.charts()[0]["head"] == [f"epoch {i}" for i in range(4)]


def test_values_that_are_not_numbers(tmp_path):
    folder = fake_run(tmp_path / "run", epochs=3)
    rows = [json.loads(row) for row in (folder / "history.jsonl").read_text().splitlines()]
    for row in rows:
        row["valid"]["mae"] = None
        row["valid"]["corr"] = float("nan")
        row["train"].setdefault("information", {})["inv"] = float("inf")
    (folder / "history.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["test"] |= {"corr": None, "mae": None}
    write_json(folder / "metrics.json", metrics)
    ids, values = ["a", "b"], np.array([np.nan, 1.0])
    write_predictions(folder / "predictions_test.csv", ids, values, values)
    features = {name: np.full((2, 1), np.nan, np.float32) for name in "FTAV"}
    save_file(features, folder / "features_test.safetensors")
    page = report(folder)
    assert "fewer than three finite rows" in page.text
    for chart in page.charts():
        json.dumps(chart, allow_nan=False)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1.5, 1.5, 1.5]])
def test_constant_predictions_and_features(tmp_path, values):
    folder = fake_run(tmp_path / "run", epochs=2)
    write_predictions(folder / "predictions_test.csv", list("abc"), values, values)
    save_file({"F": np.ones((3, 4), np.float32)}, folder / "features_test.safetensors")
    page = report(folder)
    assert "nan" not in page.text.lower()


def test_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"neither metrics\.json") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_principal_plane():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3)) * [5.0, 2.0, 0.1] + 7
    plane, share = principal_plane(x)
    assert plane.shape == (50, 2)
    np.testing.assert_allclose(share, np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1][:2] / np.cov(x.T).trace())
    np.testing.assert_allclose(np.cov(plane.T)[0, 1], 0, atol=1e-12)
    np.testing.assert_allclose(principal_plane(x[:, ::-1])[0], plane)  # neither order nor sign is left to chance
    wide = np.hstack([x, np.zeros((50, 60))])  # more columns than rows
    np.testing.assert_allclose(principal_plane(wide)[0], plane)
    flat, share = principal_plane(np.arange(4.0)[:, None])
    np.testing.assert_allclose(flat, [[-1.5, 0], [-0.5, 0], [0.5, 0], [1.5, 0]])
    np.testing.assert_allclose(share, [1, 0])


def test_numbers_and_ticks():
    assert [number(v) for v in (0.70649, -0.5, 12.34567, 1234.5, 0.0, 1e-5, 2.5e7, None, float("nan"))] == [
        *("0.706", "−0.500", "12.35", "1234", "0.000", "1.00e−05", "2.50e+07", "–", "–"),
    ]
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.5, 7.5, 6, whole=True) == [0, 2, 4, 6]
    assert ticks(0, 2, 6, whole=True) == [0, 1, 2]
    assert ticks(3, 3) == [3]


def test_environment_names_no_place():
    found = environment()
    assert {"python", "torch", "numpy", "system", "processor", "device"} <= set(found)
    assert all(isinstance(value, str) for value in found.values()) and "/" not in "".join(found.values())


def test_epochs_terms_and_names_of_strangers(tmp_path):
    """What cannot be drawn is left out and said; names are text, with their control characters written out."""
    hostile = "<script>alert(1)</script>\x1b[2J\u202e"
    record = {"epoch": 0, "train": {"loss": 1.0, "information": {hostile: 0.5}}}
    lines = [record, {**record, "epoch": 10**30}, {**record, "epoch": 1, "train": {"loss": 10**400}}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text(f"train: {{loss: {json.dumps(hostile)}}}\ndata: {{modalities: [[text]]}}\n")
    (tmp_path / "predictions_test.csv").write_text(f"id,label,prediction\n{hostile},1,2\n'=x,1e30,0\n", "utf-8")
    with pytest.warns(UserWarning, match=r"no checksums\.json"):
        found = read_run(tmp_path)
    page = render(found)
    assert [epoch["epoch"] for epoch in found.history] == [0, 1]
    assert "history.jsonl line 2 cannot be read and is left out." in page
    assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J\\u202e") >= 3
    assert found.predictions["test"].ids[1] == "=x"


def test_class_numbers_beyond_a_table(tmp_path):
    (tmp_path / "metrics.json").write_text('{"test": {"acc": 1, "recall_' + "9" * 5000 + '": 1, "recall_3": 0.5}}')
    (tmp_path / "predictions_test.csv").write_text("id,label,prediction\na,1e30,0\n")
    with pytest.warns(UserWarning, match=r"no checksums\.json"):
        page = render(read_run(tmp_path))
    assert "Class numbers that are not 0 to 99: no table of confusions." in page
    assert "class 3" in page and "999" not in page
