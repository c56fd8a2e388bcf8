"""The training loop of every objective and task, and the flags that go with it.

One step: take the micro-batches, accumulate gradients, reduce them once, step the optimizer. Nothing inside a step waits
for the device. At synchronisation points (log lines, validation, every few seconds) all processes exchange stop requests,
a due checkpoint and the first non-finite step, so no process ever acts alone.
"""

import argparse
import contextlib
import math
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import engine
from batches import TrainBatches, share_of_batch
from cuda_graph import RecordedBackward
from curves import Curves, SwitchOn
from engine import Distributed, EngineError, Parser, Precision, Progress, at_least, seed_number
from objective import Objective, ScoringNetwork, image_root
from runs import RunFolder

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
LOOK_UP_SECONDS = 2.0  # how often, at least, the processes look up from their work
KEPT_RATES = 1000  # rates that a checkpoint remembers for their median


def add_training_arguments(
    parser: Parser,
    *,
    output_dir: str,
    epochs: int,
    batch_size: int,
    warmup_epochs: float,
    min_lr: float,
    val_epochs: int = 1,
) -> None:
    """Add the flags that all training scripts have; the keyword arguments are the defaults of one script."""
    how = parser.flags("data", role="computation")
    how("--data_root", default="data", help="folder with coco/ and oxford-iiit-pet/ (see prepare.py)")
    how("--cache_dir", default="cache", help="folder of the decoded images; put it on a fast disk")
    how("--cache_device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: images on the GPU if they fit")
    recipe = parser.flags("data", role="recipe")
    recipe(
        "--cache_size",
        type=at_least(1, int, engine.LARGEST_SIZE),
        default=384,
        help="side of decoded images in pixels; smaller saves memory, blurs crops",
    )
    recipe(
        "--img_size",
        type=at_least(1, int, engine.LARGEST_SIZE),
        default=224,
        help="input size in pixels, divisible by the patch size",
    )
    seed = parser.flags("data", role="seed")
    seed(
        "--split_seed", type=seed_number, default=0, help="seed of the image selection (COCO draw, part of the labels)"
    )

    recipe = parser.flags("optimisation", role="recipe")
    recipe("--epochs", type=at_least(1, int), default=epochs, help="passes over the data")
    recipe(
        "--epoch_updates",
        type=at_least(1, int),
        help="updates that count as an epoch, for the schedule and between validations (default: one pass over the "
        "data); few images need it to train long enough",
    )
    recipe(
        "--val_epochs",
        type=at_least(1, int),
        default=val_epochs,
        help="epochs between validations; the last epoch is always validated",
    )
    recipe(
        "--batch_size",
        type=at_least(1, int),
        default=batch_size,
        help="images per update, all GPUs and micro-batches together",
    )
    recipe(
        "--optimizer",
        choices=list(OPTIMIZERS),
        default="adamw",
        help="adam: as the original code trains ResNet-50; weight decay is then added to the gradient",
    )
    recipe("--weight_decay", type=at_least(0), default=0.05, help="AdamW's decay; norms and biases are exempt")
    recipe(
        "--lr_schedule",
        choices=["cosine", "constant"],
        default="cosine",
        help="after the warm-up: half a cosine down to --min_lr, or no change",
    )
    recipe(
        "--warmup_epochs", type=at_least(0), default=warmup_epochs, help="epochs of linear warm-up before the cosine"
    )
    recipe("--min_lr", type=at_least(0), default=min_lr, help="rate at the end of the cosine")
    recipe("--clip_grad", type=at_least(0), help="clip the gradient norm to this value; try 1 if the loss jumps")
    seed = parser.flags("optimisation", role="seed")
    seed("--seed", type=seed_number, default=0, help="seed of weights, order, augmentation, masks and drop path")

    how = parser.flags("system", role="computation")
    how(
        "--micro_batch_size",
        type=at_least(1, int),
        help="images per GPU at a time; lower it to save memory, results stay",
    )
    how("--output_dir", default=output_dir, help="folder of this run; an interrupted run in it is continued")
    how("--resume", choices=["auto", "never"], default="auto", help="never: start over in --output_dir")
    how("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    how("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: bf16 or fp16 on GPUs")
    how("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network (default: on GPUs)")
    how(
        "--cuda_graph",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="record forward and backward pass once and replay them, for hosts that launch kernels more slowly than "
        "the GPU runs them; one GPU, no accumulation, objectives that allow it",
    )
    how(
        "--save_minutes", type=at_least(0), default=5, help="minutes between checkpoints; 0: one after every validation"
    )
    how("--log_every", type=at_least(1, int), default=50, help="steps between lines of log.jsonl")
    how(
        "--tensorboard",
        action=SwitchOn,
        help="write the lines of log.jsonl as TensorBoard curves too, for `tensorboard --logdir runs`; may be given when "
        "a run is continued",
    )
    how("--dry_run", action="store_true", help="print the plan of the run and leave")


def add_task_training_arguments(parser: Parser, output_dir: str) -> None:
    """Add the flags of trainings on a downstream task, whose schedule is one for checkpoints and baselines."""
    add_training_arguments(
        parser,
        output_dir=output_dir,
        epochs=100,
        batch_size=64,
        warmup_epochs=5,
        min_lr=1e-6,
        val_epochs=3,  # after every epoch, validation would cost 7 % of the training
    )


@dataclass(frozen=True)
class Plan:
    """How many updates a run makes, and at which rates."""

    epoch_steps: int  # updates of a nominal epoch
    val_steps: int  # updates between validations
    total_steps: int
    warmup_steps: int
    batch_size: int
    lr: float
    min_lr: float
    lr_schedule: str
    groups: list[dict]  # see engine.param_groups
    weight_decays: tuple[float, float] | None = None  # at the start and at the end; None: it does not change

    def weight_decay_at(self, step: int) -> float | None:
        """Weight decay of a step (0-based): half a cosine from the first to the last; None if it does not change."""
        if self.weight_decays is None:
            return None
        start, end = self.weight_decays
        return end + (start - end) * (1 + math.cos(math.pi * step / self.total_steps)) / 2

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        if self.lr_schedule == "constant" and step >= self.warmup_steps:
            return self.lr
        return engine.lr_at(step, self.total_steps, self.warmup_steps, self.lr, self.min_lr)


def plan_run(objective: Objective, args: argparse.Namespace, dist: Distributed) -> Plan:
    """Plan the updates of an objective; EngineError or DataError if batch, images and rates do not fit together."""
    epoch_steps = args.epoch_updates or objective.epoch_images // args.batch_size
    if epoch_steps == 0:
        problem = f"--batch_size {args.batch_size} is larger than the split's {objective.epoch_images} images"
        raise EngineError(f"{problem}; use at most {objective.epoch_images}")
    lr = args.blr * objective.batch_size / 256
    if args.lr_schedule == "cosine" and args.min_lr > lr:
        raise EngineError(f"--min_lr {args.min_lr} is above the rate {lr:.3g} that --blr and --batch_size give")
    weight_decays = None
    if getattr(args, "weight_decay_end", None) is not None:
        weight_decays = (args.weight_decay, args.weight_decay_end)
        if weight_decays == (0, 0):
            weight_decays = None
        elif args.weight_decay == 0:
            problem = f"--weight_decay 0 cannot grow to --weight_decay_end {args.weight_decay_end:g}"
            raise EngineError(f"{problem}; begin above 0, say at 0.04, or give --weight_decay_end 0 too")
    images = len(objective.split.images)
    share_of_batch(objective.batch_size, dist.world_size, args.micro_batch_size, images)
    return Plan(
        epoch_steps=epoch_steps,
        val_steps=args.val_epochs * epoch_steps,
        total_steps=args.epochs * epoch_steps,
        warmup_steps=round(args.warmup_epochs * epoch_steps),
        batch_size=objective.batch_size,
        lr=lr,
        min_lr=args.min_lr,
        lr_schedule=args.lr_schedule,
        groups=objective.parameter_groups(),
        weight_decays=weight_decays,
    )


@dataclass
class TrainState:
    """Where a training stands, apart from network and optimizer; saves and loads itself."""

    step: int = 0  # updates made
    seconds: float = 0.0  # of training and validation, over all resumes
    best: dict | None = None  # scores and network of the best validation
    last_val: dict | None = None  # step, epoch and scores of the last validation
    rates: list[float] = field(default_factory=list)  # images per second of each log line
    # Since the last log line, for each process: the sum of its losses. All processes have made the same steps.
    loss_sums: list[float] = field(default_factory=lambda: [0.0])
    steps_since_log: int = 0
    skipped_since_log: int = 0

    def state_dict(self) -> dict:
        state = {item.name: getattr(self, item.name) for item in fields(self)}
        state["rates"] = self.rates[-KEPT_RATES:]
        return state

    def load_state_dict(self, state: dict) -> None:
        for item in fields(self):
            setattr(self, item.name, state[item.name])

    def loss_sum_of(self, dist: Distributed) -> float:
        """Give this process its sum of losses, also when the number of processes has changed since."""
        if len(self.loss_sums) == dist.world_size:
            return self.loss_sums[dist.rank]
        return statistics.fmean(self.loss_sums)


class Meter:
    """Sums on the device since the last log line, read only at synchronisation points."""

    def __init__(self, device: torch.device):
        self.losses = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.first_bad_step = torch.full((), math.inf, device=device)  # the first step whose loss is not finite
        self.steps = 0

    def add(self, loss: Tensor, step: int) -> None:
        """Count the loss of a step (from 1)."""
        bad = ~torch.isfinite(loss)
        is_first = bad & torch.isinf(self.first_bad_step)
        self.first_bad_step = torch.where(is_first, float(step), self.first_bad_step)
        self.losses += loss
        self.steps += 1

    def restore(self, state: TrainState, dist: Distributed) -> None:
        """Continue the sums of a checkpoint that was written between two log lines."""
        self.losses.fill_(state.loss_sum_of(dist))
        self.skipped.fill_(state.skipped_since_log)
        self.steps = state.steps_since_log

    def reset(self) -> None:
        self.losses.zero_()
        self.skipped.zero_()
        self.steps = 0


class Clock:
    """Seconds of the run over all resumes, and the rate of training alone since the last log line."""

    def __init__(self, seconds_before: float = 0.0):
        now = time.monotonic()
        self.origin = now - seconds_before
        self.window = now
        self.images = 0
        self.saved_at = now

    def seconds(self) -> float:
        """Give the seconds of the run so far."""
        return time.monotonic() - self.origin

    def seconds_per_image(self) -> float:
        """Give the pace of training since the last log line."""
        return (time.monotonic() - self.window) / self.images

    def start_window(self) -> None:
        """Begin to measure the rate of the next log line."""
        self.window = time.monotonic()
        self.images = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the rate."""
        start = time.monotonic()
        yield
        self.window += time.monotonic() - start


class Trainer:
    """Trains an objective's network inside a run folder, from its last checkpoint if it has one.

    batches.run(first_step, last_step) yields a list of micro-batches per step, as a function of the step alone.
    """

    def __init__(
        self,
        objective: Objective,
        plan: Plan,
        run: RunFolder,
        batches: TrainBatches,
        precision: Precision,
        args: argparse.Namespace,
        dist: Distributed,
    ):
        self.objective = objective
        self.model = objective.model
        self.plan = plan
        self.run = run
        self.batches = batches
        self.precision = precision
        self.args = args
        self.dist = dist
        self.flops = objective.flops()
        self.params = [p for group in plan.groups for p in group["params"]]
        self.optimizer = self._make_optimizer()
        compiled = self.model
        if self._compiles():
            compiled = torch.compile(self.model, dynamic=False)
            objective.compile_others()
        self.network = self._distribute(compiled)
        self.recorded = None
        if self._wants_graph():
            self.recorded = RecordedBackward(self._backward, self.model)
        if compiled is not self.model:
            objective.compiled = ScoringNetwork(self.model, compiled)
        self.state = TrainState()
        self.meter = Meter(dist.device)
        self.clock = Clock()
        self.next_look = 1  # the step at which the processes look up at the latest
        self.note = ""  # shown beside the progress
        self.stop_signal = 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = []
        for group in self.plan.groups:
            groups.append({key: value for key, value in group.items() if key != "names"})
        make = OPTIMIZERS[self.args.optimizer]
        if not self._compiles():
            make = engine.without_compiler(make)
        return make(groups, lr=self.plan.lr, betas=self.objective.betas, fused=True)

    def _compiles(self) -> bool:
        """Tell whether the network is compiled: as --compile says, by default on GPUs."""
        if self.args.compile is None:
            return self.dist.device.type == "cuda"
        return self.args.compile

    def _distribute(self, network: nn.Module) -> nn.Module:
        """Let DistributedDataParallel average the gradients of several processes."""
        if self.dist.world_size == 1:
            return network
        ids = [self.dist.device] if self.dist.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)

    def _wants_graph(self) -> bool:
        """Tell whether forward and backward pass are recorded as a CUDA graph."""
        one_gpu = self.dist.device.type == "cuda" and self.dist.world_size == 1
        return self.args.cuda_graph and one_gpu and self.batches.micro_batches == 1 and self.objective.recordable

    # -- one update ---------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[dict[str, Tensor]], want_norm: bool) -> Tensor | None:
        """Do one update; gives the gradient norm (a device scalar) if it was needed."""
        self._set_rates()
        loss = self._accumulate(micro_batches)
        norm = self._step_optimizer(want_norm)
        self.state.step += 1
        self.meter.add(loss, self.state.step)
        self.objective.after_step(self.state.step, self.plan.total_steps)
        return norm

    def _set_rates(self) -> None:
        lr = self.plan.lr_at(self.state.step)
        weight_decay = self.plan.weight_decay_at(self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if weight_decay is not None and group["weight_decay"] > 0:
                group["weight_decay"] = weight_decay

    def _accumulate(self, micro_batches: list[dict[str, Tensor]]) -> Tensor:
        """Add the gradients of all micro-batches up; gives their mean loss."""
        if self.recorded is not None:
            (batch,) = micro_batches
            return self.recorded(batch)
        loss_sum = 0.0
        for number, batch in enumerate(micro_batches, start=1):
            with self._gradients_reduced(last=number == len(micro_batches)):
                loss = self._backward(batch, len(micro_batches))
            loss_sum = loss_sum + loss.detach()
        return loss_sum

    def _backward(self, batch: dict[str, Tensor], parts: int = 1) -> Tensor:
        """Add the gradients of a micro-batch, one of `parts`, to those that are there; gives its share of the loss."""
        with self.precision.autocast():
            loss = self.objective.loss(self.network, batch) / parts
        self.precision.scaler.scale(loss).backward()
        return loss

    def _gradients_reduced(self, last: bool) -> contextlib.AbstractContextManager:
        """Context of a backward pass: processes exchange gradients after the last micro-batch only."""
        if last or self.dist.world_size == 1:
            return contextlib.nullcontext()
        return self.network.no_sync()

    def _step_optimizer(self, want_norm: bool) -> Tensor | None:
        """Clip, step and clear the gradients."""
        scaler = self.precision.scaler
        norm = None
        if want_norm or self.args.clip_grad or scaler.is_enabled():
            scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.params, self.args.clip_grad or math.inf)
        scaler.step(self.optimizer)
        scaler.update()
        if self.recorded is None:  # a recorded pass replaces the gradients itself
            self.optimizer.zero_grad(set_to_none=True)
        if scaler.is_enabled():  # fp16: a step whose gradients overflowed was skipped by the scaler
            self.meter.skipped += ~torch.isfinite(norm)
        return norm

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> dict:
        """Train to the last step of the plan; gives the metrics of the run and writes log lines and checkpoints.

        A stop signal writes a checkpoint and raises EngineError with the exit code 128 + signal; a non-finite loss raises
        EngineError.
        """
        self._resume()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request_stop)
        self.clock = Clock(self.state.seconds)
        self.next_look = self.state.step + 1
        size = self.plan.batch_size
        total = self.plan.total_steps * size
        steps = self.batches.run(self.state.step, self.plan.total_steps)
        bar = Progress("training", total, initial=self.state.step * size, quiet=not self.dist.is_main)
        with bar, contextlib.closing(steps):
            if self._validation_was_interrupted():
                self._validate()
                self.clock.start_window()
            for micro_batches in steps:
                self._advance(micro_batches)
                bar.update(size, self.note)
        return self._metrics()

    def _advance(self, micro_batches: list[dict[str, Tensor]]) -> None:
        """Do one update and what is due after it."""
        number = self.state.step + 1
        is_last = number == self.plan.total_steps
        log_due = is_last or number % self.args.log_every == 0
        val_due = is_last or number % self.plan.val_steps == 0
        norm = self.train_step(micro_batches, want_norm=log_due)
        self.clock.images += self.plan.batch_size
        if log_due or val_due or self.state.step >= self.next_look:
            self._synchronise(norm if log_due else None, val_due)

    def _validation_was_interrupted(self) -> bool:
        """Tell whether a stop request broke off the validation that belongs to this step."""
        step = self.state.step
        if step == 0 or step % self.plan.val_steps != 0:
            return False
        return self.state.last_val is None or self.state.last_val["step"] != step

    def _metrics(self) -> dict:
        rate = statistics.median(self.state.rates) if self.state.rates else None
        metrics = {
            "last": self.state.last_val,
            "seconds": round(self.state.seconds, 2),
            "img_s": rate,
            "mfu": self._mfu(rate),
            "mem_gb": self._memory(),
            "updates": self.plan.total_steps,
            "epochs": self.args.epochs,
        }
        if self.state.best:
            metrics["best"] = self.state.best["scores"]
        return metrics

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to keep: those of the best validation score, or the last."""
        if self.state.best and self.objective.keep_best:
            return self.state.best["model"]
        return self.model.state_dict()

    # -- synchronisation points ---------------------------------------------------------------------------------------

    def _synchronise(self, norm: Tensor | None, val_due: bool) -> None:
        """Act together: stop on a non-finite loss, log, validate, checkpoint, leave. One exchange decides for all."""
        seconds_per_image = self.clock.seconds_per_image()
        seconds_unsaved = time.monotonic() - self.clock.saved_at
        every = self.dist.gather_named(
            {
                "stop": self.stop_signal,
                "save": seconds_unsaved >= 60 * self.args.save_minutes,
                "bad_step": self.meter.first_bad_step.item(),
                "pace": seconds_per_image,
                "loss_sum": self.meter.losses.item(),
            }
        )
        first_bad_step = every["bad_step"].min().item()
        if math.isfinite(first_bad_step):
            self._refuse_non_finite("loss", int(first_bad_step))
        self._plan_next_look(every["pace"].max().item())
        self._keep_sums(every["loss_sum"].tolist())
        if norm is not None:
            self._log_line(norm, 1 / seconds_per_image)
        with self.clock.paused():
            if val_due:
                self._validate()
            stop = int(every["stop"].max())
            save_due = bool(every["save"][0]) and (self.args.save_minutes > 0 or val_due)
            unfinished = self.state.step < self.plan.total_steps
            self.state.seconds = self.clock.seconds()
            if unfinished and (stop or save_due):
                self.save()
            if unfinished and stop:
                self._leave(stop)

    def _plan_next_look(self, seconds_per_image: float) -> None:
        """Let slow machines look up from their work often enough to obey a stop request within seconds."""
        step_seconds = max(seconds_per_image * self.plan.batch_size, 1e-6)
        steps = min(self.args.log_every, int(LOOK_UP_SECONDS / step_seconds))
        self.next_look = self.state.step + max(1, steps)

    def _keep_sums(self, loss_sums: list[float]) -> None:
        """Take over what a checkpoint between two log lines must hold."""
        self.state.loss_sums = loss_sums
        self.state.steps_since_log = self.meter.steps
        self.state.skipped_since_log = int(self.meter.skipped.item())
        self.state.seconds = self.clock.seconds()

    def _leave(self, stop: int) -> None:
        where = f"checkpoint written at step {self.state.step} of {self.plan.total_steps} in {self.run.dir}"
        raise EngineError(f"{signal.Signals(stop).name}; {where}; the same command continues the run", 128 + stop)

    def _refuse_non_finite(self, what: str, step: int) -> None:
        kept = "no checkpoint was due yet"
        if (self.run.dir / "last.pt").exists():
            kept = "the last checkpoint is kept"
        advice = "in another folder, try a lower rate (--blr), --clip_grad 1 or --precision fp32"
        problem = f"the {what} became non-finite at step {step} (lr {self.plan.lr_at(step - 1):.3g})"
        raise EngineError(f"{problem}; {kept} in {self.run.dir}; {advice}", 1)

    def _request_stop(self, number: int, frame: object) -> None:
        if self.stop_signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a checkpoint
        self.stop_signal = number

    def _mfu(self, img_s: float | None) -> float | None:
        """Model FLOPs utilisation: the share of the GPUs' peak that the network's own operations use."""
        peak = engine.peak_flops(self.dist.device, self.precision.name)
        if not (peak and img_s and self.flops):
            return None
        return img_s * self.flops / (peak * self.dist.world_size)

    def _memory(self) -> float | None:
        if self.dist.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)

    def _log_line(self, norm: Tensor, img_s: float) -> None:
        step = self.state.step
        loss = statistics.fmean(self.state.loss_sums) / self.meter.steps
        lr = self.plan.lr_at(step - 1)
        mfu = self._mfu(img_s)
        line = {
            "step": step,
            "epoch": step / self.plan.epoch_steps,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm.item() if torch.isfinite(norm) else None,
        }
        if self.precision.scaler.is_enabled():
            line["skipped"] = self.state.skipped_since_log
        line |= {"img_s": round(img_s, 1), "mfu": mfu, "mem_gb": self._memory()}
        self.run.log("train", **line, seconds=round(self.state.seconds, 2))
        self.state.rates.append(img_s)
        self.meter.reset()
        self._keep_sums([0.0] * self.dist.world_size)
        self.clock.start_window()
        self.note = f"loss {loss:.4f}, lr {lr:.2e}"
        if mfu:
            self.note += f", MFU {100 * mfu:.1f} %"

    def _validate(self) -> None:
        """Score the network, log the scores and keep the weights if they are the best so far."""
        if self.dist.world_size > 1:  # BatchNorm statistics of the first process, as in its checkpoint
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        self.model.eval()
        with torch.no_grad(), self.precision.autocast():
            scores = self.objective.validate(self.state.step, lambda: bool(self.stop_signal))
        self.model.train()
        if scores is None:  # stopped halfway: the run continues with this validation
            self.state.seconds = self.clock.seconds()
            self.save()
            stop = self.dist.gather_named({"stop": self.stop_signal})["stop"]
            self._leave(int(stop.max()))
        scores = {name: float(value) for name, value in scores.items()}  # checkpoints hold no numbers of NumPy's
        for name, value in scores.items():
            if name.startswith("loss") and not math.isfinite(value):
                self._refuse_non_finite("validation loss", self.state.step)
        self.state.last_val = {"step": self.state.step, "epoch": self.state.step / self.plan.epoch_steps, **scores}
        self.state.seconds = self.clock.seconds()
        self.run.log("val", **self.state.last_val, seconds=round(self.state.seconds, 2))
        self._keep_best(scores)
        if self.dist.is_main:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print(f"epoch {self.state.last_val['epoch']:g}  {shown}", flush=True)

    def _keep_best(self, scores: dict[str, float]) -> None:
        """Remember the highest score so far and, if they are to be kept, its weights."""
        select = self.objective.select
        if select is None:
            return
        best = self.state.best
        if best is not None:
            highest = best["scores"][select]
            improved = scores[select] > highest or math.isnan(highest)  # a class may be missing at first
            if not improved:
                return
        kept = {}
        if self.objective.keep_best:
            kept = self._copy_weights(best)
        self.state.best = {"scores": self.state.last_val, "model": kept}

    def _copy_weights(self, best: dict | None) -> dict[str, Tensor]:
        """Copy the weights, into the memory of the best ones before where there are some."""
        if best is None:
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        for name, value in self.model.state_dict().items():
            best["model"][name].copy_(value)
        return best["model"]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.run.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.precision.scaler.state_dict(),
                "objective": self.objective.state(),
                **self.state.state_dict(),
            }
        )
        self.clock.saved_at = time.monotonic()

    def _resume(self) -> None:
        state = self.run.load()
        if state is None:
            self.run.log("config", **self.run.config, **self.objective.findings())
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(state["scaler"])
        self.objective.load_state(state["objective"])
        self.state.load_state_dict(state)
        self.meter.restore(self.state, self.dist)
        if self.dist.is_main:
            print(f"resumed {self.run.dir} at step {self.state.step} of {self.plan.total_steps}", flush=True)


