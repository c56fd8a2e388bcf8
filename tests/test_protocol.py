"""The choices of the original protocol: trimaps, elastic deformation, inputs, output, parts and optimiser."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import MemoryStore, drawn_root, log, mae_checkpoint, metrics, on_two_processes, refusal, run
from stress import assert_same
from torch import nn

import baseline
import data
import finetune
import splits
from batches import Augmentation, Examples, TrainBatches
from engine import Distributed, EngineError
from models import MAESegmenter, build_segmenter
from segmentation import REFERENCES, Segmentation, predict
from trainer import Trainer
from weights import load_model

IMG = 32
SIZES = ["--img_size", IMG, "--cache_size", IMG, "--device", "cpu"]
TRAINING = ["--model", "mae_tiny", "--batch_size", 8, "--warmup_epochs", 0, "--log_every", 1, "--epochs", 1]
AS_IT_IS = ["--crop_scale", 1, "--no-flips"]
ORIGINAL = [
    "--crop_scale",
    0.08,
    "--elastic",
    50,
    "--inputs",
    "unit",
    "--trimap_resize",
    "bilinear",
    "--output",
    "reshape",
    "--no-train_positions",
    "--layer_decay",
    0.75,
    "--keep",
    "last",
    "--pets_listing",
    "every_jpg",
    "--pets_division",
    "leaking",
]
EXTRA = ("stray_1", "stray_2", "stray_3", "stray_4")  # photos that list.txt does not name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pets, of which list.txt leaves four out: 50 files are 35 to train on, 7 to validate and 8 to test."""
    root = tmp_path_factory.mktemp("photos") / "pets"
    shutil.copytree(drawn_root(tmp_path_factory) / "oxford-iiit-pet", root / "oxford-iiit-pet")
    images = root / "oxford-iiit-pet" / "images"
    originals = sorted(images.glob("*.jpg"))
    for name, original in zip(EXTRA, originals, strict=False):
        with Image.open(original) as photo:
            photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / f"{name}.jpg")
        with Image.open(root / data.trimap_path(original.name)) as trimap:
            trimap.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / data.trimap_path(f"{name}.jpg"))
    return root


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return mae_checkpoint(tmp_path_factory, "mae_tiny", IMG)


@pytest.fixture(scope="module")
def place(root, tmp_path_factory):
    return ["--data_root", root, "--cache_dir", tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="module")
def flags(place):
    return [*SIZES, *place, *TRAINING]


@pytest.fixture(scope="module")
def original(flags, place, init, tmp_path_factory):
    """A tested run with all of the original's choices -> (folder, what training printed)."""
    folder = tmp_path_factory.mktemp("run") / "original"
    text = run("finetune", *flags, "--init", init, *ORIGINAL, "--output_dir", folder, "--blr", 1e-2)
    run("evaluate", "test", folder, *place, "--device", "cpu", "--batch_size", 3)
    return folder, text


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def read_small(root: Path, image: str) -> torch.Tensor:
    """Read a photo as the networks here take it, 0 to 255 [3, IMG, IMG]."""
    with Image.open(root / image) as photo:
        small = photo.convert("RGB").resize((IMG, IMG), Image.Resampling.BICUBIC)
    return torch.tensor(np.asarray(small)).permute(2, 0, 1).float()


# -- Trimaps that are resized bilinearly --------------------------------------------------------------------------------


def triangle_weights(size: int, out: int) -> list[list[float]]:
    """Weigh the cells of an axis for each output cell by a triangle that widens with the scale."""
    scale = size / out
    reach = max(scale, 1.0)
    table = []
    for place in range(out):
        centre = (place + 0.5) * scale
        weights = []
        for cell in range(size):
            weights.append(max(0.0, 1 - abs(cell + 0.5 - centre) / reach))
        total = sum(weights)
        table.append([weight / total for weight in weights])
    return table


