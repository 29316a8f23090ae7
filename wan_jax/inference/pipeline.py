"""From prompts to videos: text embeddings, the deterministic sampler, and decoding.
`wan_jax.sample` and `grpo` share it, so that training, evaluation and deployment run the same code.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.diffusion.experts import Segment, per_guidance
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.solvers import SolverState
from wan_jax.distributed.multihost import my_part
from wan_jax.distributed.sharding import place, replicate
from wan_jax.errors import UserError
from wan_jax.inference.denoising import advance
from wan_jax.inference.prompt_cache import PromptCache
from wan_jax.models import vae_chunks
from wan_jax.models.config import TransformerConfig, VAEConfig
from wan_jax.models.text_encoder import encode
from wan_jax.models.tokenizer import Tokenizer
from wan_jax.models.vae import AutoencoderKLWan
from wan_jax.storage import model_dir

TEXT_ROWS = 512  # Wan's text length; rows after the prompt are zero, and are attended to
NOT_FINITE = (
    "Likely causes: damaged files of the model or the checkpoint, a guidance or a shift far out "
    "of range, or numbers that overflow in bfloat16. Convert the model again, check the settings, "
    "or try float32"
)
# Embeddings have the rows of the longest prompt, rounded up to this multiple. Zero rows after them
# are counted instead of stored (`TextBatch.padding`).
ROW_MULTIPLE = 16
ENCODER_BATCH = 16  # prompts encoded at a time


@dataclasses.dataclass(frozen=True)
class TextTable:
    """The embeddings of a set of prompts on the host, in the dtype of the encoder."""

    prompts: tuple[np.ndarray, ...]  # each [rows of the prompt, text_dim]
    negative: np.ndarray  # [rows of the negative prompt, text_dim]
    rows: int  # St of every batch

    def batch(self, indices, batch_sharding, replicated) -> TextBatch:
        """Return the embeddings of the prompts `indices` [B] on the device."""
        return TextBatch(
            place(self.padded([self.prompts[i] for i in np.asarray(indices)]), batch_sharding),
            place(self.padded([self.negative])[0], replicated),
            TEXT_ROWS - self.rows,
        )

    def padded(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Return [len(prompts), St, text_dim] with zero rows after each prompt."""
        out = np.zeros((len(prompts), self.rows, self.negative.shape[1]), self.negative.dtype)
        for row, rows in zip(out, prompts):
            row[: len(rows)] = rows
        return out


def embed_prompts(
    model: model_dir.ModelDir,
    prompts: Sequence[str],
    negative: str = "",
    *,
    dtype=jnp.float32,
    progress: Callable = lambda x: x,
    cache: bool = False,
    device=None,
) -> TextTable:
    """Encode each prompt once with the model's own tokenizer and text encoder, which is freed
    afterwards.

    Args:
        model: the converted model.
        prompts: what to show; equal prompts are encoded once.
        negative: the negative prompt.
        dtype: storage and compute type of the encoder.
        progress: wraps the iterator over batches, e.g. `tqdm`.
        cache: read embeddings from the model's `PromptCache`, and write new ones to it. Tokenizer
            and encoder are loaded only if some are missing.
        device: that the encoder runs on; None: this process's first one.

    A prompt is encoded with the rows it needs, rounded up, so its embedding does not depend on the
    other prompts, up to rounding.
    """
    # What the cache has.
    texts = list(dict.fromkeys([*prompts, negative]))
    stored = PromptCache(model, dtype) if cache else None
    known = {}
    if stored is not None:
        for text in texts:
            if (rows := stored.get(text)) is not None:
                known[text] = rows

    # Tokenizer and encoder for the rest.
    missing = [text for text in texts if text not in known]
    lengths = {}
    if missing:
        tokenizer = Tokenizer.load(model.tokenizer_path)
        lengths = dict(zip(missing, np.minimum(tokenizer.lengths(missing), TEXT_ROWS)))
        graphdef, state = model_dir.build("text_encoder", model, dtype=dtype, device=device)
        run = make_encoder(graphdef)

    # Batches of prompts of about the same length.
    size = min(ENCODER_BATCH, len(texts))
    work = []
    for rows in sorted({round_up_rows(n) for n in lengths.values()}):
        group = [text for text in missing if round_up_rows(lengths[text]) == rows]
        work += [(rows, group[i : i + size]) for i in range(0, len(group), size)]
    for rows, group in progress(work):
        # the last batch repeats its prompts, so that one shape is compiled
        ids, mask = tokenizer((group * size)[:size], rows)
        for text, row in zip(group, np.asarray(run(state, ids, mask))):
            known[text] = row[: lengths[text]].copy()
            if stored is not None:
                stored.put(text, known[text])
    return TextTable(
        tuple(known[prompt] for prompt in prompts),
        known[negative],
        round_up_rows(max(map(len, known.values()))),
    )


def text_rows(
    model: model_dir.ModelDir, prompts: Sequence[str], negative: str = "", *, dtype=jnp.float32
) -> int:
    """Return St of the table that `embed_prompts` makes of these prompts, without encoding them;
    dtype: as given there.
    """
    stored = PromptCache(model, dtype)
    known = {text: stored.rows(text) for text in dict.fromkeys([*prompts, negative])}
    missing = [text for text, rows in known.items() if rows is None]
    lengths = Tokenizer.load(model.tokenizer_path).lengths(missing) if missing else []
    return round_up_rows(max(filter(None, (*known.values(), *lengths))))


def make_encoder(graphdef) -> Callable:
    """Return the jitted text encoder: (state, ids int32 [B, St], mask [B, St]) -> [B, St, text_dim]
    in the encoder's dtype, zero after the mask.
    """
    return jax.jit(lambda state, ids, mask: encode(nnx.merge(graphdef, state), ids, mask))


def round_up_rows(rows: int) -> int:
    """Round up to a multiple of ROW_MULTIPLE, but not above TEXT_ROWS."""
    return min(-(-int(rows) // ROW_MULTIPLE) * ROW_MULTIPLE, TEXT_ROWS)


def latent_shape(
    frames: int, height: int, width: int, vae: VAEConfig, transformer: TransformerConfig
) -> tuple[int, ...]:
    """Return the shape (F, H, W, C) of the latents of a video of `frames` x `height` x `width`
    pixels. Raises `UserError` on sizes that Wan cannot make.
    """
    per_latent_frame = vae.scale_factor_temporal
    cell = vae.scale_factor_spatial
    multiple = cell * transformer.patch_size[1]
    if frames < 1 or (frames - 1) % per_latent_frame:
        raise UserError(
            f"frames={frames}: Wan makes 1 + {per_latent_frame}k frames; use "
            f"{max(1, frames - (frames - 1) % per_latent_frame)}"
        )
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            raise UserError(
                f"{name}={value} must be a multiple of {multiple}; use "
                f"{max(multiple, round(value / multiple) * multiple)}"
            )
    longest = transformer.rope_max_seq_len
    for name, value, most in (
        ("frames", frames, 1 + (longest - 1) * per_latent_frame),
        ("height", height, longest * multiple),
        ("width", width, longest * multiple),
    ):
        if value > most:
            raise UserError(
                f"{name}={value} must be at most {most}: the model has positions for {longest} tokens"
            )
    return (
        (frames - 1) // per_latent_frame + 1,
        height // cell,
        width // cell,
        transformer.in_channels,
    )


@dataclasses.dataclass(frozen=True)
class Videos:
    """B decoded videos on the host. uint8 has no NaN (it becomes black), so `finite` marks videos
    with non-finite values.
    """

    frames: np.ndarray  # uint8 [B, frames, height, width, 3] RGB
    finite: np.ndarray  # bool [B], whether all latents and pixels of a video are finite numbers

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows) -> "Videos":
        return Videos(self.frames[rows], self.finite[rows])


# XLA's search for the fastest convolutions also tries kernels that need 75 GB of scratch memory for
# 9 pictures of 512x512, and logs each failed allocation. All of these are nondeterministic kernels
# of cuDNN: without them the search takes half the time and little memory (docs/explanation/performance.md).
DECODER_OPTIONS = {"xla_gpu_exclude_nondeterministic_ops": True}


def decoder_functions(graphdef, *, blended: bool = False) -> tuple[Callable, Callable]:
    """Return the jitted functions of `make_decoder`.

    decode: (vae state, latents fp32 [B,F,H,W,C]) -> (video, finite). decode_chunk: (vae state,
    latents of a chunk, history) -> ((video, finite), history).

    video [B,frames,height,width,3] is uint8, or fp32 in [-1, 1] if `blended`, because tiles are
    blended before they are rounded. finite is that of `Videos`.
    """

    def outputs(video, latents):
        finite = all_finite(latents) & all_finite(video)
        return video if blended else jnp.round((video + 1) * 127.5).astype(jnp.uint8), finite

    @partial(jax.jit, compiler_options=DECODER_OPTIONS)
    def decode(state, latents):
        vae: AutoencoderKLWan = nnx.merge(graphdef, state)
        return outputs(vae.decode(vae.denormalise(latents)), latents)

    @partial(jax.jit, donate_argnums=(2,), compiler_options=DECODER_OPTIONS)
    def decode_chunk(state, latents, history):
        vae: AutoencoderKLWan = nnx.merge(graphdef, state)
        video, history = vae.decode_chunk(vae.denormalise(latents), history)
        return outputs(video, latents), history

    return decode, decode_chunk


def all_finite(x: jax.Array) -> jax.Array:
    """Return whether all values of each sample of x [B, ...] are finite, bool [B]."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def make_decoder(
    graphdef,
    *,
    chunk: int | None = None,
    tile: int = 0,
    overlap: int = 8,
    functions: tuple[Callable, Callable] | None = None,
) -> Callable:
    """Return the VAE decoder: (vae state, latents fp32 [B,F,H,W,C]) -> a function that waits for
    the videos and returns them as `Videos` on the host.

    Until that function is called the device can be given more work. (Tiles are only started by that
    call.) With several processes, it returns the videos of this process (`multihost.my_part`).

    Args:
        graphdef: graph of the VAE.
        chunk: latent frames at a time, 0 for whole videos. Chunks give the same video up to
            rounding. None takes whole videos if they need less than `vae_chunks.BUDGET` bytes a
            device by estimate, else the largest chunk that fits, at least one latent frame: two for
            81 frames of Wan 2.1 at 480x832, which take 12 GB a video in addition to the weights
            (table in `vae_chunks`).
        tile: side of a tile in latent cells; 0 for whole frames. Tiles need less memory than a
            chunk of one latent frame, and are an approximation (`vae_chunks.decode_tiles`).
        overlap: overlap of neighbouring tiles in latent cells.
        functions: the `decoder_functions` of this model if they are compiled already; only
            without tiles.

    Raises ValueError on values out of range.
    """
    if (chunk is not None and chunk < 0) or tile < 0 or (tile and not 0 <= overlap < tile):
        raise ValueError(
            f"chunk={chunk}, tile={tile}, overlap={overlap}: none may be negative, and tiles must "
            "overlap by less than their size"
        )

    whole, step = functions or decoder_functions(graphdef, blended=tile > 0)
    chosen = {}  # {shape on one device: latent frames of a chunk}

    def decode_in_time(state, latents) -> list[tuple[jax.Array, jax.Array]]:
        """Return (video, finite) of each chunk, or of the whole video."""
        shape = latents.sharding.shard_shape(latents.shape)
        if shape not in chosen:
            vae: AutoencoderKLWan = nnx.merge(graphdef, state)
            automatic = vae_chunks.choose_chunk(
                vae.config, shape, vae_chunks.BUDGET, jnp.dtype(vae.dtype).itemsize
            )
            chosen[shape] = automatic if chunk is None else chunk
        size = chosen[shape]
        if not 0 < size < shape[1]:
            return [whole(state, latents)]
        sizes = vae_chunks.chunk_sizes(shape[1], size)
        return list(vae_chunks.decode_chunks(partial(step, state), latents, sizes))

    def fetch(pieces: list[tuple[jax.Array, jax.Array]]) -> Videos:
        return Videos(
            np.concatenate([my_part(video) for video, _ in pieces], axis=1),
            np.all([my_part(finite) for _, finite in pieces], axis=0),
        )

    def fetch_tiled(state, latents) -> Videos:
        video = vae_chunks.decode_tiles(
            lambda x: fetch(decode_in_time(state, x)).frames, latents, tile, overlap
        )
        # non-finite values of a tile stay in the blended pixels
        finite = np.all(np.isfinite(video), axis=(1, 2, 3, 4))
        video = np.where(finite[:, None, None, None, None], video, -1)
        return Videos(np.round((video + 1) * 127.5).astype(np.uint8), finite)

    def decode(state, latents) -> Callable[[], Videos]:
        latents = jnp.asarray(latents)
        if tile:
            return partial(fetch_tiled, state, latents)
        pieces = decode_in_time(state, latents)
        for piece in jax.tree.leaves(pieces):
            piece.copy_to_host_async()
        return partial(fetch, pieces)

    return decode


def one_ahead(dispatched: Iterator) -> Iterator:
    """Yield the items of `dispatched`, each only after the next one was requested.

    If requesting an item dispatches work, the device has work left while the host waits for the
    results of an item, fetches and scores them.
    """
    waiting = collections.deque()
    for item in dispatched:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def make_ode_step(
    module: Callable, solver, guidance: float, shift: Callable | None = None
) -> Callable:
    """Return the jitted deterministic step: (arrays of `module`, solver state, step index, text) ->
    solver state.

    Args:
        module: (*arrays) -> the transformer.
        solver: one of `solvers.make_solver`.
        guidance: scale of classifier-free guidance; up to 1 means none.
        shift: (latents, sigma, timestep, text) -> what is subtracted from the velocity
            (`reward_guidance.shift`); None: nothing.
    """

    @partial(jax.jit, donate_argnums=(1,))
    def ode_step(arrays, state: SolverState, i, text: TextBatch) -> SolverState:
        t = jnp.asarray(solver.schedule.timesteps, jnp.float32)[i]
        v = velocity(module(*arrays), state.x, t, text, guidance)
        if shift is not None:
            v = v - shift(state.x, jnp.asarray(solver.schedule.sigmas)[i], t, text)
        return solver.step(state, i, v)

    return ode_step


def make_ode_steps(graphdef, solver, scales: Sequence[float], shift=None) -> tuple[Callable, ...]:
    """Return `make_ode_step` of each expert by its guidance; graphdef: of all transformers."""
    make = partial(make_ode_step, partial(nnx.merge, graphdef), solver, shift=shift)
    return per_guidance(make, scales)


def sample_ode(
    steps: Sequence[Callable],
    arrays: Callable,
    segments: Sequence[Segment],
    solver,
    batches: Iterable[tuple[jax.Array, TextBatch]],
) -> Iterator[jax.Array]:
    """Yield the final latents fp32 [B,F,H,W,C] of each batch, in order.

    Args:
        steps: `make_ode_step` of each expert.
        arrays: expert -> the first argument of its step.
        segments: `experts.segments` of the schedule.
        solver: the solver of the steps.
        batches: (noise [B,F,H,W,C], text) of each batch; iterated over once for each segment.

    All batches go through the steps of one expert before the weights of the next are requested,
    after the device has finished. Batches are yielded during the last segment, as they are
    completed.
    """
    for state in advance(steps, arrays, segments, solver, batches):
        yield state.x


def load_vae(model: model_dir.ModelDir, mesh):
    """Return (graphdef, state replicated on the mesh) of the VAE in fp32."""
    graphdef, state = model_dir.build("vae", model, dtype=jnp.float32)
    return graphdef, replicate(state, mesh)
