"""Measure speed: training on synthetic and on real batches, peers side by side, the data path, and the study's time.

    python bench.py --quick                                              # two minutes on two cores
    python bench.py --peers --output bench.jsonl                         # everything; bf16 on GPUs that have it
    python bench.py --tasks objectives                                   # all objectives of pretrain.py
    python bench.py --report bench.jsonl                                 # write BENCHMARKS.md from recorded lines

The step that is timed is that of the training scripts: their flags, objectives and tasks, and trainer.Trainer.train_step.
One JSON line per measurement and a table at the end. Contestants of a task take turns in one process, in changing order,
so a drifting machine favours none; times are medians over synchronised turns, ratios medians over pairs of the same turn.
Choices of a compiled step, and objectives on a GPU, are measured one after the other instead.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import Tensor

import baseline
import bench_choices
import bench_eager
import bench_growth
import bench_peers
import bench_products
import bench_rest
import finetune
import pretrain
from batches import TrainBatches
from bench_timing import Contestant, Pace, Stopwatch, Timing
from engine import Distributed, EngineError, Parser, Precision, at_least, hardware_name, launch, peak_flops, setup
from models import MODELS
from objective import Objective, TestSetting
from runs import RunFolder
from tasks import TASKS
from trainer import Trainer, kept_bytes, plan_run

TRAININGS = ("pretrain", "finetune", "resnet50")
ON_PHOTOS = {"data", "rest", "growth"}  # what --synthetic leaves out
DEFAULT_TASKS = (*TRAININGS, "data", "rest", "growth", "study", "products", "scaling")

PEERS = ("eager", "transformers", "timm", "pil")

# Variants of a measurement, as the report names them.
REAL = "this project, real batches"
SYNTHETIC = "this project, synthetic"
EAGER = "facebookresearch/mae-style eager step, synthetic"
WHOLE_STUDY = "3 x 150 + 6 x 100 epochs, data, validation, tests, starts, checkpoints"

# The paper's study: images through training, validation, decoding and tests, and the starts of nine runs.
STUDY = {
    "pretrain": 3 * 150 * 25_739,
    "finetune": 5 * 100 * 5_144,
    "resnet50": 100 * 5_144,
    "pretrain validation": 3 * 150 * 2 * 1_016,
    "finetune validation": 5 * 34 * 1_102,
    "resnet50 validation": 34 * 1_102,
    "decoding": 61_036 + 2 * 7_349,
    "testing": 6 * 1_103,
    "starting": 9,
    "opening": 3 * (25_739 + 2 * 1_016) + 6 * (2 * 5_144 + 1_102),  # rows of the caches, images and trimaps
}
CHECKPOINT_EVERY = 300  # seconds, as --save_minutes has it
# Validation images per image of training, with the scripts' --val_epochs.
VALIDATED = {"pretrain": 2 * 1_016 / 25_739, "finetune": 1_102 / (3 * 5_144), "resnet50": 1_102 / (3 * 5_144)}
COLUMNS = (
    "task",
    "variant",
    "model",
    "batch_size",
    "world_size",
    "precision",
    "step_ms",
    "spread_ms",
    "img_s",
    "tflops",
    "mfu",
    "mem_gb",
    "ratio",
    "note",
)
DRAWN_PHOTOS = ("--num_train=64", "--num_val=24", "--num_pets=48")
MOST_PHOTOS = 4096  # that a training reads: enough for its rate, soon decoded
ENDLESS = 10**9  # steps, more than any measurement takes


def get_args_parser() -> Parser:
    """Make the parser of the command line."""
    parser = Parser("bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        choices=list(MEASUREMENTS),
        default=DEFAULT_TASKS,
        help="what to measure. rest: start, decoding, checkpoints, tests; growth: what more images cost; study: its time\n"
        "from all these rates; products: the matrix products of a step alone; choices: pre-training with each choice in\n"
        "it undone; objectives: all objectives of pretrain.py (default: all but the last two)",
    )
    add("--choices", nargs="+", choices=choice_names(), help="with --tasks choices: only these (default: all)")
    add("--quick", action="store_true", help="mae_small, few images and turns: a check that takes two minutes")
    add("--synthetic", action="store_true", help="no real batches: one batch of random pixels, again and again")
    add(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="also other projects (requirements-dev.txt), all or those named; eager: the step of most public code",
    )
    add("--model", choices=list(MODELS), help="default mae_base (--quick: mae_small)")
    add(
        "--batch_size",
        type=at_least(1, int),
        help="images per step and process (default 256, fine-tuning 64; on CPUs 16)",
    )
    add("--img_size", type=at_least(1, int), default=224, help="input size in pixels")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="as in training")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile all contestants (default: on GPUs)")
    add("--cuda_graph", action=argparse.BooleanOptionalAction, default=False, help="as in training")
    add("--repeats", type=at_least(1, int), help="turns of each contestant (default 7)")
    add("--data_root", help="photos to read (default: drawn ones in a temporary folder)")
    add("--cache_dir", help="folder of their decoded images (default: a temporary folder)")
    add("--profile", metavar="DIR", help="write a chrome trace of each training, print its most expensive kernels")
    add("--output", default="bench.jsonl", help="file that the JSON lines are appended to")
    add("--report", metavar="FILE", help="only write BENCHMARKS.md (or --output X.md) from these JSON lines")
    return parser


def resolve(args: argparse.Namespace, on_gpu: bool) -> argparse.Namespace:
    """Fill in the defaults that depend on --quick and on the device."""
    resolved = copy.copy(args)
    if args.model is None:
        resolved.model = "mae_small" if args.quick else "mae_base"
    if args.repeats is None:
        resolved.repeats = 2 if args.quick else 7
    if args.compile is None:
        resolved.compile = on_gpu
    if args.peers is None:
        resolved.peers = ()
    elif not args.peers:
        resolved.peers = PEERS
    return resolved


def images_per_step(task: str, args: argparse.Namespace, on_gpu: bool) -> int:
    """Give the images per step and process of a task."""
    if args.batch_size is not None:
        return args.batch_size
    if args.quick:
        return 4
    if not on_gpu:
        return 16
    if task in ("finetune", "resnet50"):
        return 64
    return 256


# ---------------------------------------------------------------------------------------------------------------------
# Recording


class Ledger:
    """The measurements of one invocation; each becomes a JSON line of a file as soon as it is made."""

    def __init__(self, path: str, machine: dict, precision: str, writes: bool):
        self.path = Path(path)
        self.machine = machine
        self.precision = precision
        self.writes = writes
        self.rows: list[dict] = []

    def mend(self) -> None:
        """Cut off a last line that a kill left half written."""
        content = self.path.read_bytes()
        whole = content.rpartition(b"\n")
        if whole[2]:
            with open(self.path, "r+b") as file:
                file.truncate(len(content) - len(whole[2]))
            print(f"{self.path}: its last line was cut off, and is removed", flush=True)

    def record(self, task: str, variant: str, **fields: object) -> None:
        """Add a measurement."""
        row = {"task": task, "variant": variant, "precision": self.precision, **fields, "machine": self.machine}
        self.rows.append(row)
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")

    def adopt_last_line(self) -> None:
        """Take over what another process has just written to the file."""
        last = self.path.read_text().splitlines()[-1]
        self.rows.append(json.loads(last))

    def rates(self, variant: str) -> dict[str, float]:
        """Look up the images per second of a variant: task -> rate."""
        return {row["task"]: row["img_s"] for row in self.rows if row["variant"] == variant}


def describe_machine(device: torch.device, peers: Iterable[str]) -> dict:
    """Collect what a measurement depends on besides its flags; EngineError if a peer is not installed."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision"):
        versions[package] = importlib.metadata.version(package)
    versions |= bench_peers.package_versions(peers)
    return {
        "device": hardware_name(device),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "command": shlex.join(["python", "bench.py", *sys.argv[1:]]),
    }


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0))


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


