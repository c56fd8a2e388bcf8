"""--tensorboard: the curves are the log, also after an interruption, and cost nothing where nobody asks for them."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import REPOSITORY, SMALL, drawn_root, log, mae_checkpoint, metrics, on_two_processes, run
from stress import assert_same

import baseline
import finetune
import pretrain
from batches import EvalBatches
from curves import Curves
from engine import Distributed, EngineError
from runs import EVENT_FILES, RunFolder

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
CONFIG = {"experiment": {"seed": 0}}
SCRIPTS = {"pretrain": pretrain, "finetune": finetune, "baseline": baseline}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    place = ["--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path_factory.mktemp("cache")]
    return ["--model mae_tiny", *SMALL, *place, "--batch_size 8", "--epochs 2", "--val_epochs 1", "--log_every 2"]


def reader_of(folder: Path):
    """Open a folder as TensorBoard does; its Reload() reads what is new."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    return accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})


def points(reader) -> dict[str, list[tuple]]:
    """Read all curves -> (step, value) by tag, as float32, which TensorBoard keeps."""
    reader.Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def points_of_log(folder: Path) -> dict[str, list[tuple]]:
    """Read what log.jsonl says of the same curves."""
    curves = {}
    for event in ("train", "val"):
        for line in log(folder, event):
            for name, value in line.items():
                if name not in ("event", "step") and value is not None:
                    number = torch.tensor(value, dtype=torch.float32).item()
                    curves.setdefault(f"{event}/{name}", []).append((line["step"], number))
    return curves


def event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(EVENT_FILES))


@pytest.mark.parametrize("script", SCRIPTS)
def test_curves_hold_what_the_log_holds_and_change_no_result(script, flags, tmp_path, tmp_path_factory):
    more = ["--init", mae_checkpoint(tmp_path_factory)] if script == "finetune" else []
    reader_of(tmp_path)
    run(script, *flags, *more, "--output_dir", tmp_path / "plain")
    run(script, *flags, *more, "--tensorboard", "--output_dir", tmp_path / "curves")
    assert event_files(tmp_path / "plain") == []
    assert_same(tmp_path / "plain", tmp_path / "curves")
    assert metrics(tmp_path / "plain")["files"].keys() == metrics(tmp_path / "curves")["files"].keys()
    found = points(reader_of(tmp_path / "curves"))
    assert found == points_of_log(tmp_path / "curves")
    assert {"train/loss", "train/lr", "train/grad_norm", "train/img_s", "val/epoch"} <= found.keys()
    config = json.loads((tmp_path / "curves" / "config.json").read_text())
    assert config["roles"]["tensorboard"] == "computation"


def stop_in_validation(number: int, *args) -> None:
    """Pre-train until a validation, counted from 1, in which a stop signal arrives."""
    batches, begun = EvalBatches.__iter__, []

    def interrupted(self):
        begun.append(0)
        for batch in batches(self):
            if len(begun) == 2 * number:  # animals and other images are two lists
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineError, match="SIGTERM") as info:
        patch.setattr(EvalBatches, "__iter__", interrupted)
        run("pretrain", *args)
    del info  # its traceback keeps the stopped run, and so its lock, alive
    gc.collect()


@pytest.mark.parametrize("before", ["--tensorboard", None])
def test_a_continued_run_has_all_its_curves_once_also_if_they_are_switched_on_then(before, flags, tmp_path):
    args = [*flags, "--epochs 3", "--output_dir", tmp_path / "run"]
    reader = reader_of(tmp_path / "run")
    stop_in_validation(2, *args, *([before] if before else []))
    if before:
        assert points(reader) == points_of_log(tmp_path / "run")
    assert "resumed" in run("pretrain", *args, "--tensorboard")
    expected = points_of_log(tmp_path / "run")
    assert len(expected["val/loss_animal"]) == 3
    assert points(reader_of(tmp_path / "run")) == expected
    assert points(reader) == expected  # one that was open all the time


