"""Train a supervised baseline on a downstream task: ResNet-50, or the autoencoder's network without pre-training.

    python baseline.py --model resnet50                       # random weights, as in the paper, section 2.2
    python baseline.py --model resnet50 --weights imagenet    # torchvision's ImageNet weights, for orientation
    torchrun --nproc_per_node=4 baseline.py --model mae       # mae_base from scratch, the paper's supervised MAE

The loop, augmentation, epochs and validation are those of finetune.py; all layers train at the full rate.
"""

import argparse

from torch import nn

from engine import Distributed, EngineError, Parser, at_least, fraction, hash_file, launch, setup
from models import MODELS
from objective import Task, chosen
from tasks import TASKS
from trainer import add_task_training_arguments, train
from weights import read_checkpoint

DEFAULT_BLR = {"resnet50": 2e-3}
DEFAULT_BLR_MAE = 1e-3


def get_args_parser(task: str = "segment") -> Parser:
    """Make the parser of a task's baselines."""
    parser = Parser("baseline.py", description="Supervised baselines of a downstream task")
    parser.set_defaults(init=None)
    arm = parser.flags("model", role="arm")
    arm("--task", choices=list(TASKS), default=task, help="what to learn")
    network = parser.flags("model", role="network")
    network("--model", choices=["resnet50", "mae", *MODELS], required=True, help="mae is mae_base")
    network("--weights", help="resnet50 only: imagenet (downloads torchvision's), or a file with torchvision's keys")
    network("--drop_path", type=at_least(0), default=0.1, help="stochastic depth of the last encoder block (MAE)")
    add_task_training_arguments(parser, output_dir="runs/baseline")
    network = parser.flags("optimisation", role="network")
    network("--blr", type=at_least(0), help="lr = blr * batch_size / 256 (default: MAE 1e-3, ResNet-50 2e-3)")
    network(
        "--layer_decay",
        type=fraction,
        default=1.0,
        help="rate factor per encoder layer downwards (MAE); 1: all layers at the full rate",
    )
    TASKS[task].add_arguments(parser)
    return parser


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the model; EngineError for combinations that make no sense."""
    resolved = argparse.Namespace(**vars(args))
    if args.weights and args.model != "resnet50":
        raise EngineError("--weights goes with --model resnet50; to fine-tune a pre-trained MAE use finetune.py --init")
    if args.model == "resnet50" and args.layer_decay != 1:
        raise EngineError("--layer_decay needs a model with encoder blocks; resnet50 has none")
    if args.model == "mae":
        resolved.model = "mae_base"
    if args.blr is None:
        resolved.blr = DEFAULT_BLR.get(args.model, DEFAULT_BLR_MAE)
    return resolved


def refuse_micro_batches(args: argparse.Namespace, dist: Distributed) -> None:
    """Refuse to accumulate a network with BatchNorm: its statistics would depend on the micro-batch."""
    if args.micro_batch_size not in (None, args.batch_size // dist.world_size):
        reason = "BatchNorm's statistics would change with it; lower --batch_size"
        raise EngineError(f"resnet50 takes no --micro_batch_size: {reason}")


def synchronise_batch_norm(task: Task, dist: Distributed) -> None:
    """Compute BatchNorm's statistics over all processes, where PyTorch can."""
    if dist.world_size == 1:
        return
    if dist.device.type == "cuda":
        task.model = nn.SyncBatchNorm.convert_sync_batchnorm(task.model)
    elif dist.is_main:
        print("note: PyTorch has no SyncBatchNorm on CPUs; batch statistics are those of each process's own images")


def published_weights(name: str) -> dict:
    """Read ResNet-50 weights: "imagenet" downloads torchvision's, anything else is a file with torchvision's keys."""
    if name != "imagenet":
        return read_checkpoint(name)
    from torchvision.models import ResNet50_Weights

    try:
        return ResNet50_Weights.IMAGENET1K_V2.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        problem = f"cannot download torchvision's ResNet-50 weights ({error})"
        raise EngineError(f"{problem}; give a file instead", 1) from None


def load_backbone(model: nn.Module, name: str) -> str:
    """Load ResNet-50 weights without their classifier; gives what identifies them."""
    state = published_weights(name)
    try:
        backbone = {key: value for key, value in state.items() if not str(key).startswith("fc.")}
        model.backbone.load_state_dict(backbone)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise EngineError(f"--weights {name} does not fit ResNet-50: {reason.strip()[:120]} ...") from None
    if name == "imagenet":
        return "IMAGENET1K_V2"
    return hash_file(name)


def main(args: argparse.Namespace) -> None:
    """Train a baseline."""
    args = resolve(args)
    dist = setup(args.device)
    if args.model == "resnet50":
        refuse_micro_batches(args, dist)
    task = TASKS[args.task](args, dist)
    if args.weights:
        task.init_sha256 = load_backbone(task.model, args.weights)
    if args.model == "resnet50":
        synchronise_batch_norm(task, dist)
    train(task, args, dist)


if __name__ == "__main__":
    launch(main, get_args_parser(chosen("--task", TASKS, "segment")))