class TrainingStep:
    """One update of the training loop on the next batch of a source."""

    def __init__(self, trainer: Trainer, source: Iterator[list[dict[str, Tensor]]]):
        self.trainer = trainer
        self.source = source

    def __call__(self) -> None:
        with torch.profiler.record_function("wait for data"):
            micro_batches = next(self.source)
        self.trainer.train_step(micro_batches, want_norm=False)


@dataclass
class Training:
    """A training as its script sets it up."""

    objective: Objective
    batches: TrainBatches
    trainer: Trainer

    def contestant(self, source: Iterator[list[dict[str, Tensor]]]) -> Contestant:
        """Make a contestant of the training on a source of micro-batches."""
        weights = sum(p.numel() * p.element_size() for p in self.trainer.params)
        state_bytes = 3 * weights + kept_bytes(self.objective.state())  # with AdamW's two moments
        return Contestant(TrainingStep(self.trainer, source), self.trainer.flops, state_bytes)

    def on_real_batches(self) -> Contestant:
        """Make a contestant that reads and augments photos."""
        return self.contestant(self.batches.run(0, ENDLESS))

    def evaluation(self, micro_batches: list[dict[str, Tensor]]) -> Contestant:
        """Make a contestant that computes the loss alone, as validation does; it leaves the network in eval mode."""
        self.objective.model.eval()

        def evaluate() -> None:
            with torch.no_grad(), self.trainer.precision.autocast():
                for batch in micro_batches:
                    self.objective.loss(self.objective.scoring_network, batch)

        return Contestant(evaluate)


def random_pixels(batches: TrainBatches) -> list[dict[str, Tensor]]:
    """Make the micro-batches of a step whose images are noise, as normalised images are in mean and spread."""
    (micro_batches,) = batches.run(0, 1)
    for batch in micro_batches:
        batch["images"].normal_()
    return micro_batches


