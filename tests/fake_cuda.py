"""A GPU that is not there: tensors on cuda:0 with shape and dtype but no values, and checks of what runs on them.

    with fake_cuda() as gpu:
        trainer = make_trainer(case, gpu.dist, folders)
        with watch(gpu, networks_of(trainer)):
            trainer.train_step(micro_batches, want_norm=True)

PyTorch's FakeTensorMode runs every operation for its shape, dtype and device alone, so the scripts' own code runs as on a
GPU, without one and without a driver. Operations on several devices raise FakeTensorDeviceMismatchError; `watch` adds what
the mode lets through: waits of the host and products of the wrong precision. Not covered: values, kernels, streams,
memory, several GPUs, fp16, and the backward pass on cuda:0, which asks the driver (the device "meta" stands in for it).
"""

import argparse
import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from small_runs import REPOSITORY, words_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import models
import pretrain
import tasks
from batches import EvalBatches, Pipeline
from data import ImageStore
from engine import Distributed, Precision
from objective import Objective
from trainer import Trainer, plan_run

GPU = torch.device("cuda", 0)
IMG = 64
SIZES = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
CLASS_FOLDERS = "coco"  # of the data root: its parts stand for two classes
FLAGS = ["--batch_size 8", f"--img_size {IMG}", f"--cache_size {IMG}", "--no-compile"]


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


class Case(NamedTuple):
    """A training: its script, the name of its objective or task, and flags besides those of every case."""

    script: str
    name: str
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.script, self.name, *self.flags])


class Folders(NamedTuple):
    """Where a training reads and writes."""

    data_root: Path
    cache_dir: Path
    run_dir: Path


def arguments(case: Case, folders: Folders) -> argparse.Namespace:
    """Parse the command line of a case; fine-tuning starts from random weights, so no checkpoint has to be read."""
    module = importlib.import_module(case.script)
    flags = [*FLAGS, *case.flags, "--data_root", folders.data_root, "--cache_dir", folders.cache_dir]
    if "--model" not in " ".join(case.flags):
        flags.append("--model small")
    if case.script == "finetune":
        flags.append("--init none")
    if case.name == "classify":
        flags.append("--images " + str(folders.data_root / CLASS_FOLDERS))
    args = module.get_args_parser(case.name).parse_args(words_of(flags))
    args.init = None
    if case.script != "finetune":
        args = module.resolve(args)
    return args


def make_objective(case: Case, args: argparse.Namespace, dist: Distributed) -> Objective:
    """Build the objective or task of a case and move its network to the device, as trainer.train does."""
    table = pretrain.OBJECTIVES if case.script == "pretrain" else tasks.TASKS
    objective = table[case.name](args, dist)
    objective.model.to(dist.device, memory_format=objective.memory_format)
    return objective


def make_trainer(case: Case, dist: Distributed, folders: Folders) -> Trainer:
    """Build the trainer of a case, with its data, as trainer.train does."""
    args = arguments(case, folders)
    objective = make_objective(case, args, dist)
    plan = plan_run(objective, args, dist)
    run = mock.Mock(dir=folders.run_dir)
    with unknown_numbers():
        batches = objective.open(run)
    return Trainer(objective, plan, run, batches, Precision(args.precision, dist.device), args, dist)


def unknown_numbers() -> contextlib.AbstractContextManager:
    """Context in which numbers that are read from fake tensors are 0: what is only printed may have any value."""
    real = Tensor.item

    def item(tensor: Tensor) -> float:
        if isinstance(tensor, FakeTensor):
            return 0
        return real(tensor)

    return mock.patch.object(Tensor, "item", item)


def small_network() -> contextlib.AbstractContextManager:
    """Context in which --model small is a network for tests."""
    return mock.patch.dict(models.MODELS, small=SIZES)


# ----------------------------------------------------------------------------------------------------------------------
# The device


class FakeMode(FakeTensorMode):
    """Fake tensors that never start CUDA, although torch.cuda.is_available() says that it is there."""

    avoid_device_init = True

    def __deepcopy__(self, memo: dict) -> "FakeMode":
        return self  # a copy of a fake tensor belongs to the same mode


# What torch.cuda says of the device; its memory is large enough for any cache of images.
ANSWERS = {
    "is_available": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "mem_get_info": (2**36, 2**36),
    "set_device": None,
}


class FakeGPU(NamedTuple):
    """The device as a training sees it. pinned: the memory that a GPU can copy from without the host's waiting."""

    dist: Distributed
    pinned: set[StorageWeakRef]


