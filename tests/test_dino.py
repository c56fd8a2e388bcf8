"""DINO: its loss and its centre as defined, what may reach a prediction, a teacher that follows exactly, and no collapse."""

import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL_ENCODER, relative_error, spread
from small_runs import SMALL, drawn_root, log, mae_checkpoint, metrics, on_two_processes, refusal
from stress import assert_same
from torch import Tensor, nn

import finetune
import pretrain
from engine import EngineError, setup
from models import ViT
from objectives.dino import (
    Centre,
    Dino,
    DinoNetwork,
    Head,
    cross_entropy_of_views,
    entropy,
    nearest_size,
    scale_gradient,
)
from weights import load_model, load_pretrained

QUICK = settings(deadline=None, database=None, max_examples=50)
HEAD = {"hidden": 24, "bottleneck": 8, "prototypes": 20}


# -- Loss and centre ----------------------------------------------------------------------------------------------------


@st.composite
def distributions(draw) -> tuple[Tensor, Tensor]:
    """Draw the student's log-probabilities [V, B, K] and the teacher's probabilities [2, B, K]."""
    views, images, prototypes = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    student = torch.tensor(rng.normal(0, 2, (views, images, prototypes))).log_softmax(-1)
    teacher = torch.tensor(rng.normal(0, 4, (2, images, prototypes))).softmax(-1)
    return student, teacher


@QUICK
@given(distributions())
def test_the_loss_is_that_of_a_loop_over_pairs_of_different_crops(case):
    student, teacher = case
    for image, found in enumerate(cross_entropy_of_views(student, teacher).tolist()):
        terms = []
        for seen in range(len(teacher)):
            for predicted in range(len(student)):
                if seen == predicted:
                    continue
                pairs = zip(teacher[seen, image].tolist(), student[predicted, image].tolist(), strict=True)
                terms.append(-sum(probability * logarithm for probability, logarithm in pairs))
        assert found == pytest.approx(sum(terms) / len(terms))


@QUICK
@given(distributions())
def test_the_loss_is_the_teachers_entropy_and_a_divergence_that_is_never_negative(case):
    student, teacher = case
    of_teacher = entropy(teacher).mean(0)
    assert (cross_entropy_of_views(student, teacher) >= of_teacher - 1e-9).all()
    same = teacher[:1].expand(2, -1, -1)
    assert torch.allclose(cross_entropy_of_views(same.log(), same), entropy(same[0]))


@QUICK
@given(st.integers(1, 4), st.integers(1, 5), st.floats(0, 1), st.integers(0, 2**31))
def test_the_centre_moves_towards_the_mean_of_the_global_batch_whatever_its_parts(parts, images, momentum, seed):
    generator = torch.Generator().manual_seed(seed)
    centre = Centre(3, setup("cpu"))
    expected = torch.zeros(3)
    for _ in range(3):
        logits = torch.randn(parts * images, 3, generator=generator)
        for part in logits.chunk(parts):
            centre.observe(part)
        centre.update(len(logits), momentum)
        expected = momentum * expected + (1 - momentum) * logits.mean(0)
    assert torch.allclose(centre.mean, expected, atol=1e-6)


# -- The network --------------------------------------------------------------------------------------------------------


def make_network(**options) -> DinoNetwork:
    torch.manual_seed(0)
    return spread(DinoNetwork(**HEAD, **SMALL_ENCODER, **options))


def crops(count: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_head_is_a_linear_layer_of_normalised_weights_on_a_vector_of_length_1():
    head = spread(Head(16, **HEAD), std=0.3)
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 20, bias=False))
    linear.parametrizations.weight.original0.data.fill_(1)
    linear.parametrizations.weight.original1.data.copy_(head.prototypes)
    x = torch.randn(5, 16)
    expected = linear(F.normalize(head.mlp(x), dim=-1))
    assert torch.allclose(head(x), expected, atol=1e-6)
    assert head(x).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_a_scaled_gradient_leaves_the_value_alone(factor):
    x = torch.randn(7, requires_grad=True)
    scaled = scale_gradient(x, torch.tensor(factor))
    assert torch.equal(scaled, x)
    scaled.exp().sum().backward()
    assert torch.allclose(x.grad, factor * x.detach().exp())


