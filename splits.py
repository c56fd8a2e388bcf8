"""Which images: the COCO splits of pre-training and the Pets splits of fine-tuning, from the publishers' own annotations.

    python splits.py                                         # the names of all splits, one a line

select_split("data", "mixed", animal_fraction=0.3, split_seed=0) gives paths below "data", and a manifest. To add a split,
write one function that chooses images and name it in SPLITS. To use this file elsewhere, copy it together with data.py;
pycocotools is imported only where an annotation file is read for the first time.
"""

import contextlib
import hashlib
import inspect
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data import DataError, locked, require, seeded_rng, show_path

COCO_FOLDER = "coco"
PETS_FOLDER = "oxford-iiit-pet"
ANIMAL_IMAGES = ("per_category", "unique", "single")

# Second number of a draw's key, after the seed: draws with different numbers are independent.
DRAW_ANIMALS = 0
DRAW_OTHERS = 1
DRAW_PETS = 2
DRAW_ALL = 3
DRAW_TRAIN_FRACTION = 4
DRAW_OWN = 5

VALIDATION_SEED = 2017
PETS_PARTS_KEY = (0, 701515)  # the one draw of the 70/15/15 parts
LEAKING_PARTS_NUMBER = 701516  # of the draws of parts that overlap
MIN_PETS = 7  # fewer leave no image to validate on
PETS_PARTS = ("train", "val", "test")
PETS_LISTS = ("list.txt", "every_jpg")
PETS_DIVISIONS = ("disjoint", "leaking")


class DataNotFoundError(DataError):
    """A file of the data sets is missing."""


class TooFewImagesError(DataError):
    """The data holds fewer images than a split asks for."""


def _find_source(data_root: str | Path, path: str) -> Path:
    """Return the path of a file of the data sets; raise DataNotFoundError with advice if it is missing."""
    full = Path(data_root, path)
    if not full.is_file():
        flag = f"--data_root {shlex.quote(str(data_root))}"
        get = f"get the data with `python prepare.py download {flag}`"
        draw = f"draw some with `python prepare.py demo {flag}`"
        raise DataNotFoundError(f"{show_path(full)} not found; {get} or {draw}")
    return full


# ----------------------------------------------------------------------------------------------------------------------
# What a split is


@dataclass(frozen=True)
class Split:
    """A list of images (paths relative to the data root) and the record of what defines it."""

    name: str
    images: tuple[str, ...]
    manifest: dict

    @property
    def sha256(self) -> str:
        """Hash of the definition and the list."""
        return self.manifest["sha256"]

    @property
    def unique(self) -> int:
        """Number of different images."""
        return self.manifest["unique"]


class LabelledImage(NamedTuple):
    """What the annotations say of one image."""

    id: int | str
    labels: frozenset[str]  # names of the categories that it shows
    is_animal: bool


def _make_split(images: Sequence[str], definition: dict, coco: "CocoPart | None", pets: int = 0) -> Split:
    """Make a split of the images, which follow from the definition; the two are hashed together.

    coco: the part that COCO images among them belong to; None if all are pets. pets: how many pets there are, if known.
    """
    photos = {}
    if coco is not None:
        photos[coco.part] = len(coco.images)
    if pets:
        photos["pets"] = pets
    return list_split(images, definition, {"photos": photos, **_describe(images, coco)})


