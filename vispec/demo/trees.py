"""Which draft tree pays: tree sizes compared in one run on the demo's questions.

python -m vispec.demo.trees [--trees 8/3/3 12/3/4 …] [--draft DIR]

All arms, the plain baseline among them, take turns question by question; the medians of several repetitions count. A
larger tree has more tokens accepted in a round, and a round that takes longer: a row shows both, and what comes of it.
"""

from dataclasses import dataclass, replace
from statistics import median

from vispec import embedded
from vispec.cli import DTYPES, Parser, count, provenance, run_cli, write_json_atomic
from vispec.evaluation.comparison import compare, round_in_steps
from vispec.evaluation.loading import Tree, load_model, parse_tree, quiet_transformers
from vispec.evaluation.measure import Answer, Generation, answer_question

TREES = ("8/3/3", "12/3/4", "12/5/2", embedded.TREE_NAME, "30/3/8")
QUESTIONS, REPETITIONS = 6, 5


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

    arms = [("baseline", model), *(("spec", SpecModel(model.target.model, model.draft, *tree)) for tree in trees)]
    generation = Generation(temperature=0.0, max_new_tokens=max_new_tokens)
    for arm, arm_model in arms:
        answer_question(arm_model, inputs[0], arm, replace(generation, max_new_tokens=min(16, max_new_tokens)))
    answers: list[list[list[Answer]]] = [[[] for _ in inputs] for _ in arms]
    for _ in range(repetitions):
        for question, prompt in enumerate(inputs):
            for (arm, arm_model), found in zip(arms, answers, strict=True):
                found[question].append(answer_question(arm_model, prompt, arm, generation))
    baseline, *spec = [[_typical(repeated) for repeated in found] for found in answers]
    return [_row("/".join(map(str, tree)), baseline, found) for tree, found in zip(trees, spec, strict=True)]


def _typical(answers: list[Answer]) -> Answer:
    wall, decode = ([getattr(answer, name) for answer in answers] for name in ("wall_time", "decode_time"))
    return replace(answers[0], wall_time=median(wall), decode_time=median(decode))


def _row(tree: str, baseline: list[Answer], spec: list[Answer]) -> Row:
    comparison = compare(*({i: [answer] for i, answer in enumerate(arm)} for arm in (baseline, spec)))
    return Row(tree, comparison.tau, round_in_steps(baseline, spec), comparison.speedup, comparison.outputs_identical)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.trees", description="Tree sizes compared on the demo's questions.")
    add = parser.add_argument
    add("--trees", nargs="+", type=parse_tree, default=[parse_tree(tree) for tree in TREES], metavar="N/d/k")
    add("--draft", help="another draft head for the embedded target (default: the shipped one)")
    add("--questions", type=count, default=QUESTIONS, help="(default: %(default)s)")
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
    inputs = [build_inputs(processor, [user_turn(asked.text, asked.image)]) for asked in questions(args.questions)]
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
