"""The families of target that the recipe can build: their tokenizer, processor, model and prompts.

Everything is made of stock transformers classes. A family also knows how its tower's states are read for one picture
(36 places of the image, row by row), since the tower is trained first and by itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from vispec.demo.conversations import Conversation, Piece, chatml_pieces, vicuna_pieces
from vispec.demo.scenes import IMAGE_SIZE

IMAGE_ROWS = 6
"""Image tokens on a side of the picture; a multiple of three, so that none belongs to two places of the board."""
MAX_POSITIONS = 4096
TOWER_LAYERS = 4

LLAVA_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """How large a target is; the defaults are those of the shipped one."""

    vocabulary: int = 2000
    width: int = 192
    intermediate: int = 384
    heads: int = 6
    kv_heads: int = 2
    tower_width: int = 128
    tower_heads: int = 4


SMALL = Sizes(width=96, intermediate=192, heads=3, kv_heads=1, tower_width=48, tower_heads=3)
"""Of one that drafts for the shipped target."""


class Family(ABC):
    """What the recipe has to know about a family."""

    name: str
    image_token: str
    """The token that a prompt has `image_tokens` of in the place of its picture."""
    image_tokens: int

    def __init__(self, sizes: Sizes | None = None):
        self.sizes = sizes or Sizes()

    @abstractmethod
    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        """A byte-level BPE tokenizer trained on these texts."""

    @abstractmethod
    def processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        """The family's processor around a tokenizer."""

    @abstractmethod
    def model(self, tokenizer: PreTrainedTokenizerFast, layers: int) -> PreTrainedModel:
        """A target with random weights and so many decoder layers."""

    @abstractmethod
    def pieces(self, conversation: Conversation) -> tuple[Piece, ...]:
        """The conversation in the family's chat format."""

    @abstractmethod
    def tower(self, model: PreTrainedModel) -> nn.ModuleList:
        """What is trained first and then frozen: all that sees the picture before the projector does."""

    @abstractmethod
    def tower_states(self, model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """What the projector is given for each image token of a view of the picture: (B, 36, width)."""

    @abstractmethod
    def projector(self, model: PreTrainedModel) -> nn.Module:
        """What turns the tower's states into rows of the decoder."""

    @abstractmethod
    def project(self, model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
        """What the decoder gets from the tower's states: (B, 36, decoder's width)."""

    @abstractmethod
    def decoder_layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The layers that growth multiplies."""

    @abstractmethod
    def image_inputs(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's image arguments, as the processor makes them, from (B, 3, 96, 96)."""

    def pixels(self, images: list[Image.Image], processor: ProcessorMixin) -> torch.Tensor:
        """Pictures that need no resizing, normalised as the processor does it: (B, 3, 96, 96)."""
        settings = processor.image_processor
        array = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255.0
        array = (array - np.array(settings.image_mean, np.float32)) / np.array(settings.image_std, np.float32)
        return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


class Llava(Family):
    """LLaVA-NeXT: a CLIP tower, a two-layer projector, a Llama decoder."""

    name = "llava"
    image_token = "<image>"
    image_tokens = 2 * IMAGE_ROWS**2 + IMAGE_ROWS  # the base view, the only tile, the newlines of its rows

    def tokenizer(self, texts):
        bpe = _train_bpe(texts, ("<unk>", "<s>", "</s>", "<pad>", "<image>"), self.sizes.vocabulary)
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
            additional_special_tokens=["<image>"],
            **TOKENIZER_SETTINGS,
        )

    def processor(self, tokenizer):
        images = LlavaNextImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        )
        return LlavaNextProcessor(
            images,
            tokenizer,
            patch_size=IMAGE_SIZE // IMAGE_ROWS,
            vision_feature_select_strategy="default",
            chat_template=LLAVA_CHAT_TEMPLATE,
            image_token=self.image_token,
            num_additional_image_tokens=1,
        )

    def model(self, tokenizer, layers):
        sizes = self.sizes
        vision = CLIPVisionConfig(
            hidden_size=sizes.tower_width,
            intermediate_size=4 * sizes.tower_width,
            projection_dim=sizes.tower_width,
            num_hidden_layers=TOWER_LAYERS,
            num_attention_heads=sizes.tower_heads,
            image_size=IMAGE_SIZE,
            patch_size=IMAGE_SIZE // IMAGE_ROWS,
        )
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.width,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.width // sizes.heads,
            max_position_embeddings=MAX_POSITIONS,
            rms_norm_eps=1e-5,
            **_special_token_ids(tokenizer),
        )
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=text,
            vision_feature_layer=-1,
            image_token_index=tokenizer.convert_tokens_to_ids(self.image_token),
            image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
            tie_word_embeddings=False,
            image_seq_length=self.image_tokens,
        )
        return _build(config, tokenizer)

    def pieces(self, conversation):
        return vicuna_pieces(conversation)

    def tower(self, model):
        return nn.ModuleList([model.vision_tower])

    def tower_states(self, model, pixels):
        return model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

    def projector(self, model):
        return model.multi_modal_projector

    def project(self, model, states):
        return model.multi_modal_projector(states)

    def decoder_layers(self, model):
        return model.language_model.model.layers

    def image_inputs(self, pixels):
        # a picture of the base view's size is its own base view and its only tile
        sizes = torch.full((pixels.shape[0], 2), IMAGE_SIZE, dtype=torch.long, device=pixels.device)
        return {"pixel_values": torch.stack([pixels, pixels], dim=1), "image_sizes": sizes}


