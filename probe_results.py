"""Section of the report on probes: what frozen encoders know, beside random encoders of the same size.

found = read_probes(study)          # None where nothing was probed; what is missing is added to study.notes
probes(study, page, found)
"""

from collections import Counter
from dataclasses import dataclass, field

import figures
from arms import GREY, Arm, Style
from audit import over_seeds
from blocks import literal
from comparisons import Estimate, within_range
from groups import Study, most_common
from metrics import bootstrap, paired_bootstrap, t_interval
from probe_records import METERS, PROBES, SHOTS, Probed, few_images_note, load_probe, random_folder, statistic
from records import RecordError, RunRecord
from tables import Column, Page, write_table

RANDOM = "random weights"
RANDOM_STYLE = Style(GREY, "--", "|")
HOW = "python probe.py {study} --random"


@dataclass
class ProbedArm:
    """The probed encoders of an arm by their seeds."""

    arm: Arm
    runs: dict[int, Probed] = field(default_factory=dict)


@dataclass
class ProbeStudy:
    """All probed encoders of a study, and the random ones by their seeds."""

    arms: list[ProbedArm]
    random: dict[int, Probed]


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_probes(study: Study) -> ProbeStudy | None:
    """Read the probes of all pre-trainings that count; None where there is none. What is missing is added to the notes."""
    runs = [run for key in study.arms for run in study.main(key) if run.stage == "pretrain"]
    if not any((study.path / run.name / "probe.json").exists() for run in runs):
        return None
    read = {run.name: read_probe(study, run) for run in runs}
    found = {name: probed for name, probed in read.items() if probed is not None}
    usual = most_common(Counter(probed.conditions for probed in found.values())) if found else None
    arms: dict[str, ProbedArm] = {}
    random: dict[int, Probed] = {}
    for run in runs:
        probed = found.get(run.name)
        if probed is None:
            continue
        if probed.conditions != usual:
            study.notes.append(f"`{run.name}` was probed on other photos or in another way than most: not shown")
            continue
        arms.setdefault(run.arm.title, ProbedArm(run.arm)).runs[run.seed] = probed
        beside = read_random(study, run, probed)
        if beside is not None:
            random[run.seed] = beside
    return ProbeStudy(list(arms.values()), random)


def read_probe(study: Study, run: RunRecord) -> Probed | None:
    """Read the probe of a run; None with a note where it is missing, damaged, or of other weights."""
    try:
        probed = load_probe(study.path / run.name)
    except FileNotFoundError:
        study.notes.append(f"`{run.name}` is not probed ({HOW.format(study=study.path)})")
        return None
    except Exception as error:  # damaged records fail in as many ways as there are parsers
        study.notes.append(f"the probe of `{run.name}` is unreadable: {describe(error)}")
        return None
    weights = probed.record["key"].get("weights")
    if weights != run.files.get("model.pt", weights):
        study.notes.append(f"the probe of `{run.name}` is of other weights ({HOW.format(study=study.path)})")
        return None
    return probed


def read_random(study: Study, run: RunRecord, probed: Probed) -> Probed | None:
    """Read the probe of the random encoder beside a run; None with a note where there is none that can be compared."""
    record = probed.record
    folder = random_folder(study.path / run.name, record["model"], record["img_size"], run.seed)
    name = folder.relative_to(study.path)
    try:
        random = load_probe(folder)
    except FileNotFoundError:
        problem = "is not probed"
    except Exception as error:
        problem = f"is unreadable: {describe(error)}"
    else:
        if random.conditions == probed.conditions:
            return random
        problem = "was probed on other photos or in another way"
    note = f"`{name}`, the yardstick of seed {run.seed}, {problem} ({HOW.format(study=study.path)})"
    if note not in study.notes:
        study.notes.append(note)
    return None


