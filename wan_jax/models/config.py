"""Model configurations, read from the JSON files of a Diffusers checkpoint.

Field names and defaults are those of Diffusers' `WanTransformer3DModel`, `AutoencoderKLWan`, its
schedulers and transformers' `UMT5EncoderModel`. So `from_dict(json.load(...))` reads the published
files, and an older file without a key gets the value that the class would have given it.
`check_fields` compares every value with the type and the bounds of its field: a whole number is
between 1 and 2^20 unless its field has other bounds.
"""

import dataclasses
import math
import pathlib
import types
import typing

from wan_jax.errors import UserError
from wan_jax.storage import integrity


class ConfigError(UserError, ValueError):
    """A model configuration that this code cannot run correctly."""


class Config:
    """The interface of all configurations."""

    def validate(self) -> None:
        """Raise `ConfigError` when valid fields do not fit together or to Wan."""


def _bounded(default, low, high):
    """Return a field with numbers from `low` to `high`, both included."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


def _only(default, supported):
    """Return a field with one supported value; `default` is what the class assumes when the key is
    missing.
    """
    return dataclasses.field(default=default, metadata={"only": supported})


SMALL = 1e-30  # a lower bound for numbers that must be positive


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Config):
    """`transformer/config.json` (Diffusers `WanTransformer3DModel`)."""

    patch_size: tuple[int, int, int] = _bounded((1, 2, 2), 1, 64)
    num_attention_heads: int = _bounded(40, 1, 1024)
    attention_head_dim: int = _bounded(128, 1, 4096)
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = _bounded(40, 1, 1024)
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = _bounded(1e-6, SMALL, 1.0)
    rope_max_seq_len: int = 1024

    @property
    def width(self) -> int:
        """D, the width of the residual stream: attention heads x head dim."""
        return self.num_attention_heads * self.attention_head_dim

    def validate(self):
        fixed = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
        for name, want in fixed.items():
            if getattr(self, name) != want:
                raise ConfigError(
                    f"transformer config: {name}={getattr(self, name)!r} is not supported, every "
                    f"Wan T2V model has {want!r}; check that the folder holds a Wan T2V checkpoint"
                )
        if self.patch_size[0] != 1:
            raise ConfigError(
                f"transformer config: patch_size={list(self.patch_size)}: the temporal patch must "
                "be 1"
            )
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise ConfigError(
                    f"transformer config: {name}={getattr(self, name)} must be even: it is split "
                    "into sines and cosines"
                )


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """`vae/config.json` (Diffusers `AutoencoderKLWan`). `temperal_downsample` is how the key is
    spelled.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = _bounded((1, 2, 4, 4), 1, 1024)
    num_res_blocks: int = _bounded(2, 1, 1024)
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = _bounded(None, 1, 64)
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def validate(self):
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ConfigError(
                    f"vae config: {name} has {len(getattr(self, name))} values, z_dim is "
                    f"{self.z_dim}"
                )
        if min(self.latents_std, default=1) <= 0:
            raise ConfigError(
                f"vae config: latents_std has {min(self.latents_std)}: every value must be positive"
            )
        if self.attn_scales:
            raise ConfigError(
                f"vae config: attn_scales={list(self.attn_scales)} is not supported; Wan's VAEs "
                "have []"
            )


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(Config):
    """`text_encoder/config.json` (transformers `UMT5EncoderModel`)."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = _bounded(24, 1, 1024)
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = _bounded(1e-6, SMALL, 1.0)
    feed_forward_proj: str = "gated-gelu"

    def validate(self):
        if self.feed_forward_proj != "gated-gelu":
            raise ConfigError(
                f"text encoder: feed_forward_proj={self.feed_forward_proj!r}; Wan uses 'gated-gelu'"
            )


@dataclasses.dataclass(frozen=True)
class UniPCConfig(Config):
    """`scheduler/scheduler_config.json` of Diffusers' `UniPCMultistepScheduler`: every key with an
    effect on flow sigmas. `solvers.UniPC` implements one value of most of them.
    """

    flow_shift: float = _bounded(1.0, 1e-3, 1e3)
    solver_order: int = _bounded(2, 1, 2)
    num_train_timesteps: int = _only(1000, 1000)
    prediction_type: str = _only("epsilon", "flow_prediction")
    use_flow_sigmas: bool = _only(False, True)
    predict_x0: bool = _only(True, True)
    solver_type: str = _only("bh2", "bh2")
    solver_p: None = _only(None, None)
    lower_order_final: bool = _only(True, True)
    final_sigmas_type: str = _only("zero", "zero")
    disable_corrector: tuple[int, ...] = _only((), ())
    thresholding: bool = _only(False, False)
    use_karras_sigmas: bool = _only(False, False)
    use_exponential_sigmas: bool = _only(False, False)
    use_beta_sigmas: bool = _only(False, False)
    use_dynamic_shifting: bool = _only(False, False)
    shift_terminal: float | None = _only(None, None)


@dataclasses.dataclass(frozen=True)
class FlowMatchEulerConfig(Config):
    """`scheduler/scheduler_config.json` of Diffusers' `FlowMatchEulerDiscreteScheduler`."""

    shift: float = _bounded(1.0, 1e-3, 1e3)
    num_train_timesteps: int = _only(1000, 1000)
    use_dynamic_shifting: bool = _only(False, False)
    invert_sigmas: bool = _only(False, False)
    shift_terminal: float | None = _only(None, None)
    use_karras_sigmas: bool = _only(False, False)
    use_exponential_sigmas: bool = _only(False, False)
    use_beta_sigmas: bool = _only(False, False)
    stochastic_sampling: bool = _only(False, False)


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """How the scheduler of a checkpoint samples."""

    solver: str  # one of `solvers.SOLVERS`
    shift: float
    order: int = 2  # of UniPC


