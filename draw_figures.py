"""The figures of the drawn demo data: outlines, coats, COCO categories, pet breeds and grounds. draw.py draws them.

A figure is a tuple of parts, from the back to the front. Its unit is about the length of an animal's body; x grows to
the right and y downwards. Points are written as in SVG, "x,y x,y ...". To add a thing, write its parts and name it in
CATEGORIES.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

# The colours of a coat. A part names one of them, or any colour as "#rrggbb".
MAIN = "main"
SECOND = "second"
EARS = "ears"
MUZZLE = "muzzle"
IRIS = "iris"

IRISES = (("#c8b040",), ("#78a850",), ("#5c9cc8",))


@cache
def parse_colour(text: str) -> np.ndarray:
    """Read "#rrggbb" as red, green and blue [3] in 0..1."""
    return np.frombuffer(bytes.fromhex(text.removeprefix("#")), np.uint8) / 255


# -- Parts


def parse_points(text: str) -> np.ndarray:
    """Read "x,y x,y ..." as complex numbers x + iy: [n]."""
    return np.array([complex(*map(float, pair.split(","))) for pair in text.split()])


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a figure. A coat's part has fur, pattern and light; a crisp one is drawn sharply on top."""

    colour: str
    shade: float = 1.0  # brightness, times that of the coat's colour
    crisp: bool = False
    mirrored: bool = False  # drawn a second time, mirrored at x = 0


@dataclass(frozen=True)
class Ellipse(Part):
    """An ellipse about a point."""

    centre: str
    radius_x: float
    radius_y: float

    @cached_property
    def outline(self) -> np.ndarray:
        """Return the outline [60] as complex numbers."""
        angle = 2 * np.pi * np.linspace(0, 1, 60)
        (centre,) = parse_points(self.centre)
        x = centre.real + self.radius_x * np.cos(angle)
        y = centre.imag + self.radius_y * np.sin(angle)
        return x + 1j * y


@dataclass(frozen=True)
class Stroke(Part):
    """A brush stroke along the parabola through three points, with round ends and changing half width."""

    points: str
    start_width: float
    end_width: float

    @cached_property
    def outline(self) -> np.ndarray:
        """Return the outline [120] as complex numbers: one side forwards, the other one backwards."""
        t = np.linspace(0, 1, 60)
        start, middle, end = parse_points(self.points)
        line = start * (1 - t) * (1 - 2 * t) + middle * 4 * t * (1 - t) + end * t * (2 * t - 1)
        width = self.start_width + (self.end_width - self.start_width) * t
        roundness = np.sqrt(np.clip(1 - (2 * t - 1) ** 12, 0.02, 1))
        direction = np.exp(1j * np.angle(np.gradient(line)))
        side = 1j * (width * roundness) * direction
        return np.concatenate([line + side, (line - side)[::-1]])


@dataclass(frozen=True)
class Polygon(Part):
    """A polygon through its corners."""

    points: str

    @cached_property
    def outline(self) -> np.ndarray:
        """Return the corners [n] as complex numbers."""
        return parse_points(self.points)


Figure = tuple[Part, ...]


@dataclass(frozen=True)
class Legs:
    """The four legs of an animal: heights of knee and foot below the belly's middle, half widths, colour."""

    knee: float
    foot: float
    thigh: float
    ankle: float
    colour: str = MAIN

    def leg(self, x: float, shade: float = 1.0) -> Stroke:
        """Return the leg at x."""
        points = f"{x},0 {x - 0.02:.2f},{self.knee} {x},{self.foot}"
        return Stroke(points, self.thigh, self.ankle, colour=self.colour, shade=shade)


def four_legged(legs: Legs, depth: float, chest: float, tail: Part, neck_and_head: Figure) -> Figure:
    """Build an animal that looks to the right; depth, chest: half heights of trunk and chest."""
    return (
        legs.leg(-0.3, shade=0.7),
        legs.leg(0.38, shade=0.7),
        tail,
        Ellipse("0,0", 0.55, depth, colour=MAIN),
        Ellipse("0.3,-0.02", 0.25, chest, colour=MAIN),
        Ellipse("-0.32,-0.02", 0.25, depth, colour=MAIN),
        legs.leg(-0.38),
        legs.leg(0.28),
        *neck_and_head,
    )


# -- What the figures are


Coat = tuple[str, str]  # main and second colour, "#rrggbb"

THING_COATS = (
    ("#b83830", "#e8dcc8"),
    ("#2c5c94", "#e8e8e0"),
    ("#d8a030", "#384048"),
    ("#4a7a50", "#d8c8a0"),
    ("#8a6040", "#c8a880"),
    ("#e8e4dc", "#504840"),
    ("#58585c", "#c0b8a8"),
    ("#8c4878", "#e0c8d0"),
)


