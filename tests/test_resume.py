"""Interrupted runs end as undisturbed ones, and whatever goes wrong leaves a state from which they can go on."""

import errno
import functools
import gc
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from small_runs import REPOSITORY, SMALL, drawn_root, log, mae_checkpoint, metrics, refusal, run
from stress import assert_same, command, stress

import baseline
import engine
import finetune
import pretrain
import runs
import trainer
from batches import EvalBatches
from engine import Distributed, EngineError
from pretraining import Pretraining
from runs import RunFolder
from tasks import TASKS

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
CONFIG = {"experiment": {"blr": 0.1, "seed": 0}}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [
        "--model",
        "mae_tiny",
        *SMALL,
        "--data_root",
        drawn_root(tmp_path_factory),
        "--cache_dir",
        cache,
        "--batch_size",
        8,
        "--warmup_epochs",
        1,
        "--log_every",
        2,
    ]


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(script, flags, tmp_path, tmp_path_factory):
    more = ["--init", mae_checkpoint(tmp_path_factory)] if script == "finetune" else []
    assert stress(script, [*flags, "--epochs", 12, *more], tmp_path, kills=3) > 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_writes_a_checkpoint_and_says_how_to_go_on(number, code, flags, tmp_path):
    args = [*flags, "--epochs", 200, "--output_dir", tmp_path / "run"]
    process = subprocess.Popen(command("pretrain", *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    last = errors.splitlines()[-1]
    assert "checkpoint written at step" in last and "same command continues" in last and "Traceback" not in errors
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] > 0


@pytest.mark.parametrize(("script", "validation"), [("pretrain", 1), ("pretrain", 3), ("finetune", 3)])
def test_a_stop_request_does_not_wait_for_the_end_of_a_validation(
    script, validation, flags, tmp_path, tmp_path_factory
):
    args = [*flags, "--epochs 3 --val_epochs 1 --batch_size 4"]
    args += ["--init", mae_checkpoint(tmp_path_factory)] if script == "finetune" else []
    run(script, *args, "--output_dir", tmp_path / "undisturbed")
    batches, evaluated = EvalBatches.__iter__, []

    def interrupted(self):
        evaluated.append(0)
        for batch in batches(self):
            if len(evaluated) == (2 * validation if script == "pretrain" else validation):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
            evaluated[-1] += 1

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineError, match="SIGTERM; checkpoint") as info:
        patch.setattr(EvalBatches, "__iter__", interrupted)
        run(script, *args, "--output_dir", tmp_path / "stopped")
    assert info.value.exit_code == 143 and evaluated[-1] == 0 < evaluated[0]
    assert len(log(tmp_path / "stopped", "val")) == validation - 1
    del info
    gc.collect()
    assert "resumed" in run(script, *args, "--output_dir", tmp_path / "stopped")
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")


def stop_in_next_validation(script: str, *args) -> None:
    """Run a script until its next validation, in which a stop signal arrives, and demand that it ends as it should."""
    batches = EvalBatches.__iter__

    def interrupted(self):
        for batch in batches(self):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineError, match="SIGTERM; checkpoint written") as info:
        patch.setattr(EvalBatches, "__iter__", interrupted)
        run(script, *args)
    assert info.value.exit_code == 143
    del info  # its traceback keeps the stopped run, and so its lock, alive
    gc.collect()


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_a_validation_that_is_made_up_for_can_be_stopped_again(script, flags, tmp_path, tmp_path_factory):
    args = [*flags, "--epochs 2 --val_epochs 1 --batch_size 8 --log_every 3"]  # so that a log line is half full
    args += ["--init", mae_checkpoint(tmp_path_factory)] if script == "finetune" else []
    run(script, *args, "--output_dir", tmp_path / "undisturbed")
    stopped = tmp_path / "stopped"
    for _ in range(3):
        stop_in_next_validation(script, *args, "--output_dir", stopped)
        state = torch.load(stopped / "last.pt", weights_only=True)
        assert state["step"] == len(log(stopped, "train")) * 3 + state["steps_since_log"]
        assert log(stopped, "val") == []
    assert "resumed" in run(script, *args, "--output_dir", stopped)
    assert_same(tmp_path / "undisturbed", stopped)


