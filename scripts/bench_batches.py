"""Tokens per second of batches of 1, 2, 4 and 8 prompts: tree speculative decoding, plain decoding, generate().

    python scripts/bench_batches.py                     # the embedded pair
    python scripts/bench_batches.py --target DIR --draft DIR --tree 30/3/8 --dtype bfloat16
    python scripts/bench_batches.py --random-weights Qwen2.5-VL-3B-Instruct --dtype bfloat16

The same demo questions are answered by every arm, in batches of its size; the arms take turns, and medians over the
repetitions count. A pair with random weights reads text of random tokens instead; its draft head is practically never
right, so that its table tells what a round costs, not what it brings. All prefill is in the time, and no more than the
answers' own tokens are counted. `x plain` is the ratio of our tokens/s to those of our own plain loop, `x generate`
that to those of transformers' generate() on the same target, which answers greedily only. `equal` says how many answers
of our two arms are those of the baseline that answers one prompt at a time.
"""

import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vispec import embedded
from vispec.cli import DTYPES, Parser, count, provenance, run_cli
from vispec.evaluation.bench import one_device
from vispec.evaluation.flags import parse_tree
from vispec.evaluation.loading import load_model, quiet_transformers
from vispec.evaluation.measure import is_greedy, transformers_generate
from vispec.evaluation.random_pairs import TARGETS, build_draft, build_target, sizes_of
from vispec.files import write_json_atomic
from vispec.timing import now, turns

if TYPE_CHECKING:
    from vispec import SpecModel

