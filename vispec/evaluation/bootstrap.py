"""How sure a measure is: bootstrap intervals over questions.

A benchmark's questions are a sample of those that could have been asked. So they are drawn anew, with replacement, many
times; each draw takes a question with the answers of both arms, since their times belong together, and gives a value
of the measure. The interval holds the middle 95 % of these values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vispec.evaluation.comparison import Comparison, decode_speed, wall_speed
from vispec.evaluation.measure import Answer

DRAWS = 2000
PERCENTILES = (2.5, 97.5)
SEED = 42

ArmAnswers = Sequence[Sequence[Answer]]
"""All answers to each question; both arms have the questions in the same order."""


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


def estimates(comparison: Comparison, baseline: ArmAnswers, spec: ArmAnswers, stream: int) -> dict[str, Estimate]:
    """Speedup, decode_speedup and tau of a comparison with their draws.

    Args:
        comparison: of the two arms; has the values.
        stream: arms with the same number of questions and the same stream are drawn alike.
    """
    values = {name: getattr(comparison, name) for name in ("speedup", "decode_speedup", "tau")}
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


def _mean_speed(arm: ArmAnswers, speed, drawn: np.ndarray) -> np.ndarray:
    """Mean speed of an arm in each draw (DRAWS,), over the questions that have one."""
    speeds = np.array([speed(answers) for answers in arm], dtype=float)  # None becomes NaN
    has = ~np.isnan(speeds)
    return np.where(has, speeds, 0)[drawn].sum(axis=1) / has[drawn].sum(axis=1)


def _accepted(answers: Sequence[Answer]) -> list[int]:
    return [length for answer in answers for length in answer.accepted]
