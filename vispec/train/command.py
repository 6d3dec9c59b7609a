"""What the training commands share: arguments, start weights, data, processes."""

import argparse
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vispec.cli import DTYPES, one_line, parse_bool, provenance
from vispec.files import read_json, write_json_atomic
from vispec.ge_data.sample_file import read_tokens
from vispec.locks import alone_in
from vispec.model.drafts import BaseHead, DraftHead, MedusaHead, ViSpecHead, build_head, load_draft
from vispec.model.drafts.checkpoints import fill, identify, read_config
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.hub import model_card
from vispec.model.drafts.vocabulary import DraftVocabulary
from vispec.train.folders import check_folders
from vispec.train.medusa import MedusaTrainer
from vispec.train.plan import print_plan
from vispec.train.processes import Processes, launched_processes
from vispec.train.recipe import Recipe, recipe_identity
from vispec.train.samples import Noise, SampleFolder, find_samples, hold_out, read_lengths, skipped_samples
from vispec.train.states import RESUME_FILE, read_resume, refuse_others
from vispec.train.target_weights import read_tables, tables_digest
from vispec.train.trainer import Trainer

if TYPE_CHECKING:
    from vispec.train.online import OnlineFeatures, TokenFolder


logger = logging.getLogger("vispec")


def add_arguments(parser: argparse.ArgumentParser, lr: float, token_weight: float) -> None:
    """The flags of all training commands."""
    add = parser.add_argument
    add("--basepath", required=True, help="target, folder or hub id: its embedding and output head are read")
    add("--configpath", help="config.json of the draft head")
    add("--loadpath", help="draft head to start from, folder or hub id; not needed to go on")
    add("--tmpdir", required=True, nargs="+", help="folder(s) of sample files")
    add("--cpdir", required=True, help="folder of checkpoints; the same command goes on where it stopped")
    add("--lr", type=float, default=lr, help="(%(default)s)")
    add("--bs", type=int, default=1, help="samples of a batch (%(default)s)")
    add("--gradient-accumulation-steps", type=int, default=1, help="batches of an optimizer step (%(default)s)")
    add("--pw", type=float, default=token_weight, help="weight of the token losses (%(default)s)")
    add("--num-workers", type=int, help="processes that read samples; default: 4 with a GPU, none without")
    add("--max-len", type=int, default=4096, help="longer samples are cut (%(default)s)")
    add("--skip", nargs="+", default=[], metavar="NAME", help="samples that are left out, by file name or path")
    add("--begin-epoch", type=int, help="epochs that are expected to be done already")
    add("--num-epochs", type=int, default=20, help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--clip-value", type=float, help="gradients are cut at this value (0.5)")
    add("--clip-norm", type=float, help="instead of --clip-value: gradients are scaled down to this norm")
    add("--noise", type=float, default=0.2, help="width of the noise on input features (%(default)s)")
    add("--save-every", type=int, default=1, help="epochs between checkpoints (%(default)s)")
    add("--save-steps", type=int, default=0, help="steps between states to resume from; 0: after each epoch only")
    add("--keep", type=int, default=0, help="newest checkpoints that stay; 0: all (%(default)s)")
    add("--dry-run", action="store_true", help="read everything and print the plan; train and write nothing")
    add("--online", nargs="?", const=True, type=parse_bool, default=False, help="the target computes the features now")
    add("--target-dtype", choices=DTYPES, default="auto", help="of the target of --online (%(default)s)")
    add("--data-folder", help="images of --online; default: where the data's manifest says they are")
    add("--allow-outside", action="store_true", help="read images of --online above their folder, or at absolute paths")
    add("--report-to", choices=("tensorboard", "none"), default="none", help="(%(default)s)")


def recipe_of(args: argparse.Namespace, objective, mtp_steps: int) -> Recipe:
    least = dict.fromkeys(("bs", "gradient_accumulation_steps", "num_epochs", "save_every", "max_len"), 1)
    for name, value in (least | {"save_steps": 0, "keep": 0}).items():
        if getattr(args, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {value}")
    for name in ("lr", "pw", "noise"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number from 0 on")
    if args.clip_value is not None and args.clip_norm is not None:
        raise ValueError(f"--clip-value {args.clip_value} and --clip-norm {args.clip_norm}: expected one of them")
    for name in ("clip_value", "clip_norm"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
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
        keep=args.keep,
        workers=workers,
        report_to=args.report_to,
    )


def start_head(args: argparse.Namespace, embedding: torch.Tensor, method: str, num_q: int | None = None) -> BaseHead:
    """The head to train: from --loadpath, or random from --configpath.

    An EAGLE-2 head can become a ViSpec head: the adaptor and img_fc, and only these, then begin as they do in training.
    """
    torch.manual_seed(args.seed)
    config = read_config(args.configpath) if args.configpath else None
    if args.loadpath is None:
        if config is None:
            raise ValueError("--configpath is needed where there is no --loadpath to start from")
        classes = {"eagle2": DraftHead, "medusa": MedusaHead}
        head = ViSpecHead(config, num_q or 2) if method == "vispec" else classes[method](config)
        if method == "vispec":
            logger.warning("no --loadpath: the head starts from random weights")
            head.reset_image_parameters()
        _put_embedding(head, embedding)
        return head
    loaded = load_draft(args.loadpath, dtype=torch.float32, embedding=embedding.float())
    if config is not None:
        _compare_configs(config, loaded.config, args)
    if loaded.method == method:
        if num_q is not None and num_q != loaded.num_q:
            raise ValueError(f"--num-q {num_q}: the head in --loadpath {args.loadpath} has num_q {loaded.num_q}")
        return loaded
    if not (loaded.method == "eagle2" and method == "vispec"):
        raise ValueError(f"--loadpath {args.loadpath} is a {loaded.method} head, this command trains {method}")
    head = ViSpecHead(loaded.config, num_q or 2)
    missing, unexpected = head.load_state_dict(loaded.state_dict(), strict=False)
    if unexpected or any(not name.startswith(("imadpt.", "img_fc.")) for name in missing):
        raise ValueError(f"--loadpath {args.loadpath}: tensors do not fit ({', '.join([*missing, *unexpected])})")
    head.reset_image_parameters()
    return head


def _resumed_head(args: argparse.Namespace, embedding: torch.Tensor, state: dict) -> tuple[BaseHead, str | None, dict]:
    """The head of a run that goes on, without the one it began from; --loadpath and config as the run has them.

    What of them is given again is compared: here, or with the other arguments.
    """
    path, identity = Path(args.cpdir, RESUME_FILE), state["identity"]
    loadpath = identity.get("loadpath")
    try:
        config = DraftConfig.from_dict(identity.get("config", {}), source=str(path))
        head = build_head(config, **identify(state["head"], path, None, None))
    except (TypeError, ArithmeticError, RuntimeError) as error:  # of numbers that are none, or impossible
        raise ValueError(f"{path}: no head has the config that it holds ({one_line(error)})") from None
    fill(head, state["head"], path, torch.float32, embedding.float())
    head.embed_tokens.weight.requires_grad_(False)
    if state["draft_vocab"]:
        head.draft_vocab = DraftVocabulary(**state["draft_vocab"])
    if args.configpath and loadpath is None:
        config = read_config(args.configpath)
    elif args.configpath:
        _compare_configs(read_config(args.configpath), config, args)
    return head, args.loadpath or loadpath, config.to_dict()


def train(args: argparse.Namespace, method: str, recipe: Recipe, num_q: int | None = None) -> int:
    """Everything behind a training command once its arguments are read."""
    processes = launched_processes()
    if not processes.is_main:
        logger.setLevel(logging.ERROR)  # the main process says it
    with alone_in(Path(args.cpdir), "--cpdir") if processes.is_main and not args.dry_run else nullcontext():
        return _train(args, method, recipe, num_q, processes)


def _train(args: argparse.Namespace, method: str, recipe: Recipe, num_q: int | None, processes: Processes) -> int:
    folder = Path(args.cpdir)
    trainer, resumed = _make_trainer(args, method, recipe, num_q, processes)
    if args.begin_epoch is not None and args.begin_epoch != trainer.epoch:
        raise ValueError(f"--begin-epoch {args.begin_epoch}: --cpdir {folder} is at epoch {trainer.epoch}")
    if args.dry_run:
        if processes.is_main:
            print_plan(trainer, args.basepath, args.max_len)
    elif trainer.epoch == recipe.epochs:
        if processes.is_main:
            print(f"--cpdir {folder}: all {recipe.epochs} epochs are done")
    else:
        _check_scored(trainer.train_set.paths, args.max_len)
        if processes.is_main:
            _print_start(trainer, method, resumed)
            _note_start(folder / "training.json", provenance(args), resumed)
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
    if state is None:
        head = start_head(args, embedding, method, num_q)
        loadpath, config = args.loadpath, head.config.to_dict()
    else:
        refuse_others(folder, {"method": state["identity"].get("method")}, {"method": method})
        head, loadpath, config = _resumed_head(args, embedding, state)
    blind = getattr(args, "blind", False)
    if blind:
        head.blind()
    _check_target(head.config, embedding, lm_head, args)
    paths = find_samples(args.tmpdir)
    check_folders(paths, not args.online, args.basepath)
    skip = skipped_samples(paths, args.skip)
    train_paths, held_out_paths = hold_out(paths)
    all_features = method == "eagle2"
    online = None
    if args.online:
        train_set, held_out_set, online = _online_data(
            args, train_paths, held_out_paths, processes, all_features, head.config.vocab_size
        )
    elif args.data_folder is not None:
        raise ValueError(f"--data-folder {args.data_folder}: only --online reads images")
    else:
        sizes = (head.config.vocab_size, head.config.hidden_size)
        train_set = SampleFolder(train_paths, args.max_len, args.noise, args.seed, all_features, sizes)
        held_out_set = SampleFolder(held_out_paths, args.max_len, all_features=all_features, sizes=sizes)
        train_set[(0, None)]  # data of another target are refused before anything is written
    lengths = (read_lengths(train_paths, args.max_len), read_lengths(held_out_paths, args.max_len))
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
        "loadpath": loadpath,
        "config": config,
        **recipe_identity(recipe),
        "batch_size": recipe.batch_size * recipe.accumulation * processes.count,
    }
    identity.pop("accumulation")
    head_dtype = torch.bfloat16 if processes.autocast else torch.float32
    trainer_class = MedusaTrainer if method == "medusa" else Trainer
    sets = (train_set, held_out_set, lengths)
    trainer = trainer_class(head, lm_head.to(head_dtype), *sets, recipe, folder, processes, identity, online, skip)
    trainer.describe = partial(_describe, args, identity)
    return trainer, trainer.resume(state)


def _print_start(trainer: Trainer, method: str, resumed: bool) -> None:
    recipe, count = trainer.recipe, trainer.processes.count
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    skipped = sum(map(len, trainer.skipped))
    print(
        f"{method}: {trained:,} trained parameters, {len(trainer.train_set)} samples "
        f"({len(trainer.held_out_set)} held out{f', {skipped} skipped' if skipped else ''}), "
        f"{trainer.steps_per_epoch} steps an epoch of {trainer.group_size} samples: {count} process"
        f"{'es' if count > 1 else ''} x batches of {recipe.batch_size} x {recipe.accumulation} accumulated"
        + (f"; goes on after epoch {trainer.epoch}, step {trainer.step_in_epoch}" if resumed else ""),
        flush=True,
    )


def _note_start(path: Path, made_by: dict, resumed: bool) -> None:
    """The first start as it was, and those that went on with it."""
    if resumed and path.is_file():
        first = read_json(path)
        made_by = first | {"resumed": [*first.get("resumed", []), made_by]}
    write_json_atomic(path, made_by)


def _online_data(
    args: argparse.Namespace,
    train_paths: Sequence[Path],
    held_out_paths: Sequence[Path],
    processes: Processes,
    all_features: bool,
    vocab_size: int,
) -> "tuple[TokenFolder, TokenFolder, OnlineFeatures]":
    """Both sets without features, and the target that computes them."""
    from vispec.train.online import OnlineFeatures, Pictures, TokenFolder, load_frozen

    folders = {path.parent for path in [*train_paths, *held_out_paths]}
    pictures = Pictures(args.basepath, folders, args.data_folder, args.allow_outside)
    target = load_frozen(args.basepath, args.target_dtype, processes.device)
    online = OnlineFeatures(target, args.max_len, Noise(args.noise, args.seed), all_features)
    train_set, held_out_set = (TokenFolder(paths, pictures, vocab_size) for paths in (train_paths, held_out_paths))
    return train_set, held_out_set, online


def _describe(args: argparse.Namespace, identity: dict, head: BaseHead, epoch: int, line: dict) -> str:
    """The model card of a head after an epoch."""
    untold = ("tmpdir", "loadpath", "target_tables")
    told = {name: value for name, value in identity.items() if value is not None and name not in untold}
    return model_card(head, args.basepath, args.tmpdir, {"epoch": epoch, **told}, line["held_out"])


def _put_embedding(head: BaseHead, embedding: torch.Tensor) -> None:
    if embedding.shape != head.embed_tokens.weight.shape:
        return  # reported with the other sizes
    with torch.no_grad():
        head.embed_tokens.weight.copy_(embedding)


def _compare_configs(asked: DraftConfig, loaded: DraftConfig, args: argparse.Namespace) -> None:
    for name, value in asked.to_dict().items():
        found = getattr(loaded, name, value)
        if name != "extra" and hasattr(asked, name) and found != value and name != "max_position_embeddings":
            raise ValueError(f"--configpath {args.configpath}: {name} is {value!r}, in --loadpath {found!r}")


def _check_target(config: DraftConfig, embedding: torch.Tensor, lm_head: torch.Tensor, args) -> None:
    expected = (config.vocab_size, config.hidden_size)
    for name, table in (("embedding", embedding), ("output head", lm_head)):
        if tuple(table.shape) != expected:
            source = args.configpath or args.loadpath
            raise ValueError(
                f"--basepath {args.basepath}: its {name} is {tuple(table.shape)}, {source} says {expected}"
            )


def _check_scored(paths: Sequence[Path], max_len: int) -> None:
    """Something has to be learned; the first sample says so nearly always."""
    if not any(read_tokens(path).cut(max_len).scored().any() for path in paths):
        raise ValueError(
            f"no token of an answer is scored in any of {len(paths)} training samples, cut to --max-len {max_len}"
        )
