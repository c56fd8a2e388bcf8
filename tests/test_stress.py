"""A sample of the fault campaign (tests/stress.py), and what it found, each in a test of its own."""

import gc
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from fault_world import World, seal_run
from faults import open_folder
from small_runs import SMALL, drawn_root, mae_checkpoint, metrics, refusal, run
from stress import FAILURES, campaign
from study_folder import write_study

import carry_out
import data
import evaluate
import weights
from engine import Distributed, EngineError, read_json, write_json
from groups import Study
from runs import RunFolder

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
CONFIG = {"experiment": {"blr": 0.1, "seed": 0}}


@pytest.fixture(scope="module")
def world():
    with open_folder() as folder:
        yield World(folder)


@pytest.mark.parametrize("seed", range(4))
def test_no_damaged_file_gives_another_result_or_a_traceback(world, seed):
    outcomes = campaign(world, 50, seed)
    assert [outcome for outcome in outcomes if outcome.verdict in FAILURES] == []
    assert {"same", "refused"} <= {outcome.verdict for outcome in outcomes}


def test_json_is_written_with_a_checksum_that_any_change_breaks(tmp_path):
    path = tmp_path / "a.json"
    content = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(path, content)
    assert read_json(path) == content
    whole = path.read_text()
    rng = random.Random(0)
    for _ in range(300):
        place = rng.randrange(len(whole))
        path.write_text(whole[:place] + chr(rng.randrange(32, 127)) + whole[place + 1 :])
        try:
            found = read_json(path)
        except EngineError as error:
            assert str(path) in str(error)
        else:
            assert {key: found[key] for key in content if key in found} == content  # the word "checksum" or a blank
    path.write_text(json.dumps(content))
    assert read_json(path) == content, "one without a checksum is taken as it is"


def test_a_checkpoint_of_another_experiment_or_of_other_pixels_is_refused(tmp_path):
    other = {"experiment": {"blr": 0.2, "seed": 0}}
    for name, config, pixels in (("a", CONFIG, "p"), ("b", other, "p"), ("c", CONFIG, "q")):
        folder = RunFolder(tmp_path / name, ALONE, config)
        folder.bind(images=pixels)
        folder.log("train", step=1)
        folder.save({"step": 1})
        folder._lock.close()
    for name, words in (("b", "is of another experiment"), ("c", "the images have changed since")):
        shutil.copy(tmp_path / name / "last.pt", tmp_path / "a/last.pt")
        folder = RunFolder(tmp_path / "a", ALONE, CONFIG)
        folder.bind(images="p")
        with pytest.raises(EngineError, match=rf"{words}.*--resume never"):
            folder.load()
        folder._lock.close()


@pytest.mark.parametrize("lost", ["log.jsonl", "config.json"])
def test_a_lost_log_or_configuration_comes_back_from_the_checkpoint(tmp_path, lost):
    folder = RunFolder(tmp_path, ALONE, CONFIG)
    folder.log("train", step=1)
    folder.save({"step": 1})
    folder.log("train", step=2)
    folder._lock.close()
    (tmp_path / lost).unlink()
    again = RunFolder(tmp_path, ALONE, CONFIG)
    assert again.load()["step"] == 1
    again.log("train", step=2)
    again._lock.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert read_json(tmp_path / "config.json") == CONFIG


def test_a_changed_photo_is_told_and_a_run_that_had_begun_with_it_is_refused(
    tmp_path, tmp_path_factory, capsys, monkeypatch
):
    root = shutil.copytree(drawn_root(tmp_path_factory), tmp_path / "root")
    flags = ["--data_root", root, "--cache_dir", tmp_path / "cache", "--model", "mae_tiny", *SMALL]
    flags += ["--num_images 8 --batch_size 4 --epochs 2 --save_minutes 0", "--output_dir", tmp_path / "run"]
    finish = RunFolder.finish
    monkeypatch.setattr(RunFolder, "finish", lambda *_: (_ for _ in ()).throw(EngineError("cut", 1)))
    assert refusal("pretrain", *flags) == "cut"
    gc.collect()  # its lock
    monkeypatch.setattr(RunFolder, "finish", finish)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["experiment"]["val_animal"], "held-out lists define the experiment too"
    for photo in (root / "coco/train2017").iterdir():
        with data.Image.open(photo) as image:
            image.transpose(data.Image.Transpose.FLIP_LEFT_RIGHT).save(photo)
    capsys.readouterr()
    with pytest.raises(EngineError, match=r"the images have changed since .*last\.pt"):
        run("pretrain", *flags)
    told = capsys.readouterr().err
    assert told.count("has other pixels than when it was decoded before") == 8


