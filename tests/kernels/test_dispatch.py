"""The dispatch table: what is looked up, what overrides it, what is written."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import traffic
from engine.errors import ConfigError
from engine.kernels import dispatch
from engine.kernels.contrastive import op as _contrastive  # noqa: F401  (registers contrastive)
from engine.kernels.mi_bounds import op, plan  # noqa: F401  (registers infonce and mi_bound)
from engine.kernels.mlp import plan as tiles

CUDA = torch.device("cuda")
CANDIDATES = {"small": lambda s: s["width"] <= 100, "large": lambda s: True, "eager": lambda s: True}


def entry(algorithm: str, rows: int, width: int = 64, arch: int = 90, precision: str = "bf16") -> dict:
    return {
        "operation": "test_op", "precision": precision, "architecture": f"sm{arch}",
        "sizes": {"rows": rows, "width": width}, "algorithm": algorithm, "milliseconds": {algorithm: 1.0},
        "source": "modelled",
    }  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An operation with a table of its own, on a chip of architecture 90."""
    path = tmp_path / "dispatch.json"
    monkeypatch.setattr(dispatch, "TABLE", path)
    monkeypatch.setattr(dispatch, "read", lambda p=path, read=dispatch.read: read(p))
    monkeypatch.setattr(dispatch, "_operations", dict(dispatch._operations))
    monkeypatch.setattr(dispatch, "_capability", lambda index: 90)
    dispatch.register("test_op", ("width", "rows"), CANDIDATES, lambda precision, sizes: f"rule for {precision}")
    yield path
    monkeypatch.undo()
    dispatch._load()


def chosen(rows: int, width: int = 64, dtype: torch.dtype = torch.bfloat16, device: torch.device = CUDA) -> str:
    return dispatch.choose("test_op", dtype=dtype, device=device, sizes={"rows": rows, "width": width})


def test_nearest_size_class_by_ratio(table):
    dispatch.write(table, [entry("small", 100), entry("large", 10_000), entry("eager", 100, width=100)])
    assert [chosen(r) for r in (1, 100, 999, 1001, 10**6)] == ["small", "small", "small", "large", "large"]
    # width before rows
    assert chosen(10_000, width=90) == "eager"


def test_tiles_of_small_layers_follow_the_table(table):
    """Wide ones until a chip was measured; sizes are the rows of a launch."""
    x = SimpleNamespace(dtype=torch.float32, device=CUDA)
    assert tiles.tile(x, 32, "tf32x3") == tiles.WIDE["tf32x3"]
    measured = [
        entry(kind, rows, precision="fp32") | {"operation": "tower_tiles", "sizes": {"rows": rows}}
        for kind, rows in (("deep", 32), ("wide", 512))
    ]
    dispatch.write(table, measured)
    found = [tiles.tile(x, rows, "tf32x3", given) for rows in (64, 512) for given in (tiles.LAYERS, tiles.FIRST)]
    expected = tiles.DEEP["tf32x3"], tiles.FIRST["deep"]["tf32x3"], tiles.WIDE["tf32x3"], tiles.WIDE["tf32x3"]
    assert found == list(expected)
    with dispatch.use(tower_tiles="wide"):
        assert tiles.tile(x, 32, "tf32x3") == tiles.WIDE["tf32x3"]


def test_nearest_architecture(table, monkeypatch):
    dispatch.write(table, [entry("small", 100, arch=80), entry("large", 100, arch=100)])
    for arch, algorithm in ((75, "small"), (80, "small"), (86, "small"), (90, "small"), (95, "large"), (120, "large")):
        monkeypatch.setattr(dispatch, "_capability", lambda index, arch=arch: arch)
        dispatch._chosen.clear()
        assert chosen(100) == algorithm, arch


def test_precisions(table):
    dispatch.write(table, [entry("small", 100), entry("large", 100, precision="tf32")])
    assert chosen(100, dtype=torch.float16) == "small"  # as bf16, having none of its own
    assert chosen(100, dtype=torch.float32) == "rule for fp32"
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        assert chosen(100, dtype=torch.float32) == "large"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    dispatch.write(table, [entry("eager", 100, precision="fp16")])
    assert chosen(100, dtype=torch.float16) == "eager"


