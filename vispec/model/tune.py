"""Choose the draft tree that brings the most tokens a second on this device (`--tree tune`).

A larger tree has more tokens accepted in a round, and its rounds take longer. How much of either depends on device,
head and prompts, so trees of all kinds answer a few prompts in turn; the slower half drops out again and again, and the
last few answer until the medians of their times can be trusted. The default tree, 30/3/8, stays until the end. Rules
that grow trees (`AdaptiveTree`) are measured against the best of these: each with its size, the fastest to the end.

Triples are N/d/k: total_token, depth, top_k.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from vispec.acceptance import accepted_within
from vispec.model.adaptive import RULES
from vispec.model.shape import TreeShape
from vispec.timing import turns

DEFAULT = TreeShape()
SHAPES = tuple(
    map(
        TreeShape.parse,
        ("2/0/1", "4/2/1", "6/2/2", "6/4/1", "8/3/3", "9/7/1", "12/3/4", "12/5/2", "16/4/4", "16/7/2", "20/8/2")
        + ("24/5/4", "30/3/8", "30/7/4", "40/5/6", "60/5/8", "60/8/4"),
    )
)
TOKENS = 48
"""Of each answer."""
WARM_UP_TOKENS = 8
FINALISTS, REPETITIONS = 3, 3
"""How many fixed shapes, the default among them, are left for the last comparison, and how often all answer there."""


@dataclass
class Measured:
    """What a tree has brought."""

    tokens: int = 0
    """Of one answer to each prompt, without those of the prompts' own passes."""
    accepted: list[int] = field(default_factory=list)
    """Draft tokens accepted in each round of these answers."""
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Of every answer without the prompt's pass, by prompt."""

    @property
    def answers(self) -> int:
        return sum(map(len, self.seconds.values()))

    @property
    def time(self) -> float:
        """Seconds of one answer to each prompt: medians."""
        return sum(map(median, self.seconds.values()))

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.time

    @property
    def tau(self) -> float:
        return fmean(self.accepted)


@dataclass(frozen=True)
class Tuning:
    """What was measured, and what was chosen."""

    shape: TreeShape
    default: TreeShape
    """30/3/8, or what draft and target can do of it."""
    measured: dict[TreeShape, Measured]

    def report(self) -> str:
        """Why this shape, in a short table."""
        chosen = self.measured[self.shape]
        lines = [
            f"draft trees (N/d/k), measured on {len(chosen.seconds)} prompts and {chosen.tokens} tokens, the slower "
            "half left out again and again:",
            "| tree | τ | ms a round | tokens/s | answers |",
            "|---|---|---|---|---|",
        ]
        for shape, found in sorted(self.measured.items(), key=lambda item: (-item[1].answers, -item[1].speed)):
            ms = 1000 * found.time / len(found.accepted)
            lines.append(f"| {shape} | {found.tau:.2f} | {ms:.2f} | {found.speed:.1f} | {found.answers} |")
        ratio = chosen.speed / self.measured[self.default].speed
        lines.append(f"chosen: {self.shape}, {ratio:.2f} times as fast as {self.default} in this run")
        return "\n".join(lines)


def tune(model, prompts: Sequence[Mapping], max_new_tokens: int = TOKENS) -> Tuning:
    """Measure which tree brings the most tokens a second; the model is left as it is.

    Args:
        model: a `SpecModel` with a draft.
        prompts: what the processor returned for each prompt, one row each, input_ids included.
        max_new_tokens: of each answer; answers are greedy.

    Raises:
        ValueError: there are no prompts, or all answers end with their first token.
    """
    told = [inputs for inputs in prompts if _answer(model.baseline_generate, inputs, 2)[0] > 1]
    if not told:
        reason = "the answers to these prompts end with their first token" if prompts else "there are no prompts"
        raise ValueError(f"no tree can be chosen: {reason}")
    default = model.fit(DEFAULT)
    shapes = list(dict.fromkeys([default, *map(model.fit, SHAPES)]))
    arms = {}
    measured: dict[TreeShape, Measured] = {}

    def run(shapes: Sequence[TreeShape], repetitions: int) -> list[TreeShape]:
        """Let them answer; the fastest first."""
        for shape in shapes:
            if shape not in arms:
                arms[shape], measured[shape] = _arm(model, shape, told, max_new_tokens), Measured()
        _run(arms, shapes, told, max_new_tokens, repetitions, measured)
        return sorted(shapes, key=lambda shape: -measured[shape].speed)

    best = default
    while len(shapes) > FINALISTS:
        best, *others = run(shapes, 1)
        left = [shape for shape in (best, *others) if shape != default]
        shapes = [default, *left[: max(len(shapes) // 2, FINALISTS) - 1]]
    rules = _rules(model, best) if model.draft.by_level else []
    if rules:
        shapes.append(run(rules, 1)[0])
    return Tuning(run(shapes, REPETITIONS)[0], default, measured)


def _rules(model, size: TreeShape) -> list[TreeShape]:
    """Those that decide anything in a tree of this size."""
    sizes = {"total_token": size.total_token, "depth": size.depth, "top_k": size.top_k}
    rules = [replace(rule(), **sizes) for rule in RULES.values()]
    return [model.fit(rule) for rule in rules if any(map(rule.asks, range(1, rule.levels)))]


def _arm(model, shape: TreeShape, prompts: Sequence[Mapping], max_new_tokens: int):
    """The model with this tree, ready to be measured."""
    arm, lengths = model.with_tree(shape), [inputs["input_ids"].shape[1] for inputs in prompts]
    arm.warmup(min(lengths), max(lengths) - min(lengths) + max_new_tokens)
    _answer(arm.specgenerate, prompts[0], WARM_UP_TOKENS)
    return arm


def _run(
    arms: Mapping, shapes: list[TreeShape], prompts: Sequence[Mapping], max_new_tokens: int, repetitions: int, measured
) -> None:
    """Let shapes answer all prompts in turn."""
    for _, number, shape in turns(shapes, len(prompts), repetitions):
        new, accepted, seconds = _answer(arms[shape].specgenerate, prompts[number], max_new_tokens)
        found = measured[shape]
        if number not in found.seconds:
            found.tokens += new - 1
            found.accepted += accepted
        found.seconds.setdefault(number, []).append(seconds)


def _answer(generate: Callable, inputs: Mapping, max_new_tokens: int) -> tuple[int, list[int], float]:
    """New tokens, accepted draft tokens of each round, and seconds without the prompt's pass."""
    _, new, last_step, accepted, seconds = generate(
        **inputs, max_new_tokens=max_new_tokens, log=True, return_acceptance_len=True, return_decode_time=True
    )
    return new, accepted_within(accepted, last_step, new), seconds
