"""Figures of the report, drawn from plain arrays. Each function draws one PNG; numpy and matplotlib only.

What belongs together comes with its label and a Style (colour, line, marker), so that an arm looks the same everywhere; no
function knows an arm. Copy this file together with arms.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from arms import BLACK, BLUE, RED, SKY, Style

MASK_COLOURS = np.array([(230, 159, 0), (255, 255, 255), (0, 114, 178)], dtype=np.uint8)  # pet, background, border
MASK_OPACITY = np.array([0.62, 0.45, 0.62])  # of the colours over the grey photo
PET = 0
SHARP_SIZE = 384  # pixels to which small images are enlarged, so that a thin outline can be drawn on them
REACH = 0.1  # intervals of few seeds can be wider than any readable picture: IoU that is shown to each side of a point
MANY_POINTS = 12  # from here on a curve needs no marks

plt.rcParams["font.size"] = 10
plt.rcParams["axes.grid"] = True
plt.rcParams["grid.alpha"] = 0.3
plt.rcParams["legend.frameon"] = False
plt.rcParams["savefig.dpi"] = 130
plt.rcParams["savefig.bbox"] = "tight"
plt.rcParams["axes.spines.top"] = False
plt.rcParams["axes.spines.right"] = False


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and free it."""
    figure.savefig(path)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Images


@dataclass
class ImageRow:
    """A row of images [k, H, W, 3] uint8 with its label."""

    label: str
    images: np.ndarray


