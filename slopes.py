"""Straight lines through the points of a sweep: the slope with its 95 % interval, and the line for the figure.

    fit = fit_sweep(ANIMAL_FRACTION, {0.0: runs, 0.5: runs, 1.0: runs})     # test IoU against the share of animals
    fit.slope                                                               # points for 10 % more animals

The line is that of least squares, fitted to each seed's scores; all doses weigh the same. Its interval is that of the whole
report: Student's t over seeds; with one seed the bootstrap over test images, all runs of an image drawn together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import figures
from arms import ANIMAL_FRACTION, LABEL_FRACTION, NUM_IMAGES
from blocks import fixed
from comparisons import Estimate, Pair, same_images
from metrics import Interval, bootstrap, line_weights, scores, t_interval
from records import RunRecord
from tables import Column, Page

FEWEST_DOSES = 3  # two points always lie on a line
PLACES = 41  # at which a line and its band are drawn


class Scale(NamedTuple):
    """How the shares in [0, 1] of a sweep become doses; a slope is the change of the score for one dose more."""

    dose: Callable[[np.ndarray], np.ndarray]
    places: Callable[[float, float, int], np.ndarray]  # evenly spaced doses, as shares
    step: str


def tenths(shares: np.ndarray) -> np.ndarray:
    """Count tenths: 0.3 are three."""
    return 10 * shares


SCALES = {
    ANIMAL_FRACTION: Scale(tenths, np.linspace, "10 % more animals"),
    LABEL_FRACTION: Scale(np.log2, np.geomspace, "each doubling of the labels"),
    NUM_IMAGES: Scale(np.log2, np.geomspace, "each doubling of the images"),
}


@dataclass
class SweepFit:
    """The least-squares line of a sweep."""

    step: str
    seeds: list[int]  # those that have a run at every dose
    slope: Estimate  # mean over seeds, points of test IoU for one step
    each: list[float]  # of each seed
    misfit: float  # points between the line and the mean of the dose that lies farthest from it
    interval: str
    shares: np.ndarray  # [PLACES] in percent
    line: Interval  # [PLACES] test IoU

    def drawing(self, label: str) -> figures.FittedLine:
        """Return what the figure shows; label: of the points that the line is fitted to."""
        slope = fixed(self.slope.value, 2, "+")
        if np.isfinite(self.slope.low):
            slope = self.slope.points(2)
        return figures.FittedLine(f"line, {label}: {slope} points for {self.step}", self.shares, *self.line)


def complete_seeds(runs: dict[float, list[RunRecord]]) -> list[int]:
    """List the seeds that have a run at every dose."""
    present = [{run.seed for run in at_dose} for at_dose in runs.values()]
    return sorted(set.intersection(*present))


def reason_against(runs: dict[float, list[RunRecord]]) -> str:
    """Say why no line is fitted; empty where one is."""
    if len(runs) < FEWEST_DOSES:
        return f"{len(runs)} doses, and a line takes {FEWEST_DOSES}"
    if not complete_seeds(runs):
        return "no seed has a run at every dose"
    return ""


def fit_sweep(sweep: str, runs: dict[float, list[RunRecord]]) -> SweepFit | None:
    """Fit a line to test IoU against the dose; runs: those that count at each share, by rising share.

    None where reason_against has a reason.
    """
    if reason_against(runs):
        return None
    scale = SCALES[sweep]
    shares = np.array(list(runs))
    seeds = complete_seeds(runs)
    table = [runs_of_seed(runs, seed) for seed in seeds]

    weights = line_weights(scale.dose(shares))  # [2, doses]
    places = scale.places(shares[0], shares[-1], PLACES)
    design = np.stack([np.ones(PLACES), scale.dose(places)], axis=1)
    outputs = np.concatenate([100 * weights[1:], design @ weights])  # [1 + PLACES, doses]: slope, then the line
    found, interval = estimate(table, outputs)

    each = np.array([[run.iou for run in row] for row in table])  # [seeds, doses]
    means = each.mean(0)
    at_doses = np.stack([np.ones(len(shares)), scale.dose(shares)], axis=1) @ weights @ means
    return SweepFit(
        step=scale.step,
        seeds=seeds,
        slope=Estimate(*(float(values[0]) for values in found)),
        each=(100 * each @ weights[1]).tolist(),
        misfit=100 * float(np.abs(means - at_doses).max()),
        interval=interval,
        shares=100 * places,
        line=Interval(*(values[1:] for values in found)),
    )


def runs_of_seed(runs: dict[float, list[RunRecord]], seed: int) -> list[RunRecord]:
    """Pick a seed's run at every dose."""
    return [run for at_dose in runs.values() for run in at_dose if run.seed == seed]


