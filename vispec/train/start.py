"""The draft head that a training command begins with, or goes on with."""

import argparse
import logging
from dataclasses import fields, replace
from pathlib import Path

import torch

from vispec.cli import one_line
from vispec.model.drafts import BaseHead, SpecVLMHead, ViSpecHead, build_head, load_draft
from vispec.model.drafts.checkpoints import identify, read_config
from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.specvlm import KEY
from vispec.model.drafts.vocabulary import DraftVocabulary
from vispec.train.states import RESUME_FILE, refuse_others

UNCOMPARED = ("extra", "max_position_embeddings")
"""Of a config: what changes nothing in a head."""

logger = logging.getLogger("vispec")


def head_to_train(
    args: argparse.Namespace,
    method: str,
    num_q: int | None,
    embedding: torch.Tensor,
    lm_head: torch.Tensor,
    state: dict | None,
) -> BaseHead:
    """In float32, with the target's own embedding table.

    Args:
        embedding, lm_head: (V, H) the target's.
        state: what the run has left to go on from, which holds the trained weights; None where it begins.

    Raises:
        ValueError: the flags do not fit together, or the head does not fit the target.
    """
    torch.manual_seed(args.seed)
    config = read_config(args.configpath) if args.configpath else None
    if state is not None:
        head = _empty_head(Path(args.cpdir), method, state)
    elif args.loadpath is not None:
        head = _loaded_head(args, method, num_q, embedding.float(), config)
    elif config is not None:
        head = _new_head(args, method, num_q, config)
    else:
        raise ValueError("--configpath is needed where there is no --loadpath to start from")
    if config is not None:
        _compare(_new_config(args, method, config), head.config, args.configpath)
    if isinstance(head, SpecVLMHead):
        _compare_compressors(args, config, head)
    sizes = (head.config.vocab_size, head.config.hidden_size)
    for name, table in (("embedding", embedding), ("output head", lm_head)):
        if tuple(table.shape) != sizes:
            raise ValueError(
                f"--basepath {args.basepath}: its {name} is {tuple(table.shape)}, the draft head's {sizes}"
            )
    head.embed_tokens = torch.nn.Embedding.from_pretrained(embedding.float())
    return head


def _new_config(args: argparse.Namespace, method: str, config: DraftConfig) -> DraftConfig:
    """Of a head whose training begins; --compressor is of main_mtp alone."""
    mode = getattr(args, "compressor", None)
    try:
        return BaseHead.kinds[method].new_config(config, **({"mode": mode} if mode else {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--configpath {args.configpath}: {error}") from None


def _new_head(args: argparse.Namespace, method: str, num_q: int | None, config: DraftConfig) -> BaseHead:
    head = BaseHead.kinds[method](_new_config(args, method, config), **({"num_q": num_q} if num_q else {}))
    if isinstance(head, ViSpecHead):
        logger.warning("no --loadpath: the head starts from random weights")
        head.reset_image_parameters()
    return head


def _loaded_head(
    args: argparse.Namespace, method: str, num_q: int | None, embedding: torch.Tensor, config: DraftConfig | None
) -> BaseHead:
    """That of --loadpath; an EAGLE-2 head becomes one of ViSpec or SpecVLM, whose other parts begin as in training."""
    path = args.loadpath
    # MSD's heads have EAGLE-2's tensors, so either may become one
    asked = method if method == "msd" else None
    loaded = load_draft(path, asked, dtype=torch.float32, embedding=embedding)
    if isinstance(loaded, ViSpecHead) and loaded.norm is not None:
        raise ValueError(f"--loadpath {path}: a head of NeMo AutoModel, whose final norm is not trained here")
    if loaded.method == method:
        if num_q is not None and num_q != loaded.num_q:
            raise ValueError(f"--num-q {num_q}: the head in --loadpath {path} has num_q {loaded.num_q}")
        return loaded
    if loaded.method != "eagle2" or method not in ("vispec", "specvlm"):
        raise ValueError(f"--loadpath {path} is a {loaded.method} head, this command trains {method}")
    if method == "specvlm":
        described = _new_config(args, method, config or loaded.config).extra[KEY]
        head = SpecVLMHead(replace(loaded.config, extra={**loaded.config.extra, KEY: described}))
        head.load_state_dict(loaded.state_dict(), strict=False)
        return head
    head = ViSpecHead(loaded.config, num_q or 2)
    head.load_state_dict(loaded.state_dict(), strict=False)
    head.reset_image_parameters()
    return head


def _empty_head(cpdir: Path, method: str, state: dict) -> BaseHead:
    """As the run has it, to be filled with its weights."""
    identity, path = state["identity"], cpdir / RESUME_FILE
    refuse_others(cpdir, {"method": identity.get("method")}, {"method": method})
    try:
        config = DraftConfig.from_dict(identity.get("config", {}), source=str(path))
        head = build_head(config, **identify(state["head"], config, path, method, None)).to_empty(device="cpu")
    except (TypeError, ArithmeticError, RuntimeError, IndexError) as error:  # of numbers that are none, or impossible
        raise ValueError(f"{path}: no head has the config that it holds ({one_line(error)})") from None
    if state["draft_vocab"]:
        head.draft_vocab = DraftVocabulary(**state["draft_vocab"])
    return head


def _compare_compressors(args: argparse.Namespace, asked: DraftConfig | None, head: SpecVLMHead) -> None:
    found, described = head.config.extra[KEY], asked.extra.get(KEY) if asked else None
    if args.compressor not in (None, found["mode"]):
        raise ValueError(f"--compressor {args.compressor}: the draft head's is {found['mode']}")
    if described not in (None, found):
        raise ValueError(f"--configpath {args.configpath}: {KEY} is {described}, the draft head's {found}")


def _compare(asked: DraftConfig, found: DraftConfig, path: str) -> None:
    for name in (field.name for field in fields(asked) if field.name not in UNCOMPARED):
        if getattr(asked, name) != getattr(found, name):
            raise ValueError(
                f"--configpath {path}: {name} is {getattr(asked, name)!r}, the draft head's {getattr(found, name)!r}"
            )
