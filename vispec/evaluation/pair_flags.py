"""Flags of commands that answer with one pair: any target with its draft, the embedded one without any of them."""

import argparse

from vispec import embedded
from vispec.cli import Parser, UserError
from vispec.evaluation.flags import add_image_rows, add_place_flags, asked_tree
from vispec.evaluation.loading import Models
from vispec.methods import LOOKUP, MODELS
from vispec.model.shape import AUTO, TreeShape


def add_pair_flags(parser: Parser) -> None:
    """Flags of the target and its draft; `asked_pair` reads them, and those of a tree and of the hardware."""
    add = parser.add_argument
    add("--base-model-path", help="the target: a folder or a hub id (default: the embedded one)")
    add("--spec-model-path", help="its draft head, or a smaller VLM: a folder or a hub id")
    add_place_flags(parser)
    add_image_rows(parser)
    add(
        "--method",
        choices=(*MODELS, LOOKUP),
        help="read from the files; vlm: a whole smaller VLM; lookup drafts from the text",
    )


def asked_pair(args: argparse.Namespace) -> tuple[str, str | None, TreeShape | str, str]:
    """Paths of target and draft head (none for lookup), the tree, and the dtype."""
    base, spec = args.base_model_path, args.spec_model_path
    if args.method == LOOKUP:
        if spec is not None:
            raise UserError(f"--spec-model-path {spec}: --method lookup has no draft head")
    elif (base is None) != (spec is None):
        raise UserError("--base-model-path and --spec-model-path belong together, found only one of them")
    dtype, shape = args.dtype or "auto", Models.tree
    if base is None:
        base, spec = embedded.require_weights()
        spec = None if args.method == LOOKUP else spec
        dtype, shape = args.dtype or embedded.DTYPE, embedded.TREE
    return base, spec, asked_tree(args, shape, AUTO), dtype
