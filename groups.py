"""Read a study: which of its runs may be averaged and compared, and why the others may not.

    study = Study(Path("runs/study"))
    study.main(arms.ANIMAL)         # the runs of an arm that agree in all settings, one a seed

Runs of one arm are averaged over seeds only where all settings agree; every other run is named in study.notes. What a
setting means is read from the roles in config.json, not from its name.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arms import (
    LABEL_FRACTION,
    LABELS,
    NUM_IMAGES,
    OBJECTIVE,
    PRETRAIN_ANIMAL,
    SCHEDULE,
    Arm,
    ArmKey,
    audited_flags,
    in_table_order,
)
from blocks import literal
from records import MAE, SEGMENT, SIZES, RecordError, RunRecord, Setting, check_file, load_run
from study import PlanError, PlanLine, read_plan


class StudyError(ValueError):
    """A folder that is no study, or whose study.tsv cannot be read."""


# ----------------------------------------------------------------------------------------------------------------------
# Which settings may differ


@dataclass
class Tolerance:
    """Which settings of two runs may differ: those of some roles, some keys; never those that are strict."""

    roles: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    strict: set[str] = field(default_factory=set)

    def allows(self, key: str, role: str) -> bool:
        name = key.removeprefix("pretrain.")
        if name in self.strict:
            return False
        return name in self.keys or key in self.keys or role in self.roles


NO_TOLERANCE = Tolerance()
# What belongs to an objective in pre-training: its recipe.
RATES = ("blr", "min_lr", "weight_decay", "clip_grad")
OBJECTIVE_SETTINGS = ("kind", "objective", "mask_ratio", "drop_path", *RATES, *SCHEDULE)


def tolerance(a: Arm, b: Arm) -> Tolerance:
    """Define which settings two arms may differ in: what defines arms, and between stages what belongs to a network."""
    allowed = Tolerance(roles={"arm"})
    if a.stage != b.stage:
        allowed.roles.add("network")
    if LABEL_FRACTION in (a.sweep, b.sweep):
        allowed.keys.add("batch_size")  # there may be fewer labels than images in a batch
    if {LABELS, OBJECTIVE} & {a.sweep, b.sweep}:  # another objective with its own recipe, in pre-training alone
        before = "" if a.stage == "pretrain" else "pretrain."
        allowed.keys |= {f"{before}{name}" for name in OBJECTIVE_SETTINGS}
    allowed.keys |= audited_flags(a) | audited_flags(b)
    return allowed


def differing(a: dict[str, Setting], b: dict[str, Setting], allowed: Tolerance, shared: bool) -> list[str]:
    """Name the settings that differ, with values. shared: only of those that both have."""
    found = []
    for key in {**a, **b}:
        if shared and not (key in a and key in b):
            continue
        mine = a.get(key, Setting(None, ""))
        other = b.get(key, Setting(None, ""))
        if mine.value != other.value and not allowed.allows(key, mine.role or other.role):
            found.append(f"{key} {mine.value} instead of {other.value}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The study


class Pictures(NamedTuple):
    """Images of an arm's first run."""

    arm: Arm
    arrays: dict[str, np.ndarray]