class SlowValidation:
    """A clock that stands in for the time module: an update takes a second and a validation an hour."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = 0.0
        patch.setattr(trainer, "time", self)
        patch.setattr(trainer.Trainer, "train_step", self.delayed(trainer.Trainer.train_step, 1))
        patch.setattr(Pretraining, "validate", self.delayed(Pretraining.validate, 3600))

    def monotonic(self) -> float:
        return self.now

    def delayed(self, function, seconds: float):
        def run_later(*args, **options):
            self.now += seconds
            return function(*args, **options)

        return run_later


def test_no_rate_counts_the_time_of_a_validation(flags, tmp_path, monkeypatch):
    args = [*flags, "--epochs", 3, "--num_images", 16, "--output_dir", tmp_path / "run"]
    SlowValidation(monkeypatch)
    stop_in_next_validation("pretrain", *args)
    assert "resumed" in run("pretrain", *args)
    lines = log(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["img_s"] for line in lines] == [8, 8, 8]
    assert lines[-1]["seconds"] > 2 * 3600, "the seconds of the run count validations"


def test_a_stop_signal_outside_of_training_ends_in_one_line_too():
    code = "import argparse, engine, os, signal\nengine.launch(lambda args: os.kill(os.getpid(), signal.SIGTERM), argparse.ArgumentParser('x.py'))"  # noqa: E501
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 143
    assert result.stderr.splitlines() == ["x.py: stopped: SIGTERM; repeat the command to go on"]


def test_a_truncated_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, capsys):
    first = RunFolder(tmp_path / "run", ALONE, CONFIG)
    for step in (1, 2):
        first.log("train", step=step)
        first.save({"step": step})
    last = tmp_path / "run" / "last.pt"
    os.truncate(last, last.stat().st_size // 2)
    first._lock.close()
    second = RunFolder(tmp_path / "run", ALONE, CONFIG)
    assert second.load()["step"] == 1
    assert "last.pt is damaged" in capsys.readouterr().err
    second.log("train", step=2)
    assert [line["step"] for line in log(tmp_path / "run", "train")] == [1, 2]


def test_no_flipped_bit_in_a_checkpoint_goes_unnoticed_and_changes_what_is_read(tmp_path, capsys):
    first, weights = RunFolder(tmp_path / "run", ALONE, CONFIG), torch.arange(30) / 7
    for step in (1, 2):
        first.save({"step": step, "weights": weights})
    first._lock.close()
    last, reader = tmp_path / "run" / "last.pt", RunFolder(tmp_path / "run", ALONE, CONFIG)
    content, fell_back = last.read_bytes(), 0
    for place in range(len(content)):
        for bit in (1 << place % 8, 0x10):
            last.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            state = reader.load()
            assert torch.equal(state["weights"], weights)
            fell_back += state["step"] == 1
    assert fell_back > len(content) and "the checksum" in capsys.readouterr().err


def test_a_full_disk_while_a_checkpoint_is_written_keeps_the_one_before(flags, tmp_path, monkeypatch):
    args = [*flags, "--epochs", 4, "--save_minutes", 0]
    run("pretrain", *args, "--output_dir", tmp_path / "undisturbed")
    calls, save = [], torch.save

    def full(content, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError) as info:
        run("pretrain", *args, "--output_dir", tmp_path / "full")
    assert info.value.errno == errno.ENOSPC
    del info  # its traceback keeps the failed run, and so its lock, alive
    gc.collect()
    monkeypatch.undo()
    assert "resumed" in run("pretrain", *args, "--output_dir", tmp_path / "full")
    assert_same(tmp_path / "undisturbed", tmp_path / "full")


def test_a_full_disk_while_the_log_is_written_loses_nothing(flags, tmp_path, monkeypatch):
    args = [*flags, "--epochs", 4, "--save_minutes", 0]
    run("pretrain", *args, "--output_dir", tmp_path / "undisturbed")
    log_line, calls = RunFolder.log, []

    def full(self, event, **fields):
        calls.append(1)
        if len(calls) == 6:
            self._log.write(b'{"event": "tr')
            self._log.flush()
            raise OSError(errno.ENOSPC, "No space left on device", str(self.dir / "log.jsonl"))
        log_line(self, event, **fields)

    monkeypatch.setattr(RunFolder, "log", full)
    with pytest.raises(OSError, match="No space left"):
        run("pretrain", *args, "--output_dir", tmp_path / "full")
    gc.collect()
    monkeypatch.undo()
    assert "resumed" in run("pretrain", *args, "--output_dir", tmp_path / "full")
    assert_same(tmp_path / "undisturbed", tmp_path / "full")


def test_a_full_disk_ends_in_one_line(monkeypatch, capsys):
    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    def work(args):
        raise OSError(errno.ENOSPC, "No space left on device", "run/last.pt")

    monkeypatch.setattr("sys.argv", ["pretrain.py"])
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match="1"):
        engine.launch(work, engine.argparse.ArgumentParser("pretrain.py"))
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "disk is full" in error and "run/last.pt" in error


def test_a_second_process_is_refused_until_the_first_has_gone(tmp_path):
    first = RunFolder(tmp_path / "run", ALONE, CONFIG)
    with pytest.raises(EngineError, match="another process is training"):
        RunFolder(tmp_path / "run", ALONE, CONFIG)
    first._lock.close()  # what the system does for a killed process
    RunFolder(tmp_path / "run", ALONE, CONFIG)


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    with pytest.raises(EngineError, match=r"cannot be locked \(No locks available\); choose an --output_dir") as info:
        RunFolder(tmp_path / "run", ALONE, CONFIG)
    assert info.value.exit_code == 1


@pytest.mark.parametrize("content", ["[]", "null", "{}", "7", '{"experiment": []}', '{"experiment": null}', "{", ""])
def test_a_configuration_that_is_none_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EngineError, match=r"config\.json cannot be read|holds another experiment: blr was None"):
        RunFolder(tmp_path, ALONE, CONFIG)
    assert (tmp_path / "config.json").read_text() == content


def test_another_experiment_in_the_folder_is_named_and_nothing_is_changed(tmp_path):
    RunFolder(tmp_path / "run", ALONE, CONFIG)._lock.close()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(EngineError, match=r"blr was 0.1, now 0.2") as info:
        RunFolder(tmp_path / "run", ALONE, {"experiment": {"blr": 0.2, "seed": 0}})
    assert info.value.exit_code == 2
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(EngineError, match=r"thesis\.tex"):
        RunFolder(tmp_path, ALONE, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_run_is_not_trained_again_unless_asked(flags, tmp_path):
    args = [*flags, "--epochs", 1, "--output_dir", tmp_path / "run"]
    run("pretrain", *args)
    stamp = (tmp_path / "run" / "model.pt").stat().st_mtime_ns
    assert "nothing to do" in run("pretrain", *args)
    assert (tmp_path / "run" / "model.pt").stat().st_mtime_ns == stamp
    run("pretrain", *args, "--resume", "never")
    assert (tmp_path / "run" / "model.pt").stat().st_mtime_ns != stamp


def test_a_changed_precision_or_micro_batch_continues_a_run_and_a_changed_rate_does_not(flags, tmp_path):
    args = [*flags, "--epochs", 1, "--output_dir", tmp_path / "run"]
    run("pretrain", *args)
    assert "nothing to do" in run("pretrain", *args, "--precision", "bf16", "--micro_batch_size", 4, "--log_every", 7)
    assert "blr was" in refusal("pretrain", *args, "--blr", 1)


def build_run(script: str, flags: list, tmp_path_factory) -> tuple:
    """Build what a script would train -> (parser, arguments, objective)."""
    if script == "pretrain":
        parser = pretrain.get_args_parser()
    elif script == "finetune":
        parser = finetune.get_args_parser()
        flags = [*flags, "--init", mae_checkpoint(tmp_path_factory)]
    else:
        parser = baseline.get_args_parser()
        flags = [*flags, "--blr", 1e-3]
    args = parser.parse_args([str(flag) for flag in flags])
    kinds = pretrain.OBJECTIVES if script == "pretrain" else TASKS
    name = args.objective if script == "pretrain" else args.task
    return parser, args, kinds[name](args, ALONE)


@pytest.mark.parametrize("script", ["pretrain", "finetune", "baseline"])
def test_flags_of_the_computation_may_change_and_all_others_may_not(script, flags, tmp_path, tmp_path_factory):
    parser, args, objective = build_run(script, flags, tmp_path_factory)
    plan = trainer.plan_run(objective, args, ALONE)
    precision = engine.Precision("fp32", ALONE.device)

    def describe(**changes) -> dict:
        changed = engine.argparse.Namespace(**{**vars(args), **changes})
        return trainer.describe_run(objective, plan, precision, changed, ALONE)

    config = describe()
    flags_of_parser = {action.dest for action in parser._actions} - {"help"}
    assert flags_of_parser <= set(config["args"]) <= set(config["roles"])
    assert set(config["roles"].values()) <= set(engine.ROLES)
    RunFolder(tmp_path / "run", ALONE, config)._lock.close()
    by_content = set(objective.identity())  # a checkpoint may move: its content defines the experiment, not its path
    refused = set()
    for name in config["args"]:
        try:
            RunFolder(tmp_path / "run", ALONE, describe(**{name: "another value"}))._lock.close()
        except EngineError as error:
            assert f"{name} was" in str(error)
            refused.add(name)
        gc.collect()
    defining = {name for name in config["args"] if config["roles"][name] != "computation"}
    assert refused == defining - by_content
    assert {"seed", "epochs", "batch_size", "blr", "model"} <= refused
    assert not {"output_dir", "device", "precision", "micro_batch_size", "data_root", "log_every"} & refused


def test_a_non_finite_loss_stops_with_step_rate_and_advice(flags, tmp_path):
    args = [*flags, "--epochs", 30, "--save_minutes", 0, "--output_dir", tmp_path / "run"]
    message = refusal("pretrain", *args, "--blr", 1e30)
    assert "non-finite at step" in message and "lr " in message and "--clip_grad" in message
    assert not (tmp_path / "run" / "metrics.json").exists()
    for name in ("last.pt", "last.prev.pt"):
        if (tmp_path / "run" / name).exists():
            state = torch.load(tmp_path / "run" / name, weights_only=True)["model"]
            assert all(v.isfinite().all() for v in state.values())


def test_fp16_steps_whose_gradients_overflow_are_skipped_and_counted(flags, tmp_path, monkeypatch):
    scaler = functools.partial(
        torch.amp.GradScaler, init_scale=2.0**30
    )  # the first gradients cannot be held by float16
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run("pretrain", *flags, "--epochs", 12, "--precision", "fp16", "--output_dir", tmp_path / "run")
    lines = log(tmp_path / "run", "train")
    assert 2 <= sum(line["skipped"] for line in lines) < 22
    assert lines[-1]["skipped"] == 0 and lines[-1]["loss"] < lines[0]["loss"]


def test_the_log_is_whole_lines_of_strict_json(flags, tmp_path):
    run("pretrain", *flags, "--epochs", 1, "--output_dir", tmp_path / "run")
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_score_of_a_class_that_does_not_occur_is_null_in_every_file(tmp_path):
    run_ = RunFolder(tmp_path / "run", ALONE, CONFIG)
    run_.log("val", iou_border=float("nan"), loss=0.5)
    run_.finish({}, {"best": {"iou_border": float("nan"), "rates": (1.0, float("inf"))}})
    assert log(tmp_path / "run", "val") == [{"event": "val", "iou_border": None, "loss": 0.5}]
    assert metrics(tmp_path / "run")["best"] == {"iou_border": None, "rates": [1.0, None]}


def test_checkpoints_that_cannot_be_read_stop_the_run_instead_of_starting_it_over(tmp_path, monkeypatch):
    first = RunFolder(tmp_path / "run", ALONE, CONFIG)
    first.log("train", step=1)
    first.save({"step": 1})
    first._lock.close()
    content = (tmp_path / "run" / "log.jsonl").read_bytes()

    def unreadable(*_, **__):
        raise OSError(errno.EIO, "Input/output error", "last.pt")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", unreadable)  # the file may be whole
        with pytest.raises(OSError, match="Input/output"):
            RunFolder(tmp_path / "run", ALONE, CONFIG).load()
    gc.collect()
    os.truncate(tmp_path / "run" / "last.pt", 100)
    with pytest.raises(EngineError, match=r"no checkpoint in .* can be read; --resume never starts the run over"):
        RunFolder(tmp_path / "run", ALONE, CONFIG).load()
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == content


def test_an_update_that_ruins_the_weights_ends_no_run(flags, tmp_path):
    args = [*flags, "--epochs", 1, "--batch_size", 16, "--warmup_epochs", 0, "--blr", 1e38]
    assert "validation loss became non-finite at step 1" in refusal("pretrain", *args, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
