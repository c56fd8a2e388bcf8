"""The study script: all nine trainings at a cut size, skipping, repeating what depends on a lost run, wrong use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARMS = [
    "finetune_animal",
    "finetune_half",
    "finetune_non_animal",
    "finetune_mixed",
    "baseline_mae",
    "baseline_resnet50",
]


def run_all(*args, cwd=None, **env):
    command = ["bash", str(ROOT / "run_all.sh"), *map(str, args)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PATH": path, **env})


def trained(result) -> list[str]:
    """Names of the trainings that a run of the script really started."""
    lines = result.stdout.splitlines()
    return [line[3:] for line in lines if line.startswith("== seed0_") and "evaluate" not in line and ":" not in line]


def trained_again(args) -> list[str]:
    """Run the script once more, successfully -> the trainings that it started."""
    result = run_all(*args)
    assert result.returncode == 0, result.stdout + result.stderr
    return trained(result)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished cut demo on few drawn photos."""
    folder = tmp_path_factory.mktemp("study with 'odd' \"names\"\nund Umläuten $HOME")
    draw = [sys.executable, str(ROOT / "prepare.py"), "demo", "--data_root", str(folder / "data")]
    subprocess.run([*draw, "--num_train", "80", "--num_val", "16", "--num_pets", "48"], check=True, capture_output=True)
    args = ["--demo", "--data_root", folder / "data", "--output", folder / "out", "--cache_dir", folder / "cache"]
    args += ["--gpus", 0, "--pretrain_args", "--epochs 1", "--finetune_args", "--epochs 1"]
    result = run_all(*args)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "out", args, result


def test_the_demo_trains_three_autoencoders_and_six_arms(study):
    out, _, result = study
    assert len(trained(result)) == 9
    for arm in ARMS:
        metrics = json.loads((out / "seed0" / arm / "metrics.json").read_text())
        assert 0 <= metrics["best"]["iou"] <= 1 and metrics["best"]["loss"] < 10


def test_the_report_shows_six_arms_with_finite_numbers_and_the_trivial_predictors(study):
    out, _, _ = study
    text = (out / "report" / "report.md").read_text()
    for name in ("ResNet-50", "Supervised MAE", "Finetuned-Animals", "Finetuned-Half", "all animal", "all background"):
        assert name in text
    assert "demo" in text.splitlines()[0]
    table = (out / "report" / "table2.csv").read_text()
    assert table.count("Finetuned") == 4
    assert {p.name for p in (out / "report").glob("*.png")} >= {"curves.png", "reconstruction.png", "masks.png"}


def test_a_second_run_trains_nothing_and_says_so(study):
    _, args, _ = study
    result = run_all(*args)
    assert result.returncode == 0 and trained(result) == []
    assert result.stdout.count("finished before, skipped") >= 10


def test_a_lost_run_is_repeated_with_what_depends_on_it(study):
    out, args, _ = study
    shutil.rmtree(out / "seed0" / "pretrain_non_animal")
    assert trained_again(args) == ["seed0_pretrain_non_animal", "seed0_finetune_non_animal"]


def test_an_unfinished_run_is_started_anew_when_what_it_starts_from_was_trained_again(study):
    out, args, _ = study
    folder = out / "seed0" / "finetune_mixed"
    for name in ("metrics.json", "test.npz", "model.pt"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    config["experiment"]["init"] = "weights of an earlier pre-training"
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(out / "seed0" / "pretrain_mixed")
    assert trained_again(args) == ["seed0_pretrain_mixed", "seed0_finetune_mixed"]


def test_changed_flags_are_refused_however_often_they_are_repeated(study):
    _, args, _ = study
    for _ in range(2):
        result = run_all(*args, "--pretrain_args", "--epochs 2")
        assert result.returncode == 2 and trained(result) == ["seed0_pretrain_animal"]
        assert "holds another experiment: epochs was 1, now 2" in result.stdout


def test_a_dry_run_prints_every_command_and_writes_nothing(tmp_path):
    result = run_all("--dry_run", "--gpus", 4, "--seeds", "0 1", "--sweep", "animal_fraction", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pretrain.py") == 2 * (3 + 7) and "--nproc_per_node 4" in result.stdout
    assert "--num_images 25918" in result.stdout and "prepare.py splits" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_failed_stage_stops_the_study_and_says_how_to_repeat_it(tmp_path):
    for file in ("coco/annotations/instances_train2017.json", "coco/annotations/instances_val2017.json",
                 "oxford-iiit-pet/annotations/list.txt"):  # fmt: skip
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).write_text("{}")
    result = run_all("--data_root", tmp_path / "data", "--output", tmp_path / "out", "--gpus", 0)
    assert result.returncode == 2
    assert "so not a COCO instances file" in result.stdout and "stage splits failed" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--no_such"],
        ["--gpus", "two"],
        ["--seeds", "a b"],
        ["--sweep", "colour"],
        ["--data_root", "nowhere"],
        [],
        ["--seeds", "0 1 0"],
        ["--seeds", "00"],
        ["--pretrain_args", "--epochs '1"],
        ["--model"],
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2_with_nothing_written(args, tmp_path):
    result = run_all(*args, cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
