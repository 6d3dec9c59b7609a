"""The command line behind all `gen_<arm>_answer_<benchmark>`: a benchmark by one method."""

import argparse
import sys
from pathlib import Path

from vispec.cli import Parser, UserError, count, parse_bool
from vispec.evaluation.benchmarks import BENCHMARKS, Benchmark
from vispec.evaluation.flags import (
    PLACES,
    add_common_flags,
    add_image_rows,
    add_place_flags,
    add_tree_flags,
    asked_part,
    asked_place,
    asked_tree,
    value_of,
)
from vispec.evaluation.loading import Models
from vispec.evaluation.lossless import wants_check
from vispec.evaluation.measure import Generation, Kind
from vispec.evaluation.measured_trees import add_tune_on
from vispec.evaluation.runner import Plan, run
from vispec.methods import LOOKUP, MODELS, VLM

METHOD_FLAGS = {"--use-ours": "vispec", "--use-medusa": "medusa"}
"""And what `--method` calls them."""
UNUSED_FLAGS = ("--image-fc", "--load-in-8bit", "--max-gpu-memory", "--tree-choices", "--label")


def run_benchmark(name: str, arm: Kind, argv: list[str] | None = None) -> int:
    """Answer a benchmark's questions with an arm and write its answer file."""
    benchmark = BENCHMARKS[name]
    args = make_parser(benchmark, arm).parse_args(argv)
    method = _method(args, arm)
    _notice_unused(args, arm)
    lossless = args.check_lossless if arm == "spec" else None
    wants_check(lossless, args.temperature)  # refuses it before anything is loaded
    options = {name: getattr(args, name) for name in benchmark.options}
    questions, data = benchmark.questions(args.data_folder, **options)
    generation = Generation(args.temperature, args.max_new_token, own_config=args.generation_config)
    asked, models = asked_part(args, name, len(questions)), _models(args, arm, method)
    plan = Plan(benchmark, options, questions, data, asked, generation, args.num_choices)
    plan.add(models, method, answer_path(args, method), _model_id(args, method))
    return run([plan], models, args, lambda other: args.data_folder if other is benchmark else None, lossless)


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
        add_tree_flags(parser, str(Models.tree))
        add_tune_on(parser)
        add_place_flags(parser)
        add_image_rows(parser)
        add("--num-q", type=count, help="queries of the vision adaptor; read from the weights, checked when given")
        add(
            "--method",
            choices=(*MODELS, LOOKUP),
            help="whose draft head it is (default: eagle2); vlm: a whole smaller VLM; lookup drafts from the text so "
            "far, without one",
        )
        parser.add_bool("--use-ours", "another word for --method vispec")
        parser.add_bool("--use-medusa", "another word for --method medusa; --depth is not used")
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


def answer_path(args: argparse.Namespace, method: str) -> Path:
    """Where the answers go."""
    if args.answer_file:
        return Path(args.answer_file)
    return Path(args.answer_dir, args.bench_name, f"{_model_id(args, method)}-temperature-{args.temperature}.jsonl")


def _models(args: argparse.Namespace, arm: Kind, method: str) -> Models:
    shared = {"dtype": args.dtype, "device_map": args.device_map, "gpus": args.num_gpus_per_model}
    shared["prefix_cache"] = args.prefix_cache
    if arm == "baseline":
        return Models(args.base_model_path, **shared)
    tree = asked_tree(args, Models.tree)
    draft = {"places": {method: asked_place(args)}, "draft_image_rows": args.draft_image_rows}
    drafts = {method: args.spec_model_path}
    return Models(args.base_model_path, drafts, tree, args.num_q, skip_visual=args.skip_visual, **draft, **shared)


def _method(args: argparse.Namespace, arm: Kind) -> str:
    if arm == "baseline":
        return "baseline"
    heads = [flag for flag in METHOD_FLAGS if value_of(args, flag)]
    if len(heads) > 1:
        raise UserError(f"{'=True and '.join(heads)}=True: found both, expected at most one of them")
    if args.draft_image_rows is not None and args.method != VLM:
        raise UserError(f"--draft-image-rows is of --method {VLM}, found {args.method or 'none'}")
    if args.method == LOOKUP:
        heads += [flag for flag in ("--spec-model-path", *PLACES, "--num-q") if value_of(args, flag)]
        if heads:
            raise UserError(f"--method lookup has no draft head, found {', '.join(heads)}")
        return LOOKUP
    if heads and args.method not in (None, METHOD_FLAGS[heads[0]]):
        raise UserError(f"--method {args.method} and {heads[0]}=True: found both, expected one of them")
    if args.spec_model_path is None:
        raise UserError("--spec-model-path is missing: the draft head, a folder or a hub id (or --method lookup)")
    return METHOD_FLAGS[heads[0]] if heads else args.method or "eagle2"


def _model_id(args: argparse.Namespace, method: str) -> str:
    return args.model_id or f"{Path(args.base_model_path).name}-{method}"


def _notice_unused(args: argparse.Namespace, arm: Kind) -> None:
    given = [flag for flag in UNUSED_FLAGS if getattr(args, flag.strip("-").replace("-", "_")) is not None]
    if arm == "baseline" and args.spec_model_path:
        given.append("--spec-model-path")
    if given:
        print(f"notice: without effect here: {', '.join(given)}", file=sys.stderr)
