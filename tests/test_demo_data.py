"""The drawn demo data set has the publishers' layouts, is the same every time and is never taken for whole too early."""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import data
import demo
import prepare
import splits

SIZES = ["--num_train", "40", "--num_val", "16", "--num_pets", "28"]


def draw(root, *more):
    prepare.main(prepare.get_args_parser().parse_args(["demo", "--data_root", str(root), *SIZES, *more]))


def digest(root: Path):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "drawn"
    draw(root)
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
    draw(tmp_path / "again")
    draw(tmp_path / "other", "--seed", "1")
    assert digest(tmp_path / "again") == digest(drawn)
    same = digest(drawn).items() & digest(tmp_path / "other").items()
    assert {Path(name).suffix for name, _ in same} <= {".txt"}


def test_a_larger_set_holds_the_smaller_one(drawn, tmp_path):
    assert demo.draw_pet(0, 3)[1].tobytes() == demo.draw_pet(0, 3)[1].tobytes()
    draw(tmp_path / "more", "--num_train", "44")
    photos = {n: h for n, h in digest(drawn).items() if n.endswith(("jpg", "png"))}
    assert photos.items() <= digest(tmp_path / "more").items()


def test_complete_data_is_left_alone_and_foreign_or_other_data_never_overwritten(drawn, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    draw(drawn)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(prepare.PrepareError, match="other sizes or seed"):
        draw(drawn, "--seed", "1")
    assert before == {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(prepare.PrepareError, match="something else"):
        draw(tmp_path)
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
            draw(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    draw(tmp_path / "d")
    assert digest(tmp_path / "d") == digest(drawn) and [path.name for path in tmp_path.iterdir()] == ["d"]


def test_two_drawings_at_once_give_one_whole_data_set(drawn, tmp_path):
    threads = [threading.Thread(target=draw, args=(tmp_path / "d",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digest(tmp_path / "d") == digest(drawn) and [path.name for path in tmp_path.iterdir()] == ["d"]


def test_the_file_says_what_it_is(drawn):
    first, second = (drawn / "DATASET.txt").read_text().splitlines()
    assert first == "drawn demo photos" and json.loads(second)["num_train"] == 40
