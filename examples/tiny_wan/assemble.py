"""Writes the parts of tiny-wan's Diffusers folder without weights: index, scheduler, tokenizer.

python -m examples.tiny_wan.assemble --out assets/tiny-wan
"""

import json
import pathlib

from absl import app, flags

from examples.tiny_wan import sizes, tokenizer


def assemble(folder) -> None:
    """Write model_index.json, scheduler/ and tokenizer/ into `folder`."""
    folder = pathlib.Path(folder)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(sizes.SCHEDULER, indent=2) + "\n"
    )
    (folder / "model_index.json").write_text(json.dumps(sizes.MODEL_INDEX, indent=2) + "\n")
    tokenizer.write(folder / "tokenizer")


if __name__ == "__main__":
    flags.DEFINE_string(
        "out", None, "folder with transformer/, vae/ and text_encoder/", required=True
    )
    app.run(lambda _: assemble(flags.FLAGS.out))
