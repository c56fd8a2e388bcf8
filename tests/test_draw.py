"""The drawn demo data set has the published layouts, is reproducible, and is never taken for complete too early."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import data
import draw
import draw_figures
import prepare
import splits

ROOT = Path(__file__).parent.parent
SIZES = ["--num_train", "40", "--num_val", "16", "--num_pets", "28"]


def draw_data(root, *more):
    prepare.main(prepare.get_args_parser().parse_args(["demo", "--data_root", str(root), *SIZES, *more]))


def digest(root: Path):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "drawn"
    draw_data(root)
    return root


@pytest.fixture(scope="module")
def coco(drawn):
    return COCO(drawn / "coco/annotations/instances_train2017.json")


def test_half_of_the_photos_show_animals_some_of_two_kinds_and_some_show_nothing_labelled(coco):
    animals = coco.getCatIds(supNms=["animal"])
    kinds = [{a["category_id"] for a in coco.imgToAnns[image]} for image in coco.imgs]
    assert len(animals) == 10 and len(kinds) == 40
    assert sum(bool(k & set(animals)) for k in kinds) == 18
    assert sum(len(k & set(animals)) > 1 for k in kinds) == 3
    assert sum(not k for k in kinds) == 2
    assert len({c for k in kinds for c in k} - set(animals)) >= 6


def test_categories_are_cocos_own(coco):
    named = {c["name"]: (c["id"], c["supercategory"]) for c in coco.cats.values()}
    assert (
        named["giraffe"] == (25, "animal")
        and named["person"] == (1, "person")
        and named["traffic light"] == (10, "outdoor")
    )


def test_outlines_boxes_and_areas_agree(drawn, coco):
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation).astype(bool)
        x, y, w, h = map(int, annotation["bbox"])
        assert mask.sum() == annotation["area"] == mask[y : y + h, x : x + w].sum()
        assert mask[:, x].any() and mask[y].any() and mask[:, x + w - 1].any() and mask[y + h - 1].any()
    for image in coco.imgs.values():
        assert Image.open(drawn / "coco/train2017" / image["file_name"]).size == (image["width"], image["height"])


def test_pets_have_trimaps_with_a_thin_border_and_the_publishers_list(drawn):
    images = [image for part in ("train", "val", "test") for image in splits.pets_split(drawn, part).images]
    assert len(images) == 28
    shares, aspects = [], set()
    for image in images:
        trimap = data.read_trimap(drawn / data.trimap_path(image), drawn / image)
        aspects.add(trimap.shape[0] / trimap.shape[1])
        shares.append(np.bincount(trimap.ravel(), minlength=3) / trimap.size)
    assert np.all(np.array(shares) > 0.01) and len(aspects) >= 4
    assert 0.15 < np.mean(shares, 0)[0] < 0.6 and 0.02 < np.mean(shares, 0)[2] < 0.15
    rows = (drawn / "oxford-iiit-pet/annotations/list.txt").read_text().splitlines()
    assert "Abyssinian_1 1 1 1" in rows and "pug_2 26 2 18" in rows and rows[0].startswith("#Image CLASS-ID")


def test_no_brightness_threshold_tells_pet_from_background(drawn):
    def best_iou(image):
        grey = np.asarray(data.read_image(drawn / image).convert("L"))
        pet = data.read_trimap(drawn / data.trimap_path(image), drawn / image) == 0
        cuts = [grey > t for t in range(20, 240, 10)] + [grey < t for t in range(20, 240, 10)]
        return max((c & pet).sum() / (c | pet).sum() for c in cuts)

    assert np.mean([best_iou(image) for image in splits.pets_split(drawn, "train").images]) < 0.7


def test_the_same_seed_draws_the_same_files_and_another_seed_others(drawn, tmp_path):
    draw_data(tmp_path / "again")
    draw_data(tmp_path / "other", "--seed", "1")
    assert digest(tmp_path / "again") == digest(drawn)
    same = digest(drawn).items() & digest(tmp_path / "other").items()
    assert {Path(name).suffix for name, _ in same} <= {".txt"}


def test_a_larger_set_holds_the_smaller_one(drawn, tmp_path):
    assert draw.draw_pet(0, 3).image.tobytes() == draw.draw_pet(0, 3).image.tobytes()
    draw_data(tmp_path / "more", "--num_train", "44")
    photos = {n: h for n, h in digest(drawn).items() if n.endswith(("jpg", "png"))}
    assert photos.items() <= digest(tmp_path / "more").items()


def test_complete_data_is_left_alone_and_foreign_or_other_data_never_overwritten(drawn, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    draw_data(drawn)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(prepare.PrepareError, match="other sizes or seed"):
        draw_data(drawn, "--seed", "1")
    assert before == {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(prepare.PrepareError, match="something else"):
        draw_data(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("at", [1, 30, 41, 84])
def test_an_interrupted_drawing_is_not_taken_for_whole_and_the_next_one_mends_it(drawn, tmp_path, monkeypatch, at):
    class Interrupted(prepare.Progress):
        def update(self, n=1, note=""):
            super().update(n)
            if self.n == at:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw_data(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    draw_data(tmp_path / "d")
    assert digest(tmp_path / "d") == digest(drawn) and [path.name for path in tmp_path.iterdir()] == ["d"]


def test_two_drawings_at_once_give_one_whole_data_set(drawn, tmp_path):
    threads = [threading.Thread(target=draw_data, args=(tmp_path / "d",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digest(tmp_path / "d") == digest(drawn) and [path.name for path in tmp_path.iterdir()] == ["d"]


def test_the_file_says_what_it_is(drawn):
    first, second = (drawn / "DATASET.txt").read_text().splitlines()
    assert first == "drawn demo photos" and json.loads(second)["num_train"] == 40


# What some pictures hold: mean colour, and pixels of each label. Other versions of numpy and Pillow may round a little
# differently; another order of the random draws changes everything.
COCO_PHOTOS = [
    ((0, 0, 0), (138.5, 132.4, 115.4), [(17, 3262), (19, 1917), (9, 6629)]),
    ((0, 0, 13), (139.6, 125.6, 108.6), [(25, 2419), (64, 1116), (9, 2235), (25, 4580)]),
    ((0, 1, 26), (130.6, 112.0, 92.3), [(28, 1419), (3, 2983)]),
    ((1, 0, 5), (154.8, 158.4, 168.3), [(1, 626), (28, 4138)]),
]
PET_PHOTOS = [
    ((0, 0), "Abyssinian", (155.4, 125.9, 90.0), [13488, 23442, 3070]),
    ((0, 7), "beagle", (156.4, 147.8, 121.0), [17972, 15563, 2765]),
    ((0, 3), "Maine_Coon", (114.1, 120.0, 106.3), [6670, 28312, 2858]),
    ((1, 10), "pug", (132.1, 121.5, 124.3), [8710, 27230, 3660]),
]


def mean_colour(image):
    return np.asarray(image).reshape(-1, 3).mean(0)


def who_draws(index: int) -> tuple[int, int]:
    return index, os.getpid()


def fail_at_5(index: int) -> int:
    if index == 5:
        raise ValueError("picture 5 cannot be drawn")
    return index


@pytest.fixture
def use_cores(monkeypatch):
    """Return a function that lets draw_many share even a few pictures among so many cores."""
    monkeypatch.setattr(draw, "WORTH_SHARING", 2)

    def use(cores: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))

    return use


def test_several_cores_draw_the_same_pictures_in_the_same_order(use_cores):
    arguments = [(0, index) for index in range(9)]  # more than one worker's portion
    drawn = []
    for cores in (1, 2):
        use_cores(cores)
        photos = draw.draw_many(draw.draw_pet, arguments)
        drawn.append([(photo.breed.name, photo.image.tobytes(), photo.trimap.tobytes()) for photo in photos])
    assert len(drawn[0]) == 9
    assert drawn[0] == drawn[1]


def test_drawing_is_shared_only_where_there_are_cores_and_pictures_enough(use_cores):
    def pids(count: int) -> set[int]:
        drawn = list(draw.draw_many(who_draws, [(index,) for index in range(count)]))
        assert [index for index, _ in drawn] == list(range(count))
        return {pid for _, pid in drawn}

    use_cores(1)
    assert pids(40) == {os.getpid()}
    use_cores(3)
    assert os.getpid() not in pids(40)
    assert pids(1) == {os.getpid()}
    assert pids(0) == set()


@pytest.mark.parametrize("cores", [1, 2])
def test_what_goes_wrong_in_a_worker_comes_through(cores, use_cores):
    use_cores(cores)
    drawn = draw.draw_many(fail_at_5, [(index,) for index in range(20)])
    with pytest.raises(ValueError, match="picture 5 cannot be drawn"):
        list(drawn)


@pytest.mark.parametrize(("key", "colour", "labels"), COCO_PHOTOS)
def test_coco_photos_are_the_ones_always_drawn(key, colour, labels):
    photo = draw.draw_coco(*key)
    assert mean_colour(photo.image) == pytest.approx(colour, abs=1)
    assert [instance.category_id for instance in photo.instances] == [category for category, _ in labels]
    areas = [instance.mask.sum() for instance in photo.instances]
    assert areas == pytest.approx([area for _, area in labels], rel=0.02, abs=5)


@pytest.mark.parametrize(("key", "breed", "colour", "areas"), PET_PHOTOS)
def test_pet_photos_are_the_ones_always_drawn(key, breed, colour, areas):
    photo = draw.draw_pet(*key)
    assert photo.breed.name == breed and mean_colour(photo.image) == pytest.approx(colour, abs=1)
    assert np.bincount(photo.trimap.ravel(), minlength=4)[1:] == pytest.approx(areas, rel=0.02, abs=5)


@pytest.mark.parametrize("category", draw_figures.CATEGORIES, ids=lambda category: category.name)
def test_every_figure_has_about_the_height_asked_for(category):
    canvas = np.full((300, 400, 3), 0.5, np.float32)
    look = draw.Look(category.figure, category.coats, category.pattern, category.fur)
    alpha = draw.draw_figure(np.random.default_rng(0), canvas, look, 150, draw.Foot(200, 250))
    rows = np.flatnonzero((alpha >= 0.5).any(1))
    assert 135 < np.ptp(rows) < 170 and abs(rows[-1] - 250) < 10
    assert np.ptp(canvas) > 0.2 and np.isfinite(canvas).all() and canvas.min() >= 0 and canvas.max() <= 1


def test_run_lengths_are_cocos():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert draw.run_lengths(mask) == [2, 1, 1, 2]  # down the columns: 0 0, 1, 0, 1 1
    assert draw.run_lengths(~mask) == [0, 2, 1, 1, 2]
    assert draw.bounding_box(mask) == [1, 0, 2, 2]


def test_the_file_draws_sheets_of_examples_when_it_is_copied_with_its_figures(tmp_path):
    for name in ("draw.py", "draw_figures.py"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*args):
        command = [sys.executable, "draw.py", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("--out", "sheets").stdout.split() == ["sheets/coco.png", "sheets/pets.png"]
    for name in ("coco.png", "pets.png"):
        sheet = Image.open(tmp_path / "sheets" / name)
        assert sheet.size == (6 * draw.CELL, 4 * draw.CELL) and np.asarray(sheet).std() > 30
    refused = run("--seed", "-1")
    assert refused.returncode == 2 and "'-1' is no seed" in refused.stderr
    failed = run("--out", "draw.py")
    assert failed.returncode == 1 and failed.stderr == "draw.py: File exists: name another folder with --out\n"
