"""Peak memory and time of the training loss, in chunks and at once, forward and backward, on the same rows.

python scripts/bench_loss.py                                    # the sizes of Qwen2.5-VL 7B; minutes on a CPU
python scripts/bench_loss.py --rows 256 --dtype float32         # a smaller one

Memory is what is allocated at most beyond the inputs: on a GPU by torch's own count, on the CPU (Linux) by the growth
of the resident set of a process that does nothing else. The arms take turns; medians are printed. Required of the
chunked loss: at most a quarter of the memory, at most 1.1 times the time.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vispec.cli import provenance, run_cli
from vispec.timing import now, turns
from vispec.train.losses import Objective, summed_loss

ARMS = ("chunked", "at once")
OBJECTIVES = {"stage1": Objective.stage1(), "l1": Objective.stage2("l1"), "ce": Objective.stage2("ce")}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.arm:
        print(json.dumps(measure(args.arm, args)))
        return 0
    made_by = provenance(args)
    print(f"{made_by['device']}; --device {args.device}, torch {torch.__version__}, revision {made_by['git_revision']}")
    print(f"{args.rows} rows x {args.steps} step(s), vocabulary {args.vocab}, width {args.width}, {args.dtype}")
    measured = measure if args.device == "cuda" else in_a_process
    in_turn = [(arm, measured(arm, args)) for _, _, arm in turns(ARMS, 1, args.runs)]
    medians = {}
    for arm in ARMS:
        seconds, peaks = zip(*(result for name, result in in_turn if name == arm), strict=True)
        medians[arm] = statistics.median(seconds), statistics.median(peaks)
        print(
            f"{arm:8}  {medians[arm][1] / 2**20:10.1f} MiB  {medians[arm][0] * 1000:10.1f} ms "
            f"({min(seconds) * 1000:.1f} to {max(seconds) * 1000:.1f} in {len(seconds)} runs)"
        )
    time_ratio, memory_ratio = (a / b if b else float("nan") for a, b in zip(*medians.values(), strict=True))
    print(f"ratio     memory {memory_ratio:.3f} (required: at most 0.25), time {time_ratio:.3f} (at most 1.1)")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=2048, help="scored rows (%(default)s)")
    add("--steps", type=int, default=1, help="outputs of each row: --mtp-steps + 1 of training (%(default)s)")
    add("--vocab", type=int, default=152064, help="(%(default)s)")
    add("--width", type=int, default=3584, help="hidden size (%(default)s)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of weights and outputs")
    add("--objective", choices=tuple(OBJECTIVES), default="l1", help="(%(default)s)")
    add("--chunk", type=int, help="rows computed at a time; default: that of training")
    add("--runs", type=int, default=5, help="of each arm (%(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--arm", choices=ARMS, help="measure this arm once and print seconds and bytes as JSON")
    args = parser.parse_args(argv)
    for name in ("rows", "steps", "vocab", "width", "runs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.device == "cpu" and not sys.platform.startswith("linux"):
        raise ValueError(f"--device cpu: memory is read from /proc, found {sys.platform}, expected linux")
    return args


def in_a_process(arm: str, args: argparse.Namespace) -> tuple[float, int]:
    """One measurement in a process of its own: memory that an arm has freed would hide what the next one takes."""
    flags = [
        f"--{name}={value}" for name, value in vars(args).items() if value is not None and name not in ("arm", "runs")
    ]
    done = subprocess.run([sys.executable, __file__, *flags, "--arm", arm], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"--arm {arm}: {last}")
    return tuple(json.loads(done.stdout))


def measure(arm: str, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds and bytes of one forward and backward pass."""
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    head = torch.empty(args.vocab, args.width, dtype=dtype, device=device).normal_(std=args.width**-0.5)
    targets = torch.randn(args.rows, args.width, device=device)
    outs = torch.randn(args.rows, args.steps, args.width, dtype=dtype, device=device)
    if device.type == "cuda":
        run(arm, args, outs, targets, head)  # libraries load and take their workspace in the first pass
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        run(arm, args, outs[:1], targets[:1], head)
        before = resident()
    started = now(device)
    run(arm, args, outs, targets, head)
    seconds = now(device) - started
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    return seconds, peak - before


def run(
    arm: str, args: argparse.Namespace, outs: torch.Tensor, targets: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    """The gradient of `outs`."""
    outs = outs.detach().requires_grad_()
    objective = OBJECTIVES[args.objective]
    if arm == "chunked":
        loss, _ = summed_loss(objective, outs, targets, head, args.chunk)
    else:
        loss = objective.rows(outs, targets, head)[0]
    loss.backward()
    return outs.grad


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process's resident set: now, or (VmHWM) at most since the last question for its size now."""
    if field == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")  # sets the maximum back
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    run_cli(main)
