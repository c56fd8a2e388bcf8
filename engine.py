"""Training engine: processes, precision, learning-rate schedule, parameter groups, progress, command line, safe file writes.

Copy this one file to use it. It works as a single process and under `torchrun` alike:

    dist = setup("auto")                        # rank, world size and device of this process
    precision = Precision("auto", dist.device)  # bf16, fp16 with loss scaling, or fp32
    launch(main, parser)                        # runs main(args); errors end in one line and an exit code

`runs.py` adds the folder of a run: its lock, log and checkpoints.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed
from torch import nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Errors and the start of a script


class EngineError(ValueError):
    """Wrong use (exit code 2) or a failure (exit code 1) that is explained in one line."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def one_line(text: str) -> str:
    """Write line breaks and other characters that cannot be printed as escapes: file names may hold them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class Failure(NamedTuple):
    """How a script ends when it does not succeed."""

    message: str
    exit_code: int


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has no message."""
    lines = str(error).splitlines()
    if lines:
        return lines[0]
    return type(error).__name__


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a full share of it, a limit on files


def explain(error: BaseException) -> Failure | None:
    """Turn an error that a user can cause into a message and an exit code; None marks a defect of the program."""
    if isinstance(error, KeyboardInterrupt):
        if str(error):
            return Failure(str(error), 143)
        return Failure("interrupted", 130)
    if isinstance(error, torch.OutOfMemoryError):
        return Failure(f"out of device memory; lower --micro_batch_size ({first_line(error)})", 1)
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return Failure(f"the disk is full ({error.filename or error}); free some space and repeat the command", 1)
    if hasattr(error, "exit_code"):
        return Failure(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):
        return Failure("the reader of this output has gone; repeat the command without it", 1)
    if isinstance(error, RuntimeError) and _lost_a_peer(error):
        return Failure("another process of this run has ended; repeat the command to go on", 1)
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)) and error.filename:
        return Failure(f"{error.filename}: {error.strerror}", 2)  # the path given is of the wrong kind
    if isinstance(error, OSError) and error.filename:
        return Failure(f"{error.filename}: {error.strerror}", 1)
    return None