class Workshop:
    """Sets trainings up as the scripts do, from their own command lines; what they write goes to a temporary folder."""

    def __init__(self, args: argparse.Namespace, dist: Distributed, folder: str):
        self.args = args
        self.dist = dist
        self.folder = folder
        self.cache_dir = args.cache_dir
        if args.cache_dir is None:
            self.cache_dir = f"{folder}/cache"

    @functools.cached_property
    def data_root(self) -> str:
        """The folder of photos; without --data_root, they are drawn on first use."""
        if self.args.data_root is not None:
            return self.args.data_root
        drawn = f"{self.folder}/data"
        draw_photos(drawn)
        return drawn

    def objective(self, task: str, count: int) -> Objective:
        """Build the objective or task of a training, for `count` images per step and process."""
        if task == "pretrain":
            return self.pretraining("mae", count)
        flags = self._flags(count)
        if task == "finetune":
            args = finetune.get_args_parser().parse_args([f"--model={self.args.model}", "--init=none", *flags])
            args.init = None  # a step takes as long from random weights
        else:
            args = baseline.get_args_parser().parse_args([f"--model={task}", *flags])
            args = baseline.resolve(args)
        return self._sized(TASKS[args.task](args, self.dist))

    def pretraining(self, name: str, count: int, device: torch.device | None = None) -> Objective:
        """Build an objective of pretrain.py by name; device: another than that of --device."""
        dist = self.dist
        if device is not None:
            dist = dataclasses.replace(dist, device=device)
        flags = [f"--objective={name}", f"--model={self.args.model}", "--split=all", *self._flags(count)]
        if self.args.quick and name in ("tokens", "splitmask"):
            flags.append("--vocabulary=512")  # fewer are found sooner
        args = pretrain.resolve(pretrain.get_args_parser(name).parse_args(flags))
        return self._sized(pretrain.OBJECTIVES[name](args, dist))

    def pretraining_on(self, images: Path, count: int) -> Objective:
        """Build the Masked Autoencoder's pre-training on a folder of images, with a cache beside it."""
        flags = [*self._flags(count), f"--images={images}", f"--cache_dir={images.parent / 'cache'}"]
        args = pretrain.get_args_parser("mae").parse_args([f"--model={self.args.model}", *flags])
        return pretrain.OBJECTIVES["mae"](pretrain.resolve(args), self.dist)

    def _flags(self, count: int) -> list[str]:
        """Pass on the flags that all training scripts have."""
        return [
            f"--batch_size={count * self.dist.world_size}",
            f"--img_size={self.args.img_size}",
            f"--data_root={self.data_root}",
            f"--cache_dir={self.cache_dir}",
            f"--device={self.args.device}",
            f"--precision={self.args.precision}",
            "--compile" if self.args.compile else "--no-compile",
            "--cuda_graph" if self.args.cuda_graph else "--no-cuda_graph",
        ]

    def _sized(self, objective: Objective) -> Objective:
        """Let an objective train on four batches or more: a short list is repeated, a long one cut."""
        images = objective.split.images[:MOST_PHOTOS]
        objective.batch_size = objective.args.batch_size
        repeats = math.ceil(4 * objective.batch_size / len(images))
        objective.split = dataclasses.replace(objective.split, images=images * repeats)
        objective.epoch_images = len(objective.split.images)
        return objective

    def training(self, objective: Objective, batches: TrainBatches | None = None) -> Training:
        """Set the training of an objective up; batches: those of another training instead of its own."""
        run = self.run_folder()
        if batches is None:
            batches = objective.open(run)
        args = objective.args
        plan = plan_run(objective, args, self.dist)
        objective.model.to(self.dist.device, memory_format=objective.memory_format)
        precision = Precision(args.precision, self.dist.device)
        trainer = Trainer(objective, plan, run, batches, precision, args, self.dist)
        return Training(objective, batches, trainer)

    def run_folder(self) -> RunFolder:
        """Make a run folder, as trainings need one; a step writes nothing into it."""
        return RunFolder(tempfile.mkdtemp(dir=self.folder), self.dist, config={"experiment": {}})


