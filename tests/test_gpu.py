"""On an NVIDIA GPU: augmentation, training, resuming and testing are those of the CPU, and no step waits for the device.

Skipped where torch sees no GPU. A rehearsal runs the same tests at the same size on the CPU, so that they are known to work
before the first GPU is met; what has no meaning there is skipped one by one:

    python -m pytest tests/test_gpu.py -n 4 --dist worksteal     # on a GPU
    REHEARSE=1 python -m pytest tests/test_gpu.py                # on any machine

What is equal to the bit on one GPU: matrix products, LayerNorm and the mean squared error add in a fixed order. The backward
pass of attention adds the gradients of the queries from blocks of keys in any order, which changes nothing up to two blocks:
in half precision a block has 128 tokens, and the networks of the study have 197. In float32 it has 64, so only short
sequences repeat themselves. The cross-entropy of a map is summed in any order, so logged losses of fine-tuning may differ
in their last digits; its gradients do not depend on that sum. ResNet-50 promises nothing: cuDNN chooses its convolutions by
their speed, and their backward passes and that of max-pooling add in any order.
"""

import contextlib
import copy
import functools
import gc
import math
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import relative_error
from small_runs import drawn_root, log, mae_checkpoint, on_two_processes, run, words_of
from stress import assert_same

import augment
import data
import models
import splits
import trainer
from batches import Alone, Augmentation, Examples, TrainBatches, uniform
from colours import Colours
from engine import EngineError, setup
from probe_records import PROBES, load_probe
from trainer import Trainer

REHEARSAL = os.environ.get("REHEARSE") == "1"
ON_GPU = torch.cuda.is_available() and not REHEARSAL
DEVICE = "cuda" if ON_GPU else "cpu"
GPUS = torch.cuda.device_count()

pytestmark = pytest.mark.skipif(
    not (ON_GPU or REHEARSAL), reason="torch sees no GPU (REHEARSE=1 runs these tests on the CPU)"
)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU never waits for a device")

# Heads as wide as those of mae_base (64 in the encoder, 32 in the decoder), and nothing else of its size.
LEAST = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 1,
}

# Convolutions take their time on a CPU, above all in bfloat16.
SMALL_IN_REHEARSALS = "" if ON_GPU else "--img_size 32 --batch_size 4"
# A network by name -> the script that trains it, and its flags: four updates an epoch, all of them logged.
COMMON = "--img_size 64 --cache_size 64 --batch_size 8 --epochs 1 --epoch_updates 4 --warmup_epochs 0 --log_every 1"
RECIPES = {
    "pretrain": ("pretrain", "--model mae_least --num_images 16 --blr 1e-2"),
    "finetune": ("finetune", "--model mae_least --drop_path 0.3 --blr 1e-2 --keep last"),
    "resnet50": ("baseline", f"--model resnet50 --blr 1e-3 --keep last {SMALL_IN_REHEARSALS}"),
}
TRANSFORMERS = ["pretrain", "finetune"]

# The other objectives and tasks that the scripts know, each with a small head.
OTHERS = {
    "labels": "--objective labels",
    "tokens": "--objective tokens --vocabulary 16",
    "splitmask": "--objective splitmask --vocabulary 16",
    "ijepa": "--objective ijepa --teacher_momentum 0.9",
    "dino": "--objective dino --local_crops 2 --prototypes 64 --head_hidden 64 --head_bottleneck 32"
    " --freeze_epochs 0 --teacher_momentum 0.9",
}
for name, flags in OTHERS.items():
    RECIPES[name] = ("pretrain", f"--model mae_least --num_images 16 {flags}")
RECIPES["breeds"] = ("finetune", "--task breeds --model mae_least --drop_path 0.3 --blr 1e-2 --keep last")
WITH_TEACHER = ["ijepa", "dino"]


class Files(NamedTuple):
    """Where the drawn photos and the first weights of fine-tuning are."""

    root: Path
    init: Path
    flags: list


