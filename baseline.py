"""Train a supervised baseline on Oxford-IIIT Pet trimaps: ResNet-50, or the autoencoder's network without pre-training.

    python baseline.py --model resnet50                       # random weights, as in the paper, section 2.2
    python baseline.py --model resnet50 --weights imagenet    # torchvision's ImageNet weights, for orientation
    torchrun --nproc_per_node=4 baseline.py --model mae       # mae_base from scratch, the paper's supervised MAE

The loop, augmentation, epochs and validation are those of finetune.py; all layers train at the full rate.
"""

import argparse

from torch import nn

from engine import EngineError, Parser, Precision, launch, setup
from finetune import add_segmentation_arguments, train_segmenter
from models import MODELS, build_segmenter
from trainer import add_training_arguments, build, check_training_arguments, hash_file
from weights import read_checkpoint


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("baseline.py", description="Supervised baselines for pet segmentation")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=["resnet50", "mae", *MODELS], required=True, help="mae is mae_base")
    add("--weights", help="resnet50 only: imagenet (downloads torchvision's), or a file with torchvision's keys")
    add("--drop_path", type=float, default=0.1, help="stochastic depth of the last encoder block (MAE)")
    add_training_arguments(parser, output_dir="runs/baseline", epochs=100, batch_size=64, warmup_epochs=5, min_lr=1e-6)
    parser.add_argument("--blr", type=float, help="lr = blr * batch_size / 256 (default: MAE 1e-3, ResNet-50 2e-3)")
    add_segmentation_arguments(parser)
    return parser
# fmt: on


def load_backbone(model: nn.Module, weights: str) -> str:
    """Load torchvision's ResNet-50 weights (imagenet, or a file) without the classifier; returns what identifies them."""
    if weights == "imagenet":
        from torchvision.models import ResNet50_Weights

        try:
            state = ResNet50_Weights.IMAGENET1K_V2.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            found = f"cannot download torchvision's ResNet-50 weights ({error})"
            raise EngineError(f"{found}; give a file instead", 1) from None
    else:
        state = read_checkpoint(weights)
    try:
        model.backbone.load_state_dict({k: v for k, v in state.items() if not str(k).startswith("fc.")})
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1 if len(str(error).splitlines()) == 1 else 1].strip()[:120]
        raise EngineError(f"--weights {weights} does not fit ResNet-50: {reason} ...") from None
    return "IMAGENET1K_V2" if weights == "imagenet" else hash_file(weights)


def main(args: argparse.Namespace) -> None:
    check_training_arguments(args)
    resnet = args.model == "resnet50"
    if args.weights and not resnet:
        raise EngineError("--weights goes with --model resnet50; to fine-tune a pre-trained MAE use finetune.py --init")
    args.model = "mae_base" if args.model == "mae" else args.model
    args.drop_path = 0.0 if resnet else args.drop_path
    if args.blr is None:
        args.blr = 2e-3 if resnet else 1e-3
    dist = setup(args.device)
    precision = Precision(args.precision, dist.device)
    if resnet and args.micro_batch_size not in (None, args.batch_size // dist.world_size):
        reason = "BatchNorm's statistics would change with it; lower --batch_size"
        raise EngineError(f"resnet50 takes no --micro_batch_size: {reason}")
    model, _ = build(build_segmenter, dist, args, **({} if resnet else {"drop_path": args.drop_path}))
    flops = model.flops()
    init = load_backbone(model, args.weights) if args.weights else None
    if resnet and dist.world_size > 1:
        if dist.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif dist.is_main:
            print("note: PyTorch has no SyncBatchNorm on CPUs; batch statistics are those of each process's own images")
    train_segmenter(args, "baseline", model, dist, precision, flops=flops, model_config={"name": args.model}, init=init,
                    channels_last=resnet)  # fmt: skip


if __name__ == "__main__":
    launch(main, get_args_parser())
