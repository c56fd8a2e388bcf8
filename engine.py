"""Training engine: processes, precision, schedule, parameter groups, progress, and run directories that resume.

Copy this one file to use it. It works as a single process and under `torchrun` alike:

    dist = setup("auto")                                              # rank, world size, device
    run = Run(output_dir, dist, config)                               # lock, config.json, log.jsonl, checkpoints
    run.log("train", step=1, loss=0.9); run.save(state); state = run.load(); run.finish(weights, metrics)

Run directories are resumable to the bit: the log is cut back to the checkpoint, the checkpoint is replaced atomically.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from tqdm import tqdm

# Dense bf16 / fp16 peak in FLOP/s by a part of the GPU's name (vendors' data sheets), for model FLOPs utilisation (MFU).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "L4": 121e12,
}


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
    """Run main(parsed arguments); errors with an `exit_code` end in one line on stderr instead of a traceback."""
    args = parser.parse_args()
    try:
        main(args)
        if not torch.distributed.is_initialized():
            return
        torch.distributed.barrier()  # until the first process has written its last file
        message, code = "", 0
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except torch.OutOfMemoryError as error:
        message, code = f"out of device memory; lower --micro_batch_size ({str(error).splitlines()[0]})", 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message, code = f"the disk is full ({error.filename or error}); free some space and repeat the command", 1
        elif hasattr(error, "exit_code"):
            message, code = str(error), error.exit_code
        else:
            raise
    rank = int(os.environ.get("RANK", 0))
    once = code == 2 and int(os.environ.get("LOCAL_RANK", 0)) > 0  # wrong use is the same on every rank: say it once
    if code and not once:
        kind, where = "error" if code < 3 else "stopped", f" on rank {rank}" if rank else ""
        print(f"{parser.prog}: {kind}{where}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: interpreter shutdown would wait for collectives that others sit in, and gloo's threads may abort in it.
    os._exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices, precision


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
        if self.world_size == 1:
            return mine[None].cpu()
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(rows, mine)
        return torch.stack(rows).cpu()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def setup(device: str = "auto") -> Distributed:
    """Join the process group that `torchrun` describes in the environment, or be a single process; pick the device."""
    rank, local_rank, world_size = (
        int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    gpus = torch.cuda.device_count()
    try:
        chosen = torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise EngineError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type == "cuda":
        index = local_rank if chosen.index is None else chosen.index
        if index >= gpus:
            raise EngineError(
                f"--device {chosen} needs GPU {index}, torch sees {gpus}; use --device cpu or fewer processes"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if world_size > 1 and not torch.distributed.is_initialized():
        # Workers that torchrun restarts must not meet the addresses that their killed predecessors left in the store.
        backend, attempt = (
            "nccl" if chosen.type == "cuda" else "gloo",
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )
        store, *_ = next(torch.distributed.rendezvous("env://"))
        store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30)
        )
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
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def hardware_name(device: torch.device) -> str:
    """Name the GPU, or the CPU and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        return f"{name}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and parameter groups


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
    depth = len(getattr(model, "blocks", ()))
    groups: dict[tuple[float, float], dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = 0.0 if p.ndim <= 1 or name in no_decay else weight_decay
        scale = layer_decay ** (depth + 1 - layer_id(name, depth)) if layer_decay != 1 else 1.0
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------------------------
# Progress and files


class Progress:
    """Progress of long work with rate and time left: tqdm on a terminal, a plain line every `every` seconds otherwise."""

    def __init__(
        self, desc: str, total: int, unit: str = "img", initial: int = 0, quiet: bool = False, every: float = 10
    ):
        self.desc, self.total, self.done, self.first = desc, total, initial, initial
        self.quiet, self.every = quiet, every
        self.factor, self.unit, self.note = (1e6, "MB", "") if unit == "B" else (1, unit, "")
        self.start = self.last = time.monotonic()
        options = {"unit": unit, "unit_scale": unit == "B", "initial": initial, "dynamic_ncols": True}
        self.bar = tqdm(desc=desc, total=total, **options) if sys.stderr.isatty() and not quiet else None

    def update(self, n: int = 1, note: str = "") -> None:
        """Count n more units; the last `note` is shown beside the rate."""
        self.done, self.note, now = self.done + n, note or self.note, time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(n)
        elif not self.quiet and (now - self.last >= self.every or self.done == self.total):
            self.last = now
            rate = (self.done - self.first) / max(now - self.start, 1e-9)
            left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "?"
            done, total, speed = (x / self.factor for x in (self.done, self.total, rate))
            line = f"{self.desc}: {done:,.0f} of {total:,.0f} {self.unit}, {speed:,.1f} {self.unit}/s, {left} left"
            print(", ".join([line, self.note] if self.note else [line]), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def write_atomic(path: Path, write) -> None:
    """Let write(file) fill a temporary file, flush it to disk and rename it: readers see the whole or nothing."""
    temporary = path.with_name(path.name + ".tmp")
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


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, lambda f: f.write((json.dumps(content, indent=1) + "\n").encode()))


# ---------------------------------------------------------------------------------------------------------------------
# Run directories


class Run:
    """One run in its own directory: lock, config.json, log.jsonl, last.pt while running, then model.pt and metrics.json.

    config["experiment"] holds everything that defines the result; a directory of another experiment is refused by name.
    `finished` is True when the run has ended before. resume = "never" starts over instead of continuing.
    """

    KEPT = ("last.pt", "last.prev.pt", "log.jsonl", "metrics.json", "model.pt")

    def __init__(self, output_dir: str, dist: Distributed, config: dict, resume: str = "auto", state_bytes: int = 0):
        self.dir, self.dist, self.config = Path(output_dir), dist, config
        self.finished, self.log_bytes, self._log = False, 0, None
        if dist.is_main:
            self._check(resume)
            self._check_space(state_bytes)
            self.dir.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            if resume == "never":
                for name in self.KEPT:
                    (self.dir / name).unlink(missing_ok=True)
            self.finished = (self.dir / "metrics.json").exists()
            if not self.finished:
                write_json(self.dir / "config.json", config)
        self.finished = bool(dist.gather([self.finished])[0, 0])

    def _check(self, resume: str) -> None:
        """Refuse a directory that holds something else, before anything is written."""
        if not self.dir.exists():
            return
        if not self.dir.is_dir():
            raise EngineError(f"--output_dir {self.dir} is a file")
        path = self.dir / "config.json"
        if not path.exists():
            foreign = sorted(p.name for p in self.dir.iterdir() if p.name not in (".lock", "config.json.tmp"))
            if foreign:
                raise EngineError(
                    f"--output_dir {self.dir} holds {foreign[0]} and is no run of this project; choose another"
                )
            return
        try:
            before = json.loads(path.read_text())["experiment"]
        except (ValueError, KeyError):
            raise EngineError(f"{path} cannot be read; choose another --output_dir or delete it") from None
        now = json.loads(json.dumps(self.config["experiment"]))
        changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        if changed and resume != "never":
            key = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            found = f"{key} was {before.get(key)!r}, now {now.get(key)!r}{more}"
            advice = "choose another --output_dir, or --resume never to start over"
            raise EngineError(f"--output_dir {self.dir} holds another experiment: {found}; {advice}")

    def _check_space(self, state_bytes: int) -> None:
        """Three states must fit: the last one, the one before it, and the one being written."""
        parent = next(p for p in (self.dir, *self.dir.absolute().parents) if p.exists())
        free, needed = shutil.disk_usage(parent).free, 3 * state_bytes
        if free < needed and not (self.dir / "last.pt").exists():
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
        line = (json.dumps({"event": event, **fields}) + "\n").encode()
        self._log.write(line)
        self._log.flush()
        self.log_bytes += len(line)

    def save(self, state: dict) -> None:
        """Write last.pt (first process only); the one before it stays until the new one is complete, and after."""
        if not self.dist.is_main:
            return
        last = self.dir / "last.pt"
        if self._log is not None:
            os.fsync(self._log.fileno())
        fresh = self.dir / "last.new.pt"
        write_atomic(fresh, lambda f: torch.save({**state, "log_bytes": self.log_bytes}, f))
        if last.exists():
            os.replace(last, self.dir / "last.prev.pt")
        os.replace(fresh, last)

    def load(self) -> dict | None:
        """Read the newest complete checkpoint, or None; a damaged last.pt falls back to the one before with a warning."""
        for name in ("last.pt", "last.prev.pt"):
            path = self.dir / name
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.log_bytes = state["log_bytes"]
                return state
            except Exception as error:  # torch reports damaged archives with many types
                if self.dist.is_main:
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    print(f"warning: {path} is damaged ({reason}); trying the checkpoint before it", file=sys.stderr)
        return None

    def finish(self, weights: dict, metrics: dict) -> None:
        """Write model.pt, then metrics.json, which marks the run as finished; remove the training state."""
        if not self.dist.is_main:
            return
        write_atomic(self.dir / "model.pt", lambda f: torch.save(weights, f))
        write_json(self.dir / "metrics.json", metrics)
        for name in ("last.pt", "last.prev.pt"):
            (self.dir / name).unlink(missing_ok=True)


def describe_environment(dist: Distributed, precision: Precision) -> dict:
    """Versions, git revision, hardware and precision, for config.json."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    revision = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    import numpy
    import torchvision

    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions["numpy"] = numpy.__version__
    hardware = {"device": hardware_name(dist.device), "world_size": dist.world_size}
    return {"versions": versions, "git": revision, "hardware": hardware, "precision": precision.name}
