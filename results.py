"""Sections of the report on segmentation, the study's own task: scores, differences, curves, masks and sweeps.

Every section is a function of the study and the page; it adds nothing where its runs do not exist.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import figures
from arms import (
    ANIMAL,
    ANIMAL_FRACTION,
    ARMS,
    AUDIT,
    HALF,
    LABEL_FRACTION,
    LABELS,
    MIXED,
    NON_ANIMAL,
    NUM_IMAGES,
    OBJECTIVE,
    RESNET,
    SUPERVISED,
    TABLE_2,
    Arm,
    ArmKey,
    SweepLine,
    find_arm,
    in_table_order,
    sweep_lines,
)
from blocks import fixed, literal
from comparisons import (
    DIFFERENT,
    EQUIVALENT,
    FEWEST_SEEDS,
    LEVEL,
    MARGIN,
    POWER,
    SMALL,
    Comparison,
    Estimate,
    columns_of_test,
    estimates,
    image_level_iou,
    within_range,
)
from groups import Pictures, Study, most_common
from metrics import CLASSES, detectable_effect, image_iou, paired_bootstrap, scores, t_interval, unpaired_bootstrap
from power import verdict_lines
from records import SEGMENT, RunRecord
from slopes import SweepFit, fit_sweep, show_slopes, slope_row
from tables import Column, Page, write_table

TRIVIAL = {"all_animal": "all animal", "all_background": "all background", "mean_mask": "mean training mask"}


def seeds_in_curves(study: Study) -> str:
    """Describe the lines in a figure of curves."""
    if len({run.seed for run in study.runs}) > 1:
        return "thin: seeds, thick: their mean"
    return "one seed"


def scored_arms(study: Study) -> list[ArmKey]:
    """List the arms outside sweeps that have usable segmentations, in the order of Table 2."""
    keys = [key for key, arm in study.arms.items() if not arm.sweep and study.main_of(key, SEGMENT)]
    return in_table_order(keys)


# ----------------------------------------------------------------------------------------------------------------------
# Table 2


TABLE_2_TEXT = (
    "Test images at input size. IoU is that of the pet, with the border counted as background. The paper's is a mean over "
    "images, so our mean over images stands next to it. IoU of summed counts, in which every pixel weighs the same, has its "
    "own column; the headline and all differences are of the latter unless they say otherwise. "
    "Intervals: 95 %, Student's t over seeds; with one seed the bootstrap over test images, which knows nothing of how "
    "another seed would come out."
)
KEPT_TEXT = {"best": "weights of the best validation IoU", "last": "the last epoch's weights"}


def table_2_text(study: Study) -> str:
    """Say what the table shows, and which weights were kept."""
    kept = {}
    for key in scored_arms(study):
        keep = study.main(key)[0].config["args"].get("keep", "best")
        kept[KEPT_TEXT[keep]] = True
    if not kept:
        return TABLE_2_TEXT
    return f"{TABLE_2_TEXT} Tested: {' or '.join(kept)}."


TABLE_2_COLUMNS = [
    Column("arm"),
    Column("seeds"),
    Column("loss"),
    Column("paper_loss", "paper", 2),
    Column("image_iou", "IoU, mean over images"),
    Column("paper_iou", "paper"),
    Column("iou", "IoU of summed counts"),
    Column("accuracy", "accuracy (%)", 1),
    Column("paper_accuracy", "paper", 1),
    Column("note"),
]
DAGGER = "†"


@dataclass(frozen=True)
class Trivial:
    """A predictor that looks at no image: its name, test IoU, pixel counts [n, 3, 3] and the ids of the images [n]."""

    name: str
    iou: float
    counts: np.ndarray
    ids: np.ndarray


def test_iou(counts: np.ndarray) -> np.ndarray:
    """Score counts [..., 3, 3] by the study's IoU."""
    return scores(counts)["iou"]


def best_trivial(study: Study) -> Trivial | None:
    """Find the best predictor that looks at no image; None where they were not scored."""
    found = []
    for name, words in TRIVIAL.items():
        counts = study.reference.get(f"counts_{name}")
        if counts is not None:
            found.append(Trivial(words, float(test_iou(counts.sum(0))), counts, study.reference["ids"]))
    return max(found, key=trivial_iou, default=None)


def trivial_iou(trivial: Trivial) -> float:
    return trivial.iou