def resize_slowly(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize [H, W] with a triangle filter, pixel by pixel."""
    rows = triangle_weights(values.shape[0], size[0])
    columns = triangle_weights(values.shape[1], size[1])
    resized = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            for source_y, row_weight in enumerate(rows[y]):
                if row_weight == 0:
                    continue
                for source_x, column_weight in enumerate(columns[x]):
                    resized[y, x] += row_weight * column_weight * values[source_y, source_x]
    return resized


def write_pet(root: Path, name: str, trimap: np.ndarray) -> str:
    """Write a trimap of file values with a black photo -> the photo's path."""
    image = f"oxford-iiit-pet/images/{name}.jpg"
    for path in (root / image, root / data.trimap_path(image)):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", trimap.shape[::-1]).save(root / image)
    Image.fromarray(trimap).save(root / data.trimap_path(image))
    return image


@pytest.fixture(scope="module")
def folder_of_trimaps(tmp_path_factory):
    return tmp_path_factory.mktemp("trimaps")


@settings(deadline=None, database=None, max_examples=25)
@given(st.integers(0, 2**31), st.tuples(*[st.integers(1, 21)] * 2), st.tuples(*[st.integers(1, 13)] * 2))
def test_bilinear_trimaps_equal_a_triangle_filter_in_loops(folder_of_trimaps, seed, native, size):
    trimap = np.random.default_rng(seed).integers(1, 4, native).astype(np.uint8)
    image = write_pet(folder_of_trimaps, f"pet_{seed}", trimap)
    found = data.load_truth(folder_of_trimaps, [image], size, resize="bilinear")[0].numpy()
    values = resize_slowly(trimap, size)
    expected = np.zeros(size, int)
    expected[values >= 1.5] = 1
    expected[values >= 2.5] = 2
    clear = (np.abs(values - 1.5) > 1e-4) & (np.abs(values - 2.5) > 1e-4)
    assert found.dtype == np.uint8
    assert (found == expected)[clear].all()


def test_background_appears_between_pet_and_border_and_never_by_default(tmp_path):
    trimap = np.full((6, 9), 1, np.uint8)
    trimap[:, 5:] = 3
    image = write_pet(tmp_path, "pet", trimap)
    bilinear = data.load_truth(tmp_path, [image], (2, 3), resize="bilinear")
    assert bilinear.tolist() == [[[0, 1, 2]] * 2]
    nearest = data.load_truth(tmp_path, [image], (2, 3))
    with Image.open(tmp_path / data.trimap_path(image)) as file:
        expected = np.asarray(file.resize((3, 2), Image.Resampling.NEAREST)) - 1
    assert (nearest[0].numpy() == expected).all()
    assert 1 not in nearest
    with pytest.raises(data.DataError, match="resized by nearest or bilinear, got 'cubic'"):
        data.load_truth(tmp_path, [image], 3, resize="cubic")


def test_training_masks_become_background_between_pet_and_border_too():
    masks = torch.zeros(4, 1, 12, 12, dtype=torch.uint8)
    masks[..., 6:] = 2
    examples = Examples(MemoryStore(torch.zeros(4, 3, 12, 12, dtype=torch.uint8)), MemoryStore(masks))
    seen = {}
    for resize in data.TRIMAP_RESIZE:
        augmentation = Augmentation(9, crop_scale=None, horizontal_flip=False, mask_resize=resize)
        (batch,) = next(TrainBatches(examples, augmentation, batch_size=4, seed=0).run(0, 1))
        seen[resize] = batch["masks"]
    assert seen["bilinear"][0, 0].tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2]
    assert set(seen["nearest"].unique().tolist()) == {0, 2}


# -- Elastic deformation of batches -------------------------------------------------------------------------------------


