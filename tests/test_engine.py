"""The command line, the GPU table, the schedule and the parameter groups of the engine."""

import argparse
import errno
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from small_runs import REPOSITORY

import engine
from engine import EngineError, Parser, at_least, explain, fraction, param_groups, peak_of, seed_number, strict_json

PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla T4": 65e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 5090": 209e12,
    "NVIDIA RTX A6000": 155e12,
    "NVIDIA RTX 6000 Ada Generation": 364e12,
}
UNKNOWN = [
    "",
    "NVIDIA",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA A100-SXM4-40GB MIG 7g.40gb",
    "NVIDIA H100 80GB HBM2e",
    "NVIDIA H20",
    "NVIDIA H800",
    "NVIDIA A100X",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A10-24Q",
    "NVIDIA A16",
    "GRID T4-16Q",
    "NVIDIA T400 4GB",
    "NVIDIA L2",
    "NVIDIA L4X",
    "NVIDIA GB200",
    "NVIDIA B300 SXM6 AC",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA RTX A6000 Laptop GPU",
    "Quadro RTX 6000",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    "AMD Instinct MI300X",
]


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(name):
    assert peak_of(name) == PEAKS[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_gpu_whose_name_contains_that_of_another_has_no_peak(name):
    assert peak_of(name) is None


def test_no_peak_applies_on_the_cpu_or_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    assert engine.peak_flops(torch.device("cuda", 0), "bf16") == 362e12
    assert engine.peak_flops(torch.device("cuda", 0), "fp32") is None
    assert engine.peak_flops(torch.device("cpu"), "bf16") is None


def small_parser() -> Parser:
    parser = Parser("train.py")
    add = parser.flags("optimisation", role="recipe")
    add("--epochs", type=at_least(1, int), default=3)
    add("--min_lr", type=at_least(0), default=0.0)
    add("--crop", dest="crop_scale", type=fraction, default=1.0)
    parser.flags("optimisation", role="computation")("--micro_batch_size", type=at_least(1, int))
    parser.flags("arm", role="arm")("--init")
    parser.flags("optimisation", role="seed")("--seed", type=seed_number, default=0)
    parser.add_argument("--plain", action="store_true")
    parser.set_defaults(kind="mae")
    return parser


def test_every_argument_has_the_role_of_the_group_it_was_made_in():
    args = small_parser().parse_args(["--epochs", "5"])
    assert args.epochs == 5
    recipe = dict.fromkeys(("epochs", "min_lr", "crop_scale", "plain", "kind"), "recipe")
    assert args.roles == {**recipe, "micro_batch_size": "computation", "init": "arm", "seed": "seed"}
    assert set(args.roles) == set(vars(args)) - {"roles", "script"} and args.script == "train"


def test_flags_of_several_roles_share_one_group():
    text = small_parser().format_help()
    assert text.count("optimisation:") == 1
    group = text[text.index("optimisation:") : text.index("arm:")]
    assert "--epochs" in group and "--micro_batch_size" in group and "--seed" in group


def test_a_subcommand_keeps_the_roles_of_its_flags():
    parser = Parser("evaluate.py")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("test").flags("system", role="computation")("--device")
    args = parser.parse_args(["test", "--device", "cpu"])
    assert args.roles == {"command": "recipe", "device": "computation"}


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="unknown role 'receipt'; choose one of recipe, network"):
        Parser().flags("data", role="receipt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--epochs", "1.5"], "argument --epochs: must be an integer, got '1.5'"),
        (["--epochs", "many"], "argument --epochs: must be an integer, got 'many'"),
        (["--min_lr", "-1"], "argument --min_lr: must be at least 0, got -1"),
        (["--min_lr", "nan"], "argument --min_lr: must be at least 0 and finite, got nan"),
        (["--min_lr", "inf"], "argument --min_lr: must be at least 0 and finite, got inf"),
        (["--min_lr", "low"], "argument --min_lr: must be a number, got 'low'"),
        (["--crop", "0"], "argument --crop: must lie in (0, 1], got 0"),
        (["--crop", "1.5"], "argument --crop: must lie in (0, 1], got 1.5"),
        (["--crop", "nan"], "argument --crop: must lie in (0, 1], got nan"),
        (["--seed", "-1"], "argument --seed: must be at least 0, got -1"),
        (["--seed", str(2**32)], "argument --seed: must be below 2^32, got 4294967296"),
        (["--seed", "x"], "argument --seed: must be an integer, got 'x'"),
    ],
)
def test_a_wrong_number_is_refused_in_one_line_with_the_bound_and_the_value(flags, message, capsys):
    with pytest.raises(SystemExit) as info:
        small_parser().parse_args(flags)
    assert info.value.code == 2
    assert capsys.readouterr().err == f"train.py: error: {message} (see --help)\n"


