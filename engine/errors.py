"""The errors that users see. Each says where, what was found, what was expected, and what to do."""

import re

LONGEST = 2000

# Controls, escape sequences, halves of surrogate pairs, and characters that reverse the text or cannot be seen.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    """Text of any origin, safe for a terminal, a log or a page. Characters that act on them are written out.

    Line breaks and tabs stay, and so do the letters of every language.

    >>> print(printable("\\x1b[31mred"))
    \\x1b[31mred
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


class EngineError(Exception):
    """A problem that the user can solve. Its text is one `printable` line; each part has at most `LONGEST` characters.

    >>> print(ConfigError("train.lr", "-1", "a value > 0", "Change the value."))
    train.lr: found -1; expected a value > 0. Change the value.

    Args:
        where: the file, key, row or option with the problem, as the user would name it.
        found: what is there.
        expected: what should be there.
        do: what to do about it, in the imperative.
    """

    def __init__(self, where: str, found: str, expected: str, do: str):
        # What was found may come from a damaged file, such as a key of a megabyte.
        parts = [t if len(t) <= LONGEST else f"{t[:LONGEST]}..." for t in (where, found, expected, do)]
        parts = [printable(" ".join(part.split())) for part in parts]
        self.where, self.found, self.expected, self.do = parts
        super().__init__(f"{self.where}: found {self.found}; expected {self.expected}. {self.do}".rstrip())


class ConfigError(EngineError):
    """A setting that is unknown, of the wrong type, out of range, or in contradiction to another one."""


class DataError(EngineError):
    """A data file, store or sample that cannot be used as it is."""


class CheckpointError(EngineError):
    """A checkpoint or run folder that is missing, damaged, or belongs to another model."""


class OutputError(EngineError):
    """An output that could not be written. Nothing half-written is left behind."""


class EstimatorError(EngineError):
    """An information estimate that is undefined for its input: a batch of one, non-finite scores, a bank too small."""


class NonFiniteError(EstimatorError):
    """A loss or a gradient that is NaN or infinite. It is found before the update, which is not made."""
