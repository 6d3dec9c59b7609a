"""One runner behind all `gen_<arm>_answer_<benchmark>` command lines."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vispec.cli import ERROR, Parser, UserError, count, parse_bool, provenance, whole, worst
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
from vispec.evaluation.head_flags import FLAGS as PLACE_FLAGS
from vispec.evaluation.head_flags import add_place_flags, asked_place, value_of
from vispec.evaluation.loading import Models
from vispec.evaluation.lossless import check_lossless, wants_check
from vispec.evaluation.measure import Generation, Kind
from vispec.evaluation.measured_trees import (
    TuningSet,
    add_tune_on,
    keep_trees,
    measure_trees,
    require_measuring,
    tuning_set,
)
from vispec.evaluation.tree_flags import add_tree_flags, asked_tree

UNUSED_FLAGS = ("--image-fc", "--load-in-8bit", "--max-gpu-memory", "--tree-choices", "--label")


def run_benchmark(name: str, arm: Kind, argv: list[str] | None = None) -> int:
    """Answer a benchmark's questions with an arm and write its answer file."""
    benchmark = BENCHMARKS[name]
    args = make_parser(benchmark, arm).parse_args(argv)
    method = _method(args, arm)
    _notice_unused(args, arm)
    check = arm == "spec" and wants_check(args.check_lossless, args.temperature)
    options = {name: getattr(args, name) for name in benchmark.options}
    all_questions, data = benchmark.questions(args.data_folder, **options)
    questions = all_questions[asked_part(args, name, len(all_questions))]
    file = AnswerFile(answer_path(args, method))
    with file.alone():
        models = _models(args, arm, method)
        generation = Generation(args.temperature, args.max_new_token, own_config=args.generation_config)
        series = Series(name, method, _model_id(args, method), generation, args.num_choices)
        task = Task(series, file, settings_of(series, models, data, options))
        models = keep_trees([task], models)
        task.check()
        left_out = []
        if open_asks([task], questions):
            require_measuring(models, args.num_gpus_total)
            tuned_on = tuning_set(
                models,
                getattr(args, "tune_on", None),
                {(name, data): options},
                lambda other: args.data_folder if other is benchmark else None,
            )
            left_out = _answer(task, questions, args, models, tuned_on)
        code = worst(finish(task, len(questions), left_out), report_left_out(benchmark, left_out))
        if check:

            def rerun(question_id: int | str) -> tuple[list[int], list[int]]:
                return InFloat32(models).ids_of_both_arms(series, question_of(question_id, all_questions, data))

            if not check_lossless(file, required=bool(args.check_lossless), rerun=rerun):
                code = ERROR
        return code


