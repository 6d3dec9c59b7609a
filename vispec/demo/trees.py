"""Which draft tree pays: trees compared in one run on questions like the demo's, about other scenes.

python -m vispec.demo.trees [--trees 8/3/3 talon:n=16,d=7,k=2 …] [--draft DIR]

All arms, plain decoding and transformers' generate() among them, take turns question by question; the medians of
several repetitions count. A larger tree has more tokens accepted in a round, and a round that takes longer: a row shows
both, and what comes of it. A tree that a rule grows may also have fewer levels in a round, each a pass of the draft.
A tree is chosen here, and reported on the first questions, those of the demo: no question does both.
"""

from dataclasses import dataclass
from statistics import fmean

from vispec import embedded
from vispec.cli import DTYPES, Parser, count, provenance, run_cli, whole
from vispec.evaluation.comparison import RATIOS, Questions, compare, round_in_steps
from vispec.evaluation.flags import parse_tree
from vispec.evaluation.loading import load_model, quiet_transformers
from vispec.evaluation.measure import Arm, Generation, interleave, typical
from vispec.files import write_json_atomic
from vispec.model.shape import TreeShape

TREES = ("8/3/3", "12/3/4", "12/5/2", embedded.TREE_NAME, "30/3/8")
QUESTIONS, REPETITIONS = 6, 5
FIRST_QUESTION = 98
"""Far behind the questions on which trees are reported; a multiple of the kinds, so these come in the same order."""


@dataclass(frozen=True)
class Row:
    """What one tree brought, against the baseline of the same run."""

    tree: str
    tau: float
    levels: float
    """Mean of its rounds."""
    round_in_steps: float
    """Time of a round over the time of a plain step, both without prefill."""
    speedup: float
    """Over our own plain loop, prefill included."""
    speedup_over_generate: float
    """Over transformers' generate() on the same target, prefill included."""
    outputs_identical: bool


def measure(model, trees: list[TreeShape], inputs: list[dict], repetitions: int, max_new_tokens: int) -> list[Row]:
    """Answer every prompt by the baseline, by generate() and with every tree, in turn.

    Args:
        model: a `SpecModel` with a draft head; its own tree is not used.
        inputs: what the processor returned for each prompt.
    """
    arms = [Arm("baseline", model, "baseline"), Arm("generate", model, "generate")]
    arms += [Arm(str(tree), model.with_tree(tree), "spec") for tree in dict.fromkeys(trees)]
    found = interleave(arms, inputs, Generation(temperature=0.0, max_new_tokens=max_new_tokens), repetitions)
    answers = {arm: [[typical(repeated)] for repeated in of_prompts] for arm, of_prompts in found.items()}
    baseline, generate = answers.pop("baseline"), answers.pop("generate")
    levels = {arm.name: _levels(arm.model, inputs, max_new_tokens) for arm in arms if arm.kind == "spec"}
    return [_row(tree, levels[tree], baseline, generate, spec) for tree, spec in answers.items()]


def _levels(model, inputs: list[dict], max_new_tokens: int) -> float:
    """Mean levels of a round's tree, counted in answers that nobody times."""
    steps = (step for prompt in inputs for step in model.stream(**prompt, max_new_tokens=max_new_tokens))
    return fmean(step.levels for step in steps if step.levels)


def _row(tree: str, levels: float, baseline: Questions, generate: Questions, spec: Questions) -> Row:
    found, over = compare(baseline, spec), compare(generate, spec).speedup
    return Row(tree, found.tau, levels, round_in_steps(baseline, spec), found.speedup, over, found.outputs_identical)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.trees", description="Draft trees compared on unseen scenes.")
    add = parser.add_argument
    add("--trees", nargs="+", type=parse_tree, metavar="TREE", help=f"(default: {' '.join(TREES)})")
    add("--draft", help="another draft head for the embedded target (default: the shipped one)")
    add("--questions", type=count, default=QUESTIONS, help="(default: %(default)s)")
    add("--first-question", type=whole, default=FIRST_QUESTION, help="0: the demo's own (default: %(default)s)")
    add("--repetitions", type=count, default=REPETITIONS, help="(default: %(default)s)")
    add("--dtype", choices=DTYPES[1:], default=embedded.DTYPE, help="(default: %(default)s)")
    add("--json", metavar="FILE", help="write the rows and what made them")
    args = parser.parse_args(argv)
    args.trees = args.trees or [parse_tree(tree) for tree in TREES]
    from vispec.demo.runner import MAX_NEW_TOKENS, questions
    from vispec.prompts import build_inputs, load_processor, user_turn

    quiet_transformers()
    target, draft = embedded.require_weights()
    model = load_model(target, args.draft or draft, dtype=args.dtype)
    processor = load_processor(target)
    asked = questions(args.questions, args.first_question)
    inputs = [build_inputs(processor, [user_turn(one.text, one.image)]) for one in asked]
    rows = measure(model, args.trees, inputs, args.repetitions, MAX_NEW_TOKENS)
    columns = "tree", "τ", "levels a round", "a round in plain steps", "x plain", "x generate", "outputs identical"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        same = "yes" if row.outputs_identical else "no"
        ratios = f"{row.speedup:.2f} | {row.speedup_over_generate:.2f}"
        print(f"| {row.tree} | {row.tau:.2f} | {row.levels:.2f} | {row.round_in_steps:.2f} | {ratios} | {same} |")
    print(RATIOS)
    if args.json:
        write_json_atomic(args.json, {"rows": [vars(row) for row in rows], "provenance": provenance(args)})
    return 0


if __name__ == "__main__":
    run_cli(main)