def test_rule_of_thumb(table, monkeypatch):
    dispatch.write(table, [entry("small", 100), entry("vanished", 100_000)])
    assert chosen(100, width=101) == "rule for bf16"  # the entry's algorithm cannot take it
    assert chosen(100_000) == "rule for bf16"  # nor is there such an algorithm any more
    assert chosen(100, device=torch.device("cpu")) == "rule for bf16"
    monkeypatch.setattr(dispatch, "_capability", lambda index: None)
    dispatch._chosen.clear()
    assert chosen(100) == "rule for bf16"


def test_override_for_a_block(table):
    dispatch.write(table, [entry("small", 100)])
    with dispatch.use(test_op="large"):
        assert chosen(100) == "large"
        with dispatch.use(test_op=None):
            assert chosen(100) == "small"
        with pytest.raises(ZeroDivisionError), dispatch.use(test_op="eager"):
            raise ZeroDivisionError
        assert chosen(100) == "large"
    assert chosen(100) == "small"


@pytest.mark.parametrize(
    "algorithms, told",
    [
        ({"infonse": "fused"}, "operation 'infonse'; expected one of .*infonce"),
        ({"test_op": "huge"}, "test_op=huge; expected one of small, large, eager"),
    ],
)
def test_wrong_overrides_are_told_in_one_line(table, algorithms, told):
    with pytest.raises(ConfigError, match=told) as caught:
        dispatch.use(**algorithms)
    assert "\n" not in str(caught.value)


def test_an_override_that_cannot_take_the_sizes_is_told(table):
    with dispatch.use(test_op="small"), pytest.raises(ConfigError, match="found small for rows 7, width 200"):
        chosen(7, width=200)


def test_environment_variable(table, monkeypatch):
    dispatch.write(table, [entry("small", 100)])
    monkeypatch.setenv(dispatch.VARIABLE, " test_op=large , infonce=eager")
    assert chosen(100) == "large"
    with dispatch.use(test_op="eager"):
        assert chosen(100) == "eager"
    monkeypatch.setenv(dispatch.VARIABLE, "test_op=huge")
    with pytest.raises(ConfigError, match="ENGINE_DISPATCH: found test_op=huge"):
        chosen(100)
    monkeypatch.setenv(dispatch.VARIABLE, "large")
    with pytest.raises(ConfigError, match="operation=algorithm, separated by commas"):
        chosen(100)
    monkeypatch.delenv(dispatch.VARIABLE)
    assert chosen(100) == "small"


def test_entries_replace_those_of_their_place(table):
    dispatch.write(table, [entry("small", 100), entry("large", 1000)])
    dispatch.write(table, [entry("eager", 100)])
    assert {e["sizes"]["rows"]: e["algorithm"] for e in dispatch.read(table)} == {100: "eager", 1000: "large"}
    assert chosen(100) == "eager"
    assert len(table.read_text().splitlines()) == 4  # one entry a line


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{"operation": "x"}]}', '{"entries": 3}'])
def test_a_file_that_is_no_table(table, text):
    table.write_text(text)
    with pytest.raises(ConfigError, match="a dispatch table") as caught:
        dispatch.read(table)
    assert "\n" not in str(caught.value)


def test_eager_must_be_a_candidate():
    with pytest.raises(ValueError, match="eager torch must be a candidate"):
        dispatch.register("test_without", ("rows",), {"fast": lambda s: True}, lambda *_: "fast")


