"""Score stored test records as the original study's scripts do: on the last batch of the list alone.

    images = ImageScores.from_records(np.load("test.npz"))
    printed(images, MAE_SCRIPT)                       # Printed(images=85, iou=..., accuracy=..., loss=...)
    spread(images.iou, 85)                            # Range(low, high) of such a score over random sets of images
    range_on_same_images(a.iou, b.iou, 85)            # how far apart two runs print that are equal over all images

As committed, its test scripts compute scores after their loop over batches, so these are of the last batch: of 1,109 images
the last 85 where a batch has 128 images, and the last 21 where it has 32. Needs numpy and metrics.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metrics import image_iou_each, scores

SETS = 1000
LEVEL = 0.95
SEED = 0


class Script(NamedTuple):
    """A test script of the original study."""

    batch_size: int
    iou_alone: bool  # whether only the IoU is that of the last batch; loss and accuracy are then those of all images


MAE_SCRIPT = Script(batch_size=128, iou_alone=False)
RESNET_SCRIPT = Script(batch_size=32, iou_alone=True)


class Range(NamedTuple):
    """The middle 95 % of values."""

    low: float
    high: float


class Printed(NamedTuple):
    """What a script prints: IoU and accuracy in [0, 1], and the number of images behind the IoU."""

    images: int
    iou: float
    accuracy: float
    loss: float


@dataclass
class ImageScores:
    """Scores of each test image [n], in the order of the test list."""

    iou: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray

    @classmethod
    def from_records(cls, records: Mapping[str, np.ndarray]) -> "ImageScores":
        """Score the images of test.npz, as written for a segmentation."""
        counts = records["counts"]
        return cls(image_iou_each(counts), scores(counts)["accuracy"], records["loss_sum"] / records["pixels"])


def last_batch(images: int, batch_size: int) -> int:
    """Count the images in the last batch of a list that is not empty."""
    rest = images % batch_size
    if rest == 0:
        return batch_size
    return rest


def printed(images: ImageScores, script: Script) -> Printed:
    """Score a run as a script of the original study does. All images have one size, so means over images are exact."""
    size = last_batch(len(images.iou), script.batch_size)
    scored = 0 if script.iou_alone else -size  # where the images of loss and accuracy begin
    return Printed(
        images=size,
        iou=float(images.iou[-size:].mean()),
        accuracy=float(images.accuracy[scored:].mean()),
        loss=float(images.loss[scored:].mean()),
    )


def random_means(values: np.ndarray, size: int, seed: int = SEED) -> np.ndarray:
    """Average values [n] or [n, k] over SETS random sets of `size` images: [SETS] or [SETS, k].

    Images are drawn with replacement, as if other photos of the same kind had ended the list; so a list that is no longer
    than a batch has a spread too. The sets depend on n, size and seed alone, hence are the same for all runs of a study.
    """
    rng = np.random.default_rng(seed)
    places = rng.integers(0, len(values), (SETS, size))
    return values[places].mean(1)


def middle(values: np.ndarray) -> Range:
    """Find the range of the middle 95 % of values."""
    low, high = np.quantile(values, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Range(float(low), float(high))


def spread(values: np.ndarray, size: int) -> Range:
    """Find the range of a mean score over random sets of images."""
    return middle(random_means(values, size))


def range_on_same_images(a: np.ndarray, b: np.ndarray, size: int) -> Range:
    """Find the range of a - b on the same random sets, for two runs with scores [n] of the same images.

    Their mean difference is taken out, so the runs count as equal over all images.
    """
    differences = a - b
    return middle(random_means(differences - differences.mean(), size))


def range_on_other_images(a: np.ndarray, b: np.ndarray, size_a: int, size_b: int) -> Range:
    """Find the range of a - b where each run has random sets of its own: scores a [n] and b [m], sets of two sizes.

    Their mean difference is taken out, as above. With the same run twice it is what another order of the list does.
    """
    means_a = random_means(a - a.mean(), size_a)
    means_b = random_means(b - b.mean(), size_b, SEED + 1)
    return middle(means_a - means_b)