def patterns(count: int, size: int) -> torch.Tensor:
    """Draw patches of 0 and 255 in the first channel, and white in the others: uint8 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 1, 4, 4, generator=generator)
    pictures = torch.full((count, 3, size, size), 255, dtype=torch.uint8)
    pictures[:, :1] = 255 * (F.interpolate(coarse, size, mode="bicubic") > 0.5)
    return pictures


def elastic_batches(rank=0, world_size=1, micro=None, elastic=50.0, **options) -> TrainBatches:
    pictures = patterns(8, 48)
    masks = (pictures[:, :1] >= 128).to(torch.uint8)
    augmentation = Augmentation(48, elastic=elastic, inputs="unit", **options)
    dist = Distributed(rank, rank, world_size, torch.device("cpu"))
    examples = Examples(MemoryStore(pictures), MemoryStore(masks))
    return TrainBatches(examples, augmentation, batch_size=8, seed=2, micro_batch_size=micro, dist=dist)


def joined(micro_batches: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in micro_batches]) for name in micro_batches[0]}


@pytest.mark.parametrize("resize", data.TRIMAP_RESIZE)
@pytest.mark.parametrize("crop_scale", [None, (0.08, 1.0)])
def test_an_image_and_its_mask_are_deformed_together(resize, crop_scale):
    train = elastic_batches(mask_resize=resize, crop_scale=crop_scale, vertical_flip=True)
    still = elastic_batches(mask_resize=resize, crop_scale=crop_scale, vertical_flip=True, elastic=0.0)
    for moved, plain in zip(train.run(0, 3), still.run(0, 3), strict=True):
        (batch,) = moved
        (undeformed,) = plain
        assert (batch["masks"] != undeformed["masks"]).float().mean() > 0.02, "nothing was deformed"
        assert set(batch) == {"images", "masks"}
        pattern, white, _ = batch["images"].unbind(1)
        inside = white > 0.9999
        assert 0.8 < inside.float().mean() < 1
        wrong = (pattern >= 0.5) != (batch["masks"] == 1)
        if resize == "bilinear" and crop_scale is None:  # the two are interpolated alike
            clear = (pattern - 0.5).abs() > 1e-3
        else:
            clear = (pattern - 0.5).abs() > 0.45
        assert clear.float().mean() > 0.7
        assert (wrong & inside & clear).float().mean() < (1e-3 if crop_scale else 1e-6)
        filled = white == 0
        assert (batch["masks"][filled] == (1 if resize == "nearest" else 0)).all()


def test_places_from_outside_are_background_or_with_bilinear_masks_pet():
    border = torch.full((8, 1, 48, 48), 2, dtype=torch.uint8)
    white = torch.full((8, 3, 48, 48), 255, dtype=torch.uint8)
    filled = {}
    for resize in data.TRIMAP_RESIZE:
        augmentation = Augmentation(48, elastic=400.0, inputs="unit", mask_resize=resize)
        train = TrainBatches(Examples(MemoryStore(white), MemoryStore(border)), augmentation, batch_size=8, seed=0)
        (batch,) = next(train.run(0, 1))
        black = batch["images"][:, 0] == 0
        assert 0.005 < black.float().mean() < 0.6
        filled[resize] = set(batch["masks"][black].unique().tolist())
        assert (batch["masks"][batch["images"][:, 0] == 1] == 2).all()
    assert filled == {"nearest": {1}, "bilinear": {0}}


def test_processes_and_micro_batches_deform_as_one_process_does():
    options = {"mask_resize": "bilinear", "crop_scale": (0.08, 1.0), "vertical_flip": True}
    together = [joined(batch) for batch in elastic_batches(**options).run(0, 2)]
    by_micro = [joined(batch) for batch in elastic_batches(micro=2, **options).run(0, 2)]
    by_rank = [
        [joined(b) for b in elastic_batches(rank=r, world_size=2, micro=2, **options).run(0, 2)] for r in range(2)
    ]
    for step, expected in enumerate(together):
        apart = joined([by_rank[0][step], by_rank[1][step]])
        for other in (by_micro[step], apart):
            assert torch.allclose(other["images"], expected["images"], atol=1e-5)
            assert (other["masks"] != expected["masks"]).float().mean() < 1e-3
    assert not torch.equal(together[0]["images"], together[1]["images"])


def test_without_elastic_the_draws_of_a_batch_are_what_they_were():
    assert Augmentation(32).draws() == {}
    plain = elastic_batches().prepare(0)
    still = elastic_batches(elastic=0.0).prepare(0)
    assert (plain.index == still.index).all()
    assert (plain.boxes == still.boxes).all()
    assert (plain.flips == still.flips).all()
    assert set(still.arrays) == set()
    assert plain.arrays["elastic"].shape == (8, 2, 48, 48)


# -- Output by reshape --------------------------------------------------------------------------------------------------


class NumberedTokens(nn.Module):
    """A last layer that names the token and the place in it of every number: 1000 * token + place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.arange(x.shape[1]).view(1, -1, 1)
        return (1000 * tokens + torch.arange(768)).expand(len(x), -1, -1).double()


def numbered_logits(output: str) -> torch.Tensor:
    model = build_segmenter("mae_tiny", output=output)
    model.decoder_pred = NumberedTokens()
    with torch.no_grad():
        return model(torch.zeros(1, 3, 224, 224))[0].long()


