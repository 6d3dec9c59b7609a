"""Comparing two arms: what each reached over the questions that both have answered, and how sure that is.

The speed of an arm is the mean over questions of new tokens / wall time (seconds, the target's prefill included),
counted over the questions that both arms have answered; the speedup is the ratio of the two. The decode-only measure is
the same over the tokens after the first one, which the prefill gives, and the time after the target's prefill. Tau is
the mean of all rounds' accepted draft tokens, without those behind the end of an answer and without the token that the
target adds (EAGLE counts it: tau + 1). An arm whose trees are chosen while it answers takes plain steps too, which are
no rounds.

The intervals are bootstrap intervals over questions: a benchmark's questions are a sample of those that could have been
asked. So they are drawn anew, with replacement, many times; each draw takes a question with the answers of both arms,
since their times belong together, and gives a value of the measure. The interval holds the middle 95 % of these values.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

import numpy as np

from vispec.evaluation.measure import Answer

MEASURES = ("speedup", "decode_speedup", "tau")
"""Of a `Comparison`, those that have intervals."""
DRAWS = 2000
PERCENTILES = (2.5, 97.5)
SEED = 42

TAU_CONVENTION = (
    "mean draft tokens accepted a round, those behind an answer's end and the target's own token not counted (EAGLE's "
    "tau is this + 1)"
)

RATIOS = (
    "x plain is the ratio of tokens/s to those of our own plain loop, x generate that to those of transformers' "
    "generate() on the same target."
)

Questions = Sequence[Sequence[Answer]]
"""All answers of an arm to each question; arms that are compared have the same questions in the same order."""


@dataclass(frozen=True)
class ArmSpeed:
    """How fast an arm is. None where nothing was decoded after the first token."""

    questions: int
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


def compare(baseline: Questions, spec: Questions) -> Comparison:
    """Compare two arms."""
    speeds = [arm_speed(arm) for arm in (baseline, spec)]
    ours = list(chain.from_iterable(spec))
    rounds = sum(len(answer.acceptance_lengths) for answer in ours)
    decode = [speed.decode_tokens_per_second for speed in speeds]
    return Comparison(
        questions=len(baseline),
        speedup=speeds[1].tokens_per_second / speeds[0].tokens_per_second,
        decode_speedup=decode[1] / decode[0] if all(decode) else None,
        tau=tau(ours),
        rounds=rounds,
        plain_steps=sum(answer.plain_steps for answer in ours),
        baseline=speeds[0],
        spec=speeds[1],
        identical_questions=sum(_ids(plain) == _ids(ours) for plain, ours in zip(baseline, spec, strict=True)),
    )


def arm_speed(questions: Questions) -> ArmSpeed:
    """Speed of an arm: the mean of each question's own speed."""
    wall = [wall_speed(answers) for answers in questions]
    decode = [speed for answers in questions if (speed := decode_speed(answers)) is not None]
    return ArmSpeed(
        questions=len(questions),
        tokens_per_second=fmean(wall),
        ms_per_token=1000 / fmean(wall),
        decode_tokens_per_second=fmean(decode) if decode else None,
        new_tokens=sum(len(a.output_ids) for q in questions for a in q),
    )


def tau(answers: Iterable[Answer]) -> float | None:
    """Mean over all rounds of the draft tokens that they accepted; None where there is no round."""
    accepted = _accepted(answers)
    return fmean(accepted) if accepted else None


def wall_speed(answers: Sequence[Answer]) -> float:
    """New tokens per second of one question, all its answers together, prefill included."""
    return sum(len(a.output_ids) for a in answers) / sum(a.wall_time for a in answers)


def decode_speed(answers: Sequence[Answer]) -> float | None:
    """The same after the first token and the prefill; None where nothing was decoded."""
    decoded = [a for a in answers if len(a.output_ids) > 1 and a.decode_time > 0]
    return sum(len(a.output_ids) - 1 for a in decoded) / sum(a.decode_time for a in decoded) if decoded else None


def round_in_steps(baseline: Questions, spec: Questions) -> float | None:
    """Time of a draft round over the time of a plain step, both without prefill; None where nothing tells them.

    An answer with plain steps among its rounds does not say what a round took, so it is not counted.
    """
    drafted = [answer for answer in chain.from_iterable(spec) if not answer.plain_steps]
    times = []
    for answers in (list(chain.from_iterable(baseline)), drafted):
        rounds = sum(answer.last_round + 1 for answer in answers)
        times.append(sum(answer.decode_time for answer in answers) / rounds if rounds else 0.0)
    step, round_ = times
    return round_ / step if step and round_ else None


def _ids(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.output_ids for answer in answers]


# --- intervals ---


@dataclass(frozen=True)
class Estimate:
    """A measure with what it is in the draws."""

    value: float | None
    """None where there is nothing to measure: no round, no token after the first."""
    draws: np.ndarray | None
    """(DRAWS,), NaN where a draw has nothing to measure. None if there was one question only: nothing to draw from."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper bound, 95 %."""
        if self.value is None or self.draws is None or np.isnan(self.draws).all():
            return None
        low, high = np.nanpercentile(self.draws, PERCENTILES)
        return float(low), float(high)


def estimates(comparison: Comparison, baseline: Questions, spec: Questions, stream: int) -> dict[str, Estimate]:
    """The MEASURES of a comparison with their draws.

    Args:
        comparison: of the two arms; has the values.
        stream: arms with the same number of questions and the same stream are drawn alike.
    """
    values = {name: getattr(comparison, name) for name in MEASURES}
    questions = len(baseline)
    if questions < 2:
        return {name: Estimate(value, None) for name, value in values.items()}
    drawn = np.random.default_rng([SEED, stream]).integers(questions, size=(DRAWS, questions))
    accepted = np.array([[sum(lengths), len(lengths)] for lengths in map(_accepted, spec)], dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw without any round has no τ: NaN
        total, rounds = accepted[drawn].sum(axis=1).T
        draws = {
            "speedup": _mean_speed(spec, wall_speed, drawn) / _mean_speed(baseline, wall_speed, drawn),
            "decode_speedup": _mean_speed(spec, decode_speed, drawn) / _mean_speed(baseline, decode_speed, drawn),
            "tau": total / rounds,
        }
    return {name: Estimate(value, draws[name]) for name, value in values.items()}


def average(found: Sequence[Estimate]) -> Estimate:
    """Mean over the benchmarks that have a value; their questions are drawn independently of each other."""
    found = [estimate for estimate in found if estimate.value is not None]
    if not found:
        return Estimate(None, None)
    draws = [estimate.draws for estimate in found]
    return Estimate(
        float(np.mean([estimate.value for estimate in found])),
        None if any(row is None for row in draws) else np.mean(draws, axis=0),
    )


def _mean_speed(arm: Questions, speed: Callable, drawn: np.ndarray) -> np.ndarray:
    """Mean speed of an arm in each draw (DRAWS,), over the questions that have one."""
    speeds = np.array([speed(answers) for answers in arm], dtype=float)  # None becomes NaN
    has = ~np.isnan(speeds)
    return np.where(has, speeds, 0)[drawn].sum(axis=1) / has[drawn].sum(axis=1)


def _accepted(answers: Iterable[Answer]) -> list[int]:
    return [length for answer in answers for length in answer.accepted]
