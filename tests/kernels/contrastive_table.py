"""The table of losses in docs/kernels.md: python -m tests.kernels.contrastive_table --update writes it.

A row is one of `test_contrastive_libraries.EQUAL`. The tests go through all of them: the reference and the CPU against
the library's formula in fp64, with gradcheck, and the Triton kernels in the interpreter in fp32.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engine.files import write_text
from tests.kernels.test_contrastive_libraries import EQUAL, TOLERANCE, TRITON_TOLERANCE

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
START, END = "<!-- losses:start -->\n", "<!-- losses:end -->"


def table() -> str:
    lines = [
        "| loss | call | equal to | reference | cpu | triton, in the interpreter | gradcheck |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in EQUAL.items():
        call = case.call if "(" in case.call else f"infonce(q, k, {case.call})"
        lines.append(
            f"| {name} | `{call}` | {case.library} | {TOLERANCE:.0e} | {TOLERANCE:.0e} | {TRITON_TOLERANCE:.0e} | yes |"
        )
    return "\n" + "\n".join(lines) + "\n\n"


def written(page: str) -> str:
    """The page with the table as it is now."""
    begin, end = page.index(START) + len(START), page.index(END)
    return page[:begin] + table() + page[end:]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    if "--update" in sys.argv:
        write_text(PAGE, written(page))
    else:
        print(table())
