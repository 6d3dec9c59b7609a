"""Rows to samples: what a worker does for text and for images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from vispec.cli import one_line
from vispec.ge_data.batch_generate import generate_answers
from vispec.ge_data.conversations import (
    QWEN_MAX_TOKENS,
    QWEN_SYSTEM,
    ChatRenderer,
    SkipRow,
    check_unicode,
    read_turns,
    render_vicuna,
    tokenize,
)
from vispec.ge_data.sample_file import Sample, Tokens, make_sample
from vispec.model.drafts.eagle3 import aux_layers
from vispec.model.families import image_spans, image_token_id, video_token_id
from vispec.model.target import Target
from vispec.pictures import OutsideFolder, UnreadableImage, picture_path
from vispec.prompts import LONG_ANSWER, RefusedPrompt, ReservedWord, build_inputs, chat_template, image_file, user_turn

IMAGE_TAG = "<image>"
"""What marks the image in the human's text of a LLaVA-Pretrain row."""


class FailedRow(Exception):
    """Something was raised over a row; it may go well next time."""

    def __init__(self, error: Exception):
        super().__init__(f"{type(error).__name__}: {one_line(error)}")


Outcome = Tokens | SkipRow | FailedRow
"""A sample, with features or without, or why there is none."""
ORDINARY_PICTURE = (448, 336)
"""Width and height that every processor takes."""


