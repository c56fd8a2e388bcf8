"""Section of the report on pre-training with labels: whether it gains by a Masked Autoencoder that comes first.

    results = read_sweep(study, "segment")          # the runs of `run_all.sh --sweep labels`
    section(study, page, results)

One figure has both claims of Singh et al. 2023 (MAE before weakly supervised pre-training): a better score after fine-tuning
at each number of label epochs, and a cross-entropy that falls faster. Operations are counted over the whole chain, so that
runs of equal cost can be told.
"""

import math
from dataclasses import dataclass

import figures
from arms import LABELS, Arm, ArmKey, SweepLine, sweep_lines
from comparisons import compare, estimates
from groups import Study, differing, tolerance
from records import SEGMENT, RunRecord
from tables import Column, Page

EQUAL_COST = 0.05  # share by which the operations of two chains may differ and still count as equal
TERA = 1e12
LOSS = "loss_animal"  # on the kind of images that these arms are trained on
PRECISION = "ap_animal"

TEXT = (
    "Each row is a chain of pre-trainings on the same list of images, then fine-tuned from the encoder alone. TFLOP: "
    "operations of all pre-training, matrix products only. Two chains with one letter cost the same within "
    f"{100 * EQUAL_COST:g} %. Arms that see labels in pre-training stand in no test beside those that do not."
)
COLUMNS = [
    Column("line", "labels"),
    Column("epochs", "label epochs", 0),
    Column("seeds"),
    Column("score"),
    Column("before", "updates before"),
    Column("updates", "updates on labels"),
    Column("tflop", "TFLOP", 1),
    Column("pair", "equal cost"),
    Column("loss", "lowest cross-entropy"),
    Column("prior", "label prior"),
    Column("lowest", "lowest possible"),
    Column("ap", "average precision, last"),
    Column("base_rate", "base rate"),
]
DIFFERENCE_COLUMNS = [
    Column("epochs", "label epochs", 0),
    Column("each", "per seed [95 % bootstrap over test images]"),
    Column("mean", "mean [95 % t-interval]", 2),
]


@dataclass
class Point:
    """Runs of one arm of the sweep: fine-tuned after `epochs` epochs of labels."""

    line: SweepLine
    epochs: float
    arm: Arm
    runs: list[RunRecord]
    tflop: float  # of all pre-training, of one run
    mark: str = ""  # shared with the point of the other line that costs the same

    def on_labels(self, study: Study) -> list[RunRecord]:
        """List the pre-trainings on labels that the runs started from; none at 0 epochs."""
        if self.epochs == 0:
            return []
        return [study.parent(run) for run in self.runs]


def operations(study: Study, run: RunRecord) -> float:
    """Count the operations of all pre-training that a run started from, in TFLOP."""
    total = 0.0
    for earlier in study.before(run):
        config = earlier.config
        total += config["flops_per_image"] * config["updates"] * config["batch_size"]
    return total / TERA


def read_sweep(study: Study, task: str) -> list[Point]:
    """Collect the points of the sweep; a run whose fine-tuning differs is named in the study's notes and left out."""
    lines = {line.name: line for line in sweep_lines(LABELS)}
    found: list[Point] = []
    for key, arm in study.arms.items():
        runs = study.main_of(key, task)
        if arm.sweep != LABELS or not runs or not all(is_complete(study, run) for run in runs):
            continue
        point = Point(lines[arm.line], arm.value, arm, runs, operations(study, runs[0]))
        if not found or is_equal(study, point, found[0]):
            found.append(point)
        else:
            study.notes.append(f"`{runs[0].name}` has other settings than `{found[0].runs[0].name}`: not in its sweep")
    if not found:
        return []
    for line in lines.values():
        found += own_points(study, line, found[0], task)
    found.sort(key=place)
    mark_pairs(found)
    return found


def is_complete(study: Study, run: RunRecord) -> bool:
    """Check that all pre-trainings of a run are finished."""
    return not any(earlier.problem for earlier in study.before(run))


