"""What train.amp means on a machine."""

import pytest
import torch

from engine import precision
from engine.errors import ConfigError
from engine.precision import autocast_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("fast, expected", [(True, torch.bfloat16), (False, None)])
def test_auto_on_a_cpu_asks_the_processor(monkeypatch, fast, expected):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: fast)
    assert autocast_dtype("auto", CPU) == expected
    assert autocast_dtype("off", CPU) is None


def test_bf16_by_name_on_a_cpu_without_units_warns(monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    with pytest.warns(UserWarning, match="no bf16 units"):
        assert autocast_dtype("bf16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"train\.amp: found fp16 on a CPU|fp16 on a CPU"):
        autocast_dtype("fp16", CPU)


@pytest.mark.parametrize(
    "capability, auto", [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), None)]
)
def test_auto_on_a_gpu_goes_by_its_capability(monkeypatch, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype("auto", CUDA) == auto
    assert autocast_dtype("fp16", CUDA) == torch.float16
    if capability < (8, 0):
        with pytest.raises(ConfigError, match=r"compute capability"):
            autocast_dtype("bf16", CUDA)


def test_this_processor_can_be_asked():
    assert precision.cpu_multiplies_bf16() in (True, False)
