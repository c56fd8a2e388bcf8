"""Training engine: processes, precision, schedule, parameter groups, progress, and run directories that resume.

Copy this one file to use it. It works as a single process and under `torchrun` alike:

    dist = setup("auto")                                              # rank, world size, device
    run = Run(output_dir, dist, config)                               # lock, config.json, log.jsonl, checkpoints
    run.log("train", step=1, loss=0.9); run.save(state); state = run.load(); run.finish(weights, metrics)
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from tqdm import tqdm

# Dense bf16 / fp16 peak in FLOP/s by a part of the GPU's name (vendors' data sheets), for model FLOPs utilisation (MFU).
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "V100": 125e12, "RTX 4090": 165e12,
              "L4": 121e12}  # fmt: skip


class EngineError(ValueError):
    """Wrong use (exit code 2) or a failure (exit code 1) that is explained in one line."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class Parser(argparse.ArgumentParser):
    """An argument parser that answers wrong use in one line, without repeating all flags."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def launch(main, parser: argparse.ArgumentParser) -> None:
    """Run main(parsed arguments); SIGTERM, Ctrl-C and errors with an `exit_code` end in one line, without a traceback."""
    args = parser.parse_args()
    message, code = "", 0

    def terminate(number, frame):
        raise KeyboardInterrupt("SIGTERM; repeat the command to go on")

    signal.signal(signal.SIGTERM, terminate)
    try:
        main(args)
        if not torch.distributed.is_initialized():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the work is done
            return
        torch.distributed.barrier()  # until the first process has written its last file
    except KeyboardInterrupt as error:
        message, code = (str(error), 143) if str(error) else ("interrupted", 130)
    except torch.OutOfMemoryError as error:
        message, code = f"out of device memory; lower --micro_batch_size ({str(error).splitlines()[0]})", 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message, code = f"the disk is full ({error.filename or error}); free some space and repeat the command", 1
        elif hasattr(error, "exit_code"):
            message, code = str(error), error.exit_code
        elif isinstance(error, OSError) and error.filename:  # a folder that cannot be written, a file that has gone
            wrong = isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError))
            message, code = f"{error.filename}: {error.strerror}", 2 if wrong else 1
        else:
            raise
    rank = int(os.environ.get("RANK", 0))
    told = code == 2 and int(os.environ.get("LOCAL_RANK", 0)) > 0  # wrong use is the same on every rank: say it once
    if code and not told:
        kind, where = "error" if code < 3 else "stopped", f" on rank {rank}" if rank else ""
        print(f"{parser.prog}: {kind}{where}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: interpreter shutdown would wait for collectives that others sit in, and gloo's threads may abort in it.
    os._exit(code)


@dataclass(frozen=True)
class Distributed:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, values: list[float]) -> torch.Tensor:
        """Collect a few numbers from every process -> float64 [world_size, len(values)] on the CPU."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.world_size)] if self.world_size > 1 else [mine]
        if self.world_size > 1:
            torch.distributed.all_gather(rows, mine)
        return torch.stack(rows).cpu()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def setup(device: str = "auto") -> Distributed:
    """Join the process group that `torchrun` describes in the environment, or be a single process; pick the device."""
    env, gpus = os.environ, torch.cuda.device_count()
    rank, local_rank, world_size = int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1))
    try:
        chosen = torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise EngineError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise EngineError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda":
        index = local_rank if chosen.index is None else chosen.index
        if index >= gpus:
            advice = "use --device cpu or fewer processes"
            raise EngineError(f"--device {chosen} needs GPU {index}, torch sees {gpus}; {advice}")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if world_size > 1 and not torch.distributed.is_initialized():
        # Workers that torchrun restarts must not meet the addresses that their killed predecessors left in the store.
        store, *_ = next(torch.distributed.rendezvous("env://"))
        store = torch.distributed.PrefixStore(f"attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend, timeout = "nccl" if chosen.type == "cuda" else "gloo", timedelta(minutes=30)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Distributed(rank, local_rank, world_size, chosen)


class Precision:
    """Automatic mixed precision: bf16 (default where the GPU has it), fp16 with loss scaling, or fp32 (default on CPUs)."""

    def __init__(self, name: str, device: torch.device):
        on_gpu = device.type == "cuda"
        bf16_gpu = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "auto":
            name = ("bf16" if bf16_gpu else "fp16") if on_gpu else "fp32"
        if name == "bf16" and on_gpu and not bf16_gpu:
            raise EngineError(f"--precision bf16: {hardware_name(device)} has no bfloat16 units; use --precision fp16")
        self.name, self.device_type = name, device.type
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self):
        """Context in which the forward pass runs."""
        return torch.autocast(self.device_type, self.dtype) if self.dtype else contextlib.nullcontext()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Look up the GPU's dense half-precision peak in FLOP/s; None where it is unknown or does not apply."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return next((v for part, v in PEAK_FLOPS.items() if part in torch.cuda.get_device_name(device)), None)


