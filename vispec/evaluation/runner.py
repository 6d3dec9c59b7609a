"""One runner behind all `gen_<arm>_answer_<benchmark>` command lines."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vispec.cli import UserError, parse_bool, provenance
from vispec.evaluation.answers import AnswerFile, answer_line
from vispec.evaluation.benchmarks import BENCHMARKS, Benchmark, Question
from vispec.evaluation.loading import Parser, count, dtype_name, load_model, quiet_transformers
from vispec.evaluation.lossless import check_lossless, wants_check
from vispec.evaluation.measure import Answer, Arm, Generation, answer_question
from vispec.evaluation.text import answer_text
from vispec.prompts import UNREADABLE, build_inputs, load_processor

if TYPE_CHECKING:
    from vispec.model.spec_model import SpecModel

WARM_UPS = 3
UNUSED_FLAGS = ("--image-fc", "--load-in-8bit", "--max-gpu-memory", "--tree-choices", "--label")


def run_benchmark(name: str, arm: Arm, argv: list[str] | None = None) -> int:
    """Answer a benchmark's questions with an arm and write its answer file."""
    benchmark = BENCHMARKS[name]
    args = make_parser(benchmark, arm).parse_args(argv)
    method = _method(args, arm)
    _notice_unused(args, arm)
    check = arm == "spec" and wants_check(args.check_lossless, args.temperature)
    options = {name: getattr(args, name) for name in benchmark.options}
    questions, data = benchmark.questions(args.data_folder, **options)
    by_id = {question.question_id: question for question in questions}
    questions = questions[args.question_begin : args.question_end]
    file = AnswerFile(answer_path(args, method))
    made_by = provenance(args)
    settings = _settings(args, arm, method, benchmark, data, options)
    unknown = ("dtype", "device") if args.dtype == "auto" else ("device",)
    file.check(settings, unknown)  # before minutes of loading
    open_questions = [question for question in questions if question.question_id not in file.lines]
    left_out: dict[int | str, str] = {}
    if open_questions:
        model, processor = _load(args, arm, method, benchmark)
        settings["dtype"] = dtype_name(model)
        settings["device"] = made_by["device"] if _runs_where_provenance_says(model) else model.target.device.type
        file.begin(settings, made_by)
        left_out = _answer_all(model, processor, args, arm, method, open_questions, file)
        del model  # a check in float32 may need its memory
    file.finish(left_out)
    print(f"{len(questions) - len(left_out)} of {len(questions)} questions answered: {file.path}")
    if left_out:
        print(f"left out, because their image cannot be read: {', '.join(map(str, left_out))}")
        print(f"the files of {name} can be had from {benchmark.source}")
    if check:
        rerun = partial(_in_float32, args, method, benchmark, by_id)
        return 0 if check_lossless(file, required=bool(args.check_lossless), rerun=rerun) else 1
    return 0


def make_parser(benchmark: Benchmark, arm: Arm) -> Parser:
    parser = Parser(
        prog=f"python -m vispec.evaluation.gen_{arm}_answer_{benchmark.name}",
        description=f"Answer {benchmark.name} by "
        + ("plain autoregressive decoding." if arm == "baseline" else "tree speculative decoding."),
    )
    add = parser.add_argument
    add("--base-model-path", required=True, help="the target: a folder or a hub id")
    add("--spec-model-path", required=arm == "spec", help="the draft head: a folder or a hub id")
    where = f"local files of the benchmark (default: {benchmark.folder}{' if it exists' if benchmark.hub else ''})"
    add("--data-folder", *benchmark.folder_flags, help=where)
    add("--model-id", help="names the answers (default: the target's name and the method)")
    add("--bench-name", default=benchmark.name, help="folder of the answers")
    add("--answer-dir", default=".", help="where that folder is")
    add("--answer-file", help="the file itself (default: <bench-name>/<model-id>-temperature-<T>.jsonl)")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--max-new-token", type=count, default=1024, help="most new tokens of an answer")
    add("--num-choices", type=count, default=1, help="answers to each question, with seeds 0, 1, …")
    add("--question-begin", type=int, help="first question, counted from 0")
    add("--question-end", type=int, help="question to stop before")
    add("--num-gpus-per-model", type=count, default=1, help="GPUs that the target is spread over")
    add("--num-gpus-total", type=count, default=1, help="more than one model at a time is not offered yet")
    parser.add_hardware()
    if arm == "spec":
        add("--total-token", type=count, default=30, help="nodes of the draft tree, its root included")
        add("--depth", type=int, default=3, help="expansions of the tree after its first level")
        add("--top-k", type=count, default=8, help="nodes expanded a level")
        add("--num-q", type=count, help="queries of the vision adaptor; read from the weights, checked when given")
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