def test_reshape_puts_a_tokens_numbers_on_three_and_a_half_rows_of_one_class():
    logits = numbered_logits("reshape").tolist()
    for number in range(3):
        for y in range(224):
            for x in range(224):
                flat = 224 * 224 * number + 224 * y + x
                token = flat // 768
                assert logits[number][y][x] == 1000 * token + (flat - 768 * token)


def test_with_reshape_few_logits_come_from_the_token_that_sees_the_pixel():
    source = numbered_logits("reshape") // 1000
    own = torch.arange(14).repeat_interleave(16)[:, None] * 14 + torch.arange(14).repeat_interleave(16)
    shares = (source == own).float().mean((1, 2))
    assert ((shares > 0) & (shares < 0.02)).all()
    assert 0.005 < (source == own).float().mean() < 0.01
    assert (source[0] != source[1]).all()
    assert (source[1] != source[2]).all()
    assert (source[0] != source[2]).all()
    assert (numbered_logits("unpatchify") // 1000 == own).all()


def test_reshape_changes_neither_parameters_nor_cost():
    models = [build_segmenter("mae_tiny", img_size=IMG, output=output) for output in ("unpatchify", "reshape")]
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1]
    assert models[0].flops() == models[1].flops()
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(2, 3, IMG, IMG)
    with torch.no_grad():
        logits = [model(images) for model in models]
    assert logits[0].shape == logits[1].shape
    assert torch.equal(logits[0].flatten().sort().values, logits[1].flatten().sort().values)
    assert not torch.equal(logits[0], logits[1])
    with pytest.raises(ValueError, match="output must be unpatchify or reshape, got 'flat'"):
        build_segmenter("mae_tiny", img_size=IMG, output="flat")


# -- Inputs -------------------------------------------------------------------------------------------------------------


def scale_by_hand(pixels: torch.Tensor, inputs: str) -> torch.Tensor:
    if inputs == "unit":
        return pixels / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (pixels / 255 - mean) / std


def is_one_of(image: torch.Tensor, expected: torch.Tensor) -> bool:
    return (expected - image).abs().amax((1, 2, 3)).min().item() < 1e-3


@pytest.mark.parametrize("inputs", ["imagenet", "unit"])
def test_the_network_receives_pixels_scaled_as_the_flag_says(inputs, flags, place, root, tmp_path, monkeypatch):
    received = {"train": [], "eval": []}
    forward = MAESegmenter.forward

    def recording(self, images, *rest):
        received["train" if self.training else "eval"].extend(images.clone())
        return forward(self, images, *rest)

    def take(phase: str) -> list[torch.Tensor]:
        taken = received[phase]
        received[phase] = []
        return taken

    monkeypatch.setattr(MAESegmenter, "forward", recording)
    run("baseline", *flags, *AS_IT_IS, "--inputs", inputs, "--output_dir", tmp_path / "run")
    seen = {"train": take("train"), "val": take("eval")}
    run("evaluate", "test", tmp_path / "run", *place, "--device", "cpu")
    seen["test"] = take("eval")
    assert {part: len(images) for part, images in seen.items()} == {"train": 32, "val": 6, "test": 8}
    for part, images in seen.items():
        names = splits.pets_split(root, part).images
        expected = scale_by_hand(torch.stack([read_small(root, name) for name in names]), inputs)
        assert all(is_one_of(image, expected) for image in images)

    model, content = load_model(str(tmp_path / "run/model.pt"))
    expected = {"kind": "segmenter", "name": "mae_tiny", "img_size": IMG}
    if inputs == "unit":
        expected["inputs"] = "unit"
    assert content["model_config"] == expected
    assert model.inputs == inputs
    name = splits.pets_split(root, "test").images[0]
    received["eval"].clear()
    with Image.open(root / name) as photo:
        predict(model, photo, IMG)
    (image,) = take("eval")
    assert (image - scale_by_hand(read_small(root, name), inputs)).abs().max() < 1e-5


