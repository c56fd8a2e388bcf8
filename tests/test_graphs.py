"""Compiled networks are whole graphs, forward and backward, in training and in validation, and are compiled once."""

import contextlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from fake_cuda import Case, Folders, make_trainer, small_network
from gpu_cases import (
    IJEPA,
    LINEAR,
    MAE,
    MULTI_CROP,
    NAMED,
    SEGMENTER,
    UNMASKED,
    Fault,
    Patch,
    make_folders,
    with_flags,
    wrap,
)
from torch import nn
from torch._dynamo.exc import RecompileError, Unsupported

import models
from engine import Distributed
from objectives.dino import DinoNetwork
from objectives.ijepa import BlockPredictor
from pretrain import MaskedPixels

# Each network once: small crops come with large ones.
GRAPHS = [case for case in NAMED if case.name != "dino"] + [MULTI_CROP, LINEAR]
GRAPHS += [UNMASKED, with_flags(SEGMENTER, "--output reshape")]
# Half a minute on a CPU.
RESNET50 = pytest.param(Case("baseline", "segment", ("--model resnet50",)), marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return make_folders(tmp_path_factory)


def check_graphs(case: Case, folders: Folders) -> None:
    """Train and validate twice on the CPU through torch.compile: whole graphs, and no new ones the second time."""
    compile_whole = torch.compile

    def whole(network: nn.Module, **options: object) -> Callable:
        return compile_whole(network, fullgraph=True, backend="aot_eager", **options)

    compiled = case._replace(flags=(*case.flags, "--compile", "--device cpu", "--precision bf16"))
    torch._dynamo.reset()
    try:
        with small_network(), mock.patch.object(torch, "compile", whole):
            trainer = make_trainer(compiled, Distributed(0, 0, 1, torch.device("cpu")), folders)
            with contextlib.closing(trainer.batches.run(0, 2)) as steps:
                trainer.train_step(next(steps), want_norm=True)
                trainer._validate()
                with torch._dynamo.config.patch(error_on_recompile=True):
                    trainer.train_step(next(steps), want_norm=True)
                    trainer._validate()
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("case", [*GRAPHS, RESNET50], ids=str)
def test_compiled_networks_are_whole_graphs(folders, case):
    check_graphs(case, folders)


# -- Faults -----------------------------------------------------------------------------------------------------------------


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


def small_crops_decide_by_value(patch: Patch) -> None:
    def forward(original, network, crops, others=None, *args):
        if others is not None and others.mean() > 0:
            return original(network, crops, others, *args)
        return original(network, crops, others, *args)

    wrap(patch, DinoNetwork, "forward", forward)


def predictor_leaves_the_graph(patch: Patch) -> None:
    def predict(original, network, *args):
        torch._dynamo.graph_break()
        return original(network, *args)

    wrap(patch, BlockPredictor, "forward_predictor", predict)


FAULTS = [
    Fault(block_decides_by_value, check_graphs, MAE, Unsupported, "Data-dependent"),
    Fault(small_crops_decide_by_value, check_graphs, MULTI_CROP, Unsupported, "Data-dependent"),
    Fault(predictor_leaves_the_graph, check_graphs, IJEPA, Unsupported, "graph_break"),
    Fault(block_leaves_the_graph, check_graphs, SEGMENTER, Unsupported, "graph_break"),
    Fault(mask_ratio_changes_at_each_step, check_graphs, MAE, RecompileError, "mask_ratio"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faults_are_reported(folders, monkeypatch, fault):
    fault.require_report(monkeypatch, folders)
