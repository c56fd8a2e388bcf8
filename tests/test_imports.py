"""What a process imports: the scripts that plan and watch need the standard library, a training never torch's compiler."""

import os
import subprocess
import sys

import pytest
import torch
from fake_study import ROOT, make_plan

from engine import without_compiler

HEAVY = ["torch", "torchvision", "torch._dynamo", "sympy", "numpy", "PIL", "matplotlib", "pycocotools", "tqdm"]
HEAVY += ["tensorboard", "safetensors"]
COMPILER = {"torch._dynamo", "torchvision", "sympy"}


# Prints at the end which of these packages a process has imported, each on a line of its own.
REPORT = f"""
import atexit, sys
atexit.register(lambda: print("", *[name for name in {HEAVY} if name in sys.modules], sep="\\n", end=""))
"""


def imports_of(code: str, *words: object) -> set[str]:
    """Run code with these words as its command line -> those of HEAVY that it has imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REPORT + code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")) & set(HEAVY)


def imports_of_script(name: str, *words: object) -> set[str]:
    """Run a script of the project -> those of HEAVY that it has imported."""
    return imports_of(f"import runpy; runpy.run_path({str(ROOT / name)!r}, run_name='__main__')", *words)


@pytest.mark.parametrize("words", [["settings", "--demo"], ["plan", "--demo"], ["plan", "--dry_run", "--audit"]])
def test_planning_a_study_takes_the_standard_library_alone(words):
    assert imports_of_script("study.py", *words) == set()


def test_listing_and_watching_runs_takes_the_standard_library_alone(tmp_path):
    make_plan(tmp_path)
    assert imports_of_script("carry_out.py", tmp_path, "--list", "side_by_side") == set()
    assert imports_of_script("carry_out.py", tmp_path, "--run", "seed0/baseline_mae", "--dry_run") == set()
    assert imports_of_script("status.py", tmp_path) == set()


def test_the_report_does_not_import_torch():
    assert imports_of("import report") == {"numpy", "PIL", "matplotlib"}


def test_scripts_that_train_and_evaluate_import_no_more_of_torch_than_they_use():
    code = "import baseline, check_plan, evaluate, export, finetune, prepare, pretrain, probe"
    assert imports_of(code) == {"torch", "numpy", "PIL", "tqdm"}


def test_resnet50_needs_neither_torchvision_nor_the_compiler():
    code = "import models, torch\nmodel = models.build_segmenter('resnet50', img_size=32)\nmodel.flops()\n"
    code += "model(torch.zeros(2, 3, 32, 32)).mean().backward()"
    assert not imports_of(code) & COMPILER


USES_OF_AN_OPTIMIZER = """
import torch
from engine import without_compiler
weight = torch.nn.Parameter(torch.ones(2))
optimizer = without_compiler(torch.optim.{name})([weight], fused=True)
weight.sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
"""


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_an_optimizer_without_compiler_does_not_import_it(name):
    assert not imports_of(USES_OF_AN_OPTIMIZER.format(name=name)) & COMPILER


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_without_compiler_does_what_torchs_does(kind):
    trained = []
    for make in (kind, without_compiler(kind)):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = make([weight], lr=0.1, weight_decay=0.01)
        for _ in range(3):
            weight.exp().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert weight.grad is None and weight.requires_grad
        state = optimizer.state_dict()
        trained.append((weight, state))
    (theirs, their_state), (ours, our_state) = trained
    assert torch.equal(ours, theirs)
    assert str(our_state) == str(their_state)


def test_a_method_that_torch_does_not_wrap_stays_as_it_is():
    class Plain(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            return "its own"

    optimizer = without_compiler(Plain)([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert optimizer.zero_grad() == "its own"
    assert isinstance(optimizer, Plain)
