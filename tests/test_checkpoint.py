"""Checkpoints come back exactly, or are refused in one line; saving never harms what was there."""

import errno
import json
import os
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine import checkpoint
from engine.errors import CheckpointError, OutputError


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8))
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert repr(found) == repr(expected)
    else:
        assert found == expected


@pytest.fixture
def path(tmp_path):
    return tmp_path / "best.safetensors"


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def test_tree_comes_back_exactly(path):
    base = torch.randn(6, 4)
    state = {
        "floats": [0.1, -0.0, 1e-320, float("inf"), float("-inf"), float("nan"), 1.0],
        "plain": {"none": None, "true": True, "one": 1, "big": 2**90, "text": "F;T | σ\n", "empty": {}, "nothing": []},
        "keys": {0: "int", "0": "str", -1: ()},
        "tuple": (0.9, (1, [2, None])),
        "counter": Counter({5: 1, 9: 2}),
        "dtypes": {
            str(dtype): torch.arange(5).to(dtype)
            for dtype in (
                torch.float64,
                torch.float32,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int32,
                torch.int16,
                torch.int8,
                torch.uint64,
                torch.uint32,
                torch.uint16,
                torch.uint8,
                torch.bool,
                torch.complex64,
            )
        },
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), -0.0]),
        "transposed": base.t(),
        "every_other": base[::2, ::2],
        "array": np.arange(3, dtype=np.uint32),
        "array0": np.array(1.5),
    }
    meta = {"epoch": 3, "text_encoder": {"layers": 2}, "name": None}
    checkpoint.save(path, state, meta)
    found, found_meta = checkpoint.load(path)
    assert_same(found, state)
    assert found_meta == meta


def test_shared_and_tied_tensors(path):
    weight = torch.randn(4, 3)
    state = {
        "a": weight,
        "tied": weight,
        "row": weight[1],
        "parameter": nn.Parameter(weight),
        "a/b": weight,
        "x": {"a": 1},
    }
    checkpoint.save(path, state)
    found, _ = checkpoint.load(path)
    for name in ("a", "tied", "parameter", "a/b"):
        assert torch.equal(found[name], weight)
    assert torch.equal(found["row"], weight[1])
    found["a"].zero_()
    assert torch.equal(found["tied"], weight), "loaded tensors must not share memory"


def test_keys_with_slashes_do_not_collide(path):
    state = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}}
    checkpoint.save(path, state)
    assert_same(checkpoint.load(path)[0], state)


def test_other_tools_read_the_tensors(path):
    model = small_model()
    checkpoint.save(path, {"model": model.state_dict()})
    tensors = load_file(path)
    assert torch.equal(tensors["model/0.weight"], model[0].weight)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
@pytest.mark.parametrize("schedule", ["multi_step", "plateau", "exp"])
def test_training_resumes_bit_for_bit(path, optimizer, schedule):
    """Five steps equal three steps, saved, loaded into new objects, and two more: random draws included."""

    def start():
        model = small_model()
        optim = optimizer([{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}], lr=1e-2)
        sched = {
            "multi_step": lambda: torch.optim.lr_scheduler.MultiStepLR(optim, [2, 4]),
            "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optim, patience=0),
            "exp": lambda: torch.optim.lr_scheduler.ExponentialLR(optim, 0.5),
        }[schedule]()
        return model, optim, sched, torch.Generator().manual_seed(7), np.random.RandomState(3)

    def step(model, optim, sched, generator, random):
        x = torch.randn(8, 3, generator=generator) + torch.randn(8, 3)
        loss = (model(x) - float(random.randn())).square().mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        sched.step(*([1.0] if schedule == "plateau" else []))

    whole = start()
    torch.manual_seed(11)
    for _ in range(5):
        step(*whole)

    first = start()
    torch.manual_seed(11)
    for _ in range(3):
        step(*first)
    model, optim, sched, generator, random = first
    checkpoint.save(
        path,
        {
            "model": model.state_dict(),
            "optimizer": optim.state_dict(),
            "schedule": sched.state_dict(),
            "generator": generator.get_state(),
            "torch": torch.get_rng_state(),
            "numpy": random.get_state(),
        },
    )
    torch.manual_seed(999)
    model, optim, sched, generator, random = second = start()
    state, _ = checkpoint.load(path)
    checkpoint.load_into(model, state["model"], str(path))
    optim.load_state_dict(state["optimizer"])
    sched.load_state_dict(state["schedule"])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    random.set_state(state["numpy"])
    for _ in range(2):
        step(*second)

    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert_same(optim.state_dict(), whole[1].state_dict())


