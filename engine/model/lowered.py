"""Parameters in autocast's type, all cast at once, and copies of them that are kept.

Autocast casts each weight of each Linear separately in every forward pass, and casts its gradient again. `lower` casts
all of them in one foreach operation each way. The cast is part of the forward pass, so it always sees current values.

Within `Copies.used`, `lower` takes kept copies instead. They must never be older than their weights:

    Whenever code begins to run within `used`, each copy is the cast of its weight as it is then, and stays so until the
    forward pass has read it.

`engine.step.static` is the one place that uses copies, and keeps this by three rules:

- All copies are cast anew at the start of each pass, which sees whatever happened outside of one: loading a state,
  averaged weights, another step on the same model, writes to `p.data`. In a pass none are used where a callback or a
  loader runs between two batches that is a user's own.
- Within `used` only `engine.step.updates` changes weights, and it writes their copies: in the one pass that moves the
  weights, or by a cast behind the optimiser's own step. A step that the loss scaler leaves out changes neither.
- A step keeps no copies where other code might change weights within a stage: in the model, in an optimiser, in a hook
  (`engine.step.known_code`). Where a parameter was replaced, has moved or was frozen, the copies are forgotten together
  with the graphs that read them.

Nothing asks whether a copy is current. Neither the replay of a CUDA graph nor a write to `p.data` changes a parameter's
version.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from engine.kernels.gradients import differentiable_once
from engine.kernels.registry import backend_for

LOW = (torch.float16, torch.bfloat16)

Group = tuple[Tensor, ...]


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The 16-bit type in which autocast multiplies on `device` now. None where autocast is off or of another type."""
    if not torch.is_autocast_enabled(device.type):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if dtype in LOW else None


def lower(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Each group's tensors end to end along axis 0, in `dtype`, differentiable. One foreach operation copies all.

    A group of one tensor that already has the type is that tensor itself. As with autocast, gradients are formed in
    `dtype` and then cast to the tensors' own type, by one foreach operation. Within `Copies.used` nothing is copied
    that is kept.

    Args:
        groups: tensors that differ at most in axis 0: the weights of query, key and value, which one product then
            multiplies, or single weights.
    """
    groups = [tuple(group) for group in groups]
    copied = [i for i, g in enumerate(groups) if len(g) > 1 or g[0].dtype != dtype]
    frozen = [i for i in copied if not any(t.requires_grad for t in groups[i])]
    moving = [i for i in copied if any(t.requires_grad for t in groups[i])]
    copies: dict[int, Tensor] = {}
    if frozen:
        of_frozen = [groups[i] for i in frozen]
        copies |= zip(frozen, _wholes(of_frozen, dtype, _kept(of_frozen, dtype)), strict=True)
    if moving and backend_for(groups[moving[0]][0]) == "reference":
        copies |= {i: torch.cat(groups[i]).to(dtype) for i in moving}
    elif moving:
        of_moving = [groups[i] for i in moving]
        sizes, kept = [len(g) for g in of_moving], _kept(of_moving, dtype)
        copies |= zip(moving, _Lower.apply(dtype, sizes, kept, *(t for g in of_moving for t in g)), strict=True)
    return [copies.get(i, g[0]) for i, g in enumerate(groups)]


class Copies:
    """Copies in a 16-bit type that stay in place. See the module's text for when they may be used.

    `lower` notes what it was asked for and did not have, and `make` makes copies of it. Kept are whole float32
    parameters that belong to one group. Tensors that a forward pass computes are others each time: they are not noted.

    >>> weight = torch.nn.Parameter(torch.ones(2, 2))
    >>> copies = Copies(torch.bfloat16)
    >>> with copies.used():
    ...     cast = lower([(weight,)], torch.bfloat16)[0]
    >>> copies.make(), copies.of(weight).dtype
    (True, torch.bfloat16)
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.forget()

    def forget(self) -> None:
        """Forget all copies."""
        # by the ids of a group's tensors, which the group keeps alive
        self._wholes: dict[tuple[int, ...], tuple[Group, Tensor | None]] = {}
        self._asked: list[Group] = []
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}  # by a weight's id: the weight and its copy

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within the context this thread's `lower` takes these copies, and updates have to write them."""
        token = _used.set(self)
        try:
            yield
        finally:
            _used.reset(token)

    def take(self, group: Group) -> Tensor | None:
        """The group's copy; None where there is none, which is noted."""
        key = tuple(map(id, group))
        if key not in self._wholes:
            if not all(isinstance(weight, torch.nn.Parameter) for weight in group):
                return None
            self._wholes[key] = group, None
            self._asked.append(group)
        return self._wholes[key][1]

    def of(self, weight: Tensor) -> Tensor | None:
        """The copy of one weight, of its shape; None for none."""
        return self._parts.get(id(weight), (weight, None))[1]

    def make(self) -> bool:
        """Make copies of what `lower` has asked for since the last call. Returns whether there are new ones."""
        if not self._asked:
            return False
        asked, self._asked = self._asked, []
        made = False
        with torch.inference_mode(False), torch.no_grad():  # they outlive the caller's inference mode
            for group in asked:
                ids = {*map(id, group)}
                if len(ids) < len(group) or ids & self._parts.keys() or not all(map(_is_plain, group)):
                    continue
                whole, parts = _room(group, self.dtype)
                self._wholes[tuple(map(id, group))] = group, whole
                self._parts |= {id(weight): (weight, part) for weight, part in zip(group, parts, strict=True)}
                made = True
        if made:
            self.refresh()
        return made

    @torch.no_grad()
    def refresh(self, weights: Iterable[Tensor] | None = None) -> None:
        """Cast anew: everything, or the copies of these weights. One launch."""
        if weights is None:
            pairs = [*self._parts.values()]
        else:
            pairs = [self._parts[id(weight)] for weight in weights if id(weight) in self._parts]
        if pairs:
            torch._foreach_copy_([copy for _, copy in pairs], [weight for weight, _ in pairs])


