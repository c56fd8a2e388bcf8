"""Figures of the report, drawn from plain arrays. Each function draws one PNG; numpy and matplotlib only.

Colours are Okabe and Ito's (2008), told apart by colour-blind readers; an arm has one colour and one line style everywhere.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#808080"
STYLE = {
    "animal": (RED, "-", "o"), "half": (ORANGE, "--", "v"), "non_animal": (BLUE, "-", "s"), "mixed": (GREEN, "-", "D"),
    "mae": (PURPLE, "-.", "^"), "resnet50": (BLACK, ":", "X"), "pets": (SKY, "--", "P"), "all": (GREY, "--", "*"),
    "dose": (BLUE, "-", "o"),
}  # fmt: skip
MASK_COLOURS = np.array([(230, 159, 0), (30, 30, 30), (86, 180, 233)], dtype=np.uint8)  # pet, background, border
plt.rcParams |= {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "savefig.dpi": 130}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "savefig.bbox": "tight"}


def style(arm: str) -> tuple[str, str, str]:
    """Colour, line style and marker of an arm; doses take a shade between the two ends of their scale."""
    if arm.startswith("dose_"):
        share = float(arm[5:])
        return matplotlib.colors.to_hex(plt.cm.cividis(share**0.5)), "-", "o^v<>p8"[round(20 * share) % 7]
    return STYLE.get(arm.split("_labels_")[0], (GREY, "-", "o"))


def save(fig, path) -> None:
    """Write a figure as PNG and free it."""
    fig.savefig(path)
    plt.close(fig)


def image_grid(path, rows: list[tuple[str, np.ndarray]], block: int = 0, legend: tuple[str, ...] = ()) -> None:
    """Draw labelled rows of images [k, H, W, 3], with a gap after every `block` rows; legend names the mask colours."""
    columns = max(len(images) for _, images in rows)
    heights = [h for i in range(len(rows)) for h in ([0.12, 1] if block and i and i % block == 0 else [1])]
    size = (1.25 * columns, 1.25 * sum(heights))
    fig, axes = plt.subplots(len(heights), columns, figsize=size, squeeze=False, height_ratios=heights)
    fig.subplots_adjust(0, 0, 1, 1, wspace=0.04, hspace=0.05)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (label, images) in zip(axes[np.array(heights) == 1], rows, strict=True):
        line[0].text(-0.06, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, interpolation="nearest")
    if legend:
        handles = [Patch(color=c / 255, label=name) for c, name in zip(MASK_COLOURS, legend, strict=True)]
        fig.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.005), ncols=3)
    save(fig, path)


def curve_panels(path, panels: dict[str, tuple], arms: dict[str, tuple[str, list]]) -> None:
    """Draw one panel per title with the curves of all arms against the epoch; seeds thin, their mean thick.

    panels: title -> (event, field, height of a line or None); arms: arm -> (label, the log of each seed's run).
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels), 3.4), squeeze=False)
    for axis, (name, (event, key, zero)) in zip(axes[0], panels.items(), strict=True):
        for arm, (label, logs) in arms.items():
            points = [[(x["epoch"], x[key]) for x in log if x["event"] == event and key in x] for log in logs]
            (colour, line, _), runs = style(arm), [np.array(p).T for p in points if p]
            for x, y in runs if len(runs) > 1 else ():
                axis.plot(x, y, line, color=colour, lw=0.8, alpha=0.45)
            if runs:
                x, y = np.mean([r for r in runs if np.array_equal(r[0], runs[0][0])], axis=0)
                axis.plot(x, y, line, marker="." * (len(x) < 12), color=colour, lw=1.8, label=label)
        if zero is not None:
            place = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 9}
            axis.axhline(zero, color="#555555", ls="--", lw=1.2)
            axis.text(0.99, zero, "predicting zero", **place)
        axis.set(xlabel="epoch", ylabel=name)
        axis.xaxis.set_major_locator(plt.MaxNLocator(6, integer=True))
    named = {k: v for axis in axes[0] for v, k in zip(*axis.get_legend_handles_labels(), strict=True)}
    fig.tight_layout()
    fig.legend(named.values(), named, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=min(5, len(named) or 1))
    save(fig, path)


