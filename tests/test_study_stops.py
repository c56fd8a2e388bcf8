"""A study whose trainings are stand-ins: stop requests, failures, and what is done after them."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from fake_study import environment, finish, make_scripts, starts, wait_for


def start_fake(folder: Path, *args, fake: dict, env: dict | None = None, **more) -> subprocess.Popen:
    """Start a demo whose trainings behave as `fake` says, see fake_study.TRAINING."""
    make_scripts(folder)
    (folder / "runs/demo").mkdir(parents=True, exist_ok=True)  # which the true prepare.py makes
    (folder / "runs/demo/release").touch()
    command = ["bash", "run_all.sh", "--demo", "--gpus", "0", *args]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
    return subprocess.Popen(command, cwd=folder, env=environment(fake, **(env or {})), **options)


@pytest.mark.parametrize("end", [0, 143])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_request_stops_the_study_even_if_the_stage_ends_well(number, code, end, tmp_path):
    process = start_fake(tmp_path, "--jobs", "1", fake={"pretrain_animal": f"wait {end}"})
    study = tmp_path / "runs/demo"
    wait_for((study / "seed0/pretrain_animal/starts").exists, process)
    process.send_signal(number)
    out, err = finish(process)
    assert process.returncode == code, out + err
    assert "stopped after seed0/pretrain_animal" in err
    assert (study / "seed0/pretrain_animal/metrics.json").exists() == (end == 0)
    assert (study / "seed0/pretrain_animal/stops").read_text() == "1"
    assert not (study / "seed0/pretrain_non_animal").exists()


@pytest.mark.parametrize("script", ["read_data.py", "evaluate.py", "report.py"])
@pytest.mark.parametrize(("to_group", "number", "code"), [
    (False, signal.SIGTERM, 143),
    (False, signal.SIGINT, 130),
    (True, signal.SIGTERM, 143),
    (True, signal.SIGINT, 130),
])  # fmt: skip
def test_a_stop_request_is_not_lost_in_a_stage_that_ends_well_all_the_same(to_group, number, code, script, tmp_path):
    process = start_fake(tmp_path, "--jobs", "1", fake={script: "wait"}, start_new_session=True)
    wait_for((tmp_path / f"{script}.started").exists, process)
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = finish(process)
    assert process.returncode == code, out + err
    stage = "read" if script == "read_data.py" else script.removesuffix(".py")
    assert f"stopped after {stage}" in err
    assert f"{script} ends well" in out, "its last words reach the screen and the log"
    assert f"{script} ends well" in (tmp_path / f"runs/demo/logs/{stage}.log").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_request_reaches_all_runs_side_by_side(number, code, tmp_path):
    first = ("pretrain_animal", "pretrain_non_animal")
    process = start_fake(tmp_path, "--jobs", "2", fake=dict.fromkeys(first, "wait 143"))
    study = tmp_path / "runs/demo"
    wait_for(lambda: all((study / "seed0" / name / "starts").exists() for name in first), process)
    process.send_signal(number)
    out, err = finish(process)
    assert process.returncode == code, out + err
    assert [(study / "seed0" / name / "stops").read_text() for name in first] == ["1", "1"]
    assert sorted(path.name for path in (study / "seed0").iterdir()) == ["baseline_resnet50", *first]
    assert not list((study / "logs").glob("*.failed"))


@pytest.mark.parametrize(
    ("set_by_user", "alone"), [({}, str(len(os.sched_getaffinity(0)))), ({"OMP_NUM_THREADS": "3"}, "3")]
)
def test_resnet50_is_trained_alone_on_all_cores_of_a_cpu(set_by_user, alone, tmp_path):
    process = start_fake(tmp_path, "--jobs", "2", fake={"baseline_resnet50": "wait 143"}, env=set_by_user)
    study = tmp_path / "runs/demo"
    wait_for((study / "seed0/baseline_resnet50/starts").exists, process)
    process.terminate()
    finish(process)
    assert [path.name for path in (study / "seed0").iterdir()] == ["baseline_resnet50"]
    process = start_fake(tmp_path, "--jobs", "2", fake={}, env=set_by_user)
    out, err = finish(process)
    assert process.returncode == 0, out + err
    assert starts(study, "seed0/baseline_resnet50")[-1]["threads"] == alone
    others = set_by_user.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    assert starts(study, "seed0/pretrain_animal")[0]["threads"] == others


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_study_stops_its_trainings_and_goes_on_when_it_is_repeated(jobs, tmp_path):
    process = start_fake(tmp_path, "--jobs", jobs, fake={"pretrain_animal": "wait 143"})
    folder = tmp_path / "runs/demo/seed0/pretrain_animal"
    wait_for((folder / "starts").exists, process)
    process.kill()
    process.communicate()
    process = start_fake(tmp_path, "--jobs", jobs, fake={})
    out, err = finish(process)
    assert process.returncode == 0, out + err
    assert (folder / "stops").read_text() == "1"
    assert len(list(tmp_path.glob("runs/demo/seed0/*/metrics.json"))) == 9


def test_a_run_that_left_no_word_is_named_at_the_end(tmp_path):
    process = start_fake(tmp_path, "--jobs", "2", fake={"baseline_mae": "wait 143"})
    study = tmp_path / "runs/demo"
    wait_for((study / "seed0/baseline_mae/starts").exists, process)
    [starter] = [entry for entry in Path("/proc").glob("[0-9]*") if is_starter(entry, study / "seed0/baseline_mae")]
    os.kill(int(starter.name), signal.SIGKILL)
    _, err = finish(process)
    assert process.returncode == 1
    assert "seed0/baseline_mae did not finish" in err and "logs/seed0_baseline_mae.log" in err


def test_a_finished_study_whose_new_flags_are_refused_has_failed(tmp_path):
    finish(start_fake(tmp_path, "--jobs", "2", fake={}))
    process = start_fake(tmp_path, "--jobs", "2", "--finetune_args", "--epochs 3", fake={"baseline_mae": 2})
    _, err = finish(process)
    assert process.returncode == 1
    assert "stage seed0_baseline_mae failed with exit code 2" in err.split("some runs failed")[1]
    process = start_fake(tmp_path, "--jobs", "2", fake={})
    out, err = finish(process)
    assert process.returncode == 0, out + err


def is_starter(entry: Path, folder: Path) -> bool:
    """Tell whether a process carries out a run of this very study."""
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
        here = (entry / "cwd").resolve()
    except OSError:
        return False
    return b"seed0/baseline_mae" in words and here == folder.parents[3] and b"--run" in words and b"xargs" not in words


def test_a_failed_run_stops_no_other_and_is_named_at_the_end(tmp_path):
    process = start_fake(tmp_path, "--jobs", "2", fake={"pretrain_animal": 255, "baseline_mae": 3})
    out, err = finish(process)
    assert process.returncode == 1, out + err
    study = tmp_path / "runs/demo"
    done = {path.parent.name for path in study.glob("seed0/*/metrics.json")}
    assert done == {
        "pretrain_non_animal",
        "pretrain_mixed",
        "finetune_non_animal",
        "finetune_mixed",
        "baseline_resnet50",
    }
    assert not starts(study, "seed0/finetune_animal") and not starts(study, "seed0/finetune_half")
    assert (study / "logs/report.log").exists()
    last = err.split("some runs failed; the report names what is missing")[1]
    for name, script in (("pretrain_animal", "pretrain.py"), ("baseline_mae", "baseline.py")):
        assert f"stage seed0_{name} failed with exit code" in last
        assert f"log:     runs/demo/logs/seed0_{name}.log\n" in last
        assert any("repeat:" in line and script in line and name in line for line in last.splitlines())
    process = start_fake(tmp_path, "--jobs", "2", fake={})
    out, err = finish(process)
    assert process.returncode == 0, out + err
    assert len(list(study.glob("seed0/*/metrics.json"))) == 9
    assert not list((study / "logs").glob("*.failed"))
    assert len(starts(study, "seed0/baseline_resnet50")) == 1


def test_a_failed_run_stops_the_study_where_runs_are_made_one_after_another(tmp_path):
    process = start_fake(tmp_path, "--jobs", "1", fake={"pretrain_non_animal": 3})
    _, err = finish(process)
    assert process.returncode == 3
    assert "stage seed0_pretrain_non_animal failed with exit code 3" in err
    assert sorted(path.name for path in (tmp_path / "runs/demo/seed0").iterdir()) == [
        "pretrain_animal",
        "pretrain_non_animal",
    ]
