"""One line of a plan is skipped, repeated or run; stop requests, failures and odd words reach where they belong."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_study import environment, files_of, finish, make_plan, make_scripts, plan_line, starts, wait_for, wait_until

import carry_out
from study import quote, write_lines

PARENT = "seed0/pretrain_animal"
CHILD = "seed0/finetune_animal"
ALONE = "seed0/baseline_mae"
CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.fixture
def scripts(tmp_path):
    return make_scripts(tmp_path / "scripts")


@pytest.fixture
def study(tmp_path):
    """The folder of a study with its plan, in which nothing has run."""
    folder = tmp_path / "study"
    make_plan(folder)
    return folder


def start(scripts, study, folder, *more, fake=None, **env):
    command = [sys.executable, scripts / "carry_out.py", study, "--run", folder, *more]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(fake, **env)}
    return subprocess.Popen(command, **options)


def carry(scripts, study, folder, *more, code=0, **options) -> tuple[str, str]:
    """Carry out a line to its end -> what was printed on both streams."""
    process = start(scripts, study, folder, *more, **options)
    out, err = finish(process)
    assert process.returncode == code, out + err
    return out, err


def test_a_finished_run_is_skipped_only_under_the_same_command(scripts, study):
    carry(scripts, study, ALONE)
    out, _ = carry(scripts, study, ALONE)
    assert "finished before, skipped" in out
    assert len(starts(study, ALONE)) == 1
    make_plan(study, "--epochs", "3")
    out, _ = carry(scripts, study, ALONE)
    assert "finished before, skipped" not in out
    assert len(starts(study, ALONE)) == 2
    out, _ = carry(scripts, study, ALONE, "--flags", "--device cpu")
    assert starts(study, ALONE)[2]["words"][-2:] == ["--device", "cpu"]


def test_a_run_that_left_no_metrics_or_no_command_is_run_again(scripts, study):
    for lost in ("metrics", "command"):
        carry(scripts, study, ALONE)
        before = len(starts(study, ALONE))
        getattr(files_of(study, ALONE), lost).unlink()
        carry(scripts, study, ALONE)
        assert len(starts(study, ALONE)) == before + 1


def test_another_launcher_is_no_other_command(scripts, study):
    carry(scripts, study, ALONE)
    out, _ = carry(scripts, study, ALONE, "--launch", f"{shlex.quote(sys.executable)} -B")
    assert "finished before, skipped" in out


def test_a_parent_that_was_trained_again_repeats_its_child(scripts, study):
    carry(scripts, study, PARENT)
    carry(scripts, study, CHILD)
    (study / CHILD / "of the first training").touch()
    later = (study / CHILD / "config.json").stat().st_mtime_ns + 10**9
    os.utime(study / PARENT / "metrics.json", ns=(later, later))
    out, _ = carry(scripts, study, CHILD)
    assert "has been trained again, so it is repeated" in out
    assert not (study / CHILD / "of the first training").exists()
    assert len(starts(study, CHILD)) == 1


def test_a_child_without_its_parent_is_not_started(scripts, study):
    _, err = carry(scripts, study, CHILD, code=1)
    assert err == f"== seed0_finetune_animal: not run, for {PARENT} is not finished\n"
    assert not (study / CHILD).exists()


def test_a_failure_leaves_a_file_with_log_and_command_until_the_run_succeeds(scripts, study):
    _, err = carry(scripts, study, ALONE, code=3, fake={"baseline_mae": 3})
    files = files_of(study, ALONE)
    text = files.failure.read_text()
    assert text in err
    assert "stage seed0_baseline_mae failed with exit code 3" in text
    assert f"log:     {files.log}\n" in text
    repeat = text.split("repeat:  ")[1].splitlines()[0]
    assert shlex.split(repeat) == [sys.executable, f"{scripts}/baseline.py", "--output_dir", str(study / ALONE)]
    assert not files.command.exists()
    carry(scripts, study, ALONE)
    assert not files.failure.exists()
    assert files.command.exists()


def test_a_refused_change_of_flags_leaves_no_failure_behind_once_it_is_taken_back(scripts, study):
    carry(scripts, study, ALONE)
    make_plan(study, "--epochs", "3")
    carry(scripts, study, ALONE, code=2, fake={"baseline_mae": 2})
    assert files_of(study, ALONE).failure.exists()
    make_plan(study)
    out, _ = carry(scripts, study, ALONE)
    assert "finished before, skipped" in out
    assert not files_of(study, ALONE).failure.exists()


def test_exit_code_255_which_stops_xargs_becomes_1(scripts, study):
    carry(scripts, study, ALONE, code=1, fake={"baseline_mae": 255})
    assert "exit code 1" in files_of(study, ALONE).failure.read_text()


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_output_reaches_the_log_and_unless_quiet_the_screen(quiet, scripts, study):
    out, _ = carry(scripts, study, ALONE, *quiet)
    log = files_of(study, ALONE).log.read_text()
    assert log.endswith("baseline_mae says hello\n")
    assert log.startswith(f"{sys.executable} {scripts}/baseline.py")
    assert ("baseline_mae says hello" in out) == (not quiet)
    carry(scripts, study, ALONE, "--flags=--again", *quiet)
    assert files_of(study, ALONE).log.read_text().count("says hello") == 2


def test_a_dry_run_shows_the_command_and_writes_nothing(scripts, study):
    out, _ = carry(scripts, study, CHILD, "--dry_run")
    assert f"finetune.py --output_dir {study / CHILD}" in out
    assert [path.name for path in study.iterdir()] == ["study.tsv"]


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
@pytest.mark.parametrize("end", [0, 143])
@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_stop_request_reaches_the_training_once_and_gives_its_own_code(number, code, end, quiet, scripts, study):
    process = start(scripts, study, ALONE, *quiet, fake={"baseline_mae": f"wait {end}"})
    wait_for((study / ALONE / "starts").exists, process)
    process.send_signal(number)
    wait_for((study / ALONE / "stopped").exists, process)
    process.send_signal(signal.SIGTERM)  # as run_all.sh does, after the terminal
    (study / "release").touch()
    _, err = finish(process)
    assert process.returncode == code, err
    assert (study / ALONE / "stops").read_text() == "1"
    assert f"was stopped, exit code {code}" in err
    files = files_of(study, ALONE)
    assert not files.failure.exists()
    assert not files.command.exists()


def test_a_training_that_fails_on_a_stop_request_has_failed(scripts, study):
    process = start(scripts, study, ALONE, fake={"baseline_mae": "wait 1"})
    wait_for((study / ALONE / "starts").exists, process)
    (study / "release").touch()
    process.terminate()
    finish(process)
    assert process.returncode == 1
    assert "failed with exit code 1" in files_of(study, ALONE).failure.read_text()


def test_a_killed_training_is_reported(scripts, study):
    process = start(scripts, study, ALONE, fake={"baseline_mae": "wait 0"})
    wait_for(lambda: len(starts(study, ALONE)) == 1, process)
    os.kill(starts(study, ALONE)[0]["pid"], signal.SIGKILL)
    _, err = finish(process)
    assert process.returncode == 137
    assert "failed with exit code 137" in err
    assert files_of(study, ALONE).failure.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_training_whose_starter_is_killed_is_asked_to_stop(scripts, study):
    process = start(scripts, study, ALONE, fake={"baseline_mae": "wait 143"})
    wait_for((study / ALONE / "starts").exists, process)
    process.kill()
    process.wait()  # the training is asked when its starter is gone: not before it may end by itself
    (study / "release").touch()
    process.communicate()
    stops = study / ALONE / "stops"
    wait_until(lambda: stops.exists() and stops.read_text() == "1")


ODD = ["it's", 'say "so"', "tab\there", "line\nbreak", "carriage\rreturn", "$HOME `id` \\ *", "", "Umläute", "'\n'"]


def test_odd_words_reach_the_training_and_are_remembered(scripts, tmp_path):
    study = tmp_path / "a study with\nbreaks and\r'quotes'"
    make_plan(study, *ODD)
    carry(scripts, study, ALONE)
    assert starts(study, ALONE)[0]["words"] == [*ODD, "--output_dir", str(study / ALONE)]
    out, _ = carry(scripts, study, ALONE)
    assert "finished before, skipped" in out


def test_what_quote_writes_bash_words_reads():
    words = [*ODD, "\udcff", "~", "#", "a;b", "!"]
    assert carry_out.bash_words(" ".join(map(quote, words))) == words


def test_a_launcher_may_be_quoted_as_bash_does(scripts, study, tmp_path):
    odd = tmp_path / "pyth\nön"
    odd.symlink_to(sys.executable)
    words = subprocess.run(["bash", "-c", 'printf "%q " "$0" -S', odd], capture_output=True, env={"LC_ALL": "C"})
    assert b"$'" in words.stdout
    carry(scripts, study, ALONE, "--launch", os.fsdecode(words.stdout))
    assert len(starts(study, ALONE)) == 1


@pytest.mark.parametrize(("visible", "expected"), [("", "1"), ("4,7", "7")])
def test_runs_side_by_side_have_a_gpu_each_among_those_left_visible(visible, expected, scripts, study):
    carry(scripts, study, ALONE, JOB_GPUS="2", JOB_SLOT="1", CUDA_VISIBLE_DEVICES=visible)
    assert starts(study, ALONE)[0]["gpus"] == expected


def test_a_slot_without_a_gpu_is_refused(scripts, study):
    _, err = carry(scripts, study, ALONE, code=2, JOB_GPUS="2", JOB_SLOT="1", CUDA_VISIBLE_DEVICES="4")
    assert "CUDA_VISIBLE_DEVICES=4 leaves no GPU" in err
    assert starts(study, ALONE) == []


def test_lists_are_in_the_order_of_the_plan(study):
    lines = carry_out.read_plan(study / "study.tsv")
    assert carry_out.list_folders(study, lines, "in_order") == [PARENT, ALONE, CHILD]
    assert carry_out.list_folders(study, lines, "unfinished") == [PARENT, CHILD, ALONE]
    assert carry_out.list_folders(study, lines, "tests") == [str(study / CHILD), str(study / ALONE)]
    assert carry_out.list_folders(study, lines, "untested") == []


def test_resnet50_begins_early_on_gpus_and_is_alone_on_a_cpu(study):
    lines = [*make_plan(study), plan_line(study, "baseline", "resnet50")]
    resnet = "seed0/baseline_resnet50"
    assert carry_out.list_folders(study, lines, "side_by_side") == [resnet, PARENT, ALONE, CHILD]
    assert carry_out.list_folders(study, lines, "alone") == [resnet]
    assert carry_out.list_folders(study, lines, "others") == [PARENT, ALONE, CHILD]


def test_wrong_use_is_one_line_and_exit_code_2(scripts, study, tmp_path):
    _, err = carry(scripts, study, "seed0/no_such", code=2)
    assert err == "carry_out.py: error: the plan has no run 'seed0/no_such'\n"
    _, err = carry(scripts, tmp_path / "nowhere", ALONE, code=2)
    assert len(err.splitlines()) == 1
    (study / "study.tsv").write_text(write_lines([plan_line(study, "baseline", "mae")]) + "torn\tline")
    _, err = carry(scripts, study, ALONE, code=2)
    assert "some are missing or changed" in err


@pytest.mark.parametrize("content", [None, "", "seed\tstage\n", "one\ttwo\nthree"])
@pytest.mark.parametrize("script", ["carry_out.py", "status.py", "read_data.py"])
def test_a_missing_or_damaged_plan_is_named_with_what_mends_it(script, content, tmp_path):
    if content is not None:
        (tmp_path / "study.tsv").write_text(content)
    words = [sys.executable, str(Path(carry_out.__file__).with_name(script)), str(tmp_path)]
    if script == "carry_out.py":
        words += ["--list", "in_order"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "study.tsv" in done.stderr and "run_all.sh" in done.stderr