def train(objective: Objective, args: argparse.Namespace, dist: Distributed) -> None:
    """Train an objective in --output_dir: plan, run folder, data, loop, metrics. The one path of all trainings."""
    precision = Precision(args.precision, dist.device)
    plan = plan_run(objective, args, dist)
    config = describe_run(objective, plan, precision, args, dist)
    if args.dry_run:
        if dist.is_main:
            print_plan(objective, plan, config)
            print_groups(plan)
        return
    bytes_per_parameter = 12  # the weight and AdamW's two moments
    if objective.select and objective.keep_best:
        bytes_per_parameter += 4  # and the best weight so far
    state_bytes = config["params"] * bytes_per_parameter + kept_bytes(objective.state())
    run = RunFolder(args.output_dir, dist, config, args.resume, state_bytes=state_bytes)
    if run.finished:
        if dist.is_main:
            print(f"{run.dir} is finished; nothing to do (--resume never starts over)")
        return
    if dist.is_main:
        print_plan(objective, plan, config)
    train_batches = objective.open(run)
    examples = train_batches.examples
    images = examples.images
    run.bind(**{name: store.checksum for name, store in examples.stores().items()})
    if images.dropped and dist.is_main:
        planned = len(objective.split.images)
        print(f"note: {planned - len(images)} of {planned} images cannot be read and is left out", flush=True)
    if args.tensorboard and dist.is_main:
        run.curves = Curves(run.dir)
    objective.model.to(dist.device, memory_format=objective.memory_format)
    trainer = Trainer(objective, plan, run, train_batches, precision, args, dist)
    metrics = trainer.fit()
    metrics |= objective.finish()
    metrics |= {key: config[key] for key in ("script", "kind", "hardware")}
    metrics |= {"n_train": len(images), "n_unique": len(set(images.images)), "unreadable": images.dropped}
    metrics["pixels"] = images.checksum
    logged = ("best", "last", "predict_zero", "trivial", "updates", "seconds")
    run.log("done", **{key: value for key, value in metrics.items() if key in logged})
    run.finish(objective.export(trainer.weights), metrics)


