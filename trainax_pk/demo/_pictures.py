"""Pictures of the demo; the one module that imports matplotlib."""

from pathlib import Path

import numpy as np

try:
    import matplotlib
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Expected matplotlib for the demo's pictures, got none. Install the extra: "
        "pip install 'trainax_pk[plot]'."
    ) from error

from trainax_pk.demo._advection import UPWIND, amplification
from trainax_pk.demo._kuramoto_sivashinsky import DOMAIN_EXTENT, DT, Evaluation

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 160,
}
_COLORS = ("#0072b2", "#e69f00", "#009e73")
_GREY = "#555555"


def draw_stencils(stencils: dict[int, np.ndarray], path: Path) -> None:
    """Weights beside upwind's, and what the stencils do to each mode."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 3.0), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
        theta = np.linspace(0, np.pi, 200)
        shifts = np.linspace(-0.27, 0.27, len(stencils))
        width = 0.8 * 0.54 / max(len(stencils) - 1, 1)
        for (steps, stencil), shift, color in zip(
            stencils.items(), shifts, _COLORS, strict=False
        ):
            label = f"{steps} step" + "s" * (steps > 1)
            left.bar(np.arange(2) + shift, stencil, width, color=color, label=label)
            factor = amplification(stencil, theta)
            middle.plot(theta, np.abs(factor), color=color, label=label)
            right.plot(theta, _travelled(factor, theta), color=color)
        for i, weight in enumerate(UPWIND):
            left.plot(
                [i - 0.45, i + 0.45],
                [weight, weight],
                color="black",
                ls="--",
                lw=1.2,
                label="upwind" if i == 0 else None,
            )
        exact = amplification(UPWIND, theta)
        middle.plot(theta, np.abs(exact), color="black", ls="--", lw=1.2)
        right.plot(theta, _travelled(exact, theta), color="black", ls="--", lw=1.2)
        for axes, value in ((middle, 1.0), (right, 0.75)):
            axes.axhline(value, color=_GREY, lw=0.8, ls=":")
            axes.axvspan(0, 2 * np.pi * 5 / 30, color=_GREY, alpha=0.12, lw=0)
            axes.set_xticks([0, np.pi / 2, np.pi], ["0", "π/2", "π"])
            axes.set_xlabel("phase per cell")
            axes.set_xlim(0, np.pi)
        left.set_xticks([0, 1], ["own point", "right neighbour"])
        left.set_title("Weights")
        left.legend(loc="upper left")
        middle.set_title("Amplitude kept per step")
        right.set_title("Cells travelled per step")
        middle.annotate(
            "modes of\nthe data",
            (0.06, 0.06),
            xycoords="axes fraction",
            color=_GREY,
            fontsize=8,
        )
        right.annotate(
            "exact: 0.75", (0.97, 0.76), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", color=_GREY, fontsize=8,
        )  # fmt: skip
        figure.savefig(path)


def draw_rollout(evaluation: Evaluation, path: Path, sample: int = 0) -> None:
    """Reference, emulator and their difference over space and time."""
    reference = evaluation.reference[sample, :, 0]
    prediction = evaluation.prediction[sample, :, 0]
    extent = (0, len(reference) * DT, 0, DOMAIN_EXTENT)
    with matplotlib.rc_context({**_STYLE, "axes.spines.top": True}):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        panels = figure.subplots(3, 1, sharex=True, sharey=True)
        limit = float(np.abs(reference).max())
        fields = (
            ("Reference", reference),
            (f"Emulator, {evaluation.num_parameters:,} parameters", prediction),
            ("Difference", prediction - reference),
        )
        for axes, (title, field) in zip(panels, fields, strict=True):
            image = axes.imshow(
                field.T,
                origin="lower",
                aspect="auto",
                extent=extent,
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                interpolation="bilinear",
            )
            axes.set_title(title)
            axes.set_ylabel("x")
        panels[-1].set_xlabel("time")
        figure.colorbar(image, ax=panels, label="u", aspect=40, pad=0.02)
        figure.savefig(path)


def draw_errors(evaluation: Evaluation, path: Path) -> None:
    """Error by lead time, and the loss of training."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        time = DT * np.arange(1, len(evaluation.nrmse) + 1)
        left.plot(time, evaluation.persistence, color=_GREY, ls="--")
        left.plot(time, evaluation.nrmse, color=_COLORS[0])
        left.axhline(np.sqrt(2), color=_GREY, lw=0.8, ls=":")
        for text, place, color in (
            ("persistence", (9.5, 0.62), _GREY),
            ("emulator", (21.5, 0.1), _COLORS[0]),
            ("√2: unrelated states", (0.6, 1.62), _GREY),
        ):
            left.annotate(text, place, color=color, fontsize=8)
        left.set_yscale("log")
        left.set_ylim(top=2.8)
        left.set_xlim(0, time[-1])
        left.set_xlabel("lead time")
        left.set_title("nRMSE of the rollout")
        right.plot(evaluation.loss, color=_GREY, lw=0.4, alpha=0.5)
        right.plot(_smoothed(evaluation.loss), color=_COLORS[0])
        right.set_yscale("log")
        right.set_xlabel("update")
        right.set_title("Training loss over 5 steps")
        figure.savefig(path)


def _travelled(factor: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Phase speed in cells; at θ = 0 every stencil's limit is taken from the next."""
    speed = np.unwrap(np.angle(factor)) / np.maximum(theta, theta[1])
    speed[0] = speed[1]
    return speed


def _smoothed(series: np.ndarray) -> np.ndarray:
    window = max(1, len(series) // 50)
    padded = np.pad(np.log(series), (window // 2, window - 1 - window // 2), "edge")
    return np.exp(np.convolve(padded, np.full(window, 1 / window), "valid"))
