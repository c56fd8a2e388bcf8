"""Measure speed: training on synthetic and on real batches, peers side by side, the data path, and the study's time.

    python bench.py --quick                                              # two minutes on two cores
    python bench.py --peers --output bench.jsonl                         # everything; bf16 on GPUs that have it
    python bench.py --report bench.jsonl                                 # write BENCHMARKS.md from recorded lines

One JSON line per measurement and a table at the end. Contestants of a task take turns in one process, in rotating order, so
a drifting machine favours none; times are medians over synchronised turns, ratios medians over pairs of the same turn.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import augment
import data
import splits
from engine import EngineError, Parser, Precision, hardware_name, launch, peak_flops, setup
from models import MODELS, build_mae, build_segmenter

TASKS = ("pretrain", "finetune", "resnet50", "data", "study", "scaling")
# fmt: off
# The paper's study: images through training, and through evaluation (validation after each epoch, then the test set).
STUDY = {"pretrain": 3 * 150 * 25_739, "finetune": 5 * 100 * 5_144, "resnet50": 100 * 5_144,
         "pretrain evaluation": 3 * 150 * 2 * 1_016, "finetune evaluation": 5 * (100 * 1_102 + 1_103),
         "resnet50 evaluation": 100 * 1_102 + 1_103}
COLUMNS = ("task", "variant", "model", "batch_size", "world_size", "precision", "step_ms", "img_s", "tflops", "mfu",
           "mem_gb", "ratio", "note")
REAL, SYNTHETIC = "this project, real batches", "this project, synthetic"
WHOLE = "3 x 150 + 6 x 100 epochs and evaluation"


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="what to measure; study uses the rates of the trainings")
    add("--quick", action="store_true", help="mae_small, few images and turns: a check that takes two minutes")
    add("--synthetic", action="store_true", help="no real batches: needs no photos")
    add("--peers", action="store_true", help="also transformers, timm and PIL + torchvision (requirements-dev.txt)")
    add("--model", choices=list(MODELS), help="default mae_base (--quick: mae_small)")
    add("--batch_size", type=int, help="images per step and process (default 256, fine-tuning 64; on CPUs 16)")
    add("--img_size", type=int, default=224, help="input size in pixels")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="as in training")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile all contestants (default: on GPUs)")
    add("--repeats", type=int, help="turns of each contestant (default 7)")
    add("--data_root", help="photos to read (default: drawn ones in a temporary folder)")
    add("--profile", metavar="DIR", help="write a chrome trace of each training, print its most expensive kernels")
    add("--output", default="bench.jsonl", help="file that the JSON lines are appended to")
    add("--report", metavar="FILE", help="measure nothing; write BENCHMARKS.md (or --output X.md) from these JSON lines")
    return parser
# fmt: on


class Bench:
    """The settings, the data and the recorded measurements of one invocation."""

    def __init__(self, args):
        self.args, self.dist, self.rows, self.cores = args, setup(args.device), [], len(os.sched_getaffinity(0))
        self.device, self.on_gpu = self.dist.device, self.dist.device.type == "cuda"
        self.precision = Precision(args.precision, self.device)
        self.model = args.model or ("mae_small" if args.quick else "mae_base")
        self.patches = (args.img_size // MODELS[self.model].get("patch_size", 16)) ** 2
        self.depth = MODELS[self.model].get("depth", 12)
        self.repeats, self.steps = args.repeats or (2 if args.quick else 7), 10 if self.on_gpu else 1
        self.compile = self.on_gpu if args.compile is None else args.compile
        if args.peers:  # other projects' networks and data path
            sys.path.append(str(Path(__file__).with_name("tests")))
            self.peers = importlib.import_module("peers")
        names = ("torch", "torchvision", *(("transformers", "timm") if args.peers else ()))
        versions = {"python": sys.version.split()[0]} | {n: importlib.metadata.version(n) for n in names}
        self.machine = {"device": hardware_name(self.device), "cores": self.cores, "threads": torch.get_num_threads(),
                        "versions": versions, "command": shlex.join(["python", "bench.py", *sys.argv[1:]])}  # fmt: skip

    def batch_size(self, task: str) -> int:
        usual = (256 if task == "pretrain" else 64) if self.on_gpu else 16
        return self.args.batch_size or (4 if self.args.quick else usual)

    def record(self, task: str, variant: str, **fields) -> None:
        row = {"task": task, "variant": variant, "precision": self.precision.name, **fields, "machine": self.machine}
        self.rows.append(row)
        if self.dist.is_main:
            with open(self.args.output, "a") as f:
                f.write(json.dumps(row) + "\n")

    def time_steps(self, step, steps: int) -> tuple[float, float | None]:
        """Run steps, synchronised -> (seconds per step, peak GB on a GPU: the step's own state and what it adds)."""
        wait = torch.cuda.synchronize if self.on_gpu else lambda: None
        for _ in range(getattr(step, "settle", 0)):  # empty a queue that filled while others were timed
            step()
        wait()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            resting = torch.cuda.memory_allocated() - getattr(step, "state_bytes", 0)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        seconds = (time.perf_counter() - start) / steps
        return seconds, (torch.cuda.max_memory_allocated() - resting) / 1e9 if self.on_gpu else None

    def compare(self, task: str, contestants: dict, batch_size: int, flops=None, steps: int | None = None) -> None:
        """Time contestants (name -> function of one step) in rotating turns; ratio: their time over the first one's."""
        names, times, memory = list(contestants), {n: [] for n in contestants}, {}
        steps, world, limit = steps or self.steps, self.dist.world_size, peak_flops(self.device, self.precision.name)
        for step in contestants.values():
            self.time_steps(step, 3 if self.on_gpu else 1)  # warm-up: compilation, allocators, optimizer state
        for turn in range(self.repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds, memory[name] = self.time_steps(contestants[name], steps)
                times[name].append(seconds)
        for name, seconds in times.items():
            rate = batch_size * world / (median := statistics.median(seconds))
            done = (flops or {}).get(name, 0) * rate or None
            ratio = statistics.median(b / a for a, b in zip(times[names[0]], seconds, strict=True))
            model = "resnet50" if "resnet50" in task else None if task == "data" else self.model
            self.record(task, name, model=model, img_size=self.args.img_size, batch_size=batch_size, world_size=world,
                        step_ms=1e3 * median, spread_ms=[1e3 * min(seconds), 1e3 * max(seconds)], turns=len(seconds),
                        steps=steps, img_s=rate, tflops=done and done / 1e12, mem_gb=memory[name], ratio=ratio,
                        mfu=done / limit / world if done and limit else None, compiled=self.compile)  # fmt: skip

    def open_data(self, folder: str) -> None:
        """Draw photos unless --data_root names some, and decode them into a temporary cache."""
        self.root, self.cache = self.args.data_root or f"{folder}/data", f"{folder}/cache"
        if not self.args.data_root:
            prepare = [sys.executable, str(Path(__file__).with_name("prepare.py")), "demo", "--data_root", self.root]
            sizes = ["--num_train", "64", "--num_val", "24", "--num_pets", "48"]
            subprocess.run(prepare + sizes, check=True, stdout=subprocess.DEVNULL)
        self.photos = splits.select_split(self.root, "all", cache_dir=self.cache).images[:4096]
        self.pets = splits.pets_split(self.root, "train").images
        data.build_cache(self.root, (*self.photos, *self.pets), cache_dir=self.cache)
        data.build_cache(self.root, self.pets, kind="trimap", cache_dir=self.cache)

    def batches(self, task: str, batch_size: int, device) -> augment.TrainBatches:
        """Batches as the training scripts make them; a list shorter than four batches is repeated."""
        listed, own = (self.photos if task == "pretrain" else self.pets), torch.device(device).type == "cuda"
        images = list(itertools.islice(itertools.cycle(listed), max(len(listed), 4 * batch_size)))
        stores = [data.ImageStore(self.root, images, kind=k, cache_dir=self.cache, device=device, on_device=own)
                  for k in (["image"] if task == "pretrain" else ["image", "trimap"])]  # fmt: skip
        draws = {"pretrain": {"noise": (self.patches,)}, "finetune": {"drop_path": (self.depth, 2)}}.get(task, {})
        scale = (0.2 if task == "pretrain" else 0.5, 1.0)
        return augment.TrainBatches(*stores, img_size=self.args.img_size, batch_size=batch_size, seed=0, scale=scale,
                                 vertical_flip=task != "pretrain", draws=draws, device=device)  # fmt: skip

    def build(self, task: str, **options):
        """Build a network -> (module, loss(network, batch), FLOP of a training step per image)."""
        if task == "pretrain":
            model = build_mae(self.model, img_size=self.args.img_size)
            return model, lambda net, batch: net(batch["images"], 0.75, batch["noise"])[0], model.flops()

        def loss(network, batch):
            return F.cross_entropy(network(batch["images"], batch.get("drop_path")).float(), batch["masks"])

        if task == "resnet50":
            model = build_segmenter("resnet50")
            return model, loss, model.flops(self.args.img_size)
        model = build_segmenter(self.model, img_size=self.args.img_size, drop_path=0.1, **options)
        return model, loss, model.flops()

    def training_step(self, module: nn.Module, loss, batches):
        """Make a function that does one whole update: forward under autocast, backward, fused AdamW."""
        layout = torch.channels_last if hasattr(module, "backbone") else torch.preserve_format
        network = module.to(self.device, memory_format=layout)
        if self.compile:
            network = torch.compile(network, dynamic=False)
        if self.dist.world_size > 1:
            network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer, scaler = torch.optim.AdamW(parameters, lr=1e-5, fused=True), self.precision.scaler

        def step():
            with torch.profiler.record_function("wait for data"):
                batch = next(batches)
            with self.precision.autocast():
                value = loss(network, batch)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        step.state_bytes = 3 * sum(p.numel() * p.element_size() for p in parameters)
        step.settle = 2 * self.on_gpu
        return step

    def train(self, task: str, batch_size: int, label: str = "") -> None:
        """Measure one kind of training on synthetic and real batches, beside its peers; then its forward pass alone."""
        shapes = {"images": (3, self.args.img_size, self.args.img_size), "noise": (self.patches,)}
        fixed = {k: torch.rand(batch_size, *s, device=self.device) for k, s in shapes.items()}
        fixed["masks"] = (fixed["images"][:, 0] * 3).long().clamp(max=2)
        fixed["drop_path"] = torch.rand(batch_size, self.depth, 2, device=self.device)
        plan = {SYNTHETIC: self.build(task)}
        if not label and not self.args.synthetic:
            plan[REAL] = self.build(task)
        if not label and self.args.peers:
            plan |= self.peers.peers_of(task, lambda **options: self.build(task, **options))
        contestants, flops = {}, {}
        for name, (module, loss, flops[name]) in plan.items():
            source = itertools.repeat(fixed)
            if name == REAL:
                source = (parts[0] for parts in self.batches(task, batch_size, self.device).run(0, 10**9))
            contestants[name] = self.training_step(module, loss, source)
        if label:
            return self.compare(label, contestants, batch_size, flops)
        self.compare(task, contestants, batch_size, flops)
        if self.args.profile:
            self.profile(task, contestants[REAL if REAL in contestants else SYNTHETIC])
        module, loss, _ = plan[SYNTHETIC]

        @torch.no_grad()
        def evaluate():
            with self.precision.autocast():
                loss(module.eval(), fixed)

        self.compare(f"{task} evaluation", {SYNTHETIC: evaluate}, batch_size)

    def profile(self, task: str, step) -> None:
        """Write a chrome trace; print the ten most expensive kernels and the share of time the device waits."""
        with torch.profiler.profile() as trace:
            seconds, _ = self.time_steps(step, 3)
        os.makedirs(self.args.profile, exist_ok=True)
        trace.export_chrome_trace(f"{self.args.profile}/{task}.json")
        events, column = trace.key_averages(), f"self_{'device' if self.on_gpu else 'cpu'}_time_total"
        print(events.table(sort_by=column, row_limit=10, max_name_column_width=50))
        fetch = sum(e.cpu_time_total for e in events if e.key == "wait for data") / 3e6 / seconds
        note = f"fetching a batch (augmentation included) takes {fetch:.1%} of a step"
        if self.on_gpu:
            idle = 1 - sum(e.self_device_time_total for e in events) / 3e6 / seconds
            note += f", the device idles {max(0, idle):.1%}"
        self.record(task, "profile", note=note)

    def data_paths(self) -> None:
        """Measure the cache with augmentation, what it leaves to a GPU's host, and (peers) PIL in a DataLoader."""
        count, paths, jobs = self.batch_size("pretrain"), {}, {}
        if self.args.peers:
            files = [f"{self.root}/{name}" for name in self.photos]
            paths, jobs = self.peers.pil_paths(files, self.args.img_size, count, self.cores)
        own = f"cache + augmentation on {self.device}"
        for device in dict.fromkeys(["cpu", str(self.device)]):
            batches = self.batches("pretrain", count, device)
            paths[f"cache + augmentation on {device}"] = functools.partial(next, batches.run(0, 10**9))
        for step in paths.values():
            step.settle = 2 * self.cores + 2
        self.compare("data", paths, count, steps=4 * self.cores)
        steps = itertools.count()
        jobs["this project: rows gathered, random draws"] = lambda: batches._prepare(next(steps))
        for name, job in jobs.items():
            spent = [-time.process_time() + (job(), time.process_time())[1] for _ in range(self.repeats + 1)][1:]
            cost = 1e3 * statistics.median(spent) / count
            self.record("data", f"host, {name}", cpu_ms=cost, note=f"{cost:.3f} ms of CPU time per image")
        rates = self.rates(SYNTHETIC) | {"own": self.rates(own)["data"]}
        if "pretrain" in rates:
            share = f"{rates['pretrain'] / rates['own']:.2%} of a synthetic training step"
            self.record("data", "augmentation", note=share, model=self.model)

    def rates(self, variant: str) -> dict[str, float]:
        return {row["task"]: row["img_s"] for row in self.rows if row["variant"] == variant}

    def study(self) -> None:
        """Project the time of the whole study from the measured rates; name what is missing instead of guessing."""
        rates = {k: v for k, v in self.rates(SYNTHETIC).items() if "evaluation" in k} | self.rates(REAL)
        missing = ", ".join(sorted(STUDY.keys() - rates))
        hours = None if missing else sum(n / rates[k] for k, n in STUDY.items()) / 3600
        note = f"not measured: {missing}" if missing else f"{hours:,.2f} hours by the rates above"
        self.record("study", WHOLE, model=self.model, hours=hours, note=note)

    def scaling(self) -> None:
        """Measure the growth with the batch size, then with the number of processes, which torchrun starts."""
        base, a = self.batch_size("pretrain"), self.args
        for factor in (0.25, 0.5, 1, 2, 4) if self.on_gpu else (1, 2):
            self.train("pretrain", max(1, int(base * factor)), "scaling")
        most = torch.cuda.device_count() if self.on_gpu else self.cores
        flags = {"tasks": "scaling", "model": self.model, "batch_size": base, "img_size": a.img_size, "output": a.output,
                 "device": self.device.type, "precision": self.precision.name, "repeats": self.repeats}  # fmt: skip
        for world in (n for n in (2, 4, 8) if n <= most):
            run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__]
            run += [f"--{k}={v}" for k, v in flags.items()] + ["--compile" if self.compile else "--no-compile"]
            subprocess.run(run, check=True)
            self.rows.append(json.loads(Path(a.output).read_text().splitlines()[-1]))


def table(rows: list[dict]) -> str:
    """Format rows as a Markdown table; a figure that was not measured is a dash."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "–" if value is None else str(value)

    lines = [COLUMNS, ["---"] * len(COLUMNS), *([cell(row.get(c)) for c in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(source: str, target: str) -> None:
    """Write BENCHMARKS.md from JSON lines: tables by machine and command, then what no GPU has measured."""
    try:
        rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise EngineError(f"--report {source} cannot be read as JSON lines: {error}") from None
    parts = [f"# Benchmarks\n\nWritten by `python bench.py --report {source}`; every figure is measured, none estimated.",
             "ratio: step time over that of the first line of its task, the median over pairs of turns."]  # fmt: skip
    for machine, group in itertools.groupby(rows, key=lambda r: r["machine"]):
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        parts.append(f"## {machine['device']}\n\n`{machine['command']}`\n\n{machine['threads']} threads; {versions}")
        parts.append(table(list(group)))
    wanted = [*itertools.product(("pretrain", "finetune", "resnet50"), (SYNTHETIC, REAL)), ("scaling", SYNTHETIC),
              ("data", "cache + augmentation on cuda:0"), ("study", WHOLE)]  # fmt: skip
    on_gpu = [row for row in rows if "NVIDIA" in row["machine"]["device"] and (row.get("img_s") or row.get("hours"))]
    done = {(row["task"], row["variant"]) for row in on_gpu}
    missing = [f"- {task}: {variant}" for task, variant in wanted if (task, variant) not in done]
    parts += ["## Not measured yet on an NVIDIA GPU", "\n".join(missing)] if missing else []
    Path(target).write_text("\n\n".join(parts) + "\n")


def main(args: argparse.Namespace) -> None:
    if args.report:
        return write_report(args.report, args.output if args.output.endswith(".md") else "BENCHMARKS.md")
    for name in ("batch_size", "repeats", "img_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise EngineError(f"--{name} must be at least 1, got {getattr(args, name)}")
    bench = Bench(args)
    if bench.dist.world_size > 1:  # one of the processes that `scaling` started
        return bench.train("pretrain", bench.batch_size("pretrain"), "scaling")
    with tempfile.TemporaryDirectory() as folder:
        if not args.synthetic:
            bench.open_data(folder)
        for task in args.tasks:
            if task in STUDY:
                bench.train(task, bench.batch_size(task))
            elif task != "data" or not args.synthetic:
                {"data": bench.data_paths, "study": bench.study, "scaling": bench.scaling}[task]()
    print(table(bench.rows))


if __name__ == "__main__":
    launch(main, get_args_parser())
