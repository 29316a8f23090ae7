"""Draws what the tiny Wan's signs say: words, colours and sentences.

    python -m examples.tiny_wan.prompts --split heldout --count 200 --seed 0 --out prompts.txt

writes one prompt per line, no text twice. Words and colours are drawn inside `jit`, where the signs
are rendered; `sentences` writes the prompts on the host.

Words are random letters, pronounceable nonsense and common English words, so that a model has to
learn to spell rather than to remember. A word whose crc32 is a multiple of ten is held out:
training never draws it.
"""

import argparse
import dataclasses
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LINES, LETTERS = 2, 6  # most lines of a sign and letters of a line
HELDOUT_PART = 10  # one word in 10 is held out

COLOURS = {
    "white": (0.96, 0.96, 0.94),
    "black": (0.06, 0.06, 0.07),
    "red": (0.80, 0.11, 0.12),
    "green": (0.07, 0.49, 0.20),
    "blue": (0.11, 0.27, 0.78),
    "yellow": (0.98, 0.84, 0.12),
    "purple": (0.46, 0.14, 0.60),
    "pink": (0.99, 0.66, 0.79),
}
COLOUR_NAMES = tuple(COLOURS)
MOTIONS = (
    "sliding left",
    "sliding right",
    "rising",
    "sinking",
    "coming closer",
    "moving away",
    "swaying",
)

TEMPLATES = (
    'A {sign} sign with the word "{word}" in {letter} letters.',
    '"{word}" written in {letter} on a {sign} sign.',
    'The word "{word}" in {letter} letters on a {sign} board.',
    'A {sign} board on a {ground} wall says "{word}" in {letter}.',
    'Bold {letter} letters spell "{word}" on a {sign} sign.',
    'A photo of a {sign} sign that reads "{word}" in {letter}.',
    'On a {sign} sign, {letter} letters: "{word}"',
    '"{word}" is painted in {letter} on a {sign} board, {ground} wall.',
    'Close-up of {letter} text "{word}" on a {sign} sign.',
    'A sign says "{word}". The sign is {sign}, the text {letter}.',
    'A {sign} shop sign, {ground} wall, {letter} text saying "{word}".',
    'Text: "{word}". Colours: {letter} on {sign}.',
    'In {letter} letters, "{word}" on a {sign} plate.',
    'There is a {sign} sign with "{word}" on it in {letter}.',
    'A {ground} wall with a {sign} sign reading "{word}" in {letter}.',
    'Street sign: {sign}, {letter} lettering, "{word}".',
    'Show "{word}" in {letter} on a {sign} panel.',
    'Someone wrote "{word}" in {letter} on this {sign} sign.',
)
MOTION_TEMPLATES = (
    'A {sign} sign {motion}, with "{word}" in {letter} letters.',
    '"{word}" in {letter} on a {sign} sign {motion}.',
    'A {sign} board saying "{word}" in {letter}, {motion}.',
    'Video of a {sign} sign {motion}; {letter} text: "{word}".',
    'A sign {motion} says "{word}" in {letter} on {sign}.',
    'Clip: {letter} word "{word}" on a {sign} board, {motion}.',
)

