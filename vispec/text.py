"""From token ids to text: whole answers for files, growing answers for the screen."""

import os
from collections.abc import Iterable
from typing import TextIO

DRAFTED, PLAIN = "\x1b[32m", "\x1b[0m"
"""Terminal codes around what the draft head had right (green)."""

INCOMPLETE = "\ufffd"


def answer_text(tokenizer, output_ids: list[int]) -> str:
    """A finished answer: special tokens removed, stripped, a leading "Assistant:" dropped."""
    text = tokenizer.decode(output_ids, skip_special_tokens=True, spaces_between_special_tokens=False).strip()
    return text.removeprefix("Assistant:").strip()


class TextStream:
    """Decodes token by token and gives out only text that is complete.

    A character may be spread over several tokens, and a token's text may depend on the one before it (spaces). So the
    text of a token is what it adds to its predecessors, and nothing is given out while that ends in the middle of a
    character.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """Tokens whose text has been given out."""
        self._context = 0
        """First of the tokens that are decoded together with the next ones."""
        self._blank = True

    def push(self, token_ids: Iterable[int], drafted: Iterable[bool]) -> list[tuple[str, bool]]:
        """New complete text as (text, drafted) pieces; a character of several tokens counts as its last one."""
        pieces = []
        for token, was_drafted in zip(token_ids, drafted, strict=True):
            self._ids.append(token)
            text = self._new_text()
            if text and not text.endswith(INCOMPLETE):
                pieces += self._give_out(text, was_drafted)
        return pieces

    def finish(self) -> list[tuple[str, bool]]:
        """What is left when no token follows, an unfinished character as a replacement character."""
        return self._give_out(self._new_text(), False)

    def _give_out(self, text: str, drafted: bool) -> list[tuple[str, bool]]:
        self._context, self._shown = self._shown, len(self._ids)
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        return [(text, drafted)] if text else []

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, spaces_between_special_tokens=False)


def pieces_of(tokenizer, output_ids: list[int], drafted: list[bool]) -> list[tuple[str, bool]]:
    """A finished answer as (text, drafted) pieces."""
    stream = TextStream(tokenizer)
    return stream.push(output_ids, drafted) + stream.finish()


def coloured(pieces: Iterable[tuple[str, bool]], colour: bool) -> str:
    """Pieces as text for a terminal; with `colour`, drafted ones stand out."""
    return "".join(f"{DRAFTED}{text}{PLAIN}" if drafted and colour else text for text, drafted in pieces)


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours; see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