def estimate(table: list[list[RunRecord]], weights: np.ndarray) -> tuple[Interval, str]:
    """Estimate weighted sums of test IoU over doses, averaged over seeds, with the name of their interval.

    table: runs by seed and dose; weights [outputs, doses].
    """
    if len(table) > 1:
        return over_seeds(table, weights), "t over seeds"
    [row] = table
    if all(same_images(Pair(run, row[0])) for run in row):
        return over_images(row, weights), "bootstrap over images"
    return over_seeds(table, weights), "none, as the runs were tested on different images"


def over_seeds(table: list[list[RunRecord]], weights: np.ndarray) -> Interval:
    """Average over seeds, with t-intervals; a single seed has nan limits."""
    iou = np.array([[run.iou for run in row] for row in table])
    outputs = iou @ weights.T  # [seeds, outputs]
    intervals = [t_interval(column) for column in outputs.T]
    return Interval(*np.array(intervals).T)


def over_images(row: list[RunRecord], weights: np.ndarray) -> Interval:
    """Compute the sums of one seed, with bootstrap intervals over the test images that its runs share."""
    counts = np.stack([run.test["counts"] for run in row], axis=1)  # [images, doses, 3, 3]

    def outputs(sums: np.ndarray) -> np.ndarray:
        return scores(sums)["iou"] @ weights.T

    return bootstrap(counts, outputs)


# ----------------------------------------------------------------------------------------------------------------------
# In the report

SLOPE_TEXT = (
    "Slope of the least-squares line through the scores of a seed at all doses, averaged over seeds, in points of IoU for "
    "{step}. Interval: 95 %, {interval}. Farthest: the distance in points between the line and the mean of the dose that "
    "lies farthest from it; a line sums the doses up and does not claim that the effect is a straight one."
)
INTERVALS = {
    "t over seeds": "Student's t over seeds",
    "bootstrap over images": "with one seed the bootstrap over test images, all runs of an image drawn together, which "
    "knows nothing of how another seed would come out",
}
SLOPE_COLUMNS = [
    Column("arm", "line"),
    Column("seeds"),
    Column("doses"),
    Column("slope", "slope [95 %]", 2),
    Column("each", "per seed"),
    Column("misfit", "farthest", 2),
    Column("note"),
]


def slope_row(label: str, runs: dict[float, list[RunRecord]], fit: SweepFit | None) -> dict:
    """Describe a line, or say why there is none."""
    row: dict = {"arm": label, "seeds": 0, "doses": len(runs)}
    if fit is None:
        row["note"] = reason_against(runs)
        return row
    row["seeds"] = len(fit.seeds)
    row["slope"] = fit.slope
    row["step"] = fit.step
    row["each"] = ", ".join(fixed(value, 2, "+") for value in fit.each)
    row["misfit"] = fit.misfit
    row["interval"] = fit.interval
    others = sorted({run.seed for at_dose in runs.values() for run in at_dose} - set(fit.seeds))
    row["note"] = f"without seed {', '.join(map(str, others))} (not at every dose)" if others else ""
    return row


def show_slopes(page: Page, name: str, rows: list[dict]) -> None:
    """Show the lines of a sweep; rows: those of slope_row."""
    fitted = [row for row in rows if "slope" in row]
    if fitted:
        kinds = dict.fromkeys(row["interval"] for row in fitted)
        interval = "; ".join(INTERVALS.get(kind, kind) for kind in kinds)
        page.add(SLOPE_TEXT.format(step=fitted[0]["step"], interval=interval))
    page.table(name, rows, SLOPE_COLUMNS)