def beats(runs: list[RunRecord], trivial: Trivial) -> bool:
    """Check that every run is ahead by more than the 95 % interval of the bootstrap over test images."""
    for run in runs:
        compared = paired_bootstrap
        if not np.array_equal(run.test["ids"], trivial.ids):
            compared = unpaired_bootstrap
        difference = Estimate(*compared(run.test["counts"], trivial.counts, test_iou))
        if not difference.low > 0:
            return False
    return True


def table_2_rows(study: Study, trivial: Trivial | None) -> list[dict]:
    """Score all arms, and predictors that look at no image."""
    further = [key for key, arm in study.arms.items() if arm.stage != "pretrain" and not arm.sweep]
    rows = []
    for key in in_table_order([*TABLE_2, *(key for key in further if key not in TABLE_2)]):
        rows += arm_rows(study, key, trivial)
    for name, words in TRIVIAL.items():
        rows += reference_row(study, name, f"trivial: {words}")
    return rows


def reference_row(study: Study, name: str, label: str) -> list[dict]:
    """Score a reference prediction; no row where it is not known."""
    counts = study.reference.get(f"counts_{name}")
    if counts is None:
        return []
    values = scores(counts.sum(0))
    return [
        {
            "arm": label,
            "iou": float(values["iou"]),
            "image_iou": float(image_iou(counts)),
            "accuracy": 100 * float(values["accuracy"]),
            "miou": float(values["miou"]),
            "reference": name,
        }
    ]


def arm_rows(study: Study, key: ArmKey, trivial: Trivial | None) -> list[dict]:
    """Score an arm: its usable runs, then those with other settings; one empty row where there is none."""
    arm = study.arms.get(key) or find_arm(*key)
    groups = [group for group in study.groups.get(key, []) if group[0].kind == SEGMENT]
    first: dict = {"arm": arm.label, "seeds": 0}
    if groups:
        first = group_row(arm.label, groups[0], trivial)
    if arm.paper:
        first["paper_loss"] = arm.paper.loss
        first["paper_iou"] = arm.paper.iou
        first["paper_accuracy"] = arm.paper.accuracy
    first["note"] = study.left_out(key) if key in study.groups else "not part of this study"
    rows = [first]
    for group in groups[1:]:
        row = group_row(f"{arm.label} (seed {group[0].seed}: other settings)", group, trivial)
        rows.append({**row, "note": ""})
    return rows


def group_row(label: str, runs: list[RunRecord], trivial: Trivial | None) -> dict:
    """Score runs of equal settings."""
    found = estimates(runs)
    row = {
        "arm": label,
        "seeds": len(runs),
        "loss": found["loss"],
        "iou": found["iou"],
        "image_iou": image_level_iou(runs),
        "miou": found["miou"],
        "accuracy": found["accuracy"].times(100),
        "interval": "t over seeds" if len(runs) > 1 else "bootstrap over images",
    }
    if trivial:
        row["beats_trivial"] = beats(runs, trivial)
    return row


def table_2(study: Study, page: Page, found: "SegmentationResults") -> None:
    """Show all arms beside the paper's; a dagger marks those that do no better than a predictor without an image."""
    page.add("## Results beside the paper's Table 2", table_2_text(study))
    write_table(page.folder, "table2", found.table)
    shown = []
    marked = False
    for row in found.table:
        if row.get("beats_trivial", True):
            shown.append(row)
        else:
            shown.append({**row, "arm": f"{row['arm']} {DAGGER}"})
            marked = True
    page.show(shown, TABLE_2_COLUMNS)
    if marked:
        page.add(
            f"{DAGGER} Does not beat the best predictor that looks at no image ({found.trivial.name}, "
            f"{found.trivial.iou:.3f}): in at least one seed the 95 % bootstrap interval of the difference over "
            "test images reaches zero or below."
        )


# ----------------------------------------------------------------------------------------------------------------------
# What was found, in sentences


PRETRAINING_QUESTIONS = {
    (ANIMAL, NON_ANIMAL): "Pre-training on animals instead of non-animals",
    (ANIMAL, SUPERVISED): "Pre-training on animals instead of starting from random weights",
}


