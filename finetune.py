"""Fine-tune a pre-trained Masked Autoencoder end to end to segment Oxford-IIIT Pet trimaps.

    python finetune.py --init runs/study/seed0/pretrain_animal/model.pt                          # one GPU
    torchrun --nproc_per_node=4 finetune.py --init mae_pretrain_vit_base.pth --train_fraction 0.5
    python finetune.py --init MODEL.pt --head linear                                             # what frozen features know

The whole network is trained, encoder and decoder, with masking off (the paper, section 2.1); its last layer starts fresh.
100 epochs of 5,144 images at batch 64 are 8,000 updates. The weights kept are those of the best validation IoU.
Writes into --output_dir: config.json, log.jsonl, model.pt, metrics.json; then run `evaluate.py test` for the test images.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import data
import splits
from batches import EvalBatches
from engine import Distributed, Parser, Precision, launch, setup
from evaluate import confusion
from metrics import dataset_scores
from models import MODELS, build_segmenter
from trainer import add_training_arguments, build, check_training_arguments, open_store, train

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
NO_DECAY = ("cls_token", "pos_embed", "decoder_pos_embed")  # and all one-dimensional parameters
SCORES = ("accuracy", "iou", "iou_pet", "iou_background", "iou_border", "miou")


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("finetune.py", description="Fine-tune a Masked Autoencoder to segment pets")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(MODELS), default="mae_base", help="size of the checkpoint in --init")
    add("--init", required=True, help="checkpoint of pretrain.py, facebookresearch/mae, timm or transformers")
    add("--head", choices=["decoder", "linear"], default="decoder",
        help="linear: one layer on the frozen encoder's features, without decoder")
    add("--freeze", choices=["none", "encoder"], default="none", help="encoder: train decoder and head only")
    add("--drop_path", type=float, default=0.1, help="stochastic depth of the last encoder block")
    add_training_arguments(parser, output_dir="runs/finetune", epochs=100, batch_size=64, warmup_epochs=5, min_lr=1e-6)
    add = parser.add_argument
    add("--blr", type=float, default=5e-4, help="base rate: lr = blr * batch_size / 256")
    add("--layer_decay", type=float, default=0.65, help="rate factor per encoder layer downwards; decoder and head: 1")
    add_segmentation_arguments(parser)
    return parser


def add_segmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every arm trained on trimaps has."""
    add, flag = parser.add_argument_group("trimaps").add_argument, argparse.BooleanOptionalAction
    add("--train_fraction", type=float, default=1.0, help="random part of the training images; 0.5 is the half arm")
    add("--equal_updates", action=flag, default=False, help="as many updates as with all labels, smaller batch if need be")
    add("--crop_scale", type=float, default=0.5, help="smallest crop as a share of the image's area; 1: whole image")
    add("--flips", action=flag, default=True, help="random horizontal and vertical flips")
# fmt: on


class Validation:
    """Cross-entropy and scores over exactly the validation images, each counted once on any number of processes."""

    def __init__(self, model: nn.Module, args, dist: Distributed, images: tuple[str, ...]):
        self.model, self.args, self.dist = model, args, dist
        self.store = open_store(args, dist, images, "image", args.img_size)
        self.truth = data.load_truth(args.data_root, self.store.images, args.img_size).to(dist.device)

    def __call__(self, step: int, stopping=lambda: False) -> dict | None:
        device, dist = self.dist.device, self.dist
        counts = torch.zeros(3, 3, dtype=torch.int64, device=device)
        total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, processes that stopped
        batches = EvalBatches(self.store, img_size=self.args.img_size, batch_size=64, rank=dist.rank,
                                      world_size=dist.world_size, device=device)  # fmt: skip
        for index, images in batches:
            if stopping():
                total[1] += 1
                break
            truth = self.truth[int(index[0]) :: dist.world_size][: len(index)].long()  # a rank's share, in order
            logits = self.model(images).float()
            total[0] += F.cross_entropy(logits, truth, reduction="sum").double()
            counts += confusion(truth, logits.argmax(1)).sum(0)
        counts, (loss, stopped) = dist.sum(counts), dist.sum(total).tolist()
        if stopped:
            return None
        scores = dataset_scores(counts.cpu().numpy()[None])
        return {"loss": loss / counts.sum().item(), **{k: float(scores[k]) for k in SCORES}}

    def finish(self) -> dict:
        return {}


def train_segmenter(args, kind: str, model: nn.Module, dist: Distributed, precision: Precision, *, flops: float, init,
                    model_config: dict, layer_decay: float = 1.0, channels_last: bool = False) -> None:  # fmt: skip
    """Train any segmenter on trimaps: the one path of all arms, fine-tuned or from scratch."""
    root, part = args.data_root, {"train_fraction": args.train_fraction, "split_seed": args.split_seed}
    split, val = splits.pets_split(root, "train", **part), splits.pets_split(root, "val")
    size = len((splits.pets_split(root, "train") if args.equal_updates else split).images)
    depth = len(getattr(model, "blocks", ()))
    draws = {"drop_path": (depth, 2)} if getattr(args, "drop_path", 0) and depth else {}
    options = {"scale": (args.crop_scale, 1.0), "crop": args.crop_scale < 1, "flip": args.flips, "vertical_flip": True}
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def loss(network, b):
        logits = network(b["images"].contiguous(memory_format=layout), b.get("drop_path"))
        return F.cross_entropy(logits.float(), b["masks"])

    train(kind, args, dist, precision, model, split, forward=loss, size=size, flops=flops, betas=(0.9, 0.999),
          validation=lambda run: Validation(model, args, dist, val.images), masked=True, layout=layout, best="iou",
          batch_options={"draws": draws, **options}, model_config={"kind": "segmenter", **model_config},
          layer_decay=layer_decay, no_decay=NO_DECAY, val=val.sha256, init=init)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    check_training_arguments(args)
    frozen = args.freeze == "encoder" or args.head == "linear"
    args.drop_path = 0.0 if frozen else args.drop_path  # frozen features do not change from step to step
    dist = setup(args.device)
    precision, sizes = Precision(args.precision, dist.device), {"head": args.head}
    model, init = build(build_segmenter, dist, args, args.init, drop_path=args.drop_path, **sizes)
    if frozen:
        for name, p in model.named_parameters():
            p.requires_grad &= not name.startswith(ENCODER)
    train_segmenter(args, "finetune", model, dist, precision, flops=model.flops(training=not frozen),
                    model_config={"name": args.model, **sizes}, init=init, layer_decay=args.layer_decay)  # fmt: skip


if __name__ == "__main__":
    launch(main, get_args_parser())
