"""Augmentation on the device for a whole batch at once: crop, resize and flip as matrix products, elastic deformation.

Copy it alone; it needs only torch and numpy.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Mean and standard deviation of ImageNet's colour channels, for pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Range = tuple[float, float]  # least and most
Size = int | tuple[int, int]  # the side of a square, or height and width


@functools.lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return MEAN and STD for pixels in 0..255, each [3, 1, 1]; kept, because a copy to a GPU waits for it."""
    mean = 255 * torch.tensor(MEAN, device=device)
    std = 255 * torch.tensor(STD, device=device)
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def normalise(images: Tensor) -> Tensor:
    """Map float [B, 3, H, W] in 0..255 to zero mean and unit variance over ImageNet."""
    mean, std = _statistics(images.device)
    return images.sub(mean).div_(std)


def denormalise(images: Tensor) -> Tensor:
    """Undo normalise: float [..., 3, H, W] -> 0..255."""
    mean, std = _statistics(images.device)
    return images * std + mean


def scale_pixels(images: Tensor, inputs: str = "imagenet") -> Tensor:
    """Scale float [B, 3, H, W] in 0..255 as a network takes it: "imagenet" normalises, "unit" maps to 0..1."""
    if inputs == "unit":
        return images / 255
    return normalise(images)


def unscale_pixels(images: Tensor, inputs: str = "imagenet") -> Tensor:
    """Undo scale_pixels: float [..., 3, H, W] -> 0..255."""
    if inputs == "unit":
        return images * 255
    return denormalise(images)


def random_boxes(
    rng: np.random.Generator, sizes: np.ndarray, scale: Range = (0.2, 1.0), ratio: Range = (3 / 4, 4 / 3)
) -> np.ndarray:
    """Draw one random crop per image -> float32 [B, 4]: top, left, height, width in pixels.

    The distribution is that of torchvision's RandomResizedCrop. sizes: native (height, width), [B, 2]; scale: range of
    the crop's share of the image area; ratio: range of its width / height, drawn on a logarithmic scale.
    """
    count = len(sizes)
    sizes = np.asarray(sizes, np.float64)
    area_draw = rng.random((count, 10))  # ten tries for each image, of which the first that fits is taken
    ratio_draw = rng.random((count, 10))
    corner_draw = rng.random((count, 2))

    least_share, most_share = scale
    share = least_share + (most_share - least_share) * area_draw
    area = sizes.prod(axis=1, keepdims=True) * share
    log_least = np.log(ratio[0])
    log_most = np.log(ratio[1])
    aspect = np.exp(log_least + (log_most - log_least) * ratio_draw)
    heights = np.sqrt(area / aspect)
    widths = np.sqrt(area * aspect)
    tries = np.rint(np.stack([heights, widths], axis=-1))  # [B, 10, 2]

    not_empty = tries > 0
    within_image = tries <= sizes[:, None]
    fits = np.all(not_empty & within_image, axis=-1)
    first_fit = fits.argmax(axis=1)
    random_box = tries[np.arange(count), first_fit]
    random_corner = np.floor(corner_draw * (sizes - random_box + 1))

    central_box = _largest_boxes(sizes, ratio)
    central_corner = (sizes - central_box) // 2

    any_fits = fits.any(axis=1, keepdims=True)
    box = np.where(any_fits, random_box, central_box)
    corner = np.where(any_fits, random_corner, central_corner)
    return np.concatenate([corner, box], axis=1).astype(np.float32)


def _largest_boxes(sizes: np.ndarray, ratio: Range) -> np.ndarray:
    """Return the largest height and width [B, 2] within `sizes` [B, 2] whose width / height lies in `ratio`."""
    narrowest, widest = ratio
    image_height, image_width = sizes.T
    height = np.minimum(image_height, np.rint(image_width / narrowest))
    width = np.minimum(image_width, np.rint(image_height * widest))
    return np.stack([height, width], axis=-1)


def _centres(start: Tensor, length: Tensor, flip: Tensor, out: int) -> Tensor:
    """Place the centres of `out` output pixels on the input axis -> [B, out]; a flip reverses their order."""
    index = torch.arange(out, device=start.device)
    mirrored = out - 1 - index
    order = torch.where(flip.unsqueeze(1), mirrored, index)
    step = (length / out).unsqueeze(1)
    return start.unsqueeze(1) + (order + 0.5) * step


