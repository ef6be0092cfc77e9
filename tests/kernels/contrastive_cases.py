"""Cases of the contrastive losses that the tests share: on the CPU, in the interpreter, and for the page's table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels import infonce, siglip
from tests.kernels.mi_cases import draw

Function = Callable[..., Tensor]

QUEUE, OWN, CLASSES = 11, 3, 3

# What the options are made of: rows and keys -> tensors.
_BUILD: dict[str, Callable[[int, int], Tensor]] = {
    "labels": lambda rows, keys: torch.arange(rows) * 7 % CLASSES,
    "key_labels": lambda rows, keys: torch.arange(keys) * 5 % CLASSES,
    "row_ids": lambda rows, keys: torch.arange(rows) * 3 % 5 + (1 << 40),
    "key_ids": lambda rows, keys: torch.arange(keys) % 5 + (1 << 40),
    "mask": lambda rows, keys: torch.arange(rows * keys).view(rows, keys) * 7 % 11 < 4,
    "positives": lambda rows, keys: (torch.arange(rows) + keys // 2) % keys,
}


def _several(rows: int, keys: int) -> Tensor:
    """Some rows have four positives, one of them twice, some have fewer."""
    first = torch.arange(rows)[:, None]
    found = (first + torch.tensor([1, 1, keys // 2, keys - 1])) % keys
    found[first[:, 0] % 3 == 0, 2:] = -1
    return found


# name -> (what is given beside q and k, options). "queue": negatives [M', d]; "own": negatives [B, n, d].
INFONCE: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "labels": (("labels",), {}),
    "labels of one set of samples": (("labels",), {"exclude_self": True}),
    "labels, symmetric": (("labels",), {"symmetric": True}),
    "labels and a queue": (("labels", "key_labels", "queue"), {}),
    "several positives": (("several",), {}),
    "several positives and a queue": (("several", "queue"), {"exclude_self": True}),
    "queue alone": (("queue",), {"in_batch": False}),
    "queue alone, ids": (("queue", "row_ids", "key_ids"), {"in_batch": False}),
    "own negatives, mask": (("own", "mask"), {}),
    "own negatives and the batch": (("own",), {"in_batch": True}),
    "own negatives, labels, hard": (("own", "labels"), {"in_batch": True, "hardness": 0.5}),
    "ids": (("row_ids",), {}),
    "ids, symmetric": (("row_ids", "key_ids"), {"symmetric": True}),
    "mask": (("mask",), {}),
    "mask and ids": (("mask", "row_ids"), {"cosine": True}),
    "decoupled": ((), {"decoupled": True}),
    "decoupled, one set of samples": (("positives",), {"exclude_self": True, "decoupled": True}),
    "decoupled, labels": (("labels",), {"decoupled": True}),
    "hard": ((), {"hardness": 0.8}),
    "hard, labels, decoupled": (("labels",), {"hardness": 0.8, "decoupled": True}),
    "smooth": ((), {"label_smoothing": 0.1}),
    "smooth, labels, mask": (("labels", "mask"), {"label_smoothing": 0.2}),
    "smooth, own negatives": (("own",), {"label_smoothing": 0.2, "in_batch": True}),
}  # fmt: skip

SIGLIP: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "siglip": ((), {}),
    "siglip, labels": (("labels",), {"exclude_self": True}),
    "siglip, queue and mask": (("queue", "mask"), {}),
    "siglip, several positives": (("several",), {}),
}

NAMES = (*INFONCE, *SIGLIP)


def contrastive_case(
    name: str, rows: int, width: int, reduction: str = "mean", wrap: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> tuple[Function, dict[str, Tensor]]:
    """Function and fp64 inputs of a case: scores of order 3. `wrap` is applied to labels, ids, masks and positives."""
    given, options = (INFONCE | SIGLIP)[name]
    scale = (9 / width) ** 0.25
    inputs = {
        "q": draw((rows, width), 0, scale),
        "k": draw((rows, width), 1, scale),
        "temperature": torch.tensor(0.7, dtype=torch.float64),
    }
    keys = rows
    if "queue" in given:
        inputs["negatives"] = draw((QUEUE, width), 2, scale)
        keys = QUEUE if options.get("in_batch") is False else rows + QUEUE
    if "own" in given:
        inputs["negatives"] = draw((rows, OWN, width), 2, scale)
        keys = rows if options.get("in_batch") else 0
    if name in SIGLIP:
        inputs["bias"] = torch.tensor(-0.5, dtype=torch.float64)
    columns = keys + OWN if "own" in given else keys
    made = {n: build(rows, columns if n == "mask" else keys) for n, build in _BUILD.items() if n in given}
    if "several" in given:
        made["positives"] = _several(rows, keys)
    made = {key: wrap(tensor) for key, tensor in made.items()}
    function = siglip if name in SIGLIP else infonce
    return (lambda **tensors: function(**tensors, reduction=reduction, **made, **options)), inputs
