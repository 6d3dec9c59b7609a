"""All checks and measurements that need a GPU: exact outputs, then times beside their floors, then one table.

sh scripts/gpu_check.sh                                                   # everything, at most nine minutes
sh scripts/gpu_check.sh --device cpu --runs llama-135m/float32/8192       # tries the script itself without a GPU

Exact outputs: tiny random models of three families; in float32 both arms must say what transformers' generate says, in
bfloat16 differences are counted. Times: `vispec.evaluation.bench` with random weights at published sizes. Every part is
a process of its own with a share of the time that is left, so the table is printed whatever happens. Neither `datasets`
nor `fschat` is needed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vispec.cli import run_cli, write_json_atomic

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("llava_next", "llava_1.5", "qwen2_5_vl")
SEEDS, NEW_TOKENS = (0, 1, 2), 24
LAYOUTS = (".", ".a.", "a.bb.")
"""Prompts without an image, with one, and with three of which two touch."""
RUNS = (
    "llama-135m/float32/8192",
    "llava-v1.6-vicuna-7b-hf/bfloat16",
    "Qwen2.5-VL-3B-Instruct/bfloat16/32768",
    "Qwen2.5-VL-7B-Instruct/bfloat16/32768",
)
"""Target, dtype, and size of the draft vocabulary that is compared with none."""
MOST_OF_THE_FLOOR = 1.2
LEAST_OF_THE_POSSIBLE = 0.8


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.exactness:
        write_json_atomic(args.exactness, exactness(args.device))
        return 0
    started, out = time.monotonic(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    commands = {"exactness": [__file__, "--device", args.device, "--exactness", str(out / "exactness.json")]}
    commands.update({run: bench_command(run, args, out) for run in args.runs})
    found, failed = {}, {}
    for number, (name, command) in enumerate(commands.items()):
        limit = (args.limit - (time.monotonic() - started)) / (len(commands) - number)
        reason = in_a_process(command, out / f"{file_name(name)}.log", limit)
        file = out / f"{file_name(name)}.json"
        if reason is None:
            found[name] = json.loads(file.read_text())
        else:
            failed[name] = reason
        print(f"{name}: {reason or 'done'}, {time.monotonic() - started:.0f} s since the start", flush=True)
    print("\n".join(report(found, failed)))
    return 1 if failed or differing(found) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--runs", nargs="*", default=list(RUNS), metavar="NAME/DTYPE[/DRAFT-VOCAB]", help="default: four targets")
    add("--trees", nargs="+", default=["30/3/8"], metavar="N/d/k")
    add("--repeats", type=int, default=5, help="(%(default)s)")
    add("--prompt-tokens", type=int, default=512, help="(%(default)s)")
    add("--limit", type=float, default=520, help="seconds for everything (%(default)s)")
    add("--out", default="out/gpu_check", help="folder for JSON files and logs (%(default)s)")
    add("--exactness", metavar="FILE", help="only compare the outputs of tiny models and write FILE")
    args = parser.parse_args(argv)
    for run in args.runs:
        if len(run.split("/")) not in (2, 3):
            raise ValueError(f"--runs {run}: expected name/dtype or name/dtype/draft-vocabulary")
    return args


def bench_command(run: str, args: argparse.Namespace, out: Path) -> list[str]:
    name, dtype, *vocabulary = run.split("/")
    flags = ["--random-weights", name, "--dtype", dtype, "--device-map", args.device, "--trees", *args.trees]
    flags += ["--repeats", str(args.repeats), "--prompt-tokens", str(args.prompt_tokens)]
    flags += ["--json", str(out / f"{file_name(run)}.json")]
    return ["-m", "vispec.evaluation.bench", *flags, *(["--draft-vocab", *vocabulary] if vocabulary else [])]


def in_a_process(command: list[str], log: Path, limit: float) -> str | None:
    """Run python with these arguments; what went wrong, None if nothing did."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, timeout=limit, env=environment
            )
        except subprocess.TimeoutExpired:
            return f"not finished within {limit:.0f} s"
    if done.returncode == 0:
        return None
    last = (log.read_text().strip().splitlines() or [""])[-1]
    return f"exit code {done.returncode}: {last}"


