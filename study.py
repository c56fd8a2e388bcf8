"""Read the records of a study: which runs may be averaged and compared, and their scores with intervals.

    study = Study(Path("runs/study"))
    estimates(study.main(("finetune", "animal")))["iou"]     # Estimate(value, low, high)

Runs of one arm are averaged over seeds only where all settings agree; every other run is named in study.notes.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metrics import bootstrap, holm, paired_bootstrap, paired_t_test, ratio, scores, t_interval, tost

ARMS = {  # with the paper's Table 2: loss, IoU, accuracy in percent
    ("baseline", "resnet50"): ("ResNet-50", (0.40, 0.765, 89.3)),
    ("baseline", "mae"): ("Supervised MAE", (0.45, 0.699, 82.8)),
    ("finetune", "animal"): ("Finetuned-Animals", (0.34, 0.785, 86.7)),
    ("finetune", "half"): ("Finetuned-Half", (0.35, 0.757, 86.5)),
    ("finetune", "non_animal"): ("Finetuned-Non-Animals", (0.37, 0.761, 85.4)),
    ("finetune", "mixed"): ("Finetuned-Mixed", (0.32, 0.781, 86.8)),
    ("finetune", "pets"): ("Finetuned-Pets", None),
    ("finetune", "all"): ("Finetuned-All", None),
}
RESNET, SUPERVISED, ANIMAL, HALF, NON_ANIMAL, MIXED, PETS, ALL = ARMS
PLANNED = [(ANIMAL, NON_ANIMAL), (ANIMAL, MIXED), (ANIMAL, HALF), (ANIMAL, SUPERVISED), (NON_ANIMAL, SUPERVISED),
           (ANIMAL, RESNET)]  # fmt: skip
PRETRAINED = {"animal": "animals", "non_animal": "non-animals", "mixed": "mixed", "pets": "Pets", "all": "all of COCO",
              "mae": "no pre-training"}  # fmt: skip
MARGIN = 0.5  # IoU points within which two arms count as equivalent
CURVES = ("loss", "iou", "loss_animal", "loss_non_animal")
NAMES = ["loss", "iou", "iou_background", "iou_border", "miou", "iou_border_as_pet", "iou_border_ignored", "accuracy",
         "boundary_pet", "boundary_pet_or_border"]  # fmt: skip
DRAWN = {"seed", "split_seed", "train", "init"}  # what a seed changes
DEFINING = {"split", "num_images", "animal_fraction", "animal_images", "train_fraction", "equal_updates", "n_train",
            "updates"}  # fmt: skip
RECIPE = {"model", "blr", "layer_decay", "drop_path", "weights", "head", "freeze"}  # what belongs to a kind of network


class StudyError(ValueError):
    """A folder that is no study, or whose study.tsv cannot be read."""


class Estimate(NamedTuple):
    """A value with its 95 % interval (nan limits: none)."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def times(self, factor: float) -> "Estimate":
        return Estimate(*(float(factor * v) for v in self))


