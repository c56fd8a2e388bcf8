"""Compare the runs of a study: scores with intervals, and planned differences with tests where tests may be made.

    estimates(study.main(arms.ANIMAL))["iou"]       # Estimate(value, low, high)
    planned(study, "segment")                       # the planned differences between its arms

Over seeds, intervals are Student's t, and so are tests, which are made from three seeds on; of one run, the bootstrap over
test images (see metrics.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from arms import PLANNED, Arm, ArmKey
from blocks import fixed
from groups import Study, differing, tolerance
from metrics import (
    bootstrap,
    detectable_difference,
    holm,
    image_iou_each,
    paired_bootstrap,
    paired_t_test,
    ratio,
    scores,
    t_interval,
    tost,
    unpaired_bootstrap,
)
from records import SEGMENT, SIZES, RunRecord, TestTable

MARGIN = 0.5  # IoU points within which two arms count as equivalent
LEVEL = 0.05  # of the tests, after correction
POWER = 0.8  # with which a difference that "could have been shown" is found
FEWEST_SEEDS = 3  # that are tested: with two, one lucky pair is enough for a small p
NOUNS = {"n_train": "images", "n_unique": "distinct images", "updates": "updates"}


class Estimate(NamedTuple):
    """A value with its 95 % interval (nan limits: none)."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def times(self, factor: float) -> "Estimate":
        """Change the unit."""
        return Estimate(float(factor * self.value), float(factor * self.low), float(factor * self.high))

    def within(self, lowest: float, highest: float) -> "Estimate":
        """Cut the interval off where no value can lie."""
        low, high = np.clip([self.low, self.high], lowest, highest)
        return Estimate(float(self.value), float(low), float(high))

    def points(self, digits: int) -> str:
        """Write a difference in points with its sign, and its interval."""
        return f"{fixed(self.value, digits, '+')} [{fixed(self.low, digits, '+')}, {fixed(self.high, digits, '+')}]"


def per_image_table(table: TestTable) -> TestTable:
    """Turn sums into scores of single images, to be averaged over those images that have them."""
    values = table.score(table.sums)
    sums = np.stack([np.nan_to_num(values), ~np.isnan(values)], axis=-1)

    def average(sums: np.ndarray) -> np.ndarray:
        return ratio(sums[..., 0], sums[..., 1])

    return TestTable(sums, average, table.names)


def estimates(
    runs: list[RunRecord], native: bool = False, per_image: bool = False, resamples: int = 10_000
) -> dict[str, Estimate]:
    """Average each test score over seeds, with its t-interval; of a single run with the bootstrap over test images.

    native: at the images' own sizes. per_image: score each image and average, instead of summing images first.
    """
    tables = [run.table(native) for run in runs]
    if per_image:
        tables = [per_image_table(table) for table in tables]
    names = tables[0].names
    if len(runs) == 1:
        values, lows, highs = bootstrap(tables[0].sums, tables[0].score, resamples)
        found = {name: Estimate(values[i], lows[i], highs[i]) for i, name in enumerate(names)}
    else:
        seeds = np.array([table.score(table.sums.sum(0)) for table in tables])
        found = {name: Estimate(*t_interval(seeds[:, i])) for i, name in enumerate(names)}
    return {name: within_range(name, estimate) for name, estimate in found.items()}


def within_range(score: str, estimate: Estimate) -> Estimate:
    """Cut an interval off at 0, and at 1 unless the score is a loss, which has no highest value."""
    highest = math.inf if score.startswith("loss") else 1.0
    return estimate.within(0.0, highest)


def image_records(counts: np.ndarray) -> np.ndarray:
    """Score each image of counts [n, 3, 3] as the original study does -> records [n, 2] of (IoU, 1) for the bootstrap."""
    each = image_iou_each(counts)
    return np.stack([each, np.ones_like(each)], axis=-1)


def mean_of_records(sums: np.ndarray) -> np.ndarray:
    """Average records that image_records made: sums [..., 2] -> [...]."""
    return sums[..., 0] / sums[..., 1]


def image_level_iou(runs: list[RunRecord], resamples: int = 10_000) -> Estimate:
    """Average the IoU of each test image, the original study's score; the interval is that of `estimates`."""
    records = [image_records(run.test["counts"]) for run in runs]
    if len(runs) == 1:
        found = Estimate(*map(float, bootstrap(records[0], mean_of_records, resamples)))
    else:
        found = Estimate(*t_interval([mean_of_records(part.sum(0)) for part in records]))
    return within_range("iou", found)


