"""What each adjoint's gradient is worth, and what it costs."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from trainax_pk._tree import check_count
from trainax_pk.adjoint._agreement import Agreement, agreement, of_leaves
from trainax_pk.adjoint._cost import Cost, compiled, seconds_of
from trainax_pk.adjoint._report_plot import plot_report


class Row(eqx.Module):
    """One adjoint of a report.

    Attributes:
        total: Agreement with the reference over all leaves taken together.
        leaves: Agreement leaf by leaf, by the leaf's path.
        cost: Memory and times.
    """

    total: Agreement
    leaves: dict[str, Agreement]
    cost: Cost


class AdjointReport(eqx.Module):
    """Gradient quality, memory and time of adjoints. `print` shows the table.

    Attributes:
        rows: A `Row` for each adjoint, by name.
        reference: The name that the others are compared with.
    """

    rows: dict[str, Row]
    reference: str

    def __str__(self) -> str:
        header = (
            "adjoint", "cosine", "norm ratio", "rel. error", "worst leaf",
            "temporaries", "compile", "time",
        )  # fmt: skip
        table = [header, *(self._cells(name) for name in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                      for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        ]  # fmt: skip
        return "\n".join(
            [*lines, f"Relative to {self.reference}; time of one gradient."]
        )

    def markdown(self) -> str:
        """The table for a Markdown page."""
        header = (
            "adjoint", "cosine", "norm ratio", "relative error", "worst leaf's error",
            "temporaries", "compile", f"time relative to {self.reference}",
        )  # fmt: skip
        rows = [header, ("---",) * len(header), *map(self._cells, self.rows)]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def data(self) -> list[dict[str, Any]]:
        """Rows of plain numbers, for JSON or a data frame."""
        return [
            {
                "adjoint": name,
                "cosine": row.total.cosine,
                "norm_ratio": row.total.norm_ratio,
                "relative_error": row.total.relative_error,
                "temporary_bytes": row.cost.temporary_bytes,
                "compile_seconds": row.cost.compile_seconds,
                "seconds": row.cost.seconds,
                "relative_time": row.cost.relative_time,
                "leaves": {
                    path: {
                        "cosine": leaf.cosine,
                        "norm_ratio": leaf.norm_ratio,
                        "relative_error": leaf.relative_error,
                    }
                    for path, leaf in row.leaves.items()
                },
            }
            for name, row in self.rows.items()
        ]

    def plot(self) -> Any:
        """A figure: gradient quality, memory and time of every adjoint.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed; the message names the extra.
        """
        return plot_report(self.data(), self.reference)

    def _cells(self, name: str) -> tuple[str, ...]:
        row = self.rows[name]
        worst = max(
            (leaf.relative_error for leaf in row.leaves.values()),
            # A NaN is worse than any number.
            key=lambda error: (error != error, error),
        )
        cost = row.cost
        relative = "-" if cost.relative_time is None else f"{cost.relative_time:.2f}"
        return (
            name,
            f"{row.total.cosine:.4f}",
            f"{row.total.norm_ratio:.4f}",
            f"{row.total.relative_error:.1e}",
            f"{worst:.1e}",
            _bytes(cost.temporary_bytes),
            f"{cost.compile_seconds:.2f} s",
            relative,
        )


def adjoint_report(
    loss_fn: Callable[[PyTree, Any], Any],
    params: PyTree[Any],
    adjoints: Mapping[str, Any],
    *,
    reference: str | None = None,
    rounds: int = 5,
) -> AdjointReport:
    """Compares adjoints on one loss: quality of the gradient, memory, time.

    For the gradients g of an adjoint and r of the reference, leaf by leaf and for all
    leaves together:

        cosine = ⟨g, r⟩ / (|g| |r|),  norm ratio = |g| / |r|,  relative error =
        |g - r| / |r|

    All three, because a truncated gradient is short: a cosine of 0.9 with a norm ratio
    of 0.1 trains well under Adam although its relative error is 90 %. Gradients are
    VJPs of the scalar loss, so adjoints without forward mode take part.

    Args:
        loss_fn: `(params, adjoint) -> scalar`, whose loops are run by the adjoint.
        params: PyTree; its inexact arrays are differentiated, the rest rides along.
            Put inputs here to compare gradients with respect to inputs.
        adjoints: Adjoints by name.
        reference: Name of the one to compare with, by default the first.
        rounds: Timed calls of each gradient, interleaved; the median of the ratios
            within rounds is reported. 0 leaves times out.

    Returns:
        A report: `print(report)`, `report.plot()`, `report.data()`.

    Raises:
        ValueError: No adjoints, an unknown reference, a loss that is no real scalar,
            or parameters without an inexact array.

    Example:
        >>> import jax.numpy as jnp
        >>> import trainax_pk as tx
        >>> from trainax_pk.adjoint import adjoint_report
        >>> def loss(a, adjoint):
        ...     return tx.rollout(lambda u: jnp.sin(a * u), 1.0, 9, adjoint=adjoint)[-1]
        >>> adjoints = {"direct": tx.DirectAdjoint(), "k = 4": tx.KStepAdjoint(4)}
        >>> report = adjoint_report(loss, jnp.array(1.5), adjoints, rounds=0)
        >>> bool(report.rows["k = 4"].total.relative_error > 0)
        True
    """
    if not adjoints:
        raise ValueError(
            "Expected at least one adjoint, got none. Pass {name: adjoint}."
        )
    reference = next(iter(adjoints)) if reference is None else reference
    if reference not in adjoints:
        raise ValueError(
            f"Expected `reference` to be one of {list(adjoints)}, got {reference!r}. "
            "Pass the name of an adjoint."
        )
    check_count("rounds", rounds, minimum=0)
    programs = {n: compiled(loss_fn, params, a) for n, a in adjoints.items()}
    gradients = {n: p.gradient() for n, p in programs.items()}
    times = seconds_of(programs, rounds)
    rows = {}
    for name, gradient in gradients.items():
        leaves = of_leaves(gradient, gradients[reference])
        rows[name] = Row(
            agreement(gradient, gradients[reference]),
            leaves,
            programs[name].cost(times, name, reference),
        )
    return AdjointReport(rows, reference)


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