def list_split(images: Sequence[str], definition: dict, facts: dict) -> Split:
    """Make a split of any images; the definition, which names it, is hashed with them. facts: what else is recorded."""
    text = json.dumps([definition, list(images)], sort_keys=True, separators=(",", ":"))
    manifest = {
        "name": definition["split"],
        "definition": definition,
        "entries": len(images),
        "unique": len(set(images)),
        **facts,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return Split(definition["split"], tuple(images), manifest)


def _describe(images: Sequence[str], coco: "CocoPart | None") -> dict:
    """Count what a manifest states: ids in order; animal images, images of each category (each image once)."""
    labelled = {image: _look_up(image, coco) for image in images}
    animal_images = 0
    without_annotation = 0
    counts = Counter()
    for image in labelled.values():
        if image.is_animal:
            animal_images += 1
        if not image.labels:
            without_annotation += 1
        counts.update(image.labels)
    categories = coco.animals if coco is not None else ("cat", "dog")
    facts = {
        "ids": [labelled[image].id for image in images],
        "animal_images": animal_images,
        "categories": {name: counts[name] for name in categories},
    }
    if coco is not None:
        facts["without_annotation"] = without_annotation
        facts["person_share"] = round(counts["person"] / max(1, len(labelled)), 6)
    return facts


def _look_up(image: str, coco: "CocoPart | None") -> LabelledImage:
    """Find the labels of a COCO image or a pet; any other image has none."""
    if coco is not None and image in coco.images:
        return coco.images[image]
    name = PurePosixPath(image).stem
    if not image.startswith(f"{PETS_FOLDER}/"):
        return LabelledImage(name, frozenset(), False)
    # list.txt: "All images with 1st letter as capital are cat images"
    species = "cat" if name[:1].isupper() else "dog"
    return LabelledImage(name, frozenset([species]), True)


def draw_prefix(pool: Sequence[str], count: int, what: str, *key: int) -> list[str]:
    """Draw `count` entries of a pool: a prefix of its permutation, so that a smaller draw lies in a larger one.

    The permutation depends on the key (a seed and the number of the draw) and on the size of the pool. what: names the
    entries in the TooFewImagesError that is raised when there are not enough of them.
    """
    if count > len(pool):
        advice = "choose a smaller --num_images"
        raise TooFewImagesError(f"{count:,} {what} asked for, {len(pool):,} exist; {advice}")
    order = seeded_rng(*key).permutation(len(pool))
    return [pool[i] for i in order[:count]]


# ----------------------------------------------------------------------------------------------------------------------
# Reading COCO

# Fields of an instances file that are read; those that end in "id" are integers, the others text.
FIELDS = {
    "images": ("id", "file_name"),
    "annotations": ("id", "image_id", "category_id"),
    "categories": ("id", "name", "supercategory"),
}
UNIQUE_FIELDS = (
    ("images", "id"),
    ("images", "file_name"),
    ("annotations", "id"),
    ("categories", "id"),
    ("categories", "name"),
)
REFERENCES = (("images", "image_id"), ("categories", "category_id"))  # what a field of an annotation refers to


def _find_fault(dataset: object) -> str | None:
    """Name the first fault of a COCO instances file, or return None."""
    # The later checks rely on the earlier ones.
    for check in (_find_malformed, _find_duplicate, _find_unknown_reference, _find_bad_name):
        fault = check(dataset)
        if fault is not None:
            return fault
    return None


def _find_malformed(dataset: object) -> str | None:
    for part, fields in FIELDS.items():
        if not isinstance(dataset, dict) or not isinstance(dataset.get(part), list):
            return f"no list {part!r}, so not a COCO instances file"
        for number, entry in enumerate(dataset[part]):
            for field in fields:
                expected = int if field.endswith("id") else str
                if not isinstance(entry, dict) or type(entry.get(field)) is not expected:
                    return f"entry {number} of {part!r} lacks {field!r}, or it is malformed"
    return None


def _find_duplicate(dataset: dict) -> str | None:
    for part, field in UNIQUE_FIELDS:
        values = [entry[field] for entry in dataset[part]]
        if len(set(values)) == len(values):
            continue
        for value, count in Counter(values).items():
            if count > 1:
                return f"{field} {value!r} occurs {count} times in {part!r}"
    return None


def _find_unknown_reference(dataset: dict) -> str | None:
    for part, field in REFERENCES:
        known = {entry["id"] for entry in dataset[part]}
        for annotation in dataset["annotations"]:
            value = annotation[field]
            if value not in known:
                return f"annotation {annotation['id']} has unknown {field} {value}; it is not in {part!r}"
    return None


def _find_bad_name(dataset: dict) -> str | None:
    for entry in dataset["images"]:
        fault = find_fault_of_name(entry["file_name"])
        if fault is not None:
            return f"file_name {fault}"
    return None


def find_fault_of_name(name: str) -> str | None:
    """Say what is wrong with the name of an image file, or return None."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        return f"{str(path)!r} leads out of the image folder"
    has_surrogate = any("\ud800" <= letter <= "\udfff" for letter in str(path))
    if "\0" in str(path) or has_surrogate:
        return f"{str(path)!r} is no name of a file"
    return None


def _load_instances(path: Path) -> dict:
    """Load the needed fields of a COCO instances file; raise DataError if it is damaged."""
    wanted = set(FIELDS)
    for fields in FIELDS.values():
        wanted.update(fields)

    def keep_wanted(entry: dict) -> dict:  # drops polygons as they are read, which saves two thirds of the memory
        return {key: value for key, value in entry.items() if key in wanted}

    try:
        with open(path, encoding="utf-8") as file:
            dataset = json.load(file, object_hook=keep_wanted)
        fault = _find_fault(dataset)
    except (ValueError, RecursionError) as error:
        fault = f"not a JSON file ({error})"
    require(fault is None, f"{show_path(path)}: {fault}; fetch it again")
    return dataset


def _index_labels(dataset: dict) -> dict:
    """Index an instances file with pycocotools -> its categories, animals and images [id, name, category ids]."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    images = []
    for image_id in sorted(coco.imgs):
        labels = {annotation["category_id"] for annotation in coco.imgToAnns[image_id]}
        images.append([image_id, coco.imgs[image_id]["file_name"], sorted(labels)])
    return {
        "categories": [[category, coco.cats[category]["name"]] for category in sorted(coco.cats)],
        "animals": sorted(coco.getCatIds(supNms=["animal"])),
        "images": images,
    }


def _read_labels(path: Path, cache_dir: str | Path) -> dict:
    """Read the labels of a COCO instances file, from a digest in cache_dir where there is one.

    The annotations themselves (450 MB) take a quarter of a minute to read.
    """
    stat = path.stat()
    key = f"2 {os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape")
    digest = Path(os.path.abspath(cache_dir), f"annotations_{hashlib.sha256(key).hexdigest()[:16]}.json")
    labels = _read_digest(digest)  # without a lock, for it may be someone else's
    if labels is not None:
        return labels
    with locked(digest.with_suffix(".lock")):
        labels = _read_digest(digest)  # another process may have made it meanwhile
        if labels is None:
            labels = _index_labels(_load_instances(path))
            text = json.dumps(labels)
            digest.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return labels


