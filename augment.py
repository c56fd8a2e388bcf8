"""Augmentation on the device for a whole batch at once, and reproducible batches from a store of decoded images.

Copy it together with data.py. What a batch holds is a pure function of (seed, epoch, position in the global batch),
whatever the number of processes.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from data import ImageStore, require, seeded_rng

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, in [0, 1] units
PREFETCH = 2  # batches prepared ahead of the one in use


@functools.lru_cache
def _statistics(device: torch.device) -> Tensor:
    return 255 * torch.tensor([MEAN, STD], device=device)[..., None, None]  # kept: a copy to a GPU waits for it


def normalise(images: Tensor) -> Tensor:
    """Map float [B, 3, H, W] in 0..255 to zero mean and unit variance over ImageNet."""
    mean, std = _statistics(images.device)
    return images.sub(mean).div_(std)


def denormalise(images: Tensor) -> Tensor:
    """Undo normalise: float [..., 3, H, W] -> 0..255."""
    mean, std = _statistics(images.device)
    return images * std + mean


def random_boxes(rng: np.random.Generator, sizes: np.ndarray, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)) -> np.ndarray:
    """Draw torchvision's RandomResizedCrop boxes for native sizes [B, 2] -> float32 [B, 4] top, left, height, width."""
    sizes = np.asarray(sizes, np.float64)
    area, aspect, where = (rng.random((len(sizes), k)) for k in (10, 10, 2))  # ten tries at once
    area = sizes.prod(1)[:, None] * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * aspect)
    tries = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], -1)))  # [B, 10, 2]
    fits = ((tries > 0) & (tries <= sizes[:, None])).all(-1)
    chosen = np.take_along_axis(tries, fits.argmax(1)[:, None, None], 1)[:, 0]
    (h, w), none = sizes.T, ~fits.any(1)[:, None]  # where none fits: the largest central box whose ratio is allowed
    largest = np.stack([np.minimum(h, np.rint(w / ratio[0])), np.minimum(w, np.rint(h * ratio[1]))], -1)
    box = np.where(none, largest, chosen)
    corner = np.where(none, (sizes - box) // 2, np.floor(where * (sizes - box + 1)))
    return np.concatenate([corner, box], 1).astype(np.float32)


def _centres(start: Tensor, length: Tensor, flip: Tensor, out: int) -> Tensor:
    """Place the centres of `out` output pixels on the input axis -> [B, out]; a flip reverses their order."""
    i = torch.arange(out, device=start.device)
    return start[:, None] + (torch.where(flip[:, None], out - 1 - i, i) + 0.5) * (length / out)[:, None]


def uses_tf32(device: torch.device) -> bool:
    """Do float32 products on this device keep only 10 bits of their factors' mantissas?"""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def nearest_tf32(x: Tensor) -> Tensor:
    """Round float32 to 10 bits of mantissa: tensor cores would cut the rest off, which darkens every pixel a little."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, size: int, out: int) -> Tensor:
    """Weights that cut [start, start + length) out of an axis of `size` cells and resize it -> float32 [B, out, size].

    Antialiased bicubic (a = -0.5), as in Pillow and torchvision: a cell takes part if its centre lies in the box, and
    the filter widens with the scale. Only the cells near each centre are computed; the rest stays zero.
    """
    centre = _centres(start, length, flip, out)[..., None]
    width = (length / out).clamp(min=1)[:, None, None]
    taps = int(4 * max(1, size / out)) + 2
    cell = torch.ceil(centre - 2 * width - 0.5) + torch.arange(taps, device=start.device)
    x = ((cell + 0.5 - centre) / width).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    middle, half = (start + length / 2)[:, None, None], (length / 2).clamp(min=0.5)[:, None, None]  # never empty
    weight = torch.where((x < 2) & ((cell + 0.5 - middle).abs() <= half), weight, 0)
    weight = weight / weight.sum(-1, keepdim=True)
    weight = nearest_tf32(weight) if uses_tf32(start.device) else weight
    # The margins take the taps that fall outside, so that no two of them share a place.
    dense = torch.zeros(*centre.shape[:2], size + 2 * taps, device=start.device)
    return dense.scatter_(2, cell.long() + taps, weight)[..., taps : taps + size]


@torch.no_grad()
def crop_resize(images: Tensor, boxes: Tensor, flips: Tensor, out: int | tuple[int, int], clamp: bool = True) -> Tensor:
    """Crop, resize and flip with two matrix products per image -> float32 [B, 3, h, w] in 0..255.

    images [B, 3, S, S] uint8 or float; boxes [B, 4] (top, left, height, width) in pixels of `images`, within them;
    flips [B, 2] bool (horizontal, vertical); out: side or (h, w). Integer boxes give torchvision v2's resized_crop
    (bicubic, antialias). Never below float32, whatever the caller's autocast.
    """
    h, w = (out, out) if isinstance(out, int) else out
    with torch.autocast(images.device.type, enabled=False):
        wy = resize_weights(boxes[:, 0], boxes[:, 2], flips[:, 1], images.shape[2], h)
        wx = resize_weights(boxes[:, 1], boxes[:, 3], flips[:, 0], images.shape[3], w)
        rows = torch.bmm(images.flatten(1, 2).float(), wx.mT).unflatten(1, images.shape[1:3])
        result = torch.stack([torch.bmm(wy, channel) for channel in rows.unbind(1)], 1)
    return result.clamp_(0, 255) if clamp else result


def crop_resize_nearest(masks: Tensor, boxes: Tensor, flips: Tensor, out: int | tuple[int, int]) -> Tensor:
    """Crop, resize and flip masks [B, (1,) S, S] with the same boxes, nearest pixel centre -> int64 [B, h, w]."""
    h, w = (out, out) if isinstance(out, int) else out
    masks = masks[:, 0] if masks.ndim == 4 else masks
    y = _centres(boxes[:, 0], boxes[:, 2], flips[:, 1], h).floor().long().clamp(0, masks.shape[1] - 1)
    x = _centres(boxes[:, 1], boxes[:, 3], flips[:, 0], w).floor().long().clamp(0, masks.shape[2] - 1)
    return masks[torch.arange(len(masks), device=masks.device)[:, None, None], y[:, :, None], x[:, None, :]].long()


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
