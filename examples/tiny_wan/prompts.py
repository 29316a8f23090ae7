"""What the tiny Wan's signs say: words, colours and sentences, drawn on the device from a key.

    python -m examples.tiny_wan.prompts --split heldout --count 200 --seed 0 --out prompts.txt

writes one prompt a line with no word twice. Everything here runs inside `jit`, prompts included: a
prompt is a row of ASCII codes put together from table lookups, so a training step needs no work on
the host.

Words are random letters, pronounceable nonsense and common English words, so that a model has to
learn to spell rather than to remember. A word whose crc32 is a multiple of ten is held out:
training never draws it.
"""

import argparse
import dataclasses
import re
import string
import zlib

import jax
import jax.numpy as jnp
import numpy as np

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LINES, LETTERS = 2, 6  # a sign has up to two lines of up to six letters
PROMPT_BYTES = 96
HELD_OUT_OF = 10  # one word in ten is held out

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
    """Shares of what is written. What is neither real nor pronounceable is uniform letters."""

    two_lines: float = 0.25
    real: float = 0.3
    pronounceable: float = 0.3
    shortest: int = 3  # letters of a single word; on two lines each word has 2-5
    longest: int = 6


DEFAULT_MIX = WordMix()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Content:
    """What the prompts say."""

    letters: jax.Array  # int32 [B, LINES, LETTERS], index into ALPHABET, -1 = none
    sign: jax.Array  # int32 [B], index into COLOUR_NAMES
    letter: jax.Array  # int32 [B]
    ground: jax.Array  # int32 [B]; only some templates name it
    # int32 [B], index into MOTIONS; only clips move and only some templates name it
    motion: jax.Array
    template: jax.Array  # int32 [B], index into TEMPLATES + MOTION_TEMPLATES


# ---------------------------------------------------------------- words


def is_heldout(text: str) -> bool:
    """True if a word of the text belongs to the held-out split."""
    return any(zlib.crc32(word.encode()) % HELD_OUT_OF == 0 for word in text.split())


