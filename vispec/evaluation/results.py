"""All answer files below a folder, as tables of methods × benchmarks: one for each target and temperature.

What a file holds is read from the settings beside it, not from its name. What is missing stays visible: a cell without
answers is None, and a notice says which file would fill it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

from vispec.cli import UserError
from vispec.embedded import TARGET
from vispec.evaluation.answer_file import (
    AnswerFile,
    QuestionId,
    condition_notices,
    left_out_notice,
    meta_path,
    read_answers,
    refuse_differences,
)
from vispec.evaluation.benchmarks.mmspec import MMSPEC, TOPICS
from vispec.evaluation.comparison import (
    ArmSpeed,
    Comparison,
    Estimate,
    arm_speed,
    average,
    compare,
    estimates,
    round_in_steps,
)
from vispec.evaluation.published import BENCHMARK_TITLES, METHOD_TITLES
from vispec.evaluation.settings import ARMS, ROW, TABLE, shared_by
from vispec.methods import method_of

ALL_TOPICS = "all topics"
NEEDED = ("benchmark", "method", "base_model", "temperature")


@dataclass(frozen=True)
class Cell:
    """A method on one benchmark beside the baseline, over the questions that both have answered."""

    comparison: Comparison
    estimates: Mapping[str, Estimate]
    """Of speedup, decode_speedup and tau."""
    round_in_steps: float | None
    histogram: Counter[int]
    """How many rounds had 0, 1, 2, … draft tokens accepted."""


@dataclass(frozen=True)
class Row:
    """A speculative method on all benchmarks."""

    method: str
    settings: Mapping
    """Those that the files of a ROW share; empty if the method has no answers here."""
    cells: Mapping[str, Cell | None]

    @property
    def benchmarks(self) -> int:
        """How many the averages are over."""
        return sum(cell is not None for cell in self.cells.values())

    def average(self, measure: str) -> Estimate:
        """Mean over the benchmarks of speedup, decode_speedup or tau."""
        return average([cell.estimates[measure] for cell in self.cells.values() if cell])

    @property
    def histogram(self) -> Counter[int]:
        """Over the rounds of all benchmarks."""
        return sum((cell.histogram for cell in self.cells.values() if cell), Counter())


@dataclass(frozen=True)
class Table:
    """Methods × benchmarks of one target at one temperature."""

    base_model: str
    temperature: float
    settings: Mapping
    """Those that all files of a TABLE share."""
    baseline: Mapping[str, ArmSpeed | None]
    """By benchmark, over all questions that the baseline has answered."""
    rows: list[Row]
    files: list[AnswerFile]
    topics: Mapping[str, Mapping[str, Cell]]
    """MMSpec, which has no column: by method and topic, and at last over ALL_TOPICS."""

    @property
    def prefix_cache(self) -> int:
        """Of MMSpec: tokens of a conversation's prompts that were kept, so that its next turn is read on from them."""
        return max(file.settings.get("prefix_cache", 0) for file in self.files)

    @property
    def target(self) -> str:
        """The target's name, without its folder or organisation."""
        parts = Path(self.base_model).parts
        return "the embedded target" if parts[-4:] == TARGET.parts[-4:] else parts[-1]

    def left_out(self, method: str) -> list[int]:
        """How many questions of each benchmark a method has left out."""
        files = [file for file in self.files if file.settings["method"] == method]
        counts = {file.settings["benchmark"]: len(file.left_out) for file in files}
        return [counts.get(name, 0) for name in self.baseline]

    @property
    def baseline_average(self) -> float | None:
        """Mean over the benchmarks of tokens per second."""
        speeds = [speed.tokens_per_second for speed in self.baseline.values() if speed]
        return fmean(speeds) if speeds else None


@dataclass(frozen=True)
class Results:
    """The tables, by target and rising temperature, and what is missing from them."""

    tables: list[Table]
    notices: list[str]


def read_results(folder: Path) -> Results:
    """Read all answer files below a folder.

    Raises:
        UserError: there is none, two hold the same cell, or settings that must agree do not.
    """
    notices: list[str] = []
    tables: dict[tuple[str, float], dict[tuple[str, str], AnswerFile]] = defaultdict(dict)
    for found in _find(folder, notices):
        benchmark, method, base_model, temperature = (found.settings[name] for name in NEEDED)
        cells = tables[base_model, temperature]
        other = cells.setdefault((method, benchmark), found)
        if other is not found:
            raise UserError(
                f"two files answer {benchmark} by {method} at temperature {temperature}: {other.path} and "
                f"{found.path}; expected one, move the other away"
            )
    if not tables:
        raise UserError(f"--results {folder}: found no answer file (*.jsonl with its .meta.json) with answers")
    methods = defaultdict(set)
    for (base_model, _), cells in tables.items():
        methods[base_model] |= {method for method, _ in cells} - {"baseline"}
    return Results(
        [_table(folder, *key, tables[key], _ordered(methods[key[0]]), notices) for key in sorted(tables)], notices
    )