@contextlib.contextmanager
def fake_tensors() -> Iterator[FakeMode]:
    """Context in which every new tensor is fake. No cache of the project may carry tensors into it or out of it."""
    clear_caches()
    try:
        with (
            warnings.catch_warnings(),
            small_network(),
            mock.patch.object(nn.Module, "_apply", convert),
            FakeMode() as mode,
        ):
            # Copying a fake network, as for a teacher or to count operations.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield mode
    finally:
        clear_caches()


@torch.no_grad()
def convert(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace the tensors of a network: nn.Module.to does it in place, which fake tensors refuse."""
    parts = module.modules() if recurse else [module]
    for part in parts:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(change(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = change(buffer)
    return module


def clear_caches() -> None:
    """Empty the caches of all functions of the project; what FakeTensorMode knows of operations holds no tensors."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        if not file.startswith(str(REPOSITORY)) or "site-packages" in file:
            continue
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear") and not isinstance(value, type):
                value.cache_clear()


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeGPU]:
    """Context in which PyTorch has a GPU of fake tensors."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_settings())
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=answer)))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", refuse_to_wait))
        mode = stack.enter_context(fake_tensors())
        pinned = patch_pipeline(stack, mode)
        # No fused attention takes fake tensors, and the plain one would leave bfloat16 for its products.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        yield FakeGPU(engine.setup("cuda"), pinned)


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """Context that puts PyTorch's settings back."""
    precision = torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    attention = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(attention)


