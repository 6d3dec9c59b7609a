"""Accepted draft tokens as τ counts them.

A round says how many draft tokens the target's own choices confirmed, before its answer is cut at an end token or at
its longest length. What lies behind the end was never said, so it is not counted in τ.
"""

from collections.abc import Sequence


def accepted_within(accepted: Sequence[int], last_step: int, new_tokens: int) -> list[int]:
    """The draft tokens accepted in each round of an answer, without those behind its end.

    Args:
        accepted: of each round with a draft, as they were verified.
        last_step: 0-based index of the answer's last step, with a draft or without one; -1 if there was none.
        new_tokens: of the answer, its end token included.
    """
    # the prompt's own pass gives a token, each step one beside those it accepted; only the last one is ever cut
    behind = 1 + (last_step + 1) + sum(accepted) - new_tokens
    if behind <= 1 or not accepted:  # the step's own token is the first to be cut
        return list(accepted)
    return [*accepted[:-1], max(accepted[-1] + 1 - behind, 0)]
