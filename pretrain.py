"""Pre-train an encoder on one split of MS COCO; by default as a Masked Autoencoder.

    torchrun --nproc_per_node=4 pretrain.py --split non_animal             # four GPUs
    python pretrain.py --split mixed --animal_fraction 0.1                 # one GPU, 10 % animals
    python pretrain.py --split animal --data_root data/demo --model mae_tiny --img_size 128 --epochs 5 --device cpu
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST pretrain.py --split animal   # and rank 1 there

The defaults are the study's recipe: ViT-B, 150 epochs of 25,739 images, batch 256 (15,000 updates). The number of processes
and --micro_batch_size do not change the result. The paper's validation loss is 0.547.
Writes into --output_dir: config.json, log.jsonl, model.pt, metrics.json, reconstruction.png.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import augment
from batches import Alone, Draw, EvalBatches, Examples, uniform
from data import ImageStore
from engine import EngineError, Parser, at_least, launch, setup
from models import MODELS, build_mae, patchify, take_rows
from objective import block_activations, chosen
from objectives.dino import Dino
from objectives.ijepa import BlockFeatures
from objectives.labels import Labels
from objectives.splitmask import SplitMask
from objectives.tokens import Tokens
from pretraining import Pretraining, add_split_arguments
from trainer import add_training_arguments, train

FIGURE_IMAGES = 4  # of each validation list


class MaskedPixels(Pretraining):
    """Masked Autoencoder: predict the pixels of masked patches from the visible ones (He et al. 2021)."""

    name = "mae"
    recordable = True

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of masking."""
        recipe = parser.flags("objective", role="recipe")
        recipe("--mask_ratio", type=at_least(0), default=0.75, help="share of patches hidden from the encoder")
        recipe(
            "--norm_pix_loss",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="predict pixels normalised per patch; gives better features, blurrier colours",
        )
        arm = parser.flags("objective", role="arm")
        arm(
            "--targets",
            choices=["own", "other"],
            default="own",
            help="other: a control, to predict the pixels of another image of the batch, so that only what all images have "
            "in common can be learnt; validation asks for an image's own",
        )
        how = parser.flags("objective", role="computation")
        how("--figure_every", type=at_least(0, int), default=0, help="epochs between figures (0: only at the end)")

    def build_model(self) -> nn.Module:
        if self.args.targets == "other" and self.args.batch_size < 2:
            raise EngineError("--targets other: a batch of 1 image has no other one; raise --batch_size")
        options = {"img_size": self.args.img_size, "norm_pix_loss": self.args.norm_pix_loss}
        model = build_mae(self.args.model, **options)
        model.num_visible(self.args.mask_ratio)  # refuses a ratio that leaves no patch visible
        return model

    def draws(self) -> dict[str, Draw]:
        return {"noise": uniform(self.model.num_patches)}

    def examples(self, store: ImageStore) -> Examples:
        return Examples(store, strangers=self.args.targets == "other")

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        options = {"loss_only": True}
        if "strangers" in batch:
            options["targets"] = batch["strangers"]
        return network(batch["images"], self.args.mask_ratio, batch["noise"], **options)

    def validate(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        epoch_updates = self.args.epoch_updates or self.epoch_images // self.batch_size
        steps_between = self.args.figure_every * epoch_updates
        if steps_between and step % steps_between == 0:
            self.figure(f"reconstruction_{step:06d}")
        return super().validate(step, stopping)

    def finish(self) -> dict:
        self.figure("reconstruction")
        return {"predict_zero": self.predict_zero()}

    @torch.no_grad()
    def predict_zero(self) -> dict[str, float]:
        """Give the loss of predicting zero everywhere, which any training must clearly beat."""
        return {name: self.mean_over(name, self._loss_of_zero) for name in self.stores}

    def _loss_of_zero(self, batch: dict[str, Tensor]) -> Tensor:
        """Score zero, the mean of normalised pixels, as the prediction of all masked patches."""
        visible = self.model.num_visible(self.args.mask_ratio)
        if visible == self.model.num_patches:  # without masking the loss is over all patches
            visible = 0
        hidden = torch.argsort(batch["noise"], dim=1, stable=True)[:, visible:]
        patches = take_rows(patchify(batch["images"], self.model.patch_size), hidden)
        return self.model.forward_loss(patches, torch.zeros_like(patches))

    def figure(self, file: str) -> None:
        """Save masked input, reconstruction and original of a few fixed images as a .png and a .npz."""
        if not self.dist.is_main:
            return
        self.model.eval()
        columns: dict[str, list[np.ndarray]] = {"masked": [], "reconstruction": [], "original": []}
        ids: list[str] = []
        for name in self.stores:
            images, masked, filled = self._reconstruct(name)
            columns["masked"].append(to_photos(masked))
            columns["reconstruction"].append(to_photos(filled))
            columns["original"].append(to_photos(images))
            ids += self.stores[name].images[: len(images)]
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        np.savez_compressed(self.run_dir / f"{file}.npz", ids=np.array(ids), **arrays)
        rows = np.concatenate(list(arrays.values()), axis=2)  # [N, H, 3 W, 3]
        Image.fromarray(np.concatenate(rows)).save(self.run_dir / f"{file}.png")

    def _reconstruct(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct the first images of a validation list -> (images, masked images, reconstructions)."""
        store = self.stores[name]
        count = min(FIGURE_IMAGES, len(store))
        batches = EvalBatches(store, img_size=self.args.img_size, batch_size=count, dist=Alone(self.dist.device))
        images = next(iter(batches))["images"]
        noise = self.targets[name]["noise"][:count]
        masked, filled = self.model.reconstruct(images, self.args.mask_ratio, noise)
        return images, masked, filled

    def flops(self) -> float:
        return self.model.flops(training=True, mask_ratio=self.args.mask_ratio)

    def activation_values(self) -> int:
        visible = self.model.num_visible(self.args.mask_ratio)
        encoder = block_activations(self.model.blocks, visible + 1)
        decoder = block_activations(self.model.decoder_blocks, self.model.num_patches + 1)
        return encoder + decoder

    def export(self, weights: dict[str, Tensor]) -> dict:
        config = {
            "img_size": self.args.img_size,
            "kind": "mae",
            "name": self.args.model,
            "norm_pix_loss": self.args.norm_pix_loss,
        }
        return {"model": weights, "model_config": config}


def to_photos(images: Tensor) -> np.ndarray:
    """Turn normalised images [N, 3, H, W] into uint8 [N, H, W, 3]."""
    pixels = augment.denormalise(images).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


# The objectives by name: what --objective accepts. Name yours here.
OBJECTIVES: dict[str, type[Pretraining]] = {
    "mae": MaskedPixels,
    "labels": Labels,
    "tokens": Tokens,
    "splitmask": SplitMask,
    "ijepa": BlockFeatures,
    "dino": Dino,
}


def get_args_parser(objective: str = "mae") -> Parser:
    """Make the parser of an objective's pre-training."""
    parser = Parser("pretrain.py", description="Pre-training on a split of MS COCO")
    recipe = parser.flags("model", role="recipe")
    recipe("--objective", choices=list(OBJECTIVES), default=objective, help="what is predicted in pre-training")
    network = parser.flags("model", role="network")
    network(
        "--model",
        choices=list(MODELS),
        default="mae_base",
        help="mae_base is the paper's Table 1; mae_tiny suits a CPU",
    )
    how = parser.flags("model", role="computation")  # its content defines the experiment, not its path
    how("--init", help="continue from this checkpoint instead of random weights")
    add_split_arguments(parser)
    add_training_arguments(parser, output_dir="runs/pretrain", epochs=150, batch_size=256, warmup_epochs=10, min_lr=0.0)
    network = parser.flags("optimisation", role="network")
    network("--blr", type=at_least(0), default=1.5e-4, help="base rate: lr = blr * batch_size / 256")
    how = parser.flags("system", role="computation")
    how(
        "--meters",
        action=argparse.BooleanOptionalAction,
        default=OBJECTIVES[objective].meters,
        help="measure at each validation how much features differ, and what nearest neighbours know of breeds",
    )
    OBJECTIVES[objective].add_arguments(parser)
    return parser


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the base rate where its default depends on other flags."""
    resolved = argparse.Namespace(**vars(args))
    if args.blr is None:
        resolved.blr = OBJECTIVES[args.objective].default_blr(args)
    return resolved


def main(args: argparse.Namespace) -> None:
    """Pre-train by an objective."""
    args = resolve(args)
    dist = setup(args.device)
    train(OBJECTIVES[args.objective](args, dist), args, dist)


if __name__ == "__main__":
    launch(main, get_args_parser(chosen("--objective", OBJECTIVES, "mae")))