def draw_photos(data_root: str) -> None:
    """Draw a small data set, as a user without photos would."""
    script = Path(__file__).with_name("prepare.py")
    command = [sys.executable, str(script), "demo", f"--data_root={data_root}", *DRAWN_PHOTOS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


class Bench:
    """What the measurements share."""

    def __init__(self, args: argparse.Namespace, dist: Distributed, folder: str):
        self.args = args
        self.dist = dist
        self.device = dist.device
        self.on_gpu = dist.device.type == "cuda"
        precision = Precision(args.precision, dist.device)
        machine = describe_machine(dist.device, args.peers)
        self.ledger = Ledger(args.output, machine, precision.name, writes=dist.is_main)
        self.stopwatch = Stopwatch(dist.device, args.repeats, args.compile)
        self.workshop = Workshop(args, dist, folder)

    def count(self, task: str) -> int:
        """Give the images per step and process of a task."""
        return images_per_step(task, self.args, self.on_gpu)

    def compare(
        self,
        task: str,
        contestants: dict[str, Contestant],
        count: int,
        pace: Pace | None = None,
        describe: Callable[[Timing, Timing], str] | None = None,
        apart: bool = False,
        first: Timing | None = None,
    ) -> Timing:
        """Time contestants of steps of `count` images and record them, with ratios over the first one -> its timing.

        describe: what a timing and that of the first contestant amount to, for the last column. apart: one contestant
        after the other, each compiled anew; a compiled step would not notice what another one has replaced. first: the
        timing that all are compared with, of an earlier call.
        """
        if pace is None:
            pace = self.stopwatch.usual_pace
        rounds = [contestants]
        if apart:
            rounds = [{name: contestant} for name, contestant in contestants.items()]
        for together in rounds:
            with self.compiled_anew() if apart else contextlib.nullcontext():
                timings = self.stopwatch.take_turns(together, pace)
            for name, timing in timings.items():
                first = first or timing
                fields = self.fields_of(timing, first, count)
                if describe is not None:
                    fields["note"] = describe(timing, first)
                self.ledger.record(task, name, steps=pace.steps, model=self.model_of(task), **fields)
        return first

    @contextlib.contextmanager
    def compiled_anew(self) -> Iterator[None]:
        """Context in which nothing that was compiled before is used, in memory or on disk.

        What is found on disk may have been made with another attention kernel: those are not part of its key.
        """
        torch.compiler.reset()
        folder = tempfile.mkdtemp(dir=self.workshop.folder)
        with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
            yield

    def model_of(self, task: str) -> str | None:
        """Name the network of a task."""
        if task == "data":
            return None
        if task.startswith("resnet50"):
            return "resnet50"
        return self.args.model

    def fields_of(self, timing: Timing, first: Timing, count: int) -> dict:
        """Work out the columns of a timing."""
        world = self.dist.world_size
        rate = count * world / timing.seconds
        done = None  # operations per second
        used = None  # their share of the device's peak
        limit = peak_flops(self.device, self.ledger.precision)
        if timing.contestant.flops:
            done = timing.contestant.flops * rate
        if done is not None and limit is not None:
            used = done / (limit * world)
        memory = timing.memory
        return {
            "batch_size": count,
            "world_size": world,
            "turns": len(timing.turns),
            "img_s": rate,
            "img_size": self.args.img_size,
            "step_ms": 1e3 * timing.seconds,
            "mem_gb": None if memory is None else memory / 1e9,
            "spread_ms": [1e3 * min(timing.turns), 1e3 * max(timing.turns)],
            "compiled": self.args.compile,
            "tflops": None if done is None else done / 1e12,
            "mfu": used,
            "ratio": timing.ratio(first),
        }


def measure_training(bench: Bench, task: str) -> None:
    """Measure a training on synthetic and real batches, its peers, and its forward pass."""
    count = bench.count(task)
    training = bench.workshop.training(bench.workshop.objective(task, count))
    micro_batches = random_pixels(training.batches)
    contestants = {SYNTHETIC: training.contestant(itertools.repeat(micro_batches))}
    if not bench.args.synthetic:
        contestants[REAL] = training.on_real_batches()
    for name, peer in bench_peers.peers_of(task, training.objective, bench.args.peers).items():
        peer_training = bench.workshop.training(peer, training.batches)
        contestants[name] = peer_training.contestant(itertools.repeat(micro_batches))
    if task == "pretrain" and "eager" in bench.args.peers:
        contestants[EAGER] = eager_contestant(training, micro_batches)
    bench.compare(task, contestants, count)
    if bench.args.profile:
        profile(bench, task, contestants.get(REAL, contestants[SYNTHETIC]))
    bench.compare(f"{task} validation", {SYNTHETIC: training.evaluation(micro_batches)}, count)
    note_validation(bench, task)


def eager_contestant(training: Training, micro_batches: list[dict[str, Tensor]]) -> Contestant:
    """Make a contestant of the step that most public code has."""
    own = training.contestant(itertools.repeat(micro_batches))
    mask_ratio = training.objective.args.mask_ratio
    step = bench_eager.eager_step(training.objective.model, micro_batches[0], mask_ratio)
    return dataclasses.replace(own, step=step)


def note_validation(bench: Bench, task: str) -> None:
    """Record what validation adds to the training of the study."""
    rows = bench.ledger.rows
    trained = [row["img_s"] for row in rows if row["task"] == task and row["variant"] in (REAL, SYNTHETIC)]
    validated = [row["img_s"] for row in rows if row["task"] == f"{task} validation"]
    share = VALIDATED[task] * trained[-1] / validated[-1]
    note = f"validation adds {share:.1%} to the time of training"
    bench.ledger.record(f"{task} validation", "share", model=bench.model_of(task), share=share, note=note)


def profile(bench: Bench, task: str, contestant: Contestant) -> None:
    """Write a chrome trace; print the most expensive kernels and record how long the device waits."""
    steps = 3
    with torch.profiler.profile() as trace:
        seconds = steps * bench.stopwatch.seconds(contestant.step, Pace(steps, settle=0))
    os.makedirs(bench.args.profile, exist_ok=True)
    trace.export_chrome_trace(f"{bench.args.profile}/{task}.json.gz")
    events = trace.key_averages()
    order = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    print(events.table(sort_by=order, row_limit=25, max_name_column_width=50))
    fetching = sum(event.cpu_time_total for event in events if event.key == "wait for data") / 1e6
    note = f"fetching and augmenting a batch takes {fetching / seconds:.1%} of a step"
    if bench.on_gpu:
        busy = sum(event.self_device_time_total for event in events) / 1e6
        note += f", the device idles {max(0, 1 - busy / seconds):.1%}"
    bench.ledger.record(task, "profile", note=note)


def measure_objectives(bench: Bench) -> None:
    """Measure the training step of every objective of pretrain.py, and its cost relative to the first one's."""
    count = bench.count("pretrain")
    names = list(pretrain.OBJECTIVES)
    # On a GPU one after the other: its memory may hold one alone, and what was measured is written at once.
    groups = [[name] for name in names] if bench.on_gpu else [names]
    first = None
    for group in groups:
        with room_needed(", ".join(group), count):
            first = measure_together(bench, group, count, first)


def measure_together(bench: Bench, names: list[str], count: int, first: Timing | None) -> Timing | None:
    """Measure some objectives in turns -> the timing that all are compared with, `first` if there is one."""
    contestants = objective_contestants(bench, names, count)
    if not contestants:
        return first
    return bench.compare("objectives", contestants, count, describe=describe_cost, first=first)


def objective_contestants(bench: Bench, names: list[str], count: int) -> dict[str, Contestant]:
    """Make the contestants of those objectives that can be trained at this size."""
    contestants = {}
    for name in names:
        try:
            training = bench.workshop.training(bench.workshop.pretraining(name, count))
        except EngineError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        contestants[name] = training.contestant(itertools.repeat(random_pixels(training.batches)))
    return contestants


@contextlib.contextmanager
def room_needed(what: str, count: int) -> Iterator[None]:
    """Context of a measurement that is left out if a GPU has too little memory; it gives its memory back."""
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"{what} is left out: the memory is too small for {count} images (--batch_size)", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_cost(timing: Timing, first: Timing) -> str:
    """Say what a training step takes in operations and memory, also relative to the first contestant's."""
    flops = timing.contestant.flops
    parts = ["operations unknown"]
    if flops and first.contestant.flops:
        parts = [f"{flops / 1e9:.2f} GFLOP per image, {flops / first.contestant.flops:.2f} x the first"]
    if timing.memory and first.memory:
        parts.append(f"{timing.memory / 1e9:.2f} GB, {timing.memory / first.memory:.2f} x")
    return "; ".join(parts)


def choice_names() -> list[str]:
    """Name the alternatives that --choices selects from."""
    names = ["compilation", "cuda_graph", *bench_choices.PATCHES, *bench_choices.OPTIMIZERS, *bench_choices.KERNELS]
    return [*names, "max-autotune"]  # which takes minutes to compile


def measure_choices(bench: Bench) -> None:
    """Measure pre-training with each choice in its step undone; all contestants train the same parameters."""
    count = bench.count("pretrain")
    training = bench.workshop.training(bench.workshop.pretraining("mae", count))
    source = itertools.repeat(random_pixels(training.batches))
    contestants = {SYNTHETIC: training.contestant(source)}
    for name in bench.args.choices or choice_names():
        found = alternative(bench, name, training, source)
        if not found:
            print(f"{name} is left out: there is nothing to choose on this device, or as --compile says", flush=True)
        contestants |= found
    usual = bench.stopwatch.usual_pace
    # What was compiled, or recorded as a graph, does not notice that another contestant replaces something.
    apart = bench.on_gpu or bench.args.compile
    bench.compare("choices", contestants, count, Pace(usual.steps, max(1, usual.settle)), apart=apart)


def alternative(
    bench: Bench, name: str, training: Training, source: Iterator[list[dict[str, Tensor]]]
) -> dict[str, Contestant]:
    """Make the contestant of a choice, as the report names it; none where nothing is to be chosen."""
    own = training.contestant(source)
    if name == "compilation":
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # then nothing is compiled, whatever is asked for
            return {}
        shown = "not compiled" if bench.args.compile else "torch.compile"
        other = set_up_again(bench.workshop, training, compile=not bench.args.compile)
        return {shown: other.contestant(source)}
    if name == "cuda_graph":
        if not bench.on_gpu:
            return {}
        recorded = set_up_again(bench.workshop, training, cuda_graph=True)
        return {"forward and backward pass as a CUDA graph": recorded.contestant(source)}
    if name == "max-autotune":
        if not (bench.on_gpu and bench.args.compile):
            return {}
        return {"torch.compile, max-autotune": autotuned(bench.workshop, training).contestant(source)}
    if name in bench_choices.KERNELS:
        if not bench_choices.has_kernel(name, bench.device, training.trainer.precision.dtype or torch.float32):
            return {}
        return {name: dataclasses.replace(own, step=bench_choices.with_kernel(name, own.step))}
    if name in bench_choices.PATCHES:
        step = bench_choices.undone(name, own.step)
        return {name: Contestant(step, flops=None, state_bytes=own.state_bytes)}  # it computes more or less
    other = copy.copy(training.trainer)
    other.optimizer = bench_choices.other_optimizer(name, training.trainer.optimizer)
    return {name: dataclasses.replace(training, trainer=other).contestant(source)}


def set_up_again(workshop: Workshop, training: Training, **flags: object) -> Training:
    """Set the same training up with other flags, on the same weights and the same optimizer: its memory favours none."""
    objective = copy.copy(training.objective)
    objective.args = argparse.Namespace(**{**vars(objective.args), **flags})
    other = workshop.training(objective, training.batches)
    other.trainer.optimizer = training.trainer.optimizer
    return other


def autotuned(workshop: Workshop, training: Training) -> Training:
    """Set the same training up with a compiler that tries many kernels for each product."""
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, mode="max-autotune-no-cudagraphs")):
        return set_up_again(workshop, training)