def _find(folder: Path, notices: list[str]) -> list[AnswerFile]:
    """The answer files below a folder that have answers."""
    if not folder.is_dir():
        raise UserError(f"--results {folder}: there is no such folder")
    found = []
    for path in sorted(folder.rglob("*.jsonl")):
        if not meta_path(path).exists():  # it need not be an answer file
            notices.append(f"{path} is not counted: no {meta_path(path).name} beside it")
            continue
        file = read_answers(path)
        missing = [name for name in NEEDED if name not in file.settings]
        if missing:
            raise UserError(f"{meta_path(path)}: expected settings with {', '.join(NEEDED)}; no {', '.join(missing)}")
        if file.settings["benchmark"] not in (*BENCHMARK_TITLES, MMSPEC.name):
            notices.append(f"{path} is not counted: {file.settings['benchmark']} is none of the eight benchmarks")
        elif file.answers:
            notices += left_out_notice(file)
            found.append(file)
        else:
            notices.append(f"{path} is not counted: it has no answer yet")
    return found


def _ordered(methods: set[str]) -> list[str]:
    """Methods in the order of the paper's rows, unknown ones last."""
    known = {name: place for place, name in enumerate(METHOD_TITLES)}
    return sorted(methods, key=lambda name: (known.get(method_of(name), len(known)), name))


def _table(
    folder: Path,
    base_model: str,
    temperature: float,
    found: Mapping[tuple[str, str], AnswerFile],
    methods: list[str],
    notices: list[str],
) -> Table:
    files = list(found.values())
    for one in files[1:]:
        refuse_differences(TABLE, files[0], one)
    asked = any(benchmark in BENCHMARK_TITLES for _, benchmark in found)
    for method in ("baseline", *methods) if asked else ():
        missing = [benchmark for benchmark in BENCHMARK_TITLES if (method, benchmark) not in found]
        if missing:
            names = missing[0] if len(missing) == 1 else "{" + ",".join(missing) + "}"
            notices.append(
                f"temperature {temperature:g}, {method}: no answers to {', '.join(missing)} "
                f"(expected {folder}/{names}/{method}-temperature-{temperature}.jsonl)"
            )
    baseline = {benchmark: found.get(("baseline", benchmark)) for benchmark in BENCHMARK_TITLES}
    return Table(
        base_model,
        temperature,
        {name: files[0].settings.get(name) for name in shared_by(TABLE)},
        {name: arm_speed(list(arm.answers.values())) if arm else None for name, arm in baseline.items()},
        [_row(method, baseline, found, notices) for method in methods],
        files,
        {method: cells for method in methods if (cells := _topics(method, found, notices))},
    )


def _row(
    method: str,
    baseline: Mapping[str, AnswerFile | None],
    found: Mapping[tuple[str, str], AnswerFile],
    notices: list[str],
) -> Row:
    arms = {benchmark: file for (name, benchmark), file in found.items() if name == method}
    first, *others = arms.values() or [None]
    for other in others:
        refuse_differences(ROW, first, other)
    cells: dict[str, Cell | None] = dict.fromkeys(baseline)
    for stream, (benchmark, plain) in enumerate(baseline.items()):
        if benchmark not in arms:
            continue
        if plain is None:
            notices.append(f"{arms[benchmark].path}: no baseline to compare with")
            continue
        cells[benchmark] = compare_files(plain, arms[benchmark], notices, stream)
    settings = {name: first.settings.get(name) for name in shared_by(ROW)} if first else {}
    return Row(method, settings, cells)


def _topics(method: str, found: Mapping[tuple[str, str], AnswerFile], notices: list[str]) -> dict[str, Cell]:
    """A method's cells of MMSpec; none where an arm has no answers to it."""
    plain, ours = (found.get((arm, MMSPEC.name)) for arm in ("baseline", method))
    if ours is not None and plain is None:
        notices.append(f"{ours.path}: no baseline to compare with")
    whole = compare_files(plain, ours, notices) if plain and ours else None
    if whole is None:
        return {}
    questions = defaultdict(list)
    for question in _shared(plain, ours):
        questions[plain.lines[question].get("topic", "")].append(question)
    order = [*(topic for topic in TOPICS if topic in questions), *sorted(questions.keys() - {*TOPICS})]
    return {topic: _cell(plain, ours, questions[topic], stream=0) for topic in order} | {ALL_TOPICS: whole}


def compare_files(baseline: AnswerFile, spec: AnswerFile, notices: list[str], stream: int = 0) -> Cell | None:
    """A method's answers beside the baseline's; None where no question has been answered by both.

    Args:
        notices: what is to be said beside the numbers is added to them.
        stream: of the draws, see `estimates`.

    Raises:
        UserError: the files differ in a setting that two arms must share.
    """
    if baseline.meta and spec.meta:
        refuse_differences(ARMS, baseline, spec)
    notices += condition_notices(baseline, spec)
    only_one = len(baseline.answers.keys() ^ spec.answers.keys())
    if only_one:
        notices.append(f"{spec.path}: {only_one} question(s) that only one arm has answered are not counted")
    shared = _shared(baseline, spec)
    return _cell(baseline, spec, shared, stream) if shared else None


def _shared(baseline: AnswerFile, spec: AnswerFile) -> list[QuestionId]:
    return [question for question in baseline.answers if question in spec.answers]


def _cell(baseline: AnswerFile, spec: AnswerFile, questions: Sequence[QuestionId], stream: int) -> Cell:
    plain, ours = ([arm.answers[question] for question in questions] for arm in (baseline, spec))
    comparison = compare(plain, ours)
    return Cell(
        comparison,
        estimates(comparison, plain, ours, stream),
        round_in_steps(plain, ours),
        Counter(length for answer in chain.from_iterable(ours) for length in answer.accepted),
    )
