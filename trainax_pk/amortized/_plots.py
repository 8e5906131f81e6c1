"""Pictures of diagnostics; the one module here that imports matplotlib."""

from collections.abc import Mapping
from typing import Any

import numpy as np

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    _MISSING: ImportError | None = error
else:
    _MISSING = None

_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_BLUE, _ORANGE, _GREY = "#2a6f97", "#d1495b", "#888888"


def plot_ranks(report: Any, *, num_bins: int = 20) -> Any:
    """Histogram of each quantity's ranks, with the band of 99 % of uniform ones.

    Args:
        report: Of `simulation_based_calibration`.
        num_bins: Bins.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import RankReport, plot_ranks
        >>> ranks = jnp.linspace(0, 1, 200)[:, None]
        >>> len(plot_ranks(RankReport(ranks, jnp.ones(1), ("theta[0]",))).axes)
        1
    """
    _check()
    ranks = np.asarray(report.ranks)
    expected = ranks.shape[0] / num_bins
    spread = 2.58 * np.sqrt(expected * (1 - 1 / num_bins))
    with matplotlib.rc_context(_STYLE):
        count = ranks.shape[1]
        figure = Figure(figsize=(2.4 * count + 0.4, 2.2), layout="constrained")
        for i, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
            axes.axhspan(expected - spread, expected + spread, color="0.9")
            axes.hist(ranks[:, i], bins=num_bins, range=(0, 1), color=_BLUE)
            p_value = float(report.p_values[i])
            axes.set_title(f"{report.names[i]}, p = {p_value:.2g}", fontsize=9)
            axes.set_xlabel("rank")
    return figure


def plot_coverage(reports: Mapping[str, Any]) -> Any:
    """Coverage against credibility, one line for each report.

    Args:
        reports: By name, what `expected_coverage` or `tarp` returned.

    Returns:
        A matplotlib figure: lines below the diagonal are too narrow, above too wide.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import CoverageReport, plot_coverage
        >>> levels = jnp.array([0.5, 0.8])
        >>> report = CoverageReport(levels, levels, levels, jnp.ones(()))
        >>> len(plot_coverage({"exact": report}).axes[0].lines)
        2
    """
    _check()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.2, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":")
        for name, report in reports.items():
            label = f"{name}, p = {float(report.p_value):.2g}"
            axes.plot(
                np.asarray(report.levels), np.asarray(report.coverage), label=label
            )
        axes.set_xlabel("credibility")
        axes.set_ylabel("coverage")
        axes.legend(frameon=False)
    return figure


def plot_predictive(checks: Mapping[str, Any], observed: Mapping[str, Any]) -> Any:
    """Predicted statistics as histograms, the observed ones as lines.

    Args:
        checks: What `posterior_predictive` returned.
        observed: Statistics of the observation, by the same names.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainax_pk.amortized import plot_predictive
        >>> checks = {"mean": (jnp.ones(()), jnp.linspace(-1, 1, 100))}
        >>> len(plot_predictive(checks, {"mean": 0.0}).axes)
        1
    """
    _check()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.6 * len(checks) + 0.4, 2.2), layout="constrained")
        subplots = figure.subplots(1, len(checks), squeeze=False)[0]
        for axes, (name, (p_value, made)) in zip(subplots, checks.items(), strict=True):
            axes.hist(np.asarray(made), bins=40, color=_BLUE)
            axes.axvline(float(observed[name]), color=_ORANGE)
            axes.set_title(f"{name}, p = {float(p_value):.2g}", fontsize=9)
    return figure


def plot_pairs(samples: Mapping[str, Any], truth: Any = None) -> Any:
    """Every pair of parameters as points, margins on the diagonal.

    Args:
        samples: By name, draws `(n, d)`, such as a posterior's and a reference's.
        truth: One θ, `(d,)`, or None.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import jax
        >>> from trainax_pk.amortized import plot_pairs
        >>> x = jax.random.normal(jax.random.key(0), (100, 3))
        >>> len(plot_pairs({"draws": x}).axes)
        9
    """
    _check()
    colors = (_BLUE, _ORANGE, _GREY)
    dim = np.shape(next(iter(samples.values())))[1]
    with matplotlib.rc_context(_STYLE):
        size = 1.4 * dim + 0.6
        figure = Figure(figsize=(size, size), layout="constrained")
        grid = figure.subplots(dim, dim, squeeze=False)
        for color, (name, draws) in zip(colors, samples.items(), strict=False):
            draws = np.asarray(draws)
            for i in range(dim):
                for j in range(dim):
                    axes = grid[i, j]
                    if i == j:
                        axes.hist(
                            draws[:, i], bins=40, density=True, histtype="step",
                            color=color, label=name,
                        )  # fmt: skip
                    else:
                        axes.plot(
                            draws[:2000, j], draws[:2000, i], ".", color=color,
                            markersize=1, alpha=0.4, rasterized=True,
                        )  # fmt: skip
        if truth is not None:
            for i in range(dim):
                grid[i, i].axvline(float(truth[i]), color="black", linewidth=1)
        grid[0, 0].legend(frameon=False, fontsize=7)
    return figure


def _check() -> None:
    if _MISSING is not None:
        raise ImportError(
            "Expected matplotlib for a picture, got none. Install the extra: "
            "pip install 'trainax_pk[plot]'"
        ) from _MISSING
