"""A family of VLMs as data, and a tiny random model of it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from vispec.evaluation.families.towers import without_timm

Inputs = dict[str, torch.Tensor]

VOCABULARY = 48
TEXT_FROM = 3
"""First id of ordinary text: 0 is padding, 1 begins, 2 ends a text."""
BREAK, VIDEO, IMAGE, START, END = range(VOCABULARY - 5, VOCABULARY)
"""What stands for a patch of a video, of an image, around an image and between its rows."""
PADDING = 0

TEXT = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
TEXT |= {"pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = {**VISION, "image_size": 28, "patch_size": 7}
"""A tower that makes 4 x 4 patches of a picture of 28 x 28."""


class Shown(NamedTuple):
    """The images, or the videos, of one prompt."""

    ids: list[list[int]]
    """The tokens of each, those around and within it too."""
    inputs: Callable[[torch.Generator], Inputs]
    """What the processor makes of the pictures."""


Layout = Callable[[list[int]], Shown]
"""From the sizes of the images or videos: 0, 1, …"""


@dataclass(frozen=True)
class Family:
    model_type: str
    """As transformers calls it."""
    config: Mapping
    images: Layout | None = None
    """None: text alone is tried."""
    videos: Layout | None = None
    video_as_image: bool = False
    """Videos are made of the tokens of images; only the kinds of the tokens tell."""
    kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Inputs of the shape of input_ids, and the ids where they are 1."""
    join: Callable[[list[Inputs]], Inputs] | None = None
    """The image inputs of a batch from those of its prompts; None concatenates."""
    made_by: str = ""
    """The name of its class, where AutoModelForImageTextToText knows none: such a model is handed over as an object."""
    remark: str = ""
    """What the tiny model has that is not plain."""


def config_of(family: Family) -> PretrainedConfig | None:
    """None where this version of transformers has no such class."""
    made = CONFIG_MAPPING[family.model_type] if family.model_type in CONFIG_MAPPING else None
    if made is None or not (family.made_by or made in AutoModelForImageTextToText._model_mapping):
        return None
    return made(**copy.deepcopy(family.config))  # some classes take their values out of it


def tiny_model(family: Family, seed: int = 0) -> PreTrainedModel | None:
    """A random float32 model that never ends its answer; None as `config_of`."""
    config = config_of(family)
    if config is None:
        return None
    for part in (config, config.get_text_config()):  # a tied head says the last token again and again
        part.tie_word_embeddings = False
    with torch.random.fork_rng(), without_timm():
        torch.manual_seed(seed)
        build = getattr(transformers, family.made_by) if family.made_by else AutoModelForImageTextToText.from_config
        model = build(config).float().eval()
    randomize(model, seed)
    output = model.get_output_embeddings()
    if output is not None:
        with torch.no_grad():  # some models would look for the image of an image token that they said themselves
            output.weight[BREAK:] = 0
    for part in model.modules():  # InstructBLIP's language model has settings of its own
        settings = getattr(part, "generation_config", None)
        if settings is not None:
            settings.eos_token_id, settings.pad_token_id = None, PADDING
    return model


def randomize(module: torch.nn.Module, seed: int, std: float = 0.2) -> None:
    """Normal matrices and biases, so that answers wander; the one-dimensional weights are norms, and stay 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1 or not name.endswith("weight"):
                parameter.normal_(0, std, generator=generator)
