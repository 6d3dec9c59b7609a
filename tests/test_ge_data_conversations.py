"""Conversations: exactly the assistant's tokens are scored, bad rows are told apart."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vispec.ge_data.conversations import QWEN_SYSTEM, ChatRenderer, SkipRow, read_turns, render_vicuna, tokenize
from vispec.ge_data.sources import shuffled

TEMPLATES = json.loads((Path(__file__).parent / "golden" / "published_chat_templates.json").read_text())
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
PIECES = [
    "hi",
    "",
    " ",
    "two  spaces",
    "\n",
    "</s>",
    "USER: x",
    " ASSISTANT:",
    "<|im_end|>",
    "é漢🙂",
    "a\tb ",
    "<|im_start|>u",
]


def byte_tokenizer(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """One token a byte, so that text can be tokenised piece by piece; some tokenizers cut spaces off their offsets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    steps = [processors.ByteLevel(trim_offsets=True), bos] if trim_offsets else [bos]
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def vicuna_pieces(turns):
    """(text, is answer), written out by hand."""
    yield VICUNA + " ", False
    for role, text in turns:
        yield ("USER:" if role == "human" else "ASSISTANT:"), False
        if text:  # FastChat writes nothing after the colon for an empty turn
            yield (f" {text} " if role == "human" else f" {text}</s>"), role == "gpt"


def qwen_pieces(turns):
    yield f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n", False
    for role, text in turns:
        yield ("<|im_start|>user\n" if role == "human" else "<|im_start|>assistant\n"), False
        yield f"{text}<|im_end|>", role == "gpt"
        yield "\n", False


def random_turns(rng):
    count = rng.randint(2, 12)
    text = lambda: "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 3)))  # noqa: E731
    return [(("human", "gpt")[i % 2], text()) for i in range(count)]


@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_masks_are_the_assistant_s_tokens(family, trim_offsets):
    tokenizer = byte_tokenizer(trim_offsets)
    qwen = family == "qwen"
    template = TEMPLATES["Qwen/Qwen2.5-VL-3B-Instruct"]
    render = ChatRenderer(tokenizer, template, QWEN_SYSTEM) if qwen else render_vicuna
    for seed in range(40):
        rng = random.Random(seed)
        turns = random_turns(rng)
        ids, mask = ([], []) if qwen else ([tokenizer.bos_token_id], [False])
        for text, is_answer in (qwen_pieces if qwen else vicuna_pieces)(turns):
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            mask += [is_answer] * len(piece)
        limit = rng.choice([10_000, rng.randint(100, 400)])
        if not any(mask[:limit]):
            with pytest.raises(SkipRow, match="no answer within"):
                tokenize(tokenizer, *render(turns), limit, add_special_tokens=not qwen)
            continue
        found_ids, found_mask = tokenize(tokenizer, *render(turns), limit, add_special_tokens=not qwen)
        assert found_ids.tolist() == ids[:limit]
        assert found_mask.tolist() == mask[:limit]


def test_templates_of_text_models_want_strings():
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(False)
    text, spans = ChatRenderer(tokenizer, chatml, "be kind")([("human", "hi"), ("gpt", "yes")])
    assert [text[start:end] for start, end in spans] == ["yes<|im_end|>"]


def turn(who, value="x"):
    return {"from": who, "value": value}


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], "no conversation"),
        (None, "no conversation"),
        ([turn("human"), turn("human")], "roles do not alternate"),
        ([turn("human"), turn("gpt"), turn("gpt")], "roles do not alternate"),
        ([turn("human"), turn("bard")], "roles do not alternate"),
        ([turn("gpt")], "no human turn"),
        ([turn("human")], "no answer"),
        ([turn("human"), turn("gpt", None)], "malformed turn"),
        (["x"], "malformed turn"),
    ],
)
def test_bad_rows_have_reasons(conversation, reason):
    with pytest.raises(SkipRow, match=reason):
        read_turns({"conversations": conversation})


def test_a_leading_turn_that_is_not_the_human_s_is_left_out():
    turns = read_turns({"conversations": [turn("system"), turn("human", "a"), turn("gpt", "b")]})
    assert turns == [("human", "a"), ("gpt", "b")]


def test_order_is_that_of_datasets():
    datasets = pytest.importorskip("datasets")
    rows = [{"row": i} for i in range(100)]
    expected = datasets.Dataset.from_list(rows).shuffle(seed=42)["row"]
    assert [shuffled(rows)[i]["row"] for i in range(100)] == list(expected)
    assert not np.array_equal(expected, range(100))
