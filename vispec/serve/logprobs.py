"""Log-probabilities of an answer's tokens, as OpenAI's clients read them."""

from collections.abc import Sequence

import torch

from vispec.serve.text import TokenTexts
from vispec.text import INCOMPLETE


class TokenLogprobs:
    """Log-probabilities by the target's own distribution.

    Args:
        tops: how many of the likeliest tokens are named beside each one.
        left_out: tokens that end an answer.
    """

    def __init__(self, texts: TokenTexts, tops: int, left_out: frozenset[int]):
        self._texts, self._tops, self._left_out = texts, tops, left_out

    def of(self, tokens: Sequence[int], logits: Sequence[torch.Tensor]) -> list[dict]:
        """An entry for each token; logits are (V,)."""
        kept = [(token, own) for token, own in zip(tokens, logits, strict=True) if token not in self._left_out]
        if not kept:
            return []
        tokens, logits = zip(*kept, strict=True)
        logprobs = torch.stack(logits).log_softmax(-1)
        best = logprobs.topk(self._tops)
        own = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])
        values = torch.cat([own, best.values], dim=1).tolist()
        return [
            {**self._entry(token, first), "top_logprobs": list(map(self._entry, likeliest, others))}
            for token, (first, *others), likeliest in zip(tokens, values, best.indices.tolist(), strict=True)
        ]

    def _entry(self, token: int, logprob: float) -> dict:
        text = self._texts[token]
        # a part of a character has bytes that the text does not tell; JSON has no infinity
        known = None if INCOMPLETE in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": known}
