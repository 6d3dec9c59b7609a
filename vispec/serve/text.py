"""The text of a growing answer, of which nothing is told while a stop string may be forming; texts of tokens."""

from collections.abc import Sequence

from vispec.text import TextStream

Piece = tuple[str, bool]
"""Text, and whether the draft had it right."""


class StoppedText:
    """Text that ends before the first stop string.

    Args:
        stops: none of them empty.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self._stream, self._stops = TextStream(tokenizer), stops
        self._held: list[Piece] = []
        self.stopped = False
        """Whether a stop string has come."""

    def push(self, token: int, drafted: bool) -> list[Piece]:
        """What a token adds to the text that can be told."""
        return self._tell(self._stream.push([token], [drafted]))

    def finish(self) -> list[Piece]:
        """What is left when no token follows."""
        told = self._tell(self._stream.finish())
        left, self._held = self._held, []
        return told if self.stopped else told + left

    def _tell(self, pieces: list[Piece]) -> list[Piece]:
        if self.stopped:
            return []
        pieces = self._held + pieces
        text = "".join(piece for piece, _ in pieces)
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        told, held = _split(pieces, min(found) if found else len(text) - self._forming(text))
        self._held = [] if self.stopped else held
        return told

    def _forming(self, text: str) -> int:
        """How many characters at the end of a text may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


def _split(pieces: list[Piece], length: int) -> tuple[list[Piece], list[Piece]]:
    """The first `length` characters, and the others."""
    first, others = [], []
    for text, drafted in pieces:
        first += [(text[:length], drafted)] if text[:length] else []
        others += [(text[length:], drafted)] if text[length:] else []
        length = max(length - len(text), 0)
    return first, others


class TokenTexts:
    """What tokens add to a text behind others: by itself, a token of Llama's kind has no space before it."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        [*_, self._before] = tokenizer.encode("0", add_special_tokens=False)

    def __getitem__(self, token: int) -> str:
        return self._tokenizer.decode([self._before, token])[len("0") :]
