"""The allow-list unpickler reads what numpy writes and runs nothing."""

import collections
import io
import os
import pickle
import struct

import numpy as np
import pytest

from engine.errors import DataError
from engine.loaders import safe_pickle
from engine.loaders.safe_pickle import machine
from engine.loaders.safe_pickle.machine import Machine


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


CONTENT = {
    "f8": np.arange(24.0).reshape(2, 3, 4),
    "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big_endian": np.arange(4, dtype=">i4"),
    "str": np.array(["a", "äöü"]),
    "bytes": np.array([[b"video_1", b""]]),
    "empty": np.zeros((0, 3), np.float32),
    "no_width": np.array([""])[:0],
    "object": np.array([None, "x", [1, 2], np.arange(2)], dtype=object),
    "scalar": np.float32(1.5),
    "word": np.str_("word"),
    "no_word": np.str_(""),
    "plain": [1, 2.5, None, True, "x", b"y", (1, (2, 3)), {1, 2}, frozenset({3}), bytearray(b"z")],
    "tuple": ([], np.ones((2, 2)), ["a"], 2),
}


def equal(a, b):
    if isinstance(b, np.ndarray):
        if b.dtype == object:
            return all(equal(x, y) for x, y in zip(a, b, strict=True))
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(6))
def test_reads_what_numpy_writes(tmp_path, protocol):
    loaded = safe_pickle.load(write(tmp_path / "x.pkl", CONTENT, protocol))
    assert list(loaded) == list(CONTENT)
    for key, value in CONTENT.items():
        assert equal(loaded[key], value), key


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_views_of_the_file(tmp_path, protocol, order):
    big = np.asarray(np.random.default_rng(0).normal(size=(100, 50, 8)), order=order)
    assert big.nbytes > safe_pickle.LARGE
    loaded = safe_pickle.load(write(tmp_path / "x.pkl", {"a": big, "b": [big, 1]}, protocol))
    assert np.array_equal(loaded["a"], big)
    assert np.array_equal(loaded["b"][0], big)
    if protocol >= 3:  # protocols 0 to 2 hold bytes as escaped text
        assert not loaded["a"].flags.writeable
        assert not loaded["a"].flags.owndata


def test_an_array_may_be_in_every_row(tmp_path):
    path = write(tmp_path / "x.pkl", list(zip([np.ones((100, 1000))] * 2000, range(2000), strict=True)))
    loaded = safe_pickle.load(path)
    assert len(loaded) == 2000 and all(row[0] is loaded[0][0] for row in loaded)


def test_a_long_text_may_be_in_every_row(tmp_path):
    text, words = "very " * 1000, ["so"] * 500
    loaded = safe_pickle.load(write(tmp_path / "x.pkl", [(text, words, i) for i in range(3000)]))
    assert loaded[2999] == (text, words, 2999)


def test_tuples_as_keys(tmp_path):
    content = {("a", 1): 1, (1.5, None): [2]}
    assert safe_pickle.load(write(tmp_path / "x.pkl", content)) == content


def test_shared_objects_stay_shared(tmp_path):
    a = np.arange(3)
    loaded = safe_pickle.load(write(tmp_path / "x.pkl", [a, a, (a,)]))
    assert loaded[0] is loaded[1] is loaded[2][0]


def test_numpy_1_and_2_names(tmp_path):
    data = pickle.dumps(np.arange(3), protocol=2)
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    new = old.replace(b"numpy.core.multiarray", b"numpy._core.multiarray")
    for i, text in enumerate((old, new)):
        path = tmp_path / f"{i}.pkl"
        path.write_bytes(text)
        assert safe_pickle.load(path).tolist() == [0, 1, 2]


