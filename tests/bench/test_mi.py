"""The accuracy benchmark of information estimates: true values, samples, records, the run and its table."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from bench import runner
from bench.mi import conditional_tasks, records, samples, table, tasks, work
from bench.mi.__main__ import DOCS, RECORDS, main
from bench.mi.methods import METHODS, Method, Worker
from bench.mi.peers import own
from bench.mi.tasks import normal_log_density
from engine.errors import EngineError
from engine.information.estimate import ADVICE
from tests.truth import markov

OWN, CONDITIONAL = tasks.tasks(), conditional_tasks.tasks()

# -- true values ------------------------------------------------------------------------------------------------------


def dense(dim: int) -> np.ndarray:
    return np.full((2 * dim, 2 * dim), 0.5) + 0.5 * np.eye(2 * dim)


def test_truths_are_those_of_bmi():
    """bmi 0.1.3 states these figures for its tasks of the same distributions."""
    for dim, nats in ((2, 0.2938933), (5, 0.5928118), (25, 1.2921837), (50, 1.6242654)):
        assert tasks.gaussian_information(dense(dim), dim) == pytest.approx(nats, abs=1e-6)
    for dim, freedom, nats in ((1, 1, 0.2241714), (2, 1, 0.4319456), (3, 3, 0.1787119), (5, 2, 0.4481507)):
        assert tasks.student_information(np.eye(2 * dim), dim, freedom) == pytest.approx(nats, abs=1e-6)
    assert tasks.additive_information(0.1) == pytest.approx(1.7094380, abs=1e-6)
    assert tasks.additive_information(0.75) == pytest.approx(1 / 3)


def test_integrals_are_right():
    for rho in (0.0, 0.5, 0.99):
        one = [(0.3, (0.0, 0.0), np.array([[1, rho], [rho, 1]])), (0.7, (0.0, 0.0), np.array([[1, rho], [rho, 1]]))]
        assert tasks.mixture_information(one) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=1e-9)
    # far apart, two equal clusters tell one bit; the grid of half the points changes nothing
    far = [(0.5, (s * 9.0, s * 9.0), np.eye(2)) for s in (1, -1)]
    assert tasks.mixture_information(far) == pytest.approx(math.log(2), abs=1e-6)
    for parts in (tasks.CROSS, tasks.CLUSTERS):
        assert tasks.mixture_information(parts, 1001) == pytest.approx(tasks.mixture_information(parts), abs=1e-9)
    gauss = tasks.line_entropy(lambda at: normal_log_density(at, 1, 2), -30, 30)
    assert gauss == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 4), abs=1e-9)


def gauss_ratio(x, y, rho):
    """Sum over columns of log p(x, y) / p(x) p(y)."""
    return (normal_log_density(y, rho * x, math.sqrt(1 - rho**2)) - normal_log_density(y, 0, 1)).sum(1)


def student_ratio(x, y):
    """4 + 4 columns of correlation .4, 2 degrees of freedom."""
    both, covariance = np.concatenate([x, y], 1), 0.4 + 0.6 * np.eye(8)

    def log_density(v, shape):
        dim = v.shape[1]
        square = np.einsum("ni,ij,nj->n", v, np.linalg.inv(shape), v)
        constant = math.lgamma(1 + dim / 2) - dim / 2 * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(shape)[1]
        return constant - (1 + dim / 2) * np.log1p(square / 2)

    half = covariance[:4, :4]
    return log_density(both, covariance) - log_density(x, half) - log_density(y, half)


def mixture_ratio(x, y, parts):
    joint = sum(w * np.exp(tasks._plane_log_density(x, y, m, c)) for w, m, c in parts)
    of_x = sum(w * np.exp(normal_log_density(x, m[0], math.sqrt(c[0, 0]))) for w, m, c in parts)
    of_y = sum(w * np.exp(normal_log_density(y, m[1], math.sqrt(c[1, 1]))) for w, m, c in parts)
    return np.log(joint / of_x / of_y)[:, 0]


def square_ratio(x, y):
    grid = np.linspace(-8, 8, 3201)
    at = np.linspace(-4, 60, 6401)
    density = [np.exp(normal_log_density(v, grid**2, 0.5) + normal_log_density(grid, 0, 1)).sum() * 0.005 for v in at]
    return (normal_log_density(y, x**2, 0.5) - np.log(np.interp(y, at, density)))[:, 0]


def shift_ratio(x, y):
    shifts = np.array([-2.0, 0.0, 1.0, 3.0])
    given = normal_log_density(y, shifts[x.astype(int)], 1)
    return (given - np.log(np.exp(normal_log_density(y, shifts, 1)).mean(1, keepdims=True)))[:, 0]


def additive_ratio(x, y):
    of_y = np.clip(np.minimum(y + 0.3, 1) - np.maximum(y - 0.3, 0), 0, None) / 0.6
    return -np.log(0.6 * of_y)[:, 0]


def wider_ratio(x, y):
    """y lies within 2 above two of the labels, at the ends within 2 above one."""
    labels = np.where((y < 1) | (y >= 5), 1, 2)
    return np.log(5 / labels)[:, 0]


def unspiral(v):
    angle = (v**2).sum(1)
    turned = v.copy()
    turned[:, 0] = np.cos(angle) * v[:, 0] + np.sin(angle) * v[:, 1]
    turned[:, 1] = np.cos(angle) * v[:, 1] - np.sin(angle) * v[:, 0]
    return turned


def unroll(v):
    """The angle that the radius tells, and that the direction of the point confirms."""
    t = np.linalg.norm(v, axis=1, keepdims=True) * 21
    assert np.allclose(np.concatenate([t * np.cos(t), t * np.sin(t)], 1) / 21, v, atol=1e-6)
    return ndtri((t / (1.5 * math.pi) - 1) / 2)


def pairs_ratio(nats, dim, back=lambda v: v, back_y=None):
    rho = tasks.correlation(nats, dim)
    return lambda x, y: gauss_ratio(back(x), (back_y or back)(y), rho)


def exact_40(x, y):
    rows, mixing = len(x), np.random.default_rng(0).standard_normal((40, 10)) / math.sqrt(10)
    noise = normal_log_density(y - x @ mixing.T, 0, 2).sum(1)
    covariance = mixing @ mixing.T + 4 * np.eye(40)
    square = np.einsum("ni,ij,nj->n", y, np.linalg.inv(covariance), y)
    assert len(y) == rows
    return noise + 0.5 * square + 20 * math.log(2 * math.pi) + 0.5 * np.linalg.slogdet(covariance)[1]


# log p(x, y) / p(x) p(y) of every task, written down without the task's own code for the truth
RATIOS = {
    "own-gauss-1d-5": pairs_ratio(5, 1),
    "own-gauss-5d-5": pairs_ratio(5, 5),
    "own-gauss-20d-10": pairs_ratio(10, 20),
    "own-gauss-10-40": exact_40,
    "own-cube-5d-2": pairs_ratio(2, 5, np.cbrt),
    "own-half-cube-10d-3": pairs_ratio(3, 10, lambda v: np.sign(v) * np.abs(v) ** (2 / 3)),
    "own-cdf-5d-2": pairs_ratio(2, 5, ndtri),
    "own-spiral-4d-2": pairs_ratio(2, 4, unspiral),
    "own-swiss-roll-1": pairs_ratio(1, 1, unroll, ndtri),
    "own-student-4-4-2": student_ratio,
    "own-asinh-student-4-4-2": lambda x, y: student_ratio(np.sinh(x), np.sinh(y)),
    "own-additive-0.3": additive_ratio,
    "own-cross": lambda x, y: mixture_ratio(x, y, tasks.CROSS),
    "own-clusters": lambda x, y: mixture_ratio(x, y, tasks.CLUSTERS),
    "own-square": square_ratio,
    "own-label-shift": shift_ratio,
    "own-sign-of-product": lambda x, y: np.log(np.where(x[:, 0] * x[:, 1] * y[:, 0] > 0, 1.8, 0.2)),
    "own-channel-8": lambda x, y: np.log(np.where(x == y, 0.7, 0.3 / 7) * 8)[:, 0],
    "own-label-uniform": wider_ratio,
}


@pytest.mark.parametrize("name", OWN)
def test_samples_have_the_stated_information(name):
    """The mean of the exact log ratio over the samples, within four standard errors."""
    drawn = OWN[name].sample(40_000, 3)
    x, y = drawn["x"], drawn["y"]
    assert len(x) == len(y) == 40_000 and np.isfinite(x).all() and np.isfinite(y).all()
    if OWN[name].truth == 0:
        ranks = [v.argsort(0).argsort(0) / len(v) for v in (x, y)]
        both = np.corrcoef(np.concatenate([*ranks, *((r - 0.5) ** 2 for r in ranks)], 1).T)
        dim = x.shape[1]
        across = both[:dim, dim : 2 * dim], both[2 * dim : 3 * dim, 3 * dim :]
        assert max(abs(a).max() for a in across) < 5 / 200
        return
    ratio = RATIOS[name](x, y)
    assert ratio.mean() == pytest.approx(OWN[name].truth, abs=4 * ratio.std() / 200)


def test_samples_repeat_and_differ():
    first, again, other = (OWN["own-cross"].sample(50, seed)["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    of_another = OWN["own-independent-gauss-5d"].sample(50, 1)["x"]
    assert not np.array_equal(OWN["own-gauss-5d-5"].sample(50, 1)["x"], of_another)


# -- conditional information ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CONDITIONAL if "chain" in n])
def test_chains(name):
    """The truth is that of tests/truth, and of a Gaussian with the samples' own covariance."""
    drawn = CONDITIONAL[name].sample(40_000, 0)
    dim, sigma = drawn["x"].shape[1], conditional_tasks.WIDE if "wide" in name else conditional_tasks.UNIT
    if not name.endswith("ends"):
        assert CONDITIONAL[name].truth == pytest.approx(markov.truth(sigma, dim))
    covariance = torch.from_numpy(np.cov(np.concatenate([drawn[k] for k in "xyz"], 1).T))
    columns = [list(range(part * dim, (part + 1) * dim)) for part in range(3)]
    assert markov.gaussian_cmi(covariance, *columns) == pytest.approx(CONDITIONAL[name].truth, abs=0.02)


