"""ViSpec: lossless tree speculative decoding for vision-language models (arXiv 2509.15235)."""

import sys
from typing import TYPE_CHECKING

from vispec.model.shape import TreeShape
from vispec.version import __version__

if sys.argv[:1] == ["-m"]:  # python -m is looking for a command of ours, which then imports for seconds
    from vispec.cli import tell_interrupts

    tell_interrupts()

if TYPE_CHECKING:  # what editors and type checkers see of `__getattr__`
    from vispec.model.spec_model import SpecModel

__all__ = ["SpecModel", "TreeShape", "__version__"]


def __getattr__(name: str):
    # importing transformers takes seconds, so `import vispec` does not
    if name == "SpecModel":
        from vispec.model.spec_model import SpecModel

        return SpecModel
    raise AttributeError(f"module 'vispec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
