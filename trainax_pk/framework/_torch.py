"""What a torch loop needs of us: losses over a window, and optimizers of optax."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainax_pk._extras import load

# A batch of predictions and targets to one number: the mean over samples.
Loss = Callable[[Any, Any], Any]


def optax_for_torch(
    parameters: Iterable[Any], transformation: optax.GradientTransformation
) -> Any:
    """A `torch.optim.Optimizer` that updates as an optax transformation does.

    Every update is computed by JAX on its default device, compiled once; parameters and
    gradients are copied there and back. That costs two copies of the parameters in either
    direction, which for large networks on an accelerator is slow: `torch.optim` has Adam.
    The optimizer's state is saved with `state_dict()`. A learning rate is a schedule of
    the transformation; torch's own schedulers do nothing.

    Args:
        parameters: What is trained, such as `model.parameters()`. A parameter without a
            gradient counts as one whose gradient is zero.
        transformation: An optax transformation that needs no values of the loss.

    Returns:
        The optimizer.

    Raises:
        ValueError: No optax transformation; parameters in groups, or of a type that JAX
            does not have (float64 without its 64-bit mode).
        ImportError: torch is not installed.

    Example:
        >>> import optax
        >>> import torch  # doctest: +SKIP
        >>> import trainax_pk as tx
        >>> net = torch.nn.Linear(3, 3)  # doctest: +SKIP
        >>> lion = tx.framework.optax_for_torch(  # doctest: +SKIP
        ...     net.parameters(), optax.lion(1e-4)
        ... )
        >>> net(torch.ones(2, 3)).sum().backward()  # doctest: +SKIP
        >>> lion.step()  # doctest: +SKIP
    """
    if not isinstance(transformation, optax.GradientTransformation):
        raise ValueError(
            f"Expected an optax transformation, got {type(transformation).__name__}. Pass "
            "for example optax.lion(1e-4)."
        )
    parameters = list(parameters)
    if not parameters or any(isinstance(p, dict) for p in parameters):
        raise ValueError(
            "Expected parameters of a torch module in one group, got "
            f"{'none' if not parameters else 'several groups'}. Pass model.parameters(); "
            "groups are made by optax.multi_transform."
        )
    for parameter in parameters:
        name = str(parameter.dtype).removeprefix("torch.")
        wide = name == "float64" and not jax.config.jax_enable_x64
        if wide or name not in ("float16", "float32", "float64"):
            raise ValueError(
                f"Expected parameters of a precision that JAX is set to, got {name}. Set "
                "jax.config.update('jax_enable_x64', True) for float64, or cast the "
                "module."
            )
    return _optimizer_class()(parameters, transformation)


@functools.cache
def _optimizer_class() -> type:
    torch = load("torch", "lightning")

    class Optax(torch.optim.Optimizer):
        """Parameters are torch's, the state is optax's."""

        def __init__(
            self, parameters: list[Any], transformation: optax.GradientTransformation
        ) -> None:
            super().__init__(parameters, {})
            self._optax_state = transformation.init(self._gather(_value))
            self._update = jax.jit(functools.partial(_update, transformation))

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            values, self._optax_state = self._update(
                self._gather(_value), self._gather(_gradient), self._optax_state
            )
            for parameter, value in zip(self._parameters(), values, strict=True):
                parameter.copy_(torch.from_numpy(np.array(value)))
            return loss

        def state_dict(self) -> dict[str, Any]:
            leaves = [np.array(x) for x in jax.tree.leaves(self._optax_state)]
            return {
                **super().state_dict(),
                "optax": [torch.from_numpy(x) for x in leaves],
            }

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            rest = dict(state_dict)
            leaves = [jnp.array(x.cpu().numpy()) for x in rest.pop("optax")]
            structure = jax.tree.structure(self._optax_state)
            self._optax_state = structure.unflatten(leaves)
            super().load_state_dict(rest)

        def _parameters(self) -> list[Any]:
            return [p for group in self.param_groups for p in group["params"]]

        def _gather(self, of: Callable[[Any], Any]) -> list[jax.Array]:
            # A copy: torch writes into its own memory while JAX still computes.
            return [jnp.array(of(p).detach().cpu().numpy()) for p in self._parameters()]

    return Optax


def _update(
    transformation: optax.GradientTransformation, values: Any, grads: Any, state: Any
) -> tuple[Any, Any]:
    updates, state = transformation.update(grads, state, values)
    return optax.apply_updates(values, updates), state


def _value(parameter: Any) -> Any:
    return parameter


def _gradient(parameter: Any) -> Any:
    if parameter.grad is None:
        return load("torch", "lightning").zeros_like(parameter)
    return parameter.grad


def rollout_loss(
    model: Any, window: Any, loss: Loss, weights: Sequence[float], cut_every: int | None
) -> Any:
    """Σ_t w_t · l(u_t, r_t) with u_0 = r_0, u_{t+1} = f(u_t), as `Supervised`.

    Args:
        model: f, of a batch `(B, ...)`.
        window: Reference states `(B, L, ...)`.
        loss: l.
        weights: Of the T <= L - 1 times.
        cut_every: Stop the gradient after every so many calls; None for never.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: The model changes shape or dtype.
    """
    u, total = window[:, 0], 0.0
    for t, weight in enumerate(weights, start=1):
        before, u = u, model(u)
        if u.shape != before.shape or u.dtype != before.dtype:
            raise ValueError(
                f"Expected the torch model to return a batch of states like its input, "
                f"{before.dtype}{list(before.shape)}, got {u.dtype}{list(u.shape)}. A "
                "stepper keeps shape and dtype; its batch axis comes first."
            )
        total = total + weight * loss(u, window[:, t])
        if cut_every is not None and t % cut_every == 0:
            u = u.detach()
    return total


def _mse(prediction: Any, target: Any) -> Any:
    return _per_sample((prediction - target).square()).mean()


def _mae(prediction: Any, target: Any) -> Any:
    return _per_sample((prediction - target).abs()).mean()


def _rmse(prediction: Any, target: Any) -> Any:
    return _root(_per_sample((prediction - target).square())).mean()


def _nmse(prediction: Any, target: Any) -> Any:
    error = _per_sample((prediction - target).square())
    return (error / _per_sample(target.square())).mean()


def _nmae(prediction: Any, target: Any) -> Any:
    error = _per_sample((prediction - target).abs())
    return (error / _per_sample(target.abs())).mean()


def _nrmse(prediction: Any, target: Any) -> Any:
    error = _root(_per_sample((prediction - target).square()))
    return (error / _root(_per_sample(target.square()))).mean()


def _per_sample(x: Any) -> Any:
    return x.flatten(1).mean(1)


def _root(x: Any) -> Any:
    # Of zero the gradient is zero, as in tx.loss.rmse.
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


# Those of tx.loss, for tensors `(B, ...)`: means over samples.
TORCH_LOSSES: dict[str, Loss] = {
    "mse": _mse,
    "mae": _mae,
    "rmse": _rmse,
    "nmse": _nmse,
    "nmae": _nmae,
    "nrmse": _nrmse,
}
