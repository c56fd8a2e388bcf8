"""The training loop that pre-training and every fine-tuned arm share, and the flags that go with it.

One step: take the micro-batches, accumulate gradients, reduce them once, step the optimizer. Nothing inside a step waits
for the device. At synchronisation points (log lines, validation, every few seconds) all processes exchange stop requests,
a due checkpoint and the first non-finite step, so no process ever acts alone.
"""

from __future__ import annotations

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

import data
import splits
from engine import Distributed, EngineError, Precision, Progress, Run, describe_environment, lr_at, peak_flops
from weights import load_pretrained

# Flags that change how a result is computed, not which result it is: they may differ when a run is continued.
FREE_ARGUMENTS = {
    "data_root", "cache_dir", "cache_device", "output_dir", "device", "precision", "compile", "micro_batch_size", "resume",
    "save_minutes", "log_every", "figure_every", "dry_run", "init",
}  # fmt: skip


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
    add("--dry_run", action="store_true", help="print the plan of the run and leave; nothing is written")
# fmt: on


def check_training_arguments(args: argparse.Namespace) -> None:
    """Refuse values that no run can use, before anything is read or written."""
    positive = ("epochs", "batch_size", "img_size", "cache_size", "log_every", "micro_batch_size")
    for name in positive:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise EngineError(f"--{name} must be at least 1, got {value}")
    for name in ("weight_decay", "warmup_epochs", "min_lr", "clip_grad", "save_minutes", "blr", "lr"):
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise EngineError(f"--{name} must be a number of at least 0, got {value}")
    for name in ("seed", "split_seed"):
        if getattr(args, name) < 0:
            raise EngineError(f"--{name} must be at least 0, got {getattr(args, name)}")