def cross_ratio(a, b):
    return mixture_ratio(a, b, tasks.CROSS)


AROUND = {
    **{f"cmi-linear-{d}d": ("linear", lambda v: v, lambda v: v) for d in (1, 5, 20)},
    **{f"cmi-bent-{d}d": ("bent", lambda v: v, lambda v: v) for d in (1, 5)},
    **{f"cmi-null-{s}-{d}d": (s, lambda v: v, lambda v: v) for s in ("linear", "bent") for d in (1, 2, 5, 10, 20)},
    "cmi-post-nonlinear-1d": ("bent", np.log, np.arctanh),
    "cmi-post-nonlinear-5d": ("bent", np.cbrt, np.log),
    "cmi-cross-1d": ("linear", lambda v: v, lambda v: v),
    "cmi-cross-3d": ("bent", lambda v: v, lambda v: v),
}


@pytest.mark.parametrize("name", AROUND)
def test_x_and_y_share_what_is_stated_besides_z(name):
    shape, back, back_y = AROUND[name]
    drawn = CONDITIONAL[name].sample(40_000, 0)
    x, y, z = (drawn[k] for k in "xyz")
    mean = getattr(conditional_tasks, shape)
    a, b = back(x) - mean(z, x.shape[1], 0), back_y(y) - mean(z, y.shape[1], 1)
    assert abs(np.corrcoef(np.concatenate([a, b, z], 1).T)[: 2 * a.shape[1], 2 * a.shape[1] :]).max() < 5 / 200
    if "cross" in name:
        ratio = cross_ratio(a, b)
    elif "null" in name:
        assert abs(np.corrcoef(a[:, 0], b[:, 0])[0, 1]) < 4 / 200
        # and z matters to both
        assert np.corrcoef(x[:, 0], mean(z, 1, 0)[:, 0])[0, 1] > 0.5
        return
    else:
        ratio = gauss_ratio(a, b, 0.8)
    assert ratio.mean() == pytest.approx(CONDITIONAL[name].truth, abs=4 * ratio.std() / 200)


