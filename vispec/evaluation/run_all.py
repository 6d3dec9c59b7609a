"""Every method on every benchmark, measured together: `python -m vispec.evaluation.run_all --out DIR …`.

The target is loaded once, and the methods take turns question by question, so that a drifting machine hurts all alike.
The answers go to DIR/<benchmark>/<method>-temperature-<T>.jsonl, files as the commands `gen_*_answer_*` write them.
The same command goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from vispec.cli import DONE, ERROR, Parser, UserError, provenance, run_cli, worst
from vispec.evaluation.actors import loaded
from vispec.evaluation.answering import (
    InFloat32,
    LeftOut,
    Series,
    Task,
    answer_all,
    finish,
    open_asks,
    report_left_out,
    settings_of,
)
from vispec.evaluation.answers import AnswerFile
from vispec.evaluation.benchmarks import BENCHMARKS, Benchmark, Question
from vispec.evaluation.head_flags import add_place_flags, asked_places
from vispec.evaluation.loading import Models
from vispec.evaluation.lossless import check_lossless, wants_check
from vispec.evaluation.measure import Generation
from vispec.evaluation.measured_trees import add_tune_on, keep_trees, measure_trees, require_measuring, tuning_set
from vispec.evaluation.runner import add_common_flags, asked_part, question_of
from vispec.evaluation.tree_flags import add_tree_flags, asked_tree

METHODS = ("baseline", "vispec", "eagle2", "medusa", "lookup")
HEADS = ("vispec", "eagle2", "medusa")
"""The methods that need a draft head."""


@dataclass(frozen=True)
class Plan:
    """A benchmark at a temperature: the questions that are asked, and one answer file a method."""

    benchmark: Benchmark
    data: str
    all_questions: list[Question]
    asked: slice
    tasks: list[Task]

    @property
    def questions(self) -> list[Question]:
        return self.all_questions[self.asked]

    @property
    def temperature(self) -> float:
        return self.tasks[0].series.generation.temperature

    @property
    def open_methods(self) -> set[str]:
        """Methods that lack answers."""
        return {series.method for ask in open_asks(self.tasks, self.questions) for series in ask.series}

    def finish(self, left_out: Sequence[LeftOut]) -> int:
        """Bring the files into order and report; returns an exit code."""
        codes = [finish(task, len(self.questions), left_out) for task in self.tasks]
        return worst(*codes, report_left_out(self.benchmark, left_out))


def main(argv: list[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    models = _models(args)
    plans, missing = _plans(args, models)
    tasks = list(chain.from_iterable(plan.tasks for plan in plans))
    code = DONE
    with ExitStack() as held:
        for task in tasks:
            if not args.dry_run:
                held.enter_context(task.file.alone())
        models = keep_trees(tasks, models)
        for task in tasks:
            task.check()
        if args.dry_run:
            for plan in plans:
                _print_plan(plan)
        else:
            code = _answer(plans, models, args)
            # the models are gone by now, so that there is room for float32
            if not _check_lossless(plans, models):
                code = ERROR
    if missing:
        print(f"error: not measured, because their data cannot be read: {', '.join(missing)}", file=sys.stderr)
    return ERROR if missing else code


def _make_parser() -> Parser:
    parser = Parser(
        prog="python -m vispec.evaluation.run_all",
        description="Answer benchmarks by several methods in turn, over one loaded target.",
    )
    add = parser.add_argument
    add("--base-model-path", required=True, help="the target: a folder or a hub id")
    add(
        "--spec-model-path",
        nargs="+",
        type=_head,
        default=[],
        metavar="METHOD=PATH",
        help=f"draft heads: folders or hub ids, for {', '.join(HEADS)}",
    )
    add_place_flags(parser, nargs="+", type=_head, metavar="METHOD=VALUE")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="the baseline always runs (default: also lookup and those with a --spec-model-path)",
    )
    add("--benchmarks", nargs="+", choices=tuple(BENCHMARKS), default=list(BENCHMARKS), help="(default: all)")
    add("--temperatures", nargs="+", type=float, default=[0.0], metavar="T", help="0 is greedy (default: 0)")
    add("--out", type=Path, required=True, help="folder of the answer files")
    add("--data-root", type=Path, help="folder with the benchmarks' folders (default: each one's own; the hub)")
    add("--dry-run", action="store_true", help="print what would be done")
    add_common_flags(parser)
    add_tree_flags(parser, "/".join(map(str, Models.tree)))
    add_tune_on(parser)
    return parser


def _head(text: str) -> tuple[str, str]:
    """METHOD=PATH, or another value for a method's head."""
    method, found, path = text.partition("=")
    if method not in HEADS or not found or not path:
        raise argparse.ArgumentTypeError(f"expected METHOD=… with a method of {', '.join(HEADS)}, found {text!r}")
    return method, path