@pytest.fixture(scope="module", autouse=True)
def least_network():
    """Let the scripts know the smallest network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "mae_least", LEAST)
        yield


@pytest.fixture(scope="module", autouse=True)
def fair_share_of_cores():
    """Leave the other workers of pytest-xdist their cores."""
    threads = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, threads // workers))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(least_network, tmp_path_factory):
    root = drawn_root(tmp_path_factory)
    init = mae_checkpoint(tmp_path_factory, "mae_least")
    return Files(root, init, ["--data_root", root, "--cache_dir", tmp_path_factory.mktemp("cache")])


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """Take back what setup() chooses for the whole process."""
    precision = torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def with_tf32():
    """Let tensor cores round the factors of float32 products to 10 bits, as setup() does on a GPU."""
    torch.set_float32_matmul_precision("high")


@pytest.fixture
def without_tf32(monkeypatch):
    """Compute float32 products and convolutions in float32, also after setup()."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def command(network: str, files: Files, folder: Path, *more) -> tuple:
    """Give the script of a network and its flags; those in `more` count."""
    script, recipe = RECIPES[network]
    flags = [COMMON, recipe, *files.flags, "--no-compile --device", DEVICE, "--output_dir", folder]
    if script == "finetune":
        flags += ["--init", files.init]
    return script, *flags, *more


def train(network: str, files: Files, folder: Path, *more) -> Path:
    """Train a network -> the folder of its run."""
    run(*command(network, files, folder, *more))
    return folder


class Caught(Exception):
    """A trainer was caught before its first update."""


def trainer_of(network: str, files: Files, folder: Path, *more) -> Trainer:
    """Let a script make its trainer, and catch it before the first update."""
    caught = []

    def catch(self):
        caught.append(self)
        raise Caught

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught):
        patch.setattr(Trainer, "fit", catch)
        run(*command(network, files, folder, *more))
    return caught[0]


class Training(NamedTuple):
    """What a training leaves behind: of each update its loss and gradient norm, and the weights at the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def train_steps(made: Trainer, steps: Iterable) -> Training:
    """Make an update of each step's micro-batches."""
    losses = []
    norms = []
    for micro_batches in steps:
        norms.append(made.train_step(micro_batches, want_norm=True).item())
        losses.append(made.meter.losses.item())
        made.meter.reset()
    return Training(losses, norms, weights_of(made))


def weights_of(made: Trainer) -> dict[str, torch.Tensor]:
    """Copy the weights of a trainer to the CPU."""
    return {name: tensor.cpu().clone() for name, tensor in made.model.state_dict().items()}


def trained(network: str, files: Files, folder: Path, updates: int, *more) -> Training:
    """Train a network for some updates, without validation or files."""
    made = trainer_of(network, files, folder, *more)
    with contextlib.closing(made.batches.run(0, updates)) as steps:
        return train_steps(made, steps)


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder, "train")]


def result_of(folder: Path) -> Training:
    """Read what a finished run left behind."""
    norms = [line["grad_norm"] for line in log(folder, "train")]
    content = torch.load(folder / "model.pt", weights_only=True, map_location="cpu")
    return Training(losses_of(folder), norms, content["model"])


def is_statistic(name: str) -> bool:
    """Tell whether a tensor holds BatchNorm's statistics, which no gradient moves."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def distance(found: dict, expected: dict, start: dict) -> float:
    """How far two trainings end from each other, as a share of the way from their common start."""
    assert found.keys() == expected.keys() == start.keys()
    apart = 0.0
    way = 0.0
    for name, tensor in expected.items():
        if not is_statistic(name):
            apart += (found[name] - tensor).double().square().sum().item()
            way += (tensor - start[name]).double().square().sum().item()
    return math.sqrt(apart / way)


class Tolerance(NamedTuple):
    """How far two trainings of some updates may differ: relatively, and in their weights as a share of their way."""

    updates: int
    loss: float
    norm: float
    distance: float
    statistics: float = 0.0


def assert_alike(found: Training, expected: Training, start: dict, tolerance: Tolerance) -> None:
    assert len(found.losses) == len(expected.losses) == tolerance.updates
    assert found.losses == pytest.approx(expected.losses, rel=tolerance.loss)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance.norm)
    assert distance(found.weights, expected.weights, start) < tolerance.distance
    for name, tensor in expected.weights.items():
        if is_statistic(name):
            assert relative_error(found.weights[name].double(), tensor.double()) < tolerance.statistics, name


# -- Augmentation -------------------------------------------------------------------------------------------------------

CUTS = [(64, 64), (96, 64), (96, 112), (384, 224)]  # sides of the decoded square and of the input


def random_crops(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw crops of photos of many shapes, in pixels of their decoded squares, and all four kinds of flips."""
    rng = np.random.default_rng(size)
    sizes = rng.integers(50, 700, (count, 2)).astype(np.float32)
    boxes = augment.random_boxes(rng, sizes, (0.08, 1.0)) / np.hstack([sizes, sizes]) * size
    return torch.from_numpy(boxes), torch.from_numpy(rng.random((count, 2)) < 0.5)


