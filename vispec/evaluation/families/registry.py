"""All families that are tried, by the name of their row."""

from vispec.evaluation.families import further, grids, newest, others, squares, tiles, windows
from vispec.evaluation.families.family import Family

FAMILIES: dict[str, Family] = {
    name: family
    for part in (squares, tiles, grids, windows, others, further, newest)
    for name, family in part.FAMILIES.items()
}
