"""Training of models that generate fields: single noise levels, never a whole draw."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from trainax_pk._tree import as_number, check_flag
from trainax_pk.amortized._training import check_method
from trainax_pk.configuration._amortized import (
    check_path,
    check_random,
    straight_paths,
)
from trainax_pk.configuration._base import AbstractConfiguration, Aux
from trainax_pk.configuration._chain import as_window, check_callable
from trainax_pk.generation._fields import as_fields
from trainax_pk.generation._models import Regression, is_number
from trainax_pk.loss import mse


class AbstractFieldConfiguration(AbstractConfiguration):
    """What a batch of fields is, or of windows whose next state is the field."""

    next_step: bool = eqx.field(static=True, default=False, kw_only=True)

    def __check_init__(self) -> None:
        check_flag("next_step", self.next_step)

    @property
    def num_times(self) -> int:
        """2 for the next step, else 1: a sample has no times."""
        return 2 if self.next_step else 1

    def _targets(self, batch: Any) -> tuple[Array, PyTree[Array] | None]:
        """Fields `(B, C, *space)` and their condition."""
        if not self.next_step:
            return as_fields(batch)
        window = as_window(batch, 2, type(self).__name__)
        if not eqx.is_array(window.state):
            raise ValueError(
                "Expected states of one array for next_step=True, got "
                f"{jax.tree.structure(window.state)}. Stack them as channels."
            )
        if jax.tree.leaves((window.sample, window.time)):
            raise ValueError(
                "Expected trajectories of states alone for next_step=True, got "
                "parameters or forcing beside them. Append them to the states as channels."
            )
        return as_fields((window.state[:, 1], window.state[:, 0]))

    def _embedded(self, model: Any, batch: Any) -> tuple[Array, Array]:
        """Standardised fields, and conditions as the network sees them."""
        target, condition = self._targets(batch)
        return jax.vmap(model.embed)(target, condition)


class Denoising(AbstractFieldConfiguration):
    """Mean of λ(σ) |D(z₀ + σ n; σ, c) − z₀|² over log σ ~ N(m, s²) and n ~ N(0, 1).

    λ = (σ² + σ_data²) / (σ σ_data)², which is 1 / c_out²: every noise level asks its
    network for an answer of variance 1, and log σ decides alone which are trained on.
    z₀ are standardised fields. One pass of the network per sample.

    Attributes:
        log_sigma_mean: m. -1.2 is Karras' for data of standard deviation 0.5; -0.5 is
            the same for standardised ones.
        log_sigma_std: s >= 0.
        next_step: Batches are windows of trajectories: a field is the second state, its
            condition the first.

    Raises:
        ValueError: When built: m or s not finite, s below 0. When called: a model
            without `denoise`, no key, shapes that the model does not take.

    Source: Karras et al. 2022, arXiv:2206.00364.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Denoiser(net, G.FieldScales(1, 1, num_axes=1, residual=True))
        >>> data = G.Fields(jnp.ones((8, 1, 16)), jnp.ones((8, 1, 4)))
        >>> configuration = tx.configuration.Denoising()
        >>> configuration(model, data, key=jax.random.key(1))[0].shape
        ()
    """

    log_sigma_mean: float = eqx.field(static=True, default=-0.5, converter=as_number)
    log_sigma_std: float = eqx.field(static=True, default=1.2, converter=as_number)

    def __check_init__(self) -> None:
        numbers = (self.log_sigma_mean, self.log_sigma_std)
        finite = all(is_number(x) and np.isfinite(x) for x in numbers)
        if not finite or self.log_sigma_std < 0:
            raise ValueError(
                "Expected a finite `log_sigma_mean` and `log_sigma_std` >= 0, got "
                f"{self.log_sigma_mean!r} and {self.log_sigma_std!r}. They are those of "
                "log σ: leave them out for -0.5 and 1.2."
            )

    def __call__(
        self, model: Any, batch: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch, with a noise level and noise of its own for each sample."""
        check_method(model, "denoise")
        key = check_random(key, "Denoising")
        clean, inputs = self._embedded(model, batch)
        level_key, noise_key = jax.random.split(key)
        level = jax.random.normal(level_key, clean.shape[:1], clean.dtype)
        sigma = jnp.exp(self.log_sigma_mean + self.log_sigma_std * level)
        noise = jax.random.normal(noise_key, clean.shape, clean.dtype)
        wide = sigma.reshape(-1, *(1,) * (clean.ndim - 1))
        found = jax.vmap(model.denoise)(clean + wide * noise, sigma, inputs)
        square = (found - clean) ** 2
        s = model.sigma_data
        weight = (sigma**2 + s**2) / (sigma * s) ** 2
        return jnp.mean(weight * _sample_means(square)), Aux()


