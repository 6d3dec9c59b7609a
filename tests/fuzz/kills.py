"""Commands that are killed at random moments and started again, compared with a run that nothing has disturbed."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch

from tests.launching import command, finish, kill, start
from tests.tiny_rows import CONFIGS, GOLDEN, QWEN_PIXELS, TARGETS, generate, write_rows
from vispec.demo.make_benchmarks import FIRST_SCENE
from vispec.demo.make_data import write_coco
from vispec.demo.scenes import scene_of

TEXTS, IMAGES, QUESTIONS = 60, 24, 16
EPOCHS = 12
END_SECONDS = 60
"""Time that a command and its workers have to end in."""
WORKING_SHARE, NEIGHBOURS_SHARE = 0.6, 0.2
"""Of the starts: those that are killed when there is a first file, not while the command imports, and those beside
which the same command is started again."""

OF_A_CLOCK = ("seconds", "samples_per_second", "wall_time", "decode_time", "tstamp", "answer_id")
OF_STARTS = ("resumed", "git_revision")
"""Names in files whose values are others in every run, or in one that has gone on, perhaps in an edited checkout."""


@dataclass(frozen=True)
class Run:
    """A command that fills a folder."""

    name: str
    words: Callable[["Workshop"], list[str]]
    """What python is given, without the folder."""
    out: str
    """Flag of the folder, or of the file in it."""
    file: str = ""
    processes: int = 1


@dataclass(frozen=True)
class Undisturbed:
    """What a run comes to that nothing has disturbed, and how long it takes."""

    contents: dict
    first_file: float
    """Seconds until the first one is there."""
    seconds: float


@dataclass
class Workshop:
    """Data for all runs, and what they come to undisturbed."""

    folder: Path

    def __post_init__(self):
        self._undisturbed: dict[str, Undisturbed] = {}

    @cached_property
    def rows(self) -> Path:
        return write_rows(self.folder / "rows", TEXTS, IMAGES)

    @cached_property
    def samples(self) -> Path:
        folder = self.folder / "samples"
        assert generate("image", "llava", self.rows, folder, "--store", "all") == 0
        return folder

    @cached_property
    def questions(self) -> Path:
        write_coco(self.folder / "coco", [scene_of("eval", FIRST_SCENE + i) for i in range(QUESTIONS)])
        return self.folder / "coco"

    @property
    def out(self) -> Path:
        """Of every run, undisturbed or not, so that what the files say of their commands is the same."""
        return self.folder / "out"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def command(self, run: Run) -> list[str]:
        return command(run.processes, *run.words(self), run.out, str(self.out / run.file))

    def undisturbed(self, run: Run) -> Undisturbed:
        if run.name not in self._undisturbed:
            shutil.rmtree(self.out, ignore_errors=True)
            words = self.command(run)  # makes the data
            started = time.monotonic()
            process = start(words, self.log)
            while process.poll() is None and not self._begun():
                time.sleep(0.01)
            first_file = time.monotonic() - started
            assert process.wait() == 0, self.log.read_text()
            self._undisturbed[run.name] = Undisturbed(contents(self.out), first_file, time.monotonic() - started)
        return self._undisturbed[run.name]

    def _begun(self) -> bool:
        return self.out.is_dir() and any(not path.name.startswith(".") for path in self.out.iterdir())

    def disturb(self, run: Run, dice: random.Random) -> tuple[list[str], list[str], int]:
        """Kill a run some times, let it end, and compare.

        Returns:
            What each kill was; what is wrong; files compared.
        """
        expected = self.undisturbed(run)
        shutil.rmtree(self.out)
        kills, wrong = [], []
        for _ in range(dice.choice((1, 1, 2, 3))):
            process = start(self.command(run), self.log)
            neighbour = self._neighbour(process, run) if dice.random() < NEIGHBOURS_SHARE else None
            waited = self._wait(process, expected, dice)
            if process.poll() is None:
                number = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
                kills.append(f"{number.name} after {waited:.2f} s")
                wrong += self._kill(process, run, number, everyone=dice.random() < 0.5)
            if neighbour:
                wrong += self._refused(neighbour)
        try:
            finish(self.command(run), self.log)
        except AssertionError as error:
            return kills, [*wrong, f"does not go on: {error}"], 0
        found = contents(self.out)
        for name in sorted(found.keys() | expected.contents.keys()):
            if found.get(name) != expected.contents.get(name):
                there = "missing" if name not in found else "left over" if name not in expected.contents else "differs"
                wrong.append(f"{name} {there}")
        return kills, wrong, len(found)

    def _wait(self, process: psutil.Popen, expected: Undisturbed, dice: random.Random) -> float:
        """Until a moment before the end of the command, or while it still imports; returns the last seconds of it."""
        seconds = dice.uniform(0, expected.first_file)
        if dice.random() < WORKING_SHARE:
            while process.poll() is None and not self._begun():
                time.sleep(0.005)
            seconds = dice.uniform(0, expected.seconds - expected.first_file)
        time.sleep(seconds)
        return seconds

    def _kill(self, process: psutil.Popen, run: Run, number: signal.Signals, everyone: bool) -> list[str]:
        """Send a signal to a command, kill -9 also to all that it has launched; returns what is wrong then."""
        wrong, workers = [], process.children(recursive=True)
        if everyone and number == signal.SIGKILL:
            kill(process)
        else:
            process.send_signal(number)
        try:
            process.wait(END_SECONDS)
        except psutil.TimeoutExpired:
            wrong.append(f"still runs {END_SECONDS} s after {number.name}")
            kill(process)
        _, left = psutil.wait_procs(workers, timeout=END_SECONDS)
        wrong += [f"{one} outlives its launcher" for one in left]
        text = self.log.read_text()
        if run.processes == 1 and "Traceback" in text and "vispec/" in text:  # launchers say it in their way
            wrong.append(f"{number.name}: {text}")
        return wrong

    def _neighbour(self, process: psutil.Popen, run: Run) -> psutil.Popen:
        """The same command a second time, once the first one has begun."""
        while process.poll() is None and not self.out.exists():
            time.sleep(0.005)
        return start(self.command(run), self.folder / "neighbour")

    def _refused(self, neighbour: psutil.Popen) -> list[str]:
        """What is wrong with a second run: it has to be refused, or to go on with what the first one has left."""
        code, text = neighbour.wait(), (self.folder / "neighbour").read_text()
        return [] if code == 0 or "another run" in text else [f"a second run at a time: {text}"]


def contents(folder: Path) -> dict:
    """Every file below a folder by its name, without what a clock says: bytes, JSON, or tensors."""
    return {
        str(path.relative_to(folder)): _READERS.get(path.suffix, Path.read_bytes)(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _timeless(value):
    if isinstance(value, dict):
        dropped = (*OF_A_CLOCK, *OF_STARTS)
        return {name: _timeless(one) for name, one in value.items() if name not in dropped}
    if isinstance(value, list | tuple):
        return [_timeless(one) for one in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    return value


_READERS = {
    ".json": lambda path: _timeless(json.loads(path.read_text())),
    ".jsonl": lambda path: [_timeless(json.loads(line)) for line in path.read_text().splitlines()],
    ".pt": lambda path: _timeless(torch.load(path, weights_only=True)),
}


# --- the commands ---


def _data(stage: str, family: str) -> Run:
    module = f"vispec.ge_data.allocation_{family}_{'shargpt' if stage == 'text' else 'pretrain_gen'}"
    more = ["--batch-size", "3", "--max-new-tokens", "12"] if stage == "image" else []
    more += QWEN_PIXELS if (stage, family) == ("image", "qwen") else []

    def words(shop: Workshop) -> list[str]:
        return ["-m", module, "--model", TARGETS[family], "--data-folder", str(shop.rows), *more]

    return Run(f"data, {stage}, {family}", words, "--outdir")


def _training(module: str, processes: int, *more: str) -> Run:
    def words(shop: Workshop) -> list[str]:
        where = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--tmpdir", str(shop.samples)]
        steps = ["--num-epochs", str(EPOCHS), "--save-steps", "1", "--bs", str(2 // processes), "--lr", "1e-3"]
        return ["-m", f"vispec.train.{module}", *where, *steps, *more]

    return Run(f"{module}, {processes} processes", words, "--cpdir", processes=processes)


def _answers(arm: str, *more: str) -> Run:
    def words(shop: Workshop) -> list[str]:
        where = ["--base-model-path", TARGETS["llava"], "--data-folder", str(shop.questions)]
        flags = ["--max-new-token", "40", "--temperature", "0"]
        return ["-m", f"vispec.evaluation.gen_{arm}_answer_coco_caption", *where, *flags, *more]

    return Run(f"answers, {arm}", words, "--answer-file", file="answers.jsonl")


RUNS = (
    _data("text", "llava"),
    _data("image", "qwen"),
    _training("main", 1, "--keep", "2"),
    _training("main_mtp", 2, "--keep", "1"),
    _training("main_medusa", 1, "--save-every", "3"),
    _answers("baseline"),
    _answers("spec", "--spec-model-path", str(GOLDEN / "llava_next" / "draft_vispec"), "--use-ours=True"),
)
