"""Whole studies whose processes are killed at random moments, and which are repeated until they end.

A kill hits the script itself, any one process below it, or all of them at once; each study ends with the same networks and
scores, to the bit. `tests/stress.py studies 20` calls this.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
TARGETS = ("the script", "one process", "all processes")
MARK = "STUDY_OF_KILLS"  # in the environment of every process of a study
SIZES = ["--num_train", "40", "--num_val", "16", "--num_pets", "46"]
CUT = "--epochs 2 --epoch_updates 20 --batch_size 4 --log_every 5 --save_minutes 0"
ENDINGS = (0, 1, 2, 143)  # finished; runs are missing; refused in a line; asked to stop because the script was killed
MOST_SECONDS = 600  # that a study may take after a kill


def processes() -> dict[int, list[str]]:
    """List the processes of the study by their marked environment -> number and command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if MARK.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")[:-1]
    return found


def kill(number: int) -> None:
    """Kill a process, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def strike(target: str, script: int, draw: random.Random) -> str:
    """Kill a target -> what was hit, in words."""
    alive = processes()
    if target == "the script":
        kill(script)
        return "run_all.sh"
    if target == "all processes":
        kill(script)  # first, so that it starts no further one
        while alive := processes():
            for number in alive:
                kill(number)
        return "all"
    others = [number for number in sorted(alive) if number != script]
    if not others:
        return "nothing, for it had no child just then"
    number = draw.choice(others)
    kill(number)
    names = [Path(word).name for word in alive[number] if word.endswith((".py", ".sh")) or "/" not in word]
    return " ".join(names[:2]) or "a process"


@dataclass
class Studies:
    """Cut demos of one kind, in a folder each."""

    folder: Path
    args: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Draw photos, and make a study that nothing disturbs."""
        data = self.folder / "data"
        command = [sys.executable, str(ROOT / "prepare.py"), "demo", "--data_root", str(data), *SIZES]
        subprocess.run(command, check=True, capture_output=True)
        self.args = ["--demo", "--data_root", str(data), "--gpus", "0", "--jobs", "2", "--model", "mae_tiny"]
        self.args += ["--pretrain_args", CUT, "--finetune_args", CUT]
        start = time.monotonic()
        code, output = self.wait(self.start("undisturbed"))
        assert code == 0, output
        self.seconds = time.monotonic() - start
        self.expected = self.results("undisturbed")
        assert len(self.expected) == 9 + 6

    def start(self, name: str) -> subprocess.Popen:
        """Start a study in a session of its own; its output goes to a file."""
        output = ["--output", str(self.folder / name), "--cache_dir", str(self.folder / name / "cache")]
        # One thread a training, so that sums are made in the same order.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: "1"}
        with open(self.log(name), "wb") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            command = ["bash", str(ROOT / "run_all.sh"), *self.args, *output]
            return subprocess.Popen(command, env=environment, start_new_session=True, **streams)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def wait(self, process: subprocess.Popen) -> tuple[int, str]:
        """Wait for the end of a study's script -> (exit code, what it printed)."""
        code = process.wait(MOST_SECONDS)
        name = process.args[process.args.index("--output") + 1]
        return code, self.log(Path(name).name).read_text(errors="replace")

    def results(self, name: str) -> dict[str, str]:
        """Compute what identifies each network, and each arm's scores of the test images."""
        found = {}
        for file in (self.folder / name).glob("seed0/*/model.pt"):
            found[f"{file.parent.name} network"] = hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (self.folder / name).glob("seed0/*/test.npz"):
            digest = hashlib.sha256()
            with np.load(file) as arrays:
                for key in sorted(arrays.files):
                    digest.update(arrays[key].tobytes())
            found[f"{file.parent.name} scores"] = digest.hexdigest()
        return found


def disturb(studies: Studies, name: str, target: str, draw: random.Random) -> bool:
    """Start or repeat a study and kill a target at a random moment -> whether it had ended before."""
    process = studies.start(name)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(draw.uniform(1, 0.3 * studies.seconds))  # so that a study takes several kills
    if process.poll() is not None:
        return check(studies, name, *studies.wait(process))
    hit = strike(target, process.pid, draw)
    code, output = studies.wait(process)
    print(f"  {target}: {hit}; exit code {code}", flush=True)
    if target == "one process":
        check(studies, name, code, output)
    return False


def check(studies: Studies, name: str, code: int, output: str) -> bool:
    """Check how a study ended -> whether it is finished."""
    assert "Traceback" not in output, output
    assert code in ENDINGS, f"exit code {code}\n{output}"
    if code != 0:
        return False
    found = studies.results(name)
    assert found == studies.expected, (
        f"{[key for key in found if found[key] != studies.expected[key]]} differ\n{output}"
    )
    return True


def finish(studies: Studies, name: str) -> None:
    """Repeat a study undisturbed: it ends well, at once."""
    code, output = studies.wait(studies.start(name))
    assert code == 0, f"exit code {code}\n{output}"
    assert check(studies, name, code, output)


def kill_studies(kills: int, seed: int) -> None:
    """Kill studies again and again, each until it has ended, and compare every one with an undisturbed one."""
    draw = random.Random(seed)
    done = 0
    ended = 0
    with tempfile.TemporaryDirectory() as folder:
        studies = Studies(Path(folder))
        studies.prepare()
        print(f"an undisturbed study: {studies.seconds:.0f} s", flush=True)
        while done < kills:
            name = f"study{ended}"
            if disturb(studies, name, TARGETS[done % len(TARGETS)], draw):
                ended += 1
                continue
            done += 1
            if done % 5 == 0 or done == kills:
                finish(studies, name)
                ended += 1
    print(f"{kills} kills in {ended} studies; each ended with the same networks and scores to the bit")
