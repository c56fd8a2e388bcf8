"""One's own images: which files are listed or left out by name, how classes are divided, and copies of test photos."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from class_data import write_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import run

from data import DataError
from folders import (
    MOST_HELD_OUT,
    PARTS,
    Label,
    drop_copies,
    find_copies,
    label_parts,
    list_tree,
    read_class_folders,
    read_tree,
)


def write_classes(folder: Path, sizes: dict[str, int]) -> Path:
    """Write class folders with these numbers of photos."""
    seed = 0
    for name, size in sizes.items():
        for number in range(size):
            write_photo(folder / name / f"{number}.png", seed)
            seed += 1
    return folder


def message(function, *args) -> str:
    with pytest.raises(DataError) as info:
        function(*args)
    assert "\n" not in str(info.value)
    return str(info.value)


# -- Any tree -----------------------------------------------------------------------------------------------------------


def test_a_tree_lists_images_folder_by_folder_through_links_and_names_what_it_leaves_out(tmp_path):
    root = tmp_path / "photos"
    for number, path in enumerate(("b.JPG", "a/x.png", "a/deep er/ü'\n$(x).webp", ".hidden/h.png", "a/.h.png")):
        write_photo(root / path, number)
    write_photo(tmp_path / "elsewhere/c.jpeg", 9)
    os.symlink(tmp_path / "elsewhere", root / "linked")
    os.symlink(tmp_path / "elsewhere/c.jpeg", root / "z.jpg")
    os.symlink(tmp_path / "nowhere.jpg", root / "broken.jpg")
    os.symlink("itself.jpg", root / "itself.jpg")
    os.symlink(root, root / "a/round")
    os.mkfifo(root / "pipe.png")
    (root / "notes.txt").write_text("no image")
    (root / "folder.jpg").mkdir()
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.jpg")).touch()
    tree = list_tree(root)
    assert tree.images == ["a/deep er/ü'\n$(x).webp", "a/x.png", "b.JPG", "linked/c.jpeg", "z.jpg"]
    assert sorted(tree.remarks()) == [
        r"left out: 1 file(s) whose names are not UTF-8 (first '\udcff.jpg')",
        "left out: 1 file(s) without the name of an image (first notes.txt)",
        "left out: 1 link(s) to a folder that they lie in (first a/round)",
        "left out: 3 file(s) that lead nowhere or are pipes (first broken.jpg)",
    ]


def test_a_folder_without_images_is_refused_in_a_line_that_says_why(tmp_path):
    assert "not found; name a folder of images" in message(list_tree, tmp_path / "none")
    (tmp_path / "file").touch()
    assert "is no folder" in message(list_tree, tmp_path / "file")
    (tmp_path / "empty/a/b").mkdir(parents=True)
    assert "holds no image file (.jpg, .jpeg, " in message(list_tree, tmp_path / "empty")
    (tmp_path / "empty/a/list.txt").touch()
    assert message(list_tree, tmp_path / "empty").endswith("1 file(s) without the name of an image (first a/list.txt)")
    write_photo(tmp_path / "single/a.png", 0)
    assert "holds one image" in message(read_tree, tmp_path / "single")
    shutil.copy(tmp_path / "single/a.png", tmp_path / "single/b.png")
    assert "copies of one photo" in message(read_tree, tmp_path / "single")


def write_names(folder: Path, count: int) -> Path:
    """Write files of different sizes, which need not be images to be listed."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04d}.jpg").write_bytes(bytes(1 + number))
    return folder


def test_held_out_images_are_the_same_for_every_seed_and_size(tmp_path):
    folder = write_names(tmp_path / "photos", 60)
    whole = read_tree(folder)
    assert (len(whole.train.images), len(whole.held_out.images)) == (57, 3)
    assert set(whole.train.images) | set(whole.held_out.images) == set(list_tree(folder).images)
    for seed in range(3):
        some = read_tree(folder, num_images=20, split_seed=seed)
        more = read_tree(folder, num_images=30, split_seed=seed)
        assert some.held_out.sha256 == whole.held_out.sha256
        assert more.train.images[:20] == some.train.images
        assert len(set(more.train.images)) == 30
    assert "58 images asked for, 57 exist" in message(read_tree, folder, 58)
    assert MOST_HELD_OUT == 1000


