"""How far a study is, from plan and logs alone: states, table, summary and the time that is left."""

import json
import os
import subprocess
import sys
import time

import pytest
from fake_study import DEADLINE, ROOT, files_of, finish, make_plan, plan_line

import status
from study import read_plan, write_lines

PARENT = "seed0/pretrain_animal"
CHILD = "seed0/finetune_animal"
ALONE = "seed0/baseline_mae"


@pytest.fixture
def study(tmp_path):
    """The folder of a study with its plan, in which nothing has run."""
    make_plan(tmp_path)
    return tmp_path


def begin(study, folder, updates=100, lines=()):
    """Write what a run has written after its start; `lines` of its log are (step, seconds)."""
    path = study / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"updates": updates}))
    rows = [json.dumps({"event": "train", "step": step, "seconds": seconds}) + "\n" for step, seconds in lines]
    (path / "log.jsonl").write_text("".join(rows))


def finished(study, folder, updates=100, seconds=50.0):
    begin(study, folder, updates, [(updates, seconds)])
    (study / folder / "metrics.json").write_text("{}")


def failed(study, folder):
    failure = files_of(study, folder).failure
    failure.parent.mkdir(exist_ok=True)
    failure.write_text("failed")


def read(study) -> dict[str, status.Progress]:
    plan = read_plan(study / "study.tsv")
    return {line.folder: status.read_progress(study, line) for line in plan}


def states(study) -> list[str]:
    return [progress.state for progress in read(study).values()]


def left(study, jobs=1) -> float | None:
    return status.seconds_left(list(read(study).values()), jobs)


def summary(study, jobs=1) -> str:
    return status.summary(list(read(study).values()), jobs)


def test_a_run_waits_runs_and_finishes(study):
    assert states(study) == ["waiting", "waiting", "waiting"]
    finished(study, PARENT)
    begin(study, CHILD, lines=[(10, 1.0), (20, 2.0)])
    assert states(study) == ["finished", "running", "waiting"]
    running = read(study)[CHILD]
    assert (running.step, running.updates, running.seconds) == (20, 100, 2.0)


def test_a_run_fails_before_or_after_its_start(study):
    failed(study, PARENT)
    begin(study, ALONE, lines=[(10, 1.0)])
    failed(study, ALONE)
    assert states(study) == ["failed", "waiting", "failed"]
    assert "0 of 3 trainings finished; 2 failed; time left" in summary(study)


def test_a_run_whose_log_is_old_has_stopped(study):
    begin(study, ALONE, lines=[(10, 1.0)])
    old = time.time() - status.STALE_SECONDS - 100
    for name in ("config.json", "log.jsonl"):
        os.utime(study / ALONE / name, (old, old))
    assert read(study)[ALONE].state == "stopped"
    log = files_of(study, ALONE).log
    log.parent.mkdir()
    log.write_text("it prints")
    assert read(study)[ALONE].state == "running"


@pytest.mark.parametrize(
    "torn",
    [
        b'{"event": "train", "step": 90, "sec',
        b'{"event": "train", "step": 90}\n',
        b"\xff\xfe\n",
        b"[1]\n",
        b"null\n",
        b"\n",
    ],
)
def test_a_torn_or_foreign_last_line_is_passed_over(torn, study):
    begin(study, ALONE, lines=[(10, 1.0), (20, 2.0)])
    with open(study / ALONE / "log.jsonl", "ab") as file:
        file.write(torn)
    assert read(study)[ALONE].step == 20


def test_only_the_end_of_a_long_log_is_read(study):
    begin(study, ALONE, updates=9000, lines=[(step, step / 10) for step in range(5000)])
    assert (read(study)[ALONE].step, read(study)[ALONE].seconds) == (4999, 499.9)


def test_missing_and_torn_files_are_no_errors(study):
    begin(study, PARENT)
    (study / PARENT / "log.jsonl").unlink()
    for folder, text in ((CHILD, '{"upda'), (ALONE, "[]")):
        begin(study, folder)
        (study / folder / "config.json").write_text(text)
    assert states(study) == ["running", "waiting", "waiting"]
    assert read(study)[PARENT].step == 0


