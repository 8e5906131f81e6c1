"""The layout is the architecture: what may import what, and what a class may be."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import trainax_pk

ROOT = Path(trainax_pk.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Bottom to top. A file imports from layers below it, or from its own layer.
LAYERS = [
    {"_types", "_files", "_lock", "_extras", "_signals"},
    {"_tree", "_fourier", "loss", "metrics", "sample_data"},
    {"_batch"},
    {"adjoint"},
    {"_stepper", "_rollout"},
    {"solver", "amortized"},
    {"generation"},
    {"configuration", "data"},
    {"step", "framework"},
    {"engine", "tracker"},
    {"checkpoint", "evaluation"},
    {"callback"},
    {"trainer"},
    {"compat", "demo", "experiment"},
    {"__main__"},
]
# Neighbours of one layer that do import each other, in this direction alone.
WITHIN = {("_rollout", "_stepper"), ("_files", "_lock"),
          ("loss", "_fourier"), ("metrics", "_fourier"),
          ("loss", "_tree"), ("metrics", "_tree"), ("sample_data", "_tree")}  # fmt: skip
NAMESPACES = [
    "adjoint", "amortized", "callback", "checkpoint", "configuration", "data", "engine",
    "evaluation", "experiment", "framework", "generation", "loss", "metrics",
    "sample_data", "solver", "step", "tracker", "trainer", "compat", "compat.callback",
    "compat.configuration", "compat.loss", "compat.sample_data", "compat.trainer",
]  # fmt: skip


def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def _module(path):
    parts = ("trainax_pk", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path):
    """Absolute names of the modules that a file imports, with the names taken."""
    module = _module(path).split(".")
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield name, alias.name


def _part(module):
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else None


def _internal(path):
    """Parts of the package that a file imports."""
    for name, taken in _imports(path):
        if name.split(".")[0] == "trainax_pk":
            yield _part(name) or _part(f"{name}.{taken}")


def _layer(part):
    found = [i for i, layer in enumerate(LAYERS) if part in layer]
    assert found, f"{part} belongs to no layer: add it to LAYERS"
    return found[0]


def _classes():
    for path in FILES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ClassDef):
                yield path, node


def _base_names(node):
    for base in node.bases:
        if isinstance(base, ast.Subscript):
            base = base.value
        yield base.attr if isinstance(base, ast.Attribute) else base.id


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_imports_point_down(path):
    part = _part(_module(path))
    if part is None or part == "demo":
        # The package's own __init__ gathers everything; the demo stands above it.
        return
    for other in _internal(path):
        assert other != part or part not in ("trainax_pk",)
        if other == part or (part, other) in WITHIN:
            continue
        assert _layer(other) < _layer(part), f"{_module(path)} imports {other}"


def test_no_circles_between_files():
    graph = {}
    modules = {_module(path): path for path in FILES}
    for module, path in modules.items():
        edges = set()
        for name, taken in _imports(path):
            for candidate in (f"{name}.{taken}", name):
                if candidate in modules and candidate != module:
                    edges.add(candidate)
                    break
        graph[module] = edges
    # An __init__ that gathers its files is no dependency of these files.
    done, path_now = set(), []

    def visit(module):
        assert module not in path_now, f"circle: {[*path_now, module]}"
        if module in done:
            return
        path_now.append(module)
        for other in sorted(graph[module]):
            visit(other)
        path_now.pop()
        done.add(module)

    for module in graph:
        if module != "trainax_pk" and not module.startswith("trainax_pk.demo"):
            visit(module)


def test_siblings_do_not_import_each_other_through_their_namespace():
    for path in FILES:
        part = _part(_module(path))
        if path.name == "__init__.py" or part in (None, "demo", "compat"):
            continue
        for name, taken in _imports(path):
            private = taken is not None and taken.startswith("_")
            assert private or name not in ("trainax_pk", f"trainax_pk.{part}"), (
                f"{_module(path)} imports {name}, which gathers it"
            )


def test_no_import_inside_a_function():
    for path in FILES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = [n for n in ast.walk(node)
                         if isinstance(n, ast.Import | ast.ImportFrom)]  # fmt: skip
                assert not inner, f"{_module(path)} line {node.lineno}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        (
            "matplotlib",
            {
                "trainax_pk.demo._pictures",
                "trainax_pk.adjoint._report_plot",
                "trainax_pk.amortized._plots",
                "trainax_pk.experiment._report_plot",
            },
        ),
        (
            "tqdm",
            {
                "trainax_pk.trainer",
                "trainax_pk.compat",
                "trainax_pk.data",
                "trainax_pk.experiment",
            },
        ),
        # Loaded by name where they are needed, see _extras.py.
        ("zarr", set()),
        ("google_crc32c", set()),
        ("orbax", set()),
        ("tensorboardX", set()),
        ("mlflow", set()),
        ("wandb", set()),
        ("pyarrow", set()),
        ("fsspec", set()),
        ("xarray", set()),
        # Likewise.
        ("flowjax", set()),
        ("blackjax", set()),
        ("pydantic", {"trainax_pk.experiment"}),
        ("yaml", {"trainax_pk.experiment", "trainax_pk.__main__"}),
        ("safetensors", set()),
        ("exponax", {"trainax_pk.sample_data"}),
        ("trainax", set()),
        ("apebench", set()),
        ("pdequinox", set()),
        ("flax", set()),
        ("keras", set()),
        ("torch", set()),
        ("lightning", set()),
        ("optuna", set()),
        ("h5netcdf", set()),
        ("diffrax", {"trainax_pk.adjoint"}),
        ("optimistix", {"trainax_pk.adjoint", "trainax_pk.solver"}),
        ("lineax", {"trainax_pk.adjoint", "trainax_pk.solver"}),
    ],
)
def test_who_imports_a_library(library, allowed):
    for path in FILES:
        if library in {name.split(".")[0] for name, _ in _imports(path)}:
            module = _module(path)
            assert any(module == a or module.startswith(f"{a}.") for a in allowed), (
                f"{module} imports {library}"
            )


def test_print_in_the_demo_alone():
    for path in FILES:
        if _part(_module(path)) == "demo":
            continue
        for node in ast.walk(_tree(path)):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), (
                f"{_module(path)} line {node.lineno}"
            )


def test_classes_are_abstract_or_final():
    # compat mirrors the inheritance of trainax, which user code relies on.
    ours = {node.name for path, node in _classes() if _part(_module(path)) != "compat"}
    for path, node in _classes():
        if _part(_module(path)) == "compat":
            continue
        for base in _base_names(node):
            assert base not in ours or base.startswith("Abstract"), (
                f"{_module(path)}.{node.name} inherits from {base}, which is concrete"
            )


def test_abstract_classes_cannot_be_built():
    for path, node in _classes():
        if node.name.startswith("Abstract"):
            cls = getattr(importlib.import_module(_module(path)), node.name)
            assert inspect.isabstract(cls) or cls.__abstractvars__, cls


def test_nothing_is_left_open():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for word in ("TODO", "FIXME", "NotImplementedError"):
            assert word not in text, f"{_module(path)} holds {word}"


def test_files_and_functions_are_short():
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 400, f"{_module(path)} has {len(lines)} lines"
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                document = ast.get_docstring(node, clean=False) or ""
                size = node.end_lineno - node.lineno + 1 - len(document.splitlines())
                assert size <= 60, f"{_module(path)}.{node.name} has {size} lines"


def _public():
    yield "trainax_pk", trainax_pk, set(trainax_pk.__all__)
    for name in NAMESPACES:
        module = importlib.import_module(f"trainax_pk.{name}")
        yield module.__name__, module, set(module.__all__)


@pytest.mark.parametrize("name", NAMESPACES)
def test_namespaces_export_what_they_list(name):
    module = importlib.import_module(f"trainax_pk.{name}")
    assert len(module.__all__) == len(set(module.__all__))
    for exported in module.__all__:
        assert hasattr(module, exported)


def test_every_namespace_is_known():
    found = {m.name for m in pkgutil.iter_modules([str(ROOT)]) if m.ispkg}
    assert found - {"demo"} == {n for n in NAMESPACES if "." not in n}


def test_everything_public_is_documented_with_an_example():
    missing = []
    for where, module, names in _public():
        assert module.__doc__, where
        for name in sorted(names):
            thing = getattr(module, name)
            if not callable(thing) or inspect.ismodule(thing):
                continue
            # Other packages' classes are documented where they are from.
            if not thing.__module__.startswith("trainax_pk"):
                continue
            if not _has_example(thing):
                missing.append(f"{where}.{name}")
    assert not missing, f"without docstring or example: {missing}"


def _has_example(thing):
    document = inspect.getdoc(thing) or ""
    if inspect.isclass(thing):
        # An example may stand where the class is built; an abstract one has a guide.
        document += inspect.getdoc(thing.__init__) or ""
        document += inspect.getdoc(getattr(thing, "create", None)) or ""
        if thing.__name__.startswith(("Abstract", "Base")):
            return bool(document)
        if thing.__name__ in _REPORTS:
            return "Attributes:" in document
    return ">>>" in document


# Made by the package and read by the user: they list their fields instead.
_REPORTS = {
    "AdjointReport",
    "Agreement",
    "Calibration",
    "Aux",
    "Built",
    "Chains",
    "HandOff",
    "Match",
    "Choice",
    "CoverageReport",
    "FixedPoint",
    "History",
    "Info",
    "Inputs",
    "PosteriorAgreement",
    "Pruning",
    "RankReport",
    "Ranked",
    "Record",
    "Reproduction",
    "Simulated",
    "Trial",
    "Split",
    "Work",
}


def test_everything_public_says_what_it_is():
    """Functions that take arguments list them."""
    bare = []
    for where, module, names in _public():
        if "compat" in where:
            continue
        for name in sorted(names):
            thing = getattr(module, name)
            if not inspect.isfunction(thing) or not inspect.signature(thing).parameters:
                continue
            if "Args:" not in (inspect.getdoc(thing) or ""):
                bare.append(f"{where}.{name}")
    assert not bare, f"without Args: {bare}"
