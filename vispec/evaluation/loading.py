"""Loading a target with its draft head, for command lines."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from vispec.cli import DTYPES, parse_bool

if TYPE_CHECKING:
    from vispec.model.spec_model import SpecModel


@dataclass(frozen=True)
class Models:
    """A target with the drafts of some methods, and how they are loaded."""

    base_model_path: str
    drafts: Mapping[str, str | None] = field(default_factory=dict)
    """Draft heads by method; None for lookup, which has none."""
    tree: tuple[int, int, int] = (30, 3, 8)
    """total_token, depth, top_k."""
    num_q: int | None = None
    """Queries of a vision adaptor, checked against its weights; None takes what they have."""
    dtype: str = "auto"
    """One of `vispec.cli.DTYPES`."""
    device_map: str | None = None
    """transformers' device_map; None takes the first GPU, all of them if `gpus` > 1, or the CPU."""
    gpus: int = 1


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


MEASURED = -1
"""As --total-token: measure which tree is the fastest, see `SpecModel.tune`."""


def tree_size(text: str) -> int:
    """Nodes of a draft tree from 2 on, or MEASURED."""
    value = int(text) if text.strip().lstrip("+-").isdigit() else 0
    if value < 2 and value != MEASURED:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 2 on, or {MEASURED} to measure which tree is the fastest, found {text!r}"
        )
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


def load_models(models: Models) -> dict[str, "SpecModel"]:
    """The baseline and every method of `models`, over one target."""
    from vispec import SpecModel
    from vispec.model.checkpoints import load_draft
    from vispec.model.lookup import PromptLookup
    from vispec.model.tree import TreeShape

    TreeShape(*models.tree)  # what is wrong is said before minutes of loading
    plain = load_model(models.base_model_path, None, dtype=models.dtype, device_map=models.device_map, gpus=models.gpus)
    target = plain.target
    loaded = {"baseline": plain}
    for method, path in models.drafts.items():
        if method == "lookup":
            draft = PromptLookup()
        else:
            draft = load_draft(path, method, models.num_q, target.dtype, target.embed_tokens.weight).to(target.device)
            if draft.draft_vocab is not None:
                draft.draft_vocab.check_tokenizer(models.base_model_path)
        loaded[method] = SpecModel(target, draft, *models.tree)
    return loaded


def dtype_name(model) -> str:
    """The dtype that a model computes in, as the flag spells it."""
    return str(model.target.dtype).removeprefix("torch.")


def quiet_transformers() -> None:
    """Keep transformers' advice to programmers off the screen of a command line's user."""
    import transformers

    transformers.logging.set_verbosity_error()