def test_labels_sides_and_outliers():
    def ratio(name, of_x, of_y, rho, rows=40_000):
        drawn = CONDITIONAL[name].sample(rows, 0)
        z = drawn["z"]
        kept = z[:, 0] < 1000
        x, y, r = of_x(drawn["x"], z), of_y(drawn["y"], z), rho(z)
        each = normal_log_density(y, r * x, np.sqrt(1 - r**2)) - normal_log_density(y, 0, 1)
        each = np.where(kept, each[:, 0], 0)
        assert each.mean() == pytest.approx(CONDITIONAL[name].truth, abs=4 * each.std() / math.sqrt(rows))
        return kept

    def normal_log_density(at, mean, sd):
        return -0.5 * ((at - mean) / sd) ** 2 - np.log(sd * math.sqrt(2 * math.pi))

    def same(v, z):
        return v

    first = [conditional_tasks.linear(np.ones((1, 1)), 1, which)[0, 0] for which in (0, 1)]
    ratio("cmi-seven-labels", lambda v, z: v - z, lambda v, z: v - z, lambda z: np.full_like(z, 0.6))
    ratio("cmi-switch", lambda v, z: v - z, lambda v, z: v + z, lambda z: 0.95 * z)
    ratio("cmi-sided-3d", same, same, lambda z: np.where(z[:, :1] > 0, 0.9, -0.9))
    kept = ratio(
        "cmi-outliers", lambda v, z: v - first[0] * z, lambda v, z: v - first[1] * z, lambda z: np.full_like(z, 0.756)
    )
    assert 15 < (~kept).sum() < 70


