"""Which draft tree pays: tree sizes compared in one run on questions like the demo's, about other scenes.

python -m vispec.demo.trees [--trees 8/3/3 12/3/4 …] [--draft DIR]

All arms, the plain baseline among them, take turns question by question; the medians of several repetitions count. A
larger tree has more tokens accepted in a round, and a round that takes longer: a row shows both, and what comes of it.
A tree is chosen here, and reported on the first questions, those of the demo: no question does both.
"""

from dataclasses import dataclass

from vispec import embedded
from vispec.cli import DTYPES, Parser, count, provenance, run_cli, whole
from vispec.evaluation.comparison import compare, round_in_steps
from vispec.evaluation.loading import Tree, load_model, parse_tree, quiet_transformers
from vispec.evaluation.measure import Answer, Arm, Generation, interleave, typical
from vispec.files import write_json_atomic

TREES = ("8/3/3", "12/3/4", "12/5/2", embedded.TREE_NAME, "30/3/8")
QUESTIONS, REPETITIONS = 6, 5
FIRST_QUESTION = 98
"""Far behind the questions on which trees are reported; a multiple of the kinds, so these come in the same order."""


@dataclass(frozen=True)
class Row:
    """What one tree brought, against the baseline of the same run."""

    tree: str
    tau: float
    round_in_steps: float
    """Time of a round over the time of a plain step, both without prefill."""
    speedup: float
    """Prefill included."""
    outputs_identical: bool


def measure(model, trees: list[Tree], inputs: list[dict], repetitions: int, max_new_tokens: int) -> list[Row]:
    """Answer every prompt by the baseline and with every tree, in turn.

    Args:
        model: a `SpecModel` with a draft head; its own tree is not used.
        inputs: what the processor returned for each prompt.
    """
    from vispec import SpecModel

    arms = [Arm("baseline", model, "baseline")]
    for tree in dict.fromkeys(trees):
        arms.append(Arm("/".join(map(str, tree)), SpecModel(model.target.model, model.draft, *tree), "spec"))
    found = interleave(arms, inputs, Generation(temperature=0.0, max_new_tokens=max_new_tokens), repetitions)
    answers = {arm: [typical(repeated) for repeated in of_prompts] for arm, of_prompts in found.items()}
    baseline = answers.pop("baseline")
    return [_row(tree, baseline, spec) for tree, spec in answers.items()]


def _row(tree: str, baseline: list[Answer], spec: list[Answer]) -> Row:
    comparison = compare(*({i: [answer] for i, answer in enumerate(arm)} for arm in (baseline, spec)))
    return Row(tree, comparison.tau, round_in_steps(baseline, spec), comparison.speedup, comparison.outputs_identical)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.trees", description="Tree sizes compared on unseen scenes.")
    add = parser.add_argument
    add("--trees", nargs="+", type=parse_tree, default=[parse_tree(tree) for tree in TREES], metavar="N/d/k")
    add("--draft", help="another draft head for the embedded target (default: the shipped one)")
    add("--questions", type=count, default=QUESTIONS, help="(default: %(default)s)")
    add("--first-question", type=whole, default=FIRST_QUESTION, help="0: the demo's own (default: %(default)s)")
    add("--repetitions", type=count, default=REPETITIONS, help="(default: %(default)s)")
    add("--dtype", choices=DTYPES[1:], default=embedded.DTYPE, help="(default: %(default)s)")
    add("--json", metavar="FILE", help="write the rows and what made them")
    args = parser.parse_args(argv)
    from vispec.demo.runner import MAX_NEW_TOKENS, questions
    from vispec.prompts import build_inputs, load_processor, user_turn

    quiet_transformers()
    target, draft = embedded.require_weights()
    model = load_model(target, args.draft or draft, dtype=args.dtype)
    processor = load_processor(target)
    asked = questions(args.questions, args.first_question)
    inputs = [build_inputs(processor, [user_turn(one.text, one.image)]) for one in asked]
    rows = measure(model, args.trees, inputs, args.repetitions, MAX_NEW_TOKENS)
    print("| tree | τ | a round in plain steps | speedup | outputs identical |\n|---|---|---|---|---|")
    for row in rows:
        same = "yes" if row.outputs_identical else "no"
        print(f"| {row.tree} | {row.tau:.2f} | {row.round_in_steps:.2f} | {row.speedup:.2f} | {same} |")
    if args.json:
        write_json_atomic(args.json, {"rows": [vars(row) for row in rows], "provenance": provenance(args)})
    return 0


if __name__ == "__main__":
    run_cli(main)
