"""Samples per second of the image data command: answers in batches against one at a time, in one run.

    python scripts/bench_answers.py --rows 64 --batch-size 16 --rounds 5

Both arms do all that the command does for a row but writing its file: prompt, answer, features. They take turns, and
the medians are compared. By default the target is the embedded one and the pictures are its scenes.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import AutoProcessor

from vispec.cli import run_cli
from vispec.demo.make_data import scene_window, write_pretrain
from vispec.embedded import TARGET
from vispec.files import write_json_atomic
from vispec.ge_data.jobs import ImageJob, Settings
from vispec.ge_data.run_folder import batches_of
from vispec.ge_data.sources import load_image
from vispec.model.loading import load_target
from vispec.model.target import Target
from vispec.timing import now, turns


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Samples per second of answers in batches against one at a time.")
    add = parser.add_argument
    add("--target", default=str(TARGET), help="LLaVA target, folder or hub id (%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(%(default)s)")
    add("--rows", type=int, default=64, help="(%(default)s)")
    add("--batch-size", type=int, default=16, help="(%(default)s)")
    add("--rounds", type=int, default=5, help="runs of each arm (%(default)s)")
    add("--max-new-tokens", type=int, default=256, help="longest answer (%(default)s)")
    add("--store", default="pairs", choices=("pairs", "tokens"), help="tokens: no pass for the features (%(default)s)")
    add("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    for name, speeds in result["samples_per_second"].items():
        low, middle, high = min(speeds), statistics.median(speeds), max(speeds)
        print(f"{name}: {middle:.2f} samples/s (median of {len(speeds)}, {low:.2f} to {high:.2f})")
    print(
        f"ratio of medians {result['ratio']:.2f}; {result['equal']} of {result['answers']} answers equal, "
        f"{result['answer_tokens']} answer tokens; {result['device']}"
    )
    if args.json:
        write_json_atomic(args.json, {**result, "arguments": vars(args)})
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Run both arms in turn over the same rows."""
    write_pretrain(folder, scene_window("draft", 0, args.rows, seed=0), seed=0)
    device = "cuda" if torch.cuda.is_available() else None
    target = Target(load_target(args.target, getattr(torch, args.dtype), device))
    settings = Settings("llava", max_new_tokens=args.max_new_tokens, store=args.store)
    job, rows = ImageJob(target, AutoProcessor.from_pretrained(args.target), folder, settings), load_image(str(folder))
    arms = {f"batches of {args.batch_size}": args.batch_size, "one at a time": 1}
    speeds = {name: [] for name in arms}
    for size in arms.values():
        answers(job, rows.at(range(min(size, args.rows))), size)  # warm-up
    found = {}
    for _, _, (name, size) in turns(list(arms.items()), 1, args.rounds):
        started = now(target.device)
        found[name] = answers(job, rows.at(range(args.rows)), size)
        speeds[name].append(args.rows / (now(target.device) - started))
    batched, single = (found[name] for name in arms)
    together, alone = (statistics.median(values) for values in speeds.values())
    return {
        "samples_per_second": speeds,
        "ratio": together / alone,
        "answers": len(single),
        "equal": sum(batched.get(index) == answer for index, answer in single.items()),
        "answer_tokens": sum(map(len, single.values())),
        "device": torch.cuda.get_device_name() if device else f"CPU, {torch.get_num_threads()} thread(s)",
    }


def answers(job: ImageJob, rows: dict[int, dict], batch_size: int) -> dict[int, list[int]]:
    """The answers' token ids by row; rows that are skipped are left out."""
    found = {}
    for batch in batches_of(list(rows), batch_size):
        for index, sample in job.samples({index: rows[index] for index in batch}, batch):
            if not isinstance(sample, Exception):
                found[index] = sample.input_ids[sample.loss_mask].tolist()
    return found


if __name__ == "__main__":
    run_cli(main)