def headline(data: str, found: "SegmentationResults") -> str:
    """Summarise which IoU was reached, and whether it takes a look at the images to reach it."""
    rows = [row for row in found.table if isinstance(row.get("iou"), Estimate)]
    if not rows:
        return "No arm has been trained and tested yet."
    rows.sort(key=row_iou)
    low = f"{rows[0]['iou'].value:.3f} ({literal(rows[0]['arm'])})"
    high = f"{rows[-1]['iou'].value:.3f} ({literal(rows[-1]['arm'])})"
    text = f"On {data}, test IoU runs from {low} to {high}."
    if found.trivial:
        text += f" The best predictor that looks at no image ({found.trivial.name}) has {found.trivial.iou:.3f}: "
        text += who_beats_it(rows)
    return text


def row_iou(row: dict) -> float:
    return row["iou"].value


def who_beats_it(rows: list[dict]) -> str:
    """Say which arms do not beat the best trivial predictor."""
    behind = [literal(row["arm"]) for row in rows if not row["beats_trivial"]]
    if not behind:
        return "every arm beats it."
    if len(behind) == len(rows):
        return "no arm beats it."
    if len(behind) == 1:
        return f"{behind[0]} does not beat it."
    return f"{', '.join(behind[:-1])} and {behind[-1]} do not beat it."


def verdicts(comparisons: list[Comparison]) -> list[str]:
    """Answer the questions on pre-training in a sentence each, no more strongly than the seeds allow."""
    sentences = []
    for pair, question in PRETRAINING_QUESTIONS.items():
        for comparison in comparisons:
            if (comparison.a.key, comparison.b.key) == pair and comparison.values:
                sentences.append(f"{question} changes it by {verdict(comparison)}")
    return sentences


def verdict(comparison: Comparison) -> str:
    """Describe a difference of test IoU."""
    mean = comparison.mean
    seeds = len(comparison.values)
    text = f"{fixed(mean.value, 1, '+')} points "
    if seeds == 1:
        image = comparison.images[0]
        return (
            f"{text}(95 % bootstrap interval over test images {limits(image)}; one seed, which "
            "cannot show whether another would repeat it)."
        )
    text += f"(95 % interval {limits(mean)}, {seeds} seeds)"
    if not comparison.tested:
        return f"{text}; not tested: {literal(comparison.reason)}."
    if comparison.verdict in (DIFFERENT, SMALL):
        text += f", a difference beyond the seeds' noise (Holm-corrected {p_value(comparison.holm)})"
        if comparison.verdict == SMALL:
            text += f", yet within ±{MARGIN} points (TOST, Holm-corrected {p_value(comparison.tost_holm)})"
        return f"{text}."
    if comparison.verdict == EQUIVALENT:
        return f"{text}: equivalent within ±{MARGIN} points (TOST, Holm-corrected {p_value(comparison.tost_holm)})."
    return (
        f"{text}: inconclusive, neither a difference nor equivalence is shown; {seeds} seeds could have shown "
        f"{comparison.detectable:.1f} points (power {POWER})."
    )