def exactness(device: str) -> dict:
    """Answers of tiny random models by both arms and by transformers' generate: how many differ, by dtype."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import generate, image_prompt, random_head, random_target

    from vispec import SpecModel

    counts = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = {"answers": 0, "baseline_differs_from_generate": 0, "spec_differs_from_baseline": 0, "accepted": 0}
        for family in FAMILIES:
            for seed in SEEDS:
                target = random_target(family, seed).to(device, dtype)
                model = SpecModel(target, random_head(target, "vispec", seed + 10).to(device, dtype))
                for layout in LAYOUTS:
                    inputs = {
                        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
                        for name, value in image_prompt(target, seed, layout).items()
                    }
                    theirs = generate(target, inputs, max_new_tokens=NEW_TOKENS)
                    ours = model.baseline_generate(**inputs, max_new_tokens=NEW_TOKENS)
                    spec, accepted = model.specgenerate(**inputs, max_new_tokens=NEW_TOKENS, return_acceptance_len=True)
                    found["answers"] += 1
                    found["baseline_differs_from_generate"] += ours.tolist() != theirs.tolist()
                    found["spec_differs_from_baseline"] += spec.tolist() != ours.tolist()
                    found["accepted"] += sum(accepted)
        counts[str(dtype).removeprefix("torch.")] = found
    return counts


def differing(found: dict) -> list[str]:
    """What is not as it must be in float32."""
    wrong = []
    for name, number in found.get("exactness", {}).get("float32", {}).items():
        if "differs" in name and number:
            wrong.append(f"tiny models: {name} in {number} answers")
    for name, result in benches(found).items():
        if result["device"]["dtype"] == "float32":
            wrong += [f"{name}: {arm} differs" for arm, same in result["outputs"].items() if not same["identical"]]
    return wrong


def benches(found: dict) -> dict:
    return {name: result for name, result in found.items() if name != "exactness"}


def report(found: dict, failed: dict) -> list[str]:
    """The table, and above and below it what does not fit into one."""
    lines = [""]
    for dtype, counts in found.get("exactness", {}).items():
        lines.append(f"tiny models, {dtype}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for result in list(benches(found).values())[:1]:
        device, rates = result["device"], result["rates"]
        versions = ", ".join(f"{name} {device['versions'][name]}" for name in ("torch", "transformers"))
        speeds = f"copy {rates['bandwidth'] / 1e9:.0f} GB/s, matrix product {rates['matmul'] / 1e12:.1f} TFLOP/s"
        lines.append(f"{device['name']}, {versions}; {speeds} ({device['dtype']}); prompt {result['context']} tokens")
    lines.append("")
    lines.append(
        "| target | step ms | of the possible | over generate | tree | round ms | x floor | in steps | device idle "
        "| speedup at the published τ (projected) | outputs |\n|" + "---|" * 11
    )
    for name, result in benches(found).items():
        for tree, row in result["trees"].items():
            lines.append(table_row(name, result, tree, row))
    lines += [f"- {name}: {reason}" for name, reason in failed.items()]
    lines += [f"- float32 outputs differ: {what}" for what in differing(found)]
    lines.append(
        f"! marks what misses its target: a step at {LEAST_OF_THE_POSSIBLE:.0%} of the possible speed, no slower than "
        f"generate; a round of at most {MOST_OF_THE_FLOOR} x its floor"
    )
    return lines


def table_row(name: str, result: dict, tree: str, row: dict) -> str:
    step, round_ = result["plain_step"], row["round"]
    possible, ratio = 1 / step["times_floor"], result["transformers_step"]["our_tokens_per_second_over_theirs"]
    busy = row["device_busy_seconds"]
    published = [found for found in row["projected"] if "published_speedup" in found]
    projected = ", ".join(
        f"{found['speedup']:.2f} at {found['tau']} (published {found['published_speedup']:.2f})" for found in published
    )
    same = result["outputs"][tree]
    cells = [
        name,
        f"{1000 * step['seconds']:.2f}",
        marked(f"{possible:.0%}", possible < LEAST_OF_THE_POSSIBLE),
        marked(f"{ratio:.2f}", ratio < 1),
        tree,
        f"{1000 * round_['seconds']:.2f}",
        marked(f"{round_['times_floor']:.2f}", round_["times_floor"] > MOST_OF_THE_FLOOR),
        f"{row['round_in_plain_steps']:.2f}",
        "-" if busy is None else f"{max(0.0, 1 - busy / round_['seconds']):.0%}",
        projected or "-",
        "equal" if same["identical"] else f"part at {same['first_difference']} of {same['compared']}",
    ]
    return "| " + " | ".join(cells) + " |"


def marked(text: str, misses: bool) -> str:
    return f"{text} !" if misses else text


def file_name(run: str) -> str:
    return run.replace("/", "-")


if __name__ == "__main__":
    run_cli(main)
