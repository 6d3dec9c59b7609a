"""What each part of stage 2 brings: one factor at a time, from one stage-1 head, on the data of `rebuild.sh`.

python -m vispec.demo.ablation --work out/rebuild --out out/ablation

Every variant that is trained has the command line of stage 2, once for each seed and with equally many epochs, then τ
is measured on unseen scenes. The same command goes on where it was stopped; settings.json has the command line of every
training.
"""

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from vispec.children import start_child
from vispec.cli import Parser, UserError, changes, count, provenance, run_cli
from vispec.demo.tau import QUESTIONS, TREES, weights_digest
from vispec.files import read_json, write_json_atomic
from vispec.train.metrics import read_metrics

FLAGS = {"--lr": "1e-3", "--bs": "16", "--use-ours": "True", "--num-q": "2", "--mtp-steps": "3", "--loss": "ce"}
"""Stage 2 as rebuild.sh runs it, which is the reference of the comparison."""

EPOCHS = 6


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        flags: what differs from the reference; None is no training at all.
    """

    name: str
    text: str
    flags: Mapping[str, str] | None = field(default_factory=dict)


VARIANTS = (
    Variant("stage1", "no stage 2: the EAGLE-2 head of stage 1, image rows as ordinary pairs", None),
    # a learning rate of 0 writes the head that stage 2 begins with
    Variant("start", "no stage 2: the same, begun as a ViSpec head", {"--lr": "0", "--num-epochs": "1"}),
    Variant("reference", "stage 2: images, mtp_steps 3, cross-entropy, num_q 2"),
    Variant("blind", "without images: the adaptor's output held at zero", {"--blind": "True"}),
    Variant("mtp0", "mtp_steps 0", {"--mtp-steps": "0"}),
    Variant("mtp1", "mtp_steps 1, as published", {"--mtp-steps": "1"}),
    Variant("l1", "l1, the released loss", {"--loss": "l1"}),
    Variant("q5", "num_q 5", {"--num-q": "5"}),
    Variant("eagle2", "EAGLE-2 head, image rows as ordinary pairs", {"--use-ours": "False"}),
)


@dataclass(frozen=True)
class Head:
    """A variant's draft head of one seed."""

    variant: Variant
    seed: int | None
    """None where there is no training, and so no seed."""
    folder: Path
    """The checkpoint."""
    command: list[str] | None
    """What trains it, after `python -m`."""

    @property
    def name(self) -> str:
        return self.variant.name if self.seed is None else f"{self.variant.name}_{self.seed}"

    @property
    def cpdir(self) -> Path:
        return self.folder.parent


def heads_of(variants: Sequence[Variant], seeds: Sequence[int], work: Path, out: Path, epochs: int) -> list[Head]:
    """All heads of a comparison.

    Args:
        work: folder that rebuild.sh has filled.
        out: folder of the checkpoints.
    """
    heads = []
    for seed in seeds:
        for variant in variants:
            if variant.flags is None:
                continue
            cpdir = out / f"{variant.name}_{seed}"
            flags = {
                "--basepath": work / "target" / "model",
                "--loadpath": newest_state(work / "stage1"),
                "--tmpdir": work / "images",
                "--cpdir": cpdir,
                "--num-epochs": epochs,
                "--seed": seed,
                **FLAGS,
                **variant.flags,
            }
            flags["--save-every"] = flags["--num-epochs"]
            command = ["vispec.train.main_mtp", *(f"{name}={value}" for name, value in flags.items())]
            heads.append(Head(variant, seed, cpdir / f"state_{flags['--num-epochs']}", command))
    untrained = [variant for variant in variants if variant.flags is None]
    return [*(Head(variant, None, newest_state(work / "stage1"), None) for variant in untrained), *heads]


def newest_state(folder: Path) -> Path:
    """The checkpoint of the last epoch.

    Raises:
        UserError: there is none.
    """
    from vispec.train.states import STATE

    states = [path for path in folder.glob("state_*") if STATE.fullmatch(path.name)]
    if not states:
        raise UserError(f"{folder}: no state_<epoch> there; rebuild.sh makes it")
    return max(states, key=lambda path: int(STATE.fullmatch(path.name)[1]))


def is_trained(head: Head) -> bool:
    """Whether a head's last epoch is written; its line is there after its checkpoint, so a kill may fall between."""
    return head.folder.is_dir() and head.folder.name in {f"state_{line['epoch']}" for line in read_metrics(head.cpdir)}


def run_side_by_side(commands: Mapping[str, list[str]], logs: Path, jobs: int) -> None:
    """Run named commands, `jobs` at a time, each with its share of the cores.

    Raises:
        UserError: one has failed; the others are ended, and go on where they were when they are started again.
    """
    from tqdm import tqdm

    logs.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1)), "ACCELERATE_USE_CPU": "true"}
    waiting, running = dict(commands), {}
    with tqdm(total=len(commands), unit="run", desc=logs.parent.name) as bar:
        try:
            while waiting or running:
                for name in list(waiting)[: jobs - len(running)]:
                    running[name] = start_child(waiting.pop(name), logs / f"{name}.log", environment)
                for name, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    if process.returncode:
                        last = (logs / f"{name}.log").read_text(errors="replace").rstrip().splitlines()[-1:]
                        raise UserError(f"{name} ended with exit code {process.returncode}: {''.join(last)}")
                    del running[name]
                    bar.update(1)
                time.sleep(0.1)
        finally:
            for process in running.values():
                process.terminate()
                process.wait()


