"""Colours of a whole batch changed at random on the device: jitter, grey, blur and solarisation, as DINO trains with.

    colours = Colours(blur=0.1, solarise=0.2)
    changed = colours(images, draws)                 # [B, 3, H, W] in 0..1; draws: uniform [B, 13] in [0, 1)

What happens to an image is a pure function of its own draws. Every change is that of torchvision's v2.functional on float
images. Copy this file alone; it needs only torch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # what red, green and blue add to the grey value

# The three changes that mix an image with another one; the hue is the fourth that jitter makes.
BRIGHTNESS, CONTRAST, SATURATION = range(3)
BLENDS = 3
HUE = 3

BLUR_MARGIN = 8  # pixels to either side that the Gaussian takes in: four times DINO's largest sigma
BLUR_TAPS = 2 * BLUR_MARGIN + 1


def per_image(values: Tensor) -> Tensor:
    """Reshape a value for each image [B] so that it applies to all pixels -> [B, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def grey(images: Tensor) -> Tensor:
    """Compute the grey values of images [B, 3, H, W] -> [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    red_share, green_share, blue_share = LUMA
    return red_share * red + green_share * green + blue_share * blue


def blend(images: Tensor, kinds: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast or saturation of each image: the image times a factor, plus the rest of another image.

    The other image is black for the brightness, the mean grey for the contrast, and the image in grey for the saturation.
    kinds: [B], which of them; factors: [B], 1 changes nothing.
    """
    kinds = per_image(kinds)
    factors = per_image(factors)
    greys = grey(images)
    mean = greys.mean((1, 2, 3), keepdim=True)
    others = torch.where(kinds == CONTRAST, mean, greys)
    others = torch.where(kinds == BRIGHTNESS, 0.0, others)
    return (factors * images + (1 - factors) * others).clamp(0, 1)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images [B, 3, H, W] on the colour circle by `turns` [B], parts of a full turn.

    The hue is measured in sixths of the circle, as in the HSV model; its highest and its lowest channel stay what they are.
    """
    red, green, blue = images.unbind(1)
    lowest, highest = torch.aminmax(images, dim=1)
    chroma = highest - lowest
    divisor = torch.where(chroma == 0, 1.0, chroma)  # grey has no hue
    of_red = (green - blue) / divisor
    of_green = (blue - red) / divisor + 2
    of_blue = (red - green) / divisor + 4
    hue = torch.where(highest == green, of_green, of_blue)
    hue = torch.where(highest == red, of_red, hue)
    hue = hue + 6 * turns.view(-1, 1, 1)
    channels = []
    for sixths in (5, 3, 1):  # how far red, green and blue are from where they are lowest
        place = (hue + sixths).remainder(6)
        share = torch.minimum(place, 4 - place).clamp(0, 1)
        channels.append(highest - chroma * share)
    return torch.stack(channels, dim=1)


def jitter(images: Tensor, factors: Tensor, turns: Tensor, times: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue in an order of its own for each image.

    images: [B, 3, H, W]; factors: [B, 3] of brightness, contrast, saturation; turns: [B] of the hue; times: [B, 4], when
    each of the four happens: the lowest comes first. So that the hue, the dearest, is turned only once, all blends are
    made before it and after it, with the factor 1 where they do not belong.
    """
    blend_times = times[:, :BLENDS]
    kinds = blend_times.argsort(dim=1, stable=True)
    before_hue = blend_times.gather(1, kinds) < times[:, HUE:]
    factors = factors.gather(1, kinds)
    early = torch.where(before_hue, factors, 1.0)
    late = torch.where(before_hue, 1.0, factors)
    for number in range(BLENDS):
        images = blend(images, kinds[:, number], early[:, number])
    images = turn_hue(images, turns)
    for number in range(BLENDS):
        images = blend(images, kinds[:, number], late[:, number])
    return images


def gaussian_weights(sigmas: Tensor) -> Tensor:
    """Weigh the neighbours of a pixel by a Gaussian for each sigma [B], in pixels -> [B, BLUR_TAPS]."""
    offsets = torch.arange(-BLUR_MARGIN, BLUR_MARGIN + 1, device=sigmas.device)
    exponents = -0.5 * (offsets / sigmas.unsqueeze(1)) ** 2
    return exponents.softmax(dim=1)


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each image by a Gaussian of its own sigma [B] in pixels; edges are mirrored.

    ValueError if the images [B, 3, H, W] are too small to be mirrored.
    """
    batch, channels, height, width = images.shape
    if min(height, width) <= BLUR_MARGIN:
        raise ValueError(f"blur needs images above {BLUR_MARGIN} px, got {height} x {width}")
    weights = gaussian_weights(sigmas).repeat_interleave(channels, dim=0, output_size=batch * channels)
    padded = F.pad(images, 4 * (BLUR_MARGIN,), mode="reflect")
    planes = padded.flatten(0, 1).unsqueeze(0)  # [1, B * 3, ...]: a kernel for each plane
    with torch.autocast(images.device.type, enabled=False):
        planes = F.conv2d(planes, weights.view(-1, 1, BLUR_TAPS, 1), groups=batch * channels)
        planes = F.conv2d(planes, weights.view(-1, 1, 1, BLUR_TAPS), groups=batch * channels)
    return planes.view(batch, channels, height, width)


def solarise(images: Tensor) -> Tensor:
    """Turn the bright half of the values of images in 0..1 into their negatives."""
    return torch.where(images >= 0.5, 1 - images, images)


@dataclass(frozen=True)
class Colours:
    """How likely and how strongly the colours of an image change, in the order of the first four: their probabilities.

    jitter: brightness, contrast, saturation and hue in random order, each by a factor in 1 - x..1 + x, the hue by -x..x of
    a full turn. grey: no colours. blur: by a Gaussian of a sigma within `sigma`, in pixels. solarise: bright values turned
    into negatives. The defaults are those of DINO (Caron et al. 2021, section 3.2; Grill et al. 2020, appendix B), but for
    blur and solarise, which differ between its views.
    """

    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    solarise: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    sigma: tuple[float, float] = (0.1, 2.0)

    num_draws: ClassVar[int] = 13  # uniform numbers that an image needs

    @torch.no_grad()
    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change float images [B, 3, H, W] in 0..1 by uniform draws [B, 13] in [0, 1)."""
        chances, times, amounts, sigmas = draws.split([4, 4, 4, 1], dim=1)
        changed = self._jitter(images, amounts, times)
        images = torch.where(per_image(chances[:, 0] < self.jitter), changed, images)
        images = torch.where(per_image(chances[:, 1] < self.grey), grey(images), images)
        if self.blur > 0:
            least, most = self.sigma
            changed = blur(images, least + (most - least) * sigmas[:, 0])
            images = torch.where(per_image(chances[:, 2] < self.blur), changed, images)
        if self.solarise > 0:
            images = torch.where(per_image(chances[:, 3] < self.solarise), solarise(images), images)
        return images

    def _jitter(self, images: Tensor, amounts: Tensor, times: Tensor) -> Tensor:
        """Jitter by amounts [B, 4] in [0, 1), of which 0.5 changes nothing."""
        signed = 2 * amounts - 1
        brightness = 1 + self.brightness * signed[:, 0]
        contrast = 1 + self.contrast * signed[:, 1]
        saturation = 1 + self.saturation * signed[:, 2]
        factors = torch.stack([brightness, contrast, saturation], dim=1)
        return jitter(images, factors, self.hue * signed[:, 3], times)
