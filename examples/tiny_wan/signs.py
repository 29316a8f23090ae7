"""Draws the tiny Wan's training data on the device: pictures and clips of signs.

    atlas = build_atlas()
    content, params = sample(key, atlas, batch=1024, noise=NoiseMix())  # inside jit
    video = render(atlas, params)                # float32 [1024, 1, 64, 128, 3] in [-1, 1]
    prompts.sentences(content)                   # on the host

Every pixel is mapped back onto its sign and looked up in a table of letter shapes: plain arithmetic
and one gather, so that a training loop can draw fresh data inside `lax.scan`.

The data is noisy, as real data is: `NoiseMix` has the shares of signs that are misspelt, faint,
blurred, tiny, covered or cut off, although the prompt does not say so. A model trained on it draws
good and bad signs for one prompt, between which reinforcement learning can choose. Noise changes
nothing else: a key gives the same prompt, place, colours and motion with any mix.

Signs of another frame size have the prompts, colours and motions of the same key, which say nothing
of the size. The sign of the base size, 64x128, is enlarged by a factor between 1 and that of the
frame: letters have at least the pixels that they have in the base size, so OCR reads both.
"""

import dataclasses

import jax
import jax.numpy as jnp

from examples.tiny_wan import prompts
from examples.tiny_wan.atlas import ABOVE, BELOW, EM, SPREAD, Atlas
from examples.tiny_wan.atlas import build_atlas as build_atlas
from examples.tiny_wan.prompts import LETTERS

BASE_SIZE = 64, 128  # height, width
MODES = ("clean", "misspelt", "faint", "blurred", "tiny", "covered", "cut_off")

MIDDLE = 0.27  # em from the baseline up to the middle between ascenders and descenders
PITCH = 1.06  # em between baselines


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseMix:
    """Shares of the ways in which signs are spoilt; the rest is clean.

    The comments give the mean reward of 240 such pictures by PP-OCR; clean ones get 0.995, the mix
    0.6.
    """

    misspelt: float = 0.15  # 0.69  one or two letters of a word are wrong
    faint: float = 0.10  # 0.17  letters nearly of the sign's colour
    blurred: float = 0.10  # 0.06
    tiny: float = 0.08  # 0.17  letters of 5 pixels
    covered: float = 0.06  # 0.01  a bar across the text
    cut_off: float = 0.06  # 0.21  text more than half outside the sign


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignParams:
    """Everything `render` needs of B signs.

    Coordinates are in pixels from the middle of the frame, y downwards; colours are 0 to 1.
    """

    letters: jax.Array  # int32 [B, LINES, LETTERS], as drawn: index into ALPHABET, -1 for none
    target: jax.Array  # int32 [B, LINES, LETTERS], as the prompt asks
    mode: jax.Array  # int32 [B], index into MODES
    font: jax.Array  # int32 [B]
    em: jax.Array  # float32 [B, 2], font size in pixels across and down
    tracking: jax.Array  # float32 [B], extra space between letters, em
    slant: jax.Array  # float32 [B], shear of the letters
    thin: jax.Array  # float32 [B], pixels taken off every outline
    blur: jax.Array  # float32 [B], standard deviation in pixels, letters only
    shift: jax.Array  # float32 [B, 2], of the text from the middle of the sign
    bar: jax.Array  # float32 [B, 2], half thickness (0 = none) and angle of a bar across the text
    half: jax.Array  # float32 [B, 2], half width and half height of the sign
    radius: jax.Array  # float32 [B], of the corners
    border: jax.Array  # float32 [B], width
    center: jax.Array  # float32 [B, 2], of the sign in frame 0
    angle: jax.Array  # float32 [B], radians
    colors: jax.Array  # float32 [B, 4, 3]: background, sign, letters, border
    shade: jax.Array  # float32 [B], brightness of the background from bottom to top
    drift: jax.Array  # float32 [B, 2], movement of the sign during a clip
    zoom: jax.Array  # float32 [B], log of the growth during a clip
    sway: jax.Array  # float32 [B], radians


def line_widths(
    atlas: Atlas, letters: jax.Array, font: jax.Array, tracking: jax.Array
) -> jax.Array:
    """Return the width of each letter in em, float32 [B, LINES, LETTERS], 0 for none."""
    advance = jnp.asarray(atlas.advances)[font[:, None, None], letters] + tracking[:, None, None]
    return jnp.where(letters >= 0, advance, 0.0)


# ---------------------------------------------------------------- rendering


def wide(x: jax.Array) -> jax.Array:
    """Give one value per sign the axes of a video's pixels: [B] -> [B, 1, 1, 1]."""
    return x[:, None, None, None]


