"""Every method on every benchmark, measured together: `python -m vispec.evaluation.run_all --out DIR …`.

The target is loaded once, and the methods take turns question by question, so that a drifting machine hurts all alike.
The answers go to DIR/<benchmark>/<method>-temperature-<T>.jsonl, files as the commands `gen_*_answer_*` write them.
The same command goes on where it stopped.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from vispec.cli import DONE, ERROR, Parser, UserError, run_cli
from vispec.evaluation.benchmarks import BENCHMARKS, Benchmark, Question
from vispec.evaluation.flags import (
    add_common_flags,
    add_image_rows,
    add_place_flags,
    add_tree_flags,
    asked_part,
    asked_places,
    asked_tree,
)
from vispec.evaluation.loading import Models
from vispec.evaluation.measure import Generation, is_greedy
from vispec.evaluation.measured_trees import add_tune_on, keep_trees
from vispec.evaluation.published import BENCHMARK_TITLES
from vispec.evaluation.runner import Plan, run
from vispec.methods import BASELINE, GENERATE, LOOKUP, MODELS, VLM, method_of

METHODS = (BASELINE, GENERATE, *MODELS, LOOKUP)
LABEL = re.compile(r"\w[\w.]*", re.ASCII)
"""Tells two heads of a method apart, in names of files too."""


def main(argv: list[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    models = _models(args)
    plans, missing = _plans(args, models)
    code = DONE
    if args.dry_run:
        _print(plans, models)
    else:
        code = run(plans, models, args, lambda benchmark: _folder(benchmark, args.data_root))
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
        metavar="METHOD[-LABEL]=PATH",
        help=f"draft heads: folders or hub ids, for {', '.join(MODELS)}; a label tells two of one method apart",
    )
    add_place_flags(parser, nargs="+", type=_head, metavar="METHOD=VALUE")
    add_image_rows(parser)
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="the baseline always runs (default: also lookup and those with a --spec-model-path)",
    )
    add(
        "--benchmarks",
        nargs="+",
        choices=tuple(BENCHMARKS),
        default=list(BENCHMARK_TITLES),
        help="(default: the paper's eight)",
    )
    add("--temperatures", nargs="+", type=float, default=[0.0], metavar="T", help="0 is greedy (default: 0)")
    add("--out", type=Path, required=True, help="folder of the answer files")
    add("--data-root", type=Path, help="folder with the benchmarks' folders (default: each one's own; the hub)")
    add("--dry-run", action="store_true", help="print what would be done")
    add_common_flags(parser)
    add_tree_flags(parser, str(Models.tree))
    add_tune_on(parser)
    return parser


def _head(text: str) -> tuple[str, str]:
    """METHOD=PATH or METHOD-LABEL=PATH, or another value for that head."""
    name, found, path = text.partition("=")
    _, labelled, label = name.partition("-")
    if method_of(name) not in MODELS or not found or not path:
        raise argparse.ArgumentTypeError(f"expected METHOD=… with a method of {', '.join(MODELS)}, found {text!r}")
    if labelled and not LABEL.fullmatch(label):
        raise argparse.ArgumentTypeError(f"expected letters, digits, _ and . in a METHOD-LABEL, found {name!r}")
    return name, path


def _models(args: argparse.Namespace) -> Models:
    """The target, and the drafts of the methods that were asked for, in the order of `METHODS`."""
    heads = dict(args.spec_model_path)
    if len(heads) < len(args.spec_model_path):
        raise UserError("--spec-model-path: found two heads of one method, expected one")
    asked = args.methods or (LOOKUP, *heads)
    lacking = [method for method in MODELS if method in asked and method not in map(method_of, heads)]
    if lacking:
        raise UserError(f"--methods {lacking[0]}: its draft head is missing, give --spec-model-path {lacking[0]}=PATH")
    if GENERATE in asked and not all(map(is_greedy, args.temperatures)):
        raise UserError(f"--methods {GENERATE} is greedy, found --temperatures {' '.join(map(str, args.temperatures))}")
    names = [name for name in (GENERATE, *heads, LOOKUP) if {name, method_of(name)} & {*asked}]
    names.sort(key=lambda name: METHODS.index(method_of(name)))
    if args.draft_image_rows is not None and VLM not in map(method_of, names):
        raise UserError(f"--draft-image-rows is of {VLM}, which is not among the methods")
    return Models(
        args.base_model_path,
        {name: heads.get(name) for name in names},
        asked_tree(args, Models.tree),
        dtype=args.dtype,
        device_map=args.device_map,
        gpus=args.num_gpus_per_model,
        skip_visual=args.skip_visual,
        places=asked_places(args, heads),
        draft_image_rows=args.draft_image_rows,
        prefix_cache=args.prefix_cache,
    )


def _plans(args: argparse.Namespace, models: Models) -> tuple[list[Plan], list[str]]:
    """What is to be done, and the benchmarks whose data cannot be read."""
    plans, missing = [], []
    for name in dict.fromkeys(args.benchmarks):
        benchmark = BENCHMARKS[name]
        try:
            questions, data = _questions(benchmark, args.data_root)
        except (UserError, OSError) as error:
            missing.append(name)
            where = f"here a folder {Path(benchmark.folder).name} under --data-root"
            print(f"notice: not measured: {error} ({where})", file=sys.stderr)
            continue
        asked = asked_part(args, name, len(questions))
        for temperature in dict.fromkeys(args.temperatures):
            generation = Generation(temperature, args.max_new_token, own_config=args.generation_config)
            plan = Plan(benchmark, benchmark.defaults, questions, data, asked, generation)
            for method in ("baseline", *models.drafts):
                plan.add(models, method, args.out / name / f"{method}-temperature-{temperature}.jsonl", method)
            plans.append(plan)
    return plans, missing


def _questions(benchmark: Benchmark, data_root: Path | None) -> tuple[list[Question], str]:
    """Its questions and where they come from."""
    folder = _folder(benchmark, data_root)
    questions, data = benchmark.questions(folder)
    if data_root is not None and folder is None:
        missing = data_root / Path(benchmark.folder).name
        print(f"notice: {benchmark.name}: there is no {missing}, its questions are from {data}", file=sys.stderr)
    return questions, data


def _folder(benchmark: Benchmark, data_root: Path | None) -> str | None:
    """Where a benchmark's data are; what is not under `data_root` and on the hub is sought as without one."""
    folder = data_root and data_root / Path(benchmark.folder).name
    return None if folder is None or (benchmark.hub is not None and not folder.is_dir()) else str(folder)


def _print(plans: Sequence[Plan], models: Models) -> None:
    """What would be done."""
    tasks = list(chain.from_iterable(plan.tasks for plan in plans))
    keep_trees(tasks, models)
    for task in tasks:
        task.check()
    for plan in plans:
        total = len(plan.questions)
        print(f"{plan.benchmark.name}, temperature {plan.generation.temperature}: {total} questions of {plan.data}")
        for task in plan.tasks:
            answered = sum(question.question_id in task.lines for question in plan.questions)
            print(f"  {task.method:<9}{answered:>5} of {total} answered  {task.path}")


if __name__ == "__main__":
    run_cli(main)