# -- records ----------------------------------------------------------------------------------------------------------


def record(task, value, seed=0, method="engine", truth=1.0, rows=10_000, **more):
    return {
        "task": task, "rows": rows, "seed": seed, "method": method, "truth": truth, "value": value, "seconds": 2.0,
        "cpu_seconds": 1.0, "processor": "a chip", "commit": "abc", "versions": {"torch": "2.0"},
    } | more  # fmt: skip


def test_records_survive_an_interrupted_run(tmp_path):
    path = tmp_path / "records.jsonl"
    assert records.read(path) == []
    for seed in (1, 0):
        records.append(path, record("own-a", 0.5, seed))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task": "own-b", "ro')
    assert [r["seed"] for r in records.read(path)] == [0, 1]
    records.append(path, record("own-a", 0.7, 1))
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 3
    assert [r["value"] for r in records.read(path)] == [0.5, 0.7]  # of two with one key the later counts
    path.write_bytes(b"no record\n" + whole)
    with pytest.raises(EngineError, match="line 1: found 'no record'"):
        records.read(path)


def test_failed_ones_are_done_unless_retried():
    kept = record("own-a", 1.0)
    failed = {k: v for k, v in record("own-b", 1.0).items() if k != "value"} | {"error": "late"}
    assert records.done([kept, failed]) == {records.key(kept), records.key(failed)}
    assert records.done([kept, failed], retry=True) == {records.key(kept)}


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(METHODS, "fake", Method("fake", "tests.bench.mi_worker", ("mi",), "fake"))


def write(folder, task, x, rows=10, seed=0):
    arrays = {"x": np.full((rows, 1), float(x)), "y": np.zeros((rows, 1)), "truth": 0.5}
    samples.export({task: lambda *_: arrays}, folder, [rows], [seed], say=lambda text: None)


def test_a_run_goes_on_where_it_ended(tmp_path, fake, capsys):
    """Through the real process: values, failures and the limit are on record, and nothing is run twice."""
    for task, x in (("some-4", 4), ("some-raise", -1), ("some-nan", -2), ("some-slow", -3), ("cmi-not-for-it", 4)):
        write(tmp_path, task, x)
    path = tmp_path / "records.jsonl"
    run = [
        "run", "--samples", str(tmp_path), "--records", str(path), "--rows", "10", "--seeds", "0", "--methods", "fake",
        "--limit", "0.5",
    ]  # fmt: skip
    assert main([*run, "--tasks", "some-4"]) == 0
    before = path.read_bytes()
    assert main([*run, "--tasks", "some-*", "cmi-not*"]) == 0
    assert path.read_bytes().startswith(before)
    known = {r["task"]: r for r in records.read(path)}
    assert len(known) == len(path.read_text().splitlines()) == 4
    assert known["some-4"]["value"] == 4 and known["some-4"]["truth"] == 0.5
    assert known["some-4"]["versions"]["numpy"] == np.__version__
    assert known["some-raise"]["error"] == "ValueError: two lines" and known["some-nan"]["error"] == "value nan"
    assert known["some-slow"]["error"] == "over the limit of CPU seconds"
    assert main([*run, "--tasks", "some-*"]) == 0
    assert "4 estimates, 4 of them on record before" in capsys.readouterr().err


