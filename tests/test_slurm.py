"""A study submitted to Slurm: which jobs, in which order, what each does, and what follows a stop or a refusal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_slurm import FakeSlurm, expand
from fake_study import ROOT, environment, files_of, make_plan, make_scripts, plan_line, starts, wait_for
from hypothesis import given
from hypothesis import strategies as st

import slurm
from study import read_lines, read_plan, write_lines

FLAGS = "--partition=main --time=10"
STUDY = "runs/demo"


@pytest.fixture
def world(tmp_path):
    """Scripts whose trainings are stand-ins, and a fake Slurm."""
    return World(tmp_path)


class World:
    """A demo that is submitted to a fake Slurm."""

    def __init__(self, folder: Path):
        self.folder = make_scripts(folder / "scripts")
        self.slurm = FakeSlurm(folder / "slurm")
        self.study = self.folder / STUDY
        (self.study / "logs").mkdir(parents=True)
        (self.study / "release").touch()

    def env(self, fake: dict | None = None, **more: str) -> dict[str, str]:
        env = environment(fake, **more)
        return {**env, "PATH": self.slurm.path(env["PATH"])}

    def submit(self, *args: str, code: int = 0, **env: str) -> tuple[str, str]:
        command = ["bash", "run_all.sh", "--demo", "--gpus", "0", *args]
        done = subprocess.run(command, cwd=self.folder, env=self.env(**env), capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    def run_jobs(self, fake: dict | None = None, first: int = 0) -> dict[str, list[int]]:
        """Run the jobs that were submitted from one on -> the exit codes of each."""
        return {
            job.options["--job-name"]: self.slurm.run(job, self.folder, self.env(fake))
            for job in self.slurm.jobs()[first:]
        }

    def row(self, folder: str) -> int:
        plan = read_plan(self.study / "study.tsv")
        return 1 + [line.folder for line in plan].index(folder)


def test_a_study_becomes_a_chain_of_arrays_with_the_report_at_its_end(world):
    out, _ = world.submit("--slurm", FLAGS, "--jobs", "3")
    read, first, second, report = world.slurm.jobs()
    assert [job.options["--job-name"] for job in (read, first, second, report)] == [
        "demo-read",
        "demo-runs1",
        "demo-runs2",
        "demo-report",
    ]
    plan = read_plan(world.study / "study.tsv")
    assert [not plan[task - 1].parent for task in first.tasks] == [True] * 5
    assert [bool(plan[task - 1].parent) for task in second.tasks] == [True] * 4
    assert first.options["--array"].endswith("%3") and second.options["--array"].endswith("%3")
    assert "--dependency" not in read.options
    assert first.options["--dependency"] == "afterok:100", "without data no run can be made"
    assert second.options["--dependency"] == "afterany:101", "a failed run stops no other"
    assert report.options["--dependency"] == "afterany:100:101:102"
    for job in world.slurm.jobs():
        assert job.options["--partition"] == "main" and job.options["--time"] == "10"
        assert "--requeue" in job.options and job.options["--signal"] == "B:USR1@120"
    assert "9 of 9 runs are left; submitted as jobs 100 101 102 103" in out


def test_the_jobs_make_the_study_and_submitting_again_leaves_the_report_alone(world):
    world.submit("--slurm", FLAGS)
    codes = world.run_jobs()
    assert codes == {"demo-read": [0], "demo-runs1": [0] * 5, "demo-runs2": [0] * 4, "demo-report": [0]}
    assert len(list(world.study.glob("seed0/*/metrics.json"))) == 9
    assert (world.study / "logs/read.log").exists() and (world.study / "logs/report.log").exists()
    assert starts(world.study, "seed0/baseline_mae")[0]["threads"] == "1", "the cores that Slurm gives"
    out, _ = world.submit("--slurm", FLAGS)
    assert "0 of 9 runs are left" in out
    assert [job.options["--job-name"] for job in world.slurm.jobs()[4:]] == ["demo-report"]


def test_a_study_that_slurm_made_goes_on_without_slurm(world):
    world.submit("--slurm", FLAGS)
    world.run_jobs()
    out, _ = world.submit("--jobs", "1")
    assert out.count("finished before, skipped") == 9


def test_a_failed_run_is_named_by_the_report_and_alone_submitted_again_with_what_starts_from_it(world):
    world.submit("--slurm", FLAGS)
    codes = world.run_jobs(fake={"pretrain_animal": 3})
    assert sorted(codes["demo-runs1"]) == [0, 0, 0, 0, 3] and sorted(codes["demo-runs2"]) == [0, 0, 1, 1]
    assert codes["demo-report"] == [1]
    world.submit("--slurm", FLAGS)
    _, first, second, _ = world.slurm.jobs()[4:]
    assert first.tasks == [world.row("seed0/pretrain_animal")]
    assert second.tasks == [world.row("seed0/finetune_animal"), world.row("seed0/finetune_half")]


def test_a_refused_change_of_flags_leaves_no_failure_behind_once_it_is_taken_back(world):
    world.submit("--slurm", FLAGS)
    world.run_jobs()
    failure = files_of(world.study, "seed0/baseline_mae").failure
    failure.write_text("other flags were refused")
    world.submit("--slurm", FLAGS)
    assert world.run_jobs(first=4) == {"demo-read": [0], "demo-runs1": [0], "demo-report": [0]}
    assert not failure.exists()
    assert len(starts(world.study, "seed0/baseline_mae")) == 1


def test_the_last_job_says_which_runs_failed(world):
    world.submit("--slurm", FLAGS)
    *others, report = world.slurm.jobs()
    for job in others:
        world.slurm.run(job, world.folder, world.env({"baseline_mae": 3}))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = world.slurm.start(report, None, world.folder, world.env(), **pipes)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stage seed0_baseline_mae failed with exit code 3" in err and "logs/seed0_baseline_mae.log" in err


def task_that_waits(world: World, **env: str) -> subprocess.Popen:
    """Start the task of a baseline that waits for a stop request, until it waits."""
    world.submit("--slurm", FLAGS)
    job = world.slurm.jobs()[1]
    fake = {"baseline_mae": "wait 143"}
    row = world.row("seed0/baseline_mae")
    process = world.slurm.start(job, row, world.folder, world.env(fake, **env))
    wait_for((world.study / "seed0/baseline_mae/starts").exists, process)
    return process


def test_a_time_limit_that_comes_near_puts_the_run_back_into_the_queue_after_its_checkpoint(world):
    process = task_that_waits(world)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (world.study / "seed0/baseline_mae/stops").read_text() == "1"
    assert world.slurm.asked("scontrol") == [["requeue", "101"]]


def test_a_run_that_gets_nowhere_within_its_time_limit_fails_instead_of_starting_for_ever(world):
    process = task_that_waits(world, FAKE_STEP="0")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 1
    assert world.slurm.asked("scontrol") == []
    assert "a longer --time" in files_of(world.study, "seed0/baseline_mae").failure.read_text()


def test_a_cancelled_run_writes_its_checkpoint_and_does_not_come_back(world):
    process = task_that_waits(world)
    process.terminate()
    assert process.wait(60) == 143
    assert (world.study / "seed0/baseline_mae/stops").read_text() == "1"
    assert world.slurm.asked("scontrol") == []


def test_the_lines_of_a_dry_run_can_be_pasted_and_submit_the_same(world, tmp_path):
    out, _ = world.submit("--slurm", FLAGS, "--dry_run")
    assert world.slurm.jobs() == [] and not (world.study / "study.tsv").exists()
    lines = [
        line for line in out.splitlines() if line.startswith("mkdir") or "sbatch" in line or "study.py plan" in line
    ]
    other = FakeSlurm(tmp_path / "other")
    env = {**environment(), "PATH": other.path(os.environ["PATH"])}
    subprocess.run(["bash", "-eu", "-c", "\n".join(lines)], cwd=world.folder, env=env, check=True)
    pasted = (world.study / "study.tsv").read_text()
    world.submit("--slurm", FLAGS)
    assert other.asked("sbatch") == world.slurm.asked("sbatch") != []
    assert (world.study / "study.tsv").read_text() == pasted


def test_a_refusal_of_sbatch_is_one_line_and_takes_back_what_was_submitted(world):
    _, err = world.submit("--slurm", "--partition=nowhere", code=2, FAKE_SBATCH_REFUSES="1")
    assert err == (
        "run_all.sh: error: sbatch refused: sbatch: error: invalid partition specified: nowhere; nothing was submitted\n"
    )
    assert world.slurm.asked("scancel") == []
    _, err = world.submit("--slurm", FLAGS, code=2, FAKE_SBATCH_REFUSES="4")
    assert "the jobs before it were cancelled (101 102)" in err and len(err.splitlines()) == 1
    assert world.slurm.asked("scancel") == [["101", "102"]]
    world.submit("--slurm", FLAGS)


def test_an_answer_of_sbatch_that_is_no_number_is_refused_and_a_greeting_before_it_is_not():
    assert slurm.read_number("Welcome to the cluster\n\n12;north\n") == "12"
    with pytest.raises(ValueError, match="sbatch answered 'slurm 22' instead of a job's number"):
        slurm.read_number("slurm 22\n")


def test_a_queue_that_does_not_answer_is_told_with_the_file_that_asks_for_it(world):
    world.submit("--slurm", FLAGS)
    (world.slurm.bin / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: no controller' >&2\nexit 1\n")
    _, err = world.submit("--jobs", "1", code=2)
    assert "no controller" in err and f"remove {STUDY}/logs/slurm.jobs" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("args", [["--slurm", FLAGS], ["--jobs", "1"]])
def test_a_study_whose_jobs_still_wait_is_left_alone(args, world):
    world.submit("--slurm", FLAGS)
    (world.slurm.state / "queue").write_text("7\n102\n")
    _, err = world.submit(*args, code=2)
    waiting = f"jobs of {STUDY} are still in the queue (102)"
    assert err == f"run_all.sh: error: {waiting}; wait for them, or end them first with: scancel 102\n"
    assert len(world.slurm.jobs()) == 4


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--slurm", "--array=1-3"], "--slurm sets --array"),
        (["--slurm", "-d 5"], "--slurm sets -d"),
        (["--slurm", "-a1-3"], "--slurm sets -a1-3"),
        (["--slurm", "--dep=singleton"], "--slurm sets --dep=singleton"),
        (["--slurm", "--signal=USR1@5"], "understand --signal=B:USR1@SECONDS alone"),
        (["--slurm", "--comment='open"], "unbalanced quotes"),
        (["--slurm", "", "--gpus", "2"], "say --gres=gpu:N in the flags of sbatch"),
        (["--slurm"], "in quotes, got run_all.sh's own --dry_run"),
    ],
)
def test_wrong_use_is_one_line(args, named, world):
    _, err = world.submit(*args, "--dry_run", code=2)
    assert named in err and len(err.splitlines()) == 1


def test_a_study_on_several_nodes_is_no_study_of_jobs(world):
    _, err = world.submit("--slurm", FLAGS, "--dry_run", code=2, NNODES="2", MASTER_ADDR="here")
    assert "--slurm goes without NNODES" in err


def test_a_machine_without_slurm_is_told_before_anything_is_written(tmp_path):
    command = [sys.executable, str(ROOT / "check_plan.py"), "--demo", "--gpus", "0", "--slurm", FLAGS]
    done = subprocess.run(command, cwd=tmp_path, env=environment(PATH="/nowhere"), capture_output=True, text=True)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "sbatch not found" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_job_without_a_gpu_says_what_to_ask_for(tmp_path):
    make_plan(tmp_path)
    env = environment(CUDA_VISIBLE_DEVICES="", SLURM_ARRAY_TASK_ID="1", SLURM_JOB_ID="5")
    command = [sys.executable, str(ROOT / "slurm.py"), "train", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "job 5 sees no GPU" in done.stderr and "--gres=gpu:1" in done.stderr and "--gpus 0" in done.stderr


@pytest.mark.parametrize(("gpus", "processes"), [(1, None), (4, "4")])
def test_a_job_uses_all_gpus_that_it_has(gpus, processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    words = slurm.launcher(on_cpu=False)
    if processes is None:
        assert words == [sys.executable]
    else:
        assert words[-2:] == ["--nproc_per_node", processes] and "--standalone" in words


@given(st.sets(st.integers(1, 400), min_size=1), st.none() | st.integers(1, 50))
def test_an_array_holds_exactly_its_rows(rows, at_once):
    text = slurm.array_of(sorted(rows), at_once)
    assert expand(text) == sorted(rows)
    assert text.endswith(f"%{at_once}") == (at_once is not None)


def test_a_plan_whose_run_starts_from_none_above_it_is_damaged(tmp_path):
    lines = [plan_line(tmp_path, "finetune", "animal", parent="seed0/pretrain_animal")]
    with pytest.raises(ValueError, match="starts from seed0/pretrain_animal, which the plan does not list before it"):
        read_lines(write_lines(lines))


@pytest.mark.parametrize("words", [[], ["train", "."], ["submit"], ["what"]])
def test_the_script_alone_says_how_it_is_used(words):
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run([sys.executable, str(ROOT / "slurm.py"), *words], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "bash run_all.sh --slurm" in done.stderr and len(done.stderr.splitlines()) == 1