def _read_digest(path: Path) -> dict | None:
    """Read a digest, a checksum and JSON; None if it is missing, or torn or damaged and so to be made again."""
    try:
        checksum, _, text = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        return None
    return json.loads(text)


class CocoPart:
    """The images of one COCO annotation file with their labels, divided into animal images and others.

    part: "train2017" or "val2017". categories: names of the categories that take the animals' place. exclude: names of
    categories whose images no list holds; their labels stay known.
    `.images`: path -> LabelledImage, in the order of their ids. `.animals`: names of the animal categories. `.categories`:
    names of all categories, in the order of their ids.
    Raises DataError if the file is missing or damaged, or if a category is unknown.
    """

    def __init__(
        self,
        data_root: str | Path,
        part: str,
        categories: Sequence[str] | None = None,
        cache_dir: str | Path = "cache",
        exclude: Sequence[str] | None = None,
    ):
        self.part = part
        path = _find_source(data_root, f"{COCO_FOLDER}/annotations/instances_{part}.json")
        content = _read_labels(path, cache_dir)
        names = dict(content["categories"])
        self.categories = list(names.values())
        for name in (*(categories or ()), *(exclude or ())):
            require(name in names.values(), f"unknown category {name!r}; valid: {', '.join(names.values())}")
        if categories:
            self.animals = [name for name in names.values() if name in categories]
        else:
            self.animals = [names[category] for category in content["animals"]]
        require(self.animals, f"{show_path(path)}: no super-category 'animal'; name some with --categories")
        self.images = {}
        for image_id, file_name, category_ids in content["images"]:
            labels = frozenset(names[category] for category in category_ids)
            is_animal = not labels.isdisjoint(self.animals)
            self.images[f"{COCO_FOLDER}/{part}/{file_name}"] = LabelledImage(image_id, labels, is_animal)
        self.listed = {}  # of the images, those that lists may hold
        for path, image in self.images.items():
            if image.labels.isdisjoint(exclude or ()):
                self.listed[path] = image

    @property
    def paths(self) -> list[str]:
        """All images, but for those that are excluded."""
        return list(self.listed)

    @property
    def others(self) -> list[str]:
        """Images that show no animal."""
        return [path for path, image in self.listed.items() if not image.is_animal]

    def images_with(self, category: str) -> list[str]:
        """List the images that show a category."""
        return [path for path, image in self.listed.items() if category in image.labels]

    def animal_entries(self, listing: str = "per_category") -> list[str]:
        """List the images that show animals.

        listing: "per_category" names an image once for each of its animal categories (the paper), "unique" once, "single"
        only if it has exactly one.
        """
        _check_listing(listing)
        entries = []
        if listing == "per_category":
            for category in self.animals:
                entries += self.images_with(category)
            return entries
        for path, image in self.listed.items():
            count = len(image.labels.intersection(self.animals))
            if count == 1 or (count > 1 and listing == "unique"):
                entries.append(path)
        return entries

    def labels_of(self, image: str) -> frozenset[str]:
        """Name the categories that an image shows; none for an image of another data set."""
        if image not in self.images:
            return frozenset()
        return self.images[image].labels

    def make_split(self, name: str, images: Sequence[str], definition: dict) -> Split:
        """Make a split of images of this part; `definition` states what it follows from besides the categories."""
        return _make_split(images, {"split": name, "categories": list(self.animals), **definition}, self)


