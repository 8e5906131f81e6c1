"""Construction of exponax's steppers."""

from typing import Any, TypeVar

import equinox as eqx
import jax

Stepper = TypeVar("Stepper")


# Compiled: built eagerly, the contour integrals of ETDRK4 are dozens of programs, which
# cost two seconds at every new shape.
@eqx.filter_jit
def build(kind: type[Stepper], *args: Any, **kwargs: Any) -> Stepper:
    """`kind(*args, **kwargs)`; arrays are traced, everything else is fixed."""
    # exponax adds operands of different rank while it builds, never while it steps.
    with jax.numpy_rank_promotion("allow"):
        return kind(*args, **kwargs)
