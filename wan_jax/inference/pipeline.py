"""From prompts to videos: text embeddings, the deterministic sampler, and decoding. Shared by
`wan_jax.sample` and `grpo`, so that training, evaluation and deployment run the same code.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.solvers import SolverState
from wan_jax.distributed.mesh import place, replicate
from wan_jax.distributed.multihost import my_part
from wan_jax.errors import UserError
from wan_jax.inference.prompt_cache import PromptCache
from wan_jax.models import vae_chunks
from wan_jax.models.config import TransformerConfig, VAEConfig
from wan_jax.models.text_encoder import encode
from wan_jax.models.tokenizer import Tokenizer
from wan_jax.models.vae import AutoencoderKLWan
from wan_jax.storage import model_dir

TEXT_ROWS = 512  # Wan's text length; rows past the prompt are zero and are attended to
NOT_FINITE = (
    "Likely causes: damaged files of the model or the checkpoint, a guidance or a shift far out "
    "of range, or numbers that overflow in bfloat16. Convert the model again, check the settings, "
    "or try float32"
)
# embeddings are trimmed to the longest prompt, rounded up, and the rest is counted
ROW_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class TextTable:
    """Embeddings of a prompt set on the host: of each prompt its own rows, in the encoder's type."""

    prompts: tuple[np.ndarray, ...]  # [rows of the prompt, text_dim] each
    negative: np.ndarray  # [its rows, text_dim]
    rows: int  # St of every batch

    def batch(self, indices, batch_sharding, replicated) -> TextBatch:
        """The embeddings of prompts `indices` [B] on the device."""
        return TextBatch(
            place(self.padded([self.prompts[i] for i in np.asarray(indices)]), batch_sharding),
            place(self.padded([self.negative])[0], replicated),
            TEXT_ROWS - self.rows,
        )

    def padded(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """[len(prompts), St, text_dim], rows past each prompt zero."""
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
    batch: int = 16,
    progress: Callable = lambda x: x,
    cache: bool = False,
) -> TextTable:
    """Encodes each prompt once with the model's own tokenizer and text encoder, which is freed
    afterwards.

    cache: look for the embeddings in the model's `PromptCache` first, and leave new ones there;
    tokenizer and encoder are loaded only for what is missing. A prompt is encoded in as many rows
    as it needs, rounded up, so its embedding does not depend on the other prompts, rounding aside.
    """
    known, lengths = {}, {}
    texts = list(dict.fromkeys([*prompts, negative]))
    stored = PromptCache(model, dtype) if cache else None
    if stored:
        known = {text: rows for text in texts if (rows := stored.get(text)) is not None}
    missing = [text for text in texts if text not in known]
    if missing:  # else neither tokenizer nor encoder is loaded
        tokenizer = Tokenizer.load(model.tokenizer_path)
        lengths = dict(zip(missing, np.minimum(tokenizer.lengths(missing), TEXT_ROWS)))
        graphdef, state = model_dir.build("text_encoder", model, dtype=dtype)
        run = make_encoder(graphdef)
    size, work = min(batch, len(texts)), []
    for rows in sorted({rounded(n) for n in lengths.values()}):
        group = [text for text in missing if rounded(lengths[text]) == rows]
        work += [(rows, group[i : i + size]) for i in range(0, len(group), size)]
    for rows, group in progress(work):
        # the last batch wraps around: one compiled shape
        ids, mask = tokenizer((group * size)[:size], rows)
        for text, row in zip(group, np.asarray(run(state, ids, mask))):
            known[text] = row[: lengths[text]].copy()
            if stored:
                stored.put(text, known[text])
    return TextTable(
        tuple(known[prompt] for prompt in prompts),
        known[negative],
        rounded(max(map(len, known.values()))),
    )