def test_panels_show_the_photos_whatever_the_network_takes(original, root):
    folder, _ = original
    panels = np.load(folder / "panels.npz")
    images = next(panels[name] for name in panels if panels[name].ndim == 4 and panels[name].shape[-1] == 3)
    ids = [str(name) for name in panels["ids"]] if "ids" in panels else None
    photos = [read_small(root, image) for image in splits.pets_split(root, "test", source=LEAKING).images]
    photos = torch.stack(photos).permute(0, 2, 3, 1).numpy()
    assert ids is None or set(ids) <= set(np.load(folder / "test.npz")["ids"])
    for image in images:
        assert np.abs(photos - image.astype(float)).max((1, 2, 3)).min() <= 1


def test_a_checkpoint_of_earlier_versions_is_loaded_with_the_defaults(tmp_path):
    model = build_segmenter("mae_tiny", img_size=IMG)
    config = {"kind": "segmenter", "name": "mae_tiny", "img_size": IMG, "head": "decoder"}
    torch.save({"model": model.state_dict(), "model_config": config}, tmp_path / "model.pt")
    loaded, _ = load_model(str(tmp_path / "model.pt"))
    assert (loaded.inputs, loaded.output) == ("imagenet", "unpatchify")
    images = torch.randn(1, 3, IMG, IMG)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))


# -- A run that leaks, and its test -------------------------------------------------------------------------------------

LEAKING = splits.PetsSource("every_jpg", "leaking")


def test_a_leaking_run_says_so_and_counts_right(original, root):
    folder, text = original
    train = set(splits.pets_split(root, "train", source=LEAKING).images)
    test = splits.pets_split(root, "test", source=LEAKING).images
    assert len(test) == 8
    share = sum(image in train for image in test) / len(test)
    assert share > 0
    remark = f"this run leaks: {100 * share:.1f} % of the test images are trained on (--pets_division leaking)"
    assert f"note: {remark}\n" in text
    assert config_of(folder)["remarks"] == [remark]
    assert config_of(folder)["experiment"]["pets_division"] == "leaking"


def test_other_runs_have_no_such_remark(flags, tmp_path):
    text = run("baseline", *flags, "--output_dir", tmp_path / "run")
    assert "leaks" not in text
    assert config_of(tmp_path / "run")["remarks"] == []


def test_model_config_and_records_hold_the_choices(original):
    folder, _ = original
    model, content = load_model(str(folder / "model.pt"))
    assert content["model_config"] == {
        "kind": "segmenter",
        "name": "mae_tiny",
        "img_size": IMG,
        "head": "decoder",
        "output": "reshape",
        "inputs": "unit",
    }
    assert model.output == "reshape"


def test_a_run_is_tested_by_its_own_protocol(original, root):
    folder, _ = original
    records = np.load(folder / "test.npz")
    images = splits.pets_split(root, "test", source=LEAKING).images
    assert sorted(records["ids"]) == sorted(Path(image).stem for image in images)
    default = splits.pets_split(root, "test").images
    assert set(images) != set(default)
    model, _ = load_model(str(folder / "model.pt"))
    for number, name in enumerate(records["ids"]):
        image = f"oxford-iiit-pet/images/{name}.jpg"
        with Image.open(root / data.trimap_path(image)) as file:
            values = Image.fromarray(np.array(file, np.float32))
        small = np.asarray(values.resize((IMG, IMG), Image.Resampling.BILINEAR))
        truth = (small >= 1.5).astype(int) + (small >= 2.5)
        with torch.no_grad():
            logits = model(read_small(root, image)[None] / 255)
        expected = F.cross_entropy(logits, torch.from_numpy(truth)[None], reduction="sum").item()
        assert records["loss_sum"][number] == pytest.approx(expected, rel=1e-4)
        assert records["counts"][number].sum(1).tolist() == [(truth == k).sum() for k in range(3)]