class Run:
    """One line of study.tsv with what its folder holds; `problem` says why it cannot be used, whatever is wrong."""

    def __init__(self, study: Path, seed: str, stage: str, arm: str, name: str):
        self.seed, self.stage, self.arm, self.name, self.key = int(seed), stage, arm, name, (stage, arm)
        self.config, self.settings, self.log, self.metrics, self.test = {}, {}, [], {}, {}
        try:
            self.problem = self._read(study / name)
        except Exception as error:  # damaged records fail in as many ways as there are parsers
            self.problem = f"unreadable: {type(error).__name__}: {error}".splitlines()[0]
        if self.problem:
            self.metrics, self.log, self.test = {}, [], {}

    def _read(self, path: Path) -> str | None:
        if not (path / "config.json").exists():
            return "missing: not started (no config.json)"
        c = json.loads((path / "config.json").read_text())
        settings = c["experiment"] | {k: c[k] for k in ("n_train", "updates")} | {"precision": c.get("precision")}
        wrong = [k for k in ("n_train", "n_unique", "updates") if type(c[k]) is not int]
        wrong += [k for k in ("args", "data", "hardware", "versions", "manifest") if not isinstance(c.get(k, {}), dict)]
        if wrong or not isinstance(c.get("manifest", {}).get("train", {}), dict):
            raise TypeError(f"config.json: {', '.join(wrong) or 'manifest'} is of a wrong type")
        _ = c["args"], c.get("data", {"title": ""})["title"]
        self.config, self.settings = c, {k: v for k, v in settings.items() if k not in DRAWN}
        if (path / "log.jsonl").exists():
            lines = (path / "log.jsonl").read_bytes().split(b"\n")[:-1]  # a line being written has no end yet
            self.log = [json.loads(line) for line in lines if line]
        drawn = [line for line in self.log if line["event"] in ("train", "val")]
        _ = [float(line["epoch"]) + sum(float(line[k]) for k in CURVES if k in line) for line in drawn]
        if not (path / "metrics.json").exists():
            step = max((line.get("step", 0) for line in self.log), default=0)
            return f"unfinished: no metrics.json (logged up to update {step:,} of {c['updates']:,})"
        m = self.metrics = json.loads((path / "metrics.json").read_text())
        _ = m.get("seconds", 0) + sum(m.get(k) or 0 for k in ("img_s", "mfu", "mem_gb"))
        if self.stage == "pretrain":
            _ = sum(m["last"][k] for k in ("loss_animal", "loss_non_animal")), sum(m.get("predict_zero", {}).values())
            return None
        if not (path / "test.npz").exists():
            return f"not tested: no test.npz (python evaluate.py test {path})"
        with np.load(path / "test.npz", allow_pickle=False) as arrays:
            self.test = dict(arrays)
        _ = self.records(), self.records(native=True), m["best"]["iou"] + m["best"]["epoch"] + m["last"]["iou"]
        return None

    def records(self, native: bool = False) -> np.ndarray:
        """One row of sums per test image [n, 15]: 9 counts, loss, pixels, boundary intersections and unions."""
        end, sums = "_native" * native, np.stack([self.test["loss_sum"], self.test["pixels"]], 1)
        counts, edges = (self.test[k + end].reshape(len(sums), -1) for k in ("counts", "boundary"))
        return np.concatenate([counts, sums, edges], axis=1).astype(float)

    def iou(self, name: str = "iou") -> float:
        """Score the test images together."""
        return float(scores(self.test["counts"].sum(0))[name])


def differing(a: dict, b: dict, ignore: set = frozenset(), both: bool = True) -> list[str]:
    """Name the settings (of both, or of either) that differ, with values; the pre-training's begin with "pretrain."."""
    keys = [k for k in {**a, **b} if (k in a and k in b) or not both]
    keys = [k for k in keys if a.get(k) != b.get(k) and k.removeprefix("pretrain.") not in ignore]
    return [f"{k} {a.get(k)} instead of {b.get(k)}" for k in keys]


