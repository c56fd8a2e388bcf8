"""The study script: all nine trainings at a cut size, alone and side by side; skipping, repeating, stopping, wrong use."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_study import environment
from small_runs import run as run_script

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

CUT = "--epochs 1 --epoch_updates 2 --batch_size 4"


def run_all(*args, cwd=None, **env):
    command = ["bash", str(ROOT / "run_all.sh"), *map(str, args)]
    # One thread however many runs there are at a time, so that sums are made in the same order.
    env = environment(OMP_NUM_THREADS="1", **env)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


def trained(result) -> list[str]:
    """Names of the trainings that a run of the script really started."""
    lines = result.stdout.splitlines()
    return [line[3:] for line in lines if line.startswith("== seed0_") and "evaluate" not in line and ":" not in line]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished cut demo on few drawn photos."""
    folder = tmp_path_factory.mktemp("study with 'odd' \"names\"\nund Umläuten $HOME")
    sizes = ["--num_train", 40, "--num_val", 16, "--num_pets", 46]
    run_script("prepare", "demo", "--data_root", folder / "data", *sizes)
    args = ["--demo", "--data_root", folder / "data", "--output", folder / "out", "--cache_dir", folder / "cache"]
    args += ["--gpus", 0, "--jobs", 1, "--model", "mae_tiny", "--pretrain_args", CUT, "--finetune_args", CUT]
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


@pytest.mark.slow  # a second study; acceptance.sh runs it
def test_runs_side_by_side_give_the_same_networks_to_the_bit(study):
    out, args, _ = study
    beside = out.parent / "beside"
    result = run_all(*args, "--jobs", 2, "--output", beside)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 run(s) at a time" in result.stdout
    assert "of 9 trainings finished" in result.stderr  # the line that tells of all runs
    alone = {path.relative_to(out): path.read_bytes() for path in out.glob("seed0/*/model.pt")}
    assert len(alone) == 9
    assert {path.relative_to(beside): path.read_bytes() for path in beside.glob("seed0/*/model.pt")} == alone
    again = run_all(*args, "--jobs", 2, "--output", beside)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 9 + 2


def change_start(folder: Path, weights: str) -> None:
    """Let the configuration of a run say that it started from other weights."""
    config = json.loads((folder / "config.json").read_text())
    config["experiment"]["init"] = weights
    (folder / "config.json").write_text(json.dumps(config))


def test_what_is_lost_or_started_from_other_weights_is_repeated_and_nothing_else(study):
    out, args, _ = study
    seed = out / "seed0"
    shutil.rmtree(seed / "pretrain_non_animal")  # it ends with the same weights, so what started from them stays
    change_start(seed / "finetune_animal", "other weights")
    # Unfinished, and what it started from is trained again: it is not gone on with.
    for name in ("metrics.json", "test.npz", "model.pt"):
        (seed / "finetune_mixed" / name).unlink()
    change_start(seed / "finetune_mixed", "weights of an earlier pre-training")
    shutil.rmtree(seed / "pretrain_mixed")
    result = run_all(*args)
    assert result.returncode == 0, result.stdout + result.stderr
    repeated = ["pretrain_mixed", "pretrain_non_animal", "finetune_animal", "finetune_mixed"]
    assert sorted(trained(result)) == sorted(f"seed0_{name}" for name in repeated)


def test_changed_flags_are_refused_however_often_they_are_repeated(study):
    _, args, _ = study
    for _ in range(2):
        result = run_all(*args, "--pretrain_args", CUT.replace("--epochs 1", "--epochs 2"))
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


def test_the_demo_on_a_cpu_makes_a_run_for_each_core(tmp_path):
    cores = min(len(os.sched_getaffinity(0)), study_script.DEMO_MOST_JOBS)
    for args, jobs in ((["--demo"], cores), (["--demo", "--jobs", 1], 1), ([], 1)):
        result = run_all("--dry_run", "--gpus", 0, *args, cwd=tmp_path)
        assert result.returncode == 0 and f"CPU, {jobs} run(s) at a time" in result.stdout


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--jobs", "0"], "--jobs takes a number of runs from 1 on"),
        (["--jobs", "3", "--gpus", "2"], "--jobs 3 needs a GPU for each run"),
        (["--jobs", "two"], "invalid int value"),
    ],
)
def test_jobs_that_cannot_be_are_refused(args, named, tmp_path):
    result = run_all("--dry_run", *args, cwd=tmp_path)
    assert result.returncode == 2 and named in result.stderr and len(result.stderr.splitlines()) == 1