def hardware_name(device: torch.device) -> str:
    """Name the GPU, or the CPU and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def describe_environment(dist: Distributed, precision: Precision) -> dict:
    """Versions, git revision, hardware and precision, for config.json."""
    git, revision = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"], None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    hardware = {"device": hardware_name(dist.device), "world_size": dist.world_size}
    return {"versions": versions, "git": revision, "hardware": hardware, "precision": precision.name}


def lr_at(step: int, total_steps: int, warmup_steps: int, lr: float, min_lr: float = 0.0) -> float:
    """Learning rate of a step (0-based): linear warm-up, then half a cosine from lr to min_lr (MAE paper, appendix A)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def layer_id(name: str, depth: int) -> int:
    """Depth of a parameter for layer-wise decay: 0 embeddings, i + 1 encoder block i, depth + 1 all that follows.

    The decoder and the head follow the encoder, so they train at the full rate, by decision and not by accident.
    """
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0, no_decay=()) -> list[dict]:
    """Group trainable parameters by rate and decay; each group has `params`, `names`, `lr_scale`, `weight_decay`.

    One-dimensional parameters (norms, biases) and those named in no_decay are exempt from weight decay. lr_scale is
    layer_decay^(depth + 1 - layer_id), as in BEiT and MAE fine-tuning.
    """
    depth, groups = len(getattr(model, "blocks", ())), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.0 if p.ndim <= 1 or name in no_decay else weight_decay
            scale = layer_decay ** (depth + 1 - layer_id(name, depth))
            new = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
            group = groups.setdefault((scale, decay), new)
            group["params"].append(p)
            group["names"].append(name)
    return list(groups.values())


class _Lines:
    """A stream that shows tqdm's states as plain lines, where there is no terminal."""

    flush = staticmethod(lambda: None)

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


class Progress(tqdm):
    """Progress of long work with rate and time left: a bar on a terminal, a plain line every ten seconds otherwise."""

    def __init__(self, desc: str, total: int, unit: str = "img", initial: int = 0, quiet: bool = False):
        options = {"dynamic_ncols": True, "mininterval": 0.2}
        if not sys.stderr.isatty():
            line = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
            options = {"mininterval": 10, "miniters": 1, "file": _Lines(), "bar_format": line}
        super().__init__(desc=desc, total=total, unit=unit, unit_scale=unit == "B", unit_divisor=1000, initial=initial,
                         smoothing=0.05, disable=quiet, **options)  # fmt: skip

    def update(self, n: int = 1, note: str = "") -> None:
        """Count n more units; the last `note` is shown beside the rate."""
        if note:
            self.set_postfix_str(note, refresh=False)
        super().update(n)


