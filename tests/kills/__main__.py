"""Stop runs at many moments, let them go on, and compare them with one that was not stopped:

python -m tests.kills [NAME ...] [--share N] [--seed S]

Prints a table; the exit code is 1 where a run did not end as it should have. The names, all of them without any:
random, within, writes, damaged, renames, seeds, random-seeds, pairs, others, signals, signals-seeds.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch

from tests.kills import situations
from tests.kills.situations import SEEDS, SHORT, SINGLE, Count, Place

SITUATIONS: dict[str, Callable[[Place, int], Iterator[Count]]] = {
    "random": lambda place, share: situations.killed_at_random(place, -(-150 // share), SINGLE),
    "within": lambda place, share: situations.killed_within(place, -(-24 // share)),
    "writes": lambda place, share: situations.killed_in_writes(place, -(-40 // share)),
    "damaged": lambda place, share: situations.damaged(place, -(-60 // share)),
    "renames": lambda place, share: situations.killed_at_renames(place, share, SHORT),
    "seeds": lambda place, share: situations.killed_at_renames(place, share, SEEDS),
    "random-seeds": lambda place, share: situations.killed_at_random(place, -(-20 // share), SEEDS),
    "pairs": lambda place, share: situations.pairs(place, -(-5 // share)),
    "others": lambda place, share: situations.others(place, -(-len(situations.OTHERS) // share)),
    "signals": lambda place, share: situations.signalled(place, -(-30 // share), SINGLE),
    "signals-seeds": lambda place, share: situations.signalled(place, -(-15 // share), SEEDS),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *SITUATIONS], default=[], metavar="NAME")
    parser.add_argument("--share", type=int, default=1, help="do one part in N of the kills (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    arguments = parser.parse_args()
    if arguments.share > 1:  # a sample does not wait for the disk, which no process that is killed could notice
        os.fsync = lambda handle: None
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    started, wrong = time.perf_counter(), []
    place = Place(folder, arguments.seed)
    print("| what | tried | as it should be | of them |\n|---|---|---|---|", flush=True)
    for name in arguments.names or SITUATIONS:
        for count in SITUATIONS[name](place, arguments.share):
            wrong += count.wrong
            print(count.row(), flush=True)
    print(
        f"\n{datetime.date.today()}, {platform.system()} on {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {time.perf_counter() - started:.0f} s"
    )
    print("\n".join(wrong), end="\n" * bool(wrong))
    if wrong:
        print(f"kept for a look: {folder}")
    else:
        shutil.rmtree(folder)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