def measure_data(bench: Bench) -> None:
    """Measure the cache with augmentation, what it leaves to a GPU's host, and (peers) PIL in a DataLoader."""
    if bench.args.synthetic:
        return
    count = bench.count("pretrain")
    cores = usable_cores()
    paths = {}
    host_jobs = {}
    cpu = torch.device("cpu")
    host = pretraining_batches(bench, count, cpu)
    if "pil" in bench.args.peers:
        files = [f"{bench.workshop.data_root}/{image}" for image in host.examples.images.images]
        photos = bench_peers.photos_for(files, bench.args.img_size, count)
        in_workers = bench_peers.loader_batches(photos, count, cores)
        paths[f"PIL + torchvision, {cores} DataLoader workers"] = Contestant(in_workers.__next__)
        host_jobs["PIL + torchvision: decode, crop, flip"] = bench_peers.one_core_batches(photos, count).__next__
    paths[f"cache + augmentation on {cpu}"] = Contestant(host.run(0, ENDLESS).__next__)
    own = f"cache + augmentation on {bench.device}"
    if bench.on_gpu:
        batches = pretraining_batches(bench, count, bench.device)
        paths[own] = Contestant(batches.run(0, ENDLESS).__next__)
    bench.compare("data", paths, count, Pace(steps=4 * cores, settle=2 * cores + 2))
    host_jobs["this project: rows gathered, random draws"] = host_batches(host, pin=bench.on_gpu).__next__
    for name, job in host_jobs.items():
        cost = cpu_milliseconds(bench.stopwatch, job) / count
        bench.ledger.record("data", f"host, {name}", cpu_ms=cost, note=f"{cost:.3f} ms of CPU time per image")
    trained = [row["img_s"] for row in rows_like_these(bench) if is_synthetic_pretraining(row)]
    if trained:
        share = trained[-1] / bench.ledger.rates(own)["data"]
        note = f"{share:.2%} of a synthetic training step"
        bench.ledger.record("data", "augmentation", note=note, model=bench.args.model)