def _crc_table() -> np.ndarray:
    """uint32 [256], the table of zlib's crc32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1)
    return table


def heldout(letters: jax.Array) -> jax.Array:
    """`is_heldout` on the device: int32 [..., LETTERS] -> bool [...]."""
    table, crc = jnp.asarray(_crc_table()), jnp.full(letters.shape[:-1], 0xFFFFFFFF, jnp.uint32)
    for i in range(LETTERS):
        code = (letters[..., i] + ord("a")).astype(jnp.uint32)
        crc = jnp.where(letters[..., i] < 0, crc, table[(crc ^ code) & 255] ^ (crc >> 8))
    return (crc ^ jnp.uint32(0xFFFFFFFF)) % HELD_OUT_OF == 0


def encode_word(word: str) -> np.ndarray:
    """int32 [LETTERS], padded with -1."""
    return np.array([ALPHABET.index(c) for c in word] + [-1] * (LETTERS - len(word)), np.int32)


def _real_words(split_heldout: bool, shortest: int, longest: int) -> np.ndarray:
    """int32 [n, LETTERS]: the listed words of that length on one side of the split."""
    return np.stack(
        [
            encode_word(word)
            for word in WORDS
            if shortest <= len(word) <= longest and is_heldout(word) == split_heldout
        ]
    )


def draw_letters(key: jax.Array, batch: int, split_heldout: bool, mix: WordMix) -> jax.Array:
    """Words of one side of the split -> int32 [B, LINES, LETTERS].

    Random words are drawn several times and the first on the right side is kept; a real word,
    always on the right side, stands in for the rare row without any.
    """
    tries = 64 if split_heldout else 3  # so that the stand-in serves 0.1 % of the words
    shape = (batch, LINES, tries)
    keys = jax.random.split(key, 7)
    two = jax.random.uniform(keys[0], (batch, 1)) < mix.two_lines
    u = jax.random.uniform(keys[1], (batch, LINES, 1))
    span = mix.longest - mix.shortest + 1
    length = jnp.where(
        two[..., None], 2 + (u * 4).astype(int), mix.shortest + (u * span).astype(int)
    )

    uniform = jax.random.randint(keys[2], (*shape, LETTERS), 0, 26)
    vowels, consonants = (
        jnp.asarray([ALPHABET.index(c) for c in group])
        for group in ("aeiou", "bcdfghjklmnpqrstvwxyz")
    )
    odd = (jnp.arange(LETTERS) + jax.random.randint(keys[3], (*shape, 1), 0, 2)) % 2
    spoken = jnp.where(odd, vowels[uniform % 5], consonants[uniform % 21])
    kind = jax.random.uniform(keys[4], (batch, LINES, 1, 1))
    nonsense = jnp.where(kind < mix.real + mix.pronounceable, spoken, uniform)
    # [B, LINES, tries, LETTERS]
    nonsense = jnp.where(jnp.arange(LETTERS) < length[..., None], nonsense, -1)

    right = heldout(nonsense) == split_heldout  # [B, LINES, tries]
    first = jnp.argmax(right, axis=-1)[..., None, None]
    nonsense = jnp.take_along_axis(nonsense, first, axis=2)[:, :, 0]  # [B, LINES, LETTERS]
    single = jnp.asarray(_real_words(split_heldout, mix.shortest, mix.longest))
    double = jnp.asarray(_real_words(split_heldout, 2, 5))
    pick = jax.random.uniform(keys[5], (batch, LINES))
    real = jnp.where(
        two[..., None],
        double[(pick * len(double)).astype(int)],
        single[(pick * len(single)).astype(int)],
    )
    letters = jnp.where(((kind[:, :, 0] < mix.real) | ~right.any(-1)[..., None]), real, nonsense)
    return letters.at[:, 1].set(jnp.where(two, letters[:, 1], -1))


def words(letters) -> list[str]:
    """int [B, LINES, LETTERS] -> the text of each sign, two lines joined by a space (host)."""
    return [
        " ".join(filter(None, ("".join(ALPHABET[i] for i in line if i >= 0) for line in sign)))
        for sign in np.asarray(letters)
    ]


# ---------------------------------------------------------------- colours and sentences


def _colour_triples() -> np.ndarray:
    """int32 [n, 3]: (sign, letter, ground) where letters and sign, sign and wall contrast."""
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
    """Words, colours, motion and sentence form of `batch` signs; half of the clips have their
    motion told.
    """
    k_words, k_colours, k_motion, k_template, k_told = jax.random.split(key, 5)
    triples = jnp.asarray(_colour_triples())
    colours = triples[jax.random.randint(k_colours, (batch,), 0, len(triples))]
    u = jax.random.uniform(k_template, (batch,))
    template = (u * len(TEMPLATES)).astype(jnp.int32)
    if clip:
        told = jax.random.bernoulli(k_told, 0.5, (batch,))
        template = jnp.where(
            told, len(TEMPLATES) + (u * len(MOTION_TEMPLATES)).astype(jnp.int32), template
        )
    motion = jax.random.randint(k_motion, (batch,), 0, len(MOTIONS))
    return Content(draw_letters(k_words, batch, split_heldout, mix), *colours.T, motion, template)


def _segments() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments of sentences, uint8 [V, PROMPT_BYTES] with lengths int32 [V], and templates, int32
    [M, P, 2].

    One is P rows (segment, slot): a segment's number, to which the slot's value is added. Slots: 0
    none, 1 sign, 2 letter, 3 ground, 4 motion, 5 word (the empty segment 0; its bytes come with the
    sample).
    """
    texts = ["", *COLOUR_NAMES, *MOTIONS]
    first = {
        "sign": (1, 1),
        "letter": (1, 2),
        "ground": (1, 3),
        "motion": (1 + len(COLOUR_NAMES), 4),
        "word": (0, 5),
    }
    templates = []
    for template in TEMPLATES + MOTION_TEMPLATES:
        parts = []
        for literal, field, _, _ in string.Formatter().parse(template):
            texts.append(literal)
            parts.append((len(texts) - 1, 0))
            if field:
                parts.append(first[field])
        templates.append(parts)
    longest = max(map(len, templates))
    table = np.zeros((len(templates), longest, 2), np.int32)  # (0, 0) is an empty segment
    for row, parts in zip(table, templates):
        row[: len(parts)] = parts
    codes = np.stack(
        [np.frombuffer(text.encode().ljust(PROMPT_BYTES, b"\0"), np.uint8) for text in texts]
    )
    return codes, np.array([len(text) for text in texts], np.int32), table


