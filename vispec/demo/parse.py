"""From an answer's text to the (colour, shape, place) triples that it claims.

An object is a colour directly followed by a shape; a place is one of the fixed names of `phrases.PLACES`. Within a
sentence an object is paired with the first place after it that comes before the next object, or else with a free place
before it. An object without a place, or a place without an object, claims nothing.
"""

import re

from vispec.demo.phrases import PLACES
from vispec.demo.scenes import COLOURS, SHAPES

Triple = tuple[str, str, int]

_PLACE_OF = {name: place for style in PLACES for place, name in enumerate(style)}
_PLACE_NAMES = "|".join(sorted(map(re.escape, _PLACE_OF), key=len, reverse=True))
_MENTION = re.compile(
    rf"\b(?P<colour>{'|'.join(COLOURS)})\s+(?P<shape>{'|'.join(SHAPES)})\b"
    rf"|\b(?P<place>{_PLACE_NAMES})\b"
)
_SENTENCE_END = re.compile(r"[.!?:]\s+|[.!?:]$")


def _claims(sentence: str) -> set[Triple]:
    """A sentence that names an object first names its places after their objects, any other one before them."""
    mentions = [m.groupdict() for m in _MENTION.finditer(sentence)]
    used: set[int] = set()
    claims = set()
    for i, mention in enumerate(mentions):
        if mention["place"]:
            continue
        after = i + 1 if i + 1 < len(mentions) and mentions[i + 1]["place"] else None
        before = i - 1 if i > 0 and mentions[i - 1]["place"] and i - 1 not in used else None
        where = after if before is None or not mentions[0]["place"] else before
        if where is not None:
            used.add(where)
            claims.add((mention["colour"], mention["shape"], _PLACE_OF[mentions[where]["place"]]))
    return claims


def parse(text: str) -> set[Triple]:
    """All triples that the text claims."""
    return set().union(*map(_claims, _SENTENCE_END.split(text.lower())))
