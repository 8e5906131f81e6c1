"""Models of Keras 3, on its JAX backend, as steppers."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk._extras import load
from trainax_pk._stepper import Stepper
from trainax_pk._tree import check_flag
from trainax_pk._types import Inputs
from trainax_pk.data import hash_content
from trainax_pk.framework._whole_batch import (
    AbstractAdapted,
    call_whole,
    channels_to_end,
    channels_to_front,
    in_precision,
    taken_apart,
)

# What keras.random.SeedGenerator calls its variable.
_SEED = "seed_generator_state"
# Numbered as models are built in a process, so they say nothing of a model.
_NAMES = ("name", "shared_object_id", "registered_name")


def from_keras(
    model: Any, *, channels_last: bool = False, conditioned: bool = False
) -> Stepper:
    """A Keras model on the JAX backend as a stepper u -> u_next of one sample.

    Its trainable variables are trained. Seeds of its random layers come from the key of
    each update, so that the stepper is stochastic if there are any. All other variables
    (statistics of batch norm) are the state of the stepper's layers. The model object is
    called without being written to, with `training=True` until
    `eqx.nn.inference_mode(stepper)`, and a batch goes through it in one call.

    Args:
        model: A `keras.Model` or layer that maps `(B, ...)` to the same shape, built. It
            computes in the precision of its dtype policy, which states have to have.
        channels_last: It takes `(B, *space, channels)`, as Keras's convolutions do.
            States stay `(channels, *space)`.
        conditioned: It takes a list: the state, then what of `Inputs(sample, time)` there
            is.

    Returns:
        A `Stepper` around a `KerasModel`.

    Raises:
        ValueError: Another backend than JAX; no layer of Keras, one that is not built,
            one without trainable variables, one whose layers add losses (regularisers),
            which would be left out. When called: losses that layers add in the call; batch
            norm that is trained on one sample alone; `compute_dtype` of a step.
        ImportError: Keras is not installed.

    Example:
        >>> import os
        >>> os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import keras
        >>> import optax
        >>> import trainax_pk as tx
        >>> network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
        >>> model = tx.framework.from_keras(network)
        >>> adam = optax.adam(1e-2)
        >>> state = tx.TrainState.create(model, adam, key=jax.random.key(0))
        >>> step = jax.jit(tx.make_train_step(tx.configuration.Supervised(), adam))
        >>> state, info = step(state, jnp.ones((8, 2, 3)))
        >>> tx.framework.to_keras(state.model) is network
        True
    """
    keras = load("keras", "keras")
    if keras.backend.backend() != "jax":
        raise ValueError(
            "Expected Keras on its JAX backend, got the backend "
            f"{keras.backend.backend()!r}. Set os.environ['KERAS_BACKEND'] = 'jax' before "
            "keras is imported for the first time."
        )
    if not isinstance(model, keras.Layer):
        raise ValueError(
            f"Expected a model of Keras, got {type(model).__name__}. Pass a built "
            "keras.Model, such as keras.Sequential([keras.Input((3,)), ...])."
        )
    if not model.built or not model.trainable_variables:
        state = "without trainable variables" if model.built else "that is not built"
        raise ValueError(
            f"Expected a model with variables to train, got {model.name!r} {state}. Begin "
            "it with keras.Input, or call it on an example, and leave a layer trainable."
        )
    if model.losses:
        _refuse_losses(model, len(model.losses))
    adapted, state = eqx.nn.make_with_state(KerasModel)(
        model, channels_last=channels_last, conditioned=conditioned
    )
    return Stepper(
        adapted,
        None if adapted.index is None else state,
        stochastic=bool(adapted.network.seeds),
        conditioned=conditioned,
    )


def to_keras(stepper: Stepper, into: Any = None) -> Any:
    """Writes a stepper's weights and layer states into a Keras model.

    Args:
        stepper: What `from_keras` returned, or what a trainer made of it.
        into: Another model of the same architecture; None for the one that was adapted.

    Returns:
        The model that was written to.

    Raises:
        ValueError: Another stepper, or a model whose variables have other shapes.

    Example:
        >>> import os
        >>> os.environ["KERAS_BACKEND"] = "jax"
        >>> import jax
        >>> import keras
        >>> import trainax_pk as tx
        >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        >>> stepper = tx.framework.from_keras(network)
        >>> zero = jax.tree.map(lambda x: 0 * x, stepper)
        >>> network = tx.framework.to_keras(zero)
        >>> float(abs(network.trainable_variables[0].value).sum())
        0.0
    """
    adapted, state = taken_apart(stepper, KerasModel, "keras")
    held = adapted.network
    target = held if into is None else _Network(into)
    values = (*adapted.weights, *adapted.variables(state))
    variables = (*target.trainable, *target.others)
    shapes = [tuple(v.shape) for v in variables]
    if shapes != [x.shape for x in values]:
        raise ValueError(
            f"Expected a model with variables {[x.shape for x in values]}, got {shapes}. "
            "Build `into` like the model that was adapted."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return target.model


class KerasModel(AbstractAdapted):
    """A Keras model as a PyTree of arrays; `from_keras` makes it.

    Attributes:
        weights: Values of the trainable variables, in the model's order.
        index: Where the state of the layers is, or None.
        inference: Whether the model is evaluated; `eqx.nn.inference_mode` sets it.
        network: The model, whose own values are not read; hashable.
        channels_last: As for `from_keras`.
        conditioned: Likewise.

    Example:
        >>> import os
        >>> os.environ["KERAS_BACKEND"] = "jax"
        >>> import keras
        >>> import trainax_pk as tx
        >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        >>> [x.shape for x in tx.framework.from_keras(network).module.weights]
        [(2, 3), (3,)]
    """

    kind = "a model of Keras"
    weights: tuple[Array, ...]
    index: eqx.nn.StateIndex | None
    inference: bool
    network: "_Network" = eqx.field(static=True)
    channels_last: bool = eqx.field(static=True)
    conditioned: bool = eqx.field(static=True)

    def __init__(self, model: Any, *, channels_last: bool, conditioned: bool) -> None:
        self.channels_last = check_flag("channels_last", channels_last)
        self.conditioned = check_flag("conditioned", conditioned)
        self.network = network = _Network(model)
        self.weights = tuple(jnp.asarray(v.value) for v in network.trainable)
        others = tuple(jnp.asarray(v.value) for v in network.others)
        self.index = eqx.nn.StateIndex(others) if others else None
        self.inference = False

    @property
    def has_batch_statistics(self) -> bool:
        """Whether its layers average over a batch."""
        return self.network.has_batch_statistics

    def through(
        self,
        variables: tuple[Array, ...],
        u: PyTree[Array],
        inputs: Inputs,
        key: PRNGKeyArray | None,
    ) -> tuple[PyTree[Array], Any]:
        """The next state of one sample, and the layers' state."""
        return call_whole(self._apply, self.weights, variables, u, inputs, key)

    def variables(self, state: eqx.nn.State | None) -> tuple[Array, ...]:
        """State of the layers, in the model's order."""
        return () if self.index is None else state.get(self.index)

    def _apply(
        self,
        weights: tuple[Array, ...],
        others: tuple[Array, ...],
        u: PyTree[Array],
        inputs: Inputs,
        key: PRNGKeyArray | None,
    ) -> tuple[PyTree[Array], tuple[Array, ...]]:
        network = self.network
        network.check_precision(weights)
        values = (*weights, *others, *network.new_seeds(key))
        held = (*network.trainable, *network.others, *network.seeds)
        if self.channels_last:
            u = channels_to_end(u)
        given = [u, *(part for part in inputs if part is not None)]
        scope = load("keras", "keras").StatelessScope(
            state_mapping=list(zip(held, values, strict=True)), collect_losses=True
        )
        # The call as users make it: stateless_call leaves out what `__call__` tells inner
        # layers, `training` among them. Layers of Keras add biases across ranks.
        training = not self.inference
        with scope, jax.numpy_rank_promotion("allow"):
            out = network.model(given if self.conditioned else u, training=training)
        if scope.losses:
            _refuse_losses(network.model, len(scope.losses))
        out = in_precision(out, u, weights)
        new = tuple(scope.get_current_value(v) for v in network.others)
        return channels_to_front(out) if self.channels_last else out, new


