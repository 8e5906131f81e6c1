"""Modules of Flax NNX as steppers."""

import contextlib
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

Named = dict[str, Array]


def from_flax(
    module: Any,
    *,
    channels_last: bool = False,
    takes_batch: bool = True,
    conditioned: bool = False,
) -> Stepper:
    """A module of Flax NNX as a stepper u -> u_next of one sample.

    Of its variables `nnx.Param` are trained. Streams of random numbers are seeded from
    the key of each update, so that the stepper is stochastic if there are any (dropout).
    All other variables (`nnx.BatchStat`, ...) are the state of the stepper's layers,
    carried through time and training.

    A batch goes through the module in one call, as in a loop written for Flax: batch norm
    needs no `axis_name`, and one draw of dropout serves the batch. In evaluation
    (`eqx.nn.inference_mode`) the module is called after its `eval()`.

    Args:
        module: An `nnx.Module` that maps `(B, ...)` to the same shape. It is not changed.
        channels_last: The module takes `(B, *space, channels)`, as Flax's convolutions
            do. States stay `(channels, *space)`.
        takes_batch: Whether the module wants a batch axis; without, it is mapped over
            samples, and each has a random stream of its own.
        conditioned: The module takes `Inputs(sample, time)`, with that axis, after the
            state.

    Returns:
        A `Stepper` around a `FlaxModel`.

    Raises:
        ValueError: No module of NNX, or one without parameters; a flag that is no bool.
            When called: batch norm that is trained on one sample alone; a module that
            makes new variables when it is called.
        ImportError: Flax is not installed.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import trainax_pk as tx
        >>> from flax import nnx
        >>> model = tx.framework.from_flax(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
        >>> adam = optax.adam(1e-2)
        >>> state = tx.TrainState.create(model, adam, key=jax.random.key(0))
        >>> step = jax.jit(tx.make_train_step(tx.configuration.Supervised(), adam))
        >>> state, info = step(state, jnp.ones((8, 2, 3)))
        >>> tx.framework.to_flax(state.model)(jnp.ones((8, 3))).shape
        (8, 3)
    """
    nnx = load("flax.nnx", "flax")
    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"Expected a module of Flax NNX, got {type(module).__name__}. Pass an "
            "instance of nnx.Module; one of Linen is wrapped by nnx.bridge.ToNNX."
        )
    model, state = eqx.nn.make_with_state(FlaxModel)(
        module,
        channels_last=channels_last,
        takes_batch=takes_batch,
        conditioned=conditioned,
    )
    return Stepper(
        model,
        None if model.index is None else state,
        stochastic=bool(model.rngs),
        conditioned=conditioned,
    )


def to_flax(stepper: Stepper) -> Any:
    """The module of a stepper, with the stepper's weights and layer states.

    Args:
        stepper: What `from_flax` returned, or what a trainer made of it.

    Returns:
        A new `nnx.Module`. Its random streams are those of the module that was adapted.

    Raises:
        ValueError: Another stepper.

    Example:
        >>> import jax
        >>> import trainax_pk as tx
        >>> from flax import nnx
        >>> stepper = tx.framework.from_flax(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> doubled = jax.tree.map(lambda x: 2 * x, stepper)
        >>> module, first = tx.framework.to_flax(doubled), tx.framework.to_flax(stepper)
        >>> bool((module.kernel[...] == 2 * first.kernel[...]).all())
        True
    """
    model, state = taken_apart(stepper, FlaxModel, "flax")
    return model.module(model.params, model.variables(state), model.streams(None))


class FlaxModel(AbstractAdapted):
    """A module of Flax NNX as a PyTree of arrays; `from_flax` makes it.

    Attributes:
        params: What is trained, by its place in the module.
        rngs: Random streams of the module, as integers.
        index: Where the state of the layers is, or None.
        inference: Whether the module is evaluated; `eqx.nn.inference_mode` sets it.
        structure: The rest of the module; hashable.
        channels_last: As for `from_flax`.
        takes_batch: Likewise.
        conditioned: Likewise.

    Example:
        >>> import trainax_pk as tx
        >>> from flax import nnx
        >>> stepper = tx.framework.from_flax(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> {name: x.shape for name, x in stepper.module.params.items()}
        {'bias': (3,), 'kernel': (2, 3)}
    """

    kind = "a module of Flax"
    params: Named
    rngs: Named
    index: eqx.nn.StateIndex | None
    inference: bool
    structure: "_Structure" = eqx.field(static=True)
    channels_last: bool = eqx.field(static=True)
    takes_batch: bool = eqx.field(static=True)
    conditioned: bool = eqx.field(static=True)

    def __init__(
        self, module: Any, *, channels_last: bool, takes_batch: bool, conditioned: bool
    ) -> None:
        self.channels_last = check_flag("channels_last", channels_last)
        self.takes_batch = check_flag("takes_batch", takes_batch)
        self.conditioned = check_flag("conditioned", conditioned)
        self.structure = structure = _Structure(module)
        params, rngs, variables = structure.split(module)[1]
        if not params:
            raise ValueError(
                f"Expected a module with parameters to train, got "
                f"{type(module).__name__} without any. Build it with rngs=nnx.Rngs(0)."
            )
        self.params = params
        self.rngs = {
            n: jax.random.key_data(x) if _is_key(x) else x for n, x in rngs.items()
        }
        self.index = eqx.nn.StateIndex(variables) if variables else None
        self.inference = False

    @property
    def has_batch_statistics(self) -> bool:
        """Whether its layers average over a batch."""
        return self.structure.has_batch_statistics

    def through(
        self,
        variables: Named,
        u: PyTree[Array],
        inputs: Inputs,
        key: PRNGKeyArray | None,
    ) -> tuple[PyTree[Array], Any]:
        """The next state of one sample, and the layers' state."""
        call = call_whole if self.takes_batch else _call_sample
        return call(self._apply, self.params, variables, u, inputs, key)

    def variables(self, state: eqx.nn.State | None) -> Named:
        """State of the layers by place in the module."""
        return {} if self.index is None else state.get(self.index)

    def streams(self, key: PRNGKeyArray | None) -> Named:
        """Random streams that begin at a key, or as they were."""
        impls = self.structure.key_impls
        if key is None:
            return {n: _as_stream(x, impls.get(n)) for n, x in self.rngs.items()}
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        counts = {n: jnp.zeros_like(x) for n, x in self.rngs.items()}
        keys = {}
        for i, n in enumerate(sorted(impls)):
            keys[n] = jax.random.fold_in(key, i)
            # Of layers that are stacked (`nnx.vmap`), each has a key of its own.
            if stack := self.rngs[n].shape[:-1]:
                keys[n] = jax.random.split(keys[n], stack)
        return counts | keys

    def module(self, params: Named, variables: Named, rngs: Named) -> Any:
        """A module of these values."""
        return self.structure.merge(params, rngs, variables)

    def _apply(
        self,
        params: Named,
        variables: Named,
        u: PyTree[Array],
        inputs: Inputs,
        key: PRNGKeyArray | None,
    ) -> tuple[PyTree[Array], Named]:
        module = self.module(params, variables, self.streams(key))
        if self.inference:
            with _sharing(load("flax.nnx", "flax")):
                module.eval()
        axis = 1 if self.takes_batch else 0
        if self.channels_last:
            u = channels_to_end(u, axis)
        out = module(u, inputs) if self.conditioned else module(u)
        out = in_precision(out, u, params)
        after, (_, _, new) = self.structure.split(module)
        if after != self.structure.names:
            odd = sorted({*after[0], *after[2]} ^ {*params, *variables})
            raise ValueError(
                f"Expected a module that keeps its variables, got changes of {odd} in a "
                "call. Make variables when the module is built, and do not sow."
            )
        return channels_to_front(out, axis) if self.channels_last else out, new


