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
VIEW_STREAM = 4

ELASTIC_DRAW = "elastic"  # the name of the deformation's random numbers in a batch
COLOUR_DRAW = "colours"  # that of the colours'
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


class ColourChange(Protocol):
    """Changes float images [B, 3, H, W] in 0..1 by uniform draws [B, num_draws]: colours.Colours is one."""

    num_draws: int

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images: a random crop, flips, and the size they end with.

    crop_scale: smallest and largest area of the crop as a share of the image's area; None takes the image as it is. Flips
    have probability 1/2. elastic: strength alpha of an elastic deformation in pixels (0: none), for images and masks
    alike. mask_resize: "nearest", or "bilinear" with thresholds (see augment.threshold_trimaps). inputs: how the network
    takes pixels (see augment.scale_pixels). colours: how those of images change; None: not at all.
    """

    img_size: int
    crop_scale: tuple[float, float] | None = (0.2, 1.0)
    horizontal_flip: bool = True
    vertical_flip: bool = False
    elastic: float = 0.0
    mask_resize: str = "nearest"
    inputs: str = "imagenet"
    colours: ColourChange | None = None

    def draws(self) -> dict[str, "Draw"]:
        """Name the random numbers that deformation and colours need of each image."""
        draws = {}
        if self.elastic:
            draws[ELASTIC_DRAW] = uniform(2, self.img_size, self.img_size)
        if self.colours is not None:
            draws[COLOUR_DRAW] = uniform(self.colours.num_draws)
        return draws


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


def name_key(name: str) -> int:
    """Turn a name into a key of a random stream."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def draw_cuts(rng: np.random.Generator, augmentation: Augmentation, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw where images of native sizes [B, 2] are cut -> boxes [B, 4], flips [B, 2].

    The boxes are shares of each image, so that they fit a cache of any size.
    """
    if augmentation.crop_scale is None:
        boxes = np.hstack([0 * sizes, sizes])
    else:
        boxes = augment.random_boxes(rng, sizes, augmentation.crop_scale)
    allowed = np.array([augmentation.horizontal_flip, augmentation.vertical_flip])
    flips = (rng.random((len(sizes), 2)) < 0.5) & allowed
    return boxes / np.hstack([sizes, sizes]), flips


class HostBatch(NamedTuple):
    """The host's part of a batch: which entries, where they are cut, and arrays [B, ...] by name.

    A view has its own boxes and flips among the arrays, under its name.
    """

    index: np.ndarray  # int64 [B], entries of the list
    boxes: np.ndarray  # [B, 4] top, left, height, width as shares of the image
    flips: np.ndarray  # bool [B, 2] horizontal, vertical
    arrays: dict[str, np.ndarray]
    strangers: np.ndarray | None = None  # int64 [B], for each image another entry of the batch


class Cut(NamedTuple):
    """Where images are cut and what changes them besides, on the device."""

    boxes: Tensor  # [b, 4] top, left, height, width as shares of the image
    flips: Tensor  # bool [b, 2] horizontal, vertical
    displacement: Tensor | None = None  # of the elastic deformation
    colours: Tensor | None = None  # draws


def take_cut(part: dict[str, Tensor], prefix: str, augmentation: Augmentation) -> Cut:
    """Take out of a micro-batch what says how its images are cut, under names that begin with the prefix."""
    boxes = part.pop(prefix + "boxes")
    flips = part.pop(prefix + "flips")
    displacement = part.pop(prefix + ELASTIC_DRAW, None)
    if displacement is not None:
        displacement = augment.elastic_displacement(displacement, augmentation.elastic)
    return Cut(boxes, flips, displacement, part.pop(prefix + COLOUR_DRAW, None))


def cut_images(pixels: Tensor, cut: Cut, augmentation: Augmentation) -> Tensor:
    """Crop, flip, resize, deform, colour and scale images [b, 3, S, S] -> [b, 3, H, W]."""
    boxes = cut.boxes * pixels.shape[-1]
    images = crop_resize(pixels, boxes, cut.flips, augmentation.img_size)
    if cut.displacement is not None:
        images = augment.deform(images, cut.displacement)
    if cut.colours is not None:
        images = 255 * augmentation.colours(images / 255, cut.colours)
    return augment.scale_pixels(images, augmentation.inputs)


def cut_masks(pixels: Tensor, cut: Cut, augmentation: Augmentation) -> Tensor:
    """Crop, flip, resize and deform masks [b, 1, S, S] with the boxes of their images -> [b, H, W]."""
    boxes = cut.boxes * pixels.shape[-1]
    size = augmentation.img_size
    if augmentation.mask_resize == "bilinear":
        values = augment.file_values(pixels)
        values = crop_resize(values, boxes, cut.flips, size, clamp=False, kernel="bilinear")
        if cut.displacement is not None:
            values = augment.deform(values, cut.displacement)
        return augment.threshold_trimaps(values)
    masks = crop_resize_nearest(pixels, boxes, cut.flips, size)
    if cut.displacement is None:
        return masks
    shifted = (masks - OUTSIDE)[:, None]  # so that the 0 of places outside becomes OUTSIDE
    deformed = augment.deform(shifted, cut.displacement, mode="nearest")
    return deformed[:, 0].long() + OUTSIDE


class Pipeline:
    """Turns host batches into batches on the device, a few of them ahead of their use.

    views: name -> how the same images are cut once more.
    """

    def __init__(
        self,
        stores: dict[str, ImageStore],
        augmentation: Augmentation,
        micro_batch_size: int,
        device: torch.device | str,
        views: dict[str, Augmentation] | None = None,
    ):
        self.stores = stores
        self.augmentation = augmentation
        self.views = views or {}
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
        """Move the micro-batch that starts at image `first` to the device, and cut its images, masks and views."""
        part = {}
        for name, tensor in batch.items():
            part[name] = tensor[first : first + self.micro_batch_size].to(self.device, non_blocking=True)
        pixels = {name: self._pixels(store, part[name]) for name, store in self.stores.items()}
        cut = take_cut(part, "", self.augmentation)
        part["images"] = cut_images(pixels["images"], cut, self.augmentation)
        if "masks" in pixels:
            part["masks"] = cut_masks(pixels["masks"], cut, self.augmentation)
        for name, view in self.views.items():
            cut = take_cut(part, f"{name}_", view)
            part[name] = cut_images(pixels["images"], cut, view)
        if "strangers" in part:
            strangers = self._pixels(self.stores["images"], part["strangers"])
            cut = take_cut(part, "stranger_", self.augmentation)
            part["strangers"] = cut_images(strangers, cut, self.augmentation)
        return part

    def _pixels(self, store: ImageStore, gathered: Tensor) -> Tensor:
        """Look up the pixels of what _gather gave, on the device."""
        if store.tensor is None:
            return gathered
        return store.tensor.index_select(0, gathered)

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


def native_sizes(images: ImageStore, index: np.ndarray) -> np.ndarray:
    """Look up height and width in pixels of the files of entries [B] -> [B, 2]."""
    return images.sizes[images.rows[index]]


def view_draws(views: dict[str, Augmentation]) -> dict[str, Draw]:
    """Name the random numbers that views need of each image besides their boxes and flips."""
    draws = {}
    for name, view in views.items():
        for purpose, draw in view.draws().items():
            draws[f"{name}_{purpose}"] = draw
    return draws


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
    leaves out its incomplete last batch and holds no entry twice. draws: name -> draw of further random numbers. views:
    name -> how the same images are cut once more; each has random numbers of its own, so that one more view changes no
    other. dist: has rank, world_size and device, such as engine.Distributed.
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
        views: dict[str, Augmentation] | None = None,
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
        self.views = views or {}
        self.draws = {**augmentation.draws(), **view_draws(self.views), **(draws or {})}
        self.mine = slice(dist.rank * share, (dist.rank + 1) * share)
        self.micro_batches = share // micro
        self.steps_per_epoch = len(images) // batch_size
        self.order = functools.lru_cache(2)(self._order)
        self.order(0)  # refuses a bad seed now, not in the thread
        self.pipeline = Pipeline(examples.stores(), augmentation, micro, dist.device, self.views)

    def _order(self, epoch: int) -> np.ndarray:
        """Shuffle the entries for an epoch."""
        return seeded_rng(self.seed, ORDER_STREAM, epoch).permutation(len(self.examples.images))

    def prepare(self, step: int) -> HostBatch:
        """Draw for the global batch of a step and keep this rank's part."""
        epoch = step // self.steps_per_epoch
        number = step % self.steps_per_epoch
        first = number * self.batch_size
        index = self.order(epoch)[first : first + self.batch_size]
        sizes = native_sizes(self.examples.images, index)
        rng = seeded_rng(self.seed, CROP_STREAM, epoch, number)
        boxes, flips = draw_cuts(rng, self.augmentation, sizes)
        arrays = {name: target[index] for name, target in self.examples.targets.items()}
        for name, draw in self.draws.items():
            rng = seeded_rng(self.seed, NAMED_STREAM, epoch, number, name_key(name))
            arrays[name] = draw(rng, len(index))
        for name, view in self.views.items():
            rng = seeded_rng(self.seed, VIEW_STREAM, epoch, number, name_key(name))
            arrays[f"{name}_boxes"], arrays[f"{name}_flips"] = draw_cuts(rng, view, sizes)
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

    def run(self, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """Yield, for each global step, this rank's micro-batches.

        They hold images [b, 3, H, W], and what there is of masks [b, H, W], views and strangers [b, 3, H, W] and draws.
        """
        return self.pipeline.run(self.prepare, range(first_step, last_step))


def fixed_cuts(images: ImageStore, views: dict[str, Augmentation], seed: int) -> dict[str, np.ndarray]:
    """Draw for all entries of a list how views cut them -> arrays [N, ...] as HostBatch names them."""
    if not views:
        return {}
    index = np.arange(len(images.rows))
    sizes = native_sizes(images, index)
    arrays = {}
    for name, view in views.items():
        rng = seeded_rng(seed, VIEW_STREAM, name_key(name))
        arrays[f"{name}_boxes"], arrays[f"{name}_flips"] = draw_cuts(rng, view, sizes)
    for name, draw in view_draws(views).items():
        rng = seeded_rng(seed, NAMED_STREAM, name_key(name))
        arrays[name] = draw(rng, len(index))
    return arrays


class EvalBatches:
    """Every image of a rank's share once, squashed to img_size, with its targets, in batches of at most batch_size.

    Yields dictionaries: index int64 [b] (entries of the list), images [b, 3, H, W] scaled for the network, and a row
    [b, ...] of each target, all on the device. targets: name -> tensor [N, ...] on the device. views: name -> how images are
    cut besides, each in one way that follows from the seed, the name of the view and the place in the list.
    """

    def __init__(
        self,
        images: ImageStore,
        *,
        img_size: int,
        batch_size: int,
        targets: dict[str, Tensor] | None = None,
        inputs: str = "imagenet",
        views: dict[str, Augmentation] | None = None,
        seed: int = 0,
        dist: Place = ALONE,
    ):
        mine = np.arange(len(images.rows))[dist.rank :: dist.world_size]
        # As many batches as needed, and all of one size if that is possible.
        even = math.ceil(len(mine) / math.ceil(len(mine) / batch_size)) if len(mine) else batch_size
        self.parts = [mine[first : first + even] for first in range(0, len(mine), even)]
        self.targets = targets or {}
        self.cuts = fixed_cuts(images, views or {}, seed)
        augmentation = Augmentation(img_size, inputs=inputs)
        self.pipeline = Pipeline({"images": images}, augmentation, batch_size, dist.device, views)

    def __len__(self) -> int:
        return len(self.parts)

    def prepare(self, index: np.ndarray) -> HostBatch:
        """Take images as they are."""
        boxes = np.tile(np.float32([0, 0, 1, 1]), (len(index), 1))
        flips = np.zeros((len(index), 2), bool)
        arrays = {name: array[index] for name, array in self.cuts.items()}
        return HostBatch(index, boxes, flips, {**arrays, "index": index})

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for micro_batches in self.pipeline.run(self.prepare, self.parts):
            (batch,) = micro_batches
            for name, target in self.targets.items():
                batch[name] = target.index_select(0, batch["index"])
            yield batch
