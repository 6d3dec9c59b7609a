"""What the training commands share: from their arguments to a trainer that runs."""

import argparse
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vispec.cli import provenance
from vispec.files import read_json, write_json_atomic
from vispec.ge_data.sample_file import read_tokens
from vispec.locks import alone_in
from vispec.model.drafts import BaseHead, Eagle3Head
from vispec.model.drafts.hub import model_card
from vispec.train.draft_vocab import count_answers
from vispec.train.eagle3 import Eagle3Trainer, take_vocabulary
from vispec.train.folders import check_folders
from vispec.train.medusa import MedusaTrainer
from vispec.train.msd import MSDTrainer
from vispec.train.plan import print_plan
from vispec.train.processes import Processes, launched_processes
from vispec.train.recipe import Recipe, recipe_identity
from vispec.train.samples import Noise, SampleFiles, SampleFolder, find_samples, hold_out, skipped_samples
from vispec.train.specvlm import SpecVLMTrainer
from vispec.train.start import head_to_train
from vispec.train.states import START_FILE, read_resume
from vispec.train.target_weights import count_layers, read_tables, tables_digest
from vispec.train.trainer import Trainer

if TYPE_CHECKING:
    from vispec.train.online import OnlineFeatures

TRAINERS = {"medusa": MedusaTrainer, "eagle3": Eagle3Trainer, "msd": MSDTrainer, "specvlm": SpecVLMTrainer}
"""Of the methods that have one of their own."""
UNTOLD = ("tmpdir", "loadpath", "target_tables")
"""Of a run: what a model card leaves out."""

logger = logging.getLogger("vispec")


def train(args: argparse.Namespace, method: str, recipe: Recipe, num_q: int | None = None) -> int:
    """Everything behind a training command once its arguments are read; returns the exit code."""
    logging.basicConfig(format="%(message)s")
    processes = launched_processes()
    if not processes.is_main:
        logger.setLevel(logging.ERROR)  # the main process says it
    writes = processes.is_main and not args.dry_run
    with alone_in(Path(args.cpdir), "--cpdir") if writes else nullcontext():
        trainer, resumed = _make_trainer(args, method, recipe, num_q, processes)
        if args.begin_epoch not in (None, trainer.epoch):
            raise ValueError(f"--begin-epoch {args.begin_epoch}: --cpdir {args.cpdir} is at epoch {trainer.epoch}")
        if args.dry_run:
            if processes.is_main:
                print_plan(trainer, args.basepath)
        elif trainer.epoch == recipe.epochs:
            if processes.is_main:
                print(f"--cpdir {args.cpdir}: all {recipe.epochs} epochs are done")
        else:
            _begin(args, trainer, resumed)
            trainer.run()
        processes.leave()
    return 0


def _make_trainer(
    args: argparse.Namespace, method: str, recipe: Recipe, num_q: int | None, processes: Processes
) -> tuple[Trainer, bool]:
    """The trainer where it begins or goes on, and whether it goes on."""
    folder = Path(args.cpdir)
    state = read_resume(folder)
    embedding, lm_head = read_tables(args.basepath)
    head = head_to_train(args, method, num_q, embedding, lm_head, state)
    if blind := getattr(args, "blind", False):
        head.blind()
    train_set, held_out_set, online = _samples(args, head, processes)
    if isinstance(head, Eagle3Head) and state is None and args.loadpath is None:
        take_vocabulary(head, lm_head, count_answers(train_set.paths, head.config.vocab_size, "answers"))
    identity = {
        "method": method,
        "target_tables": tables_digest(embedding, lm_head),
        "mixed_precision": processes.mixed_precision,
        "num_q": num_q,
        "blind": blind,
        "max_len": args.max_len,
        "noise": args.noise,
        "online": args.target_dtype if args.online else None,
        "samples": len(train_set),
        "tmpdir": args.tmpdir,
        "loadpath": args.loadpath or (state["identity"].get("loadpath") if state else None),
        "config": head.config.to_dict(),
        **recipe_identity(recipe),
        "batch_size": recipe.batch_size * recipe.accumulation * processes.count,
    }
    identity.pop("accumulation")
    trainer_class = TRAINERS.get(method, Trainer)
    lm_head = lm_head.to(torch.bfloat16 if processes.autocast else torch.float32)
    trainer = trainer_class(head, lm_head, train_set, held_out_set, recipe, folder, processes, identity, online)
    trainer.describe = partial(_describe, args, identity)
    return trainer, trainer.resume(state)


