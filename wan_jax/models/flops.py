"""Floating-point operations of a program: the matrix products and convolutions of its jaxpr, as
written.

Element-wise work is not counted; it is a few per cent of a transformer's. Padding of a convolution
counts as computed.
"""

import math
from collections.abc import Callable, Iterator

from jax.extend import core


def of(jitted: Callable, *args) -> float:
    """FLOPs of one call with these (abstract) arguments, over all devices."""
    return of_jaxpr(jitted.trace(*args).jaxpr.jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr) -> float:
    return sum(map(of_equation, jaxpr.eqns))


def of_equation(eqn: core.JaxprEqn) -> float:
    """A product and a sum are two. A scan's body counts as often as it runs, of a conditional the
    largest branch, the body of a `while_loop` once, since its count is not known.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / features
    if name == "cond":
        return max(map(of_jaxpr, inner(params)))
    return sum(map(of_jaxpr, inner(params))) * params.get("length", 1)


def inner(params: dict) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            x = getattr(x, "jaxpr", x)
            if isinstance(x, core.Jaxpr):
                yield x
