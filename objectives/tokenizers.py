"""Tokenisers of patches: each patch is named by the most similar of `--vocabulary` unit vectors, in pixel space.

    tokenizer = Tokenizer("kmeans", vocabulary=512, patch_size=4, seed=0)
    tokenizer.fit(views)                 # patches of training images [views, K, d]
    tokens = tokenizer(images)           # images [B, 3, H, W], normalised -> int64 [B, L]

The vectors are random, or patches of training images, or centroids of such patches (El-Nouby et al. 2021, section 3.3:
none is worse than the tokens of DALL-E's encoder). Similarity is the cosine, so the contrast of a patch does not matter. The
paper does not say how pixels are scaled, and for random vectors that decides everything: the mean is most of a patch's
length, so without care one token names 60 % of all patches. Here each patch loses its mean colour before it meets random
vectors; patches and centroids of patches meet it as the network sees it, normalised. Tokens depend on the crop: they are
computed from the augmented view, on its device.

Patches of more than 8 pixels a side are averaged down to at most 8: those of 16 pixels to 8 x 8, as in BEiT's second view at
half the resolution; smaller ones are taken as they are.
"""

import argparse
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from batches import Alone, TrainBatches
from data import seeded_rng
from engine import Distributed, Parser, Progress, at_least, single_precision
from models import patchify, take_rows

TOKENIZERS = ("random_projection", "random_patches", "kmeans")
LARGEST_SIDE = 8  # of the patches that are compared, in pixels
COLOURS = 3
LARGEST_VOCABULARY = 65_536  # the logits of more would not fit beside a network
CLUSTERED = 64  # patches for each token that k-means looks at; El-Nouby et al. have 366
COUNTED = 16  # patches for each token whose tokens are counted, where no clusters are sought
ITERATIONS = 20  # of k-means
FLAT = 0.01  # deviation in units of normalised pixels (0.6 grey levels) below which a patch is flat
ROWS = 8192  # patches that are compared at a time: bounds the memory of their similarities
MOST_REPEATED = 4096  # views of fewer images, which take seconds
VIEWS_AT_A_TIME = 256
CODE_STREAM = 100  # of the random numbers of a tokeniser, besides those of the batches
PLACE_STREAM = 101


def add_tokenizer_arguments(parser: Parser) -> None:
    """Add the flags that say what the tokens of patches are."""
    recipe = parser.flags("objective", role="recipe")
    recipe(
        "--tokenizer",
        choices=TOKENIZERS,
        default="random_patches",
        help="what a token stands for: a random direction (with patches of 4 x 4 pixels nothing can be learnt of it), a "
        "patch of a training image, or the centre of a cluster of patches",
    )
    recipe(
        "--vocabulary",
        type=at_least(2, int, LARGEST_VOCABULARY),
        default=8192,
        help="number of different tokens; fewer make an easier task, say 512 for images of 64 pixels",
    )


