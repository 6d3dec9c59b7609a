"""Image questions as prompts: the same form in training data and in the benchmarks."""

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
LONG_ANSWER = "Please answer with at least 1000 words."
IMAGE_TAG = "<image>"

QWEN_MIN_PIXELS = 256 * 28 * 28
QWEN_MAX_PIXELS = 1280 * 28 * 28

IMAGE = {"type": "image"}


def text(value: str) -> dict:
    """A text item of a message's content."""
    return {"type": "text", "text": value}


def image_messages(content: list[dict]) -> list[dict]:
    """The system turn and one user turn with these content items."""
    return [{"role": "system", "content": [text(SYSTEM)]}, {"role": "user", "content": content}]


def long_answer_messages(question: str) -> list[dict]:
    """A row of LLaVA-Pretrain: its question without the image tag, the image, the wish for a long answer."""
    return image_messages([text(question.replace(IMAGE_TAG, "")), dict(IMAGE), text(LONG_ANSWER)])