ARMS = ("baseline", "spec", "generate")
SHORTEST_PROMPT = 64
"""Tokens of the shortest prompt of a pair with random weights; the longest has twice as many."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    quiet_transformers()
    model, prompts = random_pair(args) if args.random_weights else loaded_pair(args)
    speeds, equal = measure(model, prompts, args.sizes, args.repetitions, args.max_new_tokens, args.temperature)

    titles = ("B", "generate tokens/s", "baseline tokens/s", "vispec tokens/s", "x plain", "x generate", "equal")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for size in args.sizes:
        medians = {arm: statistics.median(found) for (arm, of), found in speeds.items() if of == size}
        baseline, spec, theirs = (medians.get(arm) for arm in ARMS)
        over = ("-", "-") if theirs is None else (f"{theirs:.1f}", f"{spec / theirs:.2f}")
        same = f"{equal['baseline', size]} and {equal['spec', size]} of {len(prompts)}"
        cells = (size, over[0], f"{baseline:.1f}", f"{spec:.1f}", f"{spec / baseline:.2f}", over[1], same)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    table = "\n".join(lines)
    print(table)
    if args.json:
        rows = [
            {"arm": arm, "batch": size, "tokens_per_second": speeds[arm, size], "equal": equal[arm, size]}
            for arm, size in speeds
        ]
        result = {"rows": rows, "table": table, "captured": model.captured, "provenance": provenance(args)}
        write_json_atomic(args.json, result)
    return 0


def parse(argv: list[str] | None):
    parser = Parser(prog="scripts/bench_batches.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--target", help="folder or hub id (default: the embedded one)")
    add("--draft", help="the target's draft head")
    add("--random-weights", metavar="NAME", help=f"instead of files: {', '.join(TARGETS)}")
    add("--tree", type=parse_tree, default=embedded.TREE_NAME, metavar="N/d/k", help="(default: %(default)s)")
    add("--sizes", nargs="+", type=count, default=[1, 2, 4, 8], metavar="B", help="(default: %(default)s)")
    add("--questions", type=count, default=16, help="a multiple of the sizes (default: %(default)s)")
    add("--repetitions", type=count, default=3, help="of each arm (default: %(default)s)")
    add("--max-new-tokens", type=count, default=128, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="(default: %(default)s)")
    parser.add_hardware(dtype=embedded.DTYPE)
    add("--json", metavar="FILE", help="write the numbers and what made them")
    args = parser.parse_args(argv)
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft go together")
    if args.random_weights and args.target:
        parser.error("--random-weights: a pair is either random or read from --target, found both")
    for size in args.sizes:
        if args.questions % size:
            parser.error(f"--questions {args.questions}: expected a multiple of --sizes {size}")
    return args


def loaded_pair(args) -> tuple["SpecModel", list[dict]]:
    """The pair that the flags name, and demo questions."""
    from vispec.demo.runner import questions
    from vispec.prompts import build_inputs, load_processor, user_turn

    target, draft = (args.target, args.draft) if args.target else embedded.require_weights()
    model = load_model(target, draft, dtype=args.dtype, device_map=args.device_map, tree=args.tree)
    processor = load_processor(target)
    return model, [build_inputs(processor, [user_turn(asked.text, asked.image)]) for asked in questions(args.questions)]


def random_pair(args) -> tuple["SpecModel", list[dict]]:
    """A pair with random weights, which never ends an answer early, and prompts of several lengths."""
    import torch
    from transformers import GenerationConfig

    from vispec import SpecModel

    torch.manual_seed(0)
    sizes = sizes_of(args.random_weights)
    device = one_device(args.device_map or ("cuda" if torch.cuda.is_available() else "cpu"))
    target = build_target(sizes, device, getattr(torch, "bfloat16" if args.dtype == DTYPES[0] else args.dtype))
    target.generation_config = GenerationConfig(pad_token_id=0)
    ids = torch.randint(sizes.text["vocab_size"] // 2, (args.questions, 2 * SHORTEST_PROMPT))
    lengths = torch.linspace(SHORTEST_PROMPT, 2 * SHORTEST_PROMPT, args.questions).long().tolist()
    prompts = [
        {"input_ids": row[None, :length], "attention_mask": torch.ones(1, length, dtype=torch.long)}
        for row, length in zip(ids, lengths, strict=True)
    ]
    return SpecModel(target, build_draft(sizes, target), tree=args.tree), prompts


def measure(model, prompts: list[dict], sizes: list[int], repetitions: int, max_new_tokens: int, temperature: float):
    """Tokens/s of every repetition, and how many answers are the single baseline's, by (arm, batch size)."""
    import torch

    from vispec.ge_data.batch_generate import collate_prompts
    from vispec.model.graphs import CAPTURED_USE

    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    for size in sorted(sizes, reverse=True):  # the largest makes the memory that the others use too
        model.warmup(min(lengths), max(lengths) - min(lengths) + max_new_tokens, size)
    batches = {
        size: [collate_prompts(prompts[i : i + size], pad_token_id=0) for i in range(0, len(prompts), size)]
        for size in sizes
    }
    options = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    kinds = ARMS if is_greedy(temperature) else ARMS[:2]
    arms = [(arm, size) for size in sizes for arm in kinds]
    # rows leave a batch as their answers end, so the same answers are given until all that they need is captured
    for _ in range(CAPTURED_USE if model.target.can_capture else 1):
        for arm, size in arms:
            torch.manual_seed(0)
            answer(model, arm, batches[size], options)
    speeds = {key: [] for key in arms}
    answers = {}
    for _, _, (arm, size) in turns(arms, 1, repetitions):
        torch.manual_seed(0)
        start = now(model.device)
        answers[arm, size] = answer(model, arm, batches[size], options)
        speeds[arm, size].append(sum(map(len, answers[arm, size])) / (now(model.device) - start))
    torch.manual_seed(0)
    single = answer(model, "baseline", [collate_prompts([prompt], pad_token_id=0) for prompt in prompts], options)
    equal = {key: sum(a == b for a, b in zip(found, single, strict=True)) for key, found in answers.items()}
    return speeds, equal


def answer(model, arm: str, batches: list[dict], options: dict) -> list[list[int]]:
    """The answers' tokens, without the padding behind them."""
    from vispec.model.rows import Stop

    generate = model.specgenerate if arm == "spec" else model.baseline_generate
    found = []
    for batch in batches:
        length = batch["input_ids"].shape[1]
        if arm == "generate":
            stop = Stop(options["max_new_tokens"], frozenset(model.target.eos_token_ids))
            output = transformers_generate(model, batch, stop.max_new_tokens)
            found += [stop.cut(row[length:].tolist(), 0)[0] for row in output]
            continue
        output, new, _ = generate(**batch, **options, log=True)
        new = new if isinstance(new, list) else [new]
        found += [row[length : length + n].tolist() for row, n in zip(output, new, strict=True)]
    return found


if __name__ == "__main__":
    run_cli(main)