class Tokenizer:
    """Names patches by the most similar of its codes.

    codes [V, d]: unit vectors, zero until they are fitted, but for random_projection. counts [V]: how often each token
    names one of the patches that fit() has seen. patch_size: of the network, in pixels.
    """

    def __init__(
        self, kind: str, vocabulary: int, patch_size: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.kind = kind
        self.seed = seed
        self.shrink = shrink_factor(patch_size)
        self.side = patch_size // self.shrink
        size = COLOURS * self.side**2
        self.codes = torch.zeros(vocabulary, size, device=device)
        self.counts = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        if kind == "random_projection":
            drawn = seeded_rng(seed, CODE_STREAM).uniform(-1, 1, (vocabulary, size))
            self.codes = F.normalize(torch.from_numpy(drawn.astype(np.float32)), dim=1).to(device)

    @property
    def vocabulary(self) -> int:
        """Number of different tokens V."""
        return len(self.codes)

    def flops(self, patches: int) -> float:
        """Count the operations that name so many patches, 2 per multiply-add."""
        return 2 * patches * self.codes.numel()

    def __call__(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Name the patches ids [B, K] (None: all) of normalised images [B, 3, H, W] -> int64 [B, K]."""
        patches = self.patches(images)
        if ids is not None:
            patches = take_rows(patches, ids)
        return self.name_patches(patches)

    def patches(self, images: Tensor) -> Tensor:
        """Cut normalised images [B, 3, H, W] into the patches that are compared [B, L, d], in float32."""
        images = images.float()
        if self.shrink > 1:
            images = F.avg_pool2d(images, self.shrink)
        patches = patchify(images, self.side)
        if self.kind != "random_projection":
            return patches
        colours = patches.unflatten(-1, (-1, COLOURS))
        centred = colours - colours.mean(-2, keepdim=True)
        return centred.flatten(-2)

    def name_patches(self, patches: Tensor) -> Tensor:
        """Name patches [..., d] -> int64 [...]; the first of equally similar codes, and 0 for what is flat when centred."""
        rows = patches.flatten(0, -2)
        tokens = nearest_codes(rows, self.codes)
        if self.kind == "random_projection":
            # Nothing but rounding would decide between the codes.
            is_flat = rows.abs().amax(1) < FLAT
            tokens = tokens.masked_fill(is_flat, 0)
        return tokens.view(patches.shape[:-1])

    @torch.no_grad()
    def fit(self, views: Tensor) -> None:
        """Make the codes from patches [n, K, d] of n views of training images, and count the tokens of these patches.

        n * K must be the vocabulary at least. Patches stand at random places of their view, and so do the codes.
        """
        if self.kind != "random_projection":
            of_different_views_first = views.transpose(0, 1).flatten(0, 1)
            self.codes = F.normalize(of_different_views_first[: self.vocabulary], dim=1)
        if self.kind == "kmeans":
            self.codes = spherical_kmeans(views.flatten(0, 1), self.codes)
        tokens = self.name_patches(views).flatten()
        self.counts = torch.zeros_like(self.counts).scatter_add(0, tokens, torch.ones_like(tokens))

    def share(self, dist: Distributed) -> None:
        """Let all processes have the codes and counts of the first one."""
        if dist.world_size == 1:
            return
        for tensor in (self.codes, self.counts):
            torch.distributed.broadcast(tensor, 0)

    def unigram(self) -> Tensor:
        """Compute the logarithm of each token's probability [V]; each is counted once more than it was seen."""
        counts = self.counts.double() + 1
        return (counts / counts.sum()).log()

    def statistics(self) -> dict[str, float]:
        """Say how evenly the counted patches use the tokens.

        perplexity: e to the entropy of the tokens, at most the vocabulary; top_share: share of the most frequent token;
        used: how many tokens name a patch at all.
        """
        shares = self.counts.double() / self.counts.sum()
        return {
            "perplexity": torch.special.entr(shares).sum().exp().item(),
            "top_share": shares.max().item(),
            "used": int((self.counts > 0).sum().item()),
        }

    def state(self) -> dict[str, Tensor]:
        """Give what a checkpoint must hold."""
        return {"codes": self.codes, "counts": self.counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what state() gave."""
        self.codes = state["codes"].to(self.codes.device)
        self.counts = state["counts"].to(self.counts.device)


def shrink_factor(patch_size: int) -> int:
    """Find the smallest factor that divides a patch's side and leaves at most LARGEST_SIDE pixels of it."""
    factor = math.ceil(patch_size / LARGEST_SIDE)
    while patch_size % factor:
        factor += 1
    return factor


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Find the unit code with the greatest cosine to each of rows [M, d] -> int64 [M]; the first among equals."""
    with single_precision():
        parts = [(part @ codes.T).argmax(1) for part in rows.split(ROWS)]
    return torch.cat(parts)


def spherical_kmeans(patches: Tensor, codes: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Move unit codes [V, d] to the directions of the sums of the unit patches [M, d] nearest to them -> [V, d].

    A code that is nearest to none stays where it is.
    """
    patches = F.normalize(patches, dim=1)
    numbers = torch.arange(len(codes), device=codes.device)
    for _ in range(iterations):
        sums = torch.zeros_like(codes)
        for part in patches.split(ROWS):
            # A product instead of index_add, whose order of summation differs from run to run on a GPU.
            members = nearest_codes(part, codes) == numbers[:, None]
            with single_precision():
                sums += members.float() @ part
        lengths = sums.norm(dim=1, keepdim=True)
        codes = torch.where(lengths > 0, sums / lengths.clamp_min(1e-12), codes)
    return codes


class Sample(NamedTuple):
    """How many views of training images are looked at, and how many patches of each."""

    views: int
    patches: int

    @staticmethod
    def of(tokenizer: Tokenizer, images: int, patches: int) -> "Sample":
        """Choose as many views as tokens, or as there are images if these are fewer; patches: those of a view.

        Of few images there are several views each, up to MOST_REPEATED: the codes' own patches alone would be counted as
        uniform.
        """
        vocabulary = tokenizer.vocabulary
        wanted = vocabulary * (CLUSTERED if tokenizer.kind == "kmeans" else COUNTED)
        repeated = min(math.ceil(wanted / patches), MOST_REPEATED)
        views = max(min(vocabulary, images), math.ceil(vocabulary / patches), repeated)
        return Sample(views, min(patches, math.ceil(wanted / views)))


@torch.no_grad()
def training_views(tokenizer: Tokenizer, batches: TrainBatches, num_patches: int, dist: Distributed) -> Tensor:
    """Cut random patches out of augmented training images, each of num_patches -> [n, K, d] on the device, see `Sample`.

    Every process looks at the same views, whatever its share of the batches.
    """
    images = len(batches.examples.images)
    sample = Sample.of(tokenizer, images, num_patches)
    size = min(VIEWS_AT_A_TIME, sample.views, images)
    place = Alone(dist.device)
    alone = TrainBatches(batches.examples, batches.augmentation, batch_size=size, seed=batches.seed, dist=place)
    steps = math.ceil(sample.views / size)
    found = []
    with Progress("looking at patches", steps, unit="batch", quiet=not dist.is_main) as progress:
        for step, (batch,) in enumerate(alone.run(0, steps)):
            patches = tokenizer.patches(batch["images"])
            noise = seeded_rng(tokenizer.seed, PLACE_STREAM, step).random((size, num_patches))
            places = np.argsort(noise, axis=1)[:, : sample.patches]
            found.append(take_rows(patches, torch.from_numpy(places).to(dist.device)))
            progress.update(1)
    return torch.cat(found)[: sample.views]


def make_tokenizer(args: argparse.Namespace, patch_size: int, device: torch.device) -> Tokenizer:
    """Make the tokeniser that the flags ask for."""
    return Tokenizer(args.tokenizer, args.vocabulary, patch_size, args.seed, device)