def text_rows(
    model: model_dir.ModelDir, prompts: Sequence[str], negative: str = "", *, dtype=jnp.float32
) -> int:
    """St of the table that `embed_prompts` makes of these prompts, without encoding them; dtype:
    its own.
    """
    stored = PromptCache(model, dtype)
    known = {text: stored.rows(text) for text in dict.fromkeys([*prompts, negative])}
    missing = [text for text, rows in known.items() if rows is None]
    lengths = Tokenizer.load(model.tokenizer_path).lengths(missing) if missing else []
    return rounded(max(filter(None, (*known.values(), *lengths))))


def make_encoder(graphdef) -> Callable:
    """The jitted text encoder: (state, ids int32 [B, S], mask [B, S]) -> [B, S, text_dim] in the
    encoder's type, zero past the mask.
    """
    return jax.jit(lambda state, ids, mask: encode(nnx.merge(graphdef, state), ids, mask))


def rounded(rows: int) -> int:
    return min(-(-int(rows) // ROW_MULTIPLE) * ROW_MULTIPLE, TEXT_ROWS)


def latent_shape(
    frames: int, height: int, width: int, vae: VAEConfig, transformer: TransformerConfig
) -> tuple[int, ...]:
    """(F, H, W, C) of a video of `frames` x `height` x `width` pixels. Raises `UserError` on sizes
    Wan cannot make.
    """
    t, s, patch = vae.scale_factor_temporal, vae.scale_factor_spatial, transformer.patch_size[1]
    if frames < 1 or (frames - 1) % t:
        raise UserError(
            f"frames={frames}: Wan makes 1 + {t}k frames; use {max(1, frames - (frames - 1) % t)}"
        )
    for name, value in (("height", height), ("width", width)):
        if value < s * patch or value % (s * patch):
            raise UserError(
                f"{name}={value} must be a multiple of {s * patch}; use "
                f"{max(s * patch, round(value / (s * patch)) * s * patch)}"
            )
    return (frames - 1) // t + 1, height // s, width // s, transformer.in_channels


@dataclasses.dataclass(frozen=True)
class Videos:
    """B decoded videos on the host. A NaN has no value in uint8, it becomes black: `finite` tells
    them apart.
    """

    frames: np.ndarray  # uint8 [B, T, H, W, 3] RGB
    finite: np.ndarray  # bool [B], whether all latents and pixels of a video are finite numbers

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows) -> "Videos":
        return Videos(self.frames[rows], self.finite[rows])


# XLA's search for the fastest convolutions also tries what needs 75 GB of scratch memory for 9
# pictures of 512x512, and says at length that it could not allocate them. All of these are among
# cuDNN's nondeterministic kernels: without them the search takes half the time and no memory to
# speak of (docs/performance.md has what decoding takes).
DECODER_OPTIONS = {"xla_gpu_exclude_nondeterministic_ops": True}


def decoder_programs(graphdef, *, blended: bool = False) -> tuple[Callable, Callable]:
    """The jitted functions of `make_decoder`: (vae state, latents fp32 [B,F,h,w,C]) -> (video,
    finite), and (vae state, latents of a chunk, history) -> ((video, finite), history). Videos
    [B,T,H,W,3] are uint8, or fp32 in [-1, 1] where they are still to be blended; finite is that of
    `Videos`.
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
    """Whether all values of a sample are finite, bool [B]; x: [B, ...]."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def make_decoder(
    graphdef,
    *,
    chunk: int | None = None,
    tile: int = 0,
    overlap: int = 8,
    programs: tuple[Callable, Callable] | None = None,
) -> Callable:
    """The jitted VAE decoder: (vae state, latents fp32 [B,F,h,w,C]) -> a function that waits for
    the videos and gives them as `Videos` on the host; with several processes, those whose latents
    lie on this one's devices. Meanwhile the device can be given more to do. (Tiles are only started
    by the second call.)

    chunk: latent frames at a time, 0 for the whole clip; None takes whole clips where they need
    less than `vae_chunks.BUDGET` bytes a device by estimate, and else the largest chunk that fits,
    at least one latent frame: two for 81 frames of Wan 2.1 at 480x832, which take 12 GB a video
    beside the weights (`vae_chunks` has a table). Chunks give the same video up to rounding. tile >
    0: in tiles of so many latent cells too, overlapping by `overlap`; that needs less and is an
    approximation (`vae_chunks.decode_tiles`). programs: this model's `decoder_programs`, compiled
    already, where there are no tiles. Raises ValueError on values out of range.
    """
    if (chunk is not None and chunk < 0) or tile < 0 or (tile and not 0 <= overlap < tile):
        raise ValueError(
            f"chunk={chunk}, tile={tile}, overlap={overlap}: none may be negative, and tiles must "
            "overlap by less than their size"
        )

    whole, step = programs or decoder_programs(graphdef, blended=tile > 0)
    chosen = {}  # shape on one device: latent frames a chunk

    def in_time(state, latents) -> list[tuple[jax.Array, jax.Array]]:
        """(video, finite) of each piece in time."""
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

    def fetched(pieces: list[tuple[jax.Array, jax.Array]]) -> Videos:
        return Videos(
            np.concatenate([my_part(video) for video, _ in pieces], axis=1),
            np.all([my_part(finite) for _, finite in pieces], axis=0),
        )

    def decode(state, latents) -> Callable[[], Videos]:
        latents = jnp.asarray(latents)
        if tile:

            def blended():
                video = vae_chunks.decode_tiles(
                    lambda x: fetched(in_time(state, x)).frames, latents, tile, overlap
                )
                # a tile that is not finite leaves such pixels
                finite = np.isfinite(video).all(axis=(1, 2, 3, 4))
                video = np.where(finite[:, None, None, None, None], video, -1)
                return Videos(np.round((video + 1) * 127.5).astype(np.uint8), finite)

            return blended
        pieces = in_time(state, latents)
        for piece in jax.tree.leaves(pieces):
            piece.copy_to_host_async()
        return partial(fetched, pieces)

    return decode