def describe(error: Exception) -> str:
    """Say in a line what is wrong with a record."""
    if isinstance(error, RecordError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def estimate(runs: list[Probed], probe: str) -> Estimate:
    """Average a score over seeds with its t-interval; of one encoder with the bootstrap over test images."""
    if len(runs) == 1:
        found = Estimate(*map(float, bootstrap(runs[0].sums(probe), statistic(probe))))
    else:
        found = Estimate(*t_interval([run.score(probe) for run in runs]))
    return within_range(probe, found)


def differences(arm: ProbedArm, random: dict[int, Probed], probe: str) -> list[Estimate]:
    """Compare the encoders of an arm with the random ones of their seeds, in points, on the same test images."""
    found = []
    for seed, run in arm.runs.items():
        if seed in random:
            difference = paired_bootstrap(run.sums(probe), random[seed].sums(probe), statistic(probe))
            found.append(Estimate(*map(float, difference)).times(100))
    return found


def score_row(label: str, runs: list[Probed]) -> dict:
    """Describe the encoders of an arm: scores, and means of the meters over seeds."""
    row: dict = {"encoder": label, "seeds": len(runs)}
    for probe in PROBES:
        row[probe] = estimate(runs, probe)
    for name in METERS:
        row[name] = sum(run.meter(name) for run in runs) / len(runs)
    for shots in SHOTS:
        name = f"shot_{shots}"
        row[f"{name}_draws"] = sum(run.draws_deviation(name) for run in runs) / len(runs)
    return row


def difference_row(arm: ProbedArm, random: dict[int, Probed]) -> dict:
    """Describe the differences of an arm to random encoders."""
    row: dict = {"encoder": arm.arm.images, "seeds": len(set(arm.runs) & set(random))}
    for probe in PROBES:
        row[probe] = over_seeds(differences(arm, random, probe))
    return row


# ----------------------------------------------------------------------------------------------------------------------
# The section

PROBES_TEXT = (
    "Frozen encoders, asked on Oxford-IIIT Pet: test top-1 of the breed from the mean of the patch tokens (cosine 20-NN, "
    "linear, and linear on 1, 5 or 10 images of each breed, mean of five draws), and the IoU of trimaps by a linear "
    "classifier of the patch tokens. Regularisers are chosen on validation images. Yardstick: the encoder with the random "
    "weights that a pre-training of the seed begins with. Spread (1: as wide as it can be, 0: all images alike) and rank "
    "(RankMe) of the image features tell a collapsed encoder. ± is half the width of the 95 % interval (t over seeds; one "
    "seed: bootstrap over test images)."
)
SCORE_COLUMNS = [
    Column("encoder", "pre-training"),
    Column("seeds"),
    *(Column(probe, words) for probe, words in PROBES.items()),
    Column("spread", "spread", 2),
    Column("rank", "rank", 1),
]
DIFFERENCE_COLUMNS = [
    Column("encoder", "pre-training − random"),
    Column("seeds"),
    *(Column(probe, words, 1) for probe, words in PROBES.items()),
]


def probes(page: Page, found: ProbeStudy | None) -> None:
    """Show what frozen encoders know, and by how much it is more than what random ones do."""
    if found is None or not found.arms:
        return
    page.add("## What frozen features know", f"{PROBES_TEXT} {draws_text(found)}")
    caption = (
        "Probes of frozen encoders after each pre-training, with 95 % intervals (t over seeds; one seed: bootstrap over "
        "test images; cut at the picture's edge); small dots: seeds. Dashed: random weights, with their interval."
    )
    page.figure("probes", caption, figures.dot_panels, panels(found), RANDOM)
    rows = [score_row(arm.arm.images, list(arm.runs.values())) for arm in found.arms]
    if found.random:
        rows.insert(0, score_row(RANDOM, list(found.random.values())))
    write_table(page.folder, "probes", rows)
    page.show(rows, SCORE_COLUMNS, brief=True)
    show_differences(page, found)


def draws_text(found: ProbeStudy) -> str:
    """Say how much the few-shot scores vary with the draw, and what can be had without looking at an image."""
    probed = [run for arm in found.arms for run in arm.runs.values()]
    parts = []
    for shots in SHOTS:
        mean = sum(run.draws_deviation(f"shot_{shots}") for run in probed) / len(probed)
        parts.append(f"{100 * mean:.1f} points ({shots})")
    usual = probed[0].record["most_frequent_breed"]
    varies = f"Standard deviation over the draws of few shots: {', '.join(parts)}."
    text = f"{varies} Always naming the most frequent breed is right for {usual:.3f} of the test images."
    note = few_images_note(probed[0].record)
    return f"{text} Note: {note}." if note else text


def show_differences(page: Page, found: ProbeStudy) -> None:
    """Show differences to the random encoders of the same seeds."""
    rows = [difference_row(arm, found.random) for arm in found.arms]
    rows = [row for row in rows if row["seeds"]]
    if not rows:
        return
    page.add(
        "Differences to the random encoder of the same seed in points, with 95 % intervals (t over seeds; one seed: paired "
        f"bootstrap over test images). {verdict(rows)}"
    )
    page.table("probe_differences", rows, DIFFERENCE_COLUMNS)


def verdict(rows: list[dict]) -> str:
    """Count for each probe the encoders that are above the random one by more than their interval."""
    parts = []
    for probe, words in PROBES.items():
        above = sum(row[probe].low > 0 for row in rows)
        parts.append(f"{words} {above} of {len(rows)}")
    return f"Above it by more than the interval: {', '.join(parts)}."


def panels(found: ProbeStudy) -> list[figures.DotPanel]:
    """Make a panel for each probe."""
    made = []
    for probe, words in PROBES.items():
        rows = []
        for arm in found.arms:
            runs = list(arm.runs.values())
            interval = figures.Interval(*estimate(runs, probe))
            rows.append(figures.DotRow(arm.arm.images, arm.arm.style, interval, [run.score(probe) for run in runs]))
        yardstick = None
        if found.random:
            yardstick = figures.Interval(*estimate(list(found.random.values()), probe))
        title = words if words.endswith("IoU") else f"{words}, top-1"
        made.append(figures.DotPanel(literal(title), rows, yardstick))
    return made
