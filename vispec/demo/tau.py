"""τ of draft heads, or of smaller VLMs, on unseen scenes: accepted draft tokens, which no other load changes.

python -m vispec.demo.tau --model TARGET --drafts HEAD … --json FILE

Greedy in float32, over the demo's questions, so that all heads give the same answers: the target's own.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from vispec import embedded
from vispec.cli import Parser, UserError, changes, count, provenance, run_cli
from vispec.evaluation.comparison import tau
from vispec.evaluation.flags import parse_tree
from vispec.evaluation.loading import load_model, quiet_transformers
from vispec.evaluation.measure import Generation, answer_question
from vispec.files import read_json, write_json_atomic
from vispec.model.shape import TreeShape

TREES = (embedded.TREE_NAME, "30/3/8")
QUESTIONS = 28
"""Two of each kind."""


def measure_tau(model, draft, tree: TreeShape, inputs: Sequence[Mapping], max_new_tokens: int) -> dict:
    """Answer all prompts by a head.

    Args:
        model: a `SpecModel` of the target; its own draft and tree are not used.
        draft: what is to be measured.
        inputs: what the processor returned for each prompt.

    Returns:
        `tau`, the mean of all rounds' accepted draft tokens; `rounds`, how many; `answers`, a digest of all output ids.
    """
    arm = model.with_tree(tree, draft)
    generation = Generation(temperature=0.0, max_new_tokens=max_new_tokens)
    answers = [answer_question(arm, prompt, "spec", generation) for prompt in inputs]
    rounds = sum(len(answer.acceptance_lengths) for answer in answers)
    digest = hashlib.blake2b(repr([answer.output_ids for answer in answers]).encode(), digest_size=8).hexdigest()
    return {"tau": tau(answers), "rounds": rounds, "answers": digest}


def weights_digest(folder: Path) -> str:
    """What tells the weights of a checkpoint from those of another one of the same name."""
    from vispec.model.hub_files import SAFETENSORS

    path = folder / SAFETENSORS
    if not path.is_file():
        raise UserError(f"{folder}: no {SAFETENSORS} there")
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.tau", description="τ of draft heads on unseen scenes.")
    add = parser.add_argument
    add("--model", default=str(embedded.TARGET), help="a target of the demo's world (default: the shipped one)")
    add("--drafts", nargs="+", default=[str(embedded.DRAFT)], metavar="DIR", help="(default: the shipped one)")
    add("--trees", nargs="+", type=parse_tree, metavar="N/d/k", help=f"(default: {' '.join(TREES)})")
    add("--questions", type=count, default=QUESTIONS, help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="keeps what is measured; the same command goes on where it stopped")
    args = parser.parse_args(argv)
    args.trees = args.trees or [parse_tree(tree) for tree in TREES]
    settings = {"model": args.model, "questions": args.questions}
    heads = _begun(args.json, settings)
    wanted = {folder: weights_digest(Path(folder)) for folder in args.drafts}
    missing = [
        (folder, tree)
        for folder, weights in wanted.items()
        for tree in args.trees
        if heads.get(folder, {}).get("weights") != weights or str(tree) not in heads[folder]["trees"]
    ]
    for folder, tree, found in _measured(args, missing):
        if heads.get(folder, {}).get("weights") != wanted[folder]:
            heads[folder] = {"weights": wanted[folder], "trees": {}}
        heads[folder]["trees"][str(tree)] = found
        if args.json:
            write_json_atomic(args.json, {"settings": settings, "heads": heads, "provenance": provenance(args)})
    for folder in wanted:
        taus = ", ".join(f"τ {heads[folder]['trees'][str(tree)]['tau']:.3f} at {str(tree)}" for tree in args.trees)
        print(f"{folder}: {taus}")
    return 0


def _measured(args, missing: list[tuple[str, TreeShape]]):
    """(folder, tree, what was measured) one after the other; the target is loaded only where something is missing."""
    if not missing:
        return
    from tqdm import tqdm

    from vispec.demo.runner import MAX_NEW_TOKENS, questions
    from vispec.model.drafts.loading import load_any_draft
    from vispec.prompts import build_inputs, load_processor, user_turn

    quiet_transformers()
    model = load_model(args.model, None, dtype=embedded.DTYPE)
    processor = load_processor(args.model)
    inputs = [build_inputs(processor, [user_turn(asked.text, asked.image)]) for asked in questions(args.questions)]
    for folder, tree in tqdm(missing, unit="head"):
        yield folder, tree, measure_tau(model, load_any_draft(folder, model.target), tree, inputs, MAX_NEW_TOKENS)


def _begun(path: Path | None, settings: dict) -> dict:
    """What an earlier call has measured."""
    if path is None or not path.is_file():
        return {}
    earlier = read_json(path)
    if differences := changes(earlier["settings"], settings):
        raise UserError(f"--json {path} holds other measurements ({differences}); choose another file")
    return earlier["heads"]


if __name__ == "__main__":
    run_cli(main)
