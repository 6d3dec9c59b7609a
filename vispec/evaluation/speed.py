"""Speedup and tau of speculative arms, from answer files.

    python -m vispec.evaluation.speed --baseline FILE --spec FILE       one pair of files
    python -m vispec.evaluation.speed --results DIR [--figure FILE]     all methods and benchmarks below a folder

The speed of an arm is the mean over questions of new tokens / wall time (seconds, the target's prefill included),
counted over the questions that both arms have answered; the speedup is the ratio of the two. The decode-only measure is
the same over the tokens after the first one, which the prefill gives, and the time after prefill and first tree. Tau is
the mean of all acceptance lengths: draft tokens accepted in a round, without the token that the target adds (EAGLE
counts it: tau + 1).
"""

import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from vispec.cli import Parser, UserError, provenance
from vispec.evaluation.answers import answers_of, left_out_of, meta_path, read_lines, read_meta
from vispec.evaluation.measure import Answer, is_greedy

COMPARABLE = (
    "benchmark", "data", "benchmark_options", "base_model", "temperature", "max_new_tokens", "num_choices", "dtype",
    "device", "device_type", "devices",
)  # fmt: skip
"""Settings that two arms must share."""

TAU_CONVENTION = "mean draft tokens accepted a round, the target's own token not counted (EAGLE's tau is this + 1)"

Answers = Mapping[Hashable, Sequence[Answer]]
"""All answers to each question."""


@dataclass(frozen=True)
class ArmSpeed:
    """How fast an arm is. None where nothing was decoded after the first token."""

    tokens_per_second: float
    ms_per_token: float
    """Inverse of tokens_per_second."""
    decode_tokens_per_second: float | None
    new_tokens: int


@dataclass(frozen=True)
class Comparison:
    """A speculative arm beside the baseline, over the same questions."""

    questions: int
    speedup: float
    decode_speedup: float | None
    tau: float | None
    rounds: int
    baseline: ArmSpeed
    spec: ArmSpeed
    identical_questions: int
    """Questions to which both arms gave the same output ids."""

    @property
    def outputs_identical(self) -> bool:
        return self.identical_questions == self.questions


def compare(baseline: Answers, spec: Answers) -> Comparison:
    """Compare two arms over the questions that both have answered.

    Raises:
        UserError: there is none.
    """
    shared = [question for question in baseline if question in spec]
    if not shared:
        raise UserError("the two arms have no question in common")
    speeds = [arm_speed([arm[question] for question in shared]) for arm in (baseline, spec)]
    lengths = [n for question in shared for answer in spec[question] for n in answer.acceptance_lengths]
    decode = [speed.decode_tokens_per_second for speed in speeds]
    return Comparison(
        questions=len(shared),
        speedup=speeds[1].tokens_per_second / speeds[0].tokens_per_second,
        decode_speedup=decode[1] / decode[0] if all(decode) else None,
        tau=fmean(lengths) if lengths else None,
        rounds=len(lengths),
        baseline=speeds[0],
        spec=speeds[1],
        identical_questions=sum(_ids(baseline[question]) == _ids(spec[question]) for question in shared),
    )


def arm_speed(questions: Sequence[Sequence[Answer]]) -> ArmSpeed:
    """Speed of an arm: the mean of each question's own speed."""
    wall = [wall_speed(answers) for answers in questions]
    decode = [speed for answers in questions if (speed := decode_speed(answers)) is not None]
    return ArmSpeed(
        tokens_per_second=fmean(wall),
        ms_per_token=1000 / fmean(wall),
        decode_tokens_per_second=fmean(decode) if decode else None,
        new_tokens=sum(len(a.output_ids) for q in questions for a in q),
    )


def wall_speed(answers: Sequence[Answer]) -> float:
    """New tokens per second of one question, all its answers together, prefill included."""
    return sum(len(a.output_ids) for a in answers) / sum(a.wall_time for a in answers)


