"""Prints the reference of a recipe's settings, or only of those with a word in their key or meaning.

python -m grpo.settings [--plain] [WORD]
"""

import argparse
import os
import sys

from grpo.settings.reference import listing, markdown
from wan_jax.errors import UserError


def main() -> None:
    purpose = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m grpo.settings", description=purpose)
    parser.add_argument(
        "word",
        nargs="?",
        default="",
        help="e.g. kl or train.kl; without it all settings are printed",
    )
    parser.add_argument("--plain", action="store_true", help="for the terminal, not Markdown")
    given = parser.parse_args()
    try:
        print(listing(given.word) if given.plain else markdown(given.word), end="", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # of `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
