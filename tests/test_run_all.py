"""The study script: all nine trainings at a cut size, skipping, repeating what depends on a lost run, wrong use."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import splits
import study as study_script
from study import PlanLine, read_lines, write_lines

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


def test_a_machine_without_torch_can_show_the_plan(tmp_path):
    """Nothing but the standard library is imported: -S leaves the installed packages out."""
    command = [sys.executable, "-S", str(ROOT / "study.py"), "plan", "--dry_run", "--extra_arms", "cars"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--split cars" in done.stdout and "--num_images 25918" in done.stdout
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


def plan(*args) -> list[PlanLine]:
    """The plan that study.py prints without data."""
    command = [sys.executable, str(ROOT / "study.py"), "plan", "--dry_run", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return read_lines(done.stdout)


def test_the_plan_has_a_line_for_each_run_with_what_it_starts_from():
    lines = plan("--seeds", 0, 1, "--sweep", "animal_fraction", "--sweep", "label_fraction")
    assert len(lines) == 2 * (9 + 14 + 16)
    above = set()
    for line in lines:
        assert line.folder == f"seed{line.seed}/{line.stage}_{line.arm}" and line.folder not in above
        assert (line.parent in above) == (line.stage == "finetune")
        above.add(line.folder)
        words = shlex.split(line.command)
        assert words[words.index("--output_dir") + 1] == f"runs/study/{line.folder}"
        assert ("--init" in words) == bool(line.parent)
        assert words[words.index("--seed") + 1] == words[words.index("--split_seed") + 1] == str(line.seed)
    assert [(line.sweep, line.value) for line in lines if line.arm == "dose_0.25"] == [("animal_fraction", 0.25)] * 4
    [half] = [line for line in lines if line.folder == "seed0/finetune_half"]
    assert half.parent == "seed0/pretrain_animal" and "--train_fraction 0.5" in half.command
    assert plan("--seeds", "0 1") == plan("--seeds", 0, 1)


def test_lines_of_one_seed_and_stage_do_not_depend_on_each_other():
    lines = plan("--sweep", "animal_fraction", "--sweep", "label_fraction", "--extra_arms")
    stages = [line.stage for line in lines]
    assert stages == sorted(stages, key=["pretrain", "finetune", "baseline"].index)


def test_any_split_can_be_an_arm():
    lines = plan("--extra_arms")
    assert {"pets", "all"} < {line.arm for line in lines} and len(lines) == 13
    lines = plan("--extra_arms", "pets")
    assert [line.stage for line in lines if line.arm == "pets"] == ["pretrain", "finetune"] and len(lines) == 11


def test_a_split_that_was_added_to_splits_is_an_arm(monkeypatch, capsys):
    monkeypatch.setattr(splits, "SPLITS", {**dict.fromkeys(splits.SPLITS), "cars": None})
    study_script.main(["plan", "--dry_run", "--extra_arms", "cars", "pets"])
    lines = read_lines(capsys.readouterr().out)
    found = [(line.stage, line.parent) for line in lines if line.arm == "cars"]
    assert found == [("pretrain", ""), ("finetune", "seed0/pretrain_cars")]


def test_trivial_predictors_belong_to_segmentation_alone(tmp_path):
    for task, expected in (("segment", True), ("breeds", False)):
        result = run_all("--dry_run", "--gpus", 0, "--task", task, cwd=tmp_path)
        assert result.returncode == 0 and ("reference.npz" in result.stdout) == expected


@pytest.mark.parametrize("option", [["--extra_arms", "cars"], ["--model", "huge"], ["--extra_arms", "animal"]])
def test_an_unknown_split_or_model_is_refused(option, tmp_path):
    result = run_all("--dry_run", *option, cwd=tmp_path)
    assert result.returncode == 2 and option[-1] in result.stderr and len(result.stderr.splitlines()) == 1


def test_flags_of_the_user_come_last_and_other_objectives_and_tasks_are_named():
    args = ["--pretrain_args", "--no-compile", "--finetune_args", "--epochs '3' --flips", "--objective", "dino"]
    lines = plan(*args, "--task", "breeds", "--demo")
    for line in lines:
        words = shlex.split(line.command)
        own = words[: words.index("--data_root")]
        if line.stage == "pretrain":
            assert own[-1] == "--no-compile" and own[own.index("--objective") + 1] == "dino"
        else:
            assert own[-3:] == ["--epochs", "3", "--flips"] and own[own.index("--task") + 1] == "breeds"
    assert not any("--objective" in line.command or "--task" in line.command for line in plan("--demo"))


def test_a_plan_survives_being_written_whatever_its_folders_are_called(tmp_path):
    name = "tab\tbreak\nquote'\" \\ $HOME"
    lines = plan("--output", name)
    assert read_lines(write_lines(lines)) == lines
    show = subprocess.run(["bash", "-c", f"printf '%s\\0' {lines[0].command}"], capture_output=True, text=True)
    words = show.stdout.split("\0")[:-1]
    assert words[words.index("--output_dir") + 1] == f"{name}/seed0/pretrain_animal"


FAKE = """import pathlib, signal, sys, time
name = pathlib.Path(sys.argv[0]).name
if name == "pretrain.py":
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
    folder.mkdir(parents=True)
    (folder / "started").touch()
    end = time.monotonic() + 60
    while not stopped and time.monotonic() < end:
        time.sleep(0.01)
    (folder / "metrics.json").write_text("{}")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_request_that_comes_as_a_stage_ends_well_stops_the_study(number, code, tmp_path):
    """The stage ends with 0 when it is asked to stop; the next one must not start."""
    for name in ("run_all.sh", "setup.sh", "study.py", "arms.py", "protocols.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("prepare.py", "pretrain.py", "finetune.py", "baseline.py", "evaluate.py", "report.py"):
        (tmp_path / name).write_text(FAKE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "run_all.sh", "--demo", "--gpus", "0"]
    (tmp_path / "runs/demo").mkdir(parents=True)  # which the true prepare.py makes
    options = {"cwd": tmp_path, "env": {**os.environ, "PATH": path}, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    first = tmp_path / "runs/demo/seed0/pretrain_animal"
    deadline = time.monotonic() + 60
    while not (first / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, out + err
    assert "stopped after seed0_pretrain_animal" in err and (first / "metrics.json").exists()
    assert not (tmp_path / "runs/demo/seed0/pretrain_non_animal").exists()
