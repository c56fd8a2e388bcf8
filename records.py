"""Read the records of one run: configuration, log, metrics and test records, each checked as it is read.

    run = load_run(Path("runs/study"), line)        # a line of its study.tsv
    run.problem or run.score("iou")

A run that is missing, unfinished or damaged is no error: its `problem` says what is wrong. Test records are those of
`evaluate.py test`: pixel counts of a segmentation; of any other task numerators and denominators of its scores.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arms import Arm, ArmKey, find_arm
from metrics import ratio, scores
from study import PlanLine

SEGMENT = "segment"
MAE = "mae"
ROLES = ("recipe", "network", "arm", "seed", "computation")
SIZES = ("n_train", "n_unique", "updates")
SCORES = (
    "loss",
    "iou",
    "iou_background",
    "iou_border",
    "miou",
    "iou_border_as_pet",
    "iou_border_ignored",
    "accuracy",
    "boundary_pet",
    "boundary_pet_or_border",
)


class RecordError(ValueError):
    """A file of a run that lacks what the report needs."""


class Setting(NamedTuple):
    """A value that defines a run's result, and its role: one of ROLES."""

    value: object
    role: str


# ----------------------------------------------------------------------------------------------------------------------
# Test records


class TestTable(NamedTuple):
    """Sums per test image [n, ...] and the function that turns their sum over images into scores [..., k]."""

    __test__ = False  # no test of pytest's

    sums: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    names: tuple[str, ...]


@dataclass
class PixelSums:
    """What segmentation is scored by, per image or summed, with any leading axes."""

    counts: np.ndarray  # [..., 3, 3] pixels, rows truth, columns prediction
    loss: np.ndarray  # [...] sum over pixels
    pixels: np.ndarray  # [...]
    boundary: np.ndarray  # [..., 2, 2] mask (pet; pet or border) by (intersection, union)

    def flat(self) -> np.ndarray:
        """Join all sums of each image: [n, 15]."""
        n = len(self.loss)
        parts = [self.counts.reshape(n, 9), self.loss[:, None], self.pixels[:, None], self.boundary.reshape(n, 4)]
        return np.concatenate(parts, axis=1).astype(float)

    @classmethod
    def from_flat(cls, sums: np.ndarray) -> "PixelSums":
        """Undo flat() for sums [..., 15]."""
        lead = sums.shape[:-1]
        counts, loss, pixels, boundary = np.split(sums, [9, 10, 11], axis=-1)
        return cls(counts.reshape(*lead, 3, 3), loss[..., 0], pixels[..., 0], boundary.reshape(*lead, 2, 2))


def pixel_scores(sums: np.ndarray) -> np.ndarray:
    """Score flat pixel sums [..., 15] -> the scores of SCORES [..., 10]."""
    s = PixelSums.from_flat(sums)
    values = scores(s.counts)
    values["loss"] = ratio(s.loss, s.pixels)
    boundary = ratio(s.boundary[..., 0], s.boundary[..., 1])
    values["boundary_pet"] = boundary[..., 0]
    values["boundary_pet_or_border"] = boundary[..., 1]
    return np.stack([values[name] for name in SCORES], axis=-1)


def quotient_scores(sums: np.ndarray) -> np.ndarray:
    """Divide numerators by denominators: sums [..., k, 2] -> scores [..., k]."""
    return ratio(sums[..., 0], sums[..., 1])


# ----------------------------------------------------------------------------------------------------------------------
# One run


@dataclass(eq=False)
class RunRecord:
    """One line of study.tsv with what its folder holds; `problem` says why it cannot be used, whatever is wrong."""

    line: PlanLine
    arm: Arm
    config: dict = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)  # what must agree with other runs, without seeds
    log: list[dict] = field(default_factory=list)
    metrics: dict = field(default_factory=dict)
    test: dict[str, np.ndarray] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of what the run and its test have written
    problem: str | None = None

    @property
    def seed(self) -> int:
        return self.line.seed

    @property
    def stage(self) -> str:
        return self.line.stage

    @property
    def name(self) -> str:
        return self.line.folder

    @property
    def key(self) -> ArmKey:
        return ArmKey(self.line.stage, self.line.arm)

    @property
    def kind(self) -> str:
        """The objective or task, or empty where it is unknown."""
        return self.config.get("kind", "")

    @property
    def select(self) -> str:
        """The score that runs are compared by."""
        if self.kind == SEGMENT:
            return "iou"
        names = self.table().names
        select = self.config.get("select")
        return select if select in names else names[0]

    def table(self, native: bool = False) -> TestTable:
        """Return the test records; native: of a segmentation at the images' own sizes."""
        if self.kind != SEGMENT:
            sums = np.stack([self.test["numerators"], self.test["denominators"]], axis=-1).astype(float)
            return TestTable(sums, quotient_scores, tuple(map(str, self.test["score_names"])))
        end = "_native" if native else ""
        counts = self.test[f"counts{end}"]
        sums = PixelSums(counts, self.test["loss_sum"], self.test["pixels"], self.test[f"boundary{end}"])
        return TestTable(sums.flat(), pixel_scores, SCORES)

    def score(self, name: str) -> float:
        """Score all test images together."""
        if self.kind == SEGMENT:
            return float(scores(self.test["counts"].sum(0))[name])
        table = self.table()
        return float(table.score(table.sums.sum(0))[table.names.index(name)])

    def trivial(self, score: str) -> dict[str, float]:
        """Name what learns nothing and has this score of pre-training's validation, as the run recorded it."""
        levels = {}
        zero = self.metrics.get("predict_zero", {})
        name = score.removeprefix("loss_")
        if name in zero:
            levels["predicting zero"] = zero[name]
        for predictor, values in self.metrics.get("trivial", {}).items():
            if score in values:
                levels[predictor] = values[score]
        return levels

    @property
    def iou(self) -> float:
        """Test IoU of a segmentation, in [0, 1]."""
        return self.score("iou")