def test_what_cannot_be_saved_is_named(path):
    with pytest.raises(TypeError, match="a/b: a checkpoint cannot hold a set"):
        checkpoint.save(path, {"a": {"b": {1, 2}}})
    with pytest.raises(TypeError, match="keys"):
        checkpoint.save(path, {"a": {(1, 2): 3}})
    assert not path.exists()


class TestRefused:
    @pytest.fixture
    def good(self, path):
        checkpoint.save(path, {"model": small_model().state_dict()}, {"epoch": 1})
        return path

    def refused(self, path, *words):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        message = str(caught.value)
        assert "\n" not in message
        assert str(path) in message
        for word in words:
            assert word in message
        return message

    def test_missing_and_folder(self, tmp_path):
        self.refused(tmp_path / "none.safetensors", "no such file")
        self.refused(tmp_path, "a folder")

    def test_truncated_anywhere(self, good):
        whole = good.read_bytes()
        for length in [0, 3, 8, 50, len(whole) // 2, len(whole) - 1]:
            good.write_bytes(whole[:length])
            self.refused(good)
        good.write_bytes(whole[:-1])
        self.refused(good, "truncated")

    def test_trailing_bytes(self, good):
        good.write_bytes(good.read_bytes() + b"x")
        self.refused(good)

    def test_one_flipped_bit_anywhere(self, good):
        """A changed byte in weights, tree or meta never loads as if nothing had happened."""
        whole = bytearray(good.read_bytes())
        for at in np.random.RandomState(0).randint(8, len(whole), size=60):
            whole[at] ^= 1
            good.write_bytes(bytes(whole))
            self.refused(good)
            whole[at] ^= 1
        whole[-1] ^= 1
        good.write_bytes(bytes(whole))
        self.refused(good, "checksum")

    def test_pickle(self, path):
        torch.save({"a": torch.zeros(3)}, path)
        self.refused(path, "pickle", "engine import")

    def test_foreign_safetensors(self, path):
        save_file({"a": torch.zeros(3)}, path)
        self.refused(path, "not a checkpoint of this project")

    def test_meta_that_was_changed(self, good):
        whole = good.read_bytes()
        assert whole.count(rb"\"epoch\": 1") == 1
        good.write_bytes(whole.replace(rb"\"epoch\": 1", rb"\"epoch\": 2"))
        self.refused(good, "checksum")

    def test_what_is_no_state(self, path):
        """Though it was written so."""
        for state, meta in (([1, 2], {}), ({}, [3])):
            checkpoint.save(path, state, meta)
            self.refused(path, "contents that do not match")

    def test_a_header_that_would_fill_the_memory(self, path, monkeypatch):
        path.write_bytes((1 << 20).to_bytes(8, "little") + b" " * (1 << 20))
        monkeypatch.setattr(checkpoint, "HEADER_BYTES", 1 << 19)
        self.refused(path, "a header of 1048576 bytes", "at most 524288")

    def test_text(self, path):
        path.write_text("mode: fast\n" * 20)
        self.refused(path, "not safetensors")

    def test_newer_version(self, good, monkeypatch):
        monkeypatch.setattr(checkpoint, "VERSION", 2)
        checkpoint.save(good, {"a": 1})
        monkeypatch.undo()
        self.refused(good, "version 2", "version 1", "upgrade")


class TestLoadInto:
    def test_values_arrive(self):
        model, other = small_model(), small_model()
        with torch.no_grad():
            other[0].weight.add_(1)
        checkpoint.load_into(model, other.state_dict(), "best")
        assert torch.equal(model[0].weight, other[0].weight)

    @pytest.mark.parametrize(
        "change, words",
        [
            (lambda s: s.pop("2.weight"), ["no parameter 2.weight", "[1, 4]"]),
            (lambda s: s.update(extra=torch.zeros(1)), ["extra", "does not have"]),
            (lambda s: s.update({"0.weight": torch.zeros(4, 7)}), ["0.weight", "[4, 7]", "[4, 3]"]),
            (lambda s: s.update({"0.weight": torch.zeros(1), "0.bias": torch.zeros(1)}), ["0.weight", "1 more"]),
        ],
    )
    def test_problem_is_named_and_nothing_changes(self, change, words):
        model = small_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {name: tensor + 1 for name, tensor in before.items()}
        change(state)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load_into(model, state, "RUN/best.safetensors")
        assert "\n" not in str(caught.value)
        assert "RUN/best.safetensors" in str(caught.value)
        for word in words:
            assert word in str(caught.value)
        assert_same(dict(model.state_dict()), before)


class TestSaving:
    def test_unwritable(self, tmp_path):
        blocker = tmp_path / "file"
        blocker.write_text("")
        with pytest.raises(OutputError, match="folder"):
            checkpoint.save(blocker / "best.safetensors", {"a": torch.zeros(2)})

    def test_failing_write_keeps_the_old_file(self, path, monkeypatch):
        checkpoint.save(path, {"a": torch.ones(3)}, {"epoch": 1})
        before = path.read_bytes()

        def full(tensor):
            if len(list(path.parent.iterdir())) == 2:  # the file is open
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return b""

        monkeypatch.setattr(checkpoint, "_bytes", full)
        with pytest.raises(OutputError) as caught:
            checkpoint.save(path, {"a": torch.zeros(3)}, {"epoch": 2})
        assert "no space left" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_full_disk(self, tmp_path):
        """The real thing, on a file system of 256 KiB."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True
        )
        if mount.returncode:
            pytest.skip(f"mounting a small file system is not permitted here: {mount.stderr.strip()}")
        try:
            path = disk / "last.safetensors"
            checkpoint.save(path, {"a": torch.ones(100)}, {"epoch": 1})
            with pytest.raises(OutputError) as caught:
                checkpoint.save(path, {"a": torch.zeros(100_000)}, {"epoch": 2})
            assert "no space left" in str(caught.value)
            state, meta = checkpoint.load(path)
            assert meta == {"epoch": 1}
            assert torch.equal(state["a"], torch.ones(100))
            assert [p.name for p in disk.iterdir()] == [path.name], "nothing half-written stays behind"
        finally:
            subprocess.run(["umount", disk], check=True)


def test_every_tensor_begins_at_a_multiple_of_its_size(path):
    """As other tools that map the file into memory need it."""
    state = {str(i): torch.arange(3).to(dtype) for i, dtype in enumerate((torch.int8, torch.float64, torch.int16))}
    checkpoint.save(path, state | {"long name, so that the header's length is odd": torch.zeros(3)})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__")["version"] == "1"
    size = {"I8": 1, "I16": 2, "F32": 4, "F64": 8}
    assert all(entry["data_offsets"][0] % size[entry["dtype"]] == 0 for entry in header.values())


def test_the_meta_alone(path, tmp_path):
    checkpoint.save(path, {"a": torch.zeros(1000)}, {"epoch": 3})
    assert checkpoint.load_meta(path) == {"epoch": 3}
    for meta in ("[3]", "{"):
        header = {"format": "engine-checkpoint", "version": "1", "state": "{}", "meta": meta, "checksum": "0"}
        save_file({"a": torch.zeros(3)}, path, metadata=header)
        with pytest.raises(CheckpointError, match="a damaged header"):
            checkpoint.load_meta(path)
        with pytest.raises(CheckpointError, match="do not match their checksum"):
            checkpoint.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load_meta(tmp_path / "none.safetensors")


def test_a_state_of_another_form_is_named(path):
    said = r"run: found a state of another form \(KeyError: 'model'\)"
    with pytest.raises(CheckpointError, match=said), checkpoint.taken_apart("run"):
        raise KeyError("model")
    for state in ([], {"a": 1}, {"0.weight": torch.zeros(4, 3, dtype=torch.complex64)}):
        with pytest.raises(CheckpointError, match="best: found something else than a state; expected real tensors"):
            checkpoint.compare(small_model(), state, "best")


def test_header_is_plain_json(path):
    checkpoint.save(path, {"a": torch.zeros(1)}, {"epoch": 1})
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        header = opened.metadata()
    assert header["format"] == "engine-checkpoint"
    assert json.loads(header["meta"]) == {"epoch": 1}
