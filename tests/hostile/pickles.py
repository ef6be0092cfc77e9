"""64 hostile pickles: code, memory, time, and what is no pickle at all."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.hostile import files
from tests.hostile.files import ESCAPE
from tests.hostile.runner import MARK, Case, data
from tests.loaders import writers
from tests.loaders.test_safe_pickle import BOMBS, raw

COMMAND = f"touch {MARK}"


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def call(module: str, name: str, *arguments: str) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(text, arguments)) + b"tR"


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def nested() -> dict:
    """A well-formed MMSA file but for one value, which is a call."""
    content = writers.mmsa(writers.samples())
    content["train"]["raw_text"] = np.array([Reduced(os.system, COMMAND)] * 7, object)
    return content


TOUCH = f"open({MARK!r}, 'w').close()"
CODE = {
    "os.system": call("os", "system", COMMAND),
    "posix.system": call("posix", "system", COMMAND),
    "subprocess": b"csubprocess\ncheck_output\n((l" + text("touch") + b"a" + text(MARK) + b"atR",
    "eval": call("builtins", "eval", TOUCH),
    "exec": call("builtins", "exec", TOUCH),
    "exec of Python 2": call("__builtin__", "execfile", MARK),
    "open": call("builtins", "open", MARK, "w"),
    "io.open": call("io", "open", MARK, "w"),
    "import": call("builtins", "__import__", "antigravity"),
    "importlib": call("importlib", "import_module", "this"),
    "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\n" + text("tofile") + b"tR",
    "INST": b"(" + text(COMMAND) + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + text(COMMAND) + b"o",
    "NEWOBJ": b"csubprocess\nPopen\n((l" + text("touch") + b"a" + text(MARK) + b"at\x81",
    "NEWOBJ_EX": b"csubprocess\nPopen\n((l" + text("touch") + b"a" + text(MARK) + b"at}\x92",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + text(COMMAND) + b"tR",
    "a dotted name": b"\x80\x04" + text("builtins") + text("object.__class__.__base__") + b"\x93",
    "EXT1": b"\x82\x01",
    "PERSID": b"Pos.system\n",
    "partial": b"cfunctools\npartial\n(cos\nsystem\n" + text(COMMAND) + b"tR(tR",
    "codecs.decode": call("codecs", "decode", COMMAND, "rot13"),
    "numpy.load": call("numpy", "load", MARK),
    "runstring": call("numpy.testing._private.utils", "runstring", TOUCH),
    "ctypes": call("ctypes", "CDLL", "libc.so.6"),
    "copyreg": b"ccopyreg\n_reconstructor\n(cos\nsystem\ncbuiltins\nobject\nNtR",
    "a torch tensor": call("torch._utils", "_rebuild_tensor_v2", "x"),
    "a state for a function": b"cnumpy\nndarray\n}" + text("__call__") + b"cos\nsystem\nsb",
}

P1, P2, P5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
WORD = (1 << 64) - 1


def equal_tuples(count: int) -> list[tuple[int, int]]:
    """Pairs of integers whose hashes as tuples are all equal, by Python's published formula turned round."""
    back1, back2, found, first = pow(P1, -1, 1 << 64), pow(P2, -1, 1 << 64), [], 0
    target = 12345 * back1 & WORD
    target = ((target >> 31) | (target << 33)) & WORD
    while len(found) < count:
        first += 1
        lane = P5 + first * P2 & WORD
        lane = ((lane << 31) | (lane >> 33)) & WORD
        second = (target - lane * P1) * back2 & WORD
        if second < 2**61 - 1:
            found.append((first, second))
    return found


def tuple_keys(as_set: bool = False) -> bytes:
    pairs = equal_tuples(40_000)
    assert len({hash(pair) for pair in pairs}) == 1
    keys = [number(a) + number(b) + b"\x86" for a, b in pairs]
    return raw(b"\x8f(", *keys, b"\x90") if as_set else raw(b"}(", b"N".join(keys), b"Nu")


def scalar_keys(kind: str, values: list[bytes]) -> bytes:
    """A dict whose keys are numpy scalars of one dtype."""
    start = b"cnumpy.core.multiarray\nscalar\nq\x00cnumpy\ndtype\n(" + text(kind) + b"tRq\x01}("
    return raw(start, *(b"h\x00h\x01B" + struct.pack("<I", len(v)) + v + b"\x86RN" for v in values), b"u")


def complex_keys() -> bytes:
    numbers = np.array([complex(-1000003 * n, n) for n in range(1, 40_000)])
    assert len({hash(complex(n)) for n in numbers}) == 1
    return scalar_keys("c16", [n.tobytes() for n in numbers])


def long_keys() -> bytes:
    step = np.finfo(np.longdouble).eps
    return scalar_keys("f16", [np.longdouble(b + 1 + k * step).tobytes() for b in range(1, 60) for k in range(900)])


