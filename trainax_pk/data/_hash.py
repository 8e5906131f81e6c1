"""A hash of what determines numbers: values, settings and code."""

import contextlib
import enum
import functools
import hashlib
import inspect
import struct
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainax_pk.data import _hash_code as code_identity
from trainax_pk.data import _hash_objects as objects
from trainax_pk.data._hash_objects import UnknownContent

_SCHEME = "trainax_pk-hash-1"


def hash_content(*parts: Any, versions: bool = True) -> str:
    """SHA-256 of everything that the parts compute with.

    Values count: numbers with their type, arrays with dtype, shape and bytes (NumPy and
    JAX arrays alike), containers, dataclasses and modules field by field. Functions
    count by the syntax of their source, without comments, docstrings, annotations,
    names and formatting, and by the values of what they refer to: defaults, closures
    and globals, recursively through the user's own code. Functions and classes of
    installed packages count by name and version. An object with a method
    `content_hash()` is asked instead.

    The same content has the same hash in any process, on any machine and Python
    version; a function without source (typed at a prompt) is hashed by its bytecode,
    which holds within one Python version.

    Args:
        *parts: Anything made of the above.
        versions: Without, installed packages and this one count by name alone, so that
            an upgrade changes nothing.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: An object whose content cannot be known (an open file, a lock, a
            generator); the message names where it is.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.data import hash_content
        >>> g = 9.81
        >>> first = hash_content(lambda t: -g * t, jnp.arange(3))
        >>> g = 9.80665
        >>> first == hash_content(lambda t: -g * t, jnp.arange(3))
        False
    """
    hasher = _Hasher(versions=versions)
    hasher.token(_SCHEME)
    for i, part in enumerate(parts):
        hasher.add(part, f"part {i}")
    return hasher.digest()


def precision_flags() -> dict[str, Any]:
    """JAX's settings and versions that change numbers."""
    config = jax.config
    return {
        "enable_x64": bool(config.jax_enable_x64),
        "default_matmul_precision": str(config.jax_default_matmul_precision),
        "default_prng_impl": str(config.jax_default_prng_impl),
        "threefry_partitionable": bool(config.jax_threefry_partitionable),
        "numpy_dtype_promotion": str(config.jax_numpy_dtype_promotion),
        "jax": jax.__version__,
        "jaxlib": code_identity.version_of("jaxlib"),
    }


