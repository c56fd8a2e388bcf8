"""Sections of the report on the original code: what its choices change, and what its scripts would have printed.

Every section is a function of the study and the page; it adds nothing where its runs do not exist. The original code is
github.com/Sam-Oliveira/pretraining_mae at commit aa2fea5, see protocols.py.
"""

from dataclasses import dataclass

import numpy as np

import figures
from arms import ANIMAL, ARMS, CHOICES, PLANNED, TABLE_2, ArmKey, Choice
from blocks import fixed, literal
from comparisons import MARGIN, Estimate, Pair, image_difference, image_level_difference, same_images, seed_pairs
from groups import Study, differing, tolerance
from metrics import t_interval
from protocols import PROTOCOLS, choices
from quirks import (
    MAE_SCRIPT,
    RESNET_SCRIPT,
    SETS,
    ImageScores,
    Range,
    Script,
    printed,
    range_on_other_images,
    range_on_same_images,
    spread,
)
from records import SEGMENT, RunRecord
from tables import Column, Page, write_table

SHOWN_RUNS = 3  # named for each remark
ORIGINAL_SETTINGS = (
    "The settings are those of the original code as committed (aa2fea5; each with its source in `protocols.py`); what it "
    "leaves open is ours. The runs behind the paper may have differed from what is committed."
)


def is_original(study: Study) -> bool:
    """Check whether the fine-tunings make all choices of the original code."""
    runs = study.main(ANIMAL)
    if not runs:
        return False
    args = runs[0].config["args"]
    wanted = choices(PROTOCOLS["original"]["finetune"])
    return all(args.get(name) == value for name, value in wanted.items())