def _letter_coverage(
    atlas: Atlas, params: SignParams, u: jax.Array, v: jax.Array, zoom: jax.Array
) -> jax.Array:
    """Return the share of each pixel covered by letters, float32 [B, T, H, W].

    u, v: coordinates of the pixel on the sign, [B, T, H, W]; zoom: [B, T, 1, 1].
    """

    # em from the middle of the text
    x = (u - wide(params.shift[:, 0]) + wide(params.slant) * v) / wide(params.em[:, 0])
    y = (v - wide(params.shift[:, 1])) / wide(params.em[:, 1])
    two = wide(params.letters[:, 1, 0] >= 0)
    second = two & (y > 0)
    # em below the baseline
    y = y - jnp.where(two, jnp.where(second, PITCH / 2, -PITCH / 2), 0.0) - MIDDLE

    # [B, LINES, LETTERS]
    ends = jnp.cumsum(line_widths(atlas, params.letters, params.font, params.tracking), axis=-1)
    # em from the line's start
    x = x + jnp.where(second, wide(ends[:, 1, -1]), wide(ends[:, 0, -1])) / 2
    start = jnp.zeros_like(x)
    letter = jnp.where(second, wide(params.letters[:, 1, 0]), wide(params.letters[:, 0, 0]))
    for i in range(1, LETTERS):
        end = jnp.where(second, wide(ends[:, 1, i - 1]), wide(ends[:, 0, i - 1]))
        start = jnp.where(x >= end, end, start)
        following = jnp.where(second, wide(params.letters[:, 1, i]), wide(params.letters[:, 0, i]))
        letter = jnp.where(x >= end, following, letter)
    x = x - start  # em from the letter's cell

    _, alphabet, rows, columns = atlas.texels.shape
    tx = jnp.clip((x - wide(params.tracking) / 2) * EM - 0.5, 0, columns - 1.01)
    ty = jnp.clip((y + ABOVE) * EM - 0.5, 0, rows - 1.01)
    column, row = tx.astype(jnp.int32), ty.astype(jnp.int32)
    cell = wide(params.font) * alphabet + jnp.maximum(letter, 0)
    packed = jnp.asarray(atlas.texels).reshape(-1)[(cell * rows + row) * columns + column]
    texel, right, below, diagonal = (
        ((packed >> bits) & 255).astype(jnp.float32) for bits in (0, 8, 16, 24)
    )
    tx, ty = tx - column, ty - row
    byte = (texel * (1 - tx) + right * tx) * (1 - ty) + (below * (1 - tx) + diagonal * tx) * ty
    pixels = (
        (byte / 127.5 - 1)
        * (SPREAD / EM)
        * wide(jnp.sqrt(params.em[:, 0] * params.em[:, 1]))
        * zoom
    )
    inside = (letter >= 0) & (x >= 0) & (y > -ABOVE) & (y < BELOW)
    return jnp.where(inside, jnp.clip(0.5 + pixels - wide(params.thin), 0, 1), 0)


def _gaussian(size: int, sigma: jax.Array) -> jax.Array:
    """Return the blur along one axis as a matrix, the identity for sigma 0: [B] -> [B, size, size]."""
    i = jnp.arange(size)
    weight = jnp.exp(-0.5 * ((i[:, None] - i) / jnp.maximum(sigma, 0.05)[:, None, None]) ** 2)
    return weight / weight.sum(-1, keepdims=True)


