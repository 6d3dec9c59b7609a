"""One family's trial: both arms against the model's own generate(), greedy, token for token in float32."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vispec import SpecModel
from vispec.cli import one_line
from vispec.evaluation.families.family import Family, Inputs, tiny_model
from vispec.evaluation.families.oracle import Oracle
from vispec.evaluation.families.prompts import batch_of, prompt_of
from vispec.evaluation.random_pairs import randomize
from vispec.model.drafts import BaseHead, Draft, PromptLookup, build_head
from vispec.model.drafts.config import DraftConfig
from vispec.model.shape import TreeShape
from vispec.model.target import Target

PROMPTS = {
    "text": ("...",),
    "one image": (".a.",),
    "two images": (".a.b.",),
    "touching": (".ab.",),
    "video": (".A.", ".AB."),
    "image and video": (".a.A.",),
}
BATCHES = {"video": (".A.", "...", ".B.."), "batch": (".a.b.", "...", ".b..")}
COLUMNS = (*PROMPTS, "heads", "batch")
NEW_TOKENS = 24
TREE = TreeShape(12, 3, 4)

WORKS, REFUSED, FAILED, DIFFERS, NOT_TRIED = "yes", "refused", "error", "DIFFERS", "–"


@dataclass(frozen=True)
class Outcome:
    """What came of one column."""

    verdict: str
    """WORKS, REFUSED (a ValueError, which is a line), FAILED (any other error), DIFFERS or NOT_TRIED."""
    reason: str = ""


class OtherTokens(Exception):
    """An answer is not the model's own."""


class OwnFailure(Exception):
    """The model's own generate() does not answer, so there is nothing to compare with."""


def try_family(family: Family, seed: int = 1) -> dict[str, Outcome] | None:
    """What comes of each column; None where this version of transformers does not have the family."""
    model = tiny_model(family, seed)
    if model is None:
        return None
    try:
        speculating(model, PromptLookup())
    except Exception as error:  # whatever goes wrong is what the table has to say
        return dict.fromkeys(COLUMNS, _outcome(error))
    return {column: _try_column(family, model, column, seed) for column in COLUMNS}


def speculating(model: PreTrainedModel, draft: Draft) -> SpecModel:
    """With TREE, or with the chain of its depth where the target follows chains alone."""
    target = Target(model)
    return SpecModel(target, draft, tree=target.fit(TREE))


def _try_column(family: Family, model: PreTrainedModel, column: str, seed: int) -> Outcome:
    wanted = {"text": (), "video": (family.videos,), "image and video": (family.images, family.videos)}
    if None in wanted.get(column, (family.images,)):
        return Outcome(NOT_TRIED)
    try:
        if column == "heads":
            _compare_heads(model, prompt_of(family, model, ".a.b.", seed))
        for layout in PROMPTS.get(column, ()):
            _compare(model, prompt_of(family, model, layout, seed))
        if column in BATCHES:
            prompts = [prompt_of(family, model, layout, seed + row) for row, layout in enumerate(BATCHES[column])]
            _compare_batch(model, prompts, family.join)
    except Exception as error:
        return _outcome(error)
    return Outcome(WORKS)


def _outcome(error: Exception) -> Outcome:
    if isinstance(error, OtherTokens):
        return Outcome(DIFFERS, one_line(error))
    if isinstance(error, OwnFailure):
        return Outcome(NOT_TRIED, f"its own generate() fails: {one_line(error)}")
    if isinstance(error, ValueError):
        return Outcome(REFUSED, one_line(error))
    return Outcome(FAILED, f"{type(error).__name__}: {one_line(error)}")


def _compare(model: PreTrainedModel, prompt: Inputs) -> None:
    expected = own_answer(model, prompt)
    _require_wandering(expected)
    baseline = SpecModel(model).baseline_generate(**prompt, max_new_tokens=NEW_TOKENS)
    _require(baseline, expected, "plain decoding")
    for name, draft in _drafts(model, [expected[0]]):
        answer, _, last_round = speculating(model, draft).specgenerate(**prompt, max_new_tokens=NEW_TOKENS, log=True)
        _require(answer, expected, name)
        if isinstance(draft, Oracle) and last_round + 1 > NEW_TOKENS * 2 // 3:
            raise AssertionError(f"the draft that knows the answer took {last_round + 1} rounds: the trial says little")


def _compare_heads(model: PreTrainedModel, prompt: Inputs) -> None:
    expected = own_answer(model, prompt)
    for method in ("vispec", "eagle2"):
        answer = speculating(model, random_head(model, method)).specgenerate(**prompt, max_new_tokens=NEW_TOKENS)
        _require(answer, expected, f"a {method} head")


def _compare_batch(model: PreTrainedModel, prompts: list[Inputs], join: Callable | None) -> None:
    """Every row is answered as its prompt alone."""
    texts = [own_answer(model, prompt)[0] for prompt in prompts]
    expected = torch.stack([text[-NEW_TOKENS:] for text in texts])
    _require_wandering(expected)
    batch = batch_of(prompts, join)
    for name, draft in _drafts(model, texts):
        answer = speculating(model, draft).specgenerate(**batch, max_new_tokens=NEW_TOKENS)
        _require(answer[:, -NEW_TOKENS:], expected, f"a batch, {name}")


def _drafts(model: PreTrainedModel, texts: list[torch.Tensor]) -> Iterator[tuple[str, Draft]]:
    yield "prompt lookup", PromptLookup()
    yield "a draft that knows the answer", Oracle(texts, model.get_input_embeddings().weight.shape[0])


@torch.inference_mode()
def own_answer(model: PreTrainedModel, prompt: Inputs) -> torch.Tensor:
    """(1, L + NEW_TOKENS) what the model's own generate() says."""
    try:
        return model.generate(**prompt, do_sample=False, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS)
    except Exception as error:
        raise OwnFailure(one_line(error)) from error


def _require(found: torch.Tensor, expected: torch.Tensor, arm: str) -> None:
    for row, (ours, theirs) in enumerate(zip(found.tolist(), expected.tolist(), strict=True)):
        if ours != theirs:
            equal = [pair[0] == pair[1] for pair in zip(ours, theirs, strict=False)]
            place = [*equal, False].index(False)
            new = place - (len(theirs) - NEW_TOKENS)
            raise OtherTokens(f"{arm}: row {row} parts from generate() at new token {new}")


def _require_wandering(answers: torch.Tensor) -> None:
    if all(len(set(answer)) == 1 for answer in answers[:, -NEW_TOKENS:].tolist()):
        raise AssertionError("the model's own answer is one token again and again: the trial says little")


def random_head(model: PreTrainedModel, method: str) -> BaseHead:
    """A draft head with random weights and the target's embeddings."""
    embedding = model.get_input_embeddings()
    vocabulary, width = embedding.weight.shape
    sizes = {"hidden_size": width, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    head = build_head(DraftConfig(**sizes, vocab_size=vocabulary, rms_norm_eps=1e-5), method)
    head.embed_tokens = None
    head.to_empty(device=embedding.weight.device)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        randomize(head)
    head.embed_tokens = embedding
    return head.eval()
