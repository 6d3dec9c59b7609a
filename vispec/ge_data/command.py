"""The command lines `python -m vispec.ge_data.allocation_*`: arguments, resume, workers."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vispec.cli import DTYPES, Parser, count, number, whole
from vispec.files import write_json_atomic
from vispec.ge_data import workers
from vispec.ge_data.report import full_matrices, read_rows, report, rows_file
from vispec.ge_data.run_folder import RunFolder, batches_of, share
from vispec.locks import alone_in
from vispec.prompts import PIXEL_LIMITS

LAST_ROW = 67999
NOT_CONTENT = ("outdir", "worker", "gpus_per_model", "ray")
"""Arguments that decide where and by whom files are made, not what is in them."""
PUBLISHED_TARGETS = {"llava": "llava-hf/llava-v1.6-vicuna-7b-hf", "qwen": "Qwen/Qwen2.5-VL-7B-Instruct"}


def make_parser(stage: str, family: str) -> Parser:
    """Arguments of one command; stage is "text" or "image", family "llava" or "qwen"."""
    what = "text conversations (stage 1)" if stage == "text" else "long answers about images (stage 2)"
    parser = Parser(description=f"Training data of the draft head: {what}, with the target's features.")
    add = parser.add_argument
    add("--outdir", required=True, help="folder of the sample files; the same command goes on where it stopped")
    add("--start", type=whole, default=0, help="first row of the shuffled data (%(default)s)")
    add("--end", type=whole, default=LAST_ROW, help="last row, inclusive (%(default)s)")
    add("--model", default=PUBLISHED_TARGETS[family], help="target: folder or hub id (%(default)s)")
    add("--gpus_per_model", "--gpus-per-model", type=float, default=1, help="below 1: several models on one GPU")
    add("--data-folder", help="local data in the published layout; default: " + _default_data(stage))
    add("--dtype", choices=DTYPES, default="auto", help="of the target and of the stored features (%(default)s)")
    add("--max-len", type=count, help="longest sample in tokens; default: what the target takes")
    add(
        "--store",
        choices=("pairs", "all", "eagle3", "tokens"),
        default="pairs",
        help="all: also features of image positions, for EAGLE-2; eagle3: also what goes into three layers, for "
        "EAGLE-3; tokens: no features, for training with --online",
    )
    add(
        "--aux-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="of --store eagle3, counted from 0 (default: 2, half of all, and the last but two)",
    )
    if stage == "image":
        add("--temperature", type=number, default=0.0, help="of the answers; 0 is greedy (%(default)s)")
        add("--seed", type=whole, default=0, help="of sampled answers (%(default)s)")
        add("--batch-size", type=count, default=16, help="answers generated together (%(default)s)")
        add("--max-new-tokens", type=count, default=1024, help="longest answer (%(default)s)")
        parser.add_bool("--allow-outside", "read images at absolute paths, and above the data folder")
        if family == "qwen":
            smallest, largest = PIXEL_LIMITS["min_pixels"], PIXEL_LIMITS["max_pixels"]
            add("--min-pixels", type=count, default=smallest, help="smaller images are enlarged (%(default)s)")
            add("--max-pixels", type=count, default=largest, help="larger images are shrunk (%(default)s)")
    add(
        "--ray",
        type=count,
        nargs="?",
        const=0,
        metavar="ACTORS",
        help="share the rows among Ray actors, on all machines of a running cluster; by default one for every "
        "--gpus_per_model GPUs, or on each machine where there are none",
    )
    add("--worker", help=argparse.SUPPRESS)
    parser.set_defaults(stage=stage, family=family)
    return parser


def run(stage: str, family: str, argv: Sequence[str] | None = None) -> int:
    """Everything behind one command line; returns the exit code."""
    logging.basicConfig(format="%(message)s")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser(stage, family).parse_args(argv)
    if args.end < args.start:
        raise ValueError(f"--start {args.start} --end {args.end}: expected start <= end")
    if getattr(args, "min_pixels", 0) > getattr(args, "max_pixels", 0):
        raise ValueError(f"--min-pixels {args.min_pixels}: expected at most --max-pixels {args.max_pixels}")
    if args.aux_layers is not None:
        if args.store != "eagle3":
            raise ValueError(f"--aux-layers {' '.join(map(str, args.aux_layers))}: only --store eagle3 stores them")
        args.aux_layers = tuple(sorted(set(args.aux_layers)))
    rows = _load_rows(stage, args.data_folder)
    end = min(args.end, len(rows) - 1)
    if end < args.end:
        print(f"the data has {len(rows)} rows: --end {args.end} becomes {end}")
    if args.start > end:
        place = f" in {args.data_folder}" if args.data_folder else ""
        raise ValueError(f"--start {args.start}: the data{place} has only {len(rows)} rows")
    batches = batches_of(range(args.start, end + 1), getattr(args, "batch_size", 1))

    if args.worker is not None:
        worker, count = (int(part) for part in args.worker.split("/"))
        _work(args, rows, RunFolder(Path(args.outdir), {}), share(batches, worker, count), worker)
        return 0

    from vispec.ge_data.target_identity import identify_target

    arguments = {k: v for k, v in vars(args).items() if k not in NOT_CONTENT}
    for name in ("allow_outside", "aux_layers"):
        if not arguments.get(name):  # runs that are there may have been begun without the flag
            arguments.pop(name, None)
    if "aux_layers" in arguments:  # a manifest has plain values
        arguments["aux_layers"] = " ".join(map(str, args.aux_layers))
    # in the order that manifests have them
    arguments = {"stage": stage, "family": family, **arguments, "end": end}
    target = identify_target(args.model, args.dtype)
    gpus = workers.visible_gpus() if args.ray is None else []  # the cluster's are not seen from here
    groups = workers.gpu_groups(gpus, args.gpus_per_model)
    outdir = Path(args.outdir)
    with alone_in(outdir, "--outdir"):
        return _fill(argv, args, rows, RunFolder.open(outdir, arguments, target), batches, groups)


def _fill(argv, args, rows, folder: RunFolder, batches, groups: Sequence[str]) -> int:
    """Make what is missing, in a process for each group of GPUs where there are several; returns the exit code."""
    if len(groups) > 1:
        module = f"vispec.ge_data.allocation_{args.family}_{'shargpt' if args.stage == 'text' else 'pretrain_gen'}"
        code = workers.run_workers(module, argv, groups, folder.path / "logs")
        if code:
            return code
    else:
        _work(args, rows, folder, batches, 0)
    skipped, failed = read_rows(folder, max(len(groups), 1))
    return report(folder, sum(map(len, batches)), skipped, failed, full_matrices(args.stage, args.model, args.dtype))


def _default_data(stage: str) -> str:
    from vispec.ge_data.sources import LLAVA_PRETRAIN_FOLDER, SHAREGPT

    return f"{SHAREGPT} of the hub" if stage == "text" else f"./{LLAVA_PRETRAIN_FOLDER}/"


def _load_rows(stage: str, data_folder: str | None):
    from vispec.ge_data.sources import load_image, load_text

    return load_text(data_folder) if stage == "text" else load_image(data_folder)


def _work(args, rows, folder: RunFolder, batches, worker: int) -> None:
    """Make the missing samples of some batches, and leave lists of the rows that were skipped and that failed."""
    from tqdm import tqdm

    missing = [batch for batch in batches if folder.missing(batch)]
    total, left = (sum(map(len, some)) for some in (batches, missing))
    skipped: dict[int, str] = {}
    failed: dict[int, str] = {}
    with tqdm(total=total, initial=total - left, unit="row", desc=f"{args.stage} samples", mininterval=1) as bar:
        for batch, without in _make(args, rows, folder, missing):
            skipped.update(without.skipped)
            failed.update(without.failed)
            bar.update(len(batch))
    # actors are done in any order
    rows_without = {"skipped": dict(sorted(skipped.items())), "failed": dict(sorted(failed.items()))}
    write_json_atomic(rows_file(folder, worker), rows_without)


def _make(args, rows, folder: RunFolder, batches):
    """Batches with their rows that have no sample, as they are done, in this process or by actors."""
    if not batches:
        return
    if args.ray is not None:
        from vispec.ge_data.actors import make_by_actors

        yield from make_by_actors(args, folder, rows, batches)
        return
    from vispec.ge_data.maker import Maker

    maker = Maker(args, folder, rows.folder)
    for batch in batches:
        yield batch, maker.make(rows.at(batch))