# ----------------------------------------------------------------------------------------------------------------------
# Planned differences


DIFFERENT = "different"
SMALL = f"different, within ±{MARGIN}"
EQUIVALENT = "equivalent"
INCONCLUSIVE = "inconclusive"
NOT_TESTED = "not tested"


class Pair(NamedTuple):
    """Two runs of one seed."""

    a: RunRecord
    b: RunRecord


@dataclass
class Comparison:
    """Paired differences a - b of one test score, seed by seed; reason: why they may not be tested."""

    a: Arm
    b: Arm
    score: str
    seeds: list[int]
    values: list[float]  # in points (hundredths of the score)
    images: list[Estimate]  # of each seed, with the bootstrap over test images
    mean: Estimate | None  # over seeds
    miou: float | None  # mean difference of mIoU in points; only of a segmentation
    reason: str
    p: float = math.nan  # paired t-test
    tost: float = math.nan  # equivalence within MARGIN; only of a segmentation
    holm: float = math.nan  # p, corrected for all planned comparisons that are tested
    tost_holm: float = math.nan  # tost, corrected in the same way
    detectable: float = math.nan  # smallest difference in points that a corrected test finds with POWER
    detectable_alone: float = math.nan  # the same if this were the only test

    @property
    def label(self) -> str:
        return f"{self.a.label} − {self.b.label}"

    @property
    def tested(self) -> bool:
        return not math.isnan(self.p)

    def untested_cells(self) -> dict:
        """Give a table's cells for a difference that is shown without a test: each seed's, and the mean of several."""
        each = []
        for value, image in zip(self.values, self.images, strict=True):
            each.append(image._replace(value=value).points(2))
        cells: dict[str, object] = {"each": ", ".join(each)}
        if len(self.values) > 1:
            cells["mean"] = self.mean
        return cells

    @property
    def verdict(self) -> str:
        """Say what the tests decide, each after correction; what none of them decides is never called equal."""
        if not self.tested:
            return NOT_TESTED
        different = self.holm < LEVEL
        equivalent = self.tost_holm < LEVEL
        if different and equivalent:
            return SMALL
        if different:
            return DIFFERENT
        if equivalent:
            return EQUIVALENT
        return INCONCLUSIVE


def seed_pairs(study: Study, a: ArmKey, b: ArmKey) -> list[Pair]:
    """Pair the runs of two arms by their seeds."""
    return [Pair(x, y) for x in study.main(a) for y in study.main(b) if x.seed == y.seed]


def compare(study: Study, a: ArmKey, b: ArmKey) -> Comparison:
    """Compare the runs of two arms."""
    pairs = seed_pairs(study, a, b)
    reasons = []
    if not pairs:
        reasons.append("no seed has both runs")
    if len(pairs) == 1:
        reasons.append("one seed")
    elif 0 < len(pairs) < FEWEST_SEEDS:
        reasons.append(f"{len(pairs)} seeds, and tests are made from {FEWEST_SEEDS} on")
    for pair in pairs:
        reasons.extend(reasons_against(study, pair))
    score = pairs[0].a.select if pairs else ""
    values = [100 * (pair.a.score(score) - pair.b.score(score)) for pair in pairs]
    result = Comparison(
        study.arms[a],
        study.arms[b],
        score,
        seeds=[pair.a.seed for pair in pairs],
        values=values,
        images=[image_difference(pair, score).times(100) for pair in pairs],
        mean=Estimate(*t_interval(values)) if pairs else None,
        miou=None,
        reason="; ".join(dict.fromkeys(reasons)),
    )
    segmentation = bool(pairs) and pairs[0].a.kind == SEGMENT
    if segmentation:
        result.miou = 100 * float(np.mean([pair.a.score("miou") - pair.b.score("miou") for pair in pairs]))
    if pairs and not reasons:
        result.p = paired_t_test(values)
        if segmentation:
            result.tost = tost(values, MARGIN)
    return result


