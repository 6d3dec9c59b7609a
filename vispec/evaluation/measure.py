"""The measurement: all arms answer through one function, with one clock and one count, and take turns in one way."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch

    from vispec.model.spec_model import SpecModel

Kind = Literal["baseline", "spec"]
"""How an arm decodes."""

WARM_UP_TOKENS = 16

T = TypeVar("T")


def is_greedy(temperature: float) -> bool:
    """Whether the decoder takes the likeliest tokens at this temperature, as `vispec.model.acceptance` has it."""
    return temperature <= 1e-5


@dataclass(frozen=True)
class Generation:
    """How an answer is generated; the same for the arms that are compared."""

    temperature: float
    max_new_tokens: int
    top_p: float = 0.0


@dataclass(frozen=True)
class Answer:
    """One generated answer and what it took."""

    output_ids: list[int]
    """New token ids, end token included; speed counts these, so no tokenizer has a say in it."""
    last_round: int
    """0-based index of the last round, -1 if the prompt's own pass was enough."""
    wall_time: float
    """Seconds from the finished prompt to the last token; the target's prefill is in it."""
    decode_time: float
    """Seconds after the target's prefill, in both arms: every draft that is grown counts, the first one too."""
    acceptance_lengths: list[int]
    """Draft tokens accepted in each round; empty for the baseline."""


@dataclass(frozen=True)
class Arm:
    """One of those that are compared: a loaded pair, and how it decodes."""

    name: str
    model: "SpecModel"
    kind: Kind


def answer_question(
    model: "SpecModel", inputs: Mapping, kind: Kind, generation: Generation, seed: int | None = 0
) -> Answer:
    """Answer one prompt and measure it.

    Args:
        inputs: what the processor returned, input_ids included.
        seed: torch's seed for this answer; None leaves the generators alone.
    """
    import torch

    generate = model.specgenerate if kind == "spec" else model.baseline_generate
    if seed is not None:
        torch.manual_seed(seed)
    start = now(model.target.device)
    output, _, last_round, accepted, decode_time = generate(
        **inputs,
        temperature=generation.temperature,
        top_p=generation.top_p,
        max_new_tokens=generation.max_new_tokens,
        log=True,
        return_acceptance_len=True,
        return_decode_time=True,
    )
    wall_time = now(model.target.device) - start
    new_ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(new_ids, last_round, wall_time, decode_time, accepted if kind == "spec" else [])


def in_turn(arms: Sequence[T], number: int) -> list[T]:
    """The order of the arms in their turn of this number: another one begins each time, so that none always does."""
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def turns(
    arms: Sequence[T], prompts: int, repetitions: int, budget: float = float("inf")
) -> Iterator[tuple[int, int, T]]:
    """Who answers next: (repetition, prompt, arm), both counted from 0.

    Every prompt is answered by all arms before the next one comes, so that a drifting machine hurts all alike.

    Args:
        budget: seconds; no repetition that would probably end later is begun, the first one always runs.
    """
    start = time.perf_counter()
    for repetition in range(repetitions):
        spent = time.perf_counter() - start
        if repetition and spent + spent / repetition > budget:
            return
        for prompt in range(prompts):
            for arm in in_turn(arms, repetition + prompt):
                yield repetition, prompt, arm


def interleave(
    arms: Sequence[Arm],
    prompts: Sequence[Mapping],
    generation: Generation,
    repetitions: int,
    *,
    budget: float = float("inf"),
    warm_up_tokens: int | None = WARM_UP_TOKENS,
    on_prompt: Callable[[int, int, dict[str, Answer]], None] | None = None,
) -> dict[str, list[list[Answer]]]:
    """Answer every prompt by every arm in turn, see `turns`.

    Args:
        prompts: what the processor returned for each of them.
        warm_up_tokens: longest answer to the first prompt that each arm gives before any counts; None: a whole one.
        on_prompt: called with (repetition, prompt, answers by arm) when all arms have answered.

    Returns:
        For each arm by its name and each prompt, the answers of all repetitions.
    """
    longest = min(warm_up_tokens or generation.max_new_tokens, generation.max_new_tokens)
    for arm in arms:
        answer_question(arm.model, prompts[0], arm.kind, replace(generation, max_new_tokens=longest))
    found: dict[str, list[list[Answer]]] = {arm.name: [[] for _ in prompts] for arm in arms}
    answered: dict[str, Answer] = {}
    for repetition, prompt, arm in turns(arms, len(prompts), repetitions, budget):
        answered[arm.name] = answer_question(arm.model, prompts[prompt], arm.kind, generation)
        found[arm.name][prompt].append(answered[arm.name])
        if len(answered) == len(arms):
            if on_prompt is not None:
                on_prompt(repetition, prompt, answered)
            answered = {}
    return found


def typical(answers: Sequence[Answer]) -> Answer:
    """Of an arm's answers to one prompt, the one that counts: the first one's tokens, with the median times of all."""
    return replace(
        answers[0],
        wall_time=median(answer.wall_time for answer in answers),
        decode_time=median(answer.decode_time for answer in answers),
    )


def drafted_flags(answer: Answer) -> list[bool]:
    """Which tokens of an answer the draft head had right; the others are the target's own."""
    flags = [False]
    for accepted in answer.acceptance_lengths:
        flags += [True] * accepted + [False]
    return flags[: len(answer.output_ids)]


def now(device: "torch.device") -> float:
    """The clock, after all work that was given to the device."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()
