"""Colours: each change is torchvision's, an image's own draws decide, and the order of the jitter is theirs too."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import colours
from colours import BLUR_TAPS, Colours

QUIET = settings(deadline=None, database=None, max_examples=40)
ROUNDING = 3e-6  # of values in 0..1
EVERYTHING = Colours(blur=0.5, solarise=0.5)


@st.composite
def photos(draw) -> tuple[Tensor, Tensor]:
    """Draw images [B, 3, H, W] in 0..1, some with flat, grey, black and white places, and uniform draws [B, 13]."""
    count = draw(st.integers(1, 4))
    height, width = draw(st.integers(9, 24)), draw(st.integers(9, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    images = rng.random((count, 3, height, width))
    levels = draw(st.sampled_from([1, 2, 5, 255]))
    images = np.rint(images * levels) / levels
    images[:, :, :3] = images[:, :1, :3]
    draws = rng.random((count, Colours.num_draws))
    return torch.tensor(images, dtype=torch.float32), torch.tensor(draws, dtype=torch.float32)


def each(images: Tensor, amounts: Tensor, change: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Change the images one by one by their amounts."""
    return torch.stack([change(image, amount) for image, amount in zip(images, amounts.tolist(), strict=True)])


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and (found - expected).abs().max().item() < ROUNDING


BLENDS = {
    "brightness": (colours.BRIGHTNESS, tv.adjust_brightness),
    "contrast": (colours.CONTRAST, tv.adjust_contrast),
    "saturation": (colours.SATURATION, tv.adjust_saturation),
}


@pytest.mark.parametrize("name", BLENDS)
@QUIET
@given(photos())
def test_blends_are_torchvisions(name, case):
    images, draws = case
    number, change = BLENDS[name]
    factors = 2 * draws[:, 0]
    kinds = torch.full((len(images),), number)
    assert close(colours.blend(images, kinds, factors), each(images, factors, change))


@QUIET
@given(photos())
def test_hue_grey_and_solarisation_are_torchvisions(case):
    images, draws = case
    turns = draws[:, 0] - 0.5
    assert close(colours.turn_hue(images, turns), each(images, turns, tv.adjust_hue))
    assert close(colours.grey(images), tv.rgb_to_grayscale(images))
    assert close(colours.solarise(images), tv.solarize(images, 0.5))


@QUIET
@given(photos())
def test_blur_is_torchvisions_with_a_sigma_for_each_image(case):
    images, draws = case
    sigmas = 0.1 + 1.9 * draws[:, 0]
    expected = each(images, sigmas, lambda image, sigma: tv.gaussian_blur(image, [BLUR_TAPS, BLUR_TAPS], [sigma]))
    assert close(colours.blur(images, sigmas), expected)


def slow_colours(image: Tensor, draws: list[float], chosen: Colours) -> Tensor:
    """Change one image by torchvision's functions, one after another in the order of their times."""
    chances, times, amounts, sigma = draws[:4], draws[4:8], draws[8:12], draws[12]
    strengths = (chosen.brightness, chosen.contrast, chosen.saturation, chosen.hue)
    changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    if chances[0] < chosen.jitter:
        for number in np.argsort(times, kind="stable"):
            amount = strengths[number] * (2 * amounts[number] - 1)
            image = changes[number](image, amount if number == colours.HUE else 1 + amount)
    if chances[1] < chosen.grey:
        image = tv.rgb_to_grayscale(image, 3)
    if chances[2] < chosen.blur:
        least, most = chosen.sigma
        image = tv.gaussian_blur(image, [BLUR_TAPS, BLUR_TAPS], [least + (most - least) * sigma])
    if chances[3] < chosen.solarise:
        image = tv.solarize(image, 0.5)
    return image


@QUIET
@given(photos())
def test_all_changes_together_are_those_of_a_loop_over_images(case):
    images, draws = case
    before = images.clone()
    found = EVERYTHING(images, draws)
    expected = each(images, draws, lambda image, numbers: slow_colours(image, numbers, EVERYTHING))
    assert (found - expected).abs().max() < 10 * ROUNDING  # one rounding after another
    assert torch.equal(images, before)
    assert found.min() >= 0
    assert found.max() <= 1


@QUIET
@given(photos())
def test_an_image_depends_on_its_own_draws_alone(case):
    images, draws = case
    together = EVERYTHING(images, draws)
    alone = [EVERYTHING(image[None], numbers[None]) for image, numbers in zip(images, draws, strict=True)]
    assert close(together, torch.cat(alone))


@QUIET
@given(photos())
def test_what_has_probability_0_never_happens_and_what_has_1_always(case):
    images, draws = case
    never = Colours(jitter=0, grey=0, blur=0, solarise=0)
    assert torch.equal(never(images, draws), images)
    grey = Colours(jitter=0, grey=1, blur=0)(images, draws)
    assert torch.equal(grey, colours.grey(images).expand_as(images))


def test_shares_of_the_changes_and_orders_of_the_jitter_are_those_asked_for():
    draws = torch.rand(6000, Colours.num_draws, generator=torch.Generator().manual_seed(0))
    images = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(1)).expand(6000, -1, -1, -1)
    chosen = Colours(jitter=0.8, grey=0, blur=0, solarise=0)
    untouched = (chosen(images, draws) == images).flatten(1).all(1)
    assert 0.18 < untouched.double().mean() < 0.22
    orders = draws[:, 4:8].argsort(1)
    found = {tuple(order) for order in orders.tolist()}
    assert len(found) == 24


def test_an_image_too_small_to_be_blurred_is_refused():
    with pytest.raises(ValueError, match="blur needs images above 8 px, got 8 x 20"):
        colours.blur(torch.zeros(1, 3, 8, 20), torch.ones(1))