class Study:
    """All runs of a study folder; groups those that may be averaged and names those that may not."""

    def __init__(self, path: Path):
        table = path / "study.tsv"
        if not table.is_file():
            raise StudyError(f"{path} is no study: it has no study.tsv; give the folder that run_all.sh wrote")
        try:
            self.runs = [Run(path, *line.split("\t")) for line in table.read_text().splitlines() if line]
        except (ValueError, TypeError):
            raise StudyError(f"{table} is damaged: its lines must be seed, stage, arm and folder, with tabs") from None
        if not self.runs:
            raise StudyError(f"{table} lists no runs; start the study with run_all.sh")
        self.path, self.find = path, {(r.seed, *r.key): r for r in self.runs}
        if twice := [r.name for r in self.runs if r not in self.find.values()]:
            raise StudyError(f"{table} lists {twice[0]} twice; repeated seeds are no independent runs")
        self._check_siblings()
        self.notes = [f"`{r.name}` is {r.problem}" for r in self.runs if r.problem]
        self.notes += [f"`{r.name}` has no log.jsonl: no curves" for r in self.runs if not (r.problem or r.log)]
        self.groups = {key: self._group(key) for key in dict.fromkeys(r.key for r in self.runs)}
        self._compare_arms()
        self.panels = self._arrays(ARMS, "panels.npz")
        self.reconstructions = self._arrays([("pretrain", arm) for arm in PRETRAINED], "reconstruction.npz")
        self.reference = self._load("reference.npz", "so trivial predictors are not shown")
        tested = next((r.test for r in self.runs if r.test), self.reference)
        if self.reference and any(not np.array_equal(self.reference.get(k), tested[k]) for k in ("ids", "img_size")):
            self.reference = {}
            self.notes.append("`reference.npz` is of other images or another size than the tests, so it is not shown")

    def pretraining(self, run: Run) -> Run | None:
        """The run that a fine-tuning started from."""
        arm = "animal" if run.arm == "half" else run.arm.split("_labels_")[0]
        return self.find.get((run.seed, "pretrain", arm)) if run.stage == "finetune" else None

    def _check_siblings(self) -> None:
        """Tested on the same images? Started from the same weights as the arm with the same pre-training?"""
        tested = Counter(tuple(r.test["ids"]) for r in self.runs if r.test).most_common(1)
        for run in self.runs:
            if run.test and tuple(run.test["ids"]) != tested[0][0]:
                run.problem = "tested on other images than its siblings"
            if parent := self.pretraining(run):
                run.settings |= {f"pretrain.{k}": v for k, v in parent.settings.items()}
                first = self.find.get((run.seed, "finetune", parent.arm))
                starts = {r.config["experiment"].get("init") for r in (run, first) if r and not r.problem}
                if not run.problem and len(starts) > 1:
                    run.problem = f"not comparable: it started from other weights than `{first.name}`"

    def _group(self, key: tuple) -> list[list[Run]]:
        """Usable runs of an arm in groups of equal settings, the largest first."""
        groups: list[list[Run]] = []
        for run in (r for r in self.runs if r.key == key and not r.problem):
            home = next((g for g in groups if not differing(run.settings, g[0].settings, both=False)), None)
            groups.append([run]) if home is None else home.append(run)
        groups.sort(key=len, reverse=True)
        for run in (r for g in groups[1:] for r in g):
            first = groups[0][0]
            changes = "; ".join(differing(run.settings, first.settings, both=False))
            self.notes.append(f"`{run.name}` has other settings than `{first.name}` ({changes}): not averaged")
        return groups

    def _compare_arms(self) -> None:
        """Name arms whose settings differ from those of the animal arm beyond what defines the arm."""
        for key, run in ((k, g[0][0]) for k, g in self.groups.items() if g):
            stage = "pretrain" if key[0] == "pretrain" else "finetune"
            free = self.free(key, (stage, "animal")) | ({"epochs"} if key == RESNET else set())  # with its own schedule
            for first in self.main((stage, "animal"))[:1]:
                if changes := "; ".join(differing(run.settings, first.settings, free)):
                    self.notes.append(f"all of `{'_'.join(key)}` has other settings than `{stage}_animal` ({changes})")

    def free(self, a: tuple, b: tuple) -> set:
        """Settings that may differ between two arms."""
        return DEFINING | ({"batch_size"} if "_labels_" in a[1] + b[1] else set()) | (RECIPE if a[0] != b[0] else set())

    def matches(self, run: Run, other: Run) -> bool:
        """May a run stand in a sweep beside another: equal in all but the share of animals or labels, with equal updates?"""
        before = [self.pretraining(r) for r in (run, other)]
        pairs = [((run, other), ("updates",)), (before, ("n_train", "n_unique", "updates"))]
        equal = all(a.config.get(k) == b.config.get(k) for (a, b), keys in pairs if a and b for k in keys)
        return equal and not differing(run.settings, other.settings, self.free(run.key, other.key) - {"animal_images"})

    def main(self, key: tuple) -> list[Run]:
        """The runs of an arm that count: the largest group of equal settings."""
        return (self.groups.get(key) or [[]])[0]

    def _load(self, name: str, so: str) -> dict:
        """Load a file of arrays below the study; what is missing or damaged is named, and {} returned."""
        try:
            with np.load(self.path / name, allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:
            state = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({type(error).__name__})"
            self.notes.append(f"`{name}` is {state}, {so}")
            return {}

    def _arrays(self, keys, name: str) -> list[tuple[tuple, dict]]:
        """Load a file of each arm's first run -> [(arm, arrays)]."""
        runs = [(key, run) for key in keys for run in self.main(key)[:1]]
        found = [(key, self._load(f"{run.name}/{name}", "so its pictures are not shown")) for key, run in runs]
        return [(key, arrays) for key, arrays in found if arrays]

    def left_out(self, key: tuple) -> str:
        bad = [r for r in self.runs if r.key == key and r not in self.main(key)]
        return "; ".join(f"without seed {r.seed} ({r.problem or 'other settings'})" for r in bad)


def all_scores(sums: np.ndarray) -> np.ndarray:
    """Score sums of records [..., 15] -> the scores of NAMES [..., 10]."""
    loss, pet, pet_or_border = (ratio(sums[..., k], sums[..., k + 1]) for k in (9, 11, 13))
    s = scores(sums[..., :9].reshape(*sums.shape[:-1], 3, 3))
    s |= {"loss": loss, "boundary_pet": pet, "boundary_pet_or_border": pet_or_border}
    return np.stack([s[k] for k in NAMES], axis=-1)


def estimates(runs: list[Run], native=False, per_image=False, resamples=10_000) -> dict[str, Estimate]:
    """Mean of each score over seeds with its t-interval; of a single run the value with the bootstrap over test images."""
    tables, statistic = [r.records(native) for r in runs], all_scores
    if per_image:
        values = [all_scores(t) for t in tables]
        tables = [np.stack([np.nan_to_num(v), ~np.isnan(v)], axis=-1) for v in values]
        statistic = lambda s: ratio(s[..., 0], s[..., 1])  # noqa: E731
    if len(runs) == 1:
        return dict(zip(NAMES, map(Estimate, *bootstrap(tables[0], statistic, resamples)), strict=True))
    seeds = np.array([statistic(t.sum(0)) for t in tables])
    return {k: Estimate(*t_interval(seeds[:, i])) for i, k in enumerate(NAMES)}


def compare(study: Study, a: tuple, b: tuple) -> dict:
    """Paired differences a - b of the test IoU in points, seed by seed, and why they may not be tested."""
    pairs = [(x, y) for x in study.main(a) for y in study.main(b) if x.seed == y.seed]
    values = [100 * (x.iou() - y.iou()) for x, y in pairs]
    images = [paired_bootstrap(x.test["counts"], y.test["counts"], lambda c: scores(c)["iou"]) for x, y in pairs]
    reasons = [["no seed has both runs"], ["one seed"], []][min(len(pairs), 2)]
    for pair in pairs:
        before = [study.pretraining(r) for r in pair if r.stage == "finetune"]
        if any(p is None or not p.config for p in before):
            reasons.append("pre-training unknown")
            before = []
        if any(p.config["args"].get("animal_images") != "unique" for p in before):
            reasons.append("images counted per category")
        for what, runs in (("pre-training", before), ("fine-tuning", pair)):
            for key, noun in (("n_train", "images"), ("n_unique", "distinct images"), ("updates", "updates")):
                same_size = len({r.config["n_train"] for r in runs}) == 1
                if len({r.config[key] for r in runs}) > 1 and (key != "n_unique" or same_size):
                    reasons.append(f"{what} {noun} {' / '.join(f'{r.config[key]:,}' for r in runs)}")
        reasons += differing(pair[0].settings, pair[1].settings, study.free(a, b))
    tested = pairs and not reasons
    return {
        "label": f"{label_of(a)} − {label_of(b)}", "pair": (a, b), "seeds": [x.seed for x, _ in pairs],
        "values": values, "images": [Estimate(*i).times(100) for i in images],
        "mean": Estimate(*t_interval(values)) if pairs else None,
        "miou": 100 * float(np.mean([x.iou("miou") - y.iou("miou") for x, y in pairs])) if pairs else None,
        "reason": "; ".join(dict.fromkeys(reasons)), "p": paired_t_test(values) if tested else math.nan,
        "tost": tost(values, MARGIN) if tested else math.nan,
    }  # fmt: skip


def planned(study: Study) -> list[dict]:
    """The planned comparisons whose arms are part of the study, with p-values corrected for all that are tested."""
    rows = [compare(study, a, b) for a, b in PLANNED if a in study.groups and b in study.groups]
    return [row | {"holm": float(p)} for row, p in zip(rows, holm([r["p"] for r in rows]), strict=True)]


def label_of(key: tuple) -> str:
    """Name an arm as the paper does."""
    name = pretrained(key[1])
    return f"pre-training ({name})" if key[0] == "pretrain" else ARMS.get(key, (name,))[0]


def pretrained(arm: str) -> str:
    """Name pre-training images: those of a dose, or of an arm with part of the labels."""
    name, _, labels = arm.partition("_labels_")
    name = f"{100 * float(name[5:]):g} % animals" if name.startswith("dose_") else PRETRAINED.get(name, name)
    return f"{name}, {100 * float(labels):g} % of labels" if labels else name
