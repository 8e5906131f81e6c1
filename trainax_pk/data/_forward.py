"""Forward models: what simulates, and how it is put together."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainax_pk._tree import describe


@runtime_checkable
class ForwardModel(Protocol):
    """Anything that steps a state: classes of other packages need not inherit.

    Attributes:
        dt: Time that one step advances.
        state_signature: PyTree of objects with `shape` and `dtype` that a state must
            match (`jax.ShapeDtypeStruct`, arrays), or None for any state.

    A trained emulator wrapped by `StepperModel` answers to it as well, so that it
    replaces the model that it was trained on.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import ForwardModel, StepperModel
        >>> model = StepperModel(lambda u: 0.5 * u, dt=0.1)
        >>> isinstance(model, ForwardModel), isinstance(jnp.sin, ForwardModel)
        (True, False)
    """

    dt: Any
    state_signature: Any

    def step(self, state: PyTree[Array], dt: Any) -> PyTree[Array]:
        """State after the time `dt`."""


class StepperModel(eqx.Module):
    """A stepper `u -> u_next` as a forward model: physics or a trained emulator.

    Attributes:
        stepper: Callable PyTree of one state. It has its time step built in.
        dt: The time that one call advances.
        state_signature: As in `ForwardModel`.

    Raises:
        ValueError: A stepper that is not callable, a time step that is not positive;
            when stepped, another `dt` than its own, which it could not honour.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> lorenz = tx.sample_data.make_lorenz_63_stepper(0.01)
        >>> model = tx.data.StepperModel(lorenz, dt=0.01)
        >>> model.step(jnp.ones(3), model.dt).shape
        (3,)
    """

    stepper: Callable[[PyTree[Array]], PyTree[Array]]
    dt: float = eqx.field(static=True)
    state_signature: Any = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        if not callable(self.stepper):
            raise ValueError(
                f"Expected `stepper` to be callable, got {self.stepper!r}. Pass a "
                "function or an eqx.Module with __call__."
            )
        check_time("dt", self.dt)

    def step(self, state: PyTree[Array], dt: Any) -> PyTree[Array]:
        """One call of the stepper."""
        if not isinstance(dt, (int, float)) or dt != self.dt:
            raise ValueError(
                f"Expected dt={self.dt}, the step that this stepper was made for, got "
                f"{dt!r}. Pass `model.dt`, or make a stepper with another step."
            )
        return self.stepper(state)

    def __or__(self, observe: Callable[[PyTree], PyTree]) -> "Observed":
        """`model | observe`."""
        return Observed(self, observe)


class Observed(eqx.Module):
    """`forward | observe`: the model's states, seen through an operator.

    Of a forward model every kept state is observed; of a plain callable its output. The
    dynamics go on with the state itself.

    Attributes:
        forward: Forward model or plain callable.
        observe: Operator of one state; an `Observation` adds noise.

    Raises:
        ValueError: A part that is neither callable nor a forward model.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Observed
        >>> first = Observed(lambda theta: 2.0 * theta, lambda x: x[:1])
        >>> (first | jnp.exp)(jnp.zeros(3))
        Array([1.], dtype=float32)
    """

    forward: Any
    observe: Callable[[PyTree], PyTree]

    def __check_init__(self) -> None:
        is_model = is_forward_model(self.forward) or callable(self.forward)
        if not (is_model or isinstance(self.forward, Parametric)):
            raise ValueError(
                f"Expected a forward model or a callable, got {self.forward!r}. Pass "
                "an object with step(state, dt), dt and state_signature, or a function."
            )
        if not callable(self.observe):
            raise ValueError(
                f"Expected `observe` to be callable, got {self.observe!r}. Pass a "
                "function of one state, or an Observation."
            )

    def __call__(
        self, params: PyTree[Array], *, key: PRNGKeyArray | None = None
    ) -> PyTree[Array]:
        """Observed output of a plain callable, or of one step of a forward model."""
        output = evaluate(self.forward, params, key=key)
        if isinstance(self.observe, Observation) and key is not None:
            return self.observe.sample(output, key=key)
        return self.observe(output)

    def __or__(self, observe: Callable[[PyTree], PyTree]) -> "Observed":
        """Observes what was observed."""
        return Observed(self, observe)


class Observation(eqx.Module):
    """Observation operator with Gaussian noise, y = h(x) + σ ε.

    Attributes:
        operator: h, of one state.
        noise_std: σ >= 0, a scalar or a PyTree like y with leaves that broadcast to it.

    Raises:
        ValueError: An operator that is not callable, a negative σ.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Observation
        >>> first = Observation(lambda u: u[:1], noise_std=0.1)
        >>> first(jnp.arange(3.0)).shape, first.linearize(jnp.ones(3))(jnp.ones(3))
        ((1,), Array([1.], dtype=float32))
        >>> first.sample(jnp.arange(3.0), key=jax.random.key(0)).shape
        (1,)
    """

    operator: Callable[[PyTree], PyTree]
    noise_std: Any = 0.0

    def __check_init__(self) -> None:
        if not callable(self.operator):
            raise ValueError(
                f"Expected `operator` to be callable, got {self.operator!r}. Pass a "
                "function of one state."
            )
        for std in jax.tree.leaves(self.noise_std):
            traced = isinstance(std, jax.core.Tracer)
            if not traced and not (np.asarray(std) >= 0).all():
                raise ValueError(
                    f"Expected `noise_std` >= 0, got {std!r}. Pass standard deviations."
                )

    def __call__(self, state: PyTree[Array]) -> PyTree[Array]:
        """h(x), without noise."""
        return self.operator(state)

    def linearize(self, state: PyTree[Array]) -> Callable[[PyTree], PyTree]:
        """The tangent-linear operator v -> (∂h/∂x) v at a state."""
        return jax.linearize(self.operator, state)[1]

    def sample(self, state: PyTree[Array], *, key: PRNGKeyArray) -> PyTree[Array]:
        """h(x) + σ ε with ε standard normal, independent between entries and leaves."""
        return self.perturb(self.operator(state), key=key)

    def perturb(self, y: PyTree[Array], *, key: PRNGKeyArray) -> PyTree[Array]:
        """y + σ ε for what the operator gave."""
        leaves, structure = jax.tree.flatten(y)
        stds = jax.tree.leaves(self.noise_std)
        if len(stds) == 1:
            stds = stds * len(leaves)
        if len(stds) != len(leaves):
            raise ValueError(
                f"Expected `noise_std` to hold one value or {len(leaves)}, one for each "
                f"leaf of the observation, got {len(stds)}. Pass a PyTree like it."
            )
        keys = jax.random.split(key, len(leaves))
        noisy = [
            _add_noise(leaf, std, k)
            for leaf, std, k in zip(leaves, stds, keys, strict=True)
        ]
        return jax.tree.unflatten(structure, noisy)

    def __or__(self, observe: Callable[[PyTree], PyTree]) -> "Observed":
        """Applies another operator to what this one observes."""
        return Observed(self, observe)


class Stochastic(eqx.Module):
    """A simulator that draws random numbers of its own: `(key, params) -> output`.

    A sample's simulator gets a key of its own, which is neither the prior's nor that of
    an observation's noise. Stochastic dynamics step within the simulator.

    Attributes:
        simulate: The simulator.

    Raises:
        ValueError: A simulator that is not callable; when called, a missing key.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> prior = tx.data.BoxUniform([-1.0, -1.0], [1.0, 1.0])
        >>> simulator = tx.data.Stochastic(tx.sample_data.two_moons)
        >>> theta, x = tx.data.SimulationDataset(simulator, prior, 100)[:10]
        >>> theta.shape, x.shape
        ((10, 2), (10, 2))
    """

    simulate: Callable[[PRNGKeyArray, PyTree[Array]], PyTree[Array]]

    def __check_init__(self) -> None:
        if not callable(self.simulate):
            raise ValueError(
                f"Expected `simulate` to be callable, got {self.simulate!r}. Pass a "
                "function (key, params) -> output."
            )

    def __call__(
        self, params: PyTree[Array], *, key: PRNGKeyArray | None = None
    ) -> PyTree[Array]:
        """An output for some parameters."""
        if key is None:
            raise ValueError(
                "Expected `key` for a stochastic simulator, got None. Pass "
                "jax.random.key(...)."
            )
        return self.simulate(key, params)

    def __or__(self, observe: Callable[[PyTree], PyTree]) -> "Observed":
        """`simulator | observe`."""
        return Observed(self, observe)


class Parametric(eqx.Module):
    """A forward model whose physics depend on the parameters that the prior draws.

    Attributes:
        build: `params -> (model, state)`: the forward model for these parameters, and
            the state to start from. Traced, so arrays of the model may be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import Parametric, StepperModel
        >>> def build(params):
        ...     decay = StepperModel(lambda u: params["rate"] * u, dt=1.0)
        ...     return decay, params["u"]
        >>> model, state = Parametric(build).build({"rate": 0.5, "u": jnp.ones(2)})
        >>> model.step(state, 1.0)
        Array([0.5, 0.5], dtype=float32)
    """

    build: Callable[[PyTree[Array]], tuple[Any, PyTree[Array]]]

    def __check_init__(self) -> None:
        if not callable(self.build):
            raise ValueError(
                f"Expected `build` to be callable, got {self.build!r}. Pass a function "
                "params -> (forward model, initial state)."
            )

    def __or__(self, observe: Callable[[PyTree], PyTree]) -> "Observed":
        """`model | observe`."""
        return Observed(self, observe)


def is_forward_model(model: Any) -> bool:
    """Whether an object steps, by its attributes; without a `dt` it cannot."""
    steps = callable(getattr(model, "step", None))
    return steps and getattr(model, "dt", None) is not None


def split_observers(model: Any) -> tuple[Any, tuple[Callable[..., Any], ...]]:
    """The model at the start of a chain `forward | a | b`, and (a, b)."""
    observers: list[Callable[..., Any]] = []
    while isinstance(model, Observed):
        observers.append(model.observe)
        model = model.forward
    return model, tuple(reversed(observers))


def resolve(model: Any, params: PyTree[Array]) -> tuple[Any, PyTree[Array]]:
    """Model and initial state for some parameters."""
    if isinstance(model, Parametric):
        built = model.build(params)
        if not (isinstance(built, tuple) and len(built) == 2):
            raise ValueError(
                "Expected `build` to return (forward model, initial state), got "
                f"{type(built).__name__}. Return a tuple of both."
            )
        return built
    return model, params


def evaluate(
    model: Any, params: PyTree[Array], *, key: PRNGKeyArray | None = None
) -> PyTree[Array]:
    """One step of a forward model, or the value of a plain callable."""
    model, state = resolve(model, params)
    if is_forward_model(model):
        check_signature(model, state)
        return model.step(state, model.dt)
    if isinstance(model, (Stochastic, Observed)):
        return model(state, key=None if key is None else simulator_key(key))
    return model(state)


def simulator_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """The key of a simulator, apart from those of its observers, which are counted."""
    return jax.random.fold_in(key, np.uint32(0xFFFFFFFF))


def check_signature(model: Any, state: PyTree[Array]) -> None:
    """A state must match what the model says that it takes."""
    signature = getattr(model, "state_signature", None)
    if signature is None:
        return
    want = [(tuple(x.shape), jnp.dtype(x.dtype)) for x in jax.tree.leaves(signature)]
    arrays = jax.tree.map(jnp.asarray, state)
    got = [(x.shape, x.dtype) for x in jax.tree.leaves(arrays)]
    same_structure = jax.tree.structure(signature) == jax.tree.structure(state)
    if not same_structure or want != got:
        raise ValueError(
            f"Expected states of signature ({describe(signature)}) for "
            f"{type(model).__name__}, got ({describe(arrays)}) from the prior. Change "
            "the prior, or wrap the model in Parametric(build) with a state of its own."
        )


def check_time(name: str, value: Any) -> float:
    """A positive, finite Python number, or a ValueError that names it."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not np.isfinite(value) or value <= 0:
        raise ValueError(
            f"Expected `{name}` to be a number > 0, got {value!r}. Pass a Python float."
        )
    return float(value)


def _add_noise(leaf: Array, std: Any, key: PRNGKeyArray) -> Array:
    leaf = jnp.asarray(leaf)
    if isinstance(std, (int, float)) and std == 0:
        return leaf
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ValueError(
            f"Expected observations that are floating to add noise to, got "
            f"{leaf.dtype}. Pass noise_std=0, or cast in the operator."
        )
    noise = jax.random.normal(key, leaf.shape, leaf.dtype)
    scale = jnp.broadcast_to(jnp.asarray(std, leaf.real.dtype), leaf.shape)
    return leaf + scale * noise
