"""What callers hand over, checked once where they arrive: an error names the argument."""

import math
from numbers import Integral, Real


def whole(name: str, value, least: int | None = None) -> int:
    """A whole number, from `least` on.

    Raises:
        TypeError: it is none, or a bool.
        ValueError: it is smaller, or not finite.
    """
    found = number(name, value)
    if found != int(found):
        raise TypeError(f"{name} must be a whole number, found {value!r}")
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, found {value}")
    return int(found)


def of_kind(name: str, value, *kinds: type) -> None:
    """TypeError where a value is of none of these kinds; None is of all."""
    if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        asked = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be {asked}, found {value!r:.60}")


def number(name: str, value) -> int | float:
    """A finite number.

    Raises:
        TypeError: it is none, or a bool.
        ValueError: it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, found {value!r}")
    if isinstance(value, Integral):
        return int(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, found {value}")
    return float(value)
