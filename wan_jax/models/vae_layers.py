"""The layers of the Wan VAEs (Diffusers `AutoencoderKLWan`), channels-last.

Shapes: B videos, T frames, H and W height and width, C channels, all at the level of the layer.

Diffusers runs chunks of a video with caches. A whole video gives the same if (a) every causal
convolution sees zero frames on the left, (b) the temporal upsampling does not change the first
frame and starts its history after it, (c) the temporal downsampling copies the first frame and
starts its first window there, (d) `average_down` pads a zero frame in front and `duplicate_up`
drops the first copy. Only causal convolutions and the temporal downsampling look back, so their last
two input frames (`History`) are all that a chunk needs of the previous one.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from wan_jax.models.layers import Linear


def _conv(x: Array, kernel: Array, stride: int, padding) -> Array:
    """Convolve every frame of x [B,T,H,W,in] with kernel [kh,kw,in,out]."""
    frames = x.reshape(-1, *x.shape[2:])
    y = jax.lax.conv_general_dilated(
        frames,
        kernel.astype(x.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _init(rngs: nnx.Rngs, shape: tuple[int, ...], dtype) -> nnx.Param:
    """Return a kernel drawn from normal(0, 1/fan_in) in fp32, which preserves the variance of the
    input.
    """
    fan_in = math.prod(shape[:-1])
    return nnx.Param(
        (jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype)
    )


class History:
    """The two frames before a chunk at every layer that looks back, in the order of their calls: all
    that encoding or decoding needs of the previous chunks.

    frames: what the previous chunk left, each [B,2,H,W,C] in the compute dtype; () at the start of
    a video. The chunk replaces them by the frames that the next chunk needs.
    """

    def __init__(self, frames: tuple[Array, ...] = ()):
        self.starts_video = not frames
        self._before = iter(frames)
        self.frames: tuple[Array, ...] = ()

    def exchange(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B 2 H W C"] | None:
        """Store the last two frames of x, T >= 0, and return the two before x, None at the start of
        a video.
        """
        before = next(self._before, None)
        last = x[:, -2:]
        missing = 2 - last.shape[1]
        if missing and before is None:
            last = jnp.pad(last, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
        elif missing and before is not None:
            last = jnp.concatenate([before[:, -missing:], last], axis=1)
        self.frames += (last,)
        return before


class CausalConv3d(nnx.Module):
    """A causal 3-D convolution: kernel [kt,kh,kw,in,out] on x [B,T,H,W,in], with kt-1 frames of
    history or zeros on the left, and zero padding of height and width.

    Computes y_t = sum_s K_(kt-1-s) * x_(t-s) by 2-D convolutions over the frames that exist: a
    single frame costs one 2-D convolution with the last tap, and the zero frames of a video are
    never multiplied. This is faster than XLA's 3-D convolution: [1,9,64,128,32] fp32 on two CPU
    cores 18 ms instead of 131, with gradients 190 instead of 458; [32,9,64,128,32] bf16 on an H200
    1.0 ms instead of 1.3, with gradients 3.0 instead of 3.7.

    One convolution that gives all taps as channels decodes 33 frames of 240x416 faster on an H200
    (112 ms instead of 137) and 5 frames of 480x832 slower (73 ms instead of 70); chunks of 4 latent
    frames of 480x832 take 1.4 times the memory with it (compiled for the CPU).
    """

    def __init__(
        self, n_in: int, n_out: int, kernel: tuple[int, int, int], *, dtype, rngs: nnx.Rngs
    ):
        self.kernel = _init(rngs, (*kernel, n_in, n_out), dtype)
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype))

    def __call__(
        self, x: Float[Array, "B T H W _"], history: History | None = None
    ) -> Float[Array, "B _ _ _ _"]:
        kernel = self.kernel[...]
        t = x.shape[1]
        kt, kh, kw = kernel.shape[:3]
        space = [(kh // 2, kh // 2), (kw // 2, kw // 2)]
        before = history.exchange(x) if history is not None and kt > 1 else None
        frames = x if before is None else jnp.concatenate([before, x], axis=1)
        n = frames.shape[1]
        results = [
            _conv(frames[:, : n - s][:, -t:], kernel[-1 - s], 1, space) for s in range(min(kt, n))
        ]
        y = results[0]
        for past in results[1:]:
            y = y + jnp.pad(past, ((0, 0), (t - past.shape[1], 0), (0, 0), (0, 0), (0, 0)))
        return y + self.bias[...].astype(x.dtype)


class Conv2d(nnx.Module):
    """A 2-D convolution of every frame: kernel [3, 3, in, out] on x [B,T,H,W,in]."""

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1, dtype, rngs: nnx.Rngs):
        self.kernel = _init(rngs, (3, 3, n_in, n_out), dtype)
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype))
        self.stride = stride

    def __call__(self, x: Float[Array, "B T H W _"]) -> Float[Array, "B _ _ _ _"]:
        # stride 2 pads only on the right and at the bottom
        space = [(1, 1)] * 2 if self.stride == 1 else [(0, 1)] * 2
        return _conv(x, self.kernel[...], self.stride, space) + self.bias[...].astype(x.dtype)


def upsampled_conv(
    x: Float[Array, "B T H W n_in"], kernel: Float[Array, "3 3 n_in n_out"]
) -> Float[Array, "B T 2*H 2*W n_out"]:
    """Double the height and width of every frame (nearest) and convolve it with the kernel.

    Four neighbouring pixels of the doubled frame have the same value, so each of the result's four
    phases (even or odd row and column) is a 2x2 convolution of x itself with sums of the kernel's
    taps: 16 products instead of 36, and the doubled frame is never stored. One convolution gives
    the four phases as channels.
    """
    b, t, h, w, n_in = x.shape
    kernel = kernel.astype(jnp.float32)
    # Sum the taps, [3,...] to [phase, tap, ...]: an even row sees rows y-1, y, y; an odd one y, y,
    # y+1.
    for axis in (0, 1):
        kernel = jnp.moveaxis(kernel, axis * 2, 0)
        phases = jnp.stack(
            [
                jnp.stack([kernel[0], kernel[1] + kernel[2]]),
                jnp.stack([kernel[0] + kernel[1], kernel[2]]),
            ]
        )
        # [phase, tap, (phase, tap | 3), I, O]
        kernel = jnp.moveaxis(phases, (0, 1), (axis * 2, axis * 2 + 1))
    n_out = kernel.shape[-1]
    # Convolve with the phases as channels.
    stacked = kernel.transpose(1, 3, 4, 0, 2, 5).reshape(2, 2, n_in, 4 * n_out)
    y = _conv(x, stacked, 1, [(1, 1), (1, 1)]).reshape(b, t, h + 1, w + 1, 2, 2, n_out)
    # Interleave the phases; each row phase is [B,T,H,W,2,n_out].
    rows = [
        jnp.stack([y[:, :, r : r + h, c : c + w, r, c] for c in (0, 1)], axis=4) for r in (0, 1)
    ]
    doubled = jnp.stack(rows, axis=3).reshape(b, t, 2 * h, 2 * w, n_out)
    # XLA for ROCm fuses this with the norm that follows, and that kernel would take 128 KiB of the
    # 64 KiB of local memory.
    return jax.lax.platform_dependent(
        doubled, rocm=jax.lax.optimization_barrier, default=lambda y: y
    )


class ChannelNorm(nnx.Module):
    """x / max(||x||, 1e-12) * sqrt(C) * scale over C, in fp32 (Diffusers `WanRMS_norm`)."""

    def __init__(self, channels: int, *, dtype):
        self.scale = nnx.Param(jnp.ones((channels,), dtype))

    def __call__(self, x: Float[Array, "B T H W _"]) -> Float[Array, "B _ _ _ _"]:
        y = x.astype(jnp.float32)
        # the clamp acts on the square, so the gradient at x = 0 is finite
        norm = jnp.sqrt(jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24))
        return (y / norm * (math.sqrt(x.shape[-1]) * self.scale[...].astype(jnp.float32))).astype(
            x.dtype
        )


class ResidualBlock(nnx.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1x1 convolution of x if the number of
    channels changes.
    """

    def __init__(self, n_in: int, n_out: int, *, dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, rngs=rngs)
        self.norm1 = ChannelNorm(n_in, dtype=dtype)
        self.conv1 = CausalConv3d(n_in, n_out, (3, 3, 3), **kw)
        self.norm2 = ChannelNorm(n_out, dtype=dtype)
        self.conv2 = CausalConv3d(n_out, n_out, (3, 3, 3), **kw)
        self.conv_shortcut = CausalConv3d(n_in, n_out, (1, 1, 1), **kw) if n_in != n_out else None

    def __call__(
        self, x: Float[Array, "B T H W _"], history: History | None = None
    ) -> Float[Array, "B _ _ _ _"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)), history)
        h = self.conv2(jax.nn.silu(self.norm2(h)), history)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Single-head attention of each frame over its H*W positions."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.norm = ChannelNorm(channels, dtype=dtype)
        self.to_qkv = Linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.proj = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W _"]) -> Float[Array, "B _ _ _ _"]:
        b, t, h, w, c = x.shape
        q, k, v = jnp.split(self.to_qkv(self.norm(x)).reshape(b * t, h * w, 3 * c), 3, axis=-1)
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * c**-0.5
        out = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits, axis=-1).astype(x.dtype), v)
        return x + self.proj(out).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.resnets_0 = ResidualBlock(channels, channels, dtype=dtype, rngs=rngs)
        self.attentions_0 = AttentionBlock(channels, dtype=dtype, rngs=rngs)
        self.resnets_1 = ResidualBlock(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T H W _"], history: History | None = None
    ) -> Float[Array, "B _ _ _ _"]:
        return self.resnets_1(self.attentions_0(self.resnets_0(x, history)), history)


