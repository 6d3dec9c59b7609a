"""How a prompt is built: one place for benchmarks, training data, the demo and `vispec.generate`.

A user turn is a list of text, image and video items in the order in which they were given; what the family's chat
template makes of it (LLaVA puts images first, Qwen keeps the order) is left to the processor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from PIL import Image

from vispec.cli import UserError
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

ImageSource: TypeAlias = Image.Image | Callable[[], Image.Image]
"""A picture, or how to open it when it is needed."""
Item: TypeAlias = str | ImageSource | Video


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
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for turn in turns:
        messages.append({"role": turn.role, "content": [_content(item) for item in turn.items]})
    return messages


def build_inputs(processor: "ProcessorMixin", turns: Sequence[Turn], system: str = SYSTEM_TURN) -> "BatchFeature":
    """What the model is called with: input_ids (1, L), attention_mask, and the family's image and video tensors.

    Raises:
        UnreadableImage: a picture cannot be read.
    """
    if getattr(processor, "chat_template", None) is None:
        raise UserError(f"the {type(processor).__name__} of the target has no chat template, so no prompt can be built")
    shown = [item for turn in turns for item in turn.items if not isinstance(item, str)]
    videos = video_arguments(processor, [item for item in shown if isinstance(item, Video)])
    sources = [item for item in shown if not isinstance(item, Video)]
    images = [source if isinstance(source, Image.Image) else source() for source in sources]
    text = processor.apply_chat_template(chat_messages(turns, system), add_generation_prompt=True, tokenize=False)
    inputs = processor(images=images or None, text=[text], return_tensors="pt", **videos)
    return inputs.convert_to_tensors("pt")  # Qwen2.5's seconds between frames come as a list all the same


def load_processor(path: str, pixel_limits: bool = False) -> "ProcessorMixin":
    """The target's processor, from a folder or a hub id; `pixel_limits` holds Qwen's images within `PIXEL_LIMITS`."""
    from transformers import AutoConfig, AutoProcessor

    limited = pixel_limits and AutoConfig.from_pretrained(path).model_type in FAMILIES_WITH_PIXEL_LIMITS
    try:
        return AutoProcessor.from_pretrained(path, **(PIXEL_LIMITS if limited else {}))
    except ImportError as error:  # transformers 5 wants torchvision for Qwen's
        raise UserError(f"the processor of {path} lacks a package: {' '.join(str(error).split())}") from None


def _content(item: Item) -> dict[str, str]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    return {"type": "video" if isinstance(item, Video) else "image"}
