"""Where and in which types sampling computes, chosen from the devices and their memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.choices import DTYPES
from wan_jax.distributed import memory
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.errors import UserError
from wan_jax.models import precision as precision_lib
from wan_jax.models import vae_chunks
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.models.quantised import Quantisation
from wan_jax.storage.model_dir import ModelDir, component_bytes

PICTURES = 8  # of a batch on each device, if not given; of longer videos it is one
USABLE = 0.8  # share of a device's memory that weights may take where nothing else is known


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices and types of a sampling command.

    Attributes:
        mesh: the devices.
        platform: of `attention.platform_of`.
        dtype: of the transformer's and the text encoder's weights and products, one of `DTYPES`.
        precision: of float32 products, one of `choices.MATMUL_PRECISIONS`.
        backend: of attention.
        quantisation: of the transformer's weights; None: in `dtype`.
        batch_size: videos sampled at a time.
        limit: bytes of a device; None: unknown, as on the CPU.
        encoder_device: that the text encoder runs on.
    """

    mesh: jax.sharding.Mesh
    platform: str
    dtype: str
    precision: str
    backend: str
    quantisation: Quantisation | None
    batch_size: int
    limit: int | None
    encoder_device: jax.Device  # pyright: ignore[reportInvalidTypeForm]

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (name, value, remark) of each choice, as text."""
        count, kind = self.mesh.size, self.mesh.devices.flat[0].device_kind
        remark = mesh_lib.describe(self.mesh) if count > 1 else ""
        products = precision_lib.describe(self.precision, self.platform)
        how = self.quantisation.describe() if self.quantisation else ""
        return [
            ("devices", f"{count} x {kind}", remark),
            ("batch", str(self.batch_size), "videos at a time"),
            ("dtype", self.dtype, f"float32 products: {products}"),
            *([("weights", self.quantisation.kind, how)] if self.quantisation else []),
            ("attention", self.backend, ""),
            ("text encoder", self.encoder_device.platform, ""),
        ]


def choose_placement(
    model: ModelDir,
    videos: int,
    frames: int,
    *,
    devices: int = 0,
    batch_size: int = 0,
    dtype: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    weights: str = "dtype",
    text_encoder: str = "auto",
) -> Placement:
    """Return the placement for this number of videos of `frames` frames.

    Args:
        model: the converted model.
        videos: number of videos.
        frames: of a video.
        devices: number of devices; 0: all of this machine.
        batch_size: videos at a time; 0: one for each device, or `PICTURES` of one frame. Fewer videos
            than devices are split by their tokens (`mesh.choose`).
        dtype: one of `DTYPES`; auto: bfloat16, but float32 on the CPU.
        precision: of `choices.MATMUL_PRECISIONS`, or auto (`precision.for_dtype`).
        attention: a backend or auto.
        weights: one of `choices.WEIGHTS`, of the transformer.
        text_encoder: one of `choices.TEXT_ENCODER`; auto: the CPU where its weights do not fit the device.

    Raises `UserError` or ValueError where there are fewer devices, or a backend cannot run.
    """
    available = jax.local_devices()
    if devices > len(available):
        raise UserError(f"--devices={devices}: this machine has {len(available)}")
    chosen = available[: devices or len(available)]
    platform = platform_of(chosen[0])
    if dtype == "auto":
        dtype = DTYPES[0] if platform == "cpu" else DTYPES[1]
    limit = memory.limit(chosen[0])

    count = len(chosen)
    batch = batch_size or count * (PICTURES if frames == 1 else 1)
    batch = min(batch, videos if videos < count else -(-videos // count) * count)
    quantisation = Quantisation.choose(weights, platform, chosen[0])
    size = component_bytes("transformer", model, jnp.dtype(dtype), quantisation=quantisation)
    fsdp, context = mesh_lib.choose(count, batch, size, limit or 0)
    mesh = mesh_lib.make_mesh(fsdp, chosen, context)
    mesh_lib.check_batch("--batch_size", batch, mesh)
    config = model.config("transformer")
    return Placement(
        mesh=mesh,
        platform=platform,
        dtype=dtype,
        precision=precision_lib.for_dtype(precision, dtype, platform),
        backend=choose_backend(attention, platform, jnp.dtype(dtype), config.attention_head_dim),
        quantisation=quantisation,
        batch_size=batch,
        limit=limit,
        encoder_device=_encoder_device(text_encoder, model, jnp.dtype(dtype), chosen[0], limit),
    )


def _encoder_device(setting: str, model: ModelDir, dtype, device, limit: int | None):
    """Return the device of the text encoder. Raises `UserError` where JAX has no CPU."""
    size = component_bytes("text_encoder", model, dtype)
    if setting == "device" or (setting == "auto" and (not limit or size <= USABLE * limit)):
        return device
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            f"the text encoder ({size / 1e9:.1f} GB in {dtype}) is to run on the CPU, which JAX may "
            "not use: add cpu to JAX_PLATFORMS, or give --text_encoder=device"
        ) from None


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How videos are decoded: latent frames of a chunk (0: whole videos), and whether the
    transformers may stay on the device meanwhile.
    """

    chunk: int
    beside: bool


def plan_decoding(
    model: ModelDir, place: Placement, shape: tuple[int, ...], tile: int, transformers: int
) -> Decoding:
    """Return how the batches of a placement are decoded, by estimate of the memory.

    shape: (F, H, W, C) of the latents of a video. tile: side of a tile in latent cells, 0 for none.
    transformers: bytes of their weights on one device.
    """
    f, h, w, c = shape
    videos = place.batch_size // mesh_lib.batch_shards(place.mesh)
    side = tile or max(h, w)
    piece = (videos, f, min(h, side), min(w, side), c)
    config = model.config("vae")
    if place.limit is None:
        return Decoding(vae_chunks.choose_chunk(config, piece), beside=True)
    free = USABLE * place.limit - component_bytes("vae", model, np.float32)
    chunk = vae_chunks.choose_chunk(config, piece, min(free, vae_chunks.BUDGET))
    needed = vae_chunks.decode_bytes(config, piece, chunk)
    return Decoding(chunk, beside=needed + transformers <= free)