SCHEDULERS = {
    "UniPCMultistepScheduler": UniPCConfig,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerConfig,
}


def load_scheduler(path) -> Scheduler:
    """Read a scheduler_config.json. Raise `ConfigError` on a class or a setting that no solver here
    implements.
    """
    values = read_json(path)
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ConfigError(
            f"{path}: _class_name={_short(name)} is not supported, {' and '.join(SCHEDULERS)} are"
        )
    config = from_dict(SCHEDULERS[name], values, where=str(path))
    if isinstance(config, UniPCConfig):
        return Scheduler("unipc", float(config.flow_shift), config.solver_order)
    return Scheduler("flow_match_euler", float(config.shift))


def from_dict(cls, values: dict, where: str = ""):
    """Build a configuration from a JSON dict. Known keys are used, unknown ones ignored (Diffusers
    writes many), and lists become tuples.

    Raises `ConfigError`, with the file name `where`, on values that this code cannot run.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    config = cls(**known)
    try:
        check_fields(config)
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None
    return config


def check_fields(config) -> None:
    """Raise `ConfigError` when the value of a field has the wrong type or is out of bounds."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        limits = field.metadata
        if "only" in limits:
            supported = value == limits["only"]
            wrong = None if supported else f"only {limits['only']!r} is supported"
        else:
            wrong = _wrong(value, hints[field.name], limits)
        if wrong:
            raise ConfigError(
                f"{field.name}={_short(list(value) if isinstance(value, tuple) else value)}: "
                f"{wrong}"
            )


def _wrong(value, hint, limits: typing.Mapping) -> str | None:
    """Return what is wrong with a value of the type `hint`, or None."""
    if isinstance(hint, types.UnionType):
        return None if value is None else _wrong(value, typing.get_args(hint)[0], limits)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, tuple) or (kinds[-1] is not ... and len(value) != len(kinds)):
            return "must be a list" + (f" of {len(kinds)} values" if kinds[-1] is not ... else "")
        return next(filter(None, (_wrong(item, kinds[0], limits) for item in value)), None)
    if hint in (bool, str):
        return (
            None
            if isinstance(value, hint)
            else f"must be {'true or false' if hint is bool else 'a text'}"
        )
    low = limits.get("low", 1 if hint is int else -1e6)
    high = limits.get("high", 2**20)
    numbers = (int,) if hint is int else (int, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        return f"must be a {'whole ' if hint is int else ''}number from {low:g} to {high:g}"
    return None


def _short(value) -> str:
    """Return the value as text of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path) -> dict:
    """Read a JSON object from a file. Raise `ConfigError` with its name when it is missing or
    something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: is {path.parent} a folder of a Wan checkpoint?")
    try:
        return integrity.read_json(path)
    except integrity.Damaged as error:
        raise ConfigError(str(error)) from None


def load(cls, path):
    """Read a configuration from a JSON file by `from_dict`. Raises `ConfigError` with the name of
    the file.
    """
    return from_dict(cls, read_json(path), where=str(path))
