"""Objective `tokens`: predict the tokens of hidden patches, as BEiT does, with tokenisers that need no other training.

    python pretrain.py --objective tokens                                                   # patches as tokens
    python pretrain.py --objective tokens --tokenizer kmeans
    python pretrain.py --objective tokens --model mae_demo --img_size 64 --vocabulary 512   # small images

BEiT (Bao et al. 2021) on a plain ViT: blocks of patches are hidden, each hidden patch enters the encoder as one learned
embedding with its position, and the encoder's features there predict the patch's token by one linear layer. Tokens come from
pixels (El-Nouby et al. 2021, see tokenizers.py). Two deviations from BEiT, so that encoders of all objectives can be
compared: fixed sine-cosine positions instead of learned biases of the attention, and no layer scale. The recipe is BEiT's at
this study's batch, untuned: rate 1.9e-4 (1.5e-3 at a batch of 2048), gradients clipped at 3.

Chance is not 1 / vocabulary: some tokens are frequent, and a hidden patch often has that of the nearest visible one.
metrics.json has the statistics of the tokens, and what two predictors reach that know no more than this.
"""

import argparse
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches import Draw, TrainBatches
from engine import Distributed, Parser, fraction
from models import ViT, encoder_sizes, matrix_product_flops, patchify, take_rows
from objective import block_activations, mean_scores, sum_over
from objectives.masks import Grid, count_hidden, hidden_patches
from objectives.tokenizers import add_tokenizer_arguments, make_tokenizer, training_views
from pretraining import Pretraining
from runs import RunFolder

MIXTURES = 100  # weights of the copied token that are tried, from 0 to 0.99


