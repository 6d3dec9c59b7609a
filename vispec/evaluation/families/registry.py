"""All families that are tried, by the name of their row."""

from vispec.evaluation.families import grids, others, squares, tiles, windows
from vispec.evaluation.families.family import Family

FAMILIES: dict[str, Family] = squares.FAMILIES | tiles.FAMILIES | grids.FAMILIES | windows.FAMILIES | others.FAMILIES
