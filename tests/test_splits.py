"""Splits: exact counts, matched sizes, nested doses, manifests, and what a wrong request is told."""

import gzip
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faults import allow_writing, forbid_writing, open_folder, without_rights
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import drawn_root, needs_photos

import data
import splits

QUIET = settings(deadline=None, database=None, max_examples=40)
CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 16, "name": "bird", "supercategory": "animal"},
    {"id": 17, "name": "cat", "supercategory": "animal"},
    {"id": 44, "name": "bottle", "supercategory": "kitchen"},
]


def write_annotations(root: Path, part: str, labels: list[list[int]], **change) -> Path:
    images = [{"id": i + 1, "file_name": f"{i + 1:012d}.jpg", "width": 9, "height": 9} for i in range(len(labels))]
    pairs = [(i + 1, c) for i, found in enumerate(labels) for c in found]
    annotations = [
        {
            "id": k,
            "image_id": i,
            "category_id": c,
            "iscrowd": k % 2,
            "bbox": [0, 0, 9, 9],
            "segmentation": [[0, 0, 9, 9]],
        }
        for k, (i, c) in enumerate(pairs)
    ]
    dataset = {"images": images, "annotations": annotations, "categories": CATEGORIES} | change
    path = root / "coco" / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataset))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """30 images with one animal, 10 with two, 60 with none, 20 of these without any annotation."""
    root = tmp_path_factory.mktemp("toy")
    labels = [[16]] * 10 + [[17, 1]] * 20 + [[16, 17]] * 10 + [[1]] * 20 + [[44, 44]] * 20 + [[]] * 20
    write_annotations(root, "train2017", labels)
    write_annotations(root, "val2017", labels[::5])
    lines = ["#Image CLASS-ID SPECIES BREED ID", *(f"{'Cat' if i % 2 else 'dog'}_{i} 1 1 1" for i in range(101))]
    path = root / "oxford-iiit-pet" / "annotations" / "list.txt"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")
    return root, root / "cache"


def select(toy, split, **options):
    return splits.select_split(toy[0], split, cache_dir=toy[1], **options)


def numbers(split) -> list[int]:
    return [int(Path(image).stem) for image in split.images]


def test_the_three_ways_of_listing_animals_count_as_defined(toy):
    sizes = {rule: len(select(toy, "animal", animal_images=rule).images) for rule in splits.ANIMAL_IMAGES}
    assert sizes == {"per_category": 50, "unique": 40, "single": 30}
    split = select(toy, "animal")
    assert split.unique == 40 and split.manifest["categories"] == {"bird": 20, "cat": 30}
    assert split.manifest["person_share"] == 0.5 and split.manifest["entries"] == 50


@QUIET
@given(
    fraction=st.floats(0, 1),
    rule=st.sampled_from(splits.ANIMAL_IMAGES),
    seed=st.integers(0, 2**40),
    count=st.integers(1, 30),
)
def test_arms_are_equal_in_size_and_doses_nest(toy, fraction, rule, seed, count):
    for size in (None, count):
        options = {"animal_images": rule, "split_seed": seed, "num_images": size}
        animal, other = select(toy, "animal", **options), select(toy, "non_animal", **options)
        mixed = select(toy, "mixed", animal_fraction=fraction, **options)
        assert len({len(s.images) for s in (animal, other, mixed)}) == 1
        assert not set(animal.images) & set(other.images) and max(numbers(animal)) <= 40 < min(numbers(other))
        dose = round(fraction * len(mixed.images))
        assert mixed.images == animal.images[:dose] + other.images[: len(mixed.images) - dose]  # prefixes: they nest
        assert len(set(other.images)) == len(other.images)
        assert (
            splits.reference_size(toy[0], cache_dir=toy[1], **options)
            == {"per_category": 50, "unique": 40, "single": 30}[rule]
        )


def test_selection_and_hash_depend_on_the_split_seed_alone(toy, tmp_path):
    for split in ("animal", "non_animal", "mixed", "all", "pets"):
        first, again, other = (select(toy, split, split_seed=s) for s in (1, 1, 2))
        fresh = splits.select_split(toy[0], split, split_seed=1, cache_dir=tmp_path / "not made yet.d")
        assert first == again == fresh and first.sha256 != other.sha256 and first.images != other.images
        assert len(first.sha256) == 64 and json.loads(json.dumps(first.manifest)) == first.manifest


