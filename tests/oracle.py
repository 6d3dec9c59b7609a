"""A draft that knows the answers: on changing branches, beside wrong ones that leave the right path at every depth."""

import torch

from vispec.model.drafts import PromptLookup, lookup
from vispec.model.tree import EMPTY


def oracle(monkeypatch, texts: list[torch.Tensor], vocabulary: int) -> PromptLookup:
    """A draft for prompts with these answers.

    Args:
        texts: (L,) prompt and answer of every row.
        vocabulary: wrong tokens are below this.
    """

    def continuations(ids: torch.Tensor, lengths: torch.Tensor, k: int, levels: int) -> torch.Tensor:
        tokens = torch.full((len(ids), k, levels), EMPTY)
        for row, length in enumerate(lengths.tolist()):
            held = ids[row, :length]
            text = next(t for t in texts if len(t) >= length and ((t[:length] == held) | (held == EMPTY)).all())
            answer = text[length : length + levels]
            for branch in range(k):
                turn = (branch + length) % k  # how many tokens are right; the last turn is the answer itself
                wrong = (answer + 1 + branch) % (vocabulary - 1)
                right = turn if turn < k - 1 else levels
                tokens[row, branch, : len(answer)] = torch.cat([answer[:right], wrong[right:]])
        return tokens

    monkeypatch.setattr(lookup, "continuations", continuations)
    return PromptLookup()