def p_value(p: float) -> str:
    """Write a p-value; none is 0."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def limits(estimate: Estimate) -> str:
    """Write the limits of a difference in points."""
    return f"{fixed(estimate.low, 1, '+')} to {fixed(estimate.high, 1, '+')}"


# ----------------------------------------------------------------------------------------------------------------------
# Planned differences

DIFFERENCES_TEXT = (
    "Differences of test IoU in percentage points, paired by seed. p: paired t-test over seeds; equivalence: TOST within "
    f"±{MARGIN} points; both Holm-corrected over the tested rows. Tests stand only where both arms had distinct images, "
    "equally many, and equal updates; otherwise the reason."
)
FEW_SEEDS_TEXT = (
    "Differences of test IoU in percentage points, paired by seed. {seeds} seeds: the intervals are shown and no test is "
    f"made. Tests are made from {FEWEST_SEEDS} seeds on, because {{seeds}} find, with power {POWER} at level {LEVEL}, only "
    "differences of {effect:.1f} times their own spread over seeds, so that a small p would say more about a lucky pair "
    "than about the arms."
)
ONE_SEED_TEXT = (
    "Differences of test IoU in percentage points. One seed cannot show how much of a difference is owed to chance in "
    "initialisation, order and choice of images, so no test is made; for intervals over seeds and tests: `run_all.sh "
    '--seeds "0 1 2 3 4"`.'
)
DIFFERENCE_COLUMNS = [
    Column("label", "difference"),
    Column("each", "per seed"),
    Column("mean", "mean [95 % t-interval]", 2),
    Column("holm", "p (Holm)"),
    Column("tost_holm", "p (equivalence, Holm)"),
    Column("detectable", "could have shown", 2),
    Column("verdict"),
    Column("miou", "mIoU, mean", 2),
    Column("reason", "not tested because"),
]


def differences_text(seeds: int) -> str:
    """Say what the table of differences shows, by the largest number of seeds that a row has."""
    if seeds < 2:
        return ONE_SEED_TEXT
    if seeds < FEWEST_SEEDS:
        return FEW_SEEDS_TEXT.format(seeds=seeds, effect=detectable_effect(seeds, POWER, LEVEL))
    return DIFFERENCES_TEXT


def differences(page: Page, comparisons: list[Comparison]) -> None:
    """Show the planned differences, with tests from FEWEST_SEEDS seeds on."""
    if not comparisons:
        return
    seeds = max(len(comparison.values) for comparison in comparisons)
    page.add("## Planned differences", differences_text(seeds))
    if any(comparison.tested for comparison in comparisons):
        page.items(verdict_lines(comparisons))
    page.table("differences", [difference_row(comparison, seeds) for comparison in comparisons], DIFFERENCE_COLUMNS)
    found = [comparison for comparison in comparisons if comparison.values]
    if found:
        differences_by_image(page, found)


def difference_row(comparison: Comparison, seeds: int) -> dict:
    """Describe a planned difference; seeds: the largest number that a row has, from which follows what is shown at all."""
    row: dict = {"label": comparison.label}
    if seeds > 1:
        row["mean"] = comparison.mean
    row["miou"] = comparison.miou
    row["reason"] = comparison.reason
    if seeds >= FEWEST_SEEDS:
        row |= columns_of_test(comparison)
        row["tost"] = comparison.tost
        row["tost_holm"] = comparison.tost_holm
    row["each"] = ", ".join(fixed(value, 2, "+") for value in comparison.values)
    return row


def differences_by_image(page: Page, comparisons: list[Comparison]) -> None:
    """Show each seed's difference with its uncertainty from the test images."""
    bars = []
    rows = []
    for comparison in comparisons:
        seeds = [figures.Interval(*estimate) for estimate in comparison.images]
        mean = figures.Interval(*comparison.mean) if len(seeds) > 1 else None
        bars.append(figures.Difference(comparison.label, seeds, mean))
        for seed, estimate in zip(comparison.seeds, comparison.images, strict=True):
            rows.append({"label": comparison.label, "seed": seed, "difference": estimate})
    caption = (
        "Planned differences of test IoU. Blue: one seed with its 95 % bootstrap interval over test images; red: "
        f"mean over seeds with its 95 % t-interval (an arrow: wider than the picture). Shaded: ±{MARGIN} points."
    )
    page.figure("forest", caption, figures.forest, bars, MARGIN)
    page.add(
        "Uncertainty from the test images alone, for these trained models (bootstrap, 10,000 resamples, in pairs where both "
        "arms have the same test images):"
    )
    columns = [Column("label", "difference"), Column("seed"), Column("difference", "points [95 %]", 2)]
    page.table("image_bootstrap", rows, columns)


# ----------------------------------------------------------------------------------------------------------------------
# All metrics

METRICS_TEXT = (
    "± is half the width of the 95 % interval (t over seeds; one seed: bootstrap over test images). Border as pet: in "
    "truth and prediction; border ignored: pixels whose truth is border are dropped. Boundary IoU: overlap of the bands "
    "along the outlines, 2 % of the diagonal wide."
)
METRIC_COLUMNS = [
    Column("arm"),
    Column("iou", "IoU pet (the paper's)"),
    Column("iou_background", "IoU background"),
    Column("iou_border", "IoU border"),
    Column("miou", "mIoU"),
    Column("iou_border_as_pet", "border as pet"),
    Column("iou_border_ignored", "border ignored"),
    Column("accuracy"),
    Column("boundary_pet", "boundary IoU, pet"),
    Column("boundary_pet_or_border", "boundary IoU, pet or border"),
]


