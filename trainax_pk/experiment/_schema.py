"""What editors need to know of files."""

from typing import Any, Literal

from trainax_pk.experiment._run import Run
from trainax_pk.experiment._spec import FAMILY, families
from trainax_pk.experiment._sweep_spec import HyperSweep

_ROOTS = {"run": Run, "sweep": HyperSweep}


def json_schema(of: Literal["run", "sweep"] = "run") -> dict[str, Any]:
    """The JSON schema of run files, or of sweeps, for editors.

    Args:
        of: "run" or "sweep".

    Returns:
        A schema of draft 2020-12 with every registered kind.

    Raises:
        ValueError: Another name.

    Example:
        >>> from trainax_pk import experiment
        >>> schema = experiment.json_schema()
        >>> "adam" in str(schema["$defs"]["optimizer"]), "Training" in schema["$defs"]
        (True, True)
        >>> "grid" in str(experiment.json_schema("sweep")["$defs"]["sampler"])
        True
    """
    if of not in _ROOTS:
        raise ValueError(
            f"Expected a schema of {' or '.join(_ROOTS)}, got {of!r}. Choose one of them."
        )
    schema = _referring(_ROOTS[of].model_json_schema())
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    definitions = schema.setdefault("$defs", {})
    for family, kinds in families().items():
        names = []
        for kind, cls in kinds.items():
            one = _referring(cls.model_json_schema())
            definitions |= one.pop("$defs", {})
            one["required"] = sorted({*one.get("required", []), "kind"})
            definitions[f"{family}.{kind}"] = one
            names.append({"$ref": f"#/$defs/{family}.{kind}"})
        # A kind's name alone stands for it with its defaults.
        definitions[family] = {"anyOf": [{"enum": list(kinds)}, *names]}
    if of == "sweep":
        fields = schema["properties"]
        fields["run"] = {"anyOf": [{"type": "string"}, fields["run"]]}
        values = fields["fields"]["additionalProperties"]
        listed = {"type": "array", "minItems": 1}
        fields["fields"]["additionalProperties"] = {"anyOf": [listed, values]}
    return schema


def _referring(schema: Any) -> Any:
    """Places where a family's kinds may stand refer to its definition."""
    if isinstance(schema, list):
        return [_referring(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get(FAMILY), str):
        return {"$ref": f"#/$defs/{schema[FAMILY]}"}
    return {k: _referring(v) for k, v in schema.items()}
