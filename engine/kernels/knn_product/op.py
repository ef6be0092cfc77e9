"""Product samples p(x|z) p(y,z) from a bank of features: exact, isolated, seeded.

    bank = Bank({"T": t, "A": a, "V": v, "C": label})        # once per epoch
    sampler = ProductSampler(bank, k=2, discrete=("C",))
    rows = sampler.draw(terms, batch_size=128, generator=g)  # at every step: {"I(T;A|C)": (x, y, z), ...}

For one draw from three tensors there is `knn_product_samples(x, y, z, m, k)`.

Distances are exact, whatever precision training runs in. All random numbers come from the generator in one piece: the
queries, and one key per query. With a generator on the CPU, a draw is the same on every device and backend, and nothing
waits for a GPU, except the preparation of a bank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type, looks_at
from engine.kernels.knn_product.conditions import Line, Space, Ties
from engine.kernels.knn_product.reference import Strata

Indices = tuple[Tensor, Tensor]

KEYS = 1 << 32


class Bank(Mapping[str, Tensor]):
    """Features of N samples, from which product rows are drawn.

    The bank is a mapping of the features. What a feature needs as a condition is prepared at its first use and kept, so
    features must not be changed in place afterwards. Make a new bank for every epoch.

    Args:
        features: Name -> [N, width], all on one device.

    Raises:
        EstimatorError: Features of different numbers of rows, on several devices, or that are no tensors.

    Example:
        >>> bank = Bank({"T": torch.randn(50, 4), "A": torch.randn(50, 3)})
        >>> bank["A"].shape
        torch.Size([50, 3])
    """

    def __init__(self, features: Mapping[str, Tensor]):
        exact_type("bank", *features.values(), integers=True)
        if len({len(value) for value in features.values()}) > 1:
            rows = ", ".join(f"{name} {len(value)}" for name, value in features.items())
            raise EstimatorError(
                "bank", f"features of {rows} rows", "the same samples in each", "Give each the same rows."
            )
        self._features = {name: value.detach() for name, value in features.items()}
        self._spaces: dict[str, Space] = {}
        self._lines: dict[str, Line] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._features[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)

    def take_over(self, earlier: Bank) -> None:
        """Keep what an earlier bank has prepared of scalar conditions whose values are the same, such as labels."""
        for name, line in earlier._lines.items():
            if name in self and self[name].numel() == len(self[name]) and line.holds(self[name]):
                self._lines[name] = line

    def space(self, name: str) -> Space:
        """Feature `name` as a condition in several dimensions."""
        if name not in self._spaces:
            self._spaces[name] = Space(self[name])
        return self._spaces[name]

    def line(self, name: str) -> Line:
        """Feature `name`, of one column, as a scalar condition.

        Raises:
            EstimatorError: it has more columns.
        """
        if name not in self._lines:
            columns = self[name].reshape(len(self[name]), -1).shape[1]
            if columns != 1:
                raise EstimatorError(
                    f"condition {name}", f"a label of {columns} columns", "one column",
                    "Number the joint values or use kNN.",
                )  # fmt: skip
            self._lines[name] = Line(self[name])
        return self._lines[name]


# -- draws ------------------------------------------------------------------------------------------------------------


class ProductRows(Sequence[Tensor]):
    """Rows of p(x|z) p(y,z): a sequence (x, y, z) of [m·k, width] each.

    y and z are kept once per query. Reading the sequence repeats them k times each.

    Attributes:
        x: [m·k, dx], query by query, the k rows of each query nearest first.
        y: [m, dy], of the queries.
        z: [m, dz], of the queries.
        k: Rows per query.
    """

    __slots__ = ("k", "x", "y", "z")

    def __init__(self, x: Tensor, y: Tensor, z: Tensor, k: int):
        self.x, self.y, self.z, self.k = x, y, z, k

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Tensor:
        part = (self.x, self.y, self.z)[i]
        return part if part is self.x or self.k == 1 else part.repeat_interleave(self.k, 0)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(3))


class ProductSampler:
    """Draws product rows for many terms at once. Terms of equal condition share one search in the bank.

    Args:
        bank: The features that rows are drawn from.
        k: Rows per query.
        discrete: Names of conditions for which rows are drawn within strata of equal value instead of among nearest
            neighbours.
        shared: Let terms of equal condition share their queries and neighbours. Otherwise every term draws its own.
            The distribution of each term's rows is the same.

    Example:
        >>> from types import SimpleNamespace
        >>> bank = Bank({name: torch.randn(50, 4) for name in "TAV"})
        >>> x, y, z = ProductSampler(bank, k=2).draw([SimpleNamespace(x="T", y="A", given="V")], 20).popitem()[1]
        >>> x.shape, y.shape
        (torch.Size([20, 4]), torch.Size([20, 4]))
    """

    def __init__(self, bank: Bank, k: int, discrete: Iterable[str] = (), shared: bool = True):
        self.bank, self.k, self.discrete, self.shared = bank, k, frozenset(discrete), shared

    @torch.no_grad()
    def draw(
        self, terms: Iterable[Any], batch_size: int, generator: torch.Generator | None = None
    ) -> dict[str, ProductRows]:
        """Draw product rows for every term.

        Args:
            terms: Objects with the attributes x, y and given, which are names of features.
            batch_size: Number of joint rows that the product rows will be compared with; m = batch_size // k queries
                are drawn per term.
            generator: Source of randomness, best on the CPU.

        Returns:
            {str(term): rows}.

        Raises:
            EstimatorError: The batch or the bank is too small for k, a condition is not finite, or one of `discrete`
                has several columns.
        """
        k = self.k
        m = batch_size // k if k > 0 else 0
        if m < 1:
            raise EstimatorError(
                "objective.k_neighbor", f"k_neighbor {k} with a batch of {batch_size}", "k_neighbor <= batch size",
                "Lower objective.k_neighbor or raise batch_size.",
            )  # fmt: skip
        terms, groups = list(terms), {}
        check_terms(terms, self.bank)
        for term in terms:
            groups.setdefault(term.given, []).append(term)
        sizes = [1 if self.shared else len(members) for members in groups.values()]
        if not sizes:
            return {}
        z = self.bank[next(iter(groups))]
        check_bank(len(z), m, k)
        query, key = _draw(len(z), sum(sizes), m, generator, z.device)
        rows = {}
        for (given, members), q, s in zip(groups.items(), query.split(sizes), key.split(sizes), strict=True):
            neighbour = self.neighbours(given, q, s).flatten(1)
            for i, term in enumerate(members):
                at = 0 if self.shared else i
                x, y, z = (self.bank[name] for name in (term.x, term.y, given))
                taken, asked = neighbour[at], q[at]
                rows[str(term)] = ProductRows(
                    x.index_select(0, taken), y.index_select(0, asked), z.index_select(0, asked), k
                )
        return {str(term): rows[str(term)] for term in terms}

    def neighbours(self, given: str, query: Tensor, key: Tensor) -> Tensor:
        """k rows like each query in condition `given`; int64 [T, m] -> int64 [T, m, k]."""
        if given in self.discrete:
            return self.bank.line(given).within_strata(query, key, self.k)
        if self.on_a_line(given):
            return self.bank.line(given).neighbours(query, key, self.k)
        return self.bank.space(given).neighbours(query, key, self.k)

    def on_a_line(self, given: str) -> bool:
        """Whether condition `given` is a scalar, or taken for one."""
        z = self.bank[given]
        return given in self.discrete or z.numel() == len(z)


def knn_product_samples(
    x: Tensor, y: Tensor, z: Tensor, m: int, k: int, generator: torch.Generator | None = None, discrete: bool = False
) -> ProductRows:
    """Draw m·k rows of p(x|z) p(y,z) from N samples of (x, y, z).

    m queries are drawn without replacement. Each keeps its y and z, and takes x from k rows of like z among the rows
    that are not queries: the nearest neighbours in z, or rows of equal z with `discrete`.

    Args:
        x: [N, dx], of any real dtype.
        y: [N, dy], of any real dtype.
        z: [N, dz], finite.
        m: Number of queries.
        k: Rows per query.
        generator: Source of randomness. Default: torch's own.
        discrete: Draw within strata of equal z instead of among nearest neighbours; z then has one column.

    Returns:
        A sequence (x, y, z) of [m·k, width] each, in the dtypes of the samples.

    Raises:
        EstimatorError: x, y and z of different numbers of rows or on several devices, fewer than k rows beside the m
            queries, or a z that is not finite (or of several columns, with `discrete`).

    Source:
        Molavipour et al., Neural Estimators for Conditional Mutual Information Using Nearest Neighbors Sampling, IEEE
        Transactions on Signal Processing 2021 (isolated sampling).

    Example:
        >>> x, y, z = (torch.randn(50, width) for width in (2, 3, 4))
        >>> rows = knn_product_samples(x, y, z, m=10, k=2)
        >>> [part.shape for part in rows]
        [torch.Size([20, 2]), torch.Size([20, 3]), torch.Size([20, 4])]
    """
    exact_type("knn_product_samples", x, y, z, integers=True, needed=3)
    if generator is not None and not isinstance(generator, torch.Generator):
        do = "Give torch.Generator().manual_seed(0)."
        raise EstimatorError("knn_product_samples", f"generator {generator!r}", "a torch.Generator", do)
    if 0 in (x.dim(), y.dim(), z.dim()):
        raise EstimatorError("knn_product_samples", "a number", "rows of samples", "Give tensors [N, width].")
    if not len(x) == len(y) == len(z):
        raise EstimatorError(
            "knn_product_samples", f"{len(x)}, {len(y)} and {len(z)} rows of x, y, z", "as many of each",
            "Give rows of the same samples.",
        )  # fmt: skip
    sample = stratified_product_indices if discrete else product_indices
    neighbour, query = sample(z, m, k, generator)
    return ProductRows(x[neighbour], y[query], z[query], k)


@torch.no_grad()
def product_indices(
    z: Tensor,
    m: int,
    k: int,
    generator: torch.Generator | None = None,
    query: Tensor | None = None,
    ties: Ties = "random",
) -> Indices:
    """Queries and their k nearest neighbours in z among the rows that are not queries (Euclidean, exact).

    Args:
        z: The bank's condition, [N, dz] or [N], finite.
        m: Number of queries, usually batch size // k. 0 gives empty indices.
        k: Neighbours per query.
        generator: Source of the queries and of tie-breaking, on any device.
        query: int64 [m], distinct rows to use as queries instead of drawing them.
        ties: Which of several rows at the distance of the k-th are taken: "random" (uniform; a label of seven values
            would otherwise give the same few rows in every call) or "first" (the lowest rows).

    Returns:
        The neighbours, int64 [m·k], query by query and nearest first; and the queries, int64 [m].

    Raises:
        EstimatorError: Fewer than k rows are left beside the m queries, or z is not finite.

    Example:
        >>> z = torch.tensor([0.0, 1.0, 2.0, 10.0])
        >>> product_indices(z, 1, 2, query=torch.tensor([1]))[0].sort().values
        tensor([0, 2])
    """
    check_bank(len(z), m, k)
    query, key = _query_and_key(query, len(z), m, generator, z.device)
    if m == 0:
        return query[0], query[0]
    if z.numel() == len(z) and ties == "random":
        neighbour = Line(z).neighbours(query, key, k)
    else:
        neighbour = Space(z).neighbours(query, key, k, ties)
    return neighbour.reshape(-1), query[0]


@torch.no_grad()
def stratified_product_indices(
    label: Tensor,
    m: int,
    k: int,
    generator: torch.Generator | None = None,
    query: Tensor | None = None,
    strata: Strata | None = None,
) -> Indices:
    """Queries and, for each, k rows drawn uniformly without replacement from the non-query rows of its stratum.

    A stratum holds the rows of equal label. One of k members or fewer is first merged with the nearest label. If the
    queries leave a stratum fewer than k other rows, its queries take their k nearest other rows by label instead, ties
    at random. No neighbour is ever a query.

    Args:
        label: The bank's condition, [N] or [N, 1], of few distinct values.
        m: Number of queries. 0 gives empty indices.
        k: Rows per query.
        generator: Source of the queries and of the draws.
        query: int64 [m], distinct rows to use as queries instead of drawing them.
        strata: From `label_strata(label, k)`, to compute them once for a bank.

    Returns:
        The neighbours, int64 [m·k], query by query; and the queries, int64 [m].

    Raises:
        EstimatorError: Fewer than k rows are left beside the m queries, or a label of several columns or not finite.

    Example:
        >>> label = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
        >>> stratified_product_indices(label, 1, 2, query=torch.tensor([4]))[0].sort().values
        tensor([3, 5])
    """
    label = Bank({"label": label}).line("label") if len(label) else Line(label)
    n = len(label.z)
    check_bank(n, m, k)
    if strata is not None and len(strata.order) != n:
        what = f"strata of {len(strata.order)} rows for {n} labels"
        raise EstimatorError("strata", what, "those of these labels", "Call label_strata again.")
    query, key = _query_and_key(query, n, m, generator, label.z.device)
    if m == 0:
        return query[0], query[0]
    return label.within_strata(query, key, k, strata).reshape(-1), query[0]


def product_rows(
    bank_x: Tensor, bank_y: Tensor, bank_z: Tensor, neighbour: Tensor, query: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The product rows that indices stand for: x of each neighbour, y and z of its query; [m·k, width] each."""
    repeated = query.repeat_interleave(k)
    return bank_x[neighbour], bank_y[repeated], bank_z[repeated]