def is_synthetic_pretraining(row: dict) -> bool:
    """Tell whether a row has the rate of pre-training on synthetic batches."""
    return (row["task"], row["variant"]) == ("pretrain", SYNTHETIC)


def pretraining_batches(bench: Bench, count: int, device: torch.device) -> TrainBatches:
    """Open the batches of pre-training on a device."""
    objective = bench.workshop.pretraining("mae", count, device)
    return objective.open(bench.workshop.run_folder())


def host_batches(batches: TrainBatches, pin: bool) -> Iterator[Tensor]:
    """Do only the host's part of batches: draw, and gather the images (pin: into page-locked memory)."""
    for step in itertools.count():
        index = batches.prepare(step).index
        yield batches.examples.images.gather(index, pin)


def cpu_milliseconds(stopwatch: Stopwatch, job: Callable[[], object]) -> float:
    """Measure the CPU time of a job in this process, the median of several."""
    costs = []
    for _ in range(stopwatch.repeats):
        costs.append(stopwatch.seconds(job, Pace(steps=1, settle=1), time.process_time))
    return 1e3 * median(costs)


def measure_products(bench: Bench) -> None:
    """Measure the step of pre-training beside its matrix products alone."""
    count = bench.count("pretrain")
    training = bench.workshop.training(bench.workshop.pretraining("mae", count))
    micro_batches = random_pixels(training.batches)
    products = bench_products.ProductsAlone(recorded_products(training, micro_batches), bench.device)
    contestants = {
        SYNTHETIC: training.contestant(itertools.repeat(micro_batches)),
        "its matrix products alone": Contestant(products, products.flops / count),
    }

    def describe(timing: Timing, first: Timing) -> str:
        rate = products.flops / timing.seconds / 1e9
        share = timing.ratio(first)
        return f"{products.flops / count / 1e9:.2f} GFLOP per image at {rate:,.0f} GFLOP/s, {share:.1%} of the step"

    bench.compare("products", contestants, count, describe=describe)


def recorded_products(training: Training, micro_batches: list[dict[str, Tensor]]) -> Counter[bench_products.Product]:
    """List the matrix products of a step's forward and backward pass."""
    objective = training.objective
    with bench_products.Recorder() as recorder:
        for batch in micro_batches:
            with training.trainer.precision.autocast():
                loss = objective.loss(objective.model, batch)
            loss.backward()
    training.trainer.optimizer.zero_grad(set_to_none=True)
    return recorder.counts


def measure_rest(bench: Bench) -> None:
    """Measure what a study's time goes to besides steps: start, decoding, checkpoints, tests."""
    if bench.args.synthetic:
        return
    workshop = bench.workshop
    record = functools.partial(bench.ledger.record, model=bench.args.model)
    objective = workshop.pretraining("mae", bench.count("pretrain"))
    images = sorted(set(objective.split.images))
    rate = bench_rest.decode_rate(workshop.data_root, images, objective.args.cache_size, workshop.folder)
    record(
        "decoding", "rest", img_s=rate, note=f"{len(images[: bench_rest.MOST_DECODED])} photos, {usable_cores()} cores"
    )
    seconds = bench_rest.checkpoint_seconds(workshop.training(objective).trainer)
    record("checkpoint", "rest", seconds=seconds, note=f"{seconds:.2f} s")
    task = workshop.objective("finetune", bench.count("finetune"))
    task.model.to(bench.device)
    precision = Precision(bench.args.precision, bench.device)
    setting = TestSetting(workshop.data_root, workshop.cache_dir, 64, bench.dist, precision, vars(task.args))
    rate, count = bench_rest.test_rate(task, setting)
    record("testing", "rest", img_s=rate, note=f"{count} images, at input and at native size")
    measure_start(bench, len(images))


def measure_start(bench: Bench, images: int) -> None:
    """Measure the time from the command of a training to its first step, without and with compiled kernels.

    images: how many there are to train on.
    """
    count = min(bench.count("pretrain"), images)
    workshop = bench.workshop
    args = bench.args
    command = bench_rest.pretrain_command(
        *(workshop.data_root, workshop.cache_dir), args.model, args.img_size, bench.device.type
    )
    kernels = tempfile.mkdtemp(dir=workshop.folder)
    for variant in ("first time", "again"):
        run = Path(tempfile.mkdtemp(dir=workshop.folder)) / "run"
        words = [*command, f"--output_dir={run}", f"--batch_size={count}"]
        words.append("--compile" if args.compile else "--no-compile")
        seconds = bench_rest.first_step_seconds(words, run, kernels)
        note = f"{seconds:.1f} s from the command to the end of the first step"
        bench.ledger.record("starting", variant, model=args.model, seconds=seconds, img_s=1 / seconds, note=note)


def measure_growth(bench: Bench) -> None:
    """Measure what a training's start and a batch cost with more and more images, at the study's --cache_size."""
    if bench.args.synthetic:
        return
    counts = list(bench_growth.QUICK_COUNTS if bench.args.quick else bench_growth.COUNTS)
    listed = bench.workshop.pretraining("mae", 1).split.images[: bench_growth.MOST_PHOTOS]
    photos = [bench_growth.small_photo(Path(bench.workshop.data_root, image)) for image in dict.fromkeys(listed)]
    openings = []
    for count in counts:
        with tempfile.TemporaryDirectory(dir=bench.workshop.folder) as place:
            folder = Path(place, "photos")
            bench_growth.write_photos(photos, folder, count)
            openings.append(measure_images(bench, folder, count))
    per_image = bench_growth.slope(counts, openings)
    rate = 1 / per_image if per_image > 0 else None  # fewer images may take longer, by chance
    note = f"{1e6 * per_image:,.0f} us for each image more"
    bench.ledger.record("opening", "growth", img_s=rate, note=note)