def is_equal(study: Study, point: Point, other: Point) -> bool:
    """Check that two points were fine-tuned alike."""
    a = point.runs[0]
    b = other.runs[0]
    if a.config["updates"] != b.config["updates"]:
        return False
    return not differing(a.settings, b.settings, tolerance(a.arm, b.arm), shared=True)


def own_points(study: Study, line: SweepLine, first: Point, task: str) -> list[Point]:
    """Give the study's own arms that are points of a line, where they were fine-tuned like the others."""
    points = []
    for value, key in line.own.items():
        runs = study.main_of(key, task)
        if not runs:
            continue
        point = Point(line, value, study.arms[key], runs, operations(study, runs[0]))
        if is_equal(study, point, first):
            points.append(point)
    return points


def place(point: Point) -> tuple[str, float]:
    """Order points by line, then by epochs."""
    return point.line.name, point.epochs


def mark_pairs(points: list[Point]) -> None:
    """Give a letter to each two points, one of either line, whose pre-training costs the same."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    for point in points:
        for other in points:
            is_pair = point.line.name < other.line.name and min(point.tflop, other.tflop) > 0
            if is_pair and abs(point.tflop / other.tflop - 1) <= EQUAL_COST:
                letter = next(letters)
                point.mark += letter
                other.mark += letter


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def section(study: Study, page: Page, points: list[Point]) -> None:
    """Show the sweep: a figure, who reaches which cross-entropy when, all points and the differences between the lines."""
    if not points:
        return
    run = points[0].runs[0]
    score = run.select
    words = run.config["scores"].get(score, score)
    page.add("## Labels in pre-training, with and without a Masked Autoencoder first", TEXT)
    draw(study, page, points, f"test {words}")
    page.items(convergence(study, points))
    columns = [Column(column.key, f"{words} [95 %]") if column.key == "score" else column for column in COLUMNS]
    page.table("label_pretraining", [point_row(study, point, score) for point in points], columns)
    differences(study, page, points)


def draw(study: Study, page: Page, points: list[Point], words: str) -> None:
    """Draw the score after fine-tuning against label epochs, beside the cross-entropy against updates."""
    lines = []
    for name in dict.fromkeys(point.line.name for point in points):
        lines.append(drawn_line([point for point in points if point.line.name == name]))
    longest = longest_runs(study, points)
    prior: dict[str, float] = {}
    base_rate: dict[str, float] = {}
    curves = []
    for point, runs in longest:
        prior |= runs[0].trivial(LOSS)
        base_rate |= runs[0].trivial(PRECISION)
        curves.append(figures.Curve(point.arm.images, point.line.style, [run.log for run in runs]))
    panels = [
        figures.Panel("validation cross-entropy of labels", "val", LOSS, prior, x="step"),
        figures.Panel("mean average precision of labels", "val", PRECISION, base_rate, x="step"),
    ]
    caption = (
        "Left: score after fine-tuning against epochs of pre-training on labels; bars: 95 % intervals (t over seeds; one "
        "seed: bootstrap over test images); points with one letter cost the same in pre-training. Middle and right: "
        "labels of animal validation images during the longest of these pre-trainings."
    )
    titles = ("epochs of labels in pre-training", words)
    page.figure("label_pretraining", caption, figures.sweep_beside_curves, lines, titles, panels, curves)


def drawn_line(points: list[Point]) -> figures.Line:
    """Give what the figure shows of one line."""
    drawn = []
    for point in points:
        score = point.runs[0].select
        interval = figures.Interval(*estimates(point.runs)[score])
        seeds = [run.score(score) for run in point.runs]
        drawn.append(figures.SweepPoint(point.epochs, interval, seeds, point.mark))
    return figures.Line(points[0].line.label, points[0].line.style, drawn)


def longest_runs(study: Study, points: list[Point]) -> list[tuple[Point, list[RunRecord]]]:
    """Find the longest pre-trainings on labels that all lines have."""
    lengths = [{point.epochs for point in points if point.line.name == name} for name in ("none", "mae")]
    shared = set.intersection(*lengths) - {0}
    if not shared:
        return []
    longest = [point for point in points if point.epochs == max(shared)]
    return [(point, point.on_labels(study)) for point in longest]


def convergence(study: Study, points: list[Point]) -> list[str]:
    """Say for each seed after how many updates either line reaches the best score of random weights."""
    runs = {point.line.name: {run.seed: run for run in found} for point, found in longest_runs(study, points)}
    sentences = []
    for seed, scratch in runs.get("none", {}).items():
        if seed not in runs["mae"]:
            continue
        for name, words in ((LOSS, "lowest cross-entropy"), (PRECISION, "highest average precision")):
            sentences += compare_speed(scratch, runs["mae"][seed], name, words)
    return sentences


def compare_speed(scratch: RunRecord, after_mae: RunRecord, name: str, words: str) -> list[str]:
    """Say when the best score of one run is reached by it and by another one; nothing where it was not recorded."""
    scores = validations(scratch, name)
    if not scores:
        return []
    best = min(scores.values()) if name == LOSS else max(scores.values())
    text = f"Seed {scratch.seed}: from random weights, the {words} {best:.3f} is reached after "
    text += f"{updates_until(scratch, name, best):,} updates"
    needed = updates_until(after_mae, name, best)
    if needed is None:
        return [f"{text}; after the MAE it is not reached."]
    return [f"{text}; after the MAE the same is reached after {needed:,}."]


def validations(run: RunRecord, name: str) -> dict[int, float]:
    """List a score of each validation of a pre-training by its update."""
    return {line["step"]: line[name] for line in run.log if line["event"] == "val" and name in line}


def updates_until(run: RunRecord, name: str, level: float) -> int | None:
    """Find the first validation with a score as good as a level; None if there is none."""
    for step, value in validations(run, name).items():
        reached = value <= level if name == LOSS else value >= level
        if reached:
            return step
    return None


def point_row(study: Study, point: Point, score: str) -> dict:
    """Describe a point in the table."""
    run = point.runs[0]
    on_labels = point.on_labels(study)
    updates = on_labels[0].config["updates"] if on_labels else 0
    total = sum(earlier.config["updates"] for earlier in study.before(run))
    row = {
        "line": point.line.label,
        "epochs": point.epochs,
        "seeds": len(point.runs),
        "score": estimates(point.runs)[score],
        "before": total - updates,
        "updates": updates,
        "tflop": point.tflop,
        "pair": point.mark,
    }
    if on_labels:
        row |= label_scores(on_labels)
    return row


def label_scores(runs: list[RunRecord]) -> dict:
    """Average over seeds what pre-training on labels has learnt, beside what looks at no image."""
    found: dict[str, float] = {}
    for run in runs:
        prior = run.metrics.get("trivial", {}).get("label prior", {})
        values = {
            "loss": min(validations(run, LOSS).values(), default=math.nan),
            "ap": run.metrics["last"][PRECISION],
            "prior": prior.get(LOSS, math.nan),
            "lowest": run.metrics.get("lowest", {}).get(LOSS, math.nan),
            "base_rate": prior.get(PRECISION, math.nan),
        }
        for name, value in values.items():
            found[name] = found.get(name, 0.0) + value / len(runs)
    return found


def differences(study: Study, page: Page, points: list[Point]) -> None:
    """Show what the Masked Autoencoder changes at each number of label epochs."""
    rows = []
    keys: dict[float, dict[str, ArmKey]] = {}
    for point in points:
        keys.setdefault(point.epochs, {})[point.line.name] = point.arm.key
    for epochs, arms in sorted(keys.items()):
        if len(arms) < 2:
            continue
        found = compare(study, arms["mae"], arms["none"])
        rows.append({"epochs": epochs, **found.untested_cells()})
    if not rows:
        return
    unit = "percentage points" if points[0].runs[0].kind == SEGMENT else "hundredths"
    page.add(
        f"With the Masked Autoencoder first minus without, in {unit} of the test score, paired by seed, not tested:"
    )
    page.table("label_differences", rows, DIFFERENCE_COLUMNS)