def forest(path, rows: list[dict], margin: float) -> None:
    """Draw differences in IoU points: per row a label, seeds [(value, low, high)] and perhaps a mean with its t-interval."""
    limit = 1.25 * np.nanmax([abs(v) for r in rows for seed in r["seeds"] for v in seed] + [2 * margin])
    fig, axis = plt.subplots(figsize=(8.2, 0.72 * len(rows) + 1.4))
    axis.axvspan(-margin, margin, color=SKY, alpha=0.3, lw=0, label=f"±{margin:g} points")
    axis.axvline(0, color=BLACK, lw=0.8)
    for i, row in enumerate(rows):
        top, step = (0.17 if row["mean"] is None else -0.12) - i, 0.34 / (len(row["seeds"]) + 1)
        for k, (value, low, high) in enumerate(row["seeds"], 1):
            label = "one seed, 95 % bootstrap over test images" if (i, k) == (0, 1) else None
            axis.plot([low, high], [top - k * step] * 2, color=BLUE, lw=1.2)
            axis.plot(value, top - k * step, "o", color=BLUE, ms=4, label=label)
        if row["mean"] is not None:
            (value, *ends), y, label = row["mean"], 0.12 - i, "mean over seeds, 95 % t-interval" if i == 0 else None
            axis.plot(np.clip(ends, -limit, limit), [y] * 2, color=RED, lw=2.4)
            axis.plot(value, y, "D", color=RED, ms=6, label=label)
            for end in (e for e in ends if abs(e) > limit):  # wider than what can be shown at a readable scale
                axis.plot(np.clip(end, -limit, limit), y, "<>"[end > 0], color=RED, ms=8, clip_on=False)
    axis.set(yticks=-np.arange(len(rows)), yticklabels=[r["label"] for r in rows], xlim=(-limit, limit),
             ylim=(-len(rows) + 0.35, 0.55), xlabel="difference in test IoU (percentage points)")  # fmt: skip
    axis.grid(axis="y", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.3, -0.6 / (0.72 * len(rows) + 0.9)), ncols=3, fontsize=9)
    save(fig, path)


def bands(path, lines: dict[str, list[dict]], xlabel: str, log: bool = False) -> None:
    """Draw IoU against a share in percent with its interval: arm -> points {"arm", "share", "iou", "values"}.

    One line gets a band, several get bars side by side. Intervals of few seeds may be wider than the picture.
    """
    fig, axis = plt.subplots(figsize=(7, 4.2))
    shown = [v for points in lines.values() for p in points for v in (p["iou"][0], *p["values"])]
    # Intervals of few seeds can be wider than any readable picture.
    ends = [np.clip(p["iou"][1:], p["iou"][0] - 0.1, p["iou"][0] + 0.1) for points in lines.values() for p in points]
    shown += [float(v) for pair in ends for v in pair if np.isfinite(v)]
    margin = 0.1 * (max(shown) - min(shown)) + 0.01
    for i, (arm, points) in enumerate(lines.items()):
        colour, dash, marker = style(arm)
        x = np.array([p["share"] for p in points]) * (1 + log * 0.05 * (i - (len(lines) - 1) / 2))
        y, low, high = np.array([p["iou"] for p in points], float).T
        axis.plot(x, y, linestyle=dash, marker=marker, ms=6, color=colour, label=points[0]["arm"])
        if len(lines) == 1:
            axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        else:
            axis.vlines(x, low, high, color=colour, lw=1.4, alpha=0.6)
        for place, p in zip(x, points, strict=True):
            axis.plot([place] * len(p["values"]), p["values"], ".", color=colour, alpha=0.6, ms=5)
    if log:
        axis.set_xscale("log")
        axis.minorticks_off()
    ticks = sorted({p["share"] for points in lines.values() for p in points})
    axis.set(xlabel=xlabel, ylabel="test IoU", ylim=(max(0, min(shown) - margin), min(1, max(shown) + margin)))
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    if len(lines) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(fig, path)


def scatter(path, points: list[dict]) -> None:
    """Draw IoU against pre-training loss, one mark per run: [{"arm", "label", "loss_animal", "loss_non_animal", "iou"}]."""
    fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.8), sharey=True)
    for axis, of in zip(axes, ("animal", "non_animal"), strict=True):
        for label, arm in {p["label"]: p["arm"] for p in points}.items():
            marks = np.array([(p[f"loss_{of}"], p["iou"]) for p in points if p["label"] == label]).T
            axis.plot(*marks, style(arm)[2], color=style(arm)[0], ms=7, alpha=0.85, label=label)
        axis.set_xlabel(f"pre-training loss on {of.replace('_', '-')} validation images")
        axis.xaxis.set_major_locator(plt.MaxNLocator(5))
    axes[0].set_ylabel("test IoU after fine-tuning")
    fig.tight_layout()
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(fig, path)
