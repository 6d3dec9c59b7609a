"""A draft head's config for any target: `python -m vispec.train.config TARGET > config.json`.

Only the target's config is read. The head gets the width, the vocabulary and the attention of the target's text
decoder, with keys and values for every head of its one layer, as the published heads have them.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from vispec.cli import Parser, UserError, run_cli

if TYPE_CHECKING:
    from vispec.model.drafts.config import DraftConfig
    from vispec.model.target import Target

QUERY_BIASES = ("q_proj.bias", "qkv_proj.bias", "query_key_value.bias")
"""Ends of the names that families give it."""


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    from vispec.model.loading import load_outline
    from vispec.model.target import Target

    outline = load_outline(args.target)
    try:
        config = draft_config(Target(outline, fast=False))
    except ValueError as error:
        raise UserError(f"{args.target}: {error}") from None
    json.dump(config.to_dict(), sys.stdout, indent=2)
    print()
    return 0


def draft_config(target: "Target") -> "DraftConfig":
    """The config of a head for a target, of which only modules and config are asked, no weight.

    Raises:
        ValueError: a head cannot learn from it, or its config lacks a size.
    """
    from vispec.model.drafts.config import DraftConfig

    text = target.text_config
    vocabulary, hidden = target.embed_tokens.weight.shape
    output = tuple(target.lm_head.weight.shape)
    if output != (vocabulary, hidden):
        raise ValueError(f"its output head is {output}, its embedding {(vocabulary, hidden)}; a head needs them alike")
    heads = _heads(text, hidden)
    return DraftConfig(
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        rms_norm_eps=getattr(text, "rms_norm_eps", None) or getattr(text, "layer_norm_eps", None) or 1e-6,
        max_position_embeddings=target.max_positions,
        rope_theta=_rope_theta(text),
        qkv_bias=any(name.endswith(QUERY_BIASES) for name, _ in target.decoder.layers[0].named_parameters()),
    )


def _intermediate_size(text) -> int:
    """Of the layers' widths the largest, where they differ."""
    sizes = getattr(text, "intermediate_size", None)
    if not sizes:
        raise ValueError("its config has no intermediate_size, so how wide a head's layer should be is not known")
    return max(sizes) if isinstance(sizes, list | tuple) else sizes


def _heads(text, hidden: int) -> int:
    """As many as the target has, or so many more that each has an even width: rotary embedding turns pairs."""
    asked = text.num_attention_heads
    if fitting := [heads for heads in range(asked, hidden + 1) if hidden % (2 * heads) == 0]:
        return fitting[0]
    raise ValueError(f"its hidden size {hidden} cannot be divided into {asked} or more heads of an even width")


def _rope_theta(text) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}  # transformers 5
    parameters = parameters.get("full_attention", parameters)
    theta = parameters.get("rope_theta") or getattr(text, "rope_theta", None)
    return float(theta or 10000.0)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m vispec.train.config", description="Print the config.json of a draft head for a target."
    )
    parser.add_argument("target", help="a folder or a hub id; its config is read, no weights")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
