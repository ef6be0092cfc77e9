"""Prepares a GPU on a thread while code and data are loaded."""

from __future__ import annotations

import contextlib
import threading

from engine.torchrun import torchrun_shard

_begun = threading.Event()


def begin_ahead(device: str) -> threading.Thread | None:
    """On a thread, make a GPU's context and let Triton hash its own files. This takes about a second.

    Nothing depends on it: what the thread has not done, or could not do, is done where it is needed. It begins once in
    a process, and not under torchrun, where each rank first chooses its device.

    Args:
        device: as in a run's settings.

    Returns:
        The thread; None where nothing was begun.
    """
    if _begun.is_set() or torchrun_shard()[1] > 1 or not (device == "auto" or device.startswith("cuda")):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    _begun.set()
    thread = threading.Thread(target=_begin, args=("cuda" if device == "auto" else device,), name="engine-ahead")
    thread.start()
    return thread


def _begin(device: str) -> None:
    with contextlib.suppress(Exception):  # the first real use of the device says what is wrong with it
        import torch

        torch.empty(1, device=device)
    with contextlib.suppress(Exception):  # not all versions have it there, and there may be no triton
        from triton.runtime.cache import triton_key

        triton_key()  # a hash of all of triton, a part of every compiled kernel's name, which triton keeps
