"""Flags that several commands have, and what is read from them."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace

from vispec.cli import Parser, UserError, count, number, share, whole
from vispec.model import adaptive
from vispec.model.shape import AUTO, TUNE, TreeShape

PLACES = {"--spec-revision": "revision", "--spec-subfolder": "subfolder"}
"""And what `vispec.model.drafts.load_draft` calls them."""
_PLACE_HELP = {
    "--spec-revision": "branch, tag or commit of the draft head's hub repository",
    "--spec-subfolder": "folder of the draft head within --spec-model-path",
}
MEASURED = -1
"""As --total-token: what --tree tune is."""
SIZES = {"--total-token": "total_token", "--depth": "depth", "--top-k": "top_k"}


# --- questions, and how they are answered ---


def add_common_flags(parser: Parser) -> None:
    """Flags of every command that answers questions."""
    add = parser.add_argument
    add("--max-new-token", type=count, default=1024, help="most new tokens of an answer")
    parser.add_bool(
        "--generation-config",
        "apply what else the target's generation config says, such as penalties and top_k; temperature and length "
        "stay those of the flags (default: nothing of it but end tokens)",
    )
    add("--prefix-cache", type=whole, default=0, metavar="TOKENS",
        help="in conversations: keep prompts of so many tokens, from which each arm reads its next turn on (default: "
        "all turns are read whole)")  # fmt: skip
    add("--question-begin", type=whole, help="first question, counted from 0")
    add("--question-end", type=whole, help="question to stop before")
    add("--num-gpus-per-model", type=count, default=1, help="GPUs that the target is spread over")
    add("--num-gpus-total", type=count, default=1, help="as many models share the questions (needs Ray)")
    parser.add_hardware()


def asked_part(args: argparse.Namespace, name: str, total: int) -> slice:
    """The part of a benchmark's questions that the flags of `add_common_flags` ask for.

    Raises:
        UserError: it is empty.
    """
    part = slice(args.question_begin, args.question_end)
    if not range(total)[part]:
        raise UserError(
            f"--question-begin {args.question_begin}, --question-end {args.question_end}: no question of {name} lies "
            f"there, it has {total}"
        )
    return part


# --- where a draft head is ---


def add_place_flags(parser: Parser, **several) -> None:
    """Flags that `asked_place` reads; `several` makes them take METHOD=VALUE pairs."""
    for flag, what in _PLACE_HELP.items():
        parser.add_argument(flag, help=what, **several)


def asked_place(args: argparse.Namespace) -> dict[str, str]:
    """Those of revision and subfolder that were given.

    Raises:
        UserError: one was given without --spec-model-path.
    """
    given = {flag: value for flag in PLACES if (value := value_of(args, flag)) is not None}
    if given and args.spec_model_path is None:
        raise UserError(f"{' and '.join(given)} without --spec-model-path: there is no draft head to look for")
    return {PLACES[flag]: value for flag, value in given.items()}


def asked_places(args: argparse.Namespace, methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """The same by method, of flags that take METHOD=VALUE pairs.

    Args:
        methods: those that have a --spec-model-path.

    Raises:
        UserError: another method is named, or one twice.
    """
    places: dict[str, dict[str, str]] = {}
    for flag, name in PLACES.items():
        for method, value in value_of(args, flag) or ():
            if method not in methods:
                raise UserError(f"{flag} {method}={value}: there is no --spec-model-path {method}=PATH")
            if name in places.setdefault(method, {}):
                raise UserError(f"{flag}: found two values for {method}, expected one")
            places[method][name] = value
    return places


def value_of(args: argparse.Namespace, flag: str):
    return getattr(args, flag.strip("-").replace("-", "_"))


def add_image_rows(parser: Parser) -> None:
    parser.add_argument(
        "--draft-image-rows",
        type=share,
        metavar="SHARE",
        help="of a smaller VLM as the draft: the share of each image's rows that it keeps, such as 0.2 (default: all)",
    )


# --- which trees are drafted ---


def parse_tree(text: str, parse: Callable[[str], TreeShape] = adaptive.parse_tree) -> TreeShape:
    """A draft tree as command lines write it."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_shape(text: str) -> TreeShape:
    """One that has all its levels in every round: total_token/depth/top_k."""
    return parse_tree(text, TreeShape.parse)


def add_tree_flags(parser: Parser, default: str) -> None:
    """Flags that `asked_tree` reads; `default`: what the help says of a command that is given none of them."""
    add = parser.add_argument
    add(
        "--tree",
        type=_tree,
        metavar="N/d/k|RULE|tune|auto",
        help="the draft tree by --total-token/--depth/--top-k, such as 30/3/8, or by the rule that grows it, "
        f"{', '.join(adaptive.RULES)}, with what differs from its defaults, such as talon:mu=0.04,n=40; tune measures "
        f"which one is the fastest; auto chooses while it answers, plain decoding too (default: {default})",
    )
    add(
        "--total-token",
        type=_total_token,
        help="nodes of the draft tree, its root included; -1 measures which tree is fastest, depth and top-k too",
    )
    add("--depth", type=int, help="expansions of the tree after its first level")
    add("--top-k", type=count, help="nodes expanded a level of the tree")
    add(
        "--skip-visual",
        type=number,
        metavar="R",
        help="ViSkip: a plain step in place of a draft where the last layer's attention to the images is at least R; "
        "published: 0.35 (default: never)",
    )


def asked_tree(args: argparse.Namespace, shape: TreeShape, default: TreeShape | str | None = None) -> TreeShape | str:
    """What the flags of `add_tree_flags` ask for.

    Args:
        shape: of it are the sizes that are not given where others are.
        default: without any flag; None is `shape`.

    Raises:
        UserError: --tree and another one were given.
        ValueError: no tree has these sizes.
    """
    given = {flag: size for flag in SIZES if (size := value_of(args, flag)) is not None}
    if args.tree is not None:
        if given:
            raise UserError(f"--tree and {', '.join(given)} both say what the tree is, expected only one of them")
        return args.tree
    if args.total_token == MEASURED:
        return TUNE
    if not given:
        return shape if default is None else default
    return replace(shape, **{SIZES[flag]: size for flag, size in given.items()})


def _tree(text: str) -> TreeShape | str:
    return text if text in (AUTO, TUNE) else parse_tree(text)


def _total_token(text: str) -> int:
    """Nodes of a draft tree from 2 on, or MEASURED."""
    value = int(text) if text.strip().lstrip("+-").isdigit() else 0
    if value < 2 and value != MEASURED:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 2 on, or {MEASURED} to measure which tree is the fastest, found {text!r}"
        )
    return value
