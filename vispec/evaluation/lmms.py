"""`vispec`, a chat model of lmms-eval: its tasks and scores, answers that are drafted, and their speed.

lmms-eval finds it by the entry point `lmms_eval.models` of this package (setup.py, extra `lmms`).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatContent, ChatMessages
from loguru import logger
from PIL import Image
from tqdm import tqdm

from vispec import embedded
from vispec.cli import DTYPES, one_line
from vispec.evaluation.loading import load_model
from vispec.ge_data.batch_generate import collate_prompts
from vispec.methods import LOOKUP
from vispec.model.arguments import whole
from vispec.model.generation import SpecOutput
from vispec.pictures import in_rgb
from vispec.prompts import Item, RefusedPrompt, Turn, build_inputs, image_file, load_processor
from vispec.timing import now
from vispec.video import FRAMES, read_video

MOST_NEW_TOKENS = 1024
"""Of an answer, where the task does not say."""
UNNAMED_STOP = "\n\n"
"""The stop string that lmms-eval gives to tasks without one. It would end answers after their first paragraph, so that
lmms-eval's own chat models do not apply it either."""
NOT_DECODING = ("image_aspect_ratio",)
"""What tasks say to single families of models, and their processors decide here."""

Prompt = Mapping
"""What the processor returned for one request."""


def manifest() -> ModelManifest:
    """What lmms-eval is told of the model."""
    return ModelManifest("vispec", chat_class_path=f"{__name__}.{ViSpec.__name__}")


