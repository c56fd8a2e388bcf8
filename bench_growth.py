"""What the number of images costs: listing them, opening their cache, making batches. For bench.py --tasks growth."""

import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import folders
from batches import TrainBatches
from data import read_image

COUNTS = (500, 2000, 8000)
QUICK_COUNTS = (64, 256)
PER_FOLDER = 1000  # files
MOST_PHOTOS = 64  # that the files are copies of
LONGEST_SIDE = 640  # pixels of a copy, as COCO's photos have


class Seconds(NamedTuple):
    """How long a training's start takes for a folder of images.

    listing: finding the files, and copies among them; decoding: into a cache that has none of them, at the first training;
    opening: the cache as every later training finds it, from a check of each file to, on a GPU, its pixels on the device.
    """

    listing: float
    decoding: float
    opening: float


def small_photo(path: Path) -> bytes:
    """Read a photo and write it as a JPEG of COCO's size; DataError if it cannot be read."""
    image = read_image(path)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_photos(photos: list[bytes], folder: Path, count: int) -> None:
    """Write `count` different image files from some photos: each with padding of its own behind the picture."""
    for number in range(count):
        inside = folder / f"{number // PER_FOLDER:04d}"
        inside.mkdir(parents=True, exist_ok=True)
        padding = number.to_bytes(8, "big") + bytes(number)  # of another length, as the sizes of photos differ
        content = photos[number % len(photos)] + padding
        (inside / f"{number:07d}.jpg").write_bytes(content)


def seconds_of(job: Callable[[], object]) -> float:
    """Time a job."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure_start(folder: Path, open_batches: Callable[[], TrainBatches], repeats: int) -> Seconds:
    """Time what a start takes for the images of a folder; open_batches: opens a training's data, and decodes them first."""
    listing = [seconds_of(functools.partial(folders.read_tree, folder)) for _ in range(repeats)]
    first = seconds_of(open_batches)
    opening = [seconds_of(open_batches) for _ in range(repeats)]
    return Seconds(median(listing), first - median(opening), median(opening))


def slope(counts: list[int], values: list[float]) -> float:
    """Give the growth of a value for each image, from the smallest to the largest number of images."""
    return (values[-1] - values[0]) / (counts[-1] - counts[0])
