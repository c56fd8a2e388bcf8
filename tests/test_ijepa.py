"""I-JEPA: masks, what a prediction can see, loss and R² as defined, the same result however computed, and what it learns."""

import argparse
import contextlib
import gc
import os
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import relative_error, spread
from small_runs import SMALL, drawn_root, log, metrics, needs_photos, on_two_processes, refusal, run, words_of
from stress import assert_same
from torch import nn

import finetune
import models
import pretrain
import trainer
from engine import EngineError, setup
from objectives.ijepa import (
    BlockFeatures,
    BlockPredictor,
    Masks,
    block_shapes,
    equal_shapes,
    explained,
    normalise_features,
    prediction_loss,
)
from weights import load_model

QUICK = settings(deadline=None, database=None, max_examples=60)
GRIDS = {14: ((5, 7), (7, 5)), 16: ((6, 7), (7, 6)), 8: ((3, 4), (4, 3))}
MINI = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def mini_is_named():
    with mock.patch.dict(models.MODELS, mini=MINI):
        yield


def default_masks(side: int, **changes) -> Masks:
    """Take the default sizes on a square grid."""
    flags = {"target_scale": [0.15, 0.2], "target_aspect": [0.75, 1.5], "target_blocks": 4, "context_ratio": 0.25}
    return Masks.of(argparse.Namespace(**flags | changes), (side, side))


# -- Masks --------------------------------------------------------------------------------------------------------------


@st.composite
def any_masks(draw) -> Masks:
    """Draw sizes that fit a grid, up to a context of all that is sure to be left."""
    side = draw(st.integers(4, 20))
    low, more = draw(st.floats(0.02, 0.25)), draw(st.floats(0, 0.1))
    aspect = draw(st.sampled_from([(0.75, 1.5), (1.0, 1.0), (0.5, 2.0), (0.3, 0.5)]))
    shapes = tuple(equal_shapes((side, side), (low, low + more), aspect))
    rows, columns = shapes[0]
    blocks = draw(st.integers(1, 4).filter(lambda blocks: blocks * rows * columns < side**2))
    context = draw(st.integers(1, side**2 - blocks * rows * columns))
    return Masks((side, side), shapes, blocks, context, tuple(block_shapes((side, side), (0.85, 1.0), (1, 1))))


