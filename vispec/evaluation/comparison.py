"""Comparing two arms: what each reached over the questions that both have answered.

The speed of an arm is the mean over questions of new tokens / wall time (seconds, the target's prefill included),
counted over the questions that both arms have answered; the speedup is the ratio of the two. The decode-only measure is
the same over the tokens after the first one, which the prefill gives, and the time after the target's prefill. Tau is
the mean of all rounds' accepted draft tokens, without those behind the end of an answer and without the token that the
target adds (EAGLE counts it: tau + 1). An arm whose trees are chosen while it answers takes plain steps too, which are
no rounds.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from vispec.cli import UserError
from vispec.evaluation.measure import Answer

COMPARABLE = (
    "benchmark", "data", "benchmark_options", "base_model", "base_model_revision", "temperature", "max_new_tokens",
    "num_choices", "dtype", "device", "device_type", "devices", "generation_config",
)  # fmt: skip
"""Settings that two arms must share."""

TAU_CONVENTION = (
    "mean draft tokens accepted a round, those behind an answer's end and the target's own token not counted (EAGLE's "
    "tau is this + 1)"
)

RATIOS = (
    "x plain is the ratio of tokens/s to those of our own plain loop, x generate that to those of transformers' "
    "generate() on the same target."
)

Answers = Mapping[Hashable, Sequence[Answer]]
"""All answers to each question."""


@dataclass(frozen=True)
class ArmSpeed:
    """How fast an arm is. None where nothing was decoded after the first token."""

    tokens_per_second: float
    ms_per_token: float
    """Inverse of tokens_per_second."""
    decode_tokens_per_second: float | None
    new_tokens: int


@dataclass(frozen=True)
class Comparison:
    """A speculative arm beside the baseline, over the same questions."""

    questions: int
    speedup: float
    decode_speedup: float | None
    tau: float | None
    rounds: int
    """Of the speculative arm, with a draft."""
    plain_steps: int
    """Of the speculative arm, without one."""
    baseline: ArmSpeed
    spec: ArmSpeed
    identical_questions: int
    """Questions to which both arms gave the same output ids."""

    @property
    def outputs_identical(self) -> bool:
        return self.identical_questions == self.questions


def compare(baseline: Answers, spec: Answers) -> Comparison:
    """Compare two arms over the questions that both have answered.

    Raises:
        UserError: there is none.
    """
    shared = [question for question in baseline if question in spec]
    if not shared:
        raise UserError("the two arms have no question in common")
    speeds = [arm_speed([arm[question] for question in shared]) for arm in (baseline, spec)]
    ours = [answer for question in shared for answer in spec[question]]
    lengths = [n for answer in ours for n in answer.accepted]
    decode = [speed.decode_tokens_per_second for speed in speeds]
    return Comparison(
        questions=len(shared),
        speedup=speeds[1].tokens_per_second / speeds[0].tokens_per_second,
        decode_speedup=decode[1] / decode[0] if all(decode) else None,
        tau=fmean(lengths) if lengths else None,
        rounds=len(lengths),
        plain_steps=sum(answer.last_round + 1 for answer in ours) - len(lengths),
        baseline=speeds[0],
        spec=speeds[1],
        identical_questions=sum(_ids(baseline[question]) == _ids(spec[question]) for question in shared),
    )


def arm_speed(questions: Sequence[Sequence[Answer]]) -> ArmSpeed:
    """Speed of an arm: the mean of each question's own speed."""
    wall = [wall_speed(answers) for answers in questions]
    decode = [speed for answers in questions if (speed := decode_speed(answers)) is not None]
    return ArmSpeed(
        tokens_per_second=fmean(wall),
        ms_per_token=1000 / fmean(wall),
        decode_tokens_per_second=fmean(decode) if decode else None,
        new_tokens=sum(len(a.output_ids) for q in questions for a in q),
    )


def wall_speed(answers: Sequence[Answer]) -> float:
    """New tokens per second of one question, all its answers together, prefill included."""
    return sum(len(a.output_ids) for a in answers) / sum(a.wall_time for a in answers)


def decode_speed(answers: Sequence[Answer]) -> float | None:
    """The same after the first token and the prefill; None where nothing was decoded."""
    decoded = [a for a in answers if len(a.output_ids) > 1 and a.decode_time > 0]
    return sum(len(a.output_ids) - 1 for a in decoded) / sum(a.decode_time for a in decoded) if decoded else None


def round_in_steps(baseline: Sequence[Answer], spec: Sequence[Answer]) -> float | None:
    """Time of a draft round over the time of a plain step, both without prefill; None where nothing tells them.

    An answer with plain steps among its rounds does not say what a round took, so it is not counted.
    """
    drafted = [answer for answer in spec if len(answer.acceptance_lengths) > answer.last_round]
    times = []
    for answers in (baseline, drafted):
        rounds = sum(answer.last_round + 1 for answer in answers)
        times.append(sum(answer.decode_time for answer in answers) / rounds if rounds else 0.0)
    step, round_ = times
    return round_ / step if step and round_ else None


def refuse_differences(why: str, names: Iterable[str], one: tuple[Path, Mapping], other: tuple[Path, Mapping]) -> None:
    """Compare settings of two answer files, each given as (path, settings).

    Raises:
        UserError: one of the names has different values; says `why` and names both files.
    """
    for name in names:
        found, expected = other[1].get(name), one[1].get(name)
        if found != expected:
            raise UserError(f"{why}: {name} is {expected!r} in {one[0]} and {found!r} in {other[0]}")


def _ids(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.output_ids for answer in answers]