class Trainer:
    """Trains `model` for total_steps updates inside a `Run`, from its last checkpoint if it has one.

    Args:
        args: the flags of `add_training_arguments`.
        forward: forward(network, micro_batch) -> scalar loss, called under autocast; network wraps model (compile, DDP).
        batches: `run(first_step, last_step)` yields a list of micro-batches per step, as a function of the step alone.
        groups: parameter groups with `lr_scale` (see engine.param_groups).
        epoch_steps: updates per nominal epoch; validation runs at its end.
        best: name of the validation score whose highest value selects the weights to keep; None keeps the last.
    """

    def __init__(self, run: Run, model: nn.Module, forward, batches, groups: list[dict], *, args, dist: Distributed,
                 precision: Precision, lr: float, betas: tuple, epoch_steps: int, flops: float, best=None):  # fmt: skip
        self.run, self.model, self.forward, self.batches, self.args = run, model, forward, batches, args
        self.dist, self.precision, self.lr, self.flops, self.best_key = dist, precision, lr, flops, best
        self.epoch_steps, self.total_steps = epoch_steps, args.epochs * epoch_steps
        self.batch_size, self.log_every, self.save_seconds = args.batch_size, args.log_every, 60 * args.save_minutes
        self.params = [p for g in groups for p in g["params"]]
        groups = [{k: v for k, v in g.items() if k != "names"} for g in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        self.network = model
        if args.compile or (args.compile is None and dist.device.type == "cuda"):
            self.network = torch.compile(model, dynamic=False)
        if dist.world_size > 1:
            ids = [dist.device] if dist.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
        self.step, self.seconds, self.best, self.last_val, self.rates = 0, 0.0, None, None, []
        # Since the last log line: sum of losses, steps, skipped steps; and the first step with a non-finite loss.
        self.meter = torch.zeros(3, device=dist.device)
        self.bad_step = torch.full((), math.inf, device=dist.device)
        self.stop_signal = 0

    # -- one step ----------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[dict], want_norm: bool) -> torch.Tensor | None:
        """Do one update; returns the gradient norm (a device scalar) if it was needed."""
        lr = self._lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler, loss_sum = self.precision.scaler, 0.0
        for i, batch in enumerate(micro_batches):
            accumulating = i + 1 < len(micro_batches) and self.dist.world_size > 1
            with self.network.no_sync() if accumulating else contextlib.nullcontext():
                with self.precision.autocast():
                    loss = self.forward(self.network, batch) / len(micro_batches)
                scaler.scale(loss).backward()
            loss_sum = loss_sum + loss.detach()
        norm = None
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

    # -- the loop ----------------------------------------------------------------------------------------------------

    def fit(self, validate) -> dict:
        """Train to total_steps; validate(step) -> dict of scores is called on every process after each nominal epoch.

        Returns the metrics of the run; writes log lines and checkpoints on the way. A stop signal writes a checkpoint
        and raises EngineError with the exit code 128 + signal; a non-finite loss raises EngineError.
        """
        self._resume()
        self._handle_signals()
        self.started = self.window = self.saved_at = time.monotonic()
        self.seconds_before, self.images, self.next_sync, self.note = self.seconds, 0, self.step + 1, ""
        done, total = self.step * self.batch_size, self.total_steps * self.batch_size
        steps = self.batches.run(self.step, self.total_steps)
        with Progress("training", total, initial=done, quiet=not self.dist.is_main) as bar, contextlib.closing(steps):
            for micro_batches in steps:
                last = self.step + 1 == self.total_steps
                log_due = last or (self.step + 1) % self.log_every == 0
                val_due = last or (self.step + 1) % self.epoch_steps == 0
                norm = self.train_step(micro_batches, want_norm=log_due)
                self.images += self.batch_size
                if log_due or val_due or self.step >= self.next_sync:
                    self._synchronise(norm if log_due else None, validate if val_due else None)
                bar.update(self.batch_size, self.note)
        return self._metrics()

    def _synchronise(self, norm: torch.Tensor | None, validate) -> None:
        """Act together: stop on a non-finite loss, log, validate, checkpoint, leave. One exchange decides for all."""
        now = time.monotonic()
        save_due = self.dist.is_main and now - self.saved_at >= self.save_seconds
        pace = (now - self.window) / self.images  # seconds per image
        rows = self.dist.gather([self.stop_signal, save_due, self.bad_step.item(), pace, self.meter[0].item()])
        stop, save, first_bad = int(rows[:, 0].max()), bool(rows[0, 1]), rows[:, 2].min().item()
        if math.isfinite(first_bad):
            self._refuse_non_finite(int(first_bad))
        # Slow machines look up from their work often enough to obey a stop request within seconds.
        step_seconds = rows[:, 3].max().item() * self.batch_size
        self.next_sync = self.step + max(1, min(self.log_every, int(2.0 / max(step_seconds, 1e-6))))
        self.loss_sums = rows[:, 4].tolist()  # of every process: a checkpoint between two log lines holds them all
        self.seconds = self.seconds_before + now - self.started
        if norm is not None:
            self._log_line(norm, 1 / pace)
            self.window, self.images = time.monotonic(), 0
        pause = time.monotonic()
        if validate is not None:
            self._validate(validate)
        self.seconds = self.seconds_before + time.monotonic() - self.started
        if self.step < self.total_steps and (stop or (save and (self.save_seconds or validate is not None))):
            self._save()
        if stop and self.step < self.total_steps:
            self._leave(stop)
        self.window += time.monotonic() - pause  # rates are of training alone

    def _refuse_non_finite(self, step: int) -> None:
        kept = "the last checkpoint is intact" if (self.run.dir / "last.pt").exists() else "no checkpoint was due yet"
        advice = "try a lower rate (--blr), --clip_grad 1 or --precision fp32"
        found = f"the loss became non-finite at step {step} (lr {self._lr(step - 1):.3g})"
        raise EngineError(f"{found}; {kept} in {self.run.dir}; {advice}", 1)

    def _lr(self, step: int) -> float:
        warmup = round(self.args.warmup_epochs * self.epoch_steps)
        return lr_at(step, self.total_steps, warmup, self.lr, self.args.min_lr)

    def _mfu(self, img_s: float | None) -> float | None:
        peak = peak_flops(self.dist.device, self.precision.name)
        return img_s * self.flops / (peak * self.dist.world_size) if peak and img_s and self.flops else None

    def _memory(self) -> float | None:
        gpu = self.dist.device.type == "cuda"
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None

    def _log_line(self, norm: torch.Tensor, img_s: float) -> None:
        steps, skipped = int(self.meter[1].item()), int(self.meter[2].item())
        loss, lr, mfu = statistics.fmean(self.loss_sums) / steps, self._lr(self.step - 1), self._mfu(img_s)
        more = {"skipped": skipped} if self.precision.scaler.is_enabled() else {}
        more |= {"img_s": round(img_s, 1), "mfu": mfu, "mem_gb": self._memory(), "seconds": round(self.seconds, 2)}
        grad_norm = norm.item() if torch.isfinite(norm) else None
        self.run.log(
            "train", step=self.step, epoch=self.step / self.epoch_steps, loss=loss, lr=lr, grad_norm=grad_norm, **more
        )
        self.rates.append(img_s)
        self.meter.zero_()
        self.note = f"loss {loss:.4f}, lr {lr:.2e}" + (f", MFU {100 * mfu:.1f} %" if mfu else "")

    def _validate(self, validate) -> None:
        if self.dist.world_size > 1:  # BatchNorm statistics of the first process, as in its checkpoint
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        self.model.eval()
        with torch.no_grad(), self.precision.autocast():
            scores = validate(self.step)
        self.model.train()
        self.last_val = {"step": self.step, "epoch": self.step / self.epoch_steps, **scores}
        self.run.log("val", **self.last_val, seconds=round(self.seconds, 2))
        if self.best_key and (self.best is None or scores[self.best_key] > self.best["scores"][self.best_key]):
            self.best = {
                "scores": self.last_val,
                "model": {k: v.detach().clone() for k, v in self.model.state_dict().items()},
            }
        if self.dist.is_main:
            print(
                "  ".join([f"epoch {self.last_val['epoch']:g}", *(f"{k} {v:.4f}" for k, v in scores.items())]),
                flush=True,
            )

    # -- interruption and state --------------------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        def request(number, frame):
            if self.stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt  # the second Ctrl-C does not wait for a checkpoint
            self.stop_signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, request)

    def _leave(self, number: int) -> None:
        where = f"checkpoint written at step {self.step} of {self.total_steps} in {self.run.dir}"
        raise EngineError(f"{signal.Signals(number).name}; {where}; the same command continues the run", 128 + number)

    def _save(self) -> None:
        scaler = self.precision.scaler.state_dict()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": scaler}
        names = ("step", "seconds", "best", "last_val", "loss_sums")
        state |= {name: getattr(self, name) for name in names} | {"meter": self.meter, "rates": self.rates[-1000:]}
        self.run.save(state)
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        state = self.run.load()
        if state is None:
            self.run.log("config", **self.run.config)
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(state["scaler"])
        for name in ("step", "seconds", "last_val", "rates", "best"):
            setattr(self, name, state[name])
        self.meter.copy_(state["meter"])
        sums = state["loss_sums"]
        same = len(sums) == self.dist.world_size
        if self.meter[1]:  # interrupted between two log lines
            self.meter[0] = sums[self.dist.rank] if same else statistics.fmean(sums)
        if self.dist.is_main:
            print(f"resumed {self.run.dir} at step {self.step} of {self.total_steps}", flush=True)

    def _metrics(self) -> dict:
        rate = statistics.median(self.rates) if self.rates else None
        metrics = {"best": self.best["scores"]} if self.best else {}
        metrics |= {"last": self.last_val, "seconds": round(self.seconds, 2), "img_s": rate, "mfu": self._mfu(rate)}
        return metrics | {
            "mem_gb": self._memory(),
            "updates": self.total_steps,
            "epochs": self.total_steps / self.epoch_steps,
        }

    @property
    def weights(self) -> dict:
        """The weights to keep: those of the best validation score, or the last."""
        return self.best["model"] if self.best else self.model.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# What every training script does before its loop