WORDS = """
able acid after again agree air alarm album alive all along amber angel ant apple april arch area arm army
art atlas aunt autumn away axe baby back bacon badge bag bake ball banana band bank barn basket bath beach
bead bean bear bed bell belt bench berry best big bike bird black blade bloom blue board boat body bold bone
book boot bowl box brave bread break brick bridge bright bring broom brown brush bus butter button buy cab
cabin cake call calm camel camera camp candle cap car card carpet cart castle cat cave cedar chain chair
chalk charm cheese chess child choice circle city class clay clean clear clever clock closed cloth cloud
clover clown coach coast coat cocoa code coin cold color comet cook cool copper coral corn cotton cow crab
crane cream crisp crown cup cycle daily daisy dance dark dawn day deep deer desert desk dial diner dish dive
do doctor dog door dove down dragon draw dream dress drink drum dry duck dust eagle early earth east easy
echo egg elbow empty engine enter entry exit eye fabric face fair fall family far farm fast father fern
field fig film finish fire first fish five flag flame flint floor flour flower fly foam fog food forest fork
four fox frame free fresh friday friend frog front frost fruit full fun future galaxy game garage garden
gate gift ginger give glass globe glove go goal goat gold golf good goose grape grass great green guest
guide guitar habit hair hall hammer hand happy harbor hat hawk head heart help hen here high hill hobby home
honey hop horse hot hotel house ice idea in ink inn iron island ivory jacket jam jar jazz jelly jet jewel
job join joke juice july jump june jungle key kind king kiosk kite knife lake lamp large laser lava lawn
leaf left lemon letter light lily lime lion list little live local lodge logo long look loud love low lucky
lunch magic mail main map maple marble market mask math meadow melon menu metal milk mill mint mirror money
monkey moon more moss moth motor mouse movie museum music name navy near neck nest new news night nine no
noble noise noon north nose note now nut oak oasis ocean off office oil old olive on onion open orange orbit
otter out oven owl pack page paint palace palm panda paper park parrot party path peach pear pearl pencil
pepper piano pie pilot pine pink pizza place planet plant plate play plum pocket poem polar pond pony pool
post potato press prize pump purple push queen quick quiet quilt rabbit radar radio rain raven ready real
red rent rest rice ride right ring river road robin robot rocket roof room root rope rose round royal ruby
run sad safe sail salad sale salt sand saturn save scarf school sea seat second seed seven shade shark sheep
shell ship shirt shoe shop short show silk silver simple sing six sky sleep slow small smile smoke snack
snow so soap sock soda soft soup south space spark spice spoon spring square squid star steam stone stop
store storm story street studio sugar summer sun swan sweet swim table taxi tea ten tent thank theory thumb
ticket tiger time toast today to tomato top tower town toy track train tree truck tulip tunnel turtle two
under up urban valley velvet very video view violet violin voice wagon walk wall warm wash watch water wave
wax way we wheat wheel white wide wild willow win wind window wine winter wolf wonder wood wool word work
world write yard year yellow yes yoga young zebra zero zone zoo
""".split()


@dataclasses.dataclass(frozen=True)
class WordMix:
    """Shares of the kinds of texts; words that are neither real nor pronounceable are random letters.

    Attributes:
      two_lines: share of signs with two words, of 2 to 5 letters each.
      real: share of words that are in `WORDS`.
      pronounceable: share of words in which vowels and consonants alternate.
      shortest: least letters of a word that stands alone.
      longest: most letters of such a word.
    """

    two_lines: float = 0.25
    real: float = 0.3
    pronounceable: float = 0.3
    shortest: int = 3
    longest: int = 6


DEFAULT_MIX = WordMix()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Content:
    """What B prompts say.

    Attributes:
      letters: int32 [B, LINES, LETTERS], index into ALPHABET, -1 for none.
      sign: int32 [B], index into COLOUR_NAMES.
      letter: int32 [B], the same.
      ground: int32 [B], the same; only some templates name it.
      motion: int32 [B], index into MOTIONS; only MOTION_TEMPLATES name it.
      template: int32 [B], index into TEMPLATES + MOTION_TEMPLATES.
    """

    letters: jax.Array
    sign: jax.Array
    letter: jax.Array
    ground: jax.Array
    motion: jax.Array
    template: jax.Array


# ---------------------------------------------------------------- words


def is_heldout(text: str) -> bool:
    """Return whether a word of the text belongs to the held-out split."""
    return any(zlib.crc32(word.encode()) % HELDOUT_PART == 0 for word in text.split())


