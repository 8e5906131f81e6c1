"""How griffe, which reads sources without running them, is to read ours."""

import re

import griffe

ROOTS = {
    "equinox.Module",
    "optimistix.AbstractAdjoint",
    "pydantic.BaseModel",
    "typing.NamedTuple",
}
MADE_HERE = "fields"


class ExamplesAreCode(griffe.Extension):
    """`Example:` is the section that griffe calls `Examples:`, which may be doctests."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M
            )
            obj.docstring.value = text


class SecondNames(griffe.Extension):
    """`new = old` in a module is the function or class `old`, documented as that."""

    def on_package(self, *, pkg, **_):
        for module in _modules(pkg):
            for name, member in list(module.attributes.items()):
                if member.is_alias or not isinstance(member.value, griffe.ExprName):
                    continue
                path = member.value.canonical_path.removeprefix(f"{pkg.name}.")
                try:
                    old = pkg[path]
                    old = old.final_target if old.is_alias else old
                except (KeyError, griffe.AliasResolutionError):
                    continue  # of another package
                if old.is_function or old.is_class:
                    module.set_member(name, griffe.Alias(name, old, parent=module))


class FieldsAreArguments(griffe.Extension):
    """Modules of equinox, pydantic's models and named tuples are built from their fields.

    griffe does the same for classes under `@dataclass`.
    """

    def on_package(self, *, pkg, **_):
        for module in _modules(pkg):
            for cls in module.classes.values():
                if not cls.is_alias and "__init__" not in cls.members:
                    _add_init(cls)


def _modules(module):
    yield module
    for inside in module.modules.values():
        if not inside.is_alias:
            yield from _modules(inside)


def _bases(cls):
    for base in cls.bases:
        path = base if isinstance(base, str) else base.canonical_path
        yield path.split("[")[0]


def _family(cls, package):
    """Names of all base classes, and those that this package defines, nearest first."""
    names, own = [], []
    for path in _bases(cls):
        names.append(path)
        if path.startswith(f"{package.name}."):
            parent = package[path.removeprefix(f"{package.name}.")]
            parent = parent.final_target if parent.is_alias else parent
            more_names, more_own = _family(parent, package)
            names += more_names
            own += [parent, *more_own]
    return names, own


def _add_init(cls):
    names, parents = _family(cls, cls.package)
    written = (p.members["__init__"] for p in parents if "__init__" in p.members)
    if not ROOTS & set(names) or any(MADE_HERE not in init.labels for init in written):
        return
    positional = griffe.ParameterKind.positional_or_keyword
    by_name = "pydantic.BaseModel" in names
    kind = griffe.ParameterKind.keyword_only if by_name else positional
    fields = {}
    for owner in [*reversed(parents), cls]:
        for name, member in owner.attributes.items():
            if _is_field(member):
                fields[name] = _parameter(member, kind)
    if fields:
        parameters = griffe.Parameters(
            griffe.Parameter("self", kind=positional),
            *fields.values(),
        )
        init = griffe.Function("__init__", parameters=parameters, parent=cls)
        init.labels.add(MADE_HERE)
        cls.set_member("__init__", init)


def _is_field(member):
    if member.is_alias or member.annotation is None or "property" in member.labels:
        return False
    # Without an instance-attribute it is a ClassVar; an AbstractVar is no field yet.
    return (
        "instance-attribute" in member.labels
        and not str(member.annotation)
        .split("[")[0]
        .endswith(("AbstractVar", "AbstractClassVar"))
        and _option(member, "init") != "False"
    )


def _option(member, name):
    """An argument of `eqx.field`, or None; "" where there is no such call."""
    call = member.value
    if not isinstance(call, griffe.ExprCall) or not str(call.function).endswith(
        "field"
    ):
        return ""
    for argument in call.arguments:
        if getattr(argument, "name", None) == name:
            return str(argument.value)
    return None


def _parameter(member, kind):
    default = _option(member, "default")
    if default == "":
        default = member.value
    elif default is None and (factory := _option(member, "default_factory")):
        default = f"{factory}()"
    return griffe.Parameter(
        member.name,
        annotation=member.annotation,
        kind=kind,
        default=default,
    )