def test_errors_of_a_run(tmp_path, fake, capsys):
    write(tmp_path, "some-4", 4)
    run = ["run", "--samples", str(tmp_path), "--records", str(tmp_path / "r.jsonl"), "--methods", "fake", "--seeds"]
    assert main([*run, "0", "--tasks", "some-4"]) == 2
    assert "no samples of some-4 with 10000 rows and seed 0" in capsys.readouterr().err
    assert main([*run, "0", "--tasks", "sme-4"]) == 2
    assert "--tasks: found sme-4" in capsys.readouterr().err
    assert main([*run, "0-x"]) == 2
    assert "--seeds: found 0-x" in capsys.readouterr().err
    assert main(["run", "--methods", "best"]) == 2
    assert "--methods: found best" in capsys.readouterr().err


@pytest.mark.parametrize(
    "python, reason", [({}, "the process ended with status 1"), ({"gone": "/no/python"}, "No such")]
)
def test_a_worker_that_cannot_start(monkeypatch, python, reason):
    monkeypatch.setitem(METHODS, "gone", Method("gone", "tests.bench.no_such_module", ("mi",), "gone"))
    with pytest.raises(EngineError, match=f"--methods gone: found .*{reason}.*Name one with --python gone=PYTHON"):
        Worker("gone", python)


def test_methods_run_on_what_they_can_read():
    jobs = work.plan(["cmi-a", "own-a"], [10, 20], [0, 1], ["engine", "bmi-ksg", "tigramite-knn"])
    assert len(jobs) == len(set(jobs)) == 4 * 4
    assert {task for task, _, _, method in jobs if method == "bmi-ksg"} == {"own-a"}
    assert {task for task, _, _, method in jobs if method == "tigramite-knn"} == {"cmi-a"}


@pytest.mark.parametrize(
    "result, expected",
    [
        ({"value": 0.0, "standard_error": 1.0}, {"value": 0.0, "interval": [-1.96, 1.96]}),
        ({"ldr": 3.0, "dv": 2.0, "nwj": 1.0}, {"value": 2.0}),
        (
            SimpleNamespace(value=1.0, interval=(0.5, 2.0), flags=["saturated"]),
            {"value": 1.0, "interval": [0.5, 2.0], "flags": ["saturated"]},
        ),
        (SimpleNamespace(value=1.0, interval=None, flags=[]), {"value": 1.0, "flags": []}),
    ],
)
def test_entries_of_a_result(result, expected):
    assert own.entries(result) == expected


def test_the_engine_itself_is_asked(monkeypatch):
    import engine

    called = []
    monkeypatch.setattr(engine, "estimate_mi", lambda *a, **k: called.append((len(a), k)) or {"value": 1.0})
    monkeypatch.setattr(engine, "estimate_cmi", lambda *a, **k: called.append((len(a), k)) or {"dv": 2.0})
    arrays = dict.fromkeys("xyz", np.zeros((3, 1)))
    assert own.estimate(arrays, 5) == {"value": 2.0}
    del arrays["z"]
    assert own.estimate(arrays, 6) == own.estimate(arrays, 7, "nwj") == {"value": 1.0}
    assert called == [(3, {"seed": 5}), (2, {"seed": 6}), (2, {"seed": 7, "bound": "nwj"})]


# -- the table --------------------------------------------------------------------------------------------------------