def remarks(study: Study) -> list[str]:
    """List what every reader must know of some runs, each remark once, with the runs that it is about."""
    found: dict[str, list[str]] = {}
    for run in study.runs:
        for remark in run.config.get("remarks", []):
            found.setdefault(remark, []).append(f"`{run.name}`")
    lines = []
    for remark, names in found.items():
        listed = ", ".join(names[:SHOWN_RUNS])
        if len(names) > SHOWN_RUNS:
            listed += f" and {len(names) - SHOWN_RUNS} more"
        lines.append(f"**{literal(remark)}**: {listed}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# What each choice changes

EFFECTS_TEXT = (
    "Each row takes our protocol and makes one choice as the original code does (as committed, aa2fea5). Differences of "
    "test IoU in percentage points, choice minus ours, paired by seed; positive: the choice scores higher. IoU of summed "
    "counts, and the mean over images that the paper reports."
)
ONE_SEED = (
    "One seed: 95 % bootstrap intervals over test images, which know nothing of how another seed would come out, so a "
    "difference outside zero is one between these two trained networks."
)
SEEDS = "Intervals of the means: 95 %, Student's t over seeds. Per seed: 95 % bootstrap over test images."
RESAMPLES_TEXT = "Images are resampled in pairs where both runs were tested on the same ones, else independently."


@dataclass
class Effect:
    """What a choice changes in test IoU, in points: for each seed with its bootstrap interval over images."""

    choice: Choice
    seeds: list[int]
    iou: list[Estimate]  # of summed counts
    image_iou: list[Estimate]  # mean over images
    note: str


def measure(study: Study, choice: Choice) -> Effect:
    """Compare the runs of a choice with those of its partner."""
    pairs = seed_pairs(study, choice.key, choice.partner)
    notes = [choice.remark, study.left_out(choice.key)]
    if not pairs:
        notes.append("no seed has both runs")
    for pair in pairs:
        allowed = tolerance(pair.a.arm, pair.b.arm)
        notes.extend(differing(pair.a.settings, pair.b.settings, allowed, shared=True))
        if not same_images(pair):
            notes.append("the test lists differ, so the intervals are unpaired")
    return Effect(
        choice,
        seeds=[pair.a.seed for pair in pairs],
        iou=[image_difference(pair, "iou").times(100) for pair in pairs],
        image_iou=[image_level_difference(pair).times(100) for pair in pairs],
        note="; ".join(dict.fromkeys(note for note in notes if note)),
    )


def over_seeds(differences: list[Estimate]) -> Estimate | None:
    """Average over seeds with the t-interval; a single seed keeps its bootstrap interval."""
    if not differences:
        return None
    if len(differences) == 1:
        return differences[0]
    return Estimate(*t_interval([difference.value for difference in differences]))


def effect_row(effect: Effect) -> dict:
    """Describe an effect for the table."""
    row = {
        "choice": effect.choice.label,
        "partner": ARMS[effect.choice.partner].label,
        "seeds": len(effect.seeds),
        "iou": over_seeds(effect.iou),
        "image_iou": over_seeds(effect.image_iou),
    }
    if len(effect.seeds) > 1:
        each = [iou.points(2) for iou in effect.iou]
        row["each"] = ", ".join(each)
    row["note"] = effect.note
    return row


EFFECT_COLUMNS = [
    Column("choice", "choice of the original code"),
    Column("partner", "compared with"),
    Column("seeds"),
    Column("iou", "IoU of summed counts [95 %]", 2),
    Column("image_iou", "IoU, mean over images [95 %]", 2),
    Column("each", "summed counts, per seed [95 % over images]"),
    Column("note"),
]


def choice_effects(study: Study, page: Page) -> None:
    """Show what each choice of the original code changes."""
    chosen = [choice for choice in CHOICES if choice.key in study.arms]
    if not chosen:
        return
    effects = [measure(study, choice) for choice in chosen]
    single = max(len(effect.seeds) for effect in effects) < 2
    page.add(
        "## What each choice of the original code changes",
        f"{EFFECTS_TEXT} {ONE_SEED if single else SEEDS} {RESAMPLES_TEXT}",
    )
    page.table("audit", [effect_row(effect) for effect in effects], EFFECT_COLUMNS)
    write_table(page.folder, "audit_seeds", seed_rows(effects))
    bars = [difference_bar(effect) for effect in effects if effect.seeds]
    if bars:
        caption = (
            "What each choice of the original code changes in test IoU of summed counts. Blue: one seed with its 95 % "
            "bootstrap interval over test images; red: mean over seeds with its 95 % t-interval (an arrow: wider than the "
            f"picture). Shaded: ±{MARGIN} points."
        )
        page.figure("audit", caption, figures.forest, bars, MARGIN)


def seed_rows(effects: list[Effect]) -> list[dict]:
    """Describe the differences of each seed."""
    rows = []
    for effect in effects:
        for seed, iou, image_iou in zip(effect.seeds, effect.iou, effect.image_iou, strict=True):
            rows.append({"choice": effect.choice.label, "seed": seed, "iou": iou, "image_iou": image_iou})
    return rows


def difference_bar(effect: Effect) -> figures.Difference:
    """Describe an effect for the figure."""
    mean = None
    if len(effect.seeds) > 1:
        mean = figures.Interval(*over_seeds(effect.iou))
    return figures.Difference(effect.choice.label, [figures.Interval(*iou) for iou in effect.iou], mean)


# ----------------------------------------------------------------------------------------------------------------------
# What the original scripts would have printed

PRINTED_TEXT = (
    "As committed (aa2fea5), the test scripts compute their scores after the loop over batches, so that these are scores of "
    "the last batch: of 1,109 test images the last 85 for the MAE arms (1,109 mod 128), which holds for loss, IoU and "
    "accuracy; the last 21 for ResNet-50 (1,109 mod 32), where it holds for the IoU alone. Their IoU is the mean over "
    "images of (intersection + 0.001) / (union + 0.001). The table has the same from our test records."
)
PRINTED_COLUMNS = [
    Column("arm"),
    Column("seed"),
    Column("iou", "IoU of summed counts, all images"),
    Column("image_iou", "IoU, mean over all images"),
    Column("last", "images in the last batch"),
    Column("printed_iou", "IoU printed"),
    Column("spread", "95 % of random sets"),
    Column("accuracy", "accuracy, all images (%)", 1),
    Column("printed_accuracy", "accuracy printed (%)", 1),
    Column("accuracy_spread", "95 % of random sets"),
    Column("printed_loss", "loss printed"),
]
EQUAL_COLUMNS = [
    Column("label", "difference"),
    Column("seed"),
    Column("all", "mean over all images", 2),
    Column("printed", "printed", 2),
    Column("same", "if equal, on the same images"),
    Column("other", "if equal, on other images"),
]


def script_of(key: ArmKey) -> Script:
    """Say which script of the original study tests an arm."""
    if ARMS[key].network == "resnet50":
        return RESNET_SCRIPT
    return MAE_SCRIPT


def show_range(found: Range, factor: float, digits: int) -> str:
    """Write the limits of a range."""
    return f"{fixed(factor * found.low, digits)} to {fixed(factor * found.high, digits)}"


def printed_scores(study: Study, page: Page) -> None:
    """Show what the original test scripts would have printed, and how far that is owed to the images."""
    keys = [key for key in TABLE_2 if study.main_of(key, SEGMENT)]
    if not keys:
        return
    rows = []
    repeats: dict[int, list[float]] = {}  # images in the last batch -> how far apart two sets are, of each run
    for key in keys:
        for run in study.main(key):
            row, apart = printed_row(run, script_of(key))
            rows.append(row)
            repeats.setdefault(row["last"], []).append(apart)
    page.add("## What the original scripts would have printed", f"{PRINTED_TEXT} {test_list_text(study, keys)}".strip())
    page.table("printed", rows, PRINTED_COLUMNS)
    page.add(repeats_text(repeats))
    equal_arms(study, page)


def test_list_text(study: Study, keys: list[ArmKey]) -> str:
    """Say how long our test lists are, where they are not the original's."""
    lengths = {len(run.test["ids"]) for key in keys for run in study.main(key)}
    if lengths == {1109}:
        return ""
    listed = " or ".join(f"{length:,}" for length in sorted(lengths))
    return f"Our list has {listed} images; what is left of it after full batches of 128 and 32 is scored accordingly."


def printed_row(run: RunRecord, script: Script) -> tuple[dict, float]:
    """Score a run as the original does -> the row of the table, and how far two sets of images are apart in points."""
    images = ImageScores.from_records(run.test)
    found = printed(images, script)
    row = {
        "arm": run.arm.label,
        "seed": run.seed,
        "iou": run.iou,
        "image_iou": float(images.iou.mean()),
        "last": found.images,
        "printed_iou": found.iou,
        "spread": show_range(spread(images.iou, found.images), 1, 3),
        "accuracy": 100 * float(images.accuracy.mean()),
        "printed_accuracy": 100 * found.accuracy,
        "printed_loss": found.loss,
    }
    if not script.iou_alone:
        row["accuracy_spread"] = show_range(spread(images.accuracy, found.images), 100, 1)
    apart = range_on_other_images(images.iou, images.iou, found.images, found.images)
    return row, 50 * (apart.high - apart.low)


def repeats_text(repeats: dict[int, list[float]]) -> str:
    """Say how far apart two scores of one network are."""
    parts = []
    for size, apart in sorted(repeats.items()):
        part = f"±{np.median(apart):.1f} points with {size} images"
        if len(apart) > 1:
            part += f" (median; {min(apart):.1f} to {max(apart):.1f} by run)"
        parts.append(part)
    found = [arm.paper.iou for arm in ARMS.values() if arm.stage == "finetune" and arm.paper]
    return (
        f"**Two scores of one and the same network, on two random sets of images, differ by up to {'; '.join(parts)}** "
        f"(95 % of {SETS:,} pairs of sets, drawn with replacement from the test list). The paper's four fine-tuned arms lie "
        f"within {100 * (max(found) - min(found)):.1f} points."
    )


def equal_arms(study: Study, page: Page) -> None:
    """Show how far apart two arms can print that are equal over all images."""
    rows = []
    for a, b in PLANNED:
        for pair in seed_pairs(study, a, b):
            if pair.a.kind == pair.b.kind == SEGMENT:
                rows.append(equal_row(pair, script_of(a), script_of(b)))
    if not rows:
        return
    page.add(
        "Two arms, in points of the mean IoU over images. The last columns have the range in which the printed difference "
        f"lies (95 % of {SETS:,} sets) when both arms are equal over all images: where both are scored on the same last "
        "images, and where each has its own, as with ResNet-50."
    )
    page.table("printed_differences", rows, EQUAL_COLUMNS)


def equal_row(pair: Pair, script_a: Script, script_b: Script) -> dict:
    """Compare what two runs print with what they would if they were equal."""
    a = ImageScores.from_records(pair.a.test)
    b = ImageScores.from_records(pair.b.test)
    printed_a = printed(a, script_a)
    printed_b = printed(b, script_b)
    other = range_on_other_images(a.iou, b.iou, printed_a.images, printed_b.images)
    row = {
        "label": f"{pair.a.arm.label} − {pair.b.arm.label}",
        "seed": pair.a.seed,
        "all": 100 * float(a.iou.mean() - b.iou.mean()),
        "printed": 100 * (printed_a.iou - printed_b.iou),
        "other": show_range(other, 100, 1),
    }
    if script_a == script_b and same_images(pair):
        row["same"] = show_range(range_on_same_images(a.iou, b.iou, printed_a.images), 100, 1)
    return row