@pytest.mark.parametrize("division", splits.PETS_DIVISIONS)
def test_reference_points_take_the_same_flags(division, original, place, root, tmp_path):
    chosen = ["--pets_listing", "every_jpg", "--pets_division", division, "--trimap_resize", "bilinear"]
    output = tmp_path / "reference.npz"
    run("evaluate", "reference", *place, "--device", "cpu", "--img_size", IMG, *chosen, "--output", output)
    reference = np.load(output)
    source = splits.PetsSource("every_jpg", division)
    parts = {}
    for part in ("train", "test"):
        images = splits.pets_split(root, part, source=source).images
        parts[part] = data.load_truth(root, images, IMG, "bilinear").numpy()
        if part == "test":
            assert list(reference["ids"]) == [Path(image).stem for image in images]
    shares = np.stack([(parts["train"] == k).mean(0) for k in range(3)])
    guesses = {"all_animal": np.zeros((IMG, IMG)), "all_background": np.ones((IMG, IMG)), "mean_mask": shares.argmax(0)}
    assert set(guesses) == set(REFERENCES)
    for name, guess in guesses.items():
        for number, truth in enumerate(parts["test"]):
            expected = [[((truth == i) & (guess == j)).sum() for j in range(3)] for i in range(3)]
            assert reference[f"counts_{name}"][number].tolist() == expected
    if division == "leaking":
        records = np.load(original[0] / "test.npz")
        assert sorted(records["ids"]) == sorted(reference["ids"])
        assert records["counts"].sum() == reference["counts_all_animal"].sum()


def test_photos_that_the_list_leaves_out_are_used(flags, root, tmp_path):
    run("baseline", *flags, "--pets_listing", "every_jpg", "--output_dir", tmp_path / "run")
    assert metrics(tmp_path / "run")["n_train"] == 35
    parts = [splits.pets_split(root, part, source=splits.PetsSource("every_jpg")).images for part in splits.PETS_PARTS]
    assert [len(part) for part in parts] == [35, 7, 8]
    names = {Path(image).stem for part in parts for image in part}
    assert set(EXTRA) < names
    assert len(names) == 50


# -- Positions, weights, optimiser --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_position_embeddings_stay_as_they_are_if_they_are_frozen(trained, flags, init, tmp_path):
    choice = "--train_positions" if trained else "--no-train_positions"
    run("finetune", *flags, "--init", init, choice, "--blr", 1e-1, "--output_dir", tmp_path / "run")
    before = torch.load(init, weights_only=True)["model"]
    after = torch.load(tmp_path / "run/model.pt", weights_only=True)["model"]
    for name in ("pos_embed", "decoder_pos_embed"):
        assert torch.equal(before[name], after[name]) is not trained
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        assert not torch.equal(before[name], after[name])
    text = run("finetune", *flags, "--init", init, choice, "--output_dir", tmp_path / "dry", "--dry_run")
    tensors = sum(int(count) for count in re.findall(r"(\d+) tensors", text))
    model = build_segmenter("mae_tiny", img_size=IMG)
    assert tensors == len(list(model.parameters())) - 1 - (0 if trained else 2)  # without the mask token


@pytest.mark.parametrize("keep", ["best", "last"])
def test_keep_chooses_the_weights_and_both_scores_are_recorded(keep, flags, init, tmp_path, monkeypatch):
    """The scores are made to fall after the first of three epochs."""
    validate = Segmentation.validate
    weights = []

    def falling(self, step, stopping):
        scores = validate(self, step, stopping)
        weights.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return {**scores, "iou": 1 / len(weights)}

    monkeypatch.setattr(Segmentation, "validate", falling)
    run("finetune", *flags, "--epochs 3 --val_epochs 1 --keep", keep, "--init", init, "--output_dir", tmp_path / "run")
    found = metrics(tmp_path / "run")
    assert (found["best"]["epoch"], found["best"]["iou"]) == (1, 1)
    assert (found["last"]["epoch"], found["last"]["iou"]) == (3, pytest.approx(1 / 3))
    kept = torch.load(tmp_path / "run/model.pt", weights_only=True)["model"]
    expected = weights[0 if keep == "best" else -1]
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert not torch.equal(weights[0]["decoder_pred.weight"], weights[-1]["decoder_pred.weight"])