def test_all_holds_every_image_also_those_without_annotation(toy):
    split = select(toy, "all")
    assert sorted(numbers(split)) == list(range(1, 101)) and split.manifest["without_annotation"] == 20


def test_categories_take_the_place_of_the_animals(toy):
    bottles, rest = (select(toy, s, categories=["bottle"], num_images=20) for s in ("animal", "non_animal"))
    assert sorted(numbers(bottles)) == list(range(61, 81)) and not set(numbers(rest)) & set(numbers(bottles))
    assert splits.reference_size(toy[0], categories=["person"], cache_dir=toy[1]) == 40


def test_pets_are_one_fixed_draw_that_no_seed_changes_and_fractions_nest(toy):
    parts = [splits.pets_split(toy[0], part) for part in ("train", "val", "test")]
    assert [len(p.images) for p in parts] == [70, 15, 16]
    assert len(set().union(*(p.images for p in parts))) == 101
    assert splits.pets_split(toy[0], "train", split_seed=5) == parts[0]
    assert set(select(toy, "pets").images) == set(parts[0].images)
    half, tenth = (splits.pets_split(toy[0], "train", train_fraction=f, split_seed=3) for f in (0.5, 0.1))
    assert half.images[:7] == tenth.images and len(half.images) == 35 and set(half.images) < set(parts[0].images)
    assert splits.pets_split(toy[0], "train", train_fraction=0.5, split_seed=4).images != half.images
    assert data.trimap_path(parts[0].images[0]).endswith(Path(parts[0].images[0]).stem + ".png")


def test_validation_is_equal_in_size_and_without_repeats(toy):
    parts = splits.mae_validation(toy[0], cache_dir=toy[1])
    assert {name: len(set(s.images)) for name, s in parts.items()} == {"animal": 8, "non_animal": 8}
    assert all(image.startswith("coco/val2017/") for s in parts.values() for image in s.images)


@pytest.mark.parametrize(
    "split, options, words",
    [
        ("birds", {}, "--split must be one of animal"),
        ("mixed", {"animal_fraction": 1.5}, r"\[0, 1\], got 1.5"),
        ("mixed", {"animal_fraction": float("nan")}, "got nan"),
        ("animal", {"animal_fraction": 0.3}, "--split mixed"),
        ("pets", {"animal_fraction": 1.0}, "--split mixed"),
        ("animal", {"num_images": 51}, "51 .* 50 exist"),
        ("non_animal", {"num_images": 61}, "61 .* 60 exist"),
        ("all", {"num_images": 101}, "100 exist"),
        ("pets", {"num_images": 71}, "70 exist"),
        ("animal", {"num_images": 0}, "at least 1"),
        ("animal", {"categories": ["cat", "dogg"]}, "unknown category 'dogg'; valid: person, bird"),
        ("animal", {"animal_images": "twice"}, "per_category, unique, single"),
        ("animal", {"split_seed": -1}, "0 or more"),
    ],
)
def test_a_wrong_request_is_told_what_is_valid(toy, split, options, words):
    with pytest.raises(data.DataError, match=words) as error:
        select(toy, split, **options)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_wrong_fractions_parts_and_lists_of_pets_are_refused(toy, tmp_path):
    for call in (dict(part="train", train_fraction=0), dict(part="train", train_fraction=1.1), dict(part="dev")):
        with pytest.raises(data.DataError):
            splits.pets_split(toy[0], **call)
    path = tmp_path / "oxford-iiit-pet" / "annotations" / "list.txt"
    path.parent.mkdir(parents=True)
    path.write_text("a 1 1 1\nb 1 1 1\na 1 1 1\n")
    with pytest.raises(data.DataError, match="each once"):
        splits.pets_split(tmp_path, "train")