def check_terms(terms: Iterable[Any], bank: Mapping[str, Tensor]) -> None:
    """Refuse terms with features that the bank lacks."""
    for term in terms:
        if missing := [name for name in (term.x, term.y, term.given) if name not in bank]:
            what = f"no feature {missing[0]!r} in the bank"
            raise EstimatorError(f"objective term {term}", what, f"it among {sorted(bank)}", "Store that feature.")


def check_bank(n: int, m: int, k: int) -> None:
    """Refuse k and m that are no counts, and a bank of n rows that is too small for them."""
    if not (isinstance(k, Integral) and isinstance(m, Integral)) or k < 1 or m < 0:
        what, expected = f"k_neighbor {k} and {m} queries", "whole numbers, k_neighbor >= 1 and queries >= 0"
        raise EstimatorError("k_neighbor", what, expected, "Change these numbers.")
    if n - m < k:
        raise EstimatorError(
            "k_neighbor", f"k_neighbor {k} with a bank of {n} rows of which {m} are queries",
            f"at least {m + k} rows (queries + k_neighbor)",
            "Lower k_neighbor or the batch size, or use more training samples.",
        )  # fmt: skip


def _draw(n: int, draws: int, m: int, generator: torch.Generator | None, device: torch.device) -> Indices:
    """Queries and keys of `draws` independent draws, int64 [draws, m] each, sent to the device in one piece."""
    source = torch.device("cpu") if generator is None else generator.device
    both = torch.empty(2, draws, m, dtype=torch.int64, device=source, pin_memory=source.type != device.type == "cuda")
    for t in range(draws):
        both[0, t] = _choose(n, m, generator, source)
    both[1] = torch.randint(KEYS, (draws, m), generator=generator, device=source)
    query, key = both.to(device, non_blocking=True)
    return query, key


