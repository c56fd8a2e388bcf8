"""Measure speed: training on synthetic and on real batches, peers side by side, the data path, and the study's time.

    python bench.py --quick                                              # two minutes on two cores
    python bench.py --peers --output bench.jsonl                         # everything; bf16 on GPUs that have it
    python bench.py --report bench.jsonl                                 # write BENCHMARKS.md from recorded lines

One JSON line per measurement and a table at the end. Contestants of a task take turns in one process, in changing order, so
a drifting machine favours none; times are medians over synchronised turns, ratios medians over pairs of the same turn.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import data
import splits
from batches import TrainBatches
from engine import EngineError, Parser, Precision, hardware_name, launch, peak_flops, setup
from models import MODELS, build_mae, build_segmenter

TRAININGS = ("pretrain", "finetune", "resnet50")
REAL, SYNTHETIC = "this project, real batches", "this project, synthetic"
WHOLE = "3 x 150 + 6 x 100 epochs and evaluation"
# The paper's study: images through training, and through evaluation (validation after each epoch, then the test set).
STUDY = {"pretrain": 3 * 150 * 25_739, "finetune": 5 * 100 * 5_144, "resnet50": 100 * 5_144,
         "pretrain evaluation": 3 * 150 * 2 * 1_016, "finetune evaluation": 5 * (100 * 1_102 + 1_103),
         "resnet50 evaluation": 100 * 1_102 + 1_103}  # fmt: skip
COLUMNS = ("task", "variant", "model", "batch_size", "world_size", "precision", "step_ms", "spread_ms", "img_s", "tflops",
           "mfu", "mem_gb", "ratio", "note")  # fmt: skip
WANTED = (*itertools.product(TRAININGS, (SYNTHETIC, REAL)), ("scaling", SYNTHETIC), ("choices", SYNTHETIC),
          ("data", "cache + augmentation on cuda:0"), ("study", WHOLE))  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add, tasks = parser.add_argument, (*TRAININGS, "data", "study", "scaling")
    text = "what to measure; study: from the trainings' rates; choices: pre-training with each choice in it undone"
    add("--tasks", nargs="+", choices=(*tasks, "choices"), default=tasks, help=text)
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
    add("--report", metavar="FILE", help="only write BENCHMARKS.md (or --output X.md) from these JSON lines")
    return parser


def pixel_loss(network, batch) -> torch.Tensor:
    return F.cross_entropy(network(batch["images"], batch["drop_path"]).float(), batch["masks"])


class Bench:
    """The settings, the data and the recorded measurements of one invocation."""

    def __init__(self, args):
        self.args, self.dist, self.rows, self.cores = args, setup(args.device), [], len(os.sched_getaffinity(0))
        self.device, self.on_gpu = self.dist.device, self.dist.device.type == "cuda"
        self.precision, names = Precision(args.precision, self.device), ["torch", "torchvision"]
        model, repeats = ("mae_small", 2) if args.quick else ("mae_base", 7)
        args.model, args.repeats = args.model or model, args.repeats or repeats
        args.compile = self.on_gpu if args.compile is None else args.compile
        usual = (4, 4) if args.quick else (256, 64) if self.on_gpu else (16, 16)
        self.count = {task: args.batch_size or usual[task != "pretrain"] for task in TRAININGS}
        patches = (args.img_size // MODELS[args.model].get("patch_size", 16)) ** 2
        self.draws = {"noise": (patches,), "drop_path": (MODELS[args.model]["depth"], 2)}
        sys.path.append(str(Path(__file__).with_name("tests")))
        if args.peers:  # other projects' networks and data path
            self.peers, names = importlib.import_module("peers"), [*names, "transformers", "timm"]
        try:
            versions = {"python": sys.version.split()[0], **{n: importlib.metadata.version(n) for n in names}}
        except importlib.metadata.PackageNotFoundError as error:
            raise EngineError(f"--peers: {error}; `pip install -r requirements-dev.txt`") from None
        self.machine = {"device": hardware_name(self.device), "cores": self.cores, "threads": torch.get_num_threads(),
                        "versions": versions, "command": shlex.join(["python", "bench.py", *sys.argv[1:]])}  # fmt: skip

    def record(self, task: str, variant: str, **fields) -> None:
        row = {"task": task, "variant": variant, "precision": self.precision.name, **fields, "machine": self.machine}
        self.rows.append(row)
        if self.dist.is_main:
            with open(self.args.output, "a") as f:
                f.write(json.dumps(row) + "\n")

    def seconds(self, step, steps: int, settle: int = 0, clock=time.perf_counter) -> float:
        """Time a synchronised step; those of `settle` go first, untimed: they empty queues that filled meanwhile."""
        if settle:
            self.seconds(step, settle)
        start = clock()
        for _ in range(steps):
            step()
        if self.on_gpu:
            torch.cuda.synchronize()
        return (clock() - start) / steps

    def compare(self, task: str, contestants: dict, count: int, steps: int = 0, settle: int = 0) -> None:
        """Time contestants (name -> function of a step of `count` images) in turns; ratio: over the first one."""
        names, times, memory = list(contestants), {n: [] for n in contestants}, {}
        steps, settle = steps or (10 if self.on_gpu else 1), settle or 2 * (self.on_gpu or self.args.compile)
        limit, world = peak_flops(self.device, self.precision.name), self.dist.world_size
        for turn in range(self.args.repeats + 1):
            shift = turn // 2 % len(names)  # each one comes early and late, and after different ones
            for name in (names[shift:] + names[:shift])[:: -1 if turn % 2 else 1]:
                if self.on_gpu:  # memory: what this contestant keeps and what its steps add
                    torch.cuda.reset_peak_memory_stats()
                    others = torch.cuda.memory_allocated() - getattr(contestants[name], "state_bytes", 0)
                times[name].append(self.seconds(contestants[name], steps, settle))
                memory[name] = (torch.cuda.max_memory_allocated() - others) / 1e9 if self.on_gpu else None
        for name, (_, *turns) in times.items():  # the first turn warmed up: compilation, allocators, optimizer state
            rate = count * world / median(turns)
            done = getattr(contestants[name], "flops", 0) * rate or None
            self.record(task, name, batch_size=count, world_size=world, steps=steps, turns=len(turns), img_s=rate,
                        model="resnet50" if "resnet50" in task else None if task == "data" else self.args.model,
                        img_size=self.args.img_size, step_ms=1e3 * median(turns), mem_gb=memory[name],
                        spread_ms=[1e3 * min(turns), 1e3 * max(turns)], compiled=self.args.compile,
                        tflops=done and done / 1e12, mfu=done / limit / world if done and limit else None,
                        ratio=median(b / a for a, b in zip(times[names[0]][1:], turns, strict=True)))  # fmt: skip

    def open_data(self, folder: str) -> None:
        """Draw photos unless --data_root names some, and decode them into a temporary cache."""
        self.root, self.cache = self.args.data_root or f"{folder}/data", f"{folder}/cache"
        if not self.args.data_root:
            script, sizes = Path(__file__).with_name("prepare.py"), ["--num_train=64", "--num_val=24", "--num_pets=48"]
            draw = [sys.executable, script, "demo", "--data_root", self.root, *sizes]
            subprocess.run(draw, check=True, stdout=subprocess.DEVNULL)
        self.pets = splits.pets_split(self.root, "train").images
        self.photos = splits.select_split(self.root, "all", cache_dir=self.cache).images[:4096]
        for images, kind in ((self.photos + self.pets, "image"), (self.pets, "trimap")):
            data.build_cache(self.root, images, kind=kind, cache_dir=self.cache)

    def batches(self, task: str, count: int, device: torch.device) -> TrainBatches:
        """Batches as the training scripts make them, held on a GPU; a list shorter than four batches is repeated."""
        kinds, images = (["image"], self.photos) if task == "pretrain" else (["image", "trimap"], self.pets)
        images, draw = images * -(-4 * count // len(images)), "noise" if task == "pretrain" else "drop_path"
        options = {"cache_dir": self.cache, "device": device, "on_device": device.type == "cuda"}
        stores = [data.ImageStore(self.root, images, kind=kind, **options) for kind in kinds]
        options = {"img_size": self.args.img_size, "batch_size": count, "seed": 0, "device": device}
        return TrainBatches(*stores, draws={draw: self.draws[draw]}, vertical_flip=len(kinds) > 1, **options)

    def training_step(self, module: torch.nn.Module, loss, flops: float, source, compiled=None, optimizer=None):
        """Make a function that does one whole update: forward under autocast, backward, fused AdamW."""
        layout = torch.channels_last if hasattr(module, "backbone") else torch.preserve_format
        network = module.to(self.device, memory_format=layout)
        compiled = self.args.compile if compiled is None else compiled
        network = torch.compile(network, dynamic=False, disable=not compiled)
        if self.dist.world_size > 1:
            network = torch.nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer, scaler = optimizer or torch.optim.AdamW(parameters, lr=1e-5, fused=True), self.precision.scaler

        def step():
            with torch.profiler.record_function("wait for data"):
                batch = next(source)
            with self.precision.autocast():
                value = loss(network, batch)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        step.flops, step.state_bytes = flops, 3 * sum(p.numel() * p.element_size() for p in parameters)
        return step

    def train(self, task: str, count: int) -> None:
        """Measure a training on synthetic and real batches, beside peers, and its forward pass; scaling: synthetic only."""
        shapes = {"images": (3, self.args.img_size, self.args.img_size), **self.draws}
        batch = {name: torch.rand(count, *shape, device=self.device) for name, shape in shapes.items()}
        batch["masks"], same = (batch["images"][:, 0] * 3).long().clamp(max=2), itertools.repeat(batch)
        if task in ("pretrain", "scaling"):
            module = build_mae(self.args.model, img_size=self.args.img_size)
            flops, loss = module.flops(mask_ratio=0.75), lambda network, b: network(b["images"], 0.75, b["noise"])[0]
        else:
            resnet, size = task == "resnet50", self.args.img_size
            module = build_segmenter(task if resnet else self.args.model, img_size=size, drop_path=0.1)
            flops, loss = module.flops(), pixel_loss
        steps = {SYNTHETIC: self.training_step(module, loss, flops, same)}
        if task != "scaling" and not self.args.synthetic:
            source = (parts[0] for parts in self.batches(task, count, self.device).run(0, 10**9))
            steps[REAL] = self.training_step(module, loss, flops, source)
        if self.args.peers:
            others = self.peers.peers_of(task, self.args.model, module, loss)
            steps |= {name: self.training_step(*parts, same) for name, parts in others.items()}
        self.compare(task, steps, count)
        if task == "scaling":
            return
        if self.args.profile:
            self.profile(task, steps.get(REAL, steps[SYNTHETIC]))

        def evaluate():
            with torch.no_grad(), self.precision.autocast():
                loss(module.eval(), batch)

        self.compare(f"{task} evaluation", {SYNTHETIC: evaluate}, count)

    def choices(self) -> None:
        """Measure pre-training with each choice in its step undone; all contestants train the same parameters."""
        alternatives, count = importlib.import_module("choices"), self.count["pretrain"]
        module = build_mae(self.args.model, img_size=self.args.img_size)
        shapes = {"images": (3, self.args.img_size, self.args.img_size), "noise": (module.num_patches,)}
        same = itertools.repeat({k: torch.rand(count, *shape, device=self.device) for k, shape in shapes.items()})
        flops = module.flops(mask_ratio=0.75)
        parts = module, lambda network, b: network(b["images"], 0.75, b["noise"])[0], flops, same
        weights = [p for p in module.to(self.device).parameters() if p.requires_grad]
        adamw = {n: torch.optim.AdamW(weights, lr=1e-5, **how) for n, how in alternatives.OPTIMIZERS.items()}
        fused, other = torch.optim.AdamW(weights, lr=1e-5, fused=True), not self.args.compile
        steps = {SYNTHETIC: self.training_step(*parts, optimizer=fused)}  # one optimizer: its memory favours none
        name = "torch.compile" if other else "not compiled"
        steps[name] = self.training_step(*parts, compiled=other, optimizer=fused)
        for name in alternatives.PATCHES:
            steps[name] = alternatives.undone(name, self.training_step(*parts, optimizer=fused))
        steps |= {name: self.training_step(*parts, optimizer=own) for name, own in adamw.items()}
        self.compare("choices", steps, count, settle=1)

    def profile(self, task: str, step) -> None:
        """Write a chrome trace; print the ten most expensive kernels and the share of time the device waits."""
        with torch.profiler.profile() as trace:
            seconds = 3 * self.seconds(step, 3)
        os.makedirs(self.args.profile, exist_ok=True)
        trace.export_chrome_trace(f"{self.args.profile}/{task}.json")
        events, order = trace.key_averages(), "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        print(events.table(sort_by=order, row_limit=10, max_name_column_width=50))
        fetch = sum(e.cpu_time_total for e in events if e.key == "wait for data") / 1e6 / seconds
        idle = 1 - sum(e.self_device_time_total for e in events) / 1e6 / seconds
        note = f", the device idles {max(0, idle):.1%}" if self.on_gpu else ""
        self.record(task, "profile", note=f"fetching and augmenting a batch takes {fetch:.1%} of a step{note}")

    def data(self) -> None:
        """Measure the cache with augmentation, what it leaves to a GPU's host, and (peers) PIL in a DataLoader."""
        count, paths, jobs, steps = self.count["pretrain"], {}, {}, itertools.count()
        if self.args.peers:
            files = [f"{self.root}/{name}" for name in self.photos]
            paths, jobs = self.peers.pil_paths(files, self.args.img_size, count, self.cores)
        for device in dict.fromkeys([torch.device("cpu"), self.device]):
            batches = self.batches("pretrain", count, device)
            paths[own := f"cache + augmentation on {device}"] = batches.run(0, 10**9).__next__
        self.compare("data", paths, count, steps=4 * self.cores, settle=2 * self.cores + 2)
        host = self.batches("pretrain", count, torch.device("cpu"))
        gather = lambda: host.images.gather(host._prepare(next(steps))[0], pin=self.on_gpu)  # noqa: E731
        jobs["this project: rows gathered, random draws"] = gather
        for name, job in jobs.items():
            cost = median(self.seconds(job, 1, 1, time.process_time) for _ in range(self.args.repeats)) * 1e3 / count
            self.record("data", f"host, {name}", cpu_ms=cost, note=f"{cost:.3f} ms of CPU time per image")
        if "pretrain" in (rates := self.rates(SYNTHETIC)):
            share = rates["pretrain"] / self.rates(own)["data"]
            self.record("data", "augmentation", note=f"{share:.2%} of a synthetic training step", model=self.args.model)

    def rates(self, variant: str) -> dict[str, float]:
        return {row["task"]: row["img_s"] for row in self.rows if row["variant"] == variant}

    def study(self) -> None:
        """Project the time of the whole study from the measured rates; name what is missing instead of guessing."""
        rates = {k: v for k, v in self.rates(SYNTHETIC).items() if "evaluation" in k} | self.rates(REAL)
        missing = ", ".join(sorted(STUDY.keys() - rates))
        hours = None if missing else sum(n / rates[k] for k, n in STUDY.items()) / 3600
        note = f"not measured: {missing}" if missing else f"{hours:,.2f} hours by the rates above"
        self.record("study", WHOLE, model=self.args.model, hours=hours, note=note)

    def scaling(self) -> None:
        """Measure the growth with the batch size, then with the number of processes, which torchrun starts."""
        count = self.count["pretrain"]
        if self.dist.world_size > 1:
            return self.train("scaling", count)
        for factor in (0.25, 0.5, 1, 2, 4) if self.on_gpu else (1, 2):
            self.train("scaling", max(1, int(count * factor)))
        same = {"model": self.args.model, "img_size": self.args.img_size, "output": self.args.output, "batch_size": count,
                "device": self.device.type, "precision": self.precision.name, "repeats": self.args.repeats}  # fmt: skip
        flags = [*(f"--{k}={v}" for k, v in same.items()), "--synthetic", "--tasks", "scaling"]
        flags += ["--compile" if self.args.compile else "--no-compile"]
        for world in (n for n in (2, 4, 8) if n <= (torch.cuda.device_count() if self.on_gpu else self.cores)):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
            subprocess.run([*torchrun, __file__, *flags], check=True)
            self.rows.append(json.loads(Path(self.args.output).read_text().splitlines()[-1]))


