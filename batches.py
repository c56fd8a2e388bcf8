"""Reproducible batches from stores of decoded images, augmented on the device.

What a batch holds is a pure function of (seed, epoch, position in the global batch), whatever the number of processes and
micro-batches. Copy this file together with augment.py and data.py.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import augment
from augment import crop_resize, crop_resize_nearest
from data import DataError, ImageStore, require, seeded_rng

CPU = torch.device("cpu")
PREFETCH = 2  # batches that the host prepares ahead of the one in use

# Streams of random numbers: each purpose has its own, so that one more draw changes no other.
ORDER_STREAM = 0
CROP_STREAM = 1
NAMED_STREAM = 2
STRANGER_STREAM = 3

ELASTIC_DRAW = "elastic"  # the name of the deformation's random numbers in a batch
OUTSIDE = 1  # background: what a deformation fills masks with


class Place(Protocol):
    """A process among others, and its device: engine.Distributed is one."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Alone:
    """A single process: the default in place of an engine.Distributed."""

    device: torch.device = CPU
    rank: int = 0
    world_size: int = 1


ALONE = Alone()


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images: a random crop, flips, and the size they end with.

    crop_scale: smallest and largest area of the crop as a share of the image's area; None takes the image as it is. Flips
    have probability 1/2. elastic: strength alpha of an elastic deformation in pixels (0: none), for images and masks
    alike. mask_resize: "nearest", or "bilinear" with thresholds (see augment.threshold_trimaps). inputs: how the network
    takes pixels (see augment.scale_pixels).
    """

    img_size: int
    crop_scale: tuple[float, float] | None = (0.2, 1.0)
    horizontal_flip: bool = True
    vertical_flip: bool = False
    elastic: float = 0.0
    mask_resize: str = "nearest"
    inputs: str = "imagenet"

    def draws(self) -> dict[str, "Draw"]:
        """Name the random numbers that the deformation needs of each image."""
        if not self.elastic:
            return {}
        return {ELASTIC_DRAW: uniform(2, self.img_size, self.img_size)}


@dataclass(frozen=True)
class Examples:
    """A list of images and what belongs to each entry.

    masks: trimaps of the same list, cut with the same boxes. targets: name -> array [N, ...], a row for each entry.
    strangers: give with each image another one of its global batch, cut as that one is.
    """

    images: ImageStore
    masks: ImageStore | None = None
    targets: dict[str, np.ndarray] = field(default_factory=dict)
    strangers: bool = False

    def stores(self) -> dict[str, ImageStore]:
        """Name the stores as the batches name what they give."""
        if self.masks is None:
            return {"images": self.images}
        return {"images": self.images, "masks": self.masks}


# Draws a batch's random numbers for one purpose: (generator, images) -> array [images, ...].
Draw = Callable[[np.random.Generator, int], np.ndarray]


def uniform(*shape: int) -> Draw:
    """Make a draw of float32 numbers in [0, 1) of a shape for each image."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.random((count, *shape), np.float32)

    return draw


class HostBatch(NamedTuple):
    """The host's part of a batch: which entries, where they are cut, and arrays [B, ...] by name."""

    index: np.ndarray  # int64 [B], entries of the list
    boxes: np.ndarray  # [B, 4] top, left, height, width as shares of the image
    flips: np.ndarray  # bool [B, 2] horizontal, vertical
    arrays: dict[str, np.ndarray]
    strangers: np.ndarray | None = None  # int64 [B], for each image another entry of the batch


