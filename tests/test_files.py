"""The files that promise to work when copied do so, importing a file does nothing, and imports go one way."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What to copy -> code that uses it.
USES = {
    "models": """
import sys, torch, models
model = models.build_mae("mae_tiny", img_size=32)
assert model(torch.zeros(1, 3, 32, 32))[0].isfinite()
assert not {"torchvision", "engine"} & set(sys.modules)
""",
    "data": """
import data
print(data.trimap_path("oxford-iiit-pet/images/a.jpg"))
""",
    "engine": """
import engine
assert engine.lr_at(0, 10, 2, 1.0) == 0.5
assert engine.setup("cpu").world_size == 1
""",
    "engine runs": """
import engine, runs
assert runs.RunFolder("run", engine.setup("cpu"), {"experiment": {}}).load() is None
""",
    "augment": """
import augment, torch
assert augment.denormalise(augment.normalise(torch.full((1, 3, 4, 4), 100.0))).sub(100).abs().max() < 1e-3
""",
    "colours": """
import colours, torch
assert colours.Colours()(torch.rand(2, 3, 16, 16), torch.rand(2, 13)).shape == (2, 3, 16, 16)
""",
    "data augment batches": """
import numpy as np
from PIL import Image
import batches, data
Image.new("RGB", (20, 30), "tan").save("a.png")
options = {"cache_dir": "cache", "cache_size": 16}
data.build_cache(".", ["a.png"], **options)
store = data.ImageStore(".", ["a.png"], **options)
train = batches.TrainBatches(batches.Examples(store), batches.Augmentation(8), batch_size=1, seed=0)
((batch,),) = train.run(0, 1)
assert batch["images"].shape == (1, 3, 8, 8)
(batch,) = batches.EvalBatches(store, img_size=8, batch_size=1)
assert batch["index"].tolist() == [0]
""",
    "cuda_graph": """
import cuda_graph
import torch
assert cuda_graph.RecordedBackward(lambda batch: None, torch.nn.Linear(1, 1)).graph is None
""",
    "metrics": """
import metrics
mean, low, high = metrics.t_interval([1.0, 2.0, 3.0])
assert low < mean < high
""",
    "data splits": """
import splits
assert "animal" in splits.split_names()
""",
    "data engine folders splits": """
import folders
open("a.jpg", "wb").write(b"a")
assert folders.list_tree(".").images == ["a.jpg"]
""",
    "engine models weights": """
import models, torch, weights
encoder = models.build_vit("mae_tiny", img_size=32)
torch.save({"model": encoder.state_dict()}, "encoder.pt")
report = weights.load_pretrained(models.build_mae("mae_tiny", img_size=32), "encoder.pt")
assert report.missing
""",
}
# Files whose local imports are part of the design.
MAY_IMPORT = {
    "models": set(),
    "data": set(),
    "engine": set(),
    "metrics": set(),
    "augment": set(),
    "colours": set(),
    "weights": {"engine", "models"},
    "runs": {"engine"},
    "splits": {"data"},
    "folders": {"data", "engine", "splits"},
    "batches": {"augment", "data"},
    "cuda_graph": set(),
    "curves": {"engine", "runs"},
    "trainer": {"batches", "cuda_graph", "curves", "engine", "objective", "runs"},
}
TRAINING = ("pretrain", "finetune", "baseline")
AFTER_TRAINING = {"evaluate", "report", "figures", "study", "bench"}


@pytest.mark.parametrize("names", USES)
def test_files_work_when_they_are_copied_together(names, tmp_path):
    for name in names.split():
        (tmp_path / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
    result = subprocess.run(
        [sys.executable, "-c", USES[names]], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert result.returncode == 0, result.stderr


def environment(**more: str) -> dict[str, str]:
    """Give the environment of a process that finds none of the project's files by itself."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, "OMP_NUM_THREADS": "1", **more}


def python_files() -> dict[str, Path]:
    """Name every module of the project: the files of its root, and those of its packages as package.file."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    for path in ROOT.glob("objectives/*.py"):
        name = "objectives" if path.stem == "__init__" else f"objectives.{path.stem}"
        files[name] = path
    return files


def local_imports(path: Path, names: set[str]) -> set[str]:
    """Find which modules of the project a file imports, at its start or in a function."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
    return imported & names


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Map each module of the project to those that it imports."""
    files = python_files()
    return {name: local_imports(path, set(files)) for name, path in files.items()}


def test_imports_go_one_way(graph):
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_files_below_the_others_import_what_the_design_says(graph, name):
    assert graph[name] <= MAY_IMPORT[name]


def test_no_training_depends_on_what_comes_after_it(graph):
    for script in TRAINING:
        reached = set()
        waiting = [script]
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting.extend(graph[name] - reached)
        assert not reached & AFTER_TRAINING


def test_importing_every_file_does_nothing(tmp_path):
    code = f"import {', '.join(sorted(python_files()))}"
    env = environment(PYTHONPATH=str(ROOT), MPLCONFIGDIR=str(tmp_path / "matplotlib"))
    (tmp_path / "work").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, "--no-such-flag"], cwd=tmp_path / "work", capture_output=True, text=True, env=env
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list((tmp_path / "work").iterdir())