def test_numbers_at_the_bounds_are_accepted():
    flags = ["--epochs", "1", "--min_lr", "0", "--crop", "1", "--seed", str(2**32 - 1)]
    args = small_parser().parse_args(flags)
    assert (args.epochs, args.min_lr, args.crop_scale, args.seed) == (1, 0.0, 1.0, 2**32 - 1)
    assert isinstance(args.epochs, int) and isinstance(args.min_lr, float)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (KeyboardInterrupt(), ("interrupted", 130)),
        (KeyboardInterrupt("SIGTERM; repeat"), ("SIGTERM; repeat", 143)),
        (torch.OutOfMemoryError("2 GB\nmore"), ("out of device memory; lower --micro_batch_size (2 GB)", 1)),
        (EngineError("wrong flag"), ("wrong flag", 2)),
        (EngineError("it failed", 1), ("it failed", 1)),
        (
            OSError(errno.ENOSPC, "No space", "a.pt"),
            ("the disk is full (a.pt); free some space and repeat the command", 1),
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), ("/x: Permission denied", 1)),
        (FileExistsError(errno.EEXIST, "File exists", "/x"), ("/x: File exists", 2)),
        (OSError(errno.EIO, "Input/output error"), None),
        (RuntimeError("a defect"), None),
    ],
    ids=repr,
)
def test_what_a_user_can_cause_has_a_message_and_an_exit_code(error, failure):
    assert explain(error) == failure


@pytest.mark.parametrize(("local_rank", "code", "lines"), [(0, 2, 1), (1, 2, 0), (1, 1, 1)])
def test_wrong_use_is_printed_once_on_a_node_and_failures_by_every_process(local_rank, code, lines):
    program = f"""
import argparse, engine
def main(args):
    raise engine.EngineError("no such split", {code})
engine.launch(main, argparse.ArgumentParser("x.py"))
"""
    env = {**os.environ, "RANK": str(local_rank), "LOCAL_RANK": str(local_rank)}
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    where = f" on rank {local_rank}" if local_rank else ""
    assert result.returncode == code
    assert result.stderr.splitlines() == [f"x.py: error{where}: no such split"] * lines


def test_a_defect_keeps_its_traceback():
    program = "import argparse, engine\nengine.launch(lambda args: 1 / 0, argparse.ArgumentParser())"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr and "Traceback" in result.stderr


@pytest.mark.parametrize("device", ["tpu", "cuda:", "", "meta"])
def test_a_device_that_cannot_be_used_is_refused(device):
    with pytest.raises(EngineError, match="--device must be auto, cpu, cuda or cuda:N, got"):
        engine.setup(device)


def test_a_gpu_that_does_not_exist_is_refused():
    with pytest.raises(EngineError, match=r"--device cuda:99 needs GPU 99, torch sees \d+; use --device cpu"):
        engine.setup("cuda:99")


def test_numbers_of_a_single_process_are_gathered_by_name():
    gathered = engine.setup("cpu").gather_named({"loss": 0.5, "stop": True})
    assert {name: column.tolist() for name, column in gathered.items()} == {"loss": [0.5], "stop": [1.0]}


def test_the_rate_warms_up_linearly_and_falls_along_half_a_cosine():
    rates = [engine.lr_at(step, 10, 4, 1.0, 0.2) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[7] == pytest.approx(0.6)
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] > 0.2


def test_groups_exempt_vectors_and_named_parameters_from_decay():
    model = torch.nn.Linear(3, 2)
    model.token = torch.nn.Parameter(torch.zeros(1, 3))
    model.frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    groups = param_groups(model, 0.1, no_decay=["token"])
    assert {tuple(group["names"]): group["weight_decay"] for group in groups} == {
        ("weight",): 0.1,
        ("bias", "token"): 0.0,
    }


def test_strict_json_replaces_what_json_cannot_hold_at_any_depth():
    content = {"a": [float("nan"), (1.5, float("inf"))], "b": {"c": float("-inf"), "d": "text"}, "e": None, "f": True}
    clean = strict_json(content)
    assert clean == {"a": [None, [1.5, None]], "b": {"c": None, "d": "text"}, "e": None, "f": True}
    json.dumps(clean, allow_nan=False)


def test_help_states_every_default_once():
    parser = engine.Parser("script.py")
    recipe = parser.flags("group", role="recipe")
    recipe("--epochs", type=int, default=150, help="passes over the data")
    recipe("--seed", type=int, default=0, help="seed of the draws")
    recipe("--workers", type=int, help="threads that decode (default: one a core)")
    recipe("--flips", action=argparse.BooleanOptionalAction, default=True, help="random flips")
    recipe("--again", action="store_true", help="repeat it")
    words = " ".join(parser.format_help().split())
    for line in (
        "passes over the data (default: 150)",
        "seed of the draws (default: 0)",
        "random flips (default: True)",
    ):
        assert line in words
    assert words.count("default") == 4 and "repeat it (" not in words


@pytest.mark.parametrize("script", ["pretrain", "finetune", "baseline", "prepare", "evaluate"])
def test_the_scripts_name_the_defaults_of_their_flags(script):
    parser = importlib.import_module(script).get_args_parser()
    waiting = [parser]
    while waiting:
        parser = waiting.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting.extend(action.choices.values())
            elif action.option_strings and str(action.default) not in ("None", "False", argparse.SUPPRESS):
                assert "default" in parser._get_formatter()._expand_help(action), (script, action.dest)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_never_replaced(kind, tmp_path):
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    else:
        os.mkfifo(target)
    with pytest.raises(EngineError, match=f"{target} is not a file that could be replaced"):
        engine.write_atomic(target, lambda file: file.write(b"new"))
    assert not target.is_file()
    assert list(tmp_path.iterdir()) == [target]


def test_a_reader_that_has_gone_is_explained():
    assert engine.explain(BrokenPipeError(32, "Broken pipe")).message.startswith("the reader of this output has gone")