def parts(masks: Masks, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw masks -> context [count, K], targets [count, M, N]."""
    drawn = masks.draw(np.random.default_rng(seed), count)
    assert drawn.dtype == np.int64
    context, targets = masks.split(torch.from_numpy(drawn))
    assert context.shape == (count, masks.context)
    assert targets.shape == (count, masks.blocks, masks.target)
    return context.numpy(), targets.numpy()


@QUICK
@given(any_masks(), st.integers(0, 2**31))
def test_no_patch_of_a_target_is_in_the_context_and_none_is_in_it_twice(masks, seed):
    for context, targets in zip(*parts(masks, 5, seed), strict=True):
        assert len(set(context)) == masks.context
        assert not set(context) & set(targets.flat)
        assert context.min() >= 0 and context.max() < masks.grid[0] * masks.grid[1]


@QUICK
@given(any_masks(), st.integers(0, 2**31))
def test_targets_are_whole_blocks_of_one_area(masks, seed):
    _, targets = parts(masks, 5, seed)
    assert len({rows * columns for rows, columns in masks.target_shapes}) == 1
    for block in targets.reshape(-1, masks.target):
        rows, columns = np.divmod(block, masks.grid[1])
        height = rows.max() - rows.min() + 1
        width = columns.max() - columns.min() + 1
        assert (height, width) in masks.target_shapes
        assert len(set(block)) == height * width
        assert rows.max() < masks.grid[0]


@QUICK
@given(st.integers(4, 30), st.floats(0.02, 0.5), st.floats(0.5, 1.5))
def test_a_block_is_at_most_half_a_patch_away_from_a_size_and_an_aspect_that_are_asked_for(side, share, aspect):
    [(rows, columns)] = block_shapes((side, side), (share, share), (aspect, aspect))
    assert abs(rows - min(max((share * side**2 * aspect) ** 0.5, 1), side)) <= 0.5 + 1e-9
    assert abs(columns - min(max((share * side**2 / aspect) ** 0.5, 1), side)) <= 0.5 + 1e-9


@pytest.mark.parametrize("side", GRIDS)
def test_the_default_blocks_have_two_shapes_within_the_papers_range_of_sizes(side):
    masks = default_masks(side)
    assert masks.target_shapes == GRIDS[side]
    assert 0.15 <= masks.target / side**2 <= 0.2
    assert masks.context == side**2 // 4


@pytest.mark.parametrize("side", GRIDS)
def test_every_position_can_be_a_target_and_can_be_seen(side):
    context, targets = parts(default_masks(side), 2000)
    for patches in (targets, context):
        hits = np.bincount(patches.ravel(), minlength=side**2).reshape(side, side)
        assert hits.min() > 20
        # No side of the image is preferred.
        assert hits[0].sum() == pytest.approx(hits[-1].sum(), rel=0.2)
        assert hits[:, 0].sum() == pytest.approx(hits[:, -1].sum(), rel=0.2)
        assert hits[: side // 2].sum() == pytest.approx(hits[(side + 1) // 2 :].sum(), rel=0.05)


def test_a_context_lies_in_its_block_unless_too_little_of_it_is_left():
    masks = default_masks(14)._replace(context_shapes=((9, 9),))
    context, targets = parts(masks, 500)
    filled = 0
    for seen, hidden in zip(context, targets, strict=True):
        extent = [np.ptp(axis) + 1 for axis in np.divmod(seen, 14)]
        if max(extent) > 9:
            filled += 1
            assert len(set(hidden.flat)) > 9**2 - 49  # so much must be covered to leave less than is asked for
    assert 0 < filled < 500


def test_masks_follow_from_the_generator_alone():
    masks = default_masks(8)
    first, again, other = (masks.draw(np.random.default_rng(seed), 6) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({tuple(row) for row in first}) == 6


@pytest.mark.parametrize("changes", [{"context_ratio": 0.5}, {"target_blocks": 6}, {"target_blocks": 5}])
def test_a_context_that_targets_may_cover_is_refused(changes):
    blocks = changes.get("target_blocks", 4)
    left = max(64 - 12 * blocks, 0)
    message = rf"of 64 patches, but {blocks} targets of 12 may leave no more than {left}; use a lower ratio or fewer"
    with pytest.raises(ValueError, match=message):
        default_masks(8, **changes)


def test_a_context_of_no_patch_is_refused():
    with pytest.raises(ValueError, match=r"--context_ratio 0.001 asks for 0 of 64 patches; use at least 0.016"):
        default_masks(8, context_ratio=0.001)


# -- Network ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> BlockPredictor:
    return spread(BlockPredictor(predictor_dim=16, predictor_depth=2, **SIZES)).eval()


def images_and_masks(count: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    context, targets = (torch.from_numpy(part) for part in parts(default_masks(8), count, seed))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 64, 64, generator=generator), context, targets


def other_pixels(images: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Replace the pixels of some patches [B, K] of images at 8 x 8 patches of 8 x 8 pixels."""
    changed = torch.zeros(len(images), 64).scatter(1, patches, 1.0)
    changed = changed.view(-1, 1, 8, 1, 8, 1).expand(-1, 3, 8, 8, 8, 8).reshape(images.shape)
    return torch.where(changed == 1, images + 3, images)


def test_pixels_of_targets_and_of_all_that_is_not_context_change_no_prediction(network):
    images, context, targets = images_and_masks()
    predicted = network(images, context, targets)
    assert torch.equal(network(other_pixels(images, targets.flatten(1)), context, targets), predicted)
    for number, row in enumerate(context):
        hidden = torch.tensor(sorted(set(range(64)) - set(row.tolist())))[None]
        one = slice(number, number + 1)
        changed = network(other_pixels(images[one], hidden), context[one], targets[one])
        torch.testing.assert_close(changed, predicted[one])


def test_every_patch_of_the_context_changes_every_prediction(network):
    images, context, targets = images_and_masks(count=1)
    predicted = network(images, context, targets)
    for patch in context[0]:
        changed = network(other_pixels(images, patch.view(1, 1)), context, targets)
        assert ((changed - predicted).abs().amax(-1) > 1e-6).all()


def test_a_prediction_depends_on_no_other_image_and_on_no_other_block(network):
    images, context, targets = images_and_masks()
    predicted = network(images, context, targets)
    for image in range(len(images)):
        for block in range(targets.shape[1]):
            one = slice(image, image + 1)
            alone = network(images[one], context[one], targets[one, block : block + 1])
            torch.testing.assert_close(alone[0, 0], predicted[image, block], rtol=1e-4, atol=1e-5)


def slow_prediction(network: BlockPredictor, encoded: torch.Tensor, context: list[int], target: list[int]):
    """Let the predictor see one block of one image: encoded [K, D] -> [N, D]."""
    tokens = []
    for features, patch in zip(encoded, context, strict=True):
        tokens.append(network.predictor_embed(features) + network.predictor_pos_embed[0, 1 + patch])
    for patch in target:
        tokens.append(network.predictor_token[0, 0] + network.predictor_pos_embed[0, 1 + patch])
    x = torch.stack(tokens)[None]
    for block in network.predictor_blocks:
        x = block(x)
    return network.predictor_proj(network.predictor_norm(x))[0, len(context) :]


@torch.no_grad()
def test_predictions_are_those_of_a_loop_over_images_and_blocks(network):
    images, context, targets = images_and_masks()
    predicted = network(images, context, targets)
    assert predicted.shape == (3, 4, 12, 32)
    for image in range(len(images)):
        patches = models.patchify(images[image : image + 1], 8)[:, context[image]]
        encoded = network.forward_encoder(patches, context[image : image + 1])[0, 1:]
        for block in range(targets.shape[1]):
            expected = slow_prediction(network, encoded, context[image].tolist(), targets[image, block].tolist())
            torch.testing.assert_close(predicted[image, block], expected, rtol=1e-4, atol=1e-5)


def test_the_predictor_has_half_the_width_and_depth_of_the_encoder_up_to_the_papers_and_as_many_heads():
    found = {}
    for name in ("mae_base", "mae_large", "mae_huge", "mae_demo"):
        objective = BlockFeatures.__new__(BlockFeatures)
        objective.args = pretrain.get_args_parser("ijepa").parse_args(["--model", name])
        found[name] = tuple(objective.predictor_sizes().values())
    assert found == {"mae_base": (384, 6), "mae_large": (384, 12), "mae_huge": (384, 12), "mae_demo": (32, 2)}
    model = BlockPredictor(predictor_dim=16, predictor_depth=1, **SIZES)
    assert model.predictor_blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


def test_a_step_costs_1_36_times_that_of_an_autoencoder_within_15_percent():
    objective = BlockFeatures.__new__(BlockFeatures)
    objective.args = pretrain.get_args_parser("ijepa").parse_args(["--model", "mae_base"])
    with torch.device("meta"):
        objective.model = objective.build_model()
        autoencoder = models.build_mae("mae_base")
    ratio = objective.flops() / autoencoder.flops(training=True, mask_ratio=0.75)
    assert ratio == pytest.approx(1.36, rel=0.15)


# -- Loss ---------------------------------------------------------------------------------------------------------------


def slow_loss(predicted: list[float], wanted: list[float]) -> float:
    total = 0.0
    for one, other in zip(predicted, wanted, strict=True):
        error = abs(one - other)
        total += 0.5 * error**2 if error < 1 else error - 0.5
    return total / len(predicted)


@QUICK
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.floats(0.1, 4))
def test_the_loss_is_that_of_a_loop_over_values(count, values, seed, width):
    rng = np.random.default_rng(seed)
    predicted, wanted = torch.from_numpy(rng.normal(0, width, (2, count, 2, values))).float()
    losses = prediction_loss(predicted, wanted)
    for row, one, other in zip(losses.tolist(), predicted, wanted, strict=True):
        assert row == pytest.approx(slow_loss(one.flatten().tolist(), other.flatten().tolist()), rel=1e-4, abs=1e-6)