def all_metrics(study: Study, page: Page) -> None:
    """Show all scores, over all pixels and over images, at both sizes; and those of validation."""
    keys = scored_arms(study)
    if not keys:
        return
    page.add("## All metrics", METRICS_TEXT)
    rows = []
    for per_image, level in ((False, "dataset"), (True, "mean over images")):
        for native, resolution in ((False, "input size"), (True, "native size")):
            part = []
            for key in keys:
                runs = study.main(key)
                found = estimates(runs, native, per_image, resamples=2000)
                where = {"level": level, "resolution": resolution}
                part.append({"arm": study.arms[key].label, "seeds": len(runs), **found, **where})
            page.add(f"### Scores: {level}, {resolution}")
            page.show(part, METRIC_COLUMNS, brief=True)
            rows += part
    write_table(page.folder, "metrics", rows)
    page.add("Best validation IoU, its epoch, and the last epoch's:")
    columns = [
        Column("arm"),
        Column("seeds"),
        Column("best"),
        Column("epoch", "at epoch"),
        Column("last", "last epoch"),
    ]
    page.table("validation", [validation_row(study.arms[key], study.main(key)) for key in keys], columns)


def validation_row(arm: Arm, runs: list[RunRecord]) -> dict:
    """Return the best validation IoU and that of the last epoch."""
    return {
        "arm": arm.label,
        "seeds": len(runs),
        "best": within_range("iou", Estimate(*t_interval([run.metrics["best"]["iou"] for run in runs]))),
        "epoch": ", ".join(f"{run.metrics['best']['epoch']:g}" for run in runs),
        "last": within_range("iou", Estimate(*t_interval([run.metrics["last"]["iou"] for run in runs]))),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Curves and masks


def learning_curves(study: Study, page: Page) -> None:
    """Draw loss and IoU against the epoch: the kinds of training, then the kinds of pre-training images."""
    seeds = seeds_in_curves(study)
    further = [key for key in scored_arms(study) if key not in ARMS and key.stage == "finetune"]
    draw_learning(
        study,
        page,
        "curves",
        [ANIMAL, HALF, SUPERVISED, RESNET],
        f"Loss and IoU against the epoch, fine-tuning and baselines (the paper's Fig. 3); {seeds}.",
    )
    draw_learning(
        study,
        page,
        "distribution",
        [ANIMAL, NON_ANIMAL, MIXED, *further],
        f"Loss and IoU against the epoch, fine-tuning by pre-training images (the paper's Fig. 5); {seeds}.",
    )


def draw_learning(study: Study, page: Page, name: str, keys: list[ArmKey], caption: str) -> None:
    """Draw the curves of some arms."""
    panels = [
        figures.Panel("training cross-entropy", "train", "loss"),
        figures.Panel("validation cross-entropy", "val", "loss"),
        figures.Panel("validation IoU", "val", "iou"),
    ]
    curves = []
    for key in keys:
        logs = [run.log for run in study.main_of(key, SEGMENT) if run.log]
        if logs:
            curves.append(figures.Curve(study.arms[key].label, study.arms[key].style, logs))
    if curves:
        page.figure(name, caption, figures.curve_panels, panels, curves)


def masks(study: Study, page: Page) -> None:
    """Show fixed test images with the predictions of all arms."""
    if not study.panels:
        return
    lists = Counter(tuple(pictures.arrays["ids"]) for pictures in study.panels)
    ids = list(most_common(lists))  # arms may have been tested on different images
    first = next(pictures.arrays for pictures in study.panels if list(pictures.arrays["ids"]) == ids)
    photos = first["images"]
    truth = first["truth"]
    rows = [figures.ImageRow("image", photos), figures.ImageRow("ground truth", figures.overlays(photos, truth, truth))]
    for pictures in study.panels:
        arrays = pictures.arrays
        if list(arrays["ids"]) == ids:
            rows.append(figures.ImageRow(mask_label(study, pictures), figures.overlays(photos, arrays["pred"], truth)))
    caption = (
        "Test images with ground truth and predictions (the paper's Fig. 4), and each network's IoU on all test images. "
        "The images were chosen by place in the list, not by score: " + ", ".join(literal(name) for name in ids) + "."
    )
    page.figure("masks", caption, figures.image_grid, rows, legend=figures.mask_legend(CLASSES))


def mask_label(study: Study, pictures: Pictures) -> str:
    """Name an arm and the IoU of the run whose masks are shown."""
    run = study.main(pictures.arm.key)[0]
    return f"{pictures.arm.label}\nIoU {run.iou:.3f}"


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps


@dataclass
class SweepResult:
    """A line of a sweep: at each value the runs that count."""

    line: SweepLine
    runs: dict[float, list[RunRecord]]

    def rows(self) -> list[dict]:
        """Return a row for each value."""
        rows = []
        for value, runs in self.runs.items():
            share = round(100 * value, 6)
            iou = estimates(runs)["iou"]
            rows.append({"arm": self.line.label, "share": share, "seeds": len(runs), "iou": iou})
        return rows

    def drawing(self, rows: list[dict], fit: SweepFit | None) -> figures.Line:
        """Return what the figure shows."""
        points = []
        for row, runs in zip(rows, self.runs.values(), strict=True):
            interval = figures.Interval(*row["iou"])
            points.append(figures.SweepPoint(row["share"], interval, [run.iou for run in runs]))
        line = figures.Line(self.line.label, self.line.style, points)
        if fit is not None:
            line.fit = fit.drawing(self.line.label)
        return line


def read_sweep(study: Study, sweep: str) -> list[SweepResult]:
    """Collect the lines of a sweep that have runs of their own; a run that does not match the others is named."""
    results = []
    for line in sweep_lines(sweep):
        found: dict[float, list[RunRecord]] = {}
        for key, arm in study.arms.items():
            runs = study.main_of(key, SEGMENT)
            if runs and (arm.sweep, arm.line) == (sweep, line.name):
                found[arm.value] = runs
        if found:
            results.append(SweepResult(line, matching_runs(study, line, found)))
    return results


def matching_runs(study: Study, line: SweepLine, found: dict[float, list[RunRecord]]) -> dict[float, list[RunRecord]]:
    """Leave out what does not match most of a line, and add the study's own arms where they match."""
    firsts = [runs[0] for runs in found.values()]

    def count_matches(run: RunRecord) -> int:
        return sum(study.matches(run, other) for other in firsts)

    base = max(firsts, key=count_matches)
    kept = {}
    for value, runs in found.items():
        if study.matches(runs[0], base):
            kept[value] = runs
        else:
            study.notes.append(f"`{runs[0].name}` has other settings or updates than `{base.name}`: not in its sweep")
    for value, key in line.own.items():
        runs = study.main_of(key, SEGMENT)
        if value not in kept and runs and study.matches(runs[0], base):
            kept[value] = runs
    return dict(sorted(kept.items()))


SWEEP_INTERVALS = (
    "Bars: 95 % intervals (t over seeds; one seed: bootstrap over test images), cut at the picture's edge; dots: seeds. "
    "Dashed: the straight line through the points with its 95 % band"
)


def doses(page: Page, results: list[SweepResult]) -> None:
    """Show test IoU against the share of animals in pre-training, and the slope of the line through it."""
    for result in results:
        rows = result.rows()
        fit = fit_sweep(ANIMAL_FRACTION, result.runs)
        page.add("## Share of animals in pre-training")
        caption = (
            "Test IoU against the share of animal images in pre-training: nested draws of distinct images, equal size "
            f"and updates. {SWEEP_INTERVALS}."
        )
        page.figure("dose", caption, figures.bands, [result.drawing(rows, fit)], "animal images in pre-training (%)")
        shown = [{key: row[key] for key in ("share", "seeds", "iou")} for row in rows]
        columns = [Column("share", "animals (%)"), Column("seeds"), Column("iou", "IoU [95 %]")]
        page.table(result.line.name, shown, columns)
        show_slopes(page, "dose_slope", [slope_row(result.line.label, result.runs, fit)])


class ShareSweep(NamedTuple):
    """How a sweep over shares on a logarithmic scale is shown; `name` of its figure and table."""

    sweep: str
    name: str
    title: str
    caption: str
    axis: str
    column: str


LABEL_SHARES = ShareSweep(
    LABEL_FRACTION,
    "labels",
    "Share of labels in fine-tuning",
    "Test IoU against the share of labelled images, by pre-training images, at equal updates.",
    "labelled training images (%)",
    "labels (%)",
)
IMAGE_SHARES = ShareSweep(
    NUM_IMAGES,
    "sizes",
    "Number of pre-training images",
    "Test IoU against the share of a split's images in pre-training, nested draws at equal updates: few images are seen "
    "more often.",
    "pre-training images (% of the split)",
    "images (%)",
)


def shares(page: Page, results: list[SweepResult], shown: ShareSweep) -> None:
    """Show test IoU against a share, and the slopes of the lines through it."""
    if not results:
        return
    page.add(f"## {shown.title}")
    rows = []
    lines = []
    slopes = []
    for result in results:
        part = result.rows()
        fit = fit_sweep(shown.sweep, result.runs)
        lines.append(result.drawing(part, fit))
        slopes.append(slope_row(result.line.label, result.runs, fit))
        rows += part
    caption = f"{shown.caption} {SWEEP_INTERVALS}, in the logarithm of the share."
    page.figure(shown.name, caption, figures.bands, lines, shown.axis, log=True)
    columns = [
        Column("arm", "pre-training"),
        Column("share", shown.column),
        Column("seeds"),
        Column("iou", "IoU [95 %]"),
    ]
    page.table(shown.name, rows, columns)
    show_slopes(page, f"{shown.name}_slope", slopes)


# ----------------------------------------------------------------------------------------------------------------------
# Pre-training and what comes of it


def pretraining_scores(study: Study, page: Page) -> None:
    """Show each run's last score of pre-training beside its test IoU; for arms that differ in pre-training alone."""
    pairs = []
    for key, arm in study.arms.items():
        if arm.stage != "finetune" or "train_fraction" in arm.flags or arm.sweep in (AUDIT, LABELS, OBJECTIVE):
            continue
        for run in study.main_of(key, SEGMENT):
            parent = study.parent(run)
            if parent and not parent.problem:
                pairs.append((run, parent))
    if len(pairs) <= 2:
        return
    words = pairs[0][1].config["scores"]
    rows = []
    clouds: dict[ArmKey, figures.Cloud] = {}
    for run, parent in pairs:
        last = parent.metrics["last"]
        if parent.kind != pairs[0][1].kind:
            continue
        found = {score: last[score] for score in words}
        rows.append({"arm": run.arm.name, "label": run.arm.images, "seed": run.seed, **found, "iou": run.iou})
        empty = figures.Cloud(run.arm.images, run.arm.style, {score: [] for score in words}, [])
        cloud = clouds.setdefault(run.key, empty)
        for score in words:
            cloud.scores[score].append(last[score])
        cloud.iou.append(run.iou)
    page.add("## Pre-training loss and what comes of it")
    caption = "Last pre-training validation loss against test IoU after fine-tuning on all labels, one mark per run."
    titles = {score: f"pre-training: {text}" for score, text in words.items()}
    page.figure("scatter", caption, figures.scatter, list(clouds.values()), titles)
    columns = [Column("label", "pre-training"), Column("seed")]
    columns += [Column(score, text) for score, text in words.items()]
    page.table("pretraining", rows, [*columns, Column("iou", "IoU")])


def half_remark(study: Study) -> str:
    """Note that the arm with half the labels is trained for fewer updates."""
    half = study.main_of(HALF, SEGMENT)
    full = study.main_of(ANIMAL, SEGMENT)
    if not half or not full:
        return ""
    a = half[0].config
    b = full[0].config
    if a["updates"] == b["updates"]:
        return ""
    return (
        f"Finetuned-Half sees {a['n_train']:,} of {b['n_train']:,} images for as many epochs, so it also makes "
        f"{a['updates']:,} instead of {b['updates']:,} updates: its difference mixes fewer labels with less training."
    )


def resnet_remark(study: Study) -> str:
    """Note that the ResNet baseline has a schedule of its own; "" where it has not."""
    resnet = study.main(RESNET)
    animal = study.main(ANIMAL)
    if not resnet or not animal:
        return ""
    own = resnet[0].config
    usual = animal[0].config
    if (own["updates"], own.get("batch_size")) == (usual["updates"], usual.get("batch_size")):
        return ""
    return (
        f"ResNet-50 was trained for {own['updates']:,} updates of {own.get('batch_size')} images, the MAE arms for "
        f"{usual['updates']:,} of {usual.get('batch_size')}: its difference to them is one of training length as well."
    )


@dataclass
class SegmentationResults:
    """What the sections on segmentation share."""

    trivial: Trivial | None
    table: list[dict]
    comparisons: list[Comparison]
    doses: list[SweepResult]
    labels: list[SweepResult]
    sizes: list[SweepResult]


def read_results(study: Study, comparisons: list[Comparison]) -> SegmentationResults:
    """Compute what the report says first; runs that fit no sweep are added to the study's notes."""
    trivial = best_trivial(study)
    return SegmentationResults(
        trivial,
        table_2_rows(study, trivial),
        comparisons,
        read_sweep(study, ANIMAL_FRACTION),
        read_sweep(study, LABEL_FRACTION),
        read_sweep(study, NUM_IMAGES),
    )
