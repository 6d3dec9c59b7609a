"""The `config.json` of a draft head: one form for all methods and targets."""

from dataclasses import MISSING, dataclass, field, fields


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
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"{source}: the draft head's configuration lacks {', '.join(missing)}")
        ours = {name: value for name, value in values.items() if name in names}
        config = cls(**ours, extra={k: v for k, v in values.items() if k not in names})
        if config.rope_scaling is not None:
            raise ValueError(f"{source}: rope_scaling {config.rope_scaling} is not supported, a draft head wants null")
        if config.num_hidden_layers != 1:
            raise ValueError(f"{source}: num_hidden_layers {config.num_hidden_layers}, but a draft head has one layer")
        if config.hidden_act != "silu":
            raise ValueError(f"{source}: hidden_act {config.hidden_act!r} is not supported, a draft head wants 'silu'")
        if config.hidden_size % config.num_attention_heads:
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

    def to_dict(self) -> dict:
        """The file's content, foreign keys included."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**ours, **self.extra}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
