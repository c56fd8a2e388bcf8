"""Run the same small trainings in another checkout and in this one, and compare their weights bit for bit.

    git worktree add /tmp/old COMMIT
    python tests/same_as.py --old /tmp/old                         # all cases
    python tests/same_as.py --old /tmp/old --only pretrain_animal finetune_frozen
    python tests/same_as.py --old /tmp/old --data_root DIR --work DIR

All trainings run on the CPU with one thread, one after another. Each checkout fine-tunes from its own pre-training. The
exit code is 1 if a case differs or fails, 2 for wrong use. This is not part of the test suite.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
SIDES = ("old", "new")
TIME_LIMIT = 600  # seconds for one command
PRETRAIN = "pretrain_animal"  # the case whose weights the fine-tunings start from

SMALL = [
    *["--img_size", "64", "--cache_size", "64", "--batch_size", "8", "--epochs", "3", "--warmup_epochs", "1"],
    *["--blr", "0.02", "--device", "cpu", "--precision", "fp32", "--log_every", "2", "--seed", "3"],
]
MICRO = ["--micro_batch_size", "2"]
LONG = ["--epochs", "20", "--save_minutes", "0"]  # a checkpoint after every epoch, and time to interrupt


@dataclass(frozen=True)
class Case:
    """One training: a script and the flags that it gets in addition to SMALL."""

    name: str
    script: str
    flags: tuple[str, ...]
    interrupted: bool = False
    processes: int = 1

    @property
    def from_pretrained(self) -> bool:
        return self.script == "finetune"


def pretraining(name: str, *flags: str, **options) -> Case:
    return Case(f"pretrain_{name}", "pretrain", ("--model", "mae_tiny", "--num_images", "24", *flags), **options)


def finetuning(name: str, *flags: str, **options) -> Case:
    return Case(f"finetune_{name}", "finetune", ("--model", "mae_tiny", *flags), **options)


CASES = [
    pretraining("animal", "--split", "animal"),
    pretraining("mixed_micro", "--split", "mixed", *MICRO),
    pretraining("interrupted", "--split", "animal", *LONG, interrupted=True),
    pretraining("pixels_clipped", "--split", "non_animal", "--no-norm_pix_loss", "--clip_grad", "1"),
    pretraining("two_processes", "--split", "animal", processes=2),
    finetuning("full"),
    finetuning("half_equal_updates", "--train_fraction", "0.5", "--equal_updates"),
    finetuning("micro", *MICRO),
    finetuning("interrupted", *LONG, interrupted=True),
    finetuning("frozen", "--freeze", "encoder"),
    finetuning("two_processes", processes=2),
    Case("baseline_mae", "baseline", ("--model", "mae_tiny")),
    Case("baseline_resnet50", "baseline", ("--model", "resnet50")),
]
assert CASES[0].name == PRETRAIN


class CaseError(Exception):
    """A training that could not be compared: it failed, or it ended before it was interrupted."""


@dataclass(frozen=True)
class Checkout:
    """A checkout of the project and the folder that its runs write to."""

    side: str
    root: Path
    work: Path
    data_root: Path

    def run_dir(self, case_name: str) -> Path:
        return self.work / case_name

    def command(self, case: Case) -> list[str]:
        launcher = [sys.executable]
        if case.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.processes}"]
        command = [*launcher, str(self.root / f"{case.script}.py"), *SMALL, *case.flags]
        command += ["--data_root", str(self.data_root), "--cache_dir", str(self.work / "cache")]
        command += ["--output_dir", str(self.run_dir(case.name))]
        if case.from_pretrained:
            command += ["--init", str(self.run_dir(PRETRAIN) / "model.pt")]
        return command

    def start(self, command: list[str], log: Path) -> subprocess.Popen:
        """Start a command in this checkout; its output is appended to `log`."""
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        environment.pop("PYTHONPATH", None)  # each side imports its own files only
        with open(log, "ab") as output:
            return subprocess.Popen(command, cwd=self.root, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def train(self, case: Case) -> Path:
        """Run a case to its end -> its model.pt; raises CaseError if it fails."""
        log = self.work / f"{case.name}.log"
        command = self.command(case)
        if case.interrupted:
            self.interrupt(self.start(command, log), case, log)
        code = wait(self.start(command, log))
        if code != 0:
            raise CaseError(f"{self.side} failed with exit code {code}: {last_line(log)}")
        if case.interrupted and "resumed " not in log.read_text():
            raise CaseError(f"{self.side} did not resume: {last_line(log)}")
        return self.run_dir(case.name) / "model.pt"

    def interrupt(self, process: subprocess.Popen, case: Case, log: Path) -> None:
        """Send SIGTERM once the first checkpoint has been written, and wait for the end."""
        checkpoint = self.run_dir(case.name) / "last.pt"
        deadline = time.monotonic() + TIME_LIMIT
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        code = wait(process)
        if code != 128 + signal.SIGTERM:
            raise CaseError(f"{self.side} was to be interrupted, but ended with exit code {code}: {last_line(log)}")


def wait(process: subprocess.Popen) -> int:
    """Wait for the end of a process -> its exit code; it is killed after TIME_LIMIT."""
    try:
        return process.wait(TIME_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    written = [line for line in lines if line.strip()]
    if not written:
        return "no output"
    return written[-1]


def compare(old_path: Path, new_path: Path) -> str | None:
    """Describe the first difference between two model.pt, None if weights and model_config are equal."""
    old = torch.load(old_path, map_location="cpu", weights_only=True)
    new = torch.load(new_path, map_location="cpu", weights_only=True)
    if old["model_config"] != new["model_config"]:
        return f"model_config: {old['model_config']} became {new['model_config']}"
    if list(old["model"]) != list(new["model"]):
        names = sorted(set(old["model"]) ^ set(new["model"]))
        if not names:
            return "the tensors are in another order"
        return f"{len(names)} tensors are in one file only: {', '.join(names[:3])}"
    for name, old_tensor in old["model"].items():
        difference = compare_tensors(old_tensor, new["model"][name])
        if difference is not None:
            return f"{name}: {difference}"
    return None


def compare_tensors(old: torch.Tensor, new: torch.Tensor) -> str | None:
    """Describe how two tensors differ in dtype, shape or content, None if they are equal bit for bit."""
    if old.dtype != new.dtype:
        return f"{old.dtype} became {new.dtype}"
    if old.shape != new.shape:
        return f"{list(old.shape)} became {list(new.shape)}"
    old_bytes = old.contiguous().reshape(-1).view(torch.uint8)  # bytes: NaN equals itself, 0.0 differs from -0.0
    new_bytes = new.contiguous().reshape(-1).view(torch.uint8)
    if torch.equal(old_bytes, new_bytes):
        return None
    largest = (old.double() - new.double()).abs().max().item()
    return f"values differ by up to {largest:.3g}"


def judge(case: Case, checkouts: list[Checkout]) -> tuple[bool, str]:
    """Train a case in both checkouts -> whether the weights are equal, and a verdict in words."""
    paths = []
    for checkout in checkouts:
        try:
            paths.append(checkout.train(case))
        except CaseError as error:
            return False, str(error)
    difference = compare(*paths)
    if difference is not None:
        return False, difference
    if paths[0].read_bytes() == paths[1].read_bytes():
        return True, "equal, files too"
    return True, "equal, files differ in their bytes"


def draw_data(old: Path, root: Path) -> None:
    """Draw a small demo data set with the old checkout's prepare.py."""
    counts = ["--num_train", "64", "--num_val", "16", "--num_pets", "48"]
    command = [sys.executable, str(old / "prepare.py"), "demo", "--data_root", str(root), *counts]
    result = subprocess.run(command, cwd=old, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"same_as.py: the demo data could not be drawn: {result.stderr.strip()}")


