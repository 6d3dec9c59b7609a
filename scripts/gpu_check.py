"""All checks and measurements that need a GPU: times beside their floors, exact outputs, then one table.

sh scripts/gpu_check.sh                                                   # everything, at most nine minutes
sh scripts/gpu_check.sh --train                                           # training instead: gpu_train_check.py
sh scripts/gpu_check.sh --device cpu --runs llama-135m/float32/8192       # tries the script itself without a GPU

Times: `vispec.evaluation.bench` and `bench_batches.py` with random weights at published sizes. Exact outputs:
`gpu_exactness.py`, tiny random models. Every part is a process of its own with a share of the time that is left, so the
table is printed whatever happens. On a GPU every step has to be captured in CUDA graphs: what is not is said, and an
error. Neither `datasets` nor `fschat` is needed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vispec.cli import run_cli

ROOT = Path(__file__).resolve().parent.parent
RUNS = (
    "llama-135m/float32/8192",
    "Qwen2.5-VL-3B-Instruct/bfloat16/32768",
    "llava-v1.6-vicuna-7b-hf/bfloat16",
    "Qwen2.5-VL-7B-Instruct/bfloat16/32768",
)
"""Target, dtype, and size of the draft vocabulary that is compared with none."""
BATCHES = "Qwen2.5-VL-3B-Instruct/bfloat16"
"""Whose batches of 1, 2, 4 and 8 prompts are measured."""
EXACTNESS_PARTS = 1.6
"""How many parts' time is kept for the exactness of outputs, which comes last and gets what the others leave too."""
MOST_OF_THE_FLOOR = 1.2
LEAST_OF_THE_POSSIBLE = 0.8
LEAST_P_VALUE = 1e-4
"""Of the sampled tokens' distribution; below it they are not the target's."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.train:
        return subprocess.call([sys.executable, str(ROOT / "scripts" / "gpu_train_check.py"), "--device", args.device])
    started, out = time.monotonic(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    commands = {run: bench_command(run, args, out) for run in args.runs}
    if args.batches:
        commands["batches"] = batches_command(args, out)
    commands["exactness"] = exactness_command(args, out)
    found, failed = {}, {}
    for number, (name, command) in enumerate(commands.items()):
        parts_left = len(commands) - number - 1 + EXACTNESS_PARTS
        share = 1 if name != "exactness" else parts_left
        limit = (args.limit - (time.monotonic() - started)) * share / parts_left
        reason = in_a_process(command, out / f"{file_name(name)}.log", limit)
        file = out / f"{file_name(name)}.json"
        if reason is not None:
            failed[name] = reason
        if reason is None or (name == "exactness" and file.exists()):  # checks that were done before it broke off
            found[name] = json.loads(file.read_text())
        print(f"{name}: {reason or 'done'}, {time.monotonic() - started:.0f} s since the start", flush=True)
    wrong = differing(found) + (not_captured(found) if args.device == "cuda" else [])
    print("\n".join(report(found, failed, wrong)))
    return 1 if failed or wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--train", action="store_true", help="check training instead, at most six minutes: see gpu_train_check.py")
    add("--runs", nargs="*", default=list(RUNS), metavar="NAME/DTYPE[/DRAFT-VOCAB]", help="default: four targets")
    add("--batches", default=BATCHES, metavar="NAME/DTYPE", help="whose batches are timed; '' for none (%(default)s)")
    add("--trees", nargs="+", default=["30/3/8"], metavar="N/d/k")
    add("--repeats", type=int, default=5, help="(%(default)s)")
    add("--prompt-tokens", type=int, default=512, help="(%(default)s)")
    add("--limit", type=float, default=520, help="seconds for everything (%(default)s)")
    add("--out", default="out/gpu_check", help="folder for JSON files and logs (%(default)s)")
    args = parser.parse_args(argv)
    for run in args.runs + [args.batches] * bool(args.batches):
        if len(run.split("/")) not in (2, 3):
            raise ValueError(f"--runs {run}: expected name/dtype or name/dtype/draft-vocabulary")
    return args


def exactness_command(args: argparse.Namespace, out: Path) -> list[str]:
    return [str(ROOT / "scripts" / "gpu_exactness.py"), "--device", args.device, "--json", str(out / "exactness.json")]


def batches_command(args: argparse.Namespace, out: Path) -> list[str]:
    name, dtype = args.batches.split("/")[:2]
    flags = ["--random-weights", name, "--dtype", dtype, "--device-map", args.device, "--tree", args.trees[0]]
    flags += ["--questions", "8", "--repetitions", "2", "--max-new-tokens", "64"]
    return [str(ROOT / "scripts" / "bench_batches.py"), *flags, "--json", str(out / "batches.json")]


def bench_command(run: str, args: argparse.Namespace, out: Path) -> list[str]:
    name, dtype, *vocabulary = run.split("/")
    flags = ["--random-weights", name, "--dtype", dtype, "--device-map", args.device, "--trees", *args.trees]
    flags += ["--repeats", str(args.repeats), "--prompt-tokens", str(args.prompt_tokens)]
    flags += ["--json", str(out / f"{file_name(run)}.json")]
    return ["-m", "vispec.evaluation.bench", *flags, *(["--draft-vocab", *vocabulary] if vocabulary else [])]


def environment() -> dict[str, str]:
    """Of a part's process: this checkout, and no network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}