def decode_speed(answers: Sequence[Answer]) -> float | None:
    """The same after the first token and the prefill; None where nothing was decoded."""
    decoded = [a for a in answers if len(a.output_ids) > 1 and a.decode_time > 0]
    return sum(len(a.output_ids) - 1 for a in decoded) / sum(a.decode_time for a in decoded) if decoded else None


def round_in_steps(baseline: Sequence[Answer], spec: Sequence[Answer]) -> float | None:
    """Time of a draft round over the time of a plain step, both without prefill; None where an arm decoded nothing."""
    times = []
    for answers in (baseline, spec):
        rounds = sum(answer.last_round + 1 for answer in answers)
        times.append(sum(answer.decode_time for answer in answers) / rounds if rounds else 0.0)
    step, round_ = times
    return round_ / step if step and round_ else None


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
    # they use this module's measures
    from vispec.evaluation import report
    from vispec.evaluation.results import read_results

    if args.figure and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--figure {args.figure}: drawing needs matplotlib: pip install matplotlib")
    results = read_results(Path(args.results))
    for notice in results.notices:
        print(f"notice: {notice}", file=sys.stderr)
    if args.figure:
        from vispec.evaluation.chart import draw_all

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
    if any(answer.acceptance_lengths for answers in baseline.values() for answer in answers):
        raise UserError(f"--baseline {args.baseline}: these are answers of a speculative method")
    result = compare(baseline, spec)
    only_one = len(baseline.keys() ^ spec.keys())
    if only_one:
        notices.append(f"{only_one} question(s) that only one arm has answered are not counted")
    for path, answers in ((Path(args.baseline), baseline), (Path(args.spec), spec)):
        notices += left_out_notice(path, left_out_of(read_meta(path), answers))
    for notice in notices:
        print(f"notice: {notice}", file=sys.stderr)
    if args.json:
        report = {
            **asdict(result),
            "identical_share": result.identical_questions / result.questions,
            "questions_of_one_arm_only": only_one,
            "tau_convention": TAU_CONVENTION,
            "settings": settings,
            "provenance": provenance(args),
        }
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        _print_report(result, settings)
    return 0


def read_answers(path: Path) -> dict[int | str, list[Answer]]:
    """All answers of a file, by question."""
    lines, torn = read_lines(path)
    if torn:
        print(f"notice: {path}: the last line is cut off and not counted", file=sys.stderr)
    answers = {question: answers_of(line, path) for question, line in lines.items()}
    for question, found in answers.items():
        if not found or any(not answer.output_ids or answer.wall_time <= 0 for answer in found):
            raise UserError(f"{path}, question {question}: an answer without tokens or without a time")
    return answers


def left_out_notice(path: Path, left_out: Sequence[Mapping]) -> list[str]:
    """What is said of the questions of an answer file that could not be asked; [] if there are none."""
    if not left_out:
        return []
    first = "question {question_id}: {reason}".format_map(left_out[0])
    return [f"{path}: {len(left_out)} question(s) left out, the first one is {first}"]


def refuse_differences(why: str, names: Iterable[str], one: tuple[Path, Mapping], other: tuple[Path, Mapping]) -> None:
    """Compare settings of two answer files, each given as (path, settings).

    Raises:
        UserError: one of the names has different values; says `why` and names both files.
    """
    for name in names:
        found, expected = other[1].get(name), one[1].get(name)
        if found != expected:
            raise UserError(f"{why}: {name} is {expected!r} in {one[0]} and {found!r} in {other[0]}")


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


def _ids(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.output_ids for answer in answers]


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
    print(f"tau                  {_number(result.tau)} over {result.rounds} rounds; {TAU_CONVENTION}")
    identical = f"{result.identical_questions} of {result.questions} questions"
    sampled = not is_greedy(settings.get("temperature", 0))
    print(f"identical output ids {identical}" + (" (sampled: they need not be)" if sampled else ""))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    from vispec.cli import run_cli

    run_cli(main)