def test_targets_have_mean_0_and_variance_1_at_each_patch_whatever_the_precision():
    features = (5 * torch.randn(3, 7, 64) + 2).bfloat16()
    normalised = normalise_features(features)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised.mean(-1), torch.zeros(3, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.var(-1, unbiased=False), torch.ones(3, 7), atol=1e-3, rtol=0)


def test_explained_is_the_share_of_the_constants_loss_that_is_saved():
    assert explained(0.1, 0.4) == pytest.approx(0.75)
    assert explained(0.4, 0.4) == 0
    assert explained(0.6, 0.4) == pytest.approx(-0.5)
    assert np.isnan(explained(0.0, 0.0))


# -- Training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    words = ["--objective ijepa --model mini --split all --batch_size 8 --warmup_epochs 1 --log_every 1"]
    words += [*SMALL, "--data_root", drawn_root(tmp_path_factory), "--cache_dir", tmp_path_factory.mktemp("cache")]
    return [*words, "--epoch_updates 5 --epochs 2 --blr 0.05 --teacher_momentum 0.9"]


def parse(flags, *more) -> argparse.Namespace:
    return pretrain.resolve(pretrain.get_args_parser("ijepa").parse_args(words_of([*flags, *more])))


def train(kind: type[BlockFeatures], flags, *more) -> BlockFeatures:
    """Pre-train in this process -> the objective as it is at the end."""
    args = parse(flags, *more)
    dist = setup("cpu")
    objective = kind(args, dist)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.train(objective, args, dist)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    objective.model.eval()
    return objective


