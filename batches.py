"""Reproducible batches from a store of decoded images, augmented on the device.

Copy it together with augment.py and data.py. What a batch holds is a pure function of (seed, epoch, position in the
global batch), whatever the number of processes.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from augment import crop_resize, crop_resize_nearest, normalise, random_boxes
from data import ImageStore, require, seeded_rng

PREFETCH = 2  # batches prepared ahead of the one in use


def _batches(prepare: Callable, items: Sequence, stores: dict, img_size: int, micro: int, device) -> Iterator[list]:
    """Yield the micro-batches, augmented on the device, of prepare(item) -> (store entries [B], arrays [B, ...] by name).

    The host's part runs in a thread, PREFETCH items ahead; its errors surface here, and closing stops it.
    """
    device = torch.empty(0, device=device).device  # with its number: "cuda" is the current GPU
    gpu = device.type == "cuda"  # then what the thread makes is page-locked; such memory belongs to its current GPU

    def load(item) -> dict[str, Tensor]:
        index, arrays = prepare(item)
        made = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        for k, store in stores.items():  # where the store is on the device, row numbers are all the host contributes
            made[k] = store.gather(index, gpu) if store.tensor is None else torch.from_numpy(store.rows[index])
        return {k: v.pin_memory() if gpu else v for k, v in made.items()}

    def augment(batch: dict[str, Tensor], first: int) -> dict[str, Tensor]:
        batch = {k: v[first : first + micro].to(device, non_blocking=True) for k, v in batch.items()}
        boxes, flips = batch.pop("boxes"), batch.pop("flips")
        for k, store in stores.items():
            pixels = batch[k] if store.tensor is None else store.tensor.index_select(0, batch[k])
            cut = crop_resize if k == "images" else crop_resize_nearest
            batch[k] = cut(pixels, boxes * store.size, flips, img_size)
        return batch | {"images": normalise(batch["images"])}

    with ThreadPoolExecutor(1, initializer=functools.partial(torch.cuda.set_device, device) if gpu else None) as pool:
        ahead = [pool.submit(load, item) for item in items[:PREFETCH]]
        for i in range(len(items)):
            ahead += [pool.submit(load, item) for item in items[i + PREFETCH : i + PREFETCH + 1]]
            batch = ahead.pop(0).result()
            yield [augment(batch, first) for first in range(0, len(batch["boxes"]), micro)]


def share_of_batch(batch_size: int, world_size: int, micro_batch_size: int | None, count: int) -> tuple[int, int]:
    """Divide a batch -> (images per process, per micro-batch); DataError names the nearest valid size."""
    share = batch_size // world_size
    micro = min(micro_batch_size or share, share)
    unit = world_size * (micro if 0 < micro < share else 1)
    nearest = min(max(1, round(batch_size / unit)), count // unit) * unit or "none: too few images"
    parts = f"{world_size} process(es)" + (f" x micro-batch {micro}" if unit > world_size else "")
    wrong = f"larger than the split's {count} images" if batch_size > count else "not divisible"
    advice = f"(must be divisible by {parts}); the nearest valid size is {nearest}"
    require(1 <= batch_size <= count and batch_size % unit == 0, f"--batch_size {batch_size} is {wrong} {advice}")
    return share, micro


class TrainBatches:
    """Augmented training batches, each a pure function of (seed, epoch, position in the global batch).

    batch_size counts the images of all processes; each rank holds a contiguous part of it, in micro-batches. An epoch
    leaves out its incomplete last batch and holds no entry twice. scale: area of the random crop (crop=False: whole
    images); flip=False: no flips at all; draws: name -> shape per image of further uniform numbers.
    """

    def __init__(self, images: ImageStore, masks: ImageStore | None = None, *, img_size: int, batch_size: int,
                 seed: int, scale=(0.2, 1.0), vertical_flip: bool = False, flip: bool = True, crop: bool = True,
                 draws: dict | None = None, rank: int = 0, world_size: int = 1, micro_batch_size: int | None = None,
                 device="cpu"):  # fmt: skip
        require(masks is None or masks.images == images.images, "images and masks must be stores of the same list")
        share, micro = share_of_batch(batch_size, world_size, micro_batch_size, len(images))
        self.images, self.seed, self.batch_size, self.draws = images, seed, batch_size, draws or {}
        self.scale, self.flips = scale if crop else None, np.array([flip, flip and vertical_flip])
        self.mine, self.micro_batches = slice(rank * share, (rank + 1) * share), share // micro
        self.steps_per_epoch = len(images) // batch_size
        self.order = functools.lru_cache(2)(lambda epoch: seeded_rng(seed, 0, epoch).permutation(len(images)))
        self.order(0)  # refuses a bad seed now, not in the thread
        stores = {"images": images} if masks is None else {"images": images, "masks": masks}
        self.settings = stores, img_size, micro, device

    def _prepare(self, step: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Draw for the whole global batch and keep this rank's part."""
        epoch, number = divmod(step, self.steps_per_epoch)
        index = self.order(epoch)[number * self.batch_size :][: self.batch_size]
        sizes = self.images.sizes[self.images.rows[index]]
        rng = seeded_rng(self.seed, 1, epoch, number)
        boxes = random_boxes(rng, sizes, self.scale) if self.scale else np.hstack([0 * sizes, sizes])
        made = {"boxes": boxes / np.hstack([sizes, sizes])}  # as shares of the image, for any cache size
        made["flips"] = (rng.random((len(index), 2)) < 0.5) & self.flips
        for name, shape in self.draws.items():
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            made[name] = seeded_rng(self.seed, 2, epoch, number, key).random((len(index), *shape), np.float32)
        return index[self.mine], {k: v[self.mine] for k, v in made.items()}

    def run(self, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """Yield, for each global step, this rank's micro-batches: normalised images [b, 3, H, W], masks [b, H, W], draws."""
        return _batches(self._prepare, range(first_step, last_step), *self.settings)


class EvalBatches:
    """Every image of a rank's share once, whole, squashed to img_size: (index int64 [b] on the CPU, images [b, 3, H, W])."""

    def __init__(self, images: ImageStore | Tensor, *, img_size: int, batch_size: int, rank: int = 0,
                 world_size: int = 1, device="cpu"):  # fmt: skip
        if isinstance(images, Tensor):  # plain ones [N, 3, H, W] serve like a store that is on the device
            size = torch.tensor([*images.shape[2:]] * 2, device=device)
            images = SimpleNamespace(tensor=images.to(device), rows=np.arange(len(images)), size=size)
        mine = np.arange(len(images.rows))[rank::world_size]
        self.parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        self.settings = {"images": images}, img_size, batch_size, device

    def __len__(self) -> int:
        return len(self.parts)

    def _prepare(self, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        boxes = np.tile(np.float32([0, 0, 1, 1]), (len(index), 1))
        return index, {"boxes": boxes, "flips": np.zeros((len(index), 2), bool)}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (batch,) in zip(self.parts, _batches(self._prepare, self.parts, *self.settings), strict=True):
            yield torch.from_numpy(index), batch["images"]