def laughing(levels: int) -> bytes:
    """A list that holds a list ten times, and so on, left on the stack and as memo 9."""
    parts = [b"(" + text("ha") * 10 + b"lq\x09"]
    return b"".join(parts + [b"(" + b"h\x09" * 10 + b"lq\x09"] * levels)


ARRAY = b"cnumpy.core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n(" + text("f4") + b"tR"
COST = {
    "30 million memo entries": lambda: raw(b"N" + b"\x94" * 30_000_000),
    "memo entries far apart": lambda: raw(b"N" + b"".join(b"r" + struct.pack("<I", 7 * i) for i in range(700_000))),
    "a memo entry beyond the file": lambda: raw(b"Nr\xff\xff\xff\x7f"),
    "20 million texts of two letters": lambda: raw(b"(" + b"\x8c\x02ab" * 20_000_000 + b"l"),
    "20 million byte strings of Python 2": lambda: raw(b"(" + b"U\x02ab" * 20_000_000 + b"l"),
    "4 million sets of one": lambda: raw(b"(" + b"(K\x01\x91" * 4_000_000 + b"l"),
    "4 million lists of one": lambda: raw(b"(" + b"]K\x01a" * 4_100_000 + b"l"),
    "4 million dicts of one": lambda: raw(b"(" + b"}NNs" * 4_100_000 + b"l"),
    "30 million numbers": lambda: raw(b"(" + b"M\xff\xff" * 30_000_000 + b"l"),
    "tuples of one hash as keys": tuple_keys,
    "tuples of one hash in a set": lambda: tuple_keys(True),
    "complex numbers of one hash as keys": complex_keys,
    "long doubles of one hash as keys": long_keys,
    "a shape of 400,000 numbers": lambda: raw(ARRAY, b"(", number(2**62 + 1) * 400_000, b"ttR"),
    "a dtype of endless lists": lambda: raw(b"(", laughing(12), b"ocnumpy\ndtype\n(h\x09tR"[1:], b"t"),
    "an encoding of endless lists": lambda: raw(b"(", laughing(12), b"c_codecs\nencode\n(", text("a"), b"h\x09tRt"),
}


def mmsa(change: Callable[[dict], None]) -> bytes:
    content = writers.mmsa(writers.samples())
    change(content)
    return pickle.dumps(content, 4)


def twice(content: dict) -> None:
    content["train"]["id"] = np.array([f"v$_${ESCAPE}"] * len(content["train"]["id"]))


def marked(content: dict) -> None:
    content["train"] |= {"[/red]": 1, "[link=x]" + ESCAPE: 2}
    del content["train"]["audio"]


CONTENT = {
    "escape sequences in ids": lambda: mmsa(twice),
    "markup and escape sequences in keys": lambda: mmsa(marked),
    "a call inside a well-formed file": lambda: pickle.dumps(nested(), 4),
}
ODD = {"empty": files.empty, "noise": files.noise, "a pipe": files.fifo, "a device": files.device,
       "a link to itself": files.itself, "a folder": files.folder}  # fmt: skip
SHAPES = ("inspect", "convert", "train")


def commands(path: Path, number: int) -> list[str]:
    """One of the commands that read data."""
    match SHAPES[number % 3]:
        case "inspect":
            return ["inspect", str(path)]
        case "convert":
            return ["convert", str(path), "store.safetensors"]
    return ["train", "--preset", "mosi", "--data", str(path), "--out", "out", "device=cpu"]


def _written(number: int, content: bytes | Callable[[], bytes]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = folder / "x.pkl"
        path.write_bytes(content if isinstance(content, bytes) else content())
        return commands(path, number)

    return make


def _odd(number: int, change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        change(folder / "x.pkl")
        return commands(folder / "x.pkl", number)

    return make


def _long_name(folder: Path) -> list[str]:
    return ["inspect", str(folder / ("n" * 5000 + ".pkl"))]


def _pipe_beside(folder: Path) -> list[str]:
    os.mkfifo(folder / "label.csv")
    writers.dump(writers.mmsa(writers.samples()), folder / "x.pkl")
    return ["inspect", str(folder / "x.pkl")]


_contents: dict[str, bytes | Callable[[], bytes]] = {f"code: {k}": raw(v) for k, v in CODE.items()} | COST | CONTENT
_contents |= {name: BOMBS[name][0] for name in list(BOMBS)[: 64 - len(_contents) - len(ODD) - 2]}
PICKLES = [
    *(Case(name, _written(i, content)) for i, (name, content) in enumerate(_contents.items())),
    *(Case(name, _odd(i, change)) for i, (name, change) in enumerate(ODD.items())),
    Case("a name of 5,000 letters", _long_name),
    Case("a pipe beside a good file", _pipe_beside, "the pipe is no label file: the data is whole without it"),
]
assert len(PICKLES) == 64 and data