def test_missing_data_says_which_command_gets_it(tmp_path):
    root = tmp_path / "my data"
    for call in (
        lambda: splits.select_split(root, "animal", cache_dir=tmp_path),
        lambda: splits.pets_split(root, "val"),
    ):
        with pytest.raises(data.DataError, match=r"prepare.py download --data_root '.*my data'.*prepare.py demo"):
            call()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"images": None}, "no list 'images'"),
        ({"annotations": {}}, "no list 'annotations'"),
        ({"images": [{"id": 1}]}, "entry 0 of 'images' lacks 'file_name'"),
        ({"annotations": [{"id": 1, "image_id": 1}]}, "lacks 'category_id'"),
        ({"categories": [{"id": 1, "name": "cat"}]}, "lacks 'supercategory'"),
        ({"annotations": [{"id": 7, "image_id": 99, "category_id": 1}]}, "annotation 7 has unknown image_id 99"),
        ({"annotations": [{"id": 7, "image_id": 1, "category_id": 99}]}, "unknown category_id 99"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]}, "id 1 occurs 2 times"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}]}, "file_name 'a.jpg' occurs 2"),
        ({"images": [{"id": 1, "file_name": "../../secret.jpg"}], "annotations": []}, "leads out of the image folder"),
        ({"images": [{"id": [1], "file_name": "a.jpg"}]}, "malformed"),
        ({"categories": [{"id": 16, "name": "x", "supercategory": "y"}], "annotations": []}, "--categories"),
    ],
)
def test_a_damaged_annotation_file_is_explained_in_one_line(tmp_path, change, words):
    path = write_annotations(tmp_path, "train2017", [[16], [44]], **change)
    with pytest.raises(data.DataError, match=words) as error:
        splits.select_split(tmp_path, "animal", cache_dir=tmp_path / "cache")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_json_is_explained_and_a_mended_one_is_read(tmp_path):
    path = write_annotations(tmp_path, "train2017", [[16], [44]])
    good = path.read_text()
    path.write_text(good[: len(good) // 2])
    with pytest.raises(data.DataError, match="not a JSON file"):
        splits.select_split(tmp_path, "animal", cache_dir=tmp_path / "cache")
    path.write_text(good)
    assert splits.select_split(tmp_path, "animal", cache_dir=tmp_path / "cache").images == (
        "coco/train2017/000000000001.jpg",
    )


def test_a_damaged_digest_is_made_again(tmp_path):
    write_annotations(tmp_path, "train2017", [[16], [44]])
    first = splits.select_split(tmp_path, "animal", cache_dir=tmp_path)
    (digest,) = tmp_path.glob("annotations_*.json")
    digest.write_text(digest.read_text()[:20])
    assert splits.select_split(tmp_path, "animal", cache_dir=tmp_path) == first


# ---------------------------------------------------------------------------------------------------------------------
# Rules that are added


def people(source):
    """Choose images that show a person.

    Further lines are not part of the description.
    """
    pool = source.coco.images_with("person")
    return source.draw(pool, source.count(len(pool)), "images with a person", 5)


def pets_and_animals(source):
    return [*source.pets[:3], *source.draw_animals(4), "other/photo.jpg"]


def mixed_people(source):
    count = source.matched_count()
    num_people = round(source.animal_fraction * count)
    return source.coco.images_with("person")[:num_people] + source.draw_others(count - num_people)


def test_a_rule_that_is_named_in_splits_can_be_selected_by_every_option(toy, monkeypatch):
    monkeypatch.setitem(splits.SPLITS, "people", people)
    assert splits.split_names() == ["animal", "non_animal", "mixed", "all", "pets", "people"]
    assert splits.describe_rule("people") == "Choose images that show a person."
    everyone, few = select(toy, "people"), select(toy, "people", num_images=7)
    assert sorted(numbers(everyone)) == [*range(11, 31), *range(41, 61)] and few.images == everyone.images[:7]
    assert everyone.images != select(toy, "people", split_seed=1).images
    assert everyone.manifest["person_share"] == 1 and everyone.manifest["animal_images"] == 20
    expected = {"split": "people", "categories": ["bird", "cat"], "animal_images": "per_category", "split_seed": 0}
    assert everyone.manifest["definition"] == {**expected, "num_images": 40}
    with pytest.raises(splits.TooFewImagesError, match="41 images with a person asked for, 40 exist"):
        select(toy, "people", num_images=41)
    with pytest.raises(data.DataError, match=r"0\.5 contradicts --split people; use --split mixed"):
        select(toy, "people", animal_fraction=0.5)
    with pytest.raises(data.DataError, match=r"--split must be one of animal, .*, people"):
        select(toy, "persons")


def test_a_rule_may_read_the_fraction_and_join_data_sets(toy, monkeypatch):
    monkeypatch.setitem(splits.SPLITS, "mixed_people", mixed_people)
    monkeypatch.setitem(splits.ANIMAL_FRACTIONS, "mixed_people", 0.1)
    monkeypatch.setattr(splits, "TAKES_FRACTION", {"mixed", "mixed_people"})
    assert select(toy, "mixed_people").manifest["definition"]["animal_fraction"] == 0.1
    quarter = select(toy, "mixed_people", animal_fraction=0.25, num_images=8)
    assert numbers(quarter)[:2] == [11, 12] and quarter.manifest["definition"]["animal_fraction"] == 0.25
    monkeypatch.setitem(splits.SPLITS, "joined", pets_and_animals)
    assert splits.describe_rule("joined") == ""
    manifest = select(toy, "joined").manifest
    assert manifest["entries"] == 8 and manifest["animal_images"] == 7 and manifest["without_annotation"] == 1
    pets = [Path(image).stem for image in splits.pets_split(toy[0], "train").images[:3]]
    assert manifest["ids"][:3] == pets and manifest["ids"][7] == "photo" and manifest["ids"][3] in range(1, 41)


def test_a_rule_that_chooses_nothing_is_refused(toy, monkeypatch):
    monkeypatch.setitem(splits.SPLITS, "nothing", lambda source: [])
    with pytest.raises(splits.TooFewImagesError, match="no image of the data belongs to --split nothing"):
        select(toy, "nothing")


def test_pets_need_no_coco_and_coco_needs_no_pets(toy, tmp_path):
    for folder, split in (("coco", "animal"), ("oxford-iiit-pet", "pets")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "annotations").symlink_to(toy[0] / folder / "annotations")
        assert splits.select_split(tmp_path, split, cache_dir=tmp_path / "c").images == select(toy, split).images
        (tmp_path / folder / "annotations").unlink()
        with pytest.raises(splits.DataNotFoundError):
            splits.select_split(tmp_path, split, cache_dir=tmp_path / "c")


def test_the_names_of_all_splits_are_printed_for_shell_scripts():
    command = [sys.executable, "splits.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(splits.__file__).parent)
    assert done.stdout.splitlines() == splits.split_names()


def test_the_list_of_pets_is_read_with_its_numbers(tmp_path):
    path = tmp_path / "oxford-iiit-pet" / "annotations" / "list.txt"
    path.parent.mkdir(parents=True)
    lines = ["#Image CLASS-ID SPECIES BREED ID", "b c_2 37 2 25", *(f"Abyssinian_{i} 1 1 1" for i in range(7)), ""]
    path.write_text("\r\n".join(lines))
    entries = splits.read_pets_list(tmp_path)
    assert entries[0] == splits.PetEntry(name="b c_2", class_id=37, species=2, breed_id=25) and len(entries) == 8
    path.write_text("\n".join([*lines, "Abyssinian_8 1 one 1"]))
    with pytest.raises(data.DataError, match=r"list.txt: line 11 must hold a name and three numbers; fetch it again"):
        splits.read_pets_list(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "../../secret", "/etc/passwd", "b/../../c"])
def test_names_in_the_list_of_pets_that_lead_elsewhere_are_refused_as_those_of_coco_are(tmp_path, name):
    path = tmp_path / "oxford-iiit-pet" / "annotations" / "list.txt"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"Abyssinian_{i} 1 1 1\n" for i in range(9)) + f"{name} 1 1 1\n")
    with pytest.raises(data.DataError, match=r"list\.txt: the name in line 10, .*; fetch it again") as error:
        splits.pets_split(tmp_path, "test")
    assert error.value.exit_code == 2 and "\n" not in str(error.value) and "\0" not in str(error.value)