def measure_images(bench: Bench, folder: Path, count: int) -> float:
    """Measure a folder of `count` images, cached beside it -> the seconds that a start takes to open them."""
    batch_size = min(bench.count("pretrain"), count // 2)
    objective = bench.workshop.pretraining_on(folder, batch_size)
    kept = []

    def open_batches() -> TrainBatches:
        kept.clear()  # a GPU may not have room for two
        kept.append(objective.open(bench.workshop.run_folder()))
        return kept[0]

    seconds = bench_growth.measure_start(folder, open_batches, bench.args.repeats)
    host = cpu_milliseconds(bench.stopwatch, host_batches(kept[0], pin=bench.on_gpu).__next__) / batch_size
    note = f"start: listed in {seconds.listing:.3f} s, opened in {seconds.opening:.3f} s"
    note += f" (first decoded in {seconds.decoding:.1f} s); batches: {host:.3f} ms of CPU time per image"
    fields = {"images": count, "seconds": seconds._asdict(), "cpu_ms": host, "cache_size": objective.args.cache_size}
    bench.ledger.record("growth", f"{count:,} images", batch_size=batch_size, note=note, **fields)
    return seconds.opening


def measure_study(bench: Bench) -> None:
    """Project the time of the study from the measured rates; name what is missing instead of guessing."""
    rates = study_rates(rows_like_these(bench))
    missing = sorted(task for task in STUDY if task not in rates)
    hours = None
    if missing:
        note = f"not measured: {', '.join(missing)}"
    else:
        parts = {task: images / rates[task] / 60 for task, images in STUDY.items()}
        checkpoints = 60 * sum(parts.values()) / CHECKPOINT_EVERY
        parts["checkpoints"] = checkpoints / rates["checkpoint"] / 60
        hours = sum(parts.values()) / 60
        shown = ", ".join(f"{task} {minutes:.1f}" for task, minutes in parts.items())
        note = f"{hours:,.2f} hours by the rates above; in minutes: {shown}"
    bench.ledger.record("study", WHOLE_STUDY, model=bench.args.model, hours=hours, note=note)


def rows_like_these(bench: Bench) -> list[dict]:
    """Collect what this invocation and earlier ones have written for the same device, networks and input size."""
    rows = []
    for row in read_rows(bench.args.output):
        same_device = row["machine"]["device"] == bench.ledger.machine["device"]
        same_model = row.get("model") in (bench.args.model, "resnet50", None)
        same_size = row.get("img_size") in (bench.args.img_size, None)
        if same_device and same_model and same_size:
            rows.append(row)
    return rows


def study_rates(rows: list[dict]) -> dict[str, float]:
    """Collect how many images, starts or checkpoints a second can be done: part of the study -> its slowest rate."""
    rates: dict[str, float] = {}
    for row in rows:
        task = row["task"]
        rate = row.get("img_s")
        if task == "checkpoint":
            rate = 1 / row["seconds"]
        if task in TRAININGS and row["variant"] != REAL:
            continue
        if rate is not None and task in (*STUDY, "checkpoint"):
            rates[task] = min(rate, rates.get(task, math.inf))
    return rates


def measure_scaling(bench: Bench) -> None:
    """Measure the growth with the batch size, then with the number of processes, which torchrun starts."""
    count = bench.count("pretrain")
    if bench.dist.world_size > 1:
        measure_batch_size(bench, count)
        return
    factors = (0.25, 0.5, 1, 2, 4) if bench.on_gpu else (1, 2)
    for factor in factors:
        images = max(1, int(count * factor))
        with room_needed("scaling", images):
            measure_batch_size(bench, images)
    available = torch.cuda.device_count() if bench.on_gpu else usable_cores()
    for world in (2, 4, 8):
        if world <= available:
            measure_in_processes(bench, count, world)


def measure_batch_size(bench: Bench, count: int) -> None:
    """Measure the step of pre-training with `count` images per process."""
    training = bench.workshop.training(bench.workshop.objective("pretrain", count))
    synthetic = training.contestant(itertools.repeat(random_pixels(training.batches)))
    bench.compare("scaling", {SYNTHETIC: synthetic}, count)


def measure_in_processes(bench: Bench, count: int, world: int) -> None:
    """Let `world` processes measure the same step together; they write the line."""
    args = bench.args
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"),
        __file__,
        "--tasks=scaling",
        "--synthetic",
        f"--model={args.model}",
        f"--batch_size={count}",
        f"--img_size={args.img_size}",
        f"--device={bench.device.type}",
        f"--precision={bench.ledger.precision}",
        "--compile" if args.compile else "--no-compile",
        f"--repeats={args.repeats}",
        f"--data_root={bench.workshop.data_root}",
        f"--cache_dir={bench.workshop.cache_dir}",
        f"--output={args.output}",
    ]
    if subprocess.run(command).returncode != 0:
        raise EngineError(f"{world} processes could not be measured; why is said above", 1)
    bench.ledger.adopt_last_line()


