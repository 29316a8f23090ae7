"""Memory errors as one message."""

import jax.numpy as jnp
import pytest

from wan_jax.errors import UserError
from wan_jax.inference.out_of_memory import explained


def test_a_device_that_is_full_is_one_message_with_remedies():
    with pytest.raises(UserError) as raised, explained("decoding", int(24e9), ["--tile=256"]):
        jnp.zeros((2**48,), jnp.float32).block_until_ready()  # a pebibyte
    message = str(raised.value)
    assert "decoding" in message and "24.0 GB" in message and "--tile=256" in message
    assert "\n" not in message


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), explained("decoding", None, []):
        _ = 1 / 0