def selected_cases(names: list[str] | None) -> list[Case]:
    """Return the named cases in the order of CASES, with the pre-training that a fine-tuning among them needs."""
    if names is None:
        return CASES
    chosen = [case for case in CASES if case.name in names]
    needs_pretraining = any(case.from_pretrained for case in chosen)
    if needs_pretraining and PRETRAIN not in names:
        chosen.insert(0, CASES[0])
    return chosen


def compare_checkouts(old: Path, data_root: Path | None, work: Path, cases: list[Case]) -> bool:
    """Run the cases in both checkouts and print a line for each -> whether all are equal."""
    if data_root is None:
        data_root = work / "data"
        draw_data(old, data_root)
    checkouts = []
    for side, root in zip(SIDES, (old, HERE), strict=True):
        folder = work / side
        folder.mkdir()
        checkouts.append(Checkout(side, root, folder, data_root))
    print(f"old: {old}\nnew: {HERE}\n\n{'case':28} {'seconds':>7}  result", flush=True)
    failures = 0
    for case in cases:
        start = time.monotonic()
        equal, verdict = judge(case, checkouts)
        seconds = time.monotonic() - start
        print(f"{case.name:28} {seconds:7.1f}  {verdict}", flush=True)
        if not equal:
            failures += 1
    print(f"\n{len(cases) - failures} of {len(cases)} cases are equal")
    return failures == 0


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("same_as.py", description="Compare the weights that two checkouts train")
    names = [case.name for case in CASES]
    parser.add_argument("--old", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument(
        "--data_root", type=Path, help="photos to train on (default: demo data, drawn by the old checkout)"
    )
    parser.add_argument(
        "--work", type=Path, help="new or empty folder for runs and logs (default: a temporary one, deleted at the end)"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"cases to run: {', '.join(names)}")
    return parser


def main(parser: argparse.ArgumentParser) -> int:
    args = parser.parse_args()
    old = args.old.resolve()
    if not (old / "pretrain.py").is_file():
        parser.error(f"--old {args.old} holds no pretrain.py: name a checkout of this project (`git worktree add`)")
    data_root = args.data_root
    if data_root is not None:
        data_root = data_root.resolve()
        if not data_root.is_dir():
            parser.error(f"--data_root {args.data_root} is not a folder")
    cases = selected_cases(args.only)
    if args.work is None:
        with tempfile.TemporaryDirectory(prefix="same_as.") as folder:
            equal = compare_checkouts(old, data_root, Path(folder), cases)
    else:
        work = args.work.resolve()
        if work.exists() and (not work.is_dir() or any(work.iterdir())):
            parser.error(f"--work {args.work} is not empty: delete it or name another folder")
        work.mkdir(parents=True, exist_ok=True)
        equal = compare_checkouts(old, data_root, work, cases)
    if equal:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(get_args_parser()))
