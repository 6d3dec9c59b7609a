"""A draft that knows the answers: on changing branches, beside wrong ones that leave the right path at every depth.

With it a random target accepts tokens by every path through the tree; what real drafts say of it is seldom accepted.
"""

import torch

from vispec.model.drafts import PromptLookup
from vispec.model.drafts.lookup import LookupMemory
from vispec.model.tree import EMPTY


class Oracle(PromptLookup):
    """A draft for prompts with these answers.

    Args:
        texts: (L,) prompt and answer of every prompt, without padding.
        vocabulary: wrong tokens are below this.
    """

    def __init__(self, texts: list[torch.Tensor], vocabulary: int):
        self.texts, self.vocabulary = texts, vocabulary

    def branches(self, memory: LookupMemory, k: int, levels: int) -> torch.Tensor:
        tokens = torch.full((len(memory.ids), k, levels), EMPTY)
        for row, length in enumerate(memory.lengths.tolist()):
            held = memory.ids[row, :length].cpu()
            text = next(t for t in self.texts if len(t) >= length and ((t[:length] == held) | (held == EMPTY)).all())
            answer = text[length : length + levels]
            turns = k if k > 1 else levels + 2  # a chain leaves the right path at every depth in its turn
            for branch in range(k):
                turn = (branch + length) % turns  # how many tokens are right; the last turn is the answer itself
                right = turn if turn < turns - 1 else levels
                wrong = (answer + 1 + branch) % (self.vocabulary - 1)
                tokens[row, branch, : len(answer)] = torch.cat([answer[:right], wrong[right:]])
        return tokens.to(memory.ids.device)
