"""What is compiled while a test runs."""

import jax

from grpo.compiled.compile import COMPILED


def compiled_names() -> list[str]:
    """Return a list that gets the name of every function that is compiled from now on."""
    names = []

    def listen(event, _, fun_name="", **__):
        if event == COMPILED:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names