def _samples(
    args: argparse.Namespace, head: BaseHead, processes: Processes
) -> "tuple[SampleFiles, SampleFiles, OnlineFeatures | None]":
    """Samples to train on and held-out ones; with --online, without features and with the target that computes them."""
    paths = find_samples(args.tmpdir)
    check_folders(paths, not args.online, args.basepath)
    skip = skipped_samples(paths, args.skip)
    train, held_out = hold_out(paths)
    if skip.issuperset(train):
        raise ValueError(f"--skip {' '.join(args.skip)}: no sample is left to train on")
    noise, all_features = Noise(args.noise, args.seed), head.reads_image_features
    layers = head.layers_of(count_layers(args.basepath)) if isinstance(head, Eagle3Head) else ()
    if args.online:
        from vispec.train.online import OnlineFeatures, Pictures, TokenFolder, load_frozen

        pictures = Pictures(args.basepath, {path.parent for path in paths}, args.data_folder, args.allow_outside)
        sets = [TokenFolder(one, args.max_len, pictures, head.config.vocab_size, skip) for one in (train, held_out)]
        target = load_frozen(args.basepath, args.target_dtype, processes.device)
        return *sets, OnlineFeatures(target, args.max_len, noise, all_features, layers)
    if args.data_folder is not None:
        raise ValueError(f"--data-folder {args.data_folder}: only --online reads images")
    sizes = (head.config.vocab_size, head.config.hidden_size)
    sets = [SampleFolder(one, args.max_len, noise, all_features, sizes, layers, skip) for one in (train, held_out)]
    sets[0][(sets[0].kept[0], None)]  # data of another target are refused before anything is written
    return *sets, None


def _begin(args: argparse.Namespace, trainer: Trainer, resumed: bool) -> None:
    """Refuse a run that learns nothing; say and write down what begins, or goes on."""
    samples = trainer.train_set
    kept = (read_tokens(samples.paths[index]).cut(args.max_len) for index in samples.kept)
    if not any(tokens.scored().any() for tokens in kept):  # nearly always in the first
        raise ValueError(
            f"no token of an answer is scored in any of {len(samples.kept)} training samples, cut to --max-len "
            f"{args.max_len}"
        )
    if not trainer.processes.is_main:
        return
    recipe, count = trainer.recipe, trainer.processes.count
    print(
        f"{trainer.head.method}: {trainer.trained:,} trained parameters, {len(samples)} samples "
        f"({len(trainer.held_out_set)} held out{f', {trainer.skipped} skipped' if trainer.skipped else ''}), "
        f"{trainer.steps_per_epoch} steps an epoch of {trainer.group_size} samples: {count} process"
        f"{'es' if count > 1 else ''} x batches of {recipe.batch_size} x {recipe.accumulation} accumulated"
        + (f"; goes on after epoch {trainer.epoch}, step {trainer.step_in_epoch}" if resumed else ""),
        flush=True,
    )
    path, start = trainer.folder / START_FILE, provenance(args)
    if resumed and path.is_file():
        first = read_json(path)
        others = first.get("resumed", [])
        if not isinstance(others, list):
            raise ValueError(f"{path}: resumed is {others!r:.60}, expected the starts that went on")
        start = first | {"resumed": [*others, start]}
    write_json_atomic(path, start)


def _describe(args: argparse.Namespace, identity: dict, head: BaseHead, epoch: int, line: dict) -> str:
    """The model card of a head after an epoch."""
    told = {name: value for name, value in identity.items() if value is not None and name not in UNTOLD}
    return model_card(head, args.basepath, args.tmpdir, {"epoch": epoch, **told}, line["held_out"])
