"""Pre-training on tokens: what a prediction sees, its loss and what it must beat, and that a run computes what it says."""

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
from engine import EngineError, setup
from models import build_mae, encoder_sizes
from objectives.masks import hidden_patches
from objectives.tokenizers import Tokenizer
from objectives.tokens import (
    TokenPredictor,
    Tokens,
    nearest_visible,
    score_copies,
    score_unigram,
    token_loss,
    token_scores,
)
from weights import load_model

QUICK = settings(deadline=None, database=None, max_examples=30)


def network(vocabulary: int = 10, mask_ratio: float = 0.4) -> TokenPredictor:
    """Build a small network whose every parameter has a random value."""
    torch.manual_seed(0)
    return spread(TokenPredictor(vocabulary, mask_ratio, **SMALL_ENCODER)).eval()


def draw_hidden(model: TokenPredictor, images: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(hidden_patches(model.grid, model.num_hidden)(np.random.default_rng(seed), images))


# -- What a prediction sees ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pixels_of_hidden_patches_reach_no_prediction_and_those_of_visible_ones_all():
    model = network()
    images = photos(1)
    hidden = draw_hidden(model, 1)
    logits = model(images, hidden)
    assert logits.shape == (1, 6, 10)
    for patch in range(16):
        changed = model(change_patch(images, patch), hidden)
        if patch in hidden[0]:
            assert torch.equal(changed, logits)
        else:
            assert (changed - logits).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_hidden_patches_are_told_apart_by_their_positions_and_images_do_not_meet():
    model = network()
    images = photos(3)
    hidden = draw_hidden(model, 3)
    logits = model(images, hidden)
    assert (logits[0, 0] - logits[0, 1]).abs().max() > 1e-3
    alone = model(images[1:2], hidden[1:2])
    assert torch.allclose(alone[0], logits[1], atol=1e-5)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    assert torch.allclose(model(images, hidden[:, order]), logits[:, order], atol=1e-5)


@torch.no_grad()
def test_nothing_hidden_would_be_the_plain_encoder():
    model = network()
    images = photos(2)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    features = model.forward_features(images)
    model.mask_token += 1
    assert torch.equal(model.forward_features(images), features)  # fine-tuning never meets the embedding
    assert model(images, nothing).shape == (2, 0, 10)


def test_operations_are_those_of_the_whole_encoder_and_the_hidden_logits():
    with torch.device("meta"):
        model = TokenPredictor(8192, 0.383, **encoder_sizes("mae_base"))
        mae = build_mae("mae_base")
    assert model.num_hidden == 75
    forward = model.flops(training=False)
    assert forward == pytest.approx(35.13e9 + 2 * 75 * 768 * 8192, rel=1e-3)
    assert forward / mae.flops(training=False, mask_ratio=0.75) == pytest.approx(1.84, abs=0.01)
    assert Tokenizer("random_projection", 8192, 16).flops(196) == pytest.approx(0.62e9, rel=0.01)


# -- Losses and what a training must beat -------------------------------------------------------------------------------


@st.composite
def predicted(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits [B, K, V] and tokens [B, K]."""
    B, K, V = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    return torch.from_numpy(rng.normal(0, 3, (B, K, V))).float(), torch.from_numpy(rng.integers(0, V, (B, K)))


@QUICK
@given(predicted())
def test_the_loss_is_that_of_a_loop_over_tokens(case):
    logits, tokens = case
    losses = []
    for rows, wanted in zip(logits.double().tolist(), tokens.tolist(), strict=True):
        of_image = []
        for row, token in zip(rows, wanted, strict=True):
            of_image.append(math.log(sum(math.exp(value) for value in row)) - row[token])
        losses.append(np.mean(of_image))
    assert token_loss(logits, tokens).item() == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-5)
    scores = token_scores(logits, tokens)
    assert scores["loss"].tolist() == pytest.approx(losses, rel=1e-4, abs=1e-5)
    hits = (logits.argmax(-1) == tokens).double().mean(1)
    assert scores["accuracy"].tolist() == hits.tolist()


@QUICK
@given(st.tuples(st.integers(1, 5), st.integers(2, 5)), st.integers(0, 2**31), st.data())
def test_the_nearest_visible_patch_is_that_of_a_loop_over_patches(grid, seed, data):
    rows, columns = grid
    count = data.draw(st.integers(1, rows * columns - 1))
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(rows * columns), (3, 1)), axis=1)
    hidden = torch.from_numpy(order[:, :count].copy())
    for wanted, found in zip(hidden.tolist(), nearest_visible(hidden, grid).tolist(), strict=True):
        visible = [patch for patch in range(rows * columns) if patch not in wanted]
        for patch, nearest in zip(wanted, found, strict=True):
            row, column = divmod(patch, columns)
            distances = [(row - other // columns) ** 2 + (column - other % columns) ** 2 for other in visible]
            assert nearest == visible[int(np.argmin(distances))]


@QUICK
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_the_copy_mixture_is_the_best_of_all_weights_and_contains_the_unigram(seed, share):
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, 5, (6, 7)))
    copies = torch.where(torch.from_numpy(rng.random((6, 7)) < share), tokens, (tokens + 1) % 5)
    unigram = torch.from_numpy(rng.dirichlet(np.ones(5))).log()
    of_unigram = score_unigram(tokens, unigram)
    found = score_copies(tokens, copies, unigram)
    assert of_unigram["loss"] == pytest.approx(np.mean([-unigram[token].item() for token in tokens.flatten()]))
    assert found["loss"] <= of_unigram["loss"]
    for weight in (0.0, 0.25, 0.5, 0.9):
        probabilities = []
        for token, copy in zip(tokens.flatten().tolist(), copies.flatten().tolist(), strict=True):
            probabilities.append(weight * (token == copy) + (1 - weight) * unigram[token].exp().item())
        assert found["loss"] <= -np.mean(np.log(probabilities)) + 1e-9
    if share == 0:
        assert found["accuracy"] == of_unigram["accuracy"]


# -- Training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    words = ["--objective", "tokens", "--model", "mae_tiny", *SMALL, "--data_root", drawn_root(tmp_path_factory)]
    words += ["--cache_dir", tmp_path_factory.mktemp("cache"), "--batch_size", 8, "--warmup_epochs", 1]
    words += ["--log_every", 1, "--vocabulary", 16]
    return [str(word) for word in words]


def train(flags, *more) -> str:
    """Pre-train in this process -> what was printed."""
    return run("pretrain", *flags, *more)


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A run long enough to learn the tokens of 8 images by heart -> its folder."""
    folder = tmp_path_factory.mktemp("run") / "tokens"
    words = ["--animal_images", "unique", "--num_images", 8, "--epochs", 120, "--blr", 3e-2, "--val_epochs", 120]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokens, "augmentation", lambda objective: Augmentation(IMG, None, horizontal_flip=False))
        text = train(flags, *words, "--output_dir", folder)
    assert "tokens (random_patches): perplexity" in text
    return folder


def test_tokens_of_a_few_images_are_learnt_by_heart(trained):
    last = np.mean([line["loss"] for line in log(trained, "train")[-10:]])
    unigram = metrics(trained)["trivial"]["unigram"]["loss_animal"]
    assert last < 0.5 * unigram


def test_a_run_says_how_evenly_tokens_are_used_and_what_trivial_predictors_reach(trained):
    record = metrics(trained)
    assert log(trained, "config")[0]["tokens"] == record["tokens"]
    assert 1 < record["tokens"]["perplexity"] <= 16
    assert 1 / 16 <= record["tokens"]["top_share"] < 1
    assert set(record["trivial"]) == {"unigram", "copy mixture"}
    for name in ("animal", "non_animal"):
        unigram, copies = (record["trivial"][predictor] for predictor in ("unigram", "copy mixture"))
        assert 0 < copies[f"loss_{name}"] <= unigram[f"loss_{name}"]
        assert 0 < unigram[f"accuracy_{name}"] < 1
        assert set(unigram) == set(copies) == set(Tokens.scores)
        assert 0 < record["last"][f"accuracy_{name}"] < 1


def test_the_encoder_is_kept_under_the_usual_keys_with_the_codes_beside_it(flags, trained, tmp_path):
    model, content = load_model(trained / "model.pt")
    assert content["model_config"]["kind"] == "vit"
    assert content["tokenizer"]["codes"].shape == (16, 192)
    assert not any(key.startswith(("head.", "mask_token")) for key in content["model"])
    words = [flag for flag in flags if flag not in ("--objective", "tokens", "--vocabulary", "16")]
    args = finetune.get_args_parser().parse_args([*words, "--init", str(trained / "model.pt"), "--load", "encoder"])
    started = finetune.TASKS["segment"](args, setup("cpu"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(started.model.state_dict()[key], tensor), key


TRAIN = """
import sys, pretrain
pretrain.main(pretrain.get_args_parser("tokens").parse_args(sys.argv[1:]))
"""


def test_one_process_two_processes_and_accumulation_give_the_same_result(flags, tmp_path, tmp_path_factory):
    words = ["--epochs", 2, "--blr", 1e-2, "--tokenizer", "kmeans", "--init", mae_checkpoint(tmp_path_factory)]
    train(flags, *words, "--output_dir", tmp_path / "one")
    train(flags, *words, "--micro_batch_size", 2, "--output_dir", tmp_path / "accumulated")
    on_two_processes(TRAIN, *flags, *words, "--output_dir", tmp_path / "two")
    expected = torch.load(tmp_path / "one/model.pt", weights_only=True)
    losses = [line["loss"] for line in log(tmp_path / "one", "train")]
    for name in ("accumulated", "two"):
        assert [line["loss"] for line in log(tmp_path / name, "train")] == pytest.approx(losses, rel=1e-5)
        found = torch.load(tmp_path / name / "model.pt", weights_only=True)
        assert torch.equal(found["tokenizer"]["codes"], expected["tokenizer"]["codes"])
        for key, tensor in expected["model"].items():
            assert relative_error(found["model"][key], tensor) < 1e-3, key
        assert metrics(tmp_path / name)["last"] == pytest.approx(metrics(tmp_path / "one")["last"], rel=1e-4)
        assert metrics(tmp_path / name)["trivial"] == metrics(tmp_path / "one")["trivial"]


def test_a_run_that_is_stopped_goes_on_with_its_tokens_and_ends_as_an_undisturbed_one(flags, tmp_path, monkeypatch):
    words = ["--epochs", 4, "--blr", 1e-2]
    train(flags, *words, "--output_dir", tmp_path / "undisturbed")
    whole = Tokens.score_list

    def stop(tokens, name, stopping):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(tokens, name, stopping)

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="the same command continues the run"):
        patch.setattr(Tokens, "score_list", stop)
        train(flags, *words, "--output_dir", tmp_path / "stopped")
    fit = Tokenizer.fit

    def fit_otherwise(tokenizer, views):
        fit(tokenizer, views.flip(1, 2))

    monkeypatch.setattr(Tokenizer, "fit", fit_otherwise)  # as a GPU of another kind might
    train(flags, *words, "--output_dir", tmp_path / "stopped")
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")


def test_another_vocabulary_is_another_experiment_and_a_mask_that_hides_all_is_refused(flags, tmp_path):
    train(flags, "--epochs", 1, "--output_dir", tmp_path)
    message = refusal("pretrain", *flags, "--epochs", 1, "--tokenizer", "kmeans", "--output_dir", tmp_path)
    assert "tokenizer was 'random_patches', now 'kmeans'" in message
    message = refusal("pretrain", *flags, "--mask_ratio", 1, "--output_dir", tmp_path / "other")
    assert "--mask_ratio 1 hides 16 of 16 patches" in message
    assert not (tmp_path / "other").exists()


def test_own_images_are_scored_as_one_list(flags, tmp_path):
    photos = drawn_root(None) / "coco/train2017"
    train(flags, "--images", photos, "--epochs", 1, "--no-meters", "--output_dir", tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    assert set(config["scores"]) == {"loss_held_out", "accuracy_held_out"}
    assert set(metrics(tmp_path / "own")["trivial"]["unigram"]) == set(config["scores"])


@pytest.fixture
def learning(flags, monkeypatch) -> list:
    """Give the flags of a run in which a network of two blocks learns what carries over to new images."""
    monkeypatch.setitem(models.MODELS, "mae_demo", {**models.MODELS["mae_demo"], "depth": 2})
    words = ["--model", "mae_demo", "--img_size", 32, "--batch_size", 16, "--split", "all", "--epoch_updates", 20]
    return [*flags, *words, "--blr", 6e-2, "--val_epochs", 100]


def test_predictions_of_new_images_beat_the_copy_mixture(learning, tmp_path):
    train(learning, "--epochs", 6, "--output_dir", tmp_path)
    record = metrics(tmp_path)
    for name in ("animal", "non_animal"):
        assert record["last"][f"loss_{name}"] < record["trivial"]["copy mixture"][f"loss_{name}"]


def test_tokens_of_other_images_cannot_be_predicted(learning, tmp_path, monkeypatch):
    name_patches = Tokenizer.name_patches

    def name_others(tokenizer, patches):
        return name_patches(tokenizer, patches).roll(1, 0)

    monkeypatch.setattr(Tokenizer, "name_patches", name_others)
    train(learning, "--epochs", 2, "--output_dir", tmp_path)
    record = metrics(tmp_path)
    for name in ("animal", "non_animal"):
        assert record["last"][f"loss_{name}"] > record["trivial"]["unigram"][f"loss_{name}"] - 0.1


@needs_photos
def test_on_real_photos_predictions_beat_the_copy_mixture(learning, tmp_path):
    train(learning, "--data_root", os.environ["SAMPLE_ROOT"], "--epochs", 6, "--output_dir", tmp_path)
    record = metrics(tmp_path)
    for name in ("animal", "non_animal"):
        assert record["last"][f"loss_{name}"] < record["trivial"]["copy mixture"][f"loss_{name}"]
