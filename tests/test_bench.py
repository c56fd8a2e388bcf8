"""The benchmark runs at tiny sizes, writes one JSON line per measurement, and reports only what was measured.

No test looks at how long anything took.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import choices
import pytest
import torch

import bench
import models

ROOT = Path(bench.__file__).parent
TINY = ["--quick", "--model", "mae_tiny", "--img_size", "32", "--batch_size", "2", "--repeats", "1", "--device", "cpu"]


def run(folder, *flags):
    command = [sys.executable, str(ROOT / "bench.py"), *map(str, flags)]
    env = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes a minute, and is torch's to test
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = run(
        folder, *TINY, "--profile", "traces", "--tasks", "pretrain", "finetune", "resnet50", "data", "study", "choices"
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]
    return folder, rows, done.stdout


def test_quick_measures_every_training_on_both_kinds_of_batches(quick):
    _, rows, _ = quick
    measured = {(r["task"], r["variant"]) for r in rows}
    for task in ("pretrain", "finetune", "resnet50"):
        assert {(task, bench.SYNTHETIC), (task, bench.REAL), (f"{task} evaluation", bench.SYNTHETIC)} <= measured
    for row in rows:
        assert row["machine"]["versions"]["torch"]
        assert "bench.py" in row["machine"]["command"]
        if "img_s" in row:
            assert row["img_s"] == pytest.approx(1e3 * row["batch_size"] / row["step_ms"])
            assert row["mfu"] is None  # no peak is known for a CPU
            assert row["mem_gb"] is None


def test_every_choice_in_the_step_is_measured_beside_its_alternative(quick):
    names = [r["variant"] for r in quick[1] if r["task"] == "choices"]
    assert names == [bench.SYNTHETIC, "torch.compile", *choices.PATCHES, *choices.OPTIMIZERS]


@pytest.mark.parametrize("name", choices.PATCHES)
def test_an_alternative_computes_the_same_loss_and_gradients(name):
    torch.manual_seed(0)
    model = models.build_mae("mae_tiny", img_size=64)
    images, noise, found = torch.randn(3, 3, 64, 64), torch.rand(3, 16), []

    def step():
        model.zero_grad()
        loss = model(images, 0.75, noise)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])

    step()
    choices.undone(name, step)()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_quick_profiles_and_prints_a_table(quick):
    folder, rows, output = quick
    assert {p.name for p in (folder / "traces").iterdir()} == {"pretrain.json", "finetune.json", "resnet50.json"}
    assert "Self CPU" in output
    assert output.count("| pretrain | ") == 3
    assert any(r["variant"] == "profile" and "of a step" in r["note"] for r in rows)


def test_the_study_is_projected_from_the_rates_of_the_same_run(quick):
    _, rows, _ = quick
    rates = {r["task"]: r["img_s"] for r in rows if r["variant"] == bench.REAL}
    rates |= {r["task"]: r["img_s"] for r in rows if r["task"].endswith("evaluation")}
    (study,) = [r for r in rows if r["task"] == "study"]
    assert study["hours"] == pytest.approx(sum(n / rates[k] for k, n in bench.STUDY.items()) / 3600)


def test_the_study_without_rates_is_unmeasured_and_never_estimated(tmp_path):
    done = run(tmp_path, *TINY, "--synthetic", "--tasks", "study")
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert row["hours"] is None
    assert "not measured: finetune, finetune evaluation, pretrain" in row["note"]


def test_peers_are_measured_beside_this_project_and_imported_only_when_asked(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("timm", reason="timm is not installed")
    done = run(tmp_path, *TINY, "--synthetic", "--peers", "--tasks", "pretrain", "finetune")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    names = {r["variant"] for r in rows}
    assert {"transformers ViTMAE (SDPA), synthetic", "timm ViT, linear head, synthetic"} <= names
    assert rows[0]["machine"]["versions"]["transformers"]
    code = "import bench, sys; print({'timm', 'transformers', 'peers'} & set(sys.modules))"
    plain = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert plain.stdout.strip() == "set()", plain.stderr


def test_the_report_lists_measured_lines_and_names_what_no_gpu_has_measured(tmp_path):
    machine = {
        "device": "Some CPU, 2 cores",
        "cores": 2,
        "threads": 2,
        "versions": {"torch": "9"},
        "command": "python bench.py",
    }
    row = {
        "task": "pretrain",
        "variant": bench.REAL,
        "step_ms": 1234.5,
        "img_s": 12.96,
        "mfu": None,
        "machine": machine,
    }
    source, target = tmp_path / "lines.jsonl", tmp_path / "BENCHMARKS.md"
    source.write_text(json.dumps(row) + "\n")
    bench.write_report(str(source), str(target))
    text = target.read_text()
    assert "1,234" in text
    assert "## Some CPU, 2 cores\n\n`python bench.py`" in text
    missing = text.split("## Not measured yet on an NVIDIA GPU")[1]
    assert f"- pretrain: {bench.REAL}" in missing
    assert "- study: " in missing
    on_gpu = {**row, "machine": {**machine, "device": "NVIDIA H200"}}
    source.write_text(json.dumps(on_gpu) + "\n")
    bench.write_report(str(source), str(target))
    assert f"- pretrain: {bench.REAL}" not in target.read_text()


@pytest.mark.parametrize("flags", [["--batch_size", "0"], ["--repeats", "-1"], ["--report", "absent.jsonl"]])
def test_wrong_use_ends_in_one_line(flags, tmp_path):
    done = run(tmp_path, "--device", "cpu", *flags)
    assert done.returncode == 2
    assert flags[0] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
