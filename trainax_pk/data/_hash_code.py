"""The identity of code: its syntax and what it refers to, not its text or bytes."""

import ast
import functools
import importlib.metadata
import linecache
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Its code is always walked: a version number would not see a change of physics made
# while this package is worked on, nor agree between an installation and a checkout.
_OWN = Path(__file__).resolve().parent.parent
_LIBRARY = tuple(
    str(Path(sysconfig.get_path(name)).resolve())
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def is_library(module_name: str, *, own: bool = False) -> bool:
    """Whether a module is installed or built in, hence known by name and version.

    This package is not, unless `own` says so.
    """
    top = module_name.split(".")[0]
    if top in (_OWN.name, "__main__"):
        return own and top == _OWN.name
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None:
        return module_name in sys.modules and bool(version_of(top))
    return is_library_file(file)


def is_library_file(file: str, *, own: bool = False) -> bool:
    """Whether a file lies where packages are installed."""
    path = str(Path(file).resolve())
    if path.startswith(f"{_OWN}/"):
        return own
    # Packages may be installed beside the interpreter's own folders, too.
    installed = {"site-packages", "dist-packages"} & set(Path(path).parts)
    return bool(installed) or any(path.startswith(f"{f}/") for f in _LIBRARY)


def library_name(module_name: str, qualified_name: str) -> tuple[str, str]:
    """Dotted name, and the version of the distribution (none for the stdlib)."""
    top = module_name.split(".")[0]
    dotted = f"{module_name}.{qualified_name}" if qualified_name else module_name
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        # Hashes agree between Python versions.
        return dotted, ""
    return dotted, version_of(top)


def version_of(top: str) -> str:
    """Version of an installed top-level package, "" if it tells none."""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(top), "__version__", ""))


def syntax(node: ast.AST) -> Iterator[str]:
    """Tokens of a syntax tree without positions, comments, docstrings, annotations.

    Empty fields are left out, and no field is named by number, so that Python versions
    that add fields to a node give the same tokens.
    """
    yield f"({type(node).__name__}"
    for name, value in ast.iter_fields(node):
        skipped = name in ("ctx", "kind", "type_comment", "annotation", "returns")
        # Names of functions and lambdas do not change numbers.
        is_own_name = name == "name" and isinstance(node, _SCOPES)
        if skipped or is_own_name or value is None or value == []:
            continue
        if name == "body" and isinstance(node, _SCOPES) and isinstance(value, list):
            value = _without_docstring(value)
        yield name
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from syntax(item)
            else:
                yield f"{type(item).__name__}:{item!r}"
    yield ")"


def find_definition(code: types.CodeType) -> ast.AST | None:
    """Syntax tree of the function that a code object was compiled from."""
    text = "".join(linecache.getlines(code.co_filename))
    candidates = _definitions(text).get(code.co_firstlineno, [])
    fitting = [n for n in candidates if _fits(n, code)]
    # The narrowest, since an outer lambda on the same line covers an inner one.
    return min(fitting, key=_extent, default=None)


@functools.lru_cache(maxsize=64)
def _definitions(text: str) -> dict[int, list[ast.AST]]:
    """Functions and lambdas of a file by their first line."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        # A notebook's line magics, or a file that has changed since.
        return {}
    found: dict[int, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, _SCOPES):
            found.setdefault(_first_line(node), []).append(node)
    return found


def free_names(node: ast.AST) -> list[tuple[str, tuple[str, ...]]]:
    """Names that a function reads and does not bind, with the attributes taken.

    `jnp.linalg.norm` is ("jnp", ("linalg", "norm")).
    """
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for child in _runtime_walk(node):
        if isinstance(child, ast.Attribute):
            chain = _chain(child)
            if chain is not None:
                found[chain] = None
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
            found[(child.id, ())] = None
    bound = _bound_names(node)
    names = [pair for pair in found if pair[0] not in bound]
    # `jnp` alone is a part of `jnp.sin`; it stands for itself only where it is used
    # bare, which a walk cannot tell: the shorter chains of a longer one go.
    longer = [(root, attributes) for root, attributes in names if attributes]
    return sorted(
        (root, attributes)
        for root, attributes in names
        if not any(
            root == other
            and len(attributes) < len(more)
            and more[: len(attributes)] == attributes
            for other, more in longer
        )
    )


def _runtime_walk(node: ast.AST) -> Iterator[ast.AST]:
    """Walks without annotations, and without what a function's decorators are."""
    pending = [node]
    while pending:
        current = pending.pop()
        yield current
        for name, value in ast.iter_fields(current):
            if name in ("annotation", "returns"):
                continue
            if current is node and name == "decorator_list":
                continue
            items = value if isinstance(value, list) else [value]
            pending.extend(item for item in items if isinstance(item, ast.AST))


def _chain(node: ast.Attribute) -> tuple[str, tuple[str, ...]] | None:
    attributes: list[str] = []
    current: ast.AST = node
    while isinstance(current, ast.Attribute):
        attributes.append(current.attr)
        current = current.value
    if not isinstance(current, ast.Name):
        return None
    return current.id, tuple(reversed(attributes))


def _bound_names(node: ast.AST) -> set[str]:
    """Names bound by the function itself: arguments and assignments.

    A name that an inner function binds counts only there in Python; as it would take a
    scope analysis to tell, what is both global and bound inside counts as bound. The
    syntax of the assignment is hashed anyway.
    """
    bound: set[str] = set()
    outer: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.arg):
            bound.add(child.arg)
        elif isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
            bound.add(child.id)
        elif isinstance(child, ast.Global | ast.Nonlocal):
            outer.update(child.names)
        elif isinstance(child, (*_SCOPES, ast.ClassDef)) and child is not node:
            bound.add(getattr(child, "name", ""))
        elif isinstance(child, ast.alias):
            bound.add((child.asname or child.name).split(".")[0])
        elif isinstance(child, ast.ExceptHandler) and child.name:
            bound.add(child.name)
    return bound - outer


def _without_docstring(body: list[Any]) -> list[Any]:
    first = body[0] if body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_text and isinstance(first.value.value, str) else body


def _first_line(node: Any) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


def _fits(node: Any, code: types.CodeType) -> bool:
    is_lambda = isinstance(node, ast.Lambda)
    if is_lambda != (code.co_name == "<lambda>"):
        return False
    if not is_lambda:
        return node.name == code.co_name
    body = node.body
    start = (body.lineno, body.col_offset)
    end = (body.end_lineno, body.end_col_offset)
    for line, end_line, column, end_column in code.co_positions():
        if None in (line, end_line, column, end_column):
            continue
        # Prologue instructions have the position (line, 0, 0).
        if column == end_column:
            continue
        if not (start <= (line, column) and (end_line, end_column) <= end):
            return False
    return len(_argument_names(node)) == code.co_argcount + code.co_kwonlyargcount


def _argument_names(node: ast.Lambda) -> list[str]:
    arguments = node.args
    return [
        a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    ]


def _extent(node: Any) -> tuple[int, int]:
    lines = node.end_lineno - node.lineno
    return lines, node.end_col_offset - node.col_offset if lines == 0 else 0