def _lost_a_peer(error: RuntimeError) -> bool:
    """Tell whether a collective failed, as it does in those that outlive a killed process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def launch(main: Callable[[argparse.Namespace], object], parser: argparse.ArgumentParser) -> None:
    """Run main(parsed arguments); an error that `explain` knows ends in one line on stderr, without a traceback."""
    args = parser.parse_args()
    exit_code = 0
    # What Pillow warns of while it decodes names no file; our own lines say what matters of it.
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main(args)
        if not torch.distributed.is_initialized():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the work is done
            return
        torch.distributed.barrier()  # until the first process has written its last file
    except (KeyboardInterrupt, Exception) as error:
        failure = explain(error)
        if failure is None:
            raise
        _report(failure, parser.prog)
        exit_code = failure.exit_code
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    # sys.exit would wait at shutdown for collectives that other processes never leave, and gloo's threads may abort.
    os._exit(exit_code)


def _interrupt(number: int, frame: object) -> None:
    """Handle SIGTERM like an interrupt from the keyboard."""
    raise KeyboardInterrupt("SIGTERM; repeat the command to go on")


def _report(failure: Failure, program: str) -> None:
    """Print a failure on stderr; wrong use is the same in every process of a node, so only the first one prints it."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if failure.exit_code == 0:
        return
    if failure.exit_code == 2 and local_rank > 0:
        return
    kind = "error"
    if failure.exit_code > 2:
        kind = "stopped"
    if rank > 0:
        kind += f" on rank {rank}"
    print(f"{program}: {kind}: {one_line(failure.message)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

LARGEST_SIZE = 8192  # side of an image in pixels, beyond which only a slip of the hand asks

ROLES = {
    "recipe": "how the network is trained; part of what defines the result",
    "network": "belongs to a kind of network, such as its size or input",
    "arm": "what an arm of the study varies",
    "seed": "what a new seed changes",
    "computation": "how a result is computed, not which result; may differ when a run is continued",
}


class HelpFormatter(argparse.HelpFormatter):
    """Help that states the default of every flag which has one, unless its own words do."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        has_none = default is None or default is False or default == argparse.SUPPRESS
        if has_none or not action.option_strings or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser that knows the role of each flag (see ROLES) and answers wrong use in one line.

    Flags made by plain add_argument have the role "recipe". Parsed namespaces have two more attributes: `roles`, a
    dictionary from the name of each argument to its role, and `script`, the name of the script without its suffix.
    """

    def __init__(self, *args: Any, **options: Any):
        options.setdefault("allow_abbrev", False)  # --output would be taken for --output_dir
        options.setdefault("formatter_class", HelpFormatter)
        self._titled_groups = {}
        self._roles = {}
        super().__init__(*args, **options)

    def flags(self, title: str, role: str) -> Callable[..., argparse.Action]:
        """Return an add_argument for the argument group `title`; the flags it adds have the given role.

        The group is made on first use, so flags of several roles can share one. Raises ValueError for unknown roles.
        """
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; choose one of {', '.join(ROLES)}")
        if title not in self._titled_groups:
            self._titled_groups[title] = self.add_argument_group(title)
        group = self._titled_groups[title]

        def add(*names: str, **options: Any) -> argparse.Action:
            action = group.add_argument(*names, **options)
            self._roles[action.dest] = role
            return action

        return add

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the flags this parser knows; parse_args and the parsers of subcommands come through here too."""
        parsed, unknown = super().parse_known_args(args, namespace)
        roles = dict(getattr(parsed, "roles", {}))  # a subcommand has set the roles of its flags
        roles.update(self._roles)
        for dest in vars(parsed):
            if dest not in ("roles", "script"):
                roles.setdefault(dest, "recipe")
        parsed.roles = roles
        parsed.script = Path(self.prog.split()[0]).stem  # a subcommand's prog is "script.py command"
        return parsed, unknown

    def error(self, message: str) -> None:
        """Leave with exit code 2 and one line, without repeating all flags."""
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")


def at_least(minimum: float, kind: type = float, maximum: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: finite numbers of a kind (float or int) from the minimum to the maximum."""

    def convert(text: str) -> float:
        value = _number(text, kind)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be at least {minimum} and finite, got {text}")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {text}")
        return value

    return convert


def fraction(text: str) -> float:
    """Convert the text of a flag to a number in (0, 1]."""
    value = _number(text, float)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {text}")
    return value


def seed_number(text: str) -> int:
    """Convert the text of a flag to a seed, an integer in [0, 2^32)."""
    value = _number(text, int)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2^32, got {text}")
    return value