def _check_listing(listing: str) -> None:
    valid = ", ".join(ANIMAL_IMAGES)
    require(listing in ANIMAL_IMAGES, f"--animal_images must be one of {valid}, got {listing!r}")


# ----------------------------------------------------------------------------------------------------------------------
# The splits of pre-training


@dataclass(frozen=True)
class Selection:
    """The options of a split.

    animal_fraction: share of animal entries, for split "mixed". num_images: default the number of animal entries, so that
    arms are matched ("all" and "pets": everything). animal_images: see CocoPart.animal_entries. categories: names of COCO
    categories that take the animals' place. split_seed: the only thing that the draws depend on. exclude_categories: names
    of COCO categories; images that show one of them are left out.
    """

    split: str
    animal_fraction: float | None = None
    num_images: int | None = None
    animal_images: str = "per_category"
    categories: Sequence[str] | None = None
    split_seed: int = 0
    exclude_categories: Sequence[str] | None = None


@dataclass(frozen=True)
class Source:
    """What a rule chooses from, and what is asked of it. Data sets are read when a rule first uses them."""

    data_root: str | Path
    selection: Selection
    cache_dir: str | Path = "cache"

    @cached_property
    def coco(self) -> CocoPart:
        """The training part of COCO."""
        selection = self.selection
        return CocoPart(self.data_root, "train2017", selection.categories, self.cache_dir, selection.exclude_categories)

    @cached_property
    def animals(self) -> list[str]:
        """Entries of the animal list, as --animal_images counts them."""
        return self.coco.animal_entries(self.selection.animal_images)

    @cached_property
    def pets(self) -> tuple[str, ...]:
        """The training images of Oxford-IIIT Pet."""
        return pets_split(self.data_root, "train").images

    @property
    def animal_fraction(self) -> float | None:
        """The share of animal entries asked for, or the split's own."""
        if self.selection.animal_fraction is None:
            return ANIMAL_FRACTIONS.get(self.selection.split)
        return self.selection.animal_fraction

    def count(self, default: int) -> int:
        """Return the number of entries asked for with --num_images, or the default."""
        if self.selection.num_images is None:
            return default
        return self.selection.num_images

    def matched_count(self) -> int:
        """Return the number of entries asked for, by default that of the animal list, which all arms are matched to."""
        return self.count(len(self.animals))

    def draw(self, pool: Sequence[str], count: int, what: str, number: int) -> list[str]:
        """Draw `count` entries of a pool with split_seed, as draw_prefix does.

        number: makes the draw independent of others; new rules take one from 6 on.
        """
        return draw_prefix(pool, count, what, self.selection.split_seed, number)

    def draw_animals(self, count: int) -> list[str]:
        """Draw entries of the animal list."""
        what = f"animal entries ({self.selection.animal_images})"
        return self.draw(self.animals, count, what, DRAW_ANIMALS)

    def draw_others(self, count: int) -> list[str]:
        """Draw images that show no animal."""
        return self.draw(self.coco.others, count, "non-animal images", DRAW_OTHERS)


