"""What a study will need is read before its first training: damage is known at once, and counted truly at the end."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_runs import IMG, drawn_root, mae_checkpoint, metrics, refusal, run

import data
import splits
from study import PlanLine, write_lines

FLAGS = f"--model mae_tiny --img_size {IMG} --cache_size 96 --batch_size 4 --epochs 1"


@pytest.fixture
def root(tmp_path, tmp_path_factory):
    """A copy of the drawn photos that may be damaged."""
    return shutil.copytree(drawn_root(tmp_path_factory), tmp_path / "root")


@pytest.fixture
def study(root, tmp_path):
    """The plan of a pre-training, a fine-tuning of it and a baseline, of which nothing has run."""
    folder = tmp_path / "study"
    place = f"--data_root {root} --cache_dir {tmp_path / 'cache'}"
    init = f"--init {folder}/seed0/pretrain_animal/model.pt"
    lines = [
        plan_line("pretrain", "animal", "", f"{FLAGS} {place}"),
        plan_line("finetune", "animal", "seed0/pretrain_animal", f"{FLAGS} {init} {place}"),
        plan_line("baseline", "resnet50", "", f"{FLAGS.replace('mae_tiny', 'resnet50')} {place}"),
    ]
    folder.mkdir()
    (folder / "study.tsv").write_text(write_lines(lines))
    return folder


def plan_line(stage: str, arm: str, parent: str, flags: str) -> PlanLine:
    return PlanLine(0, stage, arm, f"seed0/{stage}_{arm}", parent, "", None, f"{stage}.py {flags}")


def part_of(root: Path, part: str) -> tuple[str, ...]:
    return splits.pets_split(root, part).images


def test_everything_is_decoded_once_and_nothing_is_left_for_the_trainings(study, root, tmp_path, monkeypatch):
    text = run("read_data", study)
    assert "reading 80 photos and 46 trimaps" in text
    assert "everything that the study needs can be read" in text
    monkeypatch.setattr(data, "read_image", lambda path: pytest.fail("decoded again"))
    run("read_data", study)
    cache = {"cache_dir": tmp_path / "cache"}
    for part, size in (("train", 96), ("val", IMG), ("test", IMG)):
        assert len(data.ImageStore(root, part_of(root, part), cache_size=size, **cache)) == len(part_of(root, part))
    assert len(data.ImageStore(root, part_of(root, "train"), kind="trimap", cache_size=96, **cache)) == 32


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_damaged_trimap_of_any_part_is_named_before_the_first_training(study, root, part):
    name = data.trimap_path(part_of(root, part)[0])
    (root / name).write_bytes((root / name).read_bytes()[:40])
    message = refusal("read_data", study)
    assert name in message and "every trimap is needed" in message and "prepare.py verify" in message


@pytest.mark.parametrize("part", ["val", "test"])
def test_photos_that_cannot_be_read_are_named_before_the_first_training(study, root, part):
    name = part_of(root, part)[0]  # one of few, and so more than 1 %
    (root / name).write_bytes(b"")
    message = refusal("read_data", study)
    assert name in message and "the file is empty" in message


def test_a_folder_without_a_plan_is_refused(tmp_path):
    assert "has no study.tsv" in refusal("read_data", tmp_path)


def test_a_photo_that_was_left_out_is_counted_by_training_test_and_reference_alike(
    root, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    monkeypatch.setattr(data, "MAX_UNREADABLE", 0.2)  # of so few photos one is more than 1 %
    damaged = [part_of(root, part)[0] for part in ("train", "test")]
    (root / damaged[0]).write_bytes(b"")
    test_photo = root / damaged[1]
    test_photo.write_bytes(test_photo.read_bytes()[: os.path.getsize(test_photo) // 2])  # its header is good
    place = ["--data_root", root, "--cache_dir", tmp_path / "cache", "--device", "cpu"]
    folder = tmp_path / "run"
    init = ["--init", mae_checkpoint(tmp_path_factory)]
    out = run("finetune", *FLAGS.split(), *place, *init, "--output_dir", folder)
    assert f"left out: {root / damaged[0]}" in capsys.readouterr().err
    assert "1 of 32 images cannot be read and is left out" in out
    found = metrics(folder)
    assert (found["n_train"], found["n_unique"], found["unreadable"]) == (31, 31, [damaged[0]])
    run("evaluate", "test", folder, *place)
    run("evaluate", "reference", *place, "--img_size", IMG, "--output", tmp_path / "reference.npz")
    with np.load(folder / "test.npz") as tested, np.load(tmp_path / "reference.npz") as reference:
        assert tested["unreadable"].tolist() == [damaged[1]] and len(tested["ids"]) == 7
        assert tested["ids"].tolist() == reference["ids"].tolist()
