"""Warnings on several ranks: each text is shown once, by rank 0 if it has it, else with the name of the rank."""

from __future__ import annotations

import contextlib
import re
import time
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

from engine.ranks import Ranks


class RankWarnings:
    """Shows what the ranks warn of, each text once.

    Rank 0 shows its warnings at once and marks them as shown. Any other rank keeps its own back until `show`: by then
    rank 0 has passed the same place, and what it has marked is left out.

    Args:
        ranks: the processes of the run.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._kept: dict[str, tuple[Any, ...]] = {}
        self._seen: set[str] = set()
        self._show_plainly: Any = warnings.showwarning

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Within the context the warnings of this process are taken care of. What is left is shown at its end."""
        if self.ranks.size == 1:
            yield
            return
        self._show_plainly, warnings.showwarning = warnings.showwarning, self._take
        try:
            yield
        except Exception:
            time.sleep(0 if self.ranks.writes else 0.5)  # the ranks may be apart: rank 0 gets time to mark its own
            raise
        finally:
            warnings.showwarning = self._show_plainly
            self.show()

    def show(self) -> None:
        """Show what this rank has kept and rank 0 has not marked. Rank 0 must have passed the places before."""
        for key, (message, *rest) in self._kept.items():
            if not self.ranks.marked(key):
                text = f"rank {self.ranks.rank}: {message}"
                self._show_plainly(UserWarning(text), *rest)
        self._kept.clear()

    def _take(self, message: Any, *rest: Any, **more: Any) -> None:
        key = _key(str(message))
        if self.ranks.writes:
            self._show_plainly(message, *rest, **more)
            self.ranks.mark(key)
        elif key not in self._seen:
            self._kept[key] = (message, *rest)
        self._seen.add(key)


def _key(text: str) -> str:
    """What two warnings have in common that say the same of different GPUs."""
    return f"warned {zlib.crc32(re.sub(r'cuda:[0-9]+', 'cuda', text).encode())}"