def random_trimaps(count: int, size: int) -> torch.Tensor:
    """Draw trimaps of blocks of 8 pixels -> uint8 [count, size, size]."""
    blocks = torch.randint(0, 3, (count, size // 8, size // 8), dtype=torch.uint8)
    return blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)


def on_both(function, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a function on the device and on the CPU -> both results on the CPU."""
    ours = function(*[tensor.to(DEVICE) for tensor in tensors])
    assert ours.device.type == DEVICE
    return ours.cpu(), function(*tensors)


@pytest.mark.parametrize(("size", "out"), CUTS)
def test_crops_agree_within_half_a_step_although_tensor_cores_round(size, out, with_tf32):
    images = torch.randint(0, 256, (48, 3, size, size), dtype=torch.uint8)
    crop = functools.partial(augment.crop_resize, out=out)
    ours, expected = on_both(crop, images, *random_crops(48, size))
    assert (ours - expected).abs().max() < 0.5


@pytest.mark.parametrize(("size", "out"), CUTS)
def test_bilinear_trimaps_agree_but_where_a_value_lies_at_a_threshold(size, out, with_tf32):
    # Two products of values up to 3 with factors of 10 bits: an error of at most 4 * 3 / 2^11, about 0.006.
    values = augment.file_values(random_trimaps(48, size))
    crop = functools.partial(augment.crop_resize, out=out, clamp=False, kernel="bilinear")
    ours, expected = on_both(crop, values, *random_crops(48, size))
    assert (ours - expected).abs().max() < 0.008
    classes = augment.threshold_trimaps(ours)
    differs = classes != augment.threshold_trimaps(expected)
    clear = ((expected - 1.5).abs() > 0.008) & ((expected - 2.5).abs() > 0.008)
    assert not (differs & clear[:, 0]).any()
    assert differs.float().mean() < 0.01


def close_to_an_edge(start: torch.Tensor, length: torch.Tensor, flip: torch.Tensor, out: int) -> torch.Tensor:
    """Tell where the centre of an output pixel lies on the edge between two pixels, in float64 -> bool [B, out]."""
    order = torch.arange(out, dtype=torch.float64).expand(len(start), out)
    order = torch.where(flip[:, None], out - 1 - order, order)
    centre = start.double()[:, None] + (order + 0.5) * length.double()[:, None] / out
    return (centre - centre.round()).abs() < 1e-3


@pytest.mark.parametrize(("size", "out"), CUTS)
def test_nearest_trimaps_agree_but_where_a_centre_lies_between_two_pixels(size, out):
    boxes, flips = random_crops(48, size)
    crop = functools.partial(augment.crop_resize_nearest, out=out)
    ours, expected = on_both(crop, random_trimaps(48, size), boxes, flips)
    if out == 64:  # a GPU divides by multiplying with the reciprocal, which a power of two has exactly
        assert torch.equal(ours, expected)
    rows = close_to_an_edge(boxes[:, 0], boxes[:, 2], flips[:, 1], out)
    columns = close_to_an_edge(boxes[:, 1], boxes[:, 3], flips[:, 0], out)
    differs = ours != expected
    assert not (differs & ~rows[:, :, None] & ~columns[:, None, :]).any()
    assert differs.float().mean() < 0.001


ELASTIC = 50.0  # pixels, as in the original code
SIZE = 224


def test_displacements_agree_within_a_thirtieth_of_a_pixel(with_tf32):
    # cuDNN's convolutions round their factors to 10 bits too: about 2^-10 of displacements of some pixels.
    displace = functools.partial(augment.elastic_displacement, alpha=ELASTIC)
    ours, expected = on_both(displace, torch.rand(8, 2, SIZE, SIZE))
    pixels = SIZE / 2
    assert (ours - expected).abs().max() * pixels < 1 / 30
    assert expected.abs().max() * pixels > 1


def test_the_same_displacement_deforms_images_and_masks_alike(with_tf32):
    displacement = augment.elastic_displacement(torch.rand(8, 2, SIZE, SIZE), ELASTIC)
    # Places of about 100 pixels in float32 are exact to 1e-5 of a pixel, and neighbours differ by up to 255.
    images = 255 * torch.rand(8, 3, SIZE, SIZE)
    ours, expected = on_both(augment.deform, images, displacement)
    assert (ours - expected).abs().max() < 0.05
    masks = random_trimaps(8, SIZE)[:, None]
    nearest = functools.partial(augment.deform, mode="nearest")
    ours, expected = on_both(nearest, masks, displacement)
    assert (ours != expected).float().mean() < 0.001


def test_deformed_photos_agree_within_half_a_step_but_at_their_outline(with_tf32):
    coarse = torch.rand(8, 3, SIZE // 16, SIZE // 16)
    photos = 255 * F.interpolate(coarse, size=SIZE, mode="bilinear")
    draws = torch.rand(8, 2, SIZE, SIZE)

    def deform(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        return augment.deform(images, augment.elastic_displacement(draws, ELASTIC))

    ours, expected = on_both(deform, photos, draws)
    difference = (ours - expected).abs()
    # The outline is as steep as black beside white: there even a hundredth of a pixel counts.
    outside = 1 - deform(torch.ones(8, 1, SIZE, SIZE), draws)
    inside = F.max_pool2d(outside, kernel_size=3, stride=1, padding=1) < 1e-4
    assert difference[inside.expand_as(difference)].max() < 0.5
    assert inside.float().mean() > 0.8
    assert (difference > 0.5).float().mean() < 0.03


def test_changed_colours_agree_within_half_a_step(with_tf32):
    coarse = torch.rand(32, 3, 8, 8)
    photos = F.interpolate(coarse, size=64, mode="bilinear")
    changes = Colours(blur=1.0)  # a pixel between dark and bright may be solarised on one device alone
    ours, expected = on_both(changes, photos, torch.rand(32, changes.num_draws))
    assert (255 * (ours - expected)).abs().max() < 0.5
    assert (255 * (expected - photos)).abs().max() > 20


AUGMENTATIONS = {
    "crops": {},
    "elastic": {"elastic": ELASTIC},
    "bilinear": {"mask_resize": "bilinear", "elastic": ELASTIC, "inputs": "unit"},
    "colours": {"colours": Colours(solarise=0.2)},
}


@pytest.mark.parametrize("options", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_images_kept_on_the_device_give_the_same_batches_to_the_bit(options, files):
    device = setup(DEVICE).device
    names = splits.pets_split(files.root, "train").images
    place = {"cache_dir": files.flags[-1], "cache_size": 64}

    def batches(on_device: bool) -> list[dict[str, torch.Tensor]]:
        stores = []
        for kind in ("image", "trimap"):
            data.build_cache(files.root, names, kind=kind, **place)
            store = data.ImageStore(files.root, names, kind=kind, device=device, on_device=on_device, **place)
            assert (store.tensor is not None) == on_device
            stores.append(store)
        augmentation = Augmentation(64, vertical_flip=True, **options)
        draws = {"noise": uniform(16)}
        train = TrainBatches(Examples(*stores), augmentation, batch_size=8, seed=0, draws=draws, dist=Alone(device))
        return [batch for (batch,) in train.run(0, 6)]

    for kept, sent in zip(batches(True), batches(False), strict=True):
        assert kept.keys() == sent.keys() == {"images", "masks", "noise"}
        for name, tensor in kept.items():
            assert tensor.device == device
            assert torch.equal(tensor, sent[name]), name


# -- Training -----------------------------------------------------------------------------------------------------------

# Float32 has seven digits, and sums in another order agree in six of them. Adam divides each gradient by its size, so
# that the rounding of the smallest ones becomes steps in another direction: that of the keys' biases, which is zero but
# for rounding, and of a few others. With noise of 1e-5 on the results of all layers on a CPU, losses differ by 1e-7, norms
# by 2e-6 and weights by 0.006 of their way. ResNet-50 enlarges rounding: some of its ReLUs switch, which changes the
# gradient by the root of their share, and BatchNorm divides by the spread of 32 values. With the same noise its first loss
# differs by 5e-6, the norm by 0.03, the statistics by 1e-3 and the weights by 0.43 of their way; later updates say nothing.
# The other objectives and tasks differ by up to 7e-6, 3e-5 and 0.02 with it; in DINO's crops, a pixel between dark and
# bright may be solarised on one device alone.
TOLERANCES = {
    "pretrain": Tolerance(updates=3, loss=2e-5, norm=2e-4, distance=0.03),
    "finetune": Tolerance(updates=3, loss=2e-5, norm=2e-4, distance=0.03),
    "resnet50": Tolerance(updates=1, loss=1e-4, norm=0.1, distance=0.7, statistics=5e-3),
}
for name in (*OTHERS, "breeds"):
    TOLERANCES[name] = Tolerance(updates=3, loss=5e-5, norm=3e-4, distance=0.06)
TOLERANCES["dino"] = Tolerance(updates=3, loss=1e-3, norm=1e-2, distance=0.1)


@pytest.mark.parametrize("network", RECIPES)
def test_training_in_float32_is_that_of_the_cpu(network, files, without_tf32, tmp_path):
    tolerance = TOLERANCES[network]
    start = weights_of(trainer_of(network, files, tmp_path / "start", "--device cpu"))
    expected = trained(network, files, tmp_path / "cpu", tolerance.updates, "--device cpu --precision fp32")
    found = trained(network, files, tmp_path / "gpu", tolerance.updates, "--precision fp32")
    assert_alike(found, expected, start, tolerance)


CONTINUOUS = ("loss", "cross_entropy", "info_nce", "r2", "entropy", "kl", "ap")  # and not a share of right answers


@pytest.mark.parametrize("network", [*TRANSFORMERS, *OTHERS, "breeds"])
def test_validation_in_float32_is_that_of_the_cpu(network, files, without_tf32, tmp_path):
    # The same weights, whatever the gradients. A tokeniser is fitted on each device.
    more = "--precision fp32 --blr 0 --min_lr 0 --epoch_updates 1"
    (expected,) = log(train(network, files, tmp_path / "cpu", more, "--device cpu"), "val")
    (found,) = log(train(network, files, tmp_path / "gpu", more), "val")
    tolerance = 1e-4 if network in TRANSFORMERS else 1e-3  # a patch between two tokens may change its token
    compared = 0
    for name, score in expected.items():
        if name.startswith(CONTINUOUS):
            assert found[name] == pytest.approx(score, rel=tolerance, abs=1e-4), name
            compared += 1
        elif "iou" in name:  # a pixel between two equally likely classes may change its class
            assert found[name] == pytest.approx(score, abs=1e-3), name
    assert compared >= 1


@pytest.mark.parametrize(
    ("network", "tolerance"),
    [("pretrain", 0.03), ("finetune", 0.03), ("resnet50", 0.1), *((name, 0.03) for name in (*OTHERS, "breeds"))],
)
def test_bfloat16_trains_like_float32(network, tolerance, files, tmp_path):
    # bfloat16 has 8 bits, 0.4 % a rounding, and losses are means over thousands of roundings.
    expected = trained(network, files, tmp_path / "fp32", 2, "--precision fp32")
    found = trained(network, files, tmp_path / "bf16", 2, "--precision bf16")
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)


@pytest.mark.parametrize("network", TRANSFORMERS)
def test_fp16_trains_like_float32_and_skips_no_update(network, files, tmp_path):
    expected = train(network, files, tmp_path / "fp32", "--precision fp32")
    found = train(network, files, tmp_path / "fp16", "--precision fp16")
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=0.03)
    assert [line["skipped"] for line in log(found, "train")] == [0, 0, 0, 0]


def test_fp16_updates_that_overflow_are_skipped_and_counted_and_training_goes_on(files, monkeypatch, tmp_path):
    absurd = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)  # no gradient fits into float16
    monkeypatch.setattr(torch.amp, "GradScaler", absurd)
    found = train("pretrain", files, tmp_path / "run", "--epochs 6 --precision fp16")
    lines = log(found, "train")
    assert lines[0]["skipped"] == 1
    assert lines[0]["grad_norm"] is None
    assert 1 <= sum(line["skipped"] for line in lines) < 22
    assert lines[-1]["skipped"] == 0
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(tensor.isfinite().all() for tensor in result_of(found).weights.values())


@pytest.mark.parametrize("network", TRANSFORMERS)
def test_accumulation_gives_the_same_weights(network, files, without_tf32, tmp_path):
    tolerance = TOLERANCES[network]
    start = weights_of(trainer_of(network, files, tmp_path / "start"))
    expected = trained(network, files, tmp_path / "whole", tolerance.updates, "--precision fp32")
    found = trained(network, files, tmp_path / "parts", tolerance.updates, "--precision fp32 --micro_batch_size 2")
    assert_alike(found, expected, start, tolerance)


# -- No step waits for the device ---------------------------------------------------------------------------------------

# Without instructions for bfloat16, a CPU takes five times as long for its convolutions.
OF_CONVOLUTIONS = "bf16" if ON_GPU else "fp32"
# Scaling losses for fp16 waits by its nature: the host must know whether a step was skipped.
STEPS = {
    "pre-training": ("pretrain", "--precision bf16"),
    "pre-training in micro-batches": ("pretrain", "--precision bf16 --micro_batch_size 2 --clip_grad 1"),
    "fine-tuning": ("finetune", "--precision bf16"),
    "fine-tuning as in the original code": ("finetune", "--precision fp32 --elastic 50 --trimap_resize bilinear"),
    "ResNet-50": ("resnet50", f"--precision {OF_CONVOLUTIONS} --img_size 32 --batch_size 4"),
    "breeds": ("breeds", "--precision bf16"),
}
for name in OTHERS:
    STEPS[f"objective {name}"] = (name, "--precision bf16 --clip_grad 1")


@contextlib.contextmanager
def waiting_refused():
    """Let every operation raise that waits for the GPU, in all threads: in that of the batches too."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_without_waiting(made: Trainer) -> None:
    """Make three updates that must not wait, after two that may: they make tables and choose kernels."""
    with contextlib.closing(made.batches.run(0, 5)) as batches:
        for _ in range(2):
            made.train_step(next(batches), want_norm=True)
        with waiting_refused():
            for number, micro_batches in enumerate(batches):
                made.train_step(micro_batches, want_norm=number % 2 == 0)


@pytest.mark.parametrize("cache_device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", STEPS)
def test_no_update_waits_for_the_device(name, cache_device, files, tmp_path):
    network, more = STEPS[name]
    made = trainer_of(network, files, tmp_path / "run", more, "--epochs 2 --cache_device", cache_device)
    store = made.batches.examples.images
    assert (store.tensor is not None) == (ON_GPU and cache_device == "cuda")
    train_without_waiting(made)
    assert made.state.step == 5
    assert math.isfinite(made.meter.losses.item())


@needs_gpu
def test_an_update_that_waits_is_noticed(files, monkeypatch, tmp_path):
    made = trainer_of("pretrain", files, tmp_path / "run", "--precision bf16")
    loss_of = made.objective.loss

    def waiting(network, batch):
        loss = loss_of(network, batch)
        loss.item()
        return loss

    monkeypatch.setattr(made.objective, "loss", waiting)
    with pytest.raises(RuntimeError, match="synchronizing"):
        train_without_waiting(made)
    assert made.state.step == 2


# -- The compiled network -----------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """Start afresh; in a rehearsal the graphs are made, but no code for them, which takes half a minute."""
    torch._dynamo.reset()
    if not ON_GPU:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("network", [*TRANSFORMERS, *OTHERS, "breeds"])
def test_a_compiled_network_trains_like_the_same_one_without(network, files, compiler, without_tf32, tmp_path):
    tolerance = TOLERANCES[network]
    start = weights_of(trainer_of(network, files, tmp_path / "start"))
    expected = trained(network, files, tmp_path / "plain", tolerance.updates, "--precision fp32")
    made = trainer_of(network, files, tmp_path / "compiled", "--precision fp32 --compile")
    assert made.network is not made.model
    if network in WITH_TEACHER:
        assert made.objective.teacher.compiled is not None
    found = train_steps(made, list(made.batches.run(0, tolerance.updates)))
    assert_alike(found, expected, start, tolerance)


def test_a_compiled_network_in_bfloat16_repeats_itself_to_the_bit_and_never_waits(files, compiler, tmp_path):
    made = trainer_of("pretrain", files, tmp_path / "run", "--precision bf16 --compile")
    steps = list(made.batches.run(0, 4))
    start = copy.deepcopy((made.model.state_dict(), made.optimizer.state_dict()))
    expected = train_steps(made, steps)
    made.model.load_state_dict(start[0])
    made.optimizer.load_state_dict(start[1])
    made.state.step = 0
    with waiting_refused():
        for micro_batches in steps:
            made.train_step(micro_batches, want_norm=True)
    assert made.meter.losses.item() == pytest.approx(sum(expected.losses), rel=1e-5)
    for name, tensor in weights_of(made).items():
        assert torch.equal(tensor, expected.weights[name]), name


# -- Resuming -----------------------------------------------------------------------------------------------------------


def stop_after(step: int, *args) -> None:
    """Run a script until a stop signal arrives after an update, and demand that it ends as it should."""
    train_step = Trainer.train_step

    def then_stop(self, *positional, **options):
        norm = train_step(self, *positional, **options)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineError, match="SIGTERM; checkpoint") as info:
        patch.setattr(trainer.Trainer, "train_step", then_stop)
        run(*args)
    assert info.value.exit_code == 143
    del info  # its traceback keeps the stopped run, and so its lock, alive
    gc.collect()


def stop_and_resume(network: str, files: Files, folder: Path, *more) -> tuple[Path, Path]:
    """Train two epochs in one go, and in two parts -> the folders of both runs."""
    more = ("--epochs 2 --log_every 2", *more)
    undisturbed = train(network, files, folder / "undisturbed", *more)
    stopped = command(network, files, folder / "stopped", *more)
    stop_after(5, *stopped)
    assert "resumed" in run(*stopped)
    return undisturbed, folder / "stopped"


# Sequences of 17 tokens, and of 197 as in the study.
REPEATABLE = [
    "--precision fp32 --img_size 64",
    "--precision bf16 --img_size 64",
    "--precision bf16 --img_size 224 --batch_size 4",
]


@pytest.mark.parametrize("more", REPEATABLE)
def test_a_resumed_pretraining_ends_with_the_same_bits_in_weights_and_log(more, files, tmp_path):
    assert_same(*stop_and_resume("pretrain", files, tmp_path, more))


@pytest.mark.parametrize("more", REPEATABLE)
def test_a_resumed_fine_tuning_ends_with_the_same_bits_in_its_weights(more, files, tmp_path):
    undisturbed, stopped = stop_and_resume("finetune", files, tmp_path, more)
    expected = result_of(undisturbed)
    found = result_of(stopped)
    for name, tensor in expected.weights.items():
        assert torch.equal(tensor, found.weights[name]), name
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("network", [*OTHERS, "breeds"])
def test_a_resumed_training_of_any_objective_ends_with_the_same_bits_in_its_weights(network, files, tmp_path):
    undisturbed, stopped = stop_and_resume(network, files, tmp_path, "--precision bf16")
    expected = result_of(undisturbed)
    found = result_of(stopped)
    for name, tensor in expected.weights.items():
        assert torch.equal(tensor, found.weights[name]), name
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_a_resumed_fp16_training_keeps_its_scale_and_ends_with_the_same_bits(files, tmp_path):
    assert_same(*stop_and_resume("pretrain", files, tmp_path, "--precision fp16"))


# -- Several GPUs -------------------------------------------------------------------------------------------------------

ON_TWO = """
import os, sys
import torch
import models
import {script} as script
models.MODELS["mae_least"] = {least}
torch.backends.cudnn.allow_tf32 = False
torch.set_float32_matmul_precision = lambda precision: None
script.main(script.get_args_parser().parse_args(sys.argv[1:]))
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.skipif(ON_GPU and GPUS < 2, reason="torch sees a single GPU")
@pytest.mark.parametrize("network", ["pretrain", "resnet50", "splitmask", "dino"])
def test_two_processes_give_the_result_of_one(network, files, without_tf32, tmp_path):
    if network == "resnet50" and not ON_GPU:
        pytest.skip("CPU processes cannot share BatchNorm's statistics")
    if network in OTHERS and not ON_GPU:
        pytest.skip("what two CPU processes do is tested beside each objective")
    tolerance = TOLERANCES[network]
    more = ("--precision fp32 --epoch_updates", tolerance.updates)
    start = weights_of(trainer_of(network, files, tmp_path / "start"))
    expected = train(network, files, tmp_path / "one", *more)
    script, *flags = command(network, files, tmp_path / "two", *more)
    on_two_processes(ON_TWO.format(script=script, least=LEAST), *words_of(flags))
    assert_alike(result_of(tmp_path / "two"), result_of(expected), start, tolerance)


# -- Testing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter(files, tmp_path_factory):
    """A segmenter that has learnt a little -> the folder of its run."""
    folder = tmp_path_factory.mktemp("run") / "segmenter"
    return train("finetune", files, folder, "--epochs 8 --blr 5e-2 --drop_path 0 --precision fp32")


def records_of(segmenter: Path, files: Files, folder: Path, *flags) -> dict[str, np.ndarray]:
    """Test a copy of a run -> the arrays of its test.npz."""
    shutil.copytree(segmenter, folder)
    run("evaluate", "test", folder, *files.flags, "--batch_size", 3, *flags)
    return dict(np.load(folder / "test.npz"))


def share_moved(found: np.ndarray, expected: np.ndarray) -> float:
    """Give the share of the counted pixels that are counted in another place."""
    return np.abs(found - expected).sum() / 2 / expected.sum()


def test_records_in_float32_are_those_of_the_cpu(segmenter, files, without_tf32, tmp_path):
    expected = records_of(segmenter, files, tmp_path / "cpu", "--device cpu --precision fp32")
    found = records_of(segmenter, files, tmp_path / "gpu", "--device", DEVICE, "--precision", "fp32")
    assert found.keys() == expected.keys()
    assert found["ids"].tolist() == expected["ids"].tolist()
    np.testing.assert_allclose(found["loss_sum"], expected["loss_sum"], rtol=1e-4)
    # Logits agree to 1e-5, so only pixels between two equally likely classes may change theirs.
    for name in ("counts", "counts_native"):
        assert found[name].sum() == expected[name].sum()
        assert share_moved(found[name], expected[name]) < 2e-4
    for name in ("boundary", "boundary_native"):
        assert share_moved(found[name], expected[name]) < 2e-3


def test_records_in_bfloat16_are_close_to_those_of_the_cpu_in_float32(segmenter, files, tmp_path):
    expected = records_of(segmenter, files, tmp_path / "cpu", "--device cpu --precision fp32")
    found = records_of(segmenter, files, tmp_path / "gpu", "--device", DEVICE, "--precision", "bf16")
    assert found["loss_sum"].sum() == pytest.approx(expected["loss_sum"].sum(), rel=0.005)
    for name in ("counts", "counts_native"):
        assert share_moved(found[name], expected[name]) < 0.01


def test_masks_of_photos_are_those_of_the_cpu(segmenter, files, tmp_path):
    photos = [files.root / image for image in splits.pets_split(files.root, "test").images[:3]]
    for device in ("cpu", DEVICE):
        folder = tmp_path / f"on_{device}"
        run(
            "evaluate",
            "predict",
            "--checkpoint",
            segmenter / "model.pt",
            *photos,
            "--device",
            device,
            "--output_dir",
            folder,
        )
    for photo in photos:
        expected = np.array(Image.open(tmp_path / "on_cpu" / f"{photo.stem}_mask.png"))
        found = np.array(Image.open(tmp_path / f"on_{DEVICE}" / f"{photo.stem}_mask.png"))
        assert found.shape == expected.shape
        assert (found != expected).mean() < 0.005  # products in TF32 round logits to three digits


# -- Probing ------------------------------------------------------------------------------------------------------------


def test_probes_in_float32_are_those_of_the_cpu(files, without_tf32, tmp_path):
    found = {}
    for name, device in (("cpu", "cpu"), ("gpu", DEVICE)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(files.init, folder / "model.pt")
        run("probe", folder, *files.flags, "--precision fp32", "--device", device)
        found[name] = load_probe(folder)
    for meters in ("images", "patches"):
        expected = found["cpu"].record["meters"][meters]
        assert found["gpu"].record["meters"][meters] == pytest.approx(expected, rel=1e-3)
    for probe in PROBES:
        assert found["gpu"].score(probe) == pytest.approx(found["cpu"].score(probe), abs=0.03)
    assert share_moved(found["gpu"].sums("trimap"), found["cpu"].sums("trimap")) < 0.01


# -- CUDA graphs --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("network", TRANSFORMERS)
def test_a_recorded_pass_trains_to_the_same_bits_as_a_launched_one(network, precision, files, without_tf32, tmp_path):
    flags = ("--precision", precision, "--clip_grad", 1)
    launched = trained(network, files, tmp_path / "launched", 3, *flags, "--no-cuda_graph")
    recorded = trained(network, files, tmp_path / "recorded", 3, *flags, "--cuda_graph")
    for name, tensor in launched.weights.items():
        assert torch.equal(recorded.weights[name], tensor), name
    assert recorded.losses == pytest.approx(launched.losses, rel=1e-6)
    assert recorded.norms == pytest.approx(launched.norms, rel=1e-6)


@needs_gpu
def test_recording_leaves_no_trace_in_the_statistics_of_batch_normalisation(files, without_tf32, tmp_path):
    launched = trained("resnet50", files, tmp_path / "launched", 1, "--no-cuda_graph")
    recorded = trained("resnet50", files, tmp_path / "recorded", 1, "--cuda_graph")
    for name, tensor in launched.weights.items():
        if is_statistic(name):
            assert relative_error(recorded.weights[name].double(), tensor.double()) < 5e-3, name


@needs_gpu
def test_a_recorded_pass_sees_each_batch_and_accumulation_is_never_recorded(files, tmp_path):
    made = trainer_of("pretrain", files, tmp_path / "run", "--cuda_graph")
    with contextlib.closing(made.batches.run(0, 2)) as steps:
        (first,), (second,) = list(steps)
    losses = [made.recorded(batch).item() for batch in (first, second, first)]
    assert losses[0] == losses[2] != losses[1]
    assert trainer_of("pretrain", files, tmp_path / "parts", "--cuda_graph --micro_batch_size 4").recorded is None