def test_local_crops_are_encoded_with_interpolated_positions_as_fine_tuning_at_their_size_does():
    network = make_network()
    smaller = ViT(**{**SMALL_ENCODER, "img_size": 16})
    load_pretrained(smaller, network.state_dict())
    images = crops(3, 16)
    with torch.no_grad():
        assert torch.allclose(network.forward_resized(images), smaller(images), atol=1e-5)
        whole = crops(3, 32)
        assert torch.allclose(network.forward_resized(whole), network.forward_features(whole), atol=1e-5)


@pytest.mark.parametrize("changed", range(5))
def test_no_crop_reaches_the_prediction_from_another_one(changed):
    network = make_network()
    global_crops, local_crops = crops(2, 32), crops(3, 16)
    with torch.no_grad():
        before = network(global_crops, local_crops)
        if changed < 2:
            global_crops[changed] += 1
        else:
            local_crops[changed - 2] += 1
        after = network(global_crops, local_crops)
    moved = (after - before).abs().amax(1) > 1e-4
    assert moved.tolist() == [number == changed for number in range(5)]


def test_each_crop_drops_its_own_branches():
    network = make_network(drop_path=0.5)
    draws = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = network(crops(2, 32), crops(3, 16), draws)
        of_global = network(crops(2, 32), None, draws[:2])
    assert torch.allclose(together[:2], of_global, atol=1e-6)
    assert (together - network(crops(2, 32), crops(3, 16))).abs().max() > 1e-3


@pytest.mark.parametrize(
    "img_size, patch_size, expected", [(224, 16, 96), (224, 14, 98), (64, 4, 28), (64, 16, 32), (16, 8, 8)]
)
def test_local_crops_have_96_pixels_of_224_in_whole_patches(img_size, patch_size, expected):
    assert nearest_size(img_size, patch_size) == expected


# -- The objective ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    words = ["--objective", "dino", "--model", "mae_tiny", *SMALL, "--data_root", drawn_root(tmp_path_factory)]
    words += ["--cache_dir", tmp_path_factory.mktemp("cache"), "--batch_size", 8, "--warmup_epochs", 1]
    words += ["--log_every", 1, "--head_hidden", 64, "--head_bottleneck", 32, "--prototypes", 64]
    words += ["--teacher_momentum", 0.9]
    return [str(word) for word in words]


def make(flags, *more) -> Dino:
    words = [*flags, *map(str, more)]
    return Dino(pretrain.resolve(pretrain.get_args_parser("dino").parse_args(words)), setup("cpu"))


