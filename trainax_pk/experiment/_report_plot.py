"""Pictures of a run's report; the one module here that imports matplotlib."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    _MISSING: ImportError | None = error
else:
    _MISSING = None

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
Curve = tuple[Sequence[float], Sequence[float]]


def plot_curves(curves: Mapping[str, Curve]) -> str:
    """Panels of numbers over updates.

    Args:
        curves: By name, updates and values.

    Returns:
        A data URI of a PNG.
    """
    figure = _figure(9, 2.6 * -(-len(curves) // 2))
    with matplotlib.rc_context(_STYLE):
        axes = figure.subplots(-(-len(curves) // 2), 2, squeeze=False).ravel()
        for place, (name, (steps, values)) in zip(axes, curves.items(), strict=False):
            place.plot(steps, values, color="#2a6f97", linewidth=1.2)
            known = [v for v in values if v is not None and np.isfinite(v)]
            if known and min(known) > 0:
                place.set_yscale("log")
            place.set_title(name, fontsize=9, loc="left")
            place.set_xlabel("updates")
        for place in axes[len(curves) :]:
            place.set_axis_off()
    return data_uri(figure)


def plot_rollout(truth: np.ndarray, prediction: np.ndarray) -> str:
    """A rollout beside the truth.

    Args:
        truth: `(num_times, *state)`.
        prediction: Likewise.

    Returns:
        A data URI of a PNG: lines of up to three entries of a vector; space and time of
        a field on a line; the last time of a field on a plane.
    """
    if truth.ndim == 2:
        return _plot_lines(truth, prediction)
    fields = [truth, prediction, prediction - truth]
    # Fields on a line: space and time. On a plane: where the rollout ends.
    pictures = [f[:, 0].T if truth.ndim == 3 else f[-1, 0] for f in fields]
    limit = float(np.nanmax(np.abs(pictures[0]))) or 1.0
    figure = _figure(9, 2.8)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        axes = figure.subplots(1, 3)
        names = ("truth", "prediction", "difference")
        for place, name, picture in zip(axes, names, pictures, strict=True):
            image = place.imshow(
                picture, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit
            )
            place.set_title(name, fontsize=9, loc="left")
            place.set_xlabel("time steps" if truth.ndim == 3 else "x")
        figure.colorbar(image, ax=axes)
    return data_uri(figure)


def plot_errors(nrmse: np.ndarray) -> str:
    """nRMSE over lead times, as a data URI of a PNG."""
    figure = _figure(9, 2.6)
    with matplotlib.rc_context(_STYLE):
        axes = figure.subplots()
        axes.plot(range(1, len(nrmse) + 1), nrmse, color="#d1495b", linewidth=1.2)
        axes.set_yscale("log")
        axes.set_xlabel("lead, in steps")
        axes.set_ylabel("nRMSE, test data")
    return data_uri(figure)


def data_uri(figure: Any) -> str:
    """A figure inside of a page."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _plot_lines(truth: np.ndarray, prediction: np.ndarray) -> str:
    count = min(3, truth.shape[1])
    figure = _figure(9, 1.6 * count)
    with matplotlib.rc_context(_STYLE):
        axes = figure.subplots(count, 1, sharex=True, squeeze=False).ravel()
        for i, place in enumerate(axes):
            place.plot(truth[:, i], color="#444444", linewidth=1.2, label="truth")
            place.plot(
                prediction[:, i], color="#d1495b", linewidth=1.2, label="prediction"
            )
            place.set_ylabel(f"entry {i}")
        axes[0].legend(frameon=False, ncols=2)
        axes[-1].set_xlabel("time steps")
    return data_uri(figure)


def _figure(width: float, height: float) -> Any:
    if _MISSING is not None:
        raise ImportError(
            "Expected matplotlib for a report's pictures, got none. Install the extra: "
            "pip install 'trainax_pk[plot]'"
        ) from _MISSING
    return Figure(figsize=(width, height), layout="constrained")
