"""SplitMask: what either half sees, both losses against loops, the contrast over processes, and what a training beats."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL_ENCODER, change_patch, photos, relative_error, spread
from small_runs import (
    IMG,
    SMALL,
    drawn_root,
    log,
    mae_checkpoint,
    metrics,
    needs_photos,
    on_two_processes,
    refusal,
    run,
)
from stress import assert_same

import finetune
import models
from batches import Augmentation
from engine import Distributed, EngineError, setup
from models import build_mae, encoder_sizes, patchify, take_rows
from objectives.masks import halves
from objectives.splitmask import SplitMask, SplitMaskNetwork, gather_rows, group_size, info_nce, info_nce_in_groups
from objectives.tokens import token_loss
from weights import load_model

QUICK = settings(deadline=None, database=None, max_examples=30)


def network(vocabulary: int | None = 10) -> SplitMaskNetwork:
    """Build a small network whose every parameter has a random value."""
    torch.manual_seed(0)
    return spread(SplitMaskNetwork(vocabulary, decoder_depth=2, **SMALL_ENCODER)).eval()


def draw_split(images: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(halves((4, 4))(np.random.default_rng(seed), images))


# -- What either half sees ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pixels_of_a_half_reach_neither_its_own_predictions_nor_the_other_halfs_vector():
    model = network()
    images = photos(1)
    split = draw_split(1)
    logits, vectors = model(images, split)
    assert logits.shape == (1, 16, 10)
    assert vectors.shape == (1, 2, 32)
    for patch in range(16):
        changed, moved = model(change_patch(images, patch), split)
        side = 0 if patch in split[0, :8] else 1
        own = slice(8 * side, 8 * side + 8)
        other = slice(8 - 8 * side, 16 - 8 * side)
        assert torch.equal(changed[:, own], logits[:, own])
        assert (changed - logits)[:, other].abs().amax(-1).min() > 1e-4
        assert torch.equal(moved[:, 1 - side], vectors[:, 1 - side])
        assert not torch.equal(moved[:, side], vectors[:, side])


@torch.no_grad()
def test_either_half_is_encoded_alone_and_decoded_with_an_embedding_at_each_missing_place():
    model = network()
    images = photos(2)
    split = draw_split(2)
    logits, vectors = model(images, split)
    for number, (seen, missing) in enumerate([split.chunk(2, 1), reversed(split.chunk(2, 1))]):
        latent = model.forward_encoder(take_rows(patchify(images, 8), seen), seen)
        x = torch.zeros(2, 17, 32)  # in image order, the class token first
        positions = model.pos_embed[0]
        for image in range(2):
            x[image, 0] = latent[image, 0]
            for place, patch in enumerate(seen[image].tolist()):
                x[image, 1 + patch] = latent[image, 1 + place] + positions[1 + patch]
            for patch in missing[image].tolist():
                x[image, 1 + patch] = model.mask_token[0, 0] + positions[1 + patch]
        for block in model.decoder_blocks:
            x = block(x)
        decoded = model.decoder_norm(x)[:, 1:]
        assert torch.allclose(decoded.mean(1), vectors[:, number], atol=1e-4)
        wanted = model.head(take_rows(decoded, missing))
        found = logits[:, 8:] if number == 0 else logits[:, :8]
        assert torch.allclose(found, wanted, atol=1e-4)


@torch.no_grad()
def test_a_permutation_of_the_images_permutes_predictions_and_vectors_alone():
    model = network()
    images = photos(4)
    split = draw_split(4)
    order = torch.tensor([2, 0, 3, 1])
    logits, vectors = model(images, split)
    permuted, moved = model(images[order], split[order])
    assert torch.allclose(permuted, logits[order], atol=1e-5)
    assert torch.allclose(moved, vectors[order], atol=1e-5)
    assert info_nce(moved, 0.2).item() == pytest.approx(info_nce(vectors, 0.2).item(), rel=1e-5)
    tokens = torch.randint(0, 10, (4, 16), generator=torch.Generator().manual_seed(0))
    assert token_loss(permuted, tokens[order]).item() == pytest.approx(token_loss(logits, tokens).item(), rel=1e-5)


def test_operations_are_those_of_two_halves_two_decodings_and_all_logits():
    with torch.device("meta"):
        model = SplitMaskNetwork(8192, 2, **encoder_sizes("mae_base"))
        mae = build_mae("mae_base")
    forward = model.flops(training=False)
    assert forward == pytest.approx(48.69e9, rel=2e-3)
    assert forward / mae.flops(training=False, mask_ratio=0.75) == pytest.approx(2.49, abs=0.01)
    assert model.flops(training=True) == 3 * forward - 2 * 196 * 768 * 768


def test_a_grid_that_has_no_halves_is_refused(tmp_path_factory, tmp_path):
    message = refusal("pretrain", *small(tmp_path_factory), "--img_size", 48, "--output_dir", tmp_path / "run")
    assert "3 x 3 patches cannot be split into two equal halves" in message
    assert not (tmp_path / "run").exists()


# -- The contrast -------------------------------------------------------------------------------------------------------


def slow_info_nce(vectors: np.ndarray, temperature: float) -> float:
    """Compute the loss of vectors [N, 2, D] half by half."""
    total = 0.0
    count = len(vectors)
    for here, there in ((0, 1), (1, 0)):
        for own in range(count):
            similarities = []
            for other in range(count):
                a = vectors[own, here]
                b = vectors[other, there]
                similarities.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b) / temperature)
            total += math.log(sum(math.exp(value) for value in similarities)) - similarities[own]
    return total / (2 * count)


@QUICK
@given(st.tuples(st.integers(1, 6), st.just(2), st.integers(2, 5)), st.sampled_from([0.2, 1.0]), st.integers(0, 2**31))
def test_the_contrast_is_that_of_a_loop_over_halves(shape, temperature, seed):
    vectors = np.random.default_rng(seed).normal(size=shape)
    found = info_nce(torch.from_numpy(vectors), temperature).item()
    assert found == pytest.approx(slow_info_nce(vectors, temperature), rel=1e-4, abs=1e-6)


def test_the_contrast_is_ln_n_where_nothing_is_told_apart_and_low_where_all_is():
    assert info_nce(torch.ones(16, 2, 8), 0.2).item() == pytest.approx(math.log(16))
    apart = torch.eye(16)[:, None].expand(16, 2, 16)
    assert info_nce(apart, 0.2).item() == pytest.approx(math.log(1 + 15 * math.exp(-5)), rel=1e-4)


def test_the_contrast_is_in_single_precision_under_autocast():
    vectors = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce(vectors, 0.2)
    assert torch.equal(found, info_nce(vectors, 0.2))


@QUICK
@given(st.integers(1, 200), st.integers(1, 64))
def test_validation_contrasts_equal_groups_that_no_image_fewer_than_needed_is_left_out_of(images, batch_size):
    size = group_size(images, batch_size)
    assert 1 <= size <= batch_size
    groups = images // size
    assert images - groups * size < math.ceil(images / batch_size)
    vectors = torch.randn(images, 2, 4, generator=torch.Generator().manual_seed(images))
    losses = [info_nce(vectors[size * number : size * (number + 1)], 0.2).item() for number in range(groups)]
    assert info_nce_in_groups(vectors, size, 0.2) == pytest.approx(np.mean(losses), rel=1e-5)


GATHER = """
import torch
from engine import setup
from objectives.splitmask import gather_rows, info_nce
dist = setup("cpu")
everything = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
mine = everything[3 * dist.rank : 3 * dist.rank + 3].clone().requires_grad_()
loss = info_nce(gather_rows(mine, dist), 0.2)
loss.backward()
print(loss.item(), *mine.grad.flatten().tolist())
"""


def test_vectors_are_gathered_with_their_gradients():
    everything = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alone = Distributed(0, 0, 1, torch.device("cpu"))
    loss = info_nce(gather_rows(everything, alone), 0.2)
    loss.backward()
    expected = everything.grad.chunk(2)
    for part, printed in zip(expected, on_two_processes(GATHER), strict=True):
        found_loss, *gradient = (float(word) for word in printed.split())
        assert found_loss == pytest.approx(loss.item(), rel=1e-6)
        # Each of the two processes has the whole loss; the mean over processes, taken of the weights' gradients, undoes it.
        assert gradient == pytest.approx((2 * part).flatten().tolist(), rel=1e-4, abs=1e-6)


# -- Training -----------------------------------------------------------------------------------------------------------


def small(tmp_path_factory) -> list[str]:
    """Give the flags of small runs."""
    words = ["--objective", "splitmask", "--model", "mae_tiny", *SMALL, "--data_root", drawn_root(tmp_path_factory)]
    words += ["--batch_size", 8, "--warmup_epochs", 1, "--log_every", 1, "--vocabulary", 16, "--clip_grad", 3]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return [*small(tmp_path_factory), "--cache_dir", str(tmp_path_factory.mktemp("cache"))]


def train(flags, *more) -> str:
    """Pre-train in this process -> what was printed."""
    return run("pretrain", *flags, *more)


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A run long enough to learn 8 images by heart -> its folder."""
    folder = tmp_path_factory.mktemp("run") / "splitmask"
    words = ["--animal_images", "unique", "--num_images", 8, "--epochs", 100, "--blr", 3e-2, "--val_epochs", 100]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitMask, "augmentation", lambda objective: Augmentation(IMG, None, horizontal_flip=False))
        train(flags, *words, "--output_dir", folder)
    return folder


