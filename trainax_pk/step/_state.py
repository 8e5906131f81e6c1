"""What training carries from one update to the next."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from trainax_pk._tree import check_count, describe


class _Static:
    """The parts of a model that are no arrays, and which leaves train; hashable."""

    def __init__(self, static: PyTree[Any], mask: tuple[bool, ...]) -> None:
        self.leaves, self.treedef = jax.tree.flatten(static)
        self.mask = mask

    @property
    def tree(self) -> PyTree[Any]:
        return self.treedef.unflatten(self.leaves)

    def _key(self) -> Any:
        return (tuple(self.leaves), self.treedef, self.mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((self.treedef, self.mask))


class TrainState(eqx.Module):
    """Everything that an update reads and writes; arrays only, so that jit, vmap, scan
    and grad take it as it is. It is what a checkpoint holds.

    Attributes:
        params: Leaves of the model that train; None elsewhere.
        buffers: The model's other arrays (integers, frozen leaves, layer states).
        opt_state: State of the optimizer.
        ema: Moving average of `params`, or None; of several, the first.
        step: Number of updates done, strong int32 scalar.
        num_skipped: Number of updates that were not finite and left out.
        key: Root key; the key of an update is a pure function of it and `step`.
        more_ema: The other moving averages.
    """

    params: PyTree[Array]
    buffers: PyTree[Array]
    opt_state: PyTree[Array]
    ema: PyTree[Array] | None
    step: Int[Array, ""]
    num_skipped: Int[Array, ""]
    key: PRNGKeyArray
    static: _Static = eqx.field(static=True)
    more_ema: tuple[PyTree[Array], ...] = ()

    @classmethod
    def create(
        cls,
        model: PyTree[Any],
        optimizer: optax.GradientTransformation,
        *,
        key: PRNGKeyArray,
        trainable: Callable[[Any], bool] | PyTree[bool] | None = None,
        ema: bool | int = False,
    ) -> "TrainState":
        """State before the first update.

        Args:
            model: Any PyTree, usually an `eqx.Module`.
            optimizer: An optax transformation.
            key: Root key of all randomness in training.
            trainable: Which leaves train: a function of a leaf, or a PyTree of bools
                that is a prefix of the model. Of these, inexact arrays do, other than
                those of an `eqx.nn.State`.
            ema: Whether to keep a moving average of the trained leaves, or how many;
                their decays are an option of `make_train_step`.

        Returns:
            The state, with `step` 0.

        Raises:
            ValueError: An optimizer that is none, a model without a trainable leaf, a
                `trainable` that does not fit the model, no key.

        Example:
            >>> import equinox as eqx
            >>> import jax
            >>> import optax
            >>> from trainax_pk import TrainState
            >>> model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
            >>> state = TrainState.create(model, optax.sgd(0.1), key=jax.random.key(1))
            >>> int(state.step), state.model.weight.shape
            (0, (2, 2))
        """
        check_optimizer(optimizer)
        check_count("ema", int(ema) if isinstance(ema, bool) else ema, minimum=0)
        _check_key(key)
        mask = _trainable_mask(model, trainable)
        dynamic, static = eqx.partition(model, eqx.is_array)
        # The state owns its arrays: they may be donated, the caller's may not.
        dynamic = jax.tree.map(_owned, dynamic)
        params, buffers = eqx.partition(dynamic, mask)
        flat_mask = tuple(jax.tree.leaves(mask))
        if not any(flat_mask):
            raise ValueError(
                "Expected a model with a trainable inexact array, got "
                f"{describe(dynamic)}. Check `trainable` and the dtypes of the leaves."
            )
        return cls(
            params=params,
            buffers=buffers,
            opt_state=jax.tree.map(_owned, optimizer.init(params)),
            ema=jax.tree.map(_owned, params) if ema else None,
            more_ema=tuple(jax.tree.map(_owned, params) for _ in range(int(ema) - 1)),
            step=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            key=_owned(key),
            static=_Static(static, flat_mask),
        )

    @property
    def model(self) -> PyTree[Any]:
        """The model as it stands."""
        return self.model_with(self.params)

    @property
    def ema_model(self) -> PyTree[Any]:
        """The model with averaged leaves; the current model is untouched.

        Raises:
            ValueError: No average is kept.
        """
        return self.averaged_model(1)

    def averaged_model(self, number: int) -> PyTree[Any]:
        """The model with the leaves of one of several averages.

        Args:
            number: Which, counted from 1 in the order of their decays.

        Raises:
            ValueError: There are not as many.
        """
        averages = () if self.ema is None else (self.ema, *self.more_ema)
        if not 1 <= number <= len(averages):
            raise ValueError(
                f"Expected a state with a moving average of number {number}, got "
                f"{len(averages) or 'none'}. Create it with TrainState.create(..., "
                f"ema={number})."
            )
        return self.model_with(averages[number - 1])

    def model_with(self, params: PyTree[Array]) -> PyTree[Any]:
        """The model with other trained leaves."""
        return eqx.combine(params, self.buffers, self.static.tree)

    def split(self, model: PyTree[Any]) -> tuple[PyTree[Array], PyTree[Array]]:
        """Trained leaves and buffers of a model of the same structure."""
        dynamic = eqx.filter(model, eqx.is_array)
        structure = jax.tree.structure(model)
        mask = structure.unflatten(self.static.mask)
        return eqx.partition(dynamic, mask)


def check_optimizer(optimizer: Any) -> None:
    """An optax transformation, or a ValueError."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            "Expected `optimizer` to be an optax GradientTransformation (init and "
            f"update), got {optimizer!r}. Pass for example optax.adam(1e-3)."
        )


def _check_key(key: Any) -> None:
    is_key = isinstance(key, jax.Array) and (
        (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0)
        or (key.dtype == jnp.uint32 and key.ndim == 1)
    )
    if not is_key:
        raise ValueError(
            f"Expected `key` to be one random key, got {key!r}. Pass jax.random.key(0)."
        )


def _owned(x: Any) -> Array:
    """A copy without weak type: a state read back from disk must not retrace."""
    x = jnp.array(x, copy=True)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return jax.lax.convert_element_type(x, x.dtype)


def _trainable_mask(model: PyTree[Any], trainable: Any) -> PyTree[bool]:
    # Layers write their running statistics themselves.
    inexact = jax.tree.map(
        lambda x: (
            jax.tree.map(lambda _: False, x)
            if isinstance(x, eqx.nn.State)
            else eqx.is_inexact_array(x)
        ),
        model,
        is_leaf=lambda x: isinstance(x, eqx.nn.State),
    )
    if trainable is None:
        return inexact
    if callable(trainable) and not isinstance(trainable, eqx.Module):
        return jax.tree.map(lambda a, x: a and bool(trainable(x)), inexact, model)
    try:
        return jax.tree.map(
            lambda flag, part: jax.tree.map(lambda a: a and bool(flag), part),
            trainable,
            inexact,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Expected `trainable` to be a function of a leaf or a PyTree of bools "
            f"that is a prefix of the model, got {trainable!r}. Build it with "
            "jax.tree.map over the model."
        ) from error