LEARNS = ["--epochs 6 --epoch_updates 50 --val_epochs 6 --batch_size 16 --blr 0.032 --teacher_momentum 0.99"]
MANY_PHOTOS = ["--num_train", 240, "--num_val", 48, "--num_pets", 46]  # with fewer, they are learnt by heart


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory) -> BlockFeatures:
    """A run that has learnt something; its folder is objective.run_dir."""
    root = tmp_path_factory.mktemp("many") / "drawn"
    run("prepare", "demo", "--data_root", root, *MANY_PHOTOS)
    folder = tmp_path_factory.mktemp("run") / "trained"
    return train(BlockFeatures, flags, *LEARNS, "--data_root", root, "--output_dir", folder)


def test_training_beats_the_best_constant_on_images_that_it_has_not_seen(trained):
    record = metrics(trained.run_dir)
    constant = record["trivial"]["best constant of each position"]
    assert set(constant) == set(BlockFeatures.scores)
    for name in ("animal", "non_animal"):
        assert record["last"][f"loss_{name}"] < constant[f"loss_{name}"]
        assert constant[f"r2_{name}"] == 0
        assert record["last"][f"r2_{name}"] > 0.1
    assert log(trained.run_dir, "done")[0]["trivial"] == record["trivial"]


class OfOtherImages:
    """A network that is shown the image that comes next in the batch."""

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, images, context, targets):
        return self.network(images.roll(1, 0), context, targets)


def never() -> bool:
    return False


@torch.no_grad()
def test_the_context_of_other_images_predicts_no_better_than_a_constant(trained, monkeypatch):
    scores = trained.score_validation(0, never)
    monkeypatch.setattr(trained, "compiled", OfOtherImages(trained.model))
    shuffled = trained.score_validation(0, never)
    for name in ("r2_animal", "r2_non_animal"):
        assert scores[name] > 0.1
        assert shuffled[name] < 0.02


@torch.no_grad()
def test_validation_is_that_of_a_loop_over_images(trained):
    scores = trained.score_validation(0, never)
    for name, store in trained.stores.items():
        [batch] = trained.eval_batches(store, trained.targets[name], len(store))
        wanted = normalise_features(trained.teacher(batch["images"])[:, 1:])
        constant = wanted.mean(0)
        context, targets = trained.masks.split(batch["masks"])
        predicted = trained.model(batch["images"], context, targets)
        sums = {"model": 0.0, "constant": 0.0}
        for image in range(len(store)):
            for block in range(trained.masks.blocks):
                patches = targets[image, block]
                of_block = wanted[image, patches].numpy()
                for kind, guess in (("model", predicted[image, block]), ("constant", constant[patches])):
                    error = np.abs(guess.numpy() - of_block)
                    sums[kind] += np.where(error < 1, 0.5 * error**2, error - 0.5).mean()
        count = len(store) * trained.masks.blocks
        assert scores[f"loss_{name}"] == pytest.approx(sums["model"] / count, rel=1e-4)
        assert trained.trivial[f"loss_{name}"] == pytest.approx(sums["constant"] / count, rel=1e-4)
        assert scores[f"r2_{name}"] == pytest.approx(1 - sums["model"] / sums["constant"], abs=1e-4)


