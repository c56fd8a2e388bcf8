"""The README's examples of an objective and a task run through every script once they are named, like those that are here.

tests/examples holds them: short files that use the contract of objective.py and touch nothing else.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_runs import REPOSITORY, drawn_root, log, metrics
from stress import assert_same

from study import PlanLine, write_lines

EXAMPLES = REPOSITORY / "tests/examples"
IMG = 32
OBJECTIVE_LINES = 40
TASK_LINES = 60


class Project(NamedTuple):
    """A copy of the scripts in which the examples are named, and what all its commands share."""

    root: Path
    flags: list[str]


def name_example(script: Path, table: str, entry: str, statement: str) -> None:
    """Add an import and an entry of a dictionary to a script, as the README says."""
    text = script.read_text()
    start = re.search(rf"^{table}: .*\{{", text, re.MULTILINE)
    text = f"{text[: start.end()]}{entry}, {text[start.end() :]}"
    first_import = re.search(r"^(from|import) ", text, re.MULTILINE).start()
    script.write_text(text[:first_import] + statement + "\n" + text[first_import:])


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    root = tmp_path_factory.mktemp("project")
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, root)
    if (REPOSITORY / "objectives").is_dir():
        shutil.copytree(REPOSITORY / "objectives", root / "objectives")
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, root)
    name_example(root / "pretrain.py", "OBJECTIVES", '"denoise": Denoising', "from denoise import Denoising")
    name_example(root / "tasks.py", "TASKS", '"species": Species', "from species import Species")
    flags = ["--model", "mae_tiny", "--img_size", IMG, "--cache_size", IMG, "--batch_size", 8, "--log_every", 3]
    flags += ["--warmup_epochs", 1, "--device", "cpu", "--data_root", drawn_root(tmp_path_factory)]
    flags += ["--cache_dir", tmp_path_factory.mktemp("cache")]
    return Project(root, [str(flag) for flag in flags])


def start(project: Project, script: str, *flags) -> subprocess.Popen:
    command = [sys.executable, f"{script}.py", *(str(flag) for flag in flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=project.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(project: Project, script: str, *flags) -> str:
    """Run a script to its end -> what it printed."""
    process = start(project, script, *flags)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def run_interrupted(project: Project, script: str, *flags) -> str:
    """Stop a training after its first epoch and repeat the command -> what the second one printed."""
    process = start(project, script, *flags)
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "the same command continues the run" in errors
    return run(project, script, *flags)


@pytest.fixture(scope="module")
def study(project: Project) -> Path:
    """Pre-train with the objective, interrupted, and fine-tune on the task, interrupted; test it once."""
    folder = project.root / "study"
    pretrain = ["--objective", "denoise", *project.flags, "--epochs", 60, "--blr", 5e-3, "--num_images", 16]
    text = run_interrupted(project, "pretrain", *pretrain, "--output_dir", folder / "seed0/pretrain_animal")
    assert "resumed" in text
    init = folder / "seed0/pretrain_animal/model.pt"
    finetune = ["--task", "species", *project.flags, "--epochs", 30, "--blr", 1e-2, "--init", init]
    text = run_interrupted(project, "finetune", *finetune, "--output_dir", folder / "seed0/finetune_animal")
    assert "resumed" in text
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_examples_are_short():
    assert len((EXAMPLES / "denoise.py").read_text().splitlines()) <= OBJECTIVE_LINES
    assert len((EXAMPLES / "species.py").read_text().splitlines()) <= TASK_LINES


def test_an_objective_in_a_file_of_its_own_learns_resumes_and_keeps_its_encoder(project, study, tmp_path):
    folder = study / "seed0/pretrain_animal"
    config = config_of(folder)
    assert (config["script"], config["kind"]) == ("pretrain", "denoise")
    assert config["experiment"]["noise_range"] == 2
    assert not {"mask_ratio", "norm_pix_loss", "figure_every"} & set(config["args"])
    first = log(folder, "val")[0]
    last = metrics(folder)["last"]
    for name in ("loss_animal", "loss_non_animal"):
        assert last[name] < 0.8 * first[name]
    content = torch.load(folder / "model.pt", weights_only=True)
    assert content["model_config"] == {"kind": "vit", "name": "mae_tiny", "img_size": IMG}
    assert not any(key.startswith("head.") for key in content["model"])
    undisturbed = ["--objective", "denoise", *project.flags, "--epochs", 60, "--blr", 5e-3, "--num_images", 16]
    run(project, "pretrain", *undisturbed, "--output_dir", tmp_path / "undisturbed")
    assert_same(tmp_path / "undisturbed", folder)


def test_a_task_in_a_file_of_its_own_starts_from_the_encoder_and_keeps_the_best_weights(study):
    folder = study / "seed0/finetune_animal"
    config = config_of(folder)
    assert (config["script"], config["kind"], config["select"]) == ("finetune", "species", "accuracy")
    assert config["scores"] == {"loss": "cross-entropy", "accuracy": "accuracy"}
    assert not {"crop_scale", "flips", "head"} & set(config["args"])
    assert metrics(folder)["best"]["accuracy"] == max(line["accuracy"] for line in log(folder, "val"))
    losses = [line["loss"] for line in log(folder, "train")]
    assert losses[-1] < losses[0]
    assert torch.load(folder / "model.pt", weights_only=True)["model_config"]["kind"] == "classifier"


def test_the_same_task_trains_from_random_weights_too(project, tmp_path):
    text = run(project, "baseline", "--task", "species", *project.flags, "--dry_run", "--output_dir", tmp_path / "dry")
    assert "baseline (species): mae_tiny" in text


class Scored(NamedTuple):
    """A run that was tested, what the test printed and what a second one did."""

    folder: Path
    printed: str
    printed_again: str


@pytest.fixture(scope="module")
def tested(project: Project, study: Path) -> Scored:
    folder = study / "seed0/finetune_animal"
    place = ["--device", "cpu"]
    for flag in ("--data_root", "--cache_dir"):
        place += [flag, project.flags[project.flags.index(flag) + 1]]
    test = ["test", folder, *place, "--batch_size", 3]
    return Scored(folder, run(project, "evaluate", *test), run(project, "evaluate", *test))


def test_the_task_is_tested_once_on_every_test_image(tested):
    records = np.load(tested.folder / "test.npz")
    assert records["score_names"].tolist() == ["loss", "accuracy"]
    assert records["numerators"].shape == records["denominators"].shape == (8, 2)
    assert len(set(records["ids"])) == 8
    accuracy = records["numerators"][:, 1].mean()
    assert f"accuracy {accuracy:.3f}" in tested.printed
    assert "nothing to do" in tested.printed_again


def write_plan(study: Path) -> None:
    """Write the plan of the two runs as study.py would."""
    before = "seed0/pretrain_animal"
    lines = [
        PlanLine(0, "pretrain", "animal", before, "", "", None, "pretrain.py --objective denoise"),
        PlanLine(0, "finetune", "animal", "seed0/finetune_animal", before, "", None, "finetune.py --task species"),
    ]
    (study / "study.tsv").write_text(write_lines(lines))


def test_the_report_shows_the_objective_and_the_task(project, study, tested):
    write_plan(study)
    run(project, "report", study)
    text = (study / "report/report.md").read_text()
    assert "All 2 runs finished" in text
    records = np.load(tested.folder / "test.npz")
    loss, accuracy = records["numerators"].mean(0)
    assert re.search(rf"\| Finetuned-Animals \| 1 \| {loss:.3f} .*\| {accuracy:.3f} ", text)
    for words in ("cross-entropy", "accuracy", "Task: species", "Pre-training (denoise)", "| noise_range | 2 |"):
        assert words in text
    for figure in ("task_species_curves.png", "pretraining_denoise.png"):
        assert f"({figure})" in text
        assert (study / "report" / figure).stat().st_size > 0