_used: ContextVar[Copies | None] = ContextVar("copies of weights", default=None)


def in_use() -> Copies | None:
    """The copies that `lower` takes now, and that updates have to write; None for none."""
    return None if torch.compiler.is_compiling() else _used.get()


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is torch.nn.Parameter and weight.dtype == torch.float32 and weight.is_contiguous()


def _kept(groups: Sequence[Group], dtype: torch.dtype) -> list[Tensor | None] | None:
    """The kept copy of each group, or None for all."""
    copies = in_use()
    return None if copies is None or copies.dtype != dtype else [copies.take(g) for g in groups]


def _wholes(groups: Sequence[Group], dtype: torch.dtype, kept: Sequence[Tensor | None] | None) -> list[Tensor]:
    """Each group's tensors end to end: what is kept, and the others, all copied at once."""
    found = [None] * len(groups) if kept is None else [None if whole is None else whole.detach() for whole in kept]
    missing = [i for i, whole in enumerate(found) if whole is None]
    parts: list[Tensor] = []
    for i in missing:
        found[i], own = _room(groups[i], dtype)
        parts += own
    if missing:
        torch._foreach_copy_(parts, [t.detach() for i in missing for t in groups[i]])
    return found


def _room(group: Group, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
    """Memory for a group's tensors end to end, whole and in parts."""
    whole = group[0].new_empty((sum(t.shape[0] for t in group), *group[0].shape[1:]), dtype=dtype)
    return whole, whole.split([t.shape[0] for t in group])


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, sizes, kept, *tensors):
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.types = sizes, [t.dtype for t in tensors]
        ctx.lengths = [t.shape[0] for t in tensors]
        left = iter(tensors)
        return tuple(_wholes([tuple(next(left) for _ in range(size)) for size in sizes], dtype, kept))

    @staticmethod
    @differentiable_once("the cast of parameters for autocast")
    def backward(ctx, *grads):
        lengths, parts = iter(ctx.lengths), []
        for size, grad in zip(ctx.sizes, grads, strict=True):
            own = [next(lengths) for _ in range(size)]
            parts += [None] * size if grad is None else grad.split(own)
        wanted = [i for i, part in enumerate(parts) if part is not None and ctx.needs_input_grad[3 + i]]
        result = [None] * len(parts)
        for i in wanted:
            result[i] = torch.empty_like(parts[i], dtype=ctx.types[i], memory_format=torch.contiguous_format)
        if wanted:
            torch._foreach_copy_([result[i] for i in wanted], [parts[i] for i in wanted])
        return None, None, None, *result