def choose_animal(source: Source) -> list[str]:
    """Choose COCO images that show animals, an entry for each of their animal categories."""
    return source.draw_animals(source.matched_count())


def choose_non_animal(source: Source) -> list[str]:
    """Choose COCO images that show no animal, as many as there are animal entries."""
    return source.draw_others(source.matched_count())


def choose_mixed(source: Source) -> list[str]:
    """Choose animal entries and images that show no animal, by default half of each."""
    count = source.matched_count()
    num_animals = round(source.animal_fraction * count)
    return source.draw_animals(num_animals) + source.draw_others(count - num_animals)


def choose_all(source: Source) -> list[str]:
    """Choose all images of COCO's training part, shuffled."""
    pool = source.coco.paths
    return source.draw(pool, source.count(len(pool)), "images", DRAW_ALL)


def choose_pets(source: Source) -> list[str]:
    """Choose the images of Oxford-IIIT Pet that fine-tuning trains on."""
    return source.draw(source.pets, source.count(len(source.pets)), "Pets training images", DRAW_PETS)


# Name -> rule, a function from a Source to paths relative to the data root. To add a split, write a rule and name it here;
# the first line of its docstring describes it in `prepare.py splits`.
SPLITS: dict[str, Callable[[Source], list[str]]] = {
    "animal": choose_animal,
    "non_animal": choose_non_animal,
    "mixed": choose_mixed,
    "all": choose_all,
    "pets": choose_pets,
}
ANIMAL_FRACTIONS = {"animal": 1.0, "non_animal": 0.0, "mixed": 0.5}  # unless --animal_fraction says otherwise
TAKES_FRACTION = {"mixed"}  # the rules that read animal_fraction; all others refuse another value


def split_names() -> list[str]:
    """List the names of all splits."""
    return list(SPLITS)


def describe_rule(name: str) -> str:
    """Return the first line of a rule's docstring; empty if it has none."""
    text = inspect.getdoc(SPLITS[name])
    if not text:
        return ""
    return text.splitlines()[0]


def select_split(data_root: str | Path, split: str, *, cache_dir: str | Path = "cache", **options: object) -> Split:
    """Select pre-training images with the rule of a name in SPLITS. Larger selections contain smaller ones.

    options: the other fields of Selection. Raises DataError for a wrong request, DataNotFoundError if a data set that the
    rule reads is missing, TooFewImagesError if it holds too few images.
    """
    selection = Selection(split, **options)
    _check_selection(selection)
    source = Source(data_root, selection, cache_dir)
    images = list(SPLITS[split](source))
    if not images:
        advice = "choose another split or other --categories"
        raise TooFewImagesError(f"no image of the data belongs to --split {split}; {advice}")
    coco = None
    if any(image.startswith(f"{COCO_FOLDER}/") for image in images):
        coco = source.coco
    return _make_split(images, _define(source, images, coco), coco)