def load_run(study: Path, line: PlanLine) -> RunRecord:
    """Read a run's folder; whatever is wrong with it becomes the run's problem."""
    run = RunRecord(line, find_arm(line.stage, line.arm, line.sweep, line.value))
    try:
        run.problem = read_run(run, study / line.folder)
    except Exception as error:  # damaged records fail in as many ways as there are parsers
        reason = str(error) if isinstance(error, RecordError) else f"{type(error).__name__}: {error}"
        run.problem = f"unreadable: {reason}".splitlines()[0]
    if run.problem:
        run.metrics = {}
        run.log = []
        run.test = {}
    return run


def read_run(run: RunRecord, path: Path) -> str | None:
    """Fill a run from its folder -> what is missing, or None. Raises where a file is damaged."""
    if not (path / "config.json").exists():
        return "missing: not started (no config.json)"
    config = read_json(path / "config.json")
    check_config(config)
    run.config = config
    run.settings = read_settings(config)
    run.log = read_log(path / "log.jsonl")
    check_log(run.log, config)
    if not (path / "metrics.json").exists():
        step = max((line.get("step", 0) for line in run.log), default=0)
        return f"unfinished: no metrics.json (logged up to update {step:,} of {config['updates']:,})"
    run.metrics = read_json(path / "metrics.json")
    check_metrics(run.metrics, run)
    run.files = run.metrics.get("files", {})
    for name in ("config.json", "log.jsonl"):
        check_file(path / name, run.files)
    if run.stage == "pretrain":
        return None
    if not (path / "test.npz").exists():
        return f"not tested: no test.npz (python evaluate.py test {path})"
    if (path / "test.json").exists():
        record = read_json(path / "test.json")
        if record["weights"] != run.files.get("model.pt", record["weights"]):
            return f"not tested: test.npz is of other weights (python evaluate.py test {path})"
        run.files = {**run.files, **record["files"]}
        check_file(path / "test.npz", run.files)
    with np.load(path / "test.npz", allow_pickle=False) as arrays:
        run.test = dict(arrays)
    check_test(run.test, run.kind)
    return None


def read_json(path: Path) -> dict:
    """Read an object that engine.write_json wrote; one without a checksum is taken as it is."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise RecordError(f"{path.name} holds no dictionary")
    written = content.pop("checksum", None)
    if written not in (None, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]):
        raise RecordError(f"{path.name} was changed: its checksum is wrong")
    return content


def check_file(path: Path, files: dict[str, str]) -> None:
    """Refuse a file that is not what was written, where its SHA-256 is known."""
    if path.name not in files:
        return
    if not path.exists():
        raise RecordError(f"{path.name} is missing")
    if hashlib.sha256(path.read_bytes()).hexdigest() != files[path.name]:
        raise RecordError(f"{path.name} was changed: its checksum is wrong")


def read_settings(config: dict) -> dict[str, Setting]:
    """Collect what must agree between runs that are averaged: all that defines the result but for what a seed changes."""
    settings = {}
    for key, value in config["experiment"].items():
        settings[key] = Setting(value, config["roles"].get(key, "recipe"))
    settings["kind"] = Setting(config["kind"], "recipe")
    settings["n_train"] = Setting(config["n_train"], "arm")
    settings["updates"] = Setting(config["updates"], "arm")
    settings["precision"] = Setting(config.get("precision"), "recipe")
    return {key: setting for key, setting in settings.items() if setting.role != "seed"}


def read_log(path: Path) -> list[dict]:
    """Read the finished lines of a log; one that is being written has no end yet."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]


