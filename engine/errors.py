"""The one family of errors that users see: where, what was found, what was expected, what to do."""

LONGEST = 2000


class EngineError(Exception):
    """A problem the user can mend. Its text is always one line, its parts cut to `LONGEST` characters each.

    Args:
        where: file, key, row or option the problem sits at, as the user would name it.
        found: what is there.
        expected: what should have been there.
        do: what to do about it, in the imperative.
    """

    def __init__(self, where: str, found: str, expected: str, do: str):
        # What is found may come from a damaged file: a key of a megabyte, say.
        parts = [t if len(t) <= LONGEST else f"{t[:LONGEST]}..." for t in (where, found, expected, do)]
        self.where, self.found, self.expected, self.do = parts
        text = f"{self.where}: found {self.found}; expected {self.expected}. {self.do}"
        super().__init__(" ".join(text.split()))


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
