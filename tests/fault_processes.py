"""Faults of real processes: trainings that are killed, stopped, or run out of disk at a random moment, and then repeated.

Each training is forked from a process that has imported everything, because importing takes longer than the training.
"""

import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from fault_world import Outcome
from faults import DAMAGES
from small_runs import SMALL, run
from stress import assert_same

import evaluate
import finetune
import pretrain
from engine import launch

SCRIPTS = {"pretrain": pretrain, "finetune": finetune, "evaluate": evaluate}
CRASHED = 70  # exit code of a traceback
HOW = ("killed", "killed twice", "stopped", "stopped twice", "disk full", "rank killed", "damaged after a kill")
DAMAGED = ("bit", "cut", "zeroed page", "emptied", "deleted", "clock")
ENDINGS = (0, 1, 2, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


@dataclass
class Child:
    """A training that runs in a process of its own."""

    pid: int
    output: int  # where both its streams can be read
    code: int | None = None
    text: str = ""

    def poll(self) -> bool:
        """Tell whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        """Wait for its end -> exit code."""
        with open(self.output, "rb") as file:
            self.text = file.read().decode(errors="replace")
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if not self.poll():
            os.kill(self.pid, number)


def start(script: str, words: list, limit: int | None = None, **environment: str) -> Child:
    """Start a script in a fork. limit: the largest file in bytes that it may write, as a full disk."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    try:
        os.environ.update(environment)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = [f"{script}.py", *map(str, words)]
        launch(SCRIPTS[script].main, SCRIPTS[script].get_args_parser())
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(CRASHED)


@dataclass
class Training:
    """A script with its flags, and what it leaves when nothing disturbs it."""

    script: str
    words: list
    folder: Path
    ranks: int = 1
    seconds: float = 0.0
    largest: int = 0
    output: str = ""
    children: list[Child] = field(default_factory=list)

    def start(self, folder: Path, limit: int | None = None) -> list[Child]:
        """Start it in all its processes."""
        words = [*self.words, "--output_dir", folder]
        if self.ranks == 1:
            return [start(self.script, words, limit)]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        place = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [start(self.script, words, limit, RANK=str(k), LOCAL_RANK=str(k), **place) for k in range(self.ranks)]

    def undisturbed(self) -> None:
        """Make the result that all others are compared with."""
        began = time.monotonic()
        children = self.start(self.folder)
        codes = [child.wait() for child in children]
        assert codes == [0] * self.ranks, children[0].text
        self.seconds = time.monotonic() - began
        self.largest = max(path.stat().st_size for path in self.folder.iterdir())


class ProcessWorld:
    """Drawn photos, a cache, and the trainings that are disturbed."""

    def __init__(self, folder: Path):
        self.folder = folder
        data_root = folder / "data"
        run("prepare", "demo", "--data_root", data_root, "--num_train", 40, "--num_val", 16, "--num_pets", 30)
        usual = ["--data_root", data_root, "--cache_dir", folder / "cache", "--model", "mae_tiny", *SMALL]
        usual += ["--batch_size", 4, "--warmup_epochs", 1, "--log_every", 2, "--save_minutes", 0, "--epochs", 3]
        before = [*usual, "--num_images", 12]
        after = [*usual, "--init", folder / "init/model.pt", "--train_fraction", "0.6"]
        init = Training("pretrain", before, folder / "init")
        init.undisturbed()
        self.trainings = [
            Training("pretrain", before, folder / "undisturbed_pretrain"),
            Training("finetune", after, folder / "undisturbed_finetune"),
        ]
        self.on_two = Training("pretrain", before, folder / "undisturbed_two", ranks=2)
        for training in (*self.trainings, self.on_two):
            training.undisturbed()

    def try_fault(self, rng: random.Random) -> Outcome:
        """Disturb a training, repeat its command, and judge."""
        how = rng.choice(HOW)
        training = self.on_two if how == "rank killed" else rng.choice(self.trainings)
        folder = self.folder / "disturbed"
        shutil.rmtree(folder, ignore_errors=True)
        children = disturb(training, folder, how, rng)
        target = f"{training.script}, {training.ranks} process(es)"
        for child in children:
            if child.code not in ENDINGS or "Traceback" in child.text:
                return Outcome(target, how, "traceback", f"exit code {child.code}: {child.text[-1500:]}")
        damaged = None
        if how == "damaged after a kill":
            damaged = damage(folder, rng)
        return self.repeat(training, folder, target, how, damaged)

    def repeat(self, training: Training, folder: Path, target: str, how: str, damaged: Path | None) -> Outcome:
        """Give the command again: it must end with the same result or, after damage, name what is damaged."""
        children = training.start(folder)
        codes = [child.wait() for child in children]
        text = children[0].text
        if "Traceback" in text:
            return Outcome(target, how, "traceback", text[-1500:])
        if codes == [0] * training.ranks:
            try:
                assert_same(training.folder, folder)
            except (AssertionError, OSError, ValueError, KeyError) as error:
                return Outcome(target, how, "silent", f"{damaged}: {type(error).__name__}: {error}")
            return Outcome(target, how, "same")
        last = text.splitlines()[-1] if text else ""
        if damaged is not None and ("error:" in last) and (damaged.name in last or folder.name in last):
            return Outcome(target, how, "refused", last)
        return Outcome(target, how, "silent", f"exit codes {codes}, damaged {damaged}: {text[-1500:]}")


def disturb(training: Training, folder: Path, how: str, rng: random.Random) -> list[Child]:
    """Start a training and disturb it at a random moment -> its processes, which have ended."""
    limit = None
    if how == "disk full":
        limit = rng.randrange(1, int(1.1 * training.largest))
    children = training.start(folder, limit)
    if how != "disk full":
        victim = rng.choice(children)
        time.sleep(rng.uniform(0, training.seconds))
        victim.send(signal.SIGTERM if "stopped" in how else signal.SIGKILL)
        if how == "stopped twice":
            time.sleep(rng.uniform(0, 0.2))
            victim.send(rng.choice([signal.SIGTERM, signal.SIGINT]))
    for child in children:
        child.wait()
    if how == "killed twice":
        more = training.start(folder)
        time.sleep(rng.uniform(0, training.seconds))
        for child in more:
            child.send(signal.SIGKILL)
            child.wait()
        children += more
    return children


def damage(folder: Path, rng: random.Random) -> Path | None:
    """Damage a file that a killed training has left -> its path; None if it has left none."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    if not files:
        return None
    path = rng.choice(files)
    DAMAGES[rng.choice(DAMAGED)](path, rng)
    return path