def test_the_time_left_is_not_known_before_the_first_steps(study):
    assert left(study) is None
    assert summary(study) == "0 of 3 trainings finished; time left: not known yet"
    begin(study, PARENT)
    assert left(study) is None


def test_a_kind_of_run_that_has_not_begun_is_expected_to_take_its_usual_share(study):
    finished(study, PARENT, updates=10, seconds=24.0)  # a pre-training, usually 2.4 times as long as a fine-tuning
    assert left(study) == pytest.approx(2 * 10)


def test_the_time_left_is_computed_from_runs_of_the_same_kind(study):
    finished(study, PARENT, updates=1000, seconds=5.0)
    begin(study, CHILD, updates=100, lines=[(20, 40.0)])
    assert left(study) == pytest.approx(80 * 2 + 100 * 2)  # the rest of this one, and the baseline at its pace
    assert left(study, jobs=2) == pytest.approx(180)
    assert left(study, jobs=8) == pytest.approx(180)  # no more than two are left
    begin(study, ALONE, updates=60, lines=[(30, 120.0)])
    assert left(study) == pytest.approx((0.8 + 0.5) * 220)  # such a run takes 200 or 240 s, the median is 220 s
    for folder in (CHILD, ALONE):
        finished(study, folder)
    assert left(study) == 0


def test_resnet50_is_not_divided_among_the_runs_side_by_side(study):
    lines = [*make_plan(study), plan_line(study, "baseline", "resnet50")]
    (study / "study.tsv").write_text(write_lines(lines))
    begin(study, "seed0/baseline_resnet50", updates=100, lines=[(10, 10.0)])
    for folder in (PARENT, CHILD, ALONE):
        begin(study, folder, updates=100, lines=[(50, 50.0)])
    assert left(study, jobs=2) == pytest.approx(90 + 3 * 50 / 2)


def test_failed_runs_take_no_more_time(study):
    finished(study, PARENT)
    begin(study, CHILD, updates=100, lines=[(50, 50.0)])
    failed(study, ALONE)
    assert left(study) == pytest.approx(50)


def test_the_summary_says_what_runs_and_why(study):
    finished(study, PARENT)
    begin(study, CHILD, lines=[(25, 150.0)])
    text = summary(study)
    assert text.startswith("1 of 3 trainings finished; learning to outline pets after pre-training on ")
    assert "(25 %)" in text
    assert text.endswith("time left: about 17 min 30 s")  # 175 updates at 6 s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "not known yet"),
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3660, "1 h 01 min"),
    ],
)
def test_durations(seconds, text):
    assert status.show_seconds(seconds) == text


def run_status(*args):
    command = [sys.executable, "-S", ROOT / "status.py", *args]  # -S: the standard library alone
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


def test_the_script_prints_a_table_of_all_runs(study):
    finished(study, PARENT, updates=2000, seconds=100.0)
    begin(study, CHILD, lines=[(25, 50.0)])
    done = run_status(study)
    assert done.returncode == 0 and done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["run", "state", "update", "of", "updates/s", "time", "left"]
    assert rows[1] == [PARENT, "finished", "2,000", "2,000", "20.00", "–"]
    assert rows[2] == [CHILD, "running", "25", "100", "0.50", "2", "min", "30", "s"]
    assert rows[3] == [ALONE, "waiting", "0", "–", "–", "–"]
    assert done.stdout.splitlines()[4].startswith("1 of 3 trainings finished; ")


def test_without_a_plan_it_says_so_in_one_line(tmp_path):
    done = run_status(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "study.tsv" in done.stderr


def test_watching_prints_a_line_until_it_is_ended(study):
    command = [sys.executable, ROOT / "status.py", study, "--watch", "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "0 of 3 trainings finished; time left: not known yet\n"
    process.terminate()
    assert finish(process) == ("", "")
