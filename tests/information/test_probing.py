"""Probes of what is left: against scikit-learn, on independent and on dependent features, and their errors."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

import engine
from engine.errors import DataError
from engine.information import probing
from engine.information.probing import RIDGE, probe


def rows(n: int = 600, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + 3
    y = torch.stack([(x[:, 0] - 3).square(), x[:, 1] + torch.randn(n, generator=generator)], 1)
    return x, y


def test_regression_agrees_with_scikit_learn():
    (x, y), (seen, known) = rows(200, 1), rows(600, 0)
    found = probe(x, y, known=(seen, known), neighbours=7)
    scaler = StandardScaler().fit(seen.double().numpy())
    a, b = scaler.transform(seen.double().numpy()), scaler.transform(x.double().numpy())
    of_target = StandardScaler().fit(known.double().numpy())
    y, known = of_target.transform(y.double().numpy()), of_target.transform(known.double().numpy())
    knn, linear = (
        r2_score(y, model.fit(a, known).predict(b), multioutput="variance_weighted")
        for model in (KNeighborsRegressor(7), Ridge(RIDGE * len(a)))
    )
    assert (found.kind, found.rows, found.chance) == ("r2", 200, 0.0)
    assert (found.knn, found.linear) == pytest.approx((knn, linear), abs=1e-9)
    assert found.left == max(found.knn, found.linear) and found.to_dict()["left"] == found.left


def test_classes_agree_with_scikit_learn():
    (x, y), (seen, known) = rows(200, 1), rows(600, 0)
    labels, of_known = ((t[:, 0] > 0.5).long() + (t[:, 0] > 2).long() for t in (y, known))
    found = probe(x, labels, known=(seen, of_known), discrete=True, neighbours=7)
    scaler = StandardScaler().fit(seen.double().numpy())
    a, b = scaler.transform(seen.double().numpy()), scaler.transform(x.double().numpy())
    assert found.knn == pytest.approx(KNeighborsClassifier(7).fit(a, of_known).score(b, labels), abs=0.011)  # ties
    commonest = np.bincount(of_known).argmax()
    assert found.chance == pytest.approx((labels == commonest).double().mean().item())
    one_hot = torch.nn.functional.one_hot(labels, 3)
    assert (
        probe(x, one_hot, known=(seen, torch.nn.functional.one_hot(of_known, 3)), discrete=True, neighbours=7) == found
    )


@pytest.mark.parametrize("cuts, better", [([0.7, 0.9], 0), ([0.8], 1)])
def test_the_balanced_score_is_the_mean_recall_of_the_better_predictor(cuts, better):
    """Shares of classes are taken out: neighbours by their quotient, a regression in standard deviations."""
    (x, y), (seen, known) = rows(400, 1), rows(600, 0)
    target, of_seen = y[:, 0], known[:, 0]
    if better == 1:  # a noisy sum of all columns
        unit = torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0])
        target, of_seen = ((a / unit).sum(1) + 3 * (b[:, 1] - a[:, 1]) for a, b in ((x, y), (seen, known)))
    edges, count = of_seen.quantile(torch.tensor(cuts)), len(cuts) + 1
    labels, of_known = (torch.bucketize(t.contiguous(), edges).numpy() for t in (target, of_seen))
    found = probe(x, torch.tensor(labels), known=(seen, torch.tensor(of_known)), discrete=True, neighbours=7)
    scaler = StandardScaler().fit(seen.double().numpy())
    a, b = scaler.transform(seen.double().numpy()), scaler.transform(x.double().numpy())
    share = np.bincount(of_known) / 600
    ridge = Ridge(RIDGE * 600).fit(a, np.eye(count)[of_known]).predict(b)
    near = KNeighborsClassifier(7).fit(a, of_known).predict_proba(b)
    recalls = [
        np.mean([(score.argmax(1) == c)[labels == c].mean() for c in range(count)])
        for score in (near / share, (ridge - share) / np.sqrt(share * (1 - share)))
    ]
    assert found.balanced == pytest.approx(max(recalls) - 1 / count, abs=1e-3) and np.argmax(recalls) == better
    assert found.linear == pytest.approx((ridge.argmax(1) == labels).mean())
    kept = labels < 2  # of three classes one is left to the known rows
    fewer = probe(x[kept], torch.tensor(labels[kept]), known=(seen, torch.tensor(of_known)), discrete=True)
    assert 0.1 < fewer.balanced <= 0.5


def test_cross_fit_sees_what_is_there_and_nothing_else():
    x, y = rows(1000)
    assert probe(x, y).rows == 1000
    assert probe(x, y).knn > 0.6 and probe(x, y).linear < 0.6  # the square is not linear
    independent = probe(x, y[torch.randperm(1000, generator=torch.Generator().manual_seed(1))])
    assert -0.2 < independent.knn < 0 and -0.05 < independent.linear < 0.05
    assert probe(x, y) == probe(x.numpy(), y.numpy()) == engine.probe(x.double(), y.double())
    assert probe(x, y) == probe(x, y, neighbours=10, seed=0) != probe(x, y, seed=1)
    assert -0.2 < independent.left < 0.05 and probe(x, y).left == probe(x, y).knn


def test_many_rows_are_thinned_out_evenly(monkeypatch):
    (x, y), (seen, known) = rows(201, 1), rows(601, 0)
    order = y[:, 1].argsort()  # the first rows alone would be others
    x, y = x[order], y[order]
    expected = probe(x[::2], y[::2], known=(seen[::6], known[::6]))
    monkeypatch.setattr(probing, "MOST_ROWS", 101)
    found = probe(x, y, known=(seen, known))
    assert found == expected and found.rows == 101


def test_a_column_that_hardly_varies_in_the_unseen_rows_does_not_decide():
    (x, y), (seen, known) = rows(200, 1), rows(600, 0)
    y[:, 1] = y[:, 1] * 1e-3
    assert probe(x, y, known=(seen, known)).knn > -2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y: (x, y[:50]), "as many"),
        (lambda x, y: (x[:10], y[:10]), "20 rows or more"),
        (lambda x, y: (x * float("nan"), y), "not finite"),
        (lambda x, y: (x, y * 0), "a constant"),
        (lambda x, y: (x[None], y), "real numbers"),
    ],
)
def test_errors(change, text):
    with pytest.raises(DataError, match=text) as caught:
        probe(*change(*rows(100)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("known", "text"),
    [
        (lambda x, y: (x[:6], y[:6]), r"features \[6, 5\] and target \[6, 2\]; expected 7 rows or more"),
        (lambda x, y: (x[:, :4], y), r"\[100, 4\] and \[100, 2\]; expected 5 and 2 columns"),
        (lambda x, y: (x, y[:, :1]), r"\[100, 5\] and \[100, 1\]; expected 5 and 2 columns"),
    ],
)
def test_known_rows_that_do_not_fit(known, text):
    with pytest.raises(DataError, match=text):
        probe(*rows(100), known=known(*rows(100)), neighbours=7)


def test_a_single_class_is_an_error():
    x, _ = rows(100)
    with pytest.raises(DataError, match="a single class"):
        probe(x, torch.ones(100), discrete=True)


def test_names_of_classes_are_refused_in_one_line():
    with pytest.raises(DataError, match="probe, target: found a list"):
        probe(torch.randn(40, 2), ["a", "b"] * 20, discrete=True)


def test_a_rare_class_that_is_recognised_shows_in_the_balanced_score():
    """Six of 400 rows lie apart, so they are recognised: the balanced score is 1 - 1/2. Accuracy cannot show it."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 3, generator=generator)
    rare = torch.zeros(400)
    rare[:6] = 1
    apart = z + 8 * rare[:, None]
    found = probe(apart, rare, discrete=True)
    assert found.left < 0.02 and found.balanced == pytest.approx(0.5, abs=0.02)
    assert probe(1e-6 * apart, rare, discrete=True).balanced == found.balanced
    unknown = [probe(z, rare.roll(40 * n), discrete=True, seed=n).balanced for n in range(10)]
    assert abs(sum(unknown) / 10) < 0.15
    assert probe(z, z[:, :1]).balanced is None


def test_tables_of_pandas_and_numbers_that_are_no_classes():
    pandas = pytest.importorskip("pandas", reason="needs pandas, which the engine only reads")
    z = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    s = (z[:, 0] > 0).long()
    assert probe(pandas.DataFrame(z.numpy()), pandas.Series(s.numpy()), discrete=True) == probe(z, s, discrete=True)
    with pytest.raises(DataError, match="100 classes in 100 rows"):
        probe(z, z[:, 0], discrete=True)
    with pytest.raises(DataError, match="51 classes in 100 rows"):
        probe(z, torch.arange(100) % 51, discrete=True)
    assert probe(z, torch.arange(100) % 50, discrete=True).kind == "accuracy"
