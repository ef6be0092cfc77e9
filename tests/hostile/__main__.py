"""Run the corpora of hostile files:  python -m tests.hostile [pickles|runs|encoders|yaml|reports ...] [--verbose]

Each file is given to the public commands in a process of its own, which is ended after 60 s of work or 4 GB. The exit
code is 1 if anything was executed, hung, grew, showed a traceback or acted on the terminal, or was taken silently
without a reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.hostile.corpora import CORPORA  # noqa: E402  (transformers reads the above when it is imported)
from tests.hostile.runner import MEGABYTES, SECONDS, Outcome, execute, warm  # noqa: E402  (as above)

COLUMNS = {
    "executed": "executed", "slow": f"over {SECONDS} s", "large": f"over {MEGABYTES // 1024} GB",
    "traceback": "tracebacks", "terminal": "acted on the terminal", "script": "scripts in a page",
    "lines": "more than one line",
}  # fmt: skip


def main() -> int:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__, formatter_class=form)
    parser.add_argument("corpora", nargs="*", choices=[*CORPORA, []], help="which (all)")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--verbose", action="store_true", help="show what each case said")
    a = parser.parse_args()
    bad = 0
    with warm():
        for corpus in a.corpora or CORPORA:
            cases = [case for case in CORPORA[corpus] if not a.only or a.only in case.name]
            bad += table(corpus, [told(execute(case), a.verbose) for case in cases])
    return 1 if bad else 0


def told(outcome: Outcome, verbose: bool) -> Outcome:
    """Print an outcome that is not as it should be, or any."""
    wrong = outcome.faults or (outcome.silent and not outcome.case.accepted)
    if verbose or wrong:
        said = outcome.output.strip().splitlines()
        state = ", ".join(outcome.faults) or ("taken silently" if outcome.silent else f"exit {outcome.code}")
        print(f"  {outcome.case.name}: {state}, {outcome.seconds:.1f} s, {outcome.megabytes:.0f} MB")
        for line in said[-12 if wrong else -2 :]:
            print(f"      {ascii(line)[:400]}")
        sys.stdout.flush()
    return outcome


def table(corpus: str, outcomes: list[Outcome]) -> int:
    """Print the counts of a corpus, and the reasons of what was accepted; how many outcomes are wrong."""
    counts = Counter(fault for outcome in outcomes for fault in outcome.faults)
    print(f"{corpus}: {len(outcomes)} files: " + ", ".join(f"{name} {counts[key]}" for key, name in COLUMNS.items()))
    slowest, largest = max(outcomes, key=lambda o: o.seconds), max(outcomes, key=lambda o: o.megabytes)
    print(f"  slowest {slowest.seconds:.1f} s ({slowest.case.name}), largest {largest.megabytes:.0f} MB "
          f"({largest.case.name})")  # fmt: skip
    silent = [outcome for outcome in outcomes if outcome.silent]
    print(f"  silently accepted {len(silent)}")
    for outcome in silent:
        print(f"    {outcome.case.name}: {outcome.case.accepted or 'NO REASON'}")
    sys.stdout.flush()
    return sum(bool(o.faults) or (o.silent and not o.case.accepted) for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())
