"""The machine that executes a pickle's instructions."""

from __future__ import annotations

import codecs
import mmap
import pickle
import struct
from collections.abc import Callable
from typing import Any

from engine.loaders.safe_pickle.limits import (
    LARGE,
    MAX_CONTAINERS,
    MAX_STEPS,
    SET_CONTAINERS,
    SHARING,
    SPARE,
    TEXT_BYTES,
    Limit,
    Refused,
    Truncated,
)
from engine.loaders.safe_pickle.values import FIXED, Array, ByteString, Dtype, Function, Hashes, text_of


class Machine:
    """Executes one pickle. Methods are named after the instructions of `pickletools`."""

    def __init__(self, data: mmap.mmap | bytes):
        self.data, self.view, self.size, self.at = data, memoryview(data), len(data), 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.containers = 0
        self.spent = 0  # bytes that calls have copied
        self.held = 0  # bytes that texts take
        self.budget = SHARING * self.size + SPARE
        self.hashes = Hashes()

    def run(self) -> Any:
        data, size, table = self.data, self.size, _TABLE
        for _ in range(MAX_STEPS):
            at = self.at
            if at >= size:
                raise Truncated
            code = data[at]
            self.at = at + 1
            if code == 0x2E:  # STOP
                self.nothing_after()
                return self.stack.pop()
            execute = table[code]
            if execute is None:
                raise pickle.UnpicklingError(f"invalid load key {bytes(data[at : at + 1])!r} at byte {at}")
            execute(self)
        raise Limit(
            f"more than {MAX_STEPS} instructions",
            f"at most {MAX_STEPS}",
            "Save numpy arrays: lists of numbers take one instruction per number.",
        )

    def nothing_after(self) -> None:
        """Refuse a second pickle in the same file: what was dumped after the first would be left unread.

        Older protocols have no first byte of their own, so only blanks and NUL bytes may follow.
        """
        for start in range(self.at, self.size, LARGE):
            if self.data[start : start + LARGE].strip(b"\0 \t\r\n\v\f"):
                raise Limit(
                    f"another one or other bytes after it, at byte {self.at} of {self.size}",
                    "one pickle per file",
                    "Save all splits in one dict, or each in a file of its own.",
                )

    # -- reading arguments --

    def take(self, layout: struct.Struct) -> Any:
        end = self.at + layout.size
        if end > self.size:
            raise Truncated
        (value,) = layout.unpack_from(self.data, self.at)
        self.at = end
        return value

    def raw(self, length: int) -> bytes:
        start = self.at
        end = start + length
        if end > self.size or length < 0:
            raise Truncated
        self.at = end
        return self.data[start:end]

    def payload(self, length: int, kind: type = bytes) -> Any:
        if length < LARGE:
            raw = self.raw(length)
            return raw if kind is bytes else kind(raw)
        start = self.at
        if start + length > self.size:
            raise Truncated
        self.at = start + length
        return self.view[start : self.at]

    def line(self, most: int = 1 << 30) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise Truncated
        if end - self.at > most:
            raise Limit("a number of too many digits", f"a number written in at most {most} characters")
        line = self.data[self.at : end]
        self.at = end + 1
        return line

    def push_text(self, raw: bytes) -> None:
        self.hold(raw)
        self.stack.append(raw.decode("utf-8", "replace"))

    def text_line(self) -> None:
        line = self.line()
        self.hold(line)
        self.stack.append(text_of(line.decode("raw-unicode-escape")))

    def hold(self, raw: bytes) -> None:
        """Account for the memory of a text. A text of two letters takes thirty times its place in the file."""
        if len(raw) > 1:  # Python keeps one object for each of the shorter ones
            self.held += len(raw) + TEXT_BYTES
            if self.held > self.budget:
                raise Limit(
                    "texts that take far more memory than the file",
                    f"texts that take at most {SHARING} times its {self.size} bytes (and {SPARE >> 20} MiB)",
                    "Save them as one numpy array of text.",
                )

    def pop_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def new(self, container: Any) -> None:
        self.containers += SET_CONTAINERS if type(container) in (set, frozenset) else 1
        if self.containers > MAX_CONTAINERS:
            raise Limit(
                f"more than {MAX_CONTAINERS} containers",
                f"at most {MAX_CONTAINERS} lists, tuples, dicts and sets",
                "Save numpy arrays instead of lists of lists.",
            )
        self.stack.append(container)

    # -- instructions --

    def proto(self) -> None:
        if self.raw(1)[0] > pickle.HIGHEST_PROTOCOL:
            raise pickle.UnpicklingError("a later protocol")

    def frame(self) -> None:
        if self.take(_U8) > self.size - self.at:
            raise Truncated

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def dup(self) -> None:
        self.stack.append(self.stack[-1])

    def int_line(self) -> None:
        line = self.line(24)
        self.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self.small(int(line)))

    def long_line(self) -> None:
        self.stack.append(self.small(int(self.line(24).rstrip(b"L"))))

    def long1(self) -> None:
        self.long(self.raw(1)[0])

    def long4(self) -> None:
        self.long(self.take(_I4))

    def long(self, length: int) -> None:
        self.stack.append(self.small(int.from_bytes(self.raw(min(length, 10)), "little", signed=True)))

    @staticmethod
    def small(value: int) -> int:
        if not -(1 << 63) <= value < 1 << 64:  # larger ones can be chosen so that all their hashes are equal
            raise Limit("an integer of more than 64 bits", "integers of at most 64 bits")
        return value

    def float_line(self) -> None:
        self.stack.append(float(self.line(64)))

    def string(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
            raise pickle.UnpicklingError("a string without quotes")
        self.push_bytes(codecs.escape_decode(line[1:-1])[0])

    def byte_string(self, length: int) -> None:
        raw = self.payload(length)
        self.stack.append(raw) if isinstance(raw, memoryview) else self.push_bytes(raw)

    def push_bytes(self, raw: bytes) -> None:
        self.hold(raw)
        self.stack.append(_SHORT[raw] if len(raw) < 2 else ByteString(raw))

    def small_payload(self, length: int, kind: type = bytes) -> None:
        value = self.payload(length, kind)
        if not isinstance(value, memoryview):
            self.hold(value)
        self.stack.append(value)

    def append(self) -> None:
        value = self.stack.pop()
        self.list_at(-1).append(value)

    def appends(self) -> None:
        items = self.pop_mark()
        self.list_at(-1).extend(items)

    def list_at(self, place: int) -> list:
        target = self.stack[place]
        if type(target) is not list:
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")
        return target

    def setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.fill([key, value])

    def setitems(self) -> None:
        self.fill(self.pop_mark())

    def fill(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError(f"keys for a {type(target).__name__}")
        for i in range(0, len(items), 2):
            target[self.hashes.key(items[i])] = items[i + 1]

    def dict_mark(self) -> None:
        items = self.pop_mark()
        self.new({})
        self.fill(items)

    def additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")
        target.update(map(self.hashes.key, items))

    def frozenset_mark(self) -> None:
        self.new(frozenset(map(self.hashes.key, self.pop_mark())))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.new(items)

    def put(self, index: int) -> None:
        most = min(self.size, MAX_STEPS)  # a pickle that numbers its memos one by one gets no further
        if not 0 <= index <= most:
            raise Limit(f"a memo of {index} entries", f"at most {most}")
        missing = index + 1 - len(self.memo)
        if missing > 0:
            self.memo += [_NOTHING] * missing
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if not 0 <= index < len(self.memo) or self.memo[index] is _NOTHING:
            raise pickle.UnpicklingError(f"no memo {index}")
        self.stack.append(self.memo[index])

    def memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def name(self, module: str, name: str) -> None:
        try:
            self.stack.append(FIXED[module, name])
        except KeyError:
            raise Refused(f"{module[:80]}.{name[:80]}") from None

    def global_lines(self) -> None:
        self.name(self.line().decode("utf-8"), self.line().decode("utf-8"))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("a name that is no text")
        self.name(module, name)

    def inst(self) -> None:
        self.global_lines()
        function = self.stack.pop()
        self.call(function, tuple(self.pop_mark()))

    def obj(self) -> None:
        function, *arguments = self.pop_mark()
        self.call(function, tuple(arguments))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.call(self.stack.pop(), arguments)

    def call(self, function: Any, arguments: Any) -> None:
        if type(function) is not Function or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a call of a {type(function).__name__}")
        self.charge(arguments)
        self.new(function.call(*arguments))

    def charge(self, arguments: tuple) -> None:
        """Account for what a call copies.

        An argument may have been read long ago. Without this account, every instruction could copy one long string.
        """
        for a in arguments:
            if isinstance(a, (str, bytes, bytearray, memoryview)):
                self.spent += len(a)
            elif isinstance(a, (list, tuple, set, frozenset)):
                self.spent += SHARING * len(a)  # an item takes far longer than a byte
        if self.spent > self.budget:
            raise Limit(
                "calls that copy more than the file holds",
                f"calls that copy at most {SHARING} times its {self.size} bytes (and {SPARE >> 20} MiB)",
            )

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (Dtype, Array)):
            raise pickle.UnpicklingError(f"a state for a {type(target).__name__}")
        self.charge(state if isinstance(state, tuple) else ())
        target.build(state)


_NOTHING = object()  # a memo's entry that was not written
_SHORT = {raw: ByteString(raw) for raw in (b"", *(bytes([i]) for i in range(256)))}
_U1, _U2, _U4, _U8 = (struct.Struct(f"<{c}") for c in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


def _refuse(name: str) -> Callable[[Machine], None]:
    def execute(machine: Machine) -> None:
        raise Refused(f"the {name} instruction")

    return execute


def _table() -> list[Callable[[Machine], None] | None]:
    m = Machine

    def push(read: Callable[[Machine], Any]) -> Callable[[Machine], None]:
        return lambda s: s.stack.append(read(s))

    instructions: dict[bytes, Callable[[Machine], None]] = {
        b"\x80": m.proto, b"\x95": m.frame, b"(": m.mark, b"0": m.pop, b"1": m.pop_mark, b"2": m.dup,
        b"N": push(lambda s: None), b"\x88": push(lambda s: True), b"\x89": push(lambda s: False),
        b"I": m.int_line, b"L": m.long_line, b"J": push(lambda s: s.take(_I4)), b"K": push(lambda s: s.take(_U1)),
        b"M": push(lambda s: s.take(_U2)), b"\x8a": m.long1, b"\x8b": m.long4,
        b"F": m.float_line, b"G": push(lambda s: s.take(_F8)),
        b"S": m.string, b"T": lambda s: s.byte_string(s.take(_I4)), b"U": lambda s: s.byte_string(s.take(_U1)),
        b"V": m.text_line,
        b"X": lambda s: s.push_text(s.raw(s.take(_U4))), b"\x8c": lambda s: s.push_text(s.raw(s.take(_U1))),
        b"\x8d": lambda s: s.push_text(s.raw(s.take(_U8))),
        b"B": lambda s: s.small_payload(s.take(_U4)), b"C": lambda s: s.small_payload(s.take(_U1)),
        b"\x8e": lambda s: s.small_payload(s.take(_U8)), b"\x96": lambda s: s.small_payload(s.take(_U8), bytearray),
        b"]": lambda s: s.new([]), b"a": m.append, b"e": m.appends, b"l": lambda s: s.new(s.pop_mark()),
        b")": lambda s: s.stack.append(()), b"t": lambda s: s.new(tuple(s.pop_mark())),
        b"\x85": lambda s: s.tuple_of(1), b"\x86": lambda s: s.tuple_of(2), b"\x87": lambda s: s.tuple_of(3),
        b"}": lambda s: s.new({}), b"d": m.dict_mark, b"s": m.setitem, b"u": m.setitems,
        b"\x8f": lambda s: s.new(set()), b"\x90": m.additems, b"\x91": m.frozenset_mark,
        b"p": lambda s: s.put(int(s.line(20))), b"q": lambda s: s.put(s.take(_U1)), b"r": lambda s: s.put(s.take(_U4)),
        b"g": lambda s: s.get(int(s.line(20))), b"h": lambda s: s.get(s.take(_U1)), b"j": lambda s: s.get(s.take(_U4)),
        b"\x94": m.memoize, b"c": m.global_lines, b"\x93": m.stack_global, b"i": m.inst, b"o": m.obj, b"R": m.reduce,
        b"b": m.build,
    }  # fmt: skip
    refused = {b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"P": "PERSID", b"Q": "BINPERSID", b"\x82": "EXT1",
               b"\x83": "EXT2", b"\x84": "EXT4", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER"}  # fmt: skip
    instructions |= {code: _refuse(name) for code, name in refused.items()}
    return [instructions.get(bytes([i])) for i in range(256)]


_TABLE = _table()