class ViSpec(lmms):
    """A target with its draft, as `--model vispec --model_args base=…,spec=…`.

    Args:
        base: the target, a folder or a hub id; the embedded pair where neither `base` nor `spec` is given.
        spec: its draft head; without one, and without `method=lookup`, answers are decoded plainly.
        spec_revision, spec_subfolder, method, tree: see `SpecModel.from_pretrained`.
        dtype: one of `vispec.cli.DTYPES`.
        device_map: transformers'; the first GPU by default, that of its process where there are several. lmms-eval's
            `--device` says the same.
        min_pixels, max_pixels: to which the processor scales an image, of families that take such limits.
        max_num_frames: of a video.
        system_prompt: a text, or a file with one; the chat template decides by default.
        batch_size: prompts that are answered together.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    is_simple = False

    def __init__(
        self,
        base: str | None = None,
        spec: str | None = None,
        spec_revision: str | None = None,
        spec_subfolder: str | None = None,
        method: str | None = None,
        tree: str | None = None,
        dtype: str | None = None,
        device_map: str | int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_num_frames: int = FRAMES,
        system_prompt: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a number, found {batch_size!r} with max_batch_size {max_batch_size}")
        if device is not None and device_map is not None:
            raise ValueError(f"device_map {device_map} and --device {device} say one thing, expected one of them")
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.batch_size = whole("batch_size", int(batch_size), 1)
        self._frames = whole("max_num_frames", max_num_frames, 1)
        self._system = self._resolve_system_prompt(system_prompt)
        if base is None:
            if spec is not None:
                raise ValueError(f"spec {spec} needs base, the target that it was trained for")
            base, spec = embedded.require_weights()
            spec = None if method == LOOKUP else spec
            dtype, tree = dtype or embedded.DTYPE, tree or embedded.TREE
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        limits = {name: whole(name, value, 1) for name, value in limits.items() if value is not None}
        self._processor = load_processor(base, **limits)
        reads = type(getattr(self._processor, "image_processor", None)).__name__
        if limits and not reads.startswith("Qwen2VL"):
            raise ValueError(f"{' and '.join(limits)}: the {reads} of {base} has no such limits")
        place = {"spec_revision": spec_revision, "spec_subfolder": spec_subfolder}
        device_map = device if device_map is None else device_map
        loading = {"dtype": dtype or "auto", "device_map": device_map, "method": method, "tree": tree}
        self._model = load_model(base, spec, **loading, **place)

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers what its processes have found."""
        return self._model.device

    def clean(self) -> None:
        """Give back the memory, for judges that run after all answers."""
        self._model = None
        super().clean()

    def loglikelihood(self, requests: Sequence[Instance]):
        raise NotImplementedError("vispec answers questions; it does not score given answers (loglikelihood)")

    def generate_until_multi_round(self, requests: Sequence[Instance]):
        raise NotImplementedError("vispec answers single rounds; it has no generate_until_multi_round")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests, those with the same options together, and log the speed of all.

        A picture that cannot be read, or a prompt that the target cannot take, gets an empty answer and is logged.
        """
        answers: dict[int, GenerationResult] = {}
        seconds, accepted = 0.0, []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for options, until, batch in self._batches(requests):
                start = now(self.device)
                found = self._generate(list(batch.values()), options, until)
                seconds += now(self.device) - start
                accepted += sum(found.acceptance_lengths, [])
                for (place, prompt), ids in zip(batch.items(), _new_ids(found), strict=True):
                    counts = TokenCounts(input_tokens=prompt["input_ids"].shape[1], output_tokens=len(ids))
                    answers[place] = GenerationResult(_until(self._text(ids), until), counts)
                bar.update(len(batch))
        tokens = sum(answer.token_counts.output_tokens for answer in answers.values())
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"tau": fmean(accepted)} if accepted else None,
        )
        if len(answers) < len(requests):
            logger.error(f"{len(requests) - len(answers)} of {len(requests)} requests have an empty answer, see above")
        return [answers.get(place, GenerationResult("")) for place in range(len(requests))]

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[dict, list[str], dict[int, Prompt]]]:
        """Options, stop strings, and up to `batch_size` prompts that fit into one batch, by their requests' places."""
        groups: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[repr(request.args[2])].append(place)
        for places in groups.values():
            options, until = _decoding(requests[places[0]].args[2])
            for start in range(0, len(places), self.batch_size):
                alike: dict[tuple, dict[int, Prompt]] = defaultdict(dict)
                for place in places[start : start + self.batch_size]:
                    prompt = self._prompt(requests[place])
                    if prompt is not None:
                        alike[_stackable(prompt)][place] = prompt
                for batch in alike.values():
                    yield options, until, batch

    def _prompt(self, request: Instance) -> Prompt | None:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        messages = ChatMessages(messages=self._apply_system_prompt(messages, self._system)).messages
        try:
            turns = [Turn(message.role, tuple(map(self._item, message.content))) for message in messages]
            told = turns.pop(0).items if turns[0].role == "system" else ()
            prompt = build_inputs(self._processor, turns, "".join(told))
            length, positions = prompt["input_ids"].shape[1], self._model.target.max_positions
            if length > positions:
                raise RefusedPrompt(f"the prompt has {length} tokens, the target {positions} positions")
        except (RefusedPrompt, OSError) as error:
            logger.error(f"{task}, {split} {doc_id}: {one_line(error)}")
            return None
        return prompt

    def _item(self, content: ChatContent) -> Item:
        if content.type == "text":
            return content.text
        if content.type == "image" and isinstance(content.url, Image.Image):
            return in_rgb(content.url)
        if content.type == "image" and isinstance(content.url, str):
            return image_file(Path(content.url))
        is_whole_video = content.type == "video" and content.start_time is None and content.end_time is None
        if is_whole_video and isinstance(content.url, str):
            return read_video(Path(content.url), self._frames)
        raise ValueError(f"vispec shows pictures and whole video files, found {content!r:.200}")

    def _generate(self, prompts: Sequence[Prompt], options: Mapping, until: Sequence[str]) -> SpecOutput:
        tokenizer = self._processor.tokenizer
        stops = {"stop_strings": list(until), "tokenizer": tokenizer} if until else {}
        seed = options.get("seed")
        return self._model.generate(
            **(collate_prompts(prompts, tokenizer.pad_token_id or 0) if len(prompts) > 1 else prompts[0]),
            **{**options, **stops, "seed": None if seed is None else [seed] * len(prompts)},
            speculate=self._model.draft is not None,
            return_dict_in_generate=True,
        )

    def _text(self, ids: Sequence[int]) -> str:
        return self._processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _decoding(asked: Mapping) -> tuple[dict, list[str]]:
    """Options of `SpecModel.generate`, and the strings that end an answer, from a task's generation_kwargs."""
    for name in set(NOT_DECODING) & set(asked):
        logger.warning(f"{name}={asked[name]!r} is not applied: the target's processor decides it")
    if asked.get("num_return_sequences") not in (None, 1):
        raise ValueError("num_return_sequences: a request has one answer; --repeats asks each question several times")
    options = {name: value for name, value in asked.items() if name not in NOT_DECODING}
    options["max_new_tokens"] = options.get("max_new_tokens") or MOST_NEW_TOKENS
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    temperature = options.get("temperature")
    options["do_sample"] = temperature != 0 and bool(options.get("do_sample", temperature is not None))
    if not options["do_sample"]:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    return options, [stop for stop in until if stop and stop != UNNAMED_STOP]


def _stackable(prompt: Prompt) -> tuple:
    """Equal for prompts that `collate_prompts` can join: tensors alone, of the same things and sizes of pictures."""
    if not all(isinstance(value, torch.Tensor) for value in prompt.values()):
        return (id(prompt),)
    return tuple((name, tuple(value.shape[2:])) for name, value in prompt.items())


def _new_ids(found: SpecOutput) -> list[list[int]]:
    prompt = found.sequences.shape[1] - max(found.new_tokens)
    return [row[prompt : prompt + new].tolist() for row, new in zip(found.sequences, found.new_tokens, strict=True)]


def _until(text: str, stops: Sequence[str]) -> str:
    """An answer up to its first stop string."""
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)
