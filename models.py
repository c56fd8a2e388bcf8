"""Vision Transformers: encoder, Masked Autoencoder, segmenters and classifiers, and ResNet-50 baselines, in plain PyTorch.

    model = build_mae("mae_base", img_size=224)                        # He et al., Table 1: 111.9 M parameters
    loss, pred, mask = model(images, mask_ratio=0.75)                  # images: [B, 3, 224, 224], normalised
    logits = build_segmenter("mae_base", num_classes=3)(images)        # [B, 3, 224, 224]
    features = build_vit("mae_base")(images)                           # [B, 197, 768], class token first

This file can be copied alone. The architecture is that of He et al., "Masked Autoencoders Are Scalable Vision Learners"
(2021), with the state-dict keys of facebookresearch/mae, so published weights load; the code is written independently
(theirs is CC-BY-NC). Shapes: B images, C channels, H x W pixels, p patch size, L patches, K of them, N tokens (L + 1 with
the class token), D features. Layers:

    ViT                     encoder; alone, it computes features
      MaskedAutoencoder     + decoder: pre-training
        MAESegmenter        the same network without masking: one class per pixel
      LinearSegmenter       + one linear layer per patch: one class per pixel
      Classifier            + one linear layer per image: one class per image
    ResNet50Segmenter, ResNet50Classifier

The networks that are fine-tuned share one call, `network(images, drop_path=None) -> logits`, and the attributes `img_size`
(height, width), `num_classes` and `fresh_keys`: prefixes of the state-dict keys that are never taken from a checkpoint.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Named sizes. mae_base, mae_large and mae_huge are those of He et al.; mae_demo is for images of 64 pixels on CPUs, where
# small patches matter more than width; mae_tiny is for tests.
MODELS = {
    "mae_demo": {
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 2,
        "decoder_embed_dim": 64,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "mae_tiny": {
        "embed_dim": 192,
        "depth": 4,
        "num_heads": 3,
        "decoder_embed_dim": 128,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
    },
    "mae_small": {
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "decoder_embed_dim": 256,
        "decoder_depth": 4,
        "decoder_num_heads": 8,
    },
    "mae_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "mae_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "mae_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}

# ---------------------------------------------------------------------------------------------------------------------
# Patches and positions


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images [B, C, H, W] into flattened patches [B, L, p*p*C], row by row, channels last within a patch."""
    B, C, H, W = images.shape
    p = patch_size
    patches = images.reshape(B, C, H // p, p, W // p, p)
    patches = patches.permute(0, 2, 4, 3, 5, 1)  # [B, H/p, W/p, p, p, C]
    return patches.reshape(B, -1, p * p * C)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Put patches [B, L, p*p*C] back together to images [B, C, H, W]; grid = (H / p, W / p)."""
    B = patches.shape[0]
    p = patch_size
    rows, columns = grid
    images = patches.reshape(B, rows, columns, p, p, -1)
    images = images.permute(0, 5, 1, 3, 2, 4)  # [B, C, H/p, p, W/p, p]
    return images.reshape(B, -1, rows * p, columns * p)


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """Compute fixed 2-D sine-cosine position embeddings [1, 1 + L, D].

    The class token's row is zero. Of the others, the first half of the features encodes the column, the second the row.
    Raises ValueError unless dim is divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"embed_dim must be divisible by 4 for 2-D sine-cosine positions, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    coordinates = torch.stack([columns.flatten(), rows.flatten()])  # [2, L]
    angles = coordinates[..., None] * omega  # [2, L, D/4]
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    table = table.permute(1, 0, 2).flatten(1)  # [L, D]
    cls_row = torch.zeros(1, dim)
    return torch.cat([cls_row, table.float()])[None]


def interpolate_pos_embed(pos_embed: torch.Tensor, source: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Resize position embeddings [1, 1 + L, D] from one patch grid to another (bicubic); the class token's row is kept."""
    cls_row = pos_embed[:, :1].float()
    table = pos_embed[:, 1:].float()
    table = table.reshape(1, *source, -1).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    table = F.interpolate(table, size=target, mode="bicubic", align_corners=False)
    table = table.permute(0, 2, 3, 1).flatten(1, 2)  # [1, L, D]
    return torch.cat([cls_row, table], dim=1).to(pos_embed.dtype)


def take_rows(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Select rows ids [B, K] of x [B, L, D] -> [B, K, D]."""
    B, L, D = x.shape
    # One index_select on contiguous rows is faster than gather with an expanded index.
    offsets = torch.arange(B, device=ids.device)[:, None] * L
    flat_ids = (ids + offsets).flatten()
    return x.reshape(B * L, D).index_select(0, flat_ids).view(B, -1, D)


def as_image_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of an image size that is given as one number or as a pair."""
    if isinstance(img_size, int):
        return img_size, img_size
    height, width = img_size
    return height, width


# ---------------------------------------------------------------------------------------------------------------------
# Transformer blocks


class PatchEmbed(nn.Module):
    """Linear embedding of flattened patches [B, K, p*p*C] -> [B, K, D], stored as the convolution of every public ViT.

    Applied as a matrix product, so that only the visible patches are embedded.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as in `patchify`
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape [B, N, D] -> [B, heads, N, D/heads]."""
        B, N, _ = x.shape
        return x.view(B, N, self.num_heads, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Attend from the tokens of x [B, N, D] from number `first` on to all of them -> [B, N - first, D]."""
        if first == 0:
            # Three chunks instead of one permuted view: the backward pass then writes the gradient in its final layout.
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.fewer_queries(x, first)
        attended = F.scaled_dot_product_attention(self.split_heads(q), self.split_heads(k), self.split_heads(v))
        return self.proj(attended.transpose(1, 2).flatten(2))

    def fewer_queries(self, x: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute queries [B, N - first, D] of the tokens from number `first` on, keys and values [B, N, D] of all."""
        D = x.shape[-1]
        query_weight, other_weight = self.qkv.weight.split([D, 2 * D])
        query_bias, other_bias = self.qkv.bias.split([D, 2 * D])
        q = F.linear(x[:, first:], query_weight, query_bias)
        k, v = F.linear(x, other_weight, other_bias).chunk(2, dim=-1)
        return q, k, v


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on [B, N, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on [B, N, D]."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        """Transform x [B, N, D] -> [B, N - first, D].

        scale [B, 2]: factors of the two residual branches (stochastic depth). first: only the tokens from this number on
        are computed; the others serve as keys and values.
        """
        attended = self.attn(self.norm1(x), first)
        if scale is not None:
            attended = attended * scale[:, 0, None, None]
        x = x[:, first:] + attended
        transformed = self.mlp(self.norm2(x))
        if scale is not None:
            transformed = transformed * scale[:, 1, None, None]
        return x + transformed


def make_blocks(depth: int, dim: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    """Stack `depth` transformer blocks."""
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))


def init_weights(module: nn.Module) -> None:
    """Initialise as facebookresearch/mae does: xavier-uniform weights (the patch projection as a matrix), zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


def drop_path_rates(highest: float, depth: int) -> torch.Tensor:
    """Compute the stochastic-depth rate of each block [depth], growing linearly from 0 to `highest`, in [0, 1)."""
    if not 0 <= highest < 1:
        raise ValueError(f"drop_path must lie in [0, 1), got {highest}")
    return torch.linspace(0, highest, depth)


def drop_path_scales(draws: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Turn uniform draws [B, depth, 2] into factors [depth, B, 2]: 0 with probability rates[i], else 1 / (1 - rates[i])."""
    rates = rates[None, :, None]
    kept = (draws >= rates).to(draws.dtype)
    return (kept / (1 - rates)).transpose(0, 1)


def matrix_product_flops(module: nn.Module, tokens: int) -> int:
    """Count the operations of a module's matrix products on a sequence of tokens, 2 per multiply-add."""
    weights = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    attended = sum(m.proj.in_features for m in module.modules() if isinstance(m, Attention))
    return 2 * tokens * weights + 4 * tokens**2 * attended


# ---------------------------------------------------------------------------------------------------------------------
# Encoder


class ViT(nn.Module):
    """Vision Transformer encoder with fixed sine-cosine positions (Dosovitskiy et al. 2021; He et al. 2021).

    img_size: height and width in pixels, one number or a pair, divisible by patch_size. drop_path: stochastic depth of the
    last block, in [0, 1), growing linearly from 0 at the first. initialize: False leaves PyTorch's initial values; a
    subclass passes it, adds its layers and then calls `initialize_weights` once.
    """

    fresh_keys: tuple[str, ...] = ()

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        height, width = as_image_size(img_size)
        if height % patch_size or width % patch_size or min(height, width) < patch_size:
            problem = f"img_size {height} x {width} is not divisible by patch_size {patch_size}"
            raise ValueError(f"{problem}; use a multiple of it, as {max(1, round(height / patch_size)) * patch_size}")
        self.img_size = (height, width)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.grid = (height // patch_size, width // patch_size)

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid), requires_grad=False)
        self.blocks = make_blocks(depth, embed_dim, num_heads, mlp_ratio)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        # Without stochastic depth there is no buffer, which DistributedDataParallel would broadcast at every step.
        drop_rates = drop_path_rates(drop_path, depth)
        self.register_buffer("drop_rates", drop_rates if drop_path > 0 else None, persistent=False)
        if initialize:
            self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise every layer as facebookresearch/mae does."""
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    @property
    def num_patches(self) -> int:
        """Number of patches L of an image."""
        return self.grid[0] * self.grid[1]

    def num_visible(self, mask_ratio: float) -> int:
        """Count the patches of an image that stay visible at a mask ratio in [0, 1). Raises ValueError if none does."""
        visible = int(self.num_patches * (1 - mask_ratio))
        if not 0 <= mask_ratio < 1 or visible == 0:
            raise ValueError(f"mask_ratio must lie in [0, 1) and leave a patch visible, got {mask_ratio}")
        return visible

    def forward(self, images: torch.Tensor, drop_path: torch.Tensor | None = None) -> torch.Tensor:
        """Encode images [B, C, H, W] -> normalised features [B, 1 + L, D], class token first; see `forward_features`."""
        return self.forward_features(images, drop_path)

    def forward_features(self, images: torch.Tensor, drop_path: torch.Tensor | None = None) -> torch.Tensor:
        """Encode all patches of images [B, C, H, W] -> [B, 1 + L, D].

        drop_path: uniform draws [B, depth, 2] that decide which residual branches are dropped; None: no branch.
        """
        return self.forward_encoder(patchify(images, self.patch_size), drop_path=self.branch_scales(drop_path))

    def branch_scales(self, draws: torch.Tensor | None) -> torch.Tensor | None:
        """Turn uniform draws [B, depth, 2] into the factors of `forward_encoder`; None: no branch is dropped."""
        if draws is None or self.drop_rates is None:
            return None
        return drop_path_scales(draws, self.drop_rates)

    def forward_encoder(
        self,
        patches: torch.Tensor,
        ids: torch.Tensor | None = None,
        drop_path: torch.Tensor | None = None,
        pos_embed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode patches [B, K, p*p*C] at positions ids [B, K] (None: all, in image order) -> [B, 1 + K, D].

        drop_path: factors of the residual branches [depth, B, 2], see `drop_path_scales`; None: all are 1. pos_embed:
        positions [1, 1 + L, D] of images of another size, see `interpolate_pos_embed`; None: the network's own.
        """
        return self.norm(self.forward_blocks(patches, ids, drop_path, pos_embed))

    def forward_blocks(
        self,
        patches: torch.Tensor,
        ids: torch.Tensor | None = None,
        drop_path: torch.Tensor | None = None,
        pos_embed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode as `forward_encoder` does, without the last normalisation."""
        return self.forward_embedded(self.patch_embed(patches), ids, drop_path, pos_embed)

    def forward_embedded(
        self,
        x: torch.Tensor,
        ids: torch.Tensor | None = None,
        drop_path: torch.Tensor | None = None,
        pos_embed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode patches that are embedded already, x [B, K, D], as `forward_blocks` does."""
        if pos_embed is None:
            pos_embed = self.pos_embed
        positions = pos_embed[:, 1:]
        if ids is not None:
            positions = F.embedding(ids, positions[0])
        x = x + positions
        cls_token = (self.cls_token + pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)
        for i, block in enumerate(self.blocks):
            if drop_path is None:
                x = block(x)
            else:
                x = block(x, drop_path[i])
        return x

    def flops(self, training: bool = True, mask_ratio: float = 0.0) -> float:
        """Count floating-point operations per image, 2 per multiply-add, matrix products only.

        The reference formulation is counted (all patches embedded), so that rates compare with other code. training: add
        the backward pass, which costs twice the forward pass, less the gradient of the input pixels.
        """
        tokens = self.num_visible(mask_ratio) + 1
        embedding = matrix_product_flops(self.patch_embed, self.num_patches)
        forward = embedding + matrix_product_flops(self.blocks, tokens) + self.head_flops(tokens)
        if training:
            return 3 * forward - embedding
        return forward

    def head_flops(self, tokens: int) -> float:
        """Count the forward operations of the layers that follow the encoder, which returns `tokens` tokens an image."""
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training


class MaskedAutoencoder(ViT):
    """Masked Autoencoder with a ViT encoder on the visible patches and a light ViT decoder (He et al. 2021, section 3).

    norm_pix_loss: regress pixels normalised by each patch's own mean and variance (He et al., Table 1d). out_chans: channels
    that the decoder predicts per pixel, default in_chans. The other arguments are those of `ViT`; drop_path acts in
    `forward_features` only.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = True,
        out_chans: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, drop_path, initialize=False
        )
        if out_chans is None:
            out_chans = in_chans
        self.norm_pix_loss = norm_pix_loss

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_embed_dim, self.grid), requires_grad=False)
        self.decoder_blocks = make_blocks(decoder_depth, decoder_embed_dim, decoder_num_heads, mlp_ratio)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * out_chans)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise every layer as facebookresearch/mae does."""
        super().initialize_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: torch.Tensor,
        mask_ratio: float = 0.75,
        noise: torch.Tensor | None = None,
        loss_only: bool = False,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mask, encode, decode and score images [B, C, H, W] -> (loss, pred [B, L, p*p*C] in image order, mask [B, L]).

        noise [B, L] in [0, 1) fixes the masking: the patches of lowest noise stay visible (mask 0), ties broken by position.
        The loss is the mean squared error over the masked patches, over all of them at mask_ratio 0. loss_only: give the
        loss alone, as training does; what only the visible patches' predictions need is then not computed. targets: images
        [B, C, H, W] whose patches are to be predicted, by default `images`.
        """
        patches = patchify(images, self.patch_size)
        wanted = patches if targets is None else patchify(targets, self.patch_size)
        B, L, _ = patches.shape
        visible = self.num_visible(mask_ratio)
        if visible == L:
            loss, pred, mask = self.forward_unmasked(patches, wanted)
            return loss if loss_only else (loss, pred, mask)
        if noise is None:
            noise = torch.rand(B, L, device=images.device)
        order = torch.argsort(noise, dim=1, stable=True)  # [B, L], visible patches first
        visible_ids = order[:, :visible]
        masked = take_rows(wanted, order[:, visible:])
        latent = self.forward_encoder(take_rows(patches, visible_ids), visible_ids)
        # Self-attention is permutation-equivariant, so the decoder runs on the shuffled sequence: its features need no
        # unshuffling, and the masked patches, the only ones in the loss, are one slice.
        if loss_only:
            return self.forward_loss(masked, self.forward_decoder(latent, order, masked_only=True))
        pred = self.forward_decoder(latent, order)
        loss = self.forward_loss(masked, pred[:, visible:])
        restore = torch.argsort(order, dim=1)
        mask = (restore >= visible).to(images.dtype)
        return loss, take_rows(pred, restore), mask

    def forward_unmasked(
        self, patches: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict all patches `wanted` from all of `patches`, both [B, L, p*p*C] -> (loss, pred, mask) as `forward` does."""
        pred = self.forward_decoder(self.forward_encoder(patches))
        loss = self.forward_loss(wanted, pred)
        # The mask token takes no part, but DistributedDataParallel waits for the gradient of every parameter.
        loss = loss + 0 * self.mask_token.sum()
        return loss, pred, patches.new_zeros(patches.shape[:2])

    def forward_decoder(
        self, latent: torch.Tensor, order: torch.Tensor | None = None, masked_only: bool = False
    ) -> torch.Tensor:
        """Decode [B, 1 + K, D] -> [B, L, p*p*C]; masked positions are order[:, K:], and the output follows `order`.

        masked_only: give the masked patches alone [B, L - K, p*p*C]. In the last block, the other tokens then serve as keys
        and values only.
        """
        x = self.decoder_embed(latent)
        positions = self.decoder_pos_embed
        if order is not None:
            num_masked = order.shape[1] + 1 - x.shape[1]
            mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], num_masked, -1)
            x = torch.cat([x, mask_tokens], dim=1)
            rows = F.pad(order + 1, (1, 0))  # row 0 belongs to the class token
            positions = F.embedding(rows, positions[0])
        x = x + positions
        first = latent.shape[1] if masked_only else 1  # the token that the first prediction comes from
        asked = x.shape[1] - first
        last = len(self.decoder_blocks) - 1
        for i, block in enumerate(self.decoder_blocks):
            if masked_only and i == last:
                x = block(x, first=first)
            else:
                x = block(x)
        return self.decoder_pred(self.decoder_norm(x)[:, -asked:])

    def forward_loss(self, patches: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        """Compute the mean squared error of pred [B, K, p*p*C] against the pixels of patches [B, K, p*p*C] in float32."""
        target = patches.float()
        if self.norm_pix_loss:
            mean, std = self.patch_statistics(target)
            target = (target - mean) / std
        return F.mse_loss(pred.float(), target)

    @staticmethod
    def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute mean and standard deviation of each patch [B, K, p*p*C] -> two [B, K, 1].

        The variance is the unbiased one plus 1e-6.
        """
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()

    @torch.no_grad()
    def reconstruct(
        self, images: torch.Tensor, mask_ratio: float = 0.75, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruct images [B, C, H, W] -> (masked input, reconstruction), both [B, C, H, W] in the images' own units.

        Masked pixels of the input are 0 (grey, when images are normalised). The reconstruction keeps the visible patches
        and fills in predicted ones; a prediction of normalised pixels is put back by each patch's own statistics.
        """
        _, pred, mask = self(images, mask_ratio, noise)
        patches = patchify(images, self.patch_size).float()
        pred = pred.float()
        mask = mask[..., None]
        if self.norm_pix_loss:
            mean, std = self.patch_statistics(patches)
            pred = pred * std + mean
        masked = patches * (1 - mask)
        filled = masked + pred * mask
        return unpatchify(masked, self.patch_size, self.grid), unpatchify(filled, self.patch_size, self.grid)

    def head_flops(self, tokens: int) -> float:
        decoder_tokens = self.num_patches + 1
        embedding = matrix_product_flops(self.decoder_embed, tokens)
        blocks = matrix_product_flops(self.decoder_blocks, decoder_tokens)
        return embedding + blocks + matrix_product_flops(self.decoder_pred, decoder_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning

# How the images that a network takes are scaled.
INPUTS = {
    "imagenet": "zero mean and unit variance over ImageNet",
    "unit": "0 to 1, as the study's code fine-tunes although it pre-trains on normalised images",
}


def check_inputs(inputs: str) -> str:
    """Give the name of a scaling back; ValueError if it is none of INPUTS."""
    if inputs not in INPUTS:
        raise ValueError(f"inputs must be one of {', '.join(INPUTS)}, got {inputs!r}")
    return inputs


class MAESegmenter(MaskedAutoencoder):
    """Masked Autoencoder without masking, whose decoder predicts num_classes per pixel (the study, section 2.1).

    With 3 classes the last layer has the key and the shape of the pixel predictor, so it is named in `fresh_keys`. Position
    embeddings are trained.
    output: "unpatchify" puts each token's logits where its patch is; "reshape" reads the tokens' numbers as the flat class
    planes [num_classes, H, W], as the study's code does, so that a token's logits fall on three and a half image rows of
    one class. inputs: how images must be scaled, see INPUTS; kept for whoever loads the network. sizes: further arguments
    of `MaskedAutoencoder`.
    """

    fresh_keys = ("decoder_pred.",)

    def __init__(
        self,
        num_classes: int = 3,
        drop_path: float = 0.0,
        output: str = "unpatchify",
        inputs: str = "imagenet",
        **sizes: Any,
    ) -> None:
        if output not in ("unpatchify", "reshape"):
            raise ValueError(f"output must be unpatchify or reshape, got {output!r}")
        super().__init__(out_chans=num_classes, drop_path=drop_path, **sizes)
        self.num_classes = num_classes
        self.output = output
        self.inputs = check_inputs(inputs)
        self.pos_embed.requires_grad = True
        self.decoder_pos_embed.requires_grad = True
        self.mask_token.requires_grad = False  # unused without masking; kept for its key
        # Segmenters once replaced the pixel predictor by a new layer. Drawing the layer a second time takes the same
        # numbers from the random stream, so a seed still gives the initial weights of recorded runs.
        self.decoder_pred.reset_parameters()
        init_weights(self.decoder_pred)

    def forward(self, images: torch.Tensor, drop_path: torch.Tensor | None = None) -> torch.Tensor:
        """Predict class logits [B, num_classes, H, W] of images [B, C, H, W]; drop_path: see `forward_features`."""
        latent = self.forward_features(images, drop_path)
        logits = self.forward_decoder(latent)
        if self.output == "reshape":
            return logits.reshape(len(images), self.num_classes, *self.img_size)
        return unpatchify(logits, self.patch_size, self.grid)


class LinearSegmenter(ViT):
    """ViT encoder and one linear layer that predicts num_classes for each pixel of a patch from the patch's features.

    Its layer has the key of the Masked Autoencoder's pixel predictor. Position embeddings are trained, unless the caller
    freezes the encoder. inputs: see `MAESegmenter`. sizes: further arguments of `ViT`.
    """

    fresh_keys = ("decoder_pred.",)

    def __init__(self, num_classes: int = 3, drop_path: float = 0.0, inputs: str = "imagenet", **sizes: Any) -> None:
        super().__init__(drop_path=drop_path, **sizes)
        self.num_classes = num_classes
        self.inputs = check_inputs(inputs)
        self.pos_embed.requires_grad = True
        self.decoder_pred = nn.Linear(self.embed_dim, self.patch_size**2 * num_classes)
        init_weights(self.decoder_pred)

    def forward(self, images: torch.Tensor, drop_path: torch.Tensor | None = None) -> torch.Tensor:
        """Predict class logits [B, num_classes, H, W] of images [B, C, H, W]; drop_path: see `forward_features`."""
        features = self.forward_features(images, drop_path)
        return unpatchify(self.decoder_pred(features[:, 1:]), self.patch_size, self.grid)

    def head_flops(self, tokens: int) -> float:
        return matrix_product_flops(self.decoder_pred, tokens)  # the class token is counted, as for `MAESegmenter`


class Classifier(ViT):
    """ViT encoder and one linear layer that predicts num_classes for an image.

    pooling: "mean" averages the patch tokens of the last block and normalises the average with a layer of its own, as
    facebookresearch/mae fine-tunes (global_pool); "cls" takes the normalised class token. Position embeddings are trained.
    sizes: further arguments of `ViT`.
    """

    fresh_keys = ("head.", "fc_norm.")

    def __init__(self, num_classes: int, pooling: str = "mean", drop_path: float = 0.0, **sizes: Any) -> None:
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be mean or cls, got {pooling!r}")
        super().__init__(drop_path=drop_path, **sizes)
        self.num_classes = num_classes
        self.pooling = pooling
        self.pos_embed.requires_grad = True
        if pooling == "mean":
            self.fc_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
            self.norm.requires_grad_(False)  # unused; kept for its keys
        self.head = nn.Linear(self.embed_dim, num_classes)
        init_weights(self.head)

    def forward(self, images: torch.Tensor, drop_path: torch.Tensor | None = None) -> torch.Tensor:
        """Predict class logits [B, num_classes] of images [B, C, H, W]; drop_path: see `forward_features`."""
        tokens = self.forward_blocks(patchify(images, self.patch_size), drop_path=self.branch_scales(drop_path))
        return self.head(self.pool(tokens))

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reduce tokens [B, 1 + L, D] of the last block to one normalised vector per image [B, D]."""
        if self.pooling == "cls":
            return self.norm(tokens[:, 0])
        return self.fc_norm(tokens[:, 1:].mean(dim=1))

    def head_flops(self, tokens: int) -> float:
        return matrix_product_flops(self.head, 1)


# ---------------------------------------------------------------------------------------------------------------------
# ResNet-50


class Bottleneck(nn.Module):
    """A residual block of three convolutions, the second of which takes the stride, as in torchvision."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential()  # the identity
        if in_channels != out_channels:
            self.downsample.append(nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features [B, C, H, W] to [B, 4 * channels, H / stride, W / stride]."""
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual))
        residual += self.downsample(x)
        return F.relu(residual, inplace=True)


class ResNet50Backbone(nn.Module):
    """ResNet-50 up to its last stage, with torchvision's keys and, for a seed, its random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self.make_stage(64, 64, blocks=3, stride=1)
        self.layer2 = self.make_stage(256, 128, blocks=4, stride=2)
        self.layer3 = self.make_stage(512, 256, blocks=6, stride=2)
        self.layer4 = self.make_stage(1024, 512, blocks=3, stride=2)
        # torchvision draws a classifier before it draws these weights; left out, they would be others.
        nn.Linear(2048, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def make_stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        """Make the blocks of one resolution."""
        stage = nn.Sequential(Bottleneck(in_channels, channels, stride))
        for _ in range(blocks - 1):
            stage.append(Bottleneck(4 * channels, channels, stride=1))
        return stage

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute feature maps [B, 2048, H/32, W/32] of images [B, 3, H, W]."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class ResNet50(nn.Module):
    """ResNet-50 without its fully connected layer, with random weights: the base of the two baselines."""

    fresh_keys: tuple[str, ...] = ()
    num_features = 2048  # channels of the last stage

    def __init__(self, img_size: int | tuple[int, int] = 224) -> None:
        super().__init__()
        self.img_size = as_image_size(img_size)
        self.backbone = ResNet50Backbone()

    def flops(self, training: bool = True, mask_ratio: float = 0.0) -> float:
        """Count floating-point operations per image as `ViT.flops` does, a pixel of the feature maps like a token.

        mask_ratio is part of the common signature; without patches only 0 is possible. Raises ValueError otherwise.
        """
        if mask_ratio != 0:
            raise ValueError(f"ResNet-50 masks no patches: mask_ratio must be 0, got {mask_ratio}")
        height, width = halve(*self.img_size)
        first_layer = matrix_product_flops(self.backbone.conv1, height * width)
        height, width = halve(height, width)
        forward = first_layer + matrix_product_flops(self.backbone.layer1, height * width)
        for stage in (self.backbone.layer2, self.backbone.layer3, self.backbone.layer4):
            before = height * width
            height, width = halve(height, width)
            pixels = height * width
            forward += matrix_product_flops(stage, pixels)
            forward += matrix_product_flops(stage[0].conv1, before - pixels)  # it comes before the stride
        forward += self.head_flops(height, width)
        if training:
            return 3 * forward - first_layer
        return forward

    def head_flops(self, height: int, width: int) -> float:
        """Count the forward operations of the layers that follow the feature maps, which are [height, width]."""
        return 0


def halve(height: int, width: int) -> tuple[int, int]:
    """Compute the size after a layer with a stride of 2."""
    return (height + 1) // 2, (width + 1) // 2


class ResNet50Segmenter(ResNet50):
    """ResNet-50 with a decoder of transposed convolutions, the study's convolutional baseline (section 2.2).

    The decoder is that of the study's code (adl_supervised_learning at commit aa2fea5 of its repository): a 3 x 3
    convolution to 1,024 channels, then five transposed convolutions that double the size to that of the input. img_size
    must be divisible by 32. inputs: see `MAESegmenter`.
    """

    def __init__(self, num_classes: int = 3, img_size: int | tuple[int, int] = 224, inputs: str = "imagenet") -> None:
        super().__init__(img_size)
        height, width = self.img_size
        if height % 32 or width % 32:
            raise ValueError(f"img_size {height} x {width} is not divisible by 32, ResNet-50's stride")
        self.num_classes = num_classes
        self.inputs = check_inputs(inputs)
        self.decoder = nn.Sequential(
            nn.Conv2d(self.num_features, 1024, kernel_size=3, padding=1),
            nn.BatchNorm2d(1024),
            nn.ReLU(inplace=True),
            *self.double_size(1024, 512),
            *self.double_size(512, 256),
            *self.double_size(256, 128),
            *self.double_size(128, 64),
            nn.ConvTranspose2d(64, num_classes, kernel_size=3, stride=2, padding=1, output_padding=1),
        )

    @staticmethod
    def double_size(in_channels: int, out_channels: int) -> list[nn.Module]:
        """Make the layers that double height and width."""
        return [
            nn.ConvTranspose2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]

    def forward(self, images: torch.Tensor, drop_path: None = None) -> torch.Tensor:
        """Predict class logits [B, num_classes, H, W] of images [B, 3, H, W]; drop_path is accepted and ignored."""
        return self.decoder(self.backbone(images))

    def head_flops(self, height: int, width: int) -> float:
        """Count the forward operations of the decoder."""
        total = matrix_product_flops(self.decoder[0], height * width)
        for layer in self.decoder:
            if isinstance(layer, nn.ConvTranspose2d):
                total += matrix_product_flops(layer, height * width)  # at each pixel of its input
                height, width = 2 * height, 2 * width
        return total


class ResNet50Classifier(ResNet50):
    """ResNet-50 with average pooling and a new linear layer to num_classes."""

    fresh_keys = ("head.",)

    def __init__(self, num_classes: int, img_size: int | tuple[int, int] = 224) -> None:
        super().__init__(img_size)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: torch.Tensor, drop_path: None = None) -> torch.Tensor:
        """Predict class logits [B, num_classes] of images [B, 3, H, W]; drop_path is accepted and ignored."""
        pooled = F.adaptive_avg_pool2d(self.backbone(images), 1).flatten(1)
        return self.head(pooled)

    def head_flops(self, height: int, width: int) -> float:
        """Count the forward operations of the linear layer."""
        return matrix_product_flops(self.head, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Builders. Each takes the name of a size in MODELS; further keyword arguments replace those of the named size.


def build_mae(name: str = "mae_base", **overrides: Any) -> MaskedAutoencoder:
    """Build a Masked Autoencoder of a named size; overrides are arguments of `MaskedAutoencoder`."""
    sizes = MODELS[name] | overrides
    return MaskedAutoencoder(**sizes)


def build_vit(name: str = "mae_base", **overrides: Any) -> ViT:
    """Build the encoder of a named size alone; overrides are arguments of `ViT`."""
    sizes = encoder_sizes(name) | overrides
    return ViT(**sizes)


def build_segmenter(
    name: str = "mae_base",
    num_classes: int = 3,
    img_size: int | tuple[int, int] = 224,
    head: str = "decoder",
    drop_path: float = 0.0,
    **overrides: Any,
) -> MAESegmenter | LinearSegmenter | ResNet50Segmenter:
    """Build a segmenter of a named size, or name = "resnet50", which has neither heads to choose from nor drop_path.

    head: "decoder" is a `MAESegmenter`, "linear" a `LinearSegmenter`. overrides: further arguments of the segmenter's
    class. Raises ValueError for another head.
    """
    if head not in ("decoder", "linear"):
        raise ValueError(f"head must be decoder or linear, got {head!r}")
    if name == "resnet50":
        return ResNet50Segmenter(num_classes, img_size, **overrides)
    if head == "linear":
        sizes = encoder_sizes(name) | overrides
        return LinearSegmenter(num_classes, drop_path, img_size=img_size, **sizes)
    sizes = MODELS[name] | overrides
    return MAESegmenter(num_classes, drop_path, img_size=img_size, **sizes)


def build_classifier(
    name: str = "mae_base",
    num_classes: int = 37,
    img_size: int | tuple[int, int] = 224,
    pooling: str = "mean",
    drop_path: float = 0.0,
    **overrides: Any,
) -> Classifier | ResNet50Classifier:
    """Build a classifier of a named size, or name = "resnet50", which has neither pooling to choose nor drop_path."""
    if name == "resnet50":
        return ResNet50Classifier(num_classes, img_size)
    sizes = encoder_sizes(name) | overrides
    return Classifier(num_classes, pooling, drop_path, img_size=img_size, **sizes)


def encoder_sizes(name: str) -> dict[str, int]:
    """Return the arguments of `ViT` for a named size."""
    return {key: value for key, value in MODELS[name].items() if not key.startswith("decoder_")}


# The "kind" in the model_config of a checkpoint -> the function that builds its network.
BUILDERS = {"mae": build_mae, "vit": build_vit, "segmenter": build_segmenter, "classifier": build_classifier}