FEW = [
    record("own-a", 0.9, 0, interval=[0.8, 1.1]),
    record("own-a", 1.3, 1, interval=[1.2, 1.4], cpu_seconds=3.0),
    record("own-null", -0.0001, truth=0.0, interval=[0.0, 0.1]),
    record("own-a", 1.01, method="bmi-ksg", versions={"jax": "0.4"}),
    record("own-a", 0.2, rows=2000),
    record("5-wide", 0.96, method="engine"),
    {k: v for k, v in record("5-wide", 0, method="bmi-ksg").items() if k != "value"} | {"error": "late"},
    record("cmi-a", 3.05, truth=3.0),
    record("cmi-a", 2.0, truth=3.0, method="tigramite-knn", commit="", versions={"tigramite": "5"}),
]
HEAD = (
    "| estimator | tasks | runs | mean absolute error | off by > .1 nats or > 10 % | off by both "
    "| intervals that hold the truth | median CPU seconds |\n|---|---|---|---|---|---|---|---|"
)
EXPECTED = f"""### Summary, 10,000 rows

{HEAD}
| engine, tasks of bmi | 1 | 1 | 0.040 | 0 | 0 |  | 1 |
| bmi KSG, tasks of bmi | 1 | 1 (1 failed) | failed | 1 | 1 |  | 1 |
| engine, tasks of our own | 2 | 3 | 0.100 | 1 | 1 | 2 of 3 (67 %) | 1 |
| bmi KSG, tasks of our own | 1 | 1 | 0.010 | 0 | 0 |  | 1 |
| engine, conditional information | 1 | 1 | 0.050 | 0 | 0 |  | 1 |
| tigramite kNN, conditional information | 1 | 1 | 1.000 | 1 | 1 |  | 1 |

### Summary, 2,000 rows

{HEAD}
| engine, tasks of our own | 1 | 1 | 0.800 | 1 | 1 |  | 1 |

### Tasks of bmi, 10,000 rows

| task | true | engine | error | in interval | CPU s | bmi KSG (CPU s) |
|---|---|---|---|---|---|---|
| `5-wide` | 1.000 | **0.960** | 0.040 |  | 1 | failed (1) |

### Tasks of our own, 10,000 rows

| task | true | engine | error | in interval | CPU s | bmi KSG (CPU s) |
|---|---|---|---|---|---|---|
| `own-a` | 1.000 | 1.100 | 0.200 | 1/2 | 2 | **1.010** (1) |
| `own-null` | 0.000 | **0.000** | 0.000 | 1/1 | 1 |  |

### Conditional information, 10,000 rows

| task | true | engine | error | in interval | CPU s | tigramite kNN (CPU s) |
|---|---|---|---|---|---|---|
| `cmi-a` | 3.000 | **3.050** | 0.050 |  | 1 | 2.000 (1) |

Measured on a chip, one core an estimate. bmi: jax 0.4; torch 2.0. engine: torch 2.0. tigramite: tigramite 5. \
Engine at commit abc."""


def test_the_table():
    assert table.markdown(FEW) == EXPECTED
    assert table.markdown([]).startswith("No records yet")


@pytest.mark.parametrize(
    "errors, truth, expected",
    [
        ([0.05], 1.0, (False, False)),
        ([0.05], 0.3, (False, True)),
        ([0.2], 5.0, (True, False)),
        ([0.2], 1.0, (True, True)),
        ([0.05], 0.0, (False, False)),
        ([0.15], 0.0, (True, True)),
        ([0.15, -0.15], 5.0, (True, False)),  # errors of opposite signs do not cancel
    ],
)
def test_what_is_off(errors, truth, expected):
    assert table.off([record("own-a", truth + e, seed, truth=truth) for seed, e in enumerate(errors)]) == expected


def test_the_table_command_writes_page_and_plot(tmp_path, capsys):
    path, page = tmp_path / "records.jsonl", tmp_path / "page.md"
    for r in FEW:
        records.append(path, r)
    page.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    assert main(["table", "--records", str(path), "--docs", str(page)]) == 0
    assert page.read_text() == f"before\n{table.START}\n\n{EXPECTED}\n\n{table.END}\nafter\n"
    first = (tmp_path / "mi_benchmark.svg").read_bytes()
    assert main(["table", "--records", str(path), "--docs", str(page)]) == 0
    assert first.startswith(b"<?xml") and (tmp_path / "mi_benchmark.svg").read_bytes() == first
    capsys.readouterr()


def test_the_page_follows_the_records():
    assert table.markdown(records.read(RECORDS)) in DOCS.read_text(encoding="utf-8")


# -- the suite --------------------------------------------------------------------------------------------------------


def test_the_suite(monkeypatch):
    from bench.suites import mi_benchmark

    monkeypatch.setattr(mi_benchmark, "estimate", lambda arrays, seed: {"value": 0.5, "interval": [0.0, 0.6]})
    setting = runner.Setting(quick=True)
    work = mi_benchmark.build("engine", setting)
    expected = np.mean([abs(0.5 - OWN[name].truth) for name in mi_benchmark.QUICK_TASKS])
    assert work.run() == work.run() == pytest.approx(expected)
    known = mi_benchmark.details(setting, {"engine": work}, {})
    assert known["summary"]["runs"] == 6 and known["summary"]["covered"] == (4, 6)
    assert [r["seed"] for r in known["tasks"]["own-cross"]] == [0, 1]
    json.dumps(known)
    with pytest.raises(AssertionError, match=r"1 nat: 0\.500"):
        mi_benchmark.gate(setting)


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_explains_every_flag():

    page = DOCS.with_name("measuring_information.md").read_text(encoding="utf-8")
    assert [flag for flag in ADVICE if f"| **{flag}** |" not in page] == []
