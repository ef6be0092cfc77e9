"""What a pickle may cost, and how it is refused."""

import pickle

LARGE = 1 << 16  # bytes from which on a payload is a view of the file
MAX_DEPTH = 64
MAX_STEPS = 1 << 25  # more instructions are no data set
MAX_CONTAINERS = 1 << 22
SHARING = 16  # how often, on average, a byte of the file may be referred to
SPARE = 1 << 26  # further bytes that may be referred to, for small files
WIDEST_KEY = 8  # items of a tuple that is a key
TEXT_BYTES = 56  # what a text takes in memory besides its characters
SET_CONTAINERS = 4  # one set takes the memory of so many lists
ONE_HASH = 16  # keys that may share a hash: each one is compared with all others


class Refused(pickle.UnpicklingError):
    """The pickle asked for something that is not allowed, which `name` names."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class Limit(pickle.UnpicklingError):
    """The pickle exceeds a limit of this reader.

    Args:
        found: what is there. rule: what is allowed. do: what to do about it.
    """

    def __init__(self, found: str, rule: str, do: str = "Save plain numpy arrays, text, numbers, lists and dicts."):
        super().__init__(found)
        self.found, self.rule, self.do = found, rule, do


class Truncated(Exception):
    pass
