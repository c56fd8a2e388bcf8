"""Pre-train a Masked Autoencoder on one split of MS COCO.

    torchrun --nproc_per_node=4 pretrain.py --split non_animal             # four GPUs
    python pretrain.py --split mixed --animal_fraction 0.1                 # one GPU, 10 % animals
    python pretrain.py --split animal --data_root data/demo --model mae_tiny --img_size 128 --epochs 5 --device cpu
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST pretrain.py --split animal   # and rank 1 there

The defaults are the study's recipe: ViT-B, 150 epochs of 25,739 images, batch 256 (15,000 updates). The number of processes
and --micro_batch_size do not change the result. The paper's validation loss is 0.547.
Writes into --output_dir: config.json, log.jsonl, model.pt, metrics.json, reconstruction.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import augment
import splits
from engine import EngineError, Parser, Precision, launch, setup
from models import MODELS, build_mae, patchify, take_rows
from trainer import add_training_arguments, build, check_training_arguments, open_store, train


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("pretrain.py", description="Masked Autoencoder pre-training on a split of MS COCO")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(MODELS), default="mae_base", help="mae_base is the paper's Table 1; mae_tiny suits a CPU")
    add("--mask_ratio", type=float, default=0.75, help="share of patches hidden from the encoder")
    add("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=True,
        help="predict pixels normalised per patch; gives better features, blurrier colours")
    add("--init", help="continue from this MAE checkpoint instead of random weights")
    add = parser.add_argument_group("split").add_argument
    add("--split", choices=splits.SPLITS, default="animal", help="which images to pre-train on; see `prepare.py splits`")
    add("--animal_fraction", type=float, help="share of animal images in the mixed split, 0 to 1 (default 0.5)")
    add("--num_images", type=int, help="size of the split (default: that of the animal split, so that arms are matched)")
    add("--animal_images", choices=["per_category", "unique", "single"], default="per_category",
        help="count an image once per animal category (the paper), once, or only if it has exactly one")
    add("--categories", nargs="+", help="COCO categories that take the place of the animals, for other studies")
    add_training_arguments(parser, output_dir="runs/pretrain", epochs=150, batch_size=256, warmup_epochs=10, min_lr=0.0)
    parser.add_argument("--blr", type=float, default=1.5e-4, help="base rate: lr = blr * batch_size / 256")
    parser.add_argument("--figure_every", type=int, default=0, help="epochs between figures (0: only at the end)")
    return parser
# fmt: on


def validation_noise(count: int, patches: int) -> torch.Tensor:
    """Fixed masks of the validation images [count, L], equal for every arm, seed and machine."""
    return torch.from_numpy(np.random.default_rng(20170).random((count, patches), dtype=np.float32))


class Validation:
    """Mean loss over the fixed animal and non-animal validation images (name -> store), each once, under fixed masks."""

    def __init__(self, model, stores: dict, args, dist, run_dir: Path | None = None):
        self.model, self.stores, self.args, self.dist, self.run_dir = model, stores, args, dist, run_dir
        # On the device once: a copy for each batch would make a GPU wait.
        self.noise = {k: validation_noise(len(s), model.num_patches).to(dist.device) for k, s in stores.items()}
        self.figure_steps = 0

    def _mean(self, name: str, loss_of, stopping=lambda: False) -> float | None:
        """Mean of loss_of(images, noise) over all images of a store; None if a process was to stop meanwhile."""
        store, total = self.stores[name], torch.zeros(3, dtype=torch.float64, device=self.dist.device)
        size = min(self.args.micro_batch_size or self.args.batch_size, 256)
        batches = augment.EvalBatches(store, img_size=self.args.img_size, batch_size=size, rank=self.dist.rank,
                                      world_size=self.dist.world_size, device=self.dist.device)  # fmt: skip
        for index, images in batches:
            if stopping():
                total[2] += 1
                break
            # A rank's share are the rows rank, rank + world_size, ... in order, so its masks are a slice.
            noise = self.noise[name][int(index[0]) :: self.dist.world_size][: len(index)]
            total[0] += loss_of(images, noise).double() * len(images)
            total[1] += len(images)
        loss, count, stopped = self.dist.sum(total).tolist()
        return None if stopped else loss / count

    def __call__(self, step: int, stopping=lambda: False) -> dict | None:
        if self.figure_steps and step % self.figure_steps == 0:
            self.figure(f"reconstruction_{step:06d}")

        def loss(images, noise):
            return self.model(images, self.args.mask_ratio, noise)[0]

        scores = {}
        for name in self.stores:
            scores[f"loss_{name}"] = self._mean(name, loss, stopping)
            if scores[f"loss_{name}"] is None:
                return None
        return scores

    @torch.no_grad()
    def predict_zero(self) -> dict:
        """Loss of predicting zero everywhere: what any training must clearly beat."""

        def loss(images, noise):
            first = self.model.num_visible(self.args.mask_ratio) % noise.shape[1]
            hidden = torch.argsort(noise, dim=1, stable=True)[:, first:]
            patches = take_rows(patchify(images, self.model.patch_size), hidden)
            return self.model.forward_loss(patches, torch.zeros_like(patches))

        return {name: self._mean(name, loss) for name in self.stores}

    def figure(self, file: str, count: int = 4) -> None:
        """Save input, masked input, reconstruction and original of a few fixed images as a .png and a .npz."""
        if not self.dist.is_main:
            return
        self.model.eval()
        parts, ids, side, device = [], [], self.args.img_size, self.dist.device
        for name, store in self.stores.items():
            k = min(count, len(store))
            _, images = next(iter(augment.EvalBatches(store, img_size=side, batch_size=k, device=device)))
            masked, filled = self.model.reconstruct(images, self.args.mask_ratio, self.noise[name][:k])
            shown = [augment.denormalise(x).round().clamp(0, 255).byte() for x in (images, masked, filled)]
            parts.append([x.permute(0, 2, 3, 1).cpu() for x in shown])
            ids += store.images[:k]
        original, masked, filled = (torch.cat(x).numpy() for x in zip(*parts, strict=True))
        arrays = {"ids": np.array(ids), "original": original, "masked": masked, "reconstruction": filled}
        np.savez_compressed(self.run_dir / f"{file}.npz", **arrays)
        rows = [np.concatenate(row, axis=1) for row in zip(masked, filled, original, strict=True)]
        Image.fromarray(np.concatenate(rows)).save(self.run_dir / f"{file}.png")

    def finish(self) -> dict:
        """Draw the final figure; returns what the report compares the loss with."""
        self.figure("reconstruction")
        return {"predict_zero": self.predict_zero()}


def main(args: argparse.Namespace) -> None:
    check_training_arguments(args)
    options = {k: getattr(args, k) for k in ("num_images", "animal_images", "categories", "split_seed", "cache_dir")}
    dist = setup(args.device)
    precision = Precision(args.precision, dist.device)
    model, init = build(build_mae, dist, args, args.init, norm_pix_loss=args.norm_pix_loss)
    try:
        flops = model.flops(mask_ratio=args.mask_ratio)
    except ValueError as error:
        raise EngineError(str(error)) from None
    split = splits.select_split(args.data_root, args.split, animal_fraction=args.animal_fraction, **options)
    # pets and all train for as many updates as an arm of the animal split's size; other arms define their own epoch.
    matched = args.split in ("pets", "all") and args.num_images is None
    size = splits.reference_size(args.data_root, **options) if matched else len(split.images)
    held_out = splits.mae_validation(args.data_root, categories=args.categories, cache_dir=args.cache_dir)

    def loss(network, batch):
        return network(batch["images"], args.mask_ratio, batch["noise"])[0]

    def validation(run):
        stores = {name: open_store(args, dist, part.images) for name, part in held_out.items()}
        validate = Validation(model, stores, args, dist, run.dir)
        validate.figure_steps = args.figure_every * (size // args.batch_size)
        return validate

    draws = {"scale": (0.2, 1.0), "draws": {"noise": (model.num_patches,)}}
    sizes = {"kind": "mae", "name": args.model, "norm_pix_loss": args.norm_pix_loss}
    train("pretrain", args, dist, precision, model, split, forward=loss, validation=validation, size=size, flops=flops,
          betas=(0.9, 0.95), batch_options=draws, model_config=sizes, mask_ratio=args.mask_ratio, init=init)  # fmt: skip


if __name__ == "__main__":
    launch(main, get_args_parser())
