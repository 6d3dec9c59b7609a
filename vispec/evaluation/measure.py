"""The measurement: all arms answer through one function, with one clock and one count, and take turns in one way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

from vispec.acceptance import accepted_within
from vispec.timing import now, turns

if TYPE_CHECKING:
    import torch

    from vispec.model.spec_model import SpecModel

Kind = Literal["baseline", "spec", "generate"]
"""How an arm decodes; "generate" is transformers' own greedy generate() on the same target."""

WARM_UP_TOKENS = 16


def is_greedy(temperature: float) -> bool:
    """Whether the decoder takes the likeliest tokens at this temperature, as `vispec.model.sampling` has it."""
    return temperature <= 1e-5


@dataclass(frozen=True)
class Generation:
    """How an answer is generated; the same for the arms that are compared."""

    temperature: float
    max_new_tokens: int
    top_p: float = 0.0
    own_config: bool = False
    """Whether all else that the target's generation config says applies too: penalties, top_k, …"""


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
    """Draft tokens accepted in each round, as they were verified; empty for the baseline."""

    @property
    def accepted(self) -> list[int]:
        """The same without those behind the answer's end; τ is their mean."""
        return accepted_within(self.acceptance_lengths, self.last_round, len(self.output_ids))

    @property
    def plain_steps(self) -> int:
        """Steps without a draft, of an arm that drafts."""
        return self.last_round + 1 - len(self.acceptance_lengths)


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
    _seed_choices(seed)
    if kind == "generate":
        return _answer_by_generate(model, inputs, generation)
    if generation.own_config:
        return _answer_with_own_config(model, inputs, kind, generation)
    generate = model.specgenerate if kind == "spec" else model.baseline_generate
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


def stream_question(
    model: "SpecModel",
    inputs: Mapping,
    generation: Generation,
    seed: int | None,
    on_round: Callable[[list[int], list[bool]], None],
) -> Answer:
    """Answer one prompt with the draft and measure it, as `answer_question` does, round by round.

    Args:
        on_round: called with a round's new tokens and which of them the draft had right; its own time does not count.
    """
    _seed_choices(seed)
    output_ids: list[int] = []
    accepted: list[int] = []
    seconds: list[float] = []
    start = now(model.device)
    for step in model.stream(**inputs, **asdict(generation)):
        seconds.append(now(model.device) - start)
        output_ids += step.token_ids
        if step.accepted is not None:
            accepted.append(step.accepted)
        on_round(step.token_ids, step.drafted)
        start = now(model.device)
    return Answer(output_ids, len(seconds) - 2, sum(seconds), sum(seconds[1:]), accepted)


def _seed_choices(seed: int | None) -> None:
    """An answer's random choices follow from torch's default generator, whichever way it is made."""
    import torch

    if seed is not None:
        torch.manual_seed(seed)


def _answer_with_own_config(model: "SpecModel", inputs: Mapping, kind: Kind, generation: Generation) -> Answer:
    from vispec.model.sampling import Sampling

    start = now(model.device)
    found = model.generate(
        **inputs,
        **Sampling(generation.temperature, generation.top_p).options,
        max_new_tokens=generation.max_new_tokens,
        speculate=kind == "spec",
        return_dict_in_generate=True,
    )
    wall_time = now(model.device) - start
    new_ids = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(new_ids, found.rounds - 1, wall_time, found.seconds, *found.acceptance_lengths)


def _answer_by_generate(model: "SpecModel", inputs: Mapping, generation: Generation) -> Answer:
    if not is_greedy(generation.temperature):
        raise ValueError(f"generate() is an arm of greedy decoding only, found temperature {generation.temperature}")
    start = now(model.device)
    new_ids, at = generate_greedily(model, inputs, generation.max_new_tokens, generation.own_config)
    end = now(model.device)
    return Answer(new_ids, len(new_ids) - 2, end - start, end - at[0], [])


def generate_greedily(
    model: "SpecModel", inputs: Mapping, max_new_tokens: int, own_config: bool = False
) -> tuple[list[int], list[float]]:
    """Answer one prompt by transformers' own generate(): the new ids, and when each one came."""
    at: list[float] = []
    streamer = SimpleNamespace(put=lambda value: at.append(now()), end=lambda: None)
    output = transformers_generate(model, inputs, max_new_tokens, own_config, streamer=streamer)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), at[1:]  # the first call is the prompt


def transformers_generate(
    model: "SpecModel", inputs: Mapping, max_new_tokens: int, own_config: bool = False, **options
) -> "torch.Tensor":
    """What the target's own generate() returns, greedily; without penalties unless its own config is to be applied."""
    import torch

    if not own_config:
        options = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, **options}

    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    with torch.inference_mode():
        return model.target.model.generate(
            **{name: value.to(model.target.model.device) for name, value in inputs.items()},
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **options,
        )


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
            What the other prompts' lengths need is got ready as well, see `SpecModel.warmup`.
        on_prompt: called with (repetition, prompt, answers by arm) when all arms have answered.

    Returns:
        For each arm by its name and each prompt, the answers of all repetitions.
    """
    for arm in arms:
        warm_up(arm, prompts, generation, warm_up_tokens)
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


def warm_up(arm: Arm, prompts: Sequence[Mapping], generation: Generation, tokens: int | None = WARM_UP_TOKENS) -> None:
    """Get ready for answers that are timed; `tokens`: longest answer to the first prompt, None is a whole one."""
    get_ready(arm, prompts, generation.max_new_tokens)
    longest = min(tokens or generation.max_new_tokens, generation.max_new_tokens)
    answer_question(arm.model, prompts[0], arm.kind, replace(generation, max_new_tokens=longest))


def get_ready(arm: Arm, prompts: Sequence[Mapping], max_new_tokens: int) -> None:
    """Choose kernels and capture steps for answers of all sizes that are to be timed."""
    if arm.kind != "generate":
        lengths = [inputs["input_ids"].shape[1] for inputs in prompts]
        arm.model.warmup(min(lengths), max(lengths) - min(lengths) + max_new_tokens)


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
