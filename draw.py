"""Draw a demo data set: animals and things on textured grounds that stand in for COCO 2017 and Oxford-IIIT Pet photos.

    python draw.py --out runs/drawn              # two sheets of examples with their labels: seconds
    python prepare.py demo --data_root data/demo # the data set itself, by write_coco and write_pets

`draw_coco` and `draw_pet` draw one picture with its labels, which depends on (seed, stream, index) alone. The figures are
defined in draw_figures.py; copy it along. Needs numpy and Pillow only.
"""

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from draw_figures import (
    BAG,
    BREEDS,
    CAT,
    CAT_SPECIES,
    CATEGORIES,
    CUSHION,
    DOG,
    DOG_SPECIES,
    EARS,
    GROUNDS,
    IRIS,
    IRISES,
    MAIN,
    MUZZLE,
    SECOND,
    SITTING_CAT,
    SITTING_DOG,
    STONE,
    THING_COATS,
    Breed,
    Category,
    Coat,
    Figure,
    parse_colour,
)

Rng = np.random.Generator

SIZES = ((160, 214), (180, 220), (214, 160), (200, 200), (220, 172), (168, 168), (165, 220))  # height, width in pixels
CLUTTER = (STONE, BAG, CUSHION)
WORTH_SHARING = 64  # pictures from which drawing on several cores pays
ALL_COATS = (*THING_COATS, *(breed.coat for breed in BREEDS))

PET_STREAM = 3  # the random stream of the pets; COCO's parts have their own
TRIMAP_PET = 1  # as published
TRIMAP_BACKGROUND = 2
TRIMAP_BORDER = 3


# -- Noise and colours


class Octave(NamedTuple):
    """One layer of noise: size of its cells in pixels, and standard deviation."""

    cell_height: int
    cell_width: int
    deviation: float


CLOUD = (Octave(60, 60, 0.9), Octave(24, 24, 0.7), Octave(8, 8, 0.45))
FUR = (Octave(2, 8, 1.2), Octave(8, 3, 0.5), Octave(16, 16, 1))


def draw_noise(rng: Rng, octaves: Sequence[Octave], height: int, width: int) -> np.ndarray:
    """Draw smooth noise [height, width], with mean 0 and standard deviation about 1."""
    total = np.zeros((height, width), np.float32)
    for octave in octaves:
        rows = height // octave.cell_height + 2
        columns = width // octave.cell_width + 2
        cells = Image.fromarray(np.float32(rng.normal(0, octave.deviation, (rows, columns))))
        total = total + np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC))
    return total


def pixel_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows y [height, 1] and columns x [width] of an image, in pixels."""
    y = np.float32(range(height))[:, None]
    x = np.float32(range(width))
    return y, x


def blur(array: np.ndarray, radius: float) -> np.ndarray:
    """Blur an array [H, W] or [H, W, 3] in 0..1 by a Gaussian; radius in pixels."""
    image = Image.fromarray(np.uint8(array * 255))
    return np.float32(image.filter(ImageFilter.GaussianBlur(float(radius)))) / 255


def pick(rng: Rng, options: Sequence, shares: Sequence[float] | None = None) -> Any:
    """Draw one of the options, with equal probabilities unless `shares` names others."""
    return options[rng.choice(len(options), p=shares)]


def vary(rng: Rng, palettes: Sequence[Sequence[str]]) -> np.ndarray:
    """Draw one of the palettes of n colours, a little lighter, darker or warmer each time: [n, 3] in 0..1."""
    palette = pick(rng, palettes)
    colours = np.stack([parse_colour(text) for text in palette])
    brightness = rng.uniform(0.85, 1.12)
    tint = rng.normal(0, 0.012, 3)
    return np.float32(np.clip(colours * brightness + tint, 0.04, 0.98))


# -- Figures


@dataclass(frozen=True)
class Look:
    """How a figure is drawn."""

    figure: Figure
    coats: tuple[Coat, ...]  # one of them is drawn
    pattern: str = "plain"  # or stripe, patch, spot, mask
    fur: float = 1.0  # length of the fur
    lively: bool = False  # legs and head move
    shadow: float = 0.45  # strength of the shadow on the floor


class Foot(NamedTuple):
    """Where a figure stands on the canvas, in pixels."""

    x: float
    y: float


class PosedPart(NamedTuple):
    """A part of a figure in its pose: outline [n, 2] in the figure's unit, colour [3] in 0..1."""

    outline: np.ndarray
    colour: np.ndarray
    crisp: bool


