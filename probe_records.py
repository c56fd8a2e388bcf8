"""Read what probe.py found out about an encoder, each file checked as it is read. Needs neither torch nor images.

    probed = load_probe(Path("runs/study/seed0/pretrain_animal"))
    probed.score("linear")                    # test top-1 of the linear classifier

Raises RecordError for a record that cannot be used, OSError for one that is missing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metrics import ratio, scores
from records import RecordError, check_file, check_numbers, read_json

SHOTS = (1, 5, 10)  # labelled images of each breed
POOLS = ("mean", "cls")  # what stands for an image; the first has records without its name
TRIMAP = "trimap"
METERS = ("spread", "rank")
# The probes that are compared, with their words for tables and figures.
PROBES = {
    "knn": "20-NN",
    "linear": "linear",
    **{f"shot_{shots}": f"{shots}-shot" for shots in SHOTS},
    TRIMAP: "trimap IoU",
}


def record_name(pool: str) -> str:
    """Name the records of a pooling, without their suffix."""
    if pool == POOLS[0]:
        return "probe"
    return f"probe_{pool}"


def random_folder(beside: Path, model: str, img_size: int, seed: int) -> Path:
    """Name the folder of the random encoder that a run's is compared with: it lies beside the run's."""
    return beside.parent / f"random_{model}_{img_size}_seed{seed}"


def share(sums: np.ndarray) -> np.ndarray:
    """Divide what is right by all: sums [..., 2] -> [...]."""
    return ratio(sums[..., 0], sums[..., 1])


def pet_iou(counts: np.ndarray) -> np.ndarray:
    """Score pixel counts [..., 3, 3] by the study's IoU."""
    return scores(counts)["iou"]


@dataclass(frozen=True)
class Probed:
    """The record of an encoder, and arrays with a row for each test image."""

    record: dict
    arrays: dict[str, np.ndarray]

    @property
    def conditions(self) -> tuple:
        """Name all that must agree between encoders that are compared: photos, size, precision, pooling."""
        return tuple(sorted((name, value) for name, value in self.record["key"].items() if name != "weights"))

    def sums(self, probe: str) -> np.ndarray:
        """Give what the score of a probe is summed from, for each test image: [n, 2], or [n, 3, 3] pixels of trimaps."""
        if probe == TRIMAP:
            return self.arrays["counts"]
        place = list(self.arrays["score_names"]).index(probe)
        return np.stack([self.arrays["numerators"][:, place], self.arrays["denominators"][:, place]], axis=-1)

    def score(self, probe: str) -> float:
        """Score all test images together."""
        return float(statistic(probe)(self.sums(probe).sum(0)))

    def draws_deviation(self, probe: str) -> float:
        """Give the standard deviation over the draws of a few-shot probe; nan for others."""
        return self.record["scores"][probe].get("std", math.nan)

    def meter(self, name: str) -> float:
        """Give a meter of collapse of the image features."""
        return self.record["meters"]["images"][name]


def statistic(probe: str) -> Callable[[np.ndarray], np.ndarray]:
    """Give the function that turns summed rows of a probe into its score."""
    if probe == TRIMAP:
        return pet_iou
    return share


def load_probe(folder: Path, pool: str = POOLS[0]) -> Probed:
    """Read the records of an encoder from its folder."""
    name = record_name(pool)
    record = read_json(folder / f"{name}.json")
    check_record(record)
    check_file(folder / f"{name}.npz", record["files"])
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        probed = Probed(record, dict(arrays))
    check_arrays(probed.arrays)
    return probed


def check_record(record: dict) -> None:
    """Refuse a record without what the report shows."""
    for name in ("key", "files", "scores", "meters"):
        if not isinstance(record.get(name), dict):
            raise RecordError(f"probe.json: no dictionary {name!r}")
    for probe in PROBES:
        check_numbers(record["scores"].get(probe), (), f"probe.json, {probe}")
    check_numbers(record["meters"].get("images"), METERS, "probe.json, meters")
    check_numbers(record, ["img_size", "most_frequent_breed"], "probe.json")


def few_images_note(record: dict) -> str:
    """Say that some breeds have fewer training images than the largest number of shots; "" if none has."""
    fewest = record.get("fewest_of_a_breed", max(SHOTS))
    if fewest >= max(SHOTS):
        return ""
    return f"some breeds have {fewest} training images; probes of more shots take all that there are"


def check_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Refuse arrays that do not belong together."""
    missing = {"ids", "score_names", "numerators", "denominators", "counts"} - set(arrays)
    if missing:
        raise RecordError(f"probe.npz: no {min(missing)}")
    images = len(arrays["ids"])
    names = [str(name) for name in arrays["score_names"]]
    shapes = {"numerators": (images, len(names)), "denominators": (images, len(names)), "counts": (images, 3, 3)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise RecordError(f"probe.npz: {name} must have the shape {list(shape)}")
    lacking = [probe for probe in PROBES if probe != TRIMAP and probe not in names]
    if lacking:
        raise RecordError(f"probe.npz: no scores of {lacking[0]}")
