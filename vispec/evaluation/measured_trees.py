"""Trees that are measured before they are used (`--tree tune`): once for all answer files of a method."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vispec.cli import UserError
from vispec.evaluation.answering import Answerer, Task
from vispec.evaluation.answers import read_meta
from vispec.evaluation.benchmarks import Question
from vispec.evaluation.loading import Models, Tree, as_noted
from vispec.model.shape import TUNE


def keep_trees(tasks: Sequence[Task], models: Models) -> Models:
    """`models` with the trees that earlier answers have where trees are to be measured: a file keeps its tree."""
    if models.tree != TUNE:
        return models
    tuned: dict[str, Tree] = {}
    for task in tasks:
        meta = read_meta(task.file.path) if task.file.lines else None
        found = meta and meta["settings"].get("asked_tree")
        if isinstance(found, list):
            tuned.setdefault(task.series.method, tuple(found))
    models = replace(models, tuned=tuned)
    _note_trees(tasks, tuned)
    return models


def require_measuring(models: Models, gpus_total: int) -> None:
    """Refuse to measure trees by several models, each of which would choose its own.

    Raises:
        UserError: there is a tree to be measured.
    """
    if gpus_total > models.gpus and any(models.tree_of(method) == TUNE for method in models.drafts):
        raise UserError("--tree tune or --total-token -1 measures with one model: begin without --num-gpus-total")


def measure_trees(tasks: Sequence[Task], questions: Sequence[Question], models: Models, answerer: Answerer) -> None:
    """Measure the trees of the methods whose tree is TUNE; their `tasks` note them.

    Args:
        questions: of the benchmark of each method's first task.
    """
    for method in models.drafts:
        if models.tree_of(method) == TUNE:
            series = next(task.series for task in tasks if task.series.method == method)
            _note_trees(tasks, {method: answerer.tune(series, questions)})


def _note_trees(tasks: Sequence[Task], trees: Mapping[str, Tree]) -> None:
    for task in tasks:
        if task.series.method in trees:
            task.settings["asked_tree"] = as_noted(trees[task.series.method])
