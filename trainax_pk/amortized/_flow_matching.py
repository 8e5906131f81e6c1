"""Posteriors as the flow of a learned velocity."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import check_count
from trainax_pk.amortized._encoder import AbstractEncoder, check_encoder
from trainax_pk.amortized._gaussian import standard_normal
from trainax_pk.amortized._head import make_network
from trainax_pk.amortized._posterior import (
    encode,
    fit_scales,
    from_standard,
    shape_of_scale,
    standard,
    unit_scale,
)
from trainax_pk.amortized._scale import Standardisation
from trainax_pk.amortized._support import Support, support_of, unbounded

_NUM_FREQUENCIES = 4


class FlowMatchingPosterior(eqx.Module):
    """q(θ | x): normal noise carried along dz/dt = v(t, z, f(x)) from t = 0 to 1.

    Trained by `tx.configuration.FlowMatching`, without solving the equation. Draws take
    `num_ode_steps` steps of Runge-Kutta 4, log-densities as many with the divergence
    ∇·v, of d derivatives each. Both are those of the discretised flow up to O(step⁴).

    Attributes:
        encoder: Standardised x ↦ f.
        network: (z, f, t) ↦ v, a perceptron.
        dim: d.
        num_ode_steps: Steps from noise to θ.
        support: θ ↔ ℝᵈ.
        theta_scale: Learned by `standardised`.
        x_scale: Learned by `standardised`.

    Raises:
        ValueError: As `AmortizedPosterior`.

    Source: Lipman et al. 2023, arXiv:2210.02747; Dax et al. 2023, arXiv:2305.17161.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> posterior = tx.amortized.FlowMatchingPosterior(
        ...     tx.amortized.IdentityEncoder((3,)), 2, key=jax.random.key(0)
        ... )
        >>> posterior.sample(jax.random.key(1), jnp.ones(3), 5).shape
        (5, 2)
    """

    encoder: AbstractEncoder
    network: eqx.nn.MLP
    dim: int = eqx.field(static=True)
    num_ode_steps: int = eqx.field(static=True)
    support: Support
    theta_scale: Standardisation
    x_scale: Standardisation

    def __init__(
        self,
        encoder: AbstractEncoder,
        dim: int,
        *,
        prior: Any = None,
        num_ode_steps: int = 32,
        width: int = 128,
        depth: int = 3,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: PRNGKeyArray,
    ) -> None:
        """Builds the network.

        Args:
            encoder: x ↦ f.
            dim: d.
            prior: With `bounds()`, of whose support nothing leaves; None for vectors θ
                without bounds.
            num_ode_steps: Steps from noise to θ.
            width: Width of the hidden layers.
            depth: Number of hidden layers.
            activation: Between them; smooth, since its derivative is integrated.
            key: Key of the weights.
        """
        self.encoder = check_encoder(encoder)
        self.dim = check_count("dim", dim)
        self.num_ode_steps = check_count("num_ode_steps", num_ode_steps)
        self.support = unbounded(dim) if prior is None else support_of(prior)
        if self.support.dim != dim:
            raise ValueError(
                f"Expected dim={self.support.dim}, the number of parameters of the prior, "
                f"got {dim}. Pass that."
            )
        inputs = dim + encoder.num_features + 1 + 2 * _NUM_FREQUENCIES
        self.network = make_network(inputs, dim, width, depth, activation, key)
        self.theta_scale = unit_scale((self.support.dim,))
        self.x_scale = unit_scale(shape_of_scale(encoder))

    def standardised(
        self, data: Any, *, shared_axes: tuple[int, ...] = ()
    ) -> "FlowMatchingPosterior":
        """The same with scales learned from data, which no training changes.

        Args:
            data: Pairs, as a configuration takes them.
            shared_axes: As for `AmortizedPosterior.standardised`.

        Returns:
            A posterior.
        """
        return fit_scales(self, data, shared_axes)

    def velocity(
        self, t: Float[Array, ""], z: Float[Array, " d"], features: Float[Array, " f"]
    ) -> Float[Array, " d"]:
        """v(t, z, f)."""
        phase = jnp.pi * t * jnp.arange(1, _NUM_FREQUENCIES + 1, dtype=z.dtype)
        time = [t[None], jnp.cos(phase), jnp.sin(phase)]
        return self.network(jnp.concatenate([z, features, *time]))

    def embed(
        self, theta: PyTree[Array], x: Array, mask: Array | None
    ) -> tuple[Float[Array, " d"], Float[Array, " f"]]:
        """z(θ) and f(x)."""
        z, _ = standard(self.support, self.theta_scale, theta)
        return z, encode(self.encoder, self.x_scale, x, mask)

    def log_prob(
        self,
        theta: PyTree[Array],
        x: Float[Array, "..."],
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, ""]:
        """log q(θ | x): log N(z₀; 0, I) − ∫ ∇·v dt, -inf outside of the support.

        Args:
            theta: One θ.
            x: One observation.
            mask: Which of its entries were observed, or None.

        Returns:
            Scalar.
        """
        z, log_det = standard(self.support, self.theta_scale, theta)
        features = encode(self.encoder, self.x_scale, x, mask)

        def field(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            velocity = lambda z: self.velocity(t, z, features)  # noqa: E731
            return velocity(state[0]), jnp.trace(jax.jacfwd(velocity)(state[0]))

        start = (z, jnp.zeros((), z.dtype))
        noise, gained = self._integrate(field, start, backward=True)
        # Backward, the integral comes out negative.
        return standard_normal(noise) + gained + log_det

    def sample(
        self,
        key: PRNGKeyArray,
        x: Float[Array, "..."],
        num_samples: int,
        mask: Bool[Array, "..."] | None = None,
    ) -> PyTree[Array]:
        """Independent draws of q(· | x), all within the prior's support.

        Args:
            key: Key.
            x: One observation.
            num_samples: n.
            mask: Which of its entries were observed, or None.

        Returns:
            Leaves `(n, ...)`.
        """
        check_count("num_samples", num_samples)
        features = encode(self.encoder, self.x_scale, x, mask)
        field = lambda t, z: self.velocity(t, z, features)  # noqa: E731

        def draw(key: PRNGKeyArray) -> PyTree[Array]:
            noise = jax.random.normal(key, (self.dim,), features.dtype)
            z = self._integrate(field, noise, backward=False)
            return from_standard(self.support, self.theta_scale, z)

        return jax.vmap(draw)(jax.random.split(key, num_samples))

    def _integrate(self, field: Any, start: PyTree[Array], *, backward: bool) -> PyTree:
        """Runge-Kutta 4 from t = 0 to 1, or back."""
        h = (-1.0 if backward else 1.0) / self.num_ode_steps
        add = lambda u, k, c: jax.tree.map(lambda a, b: a + c * b, u, k)  # noqa: E731

        def step(u: PyTree, i: Array) -> tuple[PyTree, None]:
            t = (1.0 if backward else 0.0) + i * h
            k1 = field(t, u)
            k2 = field(t + h / 2, add(u, k1, h / 2))
            k3 = field(t + h / 2, add(u, k2, h / 2))
            k4 = field(t + h, add(u, k3, h))
            for k, c in ((k1, h / 6), (k2, h / 3), (k3, h / 3), (k4, h / 6)):
                u = add(u, k, c)
            return u, None

        dtype = jax.tree.leaves(start)[0].dtype
        steps = jnp.arange(self.num_ode_steps, dtype=dtype)
        return jax.lax.scan(step, start, steps)[0]