def adam_by_hand(parameter: torch.Tensor, state: dict, lr: float, weight_decay: float) -> None:
    """Do a step of Adam (Kingma & Ba 2015) with L2 regularisation, betas (0.9, 0.999), on a parameter in place."""
    gradient = parameter.grad + weight_decay * parameter
    state["step"] = state.get("step", 0) + 1
    state["mean"] = 0.9 * state.get("mean", 0) + 0.1 * gradient
    state["square"] = 0.999 * state.get("square", 0) + 0.001 * gradient**2
    mean = state["mean"] / (1 - 0.9 ** state["step"])
    square = state["square"] / (1 - 0.999 ** state["step"])
    parameter -= lr * mean / (square.sqrt() + 1e-8)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_steps_at_a_constant_rate_equal_the_optimiser_run_by_hand(optimizer, flags, tmp_path, monkeypatch):
    batches = []
    train_step = Trainer.train_step

    def recording(self, micro_batches, want_norm):
        batches.extend({name: value.clone() for name, value in batch.items()} for batch in micro_batches)
        return train_step(self, micro_batches, want_norm)

    monkeypatch.setattr(Trainer, "train_step", recording)
    chosen = ["--optimizer", optimizer, "--lr_schedule", "constant", "--warmup_epochs", 0.5, "--blr", 0.032]
    run("baseline", *flags, *chosen, "--drop_path", 0, "--keep", "last", "--seed", 3, "--output_dir", tmp_path / "run")
    assert len(batches) == 4
    lr = 0.032 * 8 / 256
    rates = [lr / 2, lr, lr, lr]
    assert [line["lr"] for line in log(tmp_path / "run", "train")] == pytest.approx(rates)

    torch.manual_seed(3)
    model = build_segmenter("mae_tiny", img_size=IMG)
    exempt = ("cls_token", "pos_embed", "decoder_pos_embed")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and name not in exempt]
    others = [p for name, p in parameters.items() if p.ndim <= 1 or name in exempt]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), foreach=False)
    states = {name: {} for name in parameters}
    for batch, rate in zip(batches, rates, strict=True):
        model.zero_grad()
        F.cross_entropy(model(batch["images"]), batch["masks"]).backward()
        if optimizer == "adamw":
            for group in peer.param_groups:
                group["lr"] = rate
            peer.step()
            continue
        with torch.no_grad():
            for name, parameter in parameters.items():
                decay = 0.05 if parameter.ndim > 1 and name not in exempt else 0.0
                adam_by_hand(parameter, states[name], rate, decay)
    found = torch.load(tmp_path / "run/model.pt", weights_only=True)["model"]
    torch.manual_seed(3)
    start = build_segmenter("mae_tiny", img_size=IMG).state_dict()
    for name, parameter in parameters.items():
        moved = (parameter - start[name]).norm()
        assert (found[name] - parameter).norm() < 1e-3 * moved + 1e-7, name


def test_the_flags_reach_training_and_validation(flags, root, tmp_path, monkeypatch):
    opened = []
    open_task = Segmentation.open

    def open_and_leave(self, run):
        opened.append((open_task(self, run), self.val_truth, self.val_store.images))
        raise EngineError("seen enough")

    monkeypatch.setattr(Segmentation, "open", open_and_leave)
    for chosen in ([], [word for word in ORIGINAL if word not in ("--output", "reshape")]):
        folder = tmp_path / str(len(chosen))
        assert refusal("baseline", *flags, *chosen, "--output_dir", folder) == "seen enough"
    options = {"horizontal_flip": True, "vertical_flip": True}
    default, original = (batches.augmentation for batches, _, _ in opened)
    assert default == Augmentation(IMG, crop_scale=(0.5, 1.0), **options)
    chosen = {"elastic": 50, "mask_resize": "bilinear", "inputs": "unit"}
    assert original == Augmentation(IMG, crop_scale=(0.08, 1.0), **options, **chosen)
    for resize, (_, truth, images) in zip(data.TRIMAP_RESIZE, opened, strict=True):
        assert torch.equal(truth, data.load_truth(root, images, IMG, resize))


# -- Interruption and processes -----------------------------------------------------------------------------------------


def test_a_run_with_all_choices_resumes_to_the_bit(flags, init, tmp_path, monkeypatch):
    args = [
        *flags,
        "--init",
        init,
        *ORIGINAL,
        "--epochs",
        3,
        "--blr",
        1e-2,
        "--drop_path",
        0.2,
        "--lr_schedule",
        "constant",
        "--optimizer",
        "adam",
    ]
    run("finetune", *args, "--output_dir", tmp_path / "undisturbed")
    train_step = Trainer.train_step
    for stop_at in (3, 8):  # within an epoch, and at the end of one

        def interrupted(self, micro_batches, want_norm, stop_at=stop_at):
            norm = train_step(self, micro_batches, want_norm)
            if self.state.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return norm

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", interrupted)
            message = message_of_a_stop("finetune", *args, "--output_dir", tmp_path / "stopped")
        assert f"checkpoint written at step {stop_at} of 12" in message
    assert "at step 8 of 12" in run("finetune", *args, "--output_dir", tmp_path / "stopped")
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")


