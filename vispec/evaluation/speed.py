"""Speedup and tau of speculative arms, from answer files.

    python -m vispec.evaluation.speed --baseline FILE --spec FILE       one pair of files
    python -m vispec.evaluation.speed --results DIR [--figure FILE]     all methods and benchmarks below a folder

What the measures are, `vispec.evaluation.comparison` says.
"""

import importlib.util
import json
import sys
from argparse import Namespace
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from vispec.cli import Parser, UserError, provenance
from vispec.evaluation import report
from vispec.evaluation.answer_file import left_out_notice, meta_path, read_answers
from vispec.evaluation.chart import draw_all
from vispec.evaluation.comparison import TAU_CONVENTION, Comparison
from vispec.evaluation.measure import is_greedy
from vispec.evaluation.results import compare_files, read_results


def main(argv: list[str] | None = None) -> int:
    parser = _make_parser()
    args = parser.parse_args(argv)
    pair = [flag for flag in ("baseline", "spec") if getattr(args, flag) is not None]
    if args.results is not None:
        if pair or args.json:
            parser.error("--results stands alone: expected no --baseline, --spec or --json beside it (--format json)")
        return _report_results(args)
    if len(pair) < 2:
        parser.error("expected either --results DIR, or --baseline FILE with --spec FILE")
    if args.format or args.figure:
        parser.error("--format and --figure belong to --results, found --baseline and --spec")
    return _report_pair(args)


def _make_parser() -> Parser:
    parser = Parser(prog="python -m vispec.evaluation.speed", description="Speedup and tau of answer files.")
    add = parser.add_argument
    add("--results", metavar="DIR", help="report all answer files below DIR: methods × benchmarks")
    add("--format", choices=("md", "csv", "json"), help="of the report on --results (default: md)")
    add(
        "--figure",
        metavar="FILE",
        help="draw the report on --results as a bar chart (png): that of the lowest temperature, or, where the name "
        "holds {T}, one of each",
    )
    add("--baseline", metavar="FILE", help="answers of the baseline")
    add("--spec", metavar="FILE", help="answers of a speculative method")
    add("--json", action="store_true", help="print the pair's report as one JSON object")
    return parser


def _report_results(args: Namespace) -> int:
    if args.figure and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--figure {args.figure}: drawing needs matplotlib: pip install matplotlib")
    results = read_results(Path(args.results))
    for notice in results.notices:
        print(f"notice: {notice}", file=sys.stderr)
    if args.figure:
        for path in draw_all(results, args.figure):
            print(f"{path} written", file=sys.stderr)
    if args.format == "json":
        print(report.as_json(results, provenance(args)))
    elif args.format == "csv":
        print(report.as_csv(results), end="")
    else:
        print(report.as_markdown(results))
    return 0


def _report_pair(args: Namespace) -> int:
    files = [read_answers(Path(path)) for path in (args.baseline, args.spec)]
    baseline, spec = files
    notices = []
    for flag, file in (("--baseline", baseline), ("--spec", spec)):
        if not file.answers:
            raise UserError(f"{flag} {file.path}: it has no answer yet")
        if file.meta is None:
            unchecked = "that both arms had the same cap, dtype and temperature is not checked"
            notices.append(f"no {meta_path(file.path)}: {unchecked}")
    drafted = any(answer.acceptance_lengths for answers in baseline.answers.values() for answer in answers)
    if drafted or baseline.settings.get("method", "baseline") != "baseline":
        raise UserError(f"--baseline {args.baseline}: these are answers of a speculative method")
    found = compare_files(baseline, spec, notices)
    if found is None:
        raise UserError("the two arms have no question in common")
    for notice in chain(notices, *map(left_out_notice, files)):
        print(f"notice: {notice}", file=sys.stderr)
    result, settings = found.comparison, spec.settings or baseline.settings
    if args.json:
        printed = {
            **asdict(result),
            "identical_share": result.identical_questions / result.questions,
            "questions_of_one_arm_only": len(baseline.answers.keys() ^ spec.answers.keys()),
            "tau_convention": TAU_CONVENTION,
            "settings": settings,
            "provenance": provenance(args),
        }
        print(json.dumps(printed, indent=1, ensure_ascii=False))
    else:
        _print_report(result, settings)
    return 0


def _print_report(result: Comparison, settings: dict) -> None:
    method = settings.get("method", "spec")
    print(f"{'arm':<10}{'tokens/s':>10}{'ms/token':>10}{'decode-only tokens/s':>22}{'new tokens':>12}")
    for name, arm in (("baseline", result.baseline), (method, result.spec)):
        print(
            f"{name:<10}{arm.tokens_per_second:>10.2f}{arm.ms_per_token:>10.2f}"
            f"{_number(arm.decode_tokens_per_second):>22}{arm.new_tokens:>12}"
        )
    kept = f", turns read on (--prefix-cache {settings['prefix_cache']})" if settings.get("prefix_cache") else ""
    print(f"speedup              {result.speedup:.2f}x over {result.questions} questions, prefill included{kept}")
    print(f"speedup decode-only  {_number(result.decode_speedup)}x")
    steps = f" beside {result.plain_steps} plain steps" if result.plain_steps else ""
    print(f"tau                  {_number(result.tau)} over {result.rounds} rounds{steps}; {TAU_CONVENTION}")
    identical = f"{result.identical_questions} of {result.questions} questions"
    sampled = not is_greedy(settings.get("temperature", 0))
    print(f"identical output ids {identical}" + (" (sampled: they need not be)" if sampled else ""))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    from vispec.cli import run_cli

    run_cli(main)
