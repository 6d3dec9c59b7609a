"""The `config.json` of a draft head: one form for all methods and targets."""

from dataclasses import MISSING, dataclass, field, fields

from vispec.model.arguments import number, of_kind, whole

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
         "num_hidden_layers", "max_position_embeddings")  # fmt: skip
"""Keys that are whole numbers from 1 on."""
LARGEST = 2**31 - 1
"""Of them: torch takes no larger size."""


@dataclass
class DraftConfig:
    """Sizes of a draft head. Keys of the file that are not ours are carried along in `extra`."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    num_hidden_layers: int = 1
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    pad_token_id: int | None = None
    pretraining_tp: int = 1
    qkv_bias: bool = False
    bias: bool = True
    extra: dict = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.json") -> "DraftConfig":
        """Read a parsed config file; raises ValueError naming `source` and the key that is missing or not supported."""
        names = {f.name for f in fields(cls)} - {"extra"}
        required = [f.name for f in fields(cls) if f.name != "extra" and f.default is MISSING]
        if "medusa_num_heads" in values and "hidden_size" not in values:
            raise ValueError(f"{source}: the config of one of FasterDecoding's Medusa heads, which are not read here")
        if not isinstance(values.get("hidden_size"), int) and {"text_config", "vision_config"} & values.keys():
            raise ValueError(f"{source}: the config of a whole model, expected that of a draft head")
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"{source}: the draft head's configuration lacks {', '.join(missing)}")
        ours = {name: value for name, value in values.items() if name in names}
        config = cls(**ours, extra={k: v for k, v in values.items() if k not in names})
        try:
            config._check_numbers()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None
        if config.rope_scaling is not None and not config.mrope_section:
            raise ValueError(f"{source}: rope_scaling {config.rope_scaling} is not supported, a draft head wants null")
        if config.num_hidden_layers != 1:
            raise ValueError(f"{source}: num_hidden_layers {config.num_hidden_layers}, but a draft head has one layer")
        if config.hidden_act != "silu":
            raise ValueError(f"{source}: hidden_act {config.hidden_act!r} is not supported, a draft head wants 'silu'")
        if config.hidden_size % config.num_attention_heads and "head_dim" not in values:
            raise ValueError(
                f"{source}: hidden_size {config.hidden_size} is no multiple of "
                f"num_attention_heads {config.num_attention_heads}"
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(
                f"{source}: num_attention_heads {config.num_attention_heads} is no multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        return config

    def _check_numbers(self) -> None:
        """TypeError or ValueError at a size that is none."""
        for name in SIZES:
            if whole(name, getattr(self, name), 1) > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST}, found {getattr(self, name)}")
        whole("head_dim", self.head_dim, 2)
        of_kind("rope_scaling", self.rope_scaling, dict)
        of_kind("mrope_section", self.mrope_section, list)
        for angles in self.mrope_section or ():
            whole("mrope_section", angles, 0)
        for name in ("rms_norm_eps", "rope_theta"):
            if number(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in ("qkv_bias", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, found {getattr(self, name)!r}")

    def to_dict(self) -> dict:
        """The file's content, foreign keys included."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**ours, **self.extra}

    @property
    def head_dim(self) -> int:
        return self.extra.get("head_dim") or self.hidden_size // self.num_attention_heads

    @property
    def mrope_section(self) -> list[int] | None:
        """How many angles of a head each axis of M-RoPE turns; None: positions are plain numbers."""
        return (self.rope_scaling or {}).get("mrope_section")