def table(rows: list[dict]) -> str:
    """Format rows as a Markdown table; a figure that was not measured is a dash."""

    def cell(value) -> str:
        if isinstance(value, list):  # the fastest and the slowest
            return "–".join(map(cell, value))
        number = f"{value:,.0f}" if isinstance(value, float) and value >= 100 else value
        return "–" if number is None else f"{number:.3g}" if isinstance(number, float) else str(number)

    lines = [COLUMNS, ["---"] * len(COLUMNS), *([cell(row.get(column)) for column in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(source: str, target: str) -> None:
    """Write BENCHMARKS.md from JSON lines: tables by machine and command, then what no GPU has measured."""
    try:
        rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
        sections = [
            (machine, list(group)) for machine, group in itertools.groupby(rows, key=lambda row: row["machine"])
        ]
        titles = [f"{m['device']}\n\n`{m['command']}`\n\n{m['threads']} threads; " for m, _ in sections]
        titles = [
            t + ", ".join(f"{k} {v}" for k, v in m["versions"].items())
            for t, (m, _) in zip(titles, sections, strict=True)
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngineError(f"--report {source} holds no lines that bench.py wrote: {error!r}") from None
    text = f"# Benchmarks\n\nWritten by `python bench.py --report {source}`; all is measured, nothing estimated.\n\n"
    text += "ratio: step time over that of the first line of its task, the median over pairs of turns; spread: the fastest\n"
    text += "and the slowest turn; differences well inside it are no finding. choices: one choice in the step undone.\n"
    text += "".join(f"\n## {title}\n\n{table(group)}\n" for title, (_, group) in zip(titles, sections, strict=True))
    on_gpu = [row for row in rows if "NVIDIA" in row["machine"]["device"] and (row.get("img_s") or row.get("hours"))]
    full = ({"mae_base", "resnet50", None}, {224, None})  # of the study's size, not of a quick look
    on_gpu = [row for row in on_gpu if row.get("model") in full[0] and row.get("img_size") in full[1]]
    done = {(row["task"], row["variant"]) for row in on_gpu}
    missing = [f"- {task}: {variant}\n" for task, variant in WANTED if (task, variant) not in done]
    text += "\n## Not measured yet on an NVIDIA GPU\n\n" * bool(missing) + "".join(missing)
    Path(target).write_text(text)


def main(args: argparse.Namespace) -> None:
    if args.report:
        return write_report(args.report, "BENCHMARKS.md" if args.output == "bench.jsonl" else args.output)
    for name in ("batch_size", "repeats", "img_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise EngineError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.synthetic and set(args.tasks) == {"data"}:
        raise EngineError("--tasks data measures real batches, which --synthetic leaves out")
    if args.profile and Path(args.profile).exists() and not Path(args.profile).is_dir():
        raise EngineError(f"--profile {args.profile} is a file: name a folder")
    open(args.output, "a").close()  # before anything is measured
    bench = Bench(args)
    try:
        build_segmenter(args.model, img_size=args.img_size)
    except ValueError as error:
        raise EngineError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        if not args.synthetic:
            bench.open_data(folder)
        for task in sorted(args.tasks, key=lambda task: task == "study"):  # from the rates of all others
            if task in TRAININGS:
                bench.train(task, bench.count[task])
            elif task != "data" or not args.synthetic:
                getattr(bench, task)()
    if bench.dist.world_size == 1:
        print(table(bench.rows))


if __name__ == "__main__":
    launch(main, get_args_parser())
