"""Kernels compiled side by side: into the cache, as launches will ask for them, and without stopping for a failure."""

import contextlib
import importlib.util
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels import registry, warm, warm_up
from engine.kernels.registry import interpreting
from tests.warned import user_warnings

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or interpreting(), reason="needs triton's compiler"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns where it is unset
    return tmp_path / "cache"


@pytest.fixture
def gpu_of_hopper(monkeypatch):
    """What triton asks of a GPU's driver before it launches a kernel; nothing can be launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    absent = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(type(driver), "active", property(lambda self: absent))


def pad_frames():
    """Launch the padding kernel for frames in fp32 and in fp16: two kernels to compile."""
    from engine.kernels.ragged import triton as ragged

    offsets, rows, lengths = torch.tensor([0, 2, 6]), torch.tensor([1, 0]), torch.empty(2, dtype=torch.int64)
    for dtype in (torch.float32, torch.float16):
        arguments = (torch.arange(6).to(dtype), offsets, rows, torch.empty(2, 4), lengths, 4, 1, 0, -1)
        ragged.pad_kernel[(2, 1)](*arguments, **ragged._blocks(1), num_warps=ragged.WARPS)


@needs_compiler
def test_several_threads_fill_the_cache(cache, gpu_of_hopper):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warm_up(pad_frames, workers=3) == 2
    assert len(list(cache.rglob("*.cubin"))) == 2


def test_a_kernel_that_cannot_be_compiled_costs_a_warning():
    def broken():
        raise ValueError("no\nsuch type")

    jobs = [("ragged.broken", broken), ("ragged.pad", int)]
    with pytest.warns(
        UserWarning, match=r"^1 of 2 Triton kernels could not .* first ragged\.broken: no such type"
    ) as w:
        assert warm.compile_all(jobs, workers=2) == 1
    (line,) = user_warnings(w)
    assert "\n" not in line


@needs_compiler
def test_what_is_recorded_is_what_a_launch_needs(cache, gpu_of_hopper):
    from triton import knobs

    from engine.kernels.ragged import triton as ragged

    values, offsets, rows = torch.arange(6, dtype=torch.int32), torch.tensor([0, 2, 6]), torch.tensor([1, 0])
    out, lengths = torch.empty(2, 4, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    blocks = {**ragged._blocks(1), "num_warps": ragged.WARPS}
    arguments = (values, offsets, rows, out, lengths, 4, 1, 0, -1)

    def run():
        for _ in range(2):
            ragged.pad_kernel[(2, 1)](*arguments, **blocks)

    with warm.recording() as jobs:
        run()
    assert len(jobs) == 1 and not cache.exists(), "nothing was compiled or launched"
    assert warm_up(run) == 1
    assert len(list(cache.rglob("*.cubin"))) == 1
    asked = []
    knobs.runtime.jit_cache_hook = lambda **named: asked.append(named)
    try:
        assert ragged.pad_kernel.warmup(*arguments, grid=(2, 1), **blocks).asm["cubin"]
    finally:
        knobs.runtime.jit_cache_hook = None
    assert asked == [], "a launch finds it"


def stacks():
    """Constants of these kernels are tuples, which become lists in what is recorded."""
    from engine.kernels.stacked import triton as stacked

    x, valid = [torch.ones(2, 5, 16), torch.ones(2, 7, 16)], [torch.tensor([3, 2]), torch.ones(2, 7, dtype=torch.bool)]
    settings = [True, False], [0.1, 0.0], [0.0, 0.2], torch.tensor([7])
    cube, means = stacked.stack_sequences(x[0], x[1:], valid, 6, *settings)
    stacked.stack_sequences_backward(cube, means, valid, [5, 7], *settings, [0, 0])


def updates():
    """Optional tensors and numbers that are infinite."""
    from engine.kernels.update import Settings, Table
    from engine.kernels.update import triton as update
    from engine.kernels.update.reference import Weight

    weights = [Weight(torch.ones(9), torch.zeros(9), torch.zeros(9), torch.zeros(()), None, 0) for _ in range(2)]
    table = Table(weights, [Settings()])
    where, aligned = table.gradients([torch.ones(9)] * 2)
    stats = update.inspect(table.sizes, table.blocks, where, aligned, math.inf, None)
    every = (table.addresses, table.sizes, table.blocks, table.group, table.settings, where, aligned, torch.ones(1))
    update.move(*every, math.inf, 1.0, stats, None, None, None, None)


@needs_compiler
@pytest.mark.parametrize("run, kernels", [(stacks, 2), (updates, 4)])
def test_launches_of_the_newest_kernels_find_what_was_compiled_beforehand(
    cache, gpu_of_hopper, monkeypatch, run, kernels
):
    """With other constants than a launch has, each would be compiled once more, and perhaps within a capture."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warm_up(run, workers=2) == kernels
    original, asked, found = JITFunction.run, [], []

    def look(self, *args, grid, warmup, **rest):
        found.append(original(self, *args, grid=grid, warmup=True, **rest))

    monkeypatch.setattr(JITFunction, "run", look)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **named: asked.append(named))
    run()
    assert len(found) == kernels and not asked and all(kernel.asm["cubin"] for kernel in found)


def test_results_are_zeros_while_kernels_are_recorded(monkeypatch):
    def run(tensor):
        return torch.full((2,), 7.0), torch.full((1,), 7)

    schema = "(Tensor a) -> (Tensor, Tensor)"
    registry.register("test_warm_sevens", schema, cpu=run, cuda=run, fake=run)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with registry.blank_results():
        assert all(not result.any() for result in registry.call("test_warm_sevens", torch.ones(1)))
    assert all(result.all() for result in registry.call("test_warm_sevens", torch.ones(1)))


def test_results_in_a_list_are_zeros_too(monkeypatch):
    def run(tensor):
        return torch.full((2,), 7.0), [torch.full((1,), 7), torch.full((3,), 7)]

    registry.register("test_warm_lists", "(Tensor a) -> (Tensor, Tensor[])", cpu=run, cuda=run, fake=run)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with registry.blank_results():
        one, more = registry.call("test_warm_lists", torch.ones(1))
    assert len(more) == 2 and not any(result.any() for result in (one, *more))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(warm, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="no triton"):
        warm_up(int)


def test_nothing_to_compile():
    assert warm.compile_all([]) == 0
    assert warm.compile_all([("one", int), ("two", int)], workers=2) == 2