def init_model(model: nn.Module, path: str | None, dist: Distributed) -> str | None:
    """Load pre-trained weights into a model and report it; returns the file's SHA-256, which defines the experiment."""
    if path is None:
        return None
    report = load_pretrained(model, path)
    if dist.is_main:
        print(f"init: {report}", flush=True)
    return hash_file(path)


def hash_file(path: str) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def open_store(
    args: argparse.Namespace, dist: Distributed, images, kind: str, size: int | None = None
) -> data.ImageStore:
    """Build the decoded cache of these images where it is missing, and open it, on the GPU if it fits."""
    size = size or args.cache_size
    progress = functools.partial(Progress, quiet=not dist.is_main)
    data.build_cache(args.data_root, images, kind=kind, cache_dir=args.cache_dir, cache_size=size, progress=progress)
    needed = len(set(images)) * size**2 * (3 if kind == "image" else 1)
    on_gpu = dist.device.type == "cuda" and args.cache_device != "cpu"
    if on_gpu and args.cache_device == "auto":  # leave half of what is free to the network
        on_gpu = needed < 0.5 * torch.cuda.mem_get_info(dist.device)[0]
    store = data.ImageStore(args.data_root, images, kind=kind, cache_dir=args.cache_dir, cache_size=size,
                            device=dist.device, on_device=on_gpu)  # fmt: skip
    if not len(store):
        raise EngineError(
            f"none of the {len(images)} images of this split can be read; `python prepare.py verify` names the cause"
        )
    return store


