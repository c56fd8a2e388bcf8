"""The command line that gets and checks the data, on drawn photos and on COCO's own labels."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import draw as demo
import prepare
import splits

ROOT = Path(__file__).resolve().parent.parent


def call(*args, **kwargs):
    return subprocess.run(
        [sys.executable, ROOT / "prepare.py", *map(str, args)], capture_output=True, text=True, **kwargs
    )


def run(*args):
    """Run a command in this process: faster than a new one."""
    prepare.main(prepare.get_args_parser().parse_args([str(arg) for arg in args]))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepare") / "drawn demo"
    run("demo", "--data_root", root, "--num_train", 40, "--num_val", 16, "--num_pets", 28)
    return root


@pytest.fixture
def copy(drawn, tmp_path):
    """A copy of the drawn data whose files may be damaged."""
    subprocess.run(["cp", "-r", drawn, tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def test_verify_finds_nothing_wrong_with_good_data(drawn, tmp_path, capsys):
    run("verify", "--data_root", drawn, "--cache_dir", tmp_path)
    assert "56 COCO images, 28 pets and their trimaps are readable" in capsys.readouterr().out


def test_verify_names_every_damaged_and_missing_file_and_what_to_do(copy, tmp_path, capsys):
    photos, pets = sorted((copy / "coco/train2017").iterdir()), sorted((copy / "oxford-iiit-pet/images").iterdir())
    photos[0].write_bytes(photos[0].read_bytes()[:2000])
    photos[1].write_bytes(b"")
    photos[2].unlink()
    pets[0].write_text("not a photo")
    trimap = copy / data.trimap_path(pets[5].name)
    demo.Image.new("L", (9, 9), 7).save(trimap)
    with pytest.raises(prepare.PrepareError) as error:
        run("verify", "--data_root", copy, "--cache_dir", tmp_path / "cache")
    out = capsys.readouterr().out
    assert (
        error.value.exit_code == 1
        and "6 of 112 files" in str(error.value)
        and "download --data_root" in str(error.value)
    )
    for path in (*photos[:3], pets[0], trimap):
        assert str(path) in out
    assert len(out.splitlines()) == 6  # a pet that is no photo spoils its trimap's check too


def test_splits_print_every_split_beside_the_paper_and_write_manifests(drawn, tmp_path, capsys):
    run("splits", "--data_root", drawn, "--cache_dir", tmp_path / "cache", "--output", tmp_path / "out")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert rows[1][:4] == ["animal", "21", "25,739", "18"]
    assert ["pets", "train", "19", "5,144"] in [row[:4] for row in rows]
    manifest = json.loads((tmp_path / "out/mixed.json").read_text())
    assert manifest["entries"] == 21 and manifest["sha256"][:12] == rows[5][-1]
    assert len(list((tmp_path / "out").iterdir())) == 13


def test_data_with_more_animals_than_other_images_still_shows_its_other_splits(copy, tmp_path, capsys):
    path = copy / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    animals = {c["id"] for c in content["categories"] if c["supercategory"] == "animal"}
    shown = {a["image_id"] for a in content["annotations"] if a["category_id"] in animals}
    content["images"] = [image for image in content["images"] if image["id"] in shown]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in shown]
    path.write_text(json.dumps(content))
    with pytest.raises(
        prepare.PrepareError, match=r"non_animal: 21 non-animal images asked for, 0 exist.*pretrain\.py"
    ) as error:
        run("splits", "--data_root", copy, "--cache_dir", tmp_path / "cache", "--output", tmp_path / "out")
    assert error.value.exit_code == 1
    assert "animal unique" in capsys.readouterr().out and (tmp_path / "out/animal.json").exists()


def first_people(source):
    """Choose some images that show a person."""
    return source.draw(source.coco.images_with("person"), source.count(3), "images with a person", 5)


def test_a_split_that_is_added_appears_in_the_table_the_manifests_and_the_cache(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(splits.SPLITS, "people", first_people)
    monkeypatch.setitem(splits.SPLITS, "crowd", lambda source: source.draw(source.coco.paths, 10**6, "images", 6))
    place = ["--data_root", drawn, "--cache_dir", tmp_path / "cache"]
    with pytest.raises(prepare.PrepareError, match=r"^crowd: 1,000,000 images asked for, 40 exist: give") as error:
        run("splits", *place, "--output", tmp_path / "out")
    assert error.value.exit_code == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    manifest = json.loads((tmp_path / "out/people.json").read_text())
    assert manifest["entries"] == 3 and ["people", "3", "3"] in [row[:3] for row in rows]
    assert any(line.startswith("people") and line.endswith("Choose some images that show a person.") for line in lines)
    assert "crowd" in lines and not (tmp_path / "out/crowd.json").exists() and len(manifest["ids"]) == 3
    run("cache", *place, "--cache_size", 16, "--splits", "people")
    images = splits.select_split(drawn, "people", cache_dir=tmp_path / "cache").images
    assert len(data.ImageStore(drawn, images, cache_dir=tmp_path / "cache", cache_size=16)) == 3
    assert "people" in prepare.get_args_parser().parse_args(["cache"]).splits
    assert "all" not in prepare.get_args_parser().parse_args(["cache"]).splits


@pytest.mark.parametrize(
    "lost, shown, missing",
    [
        (
            "coco",
            ["pets", "pets train", "pets val", "pets test"],
            "train2017.json not found; not shown: validation, .*val2017.json not found; get",
        ),
        (
            "oxford-iiit-pet",
            ["animal", "mixed", "all", "validation"],
            "not shown: pets, pets train, .*list.txt not found",
        ),
        (
            "coco/annotations/instances_val2017.json",
            ["animal", "mixed"],
            "not shown: validation, .*val2017.json not found",
        ),
    ],
)
def test_splits_of_one_data_set_are_shown_when_the_other_is_missing(copy, tmp_path, capsys, lost, shown, missing):
    place = ["--data_root", copy, "--cache_dir", tmp_path / "cache", "--output", tmp_path / "out"]
    run("splits", *place)
    (copy / lost).rename(tmp_path / "lost")
    capsys.readouterr()
    with pytest.raises(prepare.PrepareError) as error:
        run("splits", *place)
    message = str(error.value)
    assert error.value.exit_code == 1 and "prepare.py download --data_root" in message and "\n" not in message
    assert re.search(missing, message)
    out = capsys.readouterr().out.splitlines()
    for title in shown:
        assert any(line.startswith(f"{title} ") for line in out)
    assert not any(f"{line.split('  ')[0]}," in message for line in out[1 : out.index("")])
    assert (tmp_path / f"out/{shown[-1].replace(' ', '_')}.json").exists()
    gone = {"coco": "animal", "oxford-iiit-pet": "pets_val"}.get(lost, "validation")
    assert not (tmp_path / f"out/{gone}.json").exists()


def test_splits_are_a_function_of_the_seed(drawn, tmp_path, capsys):
    hashes = []
    for seed in (0, 0, 1):
        run("splits", "--data_root", drawn, "--cache_dir", tmp_path, "--output", tmp_path / "o", "--split_seed", seed)
        hashes.append(json.loads((tmp_path / "o/mixed.json").read_text())["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_cache_decodes_once_and_says_size_and_rate(drawn, tmp_path, capsys):
    run("cache", "--data_root", drawn, "--cache_dir", tmp_path, "--cache_size", 32)
    assert "images/s" in capsys.readouterr().out
    run("cache", "--data_root", drawn, "--cache_dir", tmp_path, "--cache_size", 32, "--splits", "mixed", "pets")
    assert "complete before" in capsys.readouterr().out
    trimaps = data.ImageStore(
        drawn, splits.pets_split(drawn, "train").images, kind="trimap", cache_dir=tmp_path, cache_size=32
    )
    assert len(trimaps) == 19


@pytest.mark.parametrize(
    "args, words",
    [
        (["splits", "--data_root", "nowhere"], "python prepare.py download --data_root nowhere"),
        (["verify", "--data_root", "nowhere"], "nowhere"),
        (["cache", "--data_root", "nowhere", "--cache_size", "2"], "--cache_size must be 16 or more"),
        (["cache", "--splits", "cats"], "invalid choice"),
        (["demo", "--data_root", "new", "--num_pets", "3"], "--num_pets 3 is too few"),
        (["demo", "--data_root", "new", "--seed", "-1"], "--seed"),
        (["demo", "--data_root", "mine"], "holds something else than a demo data set"),
        (["demo", "--data_root", "file"], "holds something else"),
        (["download", "--only", "imagenet"], "invalid choice"),
        (["download", "--mirror", "example.org"], "--mirror"),
        ([], "required"),
    ],
)
def test_wrong_use_is_one_clear_line_with_code_2_and_nothing_written(tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    Path("file").touch()
    with pytest.raises((ValueError, SystemExit)) as error:
        run(*args)
    text = str(error.value) if error.type is not SystemExit else capsys.readouterr().err
    assert getattr(error.value, "exit_code", getattr(error.value, "code", None)) == 2
    assert words in text.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]


def test_the_command_line_ends_with_its_code_and_one_line(tmp_path):
    done = call("demo", "--data_root", tmp_path / "new", "--num_pets", 3, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "prepare.py: error: --num_pets 3 is too few for every split: use 14 or more\n"


def full_size(labels: Path, root: Path):
    """Build instances files of COCO's full size, boxes and short outlines included, from its image-level labels."""
    folder = root / "coco" / "annotations"
    folder.mkdir(parents=True)
    names = [
        {"id": int(i), "name": name, "supercategory": "animal" if 16 <= int(i) <= 25 else "thing"}
        for i, name in json.loads((labels / "categories.json").read_text()).items()
    ]
    for part in ("train", "val"):
        with gzip.open(labels / f"{part}2017_labels.json.gz", "rt") as file:
            found = json.load(file)
        images = [{"id": int(i), "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in found]
        pairs = [
            (int(image), c) for image, categories in found.items() for c in categories * 3
        ]  # as many as the real file
        outline = [[k + 0.25 for k in range(100, 130)]]
        annotations = [
            {"id": n, "image_id": i, "category_id": c, "bbox": [0, 0, 640, 480], "segmentation": outline}
            for n, (i, c) in enumerate(pairs)
        ]
        content = {"images": images, "annotations": annotations, "categories": names}
        (folder / f"instances_{part}2017.json").write_text(json.dumps(content))
    pets = root / "oxford-iiit-pet" / "annotations"
    pets.mkdir(parents=True)
    (pets / "list.txt").write_text("".join(f"Abyssinian_{i} 1 1 1\n" for i in range(7349)))


@pytest.mark.skipif("COCO_LABELS" not in os.environ, reason="COCO_LABELS does not name a folder with COCO's labels")
def test_the_real_labels_give_the_papers_numbers_in_a_minute_and_3_gib(tmp_path):
    full_size(Path(os.environ["COCO_LABELS"]), tmp_path / "data")
    start = time.monotonic()
    code = "import prepare; prepare.main(prepare.get_args_parser().parse_args(['splits']))"
    code += "; print(open('/proc/self/status').read())"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table, _, status = done.stdout.partition("Name:")
    seconds, memory = time.monotonic() - start, int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    print(f"\n{table}{seconds:.1f} s, {memory:.2f} GiB at its peak")
    assert seconds < 60 and memory < 3
    manifest = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "splits").iterdir()}
    counts = {name: m["entries"] for name, m in manifest.items()}
    assert [counts[f"animal{rule}"] for rule in ("", "_unique", "_single")] == [25_739, 23_989, 22_337]
    assert [counts[f"validation{rule}"] for rule in ("", "_unique", "_single")] == [1_090, 1_016, 946]
    assert counts["non_animal"] == 25_739 and manifest["non_animal"]["animal_images"] == 0
    assert counts["mixed"] == 25_918 and manifest["mixed"]["definition"]["animal_fraction"] == 0.5
    assert counts["all"] == 118_287 and manifest["all"]["without_annotation"] == 1_021
    assert [counts[f"pets_{part}"] for part in ("train", "val", "test")] == [5_144, 1_102, 1_103]
    assert manifest["animal"]["categories"]["zebra"] == 1916
