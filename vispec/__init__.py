"""ViSpec: lossless tree speculative decoding for vision-language models (arXiv 2509.15235)."""

from vispec.version import __version__

__all__ = ["SpecModel", "__version__"]


def __getattr__(name: str):
    # importing transformers takes seconds, so `import vispec` does not
    if name == "SpecModel":
        from vispec.model.spec_model import SpecModel

        return SpecModel
    raise AttributeError(f"module 'vispec' has no attribute {name!r}")
