"""sqa: ScienceQA's problems with an image, as multiple choice with a reason, after worked examples if asked for.

The texts are `problems.json` and `pid_splits.json` in one folder, which the user brings; the images are
`images/<split>/<id>/image.png` in that folder, or come from the hub where there is no folder `images`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from vispec.cli import UserError, parse_bool
from vispec.evaluation.benchmarks.base import (
    MALFORMED,
    SHUFFLE_SEED,
    Benchmark,
    Question,
    benchmark_image,
    hub_image,
    load_from_hub,
    read_json,
    text_of,
)
from vispec.prompts import ImageSource, Turn, user_turn

IMAGES_HUB = "derek-thomas/ScienceQA"
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
SOURCE = "https://github.com/lupantech/ScienceQA (data/scienceqa, and tools/download.sh for the folder images)"
SAMPLES = 100


@dataclass(frozen=True)
class PromptFormat:
    """What a problem's texts are made of, in order: of Q, C, M (options), L (lecture), E (solution); and A, L, E."""

    asked: str
    answered: str

    @classmethod
    def parse(cls, text: str) -> "PromptFormat":
        """From the flag's spelling, such as QCM-ALE."""
        asked, _, answered = text.partition("-")
        each_once = all(len(set(part)) == len(part) for part in (asked, answered))
        known = set("QCM") <= set(asked) <= set("QCMLE") and set(answered) <= set("ALE")
        if not (each_once and known and "A" in (answered[:1], answered[-1:])):
            raise UserError(
                f"--prompt_format {text!r}: expected Q, C, M and optionally L, E in any order, then a dash and A with "
                "L, E after or before it, such as QCM-ALE"
            )
        return cls(asked, answered)


@dataclass(frozen=True)
class Problems:
    """ScienceQA's texts, and how they are put into words."""

    path: Path
    problems: dict[str, dict]
    splits: dict[str, list[str]]
    captions: dict[str, str]
    """Captions of images by problem id; empty if none are wanted."""
    format: PromptFormat
    letters: str

    def with_image(self, split: str) -> list[str]:
        """Ids of a split's problems with an image, in order."""
        if split not in self.splits:
            raise UserError(f"--test_split {split!r}: pid_splits.json has {', '.join(self.splits)}")
        return [name for name in self.splits[split] if self.problem(name).get("image")]

    def problem(self, name: str) -> dict:
        found = self.problems.get(name)
        if not isinstance(found, dict):
            raise UserError(f"sqa: {self.path} has no problem {name}, which pid_splits.json names")
        return found

    def home(self, name: str) -> tuple[str, int]:
        """The split that holds a problem, and its row there; the other splits of pid_splits.json are parts of these."""
        for split in HUB_SPLITS:
            if name in self.splits.get(split, ()):
                return split, self.splits[split].index(name)
        raise UserError(f"sqa: pid_splits.json has problem {name} in none of {', '.join(HUB_SPLITS)}")

    def question(self, name: str) -> str:
        """A problem as it is put to the model, one line for each part."""
        try:
            return self._question(name)
        except MALFORMED as error:
            raise self._malformed(name, "question, choices, hint, lecture, solution", error) from None

    def answer(self, name: str) -> str:
        """The right answer with its reasons, as a worked example gives it."""
        try:
            problem = self.problem(name)
            if not 0 <= problem["answer"] < len(problem["choices"]):
                raise IndexError(f"answer is {problem['answer']}, there are {len(problem['choices'])} choices")
            answer = f"The answer is {self.letters[problem['answer']]}."
            reasons = self._reasons(problem, self.format.answered)
        except MALFORMED as error:
            raise self._malformed(name, "answer, choices, lecture, solution", error) from None
        if not reasons:
            return answer
        text = f"{answer} BECAUSE: {reasons}" if self.format.answered.startswith("A") else f"{reasons} {answer}"
        return _single_spaces(text)

    def _question(self, name: str) -> str:
        problem = self.problem(name)
        choices = problem["choices"]
        if len(choices) > len(self.letters):
            raise UserError(f"--options {self.letters}: problem {name} has {len(choices)} choices")
        context = f"{problem.get('hint') or ''} {self.captions.get(name, '')}".strip() or "N/A"
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(self.letters, choices, strict=False))
        parts = {
            "Q": f"Question: {text_of(problem, 'question')}",
            "C": f"Context: {context}",
            "M": f"Options: {options}",
        }
        lines = []
        for is_part, group in groupby(self.format.asked, parts.__contains__):
            if is_part:
                lines += [parts[letter] for letter in group]
            elif reasons := self._reasons(problem, "".join(group)):
                lines.append(f"BECAUSE: {reasons}")
        return "".join(f"{line}\n" for line in lines)

    @staticmethod
    def _reasons(problem: dict, letters: str) -> str:
        """Lecture (L) and solution (E) in the order of the letters, without those that are empty."""
        texts = {"L": "lecture", "E": "solution"}
        return " ".join(filter(None, (problem[texts[letter]] for letter in letters if letter in texts)))

    def _malformed(self, name: str, fields: str, error: Exception) -> UserError:
        return UserError(f"sqa: {self.path}, problem {name}: expected {fields} ({error!r})")


