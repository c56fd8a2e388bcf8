"""Which images: the COCO splits of pre-training and the Pets splits of fine-tuning, from the publishers' own annotations.

select_split("data", "mixed", animal_fraction=0.3, split_seed=0) gives paths below "data", and a manifest. Copy this file
together with data.py; pycocotools is imported only where an annotation file is read for the first time.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data import locked, require, seeded_rng, show_path

SPLITS = ("animal", "non_animal", "mixed", "all", "pets")
OWN_SIZE = ("all", "pets")
ANIMAL_IMAGES = ("per_category", "unique", "single")
KEYS = {"images": ("id", "file_name"), "annotations": ("id", "image_id", "category_id"),
        "categories": ("id", "name", "supercategory")}  # fmt: skip


def _open_source(data_root, path: str) -> Path:
    """Check that a file of the data sets exists, and return its path."""
    full, flag = Path(data_root, path), f"--data_root {shlex.quote(str(data_root))}"
    ways = f"get the data with `python prepare.py download {flag}` or draw some with `python prepare.py demo {flag}`"
    require(full.is_file(), f"{show_path(full)} not found; {ways}")
    return full


def _faults(dataset) -> Iterator[str]:
    """Name what is wrong with a COCO instances file; only the first one is to be trusted."""
    for part, keys in KEYS.items():
        if not isinstance(dataset, dict) or not isinstance(dataset.get(part), list):
            yield f"no list {part!r}, so not a COCO instances file"
        for number, entry in enumerate(dataset[part]):
            kinds = ((key, int if key.endswith("id") else str) for key in keys)
            lost = [key for key, kind in kinds if not isinstance(entry, dict) or type(entry.get(key)) is not kind]
            yield from (f"entry {number} of {part!r} lacks {key!r}, or it is malformed" for key in lost)
    for part, keys in KEYS.items():
        for key in (key for key in keys if key in ("id", "file_name") or (part == "categories" and key == "name")):
            values = [entry[key] for entry in dataset[part]]
            counts = Counter(values) if len(set(values)) < len(values) else {}
            yield from (f"{key} {value!r} occurs {n} times in {part!r}" for value, n in counts.items() if n > 1)
    for part, key in (("images", "image_id"), ("categories", "category_id")):
        known = {entry["id"] for entry in dataset[part]}
        unknown = (a for a in dataset["annotations"] if a[key] not in known)
        yield from (f"annotation {a['id']} has unknown {key} {a[key]}; it is not in {part!r}" for a in unknown)
    for path in (PurePosixPath(entry["file_name"]) for entry in dataset["images"]):
        if path.is_absolute() or ".." in path.parts or not path.name:
            yield f"file_name {str(path)!r} leads out of the image folder"
        if "\0" in str(path) or any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            yield f"file_name {str(path)!r} is no name of a file"


def _read_labels(path: Path, cache_dir) -> dict:
    """Read a COCO instances file through pycocotools -> its categories, animals and images [id, name, categories].

    This is kept in a small file: the annotations themselves (450 MB) take a quarter of a minute to read.
    """
    stat = path.stat()
    key = f"1 {os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape")
    kept = Path(os.path.abspath(cache_dir), f"annotations_{hashlib.sha256(key).hexdigest()[:16]}.json")
    with locked(kept.with_suffix(".lock")):
        with contextlib.suppress(ValueError, FileNotFoundError):  # a torn one is made again
            return json.loads(kept.read_text())
        from pycocotools.coco import COCO

        wanted, coco = {*KEYS, *itertools.chain(*KEYS.values())}, COCO()
        try:
            with open(path, encoding="utf-8") as f:  # the hook drops polygons as they are read: a third of the memory
                coco.dataset = json.load(f, object_hook=lambda entry: {k: v for k, v in entry.items() if k in wanted})
            fault = next(_faults(coco.dataset), None)
        except (ValueError, RecursionError) as error:
            fault = f"not a JSON file ({error})"
        require(not fault, f"{show_path(path)}: {fault}; fetch it again")
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        labels = {image: sorted({a["category_id"] for a in coco.imgToAnns[image]}) for image in sorted(coco.imgs)}
        content = {"categories": [[c, coco.cats[c]["name"]] for c in sorted(coco.cats)],
                   "animals": sorted(coco.getCatIds(supNms=["animal"])),
                   "images": [[image, coco.imgs[image]["file_name"], found] for image, found in labels.items()]}  # fmt: skip
        kept.write_text(json.dumps(content))
    return content


@dataclass(frozen=True)
class Split:
    """A list of images (paths relative to the data root) and the record of what defines it."""

    name: str
    images: tuple[str, ...]
    manifest: dict
    sha256 = property(lambda self: self.manifest["sha256"])
    unique = property(lambda self: self.manifest["unique"])


def _make_split(images: list[str], definition: dict, **facts) -> Split:
    if not facts:  # pets; list.txt: "All images with 1st letter as capital are cat images"
        ids = [PurePosixPath(image).stem for image in images]
        cats = sum(i[:1].isupper() for i in ids)
        facts = {"ids": ids, "animal_images": len(ids), "categories": {"cat": cats, "dog": len(ids) - cats}}
    name, text = definition["split"], json.dumps([definition, images], sort_keys=True, separators=(",", ":"))
    manifest = {"name": name, "definition": definition, "entries": len(images), "unique": len(set(images)), **facts}
    return Split(name, tuple(images), manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()})


class _Coco:
    """One COCO annotation file: animal and other images as positions, and what a manifest needs to know of them."""

    def __init__(self, data_root, part: str, categories: Sequence[str] | None, cache_dir):
        path = _open_source(data_root, f"coco/annotations/instances_{part}.json")
        found = _read_labels(path, cache_dir)
        self.names = dict(found["categories"])
        for name in categories or ():
            require(name in self.names.values(), f"unknown category {name!r}; valid: {', '.join(self.names.values())}")
        self.animals = [c for c, name in self.names.items() if name in categories] if categories else found["animals"]
        require(self.animals, f"{show_path(path)}: no super-category 'animal'; name some with --categories")
        self.ids = [image for image, _, _ in found["images"]]
        self.paths = [f"coco/{part}/{name}" for _, name, _ in found["images"]]
        self.labels = [frozenset(labels) for _, _, labels in found["images"]]
        self.hits = [len(found.intersection(self.animals)) for found in self.labels]
        self.others = [i for i, hits in enumerate(self.hits) if not hits]

    def animal_list(self, rule: str) -> list[int]:
        require(rule in ANIMAL_IMAGES, f"--animal_images must be one of {', '.join(ANIMAL_IMAGES)}, got {rule!r}")
        if rule == "per_category":
            return [i for c in self.animals for i, found in enumerate(self.labels) if c in found]
        return [i for i, hits in enumerate(self.hits) if (hits == 1 if rule == "single" else hits)]

    def split(self, name: str, entries: Sequence[int], definition: dict) -> Split:
        unique, categories = set(entries), [self.names[c] for c in self.animals]
        counts = Counter(self.names[c] for i in unique for c in self.labels[i])  # an image has each label once
        definition = {"split": name, "categories": categories, **definition}
        return _make_split([self.paths[i] for i in entries], definition, ids=[self.ids[i] for i in entries],
            animal_images=sum(self.hits[i] > 0 for i in unique), categories={c: counts[c] for c in categories},
            without_annotation=sum(not self.labels[i] for i in unique),
            person_share=round(counts["person"] / max(1, len(unique)), 6))  # fmt: skip


def _first(pool: Sequence, count: int, what: str, *key: int) -> list:
    """Take a prefix of the pool's fixed permutation: smaller counts are contained in larger ones."""
    require(count <= len(pool), f"{count:,} {what} asked for, {len(pool):,} exist; choose a smaller --num_images")
    return [pool[i] for i in seeded_rng(*key).permutation(len(pool))[:count]]