def _crc_table() -> np.ndarray:
    """Return the table of zlib's crc32, uint32 [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1)
    return table


def heldout(letters: jax.Array) -> jax.Array:
    """Compute `is_heldout` of words inside `jit`: int32 [..., LETTERS] -> bool [...]."""
    table = jnp.asarray(_crc_table())
    crc = jnp.full(letters.shape[:-1], 0xFFFFFFFF, jnp.uint32)
    for i in range(LETTERS):
        code = (letters[..., i] + ord("a")).astype(jnp.uint32)
        crc = jnp.where(letters[..., i] < 0, crc, table[(crc ^ code) & 255] ^ (crc >> 8))
    return (crc ^ jnp.uint32(0xFFFFFFFF)) % HELDOUT_PART == 0


def encode_word(word: str) -> np.ndarray:
    """Return a word's indices into ALPHABET, int32 [LETTERS], padded with -1."""
    return np.array([ALPHABET.index(c) for c in word] + [-1] * (LETTERS - len(word)), np.int32)


def _real_words(split_heldout: bool, shortest: int, longest: int) -> np.ndarray:
    """Return the words of `WORDS` of these lengths in one split, int32 [n, LETTERS]."""
    return np.stack(
        [
            encode_word(word)
            for word in WORDS
            if shortest <= len(word) <= longest and is_heldout(word) == split_heldout
        ]
    )


def draw_letters(key: jax.Array, batch: int, split_heldout: bool, mix: WordMix) -> jax.Array:
    """Draw the words of `batch` signs from one split, int32 [B, LINES, LETTERS].

    Of several invented words the first one in the split is taken; a real word, which always is,
    replaces the few words for which none is.
    """
    tries = 64 if split_heldout else 3  # 0.1 % of the words need a replacement
    shape = (batch, LINES, tries)
    keys = jax.random.split(key, 7)
    # 1 lines and lengths
    two = jax.random.uniform(keys[0], (batch, 1)) < mix.two_lines
    u = jax.random.uniform(keys[1], (batch, LINES, 1))
    span = mix.longest - mix.shortest + 1
    length = jnp.where(
        two[..., None], 2 + (u * 4).astype(int), mix.shortest + (u * span).astype(int)
    )
    # 2 invented words, [B, LINES, tries, LETTERS]
    uniform = jax.random.randint(keys[2], (*shape, LETTERS), 0, 26)
    vowels, consonants = (
        jnp.asarray([ALPHABET.index(c) for c in group])
        for group in ("aeiou", "bcdfghjklmnpqrstvwxyz")
    )
    parity = (jnp.arange(LETTERS) + jax.random.randint(keys[3], (*shape, 1), 0, 2)) % 2
    pronounceable = jnp.where(parity, vowels[uniform % 5], consonants[uniform % 21])
    kind = jax.random.uniform(keys[4], (batch, LINES, 1, 1))
    invented = jnp.where(kind < mix.real + mix.pronounceable, pronounceable, uniform)
    invented = jnp.where(jnp.arange(LETTERS) < length[..., None], invented, -1)
    # 3 the first of them in the split, [B, LINES, LETTERS]
    in_split = heldout(invented) == split_heldout  # [B, LINES, tries]
    first = jnp.argmax(in_split, axis=-1)[..., None, None]
    invented = jnp.take_along_axis(invented, first, axis=2)[:, :, 0]
    # 4 real words
    single = jnp.asarray(_real_words(split_heldout, mix.shortest, mix.longest))
    double = jnp.asarray(_real_words(split_heldout, 2, 5))
    pick = jax.random.uniform(keys[5], (batch, LINES))
    real = jnp.where(
        two[..., None],
        double[(pick * len(double)).astype(int)],
        single[(pick * len(single)).astype(int)],
    )
    use_real = (kind[:, :, 0] < mix.real) | ~in_split.any(-1)[..., None]
    letters = jnp.where(use_real, real, invented)
    return letters.at[:, 1].set(jnp.where(two, letters[:, 1], -1))


def words(letters) -> list[str]:
    """Return the text of each sign on the host, two lines joined by a space.

    letters: int [B, LINES, LETTERS].
    """
    return [
        " ".join(filter(None, ("".join(ALPHABET[i] for i in line if i >= 0) for line in sign)))
        for sign in np.asarray(letters)
    ]


# ---------------------------------------------------------------- colours and sentences