def test_a_few_images_are_learnt_by_heart(trained):
    last = np.mean([line["loss"] for line in log(trained, "train")[-10:]])
    trivial = metrics(trained)["trivial"]
    assert last < 0.4 * trivial["unigram"]["loss_animal"]


def test_a_run_scores_both_losses_beside_what_they_must_beat(trained):
    record = metrics(trained)
    assert set(SplitMask.scores) <= set(record["last"])
    for name in ("animal", "non_animal"):
        last = record["last"]
        assert last[f"loss_{name}"] == pytest.approx(last[f"cross_entropy_{name}"] + last[f"info_nce_{name}"])
        chance = record["trivial"]["chance"][f"info_nce_{name}"]
        assert 1 < math.exp(chance) <= 8.001
        unigram, copies = (record["trivial"][predictor] for predictor in ("unigram", "copy mixture"))
        assert copies[f"cross_entropy_{name}"] <= unigram[f"cross_entropy_{name}"]
        assert copies[f"loss_{name}"] == pytest.approx(copies[f"cross_entropy_{name}"] + chance)
        assert 0 < last[f"accuracy_{name}"] < 1
    assert log(trained, "config")[0]["tokens"] == record["tokens"]


def test_the_encoder_is_kept_under_the_usual_keys(flags, trained):
    model, content = load_model(trained / "model.pt")
    assert content["model_config"]["kind"] == "vit"
    assert content["tokenizer"]["kind"] == "random_patches"
    assert not any(key.startswith(("head.", "mask_token", "decoder_")) for key in content["model"])
    words = flags[2 : flags.index("--vocabulary")]
    args = finetune.get_args_parser().parse_args([*words, "--init", str(trained / "model.pt"), "--load", "encoder"])
    started = finetune.TASKS["segment"](args, setup("cpu"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(started.model.state_dict()[key], tensor), key


TRAIN = """
import sys, pretrain
pretrain.main(pretrain.get_args_parser("splitmask").parse_args(sys.argv[1:]))
"""


def test_one_process_and_two_give_the_same_result(flags, tmp_path, tmp_path_factory):
    words = ["--epochs", 2, "--blr", 1e-2, "--init", mae_checkpoint(tmp_path_factory)]
    train(flags, *words, "--output_dir", tmp_path / "one")
    on_two_processes(TRAIN, *flags, *words, "--output_dir", tmp_path / "two")
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_without_contrast_a_batch_may_be_accumulated(flags, tmp_path, tmp_path_factory):
    words = ["--epochs", 2, "--blr", 1e-2, "--no-match", "--init", mae_checkpoint(tmp_path_factory)]
    train(flags, *words, "--output_dir", tmp_path / "one")
    train(flags, *words, "--micro_batch_size", 2, "--output_dir", tmp_path / "accumulated")
    assert_equal(tmp_path / "one", tmp_path / "accumulated")
    assert not any(score.startswith("info_nce") for score in metrics(tmp_path / "one")["last"])


def assert_equal(one, other) -> None:
    """Check that two runs have the same losses, scores and weights up to rounding."""
    losses = [line["loss"] for line in log(one, "train")]
    assert [line["loss"] for line in log(other, "train")] == pytest.approx(losses, rel=1e-5)
    expected = torch.load(one / "model.pt", weights_only=True)["model"]
    found = torch.load(other / "model.pt", weights_only=True)["model"]
    for key, tensor in expected.items():
        assert relative_error(found[key], tensor) < 1e-3, key
    assert metrics(other)["last"] == pytest.approx(metrics(one)["last"], rel=1e-4)
    assert metrics(other)["trivial"] == metrics(one)["trivial"]


def test_contrast_alone_needs_no_tokens(flags, tmp_path):
    text = train(flags, "--epochs", 1, "--no-inpaint", "--no-meters", "--output_dir", tmp_path)
    assert "tokens (" not in text
    record = metrics(tmp_path)
    assert set(record["trivial"]) == {"chance"}
    assert "tokens" not in record
    assert "tokenizer" not in torch.load(tmp_path / "model.pt", weights_only=True)
    scores = json.loads((tmp_path / "config.json").read_text())["scores"]
    assert set(scores) == {"loss_animal", "loss_non_animal", "info_nce_animal", "info_nce_non_animal"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--no-inpaint", "--no-match"], "--no-inpaint --no-match leaves nothing to learn"),
        (["--micro_batch_size", 4], "--match takes no --micro_batch_size"),
        (["--batch_size", 1], "a batch of 1 image has no other one"),
    ],
)
def test_what_leaves_nothing_to_learn_or_changes_the_contrast_is_refused_by_name(flags, tmp_path, more, message):
    assert message in refusal("pretrain", *flags, *more, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_micro_batch_of_the_whole_batch_is_no_accumulation(flags):
    assert "updates of 8 images" in train(flags, "--micro_batch_size", 8, "--dry_run")


def test_a_run_that_is_stopped_ends_as_an_undisturbed_one(flags, tmp_path, monkeypatch):
    words = ["--epochs", 3, "--blr", 1e-2]
    train(flags, *words, "--output_dir", tmp_path / "undisturbed")
    whole = SplitMask.score_list

    def stop(objective, name, stopping):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(objective, name, stopping)

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="the same command continues the run"):
        patch.setattr(SplitMask, "score_list", stop)
        train(flags, *words, "--output_dir", tmp_path / "stopped")
    train(flags, *words, "--output_dir", tmp_path / "stopped")
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")


@pytest.fixture
def learning(flags, monkeypatch) -> list:
    """Give the flags of a run in which a network of two blocks learns what carries over to new images."""
    monkeypatch.setitem(models.MODELS, "mae_demo", {**models.MODELS["mae_demo"], "depth": 2})
    words = ["--model", "mae_demo", "--img_size", 32, "--batch_size", 16, "--split", "all", "--epoch_updates", 20]
    return [*flags, *words, "--decoder_depth", 1, "--blr", 6e-2, "--val_epochs", 100]


def test_predictions_of_new_images_beat_trivial_ones_and_halves_are_told_apart(learning, tmp_path):
    train(learning, "--epochs", 4, "--output_dir", tmp_path)
    assert_beats_trivial_predictors(metrics(tmp_path))


def assert_beats_trivial_predictors(record: dict) -> None:
    for name in ("animal", "non_animal"):
        last = record["last"]
        trivial = record["trivial"]
        assert last[f"cross_entropy_{name}"] < trivial["unigram"][f"cross_entropy_{name}"] - 0.1
        assert last[f"info_nce_{name}"] < 0.9 * trivial["chance"][f"info_nce_{name}"]
        assert last[f"loss_{name}"] < trivial["copy mixture"][f"loss_{name}"]


@needs_photos
def test_on_real_photos_predictions_beat_trivial_ones(learning, tmp_path):
    train(learning, "--data_root", os.environ["SAMPLE_ROOT"], "--epochs", 4, "--output_dir", tmp_path)
    assert_beats_trivial_predictors(metrics(tmp_path))
