"""Fine-tune a pre-trained encoder end to end on a downstream task; by default, segment Oxford-IIIT Pet trimaps.

    python finetune.py --init runs/study/seed0/pretrain_animal/model.pt                          # one GPU
    torchrun --nproc_per_node=4 finetune.py --init mae_pretrain_vit_base.pth --train_fraction 0.5
    python finetune.py --init MODEL.pt --load encoder                                            # with a fresh decoder
    python finetune.py --init MODEL.pt --head linear                                             # what frozen features know

The complete network is trained, encoder and decoder, with masking off (the paper, section 2.1); its last layer starts fresh.
100 epochs of 5,144 images at batch 64 are 8,000 updates. The weights kept are those of the best validation IoU.
Writes into --output_dir: config.json, log.jsonl, model.pt, metrics.json; then run `evaluate.py test` for the test images.
"""

import argparse

from engine import Parser, at_least, fraction, launch, setup
from models import MODELS
from objective import chosen
from tasks import TASKS
from trainer import add_task_training_arguments, train
from weights import PARTS


def get_args_parser(task: str = "segment") -> Parser:
    """Make the parser of a task's fine-tuning."""
    parser = Parser("finetune.py", description="Fine-tune a pre-trained encoder on a downstream task")
    arm = parser.flags("model", role="arm")
    arm("--task", choices=list(TASKS), default=task, help="what to learn")
    network = parser.flags("model", role="network")
    network("--model", choices=list(MODELS), default="mae_base", help="size of the checkpoint in --init")
    network("--freeze", choices=["none", "encoder"], default="none", help="encoder: train what follows it only")
    network("--drop_path", type=at_least(0), default=0.1, help="stochastic depth of the last encoder block")
    arm(
        "--load",
        choices=list(PARTS),
        default="all",
        help="encoder: a pre-trained decoder starts fresh too, so that objectives with and without one compare equally",
    )
    how = parser.flags("model", role="computation")  # its content defines the experiment, not its path
    how("--init", required=True, help="checkpoint of pretrain.py, facebookresearch/mae, timm or transformers")
    add_task_training_arguments(parser, output_dir="runs/finetune")
    network = parser.flags("optimisation", role="network")
    network("--blr", type=at_least(0), default=5e-4, help="base rate: lr = blr * batch_size / 256")
    network(
        "--layer_decay",
        type=fraction,
        default=0.65,
        help="rate factor per encoder layer downwards; decoder and head: 1",
    )
    TASKS[task].add_arguments(parser)
    TASKS[task].add_transfer_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Fine-tune on a task."""
    dist = setup(args.device)
    train(TASKS[args.task](args, dist), args, dist)


if __name__ == "__main__":
    launch(main, get_args_parser(chosen("--task", TASKS, "segment")))
