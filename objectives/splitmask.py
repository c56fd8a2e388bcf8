"""Objective `splitmask`: from either half of an image, predict the tokens of the other half, and tell whose half it is.

    python pretrain.py --objective splitmask
    python pretrain.py --objective splitmask --no-match        # the paper's ablation: without contrast,
    python pretrain.py --objective splitmask --no-inpaint      # or contrast alone, which is known to fail
    python pretrain.py --objective splitmask --model mae_demo --img_size 64 --vocabulary 512     # small images

SplitMask (El-Nouby et al. 2021, *Are large-scale datasets necessary for self-supervised pre-training?*, section 4): blocks
and what they leave split an image into two halves. One encoder sees each half alone, so it never meets a mask. A decoder of
two blocks adds an embedding for each missing patch and predicts its token (inpaint). The mean of all that the decoder gives
must be more similar to that of the same image's other half than to those of all other images of the batch (match: InfoNCE).

What the paper leaves open is chosen here: the two losses are added, the vectors are normalised and compared without a
further layer, the class token takes part in attention alone. The tokens are patches of training images, the paper's are
random projections (see tokenizers.py). The recipe is the paper's at this study's batch, untuned: rate 1.9e-4, gradients
clipped at 3.
"""

import argparse
import math
from collections.abc import Callable

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from batches import Draw, TrainBatches
from engine import Distributed, EngineError, Parser, at_least, single_precision
from models import ViT, encoder_sizes, make_blocks, matrix_product_flops, patchify, take_rows
from objective import block_activations, sum_over
from objectives.masks import halves
from objectives.tokenizers import add_tokenizer_arguments
from objectives.tokens import Tokens, init_head, name_scores, token_loss, token_scores
from pretraining import Pretraining
from runs import RunFolder

LARGEST_BLOCK = 75 / 196  # share of the patches that a block covers at most