@dataclass(frozen=True)
class Category:
    """A COCO category: its number and group there, and how it looks."""

    name: str
    id: int
    supercategory: str
    height: float  # as a share of the picture's height, at medium distance
    figure: Figure
    pattern: str = "plain"  # or stripe, patch, spot
    fur: float = 0.25  # length of the fur, 1 for most animals
    coats: tuple[Coat, ...] = THING_COATS
    on_floor: bool = True  # and casts a shadow there

    @property
    def is_animal(self) -> bool:
        """Tell animals from things."""
        return self.supercategory == "animal"


@dataclass(frozen=True)
class Breed:
    """A pet breed with its numbers in Oxford-IIIT Pet's list.txt, and how it looks."""

    name: str
    class_id: int
    species: int
    breed_id: int
    pattern: str  # as in Category, or mask: dark ears and muzzle
    coat: Coat


@dataclass(frozen=True)
class Ground:
    """A place: the colours, in pairs, of its background and of its floor."""

    name: str
    share: float  # of the pictures
    back: tuple[Coat, ...]
    floor: tuple[Coat, ...]


CAT_SPECIES = 1  # as in list.txt
DOG_SPECIES = 2

# -- Animals

BIRD = (
    Stroke("-0.05,0.2 -0.065,0.38 -0.08,0.55", 0.018, 0.014, colour="#a07030", crisp=True),
    Stroke("0.08,0.2 0.09,0.38 0.1,0.55", 0.018, 0.014, colour="#a07030", crisp=True),
    Stroke("-0.3,0.08 -0.55,0.14 -0.8,0.2", 0.13, 0.08, colour=MAIN, shade=0.7),
    Stroke("-0.34,0.16 0,0 0.36,-0.14", 0.16, 0.2, colour=MAIN),
    Stroke("-0.1,0.22 0.1,0.14 0.26,-0.06", 0.1, 0.14, colour=SECOND),
    Stroke("0.4,-0.32 0.54,-0.3 0.68,-0.27", 0.06, 0.008, colour="#d89030", crisp=True),
    Ellipse("0.34,-0.32", 0.19, 0.18, colour=MAIN),
    Stroke("0.12,-0.1 -0.15,0.05 -0.5,0.16", 0.15, 0.03, colour=MAIN, shade=0.62),
    Ellipse("0.4,-0.36", 0.032, 0.032, colour="#101010", crisp=True),
    Ellipse("0.41,-0.37", 0.01, 0.01, colour="#ffffff", crisp=True),
)