def rows_of(heads: Sequence[Head], taus: Path) -> Iterator[dict]:
    """What was found for each head, as plain values."""
    for head in heads:
        measured = read_json(taus / f"{head.name}.json")["heads"][str(head.folder)]
        lines = read_metrics(head.cpdir)
        yield {
            "variant": head.variant.name,
            "seed": head.seed,
            "tau": {tree: found["tau"] for tree, found in measured["trees"].items()},
            "answers": sorted({found["answers"] for found in measured["trees"].values()}),
            "held_out": None if head.seed is None else lines[-1]["held_out"],
            "training_seconds": None if head.seed is None else sum(line["seconds"] for line in lines),
        }


def table(rows: Sequence[dict], variants: Sequence[Variant], seeds: Sequence[int]) -> str:
    """Markdown: for each variant the mean over the seeds, and each seed's own value beside it."""
    told = ", ".join(map(str, seeds))
    titles = [f"variant (seeds {told})", *(f"τ at {tree}" for tree in TREES), "held-out top-1"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant in variants:
        found = [row for row in rows if row["variant"] == variant.name]
        columns = [[row["tau"][tree] for row in found] for tree in TREES]
        columns.append([(row["held_out"] or {}).get("top1") for row in found])
        lines.append(f"| {variant.text} | {' | '.join(map(_cell, columns))} |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None]) -> str:
    """Mean and spread of the seeds' values."""
    if None in values:
        return ""
    each = f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{each}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.ablation", description="What each part of stage 2 brings.")
    add = parser.add_argument
    names = [variant.name for variant in VARIANTS]
    add("--work", type=Path, default=Path("out/rebuild"), help="folder of rebuild.sh (default: %(default)s)")
    add("--out", type=Path, default=Path("out/ablation"), help="(default: %(default)s)")
    add("--variants", nargs="+", choices=names, default=names, help="(default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="(default: 0 1)")
    add("--epochs", type=count, default=EPOCHS, help="of each training (default: %(default)s)")
    add("--questions", type=count, default=QUESTIONS, help="(default: %(default)s)")
    add("--jobs", type=count, default=2, help="trainings side by side, which share the cores (default: %(default)s)")
    args = parser.parse_args(argv)
    variants = [variant for variant in VARIANTS if variant.name in args.variants]
    seeds = list(dict.fromkeys(args.seeds))
    heads = heads_of(variants, seeds, args.work, args.out, args.epochs)
    _claim(args, heads)
    # the last variant takes longest: first, so that no core is left waiting for it
    trainings = {head.name: head.command for head in reversed(heads) if head.command and not is_trained(head)}
    run_side_by_side(trainings, args.out / "logs", args.jobs)
    taus = args.out / "tau"
    shared = [f"--model={args.work / 'target' / 'model'}", f"--questions={args.questions}", "--trees", *TREES]
    measurements = {
        head.name: ["vispec.demo.tau", *shared, "--drafts", str(head.folder), f"--json={taus / head.name}.json"]
        for head in heads
    }
    run_side_by_side(measurements, args.out / "logs", args.jobs)

    rows = list(rows_of(heads, taus))
    print(table(rows, variants, seeds))
    same = len({answer for row in rows for answer in row["answers"]}) == 1
    minutes = sum(row["training_seconds"] or 0 for row in rows) / 60
    print(f"\nall heads gave the same answers: {'yes' if same else 'no'}; trainings of {minutes:.0f} minutes together")
    write_json_atomic(args.out / "results.json", {"rows": rows, "provenance": provenance(args)})
    return 0


def _claim(args, heads: Sequence[Head]) -> None:
    """Note what decides the heads in --out, and the command lines; one that holds others is refused.

    Other variants and seeds may join those that are there.
    """
    settings = {
        "work": str(args.work),
        "epochs": args.epochs,
        "target": weights_digest(args.work / "target" / "model"),
        "stage1": weights_digest(newest_state(args.work / "stage1")),
    }
    file = args.out / "settings.json"
    found = read_json(file) if file.is_file() else dict(settings)
    there = found.pop("commands", {})
    commands = {head.name: shlex.join(["python", "-m", *head.command]) for head in heads if head.command}
    differences = changes(found, settings) or changes(
        {name: there.get(name, commands[name]) for name in commands}, commands
    )
    if differences:
        raise UserError(f"--out {args.out} holds other trainings ({differences}); choose another folder")
    write_json_atomic(file, {**settings, "commands": {**there, **commands}})


if __name__ == "__main__":
    run_cli(main)
