"""Live curves of a training: what log.jsonl holds, as TensorBoard scalars in the run's folder.

    python pretrain.py --split animal --tensorboard
    tensorboard --logdir runs

The package tensorboard is optional; nothing of it is imported before --tensorboard is given.
"""

import argparse
import json
import time
from pathlib import Path

from engine import first_line
from runs import EVENT_FILES


class SwitchOn(argparse.Action):
    """The action of --tensorboard: refuses the flag where the package is missing, before anything is read or written."""

    def __init__(self, option_strings: list[str], dest: str, help: str = ""):
        super().__init__(option_strings, dest, nargs=0, default=False, help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except Exception as error:  # of many types, where its own dependencies do not fit together
            advice = "install it with `pip install tensorboard`, or leave the flag out"
            parser.error(f"{option} needs the package tensorboard ({first_line(error)}); {advice}")
        setattr(namespace, self.dest, True)


class Curves:
    """TensorBoard's copy of a run's log: the numbers of train and val lines, by step.

    Event files have no way back, a log has: it goes back to the step of the last checkpoint. So every process that
    continues a run writes all its curves anew from the log, and readers drop those of the file before.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer = None
        self.origin = time.time()  # when the run began; later, less the time in which no process worked on it

    def start(self, log_text: str) -> None:
        """Begin a file of curves with those of a log."""
        from torch.utils.tensorboard import SummaryWriter

        earlier = sorted(self.folder.glob(EVENT_FILES))
        for path in earlier[:-1]:  # a TensorBoard that is open reads the last one, and finds the new one from there
            path.unlink()
        lines = [json.loads(text) for text in log_text.splitlines()]
        seconds = [line["seconds"] for line in lines if "seconds" in line]
        self.origin = time.time() - max(seconds, default=0)
        # Whoever reads this file drops what it has read before from step 0 on.
        self.writer = SummaryWriter(str(self.folder), purge_step=0)
        for line in lines:
            self.write(line)
        self.writer.flush()

    def add(self, line: dict) -> None:
        """Write a new line of the log."""
        self.write(line)
        self.writer.flush()

    def write(self, line: dict) -> None:
        """Hand the numbers of a line that belongs to a step to the writer; other lines have no curve."""
        if line["event"] not in ("train", "val"):
            return
        now = self.origin + line["seconds"]
        for name, value in line.items():
            if name == "step" or not isinstance(value, (int, float)):
                continue
            self.writer.add_scalar(f"{line['event']}/{name}", value, line["step"], walltime=now)

    def close(self) -> None:
        """End the event file."""
        if self.writer is not None:
            self.writer.close()