def patch_pipeline(stack: contextlib.ExitStack, mode: FakeMode) -> set[StorageWeakRef]:
    """Let the thread that prepares batches make real tensors, and turn them into fake ones -> the page-locked memory."""
    real = {"augment": Pipeline.augment, "gather": ImageStore.gather}
    pinned: set[StorageWeakRef] = set()

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.add(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def gather(store: ImageStore, index: object, pin: bool = False) -> Tensor:
        return real["gather"](store, index)

    def augment(pipeline: Pipeline, batch: dict[str, Tensor], first: int) -> dict[str, Tensor]:
        converted = {}
        for name, tensor in batch.items():
            converted[name] = mode.from_tensor(tensor)
            if StorageWeakRef(tensor.untyped_storage()) in pinned:
                pin_memory(converted[name])
        return real["augment"](pipeline, converted, first)

    stack.enter_context(mock.patch.object(Tensor, "pin_memory", pin_memory))
    stack.enter_context(mock.patch.object(ImageStore, "gather", gather))
    stack.enter_context(mock.patch.object(Pipeline, "augment", augment))
    return pinned


# ----------------------------------------------------------------------------------------------------------------------
# What may not happen on it


class HostWaits(AssertionError):
    """The host waits for the device inside a training step."""


def refuse_to_wait(*_: object) -> None:
    """Take the place of torch.cuda.synchronize."""
    raise HostWaits("torch.cuda.synchronize waits for the device")


class WrongPrecision(AssertionError):
    """A product is not computed in bfloat16, or a loss not in float32."""


class WrongDevice(AssertionError):
    """A tensor that belongs to the training is not on the device."""


class NoGradient(AssertionError):
    """A trainable parameter gets no gradient."""


READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
READS |= {"equal", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution"}
ATTENTION = "scaled_dot_product"
LOSSES = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "nll_loss_forward", "nll_loss2d_forward"}
LOSSES |= {"_log_softmax", "binary_cross_entropy", "binary_cross_entropy_with_logits"}


def tensors_of(values: object) -> list[Tensor]:
    """List the tensors among arguments."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def with_whole_indices(args: tuple) -> tuple:
    """Let indices of truth values, of which fake ones have none, select everything: the arguments of `index`."""
    source, indices = args
    whole = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            index = torch.arange(len(index), device=index.device)
        whole.append(index)
    return source, whole


class Watch(TorchDispatchMode):
    """Raises HostWaits and WrongPrecision at the operation that is to blame.

    warm_up: let constants be copied to the device, which are kept for later steps. reading: whether the host may wait, as
    between the loops over validation batches; it reads some number, and what it selects by is true. in_network: whether a
    call of the network is going on. products: how many of its matrix products were seen.
    """

    def __init__(self, pinned: set[StorageWeakRef], warm_up: bool = False, device: torch.device = GPU):
        super().__init__()
        self.pinned = pinned
        self.warm_up = warm_up
        self.device = device
        self.reading = False
        self.in_network = False
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a look at tensor.device
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = tensors_of((args, kwargs))
        if self.reading:
            if name == "_local_scalar_dense":
                return float(args[0].is_floating_point())  # no sum is 0, and no process was asked to stop
            if name == "index":
                args = with_whole_indices(args)
        elif any(tensor.device == self.device for tensor in tensors) or kwargs.get("device") == self.device:
            self.check_waits(name, args, kwargs)
        result = func(*args, **kwargs)  # a tensor of another device is refused here, whatever its precision
        self.check_precision(name, [tensor for tensor in tensors if tensor.is_floating_point()])
        return result

    def check_waits(self, name: str, args: tuple, kwargs: dict) -> None:
        """Refuse operations whose result, or whose size, the host has to know."""
        if name in READS:
            raise HostWaits(f"{name} reads values of the device")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostWaits("repeat_interleave without output_size reads its size from the device")
        if name in INDEXING:
            self.check_indices(name, args)
        if name in COPIES:
            self.check_copy(name, args, kwargs)

    def check_indices(self, name: str, args: tuple) -> None:
        """Refuse indices that are copied to the device at each use, and masks, whose number of hits has to be known."""
        for index in tensors_of(args[1]):
            if index.device != args[0].device:
                raise HostWaits(f"{name}: an index on {index.device} for a tensor on {args[0].device}")
            writes_number = name != "index" and args[2].numel() == 1
            if index.dtype == torch.bool and not writes_number:
                raise HostWaits(f"{name}: an index of truth values")

    def check_copy(self, name: str, args: tuple, kwargs: dict) -> None:
        """Refuse copies from the device, and those to it that do not run beside the host's work."""
        if name == "copy_":
            target, source = args[0].device, args[1]
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        else:
            source = args[0]
            target = kwargs.get("device") or source.device
            non_blocking = kwargs.get("non_blocking", False)
        if target == source.device:
            return
        way = f"{name} from {source.device} to {target}"
        if source.device == self.device:
            raise HostWaits(f"{way}: the host reads the device")
        if self.warm_up:
            return
        if not non_blocking:
            raise HostWaits(f"{way} is blocking")
        if StorageWeakRef(source.untyped_storage()) not in self.pinned:
            raise HostWaits(f"{way} starts from memory that is not page-locked")

    def check_precision(self, name: str, tensors: list[Tensor]) -> None:
        """Refuse products of the network that are not in bfloat16, and losses that are."""
        dtypes = {tensor.dtype for tensor in tensors}
        if self.in_network and (name in PRODUCTS or ATTENTION in name):
            self.products += 1
            if dtypes != {torch.bfloat16}:
                raise WrongPrecision(f"{name} of the network computes with {dtypes}")
        if name in LOSSES and torch.bfloat16 in dtypes:
            raise WrongPrecision(f"{name} computes with {dtypes}")


@contextlib.contextmanager
def watch(gpu: FakeGPU, networks: list[nn.Module], warm_up: bool = False) -> Iterator[Watch]:
    """Context of a Watch that knows when one of the networks is at work. WrongPrecision if they multiplied nothing."""
    watching = Watch(gpu.pinned, warm_up)

    def begin(*_: object) -> None:
        watching.in_network = True

    def end(*_: object) -> None:
        watching.in_network = False

    hooks = []
    for network in networks:
        hooks += [network.register_forward_pre_hook(begin), network.register_forward_hook(end)]
    try:
        with watching:
            yield watching
    finally:
        for hook in hooks:
            hook.remove()
    if not watching.products:
        raise WrongPrecision("no matrix product of the network was seen")


# ----------------------------------------------------------------------------------------------------------------------
# The checks


def require_on_device(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Raise WrongDevice if one of the named tensors is somewhere else."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise WrongDevice(f"{name} is on {tensor.device}, not on {device}")


def filled_gradients(parameters: list[nn.Parameter]) -> Callable[[Tensor], None]:
    """Make what takes the place of Tensor.backward: it checks the loss and gives each parameter a gradient."""

    def backward(loss: Tensor) -> None:
        require_on_device({"loss": loss}, GPU)
        if loss.dtype != torch.float32:
            raise WrongPrecision(f"the loss is {loss.dtype}")
        assert loss.ndim == 0
        assert loss.requires_grad
        for parameter in parameters:
            gradient = torch.zeros_like(parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    return backward


def networks_of(trainer: Trainer) -> list[nn.Module]:
    """List the networks that a training computes with: its own, and the teacher if it has one."""
    networks = [trainer.model]
    if hasattr(trainer.objective, "teacher"):
        networks.append(trainer.objective.teacher.network)
    return networks


def check_batches(case: Case, folders: Folders) -> None:
    """Make the training batches of two steps of a case on the fake GPU."""
    with fake_cuda() as gpu:
        trainer = make_trainer(case, gpu.dist, folders)
        with contextlib.closing(trainer.batches.run(0, 2)) as steps:
            for warm_up in (True, False):
                with Watch(gpu.pinned, warm_up):
                    micro_batches = next(steps)
                for batch in micro_batches:
                    require_on_device(batch, GPU)


def check_training(case: Case, folders: Folders) -> None:
    """Make two steps of a case on the fake GPU and score its validation images."""
    with fake_cuda() as gpu:
        trainer = make_trainer(case, gpu.dist, folders)
        require_on_device(trainer.model.state_dict(), GPU)
        backward = filled_gradients(trainer.params)
        steps = trainer.batches.run(0, 2)
        with mock.patch.object(Tensor, "backward", backward), contextlib.closing(steps):
            with watch(gpu, networks_of(trainer), warm_up=True):
                trainer.train_step(next(steps), want_norm=False)
            with watch(gpu, networks_of(trainer)):
                trainer.train_step(next(steps), want_norm=True)
        require_on_device(training_state(trainer), GPU)
        check_validation(trainer, gpu)


def training_state(trainer: Trainer) -> dict[str, Tensor]:
    """Name the tensors that a step has written."""
    assert len(trainer.optimizer.state) == len(trainer.params)
    named = {f"network: {name}": tensor for name, tensor in trainer.model.state_dict().items()}
    for number, state in enumerate(trainer.optimizer.state.values()):
        for name, tensor in state.items():
            named[f"optimizer: {name} of parameter {number}"] = tensor
    for name in ("losses", "skipped", "first_bad_step"):
        kept = getattr(trainer.meter, name)
        assert not kept.requires_grad, f"the meter's {name} keep the graphs of all steps"
        named[f"meter: {name}"] = kept
    for number, tensor in enumerate(tensors_of(trainer.objective.state())):
        named[f"objective: tensor {number}"] = tensor
    return named


def check_validation(trainer: Trainer, gpu: FakeGPU) -> None:
    """Score the validation images; the host may wait between the loops over batches, and never in them."""
    loop = EvalBatches.__iter__
    add_up = Distributed.sum

    def sum_on_device(dist: Distributed, tensor: Tensor) -> Tensor:
        require_on_device({"sum of scores": tensor}, GPU)
        return add_up(dist, tensor)

    def numbers(tensor: Tensor) -> np.ndarray:
        return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Distributed, "sum", sum_on_device))
        stack.enter_context(mock.patch.object(Tensor, "numpy", numbers))
        watching = stack.enter_context(watch(gpu, networks_of(trainer)))

        def strict(batches: EvalBatches) -> Iterator[dict[str, Tensor]]:
            watching.reading = False
            yield from loop(batches)
            watching.reading = True

        stack.enter_context(mock.patch.object(EvalBatches, "__iter__", strict))
        watching.reading = True
        trainer._validate()


def first_batch(case: Case, folders: Folders) -> dict[str, Tensor]:
    """Give the first micro-batch of a case, on the CPU."""
    with small_network():
        dist = Distributed(0, 0, 1, torch.device("cpu"))
        objective = make_objective(case, arguments(case, folders), dist)
        batches = objective.open(mock.Mock(dir=folders.run_dir))
        with contextlib.closing(batches.run(0, 1)) as steps:
            return next(steps)[0]


def check_gradients(case: Case, folders: Folders) -> None:
    """Go forward and backward on the device "meta", which computes nothing; every trainable parameter must take part."""
    batch = first_batch(case, folders)
    device = torch.device("meta")
    with fake_tensors() as mode:
        objective = make_objective(case, arguments(case, folders), Distributed(0, 0, 1, device))
        moved = {name: mode.from_tensor(tensor).to(device) for name, tensor in batch.items()}
        with Watch(set(), device=device):
            objective.loss(objective.model, moved).backward()
        for name, parameter in objective.model.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None
                continue
            if parameter.grad is None:
                raise NoGradient(f"{name} gets no gradient")
            require_on_device({f"gradient of {name}": parameter.grad}, device)
