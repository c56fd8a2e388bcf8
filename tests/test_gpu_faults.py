"""Faults that would cost a GPU its speed or its result: each is injected, and the checks of fake_cuda.py must report it."""

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import (
    Folders,
    HostWaits,
    NoGradient,
    WrongDevice,
    WrongPrecision,
    check_batches,
    check_gradients,
    check_training,
)
from gpu_cases import (
    BREEDS,
    DINO,
    IJEPA,
    LABELS,
    MAE,
    MULTI_CROP,
    ON_HOST,
    SEGMENTER,
    SPLITMASK,
    TOKENS,
    Fault,
    Patch,
    make_folders,
    with_flags,
    wrap,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

import augment
import batches
import classification
import colours
import meters
import models
import trainer
from batches import Pipeline
from engine import Precision
from objectives import dino, labels, splitmask
from objectives.dino import Centre
from objectives.ijepa import BlockFeatures, BlockPredictor, Masks
from objectives.labels import Labels
from objectives.tokenizers import Tokenizer
from pretrain import MaskedPixels
from segmentation import Segmentation
from teacher import Teacher


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return make_folders(tmp_path_factory)


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


def teacher_stays_on_the_host(patch: Patch) -> None:
    patch.setattr(Teacher, "to", lambda teacher, device: teacher)


def teacher_computes_in_single_precision(patch: Patch) -> None:
    def call(original, teacher, images, *args, **options):
        with torch.autocast("cuda", enabled=False):
            return original(teacher, images.float(), *args, **options)

    wrap(patch, Teacher, "__call__", call)


def teacher_follows_through_the_host(patch: Patch) -> None:
    def update(original, teacher, network, momentum):
        original(teacher, network, momentum)
        for weight, new in zip(teacher.weights, teacher.news, strict=True):
            weight.lerp_(new.cpu().to(weight.device, non_blocking=True), 1 - momentum)

    wrap(patch, Teacher, "update", update)


def mean_of_logits_is_read(patch: Patch) -> None:
    def update(original, centre, crops, momentum):
        if centre.total.abs().max() > 0:
            original(centre, crops, momentum)

    wrap(patch, Centre, "update", update)


def mean_of_logits_is_kept_on_the_host(patch: Patch) -> None:
    def update(original, centre, crops, momentum):
        original(centre, crops, momentum)
        centre.mean = torch.zeros(centre.mean.shape)

    wrap(patch, Centre, "update", update)


def colours_are_changed_where_it_pays(patch: Patch) -> None:
    def solarise(original, images):
        bright = images.amax((1, 2, 3)) > 0.5
        images[bright] = original(images[bright])
        return images

    wrap(patch, colours, "solarise", solarise)


def views_are_cut_on_the_host(patch: Patch) -> None:
    def cut(original, pixels, cut, augmentation):
        return original(pixels.cpu(), cut, augmentation)

    wrap(patch, batches, "cut_images", cut)


def tokens_are_named_on_the_host(patch: Patch) -> None:
    def name(original, tokenizer, patches):
        tokenizer.codes = torch.zeros(tokenizer.codes.shape)
        return original(tokenizer, patches)

    wrap(patch, Tokenizer, "name_patches", name)


def greatest_token_is_read(patch: Patch) -> None:
    def name(original, tokenizer, patches):
        tokens = original(tokenizer, patches)
        return tokens.clamp(max=tokens.max().item())

    wrap(patch, Tokenizer, "name_patches", name)


def halves_are_numbered_on_the_host(patch: Patch) -> None:
    def contrast(vectors: Tensor, temperature: float) -> Tensor:
        one, other = vectors.unbind(1)
        return F.cross_entropy((one @ other.T).float() / temperature, torch.arange(len(vectors)))

    patch.setattr(splitmask, "info_nce", contrast)


def blocks_are_taken_apart_on_the_host(patch: Patch) -> None:
    def split(original, masks, drawn):
        context, targets = original(masks, drawn)
        return context, torch.zeros(targets.shape, dtype=torch.long)

    wrap(patch, Masks, "split", split)


def labels_stay_on_the_host(patch: Patch) -> None:
    def loss(original, logits, shown, kind):
        return original(logits, torch.zeros(shown.shape), kind)

    wrap(patch, labels, "label_loss", loss)


def right_answers_are_counted_in_python(patch: Patch) -> None:
    def score(original, network, batch):
        scores = original(network, batch)
        scores["accuracy"] = torch.full_like(scores["loss"], scores["accuracy"].sum().item())
        return scores

    wrap(patch, classification, "score", score)


def second_loop_of_validation_mixes_devices(patch: Patch) -> None:
    def losses(original, objective, constant, *args):
        return original(objective, constant.cpu(), *args)

    wrap(patch, BlockFeatures, "losses_beside", losses)


def places_that_are_measured_are_read(patch: Patch) -> None:
    wrap(patch, meters, "take_rows", lambda original, x, ids: original(x, ids.clamp(max=ids.max().item())))


def predictions_are_scored_on_two_devices(patch: Patch) -> None:
    def scores(original, objective, name, logits):
        return original(objective, name, logits.cpu())

    wrap(patch, Labels, "scores_of", scores)


def gradients_go_through_the_host(patch: Patch) -> None:
    def loss(original, logits, *args):
        logits.register_hook(lambda gradient: gradient.cpu().to(gradient.device))
        return original(logits, *args)

    wrap(patch, labels, "label_loss", loss)


def losses_keep_their_graphs(patch: Patch) -> None:
    wrap(patch, trainer.Trainer, "_accumulate", lambda original, loop, batches: loop._backward(batches[0]))


def context_is_cut_off(patch: Patch) -> None:
    def predict(original, network, encoded, *args):
        return original(network, encoded.detach(), *args)

    wrap(patch, BlockPredictor, "forward_predictor", predict)


def prototypes_are_cut_off(patch: Patch) -> None:
    patch.setattr(dino, "scale_gradient", lambda x, factor: x.detach())


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
    Fault(teacher_stays_on_the_host, check_training, IJEPA, MIXED, "cpu"),
    Fault(teacher_computes_in_single_precision, check_training, IJEPA, WrongPrecision, "float32"),
    Fault(teacher_computes_in_single_precision, check_training, DINO, WrongPrecision, "float32"),
    Fault(teacher_follows_through_the_host, check_training, IJEPA, HostWaits, "from cuda:0 to cpu"),
    Fault(mean_of_logits_is_read, check_training, DINO, HostWaits, "reads values"),
    Fault(mean_of_logits_is_kept_on_the_host, check_training, DINO, MIXED, "cpu"),
    Fault(colours_are_changed_where_it_pays, check_batches, DINO, HostWaits, "index of truth values"),
    Fault(views_are_cut_on_the_host, check_batches, MULTI_CROP, HostWaits, "from cuda:0 to cpu"),
    Fault(copies_block, check_batches, with_flags(MULTI_CROP, ON_HOST), HostWaits, "is blocking"),
    Fault(tokens_are_named_on_the_host, check_training, TOKENS, MIXED, "cpu"),
    Fault(greatest_token_is_read, check_training, TOKENS, HostWaits, "reads values"),
    Fault(halves_are_numbered_on_the_host, check_training, SPLITMASK, MIXED, "cpu"),
    Fault(blocks_are_taken_apart_on_the_host, check_training, IJEPA, MIXED, "cpu"),
    Fault(labels_stay_on_the_host, check_training, LABELS, MIXED, "cpu"),
    Fault(right_answers_are_counted_in_python, check_training, BREEDS, HostWaits, "reads values"),
    Fault(second_loop_of_validation_mixes_devices, check_training, IJEPA, MIXED, "cpu"),
    Fault(places_that_are_measured_are_read, check_training, IJEPA, HostWaits, "reads values"),
    Fault(predictions_are_scored_on_two_devices, check_training, LABELS, MIXED, "cpu"),
    Fault(losses_keep_their_graphs, check_training, MAE, AssertionError, "keep the graphs"),
    Fault(gradients_go_through_the_host, check_gradients, LABELS, HostWaits, "from meta to cpu"),
    Fault(decoder_is_cut_off, check_gradients, MAE, NoGradient, "gets no gradient"),
    Fault(parameter_is_unused, check_gradients, MAE, NoGradient, "unused gets no gradient"),
    Fault(context_is_cut_off, check_gradients, IJEPA, NoGradient, "gets no gradient"),
    Fault(prototypes_are_cut_off, check_gradients, DINO, NoGradient, "prototypes gets no gradient"),
    Fault(noise_is_drawn_on_the_host, check_gradients, MAE, MIXED, "cpu"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faults_are_reported(folders, monkeypatch, fault):
    fault.require_report(monkeypatch, folders)
