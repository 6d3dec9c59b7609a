"""Answers that begin and end at any time, each chosen in a way of its own, on one decoder.

B rows, N nodes of a tree, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from vispec.model.batches import SinglePrompt, new_token_limits, single_prompts
from vispec.model.decoding import Decoder
from vispec.model.inputs import prompt_inputs
from vispec.model.policies import Policy
from vispec.model.processors import TextChoice, refuse_processors
from vispec.model.rows import Answer, Round, Stop
from vispec.model.sampling import Choice, Sampling, row_seeds
from vispec.model.target import Target
from vispec.model.tree import Tree


@dataclass(frozen=True)
class Joining:
    """A prompt, when its answer ends, and how its tokens are chosen; made by `OpenBatch.prepare`."""

    prompt: SinglePrompt
    stop: Stop
    choice: Choice
    """Of one row."""

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.prompt[0].shape[1]

    def take_logits(self, tokens: int) -> list[torch.Tensor]:
        """The target's own logits (V,), before processors and temperature, of the last round's tokens.

        There are some where `prepare` was asked to keep them.
        """
        kept = self.choice.kept[0]
        logits = [own for own, _ in kept[:tokens]]
        kept.clear()
        return logits


class RowChoices(Choice):
    """Each row's tokens by a choice of its own; greedy rows together."""

    def __init__(self):
        super().__init__()
        self.of: dict[int, Choice] = {}
        self.errors: dict[int, Exception] = {}
        """Of rows whose own choice failed: the other rows go on."""

    def choose(self, logits: torch.Tensor, answers: Sequence[Answer], tree: Tree | None = None) -> torch.Tensor:
        chosen = super().choose(logits, answers)
        for place, answer in enumerate(answers):
            choice = self.of[answer.row]
            if choice.seeds is not None or choice.warpers or isinstance(choice, TextChoice):
                own = slice(place, place + 1)
                row = None if tree is None else Tree(*(tensor[own] for tensor in tree))
                try:
                    chosen[own] = choice.choose(logits[own], [replace(answer, row=0)], row)
                except Exception as error:  # of somebody's processors
                    self.errors[answer.row] = error
        return chosen


class OpenBatch:
    """A batch whose answers join and leave between two rounds.

    All its methods but `prepare` are for one thread.

    Args:
        policies: of a batch of 1, 2, … rows; there is room for so many.
        tokens: of a prompt and its answer together, for which each row has room.
    """

    def __init__(self, decoder: Decoder, tokens: int, policies: Sequence[Policy]):
        self._decoder, self._policies = decoder, policies
        self.tokens = min(tokens, decoder.target.max_positions)
        self._choices = RowChoices()
        self._batch = decoder.open(len(policies), self.tokens, self._choices, policies[-1])
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._batch.answers)

    @property
    def full(self) -> bool:
        return len(self) == len(self._policies)

    def prepare(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        processors: Sequence[LogitsProcessor] = (),
        keeps_logits: bool = False,
        **inputs,
    ) -> Joining:
        """Check a prompt and what is asked of its answer.

        Args:
            input_ids: (1, L).
            max_new_tokens: None: as many as there is room for.
            sampling: None is greedy.
            seed: None: drawn from torch's default generator.
            processors: see `SpecModel.generate`; they come before temperature, top_k and top_p.
            inputs: what else the processor returned.

        Raises:
            TypeError, ValueError: something is wrong, or too long for a row.
        """
        target, sampling = self._decoder.target, sampling or Sampling()
        inputs = prompt_inputs(self.prepare, target.model, input_ids, inputs)
        [prompt] = single_prompts(target.model, input_ids, inputs)
        length = prompt[0].shape[1]
        room = self.tokens - length
        wanted = max(room, 1) if max_new_tokens is None else max_new_tokens
        if wanted > room:
            asks = f"{length} in the prompt, {wanted} in the answer"
            raise TooLong(f"there is room for {self.tokens} tokens, found {length + wanted}: {asks}")
        [limit] = new_token_limits([length], length, target.max_positions, wanted, None)
        stop = Stop(limit, frozenset(target.eos_token_ids))
        choice = _choice(target, prompt[0], limit, sampling, seed, processors, keeps_logits)
        return Joining(prompt, stop, choice)

    def join(self, joining: Joining) -> tuple[int, Round]:
        """Read a prompt; returns what its answer is called from now on, and its first token.

        Raises:
            ValueError: the target cannot read the prompt; the other answers go on.
        """
        self._numbers += 1
        number = self._numbers
        self._choices.of[number] = joining.choice
        try:
            first = self._decoder.join(self._batch, number, joining.prompt, joining.stop)
        except BaseException:
            del self._choices.of[number]
            raise
        self._settle({number: first})
        return number, first

    def round(self) -> Mapping[int, Round]:
        """Go on with all answers; those that end leave."""
        self._batch.policy = self._policies[len(self) - 1]
        step = self._decoder.round(self._batch)
        self._settle(step)
        return step

    def leave(self, number: int) -> None:
        """End an answer before its time."""
        self._batch.leave(number)
        del self._choices.of[number]

    def close(self) -> None:
        self._decoder.close(self._batch)

    def _settle(self, step: Mapping[int, Round]) -> None:
        for number, one in step.items():
            one.error = self._choices.errors.pop(number, None)
            if one.ended:
                del self._choices.of[number]


class TooLong(ValueError):
    """A prompt with its answer needs more tokens than a row has."""


def _choice(
    target: Target,
    input_ids: torch.Tensor,
    limit: int,
    sampling: Sampling,
    seed: int | None,
    processors: Sequence[LogitsProcessor],
    keeps: bool,
) -> Choice:
    seeds = None if sampling.greedy else row_seeds(seed, 1)
    warpers = LogitsProcessorList() if sampling.greedy else sampling.warpers
    if not processors and not keeps:
        return Choice(warpers, seeds)
    texts = input_ids.to(target.device)
    refuse_processors(processors, texts, target.lm_head.weight.shape[0])
    return TextChoice(LogitsProcessorList([*processors, *warpers]), seeds, texts, [limit], keeps)