def render(
    atlas: Atlas,
    params: SignParams,
    frames: int = 1,
    dtype=jnp.float32,
    size: tuple[int, int] = BASE_SIZE,
) -> jax.Array:
    """Render signs as video [B, T, H, W, 3] in [-1, 1]. Frame 0 is the picture. size: (H, W), as in
    `sample`.
    """

    def mix(under, color, share):  # [B, T, H, W, 3], [B, 3], [B, T, H, W]
        return under + (color[:, None, None, None] - under) * share[..., None]

    height, width = size
    time = (jnp.arange(frames) / max(frames - 1, 1))[None, :, None, None]
    y = (jnp.arange(height) - (height - 1) / 2)[:, None]
    x = jnp.arange(width) - (width - 1) / 2

    zoom = jnp.exp(wide(params.zoom) * time)  # [B, T, 1, 1]
    angle = wide(params.angle) + wide(params.sway) * jnp.sin(2 * jnp.pi * time)
    dx = x - wide(params.center[:, 0]) - wide(params.drift[:, 0]) * time  # [B, T, 1, W]
    dy = y - wide(params.center[:, 1]) - wide(params.drift[:, 1]) * time  # [B, T, H, 1]
    u = (dx * jnp.cos(angle) + dy * jnp.sin(angle)) / zoom  # [B, T, H, W], on the sign
    v = (dy * jnp.cos(angle) - dx * jnp.sin(angle)) / zoom

    # signed distance to the rounded rectangle, in pixels of the frame
    qx = jnp.abs(u) - wide(params.half[:, 0] - params.radius)
    qy = jnp.abs(v) - wide(params.half[:, 1] - params.radius)
    outside = jnp.hypot(jnp.maximum(qx, 0), jnp.maximum(qy, 0)) + jnp.minimum(
        jnp.maximum(qx, qy), 0
    )
    outside = (outside - wide(params.radius)) * zoom
    plate = jnp.clip(0.5 - outside, 0, 1)
    face = jnp.clip(0.5 - outside - wide(params.border) * zoom, 0, 1)

    ink = _letter_coverage(atlas, params, u, v, zoom)
    ink = jnp.einsum(
        "bij,btjk,blk->btil", _gaussian(height, params.blur), ink, _gaussian(width, params.blur)
    )
    across = v * jnp.cos(wide(params.bar[:, 1])) - u * jnp.sin(wide(params.bar[:, 1]))
    bar = jnp.clip(0.5 + (wide(params.bar[:, 0]) - jnp.abs(across)) * zoom, 0, 1) * (
        wide(params.bar[:, 0]) > 0
    )

    ground, sign, letter, border = (params.colors[:, i] for i in range(4))
    # [B, 1, H, 1, 3]
    picture = ground[:, None, None, None] * (1 - wide(params.shade) * y / height)[..., None]
    picture = mix(picture, border, plate)
    picture = mix(picture, sign, face)
    picture = mix(picture, letter, ink * face)
    picture = mix(picture, ground, bar)
    return (jnp.clip(picture, 0, 1) * 2 - 1).astype(dtype)


# ---------------------------------------------------------------- sampling


