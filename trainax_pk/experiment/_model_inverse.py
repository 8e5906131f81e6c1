"""Networks of inverse problems by name: posteriors, learned solvers."""

from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
from pydantic import Field

import trainax_pk.amortized as amortized
import trainax_pk.solver as solvers
from trainax_pk.experiment._configuration import Direct
from trainax_pk.experiment._data import Count
from trainax_pk.experiment._model import AbstractModel, Odd
from trainax_pk.experiment._schedule import NonNegative
from trainax_pk.experiment._spec import AbstractSpec, Family, register

Heads = Literal["diagonal_gaussian", "full_gaussian", "autoregressive_flow"]


@register("model")
class Posterior(AbstractModel):
    """`tx.amortized.AmortizedPosterior` with a perceptron as encoder.

    Entries of an observation `(num_times, variables)` are standardised over all times.
    """

    needs: ClassVar[str] = "pairs"
    kind: Literal["posterior"] = "posterior"
    head: Heads = "full_gaussian"
    num_features: Count = 32
    width: Count = 64
    depth: Annotated[int, Field(ge=0)] = 2

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray, *, prior: Any) -> Any:
        """The network, with scales of 1 until `fitted` learns them."""
        encoder_key, head_key = jax.random.split(key)
        size = {"width": self.width, "depth": self.depth}
        encoder = amortized.MLPEncoder(
            shape, self.num_features, **size, key=encoder_key
        )
        dim = prior.bounds()[0].size
        make = {
            "diagonal_gaussian": amortized.DiagonalGaussian,
            "full_gaussian": amortized.FullGaussian,
            "autoregressive_flow": amortized.masked_autoregressive_flow,
        }[self.head]
        head = make(dim, self.num_features, width=self.width, key=head_key)
        model = amortized.AmortizedPosterior(encoder, head, prior=prior)
        # Of the shapes that `fitted` gives: weights are read back into these.
        scales = (_unit((dim,)), _unit((1, *shape[1:])))
        return eqx.tree_at(lambda m: (m.theta_scale, m.x_scale), model, scales)

    def fitted(self, model: Any, train: Any) -> Any:
        """The model with scales of the training data."""
        return model.standardised(train.arrays, shared_axes=(0,))


def _unit(shape: tuple[int, ...]) -> amortized.Standardisation:
    dtype = jnp.result_type(float)
    return amortized.Standardisation(jnp.zeros(shape, dtype), jnp.ones(shape, dtype))


@register("model")
class FourDVarNet(AbstractModel):
    """`tx.solver.FourDVarNet1D` with a bilinear prior and a convolutional LSTM, along
    time."""

    needs: ClassVar[str] = "observations"
    kind: Literal["4dvarnet"] = "4dvarnet"
    hidden_dim: Count = 16
    kernel_size: Odd = 3
    num_steps: Count = 5
    solver_adjoint: Annotated[AbstractSpec, Family("adjoint")] = Direct()
    prior_weight: NonNegative = 1.0
    learn_weights: bool = False

    def build(self, shape: tuple[int, ...], key: PRNGKeyArray) -> Any:
        """The network."""
        prior_key, modulator_key = jax.random.split(key)
        size = {"kernel_size": self.kernel_size}
        return solvers.FourDVarNet1D(
            solvers.BilinAEPrior1D(shape[-1], self.hidden_dim, **size, key=prior_key),
            solvers.ConvLSTMGradMod1D(
                shape[-1], self.hidden_dim, **size, key=modulator_key
            ),
            num_steps=self.num_steps,
            solver_adjoint=self.solver_adjoint.build(),
            prior_weight=self.prior_weight,
            learn_weights=self.learn_weights,
        )