def uses_tf32(device: torch.device) -> bool:
    """Tell whether float32 matrix products on this device keep only 10 bits of their factors' mantissas."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def nearest_tf32(x: Tensor) -> Tensor:
    """Round float32 to the nearest value with 10 bits of mantissa, the precision of TF32.

    Tensor cores would cut the other 13 bits off instead, which darkens every pixel a little.
    """
    bits = x.contiguous().view(torch.int32)
    half_a_unit = 0x1000
    kept_bits = ~0x1FFF
    rounded = (bits + half_a_unit) & kept_bits
    return rounded.view(torch.float32)


def _bicubic(x: Tensor) -> Tensor:
    """Evaluate Keys' cubic kernel with a = -0.5 at distances x >= 0; callers drop what lies at 2 and beyond."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def _bilinear(x: Tensor) -> Tensor:
    """Evaluate the triangle kernel at distances x >= 0; callers drop what lies at 1 and beyond."""
    return 1 - x


# Name -> (function of the distance to the centre, distance from which it is zero).
KERNELS = {"bicubic": (_bicubic, 2), "bilinear": (_bilinear, 1)}


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, size: int, out: int, kernel: str = "bicubic") -> Tensor:
    """Weights that cut [start, start + length) out of an axis of `size` cells and resize it -> float32 [B, out, size].

    Antialiased interpolation as in Pillow and torchvision (bicubic: a = -0.5): a cell takes part if its centre lies in
    the box, and the filter widens with the scale. start, length, flip: [B]. Only the cells near each centre are
    computed; the rest stays zero.
    """
    weight_at, reach = KERNELS[kernel]
    device = start.device
    centre = _centres(start, length, flip, out).unsqueeze(2)  # [B, out, 1]
    start = start.view(-1, 1, 1)
    length = length.view(-1, 1, 1)
    filter_scale = (length / out).clamp(min=1)  # above 1 where the image shrinks
    taps = int(2 * reach * max(1, size / out)) + 2  # cells that the widest filter can reach

    first_cell = torch.ceil(centre - reach * filter_scale - 0.5)
    cell = first_cell + torch.arange(taps, device=device)  # [B, out, taps]
    cell_centre = cell + 0.5
    distance = ((cell_centre - centre) / filter_scale).abs()

    box_middle = start + length / 2
    box_half = (length / 2).clamp(min=0.5)  # a box narrower than a cell still holds one centre
    in_box = (cell_centre - box_middle).abs() <= box_half
    in_filter = distance < reach
    weight = torch.where(in_filter & in_box, weight_at(distance), 0)
    weight = weight / weight.sum(-1, keepdim=True)
    if uses_tf32(device):
        weight = nearest_tf32(weight)

    # The margins take the taps that fall outside the axis, so that no two taps share a place.
    dense = torch.zeros(len(start), out, taps + size + taps, device=device)
    dense.scatter_(2, cell.long() + taps, weight)
    return dense[:, :, taps : taps + size]


def _height_and_width(out: Size) -> tuple[int, int]:
    """Read an output size that is given as a side or as (height, width)."""
    if isinstance(out, int):
        return out, out
    return out


@torch.no_grad()
def crop_resize(
    images: Tensor, boxes: Tensor, flips: Tensor, out: Size, clamp: bool = True, kernel: str = "bicubic"
) -> Tensor:
    """Crop, resize and flip with two matrix products per image -> float32 [B, C, h, w] in 0..255.

    images: [B, C, S, S], uint8 or float; boxes: [B, 4] (top, left, height, width) in pixels of `images`, within them;
    flips: [B, 2] bool (horizontal, vertical); out: side or (h, w); kernel: bicubic or bilinear. With integer boxes the
    result is that of torchvision v2's resized_crop (antialias). It is computed in float32 even under the caller's
    autocast.
    """
    out_height, out_width = _height_and_width(out)
    in_height, in_width = images.shape[2:]
    top, left, height, width = boxes.unbind(1)
    horizontal, vertical = flips.unbind(1)
    with torch.autocast(images.device.type, enabled=False):
        row_weights = resize_weights(top, height, vertical, in_height, out_height, kernel)
        column_weights = resize_weights(left, width, horizontal, in_width, out_width, kernel)
        lines = images.flatten(1, 2).float()  # [B, 3 * S, S]: one product resizes the lines of all channels
        lines = torch.bmm(lines, column_weights.mT)
        channels = lines.unflatten(1, images.shape[1:3]).unbind(1)
        resized = [torch.bmm(row_weights, channel) for channel in channels]
        result = torch.stack(resized, dim=1)
    if clamp:
        result.clamp_(0, 255)  # bicubic interpolation overshoots at edges
    return result


