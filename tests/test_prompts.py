"""Prompts pinned for the published chat templates, and text from token ids."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vispec import text
from vispec.cli import UserError
from vispec.ge_data.conversations import tokenize
from vispec.pictures import UnreadableImage
from vispec.prompts import (
    RefusedPrompt,
    ReservedWord,
    Turn,
    build_inputs,
    chat_messages,
    image_file,
    load_processor,
    user_turn,
)

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = json.loads((GOLDEN / "published_chat_templates.json").read_text())
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
PICTURE = Image.new("RGB", (60, 40), "red")
QUESTION = user_turn("What is it?", "Explain.", PICTURE)
LLAVA = f"{SYSTEM} USER: <image>\nWhat is it? Explain. ASSISTANT:"
QWEN = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is it?Explain."
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
)
EXPECTED = {name: QWEN if name.startswith("Qwen") else LLAVA for name in TEMPLATES}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_the_published_targets(name):
    processor = load_processor(str(GOLDEN / "llava_next" / "target"))
    processor.chat_template = TEMPLATES[name]
    found = processor.apply_chat_template(chat_messages([QUESTION]), add_generation_prompt=True, tokenize=False)
    assert found == EXPECTED[name]


def test_turns_of_several_images_and_shots():
    shot = Turn("assistant", ("The answer is A.",))
    roles = [(m["role"], [c["type"] for c in m["content"]]) for m in chat_messages([QUESTION, shot, QUESTION])]
    question = ("user", ["text", "text", "image"])
    assert roles == [("system", ["text"]), question, ("assistant", ["text"]), question]


needs_torchvision = pytest.mark.skipif(
    transformers.__version__ >= "5" and importlib.util.find_spec("torchvision") is None,
    reason="Qwen's processor wants torchvision under transformers 5",
)


@pytest.mark.parametrize("family", ["llava_next", "llava_1.5", pytest.param("qwen2_5_vl", marks=needs_torchvision)])
def test_inputs_hold_all_images(family):
    processor = load_processor(str(GOLDEN / family / "target"))
    one, two = (build_inputs(processor, [user_turn("what?", *[PICTURE] * n)])["input_ids"].shape[1] for n in (1, 2))
    none = build_inputs(processor, [user_turn("what?")])
    assert two - one > 10 and "pixel_values" not in none


@needs_torchvision
def test_pixel_limits_are_qwens_alone():
    for family, grows in (("qwen2_5_vl", True), ("llava_next", False)):
        lengths = [
            build_inputs(load_processor(str(GOLDEN / family / "target"), limits), [QUESTION])["input_ids"].shape[1]
            for limits in (False, True)
        ]
        assert (lengths[1] > lengths[0]) == grows


def test_no_chat_template():
    processor = load_processor(str(GOLDEN / "llava_next" / "target"))
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        build_inputs(processor, [QUESTION])


def test_images_are_opened_upright_and_in_colour(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    picture = image_file(tmp_path / "turned.jpg")()
    assert picture.size == (10, 30) and picture.mode == "RGB"
    later = image_file(tmp_path / "missing.jpg")
    with pytest.raises(UnreadableImage):
        later()


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that characters are spread over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)


def test_stream_gives_out_whole_characters(byte_tokenizer):
    written = " Größe: 猫 🎈, fin"
    ids = byte_tokenizer.encode(written) + [0]
    stream = text.TextStream(byte_tokenizer)
    seen = [stream.push([token], [False]) for token in ids]
    pieces = [piece for pieces in seen for piece, _ in pieces]
    assert "".join(pieces) == written.lstrip() and stream.finish() == []
    assert "🎈" in pieces and all(len(piece) == 1 for piece in pieces)


def test_stream_ends_inside_a_character(byte_tokenizer):
    ids = byte_tokenizer.encode("a猫")[:-1]
    stream = text.TextStream(byte_tokenizer)
    assert stream.push(ids, [True] * len(ids)) == [("a", True)]
    assert stream.finish() == [("\ufffd", False)]


def test_bytes_that_are_no_text_do_not_stop_the_stream(byte_tokenizer):
    ids = byte_tokenizer.encode("a猫")[:-1] + byte_tokenizer.encode("b猫c")
    stream = text.TextStream(byte_tokenizer)
    shown = "".join(piece for piece, _ in stream.push(ids, [True] * len(ids)) + stream.finish())
    assert shown == byte_tokenizer.decode(ids) and shown.endswith("b猫c")


def test_finished_answers(byte_tokenizer):
    ids = byte_tokenizer.encode("  Assistant: Two cats.\n") + [0]
    assert text.answer_text(byte_tokenizer, ids) == "Two cats."
    assert text.answer_text(byte_tokenizer, byte_tokenizer.encode("An Assistant: no")) == "An Assistant: no"


def test_colours(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert text.wants_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not text.wants_colour(Terminal())
    pieces = [("a ", False), ("cat", True)]
    assert text.coloured(pieces, False) == "a cat"
    assert text.coloured(pieces, True) == "a \x1b[32mcat\x1b[0m"


# --- templates and texts as people have them ---

ITEMS = "{% for c in m['content'] %}{% if c['type']=='image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    f"{{{{ m['role'] }}}}: {ITEMS}{{% endfor %}}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    f"{{{{ raise_exception('roles must alternate') }}}}{{% endif %}}{{{{ m['role'] }}}}: {ITEMS}{{% endfor %}}"
)


@pytest.fixture
def processor():
    return load_processor(str(GOLDEN / "llava_1.5" / "target"))


def built(processor, turns, system="be kind") -> str:
    """The text of which a prompt was made."""
    texts = []
    plain = type(processor).__call__

    class Watched(type(processor)):
        def __call__(self, *args, text, **kwargs):
            texts.extend(text)
            return plain(self, *args, text=text, **kwargs)

    processor.__class__ = Watched
    build_inputs(processor, turns, system)
    return texts[0]


@pytest.mark.parametrize("template", [NO_SYSTEM, ALTERNATE])
def test_a_system_text_that_is_refused_begins_the_first_user_turn(processor, template):
    processor.chat_template = template
    assert built(processor, [user_turn("what?", PICTURE)]) == "user: be kind\n\nwhat?<image>"
    assert build_inputs(processor, [user_turn("what?")], system="")["input_ids"].shape[0] == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('never') }}", r"refuses the conversation \(never\)"),
        ("{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}", "refuses the conversation"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "takes texts alone"),
        ("{% for", "refuses the conversation"),
        ("", "has no chat template"),
        ("{{ messages[9] }}", "leaves out what is asked"),
        ("{% for m in messages if m['content'] is string %}{{ m['content'] }}{% endfor %}", "leaves out"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(processor, template, message):
    processor.chat_template = template
    with pytest.raises(UserError, match=message) as caught:
        build_inputs(processor, [user_turn("what?")])
    assert "\n" not in str(caught.value)


def test_a_prompt_that_the_processor_trips_over_is_one_line():
    processor = load_processor(str(GOLDEN / "llava_next" / "target"))
    processor.chat_template = f"{ITEMS}<image>".join(["{% for m in messages %}", "{% endfor %}"])
    with pytest.raises(RefusedPrompt, match="the target's LlavaNextProcessor refuses the prompt"):
        build_inputs(processor, [user_turn("what?", Image.new("RGB", (60, 40)))], "")


def test_pixels_that_are_not_finite_are_refused(processor):
    processor.image_processor.image_std = [0, 0, 0]
    with pytest.raises(RefusedPrompt, match="makes pixel_values of numbers that are not finite"):
        build_inputs(processor, [QUESTION])


@pytest.mark.parametrize("family", ["llava_next", "llava_1.5"])
@pytest.mark.parametrize("name", ["patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"])
def test_what_older_processor_files_leave_out(tmp_path, family, name):
    folder = shutil.copytree(GOLDEN / family / "target", tmp_path / "target")
    expected = build_inputs(load_processor(str(folder)), [QUESTION])["input_ids"]
    values = json.loads((folder / "processor_config.json").read_text())
    values.pop(name)
    (folder / "processor_config.json").write_text(json.dumps(values))
    assert build_inputs(load_processor(str(folder)), [QUESTION])["input_ids"].equal(expected)


@pytest.mark.parametrize("size", [(1, 1), (9, 3), (10, 10), (200, 5), (13, 27)])
@pytest.mark.parametrize("family", ["llava_next", pytest.param("qwen2_5_vl", marks=needs_torchvision)])
def test_small_pictures_are_taken(family, size):
    """As newer transformers do, whose sizes for Qwen these are."""
    inputs = build_inputs(load_processor(str(GOLDEN / family / "target")), [user_turn("what?", Image.new("RGB", size))])
    assert inputs["pixel_values"].isfinite().all()
    if family == "qwen2_5_vl":
        rows, columns = {(1, 1): (4, 4), (9, 3): (4, 8), (10, 10): (4, 4), (200, 5): (2, 26), (13, 27): (6, 4)}[size]
        assert inputs["image_grid_thw"].tolist() == [[1, rows, columns]]


def test_the_template_of_the_tokenizer_alone(processor):
    expected = build_inputs(processor, [user_turn("what?")])["input_ids"]
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert build_inputs(processor, [user_turn("what?")])["input_ids"].equal(expected)
    processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        build_inputs(processor, [user_turn("what?")])


@pytest.mark.parametrize("writes", [False, True])
def test_there_is_one_bos(processor, writes):
    """Whether the template writes it or the tokenizer adds it."""
    tokenizer = processor.tokenizer
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    if writes:
        processor.chat_template = tokenizer.bos_token + processor.chat_template
    ids = build_inputs(processor, [user_turn("what?")])["input_ids"][0]
    assert (ids == tokenizer.bos_token_id).nonzero().tolist() == [[0]]
    text = (tokenizer.bos_token if writes else "") + "what? that"
    ids, mask = tokenize(tokenizer, text, [(len(text) - 4, len(text))], 99)
    assert (ids == tokenizer.bos_token_id).nonzero().tolist() == [[0]] and mask.any()


@pytest.mark.parametrize("word", ["<image>", "<placeholder>"])
def test_words_of_the_processor_in_a_text(processor, word):
    with pytest.raises(ReservedWord, match=f"^the text holds {word}, which the target's processor keeps for itself$"):
        build_inputs(processor, [user_turn(f"what is {word}?", PICTURE)])


def test_text_that_cannot_be_encoded(processor):
    text = built(processor, [user_turn("caf\udce9 \ud83d\ude00 \ud83d")])
    assert "caf\ufffd \U0001f600 \ufffd" in text


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", b'{"version": '), ("preprocessor_config.json", b"")])
def test_a_broken_file_of_the_processor_is_named(tmp_path, name, content):
    folder = shutil.copytree(GOLDEN / "llava_1.5" / "target", tmp_path / "target")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder / name}: ") as caught:
        load_processor(str(folder))
    assert "\n" not in str(caught.value)
