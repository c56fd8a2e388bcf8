"""A result does not depend on how many processes compute it, and no process hangs when another one fails."""

import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import relative_error
from small_runs import REPOSITORY, SMALL, drawn_root, log, mae_checkpoint, metrics, on_two_processes, run
from stress import assert_same, command

import finetune

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


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
        1,
        "--epochs",
        10,
    ]


def torchrun(launcher: list, script: str, *flags, **options) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*TORCHRUN, *launcher, *command(script, *flags)[1:]]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def finish(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder, "train")][:20]


def workers(process: subprocess.Popen) -> list[int]:
    """Process ids of a torchrun's workers, in order of rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        env = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks.update({int(v[5:]): child for v in env if v.startswith(b"RANK=")})
    return [ranks[k] for k in sorted(ranks)]


def wait_for_epoch(process: subprocess.Popen) -> None:
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None, process.stderr.read()


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_one_process_two_processes_and_accumulation_give_the_same_losses(script, flags, tmp_path, tmp_path_factory):
    more = ["--init", mae_checkpoint(tmp_path_factory), "--drop_path", 0.3] if script == "finetune" else []
    args = [*flags, *more]
    two = torchrun(["--standalone", "--nproc_per_node=2"], script, *args, "--output_dir", tmp_path / "two")
    run(script, *args, "--output_dir", tmp_path / "one")
    run(script, *args, "--micro_batch_size", 2, "--output_dir", tmp_path / "accumulated")
    finish(two)
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


TRAIN_SPECIES = """
import sys
sys.path.insert(0, sys.argv[1])
import finetune
from species import Species
finetune.TASKS["species"] = Species
finetune.main(finetune.get_args_parser("species").parse_args(sys.argv[2:]))
"""


def test_a_task_with_targets_of_its_own_gives_the_same_weights_however_it_is_computed(
    flags, tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.syspath_prepend(REPOSITORY / "tests/examples")
    species = importlib.import_module("species")
    monkeypatch.setitem(finetune.TASKS, "species", species.Species)
    args = [*flags, "--init", mae_checkpoint(tmp_path_factory), "--drop_path", 0.3, "--epochs", 3, "--task", "species"]

    def train(name: str, *more) -> None:
        words = [str(word) for word in (*args, "--output_dir", tmp_path / name, *more)]
        finetune.main(finetune.get_args_parser("species").parse_args(words))

    train("one")
    train("accumulated", "--micro_batch_size", 2)
    on_two_processes(TRAIN_SPECIES, REPOSITORY / "tests/examples", *args, "--output_dir", tmp_path / "two")
    expected = torch.load(tmp_path / "one/model.pt", weights_only=True)["model"]
    for name in ("accumulated", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        found = torch.load(tmp_path / name / "model.pt", weights_only=True)["model"]
        for key, tensor in expected.items():
            assert relative_error(found[key], tensor) < 1e-4, key
        last = metrics(tmp_path / name)["last"]
        assert last["loss"] == pytest.approx(metrics(tmp_path / "one")["last"]["loss"], rel=1e-4)


def test_two_agents_with_a_rendezvous_act_as_two_nodes(flags, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=t",
    ]
    nodes = [torchrun(launcher, "pretrain", *flags, "--output_dir", tmp_path / "nodes") for _ in range(2)]
    run("pretrain", *flags, "--output_dir", tmp_path / "one")
    for node in nodes:
        finish(node)
    assert losses(tmp_path / "nodes") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_killed_worker_is_restarted_and_the_result_is_the_same_to_the_bit(flags, tmp_path):
    launcher = ["--standalone", "--nproc_per_node=2"]
    args = [*flags, "--epochs", 15, "--save_minutes", 0]
    reference = torchrun(launcher, "pretrain", *args, "--output_dir", tmp_path / "undisturbed")
    finish(reference)
    process = torchrun([*launcher, "--max_restarts=3"], "pretrain", *args, "--output_dir", tmp_path / "killed")
    wait_for_epoch(process)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert "resumed" in finish(process)
    assert_same(tmp_path / "undisturbed", tmp_path / "killed")


def test_a_stop_signal_that_reaches_one_rank_only_stops_all_at_the_same_step(flags, tmp_path):
    args = [*flags, "--epochs", 500, "--output_dir", tmp_path / "run"]
    process = torchrun(["--standalone", "--nproc_per_node=2"], "pretrain", *args)
    wait_for_epoch(process)
    os.kill(workers(process)[1], signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "checkpoint written at step" in errors
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] > 0


STOPS_IN_VALIDATION = """
import os, signal, sys
import engine, pretrain
from batches import EvalBatches
batches, rank = EvalBatches.__iter__, os.environ["RANK"]
def interrupted(self):
    for number, batch in enumerate(batches(self)):
        if rank == "1" and number == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
EvalBatches.__iter__ = interrupted
try:
    pretrain.main(pretrain.get_args_parser().parse_args(sys.argv[1:]))
except engine.EngineError as error:
    print(error)
os._exit(0)
"""


def test_a_stop_request_to_one_rank_breaks_off_the_validation_of_all(flags, tmp_path):
    outputs = on_two_processes(STOPS_IN_VALIDATION, *flags, "--epochs", 2, "--output_dir", tmp_path / "stopped")
    assert all("SIGTERM; checkpoint written at step 2 of 4" in out for out in outputs)
    assert log(tmp_path / "stopped", "val") == []
    launcher = ["--standalone", "--nproc_per_node=2"]
    for folder in ("stopped", "undisturbed"):
        finish(torchrun(launcher, "pretrain", *flags, "--epochs", 2, "--output_dir", tmp_path / folder))
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")


def test_a_rank_that_fails_early_takes_the_others_down(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        f"import argparse, sys\nsys.path.insert(0, {str(Path(command('engine')[1]).parent)!r})\nimport engine\n"
        "def main(args):\n    dist = engine.setup('cpu')\n"
        "    if dist.rank == 1:\n        raise engine.EngineError('no such file on this node', 1)\n"
        "    dist.gather([1.0])\n"
        "engine.launch(main, argparse.ArgumentParser())\n"
    )
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run(launcher, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "on rank 1: no such file on this node" in result.stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_what_outlives_a_killed_rank_ends_in_one_line(flags, tmp_path):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    args = command("pretrain", *flags, "--epochs", 500, "--output_dir", tmp_path / "run")
    ranks = []
    for rank in range(2):
        env = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    wait_for_epoch(ranks[0])
    ranks[1].kill()
    _, errors = ranks[0].communicate(timeout=90)
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    lines = [line for line in errors.splitlines() if "img/s" not in line]
    assert lines == ["pretrain.py: error: another process of this run has ended; repeat the command to go on"]


def test_a_non_finite_loss_stops_every_rank(flags, tmp_path):
    args = [*flags, "--blr", 1e30, "--output_dir", tmp_path / "run"]
    process = torchrun(["--standalone", "--nproc_per_node=2"], "pretrain", *args)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "non-finite at step" in errors
