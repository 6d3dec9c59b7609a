"""How near to the possible: the times of a plain step and of a round on this device, each beside its floor.

python -m vispec.evaluation.bench                                                     # the embedded pair
python -m vispec.evaluation.bench --random-weights llava-v1.6-vicuna-7b-hf --dtype bfloat16
python -m vispec.evaluation.bench --base-model-path BASE --spec-model-path DRAFT --trees 30/3/8 12/3/4

The prompt is text of random token ids. All arms (our baseline, transformers' generate, a round with every tree) take
turns; medians count. A floor is bytes over the bandwidth of a large copy or operations over the rate of a large matrix
product, whichever is longer, both measured first. What the speedups over our baseline and over generate would be at a
given τ is projected from these times; only for the embedded pair τ is measured too, on questions about scenes that it
has not seen.
"""

import argparse
import copy
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

from vispec import embedded
from vispec.cli import DTYPES, Parser, UserError, count, provenance, run_cli
from vispec.evaluation import bench_report
from vispec.evaluation.comparison import compare
from vispec.evaluation.flags import add_place_flags, asked_place, parse_shape
from vispec.evaluation.loading import dtype_name, load_model, quiet_transformers
from vispec.evaluation.lossless import first_position
from vispec.evaluation.measure import Arm, Generation, interleave, typical
from vispec.evaluation.published import AVERAGE, published
from vispec.evaluation.random_pairs import TARGETS, build_draft, build_target, sizes_of
from vispec.evaluation.roofline import Rates, measure_rates
from vispec.evaluation.round_times import (
    DECODER,
    DRAFT_HEAD,
    DRAFT_LAYER,
    HEAD,
    PartTimes,
    PassCosts,
    Run,
    most_new_tokens,
    part_timer,
    round_passes,
    run,
    run_generate,
    tree_building_times,
    verification_times,
)
from vispec.files import write_atomic, write_json_atomic
from vispec.model.shape import TreeShape
from vispec.prompts import build_inputs, image_file, load_processor, user_turn
from vispec.timing import turns

