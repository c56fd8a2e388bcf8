"""Trainings on a GPU that is not there (see fake_cuda.py): devices, waits of the host, precision, gradients, whole graphs.

Every objective and every task is checked, also one that is named tomorrow. The second half injects faults into the code,
each of which a check must report.
"""

import contextlib
import runpy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import (
    GPU,
    Case,
    Folders,
    HostWaits,
    NoGradient,
    Watch,
    WrongDevice,
    WrongPrecision,
    check_gradients,
    check_graphs,
    check_training,
    fake_cuda,
)
from small_runs import REPOSITORY, drawn_root
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError, Unsupported
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

import augment
import finetune
import models
import trainer
from batches import Pipeline
from engine import Precision
from pretrain import OBJECTIVES, MaskedPixels
from segmentation import Segmentation
from tasks import TASKS

FOLDER = REPOSITORY / "tests/examples"
EXAMPLE_OBJECTIVES = {"denoise": runpy.run_path(str(FOLDER / "denoise.py"))["Denoising"]}
EXAMPLE_TASKS = {"species": runpy.run_path(str(FOLDER / "species.py"))["Species"]}
ON_HOST = "--cache_device cpu"  # the default is on the device
ACCUMULATED = "--micro_batch_size 4"

MAE = Case("pretrain", "mae")
SEGMENTER = Case("finetune", "segment")
LINEAR = Case("finetune", "segment", ("--head linear",))


def with_flags(case: Case, *flags: str) -> Case:
    return case._replace(flags=(*case.flags, *flags))


def variants_of(task: str) -> Iterator[str]:
    """Name the values, besides the default, of each flag of fine-tuning that chooses between networks."""
    parser = finetune.get_args_parser(task)
    for action in parser._actions:
        if parser._roles.get(action.dest) != "network" or action.dest == "model":
            continue
        for choice in action.choices or ():
            if choice != action.default:
                yield f"{action.option_strings[0]} {choice}"


# A vocabulary that few patches fill, and no contrast, which is not accumulated.
OPTIONS = {"tokens": ("--vocabulary 16",), "splitmask": ("--vocabulary 16", "--no-match")}
NAMED = [Case("pretrain", name, (ACCUMULATED, *OPTIONS.get(name, ()))) for name in OBJECTIVES]
NAMED += [Case("finetune", name, (ACCUMULATED,)) for name in TASKS]
VARIANTS = [Case("finetune", name, (flag,)) for name in TASKS for flag in variants_of(name)]
EXAMPLES = [Case("pretrain", name) for name in EXAMPLE_OBJECTIVES] + [Case("finetune", name) for name in EXAMPLE_TASKS]
CONVOLUTIONAL = [Case("baseline", name, ("--model resnet50",)) for name in TASKS]
NETWORKS = NAMED + VARIANTS + EXAMPLES + CONVOLUTIONAL
TOKENS = [
    Case("pretrain", "tokens", (f"--vocabulary 16 --tokenizer {name}",)) for name in ("random_projection", "kmeans")
]
CONTRASTED = Case("pretrain", "splitmask", ("--vocabulary 16",))
NETWORKS += [*TOKENS, CONTRASTED, with_flags(CONTRASTED, "--no-inpaint")]
UNMASKED = with_flags(MAE, "--mask_ratio 0")
MULTI_CROP = Case("pretrain", "dino", ("--local_crops 2",))
IMAGES = [with_flags(case, ON_HOST) for case in NAMED]
IMAGES += [with_flags(MAE, "--targets other"), with_flags(MAE, "--targets other", ON_HOST)]
IMAGES += [
    with_flags(SEGMENTER, "--elastic 50"),
    with_flags(SEGMENTER, "--elastic 50 --trimap_resize bilinear --inputs unit", ON_HOST),
    with_flags(SEGMENTER, "--crop_scale 1 --no-flips --no-train_positions --optimizer adam --clip_grad 1"),
]