def test_the_teacher_is_the_encoder_that_is_kept_measured_and_fine_tuned(flags, trained, tmp_path):
    model, content = load_model(trained.run_dir / "model.pt")
    assert content["model_config"] == {"img_size": 64, "kind": "vit", "name": "mini"}
    assert trained.encoder is trained.teacher.network
    followed = trained.teacher.network.state_dict()
    assert content["model"].keys() == followed.keys()
    for key, tensor in followed.items():
        assert torch.equal(content["model"][key], tensor), key
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(content["model"][key], trained.model.state_dict()[key])
    words = [word for word in words_of(flags) if word not in ("--objective", "ijepa", "--split", "all")]
    words = [*words[: words.index("--epoch_updates")], "--init", trained.run_dir / "model.pt", "--load", "encoder"]
    args = finetune.get_args_parser().parse_args([str(word) for word in words])
    started = finetune.TASKS["segment"](args, setup("cpu")).model.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(started[key], tensor), key


def test_only_the_student_gets_gradients_and_one_step_moves_the_teacher_exactly(flags, tmp_path):
    objective = BlockFeatures(parse(flags), setup("cpu"))
    batches = objective.open(argparse.Namespace(dir=tmp_path))
    with contextlib.closing(batches.run(0, 1)) as steps:
        [batch] = next(steps)
    before = {name: value.clone() for name, value in objective.teacher.network.state_dict().items()}
    _, wanted = objective.compare(objective.model, batch)
    assert not wanted.requires_grad
    objective.loss(objective.model, batch).backward()
    assert all(parameter.grad is None for parameter in objective.teacher.network.parameters())
    for name, parameter in objective.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    torch.optim.SGD(objective.model.parameters(), lr=0.1).step()
    objective.after_step(2, 4)
    momentum = 0.9 + 0.1 / 4
    student = objective.model.state_dict()
    for name, value in objective.teacher.network.state_dict().items():
        if name == "pos_embed":
            continue
        expected = momentum * before[name].double() + (1 - momentum) * student[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)
    assert relative_error(student["norm.bias"], before["norm.bias"]) > 0


def test_images_are_cropped_mildly_and_never_flipped(flags):
    augmentation = BlockFeatures(parse(flags), setup("cpu")).augmentation()
    assert augmentation.crop_scale == (0.3, 1.0)
    assert not augmentation.horizontal_flip