def message_of_a_stop(script: str, *args) -> str:
    """Run what a signal stops -> its message; the traceback, which holds the run's lock, is gone on return."""
    try:
        run(script, *args)
    except EngineError as error:
        assert error.exit_code == 143
        return str(error)
    raise AssertionError("the run was not stopped")


TRAINS = """
import sys
import finetune
finetune.main(finetune.get_args_parser().parse_args(sys.argv[1:]))
"""


def test_two_processes_train_as_one_with_elastic_deformation(flags, init, tmp_path):
    args = [*flags, "--init", init, *ORIGINAL, "--blr", 1e-2]
    run("finetune", *args, "--output_dir", tmp_path / "one")
    on_two_processes(TRAINS, *args, "--output_dir", tmp_path / "two")
    losses = {}
    for name in ("one", "two"):
        losses[name] = [line["loss"] for line in log(tmp_path / name, "train")]
    assert len(losses["one"]) == 4
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)


# -- Wrong combinations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "wrong", "reason"),
    [
        ("finetune", ["--output", "reshape", "--head", "linear"], "--head linear has no decoder"),
        ("baseline", ["--model", "resnet50", "--output", "reshape"], "resnet50 has no decoder"),
        ("baseline", ["--model", "resnet50", "--optimizer", "adam", "--elastic", 50], "without augmentation"),
        ("baseline", ["--elastic", 50, "--img_size", 16], "--img_size must be at least 21"),
        ("finetune", ["--elastic", 50, "--img_size", 16], "--img_size must be at least 21"),
        ("baseline", ["--model", "resnet50", "--no-train_positions"], "resnet50 has none"),
        ("finetune", ["--elastic", -1], "--elastic"),
        ("finetune", ["--inputs", "raw"], "--inputs"),
        ("finetune", ["--trimap_resize", "bicubic"], "--trimap_resize"),
        ("finetune", ["--output", "flat"], "--output"),
        ("baseline", ["--pets_division", "mixed"], "--pets_division"),
        ("baseline", ["--pets_listing", "all"], "--pets_listing"),
        ("baseline", ["--optimizer", "sgd"], "--optimizer"),
        ("baseline", ["--lr_schedule", "step"], "--lr_schedule"),
        ("baseline", ["--keep", "first"], "--keep"),
    ],
)
def test_wrong_combinations_are_refused_in_one_line(script, wrong, reason, flags, init, tmp_path):
    start = ["--init", init] if script == "finetune" else []
    assert reason in refusal(script, *flags, *start, "--output_dir", tmp_path / "no", *wrong)
    assert not (tmp_path / "no").exists()


CHOICES = (
    "elastic",
    "inputs",
    "trimap_resize",
    "output",
    "train_positions",
    "keep",
    "pets_listing",
    "pets_division",
    "optimizer",
    "lr_schedule",
    "layer_decay",
)


@pytest.mark.parametrize("script", [finetune, baseline])
def test_each_choice_defines_the_experiment_and_its_default_is_not_the_originals(script):
    args = script.get_args_parser().parse_args(
        ["--model", "mae_tiny", *(["--init", "x"] if script is finetune else [])]
    )
    assert {args.roles[name] for name in CHOICES} <= {"recipe", "network"}
    defaults = {name: getattr(args, name) for name in CHOICES}
    assert defaults == {
        "elastic": 0,
        "inputs": "imagenet",
        "trimap_resize": "nearest",
        "output": "unpatchify",
        "train_positions": True,
        "keep": "best",
        "pets_listing": "list.txt",
        "pets_division": "disjoint",
        "optimizer": "adamw",
        "lr_schedule": "cosine",
        "layer_decay": 0.65 if script is finetune else 1.0,
    }


def test_a_run_with_another_choice_does_not_continue_in_its_folder(original, flags, init):
    args = ["finetune", *flags, "--init", init, *ORIGINAL, "--blr", 1e-2, "--output_dir", original[0]]
    assert "is finished; nothing to do" in run(*args)
    for choice in (["--elastic", 40], ["--trimap_resize", "nearest"]):
        assert "holds another experiment" in refusal(*args, *choice)