def _models(args: argparse.Namespace) -> Models:
    """The target, and the drafts of the methods that were asked for, in the order of `METHODS`."""
    heads = dict(args.spec_model_path)
    if len(heads) < len(args.spec_model_path):
        raise UserError("--spec-model-path: found two heads of one method, expected one")
    asked = args.methods or ("lookup", *heads)
    lacking = [method for method in HEADS if method in asked and method not in heads]
    if lacking:
        raise UserError(f"--methods {lacking[0]}: its draft head is missing, give --spec-model-path {lacking[0]}=PATH")
    return Models(
        args.base_model_path,
        {method: heads.get(method) for method in METHODS[1:] if method in asked},
        asked_tree(args, Models.tree),
        dtype=args.dtype,
        device_map=args.device_map,
        gpus=args.num_gpus_per_model,
        places=asked_places(args, heads),
    )


def _plans(args: argparse.Namespace, models: Models) -> tuple[list[Plan], list[str]]:
    """What is to be done, and the benchmarks whose data cannot be read."""
    plans, missing = [], []
    for name in dict.fromkeys(args.benchmarks):
        benchmark = BENCHMARKS[name]
        options = benchmark.defaults
        try:
            questions, data = _questions(benchmark, args.data_root)
        except (UserError, OSError) as error:
            missing.append(name)
            where = f"here a folder {Path(benchmark.folder).name} under --data-root"
            print(f"notice: not measured: {error} ({where})", file=sys.stderr)
            continue
        for temperature in dict.fromkeys(args.temperatures):
            generation = Generation(temperature, args.max_new_token, own_config=args.generation_config)
            tasks = []
            for method in ("baseline", *models.drafts):
                series = Series(name, method, method, generation)
                file = AnswerFile(args.out / name / f"{method}-temperature-{temperature}.jsonl")
                tasks.append(Task(series, file, settings_of(series, models, data, options)))
            plans.append(Plan(benchmark, data, questions, asked_part(args, name, len(questions)), tasks))
    return plans, missing


def _questions(benchmark: Benchmark, data_root: Path | None) -> tuple[list[Question], str]:
    """Its questions and where they come from."""
    folder = _folder(benchmark, data_root)
    questions, data = benchmark.questions(folder, **benchmark.defaults)
    if data_root is not None and folder is None:
        missing = data_root / Path(benchmark.folder).name
        print(f"notice: {benchmark.name}: there is no {missing}, its questions are from {data}", file=sys.stderr)
    return questions, data


def _folder(benchmark: Benchmark, data_root: Path | None) -> str | None:
    """Where a benchmark's data are; what is not under `data_root` and on the hub is sought as without one."""
    folder = data_root and data_root / Path(benchmark.folder).name
    return None if folder is None or (benchmark.hub is not None and not folder.is_dir()) else str(folder)


def _print_plan(plan: Plan) -> None:
    total = len(plan.questions)
    print(f"{plan.benchmark.name}, temperature {plan.temperature}: {total} questions of {plan.data}")
    for task in plan.tasks:
        answered = sum(question.question_id in task.file.lines for question in plan.questions)
        print(f"  {task.series.method:<9}{answered:>5} of {total} answered  {task.file.path}")


def _answer(plans: Sequence[Plan], models: Models, args: argparse.Namespace) -> int:
    """Fill all answer files; returns an exit code."""
    unfinished = []
    for plan in plans:
        if plan.open_methods:
            unfinished.append(plan)
        else:
            plan.finish([])
    if not unfinished:
        return DONE
    methods = set().union(*(plan.open_methods for plan in unfinished))
    models = replace(models, drafts={m: path for m, path in models.drafts.items() if m in methods})
    require_measuring(models, args.num_gpus_total)
    reported = {(plan.benchmark.name, plan.data): plan.benchmark.defaults for plan in plans}
    tuned_on = tuning_set(models, args.tune_on, reported, lambda benchmark: _folder(benchmark, args.data_root))
    tasks = list(chain.from_iterable(plan.tasks for plan in plans))
    made_by = provenance(args)
    code = DONE
    with loaded(models, args.num_gpus_total) as answerer:
        measure_trees(tasks, tuned_on, models, answerer)
        found = answerer.loaded_settings()
        for task in tasks:
            task.check(found)  # so that none is refused hours later
        for number, plan in enumerate(unfinished, start=1):
            title = f"{number}/{len(unfinished)} {plan.benchmark.name} T={plan.temperature:g}"
            code = worst(code, plan.finish(answer_all(plan.tasks, plan.questions, answerer, made_by, title)))
    return code


def _check_lossless(plans: Sequence[Plan], models: Models) -> bool:
    """Compare every method with the baseline where decoding is greedy; False where one differs in float32."""
    float32 = InFloat32(models)

    def rerun(plan: Plan, series: Series, question_id: int | str) -> tuple[list[int], list[int]]:
        return float32.ids_of_both_arms(series, question_of(question_id, plan.all_questions, plan.data))

    same = True
    for plan in plans:
        for task in plan.tasks[1:]:
            if wants_check(None, plan.temperature):
                print(f"{plan.benchmark.name} by {task.series.method}:")
                same &= check_lossless(task.file, required=False, rerun=partial(rerun, plan, task.series))
    return same


if __name__ == "__main__":
    run_cli(main)