def _word_codes(letters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 [B, LINES, LETTERS] -> ASCII codes [B, PROMPT_BYTES] of "one two", and the length [B]."""
    n = (letters >= 0).sum(-1)  # [B, LINES]
    p = jnp.arange(PROMPT_BYTES)[None]
    one = jnp.take_along_axis(letters[:, 0], jnp.clip(p, 0, LETTERS - 1), axis=1)
    two = jnp.take_along_axis(letters[:, 1], jnp.clip(p - n[:, :1] - 1, 0, LETTERS - 1), axis=1)
    codes = jnp.where(
        p < n[:, :1], one + ord("a"), jnp.where(p == n[:, :1], ord(" "), two + ord("a"))
    )
    length = n[:, 0] + jnp.where(n[:, 1] > 0, 1 + n[:, 1], 0)
    return jnp.where(p < length[:, None], codes, 0), length


def token_chars(content: Content) -> jax.Array:
    """The prompts' ASCII codes, zero-padded: uint8 [B, PROMPT_BYTES]."""
    codes, lengths, table = map(jnp.asarray, _segments())
    parts = table[content.template]  # [B, P, 2]
    zero = jnp.zeros_like(content.sign)
    values = jnp.stack(
        [zero, content.sign, content.letter, content.ground, content.motion, zero], axis=1
    )
    segment = parts[..., 0] + jnp.take_along_axis(values, parts[..., 1], axis=1)  # [B, P]
    is_word = parts[..., 1] == 5
    word, word_length = _word_codes(content.letters)
    length = jnp.where(is_word, word_length[:, None], lengths[segment])
    end = jnp.cumsum(length, axis=1)  # [B, P]
    p = jnp.arange(PROMPT_BYTES)
    part = (p[None, :, None] >= end[:, None]).sum(-1)  # [B, PROMPT_BYTES]: whose byte
    part = jnp.minimum(part, parts.shape[1] - 1)
    offset = p - jnp.take_along_axis(end - length, part, axis=1)
    offset = jnp.clip(offset, 0, PROMPT_BYTES - 1)
    fixed = codes[jnp.take_along_axis(segment, part, axis=1), offset]
    spelt = jnp.take_along_axis(word, offset, axis=1)
    text = jnp.where(jnp.take_along_axis(is_word, part, axis=1), spelt, fixed)
    return jnp.where(p < end[:, -1:], text, 0).astype(jnp.uint8)


def decode(chars) -> list[str]:
    """uint8 [B, PROMPT_BYTES] -> prompts (host)."""
    return [bytes(row).rstrip(b"\0").decode() for row in np.asarray(chars, np.uint8)]


def quoted(prompt: str) -> str:
    """The text that the sign should show: what stands between the straight double quotes."""
    return re.search(r'"([^"]*)"', prompt).group(1)


def unique_prompts(
    count: int,
    seed: int,
    *,
    split_heldout: bool = False,
    clip: bool = False,
    mix: WordMix = DEFAULT_MIX,
) -> list[str]:
    """`count` prompts with no text twice."""
    draw = jax.jit(
        lambda key: token_chars(
            draw_content(key, 1024, split_heldout=split_heldout, clip=clip, mix=mix)
        )
    )
    found: dict[str, str] = {}
    for i in range(100 + count // 100):
        for prompt in decode(draw(jax.random.fold_in(jax.random.key(seed), i))):
            found.setdefault(quoted(prompt), prompt)
        if len(found) >= count:
            return list(found.values())[:count]
    raise ValueError(f"only {len(found)} different texts found, {count} asked for; ask for fewer")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clips", action="store_true", help="also sentences that tell how the sign moves"
    )
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    prompts = unique_prompts(
        args.count, args.seed, split_heldout=args.split == "heldout", clip=args.clips
    )
    with open(args.out, "w") as file:
        file.writelines(f"{prompt}\n" for prompt in prompts)


if __name__ == "__main__":
    main()
