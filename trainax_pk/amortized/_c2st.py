"""Classifier two-sample test, its folds trained side by side."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from trainax_pk._tree import check_count


class _Options(eqx.Module):
    width: int
    batch_size: int
    max_epochs: Array
    patience: int
    tolerance: float
    penalty: float


def c2st(
    samples: Float[Array, "n d"],
    reference: Float[Array, "n d"],
    *,
    key: PRNGKeyArray | None = None,
    num_folds: int = 5,
    max_epochs: int = 1000,
) -> Float[Array, ""]:
    """Accuracy of a classifier that tells two sets of samples apart: 0.5 if they agree.

    The protocol of the sbibm benchmark, so that figures may be compared: samples scaled
    by the reference's mean and standard deviation; a perceptron of two hidden layers of
    10 d units (ReLU); Adam(1e-3) on batches of 200 with an L2 penalty of 1e-4, until the
    training loss has not fallen by 1e-4 for 10 epochs; accuracy over `num_folds` held-out
    parts, averaged. Folds are vmapped in one compiled program.

    Where sets differ in fine structure, training ends in a good or a bad minimum depending
    on the first weights, and the accuracy may vary by 0.2 with them. The benchmark fixes
    them; so does key=None, with the same numbers.

    Args:
        samples: One set, `(n, d)`.
        reference: The other, `(n, d)`.
        key: Key of folds, weights and order. None for the benchmark's folds and first
            weights, which are scikit-learn's for random_state=1, the same in every fold.
        num_folds: Parts that take turns at being held out.
        max_epochs: Limit.

    Returns:
        Accuracy. Its standard error is near 0.5 / √(2 n).

    Raises:
        ValueError: Sets of different shapes, of fewer than 10 samples per fold, or that
            are not finite.

    Source: Lopez-Paz & Oquab 2017, arXiv:1610.06545; Lueckmann et al. 2021,
    arXiv:2101.04653.

    Example:
        >>> import jax
        >>> import trainax_pk as tx
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> x, y = (jax.random.normal(k, (500, 2)) for k in keys[:2])
        >>> near = tx.amortized.c2st(x, y, key=keys[2], max_epochs=20)
        >>> far = tx.amortized.c2st(x + 3, y, key=keys[2], max_epochs=20)
        >>> bool(near < 0.6), bool(far > 0.9)
        (True, True)
    """
    check_count("num_folds", num_folds, minimum=2)
    check_count("max_epochs", max_epochs)
    samples, reference = (np.asarray(x, np.float32) for x in (samples, reference))
    if samples.ndim != 2 or samples.shape != reference.shape:
        raise ValueError(
            f"Expected two sets of the same shape (n, d), got {samples.shape} and "
            f"{reference.shape}. Draw as many of each: with unequal sets 0.5 is not what "
            "agreement reads."
        )
    if samples.shape[0] < 10 * num_folds:
        raise ValueError(
            f"Expected at least {10 * num_folds} samples for {num_folds} folds, got "
            f"{samples.shape[0]}. Draw more, or pass fewer folds."
        )
    if not (np.isfinite(samples).all() and np.isfinite(reference).all()):
        raise ValueError("Expected finite samples. Leave out those that are not.")
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    scale = np.where(std > 0, std, 1.0)
    x = np.concatenate([(s - mean[None]) / scale[None] for s in (samples, reference)])
    y = np.repeat(np.float32([0, 1]), samples.shape[0])
    options = _Options(10 * x.shape[1], 200, jnp.asarray(max_epochs), 10, 1e-4, 1e-4)
    order, networks, key = _begin(x.shape, options.width, key, num_folds)
    rank = jax.numpy_rank_promotion("allow")
    with rank, jax.default_matmul_precision("float32"):
        rows = jnp.asarray(x), jnp.asarray(y), order
        return jnp.mean(_accuracies(*rows, networks, key, options))


def _begin(
    shape: tuple[int, int], width: int, key: PRNGKeyArray | None, num_folds: int
) -> tuple[Array, Any, PRNGKeyArray]:
    """Rows of each fold, first weights of each fold, and the key of the order."""
    num, dim = shape
    size = num // num_folds
    if key is None:
        # The legacy generator is the one that scikit-learn draws from.
        order = np.random.RandomState(1).permutation(num)
        network = _benchmark_network(np.random.RandomState(1), dim, width)
        networks = jax.tree.map(lambda w: jnp.stack([w] * num_folds), network)
        key = jax.random.key(1)
    else:
        order_key, network_key, key = jax.random.split(key, 3)
        order = jax.random.permutation(order_key, num)
        keys = jax.random.split(network_key, num_folds)
        networks = jax.vmap(lambda k: _network(k, dim, width))(keys)
    parts = jnp.asarray(order)[: size * num_folds].reshape(num_folds, size)
    return parts, networks, key


@eqx.filter_jit
def _accuracies(
    x: Array,
    y: Array,
    parts: Array,
    networks: Any,
    key: PRNGKeyArray,
    options: _Options,
) -> Float[Array, " folds"]:
    num_folds = parts.shape[0]

    def fold(i: Array, network: Any, key: PRNGKeyArray) -> Array:
        # The parts behind the i-th, around the corner.
        train = jnp.roll(parts, -i - 1, axis=0)[:-1].reshape(-1)
        network = _train(x[train], y[train], network, key, options)
        return jnp.mean((_logit(network, x[parts[i]]) > 0) == (y[parts[i]] > 0.5))

    keys = jax.random.split(key, num_folds)
    return jax.vmap(fold)(jnp.arange(num_folds), networks, keys)


def _train(
    x: Array, y: Array, network: Any, key: PRNGKeyArray, options: _Options
) -> Any:
    adam = optax.adam(1e-3)
    num = x.shape[0]
    num_batches = -(-num // options.batch_size)
    # The last batch is filled up with rows of no weight.
    filled = num_batches * options.batch_size

    def loss_fn(network: Any, rows: Array, weight: Array) -> Array:
        losses = optax.sigmoid_binary_cross_entropy(_logit(network, x[rows]), y[rows])
        squares = sum(jnp.sum(w**2) for w, _ in network)
        penalty = 0.5 * options.penalty * squares
        return (jnp.sum(weight * losses) + penalty) / jnp.sum(weight)

    def update(carry: Any, batch: Any) -> tuple[Any, Array]:
        network, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(network, *batch)
        updates, state = adam.update(grads, state)
        network = optax.apply_updates(network, updates)
        return (network, state), loss * jnp.sum(batch[1])

    def epoch(carry: Any) -> Any:
        network, state, best, waited, i = carry
        order = jax.random.permutation(jax.random.fold_in(key, i), num)
        rows = jnp.pad(order, (0, filled - num)).reshape(num_batches, -1)
        weight = (jnp.arange(filled) < num).astype(x.dtype).reshape(num_batches, -1)
        (network, state), losses = jax.lax.scan(
            update, (network, state), (rows, weight)
        )
        loss = jnp.sum(losses) / num
        waited = jnp.where(loss > best - options.tolerance, waited + 1, 0)
        return network, state, jnp.minimum(best, loss), waited, i + 1

    def goes_on(carry: Any) -> Array:
        return (carry[3] <= options.patience) & (carry[4] < options.max_epochs)

    zero = jnp.zeros((), jnp.int32)
    start = (network, adam.init(network), jnp.asarray(jnp.inf, x.dtype), zero, zero)
    return jax.lax.while_loop(goes_on, epoch, start)[0]


def _network(key: PRNGKeyArray, dim: int, width: int) -> list[tuple[Array, Array]]:
    """Glorot's uniform weights, biases within the same limits."""
    sizes = [(dim, width), (width, width), (width, 1)]
    layers = []
    for layer_key, (n, m) in zip(jax.random.split(key, 3), sizes, strict=True):
        limit = (6 / (n + m)) ** 0.5
        numbers = jax.random.uniform(
            layer_key, (n + 1, m), jnp.float32, minval=-limit, maxval=limit
        )
        layers.append((numbers[1:], numbers[0]))
    return layers


def _benchmark_network(
    random: np.random.RandomState, dim: int, width: int
) -> list[tuple[Array, Array]]:
    """As `_network`, in the order in which scikit-learn draws."""
    layers = []
    for n, m in [(dim, width), (width, width), (width, 1)]:
        limit = (6 / (n + m)) ** 0.5
        weight = random.uniform(-limit, limit, (n, m)).astype(np.float32)
        bias = random.uniform(-limit, limit, m).astype(np.float32)
        layers.append((jnp.asarray(weight), jnp.asarray(bias)))
    return layers


def _logit(network: Any, x: Float[Array, "n d"]) -> Float[Array, " n"]:
    *hidden, (weight, bias) = network
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return (x @ weight + bias)[:, 0]