def write_atomic(path: Path, write) -> None:
    """Let write(file) fill a temporary file, flush it to disk and rename it: readers see the whole or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError):  # torch.save hides the system's reason
            raise OSError(errno.ENOSPC, f"cannot write {path}: {str(error).splitlines()[0]}", str(path)) from None
        raise


def strict_json(content):
    """Replace what JSON has no word for (NaN of a class that does not occur, infinity) by None, at any depth."""
    if isinstance(content, (list, tuple)):
        return [strict_json(v) for v in content]
    whole = {k: strict_json(v) for k, v in content.items()} if isinstance(content, dict) else content
    return None if isinstance(content, float) and not math.isfinite(content) else whole


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, lambda f: f.write((json.dumps(strict_json(content), indent=1) + "\n").encode()))


class Run:
    """One run in its own directory: lock, config.json, log.jsonl, last.pt while running, then model.pt and metrics.json.

    config["experiment"] holds everything that defines the result; a directory of another experiment is refused by name.
    `finished` is True when the run has ended before. resume = "never" starts over instead of continuing.
    """

    def __init__(self, output_dir: str, dist: Distributed, config: dict, resume: str = "auto", state_bytes: int = 0):
        self.dir, self.dist, self.config = Path(output_dir), dist, config
        self.finished, self.log_bytes, self._log, problem = False, 0, None, None
        try:
            if dist.is_main:
                self._open(resume, state_bytes)
        except (EngineError, OSError) as error:
            problem = error
        # All processes learn of a refusal, and that they train the same experiment: nodes could be out of step.
        text = json.dumps(config["experiment"], sort_keys=True)
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
        rows = dist.gather([self.finished, digest, problem is not None])
        if problem:
            raise problem
        if rows[0, 2]:
            raise EngineError(f"the first process cannot use --output_dir {self.dir}")
        if (rows[:, 1] != digest).any():
            raise EngineError("the processes were started with different flags or data; start them again together", 1)
        self.finished = bool(rows[0, 0])

    def _open(self, resume: str, state_bytes: int) -> None:
        self._check(resume, state_bytes)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._acquire_lock()
        if resume == "never":
            for name in ("last.pt", "last.prev.pt", "log.jsonl", "metrics.json", "model.pt"):
                (self.dir / name).unlink(missing_ok=True)
        self.finished = (self.dir / "metrics.json").exists()
        if not self.finished:
            write_json(self.dir / "config.json", self.config)

    def _check(self, resume: str, state_bytes: int) -> None:
        """Refuse a directory that holds something else, or a full disk, before anything is written."""
        path, there = self.dir / "config.json", [p.name for p in self.dir.iterdir()] if self.dir.is_dir() else []
        if self.dir.exists() and not self.dir.is_dir():
            raise EngineError(f"--output_dir {self.dir} is a file")
        foreign = sorted(set(there) - {".lock", "config.json.tmp"})
        if foreign and not path.exists():
            found = f"holds {foreign[0]} and is no run of this project"
            raise EngineError(f"--output_dir {self.dir} {found}; choose another")
        if path.exists():
            try:
                before = json.loads(path.read_text())["experiment"]
            except (ValueError, KeyError):
                raise EngineError(f"{path} cannot be read; choose another --output_dir or delete it") from None
            now = json.loads(json.dumps(self.config["experiment"]))
            changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
            if changed and resume != "never":
                more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
                found = f"{changed[0]} was {before.get(changed[0])!r}, now {now.get(changed[0])!r}{more}"
                advice = "choose another --output_dir, or --resume never to start over"
                raise EngineError(f"--output_dir {self.dir} holds another experiment: {found}; {advice}")
        # Three states must fit: the last one, the one before it, and the one being written.
        parent = next(p for p in (self.dir, *self.dir.absolute().parents) if p.exists())
        free, needed = shutil.disk_usage(parent).free, 3 * state_bytes
        if free < needed and "last.pt" not in there:
            room = f"{free / 1e9:.1f} GB free, checkpoints need {needed / 1e9:.1f} GB"
            raise EngineError(f"{parent} has {room}; free some or choose another --output_dir", 1)

    def _acquire_lock(self) -> None:
        self._lock = open(self.dir / ".lock", "w")  # noqa: SIM115 (held as long as the process lives, freed by any death)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            busy = f"another process is training in {self.dir}"
            raise EngineError(f"{busy}; wait for it or choose another --output_dir") from None

    def log(self, event: str, **fields) -> None:
        """Append one object to log.jsonl (first process only)."""
        if not self.dist.is_main:
            return
        if self._log is None:
            self._log = open(self.dir / "log.jsonl", "ab")  # noqa: SIM115
            self._log.truncate(self.log_bytes)  # what was logged after the checkpoint will be logged again
        line = (json.dumps(strict_json({"event": event, **fields})) + "\n").encode()
        self._log.write(line)
        self._log.flush()
        self.log_bytes += len(line)

    def save(self, state: dict) -> None:
        """Write last.pt (first process only); the one before it stays until the new one is complete, and after."""
        if not self.dist.is_main:
            return
        last, fresh = self.dir / "last.pt", self.dir / "last.new.pt"
        if self._log is not None:
            os.fsync(self._log.fileno())
        write_atomic(fresh, lambda f: torch.save({**state, "log_bytes": self.log_bytes}, f))
        if last.exists():
            os.replace(last, self.dir / "last.prev.pt")
        os.replace(fresh, last)

    def load(self) -> dict | None:
        """Read the newest complete checkpoint, None if there is none; a damaged last.pt falls back to the one before.

        Raises EngineError if checkpoints exist and none can be read: nothing is started over without being asked.
        """
        found = [p for p in (self.dir / "last.pt", self.dir / "last.prev.pt") if p.exists()]
        for path in found:
            try:
                with zipfile.ZipFile(path) as archive:  # torch checks no sums, and reads noise for a folder
                    if damaged := archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                        raise ValueError(f"the checksum or kind of an entry is wrong: {damaged}")
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.log_bytes = state["log_bytes"]
                return state
            except Exception as error:  # damaged archives are reported with many types, some as an invalid argument
                if isinstance(error, (OSError, MemoryError)) and getattr(error, "errno", 0) != errno.EINVAL:
                    raise  # the file may be whole
                if self.dist.is_main:
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    print(f"warning: {path} is damaged ({reason}); trying the checkpoint before it", file=sys.stderr)
        if found:
            raise EngineError(f"no checkpoint in {self.dir} can be read; --resume never starts the run over", 1)
        return None

    def finish(self, weights: dict, metrics: dict) -> None:
        """Write model.pt, then metrics.json, which marks the run as finished; remove the training state."""
        if self.dist.is_main:
            write_atomic(self.dir / "model.pt", lambda f: torch.save(weights, f))
            write_json(self.dir / "metrics.json", metrics)
            for name in ("last.pt", "last.prev.pt"):
                (self.dir / name).unlink(missing_ok=True)