def in_a_process(command: list[str], log: Path, limit: float) -> str | None:
    """Run python with these arguments; what went wrong, None if nothing did."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, timeout=limit, env=environment()
            )
        except subprocess.TimeoutExpired:
            return f"not finished within {limit:.0f} s"
    if done.returncode == 0:
        return None
    last = (log.read_text().strip().splitlines() or [""])[-1]
    return f"exit code {done.returncode}: {last}"


def differing(found: dict) -> list[str]:
    """What is not as it must be in float32."""
    wrong = []
    for name, counts in found.get("exactness", {}).items():
        if "error" in counts:
            wrong.append(f"tiny models, {name}: {counts['error']}")
        if name != "bfloat16":
            differ = {key: count for key, count in counts.items() if key.endswith("differs") and count}
            wrong += [f"tiny models, {name}: {key} in {count} answers" for key, count in differ.items()]
        if counts.get("least_p_value", 1.0) < LEAST_P_VALUE:
            wrong.append(f"tiny models, {name}: tokens are not distributed as the target's")
    for name, result in benches(found).items():
        if result["device"]["dtype"] == "float32":
            wrong += [f"{name}: {arm} differs" for arm, same in result["outputs"].items() if not same["identical"]]
    return wrong


def not_captured(found: dict) -> list[str]:
    """What ran without CUDA graphs, in whole or in part."""
    parts = {f"tiny models, {name}": counts for name, counts in found.get("exactness", {}).items()}
    parts.update((name, result) for name, result in found.items() if name != "exactness")
    without = {False: "ran", "none": "ran", "some": "ran in part"}
    return [
        f"{name}: {without[part['captured']]} without CUDA graphs"
        for name, part in parts.items()
        if part.get("captured") in without
    ]


def benches(found: dict) -> dict:
    return {name: result for name, result in found.items() if name not in ("exactness", "batches")}


def report(found: dict, failed: dict, wrong: list[str]) -> list[str]:
    """The table, and above and below it what does not fit into one."""
    lines = [""]
    for name, counts in found.get("exactness", {}).items():
        lines.append(f"tiny models, {name}: " + ", ".join(f"{key} {count}" for key, count in counts.items()))
    for result in list(benches(found).values())[:1]:
        device, rates = result["device"], result["rates"]
        versions = ", ".join(f"{name} {device['versions'][name]}" for name in ("torch", "transformers"))
        speeds = f"copy {rates['bandwidth'] / 1e9:.0f} GB/s, matrix product {rates['matmul'] / 1e12:.1f} TFLOP/s"
        lines.append(f"{device['name']}, {versions}; {speeds} ({device['dtype']}); prompt {result['context']} tokens")
    lines.append("")
    columns = (
        *("target", "captured", "step ms", "of the possible", "over generate", "tree", "round ms", "x floor"),
        *("in steps", "device idle", "speedup at the published τ (projected)", "outputs"),
    )
    lines.append("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name, result in benches(found).items():
        for tree, row in result["trees"].items():
            lines.append(table_row(name, result, tree, row))
    if "batches" in found:
        pair = found["batches"]["provenance"]["arguments"]["random_weights"]
        lines += ["", f"batches, {pair} with a random draft head, of which practically nothing is accepted:"]
        lines += [found["batches"]["table"], ""]
    lines += [f"- {name}: {reason}" for name, reason in failed.items()]
    lines += [f"- {what}" for what in wrong]
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
        result["captured"],
        f"{1000 * step['seconds']:.2f}",
        marked(f"{possible:.0%}", possible < LEAST_OF_THE_POSSIBLE),
        marked(f"{ratio:.2f}", ratio < 1),
        tree,
        f"{1000 * round_['seconds']:.2f}",
        marked(f"{round_['times_floor']:.2f}", round_["times_floor"] > MOST_OF_THE_FLOOR),
        f"{row['round_in_plain_steps']:.2f}",
        "-" if busy is None else f"{row['everything_else_share']:.0%}",
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
