"""Trainings on a GPU that is not there (see fake_cuda.py): devices, waits of the host, precision, gradients."""

from collections.abc import Iterator

import pytest
import torch
from fake_cuda import GPU, Folders, HostWaits, Watch, check_batches, check_gradients, check_training, fake_cuda
from gpu_cases import (
    EXAMPLE_OBJECTIVES,
    EXAMPLE_TASKS,
    IMAGES,
    MAE,
    MULTI_CROP,
    NAMED,
    NETWORKS,
    ON_HOST,
    make_folders,
    with_flags,
)
from torch import Tensor

import augment
import models
from batches import Pipeline
from pretrain import OBJECTIVES, MaskedPixels
from tasks import TASKS


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return make_folders(tmp_path_factory)


@pytest.fixture(autouse=True)
def examples_are_named(monkeypatch) -> None:
    for table, examples in ((OBJECTIVES, EXAMPLE_OBJECTIVES), (TASKS, EXAMPLE_TASKS)):
        for name, example in examples.items():
            monkeypatch.setitem(table, name, example)


@pytest.mark.parametrize("case", [*NETWORKS, *IMAGES], ids=str)
def test_training_and_validation_stay_on_the_device_and_never_wait(folders, case):
    check_training(case, folders)


@pytest.mark.parametrize("case", [*NAMED, MULTI_CROP], ids=str)
def test_batches_from_images_on_the_host_are_made_on_the_device_and_never_wait(folders, case):
    check_batches(with_flags(case, ON_HOST), folders)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_every_trainable_parameter_gets_a_gradient(folders, case):
    check_gradients(case, folders)


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
    monkeypatch.setattr(MaskedPixels, "loss", lambda objective, network, batch: batch["images"].sum().item())
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
