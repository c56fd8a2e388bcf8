"""A cut study through a real Slurm on this machine: killed, put back, cancelled, submitted again, and equal to the bit.

    python tests/real_slurm.py                # as root on Debian; installs slurm-wlm and munge if they are missing

Everything of Slurm lies in a temporary folder, which SLURM_CONF names; its daemons end with this script. Where Slurm cannot
be installed or started, the script says why and leaves with exit code 0.
"""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
PATIENCE = 300  # seconds that one step may take
EPOCH = re.compile(r"^epoch \d", re.MULTILINE)  # what a training prints after each of its epochs
SIZES = ["--num_train", "40", "--num_val", "16", "--num_pets", "46"]
LONG = "--epochs 10 --epoch_updates 30 --batch_size 4 --log_every 5"  # long enough to be met while it runs
SHORT = "--epochs 1 --epoch_updates 20 --batch_size 4"

# cons_tres: jobs share the node by cores. No cgroups: containers often have none to give.
CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Skip(Exception):
    """What this machine lacks."""


def say(text: str) -> None:
    print(f"slurm: {text}", flush=True)


def wait_for(what: str, ready: Callable[[], object]) -> object:
    """Wait until something is so -> what ready() gave."""
    end = time.monotonic() + PATIENCE
    while not (found := ready()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE} s in vain for: {what}")
        time.sleep(0.2)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# A Slurm of our own


def install() -> None:
    """Install Slurm where that is allowed. Raises Skip where it is not."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0:
        raise Skip("only root can start its daemons")
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Skip(f"there is no {missing[0]}, and no apt-get to install it")
    say(f"installing {' and '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["install", "-y", *PACKAGES], ["update"], ["install", "-y", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
        if command[0] == "install" and done.returncode == 0:
            return
    raise Skip(f"apt-get could not install it: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


@contextlib.contextmanager
def running_slurm(folder: Path) -> Iterator[None]:
    """Start munged, slurmctld and slurmd, and end them. Raises Skip if they do not come up."""
    host = os.uname().nodename
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, cores=len(os.sched_getaffinity(0))))
    os.environ["SLURM_CONF"] = str(config)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with open(folder / f"{command[0]}.out", "w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)  # munged makes its socket, slurmctld listens
        try:
            wait_for("the node to be idle", lambda: is_up(daemons))
        except AssertionError as error:
            raise Skip(f"its daemons do not come up ({error}); see {folder}") from None
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def is_up(daemons: list[subprocess.Popen]) -> bool:
    """Tell whether the node takes jobs."""
    for daemon in daemons:
        if daemon.poll() is not None:
            raise AssertionError(f"{daemon.args[0]} ended with exit code {daemon.returncode}")
    done = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True)
    return "idle" in done.stdout


def slurm(*command: str) -> str:
    """Run a command of Slurm's -> what it printed."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def queue() -> dict[str, tuple[str, str]]:
    """List the tasks in the queue: number -> (name of the job, state)."""
    rows = slurm("squeue", "--array", "--noheader", "--format=%i %j %T").splitlines()
    return {number: (name, state) for number, name, state in map(str.split, rows)}


def running(name: str) -> list[str]:
    """List the tasks of a job that run."""
    return [number for number, (job, state) in queue().items() if job.endswith(name) and state == "RUNNING"]


# ----------------------------------------------------------------------------------------------------------------------
# The study


