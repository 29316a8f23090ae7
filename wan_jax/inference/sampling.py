"""Samples videos for prompts, batch by batch, so that memory does not grow with their number.

A request is made and checked once. Then `encode` makes the embeddings of its prompts, `load` reads
the networks, and `sample` yields the videos.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.choices import SMALLER_WEIGHTS
from wan_jax.diffusion import experts
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import SolverState
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.distributed.offload import Weights
from wan_jax.inference import denoising, out_of_memory, pipeline
from wan_jax.inference.placement import Placement, plan_decoding
from wan_jax.inference.pruning import Pruning, before_and_after, collect, survivors
from wan_jax.inference.settings import SamplingSettings
from wan_jax.storage import model_dir
from wan_jax.storage.trained_weights import load_transformers


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """The N = prompts x samples videos to make, and how. Videos are numbered prompt by prompt.

    Attributes:
        model: the converted model.
        checkpoint: with trained weights, a path for `load_transformers`; None: the base model.
        prompts: what to show.
        negative: the negative prompt.
        samples: of each prompt.
        frames, height, width: pixels of a video.
        settings: of the sampler.
        place: the devices and types.
        seed: of the initial noise.
        noise: the initial noise, fp32 [N, F, H, W, C]; None: that of the seed.
        reward_shift: what is subtracted from the velocity (`reward_guidance.guidance`), or None.
        offload: of the idle expert, one of `choices.OFFLOAD`.
        tile: side of a tile in latent cells for decoding; 0: whole frames.
        pruning: which samples of a prompt are denoised to the end; None: all.
    """

    model: model_dir.ModelDir
    checkpoint: str | None
    prompts: tuple[str, ...]
    negative: str
    samples: int
    frames: int
    height: int
    width: int
    settings: SamplingSettings
    place: Placement
    seed: int = 0
    noise: np.ndarray | None = None
    reward_shift: Callable | None = None
    offload: str = "auto"
    tile: int = 0
    pruning: Pruning | None = None

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """(F, H, W, C) of the latents of a video. Raises `UserError`."""
        return pipeline.latent_shape(
            self.frames,
            self.height,
            self.width,
            self.model.config("vae"),
            self.model.config("transformer"),
        )

    @property
    def prompt_of(self) -> np.ndarray:
        """The prompt of each video, int [N]."""
        return np.repeat(np.arange(len(self.prompts)), self.samples)

    @property
    def batches(self) -> list[np.ndarray]:
        """The numbers of the videos of each batch."""
        return self.batched(np.arange(len(self.prompt_of)))

    @property
    def finished_per_prompt(self) -> int:
        """The number of videos of a prompt that are denoised to the end."""
        return self.pruning.keep if self.pruning else self.samples

    def batched(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Return numbers of videos, int [n], in batches."""
        return np.split(numbers, range(self.place.batch_size, len(numbers), self.place.batch_size))

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of a batch in its full size: the last one repeats its videos."""
        return np.resize(rows, self.place.batch_size)

    def initial_noise(self, rows: np.ndarray) -> jax.Array:
        """Return the noise of videos, fp32 [B, F, H, W, C]. Each has a key of its own, so it does
        not depend on the batch, on the number of videos or on the devices.
        """
        if self.noise is not None:
            return jnp.asarray(self.noise[rows])
        keys = jax.random.split(jax.random.key(self.seed), len(self.prompt_of))[rows]
        return jax.vmap(lambda key: jax.random.normal(key, self.shape, jnp.float32))(keys)


@dataclasses.dataclass(frozen=True)
class Networks:
    """The loaded networks: the graph and weights of the transformers, the graph of the VAE and its
    state in host memory.
    """

    transformer: nnx.GraphDef
    weights: Weights
    vae: nnx.GraphDef
    vae_state: nnx.State


@dataclasses.dataclass(frozen=True)
class Batch:
    """The videos of a batch.

    Attributes:
        number: of the batch, from 0.
        rows: the numbers of its videos.
        videos: in the same order.
        seconds: of denoising and of decoding, compilation included.
    """

    number: int
    rows: np.ndarray
    videos: pipeline.Videos
    seconds: tuple[float, float]


def encode(request: SampleRequest, progress: Callable = lambda x: x) -> pipeline.TextTable:
    """Return the embeddings of the prompts, from the model's cache where it has them. progress: as
    in `pipeline.embed_prompts`.
    """
    place = request.place
    remedies = ["--text_encoder=cpu"]
    if place.dtype == "float32":
        remedies.append("--dtype=bfloat16")
    with out_of_memory.explained("encoding the prompts", place.limit, remedies):
        return pipeline.embed_prompts(
            request.model,
            request.prompts,
            request.negative,
            dtype=jnp.dtype(place.dtype),
            cache=True,
            device=place.encoder_device,
            progress=progress,
        )


def load(request: SampleRequest) -> Networks:
    """Load the transformers onto the devices, and the VAE into host memory, so that damage is found
    before anything is computed.
    """
    place, model = request.place, request.model
    graph, state = model_dir.build("vae", model, dtype=jnp.float32)
    state = jax.tree.map(np.asarray, state)
    remedies = [*fewer_bits(place), "more devices"]
    if len(model.experts) > 1 and request.offload != "always":
        remedies.insert(0, "--offload=always")
    with out_of_memory.explained("loading the transformer", place.limit, remedies):
        transformer, weights = load_transformers(
            model,
            request.checkpoint,
            jnp.dtype(place.dtype),
            place.backend,
            place.mesh,
            request.offload,
            place.quantisation,
        )
    return Networks(transformer, weights, graph, state)


def sample(
    request: SampleRequest, table: pipeline.TextTable, networks: Networks
) -> Iterator[Batch]:
    """Yield the videos of each batch, in order; with `pruning` those that are left.

    One batch is decoded after the other is denoised if the device has memory for both networks;
    else, and if there is only one, all are denoised first and the transformers deleted.
    """
    place = request.place
    held = 1 if networks.weights.offload else len(request.model.experts)
    size = model_dir.component_bytes(
        "transformer", request.model, jnp.dtype(place.dtype), quantisation=place.quantisation
    )
    size = held * size // place.mesh.shape["fsdp"]
    plan = plan_decoding(request.model, place, request.shape, request.tile, size)
    finished = denoise(request, table, networks)
    videos = len(request.prompts) * request.finished_per_prompt
    if videos <= place.batch_size or not plan.beside:
        finished = [(rows, np.asarray(latents), seconds) for rows, latents, seconds in finished]
        networks.weights.free()
    vae_state = sharding_lib.replicate(networks.vae_state, place.mesh)
    decode = pipeline.make_decoder(
        networks.vae, chunk=plan.chunk, tile=request.tile, overlap=request.tile // 4
    )
    sharding = sharding_lib.batch_sharding(place.mesh)
    with out_of_memory.explained("decoding", place.limit, decoding_remedies(request)):
        for number, (rows, latents, seconds) in enumerate(finished):
            start = time.monotonic()
            videos = decode(vae_state, sharding_lib.place(latents, sharding))()
            yield Batch(number, rows, videos[: len(rows)], (seconds, time.monotonic() - start))


def denoise(
    request: SampleRequest, table: pipeline.TextTable, networks: Networks
) -> Iterator[tuple[np.ndarray, jax.Array, float]]:
    """Yield the numbers of the videos of each batch, their final latents fp32 [B, F, H, W, C], and the
    seconds that they took. With `pruning` these are the videos that are left, and the first batch's
    seconds include the ranking of all.
    """
    place, settings = request.place, request.settings
    solver = settings.make_solver()
    steps = pipeline.make_ode_steps(
        networks.transformer, solver, settings.guidance, request.reward_shift
    )
    segments = experts.segments(solver.schedule.timesteps, request.model.boundary)
    inputs = _Inputs(request, table, request.batches, request.initial_noise)

    def advance(segments: Sequence[experts.Segment], inputs: _Inputs) -> Iterator[SolverState]:
        return denoising.advance(
            steps, lambda expert: (networks.weights(expert),), segments, solver, inputs
        )

    start = time.monotonic()
    with out_of_memory.explained("denoising", place.limit, denoising_remedies(request)):
        if request.pruning is not None:
            first, segments = before_and_after(segments, request.pruning.step)
            texts = (text for _, text in inputs)
            timestep = solver.schedule.timesteps[request.pruning.step]
            states, predicted = collect(
                request.pruning, advance(first, inputs), texts, timestep, request.batches
            )
            left = request.batched(survivors(predicted, request.samples, request.pruning.keep))
            inputs = _Inputs(
                request, table, left, lambda rows: jax.tree.map(lambda x: x[rows], states)
            )
        for rows, state in zip(inputs.batches, advance(segments, inputs)):
            jax.block_until_ready(state)
            now = time.monotonic()
            yield rows, state.x, now - start
            start = time.monotonic()


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What each batch begins with, and its text, made when they are needed.

    Attributes:
        batches: the numbers of the videos of each batch.
        begin: numbers int [B] -> noise or a solver state.
    """

    request: SampleRequest
    table: pipeline.TextTable
    batches: list[np.ndarray]
    begin: Callable

    def __iter__(self) -> Iterator[tuple[jax.Array | SolverState, TextBatch]]:
        request, mesh = self.request, self.request.place.mesh
        sharded = sharding_lib.batch_sharding(mesh)
        for rows in map(request.padded, self.batches):
            start = jax.tree.map(lambda x: sharding_lib.place(x, sharded), self.begin(rows))
            text = self.table.batch(request.prompt_of[rows], sharded, sharding_lib.replicated(mesh))
            yield start, text