class Pipeline:
    """Turns host batches into batches on the device, a few of them ahead of their use."""

    def __init__(
        self,
        stores: dict[str, ImageStore],
        augmentation: Augmentation,
        micro_batch_size: int,
        device: torch.device | str,
    ):
        self.stores = stores
        self.augmentation = augmentation
        self.micro_batch_size = micro_batch_size
        self.device = torch.empty(0, device=device).device  # with its number: "cuda" is the current GPU
        self.on_gpu = self.device.type == "cuda"

    def load(self, host: HostBatch) -> dict[str, Tensor]:
        """Gather what the device needs; on its way to a GPU in page-locked memory."""
        arrays = {"boxes": host.boxes, "flips": host.flips, **host.arrays}
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        for name, store in self.stores.items():
            batch[name] = self._gather(store, host.index)
        if host.strangers is not None:
            batch["strangers"] = self._gather(self.stores["images"], host.strangers)
        if self.on_gpu:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    def _gather(self, store: ImageStore, index: np.ndarray) -> Tensor:
        """Give the pixels of entries, or where the device has these, the row numbers: all that the host contributes."""
        if store.tensor is None:
            return store.gather(index, self.on_gpu)
        return torch.from_numpy(store.rows[index])

    def augment(self, batch: dict[str, Tensor], first: int) -> dict[str, Tensor]:
        """Move the micro-batch that starts at image `first` to the device, crop, flip, resize, deform and scale it."""
        part = {}
        for name, tensor in batch.items():
            part[name] = tensor[first : first + self.micro_batch_size].to(self.device, non_blocking=True)
        boxes = part.pop("boxes")
        flips = part.pop("flips")
        displacement = None
        if ELASTIC_DRAW in part:
            displacement = augment.elastic_displacement(part.pop(ELASTIC_DRAW), self.augmentation.elastic)
        for name, store in self.stores.items():
            cut = self._cut_images if name == "images" else self._cut_masks
            part[name] = cut(self._pixels(store, part[name]), boxes * store.size, flips, displacement)
        if "strangers" in part:
            store = self.stores["images"]
            boxes = part.pop("stranger_boxes") * store.size
            flips = part.pop("stranger_flips")
            part["strangers"] = self._cut_images(self._pixels(store, part["strangers"]), boxes, flips, None)
        return part

    def _pixels(self, store: ImageStore, gathered: Tensor) -> Tensor:
        """Look up the pixels of what _gather gave, on the device."""
        if store.tensor is None:
            return gathered
        return store.tensor.index_select(0, gathered)

    def _cut_images(self, pixels: Tensor, boxes: Tensor, flips: Tensor, displacement: Tensor | None) -> Tensor:
        images = crop_resize(pixels, boxes, flips, self.augmentation.img_size)
        if displacement is not None:
            images = augment.deform(images, displacement)
        return augment.scale_pixels(images, self.augmentation.inputs)

    def _cut_masks(self, pixels: Tensor, boxes: Tensor, flips: Tensor, displacement: Tensor | None) -> Tensor:
        size = self.augmentation.img_size
        if self.augmentation.mask_resize == "bilinear":
            values = augment.file_values(pixels)
            values = crop_resize(values, boxes, flips, size, clamp=False, kernel="bilinear")
            if displacement is not None:
                values = augment.deform(values, displacement)
            return augment.threshold_trimaps(values)
        masks = crop_resize_nearest(pixels, boxes, flips, size)
        if displacement is None:
            return masks
        shifted = (masks - OUTSIDE)[:, None]  # so that the 0 of places outside becomes OUTSIDE
        deformed = augment.deform(shifted, displacement, mode="nearest")
        return deformed[:, 0].long() + OUTSIDE

    def run(self, prepare: Callable[..., HostBatch], items: Sequence) -> Iterator[list[dict[str, Tensor]]]:
        """Yield the micro-batches of prepare(item) for each item.

        The host's part runs in a thread, PREFETCH items ahead; its errors surface here, and closing stops it.
        """

        def job(item: object) -> dict[str, Tensor]:
            return self.load(prepare(item))

        with ThreadPoolExecutor(1, initializer=self._use_device) as pool:
            ahead: list[Future] = [pool.submit(job, item) for item in items[:PREFETCH]]
            for number in range(len(items)):
                if number + PREFETCH < len(items):
                    ahead.append(pool.submit(job, items[number + PREFETCH]))
                batch = ahead.pop(0).result()
                starts = range(0, len(batch["boxes"]), self.micro_batch_size)
                yield [self.augment(batch, first) for first in starts]

    def _use_device(self) -> None:
        """Choose the GPU whose page-locked memory the thread allocates."""
        if self.on_gpu:
            torch.cuda.set_device(self.device)


