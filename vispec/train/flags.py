"""The flags that all training commands have, and what they make of a run."""

import argparse
from dataclasses import replace

import torch

from vispec.cli import DTYPES, Parser, count, limit, number, parse_bool, whole
from vispec.train.losses import Objective
from vispec.train.recipe import Recipe

CHECKPOINT_DTYPES = tuple(name for name in DTYPES if name != "auto")


def make_parser(name: str, description: str, lr: float, token_weight: float) -> Parser:
    """The parser of a training command, to which it adds its own flags.

    Args:
        name: of its module.
        lr, token_weight: defaults.
    """
    parser = Parser(prog=name, description=description)
    add = parser.add_argument
    add("--basepath", required=True, help="target, folder or hub id: its embedding and output head are read")
    add("--configpath", help="config.json of the draft head")
    add("--loadpath", help="draft head to start from, folder or hub id; not needed to go on")
    add("--tmpdir", required=True, nargs="+", help="folder(s) of sample files")
    add("--cpdir", required=True, help="folder of checkpoints; the same command goes on where it stopped")
    add("--lr", type=number, default=lr, help="(%(default)s)")
    add("--bs", type=count, default=1, help="samples of a batch (%(default)s)")
    add("--gradient-accumulation-steps", type=count, default=1, help="batches of an optimizer step (%(default)s)")
    add("--pw", type=number, default=token_weight, help="weight of the token losses (%(default)s)")
    add("--num-workers", type=whole, help="processes that read samples; default: 4 with a GPU, none without")
    add("--max-len", type=count, default=4096, help="longer samples are cut (%(default)s)")
    add("--skip", nargs="+", default=[], metavar="NAME", help="samples that are left out, by file name or path")
    add("--begin-epoch", type=whole, help="epochs that are expected to be done already")
    add("--num-epochs", type=count, default=20, help="(%(default)s)")
    add("--seed", type=whole, default=0, help="(%(default)s)")
    clip = parser.add_mutually_exclusive_group()
    clip.add_argument("--clip-value", type=limit, help=f"gradients are cut at this value ({Recipe.clip_value})")
    clip.add_argument("--clip-norm", type=limit, help="instead: gradients are scaled down to this norm")
    add("--noise", type=number, default=0.2, help="width of the noise on input features (%(default)s)")
    add("--save-every", type=count, default=1, help="epochs between checkpoints (%(default)s)")
    add("--save-steps", type=whole, default=0, help="steps between states to resume from; 0: after each epoch only")
    add("--keep", type=whole, default=0, help="newest checkpoints that stay; 0: all (%(default)s)")
    add("--save-dtype", choices=CHECKPOINT_DTYPES, default="float32", help="of checkpoints (%(default)s)")
    add("--save-embedding", type=parse_bool, default=True, help="False: a checkpoint leaves the target's table out")
    add("--dry-run", action="store_true", help="read everything and print the plan; train and write nothing")
    parser.add_bool("--online", "the target computes the features now")
    add("--target-dtype", choices=DTYPES, default="auto", help="of the target of --online (%(default)s)")
    add("--data-folder", help="images of --online; default: where the data's manifest says they are")
    parser.add_bool("--allow-outside", "read images of --online above their folder, or at absolute paths")
    add("--report-to", choices=("tensorboard", "none"), default="none", help="(%(default)s)")
    return parser


def recipe_of(args: argparse.Namespace, objective: Objective, mtp_steps: int) -> Recipe:
    workers = args.num_workers
    if workers is None:
        workers = 4 if torch.cuda.is_available() else 0
    return Recipe(
        objective,
        lr=args.lr,
        mtp_steps=mtp_steps,
        epochs=args.num_epochs,
        batch_size=args.bs,
        accumulation=args.gradient_accumulation_steps,
        clip_value=Recipe.clip_value if args.clip_value is None else args.clip_value,
        clip_norm=args.clip_norm,
        seed=args.seed,
        save_every=args.save_every,
        save_steps=args.save_steps,
        save_dtype=args.save_dtype,
        save_embedding=args.save_embedding,
        keep=args.keep,
        workers=workers,
        report_to=args.report_to,
    )


def eagle_recipe_of(args: argparse.Namespace, objective: Objective, mtp_steps: int) -> Recipe:
    """As EAGLE's authors and those of MSD train: gradients are scaled down to a norm, and weights do not decay."""
    recipe = recipe_of(args, objective, mtp_steps)
    norm = args.clip_norm or (Recipe.clip_value if args.clip_value is None else None)
    return replace(recipe, clip_norm=norm, weight_decay=0.0)
