"""The main job on the embedded default: `python -m vispec.demo --out out/demo`.

The shipped VLM answers questions about scenes it has never seen, by ViSpec, by plain decoding and by transformers' own
generate(), in float32 and then, with fewer questions, in bfloat16. What comes out: the answers, a table, summary.json
and demo.png.
"""

import argparse
import importlib.util
import sys
import time
from dataclasses import asdict
from pathlib import Path

from vispec import embedded
from vispec.cli import Parser, UserError, count, provenance, run_cli
from vispec.evaluation.comparison import RATIOS, TAU_CONVENTION, ArmSpeed, arm_speed
from vispec.files import write_json_atomic

QUESTIONS, REPETITIONS = 12, 3
HALF_QUESTIONS = 4
"""Questions in bfloat16, which processors without units for it do slowly."""
BUDGET = {"float32": 80.0, "bfloat16": 25.0, "float16": 25.0}
"""Seconds within which answers are repeated for the medians."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo", description="The shipped VLM answers, plainly and by ViSpec.")
    parser.add_argument("--out", default="out/demo", metavar="DIR", help="folder of summary.json and demo.png")
    parser.add_argument("--questions", type=count, default=QUESTIONS, help=f"how many (default: {QUESTIONS})")
    parser.add_argument("--dtype", choices=tuple(BUDGET), help="only this one (default: float32, then bfloat16)")
    args = parser.parse_args(argv)
    target, draft = embedded.require_weights()
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the demo draws a figure and needs matplotlib: pip install matplotlib")
    start = time.perf_counter()
    results = _run_all(args, target, draft)
    out = Path(args.out)
    _print_table(results)
    from vispec.demo.figure import draw

    draw(results[0], out / "demo.png")
    summary = _summary(args, results, seconds=time.perf_counter() - start)
    write_json_atomic(out / "summary.json", summary)
    print(f"\n{out / 'summary.json'} and {out / 'demo.png'} written, {summary['seconds']:.0f} s in all")
    return 0


def _run_all(args: argparse.Namespace, target: str, draft: str) -> list:
    from vispec.demo.runner import one_reply, questions, run
    from vispec.evaluation.loading import quiet_transformers
    from vispec.prompts import load_processor
    from vispec.text import coloured, wants_colour

    quiet_transformers()
    colour = wants_colour(sys.stdout)
    processor = load_processor(target)
    asked = questions(args.questions)

    def show(index: int, reply) -> None:
        measured = one_reply(reply)
        print(f"\n{index + 1:2}. {reply.question.text}\n{coloured(reply.pieces, colour)}")
        print(
            f"    {measured.spec.new_tokens} tokens, plain {measured.baseline.ms_per_token:.1f} ms/token, "
            f"ViSpec {measured.spec.ms_per_token:.1f} ms/token, τ {_number(measured.tau)}",
            flush=True,
        )

    print(f"{len(asked)} questions about images that the model has never seen, answered greedily by all arms.")
    if colour:
        print(f"{coloured([('Green', True)], True)}: drafted by ViSpec and accepted. The rest is the target's own.")
    results = []
    for dtype in [args.dtype] if args.dtype else ["float32", "bfloat16"]:
        part = asked if not results else asked[:HALF_QUESTIONS]
        if results:
            print(f"\n{len(part)} of them again in {dtype} …", flush=True)
        on_reply = None if results else show
        results.append(run(target, draft, embedded.TREE, dtype, processor, part, REPETITIONS, BUDGET[dtype], on_reply))
    return results


def _print_table(results: list) -> None:
    print(f"\n{'':<22}{'tokens/s':>10}{'ms/token':>10}{'x plain':>10}{'x generate':>12}{'τ':>8}")
    for result in results:
        plain, theirs = result.comparison.baseline, result.over_generate.baseline
        for name, arm, tau in (
            ("generate", theirs, "-"),
            ("baseline", plain, "-"),
            ("ViSpec", result.comparison.spec, _number(result.comparison.tau)),
        ):
            ratios = [arm.tokens_per_second / other.tokens_per_second for other in (plain, theirs)]
            print(
                f"{result.dtype:<10}{name:<12}{arm.tokens_per_second:>10.1f}{arm.ms_per_token:>10.2f}"
                f"{ratios[0]:>9.2f}x{ratios[1]:>11.2f}x{tau:>8}"
            )
    print(RATIOS)
    for result in results:
        comparison = result.comparison
        same = "yes" if comparison.outputs_identical else "no"
        print(
            f"{result.dtype} outputs identical: {same} "
            f"({comparison.identical_questions} of {comparison.questions} questions)"
        )
    print("τ: mean draft tokens accepted a round; the token that the target adds is not counted.")
    _explain_half(results)


def _explain_half(results: list) -> None:
    if len(results) < 2:
        return
    half = results[1].comparison
    same_questions = [[reply.measured("baseline")] for reply in results[0].replies[: half.questions]]
    if half.baseline.tokens_per_second < 0.95 * arm_speed(same_questions).tokens_per_second:
        print(f"Plain decoding is slower in {results[1].dtype} than in {results[0].dtype} on this machine.")
    if not half.outputs_identical:
        print(
            f"In {results[1].dtype} a pass over a tree and a pass over one token round differently, "
            "so near-ties between tokens may fall differently."
        )


def _summary(args: argparse.Namespace, results: list, seconds: float) -> dict:
    first, *others = results
    return {
        "dtype": first.dtype,
        **_methods(first),
        **{other.dtype: _methods(other) for other in others},
        "tau_convention": TAU_CONVENTION,
        "tree": asdict(embedded.TREE),
        "answers": [
            {
                "scene_seed": reply.question.scene_seed,
                "question": reply.question.text,
                "answer": "".join(text for text, _ in reply.pieces),
                "new_tokens": len(reply.answers["spec"][0].output_ids),
                "acceptance_lengths": reply.answers["spec"][0].acceptance_lengths,
            }
            for reply in first.replies
        ],
        "seconds": seconds,
        "provenance": provenance(args),
    }


def _methods(result) -> dict:
    comparison, over_generate = result.comparison, result.over_generate
    plain, theirs = comparison.baseline, over_generate.baseline

    def speeds(arm: ArmSpeed) -> dict[str, float]:
        return {
            "speedup": arm.tokens_per_second / plain.tokens_per_second,
            "speedup_over_generate": arm.tokens_per_second / theirs.tokens_per_second,
            "tokens_per_second": arm.tokens_per_second,
            "ms_per_token": arm.ms_per_token,
        }

    return {
        "questions": comparison.questions,
        "repetitions": result.repetitions,
        "methods": {
            "generate": speeds(theirs),
            "baseline": speeds(plain),
            "vispec": {
                **speeds(comparison.spec),
                "decode_speedup": comparison.decode_speedup,
                "decode_speedup_over_generate": over_generate.decode_speedup,
                "tau": comparison.tau,
                "outputs_identical": comparison.outputs_identical,
                "identical_questions": comparison.identical_questions,
            },
        },
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run_cli(main)
