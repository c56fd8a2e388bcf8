"""The folder of a run: its lock, configuration, log and checkpoints; an interrupted run continues from it.

    run = RunFolder(output_dir, dist, config)   # lock and config.json
    run.log("train", step=1, loss=0.9)          # one line of log.jsonl
    run.save(state)                             # last.pt
    state = run.load()                          # the newest complete checkpoint, or None
    run.finish(weights, metrics)                # model.pt and metrics.json

Copy this file together with `engine.py` to use it.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from engine import (
    Distributed,
    EngineError,
    first_line,
    hash_file,
    read_json,
    strict_json,
    verify_archive,
    write_atomic,
    write_json,
)

OF_TRAINING = {".lock", "config.json.tmp", "last.pt", "last.prev.pt", "last.new.pt", "last.new.pt.tmp", "log.jsonl"}
EVENT_FILES = "events.out.tfevents.*"  # TensorBoard's, see curves.py


class RunFolder:
    """One run in its own folder: .lock, config.json, log.jsonl, last.pt while running, then model.pt and metrics.json.

    config["experiment"] holds everything that defines the result; a folder of another experiment is refused.
    resume = "never" starts over instead of continuing. state_bytes is the expected size of one checkpoint.
    `finished` is True if the run has ended before. Raises EngineError for a folder that cannot be used.
    """

    def __init__(self, output_dir: str, dist: Distributed, config: dict, resume: str = "auto", state_bytes: int = 0):
        self.dir = Path(output_dir)
        self.dist = dist
        self.config = config
        self.finished = False
        self.identity = {"experiment": digest_of(config["experiment"])}  # what a checkpoint belongs to
        self.log_text = ""  # all of log.jsonl; a checkpoint holds it, so that both go back to the same step
        self.curves = None  # takes every line of the log as well, see curves.py
        self._log = None
        self._lock = None
        problem = None
        try:
            if dist.is_main:
                self._open(resume, state_bytes)
        except (EngineError, OSError) as error:
            problem = error
        self._agree(problem)

    def _open(self, resume: str, state_bytes: int) -> None:
        """Check the folder before anything is written, then lock it and write config.json."""
        self._check_kind()
        self._check_content()
        self._check_experiment(resume)
        self._check_space(state_bytes)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._acquire_lock()
        if resume == "never":
            for name in ("last.pt", "last.prev.pt", "log.jsonl", "metrics.json", "model.pt"):
                (self.dir / name).unlink(missing_ok=True)
            for path in self.dir.glob(EVENT_FILES):
                path.unlink()
        self.finished = self._is_finished()
        if not self.finished:
            write_json(self.dir / "config.json", self.config)

    def _is_finished(self) -> bool:
        """Tell whether the run has ended before; one whose weights are gone is made again, a damaged record is refused."""
        metrics = self.dir / "metrics.json"
        if not metrics.exists():
            return False
        read_json(metrics)
        if (self.dir / "model.pt").exists():
            return True
        metrics.unlink()
        return False

    def _agree(self, problem: Exception | None) -> None:
        """Let all processes learn of a refusal, and check that they run the same experiment: nodes may be out of step."""
        digest = int(self.identity["experiment"][:12], 16)  # 48 bits, exact in float64
        gathered = self.dist.gather_named(
            {"finished": self.finished, "experiment": digest, "refused": problem is not None}
        )
        if problem is not None:
            raise problem
        if gathered["refused"][0]:
            raise EngineError(f"the first process cannot use --output_dir {self.dir}")
        if (gathered["experiment"] != digest).any():
            raise EngineError("the processes were started with different flags or data; start them again together", 1)
        self.finished = bool(gathered["finished"][0])

    def _check_kind(self) -> None:
        if self.dir.exists() and not self.dir.is_dir():
            raise EngineError(f"--output_dir {self.dir} is a file")

    def _check_content(self) -> None:
        """Refuse a folder that holds something other than a run."""
        if not self.dir.is_dir() or (self.dir / "config.json").exists():
            return
        # A checkpoint knows its experiment without config.json.
        foreign = sorted(path.name for path in self.dir.iterdir() if not is_of_training(path))
        if foreign:
            reason = f"holds {foreign[0]} and is no run of this project"
            raise EngineError(f"--output_dir {self.dir} {reason}; choose another")

    def _check_experiment(self, resume: str) -> None:
        """Refuse to continue a run whose experiment was a different one, naming the first difference."""
        path = self.dir / "config.json"
        if not path.exists():
            return
        try:
            before = dict(read_json(path)["experiment"])
        except (ValueError, KeyError, TypeError):
            raise EngineError(f"{path} cannot be read; choose another --output_dir or delete it") from None
        now = json.loads(json.dumps(self.config["experiment"]))
        names = sorted({*before, *now})
        changed = [name for name in names if before.get(name) != now.get(name)]
        if not changed or resume == "never":
            return
        first = changed[0]
        difference = f"{first} was {before.get(first)!r}, now {now.get(first)!r}"
        if len(changed) > 1:
            difference += f" (and {len(changed) - 1} more)"
        advice = "choose another --output_dir, or --resume never to start over"
        raise EngineError(f"--output_dir {self.dir} holds another experiment: {difference}; {advice}")

    def _check_space(self, state_bytes: int) -> None:
        """Refuse a disk that cannot hold the run's checkpoints, unless the run has written some already."""
        if (self.dir / "last.pt").exists():
            return
        parent = self.dir.absolute()
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        needed = 3 * state_bytes  # the last state, the one before it, and the one being written
        if free < needed:
            room = f"{free / 1e9:.1f} GB free, checkpoints need {needed / 1e9:.1f} GB"
            raise EngineError(f"{parent} has {room}; free some or choose another --output_dir", 1)

    def _acquire_lock(self) -> None:
        self._lock = open(self.dir / ".lock", "w")  # noqa: SIM115 (held as long as the process lives, freed by any death)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = f"another process is training in {self.dir}"
            raise EngineError(f"{busy}; wait for it or choose another --output_dir") from None
        except OSError as error:
            problem = f"{self.dir} cannot be locked ({error.strerror})"
            raise EngineError(f"{problem}; choose an --output_dir on a file system that has locks (flock)", 1) from None

    def bind(self, **digests: str) -> None:
        """Say what checkpoints belong to besides the experiment: images=... the pixels that are trained on."""
        self.identity.update(digests)

    def log(self, event: str, **fields: object) -> None:
        """Append one object to log.jsonl (first process only)."""
        if not self.dist.is_main:
            return
        if self._log is None:
            # What was logged after the checkpoint will be logged again.
            write_atomic(self.dir / "log.jsonl", lambda file: file.write(self.log_text.encode()))
            self._log = open(self.dir / "log.jsonl", "ab")  # noqa: SIM115
            if self.curves is not None:
                self.curves.start(self.log_text)
        content = strict_json({"event": event, **fields})
        line = json.dumps(content) + "\n"
        self._log.write(line.encode())
        self._log.flush()
        self.log_text += line
        if self.curves is not None:
            self.curves.add(content)

    def save(self, state: dict) -> None:
        """Write last.pt (first process only); the checkpoint before it stays as last.prev.pt."""
        if not self.dist.is_main:
            return
        last = self.dir / "last.pt"
        fresh = self.dir / "last.new.pt"
        if self._log is not None:
            os.fsync(self._log.fileno())
        content = {**state, "log": self.log_text, "identity": self.identity}
        write_atomic(fresh, lambda file: torch.save(content, file))
        if last.exists():
            os.replace(last, self.dir / "last.prev.pt")
        os.replace(fresh, last)

    def load(self) -> dict | None:
        """Read the newest complete checkpoint, None if there is none; a damaged last.pt falls back to the one before.

        Raises EngineError if checkpoints exist and none can be read: a run starts over only on request.
        """
        damaged = 0
        for path in (self.dir / "last.pt", self.dir / "last.prev.pt"):
            if not path.exists():
                continue
            try:
                state = read_checkpoint(path)
            except Exception as error:  # damaged archives are reported with many types
                if may_be_intact(error):
                    raise
                damaged += 1
                if self.dist.is_main:
                    reason = first_line(error)
                    print(f"warning: {path} is damaged ({reason}); trying the checkpoint before it", file=sys.stderr)
            else:
                self._require_own(path, state["identity"])
                self.log_text = state["log"]
                return state
        if damaged > 0:
            raise EngineError(f"no checkpoint in {self.dir} can be read; --resume never starts the run over", 1)
        return None

    def _require_own(self, path: Path, identity: dict) -> None:
        """Refuse a checkpoint of another experiment, or of other pixels than those that are there now."""
        for name, digest in self.identity.items():
            if identity.get(name) != digest:
                problem = f"{path} is of another {name}"
                if name != "experiment":
                    problem = f"the {name} have changed since {path} was written"
                raise EngineError(f"{problem}; bring back what it was, or --resume never starts the run over", 1)

    def finish(self, weights: dict, metrics: dict) -> None:
        """Write model.pt, then metrics.json, which marks the run as finished; remove the training state.

        metrics["files"] has the SHA-256 of every file of the run, so that a changed one is noticed.
        """
        if not self.dist.is_main:
            return
        if self.curves is not None:
            self.curves.close()
        write_atomic(self.dir / "model.pt", lambda file: torch.save(weights, file))
        files = {path.name: hash_file(path) for path in sorted(self.dir.iterdir()) if self._is_result(path)}
        if self.log_text:
            files["log.jsonl"] = hashlib.sha256(self.log_text.encode()).hexdigest()
        write_json(self.dir / "metrics.json", {**metrics, "files": files})
        for name in ("last.pt", "last.prev.pt"):
            (self.dir / name).unlink(missing_ok=True)

    def _is_result(self, path: Path) -> bool:
        return path.is_file() and not is_of_training(path) and not path.name.endswith(".tmp")


def is_of_training(path: Path) -> bool:
    """Tell whether a file of a run's folder serves its training, and is no result."""
    return path.name in OF_TRAINING or path.match(EVENT_FILES)


def digest_of(experiment: dict) -> str:
    """Compute the SHA-256 of what defines an experiment."""
    return hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()


def read_checkpoint(path: Path) -> dict:
    """Verify and read a checkpoint that RunFolder.save wrote; damage raises errors of many types."""
    verify_archive(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("log"), str)
        or not isinstance(state.get("identity"), dict)
    ):
        raise ValueError("it holds no state of a run")
    return state


def may_be_intact(error: Exception) -> bool:
    """Return True if reading failed for a reason other than the file's content, such as an unreachable disk."""
    if not isinstance(error, (OSError, MemoryError)):
        return False
    return getattr(error, "errno", None) != errno.EINVAL  # zipfile seeks to nonsense places in damaged archives
