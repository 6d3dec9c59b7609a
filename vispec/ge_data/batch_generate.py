"""The target's own answers, in batches: left padding and transformers' generate."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vispec.model.target import Target

Inputs = Mapping[str, torch.Tensor]
"""What a processor returned for one prompt; input_ids is (1, L)."""


def collate_prompts(prompts: Sequence[Inputs], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Processor outputs of single prompts as one batch: tokens padded on the left, tiles of images with empty ones."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for name in prompts[0]:
        values = [prompt[name] for prompt in prompts]
        if all(v.shape == p["input_ids"].shape for v, p in zip(values, prompts, strict=True)):
            fill = pad_token_id if name == "input_ids" else 0
            values = [torch.nn.functional.pad(v, (longest - v.shape[1], 0), value=fill) for v in values]
        elif name.startswith("pixel") and values[0].dim() > 2:  # (1, tiles, …), of pixels or of their mask
            tiles = max(v.shape[1] for v in values)
            values = [torch.nn.functional.pad(v, (0, 0) * (v.dim() - 2) + (0, tiles - v.shape[1])) for v in values]
        batch[name] = torch.cat(values)
    return batch


@torch.inference_mode()
def generate_answers(
    target: Target,
    prompts: Sequence[Inputs],
    max_new_tokens: Sequence[int],
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> list[torch.Tensor]:
    """Answers as token ids, each up to its first end token.

    Nothing of the target's generation config is applied but its end and padding tokens, as in decoding: no repetition
    penalty, no sampling defaults, no minimal length.

    Args:
        prompts: at least one; they are answered as one batch.
        max_new_tokens: the limit of each answer, at least 1.
        temperature: 0 is greedy.
        seeds: one for each prompt, for temperature > 0; an answer depends on its own seed only.
    """
    model = target.model
    ends = list(target.eos_token_ids)
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else (ends or [0])[0]
    batch = {name: value.to(model.device) for name, value in collate_prompts(prompts, pad).items()}
    length = batch["input_ids"].shape[1]
    sampling = LogitsProcessorList([SeededSampling(temperature, seeds, model.device)] if temperature > 0 else [])
    # sampling is the greedy choice among perturbed logits, see SeededSampling
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max(max_new_tokens), pad_token_id=pad, eos_token_id=ends or None
    )
    with _only(model, greedy):
        output = model.generate(**batch, logits_processor=sampling)
    rows = zip(output[:, length:].cpu(), max_new_tokens, strict=True)
    return [_until_end(row[:limit], ends) for row, limit in rows]


@contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """With this generation config in place of the model's, from which generate() fills in what it is not given."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(answer: torch.Tensor, eos_token_ids: Sequence[int]) -> torch.Tensor:
    ends = torch.isin(answer, torch.tensor(eos_token_ids, dtype=answer.dtype)).nonzero()[:, 0]
    return answer[: int(ends[0]) + 1] if len(ends) else answer


class SeededSampling(LogitsProcessor):
    """Sampling by the Gumbel-max rule: argmax(logits / temperature + Gumbel noise) is a sample of the softmax.

    The noise of a row comes from a generator of its own, so that an answer does not depend on its neighbours in the
    batch.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device):
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.float() / self.temperature
        noise = torch.stack(
            [
                torch.empty_like(row).exponential_(generator=generator)
                for row, generator in zip(scores, self.generators, strict=True)
            ]
        )
        return scores - noise.log()
