"""Pictures of reports; the one module here that imports matplotlib."""

from collections.abc import Callable, Sequence
from typing import Any

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter
except ImportError as error:
    _MISSING: ImportError | None = error
else:
    _MISSING = None

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.alpha": 0.3,
}
_BLUE, _ORANGE = "#2a6f97", "#d1495b"


def plot_report(rows: Sequence[dict[str, Any]], reference: str) -> Any:
    """Bars for every adjoint: cosine and norm ratio, temporaries, time."""
    if _MISSING is not None:
        raise ImportError(
            "Expected matplotlib for a report's picture, got none. Install the extra: "
            "pip install trainax_pk[plot]"
        ) from _MISSING
    names = [row["adjoint"] for row in rows]
    timed = rows[0]["relative_time"] is not None
    with matplotlib.rc_context(_STYLE):
        height = 1.1 + 0.42 * len(rows)
        figure = Figure(figsize=(10, height), layout="constrained")
        axes = figure.subplots(1, 3 if timed else 2, sharey=True)
        _quality(axes[0], rows)
        base = next(r for r in rows if r["adjoint"] == reference)
        memory = [_ratio(r, base, "temporary_bytes") for r in rows]
        _bars(axes[1], memory, _percent, log=True)
        axes[1].set_xlabel(f"temporaries, relative to {reference}")
        if timed:
            _bars(axes[2], [r["relative_time"] for r in rows], _two_digits, log=False)
            axes[2].set_xlabel(f"time of a gradient, relative to {reference}")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
    return figure


def _quality(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = range(len(rows))
    measures = (
        ("cosine", "cosine", -0.18, _BLUE),
        ("norm_ratio", "norm ratio", 0.18, _ORANGE),
    )
    for key, label, shift, color in measures:
        values = [row[key] for row in rows]
        axes.barh([p + shift for p in places], values, 0.34, color=color, label=label)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.2f}", (max(value, 0), place + shift), (3, 0),
                textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
    axes.axvline(1.0, color="0.4", lw=0.8)
    axes.set_xlabel("gradient: cosine and norm ratio")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def _bars(
    axes: Any, values: Sequence[float], text: Callable[[float], str], *, log: bool
) -> None:
    axes.barh(range(len(values)), values, 0.6, color=_BLUE)
    if log:
        axes.set_xscale("log")
        # Within a decade matplotlib labels minor ticks too, one over another.
        axes.xaxis.set_minor_formatter(NullFormatter())
    for place, value in enumerate(values):
        axes.annotate(
            text(value), (value, place), (3, 0),
            textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    axes.axvline(1.0, color="0.4", lw=0.8)
    axes.margins(x=0.15)


def _ratio(row: dict[str, Any], base: dict[str, Any], key: str) -> float:
    return row[key] / max(base[key], 1)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _two_digits(value: float) -> str:
    return f"{value:.2f}"