class FieldFlowMatching(AbstractFieldConfiguration):
    """`FlowMatching` of fields: mean of |v(t, z_t, c) − (z₁ − (1 − σ) z₀)|².

    z_t = (1 − (1 − σ) t) z₀ + t z₁ with z₁ a standardised field, z₀ standard normal and
    t on [0, 1]. One pass of the network per sample.

    Attributes:
        sigma: σ, standard deviation that is left at t = 1.
        time_exponent: α >= 0 of the density of t, ∝ t^α; above 0 more weight near the
            field.
        next_step: As for `Denoising`.

    Raises:
        ValueError: When built: σ outside of [0, 1), α below 0. When called: a model
            without `velocity`, no key, shapes that the model does not take.

    Source: Lipman et al. 2023, arXiv:2210.02747.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Velocity(net, G.FieldScales(1, num_axes=1))
        >>> configuration = tx.configuration.FieldFlowMatching()
        >>> configuration(model, jnp.ones((8, 1, 16)), key=jax.random.key(1))[0].shape
        ()
    """

    sigma: float = eqx.field(static=True, default=1e-4, converter=as_number)
    time_exponent: float = eqx.field(static=True, default=0.0, converter=as_number)

    def __check_init__(self) -> None:
        check_path(self.sigma, self.time_exponent)

    def __call__(
        self, model: Any, batch: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch, with a time and noise of its own for each sample."""
        check_method(model, "velocity")
        key = check_random(key, "FieldFlowMatching")
        end, inputs = self._embedded(model, batch)
        t, place, wanted = straight_paths(key, end, self.sigma, self.time_exponent)
        error = jax.vmap(model.velocity)(t, place, inputs) - wanted
        return jnp.mean(error**2), Aux()


class FieldRegression(AbstractFieldConfiguration):
    """Mean loss of a model's one field per condition, in the units of the data.

    Attributes:
        loss: `(prediction, target) -> scalar` of one sample. `tx.loss.mae` makes the
            strongest opponent of an ensemble by CRPS, which is the mean absolute error
            of a single field.
        next_step: As for `Denoising`.

    Raises:
        ValueError: When built: no function. When called: a model that is no
            `tx.generation.Regression`, no condition, shapes that the model does not take.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> G = tx.generation
        >>> net = lambda field, noise: field[:1]
        >>> model = G.Regression(net, G.FieldScales(1, 1, num_axes=1))
        >>> data = G.Fields(jnp.zeros((8, 1, 16)), jnp.ones((8, 1, 4)))
        >>> float(tx.configuration.FieldRegression(tx.loss.mae)(model, data)[0])
        1.0
    """

    loss: Callable[..., Array] = mse

    def __check_init__(self) -> None:
        check_callable("loss", self.loss)

    def __call__(
        self, model: Any, batch: Any, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch."""
        del key
        if not isinstance(model, Regression):
            raise ValueError(
                f"Expected a tx.generation.Regression, got {type(model).__name__}. Wrap "
                "the network in one (compute_dtype hides it)."
            )
        target, condition = self._targets(batch)
        if not jax.tree.leaves(condition):
            raise ValueError(
                f"Expected a condition of {model.scales.num_condition_channels} channels "
                "for FieldRegression, got none: a field is predicted from it. Pass "
                "tx.generation.Fields(target, condition)."
            )
        field = jax.vmap(lambda c: model(c, space=target.shape[2:]))(condition)
        if field.shape != target.shape:
            raise ValueError(
                f"Expected targets of the model's shape {field.shape}, got "
                f"{target.shape}. Build it with as many channels."
            )
        return jnp.mean(jax.vmap(self.loss)(field, target)), Aux()


def _sample_means(x: Array) -> Float[Array, " B"]:
    return jnp.mean(x.reshape(x.shape[0], -1), axis=1)