def colour_roles(rng: Rng, coat: np.ndarray, pattern: str) -> dict[str, np.ndarray]:
    """Give each role of a coat [2, 3] its colour [3]."""
    main = coat[0]
    second = coat[1]
    roles = {MAIN: main, SECOND: second, EARS: main * 0.82, MUZZLE: main}
    if pattern == "mask":
        roles[EARS] = second
    if pattern in ("mask", "patch"):
        roles[MUZZLE] = second
    roles[IRIS] = vary(rng, IRISES)[0]
    return roles


def pose_parts(rng: Rng, look: Look, coat: np.ndarray) -> list[PosedPart]:
    """Pose a figure: turned and skewed a little, and with legs and head moved if it is lively."""
    side = rng.choice([-1, 1])
    turn = np.diag([side * rng.uniform(0.9, 1.12), 1]) + rng.normal(0, 0.05, (2, 2))
    roles = colour_roles(rng, coat, look.pattern)
    nod = rng.uniform(-0.3, 0.2)
    posed = []
    for part in look.figure:
        outline = part.outline
        stride = rng.uniform(-0.35, 0.35)
        if look.lively:
            leg = np.clip(outline.imag - 0.2, 0, 0.35)
            head = np.maximum(outline.real - 0.3, 0)
            outline = outline + stride * leg + 1j * nod * head
        if part.colour in roles:
            colour = roles[part.colour] * part.shade
        else:
            colour = parse_colour(part.colour)
        sides = [outline.real]
        if part.mirrored:
            sides.append(-outline.real)
        for x in sides:
            points = np.stack([x, outline.imag], 1)
            posed.append(PosedPart(points @ turn, colour, part.crisp))
    return posed


class Frame:
    """The piece of a canvas [H, W] that a figure covers, with a margin; maps the figure's unit to pixels."""

    def __init__(self, parts: list[PosedPart], height: float, foot: Foot) -> None:
        points = np.concatenate([part.outline for part in parts])
        x_min, y_min = points.min(0).tolist()
        x_max, y_max = points.max(0).tolist()
        self.foot = foot
        self.height = height
        self.width = height * (x_max - x_min) / (y_max - y_min)
        self.scale = height / (y_max - y_min)  # pixels a unit
        self.origin = ((x_min + x_max) / 2, y_max)  # the point of the figure that stands on the foot
        margin = 5 + height * 0.15
        self.left = int(max(foot.x - self.width / 2 - margin, 0))
        self.top = int(max(foot.y - height - margin, 0))
        rows = slice(self.top, int(foot.y + margin))
        columns = slice(self.left, int(foot.x + self.width / 2 + margin))
        self.box = (rows, columns)

    def to_pixels(self, outline: np.ndarray) -> np.ndarray:
        """Map an outline [n, 2] to pixels of the piece at twice its size."""
        on_canvas = (outline - self.origin) * self.scale + self.foot
        return (on_canvas - (self.left, self.top)) * 2


class Layers(NamedTuple):
    """A painted figure, in 0..1."""

    coat: np.ndarray  # [h, w, 3]
    details: np.ndarray  # [h, w, 4], with their alpha
    alpha: np.ndarray  # [h, w], of both


class Tone(NamedTuple):
    """A shrunken copy of a part: its size and brightness."""

    size: float
    brightness: float


ROUNDED = (Tone(1, 0.74), Tone(0.86, 0.93), Tone(0.6, 1.1))  # lighter towards the middle
FLAT = (Tone(1, 1),)


def shrink(outline: np.ndarray, size: float) -> np.ndarray:
    """Shrink an outline [n, 2] and shift it up and to the left, where the light comes from."""
    centre = outline.mean(0)
    shift = (1 - size) * np.ptp(outline, 0).min() * 0.2
    return centre + (outline - centre) * size - shift


def paint_part(canvas: ImageDraw.ImageDraw, outline: np.ndarray, colour: np.ndarray, tones: Sequence[Tone]) -> None:
    """Paint an outline [n, 2] in one or more tones of a colour [3]."""
    for tone in tones:
        inner = shrink(outline, tone.size)
        ink = np.uint8(np.clip(colour * tone.brightness, 0, 1) * 255)
        canvas.polygon(inner.ravel().tolist(), fill=tuple(ink.tolist()))