class Qwen(Family):
    """Qwen2.5-VL: its own tower, which merges 2 x 2 patches into a token, and a Qwen2 decoder with M-RoPE."""

    name = "qwen"
    image_token = "<|image_pad|>"
    image_tokens = IMAGE_ROWS**2
    merge, frames = 2, 2
    patch = IMAGE_SIZE // IMAGE_ROWS // merge

    def tokenizer(self, texts):
        vision_tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision_tokens)
        bpe = _train_bpe(texts, special, self.sizes.vocabulary)
        return Qwen2TokenizerFast(
            tokenizer_object=bpe,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            additional_special_tokens=["<|im_start|>", *vision_tokens],
            **TOKENIZER_SETTINGS,
        )

    def processor(self, tokenizer):
        pixels = IMAGE_SIZE**2  # every picture is scaled to about the size that the tower knows
        images = Qwen2VLImageProcessor(
            patch_size=self.patch,
            temporal_patch_size=self.frames,
            merge_size=self.merge,
            min_pixels=pixels,
            max_pixels=pixels,
        )
        return Qwen2_5_VLProcessor(images, tokenizer, chat_template=QWEN_CHAT_TEMPLATE)

    def model(self, tokenizer, layers):
        sizes = self.sizes
        rotary = sizes.width // sizes.heads // 2
        vision = Qwen2_5_VLVisionConfig(
            depth=TOWER_LAYERS,
            hidden_size=sizes.tower_width,
            intermediate_size=4 * sizes.tower_width,
            num_heads=sizes.tower_heads,
            patch_size=self.patch,
            spatial_merge_size=self.merge,
            temporal_patch_size=self.frames,
            window_size=IMAGE_SIZE,
            fullatt_block_indexes=list(range(TOWER_LAYERS)),
            out_hidden_size=sizes.width,
        )
        config = Qwen2_5_VLConfig(
            vision_config=vision.to_dict(),
            vocab_size=len(tokenizer),
            hidden_size=sizes.width,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=MAX_POSITIONS,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            # as in the published models: a quarter of the frequencies for time, the rest for height and width
            rope_scaling={
                "type": "mrope",
                "mrope_section": [rotary - 2 * (3 * rotary // 8), 3 * rotary // 8, 3 * rotary // 8],
            },
            tie_word_embeddings=False,
            **{
                f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
                for name, token in (
                    ("vision_start", "vision_start"),
                    ("vision_end", "vision_end"),
                    ("image", "image_pad"),
                    ("video", "video_pad"),
                )
            },
            **_special_token_ids(tokenizer),
        )
        return _build(config, tokenizer)

    def pieces(self, conversation):
        return chatml_pieces(conversation)

    def tower(self, model):
        return nn.ModuleList([model.visual.patch_embed, model.visual.blocks])

    def tower_states(self, model, pixels):
        states = []
        with model.visual.merger.register_forward_pre_hook(lambda module, args: states.append(args[0])):
            # the tower attends over all pictures of a call at once and masks the rest, so a few at a time are faster
            for part in pixels.split(8):
                inputs = self.image_inputs(part)
                model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        return torch.cat(states).reshape(len(pixels), self.image_tokens, -1)

    def projector(self, model):
        return model.visual.merger

    def project(self, model, states):
        patches = states.reshape(-1, self.sizes.tower_width)
        return model.visual.merger(patches).reshape(len(states), self.image_tokens, -1)

    def decoder_layers(self, model):
        return model.model.layers

    def image_inputs(self, pixels):
        count, side = len(pixels), IMAGE_ROWS * self.merge
        blocks = pixels.reshape(count, 3, IMAGE_ROWS, self.merge, self.patch, IMAGE_ROWS, self.merge, self.patch)
        patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # merged row and column, patch row and column, its pixels
        patches = patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, self.frames, -1, -1)
        grid = torch.tensor([[1, side, side]] * count, device=pixels.device)
        return {"pixel_values": patches.reshape(count * side**2, -1), "image_grid_thw": grid}


FAMILIES: dict[str, type[Family]] = {family.name: family for family in (Llava, Qwen)}

TOKENIZER_SETTINGS = {
    "padding_side": "left",
    "model_max_length": MAX_POSITIONS,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _train_bpe(texts: Iterable[str], special_tokens: tuple[str, ...], size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, so that any text at all can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special_tokens),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _build(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    # trained with eager attention, whose backward pass in bfloat16 takes a CPU half the time of sdpa's
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(**_special_token_ids(tokenizer))
    return model


def _special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """For configs; a tokenizer that begins texts with nothing names its padding, as Qwen's published configs do."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: tokenizer.pad_token_id if value is None else value for name, value in ids.items()}
