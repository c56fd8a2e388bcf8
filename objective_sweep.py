"""Section of the report on the objectives of pre-training: does the difference between image distributions depend on them?

    results = read_sweep(study, "segment")          # the runs of `run_all.sh --sweep objective`
    section(study, page, results)

Each objective is pre-trained on animal and on non-animal images for equally many updates and fine-tuned from its encoder
alone; the autoencoder with its decoder is a further line. Updates are equal, operations are not: both are shown.
"""

import statistics
from dataclasses import dataclass

import figures
from arms import ARMS, MAE, MAE_DECODER, OBJECTIVE, OBJECTIVE_SWEEP, Arm, ArmKey, SweepLine, sweep_lines
from comparisons import compare, estimates
from groups import Study, differing, tolerance
from records import SEGMENT, RunRecord
from tables import Column, Page

TERA = 1e12
METERS = ("knn", "rank", "spread")

TEXT = (
    "Each row is pre-trained from random weights on one list of images, for equally many updates of equal batches, then "
    "fine-tuned from the encoder alone by one recipe; only the row called *with its decoder* keeps more. TFLOP: operations "
    "of pre-training, matrix products only; equal updates do not cost the same. 20-NN, rank and spread: of the encoder's "
    "features at the last validation (`meters.py`). Labels see annotations that the others do not. The recipes are not "
    "tuned."
)
COLUMNS = [
    Column("line", "objective"),
    Column("images", "pre-training images"),
    Column("seeds"),
    Column("score"),
    Column("updates"),
    Column("tflop", "TFLOP", 1),
    Column("times_mae", "× MAE", 2),
    Column("seconds", "seconds", 0),
    Column("knn", "20-NN"),
    Column("rank", "rank", 1),
    Column("spread", "spread", 2),
]
DIFFERENCE_COLUMNS = [
    Column("line", "objective"),
    Column("each", "per seed [95 % bootstrap over test images]"),
    Column("mean", "mean [95 % t-interval]", 2),
]
LEARNT_COLUMNS = [
    Column("line", "objective"),
    Column("images", "pre-training images"),
    Column("words", "validation score"),
    Column("last"),
    Column("trivial", "without learning"),
]


@dataclass
class Point:
    """Runs of one objective on one kind of images."""

    line: SweepLine
    images: ArmKey  # the study's arm that is pre-trained on the same images
    arm: Arm
    runs: list[RunRecord]
    pretraining: list[RunRecord]  # of each run

    @property
    def tflop(self) -> float:
        """Operations of one pre-training, in TFLOP."""
        config = self.pretraining[0].config
        return config["flops_per_image"] * config["updates"] * config["batch_size"] / TERA

    @property
    def seconds(self) -> float | None:
        """Median time of pre-training."""
        times = [run.metrics["seconds"] for run in self.pretraining if "seconds" in run.metrics]
        return statistics.median(times) if times else None

    def meter(self, name: str) -> float | None:
        """Mean of a meter of collapse over seeds, at the last validation; None where it was not read."""
        values = [run.metrics["last"].get(name) for run in self.pretraining]
        if None in values:
            return None
        return statistics.fmean(values)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_sweep(study: Study, task: str) -> list[Point]:
    """Collect the points of the sweep; a run that was trained otherwise is named in the study's notes and left out."""
    lines = {line.name: line for line in sweep_lines(OBJECTIVE)}
    found: list[Point] = []
    for key, arm in study.arms.items():
        runs = study.main_of(key, task)
        if arm.sweep == OBJECTIVE and runs:
            add_point(study, found, lines[arm.line], arm, runs)
    if not found:
        return []
    if not any(point.line.name == MAE_DECODER for point in found):
        for key in OBJECTIVE_SWEEP:  # the study's own arms are that line, if they are trained alike
            runs = study.main_of(key, task)
            if runs:
                add_point(study, found, lines[MAE_DECODER], study.arms[key], runs)
    places = list(lines)
    found.sort(key=lambda point: (places.index(point.line.name), OBJECTIVE_SWEEP.index(point.images)))
    return found


def add_point(study: Study, found: list[Point], line: SweepLine, arm: Arm, runs: list[RunRecord]) -> None:
    """Add a point if its trainings are finished and as long as those of the first one; else name it in the notes."""
    pretraining = [study.parent(run) for run in runs]
    if any(run is None or run.problem for run in pretraining):
        return
    images = ArmKey("finetune", pretraining[0].arm.flags["split"])
    point = Point(line, images, arm, runs, pretraining)
    if not found or is_equal(point, found[0]):
        found.append(point)
        return
    first = found[0].runs[0]
    problem = f"`{runs[0].name}` has other settings or updates than `{first.name}`"
    study.notes.append(f"{problem}: not in the sweep over objectives")


