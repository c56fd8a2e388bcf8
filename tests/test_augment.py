"""Augmentation: equal to torchvision's, image and trimap aligned, boxes where RandomResizedCrop may put them."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import ElasticTransform
from torchvision.transforms.v2 import functional as tv

import augment

QUIET = settings(deadline=None, database=None, max_examples=60)


@st.composite
def crops(draw):
    size, count = draw(st.integers(4, 96)), draw(st.integers(1, 4))
    boxes = []
    for _ in range(count):
        h, w = draw(st.integers(1, size)), draw(st.integers(1, size))
        boxes.append([draw(st.integers(0, size - h)), draw(st.integers(0, size - w)), h, w])
    flips = draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=count, max_size=count))
    out = draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    return size, torch.tensor(boxes), torch.tensor(flips), out, draw(st.integers(0, 2**31))


def flipped(image, flip):
    image = image.flip(-1) if flip[0] else image
    return image.flip(-2) if flip[1] else image


@QUIET
@given(crops())
def test_integer_boxes_equal_torchvision_and_pillow_before_clamping(case):
    size, boxes, flips, out, seed = case
    images = torch.randint(0, 256, (len(boxes), 3, size, size), generator=torch.Generator().manual_seed(seed))
    ours = augment.crop_resize(images.to(torch.uint8), boxes.float(), flips, out, clamp=False)
    for i, box in enumerate(boxes.tolist()):
        top, left, h, w = box
        cut = images[i, :, top : top + h, left : left + w].float().numpy()
        pillow = [Image.fromarray(channel.copy()).resize(out[::-1], Image.Resampling.BICUBIC) for channel in cut]
        assert (ours[i] - flipped(torch.from_numpy(np.stack(pillow)), flips[i])).abs().max() < 0.01
        if out[1] > 1:  # torch repeats the first row in results one pixel wide, where Pillow agrees with us
            theirs = tv.resized_crop(images[i].float(), *box, list(out), InterpolationMode.BICUBIC, antialias=True)
            assert (ours[i] - flipped(theirs, flips[i])).abs().max() < 0.01
    assert torch.equal(augment.crop_resize(images.to(torch.uint8), boxes.float(), flips, out), ours.clamp(0, 255))


@QUIET
@given(crops())
def test_masks_take_the_nearest_pixel_centre(case):
    size, boxes, flips, out, seed = case
    masks = torch.randint(0, 3, (len(boxes), size, size), generator=torch.Generator().manual_seed(seed))
    ours = augment.crop_resize_nearest(masks.to(torch.uint8), boxes.float(), flips, out)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        rows, columns = ((np.arange(n) + 0.5) * (m / n) for n, m in zip(out, (h, w), strict=True))
        cut = masks[i, top : top + h, left : left + w].numpy()
        exact = torch.from_numpy(cut[np.floor(rows).astype(int)][:, np.floor(columns).astype(int)].copy())
        ties = min(np.abs(rows - rows.round()).min(), np.abs(columns - columns.round()).min()) < 1e-4
        if not ties:  # a centre on a pixel's edge may fall to either side
            assert torch.equal(ours[i], flipped(exact, flips[i]))
    assert ours.dtype == torch.int64


@QUIET
@given(st.integers(0, 2**31), st.sampled_from([(60, 80), (90, 30), (64, 64), (200, 50)]))
def test_image_and_trimap_stay_aligned_through_every_augmentation(seed, native):
    rng = np.random.default_rng(seed)
    pattern = np.zeros((64, 64), np.uint8)
    for k in (1, 2):  # two rectangles, one per class
        top, left = rng.integers(0, 40, 2)
        pattern[top : top + 20, left : left + 20] = k
    mask = torch.from_numpy(pattern)[None]
    image = (mask == torch.tensor([1, 2, 0])[:, None, None]).to(torch.uint8)[None] * 255  # channel 0: class 1, ...
    sizes = np.array([native], np.float32)
    boxes = augment.random_boxes(rng, sizes, (0.2, 1.0)) / np.concatenate([sizes, sizes], 1) * 64
    boxes, flips = torch.from_numpy(boxes), torch.from_numpy(rng.random((1, 2)) < 0.5)
    seen = augment.crop_resize(image, boxes, flips, 48)[0]
    classes = augment.crop_resize_nearest(mask, boxes, flips, 48)[0]
    shown = (seen.argmax(0) + 1) % 3
    wrong = shown != classes
    edge = torch.zeros_like(wrong)
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        edge |= classes != classes.roll(shift, (0, 1))
        edge |= shown != shown.roll(shift, (0, 1))  # a sliver that no pixel centre falls into shows in the image alone
    assert not (wrong & ~edge).any()  # they may differ by a rounded pixel at the edges alone


@QUIET
@given(st.integers(0, 2**31), st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted))
def test_random_boxes_lie_inside_with_the_area_and_ratio_asked_for(seed, scale):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 700, (200, 2)).astype(np.float32)
    boxes = augment.random_boxes(rng, sizes, scale)
    assert boxes.dtype == np.float32 and (boxes == boxes.round()).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    square = sizes.min(1) > 0.8 * sizes.max(1)
    large = square & (sizes.min(1) > 100)
    share = boxes[large, 2:].prod(1) / sizes[large].prod(1)
    slack = 4 / sizes[large].min(1) / np.sqrt(scale[0])
    assert (share >= scale[0] * (1 - slack) - 1e-3).all()


def test_random_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    crop, image = RandomResizedCrop(32, scale=(0.2, 1.0)), torch.zeros(3, 60, 100)
    params = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params], float)
    ours = augment.random_boxes(np.random.default_rng(0), np.tile([60.0, 100.0], (4000, 1)), (0.2, 1.0)).astype(float)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 1 and np.abs(ours.std(0) / theirs.std(0) - 1).max() < 0.06


def test_a_box_smaller_than_a_cell_takes_the_cell_it_lies_in():
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    box = torch.tensor([[2.2, 1.6, 0.1, 0.2]])
    out = augment.crop_resize(image, box, torch.zeros(1, 2, dtype=torch.bool), 5)
    assert torch.allclose(out, torch.full_like(out, 9.0))


def test_autocast_never_lowers_the_precision():
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    box, flips = torch.tensor([[3.0, 4.0, 30.0, 20.0]]).expand(2, 4), torch.zeros(2, 2, dtype=torch.bool)
    plain = augment.crop_resize(images, box, flips, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment.crop_resize(images, box, flips, 24), plain) and plain.dtype == torch.float32


def test_an_image_gives_the_same_bits_in_any_batch():
    images = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8)
    boxes = torch.from_numpy(augment.random_boxes(np.random.default_rng(1), np.full((6, 2), 40.0)))
    flips = torch.rand(6, 2) < 0.5
    whole = augment.crop_resize(images, boxes, flips, 32)
    parts = [augment.crop_resize(images[i : i + 2], boxes[i : i + 2], flips[i : i + 2], 32) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_normalise_and_back():
    x = torch.rand(2, 3, 5, 5) * 255
    mean, std = torch.tensor(augment.MEAN).view(3, 1, 1), torch.tensor(augment.STD).view(3, 1, 1)
    assert torch.allclose(augment.normalise(x), (x / 255 - mean) / std, atol=1e-5)
    assert torch.allclose(augment.denormalise(augment.normalise(x)), x, atol=1e-3)


def tensor_core(x, nearest: bool):
    """Keep 10 bits of the mantissa, rounded or cut off: either way of making TF32 factors of a product."""
    return augment.nearest_tf32(x) if nearest else (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@QUIET
@given(crops(), st.booleans())
def test_tf32_products_change_no_pixel_by_half_a_step(case, nearest):
    size, boxes, flips, out, seed = case
    images = torch.randint(0, 256, (len(boxes), 3, size, size), generator=torch.Generator().manual_seed(seed))
    exact, bmm = augment.crop_resize(images.to(torch.uint8), boxes.float(), flips, out), torch.bmm
    with (
        mock.patch.object(torch, "bmm", lambda a, b: bmm(tensor_core(a, nearest), tensor_core(b, nearest))),
        mock.patch.object(augment, "uses_tf32", lambda device: True),
    ):
        rounded = augment.crop_resize(images.to(torch.uint8), boxes.float(), flips, out)
    assert (rounded - exact).abs().max() < 0.5


# -- Elastic deformation, against torchvision's -------------------------------------------------------------------------


def displaced_by_torchvision(monkeypatch, draws: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """Let ElasticTransform make its displacement [1, H, W, 2] from draws [2, H, W], one for x and one for y."""
    left = list(draws)
    monkeypatch.setattr(torch, "rand", lambda *shape: left.pop(0).reshape(shape))
    transform = ElasticTransform(alpha=alpha, sigma=sigma)
    displacement = transform.make_params([torch.zeros(1, 3, *draws.shape[1:])])["displacement"]
    monkeypatch.undo()
    return displacement


@pytest.mark.parametrize(("alpha", "sigma"), [(50.0, 5.0), (7.0, 2.0), (20.0, 0.9)])
@pytest.mark.parametrize("size", [(48, 48), (30, 52), (61, 41)])
def test_displacements_are_those_of_torchvisions_elastic_transform(monkeypatch, size, alpha, sigma):
    height, width = size
    draws = torch.rand(3, 2, height, width)
    ours = augment.elastic_displacement(draws, alpha, sigma)
    for number in range(3):
        theirs = displaced_by_torchvision(monkeypatch, draws[number], alpha, sigma)[0].permute(2, 0, 1)
        assert (ours[number] - theirs).abs().max() < 1e-6
    assert ours.abs().max() > 0.01


@pytest.mark.parametrize("size", [(48, 48), (30, 52), (61, 41)])
@pytest.mark.parametrize("strength", [0.02, 0.3])
def test_deformed_images_and_masks_are_those_of_torchvisions_elastic(size, strength):
    height, width = size
    displacement = strength * torch.randn(3, 2, height, width)
    images = 255 * torch.rand(3, 4, height, width)
    masks = torch.randint(1, 4, (3, 1, height, width)).float()
    ours = augment.deform(images, displacement)
    ours_nearest = augment.deform(masks, displacement, mode="nearest")
    for number in range(3):
        grid = displacement[number].permute(1, 2, 0)[None]
        smooth = tv.elastic(images[number], grid, InterpolationMode.BILINEAR, fill=0)
        assert (ours[number] - smooth).abs().max() < 1e-3
        nearest = tv.elastic(masks[number], grid, InterpolationMode.NEAREST, fill=0)
        assert torch.equal(ours_nearest[number], nearest)
    if strength > 0.1:
        assert (ours_nearest == 0).any(), "some places lie outside"


def test_the_complete_transform_equals_torchvisions_on_a_square(monkeypatch):
    images = 255 * torch.rand(1, 3, 64, 64)
    draws = torch.rand(1, 2, 64, 64)
    ours = augment.deform(images, augment.elastic_displacement(draws, 50))
    left = list(draws[0])
    monkeypatch.setattr(torch, "rand", lambda *shape: left.pop(0).reshape(shape))
    theirs = ElasticTransform(alpha=50.0)(images)
    monkeypatch.undo()
    assert (ours - theirs).abs().max() < 0.01
    assert (ours - images).abs().mean() > 10


def test_no_displacement_leaves_every_pixel_in_place():
    images = 255 * torch.rand(2, 3, 33, 40)
    still = torch.zeros(2, 2, 33, 40)
    assert (augment.deform(images, still) - images).abs().max() < 0.01
    assert torch.equal(augment.deform(images, still, mode="nearest"), images)


def test_an_image_is_deformed_alike_in_any_batch_and_under_autocast():
    images = 255 * torch.rand(6, 3, 40, 40)
    draws = torch.rand(6, 2, 40, 40)
    displacement = augment.elastic_displacement(draws, 50)
    deformed = augment.deform(images, displacement)
    for first in (0, 2, 4):
        part = augment.elastic_displacement(draws[first : first + 2], 50)
        assert torch.allclose(part, displacement[first : first + 2], atol=1e-6)
        assert torch.equal(
            augment.deform(images[first : first + 2], displacement[first : first + 2]), deformed[first : first + 2]
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment.elastic_displacement(draws, 50), displacement)
        assert torch.equal(augment.deform(images, displacement), deformed)


def test_an_image_too_small_for_the_blur_is_refused():
    augment.elastic_displacement(torch.rand(1, 2, 21, 21), 50)
    with pytest.raises(ValueError, match="needs images above 20 px, got 20 x 60"):
        augment.elastic_displacement(torch.rand(1, 2, 20, 60), 50)


# -- Bilinear trimaps ---------------------------------------------------------------------------------------------------


@QUIET
@given(crops())
def test_bilinear_crops_of_trimaps_equal_torchvisions(case):
    size, boxes, flips, out, seed = case
    masks = torch.randint(0, 3, (len(boxes), size, size), generator=torch.Generator().manual_seed(seed))
    values = augment.file_values(masks.to(torch.uint8))
    assert set(values.unique().tolist()) <= {1, 2, 3}
    resized = augment.crop_resize(values, boxes.float(), flips, out, clamp=False, kernel="bilinear")
    classes = augment.threshold_trimaps(resized)
    assert classes.dtype == torch.int64
    assert classes.shape == (len(boxes), *out)
    for number, box in enumerate(boxes.tolist()):
        if out[1] == 1:  # torch repeats the first row in results one pixel wide
            continue
        theirs = tv.resized_crop(values[number], *box, list(out), InterpolationMode.BILINEAR, antialias=True)
        theirs = flipped(theirs, flips[number])[0]
        assert (resized[number, 0] - theirs).abs().max() < 1e-4
        expected = torch.zeros_like(classes[number])
        expected[theirs >= 1.5] = 1
        expected[theirs >= 2.5] = 2
        clear = ((theirs - 1.5).abs() > 1e-4) & ((theirs - 2.5).abs() > 1e-4)
        assert torch.equal(classes[number][clear], expected[clear])


def test_what_a_deformation_fills_in_is_read_as_pet():
    border = augment.file_values(torch.full((1, 8, 8), 2))
    outside = torch.full((1, 2, 8, 8), 3.0)
    assert (augment.threshold_trimaps(augment.deform(border, outside)) == 0).all()
    read = augment.threshold_trimaps(torch.tensor([0.0, 0.7, 1, 1.49, 1.5, 2, 2.49, 2.5, 3]).view(1, 1, 3, 3))
    assert read.flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("inputs", ["imagenet", "unit"])
def test_pixels_are_scaled_as_a_network_takes_them_and_back(inputs):
    x = torch.rand(2, 3, 5, 5) * 255
    scaled = augment.scale_pixels(x, inputs)
    expected = augment.normalise(x) if inputs == "imagenet" else x / 255
    assert torch.equal(scaled, expected)
    assert torch.allclose(augment.unscale_pixels(scaled, inputs), x, atol=1e-3)
