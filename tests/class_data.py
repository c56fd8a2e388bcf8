"""Small labelled photos for tests: coloured noise that a network tells apart, as class folders or as a list of breeds."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from folders import LabelledParts

SIDE = 24
COLOURS = {"Abyssinian": (200, 60, 40), "Bengal": (40, 180, 60), "pug": (50, 70, 210)}


def write_photo(path: Path, seed: int, colour: Sequence[int] = (128, 128, 128)) -> None:
    """Write noise around a colour; every seed gives another file."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(colour, 40, (SIDE, SIDE, 3)), 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, format="PNG")


def write_breeds(root: Path, each: int) -> Path:
    """Write `each` photos of three breeds as a data root of Oxford-IIIT Pet; the class ids are not in the names' order."""
    lines = ["#Image CLASS-ID SPECIES BREED ID"]
    for class_id, (breed, colour) in zip((7, 2, 5), COLOURS.items(), strict=True):
        for number in range(each):
            name = f"{breed}_{number}"
            write_photo(root / "oxford-iiit-pet/images" / f"{name}.jpg", 1000 * class_id + number, colour)
            lines.append(f"{name} {class_id} {1 + breed.islower()} 1")
    (root / "oxford-iiit-pet/annotations").mkdir(parents=True)
    (root / "oxford-iiit-pet/annotations/list.txt").write_text("\n".join(lines) + "\n")
    return root


def write_folders(parts: LabelledParts, folder: Path) -> Path:
    """Copy labelled images to folder/PART/CLASS/NAME, times of files included."""
    for part, images in parts.parts.items():
        for image in images:
            target = folder / part / parts.ids[image]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(os.path.join(parts.root, image), target)
    return folder
