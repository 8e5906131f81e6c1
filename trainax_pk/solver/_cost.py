"""The variational cost: how far a state is from the observations and from the prior."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from trainax_pk._tree import check_flag
from trainax_pk.solver._prior import check_prior


class Weight(eqx.Module):
    """A number that training leaves alone, or a positive one that it learns.

    Or one number for each step of a solver, all positive: `at(n)` is that of step n,
    `value()` that of the last.

    Attributes:
        fixed: The number or numbers, or None.
        logarithm: What is learned, or None.

    Raises:
        ValueError: A negative or infinite number; 0 where it is to be learned or where
            there is one for each step.

    Example:
        >>> from trainax_pk.solver import Weight
        >>> round(float(Weight(0.5, learned=True).value()), 6)
        0.5
        >>> rising = Weight([1.0, 10.0])
        >>> round(float(rising.at(0).value()), 6), rising.value(), rising.num_steps
        (1.0, 10.0, 2)
    """

    fixed: float | tuple[float, ...] | None = eqx.field(static=True)
    logarithm: Float[Array, "..."] | None

    def __init__(
        self,
        value: float | Sequence[float],
        *,
        learned: bool = False,
        name: str = "weight",
    ) -> None:
        check_flag("learned", learned)
        numbers = _numbers(value, name)
        several = np.ndim(value) == 1
        if (learned or several) and 0 in numbers:
            raise ValueError(
                f"Expected `{name}` > 0 where it is learned or changes from step to "
                f"step, got {value!r}: it is kept positive by its logarithm. Start from "
                "a small number."
            )
        fixed = numbers if several else numbers[0]
        self.fixed = None if learned else fixed
        self.logarithm = jnp.log(jnp.asarray(fixed)) if learned else None

    @property
    def num_steps(self) -> int | None:
        """How many steps there are numbers for; None for one number."""
        if self.logarithm is None:
            return len(self.fixed) if isinstance(self.fixed, tuple) else None
        return self.logarithm.shape[0] if self.logarithm.ndim else None

    def value(self) -> Any:
        """The number: a Python float, or a positive array."""
        if self.logarithm is None:
            return self.fixed[-1] if isinstance(self.fixed, tuple) else self.fixed
        return jnp.exp(self.logarithm[-1] if self.logarithm.ndim else self.logarithm)

    def at(self, step: int | Array) -> "Weight":
        """The weight of a step; itself where there is one number.

        Raises:
            IndexError: A step that there is no number for.
        """
        if self.num_steps is None:
            return self
        if isinstance(step, int) and not 0 <= step < self.num_steps:
            raise IndexError(
                f"Expected a step from 0 to {self.num_steps - 1}, got {step}: there is "
                "one weight for each of them."
            )
        logarithms = (
            jnp.log(jnp.asarray(self.fixed))
            if self.logarithm is None
            else self.logarithm
        )
        one = Weight(1.0, learned=True)
        return eqx.tree_at(lambda w: w.logarithm, one, logarithms[step])


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    try:
        numbers = np.asarray(value)
    except ValueError:
        numbers = np.asarray(None)  # of no shape that arrays have
    kind_is_right = numbers.dtype.kind in "iuf" and numbers.ndim < 2 and numbers.size
    if not kind_is_right or not np.all(np.isfinite(numbers) & (numbers >= 0)):
        raise ValueError(
            f"Expected `{name}` to be a finite number >= 0, or one for each step, got "
            f"{value!r}. Pass a Python float or a list of them."
        )
    return tuple(float(v) for v in numbers.reshape(-1))


class VariationalCost(eqx.Module):
    """U(x) = w_o ‖m ⊙ (H(x) − y)‖² + w_p ‖x − Φ(x)‖² + w_b ‖x_0 − x^b‖² of one window.

    x: state `(T, *space)`; y: observations and m: mask, of the shape that H returns;
    x^b: background, what is known of the first state before the window is observed;
    sums over all entries, so that with w_o = 1/σ² and a linear-Gaussian prior U/2 is the
    negative log posterior up to a constant.

    The background differs from window to window: `about(x_b)` is the cost of one.
    Solvers take the first state of `batch.initial`, or what was set by `about`, which
    then is the background of all windows. Without w_b there is none.

    What stands in y where m does not hold is never read.

    A weight may be given for each step of a solver: prior weights that rise make a cost
    that is smooth at first and tight at last, whose good minima are found from further
    away (graduated, Blake and Zisserman 1987). `at(n)` is the cost of step n; called
    itself, the cost is that of the last.

    Attributes:
        prior: Φ, any function of one state.
        observation: H, any function of one state; None is the identity.
        observation_weight: w_o.
        prior_weight: w_p.
        background_weight: w_b.
        background: x^b, or None before `about`. Like all arrays of a model it is trained
            where a whole cost is: set it inside the loss, or leave it to the solvers.

    Raises:
        ValueError: A prior or operator that is not callable, negative weights; when
            called, an H(x) of another shape than y, a Φ(x) of another shape than x, a
            weight of a background without one.

    Source: Fablet et al. 2021, doi:10.1029/2021MS002572.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.solver import VariationalCost
        >>> cost = VariationalCost(lambda x: x / 2, prior_weight=4.0)
        >>> x, y = jnp.array([[2.0], [4.0]]), jnp.array([[1.0], [jnp.nan]])
        >>> float(cost(x, y, ~jnp.isnan(y)))  # (2 - 1)² + 4 (1² + 2²)
        21.0
        >>> cost = VariationalCost(lambda x: x / 2, background_weight=2.0)
        >>> cost = cost.about(jnp.array([5.0]))
        >>> float(cost(x, y, ~jnp.isnan(y)))  # (2 - 1)² + 1² + 2² + 2 (2 - 5)²
        24.0
    """

    prior: Callable[[Array], Array]
    observation: Callable[[Array], Array] | None
    observation_weight: Weight
    prior_weight: Weight
    background_weight: Weight
    background: Float[Array, "..."] | None

    def __init__(
        self,
        prior: Callable[[Array], Array],
        observation: Callable[[Array], Array] | None = None,
        *,
        observation_weight: float | Sequence[float] = 1.0,
        prior_weight: float | Sequence[float] = 1.0,
        background_weight: float | Sequence[float] = 0.0,
        learn_weights: bool = False,
    ) -> None:
        """Checks and keeps.

        Args:
            prior: Φ.
            observation: H.
            observation_weight: w_o >= 0, or a positive number for each step.
            prior_weight: w_p >= 0, or a positive number for each step.
            background_weight: w_b >= 0, or a positive number for each step.
            learn_weights: Train the logarithms of the weights; that of a background
                which is 0 stays 0.
        """
        self.prior = check_prior(prior)
        check_flag("learn_weights", learn_weights)
        if observation is not None and not callable(observation):
            raise ValueError(
                f"Expected `observation` to be a function x -> H(x) of one state or "
                f"None, got {observation!r}. None observes the state itself."
            )
        self.observation = observation
        self.observation_weight, self.prior_weight, self.background_weight = (
            Weight(weight, learned=learned, name=name)
            for name, weight, learned in (
                ("observation_weight", observation_weight, learn_weights),
                ("prior_weight", prior_weight, learn_weights),
                (
                    "background_weight",
                    background_weight,
                    learn_weights and not _is_zero(background_weight),
                ),
            )
        )
        self.background = None
        counts = {w.num_steps for w in self._weights()} - {None}
        if len(counts) > 1:
            raise ValueError(
                "Expected as many weights of each kind where several change from step "
                f"to step, got {sorted(counts)}. Pass one number for each step of the "
                "solver, or one for all."
            )

    def __call__(
        self,
        x: Float[Array, "T ..."],
        y: Float[Array, "..."],
        mask: Bool[Array, "..."],
    ) -> Float[Array, ""]:
        """U(x)."""
        weights, parts = self.weights(), map(_squares, self.parts(x, y, mask))
        # Weights may be of another precision than states.
        return sum(
            (w * part).astype(part.dtype)
            for w, part in zip(weights, parts, strict=True)
        )

    def parts(
        self,
        x: Float[Array, "T ..."],
        y: Float[Array, "..."],
        mask: Bool[Array, "..."],
    ) -> tuple[Float[Array, "..."], ...]:
        """What U squares, without the weights.

        m ⊙ (H(x) − y), x − Φ(x) and, with w_b, x_0 − x^b.
        """
        observed = x if self.observation is None else self.observation(x)
        projected = self.prior(x)
        for name, got, like in (("H(x)", observed, y), ("Φ(x)", projected, x)):
            if jnp.shape(got) != jnp.shape(like):
                raise ValueError(
                    f"Expected {name} to have the shape {list(jnp.shape(like))}, got "
                    f"{list(jnp.shape(got))}. Where states and observations differ in "
                    "shape, give the batch an `initial` state and the cost an "
                    "`observation` operator."
                )
        # Both selections before the difference: no NaN of a gap enters a product.
        y = jnp.where(mask, y, jnp.zeros((), y.dtype))
        misfit = jnp.where(mask, observed - y, jnp.zeros((), observed.dtype))
        if not self.has_background:
            return misfit, x - projected
        if self.background is None or self.background.shape != x.shape[1:]:
            got = None if self.background is None else list(self.background.shape)
            raise ValueError(
                f"Expected a background of the shape {list(x.shape[1:])} beside "
                f"`background_weight`, got {got}. Call cost.about(x_b) first; solvers "
                "do."
            )
        return misfit, x - projected, x[0] - self.background.astype(x.dtype)

    def about(self, background: Float[Array, "..."]) -> "VariationalCost":
        """The cost of a window whose first state is expected to be `background`."""
        if not self.has_background:
            raise ValueError(
                "Expected a `background_weight` > 0 before a background, got 0: it would "
                "change nothing. Build the cost with one."
            )
        background = jnp.asarray(background)
        where = lambda c: c.background  # noqa: E731
        return eqx.tree_at(where, self, background, is_leaf=lambda x: x is None)

    @property
    def has_background(self) -> bool:
        """Whether w_b is more than 0."""
        return self.background_weight.fixed != 0

    def weights(self) -> tuple[Any, ...]:
        """Those of `parts`, in their order."""
        return tuple(w.value() for w in self._weights())[
            : 3 if self.has_background else 2
        ]

    def _weights(self) -> tuple[Weight, Weight, Weight]:
        return self.observation_weight, self.prior_weight, self.background_weight

    def gradient(
        self,
        x: Float[Array, "T ..."],
        y: Float[Array, "..."],
        mask: Bool[Array, "..."],
    ) -> Float[Array, "T ..."]:
        """∇U(x), through H and Φ."""
        return jax.grad(self)(x, y, mask)

    @property
    def num_steps(self) -> int | None:
        """How many steps there are weights for; None where they do not change."""
        return next((w.num_steps for w in self._weights() if w.num_steps), None)

    def at(self, step: int | Array) -> "VariationalCost":
        """The cost of a solver's step."""
        weights = tuple(weight.at(step) for weight in self._weights())
        return eqx.tree_at(VariationalCost._weights, self, weights)


def _squares(x: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x))


def _is_zero(weight: Any) -> bool:
    try:
        return np.ndim(weight) == 0 and bool(weight == 0)
    except ValueError:  # numbers of uneven rows: refused as a weight
        return False


def backgrounds(cost: VariationalCost, batch: Any) -> tuple[Float[Array, "B ..."], ...]:
    """The first state of every window's start where the cost asks for it, or nothing."""
    if not cost.has_background or cost.background is not None:
        return ()
    if batch.initial is None:
        raise ValueError(
            "Expected a batch with `initial` beside `background_weight`, got None: the "
            "first state of the start is the background, and zeros in the gaps of the "
            "observations say nothing. Pass a forecast, an interpolation or the states "
            "of a network, or set one background for all by cost.about(x_b)."
        )
    return (batch.initial[:, 0],)
