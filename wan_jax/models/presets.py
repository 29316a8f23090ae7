"""The configurations of the published models, for what runs without their weights: planning,
benchmarks, tests.

They are those of the Diffusers repositories Wan-AI/*-Diffusers; a converted model has its own.
"""

import dataclasses
import math
import typing

from wan_jax.models.config import TextEncoderConfig, TransformerConfig, VAEConfig

if typing.TYPE_CHECKING:  # it imports JAX, which `grpo.plan --help` does without
    from wan_jax.storage.model_dir import ModelDir

# Per latent channel. One row is eight channels, which the formatter would put on a line each.
# fmt: off
VAE_21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
VAE_21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
VAE_22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
VAE_22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

VAE_21 = VAEConfig(latents_mean=VAE_21_MEAN, latents_std=VAE_21_STD)
VAE_22 = VAEConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=VAE_22_MEAN,
    latents_std=VAE_22_STD,
)
UMT5_XXL = TextEncoderConfig()

# Wan's own negative prompt, `sample_neg_prompt` of its wan/configs/shared_config.py.
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings that a model is published with.

    Attributes:
        steps: of denoising.
        guidance: of each expert, the one for high noise first.
        shift: of the schedule; None: that of the model's scheduler.
        shift_small: of the schedule for videos below `SMALL_PIXELS`; None: `shift`.
        fps: frames per second.
        sizes: (height, width) in pixels, as published, without the upright ones; (): unknown.
        breaks_below: who reports broken videos below the smallest of `sizes`; "": nobody known.
        source: where the values are published.
    """

    steps: int = 50
    guidance: tuple[float, ...] = (5.0,)
    shift: float | None = None
    shift_small: float | None = None
    fps: float = 16.0
    sizes: tuple[tuple[int, int], ...] = ()
    breaks_below: str = ""
    source: str = "general values"

    def shift_for(self, height: int, width: int) -> float | None:
        """Return the shift for a size in pixels; None: that of the model's scheduler."""
        small = height * width < SMALL_PIXELS
        return self.shift_small if small and self.shift_small is not None else self.shift

    def below(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the smallest published size where a size in pixels has fewer pixels, else None."""
        smallest = min(self.sizes, key=math.prod, default=(0, 0))
        return smallest if height * width < math.prod(smallest) else None


# Between 480 x 832 and 704 x 1280, the sizes that Wan is published with.
SMALL_PIXELS = 640 * 1024
GENERAL = Sampling()  # of models that are no published one


@dataclasses.dataclass(frozen=True)
class Preset:
    """The configurations of one model.

    Attributes:
        repository: of the weights on Hugging Face, or the folder of a converted model.
        transformer, vae, text_encoder: of its networks.
        boundary: of its two experts (`wan_jax.diffusion.experts`); None if it has one transformer.
        expand_timesteps: in model_index.json: one timestep per token, all equal for text to video.
        flow_shift: shift of its scheduler.
        sampling: the settings that it is published with.
    """

    repository: str
    transformer: TransformerConfig
    vae: VAEConfig = VAE_21
    boundary: float | None = None
    expand_timesteps: bool = False
    flow_shift: float = 3.0
    text_encoder: TextEncoderConfig = UMT5_XXL
    sampling: Sampling = GENERAL

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the transformers, the one for high noise first."""
        return ("transformer", "transformer_2") if self.boundary else ("transformer",)


PRESETS = {
    "wan2.1-1.3b": Preset(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        TransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        # The note on this model in the README: guidance 6, shift 8 to 12. The defaults of
        # generate.py, which are for both sizes of 2.1, are 5 and 5, and Diffusers' examples have 5
        # and 3.
        sampling=Sampling(
            guidance=(6.0,), shift=8.0, sizes=((480, 832),), source="README of Wan2.1"
        ),
    ),
    "wan2.1-14b": Preset(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        TransformerConfig(),
        # generate.py has shift 5 for all sizes, and Diffusers' documentation 5 at 720p and 3 at 480p
        sampling=Sampling(
            shift=5.0,
            shift_small=3.0,
            sizes=((480, 832), (720, 1280)),
            source="generate.py of Wan2.1, shift of Diffusers' examples",
        ),
    ),
    "wan2.2-a14b": Preset(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        TransformerConfig(),
        boundary=0.875,
        sampling=Sampling(
            steps=40,
            guidance=(4.0, 3.0),  # the file has (low noise, high noise)
            shift=12.0,
            sizes=((480, 832), (720, 1280)),
            source="wan/configs/wan_t2v_A14B.py of Wan2.2",
        ),
    ),
    "wan2.2-ti2v-5b": Preset(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        expand_timesteps=True,
        vae=VAE_22,
        flow_shift=5.0,
        transformer=TransformerConfig(
            num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48
        ),
        sampling=Sampling(
            shift=5.0,
            fps=24.0,
            sizes=((704, 1280),),
            breaks_below="issue 127 of Flow-Factory",
            source="wan/configs/wan_ti2v_5B.py of Wan2.2",
        ),
    ),
}


def published(model: "ModelDir") -> str | None:
    """Return `name_of` a converted model's configuration."""
    return name_of(of_folder(model))


def name_of(own: Preset) -> str | None:
    """Return the name of the preset with the networks of a model, also where its weights were trained
    further; None for other models.
    """
    for name, preset in PRESETS.items():
        if (own.transformer, own.vae, own.experts) == (
            preset.transformer,
            preset.vae,
            preset.experts,
        ):
            return name
    return None


def of_folder(model: "ModelDir") -> Preset:
    """Return the configuration of a converted model, with the default shift, which recipes set."""
    return Preset(
        str(model.path),
        model.config("transformer"),
        model.config("vae"),
        boundary=model.boundary,
        expand_timesteps=bool(model.index.get("expand_timesteps")),
        text_encoder=model.config("text_encoder"),
    )