class Downsample(nnx.Module):
    """Halves height and width, and with `temporal` also the number of frames after a video's first,
    which must be even.
    """

    def __init__(self, channels: int, temporal: bool, *, dtype, rngs: nnx.Rngs):
        self.resample_1 = Conv2d(channels, channels, stride=2, dtype=dtype, rngs=rngs)
        if temporal:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), dtype=dtype, rngs=rngs)
        self.temporal = temporal

    def __call__(
        self, x: Float[Array, "B T H W _"], history: History | None = None
    ) -> Float[Array, "B _ _ _ _"]:
        x = self.resample_1(x)
        if not self.temporal:
            return x
        before = history.exchange(x) if history is not None else None
        if before is None and x.shape[1] == 1:
            return x
        # windows (0,1,2), (2,3,4), ...: 1 + 2k frames give k; a later chunk's first frame is the last
        # one of the chunk before
        frames = x if before is None else jnp.concatenate([before[:, -1:], x], axis=1)
        y = self.time_conv.bias[...].astype(x.dtype)
        for tap in range(3):
            y = y + frames[:, tap : frames.shape[1] - 2 + tap : 2] @ self.time_conv.kernel[...][
                tap, 0, 0
            ].astype(x.dtype)
        return y if before is not None else jnp.concatenate([x[:, :1], y], axis=1)


