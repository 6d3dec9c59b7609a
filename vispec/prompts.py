"""How a prompt is built: one place for benchmarks, training data, the demo and `vispec.generate`.

A user turn is a list of text, image and video items in the order in which they were given; what the family's chat
template makes of it (LLaVA puts images first, Qwen keeps the order) is left to the processor.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from jinja2 import TemplateError
from PIL import Image

from vispec.cli import UserError, one_line
from vispec.files import read_json
from vispec.pictures import read_picture
from vispec.video import Video, video_arguments

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

SYSTEM_TURN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)

LONG_ANSWER = "Please answer with at least 1000 words."
"""Last item of the user turn that asks for training data."""

EXPLAIN = "Please answer with an explanation."
"""Last item of the user turn in most benchmarks."""

PIXEL_LIMITS = {"min_pixels": 256 * 28**2, "max_pixels": 1280 * 28**2}
"""Sizes to which Qwen's processor scales images in training data and in most benchmarks."""
FAMILIES_WITH_PIXEL_LIMITS = ("qwen2_vl", "qwen2_5_vl")

MOST_NARROW = 200
"""Longer side of a picture over the shorter one that Qwen's processor takes."""

SCRATCH_WORD = "<placeholder>"
"""What processors write in place of image tokens while they count them."""

PROCESSOR_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json",
)  # fmt: skip
"""All of them hold objects."""

ImageSource: TypeAlias = Image.Image | Callable[[], Image.Image]
"""A picture, or how to open it when it is needed."""
Item: TypeAlias = str | ImageSource | Video


class RefusedPrompt(ValueError):
    """The target's processor cannot take a prompt, such as one with a picture of an odd size; the message says why."""


class ReservedWord(RefusedPrompt):
    """A text has what stands for an image or a video; the message names it."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    items: tuple[Item, ...]


def user_turn(*items: Item) -> Turn:
    """A user's turn of texts, images and videos, in this order."""
    return Turn("user", items)


def image_file(path: Path) -> ImageSource:
    """The picture in a file, opened only when a prompt needs it."""
    return partial(read_picture, path)


def chat_messages(turns: Sequence[Turn], system: str = SYSTEM_TURN) -> list[dict]:
    """The conversation as chat templates take it, with the system turn before it; without one if that is empty."""
    messages = [{"role": "system", "content": [_content(system)]}] if system else []
    for turn in turns:
        messages.append({"role": turn.role, "content": [_content(item) for item in turn.items]})
    return messages


def build_inputs(processor: "ProcessorMixin", turns: Sequence[Turn], system: str = SYSTEM_TURN) -> "BatchFeature":
    """What the model is called with: input_ids (1, L), attention_mask, and the family's image and video tensors.

    A system text that the template refuses as a turn begins the first user turn. What cannot be encoded, such as half
    of a surrogate pair, becomes U+FFFD.

    Raises:
        UnreadableImage: a picture cannot be read.
        ReservedWord: a text has what stands for an image or a video.
        RefusedPrompt: the processor cannot take it.
        UserError: there is no chat template, or it refuses the conversation.
    """
    import torch

    shown = [item for turn in turns for item in turn.items if not isinstance(item, str)]
    videos = video_arguments(processor, [item for item in shown if isinstance(item, Video)])
    sources = [item for item in shown if not isinstance(item, Video)]
    images = [source if isinstance(source, Image.Image) else source() for source in sources]
    images = [_large_enough(processor, image) for image in images]
    _refuse_reserved_words(processor, turns, system, bool(shown))
    text = _rendered(processor, turns, system)
    options = videos if adds_special_tokens(processor.tokenizer, text) else videos | {"add_special_tokens": False}
    try:
        inputs = processor(images=images or None, text=[text], return_tensors="pt", **options)
    except MemoryError:
        raise
    except Exception as error:  # whatever its code trips over
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        shown = f" with pictures of {sizes}" if images else ""
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise RefusedPrompt(f"the target's {type(processor).__name__} refuses the prompt{shown} ({reason})") from error
    inputs = inputs.convert_to_tensors("pt")  # Qwen2.5's seconds between frames come as a list all the same
    for part, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise RefusedPrompt(f"the target's processor makes {part} of numbers that are not finite")
    return inputs


def adds_special_tokens(tokenizer, text: str) -> bool:
    """Whether a tokenizer is to add its special tokens to a rendered text: not where that has its BOS already."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


@contextmanager
def template_errors() -> Iterator[None]:
    """What a chat template raises, which is a program and raises what it likes, becomes a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"the target's chat template refuses the conversation ({one_line(error)})") from None


