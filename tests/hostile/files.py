"""Files that break a reader whatever its format."""

import os
import random
from collections.abc import Callable
from pathlib import Path

ESCAPE = "\x1b]0;owned\x07\x1b[2J\r\u202egpj"
"""Sets a terminal's title, clears it, overwrites the line, and turns the text round."""
SCRIPT = "<script>alert(1)</script>"


def replaced(path: Path) -> Path:
    """The path of a file that is taken away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def empty(path: Path) -> None:
    replaced(path).write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path: Path) -> None:
    replaced(path).write_bytes(random.Random(0).randbytes(5000))


def zeros(path: Path) -> None:
    replaced(path).write_bytes(bytes(5000))


def fifo(path: Path) -> None:
    os.mkfifo(replaced(path))


def folder(path: Path) -> None:
    replaced(path).mkdir()


def itself(path: Path) -> None:
    replaced(path).symlink_to(path.name)


def device(path: Path) -> None:
    replaced(path).symlink_to("/dev/zero")


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda path: replaced(path).write_bytes(content.encode() if isinstance(content, str) else content) and None


deep_json = text("[" * 200_000 + "]" * 200_000)
huge_number = text('{"epoch": ' + "9" * 100_000 + "}")
