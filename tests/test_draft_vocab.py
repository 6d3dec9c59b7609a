"""Draft vocabularies: lossless whatever they hold, counted by hand, and files that are checked."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked_commands import finish
from safetensors.torch import save_file
from test_sampling import WARM, V, check_sampled
from tiny_models import GOLDEN, generate, image_prompt, random_head, random_target, read_prompt, text_prompt
from transformers import AutoTokenizer

from vispec import SpecModel
from vispec.ge_data.sample_file import Tokens, file_name, write_sample
from vispec.model.drafts import DraftHead, load_draft
from vispec.model.drafts.checkpoints import save_draft
from vispec.model.drafts.vocabulary import VOCABULARY_FILE, DraftVocabulary, fingerprint
from vispec.model.tree import choose_nodes
from vispec.train import draft_vocab

FAMILY = GOLDEN / "llava_next"
TARGET, DRAFT = str(FAMILY / "target"), FAMILY / "draft_vispec"
SIZE = 38
"""Tokens of that target."""
SPECIAL = [0, 1, 2, 3, 37]
"""Of its tokenizer; 2 ends a text."""


def vocabulary(*ids: int, vocab_size: int = SIZE) -> DraftVocabulary:
    ids = torch.tensor(sorted(ids))
    return DraftVocabulary(ids, vocab_size, fingerprint(AutoTokenizer.from_pretrained(TARGET), ids))


def restricted_pair(family: str, method: str, ids: list[int], seed: int = 2, tree=(30, 3, 8), **options) -> SpecModel:
    target = random_target(family, seed, **options)
    head = random_head(target, method, seed + 1)
    vocab_size = head.config.vocab_size
    head.draft_vocab = DraftVocabulary(torch.tensor(ids), vocab_size, "")
    return SpecModel(target, head, *tree)


# --- decoding ---


@pytest.mark.parametrize("method", ["vispec", "eagle2", "medusa"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_greedy_answers_are_the_targets(family, method):
    """With all tokens that the answers hold, with two of them, and with none."""
    target = random_target(family, 2, vocabulary=12)
    prompts = [image_prompt(target, seed, layout) for seed, layout in enumerate((".", "a.bb."))]
    answers = [generate(target, prompt, max_new_tokens=16) for prompt in prompts]
    said = {token for ids, prompt in zip(answers, prompts, strict=True) for token in new_ids(ids, prompt)}
    unsaid = sorted(set(range(12)) - said)
    assert unsaid, "choose another seed"
    accepted = {}
    for name, ids in (("all said", sorted(said)), ("two", sorted(said)[:2]), ("none", unsaid)):
        head = random_head(target, method, seed=5)
        head.draft_vocab = DraftVocabulary(torch.tensor(ids), 12, "")
        model = SpecModel(target, head, 30, 3, 8)
        assert model.shape.top_k <= len(ids)
        lengths = []
        for prompt, answer in zip(prompts, answers, strict=True):
            found, more = model.specgenerate(**prompt, max_new_tokens=16, return_acceptance_len=True)
            assert found.tolist() == answer.tolist()
            lengths += more
        accepted[name] = sum(lengths)
    assert accepted["all said"] > 0 and accepted["none"] == 0


def new_ids(answer: torch.Tensor, prompt: dict) -> list[int]:
    return answer[0, prompt["input_ids"].shape[1] :].tolist()


def target_with(lm_head: torch.nn.Module) -> SimpleNamespace:
    """Stands in for a target whose output head alone is asked for."""
    return SimpleNamespace(lm_head=lm_head, device=torch.device("cpu"), fast=True, rescale=None)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_logits_are_rows_of_the_targets(bias):
    generator = torch.Generator().manual_seed(0)
    target = target_with(torch.nn.Linear(16, 9, bias=bias))
    ids = torch.tensor([0, 4, 5, 8])
    hidden = torch.randn(2, 3, 16, generator=generator)
    for target.fast in (True, False):
        output = DraftVocabulary(ids, 9, "").output(target)
        output.expect([6])
        torch.testing.assert_close(output.logits(hidden), target.lm_head(hidden)[..., ids])
        assert output.token_ids.tolist() == ids.tolist()
    target.rescale = torch.tanh
    output = DraftVocabulary(ids, 9, "").output(target)
    torch.testing.assert_close(output.logits(hidden), target.lm_head(hidden)[..., ids].tanh())


@pytest.mark.parametrize("method", ["vispec", "medusa"])
@torch.inference_mode()
def test_a_full_vocabulary_changes_nothing(method):
    """In any order of the rows: the tokens of the trees are then mapped back."""
    trees = []
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1)).tolist()
    for ids in (None, list(range(SIZE)), order):
        model = restricted_pair("llava_next", method, ids or [0])
        if ids is None:
            model.draft.draft_vocab = None
            model = SpecModel(model.target.model, model.draft, 30, 3, 8)
        prompt = model.target.prefill(model.target.new_cache(1, 200), *inputs_of(model))
        root = torch.tensor([7])
        memory = read_prompt(model.draft, model.target, prompt, root)
        candidates = model.draft.candidates(memory, model.shape, model.draft.output(model.target))
        trees.append(choose_nodes(root, candidates, model.shape))
    for tree in trees[1:]:
        assert torch.equal(tree.tokens, trees[0].tokens) and torch.equal(tree.parents, trees[0].parents)


def inputs_of(model: SpecModel) -> tuple[torch.Tensor, dict]:
    inputs = image_prompt(model.target.model, 1, ".a.")
    return inputs.pop("input_ids"), inputs


def test_sampled_answers_follow_the_target():
    model = restricted_pair("llava_1.5", "eagle2", [1, 3, 4], seed=11, tree=(9, 1, 4), vocabulary=V, std=0.15)
    check_sampled(model, text_prompt(model.target.model, 3, seed=1)["input_ids"], WARM, answers=400, least=60)


def test_output_heads_that_cannot_be_restricted():
    class Quantised(torch.nn.Linear):
        pass

    few = vocabulary(*SPECIAL)
    with pytest.raises(ValueError, match="output head is a Quantised, .* plain linear layer; load with draft_vocab"):
        few.output(target_with(Quantised(4, SIZE)))
    with pytest.raises(ValueError, match="output head is offloaded"):
        few.output(target_with(torch.nn.Linear(4, SIZE, device="meta")))


# --- files ---


@pytest.fixture
def head(tmp_path) -> Path:
    """A copy of a recorded draft head."""
    return Path(shutil.copytree(DRAFT, tmp_path / "head"))


def test_loading_and_leaving_it_alone(head):
    vocabulary(*SPECIAL, 9, 11).write(head)
    model = SpecModel.from_pretrained(TARGET, str(head))
    assert model.draft.draft_vocab.token_ids.tolist() == [0, 1, 2, 3, 9, 11, 37]
    restricted = model.draft.output(model.target)
    assert model.shape.top_k == 7 and restricted.token_ids.tolist() == [0, 1, 2, 3, 9, 11, 37]
    model = SpecModel.from_pretrained(TARGET, str(head), draft_vocab=False)
    assert model.draft.draft_vocab is None and model.draft.output(model.target).token_ids is None
    assert model.shape.top_k == 8


def test_round_trip_with_the_head(head, tmp_path):
    vocabulary(*SPECIAL, 9).write(head)
    (head / "README.md").write_text("# A head\n")
    draft = DraftHead.from_pretrained(str(head))
    draft.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / VOCABULARY_FILE).read_bytes() == (head / VOCABULARY_FILE).read_bytes()
    again = load_draft(str(tmp_path / "again"))
    assert again.draft_vocab.token_ids.tolist() == draft.draft_vocab.token_ids.tolist()
    assert again.draft_vocab.fingerprint == draft.draft_vocab.fingerprint
    draft.card = None
    draft.save_pretrained(tmp_path / "carded")
    assert "proposes 6 of 38 tokens only (`draft_vocab.safetensors`)." in (tmp_path / "carded/README.md").read_text()
    draft.draft_vocab = None
    save_draft(draft, tmp_path / "without")
    assert not (tmp_path / "without" / VOCABULARY_FILE).exists()


def write_file(folder: Path, ids, **note) -> None:
    values = {"format": 1, "vocab_size": SIZE, "fingerprint": "x", **note}
    save_file({"token_ids": torch.as_tensor(ids)}, folder / VOCABULARY_FILE, {"vispec": json.dumps(values)})


@pytest.mark.parametrize(
    ("ids", "note", "message"),
    [
        ([0, SIZE], {}, "token ids from 0 to 38, expected 0 to 37"),
        ([-1, 4], {}, "token ids from -1 to 4"),
        ([3, 3, 5], {}, "not ascending"),
        ([5, 3], {}, "not ascending"),
        ([0.5], {}, r"token_ids is torch.float32 \(1,\), expected int64"),
        ([[1], [2]], {}, r"token_ids is torch.int64 \(2, 1\)"),
        ([1, 2], {"vocab_size": 50}, "made for a vocabulary of 50 tokens, the head's has 38"),
        ([1, 2], {"format": 2}, "format 2, expected 1"),
    ],
)
def test_wrong_files_are_named(head, ids, note, message):
    write_file(head, ids, **note)
    with pytest.raises(ValueError, match=f"head/{VOCABULARY_FILE}: .*{message}"):
        load_draft(str(head))
    assert load_draft(str(head), draft_vocab=False).draft_vocab is None


def test_what_is_no_such_file(head):
    (head / VOCABULARY_FILE).write_bytes(b"words")
    with pytest.raises(ValueError, match=f"{VOCABULARY_FILE}: not a draft vocabulary"):
        load_draft(str(head))
    save_file({"token_ids": torch.tensor([1])}, head / VOCABULARY_FILE)
    with pytest.raises(ValueError, match=f"{VOCABULARY_FILE}: not a draft vocabulary"):
        load_draft(str(head))


def test_another_tokenizer_is_refused(head, tmp_path, caplog):
    vocabulary(*SPECIAL, 9, 11).write(head)
    target = Path(shutil.copytree(TARGET, tmp_path / "target"))
    values = json.loads((target / "tokenizer.json").read_text())
    tokens = values["model"]["vocab"]
    swapped = {9: 10, 10: 9}
    values["model"]["vocab"] = {token: swapped.get(i, i) for token, i in tokens.items()}
    (target / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="made for another tokenizer than that of .*target; .*draft_vocab=False"):
        SpecModel.from_pretrained(str(target), str(head))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (target / name).unlink()
    with caplog.at_level(logging.WARNING, "vispec"):
        assert SpecModel.from_pretrained(str(target), str(head)).draft.draft_vocab is not None
    assert f"no tokenizer there, so {head / VOCABULARY_FILE} is not checked against it" in caplog.text


# --- the command line ---


def write_data(folder: Path, answers: list[list[int]], model: str | None = TARGET) -> str:
    """Samples of five prompt tokens, which do not count, and an answer."""
    folder.mkdir()
    for index, answer in enumerate(answers):
        ids = torch.tensor([30, 31, 32, 33, 34, *answer])
        write_sample(folder / file_name(index), Tokens(ids, torch.arange(len(ids)) >= 5, []))
    if model:
        (folder / "manifest.json").write_text(json.dumps({"arguments": {"model": model}}))
    return str(folder)


# sample 2 of these 4 is the one that training holds out
ANSWERS = [[9, 9, 9, 2], [10, 10, 9, 2], [9, 10, 11, 12, 35, 2, 9, 9], [12, 9, 8, 2]]


def test_counts_and_coverage(head, tmp_path, capsys):
    data = write_data(tmp_path / "data", ANSWERS)
    (head / "README.md").write_text("# A head\n\n## Draft vocabulary\n\nan earlier one\n\n## Thanks\n")
    assert draft_vocab.main(["--counts", data, "--size", "7", "--spec-model-path", str(head)]) == 0
    printed = capsys.readouterr().out
    assert "12 answer tokens of 3 samples: 5 of 38 tokens occur" in printed
    assert "--size 7: 4 of them never occur" in printed, "of the special tokens only 2 was seen"
    assert "coverage of 8 answer tokens of 1 held-out samples" in printed
    # 9 occurs five times, 10 twice, then 8 and 12 once: of the held-out answer 9, 10, 2, 9, 9 are covered
    assert "| 7 (--size) | 62.50% |" in printed and "| 5 | 12.50% |" in printed
    assert "| 14 | 87.50% |" in printed, "8, 12, and to fill up 4, 5, 6, 7, 11"
    assert "| 28 | 87.50% |" in printed
    found = load_draft(str(head)).draft_vocab
    assert found.token_ids.tolist() == sorted([*SPECIAL, 9, 10])
    assert found.facts["coverage"] == 0.625 and found.facts["data"] == ["data"]
    assert str(tmp_path) not in str(found.facts)
    card = (head / "README.md").read_text()
    assert "7 of 38 tokens only (`draft_vocab.safetensors`), which cover 62.50% of" in card
    assert card.count("## Draft vocabulary") == 1 and "earlier" not in card and "\n## Thanks\n" in card
    model = SpecModel.from_pretrained(TARGET, str(head))
    inputs = text_prompt(model.target.model, 4, seed=1)
    answer = model.specgenerate(**inputs, max_new_tokens=12)
    assert answer.tolist() == model.baseline_generate(**inputs, max_new_tokens=12).tolist()


def test_several_folders_and_nothing_to_write(tmp_path, capsys):
    one, other = write_data(tmp_path / "a", [[9, 9]]), write_data(tmp_path / "b", [[10]], model=None)
    assert draft_vocab.main(["--counts", one, other, "--size", "6"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was written; --spec-model-path says which head" in printed
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [file_name(0)] * 2


def test_one_sample_has_no_coverage(tmp_path, capsys):
    assert draft_vocab.main(["--counts", write_data(tmp_path / "a", [[9, 10]]), "--size", "6"]) == 0
    assert "coverage: not known, since no sample could be held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "4"], r"--size 4: expected at least 5 \(special and end tokens\) and at most 38"),
        (["--size", "39"], "--size 39: .* at most 38"),
        (["--size", "9", "--spec-model-path", "nowhere"], "--spec-model-path nowhere: expected a local folder"),
        (["--size", "9", "--spec-model-path", "DATA"], "config.json: no such configuration file"),
        (["--size", "9", "--base-model-path", "DATA"], "--base-model-path .*data: no tokenizer and config"),
        (["--size", "9", "--counts", "nowhere"], "--counts nowhere: no such folder"),
        (
            ["--size", "9", "--spec-model-path", str(GOLDEN / "qwen2_5_vl" / "draft_vispec")],
            "a head for 41 tokens, but .*target has 38",
        ),
    ],
)
def test_user_errors(flags, message, tmp_path):
    data = write_data(tmp_path / "data", ANSWERS)
    flags = [data if flag == "DATA" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        draft_vocab.main(["--counts", data, *flags])


def test_wrong_data(tmp_path):
    data = write_data(tmp_path / "data", [[9], [SIZE]])
    with pytest.raises(ValueError, match="token 38, but the target has 38 tokens"):
        draft_vocab.main(["--counts", data, "--size", "9"])
    bare = write_data(tmp_path / "bare", [[9], [10]], model=None)
    with pytest.raises(ValueError, match="--base-model-path is needed: .* should name one target, found none"):
        draft_vocab.main(["--counts", bare, "--size", "9"])


def test_as_a_command(tmp_path):
    command = ["vispec.train.draft_vocab", "--counts", str(tmp_path / "none"), "--size", "9"]
    (tmp_path / "none").mkdir()
    said = finish(command, tmp_path / "log", code=1)
    assert said == f"error: --counts {tmp_path / 'none'}: no sample files (.safetensors) there\n"