def crop_resize_nearest(masks: Tensor, boxes: Tensor, flips: Tensor, out: Size) -> Tensor:
    """Crop, resize and flip masks with the boxes of their images, nearest pixel centre -> int64 [B, h, w].

    masks: [B, S, S] or [B, 1, S, S]; boxes, flips, out: as for crop_resize.
    """
    out_height, out_width = _height_and_width(out)
    if masks.ndim == 4:
        masks = masks[:, 0]
    in_height, in_width = masks.shape[1:]
    top, left, height, width = boxes.unbind(1)
    horizontal, vertical = flips.unbind(1)
    row_centre = _centres(top, height, vertical, out_height)
    column_centre = _centres(left, width, horizontal, out_width)
    row = row_centre.floor().long().clamp(0, in_height - 1)
    column = column_centre.floor().long().clamp(0, in_width - 1)
    image = torch.arange(len(masks), device=masks.device)
    pixels = masks[image.view(-1, 1, 1), row.unsqueeze(2), column.unsqueeze(1)]
    return pixels.long()


# -- Trimaps that are resized bilinearly, as the study's code does it ---------------------------------------------------


def file_values(masks: Tensor) -> Tensor:
    """Give the values that files hold, 1 pet, 2 background, 3 border: classes [B, (1,) S, S] -> float [B, 1, S, S]."""
    if masks.ndim == 3:
        masks = masks[:, None]
    return masks.float() + 1


def threshold_trimaps(values: Tensor) -> Tensor:
    """Read interpolated file values [B, 1, H, W] as classes -> int64 [B, H, W].

    Rounded to the nearest of 1, 2, 3. Halfway between pet (1) and border (3) lies background (2), and the 0 that a
    deformation fills in counts as pet.
    """
    values = values[:, 0]
    background_or_border = (values >= 1.5).long()
    border = (values >= 2.5).long()
    return background_or_border + border


# -- Elastic deformation ------------------------------------------------------------------------------------------------


def gaussian_kernel(sigma: float, device: torch.device) -> Tensor:
    """Weigh the neighbours of a pixel by a Gaussian, over as many as torchvision's ElasticTransform takes -> [K]."""
    size = int(8 * sigma + 1)
    if size % 2 == 0:
        size += 1
    half = (size - 1) / 2
    offset = torch.linspace(-half, half, size, device=device)
    weight = torch.exp(-0.5 * (offset / sigma) ** 2)
    return weight / weight.sum()


@torch.no_grad()
def elastic_displacement(draws: Tensor, alpha: float, sigma: float = 5.0) -> Tensor:
    """Turn uniform draws [B, 2, H, W] in [0, 1) into displacements [B, 2, H, W] (x, y) in units of half the image.

    torchvision's ElasticTransform: noise in [-1, 1), blurred by a Gaussian of sigma pixels, times alpha pixels. Raises
    ValueError if the image is too small for the blur's mirrored margin.
    """
    height, width = draws.shape[2:]
    kernel = gaussian_kernel(sigma, draws.device)
    margin = len(kernel) // 2
    if margin >= min(height, width):
        raise ValueError(
            f"elastic deformation with sigma {sigma:g} needs images above {margin} px, got {height} x {width}"
        )
    with torch.autocast(draws.device.type, enabled=False):
        noise = (2 * draws.float() - 1).flatten(0, 1).unsqueeze(1)  # [2 B, 1, H, W]
        noise = F.pad(noise, (margin, margin, margin, margin), mode="reflect")
        blurred = F.conv2d(noise, kernel.view(1, 1, 1, -1))
        blurred = F.conv2d(blurred, kernel.view(1, 1, -1, 1))
        displacement = blurred.view(-1, 2, height, width)
        size = torch.empty(2, device=draws.device)
        size[0].fill_(width)  # x comes first
        size[1].fill_(height)
        return displacement * alpha / size.view(1, 2, 1, 1)


@torch.no_grad()
def deform(images: Tensor, displacement: Tensor, mode: str = "bilinear") -> Tensor:
    """Read images [B, C, H, W] at displaced places -> float32 [B, C, H, W]; 0 where a place lies outside.

    mode: bilinear or nearest. As torchvision's v2.functional.elastic with fill 0.
    """
    height, width = images.shape[2:]
    device = images.device
    with torch.autocast(device.type, enabled=False):
        columns = torch.linspace((-width + 1) / width, (width - 1) / width, width, device=device)
        rows = torch.linspace((-height + 1) / height, (height - 1) / height, height, device=device)
        x = columns.view(1, 1, width) + displacement[:, 0]
        y = rows.view(1, height, 1) + displacement[:, 1]
        grid = torch.stack([x, y], dim=-1)
        deformed = F.grid_sample(images.float(), grid, mode=mode, padding_mode="zeros", align_corners=False)
        if mode == "nearest":
            return deformed
        inside = torch.ones_like(images[:, :1], dtype=torch.float32)
        inside = F.grid_sample(inside, grid, mode=mode, padding_mode="zeros", align_corners=False)
        return deformed * inside  # torchvision mixes the edge with the fill a second time