class Upsample(nnx.Module):
    """Doubles height and width, and with `temporal` also the number of frames after a video's
    first; n_in channels to n_out.
    """

    def __init__(self, n_in: int, n_out: int, temporal: bool, *, dtype, rngs: nnx.Rngs):
        self.resample_1 = Conv2d(n_in, n_out, dtype=dtype, rngs=rngs)
        if temporal:
            self.time_conv = CausalConv3d(n_in, 2 * n_in, (3, 1, 1), dtype=dtype, rngs=rngs)
        self.temporal = temporal

    def __call__(
        self, x: Float[Array, "B T H W _"], history: History | None = None
    ) -> Float[Array, "B _ _ _ _"]:
        if self.temporal:
            # the first frame of a video is not doubled
            single = 1 if history is None or history.starts_video else 0
            x = jnp.concatenate([x[:, :single], self._double(x[:, single:], history)], axis=1)
        return upsampled_conv(x, self.resample_1.kernel[...]) + self.resample_1.bias[...].astype(
            x.dtype
        )

    def _double(
        self, x: Float[Array, "B T H W C"], history: History | None
    ) -> Float[Array, "B 2*T H W C"]:
        """Double the number of frames; T may be 0."""
        b, t, h, w, c = x.shape
        if t == 0:
            if history is not None:
                history.exchange(x)
            return x
        # the earlier frame's channels come first
        pairs = self.time_conv(x, history).reshape(b, t, h, w, 2, c)
        return pairs.transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, c)


def average_down(
    x: Float[Array, "B T H W C"], n_out: int, ft: int, fs: int
) -> Float[Array, "B _ H//{fs} W//{fs} {n_out}"]:
    """Average cells of ft frames and fs x fs pixels to n_out channels: the C ft fs fs values of a
    cell are averaged in n_out groups. Returns [B,ceil(T/ft),H/fs,W/fs,n_out].

    Zero frames are put in front until ft divides the number of frames. Diffusers `AvgDown3D`.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % ft, 0), (0, 0), (0, 0), (0, 0)))
    b, t, h, w, c = x.shape
    cells = x.reshape(b, t // ft, ft, h // fs, fs, w // fs, fs, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return cells.reshape(*cells.shape[:4], n_out, -1).mean(axis=-1)


def duplicate_up(
    x: Float[Array, "B T H W C"], n_out: int, ft: int, fs: int, starts_video: bool
) -> Float[Array, "B _ H*{fs} W*{fs} {n_out}"]:
    """Spread each value over a cell of ft frames and fs x fs pixels: channels are repeated to n_out
    ft fs fs, then distributed over the cell. Returns [B,ft T,fs H,fs W,n_out].

    At the start of a video the first ft - 1 frames are dropped. Diffusers `DupUp3D`.
    """
    b, t, h, w, c = x.shape
    cells = jnp.repeat(x, n_out * ft * fs * fs // c, axis=-1).reshape(b, t, h, w, n_out, ft, fs, fs)
    out = cells.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * ft, h * fs, w * fs, n_out)
    return out[:, ft - 1 :] if starts_video else out


def patchify(x: Float[Array, "B T H W C"], p: int) -> Float[Array, "B T H//{p} W//{p} C*{p}*{p}"]:
    """Move patches of p x p pixels into the channels, in which C is slowest, then the column, then
    the row of the patch.
    """
    b, t, h, w, c = x.shape
    return (
        x.reshape(b, t, h // p, p, w // p, p, c)
        .transpose(0, 1, 2, 4, 6, 5, 3)
        .reshape(b, t, h // p, w // p, -1)
    )


def unpatchify(x: Float[Array, "B T H W C"], p: int) -> Float[Array, "B T H*{p} W*{p} C//{p}//{p}"]:
    """Invert `patchify`."""
    b, t, h, w, c = x.shape
    cells = x.reshape(b, t, h, w, c // (p * p), p, p).transpose(0, 1, 2, 6, 3, 5, 4)
    return cells.reshape(b, t, h * p, w * p, c // (p * p))