class _Structure:
    """What of a module is no array; equal where modules are alike, and hashable."""

    def __init__(self, module: Any) -> None:
        nnx = load("flax.nnx", "flax")
        self.filters = (nnx.Param, nnx.RngState)
        with _sharing(nnx):
            self.graph, *states = nnx.split(module, *self.filters, ...)
            statistics = nnx.state(module, nnx.BatchStat)
            self._parts = list(_parts(nnx, module))
        self.treedefs = tuple(jax.tree.structure(s) for s in states)
        self.names, (_, rngs, _) = self.split(module)
        self.key_impls = {
            n: str(jax.random.key_impl(x)) for n, x in rngs.items() if _is_key(x)
        }
        self.has_batch_statistics = bool(jax.tree.leaves(statistics))

    def split(
        self, module: Any
    ) -> tuple[tuple[tuple[str, ...], ...], tuple[Named, ...]]:
        """Names in the order of the treedefs, and values by name: parameters, random
        streams, the rest."""
        nnx = load("flax.nnx", "flax")
        with _sharing(nnx):
            _, *states = nnx.split(module, *self.filters, ...)
        found = [jax.tree_util.tree_leaves_with_path(s) for s in states]
        names = tuple(tuple(_name(path) for path, _ in leaves) for leaves in found)
        values = tuple({_name(path): x for path, x in leaves} for leaves in found)
        return names, values

    def merge(self, *values: Named) -> Any:
        """The module of some values, each by name."""
        nnx = load("flax.nnx", "flax")
        states = [
            treedef.unflatten([named[n] for n in names])
            for treedef, names, named in zip(
                self.treedefs, self.names, values, strict=True
            )
        ]
        with _sharing(nnx):
            return nnx.merge(self.graph, *states)

    def content_hash(self) -> str:
        """Of classes, their code and settings: the same for modules built alike."""
        return hash_content(self.names, *self._parts, versions=False)

    def _key(self) -> Any:
        return (self.graph, self.treedefs, self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _sharing(nnx: Any) -> Any:
    """Lets modules share variables, for which newer versions have to be asked."""
    mode = getattr(nnx, "set_graph_mode", None)
    return contextlib.nullcontext() if mode is None else mode(True)  # noqa: FBT003


def _call_sample(network: Any, *arguments: Any) -> Any:
    return network(*arguments)


def _as_stream(x: Array, impl: str | None) -> Array:
    return x if impl is None else jax.random.wrap_key_data(x, impl=impl)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _name(path: tuple[Any, ...]) -> str:
    """`layers.0.kernel`; what NNX puts below a variable is left out."""
    names = []
    for entry in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                names.append(str(getattr(entry, attribute)))
                break
    inner = isinstance(path[-1], jax.tree_util.GetAttrKey) and len(names) > 1
    return ".".join(names[:-1] if inner else names)


def _parts(nnx: Any, module: Any) -> Any:
    """Class and settings of every module in a module."""
    kinds = (nnx.Variable, nnx.Module, jax.Array)
    for path, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.Module):
            continue
        settings = {}
        for name, value in sorted(vars(node).items()):
            if name.startswith(("_pytree__", "_object__")) or _holds(value, kinds):
                continue
            try:
                settings[name] = hash_content(value, versions=False)
            except TypeError:
                settings[name] = type(value).__name__
        yield tuple(map(str, path)), type(node), settings


def _holds(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether something in a setting is a part of the module that is met by itself."""
    leaves = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, kinds))
    return any(isinstance(x, kinds) for x in leaves)