def _number(text: str, kind: type) -> float:
    try:
        return kind(text)
    except ValueError:
        expected = "a number"
        if kind is int:
            expected = "an integer"
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Distributed:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the first process, the one that writes files."""
        return self.rank == 0

    def gather(self, values: list[float]) -> torch.Tensor:
        """Collect a few numbers from every process -> float64 [world_size, len(values)] on the CPU."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size == 1:
            return mine[None].cpu()
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(rows, mine)
        return torch.stack(rows).cpu()

    def gather_named(self, values: dict[str, float]) -> dict[str, torch.Tensor]:
        """Collect named numbers from every process -> for each name a float64 [world_size] on the CPU."""
        columns = self.gather(list(values.values())).T
        return dict(zip(values, columns, strict=True))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def setup(device: str = "auto") -> Distributed:
    """Choose the device and join the process group that `torchrun` describes in the environment, if there is one.

    Raises EngineError for a device that does not exist.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        _prepare_gpu(chosen)
    dist = Distributed(rank, local_rank, world_size, chosen)
    if world_size > 1 and not torch.distributed.is_initialized():
        _join_process_group(dist)
    return dist


def _choose_device(name: str, local_rank: int) -> torch.device:
    """Turn --device into a device; a GPU without a number is the one of this process on its node."""
    gpus = torch.cuda.device_count()
    wrong = f"--device must be auto, cpu, cuda or cuda:N, got {name!r}"
    if name == "auto" and gpus > 0:
        name = "cuda"
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineError(wrong) from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise EngineError(wrong)
    index = device.index
    if index is None:
        index = local_rank
    if index >= gpus:
        advice = "use --device cpu or fewer processes"
        raise EngineError(f"--device {device} needs GPU {index}, torch sees {gpus}; {advice}")
    return torch.device("cuda", index)


def _prepare_gpu(device: torch.device) -> None:
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32


def _join_process_group(dist: Distributed) -> None:
    # Workers that torchrun restarts must not meet the addresses that their killed predecessors left in the store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
    backend = "gloo"
    if dist.device.type == "cuda":
        backend = "nccl"
    timeout = timedelta(minutes=30)
    torch.distributed.init_process_group(
        backend, store=store, rank=dist.rank, world_size=dist.world_size, timeout=timeout
    )


# ---------------------------------------------------------------------------------------------------------------------
# Precision and hardware


AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


class Precision:
    """Automatic mixed precision: bf16 (default where the GPU has it), fp16 with loss scaling, or fp32 (default on CPUs).

    `name` is the precision chosen, `scaler` the gradient scaler (active for fp16 only). Raises EngineError for bf16 on
    a GPU without it.
    """

    def __init__(self, name: str, device: torch.device):
        on_gpu = device.type == "cuda"
        gpu_has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "auto":
            name = self._default(on_gpu, gpu_has_bf16)
        if name == "bf16" and on_gpu and not gpu_has_bf16:
            raise EngineError(f"--precision bf16: {hardware_name(device)} has no bfloat16 units; use --precision fp16")
        self.name = name
        self.device_type = device.type
        self.dtype = AUTOCAST_DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    @staticmethod
    def _default(on_gpu: bool, gpu_has_bf16: bool) -> str:
        if not on_gpu:
            return "fp32"
        if gpu_has_bf16:
            return "bf16"
        return "fp16"

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the forward pass runs."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype)


@contextlib.contextmanager
def single_precision() -> Iterator[None]:
    """Context in which products of float32 tensors are not made in half precision, whatever the caller's autocast.

    On GPUs that have TF32 they use it, as all products of the project do.
    """
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


# Peak of dense bf16 / fp16 matrix products with float32 accumulation in FLOP/s, from the vendor's data sheets and white
# papers (half of the figures "with sparsity"). The keys are device names without vendor and memory size, see peak_of.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "GH200 HBM3e": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100 HBM3": 989e12,  # SXM5
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100 SXM4": 312e12,
    "A100 PCIe": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "V100 SXM2": 125e12,
    "V100 PCIe": 112e12,
    "T4": 65e12,
    "RTX A6000": 155e12,
    "RTX 6000 Ada Generation": 364e12,
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 4090": 165e12,
    "GeForce RTX 5090": 209e12,
}


def peak_of(name: str) -> float | None:
    """Look up the dense half-precision peak in FLOP/s by a GPU's full name; None if the GPU is not in PEAK_FLOPS.

    Nothing is guessed: a laptop version, a slice of a GPU (MIG) or a variant with another suffix is a different GPU.
    """
    kept = []
    for word in re.split(r"[\s-]+", name.lower()):
        vendor = word in ("nvidia", "tesla")
        memory_size = re.fullmatch(r"\d+gb?", word)
        if not vendor and not memory_size:
            kept.append(word)
    model = " ".join(kept)
    for known, peak in PEAK_FLOPS.items():
        if known.lower() == model:
            return peak
    return None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the device's dense half-precision peak in FLOP/s; None where it is unknown or does not apply."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def hardware_name(device: torch.device) -> str:
    """Name the GPU, or the CPU and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def describe_environment(dist: Distributed, precision: Precision) -> dict:
    """Collect versions, git revision, hardware and precision for config.json."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    hardware = {"device": hardware_name(dist.device), "world_size": dist.world_size}
    return {"versions": versions, "git": _git_revision(), "hardware": hardware, "precision": precision.name}


def _git_revision() -> str | None:
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate and parameter groups


def lr_at(step: int, total_steps: int, warmup_steps: int, lr: float, min_lr: float = 0.0) -> float:
    """Return the rate of a step (0-based): linear warm-up, then half a cosine to min_lr (MAE paper, appendix A)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def layer_id(name: str, depth: int) -> int:
    """Number a parameter for layer-wise decay: 0 embeddings, i + 1 encoder block i, depth + 1 all that follows.

    The decoder and the head follow the encoder, so they train at the full rate.
    """
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        block = int(name.split(".")[1])
        return block + 1
    return depth + 1


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, no_decay: Collection[str] = ()
) -> list[dict]:
    """Group trainable parameters by rate and decay; each group has `params`, `names`, `lr_scale`, `weight_decay`.

    One-dimensional parameters (norms, biases) and those named in no_decay are exempt from weight decay. lr_scale is
    layer_decay^(depth + 1 - layer_id), as in BEiT and MAE fine-tuning.
    """
    depth = len(getattr(model, "blocks", ()))
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay
        if parameter.ndim <= 1 or name in no_decay:
            decay = 0.0
        scale = layer_decay ** (depth + 1 - layer_id(name, depth))
        key = (scale, decay)
        if key not in groups:
            groups[key] = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    return list(groups.values())