class Study:
    """All runs of a study folder; groups those that may be averaged and names those that may not.

    runs: in the plan's order. groups: arm -> lists of runs with equal settings, the largest first. notes: one line for
    each thing that is missing or differs. panels, reconstructions: arrays of the first run of each arm. reference: arrays
    of trivial predictors. Raises StudyError for a folder that is no study.
    """

    def __init__(self, path: Path):
        self.path = path
        self.notes: list[str] = []
        self.runs = [load_run(path, line) for line in read_study_plan(path)]
        self.by_folder = {run.name: run for run in self.runs}
        self._check_test_images()
        self._check_parents()
        self._check_pixels()
        for run in self.runs:
            if run.problem:
                self.notes.append(f"`{run.name}` is {run.problem}")
        for run in self.runs:
            if not run.problem and not run.log:
                self.notes.append(f"`{run.name}` has no log.jsonl: no curves")
        self._name_unreadable()
        self.arms = {run.key: run.arm for run in self.runs}
        self.groups = {key: self._group(key) for key in self.arms}
        self._compare_arms()
        self.panels = self._arrays("panels.npz", SEGMENT)
        self.reconstructions = self._arrays("reconstruction.npz", MAE)
        self.reference = self._read_reference()

    def parent(self, run: RunRecord) -> RunRecord | None:
        """Find the run that a run started from."""
        return self.by_folder.get(run.line.parent)

    def before(self, run: RunRecord) -> list[RunRecord]:
        """List the pre-trainings that a run started from, the last one first."""
        found = []
        parent = self.parent(run)
        while parent is not None:
            found.append(parent)
            parent = self.parent(parent)
        return found

    def main(self, key: ArmKey) -> list[RunRecord]:
        """List the runs of an arm that count: the largest group of equal settings."""
        groups = self.groups.get(key)
        return groups[0] if groups else []

    def main_of(self, key: ArmKey, kind: str) -> list[RunRecord]:
        """List the runs of an arm that count, if they are of this task or objective."""
        runs = self.main(key)
        return runs if runs and runs[0].kind == kind else []

    def kinds(self, pretraining: bool) -> list[str]:
        """List the objectives, or else the tasks, of the runs that were started."""
        found = [run.kind for run in self.runs if (run.stage == "pretrain") == pretraining and run.kind]
        return list(dict.fromkeys(found))

    def left_out(self, key: ArmKey) -> str:
        """List which runs of an arm do not count, and why."""
        reasons = []
        for run in self.runs:
            if run.key == key and run not in self.main(key):
                reasons.append(f"without seed {run.seed} ({run.problem or 'other settings'})")
        return "; ".join(reasons)

    def matches(self, run: RunRecord, other: RunRecord) -> bool:
        """Check whether two runs may stand in one sweep: equal but for what it changes, at equal updates."""
        if run.config.get("updates") != other.config.get("updates"):
            return False
        before = self.parent(run)
        other_before = self.parent(other)
        if before and other_before:
            sizes = ("updates",) if NUM_IMAGES in (run.arm.sweep, other.arm.sweep) else SIZES
            for size in sizes:
                if before.config.get(size) != other_before.config.get(size):
                    return False
        allowed = tolerance(run.arm, other.arm)
        allowed.strict.add("animal_images")
        return not differing(run.settings, other.settings, allowed, shared=True)

    def _check_test_images(self) -> None:
        """Leave out runs that were tested on other images, or with other scores, than most runs of the task.

        Images are compared between runs whose data were divided in the same way.
        """
        images: dict[tuple[str, ...], Counter] = {}
        names: dict[str, Counter] = {}
        tested = [run for run in self.runs if run.test]
        for run in tested:
            images.setdefault(test_list(run), Counter())[tuple(run.test["ids"])] += 1
            names.setdefault(run.kind, Counter())[run.table().names] += 1
        for run in tested:
            if tuple(run.test["ids"]) != most_common(images[test_list(run)]):
                run.problem = "tested on other images than its siblings"
            elif run.table().names != most_common(names[run.kind]):
                run.problem = "tested with other scores than its siblings"

    def _check_parents(self) -> None:
        """Add the settings of the pre-training; leave out runs that started from other weights than their siblings."""
        first: dict[str, RunRecord] = {}
        for run in self.runs:
            parent = self.parent(run)
            if parent is None:
                continue
            for key, setting in parent.settings.items():
                run.settings[f"pretrain.{key}"] = setting
            sibling = first.setdefault(parent.name, run)
            if run.problem or sibling.problem:
                continue
            if run.config["experiment"].get("init") != sibling.config["experiment"].get("init"):
                run.problem = f"not comparable: it started from other weights than `{sibling.name}`"

    def _check_pixels(self) -> None:
        """Leave out runs whose images were others than those of most runs with the same list."""
        pixels: dict[tuple, Counter] = {}
        known = [run for run in self.runs if not run.problem and "pixels" in run.metrics]
        for run in known:
            pixels.setdefault(image_list(run), Counter())[run.metrics["pixels"]] += 1
        for run in known:
            if run.metrics["pixels"] != most_common(pixels[image_list(run)]):
                run.problem = "not comparable: images of its list had other pixels than for its siblings"

    def _name_unreadable(self) -> None:
        """Name the images that runs left out because they could not be read, each once."""
        found: dict[str, list[RunRecord]] = {}
        for run in self.runs:
            for image in (*run.metrics.get("unreadable", ()), *map(str, run.test.get("unreadable", ()))):
                found.setdefault(image, []).append(run)
        for image, runs in found.items():
            others = f" and {len(runs) - 1} more runs" if len(runs) > 1 else ""
            self.notes.append(f"{literal(image)} could not be read: left out by `{runs[0].name}`{others}")

    def _group(self, key: ArmKey) -> list[list[RunRecord]]:
        """Sort the usable runs of an arm into groups of equal settings, the largest first."""
        groups: list[list[RunRecord]] = []
        for run in self.runs:
            if run.key != key or run.problem:
                continue
            for group in groups:
                if not differing(run.settings, group[0].settings, NO_TOLERANCE, shared=False):
                    group.append(run)
                    break
            else:
                groups.append([run])
        groups.sort(key=len, reverse=True)
        for group in groups[1:]:
            for run in group:
                first = groups[0][0]
                changes = "; ".join(differing(run.settings, first.settings, NO_TOLERANCE, shared=False))
                self.notes.append(f"`{run.name}` has other settings than `{first.name}` ({changes}): not averaged")
        return groups

    def _compare_arms(self) -> None:
        """Name arms whose settings differ from those of the animal arm beyond what defines the arm."""
        for key, arm in self.arms.items():
            stage = "pretrain" if arm.stage == "pretrain" else "finetune"
            usual = self.main(ArmKey(stage, PRETRAIN_ANIMAL.name))
            runs = self.main(key)
            if not usual or not runs:
                continue
            allowed = tolerance(arm, usual[0].arm)
            if arm.own_schedule:
                allowed.keys.update(SCHEDULE)
            changes = "; ".join(differing(runs[0].settings, usual[0].settings, allowed, shared=True))
            if changes:
                self.notes.append(f"all of `{arm.title}` has other settings than `{usual[0].arm.title}` ({changes})")

    def _load(self, name: str, consequence: str, files: dict[str, str]) -> dict[str, np.ndarray]:
        """Load a file of arrays below the study; what is missing or damaged is named, and {} returned."""
        try:
            check_file(self.path / name, files)
            with np.load(self.path / name, allow_pickle=False) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            state = "missing"
        except RecordError as error:
            state = f"unreadable ({error})"
        except Exception as error:
            state = f"unreadable ({type(error).__name__})"
        self.notes.append(f"`{name}` is {state}, {consequence}")
        return {}

    def _arrays(self, name: str, kind: str) -> list[Pictures]:
        """Load a file of pictures of the first run of each arm without a sweep."""
        found = []
        for key in in_table_order(self.arms):
            arm = self.arms[key]
            runs = self.main(key)
            if not runs or runs[0].kind != kind or arm.sweep:
                continue
            arrays = self._load(f"{runs[0].name}/{name}", "so its pictures are not shown", runs[0].files)
            if arrays:
                found.append(Pictures(arm, arrays))
        return found

    def _read_reference(self) -> dict[str, np.ndarray]:
        """Load the scores of trivial predictors, if they are of the images and the size that the runs were tested on."""
        tasks = self.kinds(pretraining=False)
        if tasks and SEGMENT not in tasks:
            return {}
        tested = [run.test for run in self.runs if run.test and run.kind == SEGMENT]
        reference = self._load("reference.npz", "so trivial predictors are not shown", {})
        if not reference or not tested:
            return reference
        for name in ("ids", "img_size"):
            if not np.array_equal(reference.get(name), tested[0][name]):
                self.notes.append(
                    "`reference.npz` is of other images or another size than the tests, so it is not shown"
                )
                return {}
        return reference


def image_list(run: RunRecord) -> tuple:
    """Name what decides which pixels a run is trained on."""
    return run.config["experiment"].get("train"), run.config["args"].get("cache_size")


def test_list(run: RunRecord) -> tuple[str, ...]:
    """Name what decides which images a run is tested on: its task, and how the pets were listed and divided."""
    args = run.config["args"]
    return run.kind, args.get("pets_listing", "list.txt"), args.get("pets_division", "disjoint")


def most_common(counter: Counter) -> object:
    """Return what occurs most often."""
    [(value, _)] = counter.most_common(1)
    return value


def read_study_plan(path: Path) -> list[PlanLine]:
    """Read the plan of a study folder. Raises StudyError where it has none, or a damaged one."""
    table = path / "study.tsv"
    try:
        lines = read_plan(table)
    except PlanError as error:
        raise StudyError(str(error)) from None
    if not lines:
        raise StudyError(f"{table} lists no runs; start the study with run_all.sh")
    seen = set()
    for line in lines:
        identity = (line.seed, line.stage, line.arm)
        if identity in seen or line.folder in seen:
            raise StudyError(f"{table} lists {line.folder} twice; repeated seeds are no independent runs")
        seen.update([identity, line.folder])
    return lines