def test_python_2_strings(tmp_path):
    # as Python 2's protocol 2 writes {'id': 'a_1'} and an int64 array [1, 2]: str payloads, not bytes
    raw = np.array([1, 2], "<i8").tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(K\x01(K\x02tcnumpy\ndtype\n(U\x02i8K\x00K\x01tR"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(raw)]) + raw + b"tb"
    )
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}(U\x02idU\x03a_1U\x01x" + array + b"u.")
    loaded = safe_pickle.load(path)
    assert loaded["id"] == "a_1"
    assert loaded["x"].tolist() == [1, 2]
    assert [type(key) for key in loaded] == [str, str] and type(loaded["id"]) is str


@pytest.mark.parametrize(("raw", "text"), [("caf\u00e9".encode(), "caf\u00e9"), (b"caf\xe9", "caf\u00e9"), (b"", "")])
def test_python_2_text_is_decoded(tmp_path, raw, text):
    """Python 2 wrote the bytes of a str: UTF-8 as a rule, else Latin-1."""
    path = tmp_path / "x.pkl"
    for string in (b"U" + bytes([len(raw)]) + raw, b"T" + struct.pack("<i", len(raw)) + raw, repr(raw)[1:].encode()):
        string = b"S" + string + b"\n" if string[:1] in b"'\"" else string
        path.write_bytes(b"\x80\x02}" + string + b"(" + string + string + b"]" + string + b"ats.")
        assert safe_pickle.load(path) == {text: (text, text, [text])}


class Call:
    """Unpickles to a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class State:
    """Unpickles with a state, so that a class off the list is asked for."""

    def __init__(self):
        self.x = 1


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("what", "name"),
    [
        (lambda mark: Call(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
        (lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
        (lambda mark: Call(getattr, "x", "upper"), "builtins.getattr"),
        (lambda mark: Call(__import__, "os"), "builtins.__import__"),
        (lambda mark: Call(os.open, str(mark), os.O_CREAT), "posix.open"),
        (lambda mark: Call(np.save, str(mark), [1]), "numpy.save"),
        (lambda mark: collections.OrderedDict(a=1), "collections.OrderedDict"),
        (lambda mark: State(), "State"),
    ],
)
def test_refuses_everything_else_without_running_it(tmp_path, what, name, nested, protocol):
    mark = tmp_path / "mark"
    value = what(mark)
    content = {"train": {"audio": np.ones((50, 50, 50)), "x": [(1, value)]}} if nested else value
    with pytest.raises(DataError) as error:
        safe_pickle.load(write(tmp_path / "x.pkl", content, protocol))
    text = str(error.value)
    assert name in text.replace("__builtin__", "builtins") or "copyreg" in text or "copy_reg" in text
    assert "x.pkl" in text
    assert "\n" not in text
    assert not mark.exists()


def test_names_reached_through_attributes_are_refused(tmp_path):
    # protocol 4 allows dotted names: numpy.ndarray.tofile would write files
    stream = io.BytesIO()
    stream.write(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")
    path = tmp_path / "x.pkl"
    path.write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=r"numpy\.ndarray\.tofile"):
        safe_pickle.load(path)


@pytest.mark.parametrize(
    "body",
    [
        b"cnumpy\nndarray\n((I1000000000000\nt}tR.",  # would allocate
        b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
        b"cbuiltins\nbytes\n(I1000000000000\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02O8K\x00K\x01tRU\x08AAAAAAAAtR.",  # a forged pointer
        b"cnumpy\ndtype\n(U\x02V8K\x00K\x01tR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nlist\n(I0\ntU\x01btR.",
        b"\x82\x01.",  # EXT1: the extension registry bypasses names
        b"Pid\n.",  # persistent id
    ],
)
def test_forged_instructions_are_refused(tmp_path, body):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + body)
    with pytest.raises(DataError, match="a pickle that asks for"):
        safe_pickle.load(path)


def test_dtype_flags_cannot_be_forged(tmp_path):
    # an object dtype whose state claims plain bytes must not read the bytes as pointers
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(K\x01(K\x01tcnumpy\ndtype\n(U\x02O8K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08AAAAAAAAtb."
    )
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + array)
    with pytest.raises(DataError, match="object array"):
        safe_pickle.load(path)


def test_state_cannot_be_put_on_functions(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02c_codecs\nencode\n}U\x05_callU\x01xsb.")
    with pytest.raises(DataError, match="damaged or foreign"):
        safe_pickle.load(path)


def test_every_truncation_is_one_line(tmp_path):
    whole = pickle.dumps({"a": np.ones((100, 100)), "b": [1, "two", (3.0,)], "c": np.array(["x"])}, protocol=4)
    path = tmp_path / "x.pkl"
    for size in {*range(1, 200), *range(200, len(whole), 997), *range(len(whole) - 100, len(whole))}:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError) as error:
            safe_pickle.load(path)
        assert "\n" not in str(error.value)
        assert "ends early" in str(error.value)


def test_flipped_bytes_never_escape(tmp_path):
    whole = bytearray(pickle.dumps({"a": np.arange(4), "b": ["x", {"y": (1, 2)}]}, protocol=2))
    path = tmp_path / "x.pkl"
    rng = np.random.default_rng(0)
    for _ in range(400):
        broken = whole.copy()
        broken[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(broken)
        try:
            safe_pickle.load(path)
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>sign in</html>", "a web page"),
        (b"\n  <html><head>", "a web page"),
        (b"PK\x03\x04rest", "zip archive or a torch.save"),
        (b"\x89HDF\r\n\x1a\nrest", "HDF5"),
        (b"\x1f\x8brest", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"\xff\xd8\xff\xe0 a picture", "invalid load key b'\\xff' at byte 0"),
        (b"video_id,clip_id\n", "damaged or foreign pickle"),
    ],
)
def test_other_files_are_named(tmp_path, content, found):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        safe_pickle.load(path)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_lengths_beyond_the_file_allocate_nothing(tmp_path):
    path = tmp_path / "x.pkl"
    for body in (
        b"\x8e" + struct.pack("<Q", 1 << 60),
        b"\x95" + struct.pack("<Q", 1 << 60),
        b"B" + struct.pack("<I", 1 << 31),
    ):
        path.write_bytes(b"\x80\x04" + body + b"abc.")
        with pytest.raises(DataError, match="ends early"):
            safe_pickle.load(path)
    path.write_bytes(b"\x80\x04Nr" + struct.pack("<I", (1 << 32) - 1) + b".")  # not a table of 32 GB
    with pytest.raises(DataError, match="a memo of 4294967295 entries"):
        safe_pickle.load(path)
    path.write_bytes(b"\x80\x04Nq\x05K\x01h\x05\x86.")  # a memo with gaps, as optimised pickles have it
    assert safe_pickle.load(path) == (1, None)


def test_deep_nesting_is_one_line(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(DataError, match="nested"):
        safe_pickle.load(path)


def test_self_reference_is_refused(tmp_path):
    loop = [1]
    loop.append(loop)
    with pytest.raises(DataError, match="holds itself"):
        safe_pickle.load(write(tmp_path / "x.pkl", loop))


def laughs(levels, width):
    """A list that holds one list `width` times, that again one, ...: `width ** levels` items in a few bytes."""
    inner = ["ha" * 8] * width
    for _ in range(levels):
        inner = [inner] * width
    return inner


def raw(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


LONG_TEXT = b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"q\x00"
BOMBS = {
    "billion laughs": (pickle.dumps(laughs(9, 10)), "shared more often"),
    "one text in every row": (
        pickle.dumps(list(zip(["long " * 20_000] * 2000, range(2000), strict=True))),
        "shared more often than 16 times on average; expected lists and texts that count at most 16 times",
    ),
    "nested tuples as a key": (raw(b"}", b")", b"\x85" * 200_000, b"Ns"), "as a key"),
    "nested tuples in a set": (raw(b"\x8f(", b")", b"\x85" * 200_000, b"\x90"), "as a key"),
    "nested tuples": (raw(b")", b"\x85" * 200_000), "nested more than"),
    "integers with equal hashes": (
        raw(b"}", *(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"Ns" for i in range(2**10, 3000))),
        "64 bits",
    ),
    "an integer of a megabyte": (raw(b"\x8b" + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20)), "64 bits"),
    "a number of a megabyte of digits": (raw(b"I" + b"1" * (1 << 20) + b"\n"), "too many digits"),
    "one text copied by every call": (
        raw(LONG_TEXT, b"(", b"c_codecs\nencode\n(h\x00tR" * 50_000, b"t"),
        "copy more than",
    ),
    "one list made a set by every call": (
        raw(b"(", b"K\x01" * 100_000, b"lq\x00(", b"cbuiltins\nset\n(h\x00tR" * 20_000, b"t"),
        "copy more than",
    ),
    "one list made an array by every call": (
        raw(
            b"(" + b"K\x01" * 50_000 + b"lq\x00cnumpy\ndtype\n(X\x02\x00\x00\x00O8tRq\x01(",
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(K\x01(M\x50\xc3th\x01\x89h\x00tb"
            * 5000,
            b"t",
        ),
        "copy more than",
    ),
    "arrays without width": (
        raw(
            b"(",
            b"cnumpy\ndtype\n(X\x02\x00\x00\x00S0tRq\x01",
            b"cnumpy.core.numeric\n_frombuffer\n(C\x00h\x01J\xff\xff\xff\x7f\x85tR" * 100,
            b"t",
        ),
        "without data",
    ),
    "an empty array of a billion rows": (
        raw(
            b"cnumpy.core.numeric\n_frombuffer\n(C\x00cnumpy\ndtype\n(X\x02\x00\x00\x00f4tRJ\x00\x00\x00\x40K\x00\x86tR"
        ),
        "without data",
    ),
    "text beyond Unicode": (
        raw(
            b"cnumpy.core.numeric\n_frombuffer\n(C\x04\xff\xff\xff\xffcnumpy\ndtype\n(X\x02\x00\x00\x00U1tRK\x01\x85tR"
        ),
        "beyond Unicode",
    ),
    "containers without end": (raw(b"\x8f" * 20_000), "containers"),
    "a function as the result": (raw(b"cnumpy\nndarray\n"), "a function where a value belongs"),
    "a dtype as the result": (raw(b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR"), "a dtype where a value belongs"),
    "a later protocol": (b"\x80\x63N.", "later protocol"),
    "items for a tuple": (raw(b")Na"), "items for a tuple"),
    "an empty stack": (b".", "damaged or foreign"),
    "a mark that is not there": (raw(b"t"), "damaged or foreign"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_memory(tmp_path, name, monkeypatch):
    import resource
    import time

    if name == "containers without end":
        monkeypatch.setattr(machine, "MAX_CONTAINERS", 10_000)
    content, found = BOMBS[name]
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(DataError, match=found) as error:
        safe_pickle.load(path)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        safe_pickle.load(tmp_path / "none.pkl")


def numpy_scalars(kind, values):
    start = (
        b"cnumpy.core.multiarray\nscalar\nq\x00cnumpy\ndtype\n(X"
        + struct.pack("<I", len(kind))
        + kind.encode()
        + b"tRq\x01}("
    )
    return raw(start, *(b"h\x00h\x01C" + bytes([len(v)]) + v + b"\x86RN" for v in values), b"u")


def test_keys_of_one_hash_are_few(tmp_path, monkeypatch):
    """-1 and -2 have one hash, and so have tuples of them: 17 such pairs are data, one more key is an attack."""
    path = tmp_path / "x.pkl"
    few = {(-1 - i % 2, -1 - i // 2 % 2, -1 - i // 4 % 2, -1 - i // 8 % 2): i for i in range(16)}
    assert len({hash(key) for key in few}) == 1
    assert safe_pickle.load(write(path, [few] * 100)) == [few] * 100  # the same keys in every row count once
    many = {(*key, last): last for key in few for last in (-1, -2)}
    with pytest.raises(DataError, match="keys that were chosen to have one hash; expected at most 16"):
        safe_pickle.load(write(path, many))
    with pytest.raises(DataError, match="keys that were chosen"):
        safe_pickle.load(write(path, set(many)))


@pytest.mark.parametrize(
    ("kind", "value"), [("c16", np.complex128(1)), ("c8", np.complex64(1)), ("f16", np.longdouble(1))]
)
def test_numbers_that_are_no_keys(tmp_path, kind, value):
    (tmp_path / "x.pkl").write_bytes(numpy_scalars(kind, [value.tobytes()]))
    with pytest.raises(DataError, match="as a key; expected text, real numbers"):
        safe_pickle.load(tmp_path / "x.pkl")


def test_real_numbers_are_keys(tmp_path):
    content = {np.float32(1.5): 1, np.int64(-3): 2, np.float64(2.5): 3, b"b": 4, "s": 5}
    assert safe_pickle.load(write(tmp_path / "x.pkl", content)) == content


@pytest.mark.parametrize("limit", ["texts", "memo"])
def test_texts_and_memo_are_charged(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(machine, "SPARE", 1 << 10)
    path = tmp_path / "x.pkl"
    if limit == "texts":
        path.write_bytes(raw(b"(" + b"\x8c\x02ab" * 900 + b"l"))  # 58 bytes each, of 4 in the file
        assert safe_pickle.load(path) == ["ab"] * 900
        path.write_bytes(raw(b"(" + b"U\x02ab" * 100 + b"\x8c\x02ab" * 9000 + b"l"))
        assert len(safe_pickle.load(path)) == 9100
        monkeypatch.setattr(machine, "TEXT_BYTES", 63)
        with pytest.raises(DataError, match=r"texts that take far more memory than the file; expected .* 16 times"):
            safe_pickle.load(path)
    else:
        path.write_bytes(raw(b"N", b"\x94" * 5000))
        assert safe_pickle.load(path) is None
        read = Machine(path.read_bytes())
        read.run()
        assert type(read.memo) is list and len(read.memo) == 5000  # 8 bytes an entry, not a dict's 100


def test_shapes_and_names_of_endless_size(tmp_path):
    path = tmp_path / "x.pkl"
    array = b"cnumpy.core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n(X\x02\x00\x00\x00f4tR("
    path.write_bytes(raw(array, b"M\xff\xff" * 33, b"ttR"))
    with pytest.raises(DataError, match="an array without a shape"):
        safe_pickle.load(path)
    path.write_bytes(raw(b"cnumpy\ndtype\n(]tR"))
    with pytest.raises(DataError, match="a numpy dtype of a list"):
        safe_pickle.load(path)
    path.write_bytes(raw(b"c_codecs\nencode\n(X\x01\x00\x00\x00a]tR"))
    with pytest.raises(DataError, match="something that is no text"):
        safe_pickle.load(path)
    os.mkfifo(tmp_path / "pipe.pkl")
    with pytest.raises(DataError, match="no file"):
        safe_pickle.load(tmp_path / "pipe.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_a_second_pickle_in_the_file(tmp_path, protocol):
    """One pickle.dump for every split into one file: only the first would be read."""
    path = write(tmp_path / "x.pkl", {"train": [1]}, protocol)
    one = path.read_bytes()
    path.write_bytes(one + one)
    found = rf"another one or other bytes after it, at byte {len(one)} of {2 * len(one)}; .* in one dict"
    with pytest.raises(DataError, match=found):
        safe_pickle.load(path)
    path.write_bytes(one + bytes(1 << 17) + one)
    with pytest.raises(DataError, match=rf"after it, at byte {len(one)} of"):
        safe_pickle.load(path)
    for filling in (bytes(512), b"\r\n "):  # a block that was filled up; an editor's end of line
        path.write_bytes(one + filling)
        assert safe_pickle.load(path) == {"train": [1]}