def _choose(n: int, m: int, generator: torch.Generator | None, source: torch.device) -> Tensor:
    """m distinct of n rows, every ordered choice equally likely."""
    if source.type == "cpu" and 4 * m < n:
        # the first m distinct of uniform draws; a permutation of the whole bank would cost more than all the rest
        chosen: dict[int, None] = {}
        while len(chosen) < m:
            chosen |= dict.fromkeys(torch.randint(n, (m + 8,), generator=generator).tolist())
        return torch.tensor(list(chosen)[:m])
    return torch.randperm(n, generator=generator, device=source)[:m]


def _query_and_key(
    query: Tensor | None, n: int, m: int, generator: torch.Generator | None, device: torch.device
) -> Indices:
    if query is None:
        return _draw(n, 1, m, generator, device)
    if query.dtype != torch.int64 or query.shape != (m,):
        raise EstimatorError("query", f"{query.dtype} {list(query.shape)}", f"int64 [{m}]", "Give m distinct rows.")
    if looks_at(query) and (bool(((query < 0) | (query >= n)).any()) or len(query.unique()) < m):
        found = "rows that are out of range or given twice"
        raise EstimatorError(
            "query", found, f"distinct rows from 0 to {n - 1}", "Give each row of the bank once at most."
        )
    source = torch.device("cpu") if generator is None else generator.device
    key = torch.randint(KEYS, (1, m), generator=generator, device=source)
    return query.to(device)[None], key.to(device)
