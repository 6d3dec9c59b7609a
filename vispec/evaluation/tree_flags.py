"""The flags that say which trees are drafted: `--tree`, and the published three in its place."""

import argparse

from vispec.cli import Parser, UserError, count
from vispec.evaluation.loading import Tree, parse_tree
from vispec.model.shape import AUTO, TUNE

MEASURED = -1
"""As --total-token: what --tree tune is."""
SIZES = {"--total-token": "total_token", "--depth": "depth", "--top-k": "top_k"}


def add_tree_flags(parser: Parser, default: str) -> None:
    """Flags that `asked_tree` reads; `default`: what the help says of a command that is given none of them."""
    add = parser.add_argument
    add(
        "--tree",
        type=_tree,
        metavar="N/d/k|tune|auto",
        help="the draft tree by --total-token/--depth/--top-k, such as 30/3/8; tune measures which one is the fastest; "
        f"auto chooses while it answers, plain decoding too (default: {default})",
    )
    add(
        "--total-token",
        type=_total_token,
        help="nodes of the draft tree, its root included; -1 measures which tree is fastest, depth and top-k too",
    )
    add("--depth", type=int, help="expansions of the tree after its first level")
    add("--top-k", type=count, help="nodes expanded a level of the tree")


def asked_tree(args: argparse.Namespace, shape: Tree, default: Tree | str | None = None) -> Tree | str:
    """What the flags of `add_tree_flags` ask for.

    Args:
        shape: of it are the sizes that are not given where others are.
        default: without any flag; None is `shape`.

    Raises:
        UserError: --tree and another one were given.
    """
    given = [flag for flag, name in SIZES.items() if getattr(args, name) is not None]
    if args.tree is not None:
        if given:
            raise UserError(f"--tree and {', '.join(given)} both say what the tree is, expected only one of them")
        return args.tree
    if args.total_token == MEASURED:
        return TUNE
    if not given:
        return shape if default is None else default
    sizes = (getattr(args, name) for name in SIZES.values())
    return tuple(own if asked is None else asked for asked, own in zip(sizes, shape, strict=True))


def _tree(text: str) -> Tree | str:
    return text if text in (AUTO, TUNE) else parse_tree(text)


def _total_token(text: str) -> int:
    """Nodes of a draft tree from 2 on, or MEASURED."""
    value = int(text) if text.strip().lstrip("+-").isdigit() else 0
    if value < 2 and value != MEASURED:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 2 on, or {MEASURED} to measure which tree is the fastest, found {text!r}"
        )
    return value
