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
from pathlib import Path

from vispec.cli import Parser, UserError, provenance
from vispec.evaluation import report
from vispec.evaluation.answer_lines import read_answers
from vispec.evaluation.answers import condition_notices, conditions, left_out_notice, left_out_of, meta_path, read_meta
from vispec.evaluation.chart import draw_all
from vispec.evaluation.comparison import COMPARABLE, TAU_CONVENTION, Comparison, compare, refuse_differences
from vispec.evaluation.measure import is_greedy
from vispec.evaluation.results import read_results


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
    settings, notices = _common_settings(Path(args.baseline), Path(args.spec))
    baseline, spec = read_answers(Path(args.baseline)), read_answers(Path(args.spec))
    for flag, path, answers in (("--baseline", args.baseline, baseline), ("--spec", args.spec, spec)):
        if not answers:
            raise UserError(f"{flag} {path}: it has no answer yet")
    meta = read_meta(Path(args.baseline))
    drafted = any(answer.acceptance_lengths for answers in baseline.values() for answer in answers)
    if drafted or (meta and meta["settings"].get("method", "baseline") != "baseline"):
        raise UserError(f"--baseline {args.baseline}: these are answers of a speculative method")
    result = compare(baseline, spec)
    notices += condition_notices(*((path, conditions(path)) for path in (Path(args.baseline), Path(args.spec))))
    only_one = len(baseline.keys() ^ spec.keys())
    if only_one:
        notices.append(f"{only_one} question(s) that only one arm has answered are not counted")
    for path, answers in ((Path(args.baseline), baseline), (Path(args.spec), spec)):
        notices += left_out_notice(path, left_out_of(read_meta(path), answers))
    for notice in notices:
        print(f"notice: {notice}", file=sys.stderr)
    if args.json:
        printed = {
            **asdict(result),
            "identical_share": result.identical_questions / result.questions,
            "questions_of_one_arm_only": only_one,
            "tau_convention": TAU_CONVENTION,
            "settings": settings,
            "provenance": provenance(args),
        }
        print(json.dumps(printed, indent=1, ensure_ascii=False))
    else:
        _print_report(result, settings)
    return 0


def _common_settings(baseline: Path, spec: Path) -> tuple[dict, list[str]]:
    """The settings of the pair, and what could not be checked; differing ones are refused."""
    metas = [read_meta(path) for path in (baseline, spec)]
    notices = [
        f"no {meta_path(path)}: that both arms had the same cap, dtype and temperature is not checked"
        for path, meta in zip((baseline, spec), metas, strict=True)
        if meta is None and path.exists()
    ]
    ours, theirs = (meta["settings"] if meta else None for meta in metas)
    if ours is not None and theirs is not None:
        refuse_differences("the arms cannot be compared", COMPARABLE, (baseline, ours), (spec, theirs))
    return theirs or ours or {}, notices


def _print_report(result: Comparison, settings: dict) -> None:
    method = settings.get("method", "spec")
    print(f"{'arm':<10}{'tokens/s':>10}{'ms/token':>10}{'decode-only tokens/s':>22}{'new tokens':>12}")
    for name, arm in (("baseline", result.baseline), (method, result.spec)):
        print(
            f"{name:<10}{arm.tokens_per_second:>10.2f}{arm.ms_per_token:>10.2f}"
            f"{_number(arm.decode_tokens_per_second):>22}{arm.new_tokens:>12}"
        )
    print(f"speedup              {result.speedup:.2f}x over {result.questions} questions, prefill included")
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
