"""What a run prints: lines and progress bars of the first process."""

import sys

from tqdm import tqdm

from wan_jax.distributed import multihost


def progress_bar(iterable, **options):
    """Return the iterable with a progress bar on the terminal of the first process."""
    shown = sys.stderr.isatty() and multihost.first()
    return tqdm(iterable, leave=False, dynamic_ncols=True, disable=not shown, **options)


def print_once(*lines: object) -> None:
    """Print lines in the first process only."""
    if multihost.first():
        print(*lines, sep="\n", flush=True)
