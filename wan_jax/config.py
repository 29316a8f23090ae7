"""Model configurations, read from the JSON files of a Diffusers checkpoint.

Field names and defaults are those of Diffusers' `WanTransformer3DModel`, `AutoencoderKLWan`, transformers'
`UMT5EncoderModel` and `UniPCMultistepScheduler`, so `from_dict(json.load(...))` reads the published files and an
older file that lacks a key gets the value the class would have given it.
"""

import dataclasses
import json
import pathlib


class ConfigError(ValueError):
    """A model configuration that this code cannot run faithfully."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """`transformer/config.json` (Diffusers `WanTransformer3DModel`). Width D = attention heads * head dim."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def validate(self):
        fixed = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
        for name, want in fixed.items():
            if getattr(self, name) != want:
                raise ConfigError(f"transformer config: {name}={getattr(self, name)!r} is not supported, every Wan T2V "
                                  f"model has {want!r}; check that the folder holds a Wan T2V checkpoint")
        if self.patch_size[0] != 1:
            raise ConfigError(f"transformer config: patch_size={list(self.patch_size)}: the temporal patch must be 1")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """`vae/config.json` (Diffusers `AutoencoderKLWan`). `temperal_downsample` is the key's real spelling."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def validate(self):
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ConfigError(f"vae config: {name} has {len(getattr(self, name))} values, z_dim is {self.z_dim}")
        if self.attn_scales:
            raise ConfigError(f"vae config: attn_scales={list(self.attn_scales)} is not supported; Wan's VAEs have []")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """`text_encoder/config.json` (transformers `UMT5EncoderModel`)."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def validate(self):
        if self.feed_forward_proj != "gated-gelu":
            raise ConfigError(f"text encoder: feed_forward_proj={self.feed_forward_proj!r}; Wan uses 'gated-gelu'")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """`scheduler/scheduler_config.json` (Diffusers `UniPCMultistepScheduler` with flow sigmas)."""

    flow_shift: float = 3.0
    num_train_timesteps: int = 1000
    solver_order: int = 2
    prediction_type: str = "flow_prediction"
    use_flow_sigmas: bool = True

    def validate(self):
        if self.prediction_type != "flow_prediction" or not self.use_flow_sigmas:
            raise ConfigError("scheduler config: Wan needs prediction_type='flow_prediction' and use_flow_sigmas=true, "
                              f"got {self.prediction_type!r} and {self.use_flow_sigmas}")
        if self.solver_order not in (1, 2):
            raise ConfigError(f"scheduler config: solver_order={self.solver_order}; UniPC order 1 or 2 is supported")


def from_dict(cls, values: dict):
    """Builds a config dataclass from a JSON dict: known keys are taken, unknown ones ignored (Diffusers writes many),
    lists become tuples, and values this code cannot run raise `ConfigError`."""
    names = {field.name for field in dataclasses.fields(cls)}
    picked = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    config = cls(**picked)
    config.validate()
    return config


def load(cls, path):
    """`from_dict` on a JSON file. Raises `ConfigError` naming the file when it is missing or not JSON."""
    path = pathlib.Path(path)
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is {path.parent} a folder of a Wan checkpoint?") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return from_dict(cls, values)