def plan_run(kind: str, args, dist: Distributed, precision: Precision, model: nn.Module, groups: list[dict], *, lr: float,
             flops: float, epoch_steps: int, train: splits.Split, mask_ratio: float = 0.0, **inputs) -> dict:  # fmt: skip
    """Say what is about to run, and return the content of config.json; --dry_run also prints every parameter group.

    `experiment` in it is all that defines the result: the flags that matter and `inputs`, hashes of lists and checkpoints.
    """
    title = Path(args.data_root, "DATASET.txt")
    title = title.read_text().splitlines()[0] if title.exists() else "MS COCO 2017 and Oxford-IIIT Pet"
    experiment = {k: v for k, v in sorted(vars(args).items()) if k not in FREE_ARGUMENTS}
    config = {
        "kind": kind, "args": vars(args), "experiment": {**experiment, "train": train.sha256, **inputs},
        **describe_environment(dist, precision), "params": sum(p.numel() for p in model.parameters()),
        "flops_per_image": flops, "updates": args.epochs * epoch_steps, "epoch_updates": epoch_steps,
        "batch_size": args.batch_size, "n_train": len(train.images), "n_unique": train.unique,
        "manifest": {"train": {k: v for k, v in train.manifest.items() if not isinstance(v, list)}},
        "data": {"root": str(args.data_root), "title": title},
    }  # fmt: skip
    if not dist.is_main:
        return config
    device, versions, memory = (
        config["hardware"]["device"],
        config["versions"],
        expected_memory(model, config, mask_ratio),
    )
    print(f"{kind}: {args.model}, {config['params']:,} parameters, {flops / 1e9:.2f} GFLOP per training image")
    print(f"on {device} x {dist.world_size}, {precision.name}, torch {versions['torch']}, git {config['git']}")
    print(f"data: {len(train.images):,} list entries, {train.unique:,} unique images of {title}")
    plan = f"plan: {config['updates']:,} updates of {args.batch_size} images, {args.epochs} epochs, lr {lr:.3g}"
    print(f"{plan}, about {memory:.1f} GB of memory per process" if memory else plan, flush=True)
    for group in groups if args.dry_run else ():
        rate, count, first = group["lr_scale"], len(group["names"]), group["names"][0]
        print(
            f"  lr {lr * rate:.3e} (x {rate:.4f})  weight_decay {group['weight_decay']:g}  {count} tensors: {first} ..."
        )
    return config


def expected_memory(model: nn.Module, config: dict, mask_ratio: float) -> float | None:
    """Estimate the memory of training in GB: 16 bytes a parameter (weight, gradient, two moments) and activations.

    A pre-norm block keeps about 17 values per token and feature for the backward pass (Korthikanti et al. 2022, with
    fused attention).
    """
    if not hasattr(model, "blocks"):
        return None
    encoder, decoder = model.num_visible(mask_ratio) + 1, model.num_patches + 1
    kept = sum(17 * encoder * b.norm1.weight.numel() for b in model.blocks)
    kept += sum(17 * decoder * b.norm1.weight.numel() for b in getattr(model, "decoder_blocks", ()))
    images = config["args"]["micro_batch_size"] or config["batch_size"] // config["hardware"]["world_size"]
    return (16 * config["params"] + images * kept * (4 if config["precision"] == "fp32" else 2)) / 1e9
