"""Prints the reference of a recipe's settings, or only of those with a word in their key or meaning.

python -m grpo.settings [WORD]
"""

import argparse
import sys

from grpo.settings.reference import markdown
from wan_jax.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grpo.settings", description=__doc__)
    parser.add_argument(
        "word",
        nargs="?",
        default="",
        help="e.g. kl or train.kl; without it all settings are printed",
    )
    try:
        print(markdown(parser.parse_args().word), end="")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