def test_weights_of_which_a_bit_was_changed_are_refused_and_so_are_those_of_another_run(tmp_path, tmp_path_factory):
    path = tmp_path / "model.pt"
    shutil.copy(mae_checkpoint(tmp_path_factory), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(weights.CheckpointError, match="is damaged"):
        weights.load_model(path)
    folder = RunFolder(tmp_path / "run", ALONE, CONFIG)
    folder.finish({"model": {}}, {})
    folder._lock.close()
    assert weights.identify(tmp_path / "run/model.pt") == metrics(tmp_path / "run")["files"]["model.pt"]
    shutil.copy(mae_checkpoint(tmp_path_factory), tmp_path / "run/model.pt")
    with pytest.raises(weights.CheckpointError, match=r"model\.pt is not what its run has written"):
        weights.identify(tmp_path / "run/model.pt")


def test_no_clock_decides_whether_a_run_was_tested(tmp_path):
    run_folder = RunFolder(tmp_path, ALONE, CONFIG)
    run_folder.finish({"model": {}}, {})
    digest = weights.identify(tmp_path / "model.pt")
    evaluate.write_records(tmp_path, {"ids": np.arange(3), "panel_ids": np.arange(2)}, digest)
    for name in ("test.npz", "model.pt", "metrics.json"):
        for moment in (0, 2 * 10**9):
            os.utime(tmp_path / name, (moment, moment))
            assert evaluate.is_tested(tmp_path, digest) and carry_out.is_tested(tmp_path)
    assert not evaluate.is_tested(tmp_path, "of other weights")
    (tmp_path / "panels.npz").write_bytes(b"")
    assert not evaluate.is_tested(tmp_path, digest)


def test_a_run_is_stale_by_the_hash_of_what_it_started_from_and_not_by_the_clock(tmp_path):
    write_study(tmp_path, seeds=(0,), n=10, epochs=1)
    parent = tmp_path / "seed0/pretrain_animal"
    child = tmp_path / "seed0/finetune_animal"
    for folder in (parent, child):
        seal_run(folder)
    files = next(
        carry_out.Files(tmp_path, line)
        for line in carry_out.read_plan(tmp_path / "study.tsv")
        if line.folder == "seed0/finetune_animal"
    )
    assert carry_out.is_stale(files), "it started from something else"
    config = json.loads((child / "config.json").read_text())
    config["experiment"]["init"] = json.loads((parent / "metrics.json").read_text())["files"]["model.pt"]
    write_json(child / "config.json", config)
    for moment in (0, 4 * 10**9):
        os.utime(parent / "metrics.json", (moment, moment))
        assert not carry_out.is_stale(files)


def test_a_run_whose_images_had_other_pixels_is_not_compared(tmp_path):
    write_study(tmp_path, seeds=(0,), n=10, epochs=1)
    for arm in ("animal", "mixed", "non_animal"):
        path = tmp_path / f"seed0/finetune_{arm}"
        config = json.loads((path / "config.json").read_text())
        config["experiment"]["train"] = "one list"
        write_json(path / "config.json", config)
        content = json.loads((path / "metrics.json").read_text())
        write_json(path / "metrics.json", {**content, "pixels": "others" if arm == "mixed" else "usual"})
    notes = Study(tmp_path).notes
    assert (
        "`seed0/finetune_mixed` is not comparable: images of its list had other pixels than for its siblings" in notes
    )


def test_a_plan_of_which_a_line_is_lost_or_changed_is_refused(tmp_path):
    write_study(tmp_path, seeds=(0,), n=10, epochs=1)
    table = tmp_path / "study.tsv"
    lines = table.read_text().splitlines(keepends=True)
    for damaged in (lines[:-1], lines[:-2] + lines[-1:], [line.replace("half", "holf") for line in lines]):
        table.write_text("".join(damaged))
        with pytest.raises(ValueError, match=r"study\.tsv is damaged: .*; repeat the run_all\.sh command"):
            Study(tmp_path)


def test_a_finished_run_with_a_damaged_record_is_refused_instead_of_taken_for_finished(tmp_path):
    run_folder = RunFolder(tmp_path, ALONE, CONFIG)
    run_folder.finish({"model": {}}, {"best": 0.5})
    run_folder._lock.close()
    path = tmp_path / "metrics.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(EngineError, match=r"metrics\.json is damaged"):
        RunFolder(tmp_path, ALONE, CONFIG)


def test_a_finished_run_whose_weights_are_gone_is_made_again(tmp_path):
    for _ in range(2):
        run_folder = RunFolder(tmp_path, ALONE, CONFIG)
        assert not run_folder.finished and run_folder.load() is None
        run_folder.log("train", step=1)
        run_folder.finish({"model": {}}, {})
        run_folder._lock.close()
        (tmp_path / "model.pt").unlink()
