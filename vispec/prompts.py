"""How a prompt is built: one place for benchmarks, training data, the demo and `vispec.generate`.

A user turn is a list of text, image and video items in the order in which they were given; what the family's chat
template makes of it (LLaVA puts images first, Qwen keeps the order) is left to the processor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from jinja2 import TemplateError
from PIL import Image

from vispec.cli import UserError, one_line
from vispec.pictures import read_picture
from vispec.video import Video, video_arguments

if TYPE_CHECKING:
    from transformers import BatchFeature, ProcessorMixin

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

SCRATCH_WORD = "<placeholder>"
"""What processors write in place of image tokens while they count them."""

ImageSource: TypeAlias = Image.Image | Callable[[], Image.Image]
"""A picture, or how to open it when it is needed."""
Item: TypeAlias = str | ImageSource | Video


class ReservedWord(UserError):
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
        UserError: there is no chat template, or it refuses the conversation; the processor refuses the prompt.
    """
    shown = [item for turn in turns for item in turn.items if not isinstance(item, str)]
    videos = video_arguments(processor, [item for item in shown if isinstance(item, Video)])
    sources = [item for item in shown if not isinstance(item, Video)]
    images = [source if isinstance(source, Image.Image) else source() for source in sources]
    _refuse_reserved_words(processor, turns, system, bool(shown))
    text = _rendered(processor, turns, system)
    options = videos if adds_special_tokens(processor.tokenizer, text) else videos | {"add_special_tokens": False}
    try:
        inputs = processor(images=images or None, text=[text], return_tensors="pt", **options)
    except (MemoryError, RuntimeError):
        raise
    except Exception as error:  # for sizes that it cannot divide, or settings of its own that are none
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        shown = f" with pictures of {sizes} pixels" if images else ""
        raise UserError(f"the target's processor refuses the prompt{shown} ({one_line(error)})") from None
    return inputs.convert_to_tensors("pt")  # Qwen2.5's seconds between frames come as a list all the same


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
    template = _chat_template(processor)

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
    return text


def _chat_template(processor: "ProcessorMixin") -> str:
    """The processor's; the tokenizer's where it has none, as when tokenizer_config.json alone holds one."""
    for owner in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(owner, "chat_template", None)
        template = template.get("default") if isinstance(template, dict) else template
        if template is not None:
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


def load_processor(path: str, pixel_limits: bool = False, **limits: int) -> "ProcessorMixin":
    """The target's processor, from a folder or a hub id.

    Args:
        pixel_limits: hold Qwen's images within `PIXEL_LIMITS`.
        limits: others of them, for whatever family.

    Raises:
        ValueError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoProcessor

    from vispec.model.target_files import load_part

    if pixel_limits and load_part(AutoConfig, path).model_type in FAMILIES_WITH_PIXEL_LIMITS:
        limits = PIXEL_LIMITS | limits
    return load_part(AutoProcessor, path, **limits)


def _encodable(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _content(item: Item) -> dict[str, str]:
    if isinstance(item, str):
        return {"type": "text", "text": _encodable(item)}
    return {"type": "video" if isinstance(item, Video) else "image"}
