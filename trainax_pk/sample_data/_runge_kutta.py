"""The classical Runge-Kutta scheme."""

from collections.abc import Callable

from jaxtyping import Array, Float


def rk4_step(
    rhs: Callable[[Array], Array], u: Float[Array, "dof"], dt: float
) -> Float[Array, "dof"]:
    """One step of the classical fourth-order Runge-Kutta scheme for u̇ = rhs(u)."""
    k1 = rhs(u)
    k2 = rhs(u + 0.5 * dt * k1)
    k3 = rhs(u + 0.5 * dt * k2)
    k4 = rhs(u + dt * k3)
    return u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