def image_difference(pair: Pair, score: str) -> Estimate:
    """Return the difference between two trained models with its bootstrap interval over the test images.

    Images are resampled in pairs where both were tested on the same ones, else independently.
    """
    compared = paired_bootstrap if same_images(pair) else unpaired_bootstrap
    if pair.a.kind == SEGMENT:

        def segment_score(counts: np.ndarray) -> np.ndarray:
            return scores(counts)[score]

        return Estimate(*compared(pair.a.test["counts"], pair.b.test["counts"], segment_score))
    a = pair.a.table()
    b = pair.b.table()
    place = a.names.index(score)

    def one_score(sums: np.ndarray) -> np.ndarray:
        return a.score(sums)[..., place]

    return Estimate(*compared(a.sums, b.sums, one_score))


def image_level_difference(pair: Pair) -> Estimate:
    """Return the difference of image-level IoU between two trained models, as image_difference does."""
    compared = paired_bootstrap if same_images(pair) else unpaired_bootstrap
    records = [image_records(run.test["counts"]) for run in pair]
    return Estimate(*compared(*records, mean_of_records))


def same_images(pair: Pair) -> bool:
    """Check whether two runs were tested on the same images in the same order."""
    return np.array_equal(pair.a.test["ids"], pair.b.test["ids"])


def reasons_against(study: Study, pair: Pair) -> Iterator[str]:
    """Explain why the difference between two runs may come from something else than what defines their arms."""
    before = [study.parent(run) for run in pair if run.stage == "finetune"]
    if any(run is None or not run.config for run in before):
        yield "pre-training unknown"
        before = []
    if any(counts_images_per_category(run.config["args"]) for run in before):
        yield "images counted per category"
    yield from unequal_sizes("pre-training", before)
    yield from unequal_sizes("fine-tuning", list(pair))
    if not same_images(pair):
        yield "tested on other images"
    yield from differing(pair.a.settings, pair.b.settings, tolerance(pair.a.arm, pair.b.arm), shared=True)


def counts_images_per_category(flags: dict) -> bool:
    """Tell whether a pre-training listed an image once for each of its categories; one's own images have none."""
    return not flags.get("images") and flags.get("animal_images") != "unique"


def unequal_sizes(what: str, runs: list[RunRecord]) -> Iterator[str]:
    """Name numbers of images and updates that differ; distinct images only where the lists are equally long."""
    lengths = {run.config["n_train"] for run in runs}
    for size in SIZES:
        values = [run.config[size] for run in runs]
        if size == "n_unique" and len(lengths) > 1:
            continue
        if len(set(values)) > 1:
            numbers = " / ".join(f"{value:,}" for value in values)
            yield f"{what} {NOUNS[size]} {numbers}"


def planned(study: Study, kind: str) -> list[Comparison]:
    """Make the planned comparisons of a task whose arms are part of the study, and correct their p-values."""
    found = []
    for a, b in PLANNED:
        if a not in study.groups or b not in study.groups:
            continue
        kinds = {run.kind for key in (a, b) for run in study.main(key)}
        if not kinds - {kind}:
            found.append(compare(study, a, b))
    correct(found)
    return found


def columns_of_test(comparison: Comparison) -> dict:
    """Give what tables show of a test: p, corrected p, what it could have shown, and the verdict."""
    return {
        "p": comparison.p,
        "holm": comparison.holm,
        "detectable": comparison.detectable,
        "detectable_alone": comparison.detectable_alone,
        "verdict": comparison.verdict,
    }


def number_of_tests(comparisons: list[Comparison]) -> int:
    """Count the comparisons that Holm's correction is for: those that are tested, or else those that have values."""
    tested = [comparison for comparison in comparisons if comparison.tested]
    compared = [comparison for comparison in comparisons if comparison.values]
    return max(1, len(tested or compared))


def correct(comparisons: list[Comparison]) -> None:
    """Correct the p-values of comparisons that are made together, and compute what each test could have shown.

    A difference counts as shown where p passes the level that Holm asks of the smallest of m p-values, LEVEL / m: such a
    p is significant whatever the other tests give.
    """
    strict = LEVEL / number_of_tests(comparisons)
    differences = holm([comparison.p for comparison in comparisons])
    equivalences = holm([comparison.tost for comparison in comparisons])
    for comparison, p, tost_p in zip(comparisons, differences, equivalences, strict=True):
        comparison.holm = float(p)
        comparison.tost_holm = float(tost_p)
        if comparison.tested:
            comparison.detectable = detectable_difference(comparison.values, POWER, strict)
            comparison.detectable_alone = detectable_difference(comparison.values, POWER, LEVEL)
