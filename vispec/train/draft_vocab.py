"""Makes a draft vocabulary: counts tokens in training answers, and lets a draft head propose only the frequent ones.

python -m vispec.train.draft_vocab --counts DATA [DATA …] --size 32768 --spec-model-path HEAD

puts `draft_vocab.safetensors` beside the head. The samples that training holds out are not counted; how much of their
answers is covered is printed, for other sizes too.

Shapes: V tokens of the target.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from vispec.cli import Parser, UserError, count, provenance, run_cli
from vispec.files import write_atomic
from vispec.ge_data.run_folder import MANIFEST, read_manifest
from vispec.ge_data.sample_file import read_tokens
from vispec.model.drafts.hub import CARD, with_vocabulary_section
from vispec.model.drafts.vocabulary import DraftVocabulary, fingerprint
from vispec.model.target_files import check_files
from vispec.train.samples import find_samples, hold_out

COMPARED_SIZES = (1 / 4, 1 / 2, 1, 2, 4)
"""Sizes whose coverage is printed, as multiples of the one asked for."""


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
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for path in tqdm(paths, desc=show, unit="sample", mininterval=1):
        tokens = read_tokens(path, vocab_size)
        ids = tokens.input_ids[tokens.loss_mask]
        counts.scatter_add_(0, ids, torch.ones_like(ids))
    return counts


def main(argv: list[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
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
    parser = Parser(
        prog="python -m vispec.train.draft_vocab",
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
    places = [path.parent for folder in folders for path in sorted(Path(folder).rglob(MANIFEST))]
    models = {read_manifest(place)["arguments"].get("model") for place in places}
    if len(models) != 1 or None in models:
        found = ", ".join(sorted(map(str, models))) or "none"
        raise UserError(f"--base-model-path is needed: the data's {MANIFEST} should name one target, found {found}")
    return models.pop()


def _read_target(base: str):
    """Tokenizer of a target, the size V of its vocabulary, and its special and end tokens."""
    from transformers import GenerationConfig

    from vispec.model.loading import load_config
    from vispec.prompts import load_tokenizer

    try:
        tokenizer, config = load_tokenizer(base), load_config(base)
    except ValueError as error:
        raise UserError(f"--base-model-path {base}: no tokenizer and config can be read there ({error})") from None
    check_files(base)  # the generation config among them
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
    from vispec.model.drafts.checkpoints import read_config
    from vispec.model.hub_files import CONFIG

    if not Path(args.spec_model_path).is_dir():
        raise UserError(f"--spec-model-path {args.spec_model_path}: expected a local folder with a draft head")
    config = read_config(Path(args.spec_model_path, CONFIG))
    if "draft_vocab_size" in config.extra:
        raise UserError(f"--spec-model-path {args.spec_model_path}: an EAGLE-3 head, which has a vocabulary of its own")
    found = config.vocab_size
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