def denoising_remedies(request: SampleRequest) -> list[str]:
    """Return the flags with which denoising would need less memory."""
    remedies = [*smaller_batch(request), *fewer_bits(request.place)]
    if len(request.model.experts) > 1 and request.offload != "always":
        remedies.append("--offload=always")
    if request.frames > 1:
        remedies.append(f"--frames={1 + (request.frames - 1) // 8 * 4}")
    return [*remedies, smaller_size(request), "more devices"]


def fewer_bits(place: Placement) -> list[str]:
    """Return the flags with which the transformer's weights take less."""
    stored = place.quantisation.kind if place.quantisation else "dtype"
    wide = ["--dtype=bfloat16"] if place.dtype == "float32" else []
    return [*(f"--weights={name}" for name in SMALLER_WEIGHTS[stored]), *wide]


def decoding_remedies(request: SampleRequest) -> list[str]:
    """Return the flags with which decoding would need less memory."""
    cell = request.model.config("vae").scale_factor_spatial
    side = request.tile * cell or min(request.height, request.width)
    smaller = side // 2 // (4 * cell) * 4 * cell
    tiles = [f"--tile={smaller}"] if smaller else []
    return [*smaller_batch(request), *tiles, smaller_size(request)]


def smaller_size(request: SampleRequest) -> str:
    """Return the flags of a size with about half of the pixels."""
    model = request.model
    multiple = model.config("vae").scale_factor_spatial * model.config("transformer").patch_size[1]
    height, width = (
        max(1, round(pixels / 2**0.5 / multiple)) * multiple
        for pixels in (request.height, request.width)
    )
    return f"--height={height} --width={width}"


def smaller_batch(request: SampleRequest) -> list[str]:
    """Return the flag that halves a batch, if it has more than one video."""
    size = request.place.batch_size
    return [f"--batch_size={size // 2}"] if size > 1 else []