def answer_path(args: argparse.Namespace, method: str) -> Path:
    """Where the answers go."""
    if args.answer_file:
        return Path(args.answer_file)
    return Path(args.answer_dir, args.bench_name, f"{_model_id(args, method)}-temperature-{args.temperature}.jsonl")


def _answer_all(
    model: "SpecModel",
    processor,
    args: argparse.Namespace,
    arm: Arm,
    method: str,
    questions: list[Question],
    file: AnswerFile,
) -> dict[int | str, str]:
    """Append an answer for every question; returns those whose image cannot be read, with the reason."""
    from tqdm import tqdm

    generation = Generation(args.temperature, args.max_new_token)
    warm = False
    left_out = {}
    for question in tqdm(questions, desc=f"{args.bench_name} {method}", unit="question"):
        try:
            inputs = build_inputs(processor, question.turns)
        except UNREADABLE as error:
            left_out[question.question_id] = reason = f"{type(error).__name__}: {error}"
            tqdm.write(f"question {question.question_id} is left out: {reason}", file=sys.stderr)
            continue
        if not warm:
            for _ in range(WARM_UPS):
                answer_question(model, inputs, arm, generation)
            warm = True
        answers: list[tuple[Answer, str]] = []
        for seed in range(args.num_choices):
            answer = answer_question(model, inputs, arm, generation, seed)
            answers.append((answer, answer_text(processor.tokenizer, answer.output_ids)))
        file.append(answer_line(question.question_id, _model_id(args, method), method, answers))
    return left_out


def _in_float32(
    args: argparse.Namespace, method: str, benchmark: Benchmark, questions: dict[int | str, Question], name: int | str
) -> tuple[list[int], list[int]]:
    """Output ids of the baseline and of the method for the question of that name, both in float32."""
    model, processor = _load(args, "spec", method, benchmark, dtype="float32")
    inputs = build_inputs(processor, questions[name].turns)
    generation = Generation(args.temperature, args.max_new_token)
    plain, ours = (answer_question(model, inputs, arm, generation).output_ids for arm in ("baseline", "spec"))
    return plain, ours


def _load(args: argparse.Namespace, arm: Arm, method: str, benchmark: Benchmark, dtype: str | None = None):
    """The model in the dtype asked for, unless another one is given here, and its processor."""
    options = {}
    if arm == "spec":
        options = {
            "method": method,
            "total_token": args.total_token,
            "depth": args.depth,
            "top_k": args.top_k,
            "num_q": args.num_q,
        }
    quiet_transformers()
    processor = load_processor(args.base_model_path, benchmark.pixel_limits)
    model = load_model(
        args.base_model_path,
        args.spec_model_path if arm == "spec" else None,
        dtype=dtype or args.dtype,
        device_map=args.device_map,
        gpus=args.num_gpus_per_model,
        **options,
    )
    return model, processor


def _settings(args: argparse.Namespace, arm: Arm, method: str, benchmark: Benchmark, data: str, options: dict) -> dict:
    """What must not change within a file; dtype and device are filled in when the model is loaded."""
    settings = {
        "benchmark": benchmark.name,
        "data": data,
        "method": method,
        "base_model": _absolute(args.base_model_path),
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_token,
        "num_choices": args.num_choices,
    }
    if options:
        settings["benchmark_options"] = options
    if args.dtype != "auto":
        settings["dtype"] = args.dtype
    if arm == "spec":
        settings["spec_model"] = _absolute(args.spec_model_path)
        settings["tree"] = [args.total_token, args.depth, args.top_k]
    return settings


def _absolute(path: str) -> str:
    """A local folder by its full path, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _method(args: argparse.Namespace, arm: Arm) -> str:
    if arm == "baseline":
        return "baseline"
    if args.use_ours and args.use_medusa:
        raise UserError("--use-ours=True and --use-medusa=True: found both, expected at most one of them")
    return "vispec" if args.use_ours else "medusa" if args.use_medusa else "eagle2"


def _model_id(args: argparse.Namespace, method: str) -> str:
    return args.model_id or f"{Path(args.base_model_path).name}-{method}"


def _notice_unused(args: argparse.Namespace, arm: Arm) -> None:
    given = [flag for flag in UNUSED_FLAGS if getattr(args, flag.strip("-").replace("-", "_")) is not None]
    if arm == "baseline" and args.spec_model_path:
        given.append("--spec-model-path")
    if given:
        print(f"notice: without effect here: {', '.join(given)}", file=sys.stderr)
    if args.num_gpus_total > args.num_gpus_per_model:
        print(f"notice: --num-gpus-total {args.num_gpus_total}: one model answers all questions", file=sys.stderr)


def _runs_where_provenance_says(model: "SpecModel") -> bool:
    import torch

    return model.target.device.type == "cuda" or not torch.cuda.is_available()
