"""One's own images: any tree of image files as a split of pre-training, and folders of classes as labelled parts.

    read_tree("photos").train.images                 # every image file below a folder but for a few that are held out
    read_class_folders("flowers").parts["test"]      # flowers/test/CLASS/*.jpg, or 15 % of flowers/CLASS/*.jpg

Class folders have the layout of torchvision's ImageFolder: train/, val/ and test/ with a folder for each class, or one tree
of class folders that is divided here. Photos are told apart by their bytes: a copy of a test photo is never trained on.
"""

import hashlib
import json
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DataError, require, seeded_rng, show_path
from engine import hash_file
from splits import (
    DRAW_OWN,
    DRAW_TRAIN_FRACTION,
    VALIDATION_SEED,
    DataNotFoundError,
    Split,
    draw_prefix,
    find_fault_of_name,
    list_split,
)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision
PARTS = ("train", "val", "test")
HELD_OUT_SHARE = 0.05  # of a tree of images; pre-training is validated on them
MOST_HELD_OUT = 1000
DIVISION_NUMBER = 701517  # of the draws that divide class folders
SMALLEST_CLASS = 3  # images: one for each part

# What is left out.
NO_IMAGE = "file(s) without the name of an image"
NO_FILE = "file(s) that lead nowhere or are pipes"
NO_NAME = "file(s) whose names are not UTF-8"
NO_CLASS = "file(s) in no class folder"
CLOSED = "folder(s) that cannot be opened"
CIRCLE = "link(s) to a folder that they lie in"


# ----------------------------------------------------------------------------------------------------------------------
# Any tree of images


@dataclass
class Tree:
    """The image files below a folder (paths relative to it, sorted folder by folder), and what is left out by reason."""

    images: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def remarks(self) -> list[str]:
        """Count what is left out and name the first of each kind."""
        found = self.left_out.items()
        return [f"left out: {len(paths):,} {what} (first {show_path(paths[0])})" for what, paths in found]


def list_tree(folder: str | Path) -> Tree:
    """List the image files below a folder, through symbolic links; hidden ones are passed over.

    Raises DataError if the folder does not exist or holds no image file.
    """
    root = Path(folder)
    name = f"--images {show_path(folder)}"
    if not root.exists():
        raise DataNotFoundError(f"{name} not found; name a folder of images")
    require(root.is_dir(), f"{name} is no folder; name a folder of images")
    tree = Tree()
    _list_folder(root, "", (), tree)
    endings = ", ".join(IMAGE_ENDINGS)
    found = "; ".join(tree.remarks())
    require(tree.images, f"{name} holds no image file ({endings}){'; ' if found else ''}{found}")
    return tree


def _list_folder(root: Path, inside: str, above: tuple[tuple[int, int], ...], tree: Tree) -> None:
    """Add what lies in the folder `inside` of a tree. above: the identities of the folders that it lies in."""
    try:
        stat = os.stat(root / inside)
        entries = sorted(os.scandir(root / inside), key=lambda entry: entry.name)
    except OSError:
        tree.left_out[CLOSED].append(inside or ".")
        return
    identity = (stat.st_dev, stat.st_ino)
    if identity in above:
        tree.left_out[CIRCLE].append(inside)
        return
    for entry in entries:
        path = f"{inside}/{entry.name}" if inside else entry.name
        if entry.name.startswith("."):
            continue
        if _is_true(entry.is_dir):
            _list_folder(root, path, (*above, identity), tree)
            continue
        fault = _find_fault(entry, path)
        if fault is None:
            tree.images.append(path)
        else:
            tree.left_out[fault].append(path)


def _find_fault(entry: os.DirEntry, path: str) -> str | None:
    """Say which kind of file is left out, or return None for an image."""
    if not entry.name.lower().endswith(IMAGE_ENDINGS):
        return NO_IMAGE
    if not _is_true(entry.is_file):
        return NO_FILE
    if find_fault_of_name(path) is not None:
        return NO_NAME
    return None


def _is_true(check: Callable[[], bool]) -> bool:
    """Ask something of a file; what cannot be asked, as of a link to itself, is not true."""
    try:
        return check()
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Copies


def find_copies(root: str | Path, parts: dict[str, Sequence[str]]) -> dict[str, str]:
    """Find images whose bytes are those of an image of a later part -> the path of each, and of the one it copies.

    Only files of equal size are read. What cannot be read has no copy.
    """
    sizes = {}
    for images in parts.values():
        for image in images:
            sizes[image] = _size_of(Path(root, image))
    counts = Counter(sizes.values())
    copies = {}
    later: dict[str, str] = {}  # hash -> an image of the parts behind this one
    for images in reversed(parts.values()):
        hashes = {}
        for image in images:
            if sizes[image] is not None and counts[sizes[image]] > 1:
                hashes[image] = _hash_of(Path(root, image))
        copies |= {image: later[key] for image, key in hashes.items() if key in later}
        later |= {key: image for image, key in hashes.items() if key is not None}
    return copies


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _hash_of(path: Path) -> str | None:
    try:
        return hash_file(path)
    except OSError:
        return None


