"""Refuse a study whose trainings would be refused: the scripts' own parsers read every command before anything is written.

    python check_plan.py --demo --objective denoise          # the options of run_all.sh, which calls this

Prints how many GPUs torch sees and ends with 0 if all is well, else with one line and exit code 2.
"""

import argparse
import os
import sys

import torch

import baseline
import finetune
import pretrain
import slurm
import weights
from carry_out import bash_words
from objective import Objective
from study import DEFAULT_OBJECTIVE, DEFAULT_TASK, PlanError, PlanLine, flag_values, make_plan, one_line, read_args

PARSERS = {
    "pretrain": pretrain.get_args_parser,
    "finetune": finetune.get_args_parser,
    "baseline": baseline.get_args_parser,
}
NAMES = {"pretrain": pretrain.OBJECTIVES, "finetune": finetune.TASKS, "baseline": baseline.TASKS}


def parse_command(line: PlanLine) -> tuple[type[Objective], argparse.Namespace]:
    """Parse the command of a run -> (its objective or task, its flags).

    An unknown flag or value leaves with the parser's own line.
    """
    words = bash_words(line.command)[1:]
    pretraining = line.stage == "pretrain"
    flag = "--objective" if pretraining else "--task"
    known = NAMES[line.stage]
    name = DEFAULT_OBJECTIVE if pretraining else DEFAULT_TASK
    for name in flag_values(words, flag):  # the last one counts
        if name not in known:
            raise PlanError(f"unknown {flag} {name!r}; there are {', '.join(known)}")
    return known[name], PARSERS[line.stage](name).parse_args(words)


def main(words: list[str]) -> None:
    """Check the GPUs and every command of a study, and print the number of GPUs: to ask again would import torch again."""
    args = read_args(words, "run_all.sh")
    if args.slurm is not None and "RUN_ALL_PART" not in os.environ:  # a job of the study itself submits nothing
        slurm.check_request(args)
    gpus = torch.cuda.device_count()
    if args.gpus and args.gpus > gpus:
        raise PlanError(f"--gpus {args.gpus}: torch sees {gpus} here")
    if args.imagenet_weights is not None:
        weights.reference_keys(weights.read_checkpoint(args.imagenet_weights))
    args.on_gpus = False
    for line in make_plan(args, paper_sizes=False):
        parse_command(line)
    print(gpus)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"run_all.sh: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