VERIFIED = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of tokens whose verification is timed."""
TAUS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Values of τ for which tokens/s and speedup are projected."""
IMAGES = 8
"""In the prompt for which the draft's cache is worked out beside that of the text."""
ANSWER_TOKENS = 200
"""Of the longest answer to the questions on which the embedded pair's τ is measured."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch
    from transformers import GenerationConfig

    quiet_transformers()
    torch.manual_seed(0)
    model = load_pair(args)
    trees = args.trees or [embedded.TREE if is_embedded(args) else TreeShape()]
    ids = random_prompt(model, args.prompt_tokens, max(tree.depth for tree in trees))
    rates = measure_rates(model.device, model.target.dtype)
    arms = spec_arms(model, trees)
    answers = measured_answers(model, arms, args.repeats) if is_embedded(args) else {}
    # from here on no run may end early, and generate() applies no penalties, as decoding applies none
    model.target.model.generation_config, model.target.eos_token_ids = GenerationConfig(pad_token_id=0), []
    result = measure(arms, ids, rates, args.repeats)
    averages = {
        temperature: methods["vispec"][AVERAGE]
        for temperature in (0, 1)
        if args.random_weights and (methods := published(args.random_weights, temperature))
    }
    for name, row in result["trees"].items():
        row["projected"] = [projection(result, row, tau, "projected") for tau in TAUS]
        row["projected"] += [
            {**projection(result, row, tau, f"projected, published τ at T={at}"), "published_speedup": speedup}
            for at, (speedup, tau) in averages.items()
        ]
        row["measured"] = answers.get(name)
    result = {"device": describe(model, args), "rates": asdict(rates), **result, "provenance": provenance(args)}
    print(bench_report.text(result))
    if args.json:
        write_json_atomic(args.json, result)
    if args.profile:
        write_profile(args.profile, next(iter(arms.values())), ids)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m vispec.evaluation.bench", description="Times of a step and a round, and floors.")
    add = parser.add_argument
    add("--base-model-path", help="target, a folder or a hub id (default: the embedded pair)")
    add("--spec-model-path", help="its draft head")
    add_place_flags(parser)
    add("--random-weights", metavar="NAME", help=f"instead of files: {', '.join(TARGETS)}")
    parser.add_hardware(dtype=None)
    default = f"(default: 30/3/8, embedded: {embedded.TREE_NAME})"
    add("--trees", nargs="+", type=parse_shape, metavar="N/d/k", help=default)
    add("--draft-vocab", type=count, metavar="SIZE", help="with --random-weights: a draft vocabulary too (any tokens)")
    add("--prompt-tokens", type=count, default=512, help="(default: %(default)s)")
    add("--repeats", type=count, default=5, help="of every run (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything that was measured, and what made it")
    add("--profile", metavar="FILE", help="write a trace of a few rounds, for chrome://tracing or Perfetto")
    args = parser.parse_args(argv)
    if args.random_weights and (args.base_model_path or args.spec_model_path):
        raise UserError("--random-weights: a pair is either random or read from --base-model-path, found both")
    if bool(args.base_model_path) != bool(args.spec_model_path):
        raise UserError("--base-model-path and --spec-model-path belong together, found only one of them")
    if args.random_weights:
        most = sizes_of(args.random_weights).text["vocab_size"]
        if (args.draft_vocab or 0) > most:
            raise UserError(f"--draft-vocab {args.draft_vocab}: {args.random_weights} has {most} tokens")
    elif args.draft_vocab:
        raise UserError("--draft-vocab: a draft head from files has its own one beside it, expected --random-weights")
    asked_place(args)  # refuses what does not go together
    return args


def is_embedded(args: argparse.Namespace) -> bool:
    return not args.random_weights and not args.base_model_path


def load_pair(args: argparse.Namespace):
    """The `SpecModel` that the flags name; its tree is replaced by those of `--trees`."""
    import torch

    from vispec import SpecModel

    if args.random_weights:
        sizes = sizes_of(args.random_weights)
        device = one_device(args.device_map or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, args.dtype if args.dtype not in (None, DTYPES[0]) else "bfloat16")
        target = build_target(sizes, device, dtype)
        return SpecModel(target, build_draft(sizes, target, args.draft_vocab))
    if is_embedded(args):
        target, draft = embedded.require_weights()
        dtype = args.dtype or embedded.DTYPE
    else:
        target, draft, dtype = args.base_model_path, args.spec_model_path, args.dtype or DTYPES[0]
    place = {f"spec_{name}": value for name, value in asked_place(args).items()}
    model = load_model(target, draft, dtype=dtype, device_map=args.device_map, **place)
    if model.draft.method not in ("vispec", "eagle2"):
        raise UserError(f"--spec-model-path {draft}: {model.draft.method} has no draft layer to measure")
    return model


def one_device(name: str):
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device-map {name}: --random-weights needs one device, such as cpu or cuda:0") from None


def random_prompt(model, length: int, depth: int):
    """Text of random ids (1, L), without ids that mark images."""
    import torch

    from vispec.model.families import image_token_id

    positions, vocabulary = model.target.max_positions, model.target.embed_tokens.weight.shape[0]
    room = positions - max(most_new_tokens(depth + 1), *VERIFIED)
    if length > room:
        raise UserError(f"--prompt-tokens {length}: expected at most {room}, the target has {positions} positions")
    ids = torch.randint(vocabulary // 2, (1, length), generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(ids == image_token_id(model.target.config), 0)


def spec_arms(model, trees: list[TreeShape]) -> dict:
    """A `SpecModel` for every tree; where the head has a draft vocabulary, each tree first without and then with it."""
    heads = {"": model}
    if model.draft.draft_vocab is not None:
        everything = copy.copy(model.draft)  # the same layers
        everything.draft_vocab = None
        heads = {"": model.with_tree(trees[0], everything), f" of {len(model.draft.draft_vocab)} tokens": model}
    return {f"{shape}{name}": arm.with_tree(shape) for shape in trees for name, arm in heads.items()}


def measure(arms: dict, ids, rates: Rates, repeats: int) -> dict:
    """Times and floors of a plain step, of verification, and of a round of each arm."""
    from tqdm import tqdm

    model = next(iter(arms.values()))  # the target is the same in all of them
    costs = {name: PassCosts(arm, context=ids.shape[1]) for name, arm in arms.items()}
    baseline: list[Run] = []
    generate: list[Run] = []
    spec: dict[str, list[Run]] = {name: [] for name in arms}
    parts: dict[str, list[PartTimes]] = {name: [] for name in arms}
    work = [(baseline, partial(run, model, ids, speculate=False)), (generate, partial(run_generate, model, ids))]
    for name, arm in arms.items():
        arm.warmup(ids.shape[1], most_new_tokens(arm.shape.levels))
        work.append((spec[name], partial(run, arm, ids, speculate=True)))
        work.append((parts[name], part_timer(arm, ids)))
    for _, _, (runs, one_run) in tqdm(turns(work, 1, 1 + repeats), total=(1 + repeats) * len(work), desc="all arms"):
        runs.append(one_run())
    step, theirs = median_round(baseline), median_round(generate)
    verification = {n: median(times) for n, times in verification_times(model, ids, VERIFIED, repeats).items()}
    any_costs = next(iter(costs.values()))
    step_floor = sum(rates.floor(any_costs.of(part, 1)) for part in (DECODER, HEAD))
    read = sum(any_costs.of(part, 1).bytes for part in (DECODER, HEAD))
    return {
        "context": ids.shape[1],
        "plain_step": {**beside_floor(step, step_floor), "bytes": read, "bandwidth": read / step},
        "transformers_step": {"seconds": theirs, "our_tokens_per_second_over_theirs": theirs / step},
        "outputs": {
            name: first_difference(baseline[0].tokens, runs[0].tokens)
            for name, runs in {"transformers' generate": generate, **spec}.items()
        },
        "verification": {
            n: beside_floor(seconds, sum(rates.floor(any_costs.of(part, n)) for part in (DECODER, HEAD)))
            for n, seconds in verification.items()
        },
        "trees": {
            name: {
                **round_parts(arm, ids, costs[name], rates, median_round(spec[name]), parts[name][1:], repeats),
                "round_in_plain_steps": median_round(spec[name]) / step,
            }
            for name, arm in arms.items()
        },
        # last, when everything has been tried
        "captured": next((arm.captured for arm in arms.values() if arm.captured == "some"), model.captured),
    }


def round_parts(
    model, ids, costs: PassCosts, rates: Rates, seconds: float, times: list[PartTimes], repeats: int
) -> dict:
    """A round with one tree, which takes so many seconds, part by part."""
    tree = median(tree_building_times(model, repeats))
    logits = (1 + model.shape.depth * model.shape.top_k) * model.draft.proposed
    parts = []
    for part, rows in sorted(times[0], key=by_order):
        number, _ = times[0][part, rows]
        taken = median(found[part, rows][1] for found in times)
        floor = number * rates.floor(costs.of(part, rows))
        parts.append({"part": part, "rows": rows, "passes": number, **beside_floor(taken, floor)})
    drafted = sum(part["seconds"] for part in parts if part["part"] in (DRAFT_LAYER, DRAFT_HEAD))
    floor = sum(number * rates.floor(costs.of(part, rows)) for number, part, rows in round_passes(model.shape))
    known = sum(part["seconds"] for part in parts)
    busy = known + tree if model.target.can_capture else None
    return {
        "round": beside_floor(seconds, floor),
        "parts": parts,
        "tree_building": beside_floor(tree, logits * model.target.lm_head.weight.element_size() / rates.bandwidth),
        "draft_bytes": {part: costs.of(part, 1).bytes for part in (DRAFT_LAYER, DRAFT_HEAD)},
        "draft_cache": draft_cache(model, ids.shape[1]),
        "draft_module_seconds": drafted,
        "draft_seconds": drafted + tree,
        "everything_else_share": 1 - (known if busy is None else busy) / seconds,
        "device_busy_seconds": busy,
    }


def draft_cache(model, length: int) -> dict:
    """What the draft head's cache holds of a prompt of text, and of one with eight images of as many tokens besides."""
    config, element = model.draft.config, model.target.embed_tokens.weight.element_size()
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element
    images = [(length + i * length, length + (i + 1) * length) for i in range(IMAGES)]
    tokens = {"text": (length, []), "with_images": ((1 + IMAGES) * length, images)}
    held = {kind: int(model.draft.plan([prompt], [spans]).lengths) for kind, (prompt, spans) in tokens.items()}
    return {
        "bytes_a_token": token_bytes,
        **{
            kind: {"prompt_tokens": tokens[kind][0], "held": count, "bytes": count * token_bytes}
            for kind, count in held.items()
        },
    }