def _rendered(processor: "ProcessorMixin", turns: Sequence[Turn], system: str) -> str:
    """The text that the chat template makes of a conversation."""
    template = chat_template(processor)

    def render(turns: Sequence[Turn], system: str) -> str:
        messages = chat_messages(turns, system)
        return processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )

    with template_errors():
        try:
            text = render(turns, system)
        except TemplateError:  # of its own accord: no system turn, or a user's turn first
            if not system or not turns or turns[0].role != "user":
                raise
            text = render([user_turn(f"{system}\n\n", *turns[0].items), *turns[1:]], "")
    if "'type': 'text'" in text:
        raise UserError("the target's chat template takes texts alone, and writes down items of a turn as they are")
    asked = [item for turn in turns for item in turn.items if isinstance(item, str)]
    words = re.findall(r"\w+", _encodable(asked[-1])) if asked else []
    if not text or (words and max(words, key=len) not in text):
        raise UserError("the target's chat template leaves out what is asked")
    return text


def chat_template(processor) -> str:
    """The processor's; the tokenizer's where it has none, as when tokenizer_config.json alone holds one.

    Raises:
        UserError: neither has one.
    """
    for owner in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(owner, "chat_template", None)
        template = template.get("default") if isinstance(template, dict) else template
        if template:
            return template
    raise UserError(f"the {type(processor).__name__} of the target has no chat template, so no prompt can be built")


def _refuse_reserved_words(processor: "ProcessorMixin", turns: Sequence[Turn], system: str, shows: bool) -> None:
    """The processor takes them for its own, wherever they stand, and then counts wrong or finds no image for one."""
    words = [getattr(processor, f"{medium}_token", None) for medium in ("image", "video")]
    words += [SCRATCH_WORD] if shows else []
    texts = [system, *(item for turn in turns for item in turn.items if isinstance(item, str))]
    for word in words:
        if isinstance(word, str) and any(word in text for text in texts):
            raise ReservedWord(f"the text holds {word}, which the target's processor keeps for itself")


def load_processor(path: str, pixel_limits: bool = False, **options) -> "ProcessorMixin":
    """The target's processor, from a folder or a hub id.

    Args:
        pixel_limits: holds Qwen's images within `PIXEL_LIMITS`.
        options: go to its `from_pretrained`.

    Raises:
        UserError: it lacks a package, or a file of it is broken.
    """
    from transformers import AutoConfig, AutoProcessor

    with _named_errors(path, "processor"):
        if pixel_limits and AutoConfig.from_pretrained(path).model_type in FAMILIES_WITH_PIXEL_LIMITS:
            options |= PIXEL_LIMITS
        processor = AutoProcessor.from_pretrained(path, **options)
        if hasattr(processor, "num_additional_image_tokens"):
            _complete(processor, AutoConfig.from_pretrained(path))
    return processor


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a target's processor, with that one's chat template; needs no package that reads images.

    Raises:
        UserError: a file of it is broken.
    """
    from transformers import AutoTokenizer, ProcessorMixin

    with _named_errors(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        values, _ = ProcessorMixin.get_processor_dict(path)
        tokenizer.chat_template = values.get("chat_template") or tokenizer.chat_template
    return tokenizer


@contextmanager
def _named_errors(path: str, what: str) -> Iterator[None]:
    """Transformers trips over a broken file in many ways, and rarely says over which one."""
    try:
        yield
    except ImportError as error:  # transformers 5 wants torchvision for Qwen's processor
        raise UserError(f"the {what} of {path} lacks a package: {one_line(error)}") from None
    except MemoryError:
        raise
    except Exception as error:
        for file in (Path(path, name) for name in PROCESSOR_FILES):
            if file.is_file():
                read_json(file)
        reason = one_line(error)
        raise UserError(f"{path}: its {what} cannot be loaded ({type(error).__name__}: {reason[:200]})") from None


def _complete(processor: "ProcessorMixin", config) -> None:
    """LLaVA's older processor files leave out what counts an image's tokens, and the target's config knows."""
    vision = config.vision_config
    if processor.patch_size is None:
        processor.patch_size = vision.patch_size
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    if vision.model_type == "clip_vision_model":  # the class token
        processor.num_additional_image_tokens = 1


def _large_enough(processor: "ProcessorMixin", image: Image.Image) -> Image.Image:
    """A picture that the processor neither mistakes nor refuses for its size.

    Transformers takes an image of 1 or 3 rows for one with so many channels. Older ones of Qwen's processor refuse
    pictures that are narrower than its patch, newer ones enlarge them: by this very rule.
    """
    if image.height in (1, 3):
        image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    reads = getattr(processor, "image_processor", None)
    patch = getattr(reads, "merge_size", 0) * getattr(reads, "patch_size", 0)
    least = getattr(reads, "min_pixels", None)  # newer ones have another name for it
    short, long = sorted(image.size)
    if not type(reads).__name__.startswith("Qwen2VL") or not least or short >= patch or long > MOST_NARROW * short:
        return image
    sides = [round(side / patch) * patch for side in image.size]
    if math.prod(sides) < least:
        scale = math.sqrt(least / math.prod(image.size))
        sides = [math.ceil(side * scale / patch) * patch for side in image.size]
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)


def _encodable(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _content(item: Item) -> dict[str, str]:
    if isinstance(item, str):
        return {"type": "text", "text": _encodable(item)}
    return {"type": "video" if isinstance(item, Video) else "image"}