def train(flags, *more) -> None:
    """Pre-train in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        pretrain.main(pretrain.get_args_parser("dino").parse_args([*flags, *map(str, more)]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def opened(flags, folder, *more):
    """Open the data of an objective -> (objective, its first micro-batch)."""
    dino = make(flags, *more)
    batches = dino.open(type("Run", (), {"dir": folder})())
    return dino, next(batches.run(0, 1))[0]


def test_views_are_two_global_crops_and_as_many_local_ones_as_asked_for(flags, tmp_path):
    _, batch = opened(flags, tmp_path, "--local_crops", 2, "--no-meters")
    assert batch["images"].shape == batch["global_2"].shape == (8, 3, 64, 64)
    assert batch["local_1"].shape == batch["local_2"].shape == (8, 3, 32, 32)
    assert batch["drop_path"].shape == (8, 4, 4, 2)
    views = [batch[name].numpy().tobytes() for name in ("images", "global_2", "local_1", "local_2")]
    assert len(set(views)) == 4


def test_the_teacher_sees_global_crops_alone_and_its_targets_do_not_depend_on_the_others(flags, tmp_path):
    dino, batch = opened(flags, tmp_path, "--local_crops", 2, "--no-meters")
    crops = dino.join(batch, "images")
    before = dino.probabilities(dino.teacher(crops.global_crops))
    dino.loss(dino.model, batch).backward()
    seen = dino.centre.total.clone()
    batch["local_1"] += 1
    dino.centre.total.zero_()
    dino.loss(dino.model, batch)
    assert torch.equal(dino.centre.total, seen)
    batch["global_2"] += 1
    after = dino.probabilities(dino.teacher(dino.join(batch, "images").global_crops))
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert all(parameter.grad is None for parameter in dino.teacher.network.parameters())


def test_a_student_that_is_its_teacher_does_not_diverge_on_equal_crops(flags, tmp_path):
    words = ["--teacher_temperature", 0.1, "--student_temperature", 0.1, "--no-meters", "--drop_path", 0]
    dino, batch = opened(flags, tmp_path, *words)
    batch["global_2"] = batch["images"]
    taught = dino.probabilities(dino.teacher(dino.join(batch, "images").global_crops))
    assert dino.loss(dino.model, batch).item() == pytest.approx(entropy(taught).mean().item(), rel=1e-5)


def test_after_a_step_the_teacher_has_moved_exactly_by_its_momentum_and_the_centre_by_its_own(flags, tmp_path):
    dino, batch = opened(flags, tmp_path, "--no-meters", "--centre_momentum", 0.75)
    before = {name: tensor.clone() for name, tensor in dino.teacher.state().items()}
    spread(dino.model)
    logits = dino.teacher(dino.join(batch, "images").global_crops)
    dino.loss(dino.model, batch)
    dino.after_step(51, 100)
    momentum = 0.9 + 0.1 * (1 - math.cos(math.pi / 2)) / 2
    for name, student in dino.model.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * student
        assert torch.allclose(dino.teacher.state()[name], expected, atol=1e-7), name
    assert torch.allclose(dino.centre.mean, 0.25 * logits.mean(0), atol=1e-6)
    assert not dino.centre.total.any()


def test_prototypes_stay_for_the_first_epoch_and_learn_then(flags, tmp_path):
    dino, batch = opened(flags, tmp_path, "--no-meters", "--epoch_updates", 3)

    def gradient() -> Tensor:
        dino.model.zero_grad()
        dino.loss(dino.model, batch).backward()
        assert dino.model.head.mlp[0].weight.grad.any()
        return dino.model.head.prototypes.grad

    for step in (1, 2, 3):
        assert not gradient().any()
        dino.after_step(step, 100)
    assert gradient().any()
    assert make(flags, "--freeze_epochs", 0).learning == 1


def test_weight_decay_grows_and_the_cost_counts_all_crops_and_the_teacher(flags):
    dino = make(flags, "--local_crops", 3)
    assert (dino.args.weight_decay, dino.args.weight_decay_end) == (0.04, 0.4)
    forward = dino.model.flops(training=False)
    student = dino.model.flops(training=True)
    assert dino.flops() == 2 * student + 2 * forward + 3 * dino.model.local_flops(4)
    assert dino.model.local_flops(dino.model.num_patches) == student
    base = make(flags, "--model", "mae_base", "--img_size", 224, "--prototypes", 4096, "--head_hidden", 2048)
    autoencoder = 3 * 19.56e9  # a training step of the Masked Autoencoder at this size
    assert base.flops() / autoencoder == pytest.approx(4.8, rel=0.02)


def test_crops_too_small_to_be_blurred_are_refused_in_one_line(flags):
    words = [*flags, "--img_size", "16", "--cache_size", "16", "--local_crops", "1", "--model", "mae_demo"]
    assert "crops of 8 px are too small to be blurred; raise --img_size or give --no-colours" in refusal(
        "pretrain", *words
    )
    make(words, "--no-colours")


# -- Training -----------------------------------------------------------------------------------------------------------

LEARNT = ["--split", "all", "--batch_size", 16, "--epochs", 1, "--epoch_updates", 100, "--blr", 1.6e-2]
LEARNT += ["--drop_path", 0, "--freeze_epochs", 0]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A run long enough to tell 40 images apart -> its folder."""
    folder = tmp_path_factory.mktemp("run") / "dino"
    words = ["--teacher_momentum", 0.99, "--centre_momentum", 0, "--no-colours"]
    train(flags, *LEARNT, *words, "--output_dir", folder)
    return folder


def test_training_beats_the_best_constant_and_collapses_to_neither_side(trained):
    last = metrics(trained)["last"]
    trivial = metrics(trained)["trivial"]
    assert set(last) >= set(Dino.scores)
    for name in ("animal", "non_animal"):
        assert last[f"loss_{name}"] < trivial["best constant"][f"loss_{name}"]
        assert 0.1 * math.log(64) < last[f"entropy_{name}"] < 0.9 * math.log(64)
        assert last[f"loss_{name}"] == pytest.approx(last[f"entropy_{name}"] + last[f"kl_{name}"])
        assert trivial["best constant"][f"loss_{name}"] == pytest.approx(math.log(last[f"prototypes_{name}"]))
        assert trivial["uniform collapse"][f"entropy_{name}"] == pytest.approx(math.log(64))
        assert trivial["collapse to one prototype"] == {"entropy_animal": 0, "entropy_non_animal": 0}
    assert metrics(trained)["trivial"] == log(trained, "done")[0]["trivial"]


