"""The version, by itself: `vispec` leads to the model, which a command line need not know."""

__version__ = "0.1.0"
