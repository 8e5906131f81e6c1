"""The content hash: what changes numbers changes it, and nothing else does."""

import dataclasses
import enum
import functools
import linecache
import subprocess
import sys
import textwrap
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainax_pk as tx
from trainax_pk.data import (
    BoxUniform,
    Normal,
    Observation,
    Parametric,
    SimulationDataset,
    StepperModel,
    _hash_code,
    hash_content,
)

GRAVITY = 9.81
TABLE = np.arange(4.0)


def factor(x):
    return 2.0 * x


def falls(t):
    """Docstrings, comments and names are no content."""
    return factor(GRAVITY) * t  # a comment


def defined(source, **names):
    """Functions of a source text, compiled as if they stood in a file."""
    defined.count += 1
    file = f"/nowhere/module_{defined.count}.py"
    text = textwrap.dedent(source)
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace = {"__name__": "somewhere", "jnp": jnp, "np": np, **names}
    exec(compile(text, file, "exec"), namespace)
    return namespace


defined.count = 0

BASE = """
C = 3.0
def helper(x):
    return x * C
def model(x, power=2):
    y = helper(x) ** power
    return jnp.sin(y) + 1
"""

# What is edited, and whether the numbers change.
EDITS = {
    "comment": ("    y = helper", "    # why\n    y = helper", False),
    "docstring": ("    y = helper", '    "What."\n    y = helper', False),
    "blank lines": ("def model", "\n\n\ndef model", False),
    "formatting": ("helper(x) ** power", "( helper( x )**power )", False),
    "annotation": ("def model(x,", "def model(x: float,", False),
    "unrelated global": ("C = 3.0", "C = 3.0\nD = 4.0", False),
    "helper's name": ("helper", "helped", True),
    "constant in a helper": ("C = 3.0", "C = 3.5", True),
    "type of a constant": ("C = 3.0", "C = 3", True),
    "literal": ("+ 1", "+ 2", True),
    "operator": ("x * C", "x / C", True),
    "default": ("power=2", "power=3", True),
    "library function": ("jnp.sin", "jnp.cos", True),
    "order of statements": (
        "    y = helper(x) ** power\n",
        "    x = x + 0\n    y = helper(x) ** power\n",
        True,
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_code(edit):
    old, new, changes = EDITS[edit]
    assert old in BASE
    before = hash_content(defined(BASE)["model"])
    after = hash_content(defined(BASE.replace(old, new))["model"])
    assert (before != after) == changes
    assert before == hash_content(defined(BASE)["model"])


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Point:
    x: float
    y: object = None


class Plain:
    scale = 2.0

    def __init__(self, value):
        self.value = value

    def __call__(self, x):
        return self.scale * self.value * x


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


def make(offset):
    return lambda x: x + offset


DIFFERENT = {
    "numbers": (1, 1.0, True, 1j, "1", b"1", None, (1,), [1]),
    "floats": (0.0, -0.0, np.nextafter(0.0, 1.0), float("nan"), float("inf")),
    "arrays": (
        np.arange(3),
        np.arange(3.0),
        np.arange(3.0, dtype=np.float32),
        np.arange(3)[None],
        np.arange(3)[:, None],
        np.array([0, 2, 1]),
    ),
    "keys": (
        jax.random.key(0),
        jax.random.key(1),
        jax.random.key_data(jax.random.key(0)),
    ),
    "containers": ({"a": 1}, {"a": 2}, {"b": 1}, {1, 2}, {1}, [[1], 2], [1, [2]]),
    "dataclasses": (Point(1.0), Point(2.0), Point(1.0, 0), Slotted(1.0)),
    "enums": (Colour.RED, Colour.BLUE, 1),
    "instances": (Plain(1.0), Plain(2.0), Plain(np.ones(2))),
    "closures": (make(1.0), make(2.0), make(np.ones(2))),
    "partials": (
        functools.partial(factor, 1.0),
        functools.partial(factor, 2.0),
        functools.partial(falls, 1.0),
        factor,
    ),
    "two lambdas on a line": (lambda x: x + 1, lambda x: x + 2),
    "nested lambdas": (lambda x: (lambda y: y)(x), (lambda x: lambda y: y)(0)),
    "library": (jnp.sin, jnp.cos, np.sin, jax.nn.relu, sum, eqx.nn.Linear),
    "methods": (Plain(1.0).__call__, Plain(2.0).__call__),
    "modules": tuple(
        eqx.nn.Linear(2, 2, key=jax.random.key(i), use_bias=bool(i)) for i in (0, 1)
    ),
    "jit": (jax.jit(factor), jax.jit(falls)),
    "shapes": tuple(jax.ShapeDtypeStruct((n,), float) for n in (1, 2)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_content_differs(name):
    hashes = [hash_content(x) for x in DIFFERENT[name]]
    assert len(set(hashes)) == len(hashes)


EQUAL = {
    "array of numpy and of jax": (np.arange(3.0), jnp.arange(3.0)),
    "order of a dictionary": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "order of a set": ({"x", "y", "z"}, {"z", "y", "x"}),
    "memory layout": (
        np.arange(6.0).reshape(2, 3).T.copy(),
        np.arange(6.0).reshape(2, 3).T,
    ),
    "byte order": (np.arange(3, dtype=">i4"), np.arange(3, dtype="<i4")),
    "closures over equal values": (make(np.ones(3)), make(jnp.ones(3))),
    "instances": (Plain(1.5), Plain(1.5)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_content_is_equal(name):
    a, b = EQUAL[name]
    assert hash_content(a) == hash_content(b)


def test_globals_are_followed(monkeypatch):
    module = sys.modules[__name__]
    before = hash_content(falls)
    monkeypatch.setattr(module, "GRAVITY", 9.80665)
    changed = hash_content(falls)
    monkeypatch.setattr(module, "GRAVITY", 9.81)
    assert changed != before == hash_content(falls)
    # A helper of a helper.
    monkeypatch.setattr(module, "factor", lambda x: 2.5 * x)
    assert hash_content(falls) != before
    before = hash_content(Plain(1.0))
    monkeypatch.setattr(Plain, "scale", 3.0)
    assert hash_content(Plain(1.0)) != before


def test_cycles_end():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    loop = [1.0]
    loop.append(loop)
    assert len({hash_content(even), hash_content(odd), hash_content(loop)}) == 3


class Attributes:
    """Class attributes of all kinds, one of which is changed."""

    dt = 1.0
    array, device_array = np.eye(3), jnp.eye(3)
    numbers, nested = frozenset({1.0}), Point(1.0)
    partial = functools.partial(jnp.multiply, 2.0)
    colour, none = Colour.RED, None
    __slots__ = ("a",)


CLASS_ATTRIBUTES = {
    "array": 2 * np.eye(3),
    "device_array": 2 * jnp.eye(3),
    "numbers": frozenset({2.0}),
    "nested": Point(2.0),
    "partial": functools.partial(jnp.multiply, 3.0),
    "colour": Colour.BLUE,
    "none": np.zeros(2),
}


@pytest.mark.parametrize("name", CLASS_ATTRIBUTES)
def test_class_attributes_count(name, monkeypatch):
    class Module(eqx.Module):
        A = getattr(Attributes, name)

    before = hash_content(Attributes()), hash_content(Module())
    monkeypatch.setattr(Attributes, name, CLASS_ATTRIBUTES[name])
    assert hash_content(Attributes()) != before[0]
    Module.A = CLASS_ATTRIBUTES[name]
    assert hash_content(Module()) != before[1]


def test_what_cannot_be_known_in_a_class_is_refused_too():
    class Locked:
        lock = threading.Lock()

    with pytest.raises(TypeError, match=r"lock.*Locked\.lock"):
        hash_content(Locked())


def decorated(decorator, factor):
    class Model(eqx.Module):
        @decorator
        def step(self, u):
            return factor * u

    return Model()


DECORATORS = (jax.jit, eqx.filter_jit, functools.partial(jax.vmap, in_axes=(None, 0)))


@pytest.mark.parametrize("decorator", DECORATORS, ids=["jit", "filter_jit", "vmap"])
def test_decorated_methods_count(decorator):
    one, two = decorated(decorator, 1.0), decorated(decorator, 2.0)
    assert hash_content(one) == hash_content(decorated(decorator, 1.0))
    assert hash_content(one) != hash_content(two)


def ratio(x):
    return x / x[0]


def weighted(x, y):
    return (x * y * y).sum()


WRAPPERS = {
    "vmap": lambda axis: jax.vmap(ratio, in_axes=axis),
    "filter_vmap": lambda axis: eqx.filter_vmap(ratio, in_axes=axis),
    "grad": lambda axis: jax.grad(weighted, argnums=axis),
    "value_and_grad": lambda axis: jax.value_and_grad(weighted, argnums=axis),
    "hessian": lambda axis: jax.hessian(weighted, argnums=axis),
    "vectorize": lambda n: jnp.vectorize(
        ratio, signature=["(n)->(n)", "(n,m)->(m)"][n]
    ),
    "custom_vjp": lambda n: jax.custom_vjp(weighted, nondiff_argnums=(n,)),
    "nested": lambda axis: jax.jit(jax.vmap(jax.vmap(ratio, in_axes=axis))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_settings_of_wrappers_count(name):
    wrap = WRAPPERS[name]
    assert hash_content(wrap(0)) == hash_content(wrap(0))
    assert hash_content(wrap(0)) != hash_content(wrap(1))


@dataclasses.dataclass
class Base:
    dt: float = 1.0


class Beside(Base):
    def __init__(self, k):
        super().__init__()
        self.k = k

    @functools.cached_property
    def square(self):
        return self.k**2


class SlottedToo(Slotted):
    def __init__(self, a):
        super().__init__(a)
        self.b = 1


def test_state_beside_fields_and_in_slots_counts():
    for kind in (Beside, SlottedToo):
        assert hash_content(kind(1.0)) == hash_content(kind(1.0))
        assert hash_content(kind(1.0)) != hash_content(kind(2.0))
    used = Beside(2.0)
    assert used.square == 4.0
    assert hash_content(used) == hash_content(Beside(2.0))


def test_without_versions_an_upgrade_changes_nothing(monkeypatch):
    def f(u):
        return jnp.sin(falls(u))

    one = tx.configuration.Supervised(2)
    before = hash_content(f, versions=False), hash_content(f)
    monkeypatch.setattr(_hash_code, "version_of", lambda top: "99")
    assert hash_content(f, versions=False) == before[0]
    assert hash_content(f) != before[1]
    # This package's own code is not walked either; what an object holds is.
    assert hash_content(one, versions=False) != hash_content(one)
    two = tx.configuration.Supervised(3)
    assert hash_content(one, versions=False) != hash_content(two, versions=False)


def test_what_knows_its_content_is_asked():
    class Knows:
        def __init__(self, name):
            self.lock = threading.Lock()
            self.name = name

        def content_hash(self):
            return self.name

    assert hash_content(Knows("a")) != hash_content(Knows("b"))
    assert hash_content([Knows("a")]) == hash_content([Knows("a")])


def test_what_cannot_be_known_is_refused_by_place():
    with pytest.raises(TypeError, match=r"lock.*part 0\['model'\]\.value"):
        hash_content({"model": Plain(threading.Lock())})
    with pytest.raises(TypeError, match="generator"):
        hash_content(x for x in range(3))
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda x: hash_content(x))(1.0)


# The dataset


def stepper(u):
    return 0.9 * u + GRAVITY * jnp.asarray(TABLE)


class Decay(eqx.Module):
    rate: float
    matrix: jax.Array
    dt: float = 0.1
    state_signature = None

    def step(self, state, dt):
        return state - dt * self.rate * (self.matrix @ state)


def dataset(**changes):
    arguments = {
        "forward_model": Decay(0.5, jnp.eye(4)),
        "prior": Normal(jnp.zeros(4), 1.0),
        "num_samples": 8,
        "num_steps": 4,
        "stride": 2,
        "num_warmup_steps": 1,
        "observation": Observation(lambda u: u[:2], 0.1),
        "block_size": 4,
    } | changes
    return SimulationDataset(**arguments)


NUDGED = jnp.eye(4).at[2, 3].set(1e-300)
CHANGES = {
    "constant": {"forward_model": Decay(0.25, jnp.eye(4))},
    "array": {"forward_model": Decay(0.5, NUDGED)},
    "dtype": {"forward_model": Decay(0.5, jnp.eye(4, dtype=jnp.float32))},
    "time step": {"forward_model": Decay(0.5, jnp.eye(4), 0.2)},
    "model": {"forward_model": StepperModel(stepper, dt=0.1)},
    "parametric": {"forward_model": Parametric(lambda u: (Decay(0.5, jnp.eye(4)), u))},
    "prior's value": {"prior": Normal(jnp.zeros(4), 1.5)},
    "prior's kind": {"prior": BoxUniform(-jnp.ones(4), jnp.ones(4))},
    "samples": {"num_samples": 9},
    "steps": {"num_steps": 6},
    "stride": {"stride": 4},
    "warm-up": {"num_warmup_steps": 2},
    "operator": {"observation": Observation(lambda u: u[1:3], 0.1)},
    "noise": {"observation": Observation(lambda u: u[:2], 0.2)},
    "policy": {"on_failure": "mask"},
    "limit": {"divergence_limit": 1e6},
    "seed": {"seed": 1},
    "split": {"split": "val"},
    "width": {"block_size": 2},
}
SAME = {
    "nothing": {},
    "chunk size": {"chunk_size": 3},
    "memory budget": {"memory_budget": 2**20},
    "devices": {"devices": jax.local_devices()[1:]},
    "numpy array": {"forward_model": Decay(0.5, np.eye(4))},
    "most draws, never used": {"max_attempts": 3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_ingredient_changes_the_hash_of_a_dataset(name):
    assert dataset(**CHANGES[name]).content_hash() != dataset().content_hash()


def test_no_two_changes_are_alike():
    hashes = {dataset(**change).content_hash() for change in CHANGES.values()}
    assert len(hashes) == len(CHANGES)


@pytest.mark.parametrize("name", SAME)
def test_nothing_else_changes_the_hash_of_a_dataset(name):
    assert dataset(**SAME[name]).content_hash() == dataset().content_hash()


def test_precision_settings_change_the_hash():
    data = dataset()
    before = data.content_hash()
    with jax.default_matmul_precision("bfloat16"):
        assert data.content_hash() != before
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        assert data.content_hash() != before
    with jax.enable_x64(False):
        assert data.content_hash() != before
    assert data.content_hash() == before
    assert data.with_split("val").with_split("train").content_hash() == before


# Other processes, other Python versions

GOLDEN_SOURCE = '''
import math

WEIGHTS = {"b": [1.5, -0.0], "a": (2, None, "x")}


def inner(x, *, scale=0.5):
    """A docstring."""
    parts = [math.sqrt(scale) * w for w in WEIGHTS["b"] if w]
    return sum(parts) + (lambda y: y * x)(3)


def outer(x):
    try:
        total = f"{inner(x):.3f}"
    except ValueError as error:
        raise KeyError("none") from error
    return {**WEIGHTS, "total": total, "rest": x[1:-1]}
'''
# Written down once: any Python that runs the suite has to find it again.
GOLDEN = "10bed5106f8cb4e06bfebc6bec865a7bf55950492c5bdccc335dedc068e8be4c"


def test_the_hash_is_the_same_on_every_python():
    space = defined(GOLDEN_SOURCE)
    values = [1, 2.5, np.arange(3, dtype=np.int16), {"k": b"v"}, 1 + 2j]
    assert hash_content(space["outer"], values) == GOLDEN


MODEL_SOURCE = """
import jax
import jax.numpy as jnp
import numpy as np

def model(u):
    return jnp.tanh(u) * len(WEIGHTS)

class Turn:
    angles = np.arange(3.0)
    axes = frozenset({"x", "y", "z"})
    apply = staticmethod(jnp.vectorize(lambda x: x + 1, signature="(n)->(n)"))

wrapped = [jax.vmap(inner, in_axes=1), jax.grad(inner), Turn()]
"""
SCRIPT = """
import jax
jax.config.update("jax_enable_x64", True)
from trainax_pk.data import Normal, SimulationDataset, hash_content

data = SimulationDataset(model, Normal(jnp.zeros(2), 1.0), 4)
print(hash_content(outer, [1, 2.5]), data.content_hash(), hash_content(wrapped))
"""


def test_the_hash_is_the_same_in_another_process(tmp_path):
    script = tmp_path / "physics.py"
    script.write_text(GOLDEN_SOURCE + MODEL_SOURCE + SCRIPT)
    done = subprocess.run(
        [sys.executable, "-O", str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77", "PATH": "/usr/bin", "HOME": str(tmp_path)},
    )
    space = defined(GOLDEN_SOURCE + MODEL_SOURCE)
    data = SimulationDataset(space["model"], Normal(jnp.zeros(2), 1.0), 4)
    here = [hash_content(space["outer"], [1, 2.5]), data.content_hash()]
    here.append(hash_content(space["wrapped"]))
    assert done.stdout.split() == here