def test_kept_labels_of_someone_else_are_read_and_damaged_ones_made_anew(tmp_path):
    with open_folder() as folder:
        write_annotations(folder, "train2017", [[16]] * 3)
        whole = splits.CocoPart(folder, "train2017", cache_dir=folder / "c").images
        forbid_writing(folder / "c")
        with without_rights():
            assert splits.CocoPart(folder, "train2017", cache_dir=folder / "c").images == whole
        allow_writing(folder / "c")
        (digest,) = (folder / "c").glob("*.json")
        kept = digest.read_bytes()
        for damage in (b"{}", b"[]", b"null", b"", kept[:-3], kept.replace(b"bird", b"bard")):
            digest.write_bytes(damage)
            assert splits.CocoPart(folder, "train2017", cache_dir=folder / "c").images == whole
            assert digest.read_bytes() == kept


# ---------------------------------------------------------------------------------------------------------------------
# The real labels at full size

FULL = """
import json, sys, splits
root, cache = sys.argv[1:]
out = {}
for rule in splits.ANIMAL_IMAGES:
    out[rule] = len(splits.select_split(root, "animal", animal_images=rule, cache_dir=cache).images)
for name in splits.split_names()[:4]:
    split = splits.select_split(root, name, cache_dir=cache)
    out[name] = [len(split.images), split.unique, split.manifest["animal_images"], split.manifest["without_annotation"]]
    out[name + "_categories"] = split.manifest["categories"]
out["paper"] = splits.select_split(root, "mixed", num_images=25918, cache_dir=cache).manifest["animal_images"]
out["val"] = {k: len(v.images) for k, v in splits.mae_validation(root, cache_dir=cache).items()}
val = splits.CocoPart(root, "val2017", cache_dir=cache)
out["val_lists"] = [len(val.animal_entries(rule)) for rule in splits.ANIMAL_IMAGES]
print(json.dumps(out))
"""