def is_number(value: object) -> bool:
    """Check whether JSON holds a number here; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_numbers(values: object, names: Iterable[str], where: str) -> None:
    """Refuse a dictionary in which one of these names has no number."""
    if not isinstance(values, dict):
        raise RecordError(f"{where} is {values!r} instead of a dictionary"[:120])
    for name in names:
        if not is_number(values.get(name)):
            raise RecordError(f"{where}: {name} is {values.get(name)!r} instead of a number")


def check_config(config: object) -> None:
    """Refuse a configuration without what the report needs."""
    if not isinstance(config, dict):
        raise RecordError("config.json holds no dictionary")
    for name in ("args", "experiment", "roles", "scores"):
        if not isinstance(config.get(name), dict):
            raise RecordError(
                f"config.json: no dictionary {name!r}; the run was made by another version of the scripts"
            )
    for name in ("data", "hardware", "versions", "manifest"):
        if not isinstance(config.get(name, {}), dict):
            raise RecordError(f"config.json: {name} is {config[name]!r} instead of a dictionary"[:120])
    if not isinstance(config.get("kind"), str):
        raise RecordError("config.json: no kind")
    if not isinstance(config.get("manifest", {}).get("train", {}), dict):
        raise RecordError("config.json: manifest.train is no dictionary")
    if "data" in config and not isinstance(config["data"].get("title"), str):
        raise RecordError("config.json: data has no title")
    if not isinstance(config.get("remarks", []), list):
        raise RecordError(f"config.json: remarks is {config['remarks']!r} instead of a list"[:120])
    for name in SIZES:
        if type(config.get(name)) is not int:
            raise RecordError(f"config.json: {name} is {config.get(name)!r} instead of a whole number")
    for key, role in config["roles"].items():
        if role not in ROLES:
            raise RecordError(f"config.json: role {role!r} of {key}; there are {', '.join(ROLES)}")


def check_log(log: list, config: dict) -> None:
    """Refuse a log whose curves cannot be drawn."""
    names = {"train": ["loss"], "val": list(config["scores"])}
    for line in log:
        if not isinstance(line, dict) or "event" not in line:
            raise RecordError(f"log.jsonl: a line without event: {line!r}"[:120])
        event = line["event"]
        if event in names:
            drawn = [name for name in names[event] if name in line]
            check_numbers(line, ["epoch", *drawn], f"log.jsonl, a {event} line")


def check_metrics(metrics: object, run: RunRecord) -> None:
    """Refuse metrics without the scores that the report shows."""
    check_numbers(metrics, (), "metrics.json")
    if not isinstance(metrics.get("files", {}), dict):
        raise RecordError(f"metrics.json: files is {metrics['files']!r} instead of a dictionary"[:120])
    if not isinstance(metrics.get("unreadable", []), list):
        raise RecordError(f"metrics.json: unreadable is {metrics['unreadable']!r} instead of a list"[:120])
    for name in ("seconds", "img_s", "mfu", "mem_gb", "n_train", "n_unique"):
        if metrics.get(name) is not None:
            check_numbers(metrics, [name], "metrics.json")
    if run.stage == "pretrain":
        check_numbers(metrics.get("last"), run.config["scores"], "metrics.json, last")
        zero = metrics.get("predict_zero", {})
        check_numbers(zero, zero, "metrics.json, predict_zero")
        trivial = metrics.get("trivial", {})
        check_numbers(trivial, (), "metrics.json, trivial")
        for values in trivial.values():
            check_numbers(values, values, "metrics.json, trivial")
        return
    select = run.config.get("select")
    if run.kind == SEGMENT:
        select = "iou"
    if select is not None:
        check_numbers(metrics.get("best"), [select, "epoch"], "metrics.json, best")
        check_numbers(metrics.get("last"), [select], "metrics.json, last")


def check_test(test: dict[str, np.ndarray], kind: str) -> None:
    """Refuse test records without the arrays of their task, or of other shapes."""
    if "ids" not in test:
        raise RecordError("test.npz: no ids")
    n = len(test["ids"])
    if kind == SEGMENT:
        shapes = {"loss_sum": (n,), "pixels": (n,), "img_size": ()}
        for end in ("", "_native"):
            shapes[f"counts{end}"] = (n, 3, 3)
            shapes[f"boundary{end}"] = (n, 2, 2)
    else:
        k = len(test.get("score_names", ()))
        shapes = {"score_names": (k,), "numerators": (n, k), "denominators": (n, k)}
        if not k:
            raise RecordError("test.npz: no score_names")
        if "reference_numerators" in test:
            shapes["reference_numerators"] = (n, k)
    for name, shape in shapes.items():
        if name not in test or test[name].shape != shape:
            found = list(test[name].shape) if name in test else "nothing"
            raise RecordError(f"test.npz: {name} must have the shape {list(shape)}, found {found}")