# Copying a fake ResNet-50, as counting its operations does.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    data_root = drawn_root(tmp_path_factory)
    return Folders(data_root, tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def examples_are_named(monkeypatch) -> None:
    for table, examples in ((OBJECTIVES, EXAMPLE_OBJECTIVES), (TASKS, EXAMPLE_TASKS)):
        for name, example in examples.items():
            monkeypatch.setitem(table, name, example)


@pytest.mark.parametrize("case", [*NETWORKS, UNMASKED, MULTI_CROP, *IMAGES], ids=str)
def test_training_and_validation_stay_on_the_device_and_never_wait(folders, case):
    check_training(case, folders)


@pytest.mark.parametrize("case", [*NETWORKS, UNMASKED, MULTI_CROP], ids=str)
def test_every_trainable_parameter_gets_a_gradient(folders, case):
    check_gradients(case, folders)


@pytest.mark.parametrize("case", [*NAMED, LINEAR, CONTRASTED, MULTI_CROP], ids=str)
def test_compiled_networks_are_whole_graphs(folders, case):
    check_graphs(case, folders)


# -- Faults -------------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


class Fault(NamedTuple):
    """A change of the code, and the error by which the check of a training must report it."""

    inject: Callable[[Patch], None]
    check: Callable[[Case, Folders], None]
    case: Case
    error: type[Exception]
    message: str


def wrap(patch: Patch, owner: object, name: str, change: Callable) -> None:
    """Replace owner.name by a function that calls change(original, *arguments)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def change_loss(patch: Patch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the loss of masked pixels by change(loss, images)."""

    def changed(original, objective, network, batch):
        return change(original(objective, network, batch), batch["images"])

    wrap(patch, MaskedPixels, "loss", changed)


def loss_is_read(patch: Patch) -> None:
    change_loss(patch, lambda loss, images: loss / max(1, loss.item()))


def loss_synchronises(patch: Patch) -> None:
    def changed(loss: Tensor, images: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return loss

    change_loss(patch, changed)


def loss_decides(patch: Patch) -> None:
    change_loss(patch, lambda loss, images: loss if loss > 0 else -loss)


def loss_selects_by_value(patch: Patch) -> None:
    change_loss(patch, lambda loss, images: loss + images[images > 0].mean())


def loss_makes_a_constant(patch: Patch) -> None:
    change_loss(patch, lambda loss, images: (loss * torch.tensor([0.5, 0.5], device=loss.device)).sum())


def loss_is_in_half_precision(patch: Patch) -> None:
    change_loss(patch, lambda loss, images: loss.bfloat16())


def loss_compares_in_half_precision(patch: Patch) -> None:
    def changed(loss: Tensor, images: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return loss + F.mse_loss(images.bfloat16(), 0 * images.bfloat16()).float()

    change_loss(patch, changed)


def noise_is_drawn_on_the_host(patch: Patch) -> None:
    def forward(original, network, images, mask_ratio, noise, **kwargs):
        return original(network, images, mask_ratio, torch.rand(noise.shape), **kwargs)

    wrap(patch, models.MaskedAutoencoder, "forward", forward)


def rows_are_taken_by_an_index_on_the_host(patch: Patch) -> None:
    patch.setattr(models, "take_rows", lambda x, ids: x[torch.arange(len(x))[:, None], ids])


def block_adds_a_tensor_of_the_host(patch: Patch) -> None:
    def forward(original, block, x, *args, **kwargs):
        return original(block, x + torch.zeros(x.shape[-1]), *args, **kwargs)

    wrap(patch, models.Block, "forward", forward)


def attention_computes_in_single_precision(patch: Patch) -> None:
    def forward(original, attention, x, *args):
        with torch.autocast("cuda", enabled=False):
            return original(attention, x.float(), *args)

    wrap(patch, models.Attention, "forward", forward)


def autocast_is_off(patch: Patch) -> None:
    patch.setattr(Precision, "autocast", lambda precision: contextlib.nullcontext())


def optimizer_keeps_its_state_on_the_host(patch: Patch) -> None:
    def step(original, loop, want_norm):
        norm = original(loop, want_norm)
        for state in loop.optimizer.state.values():
            state["exp_avg"] = torch.zeros(state["exp_avg"].shape)
        return norm

    wrap(patch, trainer.Trainer, "_step_optimizer", step)


def network_stays_on_the_host(patch: Patch) -> None:
    patch.setattr(nn.Module, "to", lambda network, *args, **kwargs: network)


def augmentation_goes_through_the_host(patch: Patch) -> None:
    def scale(original, images, inputs):
        return original(images.cpu(), inputs).to(images.device, non_blocking=True)

    wrap(patch, augment, "scale_pixels", scale)


def statistics_are_made_for_each_batch(patch: Patch) -> None:
    patch.setattr(augment, "_statistics", augment._statistics.__wrapped__)


def copies_block(patch: Patch) -> None:
    def move(original, pipeline, batch, first):
        moved = {name: tensor.to(pipeline.device) for name, tensor in batch.items()}
        return original(pipeline, moved, first)

    wrap(patch, Pipeline, "augment", move)


def batches_are_not_page_locked(patch: Patch) -> None:
    def load(original, pipeline, host):
        return {name: tensor.clone() for name, tensor in original(pipeline, host).items()}

    wrap(patch, Pipeline, "load", load)


def trimaps_stay_on_the_host(patch: Patch) -> None:
    def leave(original, pipeline, batch, first):
        part = original(pipeline, batch, first)
        if "masks" in part:
            part["masks"] = torch.zeros(part["masks"].shape, dtype=torch.long)
        return part

    wrap(patch, Pipeline, "augment", leave)


def validation_trimaps_stay_on_the_host(patch: Patch) -> None:
    def opened(original, task, run):
        batches = original(task, run)
        task.val_truth = task.val_truth.cpu()
        return batches

    wrap(patch, Segmentation, "open", opened)


def validation_reads_each_batch(patch: Patch) -> None:
    def score(original, *args):
        scores = original(*args)
        scores["loss"] = scores["loss"].item()
        return scores

    wrap(patch, Segmentation, "_score", score)


def validation_computes_in_single_precision(patch: Patch) -> None:
    def score(original, *args):
        with torch.autocast("cuda", enabled=False):
            return original(*args)

    wrap(patch, Segmentation, "_score", score)


def decoder_is_cut_off(patch: Patch) -> None:
    def decode(original, network, latent, *args, **kwargs):
        return original(network, latent.detach(), *args, **kwargs)

    wrap(patch, models.MaskedAutoencoder, "forward_decoder", decode)


def parameter_is_unused(patch: Patch) -> None:
    def initialise(original, network):
        network.unused = nn.Parameter(torch.zeros(3))
        original(network)

    wrap(patch, models.MaskedAutoencoder, "initialize_weights", initialise)


def block_decides_by_value(patch: Patch) -> None:
    def forward(original, block, x, *args, **kwargs):
        if x.sum() > 0:
            return original(block, x, *args, **kwargs)
        return x

    wrap(patch, models.Block, "forward", forward)


def block_leaves_the_graph(patch: Patch) -> None:
    def forward(original, block, x, *args, **kwargs):
        torch._dynamo.graph_break()
        return original(block, x, *args, **kwargs)

    wrap(patch, models.Block, "forward", forward)


def mask_ratio_changes_at_each_step(patch: Patch) -> None:
    def loss(original, objective, network, batch):
        objective.args.mask_ratio -= 0.125
        return original(objective, network, batch)

    wrap(patch, MaskedPixels, "loss", loss)


MIXED = FakeTensorDeviceMismatchError
FAULTS = [
    Fault(loss_is_read, check_training, MAE, HostWaits, "reads values"),
    Fault(loss_synchronises, check_training, MAE, HostWaits, "synchronize"),
    Fault(loss_decides, check_training, MAE, HostWaits, "reads values"),
    Fault(loss_selects_by_value, check_training, MAE, HostWaits, "index of truth values"),
    Fault(loss_makes_a_constant, check_training, MAE, HostWaits, "from cpu to cuda:0 is blocking"),
    Fault(loss_is_in_half_precision, check_training, MAE, WrongPrecision, "the loss is torch.bfloat16"),
    Fault(loss_compares_in_half_precision, check_training, MAE, WrongPrecision, "mse_loss computes"),
    Fault(noise_is_drawn_on_the_host, check_training, MAE, MIXED, "cpu"),
    Fault(rows_are_taken_by_an_index_on_the_host, check_training, MAE, HostWaits, "an index on cpu"),
    Fault(block_adds_a_tensor_of_the_host, check_training, MAE, MIXED, "cpu"),
    Fault(attention_computes_in_single_precision, check_training, MAE, WrongPrecision, "float32"),
    Fault(autocast_is_off, check_training, MAE, WrongPrecision, "float32"),
    Fault(optimizer_keeps_its_state_on_the_host, check_training, MAE, WrongDevice, "optimizer: exp_avg"),
    Fault(network_stays_on_the_host, check_training, MAE, WrongDevice, "is on cpu"),
    Fault(augmentation_goes_through_the_host, check_training, MAE, HostWaits, "from cuda:0 to cpu"),
    Fault(statistics_are_made_for_each_batch, check_training, MAE, HostWaits, "is blocking"),
    Fault(copies_block, check_training, with_flags(MAE, ON_HOST), HostWaits, "is blocking"),
    Fault(batches_are_not_page_locked, check_training, with_flags(MAE, ON_HOST), HostWaits, "not page-locked"),
    Fault(trimaps_stay_on_the_host, check_training, SEGMENTER, MIXED, "cpu"),
    Fault(validation_trimaps_stay_on_the_host, check_training, SEGMENTER, MIXED, "cpu"),
    Fault(validation_reads_each_batch, check_training, SEGMENTER, HostWaits, "reads values"),
    Fault(validation_computes_in_single_precision, check_training, SEGMENTER, WrongPrecision, "float32"),
    Fault(decoder_is_cut_off, check_gradients, MAE, NoGradient, "gets no gradient"),
    Fault(parameter_is_unused, check_gradients, MAE, NoGradient, "unused gets no gradient"),
    Fault(noise_is_drawn_on_the_host, check_gradients, MAE, MIXED, "cpu"),
    Fault(block_decides_by_value, check_graphs, MAE, Unsupported, "Data-dependent"),
    Fault(block_leaves_the_graph, check_graphs, SEGMENTER, Unsupported, "graph_break"),
    Fault(mask_ratio_changes_at_each_step, check_graphs, MAE, RecompileError, "mask_ratio"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.inject.__name__}-{fault.check.__name__}")
def test_faults_are_reported(folders, monkeypatch, fault):
    fault.inject(monkeypatch)
    with pytest.raises(fault.error, match=fault.message):
        fault.check(fault.case, folders)


# -- Single operations --------------------------------------------------------------------------------------------------

WAITING = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool(x.any()),
    "list": lambda x: x.tolist(),
    "number": lambda x: float(x[0]),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "put_by_mask": lambda x: x.index_put_((x > 0,), x),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x.long()),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "cpu": lambda x: x.cpu(),
    "unsafe_cpu": lambda x: x.to("cpu", non_blocking=True),
    "copy_to_host": lambda x: torch.zeros(4).copy_(x),
    "constant": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "blocking_copy": lambda x: torch.zeros(4).pin_memory().to(x.device),
    "pageable_copy": lambda x: torch.zeros(4).to(x.device, non_blocking=True),
    "copy_from_host": lambda x: x.copy_(torch.zeros(4)),
    "assignment": lambda x: x.__setitem__(slice(2), torch.zeros(2)),
    "assigned_number": lambda x: x.__setitem__(0, 1.0),
    "host_index": lambda x: x[torch.arange(2)],
    "put_by_host_index": lambda x: x.index_put_((torch.arange(2),), x[:2]),
    "list_index": lambda x: x[[0, 2]],
}
FREE = {
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "fill_by_mask": lambda x: x.__setitem__(x > 0, 0.0),
    "fill_slice": lambda x: x.__setitem__(slice(2), 1.0),
    "fill_place": lambda x: x[0].fill_(1.0),
    "choice": lambda x: torch.where(x > 0, x, 0.0),
    "index": lambda x: x[torch.arange(2, device=x.device)],
    "repeat": lambda x: x.repeat_interleave(x.long(), output_size=8),
    "new": lambda x: torch.zeros(4, device=x.device) + torch.full_like(x, 2.0),
    "random": lambda x: torch.rand(4, device=x.device),
    "host": lambda x: torch.zeros(4)[torch.arange(2)].sum(),
    "locked_copy": lambda x: torch.zeros(4).pin_memory()[:2].to(x.device, non_blocking=True),
    "cast": lambda x: x.double().to(torch.bfloat16),
}


@pytest.fixture
def numbers() -> Iterator[tuple[Tensor, Watch]]:
    """Give four numbers on the device and who watches over them."""
    with fake_cuda() as gpu:
        yield torch.zeros(4, device=GPU), Watch(gpu.pinned)


@pytest.mark.parametrize("operation", WAITING.values(), ids=WAITING)
def test_operations_that_make_the_host_wait_are_refused(numbers, operation):
    x, watching = numbers
    with watching, pytest.raises(HostWaits):
        operation(x)


@pytest.mark.parametrize("operation", FREE.values(), ids=FREE)
def test_operations_that_run_on_the_device_alone_are_allowed(numbers, operation):
    x, watching = numbers
    with watching:
        operation(x)


# -- What the checks leave behind ---------------------------------------------------------------------------------------


def test_nothing_is_left_behind(folders, monkeypatch):
    augment._statistics.cache_clear()
    before = global_state()
    loss_is_read(monkeypatch)
    with pytest.raises(HostWaits):
        check_training(MAE, folders)
    assert global_state() == before


def global_state() -> dict[str, object]:
    """Collect what the checks change while they run."""
    return {
        "is_available": torch.cuda.is_available,
        "device_count": torch.cuda.device_count,
        "set_device": torch.cuda.set_device,
        "pin_memory": Tensor.pin_memory,
        "backward": Tensor.backward,
        "compile": torch.compile,
        "augment": Pipeline.augment,
        "models": dict(models.MODELS),
        "matmul": torch.get_float32_matmul_precision(),
        "benchmark": torch.backends.cudnn.benchmark,
        "mode": torch.utils._python_dispatch._get_current_dispatch_mode(),
        "cached": augment._statistics.cache_info().currsize,
    }
