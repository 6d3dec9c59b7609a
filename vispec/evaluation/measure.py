"""The measurement: both arms answer a question through this one function, with the same clock and the same count."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vispec.model.spec_model import SpecModel

Arm = Literal["baseline", "spec"]


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
    """Seconds after prefill and first tree."""
    acceptance_lengths: list[int]
    """Draft tokens accepted in each round; empty for the baseline."""


def answer_question(
    model: "SpecModel", inputs: Mapping, arm: Arm, generation: Generation, seed: int | None = 0
) -> Answer:
    """Answer one prompt by an arm and measure it.

    Args:
        inputs: what the processor returned, input_ids included.
        seed: torch's seed for this answer; None leaves the generators alone.
    """
    import torch

    generate = model.specgenerate if arm == "spec" else model.baseline_generate
    if seed is not None:
        torch.manual_seed(seed)
    start = _now(model)
    output, _, last_round, accepted, decode_time = generate(
        **inputs,
        temperature=generation.temperature,
        top_p=generation.top_p,
        max_new_tokens=generation.max_new_tokens,
        log=True,
        return_acceptance_len=True,
        return_decode_time=True,
    )
    wall_time = _now(model) - start
    new_ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(new_ids, last_round, wall_time, decode_time, accepted if arm == "spec" else [])


def drafted_flags(answer: Answer) -> list[bool]:
    """Which tokens of an answer the draft head had right; the others are the target's own."""
    flags = [False]
    for accepted in answer.acceptance_lengths:
        flags += [True] * accepted + [False]
    return flags[: len(answer.output_ids)]


def _now(model: "SpecModel") -> float:
    if model.target.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.target.device)
    return time.perf_counter()