def test_the_hash_of_a_list_follows_its_names_and_not_its_place(tmp_path):
    folder = write_names(tmp_path / "photos", 30)
    first = read_tree(folder).train
    assert first.manifest["entries"] == first.manifest["unique"] == 28
    assert first.manifest["ids"] == list(first.images)
    folder.rename(tmp_path / "moved")
    assert read_tree(tmp_path / "moved").train.sha256 == first.sha256
    (tmp_path / "moved/new.jpg").write_bytes(b"new, and of another size than all the others")
    assert read_tree(tmp_path / "moved").train.sha256 != first.sha256


def test_a_pre_training_beside_a_test_folder_says_how_to_leave_it_out(tmp_path):
    for part in PARTS:
        write_classes(tmp_path / part, {"a": 2})
    [remark] = [text for text in read_tree(tmp_path).remarks if "pre-trained on as well" in text]
    assert f"--images {tmp_path}/train leaves them out" in remark
    assert read_tree(tmp_path / "train").remarks == ()


def test_prepare_lists_ones_own_images_and_writes_their_manifests(tmp_path):
    folder = write_names(tmp_path / "photos", 30)
    text = run("prepare", "splits", "--images", folder, "--output", tmp_path / "splits", "--data_root", tmp_path)
    assert f"{read_tree(folder).train.sha256[:12]}" in text
    assert sorted(path.name for path in (tmp_path / "splits").iterdir()) == ["images.json", "images_held_out.json"]


# -- Copies -------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"ba"]), max_size=6), min_size=3, max_size=3))
def test_copies_of_later_parts_are_those_that_a_comparison_of_all_pairs_finds(tmp_path_factory, contents):
    root = tmp_path_factory.mktemp("parts")
    parts = {}
    text = {}
    for part, files in zip(PARTS, contents, strict=True):
        parts[part] = [f"{part}{number}" for number in range(len(files))]
        text |= dict(zip(parts[part], files, strict=True))
    for name, content in text.items():
        (root / name).write_bytes(content)
    later = {"train": [*parts["val"], *parts["test"]], "val": parts["test"], "test": []}
    copies = find_copies(root, parts)
    for part, names in parts.items():
        for name in names:
            same = [other for other in later[part] if text[other] == text[name]]
            assert (name in copies) == bool(same)
            assert not same or copies[name] in same
    remarks = []
    kept = drop_copies(root, parts, remarks)
    assert kept == {part: [name for name in names if name not in copies] for part, names in parts.items()}
    assert len(remarks) == sum(kept[part] != parts[part] for part in parts)


def test_a_photo_that_was_put_into_two_parts_is_counted_and_named(tmp_path):
    for part in PARTS:
        write_classes(tmp_path / part, {"a": 3, "b": 3})
        for number, path in enumerate(sorted((tmp_path / part).rglob("*.png"))):
            write_photo(path, 10 * PARTS.index(part) + number)
    shutil.copy(tmp_path / "test/b/2.png", tmp_path / "train/a/0.png")
    shutil.copy(tmp_path / "test/b/1.png", tmp_path / "train/b/1.png")
    parts = read_class_folders(tmp_path)
    expected = (
        "left out of train: 2 photos of which a later part has a copy, byte for byte (first train/a/0.png, the same"
    )
    assert parts.remarks == (f"{expected} as test/b/2.png)",)
    assert parts.parts["train"] == ("train/a/1.png", "train/a/2.png", "train/b/0.png", "train/b/2.png")
    assert len(parts.parts["test"]) == 6


# -- Class folders ------------------------------------------------------------------------------------------------------