def misspell(key: jax.Array, letters: jax.Array) -> jax.Array:
    """Misspell each word: replace one or two letters, drop one, or swap two neighbours.

    int32 [B, LINES, LETTERS] -> the same shape, never the same word.
    """
    u = jax.random.uniform(key, (6, *letters.shape[:-1], 1))
    n, k = (letters >= 0).sum(-1, keepdims=True), jnp.arange(LETTERS)
    other = (letters + 1 + (u[0] * 25).astype(jnp.int32)) % 26
    at, pair = (u[1] * n).astype(jnp.int32), (u[2] * (n - 1)).astype(jnp.int32)
    replaced = jnp.where((k == at) & (letters >= 0), other, letters)
    # another letter than `at`
    also = (at + 1 + (u[3] * (n - 1)).astype(jnp.int32)) % jnp.maximum(n, 1)
    replaced = jnp.where((k == also) & (n > 4) & (u[4] < 0.6), other, replaced)
    padded = jnp.pad(letters, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    dropped = jnp.take_along_axis(padded, k + (k >= at), axis=-1)
    source = jnp.where(k == pair, pair + 1, jnp.where(k == pair + 1, pair, k))
    swapped = jnp.take_along_axis(padded, source, axis=-1)
    can_swap = (n > 4) & (swapped != letters).any(-1, keepdims=True)
    return jnp.where(
        u[5] < 0.5,
        replaced,
        jnp.where((u[5] < 0.75) & (n > 2), dropped, jnp.where(can_swap, swapped, replaced)),
    )


def sample(
    key: jax.Array,
    atlas: Atlas,
    batch: int,
    *,
    frames: int = 1,
    heldout: bool = False,
    noise: NoiseMix | None = None,
    words: prompts.WordMix = prompts.DEFAULT_MIX,
    size: tuple[int, int] = BASE_SIZE,
) -> tuple[prompts.Content, SignParams]:
    """Draw `batch` signs: what their prompts say, and how they look.

    frames: more than 1 for clips, of which half the prompts describe the motion; heldout: whether
    to draw words that training never draws; noise: shares of spoilt signs, None for clean ones;
    size: (H, W) of the frame in pixels.
    """
    middle = jnp.array([size[1] / 2 - 1, size[0] / 2 - 1])  # of the frame, but for a pixel
    largest = min(side / base for side, base in zip(size, BASE_SIZE))
    k_content, k_misspell, k_mode, k_look, k_jitter = jax.random.split(key, 5)
    content = prompts.draw_content(
        k_content, batch, split_heldout=heldout, clip=frames > 1, mix=words
    )
    uniforms = iter(jax.random.uniform(k_look, (32, batch)))

    def between(low, high):
        return low + (high - low) * next(uniforms)

    noise = noise or NoiseMix(**{field.name: 0.0 for field in dataclasses.fields(NoiseMix)})
    shares = jnp.array([getattr(noise, name) for name in MODES[1:]])
    mode = (
        jnp.searchsorted(jnp.cumsum(shares), jax.random.uniform(k_mode, (batch,)), side="right") + 1
    )
    mode = jnp.where(mode == len(MODES), 0, mode)

    def spoil(name, bad, good):
        hit = mode == MODES.index(name)
        return jnp.where(hit.reshape(-1, *[1] * (jnp.ndim(bad) - 1)), bad, good)

    # `scale` enlarges the sign of the base size
    scale = jnp.ones(batch)
    if size != BASE_SIZE:
        k_scale = jax.random.fold_in(k_look, 1)
        scale = jax.random.uniform(k_scale, (batch,), minval=min(1.0, largest), maxval=largest)

    # text: as large as the frame allows, condensed by up to a quarter
    wrong = misspell(k_misspell, content.letters)
    letters = spoil("misspelt", wrong, content.letters)
    font = between(0, len(atlas.advances)).astype(jnp.int32)
    tracking = between(0.0, 0.06)
    width = jnp.maximum(
        *(
            line_widths(atlas, spelt, font, tracking).sum(-1).max(-1)
            for spelt in (content.letters, wrong)
        )
    )
    two = content.letters[:, 1, 0] >= 0
    em_y = scale * jnp.where(two, between(20, 24), between(27, 35))
    em_x = jnp.minimum(em_y, scale * 106 / width)
    em_y = jnp.minimum(em_y, em_x / 0.75)
    # [B, 2] half extents
    text = jnp.stack([em_x * width, em_y * jnp.where(two, 1 + PITCH, 1.0)], axis=1) / 2
    em = jnp.stack([em_x, em_y], axis=1)

    # sign: the text with a margin; `room` is how far it can go with the tilted text still in the
    # frame
    half = text + scale[:, None] * jnp.stack([between(5, 12), between(2, 7)], axis=1)
    angle = between(-0.06, 0.06)
    reach = text + jnp.abs(angle)[:, None] * text[:, ::-1]
    room = jnp.maximum(middle - reach, 0)
    farthest = jnp.minimum(0.5 * room, 8 * largest)
    center = jnp.stack([between(-1, 1), between(-1, 1)], axis=1) * farthest
    border = scale * jnp.where(between(0, 1) < 0.35, between(1.2, 2.2), 0.0)

    rgb = jnp.array(list(prompts.COLOURS.values()))
    colors = rgb[jnp.stack([content.ground, content.sign, content.letter, content.letter], axis=1)]
    colors = jnp.clip(
        colors + jax.random.uniform(k_jitter, (batch, 4, 3), minval=-0.03, maxval=0.03), 0, 1
    )
    colors = colors.at[:, 3].set(jnp.where(border[:, None] > 0, colors[:, 2], colors[:, 1]))
    faint = colors[:, 1] + (colors[:, 2] - colors[:, 1]) * between(0.02, 0.06)[:, None]
    colors = colors.at[:, 2].set(spoil("faint", faint, colors[:, 2]))

    # motion, by content.motion as in prompts.MOTIONS
    kind, zero = content.motion, jnp.zeros(batch)
    goal = room * between(0.7, 1.0)[:, None]
    way = jnp.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0), (0, 0)])[kind]  # [B, 2]
    drift = jnp.where(way == 0, 0.0, way * goal - center)
    drift = jnp.where((kind == 4)[:, None], -center, drift)
    closest = (middle / reach).min(axis=1)
    zoom = jnp.where(
        kind == 4,
        jnp.log(jnp.minimum(closest, between(1.2, 1.4))),
        jnp.where(kind == 5, jnp.log(between(0.75, 0.85)), zero),
    )
    sway = jnp.where(kind == 6, between(0.08, 0.13), 0.0)

    # the other ways to be illegible
    small = between(4.2, 5.5) / em_y
    side = jnp.where(between(0, 1) < 0.5, -1.0, 1.0)
    away = jnp.stack([side * text[:, 0] * between(1.4, 1.8), zero], axis=1)
    cover = jnp.where(two, 0.6, 0.2) * em_y * between(1.0, 1.25)
    return content, SignParams(
        letters=letters,
        target=content.letters,
        mode=mode,
        font=font,
        tracking=tracking,
        em=spoil("tiny", em * small[:, None], em),
        slant=between(-0.08, 0.08),
        thin=spoil("tiny", between(0.1, 0.3), zero),
        blur=spoil("blurred", scale * between(4.5, 6.5), zero),
        shift=spoil("cut_off", away, jnp.zeros((batch, 2))),
        bar=jnp.stack([spoil("covered", cover, zero), between(-0.06, 0.06)], axis=1),
        half=half,
        radius=scale * between(0, 9),
        border=border,
        center=center,
        angle=angle,
        colors=colors,
        shade=between(-0.3, 0.3),
        drift=drift,
        zoom=zoom,
        sway=sway,
    )