# What --tasks accepts besides the trainings, in the order of measurement: the study comes after all rates.
OTHER_MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "data": measure_data,
    "rest": measure_rest,
    "growth": measure_growth,
    "products": measure_products,
    "scaling": measure_scaling,
    "choices": measure_choices,
    "objectives": measure_objectives,
    "study": measure_study,
}
MEASUREMENTS = (*TRAININGS, *OTHER_MEASUREMENTS)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def table(rows: Iterable[dict]) -> str:
    """Format rows as a Markdown table; a figure that was not measured is a dash."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in rows:
        lines.append([cell(row.get(column)) for column in COLUMNS])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """Format a figure with three digits, and the fastest and slowest of a list."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return "–".join(cell(item) for item in value)
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def write_report(source: str, target: str) -> None:
    """Write BENCHMARKS.md from JSON lines: tables by machine and command, then what no GPU has measured.

    Raises EngineError if the source holds other lines.
    """
    rows = read_rows(source)
    text = (
        "# Benchmarks\n\n"
        f"Written by `python bench.py --report {source}`; all is measured, nothing estimated.\n\n"
        "ratio: step time over that of the first line of its task, the median over pairs of turns; spread: the fastest\n"
        "and the slowest turn; differences well inside it are no finding. choices: one choice in the step undone.\n"
        "Contestants take turns; choices of a compiled step, and objectives on a GPU, come one after the other.\n"
    )
    for machine, group in itertools.groupby(rows, key=machine_of):
        text += f"\n## {title(machine)}\n\n{table(group)}\n"
    missing = missing_measurements(rows)
    if missing:
        text += "\n## Not measured yet on an NVIDIA GPU\n\n"
        text += "".join(f"- {task}: {variant}\n" for task, variant in missing)
    Path(target).write_text(text)


def machine_of(row: dict) -> dict:
    return row["machine"]


def read_rows(source: str) -> list[dict]:
    """Read the lines that earlier invocations wrote; EngineError names the first that is none of them."""
    refused = f"{source} holds lines that bench.py did not write"
    try:
        lines = Path(source).read_text().splitlines()
    except OSError as error:
        raise EngineError(f"--report {source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EngineError(f"{refused}: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise EngineError(f"{refused}: line {number} is no JSON") from None
        if not is_measurement(row):
            raise EngineError(f"{refused}: line {number} has no task, variant and machine")
        rows.append(row)
    return rows


def is_measurement(row: object) -> bool:
    """Tell whether a line of JSON has what the report cannot do without."""
    if not isinstance(row, dict) or not {"task", "variant", "machine"} <= row.keys():
        return False
    machine = row["machine"]
    if not isinstance(machine, dict) or not {"device", "threads", "versions", "command"} <= machine.keys():
        return False
    return isinstance(machine["versions"], dict)


def title(machine: dict) -> str:
    """Say which machine and command a table comes from."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['device']}\n\n`{machine['command']}`\n\n{machine['threads']} threads; {versions}"


def missing_measurements(rows: list[dict]) -> list[tuple[str, str]]:
    """List the (task, variant) that no NVIDIA GPU has measured at the study's size."""
    wanted = []
    for task in TRAININGS:
        wanted.append((task, SYNTHETIC))
        wanted.append((task, REAL))
    wanted.append(("scaling", SYNTHETIC))
    wanted.append(("choices", SYNTHETIC))
    wanted += [("objectives", name) for name in pretrain.OBJECTIVES]
    wanted.append(("opening", "growth"))
    wanted.append(("data", "cache + augmentation on cuda:0"))
    wanted.append(("study", WHOLE_STUDY))
    done = {(row["task"], row["variant"]) for row in rows if is_of_study_size(row)}
    return [measurement for measurement in wanted if measurement not in done]


def is_of_study_size(row: dict) -> bool:
    """Tell whether an NVIDIA GPU measured a row with the study's networks and input size, and not for a quick look."""
    machine = row["machine"]
    on_gpu = "NVIDIA" in machine["device"] and "--quick" not in machine["command"]
    has_result = row.get("img_s") is not None or row.get("hours") is not None
    full_model = row.get("model") in ("mae_base", "resnet50", None)
    full_images = row.get("img_size") in (224, None)
    return on_gpu and has_result and full_model and full_images


# ---------------------------------------------------------------------------------------------------------------------
# Start


def main(args: argparse.Namespace) -> None:
    """Measure what --tasks names, or write the report."""
    if args.report:
        target = "BENCHMARKS.md" if args.output == "bench.jsonl" else args.output
        write_report(args.report, target)
        return
    refuse_wrong_use(args)
    with open(args.output, "a"):
        pass  # a file that cannot be written is refused before anything is measured
    dist = setup(args.device)
    args = resolve(args, on_gpu=dist.device.type == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, dist, folder)
        if dist.is_main:
            bench.ledger.mend()
            read_rows(args.output)  # so is one with other lines
        for task in TRAININGS:
            if task in args.tasks:
                measure_training(bench, task)
        for task, measure in OTHER_MEASUREMENTS.items():
            if task in args.tasks:
                measure(bench)
    if dist.world_size == 1:
        print(table(bench.ledger.rows))


def refuse_wrong_use(args: argparse.Namespace) -> None:
    """Raise EngineError for flags that do not fit together."""
    if args.synthetic and set(args.tasks) <= ON_PHOTOS:
        raise EngineError(f"--tasks {' '.join(args.tasks)} measures on photos, which --synthetic leaves out")
    if args.choices and "choices" not in args.tasks:
        raise EngineError("--choices belongs to --tasks choices")
    if args.profile and Path(args.profile).exists() and not Path(args.profile).is_dir():
        raise EngineError(f"--profile {args.profile} is a file; name a folder")


if __name__ == "__main__":
    launch(main, get_args_parser())