def test_three_parts_are_taken_as_they_are_and_nested_folders_belong_to_their_class(tmp_path):
    for part in PARTS:
        write_classes(tmp_path / part, {"b c": 1, "a": 1})
        write_photo(tmp_path / part / "a/nested/0.png", 50 + PARTS.index(part))
        write_photo(tmp_path / part / "loose.png", 60)
    write_photo(tmp_path / "other/x.png", 61)
    for number, path in enumerate(sorted(tmp_path.rglob("[0-9]*.png"))):
        write_photo(path, number)
    parts = read_class_folders(tmp_path)
    assert parts.classes == ("a", "b c")
    assert parts.parts["val"] == ("val/a/0.png", "val/a/nested/0.png", "val/b c/0.png")
    assert parts.labels_of(parts.parts["val"]).tolist() == [0, 0, 1]
    assert [parts.ids[image] for image in parts.parts["test"]] == ["a/0.png", "a/nested/0.png", "b c/0.png"]
    assert parts.remarks == ("left out: 4 file(s) in no class folder (first other/x.png)",)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdé🐱"), st.integers(3, 30), min_size=2), st.integers(0, 3))
def test_one_tree_is_divided_class_by_class(tmp_path_factory, sizes, seed):
    root = tmp_path_factory.mktemp("tree")
    number = 0
    for name, size in sizes.items():
        (root / name).mkdir()
        for index in range(size):
            number += 1
            (root / name / f"{index}.jpg").write_bytes(bytes(number))
    parts = read_class_folders(root, seed)
    assert parts.classes == tuple(sorted(sizes))
    everything = [image for images in parts.parts.values() for image in images]
    assert sorted(everything) == sorted(list_tree(root).images)
    assert len(set(everything)) == len(everything)
    for name, size in sizes.items():
        counts = Counter({part: sum(image.startswith(f"{name}/") for image in parts.parts[part]) for part in PARTS})
        assert counts["val"] == counts["test"] == max(1, size * 15 // 100)
        assert counts["train"] == size - 2 * counts["test"] > 0
    (root / "new").mkdir()
    for index in range(3):
        (root / "new" / f"{index}.jpg").write_bytes(bytes(number + 1 + index))
    again = read_class_folders(root, seed)
    for part in PARTS:  # one more class changes no other
        assert [image for image in again.parts[part] if not image.startswith("new/")] == list(parts.parts[part])


def test_folders_that_cannot_be_divided_are_refused_in_a_line_that_names_them(tmp_path):
    one = write_classes(tmp_path / "one", {"a": 5, "single": 1, "pair": 2})
    text = message(read_class_folders, one)
    assert "class pair has 2 images (2 classes have fewer than 3); at least 3 are needed" in text
    assert "1 class of images" in message(read_class_folders, write_classes(tmp_path / "alone", {"a": 5}))
    loose = tmp_path / "loose"
    write_photo(loose / "a.png", 0)
    assert "has no class folders with images" in message(read_class_folders, loose)
    half = write_classes(tmp_path / "half/train", {"a": 3, "b": 3}).parent
    assert "has train/ but no val/" in message(read_class_folders, half)
    for part in ("val", "test"):
        write_classes(half / part, {"a": 1, "b": 1, "c": 1})
    assert f"{half}/val/c is a class without images in train/" in message(read_class_folders, half)


def test_classes_that_hold_the_same_photos_are_refused_with_the_copies_named(tmp_path):
    write_classes(tmp_path / "same", {"a": 5})
    shutil.copytree(tmp_path / "same/a", tmp_path / "same/b")
    for image in (tmp_path / "same").rglob("*.png"):
        image.write_bytes(b"one photo")
    assert "are copies of those of a later part (left out of" in message(read_class_folders, tmp_path / "same")


def test_the_hash_of_a_part_follows_the_labels(tmp_path):
    images = [f"{number}.jpg" for number in range(9)]
    for number, image in enumerate(images):
        (tmp_path / image).write_bytes(bytes(number))
    parts = {part: images[3 * i : 3 * i + 3] for i, part in enumerate(PARTS)}
    hashes = []
    for classes in ("aabaabaab", "aaaaaabbc", "baabaabaa"):
        labels = {image: Label(name, image) for image, name in zip(images, classes, strict=True)}
        if classes.count("c") == 1:
            assert "class b has 2 images (2 classes" in message(label_parts, "toy", tmp_path, parts, labels)
            continue
        found = label_parts("toy", tmp_path, parts, labels)
        hashes.append(found.split("train").sha256)
        some = found.split("train", 0.5, split_seed=1)
        assert set(some.images) < set(found.parts["train"])
        assert some.manifest["definition"]["train_fraction"] == 0.5
    assert len(set(hashes)) == 2
