"""Objective `ijepa`: predict the features of large blocks of an image from what is visible elsewhere (I-JEPA).

    python pretrain.py --objective ijepa --split animal

Assran et al. 2023, *Self-supervised learning from images with a joint-embedding predictive architecture*. A teacher, the
moving average of the encoder, sees the whole image; its features, normalised per patch, are the targets. The encoder sees a
quarter of the patches, and a narrow predictor has to tell the teacher's features of four blocks that it does not see. The
teacher is the encoder that is kept and judged. Written independently of facebookresearch/ijepa (CC-BY-NC); it deviates:

- All blocks have one area, so that shapes are static: of the areas that the ranges of size and aspect allow, the one that
  most shapes have. Each block draws its shape; there, a batch draws one, and large blocks are high ones.
- Blocks lie anywhere in the image; there, never in its last row and column.
- The context is a fixed number of patches drawn among those of its block that no target covers; there, what all images of
  a GPU's batch have in common, which leaves out the bottom of most images. Where fewer are left, patches outside of the
  context's block fill it up.
- The encoder has a class token, which the predictor does not see, and the weights begin as those of the other objectives.

How well it predicts is told by R², the share of the loss of the best constant for each position that the prediction saves:
a loss alone says nothing, as the targets change with the teacher. 0 is reached without looking at an image; above 0.2 and
rising is healthy, if the meters of collapse agree. The recipe is that of the paper, scaled to 15,000 updates of 256 images:
rate 2.5e-4, momentum 0.996 to 1. It is untuned. With few updates the teacher needs a lower momentum, say 0.99 for 800.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
from batches import Augmentation, Draw
from engine import Distributed, Parser, at_least, fraction
from models import (
    ViT,
    build_vit,
    encoder_sizes,
    make_blocks,
    matrix_product_flops,
    patchify,
    sincos_pos_embed,
    take_rows,
)
from objective import block_activations, mean_scores, sum_over
from pretraining import Pretraining, add_weight_decay_schedule
from teacher import Teacher, momentum_at

NO_DECAY = ("cls_token", "predictor_token")  # besides all one-dimensional parameters
ROUNDED = 101  # values of size and of aspect whose blocks are rounded
CONTEXT_SCALE = (0.85, 1.0)  # share of the image that the context's block covers
LARGEST_PREDICTOR = {"dim": 384, "depth": 12}  # of ViT-L and ViT-H in the paper
TRIVIAL = "best constant of each position"
HELD_OUT_SCORES = {
    "loss_held_out": "smooth L1 of features, held-out images",
    "r2_held_out": "R² against the best constant, held-out images",
}


# -- Masks --------------------------------------------------------------------------------------------------------------

Shape = tuple[int, int]  # rows and columns of a block, or of all patches


def block_shapes(grid: Shape, scale: Sequence[float], aspect: Sequence[float]) -> list[Shape]:
    """List the blocks, rounded to whole patches, whose share of a grid and rows / columns lie in ranges (low, high)."""
    area = np.linspace(*scale, ROUNDED)[:, None] * grid[0] * grid[1]
    ratio = np.linspace(*aspect, ROUNDED)
    rows = np.rint(np.sqrt(area * ratio)).clip(1, grid[0])
    columns = np.rint(np.sqrt(area / ratio)).clip(1, grid[1])
    shapes = {(int(height), int(width)) for height, width in zip(rows.flat, columns.flat, strict=True)}
    return sorted(shapes)


def equal_shapes(grid: Shape, scale: Sequence[float], aspect: Sequence[float]) -> list[Shape]:
    """Choose among `block_shapes` those of the area that most of them have; of several, that nearest to the middle."""
    by_area: dict[int, list[Shape]] = {}
    for rows, columns in block_shapes(grid, scale, aspect):
        by_area.setdefault(rows * columns, []).append((rows, columns))
    middle = sum(scale) / 2 * grid[0] * grid[1]

    def preference(area: int) -> tuple[int, float]:
        return len(by_area[area]), -abs(area - middle)

    return by_area[max(by_area, key=preference)]


class Masks(NamedTuple):
    """How blocks are drawn on a grid of patches: sizes are the same for all images, places and shapes are drawn.

    target_shapes: rows and columns that a target can have, all of one area; blocks: targets of an image; context: patches
    that the encoder sees; context_shapes: of the block that they are drawn in.
    """

    grid: Shape
    target_shapes: tuple[Shape, ...]
    blocks: int
    context: int
    context_shapes: tuple[Shape, ...]

    @staticmethod
    def of(args: argparse.Namespace, grid: Shape) -> "Masks":
        """Take the sizes from the flags; ValueError if they do not fit the grid."""
        for name in ("target_scale", "target_aspect"):
            low, high = getattr(args, name)
            if low > high:
                raise ValueError(f"--{name} {low:g} {high:g} is LOW above HIGH; give --{name} {high:g} {low:g}")
        patches = grid[0] * grid[1]
        targets = tuple(equal_shapes(grid, args.target_scale, args.target_aspect))
        context = round(args.context_ratio * patches)
        rows, columns = targets[0]
        left = patches - args.target_blocks * rows * columns
        asked = f"--context_ratio {args.context_ratio:g} asks for {context} of {patches} patches"
        if context < 1:
            raise ValueError(f"{asked}; use at least {1 / patches:.3f}")
        if context > left:
            reason = f"{args.target_blocks} targets of {rows * columns} may leave no more than {max(left, 0)}"
            raise ValueError(f"{asked}, but {reason}; use a lower ratio or fewer --target_blocks")
        contexts = tuple(block_shapes(grid, CONTEXT_SCALE, (1, 1)))
        return Masks(grid, targets, args.target_blocks, context, contexts)

    @property
    def target(self) -> int:
        """Patches of a target."""
        rows, columns = self.target_shapes[0]
        return rows * columns

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw the patches of context and targets for each image -> int64 [count, context + blocks * target]."""
        targets = self.draw_targets(rng, count).reshape(count, -1)
        return np.concatenate([self.draw_context(rng, targets), targets], axis=1)

    def split(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Take apart what `draw` gave -> context [B, context], targets [B, blocks, target]."""
        targets = masks[:, self.context :]
        return masks[:, : self.context], targets.unflatten(1, (self.blocks, self.target))

    def draw_targets(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw the blocks to be predicted -> patches int64 [count, blocks, target], row by row."""
        top, left, shape = self.place(rng, self.target_shapes, (count, self.blocks))
        rows, columns = np.divmod(np.arange(self.target), shape[..., 1:])
        return (top[..., None] + rows) * self.grid[1] + left[..., None] + columns

    def draw_context(self, rng: np.random.Generator, targets: np.ndarray) -> np.ndarray:
        """Draw the patches that the encoder sees, none of targets [count, N] among them -> int64 [count, context]."""
        count = len(targets)
        top, left, shape = self.place(rng, self.context_shapes, (count, 1))
        row, column = np.divmod(np.arange(self.grid[0] * self.grid[1]), self.grid[1])
        inside_rows = (row >= top) & (row < top + shape[..., 0])
        inside_columns = (column >= left) & (column < left + shape[..., 1])
        # Patches are taken in the order of these numbers: those of the block first, then others, targets never.
        order = rng.random((count, len(row)), np.float32)
        order += ~(inside_rows & inside_columns)
        np.put_along_axis(order, targets, 3.0, axis=1)
        return np.argsort(order, axis=1, kind="stable")[:, : self.context]

    def place(
        self, rng: np.random.Generator, shapes: Sequence[Shape], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw blocks anywhere in the grid -> top and left [*size], rows and columns [*size, 2]."""
        shape = np.array(shapes)[rng.integers(0, len(shapes), size)]
        room = np.array(self.grid) - shape + 1
        corner = rng.integers(0, room)
        return corner[..., 0], corner[..., 1], shape


# -- Network ------------------------------------------------------------------------------------------------------------


class BlockPredictor(ViT):
    """ViT encoder of the context, and a narrow ViT that predicts features of patches from theirs and from positions.

    predictor_dim, predictor_depth: its width and blocks; it has as many heads as the encoder. sizes: arguments of `ViT`.
    """

    def __init__(self, predictor_dim: int, predictor_depth: int, **sizes: int) -> None:
        super().__init__(**sizes, initialize=False)
        heads = self.blocks[0].attn.num_heads
        positions = sincos_pos_embed(predictor_dim, self.grid)
        self.predictor_embed = nn.Linear(self.embed_dim, predictor_dim)
        self.predictor_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        self.predictor_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.predictor_blocks = make_blocks(predictor_depth, predictor_dim, heads, mlp_ratio=4.0)
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_dim, self.embed_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise every layer as the other pre-trainings do."""
        super().initialize_weights()
        nn.init.normal_(self.predictor_token, std=0.02)

    def forward(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predict the features of blocks of images [B, 3, H, W] -> [B, M, N, D].

        context: the patches that are seen [B, K]; targets: those of M blocks [B, M, N]. No other pixel is looked at.
        """
        patches = take_rows(patchify(images, self.patch_size), context)
        encoded = self.forward_encoder(patches, context)
        return self.forward_predictor(encoded[:, 1:], context, targets)

    def forward_predictor(self, encoded: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predict each block alone from the features [B, K, D] of the context -> [B, M, N, D]."""
        blocks = targets.shape[1]
        visible = context.shape[1]
        positions = self.predictor_pos_embed[0, 1:]
        seen = self.predictor_embed(encoded) + F.embedding(context, positions)
        seen = seen[:, None].expand(-1, blocks, -1, -1)  # [B, M, K, P]
        asked = self.predictor_token + F.embedding(targets, positions)  # [B, M, N, P]
        x = torch.cat([seen, asked.to(seen.dtype)], dim=2).flatten(0, 1)  # [B * M, K + N, P]
        for block in self.predictor_blocks[:-1]:
            x = block(x)
        x = self.predictor_blocks[-1](x, first=visible)  # the context serves as keys and values only
        predicted = self.predictor_proj(self.predictor_norm(x))
        return predicted.unflatten(0, (-1, blocks))

    def step_flops(self, masks: Masks) -> float:
        """Count the operations of a training step per image, the teacher's forward pass included, as `ViT.flops` does."""
        whole = ViT.flops(self, training=False)
        embedding = matrix_product_flops(self.patch_embed, self.num_patches)
        encoder = embedding + matrix_product_flops(self.blocks, masks.context + 1)
        narrow = matrix_product_flops(self.predictor_embed, masks.context)
        narrow += masks.blocks * matrix_product_flops(self.predictor_blocks, masks.context + masks.target)
        narrow += masks.blocks * matrix_product_flops(self.predictor_proj, masks.target)
        return 3 * (encoder + narrow) - embedding + whole


def normalise_features(features: Tensor) -> Tensor:
    """Give each patch's features [..., D] zero mean and unit variance, in float32."""
    return F.layer_norm(features.float(), features.shape[-1:])


def prediction_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Compute the smooth L1 loss of each image, the mean over its values: both [B, ...] -> [B]."""
    losses = F.smooth_l1_loss(predicted.float(), wanted, reduction="none")
    return losses.flatten(1).mean(1)


def explained(loss: float, constant_loss: float) -> float:
    """Compute R² = 1 - loss / constant_loss; not a number where a constant makes no error, as after a collapse."""
    if constant_loss == 0:
        return math.nan
    return 1 - loss / constant_loss


# -- The objective ------------------------------------------------------------------------------------------------------


class BlockFeatures(Pretraining):
    """I-JEPA: predict a teacher's features of blocks that the encoder does not see."""

    name = "ijepa"
    meters = True
    scores = {
        "loss_animal": "smooth L1 of features, animal images",
        "loss_non_animal": "smooth L1 of features, non-animal images",
        "r2_animal": "R² against the best constant, animal images",
        "r2_non_animal": "R² against the best constant, non-animal images",
    }
    betas = (0.9, 0.999)

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of masks, predictor and teacher."""
        parser.set_defaults(blr=2.5e-4, warmup_epochs=15)
        add_weight_decay_schedule(parser)
        recipe = parser.flags("objective", role="recipe")
        recipe("--target_blocks", type=at_least(1, int), default=4, help="blocks of an image that are predicted")
        recipe(
            "--target_scale",
            type=fraction,
            nargs=2,
            default=[0.15, 0.2],
            metavar=("LOW", "HIGH"),
            help="share of the image that a block covers; a little less or more costs much (Assran et al., Table 8)",
        )
        recipe(
            "--target_aspect",
            type=at_least(0.1),
            nargs=2,
            default=[0.75, 1.5],
            metavar=("LOW", "HIGH"),
            help="height of a block by its width",
        )
        recipe(
            "--context_ratio",
            type=fraction,
            default=0.25,
            help="share of patches that the encoder sees, outside of all blocks that are predicted",
        )
        recipe(
            "--teacher_momentum",
            type=at_least(0, maximum=1),
            default=0.996,
            help="of the teacher's moving average at the first update, rising to 1; lower it for fewer updates, so that "
            "the teacher does not stay at its random weights",
        )
        network = parser.flags("objective", role="network")
        network(
            "--predictor_dim",
            type=at_least(1, int),
            help="width of the predictor (default: half the encoder's, at most 384)",
        )
        network(
            "--predictor_depth",
            type=at_least(1, int),
            help="blocks of the predictor (default: half the encoder's, at most 12)",
        )

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        if args.images:
            self.scores = HELD_OUT_SCORES
        super().__init__(args, dist)
        encoder = build_vit(args.model, img_size=args.img_size)
        encoder.load_state_dict(self.model.state_dict(), strict=False)  # the predictor has no part in it
        self.teacher = Teacher(encoder).to(dist.device)
        self.trivial: dict[str, float] = {}

    def build_model(self) -> nn.Module:
        sizes = encoder_sizes(self.args.model)
        model = BlockPredictor(**self.predictor_sizes(), img_size=self.args.img_size, **sizes)
        self.masks = Masks.of(self.args, model.grid)
        return model

    def predictor_sizes(self) -> dict[str, int]:
        """Give width and depth of the predictor."""
        encoder = encoder_sizes(self.args.model)
        dim = self.args.predictor_dim
        depth = self.args.predictor_depth
        multiple = math.lcm(4, encoder["num_heads"])  # for two-dimensional positions, and for the heads
        if dim is None:
            dim = min(encoder["embed_dim"] // 2, LARGEST_PREDICTOR["dim"])
        elif dim % multiple:
            nearest = max(1, round(dim / multiple)) * multiple
            problem = f"--predictor_dim {dim} is no multiple of {multiple}, as --model {self.args.model} needs"
            raise ValueError(f"{problem}; use {nearest}")
        if depth is None:
            depth = min(max(encoder["depth"] // 2, 1), LARGEST_PREDICTOR["depth"])
        return {"predictor_dim": dim, "predictor_depth": depth}

    @property
    def encoder(self) -> ViT:
        return self.teacher.network

    def parameter_groups(self) -> list[dict]:
        return engine.param_groups(self.model, self.args.weight_decay, no_decay=NO_DECAY)

    def flops(self) -> float:
        return self.model.step_flops(self.masks)

    def activation_values(self) -> int:
        encoder = block_activations(self.model.blocks, self.masks.context + 1)
        tokens = self.masks.blocks * (self.masks.context + self.masks.target)
        return encoder + block_activations(self.model.predictor_blocks, tokens)

    def augmentation(self) -> Augmentation:
        return Augmentation(self.args.img_size, crop_scale=(0.3, 1.0), horizontal_flip=False)

    def draws(self) -> dict[str, Draw]:
        return {"masks": self.masks.draw}

    def features_of(self, images: Tensor) -> Tensor:
        """Let the teacher see whole images [B, 3, H, W] -> normalised features of their patches [B, L, D], no gradient."""
        return normalise_features(self.teacher(images)[:, 1:])

    def compare(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Predict the targets of a batch -> (predicted, wanted), both [B, M, N, D]."""
        context, targets = self.masks.split(batch["masks"])
        wanted = take_rows(self.features_of(batch["images"]), targets.flatten(1))
        predicted = network(batch["images"], context, targets)
        return predicted, wanted.view(predicted.shape)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        predicted, wanted = self.compare(network, batch)
        return prediction_loss(predicted, wanted).mean()

    def compile_others(self) -> None:
        self.teacher.compile()

    def after_step(self, step: int, total_steps: int) -> None:
        """Let the teacher follow the encoder."""
        self.teacher.update(self.model, momentum_at(step, total_steps, self.args.teacher_momentum))

    def score_validation(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Compare the loss of each validation list with that of the best constant for each position."""
        scores = {}
        for name in self.stores:
            constant = self.mean_features(name, stopping)
            if constant is None:
                return None
            losses = self.losses_beside(constant, name, stopping)
            if losses is None:
                return None
            scores[f"loss_{name}"] = losses["model"]
            scores[f"r2_{name}"] = explained(losses["model"], losses["constant"])
            self.trivial |= {f"loss_{name}": losses["constant"], f"r2_{name}": 0.0}
        return scores

    def mean_features(self, name: str, stopping: Callable[[], bool]) -> Tensor | None:
        """Average the teacher's features at each position over a validation list -> [L, D]; None as in sum_over."""
        store = self.stores[name]
        totals = torch.zeros(self.model.num_patches, self.model.embed_dim, dtype=torch.float64, device=self.dist.device)

        def score(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"features": self.features_of(batch["images"]).sum(0, dtype=torch.float64)}

        batches = self.eval_batches(store, {}, self.validation_batch_size)
        sums = sum_over(batches, score, {"features": totals}, self.dist, stopping)
        if sums is None:
            return None
        return (sums["features"] / len(store)).float()

    def losses_beside(self, constant: Tensor, name: str, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Average the losses of the model and of constant features [L, D] over a validation list; None as in sum_over."""

        def score(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            predicted, wanted = self.compare(self.scoring_network, batch)
            _, targets = self.masks.split(batch["masks"])
            fixed = F.embedding(targets, constant)
            return {"model": prediction_loss(predicted, wanted), "constant": prediction_loss(fixed, wanted)}

        batches = self.eval_batches(self.stores[name], self.targets[name], self.validation_batch_size)
        return mean_scores(batches, score, ("model", "constant"), self.dist, stopping)

    def state(self) -> dict:
        return {"teacher": self.teacher.state()}

    def load_state(self, state: dict) -> None:
        self.teacher.load_state(state["teacher"])

    def finish(self) -> dict:
        """Show what the best constant for each position reached at the last validation."""
        return {"trivial": {TRIVIAL: self.trivial}}

    def export(self, weights: dict[str, Tensor]) -> dict:
        return super().export(self.teacher.network.state_dict())
