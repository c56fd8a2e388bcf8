"""Baselines run through the loop of fine-tuning: ResNet-50 and the same network as the MAE, from random weights."""

import json
import os
import re

import pytest
import torch
from small_runs import IMG, SMALL, drawn_root, log, metrics, needs_photos, on_two_processes, refusal, run
from test_finetune import overfit
from torchvision.models import resnet50

from models import ResNet50Segmenter, build_segmenter
from weights import load_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return drawn_root(tmp_path_factory)


@pytest.fixture(scope="module")
def flags(root, tmp_path_factory):
    return [
        *SMALL,
        "--data_root",
        root,
        "--cache_dir",
        tmp_path_factory.mktemp("cache"),
        "--batch_size",
        8,
        "--epochs",
        1,
        "--log_every",
        1,
    ]


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory):
    """ResNet-50 weights as torchvision publishes them, with a classifier and running statistics."""
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = resnet50(weights=None).eval()
    model.bn1.running_mean += 0.25
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def resnet_run(flags, resnet_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "resnet50"
    text = run(
        "baseline", "--model", "resnet50", *flags, "--weights", resnet_weights, "--blr", 1e-4, "--output_dir", folder
    )
    return folder, text


def test_resnet50_trains_and_its_checkpoint_loads_as_the_segmenter_that_was_scored(resnet_run):
    folder, _ = resnet_run
    config, m = json.loads((folder / "config.json").read_text()), metrics(folder)
    assert (m["script"], m["kind"], m["updates"], m["n_train"]) == ("baseline", "segment", 4, 32)
    model, content = load_model(str(folder / "model.pt"))
    assert isinstance(model, ResNet50Segmenter)
    assert content["model_config"] == {"kind": "segmenter", "img_size": IMG, "name": "resnet50"}
    assert config["params"] == sum(p.numel() for p in model.parameters())
    assert model(torch.zeros(2, 3, IMG, IMG)).shape == (2, 3, IMG, IMG)
    assert {p.name for p in folder.iterdir()} == {".lock", "config.json", "log.jsonl", "metrics.json", "model.pt"}


def test_weights_from_a_file_are_the_start_and_batch_statistics_move_on(resnet_run, resnet_weights):
    before, after = (torch.load(p, weights_only=True) for p in (resnet_weights, resnet_run[0] / "model.pt"))
    key = "layer4.2.conv3.weight"
    change = (after["model"][f"backbone.{key}"] - before[key]).norm() / before[key].norm()
    assert 0 < change < 0.05, "trained a little, from these weights"
    assert after["model"]["backbone.bn1.num_batches_tracked"] == 4
    assert not torch.equal(after["model"]["backbone.bn1.running_mean"], before["bn1.running_mean"])
    assert not any(k.startswith("backbone.fc") for k in after["model"])


def test_another_file_of_weights_is_another_experiment(flags, resnet_run, tmp_path):
    message = refusal("baseline", "--model", "resnet50", *flags, "--blr", 1e-4, "--output_dir", resnet_run[0])
    assert "holds another experiment" in message


def test_the_supervised_mae_trains_every_layer_at_the_full_rate(flags, tmp_path):
    text = run("baseline", "--model", "mae_tiny", *flags, "--output_dir", tmp_path / "dry", "--dry_run")
    rates = re.findall(r"lr (\S+) \(x (\S+)\)  weight_decay (\S+)", text)
    assert sorted(rates) == [("3.125e-05", "1.0000", "0"), ("3.125e-05", "1.0000", "0.05")]
    assert not list(tmp_path.iterdir())


def test_layer_decay_from_scratch_slows_the_first_layers_down(flags, tmp_path):
    text = run("baseline", "--model", "mae_tiny", *flags, "--layer_decay", 0.75, "--output_dir", tmp_path, "--dry_run")
    factors = {first: float(factor) for factor, first in re.findall(r"\(x (\S+)\) .*tensors: (\S+) \.\.\.", text)}
    depth = len(build_segmenter("mae_tiny", img_size=IMG).blocks)
    assert factors["cls_token"] == pytest.approx(0.75 ** (depth + 1), abs=5e-5)
    for block in range(depth):
        assert factors[f"blocks.{block}.attn.qkv.weight"] == pytest.approx(0.75 ** (depth - block), abs=5e-5)
    assert factors["decoder_embed.weight"] == 1


def test_each_model_has_its_own_default_rate(flags, tmp_path):
    def rate(*more):
        text = run("baseline", *flags, "--output_dir", tmp_path / "dry", "--dry_run", *more)
        return float(re.search(r"epochs, lr ([\d.e-]+)", text)[1])

    assert rate("--model", "resnet50", "--batch_size", 32) == pytest.approx(2e-3 * 32 / 256)
    assert rate("--model", "mae_tiny", "--batch_size", 32) == pytest.approx(1e-3 * 32 / 256, rel=1e-3)
    assert rate("--model", "resnet50", "--batch_size", 32, "--blr", 0.08) == pytest.approx(0.01)


def test_the_supervised_mae_starts_from_the_seeds_random_weights(flags, tmp_path):
    run(
        "baseline",
        "--model",
        "mae_tiny",
        *flags,
        "--seed",
        4,
        "--blr",
        0,
        "--min_lr",
        0,
        "--output_dir",
        tmp_path / "run",
    )
    torch.manual_seed(4)
    expected = build_segmenter("mae_tiny", img_size=IMG, drop_path=0.1).state_dict()
    found = torch.load(tmp_path / "run/model.pt", weights_only=True)["model"]
    assert set(found) == set(expected)
    assert all(torch.equal(found[k], expected[k]) for k in found)


def test_the_supervised_mae_learns(flags, tmp_path):
    run(
        "baseline",
        "--model mae_tiny",
        *flags,
        "--epochs 8 --blr 2e-2",
        "--output_dir",
        tmp_path / "run",
        "--warmup_epochs 1",
    )
    losses = [line["loss"] for line in log(tmp_path / "run", "train")]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_half_arm_trains_on_half_of_the_images(flags, tmp_path):
    run("baseline", "--model", "mae_tiny", *flags, "--train_fraction", 0.5, "--output_dir", tmp_path / "run")
    assert (metrics(tmp_path / "run")["n_train"], metrics(tmp_path / "run")["updates"]) == (16, 2)


TWO_PROCESSES = """
import hashlib, sys
import baseline, trainer
fit, models = trainer.Trainer.fit, []
trainer.Trainer.fit = lambda self: (models.append(self.model), fit(self))[1]
baseline.main(baseline.get_args_parser().parse_args(sys.argv[1:]))
state = models[0].state_dict()
print("state", len(state), hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest())
"""


def test_resnet50_on_two_processes_keeps_equal_weights_and_statistics_and_says_whose_batches_they_see(flags, tmp_path):
    args = ["--model", "resnet50", *flags, "--epochs", 2, "--output_dir", tmp_path / "two"]
    first, second = on_two_processes(TWO_PROCESSES, *args)
    states = [next(line for line in out.splitlines() if line.startswith("state")) for out in (first, second)]
    assert states[0] == states[1]
    assert "batch statistics are those of each process's own images" in first
    kept = load_model(str(tmp_path / "two" / "model.pt"))[0].state_dict()
    assert kept["backbone.bn1.num_batches_tracked"] in (4, 8)
    assert kept["backbone.bn1.running_mean"].abs().sum() > 0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["--model", "mae_tiny", "--weights", "imagenet"], "to fine-tune a pre-trained MAE use finetune.py --init"),
        (["--model", "resnet50", "--micro_batch_size", 4], "resnet50 takes no --micro_batch_size"),
        (["--model", "resnet50", "--weights", "missing.pth"], "checkpoint missing.pth does not exist"),
        (["--model", "mae_tiny", "--img_size", 60], "60"),
        (["--model", "resnet50", "--img_size", 48], "48 x 48 is not divisible by 32"),
        (["--model", "resnet50", "--layer_decay", 0.75], "--layer_decay needs a model with encoder blocks"),
        (["--model", "mae_tiny", "--batch_size", 33], "--batch_size 33 is larger than the split's 32 images"),
    ],
)
def test_wrong_use_is_refused_in_one_line(flags, tmp_path, wrong, reason):
    assert reason in refusal("baseline", *flags, "--output_dir", tmp_path / "no", *wrong)


def test_weights_of_another_network_are_refused(flags, tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    message = refusal(
        "baseline", "--model resnet50", *flags, "--weights", tmp_path / "other.pth", "--output_dir", tmp_path / "no"
    )
    assert "other.pth does not fit ResNet-50: Missing key(s)" in message
    assert len(message) < 500


@needs_photos
@pytest.mark.slow
def test_at_full_size_resnet50_learns_sixteen_real_photos_as_far_as_its_stride_lets_it(monkeypatch, tmp_path):
    best = overfit(
        monkeypatch,
        os.environ["SAMPLE_ROOT"],
        tmp_path,
        "baseline",
        "--model resnet50 --cache_size 224 --epochs 15 --blr 1e-2 --warmup_epochs 1",
    )
    print("accuracy", best["accuracy"])
    assert best["accuracy"] > 0.90
