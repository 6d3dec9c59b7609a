"""What a benchmark is, and what its loaders share: files that may be missing, rows that may be wrong, the hub."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vispec.cli import UserError, one_line
from vispec.files import parse_json
from vispec.pictures import UnreadableImage, in_rgb, read_picture
from vispec.prompts import ImageSource, Turn

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

SHUFFLE_SEED = 42
MALFORMED = (KeyError, IndexError, TypeError, AttributeError)
"""What a row raises that is not as the published ones are."""


@dataclass(frozen=True)
class Question:
    """One question; its images are opened when the prompt is built."""

    question_id: int | str
    turns: tuple[Turn, ...]
    further: tuple[Turn, ...] = ()
    """What the user goes on with: each turn follows a method's own answer to what was asked before."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What else the benchmark says of it; its answers' lines have it too."""

    def __post_init__(self):
        if isinstance(self.question_id, bool) or not isinstance(self.question_id, int | str):
            raise TypeError(f"question_id is {self.question_id!r}, expected a whole number or text")


@dataclass(frozen=True)
class Benchmark:
    """A set of questions: data plus a loader.

    A loader reads all rows of a folder, or of the hub where the folder is None, and returns their questions in the
    order of the data.
    """

    name: str
    load: Callable[..., list[Question]]
    """(folder or None, suffix, **values of the benchmark's own flags) -> all questions."""
    suffix: str
    """Text item after the question."""
    folder: str
    """Where local files are looked for when no folder is given."""
    source: str
    """Where the files can be had."""
    hub: str | None = None
    """Data set on the hub that serves when there is no local folder."""
    samples: int | None = 100
    """Questions that are asked: the first ones after shuffling; None asks those of the loader, in its order."""
    pixel_limits: bool = True
    """Whether Qwen's images are held within the limits of the training data."""
    folder_flags: tuple[str, ...] = ()
    """Other spellings of --data-folder."""
    authors_row: Callable[[Mapping], dict] | None = None
    """From the line of an answer file to that of the authors' own evaluation, which is written beside it; None: not."""
    flags: Mapping[str, dict] = field(default_factory=dict)
    """Flags that this benchmark alone has, with the arguments of argparse's add_argument."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the values of the benchmark's own flags."""
        return tuple(flag.removeprefix("--") for flag in self.flags)

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of the benchmark's own flags where none is given."""
        settings = self.flags.values()
        return {name: given.get("default") for name, given in zip(self.options, settings, strict=True)}

    def questions(self, folder: str | None, **options) -> tuple[list[Question], str]:
        """The questions that are asked, and the folder or hub data set that they come from.

        Args:
            folder: local files; None takes the default folder if it exists, else the hub.
            options: values of the benchmark's own flags, see `options`; their defaults where they are not given.

        Raises:
            UserError: a file is missing; it says which, where it was looked for and where to get it.
        """
        found, data = self._all(folder, **options)
        return _distinct(found if self.samples is None else first_shuffled(found, self.samples)), data

    def others(self, folder: str | None, **options) -> tuple[list[Question], str]:
        """The questions of the same data that `questions` leaves out, and where they come from."""
        found, data = self._all(folder, **options)
        return _distinct([] if self.samples is None else first_shuffled(found, len(found))[self.samples :]), data

    def _all(self, folder: str | None, **options) -> tuple[list[Question], str]:
        where = Path(folder or self.folder)
        local = folder is not None or self.hub is None or where.is_dir()
        found = self.load(where if local else None, self.suffix, **self.defaults | options)
        if not found:
            raise UserError(f"{self.name}: {where if local else self.hub} has no question of this benchmark")
        return found, str(where.resolve()) if local else f"hub:{self.hub}"


def first_shuffled(rows: Sequence[Any], count: int) -> list:
    """The first rows in the order that `datasets`' shuffle(seed=42) gives to as many rows."""
    import numpy as np

    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))
    return [rows[i] for i in order[:count]]


def read_json(path: Path, benchmark: str, source: str) -> Any:
    """A data file of a benchmark; a missing or broken one is named, with the place where it can be had."""
    return _parsed(_read(path, benchmark, source), str(path), benchmark, source)


def read_json_lines(path: Path, benchmark: str, source: str) -> list[Any]:
    """A data file with one JSON value a line; blank lines do not count."""
    lines = enumerate(_read(path, benchmark, source).split(b"\n"), start=1)
    return [_parsed(line, f"{path}, line {number}", benchmark, source) for number, line in lines if line.strip()]


def text_of(row: Mapping, name: str) -> str:
    """A field that holds text.

    Raises:
        KeyError, TypeError: the row has no such field, or no text in it.
    """
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, expected text")
    return value


def load_from_hub(benchmark: str, name: str, split: str, source: str) -> "Dataset":
    """A split of a data set on the hub, or from datasets' cache."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    # a script data set is a RuntimeError since version 4 and a ValueError before, an unreachable hub a ConnectionError
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{benchmark}: datasets {datasets.__version__} does not load {name} from the hub ({reason}); give a local "
            f"copy by --data-folder, from {source}"
        ) from None


def hub_image(data: "Dataset", row: int) -> ImageSource:
    """The picture in a row of a data set, decoded only when a prompt needs it."""
    return partial(_decode, data, row)


def benchmark_image(path: Path) -> ImageSource:
    """The picture in a file of a benchmark; what is transparent keeps its colour, as in the authors' code."""
    return partial(read_picture, path, on_white=False)


def _decode(data: "Dataset", row: int) -> "Image.Image":
    """Raises UnreadableImage."""
    try:
        picture = data[row].get("image")
        if picture is None:
            raise UnreadableImage("there is no image")
        return in_rgb(picture, on_white=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder trips over
        raise UnreadableImage(f"row {row} of the data set: {one_line(error)}") from None


def _read(path: Path, benchmark: str, source: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{benchmark}: {path.name} is missing, looked for in {path.parent.resolve()} (--data-folder); "
            f"get it from {source}"
        ) from None


def _parsed(content: bytes, name: str, benchmark: str, source: str) -> Any:
    try:
        return parse_json(content, name)
    except ValueError as error:
        raise UserError(f"{benchmark}: {error}; get it again from {source}") from None


def _distinct(questions: list[Question]) -> list[Question]:
    """The questions with one id each: of several with the same one, all but the first get a number.

    MME asks two questions about an image under one id, and an answer file has one line an id.
    """
    given = {question.question_id for question in questions}
    seen: set[int | str] = set()
    distinct = []
    for question in questions:
        name, times = question.question_id, 1
        while name in seen or (times > 1 and name in given):
            times += 1
            name = f"{question.question_id}#{times}"
        seen.add(name)
        distinct.append(replace(question, question_id=name))
    return distinct