def projection(result: dict, row: dict, tau: float, kind: str) -> dict:
    """Speed at a mean of `tau` accepted draft tokens a round: a round adds one more token, the target's own."""
    tokens_per_second = (tau + 1) / row["round"]["seconds"]
    return {
        "tau": tau,
        "kind": kind,
        "tokens_per_second": tokens_per_second,
        "speedup": tokens_per_second * result["plain_step"]["seconds"],
        "speedup_over_generate": tokens_per_second * result["transformers_step"]["seconds"],
    }


def measured_answers(model, arms: dict, repeats: int) -> dict[str, dict]:
    """The baselines and every arm answer the embedded questions, in turn: what speed and τ really are."""
    processor = load_processor(str(embedded.TARGET))
    inputs = [build_inputs(processor, [user_turn(text, image_file(picture))]) for picture, text in embedded.questions()]
    baselines = [Arm("baseline", model, "baseline"), Arm("generate", model, "generate")]
    all_arms = [*baselines, *(Arm(name, arm, "spec") for name, arm in arms.items())]
    found = interleave(all_arms, inputs, Generation(0.0, ANSWER_TOKENS), repeats, warm_up_tokens=None)
    answers = {arm: [[typical(repeated)] for repeated in of_prompts] for arm, of_prompts in found.items()}
    measured = {}
    for name in arms:
        ours, generates = (asdict(compare(answers[one.name], answers[name])) for one in baselines)
        ratios = {f"{ratio}_over_generate": generates[ratio] for ratio in ("speedup", "decode_speedup")}
        measured[name] = {**ours, **ratios}
    return measured