def drop_copies(root: str | Path, parts: dict[str, Sequence[str]], remarks: list[str]) -> dict[str, list[str]]:
    """Leave out of each part the copies of images of later parts; add a remark that counts and names them."""
    copies = find_copies(root, parts)
    kept = {}
    for part, images in parts.items():
        kept[part] = [image for image in images if image not in copies]
        dropped = [image for image in images if image in copies]
        if dropped:
            first = f"first {show_path(dropped[0])}, the same as {show_path(copies[dropped[0]])}"
            photos = "1 photo" if len(dropped) == 1 else f"{len(dropped):,} photos"
            remarks.append(f"left out of {part}: {photos} of which a later part has a copy, byte for byte ({first})")
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# A split of pre-training


@dataclass(frozen=True)
class OwnImages:
    """What a pre-training on one's own images reads: training images, held-out images, and what is to be said of them."""

    train: Split
    held_out: Split
    remarks: tuple[str, ...]


def read_tree(folder: str | Path, num_images: int | None = None, split_seed: int = 0) -> OwnImages:
    """Select all images below a folder, or num_images that split_seed chooses, but for those held out for validation.

    Held out are 5 %, at most 1,000, the same for every seed. Raises DataError for fewer than two images.
    """
    tree = list_tree(folder)
    remarks = tree.remarks()
    count = len(tree.images)
    require(count > 1, f"--images {show_path(folder)} holds one image; one more is needed to validate on")
    num_held_out = min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * count)))
    held_out = set(draw_prefix(tree.images, num_held_out, "images", VALIDATION_SEED, DRAW_OWN))
    parts = {
        "the training images": [image for image in tree.images if image not in held_out],
        "the held-out images": [image for image in tree.images if image in held_out],
    }
    pool, kept = drop_copies(folder, parts, remarks).values()
    require(pool, f"--images {show_path(folder)} holds copies of one photo alone; another one is needed")
    if num_images is None:
        num_images = len(pool)
    images = draw_prefix(pool, num_images, "images", split_seed, DRAW_OWN)
    if Path(folder, "train").is_dir() and Path(folder, "test").is_dir():
        advice = f"--images {show_path(Path(folder, 'train'))} leaves them out"
        remarks.append(f"images of {show_path(Path(folder, 'test'))} are pre-trained on as well; {advice}")
    train = _own_split(images, {"split": "images", "num_images": num_images, "split_seed": split_seed})
    return OwnImages(train, _own_split(kept, {"split": "images held out"}), tuple(remarks))


def _own_split(images: Sequence[str], definition: dict) -> Split:
    return list_split(images, definition, {"photos": {}, "ids": list(images)})


def name_folder(folder: str | Path) -> str:
    """Name the data of a folder: the first line of its DATASET.txt, or its own name."""
    label = Path(folder, "DATASET.txt")
    if label.is_file():
        lines = label.read_text(errors="replace").splitlines()
        if lines:
            return lines[0]
    return f"images of {show_path(Path(os.path.abspath(folder)).name)}"


# ----------------------------------------------------------------------------------------------------------------------
# Labelled parts


class Label(NamedTuple):
    """What is known of an image: the name of its class, and its own name in test records."""

    class_name: str
    id: str


@dataclass(frozen=True)
class LabelledParts:
    """Labelled images, divided into train, val and test.

    root: the folder that paths are relative to. parts: paths, sorted by class and name. classes: their names, sorted.
    labels: path -> number of its class. ids: path -> its name in test records. remarks: what is to be said of them.
    """

    name: str
    root: str
    parts: dict[str, tuple[str, ...]]
    classes: tuple[str, ...]
    labels: dict[str, int]
    ids: dict[str, str]
    remarks: tuple[str, ...]
    photos: dict[str, int]  # how many photos there are of the study's data sets, see splits.name_data

    def labels_of(self, images: Iterable[str]) -> np.ndarray:
        """Look the classes of images up -> int64 [n]."""
        return np.array([self.labels[image] for image in images], np.int64)

    def split(self, part: str, train_fraction: float = 1.0, split_seed: int = 0) -> Split:
        """Make a split of a part; its labels are part of what is hashed.

        train_fraction: share of the training images, in (0, 1], that split_seed chooses; smaller ones lie in larger ones.
        """
        images = self.parts[part]
        definition = {"split": f"{self.name} {part}"}
        if part == "train" and train_fraction < 1:
            count = max(1, round(train_fraction * len(images)))
            images = draw_prefix(images, count, "training images", split_seed, DRAW_TRAIN_FRACTION)
            definition |= {"train_fraction": train_fraction, "split_seed": split_seed}
        named = [self.classes[self.labels[image]] for image in images]
        definition["labels"] = hashlib.sha256(json.dumps([self.classes, named]).encode()).hexdigest()
        facts = {"photos": self.photos, "num_classes": len(self.classes), "ids": [self.ids[image] for image in images]}
        return list_split(images, definition, facts)


