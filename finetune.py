"""Fine-tune a pre-trained Masked Autoencoder end to end to segment Oxford-IIIT Pet trimaps.

    python finetune.py --init runs/study/seed0/pretrain_animal/model.pt                          # one GPU
    torchrun --nproc_per_node=4 finetune.py --init mae_pretrain_vit_base.pth --train_fraction 0.5
    python finetune.py --init MODEL.pt --head linear                                             # what frozen features know

The whole network is trained, encoder and decoder, with masking off (the paper, section 2.1); its last layer starts fresh.
100 epochs of 5,144 images at batch 64 are 8,000 updates. The weights kept are those of the best validation IoU.
Writes into --output_dir: config.json, log.jsonl, model.pt, metrics.json; then run `evaluate.py test` for the test images.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import augment
import data
import splits
from engine import Distributed, EngineError, Parser, Precision, Run, launch, param_groups, setup
from evaluate import confusion
from metrics import dataset_scores
from models import MODELS, build_segmenter
from trainer import Trainer, add_training_arguments, check_training_arguments, init_model, open_store, plan_run

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

    def __call__(self, step: int) -> dict:
        device = self.dist.device
        counts = torch.zeros(3, 3, dtype=torch.int64, device=device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        batches = augment.EvalBatches(self.store, img_size=self.args.img_size, batch_size=64, rank=self.dist.rank,
                                   world_size=self.dist.world_size, device=device)  # fmt: skip
        for index, images in batches:
            truth = self.truth[index.to(device)].long()
            logits = self.model(images).float()
            loss += F.cross_entropy(logits, truth, reduction="sum").double()
            counts += confusion(truth, logits.argmax(1)).sum(0)
        counts, loss = self.dist.sum(counts), self.dist.sum(loss)
        scores = dataset_scores(counts.cpu().numpy()[None])
        return {"loss": (loss / counts.sum()).item(), **{k: float(scores[k]) for k in SCORES}}


def train_segmenter(args, kind: str, model: nn.Module, dist: Distributed, precision: Precision, *, layer_decay: float,
                    config_of_model: dict, init: str | None, flops: float, channels_last: bool = False) -> None:  # fmt: skip
    """Train any segmenter on trimaps: the one loop of all arms, fine-tuned or from scratch."""
    if not 0 < args.crop_scale <= 1:
        raise EngineError(f"--crop_scale must lie in (0, 1], got {args.crop_scale}")
    train = splits.pets_split(args.data_root, "train", train_fraction=args.train_fraction, split_seed=args.split_seed)
    val = splits.pets_split(args.data_root, "val")
    size = len(train.images)
    epoch_steps = size // args.batch_size
    if args.equal_updates:
        epoch_steps = len(splits.pets_split(args.data_root, "train").images) // args.batch_size
        args.batch_size = min(args.batch_size, size)
    if not epoch_steps:
        raise EngineError(
            f"--batch_size {args.batch_size} is larger than the {size} training images; use at most {size}"
        )

    lr = args.blr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay, layer_decay, NO_DECAY)
    config = plan_run(kind, args, dist, precision, model, groups, lr=lr, flops=flops, epoch_steps=epoch_steps, train=train,
                      val=val.sha256, init=init)  # fmt: skip
    if args.dry_run:
        return
    run = Run(args.output_dir, dist, config, args.resume, state_bytes=config["params"] * 16)
    if run.finished:
        return print(f"{run.dir} is finished; nothing to do (--resume never starts over)") if dist.is_main else None

    images = open_store(args, dist, train.images, "image")
    masks = open_store(args, dist, images.images, "trimap")
    depth = len(getattr(model, "blocks", ()))
    drops = {"drop_path": (depth, 2)} if getattr(args, "drop_path", 0) and depth else {}
    batches = augment.TrainBatches(
        images, masks, img_size=args.img_size, batch_size=args.batch_size, seed=args.seed, scale=(args.crop_scale, 1.0),
        crop=args.crop_scale < 1, flip=args.flips, vertical_flip=True, draws=drops, rank=dist.rank,
        world_size=dist.world_size, micro_batch_size=args.micro_batch_size, device=dist.device,
    )  # fmt: skip
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(dist.device, memory_format=layout)

    def loss(network, b):
        logits = network(b["images"].contiguous(memory_format=layout), b.get("drop_path"))
        return F.cross_entropy(logits.float(), b["masks"])

    trainer = Trainer(run, model, loss, batches, groups, args=args, dist=dist, precision=precision, lr=lr,
                      betas=(0.9, 0.999), epoch_steps=epoch_steps, flops=flops, best="iou")  # fmt: skip
    metrics = trainer.fit(Validation(model, args, dist, val.images))
    metrics |= {
        "kind": kind,
        "hardware": config["hardware"],
        "n_train": len(images),
        "n_unique": train.unique,
        "unreadable": images.dropped,
    }
    run.log("done", **{k: metrics[k] for k in ("best", "last", "updates", "seconds")})
    run.finish(
        {"model": trainer.weights, "model_config": {"kind": "segmenter", "img_size": args.img_size, **config_of_model}},
        metrics,
    )


def freeze_encoder(model: nn.Module) -> None:
    """Exclude the encoder of a MAESegmenter from training."""
    for name, p in model.named_parameters():
        if name.startswith(ENCODER):
            p.requires_grad = False


def main(args: argparse.Namespace) -> None:
    check_training_arguments(args)
    if not 0 < args.layer_decay <= 1:
        raise EngineError(f"--layer_decay must lie in (0, 1], got {args.layer_decay}")
    frozen = args.freeze == "encoder" or args.head == "linear"
    args.drop_path = 0.0 if frozen else args.drop_path  # frozen features do not change from step to step
    dist = setup(args.device)
    precision = Precision(args.precision, dist.device)
    torch.manual_seed(args.seed)
    try:
        model = build_segmenter(args.model, img_size=args.img_size, head=args.head, drop_path=args.drop_path)
    except ValueError as error:
        raise EngineError(str(error)) from None
    init = init_model(model, args.init, dist)
    if frozen:
        freeze_encoder(model)
    sizes = {"name": args.model, "head": args.head}
    flops = model.flops(training=not frozen)
    train_segmenter(
        args,
        "finetune",
        model,
        dist,
        precision,
        layer_decay=args.layer_decay,
        config_of_model=sizes,
        init=init,
        flops=flops,
    )


if __name__ == "__main__":
    launch(main, get_args_parser())
