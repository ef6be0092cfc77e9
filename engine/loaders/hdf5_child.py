"""The process that parses HDF5. It is not the one that trains, because libhdf5 can crash on a hostile file.

`engine.loaders.hdf5` runs it as a script, with a limit of memory in bytes as its argument. It reads requests from
stdin, one JSON array per line. It answers on stdout with a JSON object in one line, then the bytes that this announces:

- `["open", path]` -> `{"root", "videos": [name, ...], "kind": "numbers"|"words"}`, for a CMU-SDK .csd file;
- `["video", name]` -> `{"shape": [n, d], "dtype", "size"}`, then intervals float64 [n, 2] and features [n, d] (float32
  where that holds every value of the file's type, else float64); for words `{"words": [...], "size"}`, then the
  intervals.

An answer `{"error": [found, expected]}` says why a file is refused. Links that leave their place, data kept in other
files, and filters that need a plugin are refused: reading a file must not open others.
"""

import sys

del sys.path[0]  # this script's folder, in which `inspect` and others would hide the standard library's

import contextlib
import json
import os

os.environ["HDF5_PLUGIN_PRELOAD"] = "::"  # no plugins: they are shared libraries looked up on a path

import h5py
import numpy as np

FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
RATIO = 1100  # deflate expands at most 1032 times
MOST = 1 << 31  # bytes of one video's features
VIDEOS = 1 << 20


class Refused(Exception):
    """(found, expected)"""


def child(group, name, kind):
    """A member of a group that really is in this file."""
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        found = "nothing" if link is None else f"a {type(link).__name__}"
        raise Refused(f"{found} at {group.name}/{name}"[:300], "a member of this file")
    member = group[name]
    if not isinstance(member, kind):
        raise Refused(f"a {type(member).__name__} at {member.name}"[:300], f"a {kind.__name__}")
    return member


def names(group):
    if len(group) > VIDEOS:
        raise Refused(f"{len(group)} members of {group.name}"[:300], "one a video")
    return list(group)


def values(dataset, size):
    """A whole dataset, no larger than the file can account for."""
    where = dataset.name[:200]
    if dataset.is_virtual or dataset.external:
        raise Refused(f"data of {where} in other files", "data in this file")
    creation = dataset.id.get_create_plist()
    for i in range(creation.get_nfilters()):
        if creation.get_filter(i)[0] not in FILTERS:
            raise Refused(f"filter {creation.get_filter(i)[0]} on {where}", f"one of {', '.join(FILTERS.values())}")
    if dataset.ndim not in (1, 2) or dataset.dtype.kind not in "fiuSO":
        raise Refused(f"shape {dataset.shape} and dtype {dataset.dtype} of {where}"[:300], "a table of numbers or text")
    if dataset.dtype.kind == "O" and h5py.check_string_dtype(dataset.dtype) is None:
        raise Refused(f"dtype {dataset.dtype} of {where}"[:300], "a table of numbers or text")
    stored = min(dataset.id.get_storage_size(), size)
    if not dataset.nbytes <= min(MOST, RATIO * stored):
        raise Refused(f"{dataset.nbytes} bytes of {where} from {stored} stored", "no more than was stored")
    if dataset.chunks and np.prod(dataset.chunks, dtype=object) * dataset.dtype.itemsize > MOST:
        raise Refused(f"chunks of shape {dataset.chunks} in {where}", "smaller ones")
    return dataset[()]


class Csd:
    """An open .csd file: `/<root>/data/<video>/{features, intervals}`."""

    def __init__(self, path):
        self.size = os.path.getsize(path)
        self.file = h5py.File(path, "r", locking=False)
        roots = [n for n in names(self.file) if isinstance(self.file.get(n, getlink=True), h5py.HardLink)]
        if len(roots) != 1:
            raise Refused(f"{len(roots)} groups at the root", "one, the computational sequence")
        self.root = roots[0]
        self.data = child(child(self.file, self.root, h5py.Group), "data", h5py.Group)
        self.videos = names(self.data)
        if not self.videos:
            raise Refused("no videos", "one group per video")
        first = child(child(self.data, self.videos[0], h5py.Group), "features", h5py.Dataset)
        text = first.dtype.kind == "S" or h5py.check_string_dtype(first.dtype) is not None
        self.kind = "words" if text else "numbers"

    def video(self, name):
        group = child(self.data, name, h5py.Group)
        features, intervals = (child(group, part, h5py.Dataset) for part in ("features", "intervals"))
        if intervals.dtype.kind not in "fiu" or intervals.shape != (*features.shape[:1], 2):
            raise Refused(
                f"intervals of shape {intervals.shape} for features of shape {features.shape} of {name}"[:300],
                "(start, end) a row",
            )
        features, intervals = values(features, self.size), values(intervals, self.size)
        if features.ndim == 1:
            features = features[:, None]
        if (self.kind == "words") != (features.dtype.kind in "SO"):
            raise Refused(f"dtype {features.dtype} of {name}"[:300], "the same kind of features in every video")
        intervals = np.ascontiguousarray(intervals, "<f8")
        if self.kind == "numbers":
            dtype = "<f4" if np.can_cast(features.dtype, np.float32) else "<f8"
            body = np.ascontiguousarray(features, dtype).tobytes()
            return {"shape": list(features.shape), "dtype": dtype}, intervals.tobytes() + body
        if features.shape[1] != 1:
            raise Refused(f"{features.shape[1]} words per row in {name}"[:300], "one")
        text = [w.decode("utf-8", "replace") if isinstance(w, bytes) else str(w) for w in features[:, 0].tolist()]
        return {"words": text}, intervals.tobytes()


def answer(request, opened):
    if request[0] == "open":
        opened.clear()
        csd = Csd(request[1])
        opened.append(csd)
        return {"root": csd.root, "videos": csd.videos, "kind": csd.kind}, b""
    return opened[0].video(request[1])


def main():
    for name, limit in (("RLIMIT_AS", int(sys.argv[1])), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):  # a system without this limit
            import resource

            resource.setrlimit(getattr(resource, name), (limit, limit))
    opened = []
    for line in sys.stdin.buffer:
        body = b""
        try:
            header, body = answer(json.loads(line), opened)
        except Refused as cause:
            header = {"error": list(cause.args)}
        except MemoryError:
            header = {"error": ["more data than the memory allowed for it", "a .csd file of the CMU-SDK"]}
        except Exception as cause:  # the library raises anything for a damaged file
            header = {
                "error": [f"a damaged file ({str(cause)[:300] or type(cause).__name__})", "a .csd file of the CMU-SDK"]
            }
        sys.stdout.buffer.write(json.dumps({**header, "size": len(body)}).encode() + b"\n" + body)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