def _load(
    folder: Path,
    suffix: str,
    *,
    caption_file: str | None,
    test_split: str,
    test_number: int,
    shot_number: int,
    shot_qids: list[str] | None,
    prompt_format: str,
    options: str,
    use_caption: bool,
) -> list[Question]:
    """The sample of problems that is asked, each after the same worked examples.

    Args: see `FLAGS`.
    """
    captions = _captions(Path(caption_file) if caption_file else folder / "captions.json") if use_caption else {}
    problems = _problems(folder, captions, PromptFormat.parse(prompt_format), options)
    ids = problems.with_image(test_split)
    ids = ids[:test_number] if test_number > 0 else ids
    stream = random.Random(SHUFFLE_SEED)
    asked = stream.sample(ids, min(SAMPLES, len(ids)))
    shots = _shots(problems, stream, shot_number, shot_qids)
    image = _images(folder, problems, [*asked, *shots])

    def user(name: str) -> Turn:
        return user_turn(_single_spaces(problems.question(name) + suffix), image(name))

    examples = [turn for name in shots for turn in (user(name), Turn("assistant", (problems.answer(name),)))]
    return [Question(name, (*examples, user(name))) for name in asked]


def _problems(folder: Path, captions: dict[str, str], prompt_format: PromptFormat, letters: str) -> Problems:
    path = folder / "problems.json"
    texts, splits = (read_json(file, "sqa", SOURCE) for file in (path, folder / "pid_splits.json"))
    if not isinstance(texts, dict):
        raise UserError(f"sqa: {path}: expected an object with a problem under each id; get it again from {SOURCE}")
    if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
        raise UserError(f"sqa: {folder / 'pid_splits.json'}: expected a list of ids for each split")
    ids = {split: [str(name) for name in names] for split, names in splits.items()}
    return Problems(path, texts, ids, captions, prompt_format, letters)


def _captions(path: Path) -> dict[str, str]:
    data = read_json(path, "sqa (--use_caption, --caption_file)", SOURCE)
    captions = data.get("captions") if isinstance(data, dict) else None
    if not isinstance(captions, dict):
        raise UserError(f"--caption_file {path}: expected an object with the key `captions`")
    return captions


def _shots(problems: Problems, stream: random.Random, count: int, names: list[str] | None) -> list[str]:
    """Ids of the worked examples: those that are named, or as many as asked for, drawn after the questions."""
    if not names and count <= 0:
        return []
    known = problems.with_image("train")
    if not names:
        if count > len(known):
            raise UserError(f"--shot_number {count}: there are {len(known)} train problems with an image")
        return stream.sample(known, count)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"--shot_qids: no train problem with an image: {', '.join(unknown)}")
    return names


def _images(folder: Path, problems: Problems, names: list[str]) -> Callable[[str], ImageSource]:
    """How the pictures of the named problems are found."""
    if (folder / "images").is_dir():
        return lambda name: benchmark_image(folder / "images" / problems.home(name)[0] / name / "image.png")
    rows = {}
    for split in sorted({problems.home(name)[0] for name in names}):
        rows[split] = load_from_hub("sqa", IMAGES_HUB, HUB_SPLITS[split], f"{SOURCE}: there is no {folder / 'images'}")
        expected, found = len(problems.splits[split]), len(rows[split])
        if found != expected:
            raise UserError(
                f"sqa: split {HUB_SPLITS[split]} of {IMAGES_HUB} has {found} rows, pid_splits.json {expected} ids, so "
                "that images cannot be told apart; give a folder with images by --data_root"
            )

    def image(name: str) -> ImageSource:
        split, row = problems.home(name)
        return hub_image(rows[split], row)

    return image


def _single_spaces(text: str) -> str:
    return text.replace("  ", " ")


def _letters(text: str) -> str:
    """ABCDE, also spelled A,B,C,D,E."""
    return "".join(text.replace(",", " ").split())


FLAGS = {
    "--caption_file": {"help": "captions of the images (default: captions.json beside the problems)"},
    "--test_split": {"default": "test", "help": "split of pid_splits.json that is asked"},
    "--test_number": {"type": int, "default": -1, "help": "only its first problems with an image; -1: all"},
    "--shot_number": {"type": int, "default": 0, "help": "worked examples before each question"},
    "--shot_qids": {"nargs": "+", "metavar": "ID", "help": "which train problems they are (default: drawn)"},
    "--prompt_format": {
        "default": "QCM-ALE",
        "help": "order of question, context, options (M), lecture and solution (E); a dash; the same for answers (A)",
    },
    "--options": {"type": _letters, "default": "ABCDE", "help": "letters of the options"},
    "--use_caption": {
        "type": parse_bool,
        "nargs": "?",
        "const": True,
        "default": False,
        "metavar": "True|False",
        "help": "put the image's caption into the context",
    },
}

SQA = Benchmark(
    name="sqa",
    load=_load,
    suffix='Your answer should begin with "The answer is". Please answer with an explanation. Answer:',
    folder="vispec/data/scienceqa",
    source=SOURCE,
    samples=None,  # the loader draws them
    folder_flags=("--data_root",),
    flags=FLAGS,
)