def share_of_batch(batch_size: int, world_size: int, micro_batch_size: int | None, count: int) -> tuple[int, int]:
    """Divide a batch -> (images per process, per micro-batch); DataError names the nearest valid size."""
    share = batch_size // world_size
    micro = share
    if micro_batch_size:
        micro = min(micro_batch_size, share)
    unit = world_size
    parts = f"{world_size} process(es)"
    if 0 < micro < share:
        unit = world_size * micro
        parts += f" x micro-batch {micro}"
    if 1 <= batch_size <= count and batch_size % unit == 0:
        return share, micro
    problem = "not divisible"
    if batch_size > count:
        problem = f"larger than the split's {count} images"
    nearest = min(max(1, round(batch_size / unit)), count // unit) * unit
    advice = f"(must be divisible by {parts}); the nearest valid size is {nearest or 'none: too few images'}"
    raise DataError(f"--batch_size {batch_size} is {problem} {advice}")


class TrainBatches:
    """Augmented training batches, each a pure function of (seed, epoch, position in the global batch).

    batch_size counts the images of all processes; each rank holds a contiguous part of it, in micro-batches. An epoch
    leaves out its incomplete last batch and holds no entry twice. draws: name -> draw of further random numbers. dist: has
    rank, world_size and device, such as engine.Distributed.
    """

    def __init__(
        self,
        examples: Examples,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        micro_batch_size: int | None = None,
        draws: dict[str, Draw] | None = None,
        dist: Place = ALONE,
    ):
        images = examples.images
        same_list = examples.masks is None or examples.masks.images == images.images
        require(same_list, "images and masks must be stores of the same list")
        require(batch_size > 1 or not examples.strangers, "a batch of 1 image has no other one; raise --batch_size")
        share, micro = share_of_batch(batch_size, dist.world_size, micro_batch_size, len(images))
        self.examples = examples
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.seed = seed
        self.draws = {**augmentation.draws(), **(draws or {})}
        self.mine = slice(dist.rank * share, (dist.rank + 1) * share)
        self.micro_batches = share // micro
        self.steps_per_epoch = len(images) // batch_size
        self.order = functools.lru_cache(2)(self._order)
        self.order(0)  # refuses a bad seed now, not in the thread
        self.pipeline = Pipeline(examples.stores(), augmentation, micro, dist.device)

    def _order(self, epoch: int) -> np.ndarray:
        """Shuffle the entries for an epoch."""
        return seeded_rng(self.seed, ORDER_STREAM, epoch).permutation(len(self.examples.images))

    def prepare(self, step: int) -> HostBatch:
        """Draw for the global batch of a step and keep this rank's part."""
        epoch = step // self.steps_per_epoch
        number = step % self.steps_per_epoch
        first = number * self.batch_size
        index = self.order(epoch)[first : first + self.batch_size]
        rng = seeded_rng(self.seed, CROP_STREAM, epoch, number)
        boxes = self._boxes(rng, index)
        allowed = np.array([self.augmentation.horizontal_flip, self.augmentation.vertical_flip])
        flips = (rng.random((len(index), 2)) < 0.5) & allowed
        arrays = {name: target[index] for name, target in self.examples.targets.items()}
        for name, draw in self.draws.items():
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            arrays[name] = draw(seeded_rng(self.seed, NAMED_STREAM, epoch, number, key), len(index))
        strangers = None
        if self.examples.strangers:
            other = self._strangers(epoch, number)
            arrays["stranger_boxes"] = boxes[other]
            arrays["stranger_flips"] = flips[other]
            strangers = index[other][self.mine]
        mine = {name: array[self.mine] for name, array in arrays.items()}
        return HostBatch(index[self.mine], boxes[self.mine], flips[self.mine], mine, strangers)

    def _strangers(self, epoch: int, number: int) -> np.ndarray:
        """Draw for each position of a global batch another one -> int64 [B]."""
        rng = seeded_rng(self.seed, STRANGER_STREAM, epoch, number)
        circle = rng.permutation(self.batch_size)
        other = np.empty_like(circle)
        other[circle] = np.roll(circle, 1)
        return other

    def _boxes(self, rng: np.random.Generator, index: np.ndarray) -> np.ndarray:
        """Draw crops as shares of each image [B, 4], so that they fit a cache of any size."""
        images = self.examples.images
        sizes = images.sizes[images.rows[index]]
        if self.augmentation.crop_scale is None:
            boxes = np.hstack([0 * sizes, sizes])
        else:
            boxes = augment.random_boxes(rng, sizes, self.augmentation.crop_scale)
        return boxes / np.hstack([sizes, sizes])

    def run(self, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """Yield, for each global step, this rank's micro-batches: images [b, 3, H, W], masks [b, H, W], draws, strangers."""
        return self.pipeline.run(self.prepare, range(first_step, last_step))


class EvalBatches:
    """Every image of a rank's share once, squashed to img_size, with its targets, in batches of at most batch_size.

    Yields dictionaries: index int64 [b] (entries of the list), images [b, 3, H, W] scaled for the network, and a row
    [b, ...] of each target, all on the device. targets: name -> tensor [N, ...] on the device.
    """

    def __init__(
        self,
        images: ImageStore,
        *,
        img_size: int,
        batch_size: int,
        targets: dict[str, Tensor] | None = None,
        inputs: str = "imagenet",
        dist: Place = ALONE,
    ):
        mine = np.arange(len(images.rows))[dist.rank :: dist.world_size]
        # As many batches as needed, and all of one size if that is possible.
        even = math.ceil(len(mine) / math.ceil(len(mine) / batch_size)) if len(mine) else batch_size
        self.parts = [mine[first : first + even] for first in range(0, len(mine), even)]
        self.targets = targets or {}
        augmentation = Augmentation(img_size, inputs=inputs)
        self.pipeline = Pipeline({"images": images}, augmentation, batch_size, dist.device)

    def __len__(self) -> int:
        return len(self.parts)

    def prepare(self, index: np.ndarray) -> HostBatch:
        """Take images as they are."""
        boxes = np.tile(np.float32([0, 0, 1, 1]), (len(index), 1))
        flips = np.zeros((len(index), 2), bool)
        return HostBatch(index, boxes, flips, {"index": index})

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for micro_batches in self.pipeline.run(self.prepare, self.parts):
            (batch,) = micro_batches
            for name, target in self.targets.items():
                batch[name] = target.index_select(0, batch["index"])
            yield batch