def test_a_few_images_are_told_apart_far_better_than_new_ones(trained):
    last = np.mean([line["loss"] for line in log(trained, "train")[-10:]])
    assert last < 0.8 * math.log(64)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--teacher_temperature", 1, "--student_temperature", 1], math.log(64)),
        (["--teacher_temperature", 0.01, "--centre_momentum", 1], 0.0),
    ],
)
def test_settings_that_collapse_are_shown_by_the_entropy(flags, tmp_path, words, expected):
    words = [*LEARNT, "--epoch_updates", 15, "--no-meters", *words]
    train(flags, *words, "--output_dir", tmp_path)
    last = metrics(tmp_path)["last"]
    trivial = metrics(tmp_path)["trivial"]["best constant"]
    assert last["entropy_animal"] == pytest.approx(expected, abs=0.1 * math.log(64))
    assert last["loss_animal"] > 0.97 * trivial["loss_animal"]


def test_the_teachers_encoder_is_kept_measured_and_taken_by_fine_tuning(flags, tmp_path):
    train(flags, "--epochs", 1, "--output_dir", tmp_path / "run")
    model, content = load_model(tmp_path / "run/model.pt")
    assert content["model_config"]["kind"] == "vit"
    assert not any(key.startswith("head.") for key in content["model"])
    words = [flag for flag in flags if flag not in ("--objective", "dino")]
    at = words.index("--head_hidden")
    words = [*words[:at], "--init", str(tmp_path / "run/model.pt"), "--load", "encoder"]
    args = finetune.get_args_parser().parse_args(words)
    started = finetune.TASKS["segment"](args, setup("cpu")).model.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(started[key], tensor), key
    assert {"spread", "rank", "token_spread", "token_rank", "knn"} <= set(metrics(tmp_path / "run")["last"])


def test_what_is_kept_and_measured_is_the_teachers_and_not_the_students(flags):
    dino = make(flags)
    spread(dino.model)
    exported = dino.export(dino.model.state_dict())["model"]
    for key, tensor in dino.encoder.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(exported[key], tensor), key
    assert not torch.equal(exported["cls_token"], dino.model.cls_token)


TRAIN = """
import sys, pretrain
pretrain.main(pretrain.get_args_parser("dino").parse_args(sys.argv[1:]))
"""


def test_one_process_two_processes_and_accumulation_give_the_same_result(flags, tmp_path, tmp_path_factory):
    words = ["--epochs", 2, "--local_crops", 1, "--drop_path", 0.3, "--no-meters", "--freeze_epochs", 0]
    words += ["--init", mae_checkpoint(tmp_path_factory)]
    train(flags, *words, "--output_dir", tmp_path / "one")
    train(flags, *words, "--micro_batch_size", 2, "--output_dir", tmp_path / "accumulated")
    on_two_processes(TRAIN, *flags, *words, "--output_dir", tmp_path / "two")
    expected = torch.load(tmp_path / "one/model.pt", weights_only=True)["model"]
    losses = [line["loss"] for line in log(tmp_path / "one", "train")]
    for name in ("accumulated", "two"):
        assert [line["loss"] for line in log(tmp_path / name, "train")] == pytest.approx(losses, rel=1e-4)
        found = torch.load(tmp_path / name / "model.pt", weights_only=True)["model"]
        for key, tensor in expected.items():
            assert relative_error(found[key], tensor) < 1e-3, key
        assert metrics(tmp_path / name)["last"] == pytest.approx(metrics(tmp_path / "one")["last"], rel=1e-3)


def test_a_run_that_is_stopped_in_a_validation_ends_as_an_undisturbed_one(flags, tmp_path, monkeypatch):
    words = ["--epochs", 3, "--blr", 1e-2, "--no-meters"]
    train(flags, *words, "--output_dir", tmp_path / "undisturbed")
    whole = Dino.sums_of

    def stop(dino, name, stopping):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(dino, name, stopping)

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="the same command continues the run"):
        patch.setattr(Dino, "sums_of", stop)
        train(flags, *words, "--output_dir", tmp_path / "stopped")
    train(flags, *words, "--output_dir", tmp_path / "stopped")
    assert_same(tmp_path / "undisturbed", tmp_path / "stopped")
