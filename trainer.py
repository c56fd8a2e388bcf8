"""The training loop that pre-training and every fine-tuned arm share, and the flags that go with it.

One step: take the micro-batches, accumulate gradients, reduce them once, step the optimizer. Nothing inside a step waits
for the device. At synchronisation points (log lines, validation, every few seconds) all processes exchange stop requests,
a due checkpoint and the first non-finite step, so no process ever acts alone.
"""

import argparse
import contextlib
import functools
import hashlib
import math
import signal
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import augment
import data
import engine
import splits
from engine import Distributed, EngineError, Precision, Progress, Run
from weights import load_pretrained

# Flags that change how a result is computed, not which result it is: they may differ when a run is continued.
FREE_ARGUMENTS = {
    "data_root", "cache_dir", "cache_device", "output_dir", "device", "precision", "compile", "micro_batch_size", "resume",
    "save_minutes", "log_every", "figure_every", "dry_run", "init",
}  # fmt: skip
POSITIVE = {"epochs", "batch_size", "img_size", "cache_size", "log_every", "micro_batch_size"}


# fmt: off
def add_training_arguments(parser: argparse.ArgumentParser, *, output_dir: str, epochs: int, batch_size: int,
                           warmup_epochs: float, min_lr: float) -> None:
    """Add the flags that all training scripts have; the keyword arguments are the defaults of one script."""
    add = parser.add_argument_group("data").add_argument
    add("--data_root", default="data", help="folder with coco/ and oxford-iiit-pet/ (see prepare.py)")
    add("--cache_dir", default="cache", help="folder of the decoded images; put it on a fast disk")
    add("--cache_size", type=int, default=384, help="side of decoded images in pixels; smaller saves memory, blurs crops")
    add("--cache_device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: images on the GPU if they fit")
    add("--img_size", type=int, default=224, help="input size in pixels, divisible by the patch size")
    add("--split_seed", type=int, default=0, help="seed of the image selection (COCO draw, part of the labels)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=epochs, help="passes over the data")
    add("--batch_size", type=int, default=batch_size, help="images per update, all GPUs and micro-batches together")
    add("--micro_batch_size", type=int, help="images per GPU at a time; lower it to save memory, results stay")
    add("--weight_decay", type=float, default=0.05, help="AdamW's decay; norms and biases are exempt")
    add("--warmup_epochs", type=float, default=warmup_epochs, help="epochs of linear warm-up before the cosine")
    add("--min_lr", type=float, default=min_lr, help="rate at the end of the cosine")
    add("--clip_grad", type=float, help="clip the gradient norm to this value; try 1 if the loss jumps")
    add("--seed", type=int, default=0, help="seed of weights, order, augmentation, masks and drop path")
    add = parser.add_argument_group("system").add_argument
    add("--output_dir", default=output_dir, help="folder of this run; an interrupted run in it is continued")
    add("--resume", choices=["auto", "never"], default="auto", help="never: start over in --output_dir")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: bf16 or fp16 on GPUs")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network (default: on GPUs)")
    add("--save_minutes", type=float, default=5, help="minutes between checkpoints; 0: one after every epoch")
    add("--log_every", type=int, default=50, help="steps between lines of log.jsonl")
    add("--dry_run", action="store_true", help="print the plan of the run and leave")
# fmt: on


def check_training_arguments(args: argparse.Namespace) -> None:
    """Refuse values that no run can use, before anything is read or written."""
    fractions = {"crop_scale", "layer_decay"}
    for name, value in vars(args).items():
        least = 1 if name in POSITIVE else 0
        if type(value) in (int, float) and not (math.isfinite(value) and value >= least):
            raise EngineError(f"--{name} must be at least {least}, got {value}")
        if name in ("seed", "split_seed") and value >= 2**32:
            raise EngineError(f"--{name} must be below 2^32, got {value}")
        if name in fractions and not 0 < value <= 1:
            raise EngineError(f"--{name} must lie in (0, 1], got {value}")


