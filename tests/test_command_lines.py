"""Any combination of flags and values ends in a run or in one line with exit code 2. FUZZ=2000 tries more of them."""

import argparse
import contextlib
import importlib
import io
import os
import shlex
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_runs import IMG, REPOSITORY, drawn_root, mae_checkpoint, parser_of

import engine
import study as study_script
from study import read_lines

EXAMPLES = int(os.environ.get("FUZZ", "60"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
ODD = [
    "",
    " ",
    "-",
    "--",
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "1e-400",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "abc",
    "0x10",
    "1_000",
    "٣",
]
ODD += [
    "9" * 30,
    "9" * 500,
    "a\nb",
    "ü😀",
    "\udcff",
    "/",
    ".",
    "..",
    "/dev/null",
    "/proc/self/nowhere",
    "--epochs",
    "-h0",
    "@x",
]
TRAININGS = ("pretrain", "finetune", "baseline")
OTHERS = ("evaluate", "probe", "prepare", "read_data", "report", "status", "carry_out", "bench", "export", "power")
SLOW_MODELS = ("mae_base", "mae_large", "mae_huge", "mae_small", "mae_demo", "mae")


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


@st.composite
def words_for(draw, parser: argparse.ArgumentParser) -> list[str]:
    """Draw flags of a parser with values good and bad, unknown flags, and words that belong to none."""
    words = []
    options = options_of(parser)
    for action in draw(st.lists(st.sampled_from(options), max_size=4)) if options else ():
        words.append(draw(st.sampled_from(action.option_strings)))
        good = [str(choice) for choice in action.choices or () if choice not in SLOW_MODELS]
        if action.default is not None and not isinstance(action.default, (list, tuple)):
            good.append(str(action.default))
        odd = ODD
        if action.dest == "images":  # to list every file of the machine would take minutes
            odd = [word for word in ODD if word not in ("/", "..")]
        value = st.sampled_from([*good, *good, *odd])
        count = draw(st.sampled_from([0, 1, 1, 1, 1, 2])) if action.nargs != 0 else draw(st.sampled_from([0, 0, 0, 1]))
        words += [draw(value) for _ in range(count)]
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from([*ODD, "--no_such", "--no_such=1", "-x"])))
    return words


class Ending:
    """How a command line ended: its exit code, and what was printed on stderr."""

    def __init__(self, call):
        errors = io.StringIO()
        self.result = None
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                self.result = call()
                self.code = 0
            except SystemExit as error:
                self.code = error.code or 0
            except Exception as error:
                failure = engine.explain(error)
                if (failure is None and not isinstance(error, ValueError)) or type(error) is ValueError:
                    raise
                self.code = failure.exit_code if failure else 2
                errors.write(engine.one_line(failure.message if failure else str(error)))
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        self.errors = errors.getvalue()

    def check(self, codes: tuple[int, ...] = (0, 2)) -> None:
        assert self.code in codes, self.errors
        if self.code:
            assert len(self.errors.removesuffix("\n").split("\n")) == 1 and self.errors.strip()


@pytest.mark.parametrize("script", [*TRAININGS, *OTHERS])
def test_any_words_are_parsed_or_refused_in_one_line(script):
    parser = importlib.import_module(script).get_args_parser()
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers = list(action.choices.values())

    @FUZZ
    @given(st.data())
    def check(data):
        chosen = data.draw(st.sampled_from(parsers))
        words = data.draw(words_for(chosen))
        Ending(lambda: chosen.parse_args(words)).check()

    check()


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    place = ["--data_root", drawn_root(tmp_path_factory), "--cache_dir", cache]
    return [
        str(word) for word in (*place, "--batch_size", 4, "--img_size", IMG, "--cache_size", IMG, "--device", "cpu")
    ]


@pytest.mark.parametrize("script", TRAININGS)
def test_any_training_is_planned_or_refused_in_one_line(script, flags, tmp_path_factory, monkeypatch):
    module = importlib.import_module(script)
    parser = module.get_args_parser()
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    needed = {"pretrain": [], "finetune": ["--init", str(mae_checkpoint(tmp_path_factory))], "baseline": []}

    @FUZZ
    @given(words_for(parser))
    @example(["--epochs", "9" * 500])
    @example(["--epochs", "1", "--warmup_epochs", "1e300"])
    @example(["--img_size", "16" + "0" * 12])
    @example(["--img_size", "16" + "0" * 6])
    @example(["--seed", "9" * 30])
    @example(["--drop_path", "1e300"])
    @example(["--blr", "1e308", "--batch_size", "32"])
    def check(words):
        line = ["--model", "mae_tiny", *flags, *needed[script], *words, "--dry_run"]
        Ending(lambda: module.main(parser_of(script, line).parse_args(line))).check((0, 1, 2))

    check()


STUDY_WORDS = [action for action in options_of(study_script.get_args_parser("study.py")) if action.dest != "data_root"]


@FUZZ
@given(st.data())
def test_any_study_is_planned_or_refused_in_one_line(data):
    parser = study_script.get_args_parser("run_all.sh")
    words = [*data.draw(words_for(parser)), "--dry_run"]

    def plan() -> list:
        args = study_script.read_args(words, "run_all.sh")
        args.on_gpus = False
        study_script.shell_settings(args)
        lines = study_script.make_plan(args, paper_sizes=True)
        return read_lines(study_script.write_lines(lines))

    ending = Ending(plan)
    ending.check()
    if ending.code == 0:
        assert all("\n" not in line.command for line in ending.result)


REAL = [
    "pretrain.py --epochs nan",
    "finetune.py",
    "baseline.py --model resnet50 --layer_decay 0.5 --dry_run",
    "evaluate.py predict --checkpoint /dev/null cat.jpg",
    "evaluate.py test /proc",
    "probe.py /proc --random",
    "prepare.py splits --data_root nowhere --output /dev/null",
    "prepare.py demo --num_pets 0",
    "report.py /proc/self",
    "power.py --tests 0",
    "status.py .. --jobs 0",
    "carry_out.py . --run x",
    "read_data.py /dev/null",
    "check_plan.py --demo --model x",
    "study.py plan --seeds ''",
    "bench.py --steps -1",
    "weights.py export --to timm nowhere.pt encoder.pth",
    "weights.py",
]


@pytest.mark.parametrize("line", REAL)
def test_wrong_use_of_the_real_scripts_is_one_line_and_exit_code_2(line, tmp_path):
    script, *words = shlex.split(line)
    command = [sys.executable, str(REPOSITORY / script), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
