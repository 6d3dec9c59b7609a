"""The flags that say where in its hub repository or folder a draft head is: `--spec-revision`, `--spec-subfolder`."""

import argparse
from collections.abc import Iterable

from vispec.cli import Parser, UserError

FLAGS = {"--spec-revision": "revision", "--spec-subfolder": "subfolder"}
"""And what `vispec.model.drafts.load_draft` calls them."""
_HELP = {
    "--spec-revision": "branch, tag or commit of the draft head's hub repository",
    "--spec-subfolder": "folder of the draft head within --spec-model-path",
}


def add_place_flags(parser: Parser, **several) -> None:
    """Flags that `asked_place` reads; `several` makes them take METHOD=VALUE pairs."""
    for flag, what in _HELP.items():
        parser.add_argument(flag, help=what, **several)


def asked_place(args: argparse.Namespace) -> dict[str, str]:
    """Those of revision and subfolder that were given.

    Raises:
        UserError: one was given without --spec-model-path.
    """
    given = {flag: value for flag in FLAGS if (value := value_of(args, flag)) is not None}
    if given and args.spec_model_path is None:
        raise UserError(f"{' and '.join(given)} without --spec-model-path: there is no draft head to look for")
    return {FLAGS[flag]: value for flag, value in given.items()}


def asked_places(args: argparse.Namespace, methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """The same by method, of flags that take METHOD=VALUE pairs.

    Args:
        methods: those that have a --spec-model-path.

    Raises:
        UserError: another method is named, or one twice.
    """
    places: dict[str, dict[str, str]] = {}
    for flag, name in FLAGS.items():
        for method, value in value_of(args, flag) or ():
            if method not in methods:
                raise UserError(f"{flag} {method}={value}: there is no --spec-model-path {method}=PATH")
            if name in places.setdefault(method, {}):
                raise UserError(f"{flag}: found two values for {method}, expected one")
            places[method][name] = value
    return places


def value_of(args: argparse.Namespace, flag: str):
    return getattr(args, flag.strip("-").replace("-", "_"))
