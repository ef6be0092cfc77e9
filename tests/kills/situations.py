"""The situations: each starts runs, stops them, lets them go on, and counts those that ended as they should have."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.cli import main
from engine.config import Config
from tests.kills.children import Child, Ended, Renames, Steps
from tests.kills.content import content, curves, differing
from tests.loaders import writers
from tests.small_runs import SIZES, make_text_encoder, small_config

SINGLE, SHORT, SEEDS = "a single run", "a single run of 2 epochs", "seeds=0-2"
WORDS = {SINGLE: [], SHORT: ["epochs=2"], SEEDS: [SEEDS, "epochs=2", "objective.enabled=false"]}
EVERY = {f"a run with a checkpoint every {'batch' if n == 1 else f'{n} batches'}": n for n in (1, 2, 3)}
WORDS |= {kind: [f"train.checkpoint_steps={n}"] for kind, n in EVERY.items()}
"""The runs that are stopped -> their settings beside those of `tests.small_runs.small_config`."""


@dataclass
class Count:
    """What one situation came to. `wrong`: one line for everything that is not as it should be."""

    title: str
    tried: int = 0
    notes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, problem: str | None, note: str | None = None) -> None:
        self.tried += 1
        if problem:
            self.wrong.append(problem)
        if note:
            self.notes[note] += 1

    def row(self) -> str:
        notes = ", ".join(f"{count} {note}" for note, count in sorted(self.notes.items()))
        return f"| {self.title} | {self.tried} | {self.tried - len(self.wrong)} | {notes} |"


class Place:
    """A folder with tiny data, a tiny text encoder and runs."""

    def __init__(self, folder: Path, seed: int):
        torch.set_num_threads(1)
        self.folder, self.random = folder, random.Random(seed)
        self.data, self.number = folder / "data", 0
        writers.write_declarelab(self.data, writers.samples(sizes=SIZES))
        config = small_config(self.data, make_text_encoder(folder / "bert"))
        config.output.tensorboard = config.output.report = True
        config.data.normalize_audio = config.data.normalize_vision = "zscore"
        self.config = folder / "tiny.yaml"
        config.save(self.config)
        self.settings = config
        # Whatever a first run imports and compiles is there for all of them.
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(self.words(folder / "first")) == 0
        self._whole: dict[str, tuple[dict, float, list[str]]] = {}
        self.batches: dict[str, list[str]] = {}  # of every uninterrupted run

    def words(self, out: Path, *more: str, resume: bool = False, config: Path | None = None) -> list[str]:
        start = ["--resume"] if resume else ["--config", str(config or self.config)]
        return ["train", *start, "--out", str(out), *more]

    def new(self) -> Path:
        self.number += 1
        return self.folder / f"run{self.number}"

    def child(self, words: list[str], before: Callable[[], None] = lambda: None) -> Child:
        self.number += 1
        return Child(words, self.folder / f"log{self.number}.txt", before)

    def engine(self, words: list[str], before: Callable[[], None] = lambda: None) -> Ended:
        return self.child(words, before).wait()

    def whole(self, kind: str) -> tuple[dict, float, list[str]]:
        """An uninterrupted run: its content, seconds of computing, and the files that it renamed."""
        if kind not in self._whole:
            out, log = self.new(), self.folder / f"renames {kind}"
            steps, renames = self.steps(), Renames(names=log)
            ended = self.engine(self.words(out, *WORDS[kind]), lambda: (steps(), renames()))
            assert ended.code == 0, ended.output
            self.batches[kind] = steps.read()
            self._whole[kind] = content(out), ended.seconds, log.read_text().split()
        return self._whole[kind]

    def steps(self, **moment: int) -> Steps:
        self.number += 1
        return Steps(self.folder / f"steps{self.number}", **moment)

    def finish(
        self,
        out: Path,
        kind: str,
        what: str,
        before: Steps | None = None,
        most: int = 0,
        told: str = "",
        signalled: bool = False,
    ) -> str | None:
        """Resume a run and compare it with the uninterrupted one; what is wrong with it.

        Args:
            before: the batches that were done before it was stopped; at most `most` of them may be done again.
            told: what has to be said.
            signalled: whether a signal had it save where an uninterrupted run saves nothing. The last checkpoint but
                one is another then.
        """
        after = self.steps()
        ended = self.engine(self.words(out, *[SEEDS] * (kind == SEEDS), resume=True), after)
        if ended.code == 2 and "none of --preset, --config and --task" in ended.output:  # killed before it had a folder
            ended = self.engine(self.words(out, *WORDS[kind]), after)
        if ended.code != 0 or "Traceback" in ended.output:
            return f"{what}: resumed with exit code {ended.code}: {ended.output.strip()[-500:]}"
        found = differing(content(out), self.whole(kind)[0])
        if found := [name for name in found if not (signalled and name.endswith("previous.safetensors"))]:
            return f"{what}: other {', '.join(found)}"
        if told not in ended.output:
            return f"{what}: not told: {told}"
        lost = 0 if before is None else self.lost(kind, before.read(), after.read())
        if not 0 <= lost <= most:
            return f"{what}: {lost} batches were done again"
        for run in out.glob("seed*") if kind == SEEDS else [out]:
            if any(len(values) != 1 for values in curves(run).values()) or len(curves(run)) < 3:
                return f"{what}: points of TensorBoard are missing or doubled"
        shutil.rmtree(out)
        return None

    def lost(self, kind: str, before: list[str], after: list[str]) -> int:
        """How many batches were done a second time."""
        whole = self.batches[kind]
        begun = whole.index(after[0]) if after else len(whole)
        if after != whole[begun:]:
            return len(whole)
        return (whole.index(before[-1]) + 1 if before else 0) - begun


def killed_within(place: Place, runs: int) -> Iterator[Count]:
    """SIGKILL at a random moment of runs with checkpoints within their epochs: no more than the interval is lost."""
    for kind, interval in EVERY.items():
        count = Count(f"`kill -9` of {kind} at a random moment: at most {interval} done again")
        while count.tried < runs:
            out, seconds, steps = place.new(), place.whole(kind)[1], place.steps()
            child = place.child(place.words(out, *WORDS[kind]), steps)
            child.compute(0.15 * seconds + place.random.uniform(0, 0.85 * seconds))
            child.kill()
            if child.wait().code == 0:  # it was faster
                shutil.rmtree(out)
                continue
            count.add(place.finish(out, kind, f"{out.name}, killed within", steps, interval), _stage(steps))
        yield count


def killed_in_writes(place: Place, runs: int) -> Iterator[Count]:
    """SIGKILL while a checkpoint is being written."""
    kind, interval = next(iter(EVERY.items()))
    count = Count(f"`kill -9` of {kind} in the middle of writing one: at most {interval} done again")
    while count.tried < runs:
        out, steps = place.new(), place.steps(kill_in_write=place.random.randint(1, 12000))
        ended = place.engine(place.words(out, *WORDS[kind]), steps)
        if ended.code == 0:  # it wrote fewer
            shutil.rmtree(out)
            continue
        count.add(place.finish(out, kind, f"{out.name}, killed in a write", steps, interval), _stage(steps))
    yield count


def _stage(steps: Steps) -> str:
    done = steps.read()
    return f"in epoch {done[-1].split()[0]}" if done else "before a batch"


def damaged(place: Place, tries: int) -> Iterator[Count]:
    """Flipped bits and truncations of what a run that was killed within an epoch has left."""
    kind = next(iter(EVERY))
    killed, steps = place.new(), place.steps(kill_after=9)
    place.whole(kind)
    assert place.engine(place.words(killed, *WORDS[kind]), steps).code == -signal.SIGKILL
    last, previous = "last.safetensors", "previous.safetensors"
    cases = [(last,), (last,), (last, previous), ("history.jsonl",), ("checksums.json",), (previous,)]
    count = Count("a bit flipped or a file cut off after `kill -9` within an epoch")
    for number in range(tries):
        out, names = place.new(), cases[number % len(cases)]
        shutil.copytree(killed, out)
        for name in names:
            _damage(place, out / name)
        what = f"{out.name}, damaged {' and '.join(names)}"
        if names in ((last,), (previous,)):  # a damaged copy of the one before is not needed
            told = f"The run goes on from {previous}, in epoch 1, after " if names == (last,) else ""
            count.add(place.finish(out, kind, what, steps, most=2, told=told), " and ".join(names))
            continue
        ended = place.engine(place.words(out, resume=True))
        named = str(out) if len(names) > 1 else names[0]
        if ended.code != 2 or named not in ended.one_line or "Traceback" in ended.output:
            count.add(f"{what}: exit code {ended.code}: {ended.output.strip()[-500:]}")
        else:
            count.add(None, " and ".join(names))
    yield count


def _damage(place: Place, path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = place.random.randrange(len(content))
    if place.random.random() < 0.5:
        content[at] ^= 1 << place.random.randrange(8)
    else:
        del content[at:]
    path.write_bytes(content)


def killed_at_random(place: Place, runs: int, kind: str) -> Iterator[Count]:
    """SIGKILL after a random share of what a run computes."""
    count = Count(f"`kill -9` of {kind} at a random moment")
    while count.tried < runs:
        out, seconds = place.new(), place.whole(kind)[1]
        child = place.child(place.words(out, *WORDS[kind]))
        child.compute(place.random.uniform(0, seconds))
        child.kill()
        if child.wait().code == 0:  # it was faster
            shutil.rmtree(out)
            continue
        epochs = sum(len(p.read_text().splitlines()) for p in out.rglob("history.jsonl"))
        count.add(place.finish(out, kind, f"{out.name}, killed at random"), f"after {epochs} epochs")
    yield count


def killed_at_renames(place: Place, every: int, kind: str) -> Iterator[Count]:
    """SIGKILL just before and, of a single run, just after each file gets its name."""
    names, moments = place.whole(kind)[2], (False,) if kind == SEEDS else (False, True)
    count = Count(f"kill before{' and after' * (len(moments) == 2)} every rename of {kind} ({len(names)} renames)")
    for at in range(1, len(names) + 1, every):
        for after in moments:
            out = place.new()
            ended = place.engine(place.words(out, *WORDS[kind]), Renames(at, after))
            what = f"{out.name}, killed {'after' if after else 'before'} rename {at}, of {names[at - 1]}"
            if ended.code != -signal.SIGKILL:
                count.add(f"{what}: not killed: {ended.output}")
                continue
            count.add(place.finish(out, kind, what), "after" if after else "before")
    yield count


def signalled(place: Place, runs: int, kind: str) -> Iterator[Count]:
    """Signals that ask a run to end, at random moments: one line, the right exit code, nobody left behind."""
    again = "" if kind == SEEDS else ": no batch done again"
    count = Count(f"SIGINT, SIGTERM, SIGHUP or SIGUSR1 to {kind} at a random moment{again}")
    while count.tried < runs:
        out, seconds, steps = place.new(), place.whole(kind)[1], place.steps()
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)[count.tried % 4]
        child = place.child(place.words(out, *WORDS[kind]), steps)
        child.wait_until_it_works()
        child.compute(place.random.uniform(0, seconds))
        child.kill(number)
        ended = child.wait()
        if ended.code == 0:
            shutil.rmtree(out)
            continue
        what = f"{out.name}, {number.name}"
        lines = [line for line in ended.output.splitlines() if not line.startswith(("warning:", " "))]
        said = "interrupted:" if number == signal.SIGINT else f"interrupted by {number.name}:"
        # a run that was at its end has said how it went
        alone = len(lines) == 1 or (lines and "test metrics at the best epoch" in ended.output)
        if ended.code != 128 + number or not alone or not lines[-1].startswith(said):
            count.add(f"{what}: exit code {ended.code}: {ended.output.strip()[-500:]}")
        elif not child.left_alone():
            count.add(f"{what}: a process of it is left")
        else:
            before = None if kind == SEEDS else steps
            count.add(place.finish(out, kind, what, before, signalled=True), number.name)
    yield count


def pairs(place: Place, each: int) -> Iterator[Count]:
    """Two runs, and two resumes, into one folder at once: one wins, and the other says why."""
    for resume in (False, True):
        count = Count(f"pairs of {'resumes' if resume else 'runs'} into one folder at once")
        for _ in range(each):
            out, begin, other = place.new(), os.pipe(), os.pipe()
            if resume:
                assert place.engine(place.words(out, "epochs=1")).code == 0
            words = place.words(out, *resume * ["epochs=3"], resume=resume)
            both = [place.child(words, lambda pipes=(begin, other): _side_by_side(*pipes)) for _ in range(2)]
            time.sleep(0.1)
            for end in (*begin, *other):
                os.close(end)
            ended = sorted((child.wait() for child in both), key=lambda e: e.code)
            refused = ended[1].one_line
            said = "another process is writing" in refused or (not resume and "another run" in refused)
            if [e.code for e in ended] != [0, 2] or not said:
                count.add(f"{out.name}: exit codes {[e.code for e in ended]}: {ended[1].output.strip()[-500:]}")
            elif not resume and (found := differing(content(out), place.whole(SINGLE)[0])):
                count.add(f"{out.name}: other {', '.join(found)}")
            else:
                count.add(None, "one won")
        yield count


def _side_by_side(begin: tuple[int, int], other: tuple[int, int]) -> None:
    """In a child: wait until `begin` is closed, and train only when all others that hold `other` have ended."""
    from engine.training.run import TrainingRun

    train_epoch = TrainingRun._train_epoch

    def alone(*arguments):
        TrainingRun._train_epoch = train_epoch
        os.close(other[1])
        os.read(other[0], 1)
        return train_epoch(*arguments)

    TrainingRun._train_epoch = alone
    os.close(begin[1])
    os.read(begin[0], 1)


def others(place: Place, kinds: int) -> Iterator[Count]:
    """A resume with other data or settings: refused, in one line that names what differs."""
    count = Count("resumes with other data or settings")
    run = place.new()
    assert place.engine(place.words(run)).code == 0
    before = content(run)
    for kind, (change, named) in list(OTHERS.items())[:kinds]:
        config, out = place.settings.model_copy(deep=True, update={"epochs": 5}), place.new()
        shutil.copytree(run, out)
        more = change(place, config, out)
        config.save(place.folder / "other.yaml")
        resume = ["--resume"] if more is None else ["--resume", "--config", str(place.folder / "other.yaml"), *more]
        ended = place.engine(
            ["train", *resume, "--out", str(out), "epochs=5" if kind != "fewer epochs" else "epochs=2"]
        )
        if ended.code != 2 or named not in ended.one_line or len(ended.one_line.splitlines()) != 1:
            count.add(f"{kind}: exit code {ended.code}: {ended.output.strip()[-500:]}")
        elif found := [name for name in differing(content(out), before) if name != "config.yaml" or more is not None]:
            count.add(f"{kind}: it changed {', '.join(found)}")
        else:
            count.add(None, kind)
    yield count


def _data(edit: Callable[[dict], None]) -> Callable[[Place, Config, Path], list[str]]:
    """Data with another content, written the same way."""

    def change(place: Place, config: Config, out: Path) -> list[str]:
        samples = writers.samples(sizes=SIZES)
        edit(samples)
        writers.write_declarelab(place.folder / f"data-{out.name}", samples)
        config.data.path = str(place.folder / f"data-{out.name}")
        return []

    return change


def _label(samples: dict) -> None:
    samples["test"][2].label += 0.25


def _feature(samples: dict) -> None:
    samples["train"][3].audio[0, 1] += 0.5


def _text(samples: dict) -> None:
    samples["valid"][1].text = samples["valid"][0].text


def _fewer(samples: dict) -> None:
    del samples["train"][-1]


def _order(samples: dict) -> None:
    samples["test"].reverse()


def _edited(place: Place, config: Config, out: Path) -> None:
    path = out / "config.yaml"
    path.write_text(path.read_text().replace("batch_size: 6", "batch_size: 7"))


def _unchanged(place: Place, config: Config, out: Path) -> list[str]:
    return []


OTHERS: dict[str, tuple[Callable[[Place, Config, Path], list[str] | None], str]] = {
    "another label": (_data(_label), "(test)"),
    "train.lr": (lambda *_: ["train.lr=0.5"], "train.lr=0.5, not 0.01"),
    "an edited config.yaml": (_edited, "batch_size=7, not 6"),
    "a sample less": (_data(_fewer), "(train)"),
    "another feature": (_data(_feature), "(train)"),
    "another text": (_data(_text), "(valid)"),
    "another order": (_data(_order), "(test)"),
    "seed": (lambda *_: ["seed=1"], "seed=1, not 0"),
    "mode": (lambda *_: ["mode=faithful"], "mode=faithful, not fast"),
    "objective.bound": (lambda *_: ["objective.bound=mine"], "objective.bound=mine, not"),
    "fewer epochs": (_unchanged, "3 finished epochs"),
}
"""What is other -> how it is made (the words to resume with; None: the run's own settings), and what has to be said."""
