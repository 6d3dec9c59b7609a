"""Loading a target with its draft head, for command lines."""

import argparse
from typing import NoReturn

from vispec.cli import DTYPES, parse_bool


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag, and takes no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")

    def add_bool(self, flag: str, help: str) -> None:
        """A flag that is given as `--flag=True`; `--flag` alone means True."""
        self.add_argument(flag, type=parse_bool, nargs="?", const=True, default=False, metavar="True|False", help=help)

    def add_hardware(self, dtype: str | None = "auto") -> None:
        """Flags for how the target is loaded."""
        self.add_argument("--dtype", choices=DTYPES, default=dtype, help="auto: that of the target's files")
        self.add_argument(
            "--device-map",
            help="cpu, cuda:0, auto (spread over all GPUs), …; default: the first GPU if there is one",
        )


def count(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text) if text.strip().lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return value


def load_model(
    base_model_path: str,
    spec_model_path: str | None,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    gpus: int = 1,
    **options,
):
    """A `SpecModel`; `options` go to its `from_pretrained` (method, tree, num_q).

    Args:
        dtype: one of `vispec.cli.DTYPES`.
        device_map: transformers' device_map; None takes the first GPU, all of them if `gpus` > 1, or the CPU.
    """
    import torch

    from vispec import SpecModel

    if device_map is None and torch.cuda.is_available():
        device_map = "auto" if gpus > 1 else "cuda"
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    options = {name: value for name, value in options.items() if value is not None}
    return SpecModel.from_pretrained(
        base_model_path, spec_model_path, torch_dtype=torch_dtype, device_map=device_map, **options
    )


def dtype_name(model) -> str:
    """The dtype that a model computes in, as the flag spells it."""
    return str(model.target.dtype).removeprefix("torch.")


def quiet_transformers() -> None:
    """Keep transformers' advice to programmers off the screen of a command line's user."""
    import transformers

    transformers.logging.set_verbosity_error()