def beside_floor(seconds: float, floor: float) -> dict[str, float]:
    return {"seconds": seconds, "floor": floor, "times_floor": seconds / floor}


def median_round(runs: list[Run]) -> float:
    """Median over all counted rounds of all runs but the first, which warms up."""
    return median(seconds for one in runs[1:] for seconds in one.seconds)


def first_difference(ours: list[int], theirs: list[int]) -> dict:
    """Where two arms' tokens part, as far as both go."""
    compared = min(len(ours), len(theirs))
    place = first_position(ours[:compared], theirs[:compared])
    return {"compared": compared, "identical": place is None, "first_difference": place}


def by_order(part_and_rows: tuple[str, int]) -> tuple[int, int]:
    part, rows = part_and_rows
    return (DECODER, HEAD, DRAFT_LAYER, DRAFT_HEAD).index(part), rows


def describe(model, args: argparse.Namespace) -> dict:
    """What was measured, for the head of the report."""
    made_by = provenance({})
    return {
        "pair": args.random_weights or args.base_model_path or "embedded",
        "weights": "random" if args.random_weights else "loaded",
        "dtype": dtype_name(model),
        "kind": model.device.type,
        "name": made_by["device"],
        "versions": made_by["versions"],
        "parameters": sum(weight.numel() for weight in model.target.model.parameters()),
        "draft_parameters": sum(
            weight.numel() for name, weight in model.draft.named_parameters() if not name.startswith("embed_tokens")
        ),
    }


def write_profile(path: str, model, ids) -> None:
    """A trace of plain steps and then of rounds, as torch's profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        run(model, ids, speculate=False)
        run(model, ids, speculate=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        write_atomic(path, lambda out: out.write(file.read_bytes()))


if __name__ == "__main__":
    run_cli(main)
