"""Refuse a study whose trainings would be refused: the scripts' own parsers read every command before anything is written.

    python check_plan.py --demo --objective denoise          # the options of run_all.sh, which calls this

Prints how many GPUs torch sees and ends with 0 if all is well, else with one line and exit code 2.
"""

import sys

import torch

import baseline
import finetune
import pretrain
from carry_out import bash_words
from study import PlanError, PlanLine, flag_values, make_plan, read_args

PARSERS = {
    "pretrain": pretrain.get_args_parser,
    "finetune": finetune.get_args_parser,
    "baseline": baseline.get_args_parser,
}
NAMES = {"pretrain": pretrain.OBJECTIVES, "finetune": finetune.TASKS, "baseline": baseline.TASKS}


def check_command(line: PlanLine) -> None:
    """Parse the command of a run; an unknown flag or value leaves with the parser's own line."""
    words = bash_words(line.command)[1:]
    flag = "--objective" if line.stage == "pretrain" else "--task"
    known = NAMES[line.stage]
    chosen = flag_values(words, flag)
    if not chosen:
        PARSERS[line.stage]().parse_args(words)
        return
    name = chosen[-1]
    if name not in known:
        raise PlanError(f"unknown {flag} {name!r}; there are {', '.join(known)}")
    PARSERS[line.stage](name).parse_args(words)


def main(words: list[str]) -> None:
    """Check the GPUs and every command of a study, and print the number of GPUs: to ask again would import torch again."""
    args = read_args(words, "run_all.sh")
    gpus = torch.cuda.device_count()
    if args.gpus and args.gpus > gpus:
        raise PlanError(f"--gpus {args.gpus}: torch sees {gpus} here")
    args.on_gpus = False
    for line in make_plan(args, paper_sizes=False):
        check_command(line)
    print(gpus)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"run_all.sh: error: {error}", file=sys.stderr)
        sys.exit(2)