@dataclass
class Settings:
    """What decides the content of the files, besides the rows."""

    family: str
    """"llava" or "qwen"."""
    max_len: int | None = None
    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    store: str = "pairs"
    aux_layers: tuple[int, ...] | None = None
    """Of "eagle3": the layers whose inputs are stored, ascending; None: those of EAGLE-3 by default."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    allow_outside: bool = False
    """Read images at absolute paths, and above the data folder."""


class TextJob:
    """Conversations with the target's features (training stage 1).

    Args:
        config: the target's.
        tokenizer: the target's, with the chat template.
        target: None where token ids alone are stored, which no model is needed for.
    """

    def __init__(self, config, tokenizer, settings: Settings, target: Target | None):
        self.target, self.settings = target, settings
        self.layers = stored_layers(settings, target)
        self.media_tokens = _media_tokens(config)
        longest = config.get_text_config().max_position_embeddings
        limit = min(filter(None, (longest, settings.max_len, tokenizer.model_max_length)))
        if settings.family == "qwen":
            self.render = ChatRenderer(tokenizer, chat_template(tokenizer), QWEN_SYSTEM)
            limit = min(limit, QWEN_MAX_TOKENS)
        else:
            self.render = render_vicuna
        self.tokenize = partial(tokenize, tokenizer, max_len=limit)

    def samples(self, rows: Mapping[int, dict], wanted: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """(row index, sample or reason to skip) of all `wanted` rows; `rows` is the batch that they belong to."""
        for index in wanted:
            yield index, _outcome(partial(self._sample_of, rows[index]))

    def _sample_of(self, row: dict) -> Tokens:
        ids, mask = self.tokenize(*self.render(read_turns(row)))
        if torch.isin(ids, self.media_tokens).any():
            raise SkipRow("image tag in a text conversation")
        if self.target is None:
            return Tokens(ids, mask, [])
        return features(self.target, ids, mask, {}, self.settings.store, self.layers)


class ImageJob:
    """Long answers of the target about images, with its features (training stage 2).

    Args:
        folder: where the images are that rows name.
    """

    def __init__(self, target: Target, processor, folder: Path, settings: Settings):
        self.target, self.processor, self.folder, self.settings = target, processor, folder, settings
        self.layers = stored_layers(settings, target)
        # a target that cannot be asked is no fault of a row
        build_inputs(processor, [user_turn(Image.new("RGB", ORDINARY_PICTURE), LONG_ANSWER)])
        self.media_tokens = _media_tokens(target.config)

    def samples(self, rows: Mapping[int, dict], wanted: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """(row index, sample or reason to skip) of all `wanted` rows.

        The answers of all `rows` are generated together even where only some are wanted: an answer may depend
        on its neighbours' padding, and a run that was interrupted must end with the files of one that was not.
        """
        prepared = {index: _outcome(partial(self._prompt, row)) for index, row in rows.items()}
        prompts = {index: prompt for index, prompt in prepared.items() if not isinstance(prompt, Exception)}
        answers = self._outcomes(prompts) if prompts.keys() & set(wanted) else {}
        for index in wanted:
            outcome = answers.get(index, prepared[index])
            if not isinstance(outcome, Exception):
                outcome = _outcome(partial(self._sample, prompts[index], outcome))
            yield index, outcome

    def _outcomes(self, prompts: dict[int, dict]) -> dict[int, torch.Tensor | FailedRow]:
        """The answers to some prompts; where they cannot be had together, each is asked for alone."""
        found = _outcome(partial(self._answers, prompts))
        if not isinstance(found, Exception):
            return found
        if len(prompts) == 1:
            return dict.fromkeys(prompts, found)
        alone = ({index: prompt} for index, prompt in prompts.items())
        return {index: answer for one in alone for index, answer in self._outcomes(one).items()}

    def _prompt(self, row: dict) -> dict[str, torch.Tensor]:
        """The processor's output for one row, (1, L)."""
        question = _question(row).replace(IMAGE_TAG, "")
        if not isinstance(row.get("image"), str):
            raise SkipRow("no image")
        if self._has_media(torch.tensor(self.processor.tokenizer(question).input_ids)):
            raise SkipRow("more than one image tag")
        try:
            picture = image_file(picture_path(self.folder, row["image"], self.settings.allow_outside))()
        except OutsideFolder:
            raise SkipRow("image outside of the data folder (--allow-outside reads it)") from None
        except UnreadableImage:
            raise SkipRow("unreadable image") from None
        try:
            inputs = dict(build_inputs(self.processor, [user_turn(question, picture, LONG_ANSWER)]))
        except ReservedWord:
            raise SkipRow("a word of the processor's own in the text") from None
        except RefusedPrompt:  # too narrow
            raise SkipRow("the processor refuses the image") from None
        if inputs["input_ids"].shape[1] >= self._limit:
            raise SkipRow("prompt exceeds the length limit")
        return inputs

    def _has_media(self, ids: torch.Tensor) -> bool:
        """Whether one of some token ids stands for an image or a video."""
        return bool(torch.isin(ids.long(), self.media_tokens).any())

    @property
    def _limit(self) -> int:
        return min(self.target.max_positions, self.settings.max_len or self.target.max_positions)

    def _answers(self, prepared: dict[int, dict]) -> dict[int, torch.Tensor]:
        # each prompt's own room: an answer may not be cut because a neighbour's prompt is long
        rooms = [self._limit - inputs["input_ids"].shape[1] for inputs in prepared.values()]
        answers = generate_answers(
            self.target,
            list(prepared.values()),
            [min(self.settings.max_new_tokens, room) for room in rooms],
            self.settings.temperature,
            seeds=[self.settings.seed + index for index in prepared],
        )
        return dict(zip(prepared, answers, strict=True))

    def _sample(self, inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> Tokens:
        if len(answer) == 0 or int(answer[0]) in self.target.eos_token_ids:
            raise SkipRow("empty answer")
        if self._has_media(answer):
            raise SkipRow("image tag in the answer")
        ids = torch.cat([inputs["input_ids"][0], answer])
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[-len(answer) :] = True
        rest = image_inputs(inputs)
        if self.settings.store == "tokens":
            return Tokens(ids, mask, image_spans(self.target.model, ids[None], rest)[0])
        return features(self.target, ids, mask, rest, self.settings.store, self.layers)


def stored_layers(settings: Settings, target: Target | None) -> tuple[int, ...]:
    """The layers whose inputs are stored.

    Raises:
        ValueError: the target has too few, or not those that were asked for.
    """
    if settings.store != "eagle3":
        return ()
    return aux_layers(len(target.decoder.layers), settings.aux_layers)


def _media_tokens(config) -> torch.Tensor:
    """Ids that stand for images and videos, or say that one follows, as Qwen's positions take it."""
    named = (image_token_id(config), video_token_id(config), getattr(config, "vision_start_token_id", None))
    return torch.tensor([token for token in named if token is not None], dtype=torch.long)


def _outcome(make: Callable[[], object]):
    """What `make` returns, or why it does not."""
    try:
        return make()
    except SkipRow as reason:
        return reason
    except Exception as error:  # whatever it is, the other rows are to become samples
        return FailedRow(error)


def _question(row: dict) -> str:
    """The human's text of a LLaVA-Pretrain row, image tag included."""
    conversation = row.get("conversations") if isinstance(row, dict) else None
    turns = [turn for turn in conversation or [] if isinstance(turn, dict)] if isinstance(conversation, list) else []
    question = next((turn.get("value") for turn in turns if turn.get("from") == "human"), None)
    if not isinstance(question, str):
        raise SkipRow("no human turn")
    if IMAGE_TAG not in question:
        raise SkipRow("image tag missing")
    if question.count(IMAGE_TAG) > 1:
        raise SkipRow("more than one image tag")
    check_unicode(question)
    return question


def image_inputs(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a processor's output what belongs to the images, not to the text of the prompt."""
    return {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}


@torch.no_grad()
def features(
    target: Target, ids: torch.Tensor, mask: torch.Tensor, inputs: dict, store: str, layers: tuple[int, ...] = ()
) -> Sample:
    """One unpadded pass of the target over the tokens (L,), with the image's processor outputs.

    Args:
        layers: those whose inputs are kept too.

    Raises:
        ValueError: the image's tokens in `ids` are not those that `inputs` belong to.
    """
    length = len(ids)
    inputs = {**inputs, "attention_mask": torch.ones(1, length, dtype=torch.long)}
    prompt = target.prefill(target.new_cache(1, length), ids[None], inputs, layers)
    aux = prompt.features[0] if layers else None
    return make_sample(ids, mask, prompt.images[0], prompt.embeds[0], prompt.hidden[0], store, aux, layers)
