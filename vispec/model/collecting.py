"""From rounds to what `generate`, `specgenerate`, `baseline_generate` and `stream` return."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from vispec.model.rows import Round
from vispec.model.target import Target
from vispec.timing import now


@dataclass
class StreamedTokens:
    """What one round of `SpecModel.stream` brings."""

    token_ids: list[int]
    drafted: list[bool]
    """Which of them the draft head had right; the others are the target's own."""
    accepted: int | None
    """Draft tokens that verification accepted, before the answer's end cut any of them off; None without a draft."""
    levels: int = 0
    """Of the tree that was drafted, a pass of the draft each where it drafts level by level; 0 without a draft."""


def streamed(rounds: Iterator[dict[int, Round]]) -> Iterator[StreamedTokens]:
    """The rounds of a single prompt; closing this closes them at once, whoever else may know them."""
    with closing(rounds):
        for step in rounds:
            tokens, accepted = step[0].tokens, step[0].accepted
            drafted = [i < accepted for i in range(len(tokens))]
            yield StreamedTokens(tokens, drafted, accepted if step[0].drafted else None, step[0].levels)


def collected(
    rounds: Iterator[dict[int, Round]],
    input_ids: torch.Tensor,
    target: Target,
    log: bool,
    return_acceptance_len: bool,
    return_decode_time: bool,
):
    """Run the rounds of a batch; returns what `SpecModel.specgenerate` says."""
    answers = [step.tokens for step in next(rounds).values()]
    start = now(target.device)
    acceptance_lengths: list[list[int]] = [[] for _ in answers]
    last_rounds = [-1 for _ in answers]
    for steps in rounds:
        for row, step in steps.items():
            answers[row] += step.tokens
            last_rounds[row] += 1
            if step.drafted:
                acceptance_lengths[row].append(step.accepted)
    seconds = now(target.device) - start
    result = [torch.cat([input_ids, _padded(answers, target).to(input_ids)], dim=1)]
    per_row = []
    if log:
        per_row += [[len(tokens) for tokens in answers], last_rounds]
    if return_acceptance_len:
        per_row.append(acceptance_lengths)
    result += per_row if len(answers) > 1 else [values[0] for values in per_row]
    if return_decode_time:
        result.append(seconds)
    return result[0] if len(result) == 1 else tuple(result)


def _padded(answers: list[list[int]], target: Target) -> torch.Tensor:
    """(B, longest) answers, padded on the right by the target's padding token; by an end token if it has none."""
    padding = target.model.generation_config.pad_token_id
    if padding is None:
        padding = (target.eos_token_ids or [0])[0]
    return pad_sequence([torch.tensor(tokens) for tokens in answers], batch_first=True, padding_value=padding)


class Columns:
    """The answers of all rows, token by token: what generate() would have after each of its steps.

    Args:
        ends: its `longest` says where all rows end together; None: each where it does.
        padding: token behind an answer.
        streamer: is given each column once it is there; None: nobody is.
    """

    def __init__(self, rows: int, ends, padding: int, streamer):
        self.answers: list[list[int]] = [[] for _ in range(rows)]
        self._going = set(range(rows))
        self._ends, self._padding, self._streamer = ends, padding, streamer
        self._shown = 0

    def add(self, step: dict[int, Round]) -> None:
        for row, one in step.items():
            self.answers[row] += one.tokens
            if one.ended:
                self._going.discard(row)
        if self._streamer is None:
            return
        lengths = [len(self.answers[row]) for row in self._going]
        ready = min([self._longest(), *lengths])
        for place in range(self._shown, ready):
            self._streamer.put(torch.tensor(self._column(place)))
        self._shown = max(self._shown, ready)

    def tensor(self) -> torch.Tensor:
        """(B, new)."""
        columns = [self._column(place) for place in range(self._longest())]
        return torch.tensor(columns).T

    def lengths(self) -> list[int]:
        return [min(len(tokens), self._longest()) for tokens in self.answers]

    def _longest(self) -> int:
        together = self._ends.longest
        return max(map(len, self.answers)) if together is None else together

    def _column(self, place: int) -> list[int]:
        return [tokens[place] if place < len(tokens) else self._padding for tokens in self.answers]
