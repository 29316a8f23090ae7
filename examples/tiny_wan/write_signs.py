"""Writes signs with captions, as a user's folder of clips has them, for `grpo.encode_clips`.

    python -m examples.tiny_wan.write_signs --count 1024 --out signs
    python -m grpo.encode_clips --model models/tiny-wan --src signs --out data/signs --height 64 --width 128

The signs are clean and spell words of the training prompts. Sign i is signs/<i>.png with its prompt in
signs/<i>.txt; the same seed and count give the same signs.
"""

import pathlib

import jax
import numpy as np
from absl import flags

from examples.tiny_wan import prompts, signs
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_number
from wan_jax.command_line.limits import SEED, Range
from wan_jax.errors import UserError
from wan_jax.storage import media


def write(folder: pathlib.Path, count: int, seed: int) -> None:
    """Write `count` signs of 64x128 into a folder that is new or empty; else `UserError`."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"--out={folder} has files, which would be mixed with the signs: choose a new folder"
        )
    atlas = signs.build_atlas()
    content, look = signs.sample(jax.random.key(seed), atlas, count)
    frames = np.asarray(signs.render(atlas, look)[:, 0])
    folder.mkdir(parents=True, exist_ok=True)
    for i, (frame, prompt) in enumerate(zip(frames, prompts.sentences(content))):
        picture = ((frame + 1) * 127.5).round().astype(np.uint8)
        media.write_image(folder / f"{i:05d}.png", picture)
        (folder / f"{i:05d}.txt").write_text(prompt + "\n")
    print(f"{count} signs with their prompts in {folder}")


def main(_):
    args = flags.FLAGS
    write(pathlib.Path(args.out), args.count, args.seed)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder to write, new or empty", required=True)
    define_number("count", 256, "signs", Range(1, 20_000), int)
    define_number("seed", 0, "of the signs", SEED, int)
    cli.run(main)
