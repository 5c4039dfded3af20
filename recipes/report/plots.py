"""The plots of a report, as SVG pictures that a page can hold in itself.

A picture in an `<img>` runs no script and loads nothing, whatever its labels say.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vqguard.errors import DataError
from vqguard.paper import PAPER_TAU

Points: TypeAlias = "Sequence[Mapping[str, float | None]]"

# Okabe and Ito's palette: told apart by colour-blind readers and on grey paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666")
_DASHES = ("-", "--", ":", "-.")


def roc_plot(points: Points) -> str:
    """True- against false-positive rate over tau, the paper's tau of 0.6 marked where it is.

    Args:
        points: mappings with `tau`, `fpr` and `tpr`, all in [0, 1].

    Returns:
        A data URI of an SVG picture.

    Raises:
        DataError: if a point lacks a number.
    """
    taus, fprs, tprs = (
        [_number(point, key, "series.roc") for point in points] for key in ("tau", "fpr", "tpr")
    )
    order = sorted(range(len(taus)), key=lambda i: (fprs[i], tprs[i]))
    figure, (axes,) = _figure(1, width=5.4, height=4.4)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=":", label="chance")
    axes.plot(
        [fprs[i] for i in order],
        [tprs[i] for i in order],
        color=COLOURS[0],
        marker="o",
        markersize=4,
        label="safety map",
    )
    for i in _spread(order, 6):
        axes.annotate(
            f"τ {taus[i]:.2g}",
            (fprs[i], tprs[i]),
            xytext=(7, -11),
            textcoords="offset points",
            fontsize=8,
            color="#444444",
        )
    chosen = [i for i in order if math.isclose(taus[i], PAPER_TAU, abs_tol=1e-9)]
    if chosen:
        axes.plot(
            [fprs[i] for i in chosen],
            [tprs[i] for i in chosen],
            linestyle="none",
            marker="D",
            markersize=8,
            color=COLOURS[1],
            label=f"τ {PAPER_TAU} (paper)",
        )
    axes.set_xlabel("False-positive rate (neutral scenes refused)")
    axes.set_ylabel("True-positive rate (toxic scenes refused)")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="lower right", frameon=False)
    return _data_uri(figure)


def curves_plot(curves: Mapping[str, Points]) -> str:
    """ROC and precision-recall curves, a line a category.

    Args:
        curves: category to mappings with `fpr`, `tpr` and `precision`, all in [0, 1].

    Returns:
        A data URI of an SVG picture.

    Raises:
        DataError: if a point lacks a number.
    """
    figure, (roc, precision) = _figure(2, width=10.4, height=4.2)
    for index, (name, points) in enumerate(curves.items()):
        fprs, tprs, precisions = (
            [_number(point, key, f"series.curves.{name}") for point in points]
            for key in ("fpr", "tpr", "precision")
        )
        order = sorted(range(len(points)), key=lambda i: (fprs[i], tprs[i]))
        _line(roc, index, [fprs[i] for i in order], [tprs[i] for i in order], name)
        _line(precision, index, [tprs[i] for i in order], [precisions[i] for i in order], name)
    for axes, x, y in (
        (roc, "Neutral images flagged (FPR)", "Images of the category flagged (DSR)"),
        (precision, "Recall (DSR)", "Precision"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
    _legend(precision, outside=True)
    return _data_uri(figure)


def training_plot(stage: str, points: Points) -> str | None:
    """Losses and codebook perplexities of a stage over its steps; None if it has neither.

    Args:
        stage: name of the stage, for messages.
        points: mappings with `step` and any of `...loss...` and `...perplexity...`; a value
            of None leaves a gap.

    Returns:
        A data URI of an SVG picture.

    Raises:
        DataError: if a point lacks its step or a value is not a number.
    """
    where = f"series.training.{stage}"
    steps = [_number(point, "step", where) for point in points]
    names = dict.fromkeys(key for point in points for key in point)
    panels = {
        word: kept for word in ("loss", "perplexity") if (kept := [n for n in names if word in n])
    }
    if not points or not panels:
        return None
    figure, all_axes = _figure(len(panels), width=4.7 * len(panels), height=3.1)
    for axes, (word, kept) in zip(all_axes, panels.items(), strict=True):
        for index, name in enumerate(kept):
            values = [
                _number(p, name, where) if p.get(name) is not None else math.nan for p in points
            ]
            _line(axes, index, steps, values, name.replace("_", " "))
        axes.set_xlabel("Training step")
        axes.set_ylabel(word.capitalize())
        if word == "perplexity":
            axes.set_ylim(bottom=0)
        _legend(axes)
    return _data_uri(figure)


def attack_plot(losses: Mapping[str, Sequence[float | None]]) -> str:
    """The attacks' losses over their steps.

    A few share one panel. More are split into panels by what their labels say before the
    last comma, so that "per request: base, plain, ε 8/255" shares one with its other budgets.

    Args:
        losses: label to the loss at each step; a value of None leaves a gap.

    Returns:
        A data URI of an SVG picture.

    Raises:
        DataError: if a value is not a number.
    """
    panels: dict[str, dict[str, Sequence[float | None]]] = {}
    for name, values in losses.items():
        title, _, short = name.rpartition(", ") if len(losses) > len(COLOURS) else ("", "", name)
        panels.setdefault(title, {})[short] = values
    if len(panels) == 1:
        figure, all_axes = _figure(1, width=8.2, height=3.6)
    else:
        rows = math.ceil(len(panels) / 3)
        figure, all_axes = _figure(3, width=10.8, height=2.6 * rows, rows=rows)
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=False):
        for index, (name, values) in enumerate(lines.items()):
            where = f"series.attack_losses.{name}"
            numbers = [
                math.nan if v is None else _number({"loss": v}, "loss", where) for v in values
            ]
            _line(axes, index, list(range(1, len(numbers) + 1)), numbers, name)
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)
        axes.set_xlabel("Attack step", fontsize=9)
        axes.set_ylabel("Attack loss", fontsize=9)
        _legend(axes, outside=len(panels) == 1)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    return _data_uri(figure)


def _line(axes: Axes, index: int, x: Sequence[float], y: Sequence[float], name: str) -> None:
    # A leading underscore would hide the line from the legend.
    axes.plot(
        x,
        y,
        color=COLOURS[index % len(COLOURS)],
        linestyle=_DASHES[index // len(COLOURS) % len(_DASHES)],
        linewidth=1.5,
        marker="o" if len(x) == 1 else "",
        label=name.lstrip("_") or "unnamed",
    )


def _legend(axes: Axes, *, outside: bool = False) -> None:
    place: dict[str, Any] = {"loc": "best"}
    if outside:
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    legend = axes.legend(frameon=False, fontsize=8, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _figure(columns: int, width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    # Not pyplot: no state of the process is touched and no display is looked for.
    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    # The salt and the missing date make the same records give the same page.
    with rc_context({"svg.hashsalt": "vqguard", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _spread(indices: Sequence[int], count: int) -> list[int]:
    if len(indices) <= count:
        return list(indices)
    return [indices[round(k * (len(indices) - 1) / (count - 1))] for k in range(count)]


def _number(point: object, key: str, where: str) -> float:
    value = point.get(key) if isinstance(point, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: every point needs a number {key!r}, got {point!r}")
    return float(value)
