"""Breeds and class folders: labels stay with their images, scores equal slow formulas, both ways give the same numbers."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from class_data import COLOURS, write_breeds, write_folders
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import relative_error
from small_runs import drawn_root, log, mae_checkpoint, metrics, on_two_processes, parser_of, refusal, run, words_of
from stress import assert_same

from classification import Breeds, class_weights, name_breeds, read_breeds
from data import DataError
from engine import EngineError, setup
from folders import read_class_folders
from splits import PetEntry
from study import PlanLine, write_lines

SMALL = "--model mae_tiny --img_size 32 --cache_size 32 --batch_size 8 --warmup_epochs 1 --log_every 1 --device cpu"


@pytest.fixture(scope="module")
def breeds(tmp_path_factory) -> Path:
    """A data root of 150 photos of three breeds."""
    return write_breeds(tmp_path_factory.mktemp("breeds"), each=50)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def place(root: Path, cache: Path) -> list:
    return ["--data_root", root, "--cache_dir", cache]


def train(tmp_path_factory, cache: Path, folder: Path, *flags) -> None:
    """Fine-tune the same small checkpoint on a task."""
    init = mae_checkpoint(tmp_path_factory, "mae_tiny", 32)
    run("finetune", SMALL, "--cache_dir", cache, "--init", init, "--output_dir", folder, *flags)


# -- Labels -------------------------------------------------------------------------------------------------------------


def test_breeds_are_numbered_by_list_txt_and_named_as_their_photos(breeds):
    parts = read_breeds(str(breeds))
    assert parts.classes == tuple(sorted(COLOURS))
    for images in parts.parts.values():
        for image in images:
            assert parts.classes[parts.labels[image]] == Path(image).stem.rpartition("_")[0]
            assert parts.ids[image] == f"{parts.classes[parts.labels[image]]}/{Path(image).name}"
    assert [len(images) for images in parts.parts.values()] == [105, 22, 23]


def test_a_class_id_whose_photos_do_not_agree_on_a_name_is_named_by_its_number():
    entries = [("pug_1", 1), ("pug_2", 1), ("beagle_1", 2), ("boxer_1", 2), ("samoyed_1", 3), ("samoyed_2", 4)]
    named = name_breeds([PetEntry(name, class_id, 1, 1) for name, class_id in entries])
    assert named == {1: "pug", 2: "class 2", 3: "class 3", 4: "class 4"}


def change_list(breeds: Path, root: Path, change) -> Path:
    """Copy a data root with another list.txt."""
    shutil.copytree(breeds, root)
    path = root / "oxford-iiit-pet/annotations/list.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    return root


def test_a_list_without_breeds_and_a_breed_with_one_image_are_refused_in_one_line(breeds, tmp_path):
    without = change_list(breeds, tmp_path / "without", lambda rows: [f"{row.split()[0]} 1 1 1" for row in rows[1:]])
    with pytest.raises(
        EngineError, match=r"all images of list.txt have the class id 1; a list with two breeds or more"
    ):
        read_breeds(str(without))
    single = change_list(breeds, tmp_path / "single", lambda rows: rows[:102])
    with pytest.raises(DataError, match="class pug has 1 image; at least 3 are needed, one for each part"):
        read_breeds(str(single))


@pytest.mark.parametrize("damaged", [0, 50, 104])
def test_an_image_that_cannot_be_read_takes_its_label_with_it(damaged, breeds, tmp_path, tmp_path_factory, capsys):
    root = tmp_path / "root"
    shutil.copytree(breeds, root)
    image = read_breeds(str(root)).parts["train"][damaged]
    (root / image).write_bytes(b"damaged")
    line = words_of(["--task", "breeds", SMALL, *place(root, tmp_path / "cache"), "--init", "none"])
    args = parser_of("finetune", line).parse_args(line)
    args.init = None
    task = Breeds(args, setup("cpu"))
    examples = task.open(type("Run", (), {"dir": tmp_path})).examples
    assert f"{image}: cannot be read" in capsys.readouterr().err
    assert len(examples.images) == 104
    assert examples.images.dropped == [image]
    for path, label in zip(examples.images.images, examples.targets["label"], strict=True):
        assert task.parts.classes[label] == Path(path).stem.rpartition("_")[0]


# -- Scores -------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_the_weighted_mean_is_the_mean_of_the_classes_accuracies(images):
    labels = np.array([label for label, _ in images])
    right = np.array([correct for _, correct in images])
    weights = class_weights(labels)
    slow = np.mean([right[labels == label].mean() for label in set(labels.tolist())])
    assert weights.mean() == pytest.approx(1)
    assert (right * weights).sum() / weights.sum() == pytest.approx(slow)


@pytest.fixture(scope="module")
def tuned(breeds, cache, tmp_path_factory) -> Path:
    """A run on the three breeds, tested."""
    folder = tmp_path_factory.mktemp("study") / "seed0/finetune_animal"
    flags = ["--task", "breeds", "--data_root", breeds, "--epochs", 6, "--blr", 1e-2, "--drop_path", 0]
    train(tmp_path_factory, cache, folder, *flags)
    run("evaluate", "test", folder, *place(breeds, cache), "--device", "cpu", "--batch_size", 5)
    return folder


def test_fine_tuning_tells_the_breeds_apart_and_the_records_say_how_well(tuned):
    with np.load(tuned / "test.npz") as arrays:
        records = dict(arrays)
    assert records["score_names"].tolist() == ["loss", "accuracy", "class_accuracy"]
    assert len(set(records["ids"])) == 23
    right = records["truth"] == records["predicted"]
    each = [right[records["truth"] == label].mean() for label in range(3)]
    found = records["numerators"].sum(0) / records["denominators"].sum(0)
    assert found[1] == pytest.approx(right.mean())
    assert found[2] == pytest.approx(np.mean(each))
    guess = records["reference_numerators"].sum(0) / records["denominators"].sum(0)
    assert guess[2] == pytest.approx(1 / 3)
    assert found[1] > guess[1] + 0.3
    names = [name.split("/")[0] for name in records["ids"]]
    assert [records["classes"][label] for label in records["truth"]] == names


def test_validation_scores_are_those_of_the_weights_that_are_kept(tuned, breeds, cache, tmp_path_factory):
    best = metrics(tuned)["best"]
    assert best["accuracy"] == max(line["accuracy"] for line in log(tuned, "val"))
    content = torch.load(tuned / "model.pt", weights_only=True)
    assert content["classes"] == sorted(COLOURS)
    assert content["model_config"]["num_classes"] == 3
    assert json.loads((tuned / "config.json").read_text())["select"] == "accuracy"


def test_predict_prints_a_name_and_a_probability_for_the_likeliest_classes(tuned, breeds):
    images = [breeds / read_breeds(str(breeds)).parts["test"][number] for number in (0, -1)]
    text = run("evaluate", "predict", "--checkpoint", tuned / "model.pt", "--device", "cpu", *images)
    lines = text.splitlines()
    for image, first in zip(images, (0, 4), strict=True):
        assert lines[first] == f"{image}:"
        guesses = [line.removeprefix("  ").split(", ") for line in lines[first + 1 : first + 4]]
        assert {name for name, _ in guesses} == set(COLOURS)
        shares = [float(share) for _, share in guesses]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=0.002)
        assert guesses[0][0] == image.stem.rpartition("_")[0]


def test_the_report_sets_the_networks_beside_the_class_frequencies(tuned):
    study = tuned.parent.parent
    line = PlanLine(0, "finetune", "animal", "seed0/finetune_animal", "", "", None, "finetune.py --task breeds")
    (study / "study.tsv").write_text(write_lines([line]))
    run("report", study)
    rows = json.loads((study / "report/task_breeds.json").read_text())
    assert [row["arm"] for row in rows] == ["Finetuned-Animals", "class frequencies (look at no image)"]
    assert rows[0]["accuracy_low"] <= rows[0]["accuracy"] <= rows[0]["accuracy_high"]
    assert rows[0]["class_accuracy"] > rows[1]["class_accuracy"] == pytest.approx(1 / 3)
    text = (study / "report/report.md").read_text()
    assert "top-1 accuracy" in text
    assert "accuracy, mean over classes" in text


# -- Two ways to say the same -------------------------------------------------------------------------------------------


def assert_equal_runs(a: Path, b: Path) -> None:
    """Demand the same weights and test records, to the bit."""
    mine, other = (torch.load(folder / "model.pt", weights_only=True) for folder in (a, b))
    assert mine["model"].keys() == other["model"].keys()
    assert mine["classes"] == other["classes"]
    for key, tensor in mine["model"].items():
        assert torch.equal(tensor, other["model"][key]), key
    with np.load(a / "test.npz") as mine, np.load(b / "test.npz") as other:
        assert set(mine) == set(other)
        for name in mine:
            assert np.array_equal(mine[name], other[name]), name


def test_drawn_data_as_class_folders_give_the_same_weights_and_scores_as_list_txt(tmp_path, tmp_path_factory):
    """Both sort their images by class and name, so even the order is the same."""
    root = drawn_root(tmp_path_factory)
    cache = tmp_path / "cache"
    folder = write_folders(read_breeds(str(root)), tmp_path / "photos")
    flags = ["--epochs", 3, "--blr", 1e-2, "--drop_path", 0.2]
    train(tmp_path_factory, cache, tmp_path / "list", *flags, "--task", "breeds", "--data_root", root)
    train(tmp_path_factory, cache, tmp_path / "folders", *flags, "--task", "classify", "--images", folder)
    run("evaluate", "test", tmp_path / "list", *place(root, cache), "--device", "cpu")
    moved = folder.rename(tmp_path / "moved")
    assert "--images" in refusal("evaluate", "test", tmp_path / "folders", "--cache_dir", cache, "--device", "cpu")
    run("evaluate", "test", tmp_path / "folders", "--images", moved, "--cache_dir", cache, "--device", "cpu")
    assert_equal_runs(tmp_path / "list", tmp_path / "folders")
    config = json.loads((tmp_path / "folders/config.json").read_text())
    assert config["data"] == {"root": str(folder), "title": "images of photos"}
    again = ("evaluate", "test", tmp_path / "folders", "--again", "--cache_dir", cache, "--device", "cpu")
    for part in ("train", "val", "test"):
        shutil.rmtree(moved / part / "pug", ignore_errors=True)
    assert "the network knows 14 classes, " in refusal(*again, "--images", moved)
    assert "leave --images out" in refusal("evaluate", "test", tmp_path / "list", "--again", "--images", moved)


def test_an_interrupted_run_ends_as_an_undisturbed_one(breeds, cache, tmp_path, tmp_path_factory, monkeypatch):
    flags = ["--task", "breeds", "--data_root", breeds, "--train_fraction", 0.3, "--epochs", 3, "--drop_path", 0.2]
    train(tmp_path_factory, cache, tmp_path / "undisturbed", *flags)
    validate = Breeds.validate

    def interrupted(self, step, stopping):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, step, stopping)

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="SIGTERM; checkpoint written"):
        patch.setattr(Breeds, "validate", interrupted)
        train(tmp_path_factory, cache, tmp_path / "stopped", *flags)
    train(tmp_path_factory, cache, tmp_path / "stopped", *flags)
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")


TRAIN_BREEDS = """
import sys
import finetune
finetune.main(finetune.get_args_parser("breeds").parse_args(sys.argv[1:]))
"""


def test_two_processes_give_the_weights_and_scores_of_one(breeds, cache, tmp_path, tmp_path_factory):
    flags = ["--task", "breeds", "--data_root", breeds, "--train_fraction", 0.3, "--epochs", 2, "--drop_path", 0.2]
    train(tmp_path_factory, cache, tmp_path / "one", *flags)
    more = ["--init", mae_checkpoint(tmp_path_factory, "mae_tiny", 32), "--cache_dir", cache]
    on_two_processes(TRAIN_BREEDS, *words_of([SMALL, *flags, *more]), "--output_dir", tmp_path / "two")
    expected = torch.load(tmp_path / "one/model.pt", weights_only=True)["model"]
    found = torch.load(tmp_path / "two/model.pt", weights_only=True)["model"]
    for key, tensor in expected.items():
        assert relative_error(found[key], tensor) < 1e-4, key
    for name in ("loss", "accuracy", "class_accuracy"):
        assert metrics(tmp_path / "two")["last"][name] == pytest.approx(
            metrics(tmp_path / "one")["last"][name], rel=1e-4
        )


@pytest.mark.parametrize("flags", [["--model", "resnet50"], ["--model", "mae_tiny", "--pool", "cls"]])
def test_baselines_plan_the_same_task_without_a_checkpoint(flags, breeds, tmp_path):
    whole = [SMALL, *flags, "--task", "breeds", "--data_root", breeds, "--output_dir", tmp_path / "dry", "--dry_run"]
    text = run("baseline", *whole)
    assert f"baseline (breeds): {flags[1]}" in text
    assert "105 list entries" in text


# -- Pre-training on one's own images -----------------------------------------------------------------------------------


def test_pre_training_on_a_tree_needs_no_coco_and_is_judged_on_held_out_images(breeds, cache, tmp_path):
    images = breeds / "oxford-iiit-pet/images"
    flags = [SMALL, "--images", images, *place(tmp_path / "nothing", cache), "--blr", 1e-2, "--epochs", 3]
    run("pretrain", *flags, "--output_dir", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["scores"] == {"loss_held_out": "loss on held-out images"}
    assert config["n_train"] == 142
    assert config["data"] == {"root": str(images), "title": "images of images"}
    scores = log(tmp_path / "run", "val")
    assert scores[-1]["loss_held_out"] < scores[0]["loss_held_out"]
    assert metrics(tmp_path / "run")["predict_zero"]["held_out"] > 0
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    assert "nothing to do" in run("pretrain", *flags, "--images", moved, "--output_dir", tmp_path / "run")
    (moved / "Bengal_0.jpg").unlink()
    message = refusal("pretrain", *flags, "--images", moved, "--output_dir", tmp_path / "run")
    assert "train was" in message


@pytest.mark.parametrize("flag", ["--split mixed", "--categories dog", "--animal_images unique"])
def test_flags_that_choose_images_of_coco_are_refused_beside_ones_own(flag, breeds, tmp_path):
    message = refusal("pretrain", SMALL, "--images", breeds, flag, "--output_dir", tmp_path / "run")
    assert f"{flag.split()[0]} chooses images of COCO" in message


def test_what_a_study_of_own_images_needs_is_read_first(breeds, cache, tmp_path):
    images = breeds / "oxford-iiit-pet/images"
    (tmp_path / "classes").mkdir()
    folder = write_folders(read_breeds(str(breeds)), tmp_path / "classes")
    assert len(read_class_folders(folder).parts["train"]) == 105
    small = f"{SMALL} --cache_dir {cache}"
    lines = [
        PlanLine(0, "pretrain", "images", "p", "", "", None, f"pretrain.py {small} --images {images}"),
        PlanLine(0, "baseline", "mae", "b", "", "", None, f"baseline.py {small} --task classify --images {folder}"),
    ]
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.tsv").write_text(write_lines(lines))
    assert "reading 300 photos and 0 trimaps" in run("read_data", tmp_path / "study")
    shutil.rmtree(folder / "val")
    assert "has train/ but no val/" in refusal("read_data", tmp_path / "study")