CAT = four_legged(
    Legs(knee=0.19, foot=0.34, thigh=0.075, ankle=0.043),
    depth=0.17,
    chest=0.18,
    tail=Stroke("-0.47,-0.075 -0.72,0.11 -0.95,-0.34", 0.05, 0.035, colour=MAIN, shade=0.85),
    neck_and_head=(
        Stroke("0.32,-0.02 0.46,-0.11 0.59,-0.19", 0.12, 0.09, colour=MAIN),
        Stroke("0.59,-0.19 0.66,-0.15 0.73,-0.11", 0.14, 0.09, colour=MAIN),
        Ellipse("0.59,-0.19", 0.18, 0.18, colour=MAIN),
        Stroke("0.53,-0.25 0.52,-0.35 0.51,-0.44", 0.07, 0.012, colour=MAIN, shade=0.7),
        Stroke("0.66,-0.25 0.65,-0.35 0.64,-0.44", 0.07, 0.012, colour=MAIN, shade=0.7),
        Ellipse("0.65,-0.23", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.66,-0.24", 0.009, 0.009, colour="#ffffff", crisp=True),
        Ellipse("0.73,-0.11", 0.043, 0.036, colour="#14100e", crisp=True),
    ),
)

DOG = four_legged(
    Legs(knee=0.25, foot=0.45, thigh=0.088, ankle=0.05),
    depth=0.18,
    chest=0.19,
    tail=Stroke("-0.47,-0.079 -0.68,-0.15 -0.75,-0.45", 0.04, 0.03, colour=MAIN, shade=0.85),
    neck_and_head=(
        Stroke("0.32,-0.02 0.47,-0.15 0.62,-0.28", 0.13, 0.085, colour=MAIN),
        Stroke("0.62,-0.28 0.74,-0.22 0.86,-0.15", 0.14, 0.085, colour=MAIN),
        Ellipse("0.62,-0.28", 0.17, 0.17, colour=MAIN),
        Stroke("0.56,-0.37 0.47,-0.32 0.49,-0.15", 0.05, 0.07, colour=MAIN, shade=0.7),
        Ellipse("0.68,-0.32", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.68,-0.33", 0.009, 0.009, colour="#ffffff", crisp=True),
        Ellipse("0.86,-0.15", 0.041, 0.034, colour="#14100e", crisp=True),
    ),
)

HORSE = four_legged(
    Legs(knee=0.37, foot=0.68, thigh=0.088, ankle=0.05),
    depth=0.2,
    chest=0.21,
    tail=Stroke("-0.47,-0.088 -0.72,0.092 -0.66,0.41", 0.07, 0.06, colour=SECOND, shade=0.8),
    neck_and_head=(
        Stroke("0.32,-0.02 0.54,-0.28 0.75,-0.54", 0.14, 0.065, colour=MAIN),
        Stroke("0.28,-0.12 0.52,-0.33 0.75,-0.54", 0.07, 0.05, colour=SECOND, shade=0.8),
        Stroke("0.75,-0.54 0.93,-0.45 1.12,-0.36", 0.1, 0.065, colour=MAIN),
        Ellipse("0.75,-0.54", 0.13, 0.13, colour=MAIN),
        Stroke("0.71,-0.61 0.69,-0.69 0.68,-0.76", 0.035, 0.012, colour=MAIN, shade=0.7),
        Stroke("0.79,-0.61 0.77,-0.69 0.76,-0.76", 0.035, 0.012, colour=MAIN, shade=0.7),
        Ellipse("0.8,-0.57", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.81,-0.58", 0.009, 0.009, colour="#ffffff", crisp=True),
        Ellipse("1.12,-0.36", 0.031, 0.026, colour="#14100e", crisp=True),
    ),
)

SHEEP = four_legged(
    Legs(knee=0.23, foot=0.41, thigh=0.075, ankle=0.043, colour=SECOND),
    depth=0.25,
    chest=0.27,
    tail=Stroke("-0.47,-0.11 -0.55,-0.08 -0.6,-0.05", 0.06, 0.05, colour=MAIN, shade=0.9),
    neck_and_head=(
        Stroke("0.32,-0.02 0.47,-0.13 0.62,-0.24", 0.18, 0.065, colour=MAIN),
        Stroke("0.62,-0.24 0.73,-0.18 0.84,-0.12", 0.1, 0.065, colour=SECOND),
        Ellipse("0.62,-0.24", 0.13, 0.13, colour=SECOND),
        Stroke("0.62,-0.28 0.53,-0.28 0.44,-0.29", 0.05, 0.03, colour=SECOND, shade=0.7),
        Stroke("0.67,-0.32 0.68,-0.39 0.69,-0.47", 0.02, 0.015, colour="#c8b89c", crisp=True),
        Ellipse("0.66,-0.26", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.67,-0.27", 0.009, 0.009, colour="#ffffff", crisp=True),
        Ellipse("0.84,-0.12", 0.031, 0.026, colour="#14100e", crisp=True),
    ),
)

COW = four_legged(
    Legs(knee=0.27, foot=0.48, thigh=0.1, ankle=0.058),
    depth=0.24,
    chest=0.25,
    tail=Stroke("-0.47,-0.11 -0.72,0.074 -0.62,0.27", 0.03, 0.035, colour=MAIN, shade=0.8),
    neck_and_head=(
        Stroke("0.32,-0.02 0.51,-0.13 0.7,-0.24", 0.17, 0.08, colour=MAIN),
        Stroke("0.7,-0.24 0.84,-0.17 0.98,-0.095", 0.13, 0.08, colour=MAIN),
        Ellipse("0.7,-0.24", 0.16, 0.16, colour=MAIN),
        Stroke("0.69,-0.31 0.6,-0.31 0.51,-0.32", 0.05, 0.03, colour=MAIN, shade=0.7),
        Stroke("0.74,-0.35 0.75,-0.42 0.76,-0.5", 0.02, 0.015, colour="#c8b89c", crisp=True),
        Ellipse("0.76,-0.27", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.76,-0.28", 0.009, 0.009, colour="#ffffff", crisp=True),
        Ellipse("0.98,-0.095", 0.038, 0.032, colour="#14100e", crisp=True),
    ),
)

ELEPHANT = four_legged(
    Legs(knee=0.33, foot=0.6, thigh=0.18, ankle=0.1),
    depth=0.33,
    chest=0.35,
    tail=Stroke("-0.47,-0.15 -0.72,0.035 -0.62,0.23", 0.03, 0.035, colour=MAIN, shade=0.8),
    neck_and_head=(
        Stroke("0.32,-0.02 0.51,-0.15 0.7,-0.27", 0.24, 0.12, colour=MAIN),
        Stroke("0.7,-0.27 0.81,-0.2 0.92,-0.14", 0.2, 0.12, colour=MAIN),
        Ellipse("0.7,-0.27", 0.25, 0.25, colour=MAIN),
        Stroke("0.81,-0.27 1.11,-0.021 1.03,0.45", 0.13, 0.05, colour=MAIN),
        Stroke("0.86,-0.13 1.06,0.029 1.2,-0.031", 0.03, 0.01, colour="#f4ecd8", crisp=True),
        Ellipse("0.58,-0.23", 0.2, 0.28, colour=MAIN, shade=0.8),
        Ellipse("0.78,-0.32", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.79,-0.33", 0.009, 0.009, colour="#ffffff", crisp=True),
    ),
)

BEAR = four_legged(
    Legs(knee=0.25, foot=0.46, thigh=0.15, ankle=0.086),
    depth=0.27,
    chest=0.29,
    tail=Stroke("-0.47,-0.12 -0.55,-0.089 -0.6,-0.059", 0.06, 0.05, colour=MAIN, shade=0.9),
    neck_and_head=(
        Stroke("0.32,-0.02 0.52,-0.12 0.71,-0.22", 0.19, 0.095, colour=MAIN),
        Stroke("0.71,-0.22 0.84,-0.15 0.96,-0.085", 0.15, 0.095, colour=MAIN),
        Ellipse("0.71,-0.22", 0.19, 0.19, colour=MAIN),
        Ellipse("0.65,-0.37", 0.065, 0.065, colour=MAIN, shade=0.7),
        Ellipse("0.8,-0.37", 0.065, 0.065, colour=MAIN, shade=0.7),
        Ellipse("0.78,-0.26", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.79,-0.27", 0.009, 0.009, colour="#ffffff", crisp=True),
        Ellipse("0.96,-0.085", 0.046, 0.038, colour="#14100e", crisp=True),
    ),
)

ZEBRA = four_legged(
    Legs(knee=0.33, foot=0.6, thigh=0.075, ankle=0.043),
    depth=0.2,
    chest=0.21,
    tail=Stroke("-0.47,-0.088 -0.72,0.092 -0.62,0.29", 0.03, 0.035, colour=MAIN, shade=0.8),
    neck_and_head=(
        Stroke("0.32,-0.02 0.5,-0.24 0.69,-0.46", 0.14, 0.065, colour=MAIN),
        Stroke("0.69,-0.46 0.85,-0.38 1.01,-0.3", 0.1, 0.065, colour=MAIN),
        Ellipse("0.69,-0.46", 0.13, 0.13, colour=MAIN),
        Stroke("0.64,-0.54 0.63,-0.61 0.61,-0.69", 0.035, 0.012, colour=MAIN, shade=0.7),
        Stroke("0.72,-0.54 0.71,-0.61 0.69,-0.69", 0.035, 0.012, colour=MAIN, shade=0.7),
        Ellipse("0.74,-0.49", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.74,-0.5", 0.009, 0.009, colour="#ffffff", crisp=True),
        Ellipse("1.01,-0.3", 0.031, 0.026, colour="#14100e", crisp=True),
    ),
)

GIRAFFE = four_legged(
    Legs(knee=0.46, foot=0.84, thigh=0.075, ankle=0.043),
    depth=0.2,
    chest=0.21,
    tail=Stroke("-0.47,-0.088 -0.72,0.092 -0.62,0.29", 0.03, 0.035, colour=MAIN, shade=0.8),
    neck_and_head=(
        Stroke("0.32,-0.02 0.57,-0.53 0.82,-1.05", 0.11, 0.055, colour=MAIN),
        Stroke("0.82,-1.05 0.94,-0.98 1.07,-0.92", 0.088, 0.055, colour=MAIN),
        Ellipse("0.82,-1.05", 0.11, 0.11, colour=MAIN),
        Stroke("0.78,-1.1 0.76,-1.18 0.75,-1.25", 0.035, 0.012, colour=MAIN, shade=0.7),
        Stroke("0.86,-1.1 0.84,-1.18 0.83,-1.25", 0.035, 0.012, colour=MAIN, shade=0.7),
        Ellipse("0.85,-1.07", 0.03, 0.03, colour="#14100e", crisp=True),
        Ellipse("0.86,-1.08", 0.009, 0.009, colour="#ffffff", crisp=True),
        Ellipse("1.07,-0.92", 0.026, 0.022, colour="#14100e", crisp=True),
    ),
)


# -- Things

PERSON = (
    Stroke("0.1,0.5 0.12,0.8 0.14,1.3", 0.12, 0.08, colour=SECOND, mirrored=True),
    Stroke("0.2,-0.1 0.31,0.2 0.27,0.45", 0.07, 0.05, colour=MAIN, shade=0.8, mirrored=True),
    Stroke("0,-0.2 0,0.2 0,0.6", 0.24, 0.2, colour=MAIN),
    Stroke("0,-0.35 0,-0.28 0,-0.2", 0.06, 0.07, colour="#d8a888"),
    Ellipse("0,-0.48", 0.14, 0.18, colour="#d8a888"),
    Stroke("-0.12,-0.56 0,-0.68 0.13,-0.56", 0.04, 0.04, colour="#40281c"),
)

CAR = (
    Polygon("-0.6,-0.1 -0.4,-0.42 0.3,-0.42 0.6,-0.1", colour=MAIN, shade=0.9),
    Stroke("-0.95,0.02 0,0.035 0.95,0.05", 0.2, 0.17, colour=MAIN),
    Ellipse("0.55,0.2", 0.19, 0.19, colour="#181818", crisp=True, mirrored=True),
    Polygon("-0.5,-0.1 -0.35,-0.36 -0.08,-0.36 -0.08,-0.1", colour="#a8c4d4", crisp=True),
    Polygon("0,-0.1 0,-0.36 0.26,-0.36 0.46,-0.1", colour="#90b0c4", crisp=True),
    Ellipse("0.55,0.2", 0.09, 0.09, colour="#b8b8b8", crisp=True, mirrored=True),
)

BOAT = (
    Stroke("0,-1 0,-0.45 0,0.1", 0.025, 0.03, colour="#6a4a30"),
    Polygon("0.06,-0.95 0.06,0 0.6,0", colour=MAIN),
    Polygon("-0.05,-0.8 -0.05,0 -0.45,0", colour=MAIN, shade=0.85),
    Polygon("-0.8,0.1 0.85,0.1 0.55,0.42 -0.5,0.42", colour=SECOND),
    Stroke("-0.75,0.13 0.025,0.13 0.8,0.13", 0.03, 0.03, colour="#f0f0f0", crisp=True),
)

TRAFFIC_LIGHT = (
    Stroke("0,0.4 0,0.85 0,1.3", 0.05, 0.05, colour="#606468"),
    Polygon("-0.2,-0.5 0.2,-0.5 0.2,0.45 -0.2,0.45", colour="#383c30"),
    Ellipse("0,-0.3", 0.12, 0.12, colour="#e03828", crisp=True),
    Ellipse("0,0", 0.12, 0.12, colour="#d8a820", crisp=True),
    Ellipse("0,0.28", 0.12, 0.12, colour="#30b050", crisp=True),
)

UMBRELLA = (
    Stroke("0,-0.1 0,0.35 0,0.8", 0.02, 0.02, colour="#403830", crisp=True),
    Polygon("-0.8,0 -0.7,-0.3 -0.4,-0.5 0,-0.6 0.4,-0.5 0.7,-0.3 0.8,0 0.5,-0.1 0.2,0 -0.2,0 -0.5,-0.1", colour=MAIN),
    Polygon("0,-0.6 0.2,0 0.5,-0.1 0.3,-0.4", colour=SECOND, mirrored=True),
    Stroke("0,0.75 0.08,0.85 0.14,0.72", 0.02, 0.02, colour="#403830", crisp=True),
)

SPORTS_BALL = (
    Ellipse("0,0", 0.5, 0.5, colour=MAIN),
    Stroke("-0.5,0 0,0.15 0.5,0", 0.03, 0.03, colour=SECOND, crisp=True),
    Stroke("0,-0.5 0.18,0 0,0.5", 0.03, 0.03, colour=SECOND, crisp=True),
)

KITE = (
    Polygon("0,-0.7 0.5,0 0,0", colour=MAIN),
    Polygon("0,-0.7 -0.5,0 0,0", colour=SECOND),
    Polygon("0,0 0.5,0 0,0.8", colour=SECOND, shade=0.8),
    Polygon("0,0 -0.5,0 0,0.8", colour=MAIN, shade=0.8),
    Stroke("0,0.8 0.3,1.1 0,1.4", 0.02, 0.02, colour="#e8e0d0", crisp=True),
    Ellipse("0.2,1.05", 0.09, 0.05, colour="#d83848", crisp=True),
)

BOTTLE = (
    Stroke("0,-0.1 0,0.35 0,0.8", 0.2, 0.22, colour=MAIN),
    Stroke("0,-0.6 0,-0.3 0,0", 0.07, 0.12, colour=MAIN),
    Stroke("0,-0.66 0,-0.6 0,-0.55", 0.08, 0.08, colour=SECOND, crisp=True),
    Polygon("-0.2,0.2 0.2,0.2 0.2,0.55 -0.2,0.55", colour="#ece4d0", crisp=True),
)

CUP = (
    Stroke("0.3,-0.25 0.75,0 0.3,0.3", 0.06, 0.06, colour=MAIN, shade=0.8),
    Polygon("-0.45,-0.4 0.45,-0.4 0.34,0.5 -0.34,0.5", colour=MAIN),
    Ellipse("0,-0.4", 0.45, 0.12, colour=MAIN, shade=0.7),
    Ellipse("0,-0.39", 0.38, 0.08, colour="#402818", crisp=True),
)

CHAIR = (
    Stroke("0.38,0.1 0.4,0.5 0.42,0.9", 0.05, 0.04, colour=SECOND, shade=0.7, mirrored=True),
    Stroke("0.3,-0.9 0.31,-0.4 0.32,0.1", 0.05, 0.05, colour=SECOND, mirrored=True),
    Stroke("-0.3,-0.75 0,-0.75 0.3,-0.75", 0.11, 0.11, colour=MAIN),
    Stroke("-0.3,-0.4 0,-0.4 0.3,-0.4", 0.08, 0.08, colour=MAIN),
    Stroke("-0.4,0.1 0,0.1 0.4,0.1", 0.1, 0.1, colour=MAIN),
)

POTTED_PLANT = (
    Stroke("0,0 -0.3,-0.3 -0.6,-0.3", 0.1, 0.02, colour="#4a8a3a"),
    Stroke("0,0 0.3,-0.4 0.6,-0.35", 0.1, 0.02, colour="#3a7a34"),
    Stroke("0,0 -0.2,-0.5 -0.35,-0.8", 0.1, 0.02, colour="#5a9a44"),
    Stroke("0,0 0.2,-0.5 0.25,-0.9", 0.1, 0.02, colour="#44843c"),
    Polygon("-0.32,0 0.32,0 0.24,0.5 -0.24,0.5", colour=MAIN),
)

CLOCK = (
    Ellipse("0,0", 0.5, 0.5, colour=MAIN),
    Ellipse("0,0", 0.4, 0.4, colour="#f0ece0", crisp=True),
    Stroke("0,0 0.11,-0.08 0.22,-0.16", 0.03, 0.02, colour="#202020", crisp=True),
    Stroke("0,0 -0.025,-0.17 -0.05,-0.33", 0.025, 0.015, colour="#202020", crisp=True),
)


# -- Pets that sit

SITTING_BODY = (
    Stroke("0.4,1.6 0.95,1.55 0.85,1", 0.1, 0.07, colour=MAIN, shade=0.85),
    Ellipse("0,1.05", 0.6, 0.75, colour=MAIN),
    Ellipse("0.36,1.45", 0.34, 0.3, colour=MAIN, shade=0.92, mirrored=True),
    Stroke("0,0.3 0,0.75 0,1.2", 0.4, 0.34, colour=MAIN),
    Stroke("0.16,0.9 0.18,1.31 0.2,1.72", 0.15, 0.13, colour=MAIN, mirrored=True),
    Ellipse("0.2,1.72", 0.18, 0.1, colour=MAIN, shade=1.05, mirrored=True),
    Stroke("0.16,1.7 0.16,1.74 0.16,1.78", 0.01, 0.01, colour="#3c2820", crisp=True, mirrored=True),
    Stroke("0.25,1.7 0.25,1.74 0.25,1.78", 0.01, 0.01, colour="#3c2820", crisp=True, mirrored=True),
)

SITTING_CAT = (
    *SITTING_BODY,
    Polygon("0.44,-0.12 0.42,-0.72 0.06,-0.4", colour=EARS, mirrored=True),
    Polygon("0.36,-0.34 0.37,-0.58 0.2,-0.42", colour="#c89890", crisp=True, mirrored=True),
    Ellipse("0,0", 0.5, 0.44, colour=MAIN),
    Ellipse("0,0.14", 0.27, 0.22, colour=MUZZLE),
    Ellipse("0.2,-0.06", 0.11, 0.09, colour=IRIS, crisp=True, mirrored=True),
    Ellipse("0.2,-0.06", 0.035, 0.08, colour="#0c0a0a", crisp=True, mirrored=True),
    Ellipse("0.22,-0.1", 0.025, 0.025, colour="#ffffff", crisp=True, mirrored=True),
    Stroke("0.15,0.2 0.38,0.15 0.6,0.1", 0.008, 0.004, colour="#f8f4ec", crisp=True, mirrored=True),
    Stroke("0.15,0.22 0.39,0.21 0.62,0.2", 0.008, 0.004, colour="#f8f4ec", crisp=True, mirrored=True),
    Stroke("0.15,0.24 0.38,0.27 0.6,0.3", 0.008, 0.004, colour="#f8f4ec", crisp=True, mirrored=True),
    Polygon("-0.08,0.08 0.08,0.08 0,0.17", colour="#b87870", crisp=True),
    Stroke("0,0.27 0.06,0.3 0.12,0.25", 0.012, 0.012, colour="#3c2820", crisp=True, mirrored=True),
)

SITTING_DOG = (
    *SITTING_BODY,
    Ellipse("0,0", 0.5, 0.44, colour=MAIN),
    Stroke("0.3,-0.34 0.56,-0.2 0.52,0.25", 0.12, 0.15, colour=EARS, mirrored=True),
    Ellipse("0,0.2", 0.26, 0.25, colour=MUZZLE),
    Ellipse("0.2,-0.06", 0.09, 0.08, colour="#4a2c18", crisp=True, mirrored=True),
    Ellipse("0.2,-0.06", 0.06, 0.065, colour="#0c0a0a", crisp=True, mirrored=True),
    Ellipse("0.22,-0.09", 0.022, 0.022, colour="#ffffff", crisp=True, mirrored=True),
    Ellipse("0,0.1", 0.11, 0.08, colour="#1c1614", crisp=True),
    Ellipse("-0.03,0.07", 0.03, 0.02, colour="#706864", crisp=True),
    Stroke("0,0.18 0,0.24 0,0.3", 0.01, 0.01, colour="#3c2820", crisp=True),
    Stroke("0,0.3 0.1,0.34 0.18,0.28", 0.013, 0.013, colour="#3c2820", crisp=True, mirrored=True),
)


# -- Clutter on the grounds

STONE = (Ellipse("0,0", 1, 0.7, colour=MAIN),)
BAG = (
    Stroke("-0.6,0.1 0,0 0.6,-0.1", 0.5, 0.5, colour=MAIN),
    Stroke("-0.5,0.3 0,0.3 0.5,0.3", 0.3, 0.3, colour=SECOND),
)
CUSHION = (Polygon("-0.7,-0.6 0.6,-0.7 0.7,0.5 -0.6,0.6", colour=MAIN),)


# -- What is drawn: categories, breeds and grounds

CATEGORIES = (
    Category(
        "bird",
        id=16,
        supercategory="animal",
        height=0.34,
        figure=BIRD,
        fur=1.0,
        coats=(
            ("#c84434", "#f0e8dc"),
            ("#3c6cac", "#f0e8dc"),
            ("#d8a834", "#403020"),
            ("#585450", "#e8e0d4"),
            ("#4c8448", "#d8d8a0"),
        ),
    ),
    Category(
        "cat",
        id=17,
        supercategory="animal",
        height=0.58,
        figure=CAT,
        fur=1.0,
        coats=(("#c48a4e", "#6b4423"), ("#8a8680", "#403c3a"), ("#eadcc4", "#b59a7a"), ("#3e3a3a", "#252323")),
    ),
    Category(
        "dog",
        id=18,
        supercategory="animal",
        height=0.58,
        figure=DOG,
        pattern="patch",
        fur=1.0,
        coats=(("#b5763a", "#efe4d0"), ("#3a3230", "#c08a50"), ("#efe8dc", "#a07040"), ("#8a5a34", "#402a1c")),
    ),
    Category(
        "horse",
        id=19,
        supercategory="animal",
        height=0.58,
        figure=HORSE,
        fur=1.0,
        coats=(("#7a4526", "#503018"), ("#a8683a", "#5e3a20"), ("#4a403c", "#2a2422"), ("#d8c8b0", "#a89880")),
    ),
    Category(
        "sheep",
        id=20,
        supercategory="animal",
        height=0.58,
        figure=SHEEP,
        fur=1.6,
        coats=(("#ece6d8", "#4a443c"), ("#d8cebc", "#6a6050"), ("#e4dccc", "#d8c8b0")),
    ),
    Category(
        "cow",
        id=21,
        supercategory="animal",
        height=0.58,
        figure=COW,
        pattern="patch",
        fur=1.0,
        coats=(("#f0ece4", "#262220"), ("#f0e8dc", "#7a4424"), ("#9a5a30", "#e8dcc8")),
    ),
    Category(
        "elephant",
        id=22,
        supercategory="animal",
        height=0.58,
        figure=ELEPHANT,
        fur=1.0,
        coats=(("#8c8884", "#706c6a"), ("#9c9088", "#807468"), ("#6e6a6a", "#585454")),
    ),
    Category(
        "bear",
        id=23,
        supercategory="animal",
        height=0.58,
        figure=BEAR,
        fur=1.0,
        coats=(("#5c3c24", "#40281a"), ("#2c2624", "#181412"), ("#e8e2d4", "#ccc4b0")),
    ),
    Category(
        "zebra",
        id=24,
        supercategory="animal",
        height=0.58,
        figure=ZEBRA,
        pattern="stripe",
        fur=1.0,
        coats=(("#f0ece4", "#1c1a1a"), ("#e4dccc", "#2a2220")),
    ),
    Category(
        "giraffe",
        id=25,
        supercategory="animal",
        height=0.85,
        figure=GIRAFFE,
        pattern="spot",
        fur=1.0,
        coats=(("#f0dcae", "#b87030"), ("#ead0a0", "#a06428")),
    ),
    Category("person", id=1, supercategory="person", height=0.8, figure=PERSON),
    Category("car", id=3, supercategory="vehicle", height=0.36, figure=CAR),
    Category("boat", id=9, supercategory="vehicle", height=0.6, figure=BOAT),
    Category("traffic light", id=10, supercategory="outdoor", height=0.8, figure=TRAFFIC_LIGHT),
    Category("umbrella", id=28, supercategory="accessory", height=0.6, figure=UMBRELLA),
    Category("sports ball", id=37, supercategory="sports", height=0.28, figure=SPORTS_BALL),
    Category("kite", id=38, supercategory="sports", height=0.4, figure=KITE, on_floor=False),
    Category("bottle", id=44, supercategory="kitchen", height=0.5, figure=BOTTLE),
    Category("cup", id=47, supercategory="kitchen", height=0.3, figure=CUP),
    Category("chair", id=62, supercategory="furniture", height=0.7, figure=CHAIR),
    Category("potted plant", id=64, supercategory="furniture", height=0.6, figure=POTTED_PLANT),
    Category("clock", id=85, supercategory="indoor", height=0.34, figure=CLOCK, on_floor=False),
)

BREEDS = (
    Breed("Abyssinian", 1, CAT_SPECIES, 1, pattern="plain", coat=("#b8743c", "#8a5028")),
    Breed("Bengal", 6, CAT_SPECIES, 2, pattern="spot", coat=("#d0a060", "#503018")),
    Breed("Bombay", 8, CAT_SPECIES, 4, pattern="plain", coat=("#4a4646", "#302c2c")),
    Breed("Maine_Coon", 21, CAT_SPECIES, 7, pattern="stripe", coat=("#8c7660", "#503c2c")),
    Breed("Persian", 24, CAT_SPECIES, 8, pattern="plain", coat=("#eee4d4", "#d0bea4")),
    Breed("Russian_Blue", 28, CAT_SPECIES, 10, pattern="plain", coat=("#808890", "#5c646c")),
    Breed("Siamese", 33, CAT_SPECIES, 11, pattern="mask", coat=("#e8d8bc", "#54402f")),
    Breed("beagle", 5, DOG_SPECIES, 4, pattern="patch", coat=("#b8703c", "#f4ecdf")),
    Breed("boxer", 9, DOG_SPECIES, 5, pattern="mask", coat=("#b0703c", "#3c2820")),
    Breed("newfoundland", 23, DOG_SPECIES, 16, pattern="plain", coat=("#4a3c34", "#2c2420")),
    Breed("pug", 26, DOG_SPECIES, 18, pattern="mask", coat=("#d8b482", "#302824")),
    Breed("saint_bernard", 29, DOG_SPECIES, 19, pattern="patch", coat=("#f0e8dc", "#a85c30")),
    Breed("samoyed", 30, DOG_SPECIES, 20, pattern="plain", coat=("#f4f0e8", "#d4ccc0")),
    Breed("shiba_inu", 32, DOG_SPECIES, 22, pattern="patch", coat=("#d08844", "#f0dcb8")),
)

GROUNDS = (
    Ground(
        "meadow",
        0.4,
        back=(("#6fa4d8", "#486848"), ("#a8c4dc", "#6c7a8c"), ("#e0b890", "#7a6a54"), ("#b8bcc0", "#586454")),
        floor=(
            ("#6a8c40", "#6a8c40"),
            ("#a89858", "#a89858"),
            ("#8c7454", "#8c7454"),
            ("#c8b890", "#c8b890"),
            ("#e0e0e0", "#e0e0e0"),
            ("#587838", "#587838"),
        ),
    ),
    Ground(
        "room",
        0.35,
        back=(
            ("#d8ccb4", "#b8a488"),
            ("#b8c4cc", "#d8e0e4"),
            ("#c8a088", "#8a5848"),
            ("#8a947c", "#6a7460"),
            ("#e8e0d4", "#c8b8a4"),
        ),
        floor=(("#a87848", "#6a4428"), ("#c8b8a0", "#a08c70"), ("#7c747c", "#585058")),
    ),
    Ground(
        "cloth",
        0.25,
        back=(
            ("#a83c38", "#d8b8a0"),
            ("#4c6890", "#c8d4e0"),
            ("#8a6a48", "#d8c4a0"),
            ("#d8d0c4", "#a89c8c"),
            ("#5c5450", "#908478"),
            ("#3c5c30", "#a8b868"),
        ),
        floor=(("#808080", "#808080"),),
    ),
)