def test_what_a_lost_process_wrote_after_its_checkpoint_is_in_no_curve(tmp_path):
    folder = tmp_path / "run"
    watching = reader_of(folder)
    first = RunFolder(folder, ALONE, CONFIG)
    first.curves = Curves(folder)
    for step in range(1, 6):
        first.log("train", step=step, loss=1.0 * step, seconds=1.0 * step)
        if step == 3:
            first.save({"step": step})
    assert [step for step, _ in points(watching)["train/loss"]] == [1, 2, 3, 4, 5]
    first._lock.close()
    second = RunFolder(folder, ALONE, CONFIG)
    assert second.load()["step"] == 3
    second.curves = Curves(folder)
    for step in (4, 6):
        second.log("train", step=step, loss=-1.0 * step, seconds=1.0 * step)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0), (6, -6.0)]
    assert points(watching)["train/loss"] == expected
    assert points(reader_of(folder))["train/loss"] == expected
    second._lock.close()
    third = RunFolder(folder, ALONE, CONFIG)
    third.load()
    third.curves = Curves(folder)
    third.log("train", step=4, loss=0.5, seconds=4.0)
    assert points(watching)["train/loss"] == points(reader_of(folder))["train/loss"] == [*expected[:3], (4, 0.5)]
    assert len(event_files(folder)) == 2


def test_the_time_of_a_point_is_that_of_training(tmp_path):
    folder = tmp_path / "run"
    run_folder = RunFolder(folder, ALONE, CONFIG)
    run_folder.curves = Curves(folder)
    for step, seconds in ((1, 10.0), (2, 25.5)):
        run_folder.log("train", step=step, loss=0.1, skipped=None, seconds=seconds)
    run_folder.finish({}, {})
    reader = reader_of(folder)
    reader.Reload()
    first, second = reader.Scalars("train/loss")
    assert abs(second.wall_time - first.wall_time - 15.5) < 1e-3
    assert "train/skipped" not in reader.Tags()["scalars"]


def test_a_run_that_starts_over_keeps_no_curve(flags, tmp_path):
    reader_of(tmp_path)
    args = [*flags, "--output_dir", tmp_path / "run"]
    run("pretrain", *args, "--tensorboard")
    assert len(event_files(tmp_path / "run")) == 1
    run("pretrain", *args, "--resume never")
    assert event_files(tmp_path / "run") == []


def test_a_checkpoint_beside_curves_is_still_a_run_without_its_configuration(tmp_path):
    first = RunFolder(tmp_path / "run", ALONE, CONFIG)
    reader_of(tmp_path)
    first.curves = Curves(first.dir)
    first.log("train", step=1, loss=0.5, seconds=1.0)
    first.save({"step": 1})
    first._lock.close()
    (tmp_path / "run" / "config.json").unlink()
    assert RunFolder(tmp_path / "run", ALONE, CONFIG).load()["step"] == 1


TWO_PROCESSES = """
import sys, pretrain
pretrain.main(pretrain.get_args_parser().parse_args(sys.argv[1:]))
"""


def test_of_several_processes_only_the_first_writes_curves(flags, tmp_path):
    reader_of(tmp_path)
    words = [word for flag in flags for word in str(flag).split()]
    words += ["--epochs", 1, "--num_images", 8, "--batch_size", 4, "--tensorboard", "--output_dir", tmp_path / "run"]
    on_two_processes(TWO_PROCESSES, *words)
    assert len(event_files(tmp_path / "run")) == 1
    assert points(reader_of(tmp_path / "run")) == points_of_log(tmp_path / "run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_the_package_the_flag_is_refused_and_all_else_works(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    parser = SCRIPTS[script].get_args_parser()
    needed = {"pretrain": [], "finetune": ["--init", "model.pt"], "baseline": ["--model", "mae"]}[script]
    assert not parser.parse_args(needed).tensorboard
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([*needed, "--tensorboard"])
    assert "--tensorboard needs the package tensorboard" in capsys.readouterr().err


def test_a_missing_package_is_one_line_before_anything_is_written(tmp_path):
    package = tmp_path / "packages" / "tensorboard"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorboard'\")\n")
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(REPOSITORY / "pretrain.py"), "--tensorboard"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs the package tensorboard (No module named 'tensorboard')" in done.stderr
    assert "pip install tensorboard" in done.stderr
    assert list((tmp_path / "work").iterdir()) == []