class _Hasher:
    def __init__(self, *, versions: bool = True) -> None:
        self._versions = versions
        self._hash = functools.partial(hash_content, versions=versions)
        known, own = code_identity, not versions
        self._is_library = functools.partial(known.is_library, own=own)
        self._is_library_file = functools.partial(known.is_library_file, own=own)
        self._sha = hashlib.sha256()
        # Objects on the way down, to end cycles; code that was walked is not again.
        self._open: list[int] = []
        self._seen_code: dict[int, int] = {}
        self._alive: list[Any] = []
        # What a wrapper of a library wraps, walked before the wrapper's settings.
        self._wrapped: dict[int, int] = {}
        self._in_wrapper = 0

    def digest(self) -> str:
        return self._sha.hexdigest()

    def token(self, text: str) -> None:
        self.raw(text.encode("utf-8", "surrogatepass"))

    def raw(self, data: bytes) -> None:
        # With its length, so that neighbours cannot be confused.
        self._sha.update(struct.pack("<Q", len(data)))
        self._sha.update(data)

    def add(self, x: Any, where: str) -> None:
        if objects.is_plain(x):
            self._add_plain(x)
        elif objects.is_array(x):
            self._add_array(x)
        else:
            with self._entered(x) as depth:
                if depth is not None:
                    self.token(f"cycle:{depth}")
                else:
                    self._add_object(x, where)

    @contextlib.contextmanager
    def _entered(self, x: Any) -> Iterator[int | None]:
        if id(x) in self._open:
            yield len(self._open) - self._open.index(id(x))
            return
        self._open.append(id(x))
        # Kept alive, since the id of what is freed is given to another object.
        self._alive.append(x)
        try:
            yield None
        finally:
            self._open.pop()

    def _add_plain(self, x: Any) -> None:
        name = type(x).__name__
        if isinstance(x, float):
            self.token(f"{name}:{x.hex()}")
        elif isinstance(x, complex):
            self.token(f"{name}:{x.real.hex()}:{x.imag.hex()}")
        elif isinstance(x, bytes):
            self.token(name)
            self.raw(x)
        else:
            self.token(f"{name}:{x!s}")

    def _add_array(self, x: Any) -> None:
        dtype = x.dtype
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            self.token(f"key:{jax.random.key_impl(x)}")
            x = jax.random.key_data(x)
        array = np.asarray(x)
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        self.token(f"array:{array.dtype.newbyteorder('<').name}:{array.shape}")
        self.raw(np.ascontiguousarray(little).tobytes())

    def _add_object(self, x: Any, where: str) -> None:
        own = getattr(x, "content_hash", None)
        if callable(own) and not isinstance(x, type):
            self.token(f"content_hash:{own()}")
        elif isinstance(x, Mapping):
            self._add_mapping(x, where)
        elif isinstance(x, tuple | list):
            self._add_sequence(x, where)
        elif isinstance(x, set | frozenset):
            self.token("set")
            for digest in sorted(self._hash(item) for item in x):
                self.token(digest)
        elif isinstance(x, functools.partial):
            self.token("partial")
            self.add((x.func, x.args, x.keywords), f"{where}, a partial")
        elif isinstance(x, types.ModuleType):
            self.token(f"module:{x.__name__}")
        elif isinstance(x, types.MethodType):
            self.token("method")
            self.add(x.__func__, where)
            self.add(x.__self__, f"self of {where}")
        elif isinstance(x, types.FunctionType):
            self._add_function(x, where)
        elif isinstance(x, type):
            self._add_class(x, where)
        elif objects.named_in_library(x, self._is_library):
            self._add_library(x)
        else:
            self._add_instance(x, where)

    def _add_mapping(self, x: Mapping, where: str) -> None:
        self.token(f"mapping:{len(x)}")
        for digest, key in sorted((self._hash(k), k) for k in x):
            self.token(digest)
            self.add(x[key], f"{where}[{key!r}]")

    def _add_sequence(self, x: Any, where: str) -> None:
        named = hasattr(x, "_fields")
        self.token(f"{type(x).__name__ if named else type(x).__mro__[-2].__name__}")
        self.token(str(len(x)))
        for i, item in enumerate(x):
            self.add(item, f"{where}[{i}]")

    def _add_instance(self, x: Any, where: str) -> None:
        wrapped = getattr(x, "__wrapped__", None)
        if wrapped is not None and callable(wrapped):
            # jit, custom_vjp, filter_vmap: what they wrap, and how.
            self.token(f"wrapped:{type(x).__name__}")
            self.add(wrapped, where)
            if self._is_library(type(x).__module__):
                self._add_settings(x, wrapped, where)
                return
        state = objects.state(x)
        if state is None:
            raise UnknownContent(
                f"Expected content that can be hashed, got {type(x).__name__} "
                f"({x!r:.80}) at {where}. Give it a method content_hash(), or keep it "
                "out of what is hashed."
            )
        self.token("instance")
        self.add(type(x), f"class of {where}")
        for name in sorted(state):
            self.token(name)
            self.add(state[name], f"{where}.{name}")

    def _add_library(self, x: Any) -> None:
        self._add_library_name(*objects.home(x))

    def _add_library_name(self, module: str, name: str) -> None:
        dotted, version = code_identity.library_name(module, name)
        self.token(f"library:{dotted}@{version if self._versions else ''}")

    def _add_class(self, cls: type, where: str) -> None:
        if self._is_library(cls.__module__):
            self._add_library(cls)
            return
        self.token(f"class:{cls.__qualname__.rsplit('.', 1)[-1]}")
        if self._visit(cls):
            return
        for base in cls.__bases__:
            if base is not object:
                self.add(base, f"base of {cls.__qualname__}")
        members = getattr(cls, "__members__", {}) if issubclass(cls, enum.Enum) else {}
        for name in members:
            self.token(name)
            self.add(members[name].value, f"{cls.__qualname__}.{name}")
        for name, value in sorted(vars(cls).items()):
            if not (members and (name in members or objects.is_sunder(name))):
                self._add_attribute(name, value, f"{cls.__qualname__}.{name}")

    def _add_attribute(self, name: str, value: Any, where: str) -> None:
        functions = list(objects.functions(value, self._is_library))
        value = objects.without_descriptor(value)
        if functions:
            self.token(name)
            for function in functions:
                self._add_method(function, where)
            if isinstance(value, functools.partialmethod):
                self.add((value.args, value.keywords), where)
        elif objects.is_data(name, value, self._is_library):
            self.token(name)
            self.add(value, where)

    def _add_method(self, function: types.FunctionType, where: str) -> None:
        # A dataclass writes methods of its own; equinox wraps __init__ in its code.
        inner = inspect.unwrap(function)
        if not isinstance(inner, types.FunctionType):
            return
        file = inner.__code__.co_filename
        outside = file == "<string>" or self._is_library_file(file)
        wraps_init = inner is not function and inner.__name__ == "__init__"
        if not outside and not wraps_init:
            self._add_function(function, where)

    def _add_settings(self, x: Any, wrapped: Any, where: str) -> None:
        """How a wrapper of a library wraps: axes, argnums, signatures.

        What is off counts nothing, so that options of later versions change nothing;
        what cannot be known is the library's own.
        """
        if wrapped is not None:
            self._wrapped.setdefault(id(wrapped), len(self._wrapped))
            self._alive.append(wrapped)
        self._in_wrapper += 1
        try:
            found = objects.settings(x)
            for name in sorted(found):
                self._add_setting(name, found[name], where)
        finally:
            self._in_wrapper -= 1

    def _add_setting(self, name: str, value: Any, where: str) -> None:
        before = self._sha.copy(), dict(self._seen_code)
        self.token(f"setting:{name}")
        if id(value) in self._wrapped:
            self.token(f"wrapped:{self._wrapped[id(value)]}")
            return
        try:
            self.add(value, f"`{name}` of {where}")
        except UnknownContent:
            self._sha, self._seen_code = before

    def _add_function(self, f: types.FunctionType, where: str) -> None:
        wrapped = getattr(f, "__wrapped__", None)
        library = self._is_library(f.__module__ or "")
        if library or self._is_library_file(f.__code__.co_filename):
            if wrapped is not None and callable(wrapped):
                self.token(f"wrapper:{f.__code__.co_name}")
                self.add(wrapped, where)
                self._add_settings(f, wrapped, where)
            elif library and "<locals>" not in f.__qualname__:
                self._add_library(f)
            elif self._in_wrapper:
                self.token(f"library-closure:{f.__qualname__}")
                self._add_settings(f, None, where)
            else:
                # Made by a library around something of the user's: the closure tells.
                self.token(f"library-closure:{f.__qualname__}")
                self._add_bindings(f, [], where)
            return
        self.token("function")
        plain = not (f.__closure__ or f.__defaults__ or f.__kwdefaults__)
        if self._visit(f.__code__) and plain:
            return
        node = code_identity.find_definition(f.__code__)
        if node is None:
            self._add_bytecode(f, where)
            return
        for token in code_identity.syntax(node):
            self.token(token)
        self._add_bindings(f, code_identity.free_names(node), where)

    def _add_bindings(self, f: types.FunctionType, names: Any, where: str) -> None:
        self.add((f.__defaults__, f.__kwdefaults__), f"defaults of {where}")
        closure = dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=True))
        for name in sorted(closure):
            self.token(f"closure:{name}")
            with contextlib.suppress(ValueError):  # an empty cell
                self.add(closure[name].cell_contents, f"`{name}` in {where}")
        for root, attributes in names:
            if root in closure or root not in f.__globals__:
                continue
            self._add_global(f.__globals__[root], root, attributes, where)

    def _add_global(
        self, value: Any, root: str, attributes: tuple[str, ...], where: str
    ) -> None:
        for i, attribute in enumerate(attributes):
            if not isinstance(value, types.ModuleType):
                break
            if self._is_library(value.__name__):
                rest = ".".join(attributes[i:])
                self._add_library_name(value.__name__, rest)
                return
            value = getattr(value, attribute, None)
        self.token(f"global:{'.'.join((root, *attributes))}")
        self.add(value, f"`{root}` in {where}")

    def _add_bytecode(self, f: types.FunctionType, where: str) -> None:
        version = ".".join(map(str, sys.version_info[:2]))
        self.token(f"bytecode:{version}")
        names: dict[str, None] = {}
        self._add_code(f.__code__, names)
        self._add_bindings(f, [(n, ()) for n in sorted(names)], where)

    def _add_code(self, code: types.CodeType, names: dict[str, None]) -> None:
        self.raw(code.co_code)
        names.update(dict.fromkeys(code.co_names))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant, names)
            else:
                self.add(constant, "a constant")

    def _visit(self, x: Any) -> bool:
        """Whether it was walked before; then its number stands for it."""
        if id(x) in self._seen_code:
            self.token(f"seen:{self._seen_code[id(x)]}")
            return True
        self._seen_code[id(x)] = len(self._seen_code)
        self._alive.append(x)
        return False