def halve(image: Image.Image) -> np.ndarray:
    """Reduce an image to half its size, as an array in 0..1."""
    return np.float32(image.reduce(2)) / 255


def paint_parts(rng: Rng, parts: list[PosedPart], frame: Frame, size: tuple[int, int], fur: float) -> Layers:
    """Paint the parts on layers of `size` (height, width), smoothed by painting at twice the size."""
    double = (2 * size[1], 2 * size[0])
    coat = Image.new("RGB", double, "#504844")
    details = Image.new("RGBA", double, 0)
    alpha = Image.new("L", double, 0)
    coat_canvas = ImageDraw.Draw(coat)
    detail_canvas = ImageDraw.Draw(details)
    alpha_canvas = ImageDraw.Draw(alpha)
    tuft = fur * (0.5 + frame.height * 0.004)
    for part in parts:
        outline = frame.to_pixels(part.outline)
        tufts = rng.normal(0, tuft, outline.shape)
        if part.crisp:
            paint_part(detail_canvas, outline, part.colour, FLAT)
        else:
            outline = outline + tufts
            paint_part(coat_canvas, outline, part.colour, ROUNDED)
        alpha_canvas.polygon(outline.ravel().tolist(), fill=255)
    return Layers(halve(coat), halve(details), halve(alpha))