def is_equal(point: Point, other: Point) -> bool:
    """Check that two points were pre-trained for equally many updates of equal batches, and fine-tuned alike."""
    for name in ("updates", "batch_size"):
        if point.pretraining[0].config[name] != other.pretraining[0].config[name]:
            return False
    a = point.runs[0]
    b = other.runs[0]
    if a.config["updates"] != b.config["updates"]:
        return False
    return not differing(a.settings, b.settings, tolerance(a.arm, b.arm), shared=True)


def of_images(points: list[Point], images: ArmKey) -> list[Point]:
    """Pick the points of one kind of images."""
    return [point for point in points if point.images == images]


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def section(study: Study, page: Page, points: list[Point]) -> None:
    """Show the sweep: a figure, all points, the differences between the images, and what each objective has learnt."""
    if not points:
        return
    run = points[0].runs[0]
    score = run.select
    words = run.config["scores"].get(score, score)
    page.add("## Objectives of pre-training", TEXT)
    draw(page, points, f"test {words}")
    columns = [Column(column.key, f"{words} [95 %]") if column.key == "score" else column for column in COLUMNS]
    page.table("objectives", [point_row(points, point) for point in points], columns)
    differences(study, page, points)
    learnt(page, points)


def draw(page: Page, points: list[Point], words: str) -> None:
    """Draw the score of each objective by pre-training images, and against the operations of pre-training."""
    rows = []
    for name in dict.fromkeys(point.line.name for point in points):
        of_line = [point for point in points if point.line.name == name]
        marks = [mark(point) for point in of_line]
        rows.append(figures.Row(of_line[0].line.label, of_line[0].line.style.marker, marks))
    caption = (
        "Left: score after fine-tuning, by objective and pre-training images; bars: 95 % intervals (t over seeds; one seed: "
        "bootstrap over test images); dots: seeds. Right: the same scores against the operations of pre-training."
    )
    page.figure("objectives", caption, figures.rows_beside_cost, rows, (words, "pre-training (TFLOP)"))


def mark(point: Point) -> figures.Mark:
    """Give what the figure shows of a point."""
    score = point.runs[0].select
    interval = figures.Interval(*estimates(point.runs)[score])
    seeds = [run.score(score) for run in point.runs]
    own = ARMS[point.images]
    return figures.Mark(own.images, own.style, interval, seeds, point.tflop)


def point_row(points: list[Point], point: Point) -> dict:
    """Describe a point in the table."""
    row = {
        "line": point.line.label,
        "images": point.pretraining[0].arm.images,
        "seeds": len(point.runs),
        "score": estimates(point.runs)[point.runs[0].select],
        "updates": point.pretraining[0].config["updates"],
        "tflop": point.tflop,
        "seconds": point.seconds,
    }
    for other in of_images(points, point.images):
        if other.line.name == MAE:
            row["times_mae"] = point.tflop / other.tflop
    for name in METERS:
        value = point.meter(name)
        if value is not None:
            row[name] = value
    return row


def differences(study: Study, page: Page, points: list[Point]) -> None:
    """Show what the images change under each objective."""
    first, second = OBJECTIVE_SWEEP
    rows = []
    for point in of_images(points, first):
        for other in of_images(points, second):
            if other.line.name != point.line.name:
                continue
            found = compare(study, point.arm.key, other.arm.key)
            rows.append({"line": point.line.label, **found.untested_cells()})
    if not rows:
        return
    unit = "percentage points" if points[0].runs[0].kind == SEGMENT else "hundredths"
    page.add(f"Animal minus non-animal pre-training images, in {unit} of the test score, paired by seed, not tested:")
    page.table("objective_differences", rows, DIFFERENCE_COLUMNS)


def learnt(page: Page, points: list[Point]) -> None:
    """Show the last validation scores of each objective beside what any training must beat."""
    rows = []
    for point in points:
        if point.line.name == MAE_DECODER:
            continue
        for score, words in point.pretraining[0].config["scores"].items():
            trivial = trivial_words(point, score)
            if not trivial:
                continue
            row = {
                "line": point.line.label,
                "images": point.pretraining[0].arm.images,
                "words": words,
                "last": statistics.fmean(run.metrics["last"][score] for run in point.pretraining),
                "trivial": trivial,
            }
            rows.append(row)
    if not rows:
        return
    page.add("What each has learnt of its own question, on validation images, beside what needs no learning:")
    page.table("objective_scores", rows, LEARNT_COLUMNS)


def trivial_words(point: Point, score: str) -> str:
    """Name what learns nothing with its score, mean over seeds: "unigram 6.071, copy mixture 5.738"."""
    levels = [run.trivial(score) for run in point.pretraining]
    words = []
    for predictor in levels[0]:
        known = [level[predictor] for level in levels if predictor in level]
        words.append(f"{predictor} {statistics.fmean(known):.3f}")
    return ", ".join(words)