@pytest.mark.skipif("COCO_LABELS" not in os.environ, reason="COCO_LABELS names no folder with the labels of COCO 2017")
def test_full_size_annotations_give_the_counts_of_coco_2017_in_time_and_memory(tmp_path):
    labels = Path(os.environ["COCO_LABELS"])
    names = json.loads((labels / "categories.json").read_text())
    counts = json.loads((labels / "animal_counts.json").read_text())
    animals = counts["train2017"]["per_category"]
    categories = [
        {"id": int(c), "name": n, "supercategory": "animal" if n in animals else "other"} for c, n in names.items()
    ]
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    polygon = json.dumps([np.random.default_rng(0).uniform(0, 600, 44).round(2).tolist()])  # as long as the real ones
    for part in ("train2017", "val2017"):
        found = json.loads(gzip.decompress((labels / f"{part}_labels.json.gz").read_bytes()))
        # Two or three instances for each label make the real file's 860,000 annotations.
        lines = [
            f'{{"id": {3 * i + k}, "image_id": {int(image)}, "category_id": {c}, "iscrowd": 0, "area": 1.5, '
            f'"bbox": [0, 0, 9, 9], "segmentation": {polygon}}}'
            for i, (image, c) in enumerate((image, c) for image, cs in found.items() for c in cs)
            for k in range(2 + i % 2)
        ]
        images = [{"id": int(i), "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in found]
        with open(tmp_path / "coco" / "annotations" / f"instances_{part}.json", "w") as f:
            f.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
            f.write(",".join(lines) + "]}")
        del lines
    start = time.monotonic()
    command = [sys.executable, "-c", FULL, str(tmp_path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(data.__file__).parent, check=False)
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)  # so nothing else was printed, by pycocotools for one
    for path in (tmp_path / "coco" / "annotations").iterdir():
        path.unlink()  # 400 MB that pytest would keep
    print(f"full size: {seconds:.1f} s, {peak:.2f} GiB")
    assert (out["per_category"], out["unique"], out["single"]) == (25_739, 23_989, 22_337)
    assert out["animal"][:3] == [25_739, 23_989, 23_989] and out["animal_categories"] == animals
    assert out["non_animal"][:3] == [25_739, 25_739, 0]
    assert out["mixed"][0] == 25_739 and out["all"] == [118_287, 118_287, 23_989, 1_021]
    assert out["val"] == {"animal": 1_016, "non_animal": 1_016} and out["val_lists"] == [1_090, 1_016, 946]
    assert seconds < 60 and peak < 3


# ----------------------------------------------------------------------------------------------------------------------
# The original code's lists and parts

FULL_LIST = [f"breed_{number:04d}" for number in range(7390)]  # as many as there are .jpg files
LEAKING = splits.PetsSource("every_jpg", "leaking")


def test_at_full_size_the_leaking_parts_train_on_70_percent_of_the_test_images(monkeypatch):
    monkeypatch.setattr(splits.PetsSource, "names", lambda self, data_root: FULL_LIST)
    tests = {splits.pets_split("nowhere", "test", split_seed=seed, source=LEAKING).images for seed in range(20)}
    assert len(tests) == 1
    (test,) = tests
    in_train = []
    in_val = []
    for seed in range(20):
        train = splits.pets_split("nowhere", "train", split_seed=seed, source=LEAKING).images
        val = splits.pets_split("nowhere", "val", split_seed=seed, source=LEAKING).images
        assert [len(train), len(val), len(test)] == [5173, 1108, 1109]
        assert len(set(train)) == 5173
        in_train.append(len(set(test).intersection(train)) / len(test))
        in_val.append(len(set(test).intersection(val)) / len(test))
    assert np.mean(in_train) == pytest.approx(0.698, abs=0.01)
    assert np.mean(in_val) == pytest.approx(0.15, abs=0.01)
    assert len(set(in_train)) > 1, "each seed shuffles anew"


def test_at_full_size_the_disjoint_parts_share_no_image(monkeypatch):
    monkeypatch.setattr(splits.PetsSource, "names", lambda self, data_root: FULL_LIST)
    parts = [splits.pets_split("nowhere", part, split_seed=3).images for part in splits.PETS_PARTS]
    assert [len(part) for part in parts] == [5173, 1108, 1109]
    assert len(set().union(*parts)) == 7390


def test_leaking_parts_follow_from_the_seed_and_say_so(toy):
    source = splits.PetsSource(division="leaking")
    first, again, other = (splits.pets_split(toy[0], "train", split_seed=seed, source=source) for seed in (1, 1, 2))
    assert first == again
    assert first.sha256 != other.sha256
    assert first.manifest["definition"] == {"split": "pets train", "division": "leaking", "split_seed": 1}
    default = splits.pets_split(toy[0], "train")
    assert default.manifest["definition"] == {"split": "pets train"}
    half = splits.pets_split(toy[0], "train", train_fraction=0.5, split_seed=1, source=source)
    assert set(half.images) < set(first.images)


def test_every_jpg_lists_the_files_of_the_folder(toy, tmp_path):
    images = tmp_path / "oxford-iiit-pet" / "images"
    with pytest.raises(splits.DataNotFoundError, match="images not found; get it with"):
        splits.PetsSource("every_jpg").names(tmp_path)
    images.mkdir(parents=True)
    for name in ("b_2.jpg", "a_1.jpg", "A_9.jpg", "._a_1.jpg", "a_1.mat", "c_3.jpeg"):
        (images / name).touch()
    with pytest.raises(data.DataError, match=r"must hold at least 7 \.jpg files"):
        splits.PetsSource("every_jpg").names(tmp_path)
    for number in range(4):
        (images / f"d_{number}.jpg").touch()
    names = ["A_9", "a_1", "b_2", "d_0", "d_1", "d_2", "d_3"]
    assert splits.PetsSource("every_jpg").names(tmp_path) == names
    with pytest.raises(data.DataError, match=r"list\.txt"):  # which only the default needs
        splits.PetsSource().names(tmp_path)
    parts = [splits.pets_split(tmp_path, part, source=splits.PetsSource("every_jpg")) for part in splits.PETS_PARTS]
    assert sorted(Path(image).stem for part in parts for image in part.images) == names
    assert parts[0].manifest["definition"]["listing"] == "every_jpg"


def content_of_parts(root: str | Path, source: splits.PetsSource) -> list[set[str]]:
    """Hash the files of the three parts, whatever their names."""
    parts = []
    for part in splits.PETS_PARTS:
        images = splits.pets_split(root, part, source=source).images
        parts.append({hashlib.sha256(Path(root, image).read_bytes()).hexdigest() for image in images})
    return parts


def assert_disjoint(parts: list[set[str]]) -> None:
    train, val, test = parts
    assert train and val and test
    assert not train & val
    assert not train & test
    assert not val & test


@pytest.mark.parametrize("listing", splits.PETS_LISTS)
def test_by_default_no_file_of_one_part_has_the_content_of_another(listing, tmp_path_factory):
    root = drawn_root(tmp_path_factory)
    assert_disjoint(content_of_parts(root, splits.PetsSource(listing)))
    train, _, test = content_of_parts(root, splits.PetsSource(listing, "leaking"))
    assert train & test


@needs_photos
@pytest.mark.parametrize("listing", splits.PETS_LISTS)
def test_no_real_photo_of_one_part_has_the_content_of_another(listing):
    assert_disjoint(content_of_parts(os.environ["SAMPLE_ROOT"], splits.PetsSource(listing)))


def test_complete_data_sets_are_named_and_others_counted():
    whole = {"train2017": 118_287, "val2017": 5_000}
    assert splits.name_data({**whole, "pets": 7_349}) == "MS COCO 2017 and Oxford-IIIT Pet"
    assert splits.name_data({"train2017": 100, "val2017": 16, "pets": 118}) == (
        "116 COCO photos of 123,287, 118 pets of 7,349"
    )
    assert splits.name_data({**whole, "pets": 118}) == "MS COCO 2017, 118 pets of 7,349"
    assert splits.name_data({"pets": 7_349}) == "Oxford-IIIT Pet" and splits.name_data({}) == "unknown data"