def test_a_teacher_begins_as_the_network_that_init_names(flags, trained):
    objective = BlockFeatures(parse(flags, "--init", trained.run_dir / "model.pt"), setup("cpu"))
    for key, tensor in trained.teacher.network.state_dict().items():
        assert torch.equal(objective.teacher.network.state_dict()[key], tensor), key
        assert torch.equal(objective.model.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    "words, message",
    [
        (["--predictor_dim", 50], "--predictor_dim 50 is no multiple of 4, as --model mini needs; use 48"),
        (["--target_scale", 0.2, 0.1], "--target_scale 0.2 0.1 is LOW above HIGH; give --target_scale 0.1 0.2"),
        (["--target_aspect", 2, 0.5], "--target_aspect 2 0.5 is LOW above HIGH"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_their_flags(flags, tmp_path, words, message):
    assert message in refusal("pretrain", *flags, *words, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_context_that_does_not_fit_is_refused_before_anything_is_written(flags, tmp_path):
    message = refusal("pretrain", *flags, "--context_ratio 0.5", "--output_dir", tmp_path / "run")
    assert "--context_ratio 0.5 asks for 32 of 64 patches, but 4 targets of 12 may leave no more than 16" in message
    assert not (tmp_path / "run").exists()


def test_ones_own_images_have_scores_of_the_held_out_ones(flags, tmp_path, tmp_path_factory):
    words = ["--images", drawn_root(tmp_path_factory) / "coco/train2017", "--split animal --epochs 1"]
    run("pretrain", *flags, *words, "--output_dir", tmp_path / "run")
    record = metrics(tmp_path / "run")
    assert {"loss_held_out", "r2_held_out"} <= set(record["last"])
    assert set(record["trivial"]["best constant of each position"]) == {"loss_held_out", "r2_held_out"}


# -- Collapse -----------------------------------------------------------------------------------------------------------


class Collapsing(BlockFeatures):
    """Targets of the student itself, through which gradients flow: constant features are the easiest to predict."""

    def features_of(self, images):
        return normalise_features(self.model.forward_features(images)[:, 1:])

    def after_step(self, step, total_steps):
        self.teacher.update(self.model, 0.0)


def test_a_collapse_is_shown_by_the_meters(flags, trained, tmp_path):
    train(Collapsing, flags, *LEARNS, "--output_dir", tmp_path / "run")
    healthy = metrics(trained.run_dir)["last"]
    collapsed = metrics(tmp_path / "run")["last"]
    for meter in ("spread", "token_spread"):
        assert collapsed[meter] < 0.2 * healthy[meter]
    assert collapsed["loss_animal"] < healthy["loss_animal"]  # the loss alone would look better


# -- However it is computed ---------------------------------------------------------------------------------------------

TRAIN = f"""
import sys, models, pretrain
models.MODELS["mini"] = {MINI!r}
pretrain.main(pretrain.get_args_parser("ijepa").parse_args(sys.argv[1:]))
"""


def test_one_process_two_processes_and_accumulation_give_the_same_result(flags, tmp_path):
    run("pretrain", *flags, "--output_dir", tmp_path / "one")
    run("pretrain", *flags, "--micro_batch_size", 2, "--output_dir", tmp_path / "accumulated")
    on_two_processes(TRAIN, *words_of(flags), "--output_dir", tmp_path / "two")
    expected = torch.load(tmp_path / "one/model.pt", weights_only=True)["model"]
    losses = [line["loss"] for line in log(tmp_path / "one", "train")]
    for name in ("accumulated", "two"):
        assert [line["loss"] for line in log(tmp_path / name, "train")] == pytest.approx(losses, rel=1e-5)
        found = torch.load(tmp_path / name / "model.pt", weights_only=True)["model"]
        for key, tensor in expected.items():
            # Keys need no bias: its gradient is rounding, which the optimizer brings to full size.
            tolerance = 1e-2 if key.endswith("qkv.bias") else 1e-4
            assert relative_error(found[key], tensor) < tolerance, key
        assert metrics(tmp_path / name)["last"] == pytest.approx(metrics(tmp_path / "one")["last"], rel=1e-3, abs=1e-4)
        trivial = metrics(tmp_path / name)["trivial"]["best constant of each position"]
        first = metrics(tmp_path / "one")["trivial"]["best constant of each position"]
        assert trivial == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("moment", ["mean_features", "losses_beside"])
def test_a_run_that_is_stopped_in_a_validation_ends_as_an_undisturbed_one(flags, tmp_path, monkeypatch, moment):
    run("pretrain", *flags, "--output_dir", tmp_path / "undisturbed")
    whole = getattr(BlockFeatures, moment)

    def stop(objective, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(objective, *args)

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="the same command continues the run") as info:
        patch.setattr(BlockFeatures, moment, stop)
        run("pretrain", *flags, "--output_dir", tmp_path / "stopped")
    del info  # its traceback keeps the stopped run, and so its lock, alive
    gc.collect()
    saved = torch.load(tmp_path / "stopped/last.pt", weights_only=True)
    assert saved["step"] == 5
    key = "blocks.0.attn.qkv.weight"
    assert not torch.equal(saved["objective"]["teacher"][key], saved["model"][key])
    assert max(group["weight_decay"] for group in saved["optimizer"]["param_groups"]) > 0.04
    assert "resumed" in run("pretrain", *flags, "--output_dir", tmp_path / "stopped")
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")


@needs_photos
def test_on_real_photos_predictions_beat_the_best_constant(flags, tmp_path):
    words = [*LEARNS, "--data_root", os.environ["SAMPLE_ROOT"], "--cache_dir", tmp_path, "--no-meters"]
    run("pretrain", *flags, *words, "--output_dir", tmp_path / "run")
    record = metrics(tmp_path / "run")["last"]
    assert record["r2_animal"] > 0.1
    assert record["r2_non_animal"] > 0.1