def pattern_share(pattern: str, x: np.ndarray, y: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """Compute how much of a coat's second colour shows at x, y (in sizes of the figure): [h, w] in 0..1."""
    if pattern == "stripe":
        share = np.sin(x * 61 + cloud) * 4 + 0.5
    elif pattern == "patch":
        share = (cloud - 0.3) * 9
    else:  # spots
        share = np.abs(np.sin(x * 34 + cloud) * np.sin(y * 34 + cloud)) * 9 - 4
    return share.clip(0, 1)


def add_pattern(rng: Rng, body: np.ndarray, pattern: str, coat: np.ndarray, extent: float) -> np.ndarray:
    """Paint a pattern in the coat's second colour onto a body [h, w, 3] of `extent` pixels."""
    h, w = body.shape[:2]
    y, x = pixel_grid(h, w)
    cloud = draw_noise(rng, CLOUD, h, w)
    share = pattern_share(pattern, x / extent, y / extent, cloud)[..., None]
    brightness = body.mean(2, keepdims=True)
    second = coat[1] / coat[0].mean() * brightness
    return body + share * (second - body)


def shade_figure(rng: Rng, layers: Layers, look: Look, coat: np.ndarray, frame: Frame) -> np.ndarray:
    """Give a painted figure its pattern, light from the upper left, fur and details: [h, w, 3] in 0..1."""
    h, w = layers.alpha.shape
    height = frame.height
    body = blur(layers.coat, 0.3 + height * 0.008)
    if look.pattern in ("stripe", "patch", "spot"):
        body = add_pattern(rng, body, look.pattern, coat, max(height, frame.width))
    slope_y, slope_x = np.gradient(blur(layers.alpha, height * 0.06))
    light = (3 + height * 0.03) * (slope_y + slope_x)
    strands = look.fur * 0.11 * draw_noise(rng, FUR, h, w)
    brightness = 1 + light + strands
    body = (body * brightness[..., None]).clip(0, 1)
    detail = layers.details[..., :3]
    detail_alpha = layers.details[..., 3:]
    return body + detail_alpha * (detail - body)


def cast_shadow(canvas: np.ndarray, frame: Frame, strength: float) -> None:
    """Darken a piece of canvas [h, w, 3] around the foot of a figure, in place."""
    y, x = pixel_grid(*canvas.shape[:2])
    depth = frame.height * 0.06 + 2
    half_width = frame.width * 0.45
    below = (y + frame.top - frame.foot.y + 2) / depth
    beside = (x + frame.left - frame.foot.x) / half_width
    darkness = np.exp(-(below**2 + beside**4))
    canvas *= 1 - strength * darkness[..., None]


def draw_figure(rng: Rng, canvas: np.ndarray, look: Look, height: float, foot: Foot) -> np.ndarray:
    """Draw a figure about `height` pixels high onto a canvas [H, W, 3], in place; return its alpha [H, W]."""
    coat = vary(rng, look.coats)
    parts = pose_parts(rng, look, coat)
    frame = Frame(parts, height, foot)
    piece = canvas[frame.box]
    layers = paint_parts(rng, parts, frame, piece.shape[:2], look.fur)
    body = shade_figure(rng, layers, look, coat, frame)
    cast_shadow(piece, frame, look.shadow)
    piece += layers.alpha[..., None] * (body - piece)
    alpha = np.zeros(canvas.shape[:2], np.float32)
    alpha[frame.box] = layers.alpha
    return alpha


# -- Grounds and light


class Scene(NamedTuple):
    """A picture in the making."""

    canvas: np.ndarray  # [H, W, 3] in 0..1
    horizon: float  # where the floor begins, as a share of the height


@dataclass(frozen=True)
class Layout:
    """The random numbers of a ground."""

    horizon: float
    style: float  # in 0..1
    across: float  # frequency of what repeats from left to right
    down: float  # and from top to bottom


def mix_background(kind: str, layout: Layout, y: np.ndarray, x: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """Compute how much of the background's second colour shows at y [H, 1], x [W] in 0..1: [H, W]."""
    if kind == "meadow":  # hills below the sky
        hills = np.sin(x * layout.down / 2 + layout.across)
        ridge = layout.horizon - 0.05 + 0.07 * hills + 0.02 * cloud
        return np.float32(y > ridge)
    if kind == "room":  # a papered or panelled wall
        along = x if layout.style < 0.6 else y
        stripes = np.sin(along * 3 * layout.down) > layout.across / 12 - 1
        return np.broadcast_to(np.float32(stripes), cloud.shape)
    folds = np.sin(x * layout.across + y * layout.down + cloud)
    return 0.5 + 0.3 * folds  # of a cloth


def draw_ground(rng: Rng) -> Scene:
    """Draw a place (meadow, room or cloth) with clutter on it."""
    h, w = pick(rng, SIZES)
    layout = Layout(rng.uniform(0.3, 0.58), rng.random(), rng.uniform(4, 24), rng.uniform(4, 24))
    ground = pick(rng, GROUNDS, [ground.share for ground in GROUNDS])
    cloud = draw_noise(rng, CLOUD, h, w)
    blades = draw_noise(rng, FUR, h, w)
    back_colours = vary(rng, ground.back)
    floor_colours = vary(rng, ground.floor)

    rows, columns = pixel_grid(h, w)
    y = rows / h
    x = columns / w
    mix = mix_background(ground.name, layout, y, x, cloud)[..., None]
    back = back_colours[0] + (back_colours[1] - back_colours[0]) * mix
    back = back * (1 + 0.06 * cloud)[..., None]

    near = np.clip((y - layout.horizon) / (1 - layout.horizon), 0, 1)  # 0 at the horizon, 1 at the lower edge
    joint = 0.93 if layout.style < 0.5 else 0  # narrow joints between boards, or broad stripes
    perspective = (x - 0.5) / (0.3 + near)
    boards = np.sin(perspective * (18 + layout.across)) > joint
    floor = np.where(boards[..., None], floor_colours[1], floor_colours[0])
    brightness = 0.75 + 0.3 * near + 0.1 * blades * (0.4 + near)
    floor = floor * brightness[..., None]

    is_back = (y < layout.horizon)[..., None] | (ground.name == "cloth")
    scene = Scene(np.where(is_back, back, floor), layout.horizon)
    scatter_clutter(rng, scene)
    return scene


def scatter_clutter(rng: Rng, scene: Scene) -> None:
    """Draw up to three cushions and stones in the colours of fur.

    So colour alone does not identify an animal.
    """
    h, w = scene.canvas.shape[:2]
    for _ in range(rng.integers(0, 4)):
        figure = pick(rng, CLUTTER)
        pattern = pick(rng, ("plain", "stripe", "patch"))
        x = rng.uniform(0, w)
        y = h * rng.uniform(scene.horizon + 0.1, 1)
        height = rng.uniform(0.15, 0.4) * h
        draw_figure(rng, scene.canvas, Look(figure, ALL_COATS, pattern, shadow=0.3), height, Foot(x, y))


def develop(rng: Rng, canvas: np.ndarray) -> Image.Image:
    """Light a canvas [H, W, 3] like a photo: direction, vignette, warmth and sensor noise."""
    h, w = canvas.shape[:2]
    x = np.linspace(-1, 1, w, dtype=np.float32)
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    to_right = rng.uniform(-0.14, 0.14)
    to_bottom = rng.uniform(-0.12, 0.12)
    vignette = rng.uniform(0, 0.16)
    light = 1 + to_right * x + to_bottom * y - vignette * (x * x + y * y)
    exposure = rng.uniform(0.85, 1.1)
    white_balance = rng.normal(1, 0.02, 3)
    grain = np.float32(rng.normal(0, 0.006, (h, w)))
    photo = canvas * light[..., None] * np.float32(exposure * white_balance) + grain[..., None]
    return Image.fromarray(np.uint8(photo.clip(0, 1) * 255))


# -- COCO-like photos


class Instance(NamedTuple):
    """A labelled object: COCO's category id, and the mask bool [H, W] of what is visible."""

    category_id: int
    mask: np.ndarray


class CocoPhoto(NamedTuple):
    """A photo and its labelled objects, from the back to the front."""

    image: Image.Image
    instances: list[Instance]


ANIMALS = [category.name for category in CATEGORIES if category.is_animal]
THINGS = [category.name for category in CATEGORIES if not category.is_animal]
BY_NAME = {category.name: category for category in CATEGORIES}

CYCLE = 40  # pictures after which the contents repeat
WITH_ANIMALS = 18  # of these
WITH_TWO_KINDS = 3  # of these 18
WITHOUT_LABEL = 2  # of the 22 others
MIN_VISIBLE = 12  # pixels; what shows less gets no label


def choose_contents(rng: Rng, index: int) -> list[str]:
    """Draw what a photo shows: names of categories, one for each object."""
    slot = index * 7 % CYCLE
    number = 0
    if slot < WITH_ANIMALS:
        number = 1
    if slot < WITH_TWO_KINDS:
        number = 2
    kinds = rng.choice(ANIMALS, number, replace=False)
    names = list(kinds)
    if number == 1:
        names = list(kinds) * pick(rng, (1, 1, 1, 2, 3))
    things = 0
    if names:
        things = rng.integers(0, 3)
    elif slot < CYCLE - WITHOUT_LABEL:
        things = rng.integers(1, 4)
    names.extend(rng.choice(THINGS, things))
    return names


def draw_object(rng: Rng, scene: Scene, category: Category, floor: float) -> np.ndarray:
    """Draw an object whose foot is at `floor` (share of the height) onto a scene; return its alpha [H, W]."""
    h, w = scene.canvas.shape[:2]
    nearness = 0.55 + 0.6 * (floor - scene.horizon) / (1 - scene.horizon)
    height = category.height * rng.uniform(0.75, 1.25) * h * nearness
    x = w * rng.uniform(0.15, 0.85)
    if category.on_floor:
        y = h * floor
        shadow = 0.45
    else:
        y = h * rng.uniform(0.35, 0.6)
        shadow = 0.0
    look = Look(category.figure, category.coats, category.pattern, category.fur, category.is_animal, shadow)
    return draw_figure(rng, scene.canvas, look, height, Foot(x, y))


def draw_coco(seed: int, stream: int, index: int) -> CocoPhoto:
    """Draw one COCO-like photo.

    Of 40 photos 18 show animals (3 of them two kinds) and 22 show none (2 of these nothing that has a label).
    """
    rng = np.random.default_rng([seed, stream, index])
    scene = draw_ground(rng)
    names = choose_contents(rng, index)
    floors = sorted(rng.uniform(scene.horizon + 0.12, 0.98) for _ in names)  # from far to near
    instances = []
    for name, floor in zip(rng.permutation(names), floors, strict=True):
        category = BY_NAME[name]
        mask = draw_object(rng, scene, category, floor) >= 0.5
        instances = [Instance(hidden.category_id, hidden.mask & ~mask) for hidden in instances]
        instances.append(Instance(category.id, mask))
    visible = [instance for instance in instances if instance.mask.sum() >= MIN_VISIBLE]
    return CocoPhoto(develop(rng, scene.canvas), visible)


def run_lengths(mask: np.ndarray) -> list[int]:
    """Encode a mask bool [H, W] as COCO's uncompressed run lengths.

    Runs of 0 and 1 in turn, down the columns; the first one is of 0 and may be empty.
    """
    pixels = mask.ravel(order="F")
    starts = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff(starts, prepend=0, append=pixels.size).tolist()


def bounding_box(mask: np.ndarray) -> list[float]:
    """Return COCO's box of a mask bool [H, W]: left, top, width, height in pixels."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    width = np.ptp(columns) + 1
    height = np.ptp(rows) + 1
    return [float(columns[0]), float(rows[0]), float(width), float(height)]


def coco_categories() -> list[dict]:
    """List the categories as in COCO's instances files."""
    return [{"id": c.id, "name": c.name, "supercategory": c.supercategory} for c in CATEGORIES]


def draw_many(draw: Callable, arguments: Sequence[tuple]) -> Iterator:
    """Yield draw(*argument) for each argument in order, drawn by all cores where that pays."""
    workers = len(os.sched_getaffinity(0))
    if workers == 1 or len(arguments) < WORTH_SHARING:
        for argument in arguments:
            yield draw(*argument)
        return
    # Forked, so that nothing is imported again.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=ignore_interrupts) as pool:
        yield from pool.map(draw, *zip(*arguments, strict=True), chunksize=8)


def ignore_interrupts() -> None:
    """Leave stop requests to the process that collects the pictures."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def write_coco(folder: Path, part: str, count: int, seed: int, stream: int, update: Callable[[], None]) -> None:
    """Draw `count` photos into folder/part and their instances file; `update()` is called after each."""
    images = []
    annotations = []
    (folder / part).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    arguments = [(seed, stream, index) for index in range(count)]
    for index, photo in enumerate(draw_many(draw_coco, arguments)):
        number = 1 + stream + index * 37
        name = f"{number:012d}.jpg"
        photo.image.save(folder / part / name, quality=90)
        images.append({"id": number, "file_name": name, "width": photo.image.width, "height": photo.image.height})
        for instance in photo.instances:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": instance.category_id,
                "iscrowd": 0,
                "bbox": bounding_box(instance.mask),
                "area": float(instance.mask.sum()),
                "segmentation": {"size": instance.mask.shape, "counts": run_lengths(instance.mask)},
            }
            annotations.append(annotation)
        update()
    content = {
        "info": {"description": "drawn demo photos"},
        "images": images,
        "annotations": annotations,
        "categories": coco_categories(),
    }
    (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


# -- Pet photos


class PetPhoto(NamedTuple):
    """A photo of a pet with its breed and trimap."""

    breed: Breed
    image: Image.Image
    trimap: np.ndarray  # uint8 [H, W]: 1 pet, 2 background, 3 a thin band between them


class Pose(NamedTuple):
    """How a pet is shown: sitting or standing, and how large."""

    share: float  # of the pets
    min_height: float  # as a share of the picture's height
    max_height: float
    close_up: bool = False  # the head fills the picture; feet and legs lie below its edge
    stands: bool = False


POSES = (
    Pose(share=0.4, min_height=1.15, max_height=1.8, close_up=True),
    Pose(share=0.3, min_height=0.65, max_height=0.95),
    Pose(share=0.3, min_height=0.45, max_height=0.75, stands=True),
)
STANDING = {CAT_SPECIES: CAT, DOG_SPECIES: DOG}
SITTING = {CAT_SPECIES: SITTING_CAT, DOG_SPECIES: SITTING_DOG}


def make_trimap(alpha: np.ndarray) -> np.ndarray:
    """Derive a trimap uint8 [H, W] from a pet's alpha [H, W]."""
    soft = blur(alpha, 2)
    trimap = np.full(alpha.shape, TRIMAP_BACKGROUND, np.uint8)
    trimap[soft > 0.1] = TRIMAP_BORDER
    trimap[soft > 0.9] = TRIMAP_PET
    return trimap


def draw_pet(seed: int, index: int) -> PetPhoto:
    """Draw one pet photo; the breeds take turns."""
    rng = np.random.default_rng([seed, PET_STREAM, index])
    breed = BREEDS[index % len(BREEDS)]
    canvas = draw_ground(rng).canvas
    h, w = canvas.shape[:2]
    pose = pick(rng, POSES, [pose.share for pose in POSES])
    height = h * rng.uniform(pose.min_height, pose.max_height)
    x = w * rng.uniform(0.36, 0.64)
    if pose.close_up:
        y = height + h * rng.uniform(0.06, 0.24)
    else:
        y = h * rng.uniform(0.85, 0.99)
    figure = STANDING[breed.species] if pose.stands else SITTING[breed.species]
    look = Look(figure, (breed.coat,), breed.pattern, lively=pose.stands)
    trimap = make_trimap(draw_figure(rng, canvas, look, height, Foot(x, y)))
    return PetPhoto(breed, develop(rng, canvas), trimap)


def write_pets(folder: Path, count: int, seed: int, update: Callable[[], None]) -> None:
    """Draw `count` pets into folder/images, with trimaps and list.txt in the published format.

    `update()` is called after each.
    """
    images = folder / "images"
    annotations = folder / "annotations"
    trimaps = annotations / "trimaps"
    trimaps.mkdir(parents=True)
    images.mkdir()
    rows = []
    for index, photo in enumerate(draw_many(draw_pet, [(seed, index) for index in range(count)])):
        breed = photo.breed
        name = f"{breed.name}_{index // len(BREEDS) + 1}"
        photo.image.save(images / f"{name}.jpg", quality=90)
        Image.fromarray(photo.trimap).save(trimaps / f"{name}.png")
        rows.append(f"{name} {breed.class_id} {breed.species} {breed.breed_id}")
        update()
    lines = ["#Image CLASS-ID SPECIES BREED ID", *sorted(rows)]
    (annotations / "list.txt").write_text("\n".join(lines) + "\n")


# -- Sheets of examples

CELL = 226  # side of a picture's cell on a sheet, in pixels; the largest pictures have 220
OVERLAY = np.array([255, 64, 32])  # colour of the labels


def overlay(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Tint the pixels of a mask bool [H, W]."""
    pixels = np.array(image)
    pixels[mask] = pixels[mask] // 2 + OVERLAY // 2
    return Image.fromarray(np.uint8(pixels))


def any_instance(photo: CocoPhoto) -> np.ndarray:
    """Return the mask bool [H, W] of everything that has a label."""
    mask = np.zeros((photo.image.height, photo.image.width), bool)
    for instance in photo.instances:
        mask |= instance.mask
    return mask


def make_sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Lay out rows of pictures on a white sheet."""
    sheet = Image.new("RGB", (CELL * max(map(len, rows)), CELL * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (CELL * j, CELL * i))
    return sheet


def write_sheets(out: Path, seed: int, columns: int = 6) -> list[Path]:
    """Write the sheets coco.png and pets.png into a folder; return their paths.

    Each has two rows of photos, and below each row the same photos with their labels.
    """
    coco_rows = []
    pet_rows = []
    for first in (0, columns):
        indices = range(first, first + columns)
        photos = [draw_coco(seed, 0, index) for index in indices]
        coco_rows.append([photo.image for photo in photos])
        coco_rows.append([overlay(photo.image, any_instance(photo)) for photo in photos])
        pets = [draw_pet(seed, index) for index in indices]
        pet_rows.append([pet.image for pet in pets])
        pet_rows.append([overlay(pet.image, pet.trimap == TRIMAP_PET) for pet in pets])
    out.mkdir(parents=True, exist_ok=True)
    sheets = {"coco.png": coco_rows, "pets.png": pet_rows}
    for name, rows in sheets.items():
        make_sheet(rows).save(out / name)
    return [out / name for name in sheets]


def parse_seed(text: str) -> int:
    """Read a seed, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: use an integer, 0 or more")
    return int(text)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser("draw.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="runs/drawn", help="folder for coco.png and pets.png (default: runs/drawn)")
    parser.add_argument("--seed", type=parse_seed, default=0, help="another seed draws other photos (default: 0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Draw the sheets of examples."""
    try:
        paths = write_sheets(Path(args.out), args.seed)
    except OSError as error:
        place = error.filename or args.out
        raise SystemExit(f"{place}: {error.strerror}: name another folder with --out") from None
    for path in paths:
        print(path)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