class TokenPredictor(ViT):
    """ViT encoder that sees an embedding in the place of hidden patches, and one linear layer that predicts their tokens.

    num_hidden: patches of an image that mask_ratio hides. sizes: arguments of `ViT`. ValueError for a ratio that hides none
    or all of them.
    """

    fresh_keys = ("mask_token", "head.")

    def __init__(self, vocabulary: int, mask_ratio: float, **sizes: object) -> None:
        super().__init__(**sizes)
        self.num_hidden = count_hidden(self.num_patches, mask_ratio)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.head = nn.Linear(self.embed_dim, vocabulary)
        nn.init.normal_(self.mask_token, std=0.02)
        init_head(self.head)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Predict the tokens of the patches hidden [B, K] of images [B, 3, H, W] -> logits [B, K, V]."""
        embedded = self.patch_embed(patchify(images, self.patch_size))
        is_hidden = as_mask(hidden, self.num_patches)
        embedded = torch.where(is_hidden[..., None], self.mask_token.to(embedded.dtype), embedded)
        features = self.norm(self.forward_embedded(embedded))
        return self.head(take_rows(features[:, 1:], hidden))

    def head_flops(self, tokens: int) -> float:
        return matrix_product_flops(self.head, self.num_hidden)


def init_head(head: nn.Linear) -> None:
    """Initialise a layer that predicts tokens with the deviation of BEiT."""
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)


def as_mask(ids: Tensor, patches: int) -> Tensor:
    """Turn the ids [B, K] of patches into truth values [B, L], True at each of them."""
    nowhere = torch.zeros(len(ids), patches, dtype=torch.bool, device=ids.device)
    return nowhere.scatter(1, ids, True)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the mean cross-entropy of logits [B, K, V] against tokens [B, K], in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def token_scores(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Score the predictions of each image: cross-entropy and share of right tokens, each [B]; see `token_loss`."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
    hits = logits.argmax(-1) == tokens
    return {"loss": losses.view(tokens.shape).mean(1), "accuracy": hits.double().mean(1)}


# -- Predictors that any training must beat -----------------------------------------------------------------------------


def nearest_visible(hidden: Tensor, grid: Grid) -> Tensor:
    """Find for each hidden patch [B, K] the nearest visible one, the first among equals -> ids [B, K]."""
    rows, columns = grid
    place = torch.arange(rows * columns, device=hidden.device)
    row = place // columns
    column = place % columns
    squares = (row - row[:, None]) ** 2 + (column - column[:, None]) ** 2
    distances = F.embedding(hidden, squares.float())  # [B, K, L]
    is_hidden = as_mask(hidden, rows * columns)
    return distances.masked_fill(is_hidden[:, None], math.inf).argmin(-1)


def score_unigram(tokens: Tensor, unigram: Tensor) -> dict[str, float]:
    """Score how often each token occurs (logarithms [V]) as the prediction of all tokens [N, K]."""
    hits = tokens == unigram.argmax()
    return {"loss": -unigram[tokens].mean().item(), "accuracy": hits.double().mean().item()}


def score_copies(tokens: Tensor, copies: Tensor, unigram: Tensor) -> dict[str, float]:
    """Score the best mixture of copying a token [N, K] and of `unigram` (logarithms [V]) as the prediction of tokens [N, K].

    Its one weight is the best one for these very tokens, which favours it over what was trained on other images.
    """
    is_copied = (tokens == copies).double()
    probabilities = unigram.exp()
    by_itself = probabilities[tokens]
    best = {"loss": math.inf, "accuracy": 0.0}
    for number in range(MIXTURES):
        weight = number / MIXTURES
        loss = -(weight * is_copied + (1 - weight) * by_itself).log().mean().item()
        if loss >= best["loss"]:
            continue
        takes_copy = weight + (1 - weight) * probabilities[copies] >= (1 - weight) * probabilities.max()
        predicted = torch.where(takes_copy, copies, unigram.argmax())
        best = {"loss": loss, "accuracy": (predicted == tokens).double().mean().item()}
    return best


# -- The objective ------------------------------------------------------------------------------------------------------


def name_scores(words: dict[str, str], lists: Iterable[str] = ("animal", "non_animal")) -> dict[str, str]:
    """Name the scores of each validation list: score of a list -> words for the report."""
    named = {}
    for score, meaning in words.items():
        for name in lists:
            named[f"{score}_{name}"] = f"{meaning}, {name.replace('_', '-')} images"
    return named


class Tokens(Pretraining):
    """Predict the tokens of hidden patches from the visible ones (BEiT)."""

    name = "tokens"
    meters = True
    words = {"loss": "cross-entropy of hidden tokens", "accuracy": "accuracy of hidden tokens"}
    scores = name_scores(words)
    recordable = True

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        """Add the flags of the tokeniser and of the mask."""
        parser.set_defaults(blr=1.9e-4, clip_grad=3.0)
        add_tokenizer_arguments(parser)
        recipe = parser.flags("objective", role="recipe")
        recipe("--mask_ratio", type=fraction, default=0.383, help="share of patches hidden in blocks; BEiT: 75 of 196")

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        super().__init__(args, dist)
        self.tokenizer = make_tokenizer(args, self.model.patch_size, dist.device)

    def build_model(self) -> nn.Module:
        sizes = encoder_sizes(self.args.model)
        return TokenPredictor(self.args.vocabulary, self.args.mask_ratio, img_size=self.args.img_size, **sizes)

    def score_names(self) -> dict[str, str]:
        return name_scores(self.words, self.held_out)

    def draws(self) -> dict[str, Draw]:
        return {"hidden": hidden_patches(self.model.grid, self.model.num_hidden)}

    def flops(self) -> float:
        return self.model.flops(training=True) + self.tokenizer.flops(self.model.num_hidden)

    def activation_values(self) -> int:
        blocks = block_activations(self.model.blocks, self.model.num_patches + 1)
        logits = self.model.num_hidden * self.args.vocabulary
        return blocks + 3 * logits  # a softmax in float32 besides them

    def open(self, run: RunFolder) -> TrainBatches:
        batches = super().open(run)
        views = training_views(self.tokenizer, batches, self.model.num_patches, self.dist)
        self.tokenizer.fit(views)
        self.tokenizer.share(self.dist)
        if self.dist.is_main:
            print(self.describe_tokens(), flush=True)
        return batches

    def describe_tokens(self) -> str:
        """Say how evenly the tokens are used."""
        found = self.tokenizer.statistics()
        used = f"{found['used']:,} of {self.tokenizer.vocabulary:,} used"
        top = f"the most frequent names {100 * found['top_share']:.1f} % of patches"
        return f"tokens ({self.args.tokenizer}): perplexity {found['perplexity']:.1f}, {used}, {top}"

    def findings(self) -> dict:
        return {"tokens": self.tokenizer.statistics()}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        tokens = self.tokenizer(batch["images"], batch["hidden"])
        return token_loss(network(batch["images"], batch["hidden"]), tokens)

    def score_validation(self, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Score the predictions of each list of validation images, each image once."""
        scores = {}
        for name in self.stores:
            found = self.score_list(name, stopping)
            if found is None:
                return None
            for score, value in found.items():
                scores[f"{score}_{name}"] = value
        return scores

    def score_list(self, name: str, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Average the scores over the images of a list; None if a process was to stop meanwhile."""
        batches = self.eval_batches(self.stores[name], self.targets[name], self.validation_batch_size)
        return mean_scores(batches, self.score_images, self.words, self.dist, stopping)

    def score_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Score the predictions of each image of a batch -> name -> [b]."""
        tokens = self.tokenizer(batch["images"], batch["hidden"])
        return token_scores(self.scoring_network(batch["images"], batch["hidden"]), tokens)

    def state(self) -> dict:
        return {"tokenizer": self.tokenizer.state()}

    def load_state(self, state: dict) -> None:
        self.tokenizer.load_state(state["tokenizer"])

    def finish(self) -> dict:
        """Score what knows the tokens' frequencies alone, and what also sees the nearest visible token."""
        trivial: dict[str, dict[str, float]] = {}
        for name in self.stores:
            for predictor, scores in self.score_trivial(name).items():
                of_predictor = trivial.setdefault(predictor, {})
                for score, value in scores.items():
                    of_predictor[f"{score}_{name}"] = value
        return {"trivial": trivial, **self.findings()}

    def score_trivial(self, name: str) -> dict[str, dict[str, float]]:
        """Score the trivial predictors on a list of validation images: predictor -> scores."""
        tokens = self.tokens_of(name)
        unigram = self.tokenizer.unigram()
        wanted = []
        copies = []
        for hidden in self.hidden_parts(self.targets[name]):
            wanted.append(tokens.gather(1, hidden))
            copies.append(tokens.gather(1, nearest_visible(hidden, self.model.grid)))
        wanted = torch.cat(wanted, dim=1)
        copies = torch.cat(copies, dim=1)
        return {"unigram": score_unigram(wanted, unigram), "copy mixture": score_copies(wanted, copies, unigram)}

    def hidden_parts(self, targets: dict[str, Tensor]) -> list[Tensor]:
        """List the patches [N, K] that are predicted from all others; several where an image is predicted in parts."""
        return [targets["hidden"]]

    def tokens_of(self, name: str) -> Tensor:
        """Compute all tokens of a list of validation images -> int64 [N, L] in its order."""
        store = self.stores[name]
        shape = (len(store), self.model.num_patches)
        nothing = torch.zeros(shape, dtype=torch.int64, device=self.dist.device)

        def find(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"tokens": nothing.index_copy(0, batch["index"], self.tokenizer(batch["images"]))}

        batches = self.eval_batches(store, {}, self.validation_batch_size)
        sums = sum_over(batches, find, {"tokens": nothing.clone()}, self.dist, stopping=lambda: False)
        return sums["tokens"]

    def export(self, weights: dict[str, Tensor]) -> dict:
        codes = self.tokenizer.codes.cpu()
        return {**super().export(weights), "tokenizer": {"kind": self.args.tokenizer, "codes": codes}}
