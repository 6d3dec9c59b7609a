"""The draft head that a training command begins with, or goes on with."""

import argparse
import logging
from dataclasses import fields
from pathlib import Path

import torch

from vispec.cli import one_line
from vispec.model.drafts import BaseHead, ViSpecHead, build_head, load_draft
from vispec.model.drafts.checkpoints import identify, read_config
from vispec.model.drafts.config import DraftConfig
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
    config = BaseHead.kinds[method].new_config(read_config(args.configpath)) if args.configpath else None
    if state is not None:
        head = _empty_head(Path(args.cpdir), method, state)
    elif args.loadpath is not None:
        head = _loaded_head(args.loadpath, method, num_q, embedding.float())
    elif config is not None:
        head = _new_head(config, method, num_q)
    else:
        raise ValueError("--configpath is needed where there is no --loadpath to start from")
    if config is not None:
        _compare(config, head.config, args.configpath)
    sizes = (head.config.vocab_size, head.config.hidden_size)
    for name, table in (("embedding", embedding), ("output head", lm_head)):
        if tuple(table.shape) != sizes:
            raise ValueError(
                f"--basepath {args.basepath}: its {name} is {tuple(table.shape)}, the draft head's {sizes}"
            )
    head.embed_tokens = torch.nn.Embedding.from_pretrained(embedding.float())
    return head


def _new_head(config: DraftConfig, method: str, num_q: int | None) -> BaseHead:
    head = BaseHead.kinds[method](config, **({"num_q": num_q} if num_q else {}))
    if isinstance(head, ViSpecHead):
        logger.warning("no --loadpath: the head starts from random weights")
        head.reset_image_parameters()
    return head


def _loaded_head(path: str, method: str, num_q: int | None, embedding: torch.Tensor) -> BaseHead:
    """That of --loadpath; an EAGLE-2 head becomes a ViSpec head, whose adaptor and img_fc begin as in training."""
    # MSD's heads have EAGLE-2's tensors, so either may become one
    asked = method if method == "msd" else None
    loaded = load_draft(path, asked, dtype=torch.float32, embedding=embedding)
    if isinstance(loaded, ViSpecHead) and loaded.norm is not None:
        raise ValueError(f"--loadpath {path}: a head of NeMo AutoModel, whose final norm is not trained here")
    if loaded.method == method:
        if num_q is not None and num_q != loaded.num_q:
            raise ValueError(f"--num-q {num_q}: the head in --loadpath {path} has num_q {loaded.num_q}")
        return loaded
    if (loaded.method, method) != ("eagle2", "vispec"):
        raise ValueError(f"--loadpath {path} is a {loaded.method} head, this command trains {method}")
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


def _compare(asked: DraftConfig, found: DraftConfig, path: str) -> None:
    for name in (field.name for field in fields(asked) if field.name not in UNCOMPARED):
        if getattr(asked, name) != getattr(found, name):
            raise ValueError(
                f"--configpath {path}: {name} is {getattr(asked, name)!r}, the draft head's {getattr(found, name)!r}"
            )