def label_parts(
    name: str,
    root: str | Path,
    parts: dict[str, Sequence[str]],
    labels: dict[str, Label],
    remarks: Sequence[str] = (),
    photos: dict[str, int] | None = None,
) -> LabelledParts:
    """Number the classes of divided images, sort each part by class and name, and leave copies of later parts out.

    Raises DataError for fewer than two classes, for a class of fewer than three images and for a part without images.
    """
    where = show_path(root)
    counts = Counter(labels[image].class_name for images in parts.values() for image in images)
    require(len(counts) > 1, f"{where}: {len(counts)} class of images; two are needed to be told apart")
    _require_size(counts, where)
    classes = tuple(sorted(counts))
    remarks = list(remarks)
    ordered = {}
    for part, images in drop_copies(root, parts, remarks).items():
        why = ""
        if parts[part] and not images:
            why = f", for all of its images are copies of those of a later part ({remarks[-1]})"
        require(images, f"{where}: no image for the {part} part{why}")
        ordered[part] = tuple(sorted(images, key=labels.get))
        missing = sorted(set(classes) - {labels[image].class_name for image in images})
        if missing:
            remarks.append(f"{len(missing):,} class(es) without an image in {part} (first {show_path(missing[0])})")
    numbers = {class_name: number for number, class_name in enumerate(classes)}
    kept = [image for images in ordered.values() for image in images]
    return LabelledParts(
        name,
        str(root),
        ordered,
        classes,
        labels={image: numbers[labels[image].class_name] for image in kept},
        ids={image: labels[image].id for image in kept},
        remarks=tuple(remarks),
        photos=photos or {},
    )


def _require_size(counts: dict[str, int], where: str) -> None:
    """Raise DataError if a class has too few images to be divided."""
    small = sorted(name for name, count in counts.items() if count < SMALLEST_CLASS)
    if small:
        images = "1 image" if counts[small[0]] == 1 else f"{counts[small[0]]} images"
        problem = f"class {show_path(small[0])} has {images}"
        others = f" ({len(small)} classes have fewer than {SMALLEST_CLASS})" if len(small) > 1 else ""
        raise DataError(f"{where}: {problem}{others}; at least {SMALLEST_CLASS} are needed, one for each part")


def read_class_folders(folder: str | Path, division_seed: int = 0) -> LabelledParts:
    """Read class folders: train/, val/ and test/, or one tree that division_seed divides 70/15/15, class by class.

    Images may lie deeper than their class folder, as in torchvision's ImageFolder. Raises DataError where label_parts does.
    """
    tree = list_tree(folder)
    given = [part for part in PARTS if Path(folder, part).is_dir()]
    lacking = [part for part in PARTS if part not in given]
    if given and lacking:
        advice = "give all three, or class folders alone, which are divided here"
        raise DataError(f"--images {show_path(folder)} has {given[0]}/ but no {lacking[0]}/; {advice}")
    depth = 1 if given else 0  # of the class folders
    labels = {}
    for image in tree.images:
        *above, file = image.split("/", depth + 1)
        if len(above) > depth and (not given or above[0] in PARTS):
            labels[image] = Label(above[depth], f"{above[depth]}/{file}")
        else:
            tree.left_out[NO_CLASS].append(image)
    require(labels, f"--images {show_path(folder)} has no class folders with images; see torchvision's ImageFolder")
    if given:
        parts = {part: [image for image in labels if image.startswith(f"{part}/")] for part in PARTS}
        _require_known_classes(parts, labels, folder)
    else:
        parts = _divide(labels, folder, division_seed)
    return label_parts("classify", folder, parts, labels, tree.remarks())


def _require_known_classes(parts: dict[str, list[str]], labels: dict[str, Label], folder: str | Path) -> None:
    """Raise DataError if a class is to be validated or tested that no image is trained on."""
    trained = {labels[image].class_name for image in parts["train"]}
    for part, images in parts.items():
        unknown = sorted({labels[image].class_name for image in images} - trained)
        if unknown:
            place = show_path(Path(folder, part, unknown[0]))
            raise DataError(f"{place} is a class without images in train/; add some or take the folder away")


def _divide(labels: dict[str, Label], folder: str | Path, seed: int) -> dict[str, list[str]]:
    """Divide images 70/15/15, each class by a draw of its own, so that one more class changes no other."""
    members = defaultdict(list)
    for image, label in labels.items():
        members[label.class_name].append(image)
    _require_size({name: len(group) for name, group in members.items()}, show_path(folder))
    parts = {part: [] for part in PARTS}
    for name, group in members.items():
        order = seeded_rng(seed, DIVISION_NUMBER, zlib.crc32(name.encode())).permutation(len(group))
        drawn = [group[i] for i in order]
        count = max(1, len(group) * 15 // 100)
        parts["test"] += drawn[:count]
        parts["val"] += drawn[count : 2 * count]
        parts["train"] += drawn[2 * count :]
    return parts
