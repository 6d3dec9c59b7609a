"""A draft vocabulary: the draft proposes frequent tokens alone (FR-Spec, arXiv 2502.14856, section 3).

Reading the target's output head takes most of a small draft's time, once for every level of a tree, and answers use few
of its rows. With a draft vocabulary the draft reads only the rows of the tokens that are frequent in training answers.
Verification stays over all tokens, so decoding stays lossless: a token that is left out is never drafted, the target
has to say it itself.

python -m vispec.model.draft_vocab --counts DATA [DATA …] --size 32768 --spec-model-path HEAD

counts tokens in the answers of training data and puts `draft_vocab.safetensors` beside the head. The samples that
training holds out are not counted; how much of their answers is covered is printed, for other sizes too.

Shapes: V tokens of the target, V' of the draft vocabulary, H hidden size.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from vispec.cli import UserError, provenance, run_cli
from vispec.files import write_atomic
from vispec.model.hub import CARD, VOCABULARY_FILE, with_vocabulary_section
from vispec.model.packing import PackableLinear, allow_packing
from vispec.model.passes import decoding_pass

logger = logging.getLogger("vispec")

FORMAT = 1
COMPARED_SIZES = (1 / 4, 1 / 2, 1, 2, 4)
"""Sizes whose coverage is printed, as multiples of the one asked for."""


class DraftOutput(NamedTuple):
    """How the estimates of a draft become tokens."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    """(…, H) -> (…, V), or (…, V') with a draft vocabulary."""
    token_ids: torch.Tensor | None = None
    """(V',) the token of each logit; None: they are all tokens, in order."""


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
                note = json.loads((file.metadata() or {})["vispec"])
                ids = file.get_tensor("token_ids")
            format, made_for, found = note.pop("format"), note.pop("vocab_size"), note.pop("fingerprint")
        except (SafetensorError, KeyError, ValueError) as error:
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
        except (OSError, ValueError):
            logger.warning("%s: no tokenizer there, so %s is not checked against it", base_model_path, self.source)
            return
        if fingerprint(tokenizer, self.token_ids) != self.fingerprint:
            raise ValueError(
                f"{self.source}: made for another tokenizer than that of {base_model_path}; make it anew, or load with "
                "draft_vocab=False"
            )

    def output(self, lm_head: nn.Module, device: torch.device) -> DraftOutput:
        """The rows of these tokens of the target's output head, copied to `device`: V' · H numbers more in memory.

        Raises:
            ValueError: the output head is no plain linear layer (it is quantised, say), or it was offloaded.
        """
        if type(lm_head) not in (nn.Linear, PackableLinear):
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
        for name, parameter in lm_head.named_parameters():
            setattr(rows, name, nn.Parameter(parameter.detach()[kept].to(device), requires_grad=False))
        allow_packing(rows)
        return DraftOutput(decoding_pass()(rows.forward), self.token_ids.to(device))


def fingerprint(tokenizer, token_ids: torch.Tensor) -> str:
    """SHA-256 of what these ids stand for in a tokenizer of transformers; ids that it does not use count as null."""
    tokens = tokenizer.convert_ids_to_tokens(token_ids.tolist())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


# --- counting ---


def rank_tokens(counts: torch.Tensor, required: Iterable[int]) -> torch.Tensor:
    """All tokens (V,): the required ones, then by frequency; among equals the lower id first.

    Args:
        counts: (V,) how often each token was seen.
        required: tokens that belong to every draft vocabulary.
    """
    keys = counts.clone()
    keys[list(required)] = counts.max() + 1
    return keys.sort(descending=True, stable=True).indices


def coverage(ranked: torch.Tensor, counts: torch.Tensor, size: int) -> float:
    """Share of the tokens counted in `counts` (V,) that are among the first `size` of `ranked`."""
    return float(counts[ranked[:size]].sum() / counts.sum())


def count_answers(paths: Sequence[Path], vocab_size: int, show: str) -> torch.Tensor:
    """(V,) how often each token stands in the answers of some sample files; `show` names the progress bar."""
    from tqdm import tqdm

    from vispec.ge_data.sample_file import read_tokens

    counts = torch.zeros(vocab_size, dtype=torch.long)
    for path in tqdm(paths, desc=show, unit="sample", mininterval=1):
        tokens = read_tokens(path)
        ids = tokens.input_ids[tokens.loss_mask]
        if len(ids) and int(ids.max()) >= vocab_size:
            raise UserError(f"{path}: token {int(ids.max())}, but the target has {vocab_size} tokens")
        counts.scatter_add_(0, ids, torch.ones_like(ids))
    return counts


# --- the command line ---


def main(argv: list[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    from vispec.train.samples import find_samples, hold_out

    paths, held_out_paths = hold_out(find_samples(args.counts, "--counts"))
    base = args.base_model_path or _model_of(args.counts)
    tokenizer, vocab_size, required = _read_target(base)
    _check(args, base, vocab_size, len(required))
    counts = count_answers(paths, vocab_size, "answers")
    held_out = count_answers(held_out_paths, vocab_size, "held out")
    ranked = rank_tokens(counts, required)
    seen = int((counts > 0).sum())
    print(f"{int(counts.sum())} answer tokens of {len(paths)} samples: {seen} of {vocab_size} tokens occur")
    unseen = int((counts[ranked[: args.size]] == 0).sum())
    if unseen:
        print(f"--size {args.size}: {unseen} of them never occur: special tokens or, to fill up, the lowest ids")
    made_by = provenance(args)
    facts = {
        "data": [Path(folder).resolve().name for folder in args.counts],  # of local folders, the rest is private
        "samples": len(paths),
        "answer_tokens": int(counts.sum()),
        "versions": made_by["versions"],
        "git_revision": made_by["git_revision"],
    }
    if held_out.sum():
        facts["coverage"] = coverage(ranked, held_out, args.size)
        _print_coverage(ranked, held_out, len(held_out_paths), args.size, len(required))
    else:
        print("coverage: not known, since no sample could be held out")
    if args.spec_model_path is None:
        print("nothing was written; --spec-model-path says which head the vocabulary is for")
        return 0
    ids = ranked[: args.size].sort().values
    vocabulary = DraftVocabulary(ids, vocab_size, fingerprint(tokenizer, ids), facts)
    print(f"draft vocabulary of {args.size} tokens: {vocabulary.write(args.spec_model_path)}")
    card = Path(args.spec_model_path, CARD)
    if card.is_file():
        text = with_vocabulary_section(card.read_text(encoding="utf-8"), vocabulary)
        write_atomic(card, lambda file: file.write(text.encode()))
    return 0


def _make_parser() -> argparse.ArgumentParser:
    from vispec.cli import Parser, count

    parser = Parser(
        prog="python -m vispec.model.draft_vocab",
        description="Count tokens in training answers and let a draft head propose only the frequent ones.",
    )
    add = parser.add_argument
    add("--counts", nargs="+", required=True, metavar="DATA", help="folders of training samples, with any --store")
    add("--size", type=count, required=True, help="tokens of the draft vocabulary")
    add("--spec-model-path", help="folder of the draft head; without it only the coverage is printed")
    add("--base-model-path", help="the target: a folder or a hub id (default: the one that made the data)")
    return parser


def _model_of(folders: Sequence[str]) -> str:
    """The target that the manifests of some data folders name."""
    from vispec.ge_data.run_folder import MANIFEST

    manifests = [path for folder in folders for path in sorted(Path(folder).rglob(MANIFEST))]
    models = {json.loads(path.read_text(encoding="utf-8"))["arguments"].get("model") for path in manifests}
    if len(models) != 1 or None in models:
        found = ", ".join(sorted(map(str, models))) or "none"
        raise UserError(f"--base-model-path is needed: the data's {MANIFEST} should name one target, found {found}")
    return models.pop()


def _read_target(base: str):
    """Tokenizer of a target, the size V of its vocabulary, and its special and end tokens."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(f"--base-model-path {base}: no tokenizer and config can be read there ({error})") from None
    try:
        generation = GenerationConfig.from_pretrained(base)
    except OSError:  # transformers itself then takes what the config says
        generation = GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id
    ends = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return tokenizer, config.get_text_config().vocab_size, sorted({*tokenizer.all_special_ids, *ends})


def _check(args: argparse.Namespace, base: str, vocab_size: int, required: int) -> None:
    """What can be wrong is said before the counting."""
    if not required <= args.size <= vocab_size:
        raise UserError(
            f"--size {args.size}: expected at least {required} (special and end tokens) and at most {vocab_size}"
        )
    if args.spec_model_path is None:
        return
    from vispec.model.checkpoints import CONFIG, read_config

    if not Path(args.spec_model_path).is_dir():
        raise UserError(f"--spec-model-path {args.spec_model_path}: expected a local folder with a draft head")
    found = read_config(Path(args.spec_model_path, CONFIG)).vocab_size
    if found != vocab_size:
        raise UserError(
            f"--spec-model-path {args.spec_model_path}: a head for {found} tokens, but {base} has {vocab_size}"
        )


def _print_coverage(ranked: torch.Tensor, held_out: torch.Tensor, samples: int, size: int, least: int) -> None:
    sizes = sorted({min(max(int(size * factor), least), len(ranked)) for factor in COMPARED_SIZES})
    print(f"coverage of {int(held_out.sum())} answer tokens of {samples} held-out samples:")
    print("| size | covered |\n|---|---|")
    for each in sizes:
        print(f"| {each}{' (--size)' if each == size else ''} | {coverage(ranked, held_out, each):.2%} |")


if __name__ == "__main__":
    run_cli(main)
