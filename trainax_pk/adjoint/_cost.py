"""Memory and time of a compiled gradient."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


class Cost(eqx.Module):
    """What a gradient costs.

    Attributes:
        temporary_bytes: What XLA allocates for the value and its gradient beside
            arguments and results, `memory_analysis().temp_size_in_bytes`.
        compile_seconds: Time to trace, lower and compile.
        seconds: Median time of a call, or None if not timed.
        relative_time: Median over rounds of the time relative to the reference's in
            the same round, or None if not timed.
    """

    temporary_bytes: int
    compile_seconds: float
    seconds: float | None
    relative_time: float | None


class Program(eqx.Module):
    """A compiled gradient with its operands."""

    run: Callable[[Any], Any]
    operands: PyTree[Any]
    temporary_bytes: int
    compile_seconds: float

    def gradient(self) -> PyTree[Any]:
        """The gradient's leaves."""
        return jax.block_until_ready(self.run(self.operands))

    def cost(
        self, seconds: Mapping[str, list[float]], name: str, reference: str
    ) -> Cost:
        """Its cost, given everyone's seconds."""
        if not seconds[name]:
            return Cost(self.temporary_bytes, self.compile_seconds, None, None)
        pairs = zip(seconds[name], seconds[reference], strict=True)
        return Cost(
            self.temporary_bytes,
            self.compile_seconds,
            statistics.median(seconds[name]),
            statistics.median(a / b for a, b in pairs),
        )


def compiled(
    loss_fn: Callable[[PyTree, Any], Any], params: PyTree[Any], adjoint: Any
) -> Program:
    """The gradient of a loss under an adjoint, compiled."""
    operands, static = eqx.partition(params, eqx.is_inexact_array)
    if not jax.tree.leaves(operands):
        raise ValueError(
            f"Expected parameters with inexact arrays, got {params!r}. Pass what is to "
            "be differentiated as jax.Array of a floating dtype."
        )

    def loss(operands: PyTree) -> Any:
        value = loss_fn(eqx.combine(operands, static), adjoint)
        real = eqx.is_array(value) and jnp.issubdtype(value.dtype, jnp.floating)
        if not real or value.shape != ():
            raise ValueError(
                f"Expected a loss that is a real scalar array, got {value!r}. Return "
                "the value alone, without auxiliary output."
            )
        return value

    began = time.perf_counter()
    program = jax.jit(jax.grad(loss)).lower(operands).compile()
    took = time.perf_counter() - began
    analysis = program.memory_analysis()
    return Program(program, operands, analysis.temp_size_in_bytes, took)


def seconds_of(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after another in every round, so that drifts cancel."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            program.gradient()
            seconds[name].append(time.perf_counter() - began)
    return seconds
