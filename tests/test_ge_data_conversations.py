"""Conversations: exactly the assistant's tokens are scored, bad rows are told apart."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tiny_rows import turn
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vispec.cli import UserError
from vispec.embedded import TARGET
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
    count = rng.randint(1, 12)
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
        ids, mask = [tokenizer.bos_token_id], [False]  # the tokenizer's, since neither text begins with it
        for text, is_answer in (qwen_pieces if qwen else vicuna_pieces)(turns):
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            mask += [is_answer] * len(piece)
        limit = rng.choice([10_000, rng.randint(100, 400)])
        if not any(mask[:limit]):
            with pytest.raises(SkipRow, match="no answer within"):
                tokenize(tokenizer, *render(turns), limit)
            continue
        found_ids, found_mask = tokenize(tokenizer, *render(turns), limit)
        assert found_ids.tolist() == ids[:limit]
        assert found_mask.tolist() == mask[:limit]


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Built like Vicuna's: spaces inside tokens, one more after each special token, bytes where a character is new."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    corpus = [VICUNA, "USER: hi two  spaces ASSISTANT: hi a x USER: hi ASSISTANT: hi"] * 3
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in corpus], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = learned["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in learned["merges"]]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(SPECIAL)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def embedded_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded target's: byte-level tokens of several characters."""
    return PreTrainedTokenizerFast.from_pretrained(TARGET)


def bytes_of(tokenizer, ids) -> list[bytes]:
    """What each token stands for in the text, found by its spelling alone."""
    byte_level = isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    spelling = _byte_level_alphabet()
    found = []
    after_special = True
    for token in tokenizer.convert_ids_to_tokens(ids):
        special = token in tokenizer.all_special_tokens or token in SPECIAL
        if special or not byte_level and token.startswith("<0x"):
            found.append(token.encode() if special else bytes([int(token[3:5], 16)]))
        elif byte_level:
            found.append(bytes(spelling[character] for character in token))
        else:
            found.append(token[after_special:].replace("▁", " ").encode())  # a segment's first space is not the text's
        after_special = special
    return found


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@pytest.mark.parametrize(
    ("make_tokenizer", "family"),
    [(metaspace_tokenizer, "llava"), (embedded_tokenizer, "llava"), (embedded_tokenizer, "qwen")],
)
def test_masks_of_tokens_of_several_characters(make_tokenizer, family):
    """Brute force: the tokens' bytes one after another are the text, so each token's first character is known."""
    tokenizer = make_tokenizer()
    qwen = family == "qwen"
    template = TEMPLATES["Qwen/Qwen2.5-VL-3B-Instruct"]
    render = ChatRenderer(tokenizer, template, QWEN_SYSTEM) if qwen else render_vicuna
    scored = 0
    for seed in range(40):
        rng = random.Random(seed)
        turns = random_turns(rng)
        pieces = list((qwen_pieces if qwen else vicuna_pieces)(turns))
        text = "".join(piece for piece, _ in pieces)
        is_answer = [*(answer for piece, answer in pieces for _ in piece), False]
        limit = rng.choice([10_000, rng.randint(50, 150)])
        try:
            ids, mask = tokenize(tokenizer, *render(turns), limit)
        except SkipRow:
            ids, mask = None, None
        everything = tokenizer(text, add_special_tokens=False)["input_ids"]
        content = text.encode()
        expected, place = [], 0
        for token in bytes_of(tokenizer, everything):
            assert content[place : place + len(token)] == token
            expected.append(is_answer[len(content[:place].decode(errors="ignore"))])
            place += len(token)
        assert place == len(content)
        everything, expected = [tokenizer.bos_token_id, *everything], [False, *expected]
        if mask is None:
            assert not any(expected[:limit])
            continue
        assert ids.tolist() == everything[:limit]
        assert mask.tolist() == expected[:limit]
        scored += mask.sum().item()
    assert scored > 500


def test_templates_of_text_models_want_strings():
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(False)
    text, spans = ChatRenderer(tokenizer, chatml, "be kind")([("human", "hi"), ("gpt", "yes")])
    assert [text[start:end] for start, end in spans] == ["yes<|im_end|>"]


TURNS = [("human", "hi"), ("gpt", "yes"), ("human", "so?"), ("gpt", "no")]
PLAIN = "{{ m['role'] }}: {{ m['content'] }}.{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
NO_SYSTEM = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + PLAIN
FEW = "{% for m in messages %}{% if loop.index > 4 %}{{ raise_exception('too many') }}{% endif %}" + PLAIN
LAST = "{{ m['role'] }}: {% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
THINKS = "{% for m in messages %}" + PLAIN.replace("{{ m['role'] }}: ", LAST)


def test_a_system_text_that_is_refused_begins_the_first_human_turn():
    text, spans = ChatRenderer(byte_tokenizer(False), NO_SYSTEM, "be kind")(TURNS)
    assert text.startswith("user: be kind\n\nhi.assistant: yes.")
    assert [text[start:end] for start, end in spans] == ["yes.", "no."]


@pytest.mark.parametrize(("template", "reason"), [(FEW, "refuses the conversation"), (THINKS, "rewrites earlier")])
def test_a_conversation_that_the_template_does_not_fit_is_skipped(template, reason):
    render = ChatRenderer(byte_tokenizer(False), template, "be kind")
    assert len(render(TURNS[:2])[1]) == 1
    with pytest.raises(SkipRow, match=reason):
        render(TURNS)


@pytest.mark.parametrize("template", ["{% for", "{{ 1 / 0 }}", "{{ raise_exception('never') }}", "hello"])
def test_a_template_that_cannot_be_used_is_one_line(template):
    with pytest.raises(UserError, match="the target's chat template cannot be used") as caught:
        ChatRenderer(byte_tokenizer(False), template, "be kind")
    assert "\n" not in str(caught.value)


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
