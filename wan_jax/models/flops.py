"""Floating-point operations of a jitted function, counted from its jaxpr: matrix products and
convolutions.

Element-wise operations are not counted; in a transformer they are a few per cent. The padding of a
convolution is counted as computed.
"""

import math
from collections.abc import Callable, Iterator
from typing import cast

from jax.core import ShapedArray
from jax.extend import core


def count(jitted: Callable, *args) -> float:
    """Return the FLOPs of one call with these (abstract) arguments, summed over all devices."""
    return _count_jaxpr(jitted.trace(*args).jaxpr.jaxpr)


def _count_jaxpr(jaxpr: core.Jaxpr) -> float:
    return sum(map(_count_equation, jaxpr.eqns))


def _count_equation(eqn: core.JaxprEqn) -> float:
    """Return the FLOPs of one equation; a multiplication and an addition are two.

    The body of a scan counts once per iteration, a conditional as its largest branch, and the body
    of a `while_loop` once, because its number of iterations is unknown.
    """
    name = eqn.primitive.name
    params = eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(eqn.invars[0])
        return 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = _shape(eqn.invars[1])
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) / features
    if name == "cond":
        return max(map(_count_jaxpr, _inner_jaxprs(params)))
    return sum(map(_count_jaxpr, _inner_jaxprs(params))) * params.get("length", 1)


def _shape(operand: core.Var | core.Literal) -> tuple[int, ...]:
    """Return the shape of an operand or a result of a product."""
    return cast(ShapedArray, operand.aval).shape


def _inner_jaxprs(params: dict) -> Iterator[core.Jaxpr]:
    """Yield the jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr
