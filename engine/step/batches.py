"""Batches as other people's loops have them, read into the parts that a training step needs.

A batch may be an `engine.loaders.batch.Batch`, a tuple `(inputs, target, index)` of which the last parts may be
missing, a dict, or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from engine.errors import ConfigError, DataError
from engine.loaders.batch import Batch

TARGETS = ("y", "label", "labels", "target")
"""The keys of a dict batch that hold its target. It has at most one of them."""

Target = Tensor | dict[str, Tensor] | None


class KeywordInputs(dict):
    """The inputs of a dict batch. The model receives them as keyword arguments."""


pytree.register_pytree_node(
    KeywordInputs,
    lambda inputs: (list(inputs.values()), list(inputs)),
    lambda values, names: KeywordInputs(zip(names, values, strict=True)),
    serialized_type_name="engine.step.batches.KeywordInputs",
)


class ReadBatch(NamedTuple):
    """A batch in parts. `index` int64 [B] is None where the loader gives none; so is `target`."""

    inputs: Any
    target: Target
    index: Tensor | None
    rows: int

    def to(self, device: torch.device | None) -> ReadBatch:
        """The same on `device`; None leaves it where it is."""
        if device is None:
            return self
        if isinstance(self.inputs, Batch):
            batch = self.inputs if self.inputs.index.device == device else self.inputs.to(device)
            return ReadBatch(batch, batch.label, batch.index, self.rows)
        inputs, target, index = (_moved(part, device) for part in self[:3])
        return ReadBatch(inputs, target, index, self.rows)


def read_batch(item: Any, *, pass_target: bool = False) -> ReadBatch:
    """The parts of one batch of any loader.

    - A tuple or list is `(inputs, target, index)`, `(inputs, target)` or `(inputs,)`. A tensor is inputs alone.
    - A dict holds its target under one of `TARGETS` and the samples' row numbers under "index", both optional. All
      other entries are inputs.

    Args:
        item: the batch.
        pass_target: a dict's target stays among the inputs too, for a model that computes its own loss.

    Raises:
        DataError: the batch is none of these, or its parts have different numbers of rows.

    >>> batch = read_batch({"x": torch.ones(4, 2), "y": torch.zeros(4), "index": torch.arange(4)})
    >>> list(batch.inputs), batch.rows
    (['x'], 4)
    """
    if isinstance(item, Batch):
        return ReadBatch(item, item.label, item.index, len(item))
    if isinstance(item, Mapping):
        inputs, target, index = _parts_of_dict(item, pass_target)
    elif isinstance(item, Tensor):
        inputs, target, index = item, None, None
    elif isinstance(item, (tuple, list)) and 1 <= len(item) <= 3:
        inputs, target, index = (*item, None, None)[:3]
    else:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise DataError(
            "a batch of the loader", f"a {type(item).__name__}{size}",
            "(inputs, target, index), a dict, a tensor or an engine Batch", "Wrap the loader, or give it a collate_fn.",
        )  # fmt: skip
    target = dict(target) if isinstance(target, Mapping) else target
    if isinstance(inputs, Mapping) and not isinstance(inputs, dict):  # such as a BatchEncoding
        inputs = dict(inputs)
    return ReadBatch(inputs, target, index, _rows(inputs, target, index))


def _parts_of_dict(item: Mapping[str, Any], pass_target: bool) -> tuple[KeywordInputs, Any, Any]:
    named = [key for key in TARGETS if key in item]
    if len(named) > 1:
        raise DataError(
            "a batch of the loader", f"the keys {' and '.join(named)}", f"one target, under one of {list(TARGETS)}",
            "Put several targets into one dict under one of these keys.",
        )  # fmt: skip
    left_out = {"index", *(() if pass_target else named)}
    inputs = KeywordInputs({key: value for key, value in item.items() if key not in left_out})
    return inputs, item[named[0]] if named else None, item.get("index")


def _rows(inputs: Any, target: Any, index: Any) -> int:
    """The number of a batch's rows, on which its parts must agree."""
    if not (target is None or isinstance(target, Tensor) or all_tensors(target)):
        raise DataError(
            "a batch's target", f"a {type(target).__name__}", "a tensor, a dict of tensors, or None",
            "Convert it, for example with torch.as_tensor in the collate_fn.",
        )  # fmt: skip
    if index is not None and not (isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1):
        found = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else f"a {type(index).__name__}"
        raise DataError(
            "a batch's index", found, "int64 [B], the samples' rows in the training set", "Yield row numbers there."
        )
    counted = (
        {"target": target} if isinstance(target, Tensor) else {f"target {k!r}": v for k, v in (target or {}).items()}
    )
    counted |= {} if index is None else {"index": index}
    counted = counted or {"inputs": next((x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)), None)}
    sizes = {name: len(t) if isinstance(t, Tensor) and t.dim() > 0 else None for name, t in counted.items()}
    if len(set(sizes.values())) > 1 or None in sizes.values():
        raise DataError(
            "a batch of the loader", " and ".join(f"{n} of {'no' if s is None else s} rows" for n, s in sizes.items()),
            "one number of rows in all parts", "Check the collate_fn.",
        )  # fmt: skip
    rows = next(iter(sizes.values()))
    if rows == 0:
        raise DataError("a batch of the loader", "no rows", "one or more", "Leave empty batches out.")
    return rows


