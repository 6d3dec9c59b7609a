"""Text conversations as token ids, with a mask that is exactly the assistant's tokens.

The mask is right by construction: the text is rendered turn by turn, which gives each answer's characters, and the
tokenizer's offsets say which tokens these characters became. Nothing is counted.
"""

from collections.abc import Sequence
from itertools import product

import torch
from jinja2 import TemplateError

from vispec.cli import UserError, one_line
from vispec.prompts import adds_special_tokens

Turn = tuple[str, str]
"""Who speaks ("human" or "gpt"), and what."""
CharSpan = tuple[int, int]

QWEN_SYSTEM = "You are a helpful assistant."
QWEN_MAX_TOKENS = 2048


class SkipRow(Exception):
    """A row of the data that cannot become a sample; the message is the reason, the same for all such rows."""


def read_turns(row: dict) -> list[Turn]:
    """The turns of a row's `conversations`, beginning with the human's; a turn may be empty.

    Args:
        row: whatever a data file holds as one.

    Raises:
        SkipRow: the row has no usable conversation.
    """
    conversation = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(conversation, list) or not conversation:
        raise SkipRow("no conversation")
    turns = [(turn.get("from"), turn.get("value")) for turn in conversation if isinstance(turn, dict)]
    if len(turns) != len(conversation) or not all(isinstance(value, str) for _, value in turns):
        raise SkipRow("malformed turn")
    if turns[0][0] != "human":
        turns = turns[1:]
    if any(role != ("human", "gpt")[i % 2] for i, (role, _) in enumerate(turns)):
        raise SkipRow("roles do not alternate")
    if not turns:
        raise SkipRow("no human turn")
    if len(turns) < 2:
        raise SkipRow("no answer")
    for _, value in turns:
        check_unicode(value)
    return turns


def check_unicode(text: str) -> None:
    """SkipRow where a tokenizer would refuse a text: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SkipRow("broken unicode") from None


def render_vicuna(turns: Sequence[Turn]) -> tuple[str, list[CharSpan]]:
    """FastChat's vicuna template: the text, and the characters of each answer with its end token."""
    from fastchat.conversation import get_conv_template

    conversation = get_conv_template("vicuna_v1.1")
    spans = []
    for role, text in turns:
        if role == "human":
            conversation.append_message(conversation.roles[0], text)
            continue
        conversation.append_message(conversation.roles[1], None)
        start = len(conversation.get_prompt())
        conversation.update_last_message(text)
        spans.append((start, len(conversation.get_prompt())))
    return conversation.get_prompt(), spans


class ChatRenderer:
    """A chat template of transformers, rendered turn by turn.

    Args:
        tokenizer: renders the template.
        template: a chat template.
        system: text of the system turn; it begins the first human turn where the template refuses it as a turn.

    Raises:
        UserError: the template cannot be used.
    """

    def __init__(self, tokenizer, template: str, system: str):
        self.tokenizer, self.template, self.system = tokenizer, template, system
        # content is a string to some templates and a list of items to others, which trip over it or write nothing
        reason = "it leaves out what is asked"
        for self._has_system, self._as_items in product((True, False), (False, True)):
            try:
                if "probe" in self._render(self._messages([("human", "probe")])):
                    return
            except Exception as error:  # a template is a program, which raises what it likes
                reason = one_line(error)
        raise UserError(f"the target's chat template cannot be used ({reason})")

    def __call__(self, turns: Sequence[Turn]) -> tuple[str, list[CharSpan]]:
        """The text, and the characters of each answer with its end token.

        Raises:
            SkipRow: the template refuses the conversation, or changes what it has written when a turn is added.
        """
        try:
            return self._rendered(self._messages(turns))
        except TemplateError:
            raise SkipRow("the chat template refuses the conversation") from None

    def _rendered(self, messages: Sequence[dict]) -> tuple[str, list[CharSpan]]:
        text, spans = "", []
        for end, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:end], add_generation_prompt=True)
            before, text = text, self._render(messages[: end + 1])
            if not (text.startswith(prompt) and prompt.startswith(before)):
                raise SkipRow("the chat template rewrites earlier turns, so its answers cannot be told apart")
            value = message["content"][0]["text"] if self._as_items else message["content"]
            spans.append((len(prompt), len(prompt) + _answer_length(text[len(prompt) :], value)))
        return self._render(messages), spans

    def _render(self, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _messages(self, turns: Sequence[Turn]) -> list[dict]:
        texts = [("user" if role == "human" else "assistant", value) for role, value in turns]
        if self._has_system:
            texts.insert(0, ("system", self.system))
        else:
            texts[0] = ("user", f"{self.system}\n\n{texts[0][1]}")
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if self._as_items else text}
            for role, text in texts
        ]


def _answer_length(rendered: str, value: str) -> int:
    """Characters of an answer with its end token; white space that the template puts after that is not the answer's."""
    if rendered.startswith(value):
        return len(value) + len(rendered[len(value) :].rstrip())
    return len(rendered.rstrip())


def tokenize(tokenizer, text: str, spans: Sequence[CharSpan], max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (L,) of at most `max_len` tokens and the mask (L,) of those that begin inside one of `spans`.

    Raises:
        SkipRow: no answer token is left.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed for the masks"
        )
    encoded = tokenizer(
        text,
        add_special_tokens=adds_special_tokens(tokenizer, text),
        truncation=True,
        max_length=max_len,
        return_offsets_mapping=True,
    )
    inside = torch.zeros(len(text) + 1, dtype=torch.bool)
    for start, end in spans:
        inside[start:end] = True
    begin, stop = torch.tensor(encoded["offset_mapping"], dtype=torch.long).reshape(-1, 2).unbind(1)
    # some tokenizers cut spaces off the offsets: a token of spaces alone then ends behind them with nothing left
    first = torch.where(stop > begin, begin, begin - 1)
    mask = inside[first.clamp(min=0)] & (first >= 0)
    if not mask.any():
        raise SkipRow("no answer within the length limit")
    return torch.tensor(encoded["input_ids"]), mask
