"""24 hostile settings files."""

from collections.abc import Callable
from pathlib import Path

import yaml

from tests.hostile import files
from tests.hostile.files import ESCAPE
from tests.hostile.runner import MARK, Case, data, settings

LEVELS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 10))
MERGES = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 10))
TEXTS: dict[str, str | bytes] = {
    "a billion laughs": f"l0: &l0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n{LEVELS}seed: *l9\n",
    "a billion merges": f"m0: &m0 {{a: 1, b: 2}}\n{MERGES}data: {{<<: *m9}}\n",
    "a list that holds itself": "data: &a [*a]\n",
    "100,000 brackets": "seed: " + "[" * 100_000,
    "300 nested maps": "".join(" " * i + "a:\n" for i in range(300)),
    "a number of 100,000 digits": "seed: " + "9" * 100_000,
    "a hexadecimal number of 100,000 digits": "epochs: 0x" + "f" * 100_000,
    "a number to the base 60 of 50,000 places": "epochs: 1" + ":59" * 50_000,
    "a Python object": f"seed: !!python/object/apply:os.system ['touch {MARK}']\n",
    "a Python name": "seed: !!python/name:os.system\n",
    "a date that is none": "seed: 2001-99-99\n",
    "ten megabytes": "# a comment\n" * 900_000,
    "a character that YAML forbids": b"preset: mosi\n# \x00\n",
    "escape sequences in a key and a value": f"{ascii(ESCAPE).replace(chr(39), chr(34))}: 1\n",
    "a list as a key": "? [1, 2]\n: 3\n",
    "a key twice": "preset: mosi\nepochs: 2\nepochs: 3\n",
}


def _text(content: str | bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        files.text(content)(folder / "x.yaml")
        return ["config", "--config", "x.yaml"]

    return make


def _trained(**changes: dict | int) -> Callable[[Path], list[str]]:
    """A run by sound settings with a few changed; lower levels too."""

    def make(folder: Path) -> list[str]:
        values = settings().model_dump(mode="json")
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        (folder / "x.yaml").write_text(yaml.safe_dump(values))
        return ["train", "--config", "x.yaml", "--data", str(data()), "--out", "out"]

    return make


WIDE = [[9000, 3, 9000], [9000, 3, 9000]]
LARGE = {
    "a width of 16,384": _trained(model={"d_common": 1 << 14}),
    "a time axis of 99,999": _trained(data={"time_len": 99_999}, model={"d_common": 2048}),
    "CubeMLP of 9,000 by 9,000": _trained(model={"cubemlp": {"d_hiddens": WIDE, "d_outs": WIDE}}),
    "a billion workers": _trained(data={"loader": "torch", "workers": 10**9}),
    "a billion classes": _trained(model={"task": "classification", "num_class": 10**9}, train={"loss": "CE"}),
}


def _odd(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        change(folder / "x.yaml")
        return ["config", "--config", "x.yaml"]

    return make


YAMLS = [
    *(Case(name, _text(content)) for name, content in TEXTS.items()),
    *(Case(name, make) for name, make in LARGE.items()),
    *(Case(name, _odd(change)) for name, change in (("a pipe", files.fifo), ("a device", files.device),
                                                    ("a link to itself", files.itself))),
]  # fmt: skip
assert len(YAMLS) == 24