class Study:
    """A cut demo in a folder."""

    def __init__(self, folder: Path, name: str):
        self.output = folder / name
        self.args = [
            "--demo",
            "--data_root",
            folder / "data",
            "--output",
            self.output,
            "--cache_dir",
            folder / name / "cache",
        ]
        self.args += ["--gpus", "0", "--model", "mae_tiny", "--pretrain_args", LONG, "--finetune_args", SHORT]

    def run(self, *more: str) -> str:
        """Start run_all.sh with one thread a training, so that sums are made in the same order -> what it printed."""
        command = ["bash", str(ROOT / "run_all.sh"), *map(str, self.args), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def weights(self) -> dict[str, str]:
        """Compute the SHA-256 of each network."""
        files = self.output.glob("seed0/*/model.pt")
        return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def log(self, run: str) -> str:
        """Read the log of a run."""
        file = self.output / "logs" / f"seed0_{run}.log"
        return file.read_text() if file.exists() else ""

    def training(self, run: str) -> int | None:
        """Find the process of a training that has made some updates."""
        if not EPOCH.search(self.log(run)):
            return None
        folder = os.fsencode(self.output / "seed0" / run)
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                words = entry.read_bytes().split(b"\0")
                if folder in words and words[1].endswith(b"pretrain.py"):  # not what started it
                    return int(entry.parent.name)
        return None


def task_of(process: int) -> str:
    """Find the task of Slurm that a process belongs to."""
    text = Path(f"/proc/{process}/environ").read_bytes()
    names = dict(word.split(b"=", 1) for word in text.split(b"\0") if b"=" in word)
    return names[b"SLURM_ARRAY_JOB_ID"].decode() + "_" + names[b"SLURM_ARRAY_TASK_ID"].decode()


def wait_for_the_end() -> None:
    """Wait until no job is left; what was put back need not wait for its turn."""

    def is_empty() -> bool:
        tasks = queue()
        for number, (_, state) in tasks.items():
            if state == "PENDING":
                subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], capture_output=True)
        return not tasks

    for _ in range(4):  # each may take as long as one step
        with contextlib.suppress(AssertionError):
            wait_for("the queue to be empty", is_empty)
            return
    raise AssertionError(f"jobs are left: {queue()}")


def disturb(study: Study) -> None:
    """Kill one run, put two others back (by hand, and as before a time limit), and cancel everything while they run."""
    study.run("--slurm", "--time=30 --mem=500")
    process = wait_for("the first training", lambda: study.training("pretrain_animal"))
    say(f"kill -9 of a training ({task_of(process)})")
    os.kill(process, signal.SIGKILL)

    process = wait_for("the second training", lambda: study.training("pretrain_non_animal"))
    task = task_of(process)
    say(f"scontrol requeue {task}")
    slurm("scontrol", "requeue", task)
    wait_for("its checkpoint", lambda: "checkpoint written at step" in study.log("pretrain_non_animal"))

    process = wait_for("the third training", lambda: study.training("pretrain_mixed"))
    task = task_of(process)
    say(f"the time limit of {task} comes near (its signal, SIGUSR1 to the batch script)")
    slurm("scancel", "--signal=USR1", "--batch", task)
    wait_for("its checkpoint", lambda: "checkpoint written at step" in study.log("pretrain_mixed"))
    wait_for("its place in the queue", lambda: queue().get(task, ("", ""))[1] == "PENDING")

    slurm("scontrol", "update", f"JobId={task}", "StartTime=now")
    wait_for("its second start", lambda: "resumed" in study.log("pretrain_mixed"))
    jobs = sorted({number.split("_")[0] for number in queue()})
    say(f"scancel {' '.join(jobs)}")
    slurm("scancel", *jobs)
    wait_for("the queue to be empty", lambda: not queue())


def compare(folder: Path) -> None:
    """Make a study one run after another, and one by Slurm with everything that can happen to it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "prepare.py"), "demo", "--data_root", str(folder / "data"), *SIZES]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    alone = Study(folder, "alone")
    say("the study, one run after another")
    alone.run("--jobs", "1")
    jobs = Study(folder, "jobs")
    disturb(jobs)
    done = len(list(jobs.output.glob("seed0/*/metrics.json")))
    say(f"{done} of 9 runs were finished; submitting again")
    out = jobs.run("--slurm", "--time=30 --mem=500")
    assert f"{9 - done} of 9 runs are left" in out, out
    wait_for_the_end()
    assert (jobs.output / "report/report.html").exists(), "the last job wrote no report"
    assert len(alone.weights()) == 9
    assert jobs.weights() == alone.weights(), "some networks differ"
    say("nine networks, equal to the bit to those made one after another")
    out = jobs.run("--slurm", "--time=30 --mem=500")
    assert "0 of 9 runs are left" in out, out
    wait_for_the_end()
    say("a third submission had nothing left to train")


def main() -> int:
    try:
        install()
        with tempfile.TemporaryDirectory() as name, running_slurm(Path(name, "slurm")):
            compare(Path(name))
    except Skip as reason:
        say(f"skipped: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