def _colour_triples() -> np.ndarray:
    """Return the triples of sign, letter and ground whose sign contrasts with both, int32 [n, 3]."""
    rgb = np.array(list(COLOURS.values()))
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    far = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) > 0.45
    n = range(len(rgb))
    return np.array(
        [(s, l, g) for s in n for l in n for g in n if abs(luma[s] - luma[l]) > 0.3 and far[s, g]],
        np.int32,
    )


def draw_content(
    key: jax.Array,
    batch: int,
    *,
    split_heldout: bool = False,
    clip: bool = False,
    mix: WordMix = DEFAULT_MIX,
) -> Content:
    """Draw words, colours, motion and sentence form of `batch` signs.

    Args:
      key: source of all draws.
      batch: number of signs.
      split_heldout: whether to draw held-out words or those of training.
      clip: whether half of the prompts describe a motion.
      mix: shares of the kinds of words.
    """
    k_words, k_colours, k_motion, k_template, k_moves = jax.random.split(key, 5)
    triples = jnp.asarray(_colour_triples())
    colours = triples[jax.random.randint(k_colours, (batch,), 0, len(triples))]
    u = jax.random.uniform(k_template, (batch,))
    template = (u * len(TEMPLATES)).astype(jnp.int32)
    if clip:
        moving = len(TEMPLATES) + (u * len(MOTION_TEMPLATES)).astype(jnp.int32)
        template = jnp.where(jax.random.bernoulli(k_moves, 0.5, (batch,)), moving, template)
    motion = jax.random.randint(k_motion, (batch,), 0, len(MOTIONS))
    letters = draw_letters(k_words, batch, split_heldout, mix)
    sign, letter, ground = colours.T
    return Content(letters, sign, letter, ground, motion, template)


def sentences(content: Content) -> list[str]:
    """Write the prompts on the host."""
    templates = TEMPLATES + MOTION_TEMPLATES
    fields = (content.template, content.sign, content.letter, content.ground, content.motion)
    return [
        templates[template].format(
            word=word,
            sign=COLOUR_NAMES[sign],
            letter=COLOUR_NAMES[letter],
            ground=COLOUR_NAMES[ground],
            motion=MOTIONS[motion],
        )
        for word, template, sign, letter, ground, motion in zip(
            words(content.letters), *(np.asarray(field).tolist() for field in fields)
        )
    ]


def ascii_codes(prompts: list[str], width: int) -> np.ndarray:
    """Return the prompts' ASCII codes, uint8 [N, width], zero-padded.

    Raises:
      ValueError: a prompt is longer than `width`.
    """
    if (longest := max(map(len, prompts))) > width:
        raise ValueError(f"a prompt has {longest} characters, more than width={width}")
    rows = b"".join(prompt.encode("ascii").ljust(width, b"\0") for prompt in prompts)
    return np.frombuffer(rows, np.uint8).reshape(len(prompts), width)


def unique_prompts(
    count: int,
    seed: int,
    *,
    split_heldout: bool = False,
    clip: bool = False,
    mix: WordMix = DEFAULT_MIX,
) -> list[str]:
    """Return `count` prompts with different texts.

    Raises:
      ValueError: there are not enough different texts.
    """
    draw = jax.jit(
        lambda key: draw_content(key, 1024, split_heldout=split_heldout, clip=clip, mix=mix)
    )
    found: dict[str, str] = {}  # text: prompt
    for i in range(100 + count // 100):
        content = draw(jax.random.fold_in(jax.random.key(seed), i))
        for text, prompt in zip(words(content.letters), sentences(content)):
            found.setdefault(text, prompt)
        if len(found) >= count:
            return list(found.values())[:count]
    raise ValueError(f"count={count}: only {len(found)} different texts; ask for fewer")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clips", action="store_true", help="also sentences that describe how the sign moves"
    )
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    prompts = unique_prompts(
        args.count, args.seed, split_heldout=args.split == "heldout", clip=args.clips
    )
    pathlib.Path(args.out).write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
