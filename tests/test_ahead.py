"""What a GPU needs first is begun on a thread, and nothing depends on it."""

import threading

import pytest
import torch

from engine.training import ahead


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU. What is asked of it."""
    asked = []
    monkeypatch.setattr(ahead, "_begun", threading.Event())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: asked.append((device, threading.current_thread().name)))
    return asked


@pytest.mark.parametrize(("device", "asked_for"), [("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")])
def test_it_begins_once_on_the_runs_device(gpu, device, asked_for):
    thread = ahead.begin_ahead(device)
    assert ahead.begin_ahead(device) is None
    thread.join(600)
    assert not thread.is_alive() and gpu == [(asked_for, "engine-ahead")]


def test_not_for_other_devices_nor_for_ranks_nor_without_a_gpu(gpu, monkeypatch):
    assert ahead.begin_ahead("cpu") is None and ahead.begin_ahead("mps") is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ahead.begin_ahead("cuda") is None
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ahead.begin_ahead("auto") is None and gpu == []


def test_a_gpu_that_cannot_be_used_is_left_to_its_first_use(gpu, monkeypatch):
    def broken(*size, device):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "empty", broken)
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    ahead.begin_ahead("cuda").join(600)
    assert not failed