def without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Make an optimizer class whose methods do the same without importing torch's compiler.

    torch wraps these methods so that its compiler passes them over; at the first call the wrappers import the compiler,
    which takes 2 s and 150 MB also where nothing is compiled. What they wrap is in their attribute __wrapped__, as
    functools.wraps leaves it; a method that is not wrapped stays as it is.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))  # its wrapper switches gradients off as well
    return type(kind.__name__, (kind,), methods)


# ---------------------------------------------------------------------------------------------------------------------
# Progress


class _Lines:
    """A stream that prints tqdm's states as plain lines, for output that is not a terminal."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


class Progress(tqdm):
    """Progress of long work with rate and time left: a bar on a terminal, a plain line every ten seconds otherwise."""

    def __init__(self, desc: str, total: int, unit: str = "img", initial: int = 0, quiet: bool = False):
        options = {"desc": desc, "total": total, "unit": unit, "initial": initial, "disable": quiet}
        options["smoothing"] = 0.05
        options["unit_scale"] = unit == "B"
        options["unit_divisor"] = 1000
        if sys.stderr.isatty():
            options["dynamic_ncols"] = True
            options["mininterval"] = 0.2
        else:
            options["file"] = _Lines()
            options["mininterval"] = 10
            options["miniters"] = 1
            options["bar_format"] = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
        super().__init__(**options)

    def update(self, n: int = 1, note: str = "") -> None:
        """Count n more units; the last `note` is shown after the rate."""
        if note:
            self.set_postfix_str(note, refresh=False)
        super().update(n)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a temporary file, flush it to disk and rename it; readers never see half a file.

    Raises OSError if the file cannot be written; the temporary file is removed and the old file stays. EngineError if
    something other than a file has its name, such as a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise EngineError(f"{path} is not a file that could be replaced; choose another name")
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError):  # torch.save hides the system's reason
            raise OSError(errno.ENOSPC, f"cannot write {path}: {first_line(error)}", str(path)) from None
        raise


def strict_json(content: object) -> object:
    """Replace NaN and infinity by None at any depth: JSON has no word for them. Tuples become lists."""
    if isinstance(content, dict):
        return {key: strict_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict_json(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def checksum(content: dict) -> str:
    """Compute what tells a changed JSON object from the one that was written."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def write_json(path: Path, content: dict) -> None:
    """Write strict JSON atomically, with its checksum as the last entry."""
    content = strict_json(content)
    text = json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict:
    """Read what write_json wrote. Raises EngineError for a damaged file; one without a checksum is taken as it is."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.pop("checksum", None) not in (None, checksum(content)):
        raise EngineError(f"{path} is damaged; bring it back, or move its folder away and repeat the command", 1)
    return content


def hash_file(path: str | os.PathLike) -> str:
    """Compute the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def verify_archive(path: str | os.PathLike) -> None:
    """Raise ValueError if an entry of a zip archive is damaged; torch checks no sums, and takes noise for a folder."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        for entry in archive.infolist():
            if entry.external_attr != 0:
                damaged = entry.filename
    if damaged is not None:
        raise ValueError(f"the checksum or kind of an entry is wrong: {damaged}")
