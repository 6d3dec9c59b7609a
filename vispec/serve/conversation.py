"""From the messages of a request to a conversation, as prompts are built from."""

from collections.abc import Sequence

from vispec.prompts import Item, Turn
from vispec.serve.pictures import PictureLimits, picture_of
from vispec.serve.protocol import ApiError, ImagePart, Message


def conversation(messages: Sequence[Message], limits: PictureLimits) -> tuple[list[Turn], str]:
    """The turns, and the system text before them.

    Raises:
        ApiError: the order of roles is one that no chat template has, or a picture cannot be had.
    """
    begins = next((place for place, one in enumerate(messages) if one.role in ("user", "assistant")), len(messages))
    system, others = messages[:begins], messages[begins:]
    _check_roles(others, begins)
    found = sum(isinstance(part, ImagePart) for one in messages for part in _parts(one))
    if found > limits.images:
        raise ApiError(
            400, f"{found} images, the server takes {limits.images} in a request", "messages", "too_many_images"
        )
    texts = [_text(f"messages.{place}", one) for place, one in enumerate(system)]
    turns = [Turn(one.role, _items(f"messages.{place}", one, limits)) for place, one in enumerate(others, begins)]
    return turns, "\n\n".join(texts)


def _check_roles(others: Sequence[Message], begins: int) -> None:
    for place, one in enumerate(others, begins):
        if one.role in ("system", "developer"):
            raise ApiError(400, f"messages.{place}: {one.role} messages are taken at the beginning only", "messages")
    if not others or others[-1].role != "user":
        raise ApiError(400, "messages: the last one must be the user's", "messages")


def _parts(message: Message) -> Sequence:
    return () if isinstance(message.content, str) else message.content


def _text(name: str, message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    if any(isinstance(part, ImagePart) for part in message.content):
        raise ApiError(400, f"{name}: images belong to the user's messages", f"{name}.content")
    return "\n".join(part.text for part in message.content)


def _items(name: str, message: Message, limits: PictureLimits) -> tuple[Item, ...]:
    if isinstance(message.content, str) or message.role != "user":
        return (_text(name, message),)
    return tuple(
        picture_of(part.image_url.url, limits, f"{name}.content.{place}.image_url")
        if isinstance(part, ImagePart)
        else part.text
        for place, part in enumerate(message.content)
    )