def one_ahead(dispatched: Iterator) -> Iterator:
    """The items of `dispatched`, each only when the next has been asked for: where asking
    dispatches work, the device has some left while the host waits for an item's results, fetches
    and scores them.
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
    """The jitted deterministic step: (arrays of `module`, solver state, step index, text) -> solver
    state.

    shift: (latents, sigma, timestep, text) -> what is taken off the velocity (`reward_head.shift`),
    None: nothing.
    """

    @partial(jax.jit, donate_argnums=(1,))
    def ode_step(arrays, state: SolverState, i, text: TextBatch) -> SolverState:
        t = jnp.asarray(solver.schedule.timesteps, jnp.float32)[i]
        v = velocity(module(*arrays), state.x, t, text, guidance)
        if shift is not None:
            v = v - shift(state.x, jnp.asarray(solver.schedule.sigmas)[i], t, text)
        return solver.step(state, i, v)

    return ode_step


def sample_ode(
    steps: Sequence[Callable],
    arrays: Callable,
    parts: Sequence[Segment],
    solver,
    batches: Sequence[tuple[jax.Array, TextBatch]],
) -> Iterator[jax.Array]:
    """Final latents fp32 [B,F,H,W,C] of each batch (noise of that shape, text), in order.

    steps: one `make_ode_step` an expert; arrays(expert): what it takes first; parts:
    `experts.segments`. Every batch goes through one expert's steps before the next expert's weights
    are asked for, with nothing under way; the last one yields as it goes.
    """
    states = [solver.init(jnp.copy(noise)) for noise, _ in batches]
    for part in parts:
        if part is not parts[0]:
            jax.block_until_ready(states)
        weights = arrays(part.expert)
        for b, (_, text) in enumerate(batches):
            for i in part.steps:
                states[b] = steps[part.expert](weights, states[b], i, text)
            if part is parts[-1]:
                yield states[b].x
                states[b] = None


def load_vae(model: model_dir.ModelDir, mesh):
    """(graphdef, state replicated on the mesh); the VAE runs in fp32."""
    graphdef, state = model_dir.build("vae", model, dtype=jnp.float32)
    return graphdef, replicate(state, mesh)