class _Network:
    """A Keras model and its variables; equal to itself alone."""

    def __init__(self, model: Any) -> None:
        keras = load("keras", "keras")
        rest = model.non_trainable_variables
        self.model = model
        self.trainable = tuple(model.trainable_variables)
        self.seeds = tuple(v for v in rest if v.name == _SEED)
        self.others = tuple(v for v in rest if v.name != _SEED)
        layers = model._flatten_layers()
        self.has_batch_statistics = any(
            isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
            for layer in layers
        )

    def new_seeds(self, key: PRNGKeyArray | None) -> tuple[Array, ...]:
        """One for each random layer: functions of the key."""
        if key is None:
            return tuple(jnp.zeros(v.shape, v.dtype) for v in self.seeds)
        keys = (jax.random.fold_in(key, i) for i in range(len(self.seeds)))
        words = (
            jax.random.key_data(k)
            if jnp.issubdtype(k.dtype, jax.dtypes.prng_key)
            else k
            for k in keys
        )
        return tuple(
            w[-2:].astype(v.dtype) for w, v in zip(words, self.seeds, strict=True)
        )

    def check_precision(self, weights: tuple[Array, ...]) -> None:
        """Keras would cast other weights back without a word."""
        for variable, x in zip(self.trainable, weights, strict=True):
            if x.dtype.name != variable.dtype:
                raise ValueError(
                    f"Expected weights of {variable.dtype} for {variable.path}, got "
                    f"{x.dtype.name}. Leave out `compute_dtype`, and choose the precision "
                    "when the model is built: keras.config.set_dtype_policy("
                    "'mixed_bfloat16')."
                )

    def content_hash(self) -> str:
        """Of architecture and code: the same for models built alike."""
        config = json.loads(self.model.to_json()) if _has_config(self.model) else {}
        variables = [(tuple(v.shape), v.dtype) for v in (*self.trainable, *self.others)]
        return hash_content(
            type(self.model), _unnamed(config), variables, versions=False
        )


def _refuse_losses(model: Any, count: int) -> None:
    raise ValueError(
        f"Expected a model without losses of its own, got {count} of {model.name!r}: a "
        "configuration would leave them out. Remove its regularisers and `add_loss`, and "
        "decay weights by the optimizer (optax.adamw)."
    )


def _has_config(model: Any) -> bool:
    try:
        model.to_json()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # A class of the user's without get_config counts by its code.
        return False
    return True


def _unnamed(config: Any) -> Any:
    """A configuration with names by the order in which they occur."""
    known: dict[str, str] = {}

    def collect(x: Any) -> None:
        for name, value in x.items() if isinstance(x, dict) else enumerate(x):
            if name == "name" and isinstance(value, str):
                known.setdefault(value, f"#{len(known)}")
            elif isinstance(value, dict | list):
                collect(value)

    def replace(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: replace(v) for k, v in x.items() if k not in _NAMES[1:]}
        if isinstance(x, list):
            return [replace(v) for v in x]
        return known.get(x, x) if isinstance(x, str) else x

    collect(config)
    return replace(config)