def all_tensors(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor):
        return part if part.device == device else part.to(device, non_blocking=True)
    return pytree.tree_map(lambda leaf: _moved(leaf, device) if isinstance(leaf, Tensor) else leaf, part)


def rows_of(target: Target, features: Mapping[str, Tensor], prediction: Any = None, inputs: Any = None) -> int:
    """The number of rows of a batch, from the first of these that holds a tensor; 1 where none does."""
    tensors = (x for x in pytree.tree_leaves((target, features, prediction, inputs)) if isinstance(x, Tensor))
    return next((len(x) for x in tensors if x.dim() > 0), 1)


def check_index(batch: ReadBatch, size: int) -> None:
    """Raise DataError for an index that is missing, or that names no row of a bank of `size` rows.

    An index on a GPU is not read, because the host would have to wait for it.
    """
    index = batch.index
    if index is None:
        raise DataError(
            "a batch of the loader", "no index", "the samples' rows in the training set, which the feature bank needs",
            'Yield (inputs, target, index), or a dict with "index": engine.step.batches.Numbered(dataset) adds it.',
        )  # fmt: skip
    if isinstance(batch.inputs, Batch) or index.device.type != "cpu" or len(index) == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= size:
        raise DataError(
            "a batch's index", f"rows {low} to {high}", f"rows from 0 to {size - 1}, as size={size} says",
            "Pass the number of samples of the whole training set as size.",
        )  # fmt: skip


def whole_batches(batches: Iterable[ReadBatch]) -> Iterator[Batch | tuple[Any, Tensor, Tensor]]:
    """Batches as a static step copies them. Raises ConfigError for one without a target tensor or index."""
    for inputs, target, index, _ in batches:
        if not isinstance(target, Tensor) or index is None:
            raise ConfigError(
                "a static step's batch", "no index" if index is None else f"a target of type {type(target).__name__}",
                "a target tensor and an index", "Give both, or use graphs off.",
            )  # fmt: skip
        yield inputs if isinstance(inputs, Batch) else (inputs, target, index)


class Numbered(torch.utils.data.Dataset):
    """A dataset whose items also tell their row number.

    Args:
        dataset: with a length, of items `(inputs, target)` or dicts.

    >>> Numbered([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)
    >>> Numbered([{"x": 3}])[0]
    {'x': 3, 'index': 0}
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        item = self.dataset[row]
        if isinstance(item, Mapping):
            return {**item, "index": row}
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return (*item, row)
        raise DataError(
            f"row {row} of the dataset", f"a {type(item).__name__}", "(inputs, target) or a dict",
            "Add the row number in the dataset itself.",
        )  # fmt: skip


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` of a tensor, of every tensor of a dict, or of nothing where the value is None."""
    if isinstance(value, dict):
        return {name: function(part) for name, part in value.items()}
    return None if value is None else function(value)


def joined(parts: list[Any]) -> Any:
    """Tensors, dicts of tensors or Nones of several batches as one, in their order."""
    if not parts or parts[0] is None:
        return None
    if isinstance(parts[0], Mapping):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(parts)
