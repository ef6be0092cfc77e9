"""Product rows of a whole epoch: queries, keys and neighbours of all batches at once, then one launch per batch.

    epoch = draw_epoch(sampler, terms, [32] * 40 + [4], generator)  # at the epoch's beginning
    rows = epoch.take(number)                                       # batch `number`: {"I(T;A|C)": (x, y, z), ...}
    rows = epoch.take(counter, 32)                                  # the same within a captured CUDA graph

The rows are those that `ProductSampler.draw` would find for the same queries and keys. The bank does not change within
an epoch, so its neighbours need not be searched anew for every batch: where an epoch asks for many, each row's nearest
rows are listed once, and a draw skips its queries in the lists. A list that runs out, or ends within a tie, is not
trusted: its draw is searched as before. Finding these draws makes the host wait once per condition. The check that a
condition is finite may wait, too. Nothing waits after that.

Kept are 8·(1 + k) bytes per query and draw, and a copy of the features that terms use. At the epoch's beginning the
lists take 16 bytes per entry, and working memory is bounded by SLICE and QUERIES: about 200 MB on a GPU, less on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.knn_product import reference
from engine.kernels.knn_product.op import KEYS, ProductRows, ProductSampler, Space, check_bank, check_terms
from engine.kernels.knn_product.reference import Piece
from engine.kernels.registry import backend_for, call

SLICE = 1 << 26  # draws of one slice, times the bank's rows
QUERIES = 1 << 14  # queries of one slice
DRAWN = 1 << 22  # random numbers drawn at a time
ALIGN = 8  # elements: a piece begins at a multiple of 16 bytes or more
TILE = 32  # queries that the GPU's search works on together: a draw of fewer costs as much
LISTING = 1 << 24  # distances that a GPU finds while the host launches what lists need beside them, and waits once


# -- one batch's rows -------------------------------------------------------------------------------------------------


class EpochProducts:
    """Product rows of every batch of an epoch. Made by `draw_epoch`.

    All tensors keep their addresses while the object lives, so that a CUDA graph may read them.

    Args:
        bank: features of N samples, [N, ...] each, on one device.
        terms: with the attributes x, y and given, names of features.
        draws: for every term the number of its draw, in [0, T).
        query: int64 [steps, T, M], M that of the largest batch; a smaller one uses the first m of them.
        neighbour: int64 [steps, T, M, k].
        batch_sizes: of the epoch's batches.

    Attributes:
        query, neighbour, batch_sizes: as given.
        features: [N, width], all features that the terms use, next to each other.
    """

    def __init__(
        self, bank: Mapping[str, Tensor], terms: Sequence[Any], draws: Sequence[int], query: Tensor, neighbour: Tensor,
        batch_sizes: Sequence[int],
    ):  # fmt: skip
        self.query, self.neighbour, self.batch_sizes = query, neighbour, list(batch_sizes)
        self.k = neighbour.shape[3]
        names = list(dict.fromkeys(name for t in terms for name in (t.x, t.y, t.given)))
        self.features = _concatenated([bank[name] for name in names])
        self._shapes = {name: (bank[name].shape[1:], bank[name].dtype) for name in names}
        self._pieces, self._places, self._size = self._layout(terms, draws)
        numbers = [[p.draw, p.column, p.width, p.offset, p.near] for p in self._pieces]
        self._plan = _send(torch.tensor(numbers, dtype=torch.int64).reshape(-1, 5), query.device)
        self._counters = torch.arange(len(self.batch_sizes), device=query.device)

    def _layout(self, terms: Sequence[Any], draws: Sequence[int]) -> tuple[list[Piece], dict[str, list], int]:
        """The pieces, each term's (feature, piece) for x, y and z, and the buffer's elements a query."""
        columns, at = {}, 0
        for name, (shape, _) in self._shapes.items():
            columns[name] = at, shape.numel()
            at += shape.numel()
        pieces: dict[tuple, Piece] = {}
        places: dict[str, list] = {}
        size = 0
        for term, draw in zip(terms, draws, strict=True):
            places[str(term)] = []
            for name, near in ((term.x, True), (term.y, False), (term.given, False)):
                key = draw, name, near
                if key not in pieces:
                    column, width = columns[name]
                    pieces[key] = Piece(draw, column, width, size, near)
                    size += -(-width * (self.k if near else 1) // ALIGN) * ALIGN
                places[str(term)].append((name, pieces[key]))
        return list(pieces.values()), places, size

    def take(self, number: int | Tensor, size: int | None = None) -> dict[str, ProductRows]:
        """The rows of batch `number`, as `ProductSampler.draw` gives them. Nothing waits for a device.

        Args:
            number: The batch's place in `batch_sizes`. Or the same as an int64 0-d tensor on the device, which is read
                when the rows are taken, so that a replayed CUDA graph takes the batch that it names then. A GPU does
                not check that it is in [0, steps), and nothing checks that this batch has `size` rows.
            size: The batch's size. Required with a tensor.

        Returns:
            {str(term): rows}. Terms may share memory. Empty for a batch smaller than k.

        Raises:
            EstimatorError: No such batch, or a size that is not that batch's.
        """
        if isinstance(number, Tensor):
            known = self.batch_sizes
        else:
            known = self.batch_sizes[number : number + 1] if number >= 0 else []
            size = known[0] if size is None and known else size
        if size not in known:
            what = "a batch" if isinstance(number, Tensor) else f"batch {number}"
            raise EstimatorError(
                "EpochProducts.take", f"{what} of size {size}",
                f"one of this epoch's {len(self.batch_sizes)} batches, of sizes {sorted(set(self.batch_sizes))}",
                "Draw an epoch that has this batch.",
            )  # fmt: skip
        m = size // self.k
        if m == 0:
            return {}
        counter = number if isinstance(number, Tensor) else self._counters.select(0, number)
        flat = self._take(counter, m)
        return {
            term: ProductRows(*(self._view(flat, name, piece, m) for name, piece in three), self.k)
            for term, three in self._places.items()
        }

    def _take(self, counter: Tensor, m: int) -> Tensor:
        given = self.features, self.query, self.neighbour, counter
        if backend_for(self.features, "knn_take") == "reference":
            return reference.take(*given, self._pieces, m, m * self._size)
        return call("knn_take", *given, self._plan, m, m * self._size)

    def _view(self, flat: Tensor, name: str, piece: Piece, m: int) -> Tensor:
        rows, (shape, dtype) = m * self.k if piece.near else m, self._shapes[name]
        part = flat.narrow(0, piece.offset * m, rows * piece.width)
        return part.view(rows, *shape).to(dtype)

    def fits(self, other: EpochProducts) -> bool:
        """Whether `load` takes the other epoch."""
        return other._signature() == self._signature()

    @torch.no_grad()
    def load(self, other: EpochProducts) -> None:
        """Take over another epoch's draws and features in place, so that a captured graph reads them from now on.

        Raises:
            EstimatorError: The other epoch's terms, number of batches or shapes differ.
        """
        if not self.fits(other):
            raise EstimatorError(
                "EpochProducts.load", f"an epoch of {other._signature()}", f"{self._signature()}",
                "Load epochs of one objective, bank size and number of batches.",
            )  # fmt: skip
        for own, new in ((self.query, other.query), (self.neighbour, other.neighbour), (self.features, other.features)):
            own.copy_(new)
        self.batch_sizes = list(other.batch_sizes)

    def _signature(self) -> tuple:
        return (
            tuple(self.neighbour.shape), tuple(self.features.shape), self.features.dtype, self._shapes, self._places
        )  # fmt: skip


def _concatenated(features: Sequence[Tensor]) -> Tensor:
    """[N, ...] each, as one contiguous [N, sum of widths] of the widest of their types."""
    for value in features:
        if not value.is_floating_point():
            raise EstimatorError("bank", f"a feature of {value.dtype}", "floating-point features", "Convert it.")
    if not features:
        return torch.empty(0, 0)
    return torch.cat([value.detach().reshape(len(value), -1) for value in features], 1)


# -- the draws of an epoch --------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_epoch(
    sampler: ProductSampler, terms: Iterable[Any], batch_sizes: Sequence[int], generator: torch.Generator | None = None
) -> EpochProducts:
    """Draw the product rows of all batches of an epoch.

    Args:
        sampler: Says what is drawn from, and how.
        terms: Objects with the attributes x, y and given, which are names of features.
        batch_sizes: Joint rows of every batch; m = size // k queries are drawn for it, none if it is smaller than k.
        generator: Source of randomness. With one on the CPU the draws are the same on every device. With one on a GPU
            they are made there.

    Returns:
        The draws of all batches. `take(number)` gives the rows of one batch.

    Raises:
        EstimatorError: k is below 1, the bank is too small for a batch, a condition is not finite, or one of the
            sampler's `discrete` has several columns.

    Example:
        >>> from types import SimpleNamespace
        >>> from engine.kernels.knn_product import Bank
        >>> sampler = ProductSampler(Bank({name: torch.randn(50, 4) for name in "TAV"}), k=2)
        >>> epoch = draw_epoch(sampler, [SimpleNamespace(x="T", y="A", given="V")], batch_sizes=[20, 20, 10])
        >>> [part.shape[0] for part in epoch.take(2).popitem()[1]]
        [10, 10, 10]
    """
    k, bank, terms, sizes = sampler.k, sampler.bank, list(terms), [int(size) for size in batch_sizes]
    if k < 1:
        raise EstimatorError("objective.k_neighbor", f"k_neighbor {k}", "k_neighbor >= 1", "Raise it.")
    check_terms(terms, bank)
    groups: dict[str, list[Any]] = {}
    for term in terms:
        groups.setdefault(term.given, []).append(term)
    draw_of, parts, count = {}, {}, 0
    for given, members in groups.items():
        own = range(count, count + (1 if sampler.shared else len(members)))
        draw_of |= {str(term): own[0 if sampler.shared else i] for i, term in enumerate(members)}
        parts[given] = slice(own.start, own.stop)
        count = own.stop
    first = bank[terms[0].given] if terms else torch.empty(0)
    n, device, steps = len(first), first.device, len(sizes)
    most = max((size // k for size in sizes), default=0)
    query = torch.zeros(steps, count, most, dtype=torch.int64, device=device)
    neighbour = torch.zeros(steps, count, most, k, dtype=torch.int64, device=device)
    drawn = []
    for m in dict.fromkeys(size // k for size in sizes if size >= k) if terms else ():
        check_bank(n, m, k)
        alike = torch.tensor([step for step, size in enumerate(sizes) if size // k == m])
        drawn.append((m, _send(alike, device), *_queries_and_keys(n, len(alike) * count, m, generator, device)))
    for m, at, q, key in drawn:  # after all draws, which keep the host busy
        q, key = q.view(-1, count, m), key.view(-1, count, m)
        neighbours = torch.empty(*q.shape, k, dtype=torch.int64, device=device)
        for given, part in parts.items():
            flat = q[:, part].flatten(0, 1), key[:, part].flatten(0, 1)
            neighbours[:, part] = _neighbours(sampler, given, *flat).view(len(at), -1, m, k)
        query[:, :, :m].index_copy_(0, at, q)
        neighbour[:, :, :m].index_copy_(0, at, neighbours)
    return EpochProducts(bank, terms, [draw_of[str(term)] for term in terms], query, neighbour, sizes)


def _queries_and_keys(
    n: int, draws: int, m: int, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """m distinct of n rows for every draw, and a key for each: int64 [draws, m] both."""
    source = torch.device("cpu") if generator is None else generator.device
    few = 4 * m < n
    width = 2 * m + 64 if few else n
    parts = [
        _first_distinct(torch.randint(n, (len(part), width), generator=generator, device=source), m)
        if few
        else torch.rand(len(part), n, dtype=torch.float64, generator=generator, device=source).argsort(1)[:, :m]
        for part in torch.arange(draws).split(max(1, DRAWN // width))
    ]
    key = torch.randint(KEYS, (draws, m), generator=generator, device=source)
    return tuple(_send(torch.stack([torch.cat(parts), key]), device))


def _send(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device. The host does not wait until they are there."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _first_distinct(drawn: Tensor, m: int) -> Tensor:
    """The first m distinct numbers of each line of `drawn` [draws, 2·m + 64], in the order drawn.

    Of numbers uniform among more than 4·m, a line holds fewer than m distinct ones with probability below 1e-38.
    """
    ascending, place = torch.sort(drawn, dim=1, stable=True)
    repeated = torch.zeros_like(drawn, dtype=torch.bool)
    repeated[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    new = torch.ones_like(repeated).scatter_(1, place, ~repeated)
    number = (new.cumsum(1) - 1).clamp(max=m)
    chosen = drawn.new_empty(len(drawn), m + 1)  # the last column takes what is left over
    return chosen.scatter_(1, torch.where(new, number, m), drawn)[:, :m]


# -- neighbours -------------------------------------------------------------------------------------------------------


def _neighbours(sampler: ProductSampler, given: str, query: Tensor, key: Tensor) -> Tensor:
    """As `sampler.neighbours`, by the cheaper of two ways; int64 [draws, m] -> int64 [draws, m, k]."""
    n = len(sampler.bank[given])
    if not sampler.on_a_line(given):
        space = sampler.bank.space(given)
        if lists_pay(n, *query.shape, backend_for(space.z, "knn_nearest")):
            return from_lists(space, query, key, sampler.k)
    return _searched(lambda q, s: sampler.neighbours(given, q, s), n, query, key)


def lists_pay(n: int, draws: int, m: int, backend: str) -> bool:
    """Whether listing the whole bank's neighbours costs less than searching every draw.

    Both multiply queries with the bank. Lists have n queries, and more neighbours of each are looked for. On a CPU a
    list was measured to cost two to nine times as much as a search; for a GPU the ratio is modelled. There lists also
    take some fifty launches, during which the GPU mostly waits.
    """
    if backend == "triton":
        return (draws * max(m, TILE) - 2 * n) * n > LISTING
    return draws * m > 8 * n


def from_lists(space: Space, query: Tensor, key: Tensor, k: int) -> Tensor:
    """As `space.neighbours`, from lists of each row's nearest rows."""
    n = len(space.z)
    rows, distance = nearest_lists(space, min(n, 2 * k + 7))
    parts = [reference.select(rows, distance, *part, k) for part in _slices(n, query, key)]
    neighbours = torch.cat([part for part, _ in parts])
    undecided = torch.cat([part for _, part in parts]).nonzero()[:, 0]  # the host waits here
    if len(undecided):
        neighbours[undecided] = _searched(lambda q, s: space.neighbours(q, s, k), n, query[undecided], key[undecided])
    return neighbours


def nearest_lists(space: Space, length: int) -> tuple[Tensor, Tensor]:
    """The `length` rows nearest to each row of a bank, itself among them, and their squared distances.

    Returns:
        rows int64 [N, length], nearest first, of equals the lowest; distance float64 [N, length].
    """
    every = torch.arange(len(space.z), device=space.z.device)
    wide, rows, distance = reference.wide(space.z), [], []
    for part in every.split(min(QUERIES, max(1, DRAWN // (length * wide.shape[1])))):
        # one draw: on a CPU the search goes through many queries best
        near = space.neighbours(part[None], torch.zeros_like(part)[None], length, "first", isolate=False)[0]
        rows.append(near)
        distance.append((wide[near] - wide[part][:, None]).square().sum(-1))
    return torch.cat(rows), torch.cat(distance)


def _searched(search: Any, n: int, query: Tensor, key: Tensor) -> Tensor:
    return torch.cat([search(q, s) for q, s in _slices(n, query, key)])


def _slices(n: int, query: Tensor, key: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some draws at a time."""
    size = max(1, min(SLICE // n, QUERIES // query.shape[1]))
    return zip(query.split(size), key.split(size), strict=True)