def describe_run(
    objective: Objective, plan: Plan, precision: Precision, args: argparse.Namespace, dist: Distributed
) -> dict:
    """Collect config.json. `experiment` is what defines the result; `roles` says what each flag is for."""
    flags = {name: value for name, value in sorted(vars(args).items()) if name in args.roles}
    identity = objective.identity()
    roles = {**args.roles, **dict.fromkeys(identity, "seed")}  # hashes of what the seeds have drawn
    experiment = {name: value for name, value in flags.items() if roles[name] != "computation"}
    manifest = {name: value for name, value in objective.split.manifest.items() if not isinstance(value, list)}
    return {
        "script": args.script,
        "kind": objective.name,
        "scores": objective.scores,
        "select": objective.select,
        "remarks": objective.remarks(),
        "args": flags,
        "experiment": {**experiment, **identity},
        "roles": roles,
        **engine.describe_environment(dist, precision),
        "params": sum(p.numel() for p in objective.model.parameters()),
        "flops_per_image": objective.flops(),
        "updates": plan.total_steps,
        "epoch_updates": plan.epoch_steps,
        "batch_size": plan.batch_size,
        "n_train": len(objective.split.images),
        "n_unique": objective.split.unique,
        "manifest": {"train": manifest},
        "data": {"root": image_root(str(args.data_root), flags), "title": objective.data_title()},
    }