def make_parser(benchmark: Benchmark, arm: Kind) -> Parser:
    parser = Parser(
        prog=f"python -m vispec.evaluation.gen_{arm}_answer_{benchmark.name}",
        description=f"Answer {benchmark.name} by "
        + ("plain autoregressive decoding." if arm == "baseline" else "tree speculative decoding."),
    )
    add = parser.add_argument
    add("--base-model-path", required=True, help="the target: a folder or a hub id")
    add("--spec-model-path", help="the draft head: a folder or a hub id")
    where = f"local files of the benchmark (default: {benchmark.folder}{' if it exists' if benchmark.hub else ''})"
    add("--data-folder", *benchmark.folder_flags, help=where)
    add("--model-id", help="names the answers (default: the target's name and the method)")
    add("--bench-name", default=benchmark.name, help="folder of the answers")
    add("--answer-dir", default=".", help="where that folder is")
    add("--answer-file", help="the file itself (default: <bench-name>/<model-id>-temperature-<T>.jsonl)")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--num-choices", type=count, default=1, help="answers to each question, with seeds 0, 1, …")
    add_common_flags(parser)
    if arm == "spec":
        add_tree_flags(parser, "/".join(map(str, Models.tree)))
        add_tune_on(parser)
        add_place_flags(parser)
        add("--num-q", type=count, help="queries of the vision adaptor; read from the weights, checked when given")
        add("--method", choices=("lookup",), help="lookup drafts from the text so far, without a draft head")
        parser.add_bool("--use-ours", "the draft head is ViSpec's; neither this nor --use-medusa: EAGLE-2's")
        parser.add_bool("--use-medusa", "the draft head is Medusa's; --depth is not used")
        add(
            "--check-lossless",
            type=parse_bool,
            nargs="?",
            const=True,
            metavar="True|False",
            help="compare output ids with the baseline's file beside this one (default: greedily, if there is one)",
        )
    for flag, settings in benchmark.flags.items():
        add(flag, **settings)
    for flag in UNUSED_FLAGS:
        add(flag, nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def add_common_flags(parser: Parser) -> None:
    """Flags of every command that answers questions."""
    add = parser.add_argument
    add("--max-new-token", type=count, default=1024, help="most new tokens of an answer")
    parser.add_bool(
        "--generation-config",
        "apply what else the target's generation config says, such as penalties and top_k; temperature and length "
        "stay those of the flags (default: nothing of it but end tokens)",
    )
    add("--question-begin", type=whole, help="first question, counted from 0")
    add("--question-end", type=whole, help="question to stop before")
    add("--num-gpus-per-model", type=count, default=1, help="GPUs that the target is spread over")
    add("--num-gpus-total", type=count, default=1, help="as many models share the questions (needs Ray)")
    parser.add_hardware()


def asked_part(args: argparse.Namespace, name: str, total: int) -> slice:
    """The part of a benchmark's questions that the flags of `add_common_flags` ask for.

    Raises:
        UserError: it is empty.
    """
    part = slice(args.question_begin, args.question_end)
    if not range(total)[part]:
        raise UserError(
            f"--question-begin {args.question_begin}, --question-end {args.question_end}: no question of {name} lies "
            f"there, it has {total}"
        )
    return part


def question_of(question_id: int | str, questions: Sequence[Question], data: str) -> Question:
    """The question that an answer belongs to.

    Raises:
        UserError: the data have changed since.
    """
    for question in questions:
        if question.question_id == question_id:
            return question
    raise UserError(f"it is not among the questions of {data} any more")


def answer_path(args: argparse.Namespace, method: str) -> Path:
    """Where the answers go."""
    if args.answer_file:
        return Path(args.answer_file)
    return Path(args.answer_dir, args.bench_name, f"{_model_id(args, method)}-temperature-{args.temperature}.jsonl")


def _answer(
    task: Task, questions: list[Question], args: argparse.Namespace, models: Models, tuned_on: TuningSet | None
) -> list[LeftOut]:
    title = f"{args.bench_name} {task.series.method}"
    with loaded(models, args.num_gpus_total) as answerer:
        measure_trees([task], tuned_on, models, answerer)
        return answer_all([task], questions, answerer, provenance(args), title)


def _models(args: argparse.Namespace, arm: Kind, method: str) -> Models:
    hardware = {"dtype": args.dtype, "device_map": args.device_map, "gpus": args.num_gpus_per_model}
    if arm == "baseline":
        return Models(args.base_model_path, **hardware)
    tree = asked_tree(args, Models.tree)
    places = {method: asked_place(args)}
    return Models(args.base_model_path, {method: args.spec_model_path}, tree, args.num_q, places=places, **hardware)


def _method(args: argparse.Namespace, arm: Kind) -> str:
    if arm == "baseline":
        return "baseline"
    heads = [flag for flag, given in (("--use-ours", args.use_ours), ("--use-medusa", args.use_medusa)) if given]
    if len(heads) > 1:
        raise UserError("--use-ours=True and --use-medusa=True: found both, expected at most one of them")
    if args.method == "lookup":
        heads += [flag for flag in ("--spec-model-path", *PLACE_FLAGS, "--num-q") if value_of(args, flag)]
        if heads:
            raise UserError(f"--method lookup has no draft head, found {', '.join(heads)}")
        return "lookup"
    if args.spec_model_path is None:
        raise UserError("--spec-model-path is missing: the draft head, a folder or a hub id (or --method lookup)")
    return {"--use-ours": "vispec", "--use-medusa": "medusa"}[heads[0]] if heads else "eagle2"


def _model_id(args: argparse.Namespace, method: str) -> str:
    return args.model_id or f"{Path(args.base_model_path).name}-{method}"


def _notice_unused(args: argparse.Namespace, arm: Kind) -> None:
    given = [flag for flag in UNUSED_FLAGS if getattr(args, flag.strip("-").replace("-", "_")) is not None]
    if arm == "baseline" and args.spec_model_path:
        given.append("--spec-model-path")
    if given:
        print(f"notice: without effect here: {', '.join(given)}", file=sys.stderr)