class SplitMaskNetwork(ViT):
    """ViT encoder of half an image, and a decoder of its width that predicts the other half's tokens.

    vocabulary: None leaves the prediction of tokens out. sizes: arguments of `ViT`.
    """

    fresh_keys = ("decoder_", "mask_token", "head.")

    def __init__(self, vocabulary: int | None, decoder_depth: int, num_heads: int, **sizes: object) -> None:
        super().__init__(num_heads=num_heads, initialize=False, **sizes)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.decoder_blocks = make_blocks(decoder_depth, self.embed_dim, num_heads, mlp_ratio=4.0)
        self.decoder_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.initialize_weights()
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = None
        if vocabulary is not None:
            self.head = nn.Linear(self.embed_dim, vocabulary)
            init_head(self.head)

    def forward(self, images: Tensor, split: Tensor) -> tuple[Tensor | None, Tensor]:
        """Look at either half of images [B, 3, H, W] -> (logits [B, L, V] of all patches in the order of `split`, vectors).

        split [B, L]: ids of the patches of one half, then those of the other. The logits of a patch come from the half that
        it is not in; None without a vocabulary. Vectors [B, 2, D]: one of each half.
        """
        one, other = split.chunk(2, dim=1)
        seen = torch.cat([one, other])  # [2 B, L / 2]
        missing = torch.cat([other, one])
        patches = take_rows(patchify(images, self.patch_size), split)
        latent = self.forward_encoder(torch.cat(patches.chunk(2, dim=1)), seen)
        decoded = self.forward_decoder(latent, seen, missing)
        vectors = decoded[:, 1:].mean(1)
        return self.predict(decoded[:, latent.shape[1] :]), torch.stack(vectors.chunk(2), dim=1)

    def forward_decoder(self, latent: Tensor, seen: Tensor, missing: Tensor) -> Tensor:
        """Decode latent [B, 1 + K, D] of the patches `seen` [B, K] -> [B, 1 + L, D], those of `missing` [B, L - K] last."""
        mask_tokens = self.mask_token.to(latent.dtype).expand(*missing.shape, -1)
        x = torch.cat([latent, mask_tokens], dim=1)
        rows = F.pad(torch.cat([seen, missing], dim=1) + 1, (1, 0))  # row 0 belongs to the class token
        x = x + F.embedding(rows, self.pos_embed[0])
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)

    def predict(self, decoded: Tensor) -> Tensor | None:
        """Predict tokens from decoded missing patches [2 B, L / 2, D] -> logits [B, L, V], those of the first half first."""
        if self.head is None:
            return None
        other, one = decoded.chunk(2)  # who sees one half misses the other
        return self.head(torch.cat([one, other], dim=1))

    def flops(self, training: bool = True, mask_ratio: float = 0.0) -> float:
        """Count floating-point operations per image as `ViT.flops` does; the two halves leave nothing to mask."""
        tokens = self.num_patches + 1
        embedding = matrix_product_flops(self.patch_embed, self.num_patches)
        encoder = 2 * matrix_product_flops(self.blocks, self.num_patches // 2 + 1)
        decoder = 2 * matrix_product_flops(self.decoder_blocks, tokens)
        forward = embedding + encoder + decoder
        if self.head is not None:
            forward += matrix_product_flops(self.head, self.num_patches)
        if training:
            return 3 * forward - embedding
        return forward


# -- Matching -----------------------------------------------------------------------------------------------------------


class GatherRows(torch.autograd.Function):
    """Put the rows of all processes together, [b, ...] -> [B, ...]; each process gets the gradients of its own from all."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, dist: Distributed) -> Tensor:
        """Gather; every process has equally many rows."""
        ctx.rank = dist.rank
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.world_size)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        """Add the gradients of all processes up; they average those of the weights afterwards."""
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.rank * ctx.count :][: ctx.count], None


def gather_rows(rows: Tensor, dist: Distributed) -> Tensor:
    """Give the rows [B, ...] of the global batch from this process's part of it [b, ...], with gradients."""
    if dist.world_size == 1:
        return rows
    return GatherRows.apply(rows, dist)


def info_nce(vectors: Tensor, temperature: float) -> Tensor:
    """Compute the contrastive loss of vectors [N, 2, D] of two halves of N images, in float32.

    The mean of both directions: which image does a half belong to, by the cosines to all other halves over temperature (van
    den Oord et al. 2018; El-Nouby et al. 2021, equation 2, with the minus and the logarithm that it lacks in print).
    """
    one, other = F.normalize(vectors.float(), dim=-1).unbind(1)
    with single_precision():
        logits = one @ other.T / temperature
    own = torch.arange(len(vectors), device=vectors.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def group_size(images: int, batch_size: int) -> int:
    """Choose how many images are contrasted in validation: equal groups, as few and as large as batch_size allows."""
    groups = math.ceil(images / batch_size)
    return images // groups


def info_nce_in_groups(vectors: Tensor, size: int, temperature: float) -> float:
    """Average `info_nce` over groups of `size` successive images; those that fill no group are left out."""
    whole = len(vectors) // size * size
    losses = [info_nce(group, temperature) for group in vectors[:whole].split(size)]
    return torch.stack(losses).double().mean().item()


# -- The objective ------------------------------------------------------------------------------------------------------


class SplitMask(Tokens):
    """Predict the tokens of each half of an image from the other one, and match the halves (SplitMask)."""

    name = "splitmask"
    meters = True
    words_of_inpainting = {"cross_entropy": "cross-entropy of tokens", "accuracy": "accuracy of tokens"}
    words_of_matching = {"info_nce": "InfoNCE of halves"}
    words = {"loss": "loss", **words_of_inpainting, **words_of_matching}
    scores = name_scores(words)

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of the tokeniser, of the decoder and of either half of the loss."""
        parser.set_defaults(blr=1.9e-4, clip_grad=3.0)
        add_tokenizer_arguments(parser)
        recipe = parser.flags("objective", role="recipe")
        recipe("--decoder_depth", type=at_least(1, int), default=2, help="transformer blocks that follow the encoder")
        recipe(
            "--temperature",
            type=at_least(1e-3),
            default=0.2,
            help="of the contrast between images; lower minds similar images more",
        )
        arm = parser.flags("objective", role="arm")
        arm(
            "--inpaint",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="predict the tokens of the half that is not seen",
        )
        arm(
            "--match",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="contrast the two halves of an image with those of all other images of the batch",
        )

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        check_losses(args, dist)
        super().__init__(args, dist)

    def build_model(self) -> nn.Module:
        vocabulary = self.args.vocabulary if self.args.inpaint else None
        sizes = {"img_size": self.args.img_size, **encoder_sizes(self.args.model)}
        model = SplitMaskNetwork(vocabulary, self.args.decoder_depth, **sizes)
        self.draw_halves = halves(model.grid, LARGEST_BLOCK)  # refuses a grid that has no halves
        return model

    def score_names(self) -> dict[str, str]:
        words = {"loss": self.words["loss"]}
        if self.args.inpaint:
            words |= self.words_of_inpainting
        if self.args.match:
            words |= self.words_of_matching
        return name_scores(words, self.held_out)

    def draws(self) -> dict[str, Draw]:
        return {"split": self.draw_halves}

    def flops(self) -> float:
        operations = self.model.flops(training=True)
        if self.args.inpaint:
            operations += self.tokenizer.flops(self.model.num_patches)
        return operations

    def activation_values(self) -> int:
        patches = self.model.num_patches
        encoder = 2 * block_activations(self.model.blocks, patches // 2 + 1)
        decoder = 2 * block_activations(self.model.decoder_blocks, patches + 1)
        if not self.args.inpaint:
            return encoder + decoder
        return encoder + decoder + 3 * patches * self.args.vocabulary  # logits, and their softmax in float32

    def open(self, run: RunFolder) -> TrainBatches:
        if self.args.inpaint:
            return super().open(run)
        return Pretraining.open(self, run)  # no token is asked for

    def findings(self) -> dict:
        if self.args.inpaint:
            return super().findings()
        return {}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits, vectors = network(batch["images"], batch["split"])
        losses = []
        if self.args.inpaint:
            losses.append(token_loss(logits, self.tokenizer(batch["images"], batch["split"])))
        if self.args.match:
            losses.append(info_nce(gather_rows(vectors, self.dist), self.args.temperature))
        return sum(losses)

    def score_list(self, name: str, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Score all images of a list; images are contrasted in the same groups, however many processes there are."""
        store = self.stores[name]
        totals = self.nothing_found(len(store))
        vectors = totals["vectors"].clone()

        def score(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            logits, found = self.scoring_network(batch["images"], batch["split"])
            scores = {"vectors": vectors.index_copy(0, batch["index"], found.float())}
            if self.args.inpaint:
                tokens = self.tokenizer(batch["images"], batch["split"])
                scores |= {score: values.double().sum() for score, values in token_scores(logits, tokens).items()}
            return scores

        batches = self.eval_batches(store, self.targets[name], self.validation_batch_size)
        sums = sum_over(batches, score, totals, self.dist, stopping)
        if sums is None:
            return None
        return self.summarise(sums, len(store))

    def nothing_found(self, images: int) -> dict[str, Tensor]:
        """Give zeros for what score_list adds up."""
        zero = torch.zeros((), dtype=torch.float64, device=self.dist.device)
        vectors = torch.zeros(images, 2, self.model.embed_dim, device=self.dist.device)
        return {"loss": zero, "accuracy": zero.clone(), "vectors": vectors}

    def summarise(self, sums: dict[str, Tensor], images: int) -> dict[str, float]:
        """Turn sums over the images of a list into its scores."""
        scores = {"loss": 0.0}
        if self.args.inpaint:
            scores["cross_entropy"] = sums["loss"].item() / images
            scores["accuracy"] = sums["accuracy"].item() / images
            scores["loss"] += scores["cross_entropy"]
        if self.args.match:
            size = group_size(images, self.args.batch_size)
            scores["info_nce"] = info_nce_in_groups(sums["vectors"], size, self.args.temperature)
            scores["loss"] += scores["info_nce"]
        return scores

    def score_trivial(self, name: str) -> dict[str, dict[str, float]]:
        """Score the trivial predictors of tokens and, for the contrast, the choice of any image: ln N of N images."""
        chance = 0.0
        if self.args.match:
            chance = math.log(group_size(len(self.stores[name]), self.args.batch_size))
        if not self.args.inpaint:
            return {"chance": {"loss": chance, "info_nce": chance}}
        scored = {}
        for predictor, found in super().score_trivial(name).items():
            cross_entropy = found["loss"]
            scored[predictor] = {**found, "loss": cross_entropy + chance, "cross_entropy": cross_entropy}
        if self.args.match:
            scored["chance"] = {"info_nce": chance}
        return scored

    def hidden_parts(self, targets: dict[str, Tensor]) -> list[Tensor]:
        return list(targets["split"].chunk(2, dim=1))

    def export(self, weights: dict[str, Tensor]) -> dict:
        if self.args.inpaint:
            return super().export(weights)
        return Pretraining.export(self, weights)


def check_losses(args: argparse.Namespace, dist: Distributed) -> None:
    """Refuse flags that leave nothing to learn, or that would change what is contrasted."""
    if not args.inpaint and not args.match:
        raise EngineError("--no-inpaint --no-match leaves nothing to learn; leave one of them out")
    if not args.match:
        return
    if args.batch_size < 2:
        raise EngineError("--match: a batch of 1 image has no other one; raise --batch_size or give --no-match")
    share = args.batch_size // dist.world_size
    if args.micro_batch_size is not None and args.micro_batch_size < share:
        reason = "all images of a batch are contrasted with each other, and would not be in parts"
        raise EngineError(f"--match takes no --micro_batch_size: {reason}; leave it out or give --no-match")
