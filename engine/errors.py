"""The one family of errors that users see: where, what was found, what was expected, what to do."""

import re

LONGEST = 2000

# Controls, escape sequences, halves of surrogate pairs, and what turns the direction of text round or is not seen.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    """Text of any origin for a terminal, a log or a page: what acts on them is written out, `\\x1b` for an escape.

    Line breaks (\\n) and tabs stay; so do letters of every language.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


class EngineError(Exception):
    """A problem the user can mend. Its text is always one `printable` line, its parts cut to `LONGEST` characters each.

    Args:
        where: file, key, row or option the problem sits at, as the user would name it.
        found: what is there.
        expected: what should have been there.
        do: what to do about it, in the imperative.
    """

    def __init__(self, where: str, found: str, expected: str, do: str):
        # What is found may come from a damaged file: a key of a megabyte, say.
        parts = [t if len(t) <= LONGEST else f"{t[:LONGEST]}..." for t in (where, found, expected, do)]
        parts = [printable(" ".join(part.split())) for part in parts]
        self.where, self.found, self.expected, self.do = parts
        super().__init__(f"{self.where}: found {self.found}; expected {self.expected}. {self.do}".rstrip())


class ConfigError(EngineError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another one."""


class DataError(EngineError):
    """A data file, store or sample that cannot be used as it is."""


class CheckpointError(EngineError):
    """A checkpoint or run folder that is missing, damaged, or belongs to another model."""


class OutputError(EngineError):
    """An output that could not be written; nothing half-written is left behind."""


class EstimatorError(EngineError):
    """An information estimate that is undefined for its input (batch of one, non-finite scores, bank too small)."""
