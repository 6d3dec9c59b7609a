"""A draft vocabulary: the draft proposes frequent tokens alone (FR-Spec, arXiv 2502.14856, section 3).

Reading the target's output head takes most of a small draft's time, once for every level of a tree, and answers use few
of its rows. With a draft vocabulary the draft reads only the rows of the tokens that are frequent in training answers.
Verification stays over all tokens, so decoding stays lossless: a token that is left out is never drafted, the target
has to say it itself.

Its file lies beside the head's weights. Which tokens are frequent is counted where heads are trained.

Shapes: V tokens of the target, V' of the draft vocabulary, H hidden size.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from vispec.files import parse_json, write_atomic
from vispec.model.products import Products
from vispec.model.target import Target
from vispec.model.tree import DraftOutput

logger = logging.getLogger("vispec")

FORMAT = 1
VOCABULARY_FILE = "draft_vocab.safetensors"
VOCABULARY_TITLE = "## Draft vocabulary"


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """The tokens that a draft may propose."""

    token_ids: torch.Tensor
    """(V',) int64, ascending."""
    vocab_size: int
    """V of the target it was made for."""
    fingerprint: str
    """Of these tokens' strings, see `fingerprint`."""
    facts: Mapping = field(default_factory=dict)
    """What else its file says: the coverage of held-out answers, what made it."""
    source: str = ""
    """Its file."""

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    @classmethod
    def read(cls, path: str | Path, vocab_size: int) -> "DraftVocabulary":
        """Read a file for a head whose target has `vocab_size` tokens.

        Raises:
            ValueError: it is no such file, it was made for another target, or ids are out of range or not ascending.
        """
        try:
            with safe_open(path, framework="pt") as file:
                note = dict(parse_json((file.metadata() or {})["vispec"].encode(), "its note"))
                ids = file.get_tensor("token_ids")
            format, made_for, found = note.pop("format"), note.pop("vocab_size"), note.pop("fingerprint")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a draft vocabulary ({error})") from None
        if format != FORMAT:
            raise ValueError(f"{path}: a draft vocabulary of format {format}, expected {FORMAT}")
        if made_for != vocab_size:
            raise ValueError(f"{path}: made for a vocabulary of {made_for} tokens, the head's has {vocab_size}")
        if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) == 0:
            raise ValueError(f"{path}: token_ids is {ids.dtype} {tuple(ids.shape)}, expected int64 in one dimension")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"{path}: token ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {vocab_size - 1}"
            )
        if bool((ids.diff() <= 0).any()):
            raise ValueError(f"{path}: the token ids are not ascending")
        return cls(ids, vocab_size, found, note, str(path))

    def write(self, folder: str | Path) -> Path:
        """Put the file beside a head, whole or not at all."""
        note = {"format": FORMAT, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint, **self.facts}
        # one metadata key only: the writer orders several at random, and equal vocabularies are to be equal files
        content = save({"token_ids": self.token_ids}, {"vispec": json.dumps(note, sort_keys=True)})
        path = Path(folder, VOCABULARY_FILE)
        write_atomic(path, lambda file: file.write(content))
        return path

    def check_tokenizer(self, base_model_path: str, **where) -> None:
        """Refuse a target whose tokenizer has other tokens under these ids; `where` tells the hub what to look at."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(base_model_path, **where)
        except Exception:  # transformers trips over what is missing or broken in many ways
            logger.warning("%s: no tokenizer there, so %s is not checked against it", base_model_path, self.source)
            return
        if fingerprint(tokenizer, self.token_ids) != self.fingerprint:
            raise ValueError(
                f"{self.source}: made for another tokenizer than that of {base_model_path}; make it anew, or load with "
                "draft_vocab=False"
            )

    def output(self, target: Target) -> DraftOutput:
        """The rows of these tokens of a target's output head, copied: V' · H numbers more in memory.

        Raises:
            ValueError: the output head is no plain linear layer (it is quantised, say), or it was offloaded.
        """
        lm_head = target.lm_head
        if type(lm_head) is not nn.Linear:
            raise ValueError(
                f"{self.source}: the target's output head is a {type(lm_head).__name__}, a draft vocabulary needs a "
                "plain linear layer; load with draft_vocab=False"
            )
        if lm_head.weight.is_meta:
            raise ValueError(
                f"{self.source}: the target's output head is offloaded, a draft vocabulary needs it in memory; load "
                "with draft_vocab=False"
            )
        kept = self.token_ids.to(lm_head.weight.device)
        rows = nn.Linear(lm_head.in_features, len(self), lm_head.bias is not None, device="meta")
        with torch.inference_mode(False):  # products ask tensors for their versions
            for name, parameter in lm_head.named_parameters():
                setattr(rows, name, nn.Parameter(parameter.detach()[kept].to(target.device), requires_grad=False))
        head = _Rows(rows, target)
        return DraftOutput(head, head.expect, self.token_ids.to(target.device))


class _Rows:
    """The rows of an output head as a function (…, H) -> (…, V')."""

    def __init__(self, rows: nn.Linear, target: Target):
        self.rows, self.rescale = rows, target.rescale
        self.products = Products() if target.fast else None

    def expect(self, rows: Iterable[int]) -> None:
        if self.products is not None:
            self.products.expect(rows, self.rows)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.rows(hidden) if self.products is None else self.products.linear(self.rows, hidden)
        return logits if self.rescale is None else self.rescale(logits)


def fingerprint(tokenizer, token_ids: torch.Tensor) -> str:
    """SHA-256 of what these ids stand for in a tokenizer of transformers; ids that it does not use count as null."""
    tokens = tokenizer.convert_ids_to_tokens(token_ids.tolist())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def with_vocabulary_section(card: str, vocabulary: DraftVocabulary) -> str:
    """A model card that tells of a draft vocabulary, in place of what it told of an earlier one."""
    card = re.sub(rf"\n{VOCABULARY_TITLE}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL).rstrip()
    covered = vocabulary.facts.get("coverage")
    told = "" if covered is None else f", which cover {covered:.2%} of the tokens of held-out answers"
    return (
        f"{card}\n\n{VOCABULARY_TITLE}\n\nThe head proposes {len(vocabulary)} of {vocabulary.vocab_size} tokens only "
        f"(`{VOCABULARY_FILE}`){told}. The target verifies over all tokens, so answers stay its own.\n"
    )
