"""How much of an answer could be copied: the draft that needs no model.

Prompt lookup takes the longest n-gram (n >= 2) that ends the text so far and occurred before, in
prompt or answer, and predicts the token that followed its most recent occurrence.
"""

from collections.abc import Sequence

import numpy as np

SHORTEST_MATCH = 2


def prompt_lookup_hits(prompt: Sequence[int], answer: Sequence[int]) -> int:
    """How many of the answer's tokens prompt lookup predicts."""
    ids = np.asarray([*prompt, *answer])
    hits = 0
    # matched[j]: length of the longest common suffix of ids[:j + 1] and the text so far, ids[:t].
    matched = np.zeros(0, dtype=np.int64)
    for t in range(2, len(ids)):
        longer = np.concatenate([[1], matched + 1])
        matched = np.where(ids[: t - 1] == ids[t - 1], longer, 0)
        longest = matched.max()
        if t >= len(prompt) and longest >= SHORTEST_MATCH:
            last = np.flatnonzero(matched == longest)[-1]
            hits += int(ids[last + 1] == ids[t])
    return hits


def prompt_lookup_share(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Share of all answer tokens, over (prompt, answer) pairs, that prompt lookup predicts."""
    total = sum(len(answer) for _, answer in pairs)
    return sum(prompt_lookup_hits(*pair) for pair in pairs) / total