class Trainer:
    """Trains `model` for total_steps updates inside a `Run`, from its last checkpoint if it has one.

    forward(network, micro_batch) -> scalar loss runs under autocast; network wraps model (compile, DDP).
    batches.run(first_step, last_step) yields a list of micro-batches per step, as a function of the step alone.
    groups: see engine.param_groups. epoch_steps: updates per nominal epoch; validation runs at its end. best: the
    validation score whose highest value selects the weights to keep; None keeps the last.
    """

    def __init__(self, run: Run, model: nn.Module, forward, batches, groups: list[dict], *, args, dist: Distributed,
                 precision: Precision, lr: float, betas: tuple, epoch_steps: int, flops: float, best=None):  # fmt: skip
        self.run, self.model, self.forward, self.batches, self.args = run, model, forward, batches, args
        self.dist, self.precision, self.lr, self.flops, self.best_key = dist, precision, lr, flops, best
        self.epoch_steps, self.total_steps = epoch_steps, args.epochs * epoch_steps
        self.params = [p for g in groups for p in g["params"]]
        groups = [{k: v for k, v in g.items() if k != "names"} for g in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        self.network, gpu = model, dist.device.type == "cuda"
        if args.compile or (args.compile is None and gpu):
            self.network = torch.compile(model, dynamic=False)
        if dist.world_size > 1:
            ids = [dist.device] if gpu else None
            self.network = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
        self.step, self.seconds, self.best, self.last_val, self.rates = 0, 0.0, None, None, []
        # Since the last log line: sum of losses, steps, skipped steps; and the first step with a non-finite loss.
        self.meter = torch.zeros(3, device=dist.device)
        self.bad_step = torch.full((), math.inf, device=dist.device)
        self.stop_signal = 0

    def train_step(self, micro_batches: list[dict], want_norm: bool) -> torch.Tensor | None:
        """Do one update; returns the gradient norm (a device scalar) if it was needed."""
        lr, scaler, loss_sum, norm = self._lr(self.step), self.precision.scaler, 0.0, None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for i, batch in enumerate(micro_batches):
            accumulating = i + 1 < len(micro_batches) and self.dist.world_size > 1
            with self.network.no_sync() if accumulating else contextlib.nullcontext():
                with self.precision.autocast():
                    loss = self.forward(self.network, batch) / len(micro_batches)
                scaler.scale(loss).backward()
            loss_sum = loss_sum + loss.detach()
        if want_norm or self.args.clip_grad or scaler.is_enabled():
            scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.params, self.args.clip_grad or math.inf)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        bad = ~torch.isfinite(loss_sum)
        self.bad_step = torch.where(bad & torch.isinf(self.bad_step), float(self.step + 1), self.bad_step)
        self.meter[0] += loss_sum
        self.meter[1] += 1
        if scaler.is_enabled():  # fp16: a step whose gradients overflowed was skipped by the scaler
            self.meter[2] += ~torch.isfinite(norm)
        self.step += 1
        return norm

    def fit(self, validate) -> dict:
        """Train to total_steps; validate(step, stopping) runs on every process after each nominal epoch.

        It returns a dict of scores, or None on all processes if stopping() became true on one of them meanwhile.
        Returns the metrics of the run; writes log lines and checkpoints on the way. A stop signal writes a checkpoint
        and raises EngineError with the exit code 128 + signal; a non-finite loss raises EngineError.
        """
        self._resume()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request_stop)
        self.started = self.window = self.saved_at = time.monotonic()
        self.seconds_before, self.images, self.next_sync, self.note = self.seconds, 0, self.step + 1, ""
        size, log_every = self.args.batch_size, self.args.log_every
        steps, quiet = self.batches.run(self.step, self.total_steps), not self.dist.is_main
        bar = Progress("training", self.total_steps * size, initial=self.step * size, quiet=quiet)
        with bar, contextlib.closing(steps):
            if self.step and self.step % self.epoch_steps == 0 and (self.last_val or {}).get("step") != self.step:
                self._validate(validate)  # the one that a stop request interrupted
            for micro_batches in steps:
                last = self.step + 1 == self.total_steps
                log_due = last or (self.step + 1) % log_every == 0
                val_due = last or (self.step + 1) % self.epoch_steps == 0
                norm = self.train_step(micro_batches, want_norm=log_due)
                self.images += size
                if log_due or val_due or self.step >= self.next_sync:
                    self._synchronise(norm if log_due else None, validate if val_due else None)
                bar.update(size, self.note)
        rate = statistics.median(self.rates) if self.rates else None
        metrics = {"best": self.best["scores"]} if self.best else {}
        metrics |= {"last": self.last_val, "seconds": round(self.seconds, 2), "img_s": rate, "mfu": self._mfu(rate)}
        return metrics | {"mem_gb": self._memory(), "updates": self.total_steps, "epochs": self.args.epochs}

    @property
    def weights(self) -> dict:
        """The weights to keep: those of the best validation score, or the last."""
        return self.best["model"] if self.best else self.model.state_dict()

    # -- synchronisation points ---------------------------------------------------------------------------------------

    def _synchronise(self, norm: torch.Tensor | None, validate) -> None:
        """Act together: stop on a non-finite loss, log, validate, checkpoint, leave. One exchange decides for all."""
        now = time.monotonic()
        save_due = self.dist.is_main and now - self.saved_at >= 60 * self.args.save_minutes
        pace = (now - self.window) / self.images  # seconds per image
        rows = self.dist.gather([self.stop_signal, save_due, self.bad_step.item(), pace, self.meter[0].item()])
        stop, save, first_bad = int(rows[:, 0].max()), bool(rows[0, 1]), rows[:, 2].min().item()
        if math.isfinite(first_bad):
            self._refuse_non_finite("loss", int(first_bad))
        # Slow machines look up from their work often enough to obey a stop request within seconds.
        step_seconds = rows[:, 3].max().item() * self.args.batch_size
        self.next_sync = self.step + max(1, min(self.args.log_every, int(2.0 / max(step_seconds, 1e-6))))
        self.loss_sums = rows[:, 4].tolist()  # of every process: a checkpoint between two log lines holds them all
        self.seconds = self.seconds_before + now - self.started
        if norm is not None:
            self._log_line(norm, 1 / pace)
            self.window, self.images = time.monotonic(), 0
        pause = time.monotonic()
        if validate is not None:
            self._validate(validate)
        self.seconds = self.seconds_before + time.monotonic() - self.started
        if self.step < self.total_steps and (stop or (save and (self.args.save_minutes or validate is not None))):
            self._save()
        if stop and self.step < self.total_steps:
            self._leave(stop)
        self.window += time.monotonic() - pause  # rates are of training alone

    def _leave(self, stop: int) -> None:
        where = f"checkpoint written at step {self.step} of {self.total_steps} in {self.run.dir}"
        raise EngineError(f"{signal.Signals(stop).name}; {where}; the same command continues the run", 128 + stop)

    def _refuse_non_finite(self, what: str, step: int) -> None:
        kept = "the last checkpoint is kept" if (self.run.dir / "last.pt").exists() else "no checkpoint was due yet"
        advice = "in another folder, try a lower rate (--blr), --clip_grad 1 or --precision fp32"
        found = f"the {what} became non-finite at step {step} (lr {self._lr(step - 1):.3g})"
        raise EngineError(f"{found}; {kept} in {self.run.dir}; {advice}", 1)

    def _request_stop(self, number: int, frame) -> None:
        if self.stop_signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a checkpoint
        self.stop_signal = number

    def _lr(self, step: int) -> float:
        warmup = round(self.args.warmup_epochs * self.epoch_steps)
        return engine.lr_at(step, self.total_steps, warmup, self.lr, self.args.min_lr)

    def _mfu(self, img_s: float | None) -> float | None:
        peak = engine.peak_flops(self.dist.device, self.precision.name)
        return img_s * self.flops / (peak * self.dist.world_size) if peak and img_s and self.flops else None

    def _memory(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.dist.device.type == "cuda" else None

    def _log_line(self, norm: torch.Tensor, img_s: float) -> None:
        loss = statistics.fmean(self.loss_sums) / self.meter[1].item()
        line = {"loss": loss, "lr": self._lr(self.step - 1), "grad_norm": norm.item() if torch.isfinite(norm) else None}
        line |= {"skipped": int(self.meter[2].item())} if self.precision.scaler.is_enabled() else {}
        line |= {"img_s": round(img_s, 1), "mfu": self._mfu(img_s), "mem_gb": self._memory()}
        self.run.log(
            "train", step=self.step, epoch=self.step / self.epoch_steps, **line, seconds=round(self.seconds, 2)
        )
        self.rates.append(img_s)
        self.meter.zero_()
        mfu = f", MFU {100 * line['mfu']:.1f} %" if line["mfu"] else ""
        self.note = f"loss {loss:.4f}, lr {line['lr']:.2e}{mfu}"

    def _validate(self, validate) -> None:
        if self.dist.world_size > 1:  # BatchNorm statistics of the first process, as in its checkpoint
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        self.model.eval()
        with torch.no_grad(), self.precision.autocast():
            scores = validate(self.step, lambda: bool(self.stop_signal))
        self.model.train()
        if scores is None:  # stopped halfway: the run continues with this validation
            self._save()
            self._leave(int(self.dist.gather([self.stop_signal]).max()))
        if not all(math.isfinite(v) for k, v in scores.items() if k.startswith("loss")):
            self._refuse_non_finite("validation loss", self.step)
        self.last_val = {"step": self.step, "epoch": self.step / self.epoch_steps, **scores}
        self.run.log("val", **self.last_val, seconds=round(self.seconds, 2))
        if self.best_key and (self.best is None or scores[self.best_key] > self.best["scores"][self.best_key]):
            kept = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.best = {"scores": self.last_val, "model": kept}
        if self.dist.is_main:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
            print(f"epoch {self.last_val['epoch']:g}  {shown}", flush=True)

    def _save(self) -> None:
        scaler = self.precision.scaler.state_dict()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": scaler}
        names = ("step", "seconds", "best", "last_val", "loss_sums", "meter")
        self.run.save(state | {name: getattr(self, name) for name in names} | {"rates": self.rates[-1000:]})
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        state = self.run.load()
        if state is None:
            return self.run.log("config", **self.run.config)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(state["scaler"])
        for name in ("step", "seconds", "last_val", "rates", "best"):
            setattr(self, name, state[name])
        self.meter.copy_(state["meter"])
        if self.meter[1]:  # interrupted between two log lines, perhaps with another number of processes
            sums = state["loss_sums"]
            self.meter[0] = sums[self.dist.rank] if len(sums) == self.dist.world_size else statistics.fmean(sums)
        if self.dist.is_main:
            print(f"resumed {self.run.dir} at step {self.step} of {self.total_steps}", flush=True)


def build(make, dist: Distributed, args, init: str | None = None, **sizes) -> tuple[nn.Module, str | None]:
    """Build a model from the run's seed and load `init` into it -> (model, SHA-256 of init, which defines the result)."""
    torch.manual_seed(args.seed)
    try:
        model = make(args.model, img_size=args.img_size, **sizes)
    except ValueError as error:
        raise EngineError(str(error)) from None
    if init is None:
        return model, None
    report = load_pretrained(model, init)
    if dist.is_main:
        print(f"init: {report}", flush=True)
    return model, hash_file(init)


def hash_file(path: str) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def open_store(args, dist: Distributed, images, kind: str = "image", size: int | None = None) -> data.ImageStore:
    """Build the decoded cache of these images where it is missing, and open it, on the GPU if it fits."""
    options = {"kind": kind, "cache_dir": args.cache_dir, "cache_size": size or args.cache_size}
    data.build_cache(args.data_root, images, progress=Progress, **options)  # shown by the process that builds
    on_gpu = dist.device.type == "cuda" and args.cache_device != "cpu"
    if on_gpu and args.cache_device == "auto":  # leave half of what is free to the network
        needed = len(set(images)) * options["cache_size"] ** 2 * (3 if kind == "image" else 1)
        on_gpu = needed < 0.5 * torch.cuda.mem_get_info(dist.device)[0]
    store = data.ImageStore(args.data_root, images, device=dist.device, on_device=on_gpu, **options)
    if not len(store):
        advice = "`python prepare.py verify` names the cause"
        raise EngineError(f"none of the {len(images)} images of this split can be read; {advice}")
    return store


def train(kind: str, args, dist: Distributed, precision: Precision, model: nn.Module, split: splits.Split, *, forward,
          validation, size: int, flops: float, betas: tuple, batch_options: dict, model_config: dict, masked=False,
          layout=torch.contiguous_format, best=None, layer_decay=1.0, no_decay=(), mask_ratio=0.0, **inputs):  # fmt: skip
    """Train a model on a split in --output_dir: plan, run directory, stores, loop, metrics. The one path of all trainings.

    size: images of a nominal epoch; validation(run) makes the object that scores (see Trainer.fit), with `finish()` ->
    further metrics; masked: with trimaps; inputs: what else defines the experiment, beside flags and images.
    """
    epoch_steps = size // args.batch_size
    if not epoch_steps:
        raise EngineError(
            f"--batch_size {args.batch_size} is larger than the split's {size} images; use at most {size}"
        )
    if masked:  # equal updates with few labels: whole epochs are counted in updates, batches may be smaller
        args.batch_size = min(args.batch_size, len(split.images))
    lr, groups = args.blr * args.batch_size / 256, engine.param_groups(model, args.weight_decay, layer_decay, no_decay)
    if args.min_lr > lr:
        raise EngineError(f"--min_lr {args.min_lr} is above the rate {lr:.3g} that --blr and --batch_size give")
    augment.share_of_batch(args.batch_size, dist.world_size, args.micro_batch_size, len(split.images))
    config = describe_run(kind, args, dist, precision, model, flops, epoch_steps, split, inputs)
    plan = functools.partial(print_plan, config, model, lr, mask_ratio, groups if args.dry_run else ())
    if args.dry_run:
        return plan() if dist.is_main else None
    run = Run(args.output_dir, dist, config, args.resume, state_bytes=config["params"] * (16 if best else 12))
    if run.finished:
        return print(f"{run.dir} is finished; nothing to do (--resume never starts over)") if dist.is_main else None
    if dist.is_main:
        plan()
    images = open_store(args, dist, split.images)
    masks = open_store(args, dist, images.images, "trimap") if masked else None
    batches = augment.TrainBatches(
        images, masks, img_size=args.img_size, batch_size=args.batch_size, seed=args.seed, rank=dist.rank,
        world_size=dist.world_size, micro_batch_size=args.micro_batch_size, device=dist.device, **batch_options,
    )  # fmt: skip
    model.to(dist.device, memory_format=layout)
    trainer = Trainer(run, model, forward, batches, groups, args=args, dist=dist, precision=precision, lr=lr, betas=betas,
                      epoch_steps=epoch_steps, flops=flops, best=best)  # fmt: skip
    validate = validation(run)
    metrics = trainer.fit(validate) | validate.finish()
    metrics |= {"kind": kind, "hardware": config["hardware"], "n_train": len(images), "n_unique": split.unique}
    run.log("done", **{k: v for k, v in metrics.items() if k in ("best", "last", "predict_zero", "updates", "seconds")})
    weights = {"model": trainer.weights, "model_config": {"img_size": args.img_size, **model_config}}
    run.finish(weights, metrics | {"unreadable": images.dropped})


def describe_run(kind: str, args, dist: Distributed, precision: Precision, model: nn.Module, flops: float, epoch_steps: int,
                 split: splits.Split, inputs: dict) -> dict:  # fmt: skip
    """Collect config.json; `experiment` is what defines the result: flags that matter, hashes of lists and checkpoints."""
    title = Path(args.data_root, "DATASET.txt")
    title = title.read_text().splitlines()[0] if title.exists() else "MS COCO 2017 and Oxford-IIIT Pet"
    experiment = {k: v for k, v in sorted(vars(args).items()) if k not in FREE_ARGUMENTS}
    return {
        "kind": kind, "args": vars(args), "experiment": {**experiment, "train": split.sha256, **inputs},
        **engine.describe_environment(dist, precision), "params": sum(p.numel() for p in model.parameters()),
        "flops_per_image": flops, "updates": args.epochs * epoch_steps, "epoch_updates": epoch_steps,
        "batch_size": args.batch_size, "n_train": len(split.images), "n_unique": split.unique,
        "manifest": {"train": {k: v for k, v in split.manifest.items() if not isinstance(v, list)}},
        "data": {"root": str(args.data_root), "title": title},
    }  # fmt: skip


def print_plan(c: dict, model: nn.Module, lr: float, mask_ratio: float, groups: list[dict]) -> None:
    """Say what is about to run, from config.json's content; with --dry_run also every parameter group."""
    args, hardware = c["args"], c["hardware"]
    cost = f"{c['flops_per_image'] / 1e9:.2f} GFLOP per training image"
    print(f"{c['kind']}: {args['model']}, {c['params']:,} parameters, {cost}")
    where = f"on {hardware['device']} x {hardware['world_size']}, {c['precision']}"
    print(f"{where}, torch {torch.__version__}, git {c['git']}")
    print(f"data: {c['n_train']:,} list entries, {c['n_unique']:,} unique images of {c['data']['title']}")
    plan = f"plan: {c['updates']:,} updates of {c['batch_size']} images, {args['epochs']} epochs, lr {lr:.3g}"
    memory = expected_memory(model, c, mask_ratio)
    print(f"{plan}, about {memory:.1f} GB of memory per process" if memory else plan, flush=True)
    for group in groups:
        rate, names = f"lr {lr * group['lr_scale']:.3e} (x {group['lr_scale']:.4f})", group["names"]
        print(f"  {rate}  weight_decay {group['weight_decay']:g}  {len(names)} tensors: {names[0]} ...")


def expected_memory(model: nn.Module, config: dict, mask_ratio: float) -> float | None:
    """Estimate the memory of training in GB: 16 bytes a parameter (weight, gradient, two moments) and activations.

    A pre-norm block keeps about 17 values per token and feature for the backward pass (Korthikanti et al. 2022).
    """
    if not hasattr(model, "blocks"):
        return None
    decoder = getattr(model, "decoder_blocks", ())
    tokens = {model.blocks: model.num_visible(mask_ratio) + 1, decoder: model.num_patches + 1}
    kept = sum(17 * n * block.norm1.weight.numel() for blocks, n in tokens.items() for block in blocks)
    images = config["args"]["micro_batch_size"] or config["batch_size"] // config["hardware"]["world_size"]
    return (16 * config["params"] + images * kept * (4 if config["precision"] == "fp32" else 2)) / 1e9