def select_split(data_root, split: str, *, animal_fraction: float | None = None, num_images: int | None = None,
                 animal_images: str = "per_category", categories: Sequence[str] | None = None, split_seed: int = 0,
                 cache_dir="cache") -> Split:  # fmt: skip
    """Select pre-training images. Doses nest: they are prefixes of two permutations that depend on split_seed alone.

    animal_fraction: share of animal entries, for split "mixed". num_images: default the size of the animal list, so that
    arms are matched ("all" and "pets": everything). animal_images: per_category lists an image once for each of its
    animal categories (the paper), unique once, single only if it has exactly one. categories: take the animals' place.
    """
    implied = {"animal": 1.0, "mixed": 0.5, "non_animal": 0.0}.get(split)
    fraction = implied if animal_fraction is None else animal_fraction
    require(split in SPLITS, f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    advice = f"contradicts --split {split}; use --split mixed"
    require(split == "mixed" or fraction == implied, f"--animal_fraction {fraction} {advice}")
    require(fraction is None or 0 <= fraction <= 1, f"--animal_fraction must lie in [0, 1], got {animal_fraction}")
    require(num_images is None or num_images >= 1, f"--num_images must be at least 1, got {num_images}")
    if split == "pets":
        pool = pets_split(data_root, "train").images
        images = _first(pool, num_images or len(pool), "Pets training images", split_seed, 2)
        return _make_split(images, {"split": "pets", "num_images": len(images), "split_seed": split_seed})
    coco = _Coco(data_root, "train2017", categories, cache_dir)
    animals = coco.animal_list(animal_images)
    count = num_images or len(coco.ids if split == "all" else animals)
    definition = {"animal_images": animal_images, "split_seed": split_seed, "num_images": count}
    if split == "all":
        return coco.split(split, _first(range(len(coco.ids)), count, "images", split_seed, 3), definition)
    dose = round(fraction * count)
    entries = _first(animals, dose, f"animal entries ({animal_images})", split_seed, 0)
    entries += _first(coco.others, count - dose, "non-animal images", split_seed, 1)
    return coco.split(split, entries, definition | {"animal_fraction": fraction})


def reference_size(data_root, **options) -> int:
    """Count the animal list's entries: the epoch that all arms are matched to (takes select_split's keywords)."""
    return len(select_split(data_root, "animal", **options | {"num_images": None}).images)


def mae_validation(data_root, *, categories: Sequence[str] | None = None, cache_dir="cache") -> dict[str, Split]:
    """Select unique animal and as many non-animal images of val2017, the same for every seed and arm."""
    coco = _Coco(data_root, "val2017", categories, cache_dir)
    pools = {"animal": coco.animal_list("unique"), "non_animal": coco.others}
    count = min(map(len, pools.values()))
    require(count, f"{show_path(data_root)}: val2017 needs images with and without the chosen categories")
    return {name: coco.split(name, sorted(_first(pool, count, name, 2017, k)), {"part": "val2017", "num_images": count})
            for k, (name, pool) in enumerate(pools.items())}  # fmt: skip


def pets_split(data_root, part: str, *, train_fraction: float = 1.0, split_seed: int = 0) -> Split:
    """Select part "train", "val" or "test" of the one fixed random 70/15/15 draw over the images of list.txt.

    train_fraction: share of the training images, in (0, 1], that split_seed chooses; smaller ones lie in larger ones.
    """
    path = _open_source(data_root, "oxford-iiit-pet/annotations/list.txt")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    names = sorted(line.rsplit(maxsplit=3)[0] for line in lines if line.strip() and not line.startswith("#"))
    good = 7 <= len(names) == len(set(names))  # fewer leave no image to validate on
    require(good, f"{show_path(path)} must name at least 7 images, each once; fetch it again")
    require(0 < train_fraction <= 1, f"--train_fraction must lie in (0, 1], got {train_fraction}")
    names = _first(names, len(names), "images", 0, 701515)
    train, val = len(names) * 70 // 100, len(names) * 15 // 100
    parts = {"train": names[:train], "val": names[train : train + val], "test": names[train + val :]}
    require(part in parts, f"part must be train, val or test, got {part!r}")
    chosen, definition = parts[part], {"split": f"pets {part}"}
    if part == "train" and train_fraction < 1:
        chosen = _first(chosen, max(1, round(train_fraction * len(chosen))), "training images", split_seed, 4)
        definition |= {"train_fraction": train_fraction, "split_seed": split_seed}
    return _make_split([f"oxford-iiit-pet/images/{name}.jpg" for name in chosen], definition)


def split_names():
    return list(SPLITS)
