"""The code blocks of the README and the pages.

A block is one of four kinds, and `kind` says which:

    run         a python block, or a shell block below the line `<!-- run -->`: executed
    parsed      any other shell block: every command is checked against what exists; a YAML block: loaded as settings
    not run     a block below a line `<!-- not run: REASON -->`
    no code     a block without a language, such as the layout of a file
"""

import re
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]

BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>run|not run: [^>]+) -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    kind: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def of_page(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(path.name, text.count("\n", 0, found.start("code")), found["language"], _kind(found), found["code"])
        for found in BLOCK.finditer(text)
    ]


def _kind(found: re.Match[str]) -> str:
    mark = found["mark"] or ""
    if mark.startswith("not run"):
        return "not run"
    if not found["language"]:
        return "no code"
    return "run" if found["language"] == "python" or mark == "run" else "parsed"


def every() -> list[Block]:
    return [block for page in PAGES for block in of_page(page)]


def commands(block: Block) -> list[str]:
    """The commands of a shell block, without comments; lines that end in a backslash are joined."""
    lines = block.code.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^|\s{2,})#.*", "", line).strip() for line in lines)
    return [part.strip() for line in stripped if line for part in line.split("&&")]