def _check_selection(selection: Selection) -> None:
    """Raise DataError if a selection asks for what cannot be."""
    split = selection.split
    fraction = selection.animal_fraction
    require(split in SPLITS, f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    if fraction is not None and split not in TAKES_FRACTION:
        own = ANIMAL_FRACTIONS.get(split)
        advice = f"use --split {' or '.join(sorted(TAKES_FRACTION))}"
        require(fraction == own, f"--animal_fraction {fraction} contradicts --split {split}; {advice}")
    if fraction is not None:
        require(0 <= fraction <= 1, f"--animal_fraction must lie in [0, 1], got {fraction}")
    count = selection.num_images
    if count is not None:
        require(count >= 1, f"--num_images must be at least 1, got {count}")
    _check_listing(selection.animal_images)


def _define(source: Source, images: Sequence[str], coco: CocoPart | None) -> dict:
    """State what a selection follows from; COCO's options only where the list holds COCO images."""
    selection = source.selection
    if coco is None:
        return {"split": selection.split, "num_images": len(images), "split_seed": selection.split_seed}
    definition = {
        "split": selection.split,
        "categories": list(coco.animals),
        "animal_images": selection.animal_images,
        "split_seed": selection.split_seed,
        "num_images": len(images),
    }
    if source.animal_fraction is not None:
        definition["animal_fraction"] = source.animal_fraction
    if selection.exclude_categories:
        definition["exclude_categories"] = sorted(selection.exclude_categories)
    return definition


def keep_labelled(split: Split, coco: CocoPart) -> Split:
    """Leave out the images of a split without a label of COCO; the manifest names them under "unlabelled".

    Raises TooFewImagesError if no image is left.
    """
    kept = []
    left_out = {}
    for image in split.images:
        if coco.labels_of(image):
            kept.append(image)
        else:
            left_out[image] = None
    if not kept:
        problem = f"none of the {len(split.images):,} images of the split {split.name} has a label of COCO"
        raise TooFewImagesError(f"{problem}; choose a --split of COCO, such as animal")
    labelled = _make_split(kept, {**split.manifest["definition"], "labelled": True}, coco)
    return replace(labelled, manifest={**labelled.manifest, "unlabelled": list(left_out)})


def reference_size(data_root: str | Path, **options: object) -> int:
    """Count the entries of the animal list, the epoch that all arms are matched to (takes select_split's keywords).

    Images that an arm leaves out shorten its list, not its epoch.
    """
    options["num_images"] = None
    options["exclude_categories"] = None
    return len(select_split(data_root, "animal", **options).images)


def mae_validation(
    data_root: str | Path, *, categories: Sequence[str] | None = None, cache_dir: str | Path = "cache"
) -> dict[str, Split]:
    """Select unique animal and as many non-animal images of val2017, the same for every seed and arm."""
    coco = CocoPart(data_root, "val2017", categories, cache_dir)
    animals = coco.animal_entries("unique")
    others = coco.others
    count = min(len(animals), len(others))
    require(count > 0, f"{show_path(data_root)}: val2017 needs images with and without the chosen categories")
    definition = {"part": "val2017", "num_images": count}
    validation = {}
    for name, pool, number in (("animal", animals, DRAW_ANIMALS), ("non_animal", others, DRAW_OTHERS)):
        chosen = set(draw_prefix(pool, count, name, VALIDATION_SEED, number))
        images = [path for path in pool if path in chosen]  # in the order of their ids
        validation[name] = coco.make_split(name, images, definition)
    return validation


# ----------------------------------------------------------------------------------------------------------------------
# The splits of fine-tuning


class PetEntry(NamedTuple):
    """One image of Oxford-IIIT Pet, as list.txt describes it."""

    name: str  # of the image file, without its extension
    class_id: int  # breed, 1 to 37
    species: int  # 1 cat, 2 dog
    breed_id: int  # within the species


def read_pets_list(data_root: str | Path) -> list[PetEntry]:
    """Read list.txt of Oxford-IIIT Pet, in its order. Raises DataError if it is missing or damaged."""
    path = _find_source(data_root, f"{PETS_FOLDER}/annotations/list.txt")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, class_id, species, breed_id = line.rsplit(maxsplit=3)
            entries.append(PetEntry(name, int(class_id), int(species), int(breed_id)))
        except ValueError:
            layout = "a name and three numbers"
            raise DataError(f"{show_path(path)}: line {number} must hold {layout}; fetch it again") from None
        fault = find_fault_of_name(name)
        require(fault is None, f"{show_path(path)}: the name in line {number}, {fault}; fetch it again")
    names = {entry.name for entry in entries}
    good = len(entries) >= MIN_PETS and len(names) == len(entries)
    require(good, f"{show_path(path)} must name at least {MIN_PETS} images, each once; fetch it again")
    return entries


def has_pets(data_root: str | Path) -> bool:
    """Tell whether there is a list of Oxford-IIIT Pet."""
    return Path(data_root, PETS_FOLDER, "annotations/list.txt").is_file()


def pets_breeds(data_root: str | Path) -> dict[str, int]:
    """Number the breeds of list.txt from 0 on, in the order of their class ids -> breed of each image, by its path."""
    entries = read_pets_list(data_root)
    class_ids = sorted({entry.class_id for entry in entries})
    return {f"{PETS_FOLDER}/images/{entry.name}.jpg": class_ids.index(entry.class_id) for entry in entries}


@dataclass(frozen=True)
class PetsSource:
    """Which photos of Oxford-IIIT Pet are divided, and how.

    listing: "list.txt", the publisher's list, or "every_jpg", each .jpg file in the folder of images, as the study's code.
    division: "disjoint", one draw for every seed, or "leaking": the list is shuffled anew for each part, as the study's
    code does for its Masked Autoencoders, so that 70 % of the test images are trained on.
    """

    listing: str = "list.txt"
    division: str = "disjoint"

    def definition(self) -> dict:
        """State what differs from the default, for the manifest."""
        stated = {}
        if self.listing != "list.txt":
            stated["listing"] = self.listing
        if self.division != "disjoint":
            stated["division"] = self.division
        return stated

    def names(self, data_root: str | Path) -> list[str]:
        """List the names of the photos without their extension, sorted."""
        if self.listing == "list.txt":
            return sorted(entry.name for entry in read_pets_list(data_root))
        folder = Path(data_root, PETS_FOLDER, "images")
        if not folder.is_dir():
            raise DataNotFoundError(f"{show_path(folder)} not found; get it with `python prepare.py download`")
        names = sorted(path.stem for path in folder.glob("[!.]*.jpg"))
        require(len(names) >= MIN_PETS, f"{show_path(folder)} must hold at least {MIN_PETS} .jpg files")
        return names

    def shuffled(self, names: list[str], part: str, split_seed: int) -> list[str]:
        """Shuffle the names as a part is cut from them."""
        if self.division == "disjoint":
            return draw_prefix(names, len(names), "images", *PETS_PARTS_KEY)
        if part == "test":  # the study's code seeds this one alone
            split_seed = 0
        return draw_prefix(names, len(names), "images", split_seed, LEAKING_PARTS_NUMBER, PETS_PARTS.index(part))


def pets_split(
    data_root: str | Path,
    part: str,
    *,
    train_fraction: float = 1.0,
    split_seed: int = 0,
    source: PetsSource = PetsSource(),
) -> Split:
    """Select part "train", "val" or "test" of the random 70/15/15 division of Oxford-IIIT Pet.

    train_fraction: share of the training images, in (0, 1], that split_seed chooses; smaller ones lie in larger ones.
    source: which photos are divided, and how; by default the one fixed draw over the images of list.txt.
    """
    require(part in PETS_PARTS, f"part must be train, val or test, got {part!r}")
    require(0 < train_fraction <= 1, f"--train_fraction must lie in (0, 1], got {train_fraction}")
    names = source.shuffled(source.names(data_root), part, split_seed)
    val_start = len(names) * 70 // 100
    test_start = val_start + len(names) * 15 // 100
    parts = {"train": names[:val_start], "val": names[val_start:test_start], "test": names[test_start:]}
    chosen = parts[part]
    definition = {"split": f"pets {part}", **source.definition()}
    if source.division == "leaking" and part != "test":
        definition["split_seed"] = split_seed
    if part == "train" and train_fraction < 1:
        count = max(1, round(train_fraction * len(chosen)))
        chosen = draw_prefix(chosen, count, "training images", split_seed, DRAW_TRAIN_FRACTION)
        definition["train_fraction"] = train_fraction
        definition["split_seed"] = split_seed
    images = [f"{PETS_FOLDER}/images/{name}.jpg" for name in chosen]
    return _make_split(images, definition, None, len(names))


# ----------------------------------------------------------------------------------------------------------------------
# Which data it is

PUBLISHED = {"train2017": 118_287, "val2017": 5_000, "pets": 7_349}  # photos of each part


def name_data(photos: dict[str, int]) -> str:
    """Name data sets by how many photos of each part they hold, beside the publishers' numbers where these differ."""
    coco = {part: count for part, count in photos.items() if part != "pets"}
    names = []
    if coco:
        published = sum(PUBLISHED[part] for part in coco)
        names.append(_name_part(sum(coco.values()), published, "MS COCO 2017", "COCO photos"))
    if "pets" in photos:
        names.append(_name_part(photos["pets"], PUBLISHED["pets"], "Oxford-IIIT Pet", "pets"))
    complete = all(name[0].isupper() for name in names)
    return (" and " if complete else ", ").join(names) or "unknown data"


def _name_part(count: int, published: int, name: str, noun: str) -> str:
    """Name a data set that is complete; count the photos of any other."""
    if count == published:
        return name
    return f"{count:,} {noun} of {published:,}"


if __name__ == "__main__":
    print("\n".join(split_names()))