def print_plan(objective: Objective, plan: Plan, config: dict) -> None:
    """Say what is about to run."""
    hardware = config["hardware"]
    cost = f"{config['flops_per_image'] / 1e9:.2f} GFLOP per training image"
    print(f"{config['script']} ({config['kind']}): {config['args']['model']}, {config['params']:,} parameters, {cost}")
    where = f"on {hardware['device']} x {hardware['world_size']}, {config['precision']}"
    print(f"{where}, torch {torch.__version__}, git {config['git']}")
    images = f"{config['n_train']:,} list entries, {config['n_unique']:,} unique images"
    print(f"data: {images} of {config['data']['title']}")
    for remark in config["remarks"]:
        print(f"note: {remark}")
    updates = f"{plan.total_steps:,} updates of {plan.batch_size} images, {config['args']['epochs']} epochs"
    memory = expected_memory(objective, config)
    if memory is None:
        print(f"plan: {updates}, lr {plan.lr:.3g}", flush=True)
    else:
        print(f"plan: {updates}, lr {plan.lr:.3g}, about {memory:.1f} GB of memory per process", flush=True)


def print_groups(plan: Plan) -> None:
    """Print the rate and decay of every parameter group."""
    for group in plan.groups:
        rate = f"lr {plan.lr * group['lr_scale']:.3e} (x {group['lr_scale']:.4f})"
        names = group["names"]
        print(f"  {rate}  weight_decay {group['weight_decay']:g}  {len(names)} tensors: {names[0]} ...")


def expected_memory(objective: Objective, config: dict) -> float | None:
    """Estimate the memory of training in GB: 16 bytes a parameter (weight, gradient, moments), a teacher, activations."""
    values = objective.activation_values()
    if values is None:
        return None
    images = config["args"]["micro_batch_size"] or config["batch_size"] // config["hardware"]["world_size"]
    bytes_per_value = 4 if config["precision"] == "fp32" else 2
    return (16 * config["params"] + kept_bytes(objective.state()) + images * values * bytes_per_value) / 1e9


def kept_bytes(state: dict) -> int:
    """Count the bytes of the tensors that an objective keeps besides its network, such as a teacher: of its state()."""
    total = 0
    for value in state.values():
        if isinstance(value, dict):
            total += kept_bytes(value)
        elif isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    return total
