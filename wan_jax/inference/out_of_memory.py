"""Memory errors of the device as one message with what would need less."""

import contextlib
from collections.abc import Iterator, Sequence

import jax

from wan_jax.errors import UserError


@contextlib.contextmanager
def explained(stage: str, limit: int | None, remedies: Sequence[str]) -> Iterator[None]:
    """Raise `UserError` where the device has too little memory for what is done inside.

    stage: what is done, for the message. limit: bytes of the device; None: unknown. remedies: what
    would need less memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        size = "" if limit is None else f" ({limit / 1e9:.1f} GB for JAX)"
        first = text.strip().splitlines()[0][:200]
        raise UserError(
            f"{stage}: the device's memory{size} is too small [{first}]. What needs less: "
            + "; ".join([*remedies, "no other program on the device"])
        ) from None
