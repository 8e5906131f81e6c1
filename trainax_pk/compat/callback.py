"""trainax's callbacks: called before every update with its number, model and batch."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from trainax_pk._tree import check_count, global_norm_squared
from trainax_pk.compat.configuration import BaseConfiguration


class BaseCallback(eqx.Module):
    """Runs every so many updates and answers `{name: result}`, else `{name: None}`.

    To add one: subclass and implement `callback`.
    """

    every: int
    name: str

    def __init__(self, every: int, name: str) -> None:
        self.every = check_count("every", every)
        self.name = name

    @abc.abstractmethod
    def callback(self, update_i: int, stepper: Any, data: PyTree[Array]) -> Any:
        """The result at an update where it is due."""

    def __call__(
        self, update_i: int, stepper: Any, data: PyTree[Array]
    ) -> dict[str, Any]:
        """The result by name; None where it is not due."""
        if update_i % self.every == 0:
            return {self.name: self.callback(update_i, stepper, data)}
        return {self.name: None}


class CompositeCallback(eqx.Module):
    """Several callbacks, or functions like them, as one.

    Example:
        >>> from trainax_pk.compat import callback
        >>> both = callback.CompositeCallback(
        ...     [callback.GetNetwork(1, "a"), callback.GetNetwork(2, "b")]
        ... )
        >>> both(3, "the network", None)
        {'a': 'the network', 'b': None}
    """

    callbacks: list[Any]

    def __init__(self, callbacks: list[Any]) -> None:
        self.callbacks = callbacks

    def __call__(
        self, update_i: int, stepper: Any, data: PyTree[Array]
    ) -> dict[str, Any]:
        """The results of all, merged."""
        results: dict[str, Any] = {}
        for callback in self.callbacks:
            results.update(callback(update_i, stepper, data))
        return results


class GetNetwork(BaseCallback):
    """The network itself.

    Example:
        >>> from trainax_pk.compat import callback
        >>> get = callback.GetNetwork(every=10)
        >>> get(10, "the network", None), get(11, "the network", None)
        ({'network': 'the network'}, {'network': None})
    """

    def __init__(self, every: int, name: str = "network") -> None:
        super().__init__(every, name)

    def callback(self, update_i: int, stepper: Any, data: PyTree[Array]) -> Any:
        """The network."""
        del update_i, data
        return stepper


class SaveNetwork(BaseCallback):
    """Writes the network to `{path}/{file_name}_{update_i}.eqx`.

    Example:
        >>> from trainax_pk.compat import callback
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     callback.SaveNetwork(5, folder, "net")(5, jnp.ones(2), None)
        {'network_saved': True}
    """

    path: str
    file_name: str

    def __init__(
        self, every: int, path: str, file_name: str, name: str = "network_saved"
    ) -> None:
        super().__init__(every, name)
        self.path = path
        self.file_name = file_name

    def callback(self, update_i: int, stepper: Any, data: PyTree[Array]) -> bool:
        """True, once the file is written."""
        del data
        eqx.tree_serialise_leaves(
            f"{self.path}/{self.file_name}_{update_i}.eqx", stepper
        )
        return True


class WeightNorm(BaseCallback):
    """Euclidean norm of the network's arrays.

    Example:
        >>> from trainax_pk.compat import callback
        >>> import jax.numpy as jnp
        >>> callback.WeightNorm(1)(0, jnp.array([3.0, 4.0]), None)
        {'weight_norm': Array(5., dtype=float32)}
    """

    squared: bool

    def __init__(
        self,
        every: int,
        squared: bool = False,  # noqa: FBT001, FBT002
        name: str = "weight_norm",
    ) -> None:
        super().__init__(every, name)
        self.squared = squared

    def callback(self, update_i: int, stepper: Any, data: PyTree[Array]) -> Array:
        """‖θ‖₂, or its square."""
        del update_i, data
        return _norm(stepper, self.squared)


class GradNorm(BaseCallback):
    """Euclidean norm of a configuration's gradient on the batch.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> model = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
        >>> model = eqx.tree_at(lambda m: m.weight, model, jnp.array([[3.0]]))
        >>> norm = tx.callback.GradNorm(1, tx.configuration.Supervised(), name="norm")
        >>> norm(0, model, jnp.array([[[1.0], [2.0]]]))  # d/dw (w - 2)² at 3
        {'norm': Array(2., dtype=float32)}
    """

    loss_configuration: BaseConfiguration
    squared: bool
    ref_stepper: Any
    residuum_fn: Any

    def __init__(
        self,
        every: int,
        loss_configuration: BaseConfiguration,
        *,
        squared: bool = False,
        ref_stepper: Any = None,
        residuum_fn: Any = None,
        name: str,
    ) -> None:
        super().__init__(every, name)
        self.loss_configuration = loss_configuration
        self.squared = squared
        self.ref_stepper = ref_stepper
        self.residuum_fn = residuum_fn

    def callback(self, update_i: int, stepper: Any, data: PyTree[Array]) -> Array:
        """‖∂L/∂θ‖₂, or its square."""
        del update_i
        _, grad = _value_and_grad(
            self.loss_configuration, stepper, data, self.ref_stepper, self.residuum_fn
        )
        return _norm(grad, self.squared)


class Loss(BaseCallback):
    """Loss of another configuration on the batch, and its gradient if wished.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk.compat as tx
        >>> loss = tx.callback.Loss(1, tx.configuration.Supervised(), name="loss")
        >>> loss(0, lambda u: 3 * u, jnp.array([[[1.0], [2.0]]]))
        {'loss': Array(1., dtype=float32)}
    """

    loss_configuration: BaseConfiguration
    with_grad: bool
    ref_stepper: Any
    residuum_fn: Any

    def __init__(
        self,
        every: int,
        loss_configuration: BaseConfiguration,
        *,
        with_grad: bool = False,
        ref_stepper: Any = None,
        residuum_fn: Any = None,
        name: str,
    ) -> None:
        super().__init__(every, name)
        self.loss_configuration = loss_configuration
        self.with_grad = with_grad
        self.ref_stepper = ref_stepper
        self.residuum_fn = residuum_fn

    def callback(self, update_i: int, stepper: Any, data: PyTree[Array]) -> Any:
        """The loss, or `(loss, gradient)`."""
        del update_i
        operands = (stepper, data, self.ref_stepper, self.residuum_fn)
        if self.with_grad:
            return _value_and_grad(self.loss_configuration, *operands)
        return _value(self.loss_configuration, *operands)


@eqx.filter_jit
def _value(
    configuration: Any, stepper: Any, data: Any, ref_stepper: Any, residuum_fn: Any
) -> Array:
    return configuration(
        stepper, data, ref_stepper=ref_stepper, residuum_fn=residuum_fn
    )


@eqx.filter_jit
def _value_and_grad(
    configuration: Any, stepper: Any, data: Any, ref_stepper: Any, residuum_fn: Any
) -> Any:
    return eqx.filter_value_and_grad(
        lambda m: configuration(
            m, data, ref_stepper=ref_stepper, residuum_fn=residuum_fn
        )
    )(stepper)


@eqx.filter_jit
def _norm(tree: Any, squared: bool) -> Array:  # noqa: FBT001
    total = global_norm_squared(tree)
    return total if squared else jnp.sqrt(total)


__all__ = [
    "BaseCallback",
    "CompositeCallback",
    "GetNetwork",
    "GradNorm",
    "Loss",
    "SaveNetwork",
    "WeightNorm",
]
