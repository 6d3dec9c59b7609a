"""Trees that are measured before they are used (`--tree tune`): once for all answer files of a method.

A tree that was chosen on some questions would look better on them than on others, so those are never reported: they are
questions of the benchmark's data that no run asks, or of another benchmark (`--tune-on`). The answer files name them.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vispec.cli import Parser, UserError
from vispec.evaluation.answerer import Answerer
from vispec.evaluation.benchmarks import BENCHMARKS, Benchmark, Question
from vispec.evaluation.loading import Models
from vispec.evaluation.settings import as_noted, noted_tree
from vispec.evaluation.task import Task
from vispec.model.shape import AUTO, TUNE


@dataclass(frozen=True)
class TuningSet:
    """Questions on which trees are measured."""

    benchmark: str
    data: str
    """Where they come from."""
    questions: Sequence[Question]


def add_tune_on(parser: Parser) -> None:
    parser.add_argument(
        "--tune-on",
        type=_tune_on,
        metavar="BENCHMARK[=FOLDER]",
        help="where --tree tune has its questions from, another benchmark or other data (default: questions of the "
        "benchmark's data that are not asked)",
    )


def keep_trees(tasks: Sequence[Task], models: Models) -> Models:
    """`models` with the trees that earlier answers have where trees are to be measured: a file keeps its tree."""
    if models.tree != TUNE:
        return models
    kept: dict[str, dict] = {}
    for task in tasks:
        found = task.settings if task.lines else {}
        if found.get("asked_tree") not in (None, AUTO, TUNE):
            kept.setdefault(task.method, {n: found[n] for n in ("asked_tree", "tuned_on") if n in found})
    for method, noted in kept.items():
        _note(tasks, method, noted)
    return replace(models, tuned={method: noted_tree(noted["asked_tree"]) for method, noted in kept.items()})


def tuning_set(
    models: Models,
    asked: tuple[str, str | None] | None,
    reported: Mapping[tuple[str, str], Mapping],
    folder_of: Callable[[Benchmark], str | None],
    gpus_total: int,
) -> TuningSet | None:
    """Where trees are measured; None if all of `models` are known.

    Args:
        asked: what --tune-on says.
        reported: the benchmarks that are asked, with where their questions come from: the values of their own flags.
        folder_of: where the data of a benchmark are looked for if --tune-on does not say it.

    Raises:
        UserError: all questions are reported, or there are several models, each of which would choose its own tree.
    """
    if all(models.tree_of(method) != TUNE for method in models.drafting):
        return None
    if gpus_total > models.gpus:
        raise UserError("--tree tune or --total-token -1 measures with one model: begin without --num-gpus-total")
    for name, folder in [asked] if asked else dict.fromkeys((name, None) for name, _ in reported):
        benchmark = BENCHMARKS[name]
        folder = folder or folder_of(benchmark)
        questions, data = benchmark.questions(folder)
        if (name, data) in reported:
            questions, data = benchmark.others(folder, **reported[name, data])
        if questions:
            return TuningSet(name, data, questions)
    names = ", ".join(dict.fromkeys([asked[0]] if asked else [name for name, _ in reported]))
    raise UserError(
        f"--tree tune: all questions of {names} are reported, and a tree has to be measured on others: give another "
        "benchmark, --tune-on BENCHMARK or --tune-on BENCHMARK=FOLDER"
    )


def measure_trees(tasks: Sequence[Task], found: TuningSet | None, models: Models, answerer: Answerer) -> None:
    """Measure the trees of the methods whose tree is TUNE; their `tasks` note them, and on which questions it was."""
    for method in models.drafting:
        if found is not None and models.tree_of(method) == TUNE:
            tree, questions = answerer.tune(method, found.benchmark, found.questions)
            told = ", ".join(map(str, questions))
            print(f"{method}: measured on questions of {found.benchmark} ({found.data}) that are not reported: {told}")
            tuned_on = {"benchmark": found.benchmark, "data": found.data, "question_ids": questions}
            _note(tasks, method, {"asked_tree": as_noted(tree), "tuned_on": tuned_on})


def _note(tasks: Sequence[Task], method: str, noted: Mapping) -> None:
    for task in tasks:
        if task.method == method:
            task.asked.update(noted)


def _tune_on(text: str) -> tuple[str, str | None]:
    """A benchmark, and the folder of its data where one is given."""
    name, _, folder = text.partition("=")
    if name not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(BENCHMARKS)}, found {name!r}")
    return name, folder or None