def test_measuring_takes_the_fastest_candidate(table, monkeypatch):
    """Everything but the clock: each candidate runs under its own override; one does not fit into memory."""
    ran = []

    def work(device, dtype, sizes):
        return lambda: ran.append((chosen(**sizes, dtype=dtype), dtype, torch.backends.cuda.matmul.allow_tf32))

    dispatch.register("test_op", ("width", "rows"), CANDIDATES, lambda *_: "eager", work=work)
    times = {"small": 3.0, "large": None, "eager": 2.0}

    def clock(run, milliseconds):
        run()
        return times[ran[-1][0]]

    monkeypatch.setattr(dispatch, "_time", clock)
    monkeypatch.setattr(dispatch, "_source", lambda device: "measured")
    classes = [{"rows": 10, "width": 64}, {"rows": 10, "width": 200}]
    found = dispatch.measure("test_op", "cuda", precisions=("tf32", "bf16"), classes=classes)
    assert [e["milliseconds"] for e in found] == 2 * [{"small": 3.0, "eager": 2.0}, {"eager": 2.0}]
    assert {e["algorithm"] for e in found} == {"eager"} and {e["architecture"] for e in found} == {"sm90"}
    assert {(dtype, tf32) for _, dtype, tf32 in ran} == {(torch.float32, True), (torch.bfloat16, False)}
    dispatch.write(table, found)
    assert chosen(10) == "eager"


def test_choosing_is_traced_whole_with_dynamic_sizes(table):
    dispatch.write(table, [entry("small", 100), entry("large", 10_000)])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def function(x):
        sizes = {"rows": x.shape[0], "width": 64}
        return x + 1 if dispatch.choose("test_op", dtype=torch.bfloat16, device=CUDA, sizes=sizes) == "small" else x - 1

    for rows, expected in ((50, 1.0), (60, 1.0), (5000, -1.0), (6000, -1.0)):
        assert function(torch.zeros(rows))[0] == expected
    assert len(graphs) == 2


class TestCommittedTable:
    def test_every_entry_is_one_that_can_be_taken(self):
        for e in dispatch.read():
            candidates = dispatch._operations[e["operation"]].candidates
            assert candidates[e["algorithm"]](e["sizes"])
            assert e["algorithm"] == min(e["milliseconds"], key=e["milliseconds"].get)
            assert e["precision"] in dispatch.PRECISIONS and e["source"].startswith(("measured", "modelled", "eager"))

    def test_modelled_entries_are_the_models(self):
        keyed = {dispatch._key(e): e for e in traffic.dispatch_entries()}
        modelled = [
            e for e in dispatch.read() if "modelled" in e["source"] and e["operation"] in ("infonce", "mi_bound")
        ]
        assert all(keyed[dispatch._key(e)] == e for e in modelled), "run python -m bench.traffic --dispatch"

    def test_no_wide_embeddings_are_fused(self):
        for operation in ("infonce", "mi_bound"):
            for width in (64, 128, 129, 512, 4096):
                for rows in (1, 128, 4096, 1 << 20):
                    sizes = {"groups": 1, "rows": rows, "columns": rows, "width": width}
                    for dtype in (torch.float32, torch.bfloat16, torch.float16):
                        found = dispatch._choose(operation, dispatch.precision_of(dtype), 90, sizes)
                        assert width <= plan.MAX_WIDTH or found != "fused"

    @pytest.mark.parametrize("operation", ["infonce", "mi_bound", "contrastive"])
    def test_more_groups_than_a_launch_takes_are_for_plain_torch(self, operation):
        for rows, width in ((4, 16), (1 << 16, 64), (64, 512)):
            sizes = {"groups": dispatch.MOST_PROGRAMS + 1, "rows": rows, "columns": rows, "width": width}
            for precision in dispatch.PRECISIONS:
                for architecture in (None, 80, 90, 100):
                    assert dispatch._choose(operation, precision, architecture, sizes) == "eager"
            candidates = dispatch._operations[operation].candidates
            assert candidates["chunked"](sizes | {"groups": dispatch.MOST_PROGRAMS})
            assert not any(fits(sizes) for name, fits in candidates.items() if name != "eager")

    def test_it_is_packaged(self):
        code = "import engine.kernels.dispatch as d, json; print(json.dumps(d.read()[0]))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["operation"]
        assert "kernels/*.json" in (dispatch.TABLE.parents[2] / "setup.py").read_text(encoding="utf-8")