def enlarge(images: np.ndarray) -> np.ndarray:
    """Repeat pixels until images [k, H, W, ...] have at least SHARP_SIZE; nothing is interpolated."""
    factor = math.ceil(SHARP_SIZE / max(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def outlines(masks: np.ndarray, width: int) -> np.ndarray:
    """Mark the pixels [k, H, W] inside boolean masks that are at most `width` pixels away from their edge."""
    inner = masks
    for _ in range(width):
        padded = np.pad(inner, [(0, 0), (1, 1), (1, 1)], mode="edge")
        vertical = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1]
        horizontal = padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
        inner = inner & vertical & horizontal
    return masks & ~inner


def overlays(photos: np.ndarray, masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Tint grey photos [k, H, W, 3] with the classes of masks [k, H, W], and outline the true pets in black.

    Returns enlarged images, see enlarge.
    """
    masks = enlarge(masks)
    grey = enlarge(photos).mean(axis=-1, keepdims=True)
    opacity = MASK_OPACITY[masks][..., None]
    tinted = (1 - opacity) * grey + opacity * MASK_COLOURS[masks]
    tinted[outlines(enlarge(truth) == PET, width=3)] = 0
    return tinted.round().astype(np.uint8)


def image_grid(path: Path, rows: Sequence[ImageRow], block: int = 0, legend: Sequence[Patch] = ()) -> None:
    """Draw labelled rows of images, with a gap after every `block` rows, and a legend below."""
    columns = max(len(row.images) for row in rows)
    gap = 0.12
    heights = []
    places = []  # of the rows among the lines of the grid, which has further lines for gaps
    for number in range(len(rows)):
        if block and number and number % block == 0:
            heights.append(gap)
        places.append(len(heights))
        heights.append(1)
    figure, axes = plt.subplots(
        len(heights), columns, figsize=(1.35 * columns, 1.35 * sum(heights)), squeeze=False, height_ratios=heights
    )
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.04, hspace=0.04)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, row in zip(places, rows, strict=True):
        first = axes[place, 0]
        place_left = {"transform": first.transAxes, "ha": "right", "va": "center"}
        first.text(-0.06, 0.5, row.label, parse_math=False, **place_left)
        for axis, image in zip(axes[place], enlarge(row.images), strict=False):
            axis.imshow(image)
    if legend:
        figure.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.005), ncols=len(legend))
    save(figure, path)


def mask_legend(names: Sequence[str]) -> list[Patch]:
    """Explain the colours of overlays; names of the classes, in the order of MASK_COLOURS."""
    handles = []
    for colour, name in zip(MASK_COLOURS, names, strict=True):
        if colour.min() < 255:  # the background keeps the photo's grey
            handles.append(Patch(color=colour / 255, label=name))
    handles.append(Patch(fill=False, edgecolor=BLACK, linewidth=1.5, label="outline of the true pet"))
    return handles


# ----------------------------------------------------------------------------------------------------------------------
# Curves


@dataclass
class Panel:
    """One panel of curves: `key` of the log lines of an event against their `x`.

    levels: what the scores of predictors that learn nothing, and other fixed heights, are called.
    """

    title: str
    event: str
    key: str
    levels: dict[str, float] = field(default_factory=dict)
    x: str = "epoch"


@dataclass
class Curve:
    """The logs of an arm, one a seed; a log is a list of lines with "event", "epoch" and scores."""

    label: str
    style: Style
    logs: list[list[dict]]


@dataclass
class Series:
    """Values of one log [k] against the epoch or update [k]."""

    x: np.ndarray
    values: np.ndarray


def read_series(log: list[dict], panel: Panel) -> Series:
    """Take what a panel shows from a log."""
    lines = [line for line in log if line["event"] == panel.event and panel.key in line]
    x = np.array([line[panel.x] for line in lines])
    return Series(x, np.array([line[panel.key] for line in lines]))


def curve_panels(path: Path, panels: Sequence[Panel], curves: Sequence[Curve]) -> None:
    """Draw a panel of all curves against the epoch for each score; seeds thin, their mean thick."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels), 3.4), squeeze=False)
    labels: dict[str, object] = {}
    for axis, panel in zip(axes[0], panels, strict=True):
        draw_panel(axis, panel, curves)
        handles, names = axis.get_legend_handles_labels()
        labels.update(zip(names, handles, strict=True))
    figure.tight_layout()
    columns = min(5, len(labels) or 1)
    figure.legend(labels.values(), labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=columns)
    save(figure, path)


def draw_panel(axis: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    """Draw the curves of a panel and its levels."""
    for curve in curves:
        draw_curve(axis, panel, curve)
    for name, height in panel.levels.items():
        axis.axhline(height, color="#555555", ls="--", lw=1.2)
        axis.text(0.99, height, name, transform=axis.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
    axis.set_xlabel({"epoch": "epoch", "step": "updates"}[panel.x])
    axis.set_ylabel(panel.title)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def draw_curve(axis: Axes, panel: Panel, curve: Curve) -> None:
    """Draw the seeds of an arm and the mean of those that were logged at the same epochs or updates."""
    runs = [read_series(log, panel) for log in curve.logs]
    runs = [run for run in runs if len(run.x)]
    if not runs:
        return
    style = curve.style
    if len(runs) > 1:
        for run in runs:
            axis.plot(run.x, run.values, style.line, color=style.colour, lw=0.8, alpha=0.45)
    x = runs[0].x
    mean = np.mean([run.values for run in runs if np.array_equal(run.x, x)], axis=0)
    marker = "." if len(x) < MANY_POINTS else ""
    axis.plot(x, mean, style.line, marker=marker, color=style.colour, lw=1.8, label=curve.label)


# ----------------------------------------------------------------------------------------------------------------------
# Differences


@dataclass
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass
class Difference:
    """A row of the forest plot, in points: each seed with its bootstrap interval, and their mean with its t-interval."""

    label: str
    seeds: list[Interval]
    mean: Interval | None


def forest(path: Path, rows: Sequence[Difference], margin: float) -> None:
    """Draw differences in IoU points, one row each; the margin of equivalence is shaded."""
    reach = [2 * margin]
    for row in rows:
        for seed in row.seeds:
            reach += [abs(seed.value), abs(seed.low), abs(seed.high)]
    limit = 1.25 * np.nanmax(reach)
    figure, axis = plt.subplots(figsize=(8.2, 0.72 * len(rows) + 1.4))
    axis.axvspan(-margin, margin, color=SKY, alpha=0.3, lw=0, label=f"±{margin:g} points")
    axis.axvline(0, color=BLACK, lw=0.8)
    for number, row in enumerate(rows):
        draw_seeds(axis, row, number)
        if row.mean is not None:
            draw_mean(axis, row.mean, number, limit)
    axis.set_yticks(-np.arange(len(rows)), [row.label for row in rows])
    axis.set_xlim(-limit, limit)
    axis.set_ylim(-len(rows) + 0.35, 0.55)
    axis.set_xlabel("difference in test IoU (percentage points)")
    axis.grid(axis="y", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.3, -0.6 / (0.72 * len(rows) + 0.9)), ncols=3, fontsize=9)
    save(figure, path)


def draw_seeds(axis: Axes, row: Difference, number: int) -> None:
    """Draw the seeds of a row, one below the other, under their mean if there is one."""
    top = -number - 0.12
    if row.mean is None:
        top = -number + 0.17
    step = 0.34 / (len(row.seeds) + 1)
    for place, seed in enumerate(row.seeds, 1):
        height = top - place * step
        first = number == 0 and place == 1
        label = "one seed, 95 % bootstrap over test images" if first else None
        axis.plot([seed.low, seed.high], [height, height], color=BLUE, lw=1.2)
        axis.plot(seed.value, height, "o", color=BLUE, ms=4, label=label)


def draw_mean(axis: Axes, mean: Interval, number: int, limit: float) -> None:
    """Draw a mean over seeds; an arrow stands for the end of an interval that is wider than the picture."""
    height = 0.12 - number
    label = "mean over seeds, 95 % t-interval" if number == 0 else None
    axis.plot(np.clip([mean.low, mean.high], -limit, limit), [height, height], color=RED, lw=2.4)
    axis.plot(mean.value, height, "D", color=RED, ms=6, label=label)
    if abs(mean.low) > limit:
        arrow = ">" if mean.low > 0 else "<"
        axis.plot(np.clip(mean.low, -limit, limit), height, arrow, color=RED, ms=8, clip_on=False)
    if abs(mean.high) > limit:
        arrow = ">" if mean.high > 0 else "<"
        axis.plot(np.clip(mean.high, -limit, limit), height, arrow, color=RED, ms=8, clip_on=False)


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps


@dataclass
class SweepPoint:
    """IoU, or a task's score, at a share in percent or a number of epochs, with its interval and each seed's value.

    mark: a letter beside the point.
    """

    share: float
    iou: Interval
    seeds: list[float]
    mark: str = ""


@dataclass
class FittedLine:
    """A fitted line at shares in percent [k]: IoU with its interval [k], and what the legend says of it."""

    label: str
    shares: np.ndarray
    iou: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass
class Line:
    """The points of a sweep that belong together, and the straight line through them if one was fitted."""

    label: str
    style: Style
    points: list[SweepPoint]
    fit: FittedLine | None = None


def bands(path: Path, lines: Sequence[Line], xlabel: str, log: bool = False) -> None:
    """Draw IoU against a share in percent: points with bars, and fitted lines with bands.

    log: on a logarithmic scale, where several lines are shifted a little against each other.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for number, line in enumerate(lines):
        shift = 1.0
        if log:
            shift += 0.05 * (number - (len(lines) - 1) / 2)
        draw_line(axis, line, shift)
        if line.fit is not None:
            draw_fit(axis, line.fit, line.style, thin=len(lines) > 1)
    if log:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xlabel(xlabel)
    axis.set_ylabel("test IoU")
    axis.set_ylim(*visible_range(lines))
    ticks = sorted({point.share for line in lines for point in line.points})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    legend_below(axis, lines)
    save(figure, path)


def sweep_beside_curves(
    path: Path, lines: Sequence[Line], axes_of_sweep: tuple[str, str], panels: Sequence[Panel], curves: Sequence[Curve]
) -> None:
    """Draw the lines of a sweep, with the titles of its two axes, beside panels of curves."""
    count = 1 + len(panels)
    figure, (left, *others) = plt.subplots(1, count, figsize=(5 * count, 4.2))
    for line in lines:
        draw_line(left, line, shift=1.0)
    left.set_xlabel(axes_of_sweep[0])
    left.set_ylabel(axes_of_sweep[1])
    left.set_ylim(*visible_range(lines))
    left.set_xticks(sorted({point.share for line in lines for point in line.points}))
    left.legend(loc="best")
    for axis, panel in zip(others, panels, strict=True):
        draw_panel(axis, panel, curves)
    if curves:
        others[0].legend(loc="best")
    figure.tight_layout()
    save(figure, path)


@dataclass
class Mark:
    """A score in a row: what it is of, its interval, each seed's value, and what the training before it cost."""

    label: str
    style: Style
    iou: Interval
    seeds: list[float]
    cost: float


@dataclass
class Row:
    """Scores of one kind, under one marker."""

    label: str
    marker: str
    marks: list[Mark]


def rows_beside_cost(path: Path, rows: Sequence[Row], titles: tuple[str, str]) -> None:
    """Draw rows of scores from top to bottom, beside the same scores against their cost; titles: of score and cost."""
    height = 1.6 + 0.55 * len(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height))
    for number, row in enumerate(rows):
        middle = (len(row.marks) - 1) / 2
        for place, mark in enumerate(row.marks):
            draw_mark(left, mark, row.marker, number + 0.24 * (place - middle))
        costs = [mark.cost for mark in row.marks]
        scores = [mark.iou.value for mark in row.marks]
        right.plot(costs, scores, row.marker, color=BLACK, mfc="none", ms=9, label=row.label)
        for mark in row.marks:
            right.plot(mark.cost, mark.iou.value, row.marker, color=mark.style.colour, ms=5)
    left.set_yticks(range(len(rows)), [row.label for row in rows])
    left.invert_yaxis()
    left.set_xlabel(titles[0])
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel(titles[1])
    right.set_ylabel(titles[0])
    handles, names = left.get_legend_handles_labels()
    found = dict(zip(names, handles, strict=True))
    figure.tight_layout()
    left.legend(found.values(), found.keys(), loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(found))
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def draw_mark(axis: Axes, mark: Mark, marker: str, height: float) -> None:
    """Draw a score with its interval and seeds at a height."""
    low = max(mark.iou.low, mark.iou.value - REACH)
    high = min(mark.iou.high, mark.iou.value + REACH)
    axis.hlines(height, low, high, color=mark.style.colour, lw=1.4, alpha=0.6)
    axis.plot(mark.seeds, [height] * len(mark.seeds), ".", color=mark.style.colour, alpha=0.6, ms=5)
    axis.plot(mark.iou.value, height, marker, color=mark.style.colour, ms=7, label=mark.label)


def legend_below(axis: Axes, lines: Sequence[Line]) -> None:
    """Put a legend below the picture: the lines in one column, what was fitted to them in another."""
    handles, names = axis.get_legend_handles_labels()
    found = dict(zip(names, handles, strict=True))
    points = [line.label for line in lines]
    fits = [line.fit.label for line in lines if line.fit is not None]
    shown = [*points, *fits]
    columns = 2 if fits else 1
    axis.legend([found[name] for name in shown], shown, loc="upper left", bbox_to_anchor=(-0.05, -0.14), ncols=columns)


def visible_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Choose limits in [0, 1] that hold all values, and of their intervals what is not too far away."""
    shown = []
    for line in lines:
        for point in line.points:
            middle = point.iou.value
            shown += [middle, *point.seeds]
            ends = np.clip([point.iou.low, point.iou.high], middle - REACH, middle + REACH)
            shown += [float(end) for end in ends if np.isfinite(end)]
    margin = 0.1 * (max(shown) - min(shown)) + 0.01
    return max(0, min(shown) - margin), min(1, max(shown) + margin)


def draw_line(axis: Axes, line: Line, shift: float) -> None:
    """Draw a line of a sweep with its intervals and seeds."""
    style = line.style
    x = np.array([point.share for point in line.points]) * shift
    middle = np.array([point.iou.value for point in line.points], float)
    low = np.array([point.iou.low for point in line.points], float)
    high = np.array([point.iou.high for point in line.points], float)
    axis.plot(x, middle, linestyle=style.line, lw=0.8, marker=style.marker, ms=6, color=style.colour, label=line.label)
    axis.vlines(x, low, high, color=style.colour, lw=1.4, alpha=0.6)
    for place, point in zip(x, line.points, strict=True):
        axis.plot(np.full(len(point.seeds), place), point.seeds, ".", color=style.colour, alpha=0.6, ms=5)
        axis.annotate(point.mark, (place, point.iou.value), (6, 6), textcoords="offset points", color=style.colour)


def draw_fit(axis: Axes, fit: FittedLine, style: Style, thin: bool) -> None:
    """Draw a fitted line with its band; thin: one of several."""
    axis.plot(fit.shares, fit.iou, "--", color=style.colour, lw=1.2 if thin else 2.0, label=fit.label)
    axis.fill_between(fit.shares, fit.low, fit.high, color=style.colour, alpha=0.08 if thin else 0.18, lw=0)


# ----------------------------------------------------------------------------------------------------------------------
# Two scores of the same runs


@dataclass
class Cloud:
    """The runs of an arm: scores of pre-training by key [runs], and test IoU [runs]."""

    label: str
    style: Style
    scores: dict[str, list[float]]
    iou: list[float]


def scatter(path: Path, clouds: Sequence[Cloud], titles: dict[str, str]) -> None:
    """Draw IoU against each score of pre-training, one mark a run; titles: score -> label of its axis."""
    width = 4.6 * len(titles)
    figure, axes = plt.subplots(1, len(titles), figsize=(width, 3.8), sharey=True, squeeze=False)
    for axis, (key, title) in zip(axes[0], titles.items(), strict=True):
        for cloud in clouds:
            style = cloud.style
            axis.plot(
                cloud.scores[key], cloud.iou, style.marker, color=style.colour, ms=7, alpha=0.85, label=cloud.label
            )
        axis.set_xlabel(title)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axes[0, 0].set_ylabel("test IoU after fine-tuning")
    figure.tight_layout()
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# Scores of several arms beside a yardstick


@dataclass
class DotRow:
    """The score of an arm with its interval, and the value of each seed."""

    label: str
    style: Style
    value: Interval
    seeds: list[float]


@dataclass
class DotPanel:
    """One score of all arms; yardstick: what they are compared with."""

    title: str
    rows: list[DotRow]
    yardstick: Interval | None


PANELS_ABREAST = 3


def dot_panels(path: Path, panels: Sequence[DotPanel], yardstick: str) -> None:
    """Draw a panel for each score, with a row for each arm and a dashed line at the yardstick, which has this name."""
    lines = math.ceil(len(panels) / PANELS_ABREAST)
    height = 0.36 * len(panels[0].rows) + 1.15
    figure, axes = plt.subplots(lines, PANELS_ABREAST, figsize=(10.5, lines * height), squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw_dots(axis, panel, yardstick)
    rows = panels[0].rows
    axes[0, 0].set_yticks(-np.arange(len(rows)), [row.label for row in rows])
    axes[0, 0].set_ylim(-len(rows) + 0.5, 0.5)
    figure.tight_layout()
    handles, names = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=2)
    save(figure, path)


def draw_dots(axis: Axes, panel: DotPanel, yardstick: str) -> None:
    """Draw one score of all arms."""
    if panel.yardstick is not None:
        line = panel.yardstick
        axis.axvline(line.value, color="#444444", ls="--", lw=1.6, label=yardstick)
        axis.axvspan(line.low, line.high, color="#888888", alpha=0.18, lw=0, label="its 95 % interval")
    for number, row in enumerate(panel.rows):
        value = row.value
        colour = row.style.colour
        axis.plot([value.low, value.high], [-number, -number], color=colour, lw=2.2, alpha=0.55, solid_capstyle="round")
        if len(row.seeds) > 1:
            axis.plot(row.seeds, np.full(len(row.seeds), -number + 0.2), ".", color=colour, ms=4, alpha=0.7)
        axis.plot(value.value, -number, row.style.marker, color=colour, ms=9)
    axis.set_title(panel.title, fontsize=12)
    axis.set_xlim(*dot_limits(panel))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.grid(axis="y", visible=False)


def dot_limits(panel: DotPanel) -> tuple[float, float]:
    """Choose limits that hold all values, and of their intervals what is not too far away."""
    shown = []
    intervals = [row.value for row in panel.rows]
    if panel.yardstick is not None:
        intervals.append(panel.yardstick)
    for interval in intervals:
        ends = np.clip([interval.low, interval.high], interval.value - REACH, interval.value + REACH)
        shown += [interval.value, *(float(end) for end in ends if np.isfinite(end))]
    for row in panel.rows:
        shown += row.seeds
    margin = 0.06 * (max(shown) - min(shown)) + 0.005
    return min(shown) - margin, max(shown) + margin
