"""Masked Autoencoder, its segmentation form and a ResNet-50 baseline, in plain PyTorch. Copy this one file to use them.

    model = build_mae("mae_base", img_size=224)                       # Table 1 of the paper, 111.9 M parameters
    loss, pred, mask = model(images, mask_ratio=0.75)                  # images: [B, 3, 224, 224], normalised
    segmenter = build_segmenter("mae_base", num_classes=3)

The architecture is that of He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), with the state-dict keys of
facebookresearch/mae, so published weights load; the code is written independently (theirs is CC-BY-NC). Shapes: B images,
C channels, H x W pixels, p patch size, L patches, K of them, N tokens (L + 1 with the class token), D features.
"""

import torch
import torch.nn.functional as F
from torch import nn

# Named sizes. mae_base is Table 1 of the paper; mae_tiny is for demonstrations and tests on CPUs.
MODELS = {
    "mae_tiny": dict(embed_dim=192, depth=4, num_heads=3, decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4),
    "mae_small": dict(
        embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8
    ),
    "mae_base": dict(embed_dim=768, depth=12, num_heads=12),
    "mae_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "mae_huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images [B, C, H, W] into flattened patches [B, L, p*p*C], row by row, channels last within a patch."""
    (B, C, H, W), p = images.shape, patch_size
    return images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Put patches [B, L, p*p*C] back together to images [B, C, H, W]; grid = (H / p, W / p)."""
    B, p, (h, w) = patches.shape[0], patch_size, grid
    return patches.reshape(B, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * p, w * p)


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """Compute fixed 2-D sine-cosine positions [1, 1 + L, D]: a zero row, then half the features for column, half for row."""
    if dim % 4:
        raise ValueError(f"embed_dim must be divisible by 4 for 2-D sine-cosine positions, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.stack([columns.flatten(), rows.flatten()])[..., None] * omega  # [2, L, D/4]
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).permute(1, 0, 2).flatten(1)  # [L, D]
    return torch.cat([torch.zeros(1, dim), table.float()])[None]


def interpolate_pos_embed(pos_embed: torch.Tensor, source: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Resize position embeddings [1, 1 + L, D] from one patch grid to another (bicubic); the class token's row is kept."""
    cls_row, table = pos_embed[:, :1], pos_embed[:, 1:]
    table = table.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=target, mode="bicubic", align_corners=False)
    return torch.cat([cls_row.float(), table.permute(0, 2, 3, 1).flatten(1, 2)], dim=1).to(pos_embed.dtype)


def take_rows(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pick rows ids [B, K] of x [B, L, D] -> [B, K, D]. One index_select on contiguous rows: faster than gather."""
    B, L, D = x.shape
    flat = ids + torch.arange(B, device=ids.device)[:, None] * L
    return x.reshape(B * L, D).index_select(0, flat.flatten()).view(B, -1, D)


class PatchEmbed(nn.Module):
    """Linear embedding of flattened patches [B, K, p*p*C] -> [B, K, D], stored as the convolution of every public ViT.

    Applied as a matrix product, so that only the visible patches are embedded.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, D = x.shape
        # Splitting the last dimension, not a permuted view: the backward pass then writes one gradient in its final layout.
        q, k, v = (t.view(B, N, self.num_heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D/heads]
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on [B, N, D]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; `scale` [B, 2] multiplies the two residual branches (stochastic depth)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        attended = self.attn(self.norm1(x))
        x = x + (attended if scale is None else attended * scale[:, 0, None, None])
        transformed = self.mlp(self.norm2(x))
        return x + (transformed if scale is None else transformed * scale[:, 1, None, None])


class MaskedAutoencoder(nn.Module):
    """Masked Autoencoder with a ViT encoder on the visible patches and a light ViT decoder (He et al. 2021, section 3).

    img_size: height and width in pixels, one number or a pair, divisible by patch_size. norm_pix_loss: regress pixels
    normalised by each patch's own mean and variance (He et al., Table 1d).
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768,
        depth: int = 12, num_heads: int = 12, decoder_embed_dim: int = 512, decoder_depth: int = 8,
        decoder_num_heads: int = 16, mlp_ratio: float = 4.0, norm_pix_loss: bool = True,
    ):  # fmt: skip
        super().__init__()
        H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
        if H % patch_size or W % patch_size or min(H, W) < patch_size:
            raise ValueError(f"img_size {H} x {W} is not divisible by patch_size {patch_size}")
        self.img_size, self.patch_size, self.norm_pix_loss = (H, W), patch_size, norm_pix_loss
        self.grid = (H // patch_size, W // patch_size)

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_embed_dim, self.grid), requires_grad=False)
        blocks = (Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def num_visible(self, mask_ratio: float) -> int:
        """Count the patches of an image that stay visible at a mask ratio in [0, 1)."""
        visible = int(self.num_patches * (1 - mask_ratio))
        if not 0 <= mask_ratio < 1 or not visible:
            raise ValueError(f"mask_ratio must lie in [0, 1) and leave a patch visible, got {mask_ratio}")
        return visible

    def forward(self, images: torch.Tensor, mask_ratio: float = 0.75, noise: torch.Tensor | None = None):
        """Mask, encode, decode and score images [B, C, H, W] -> (loss, pred [B, L, p*p*C] in image order, mask [B, L]).

        noise [B, L] in [0, 1) fixes the masking: the patches of lowest noise stay visible (mask 0), ties broken by position.
        The loss is the mean squared error over the masked patches, over all of them at mask_ratio 0.
        """
        patches = patchify(images, self.patch_size)
        B, L, _ = patches.shape
        visible = self.num_visible(mask_ratio)
        if visible == L:
            pred = self.forward_decoder(self.forward_encoder(patches))
            loss = self.forward_loss(patches, pred) + 0 * self.mask_token.sum()  # DDP waits for every gradient
            return loss, pred, images.new_zeros(B, L)
        if noise is None:
            noise = torch.rand(B, L, device=images.device)
        order = torch.argsort(noise, dim=1, stable=True)  # [B, L], visible patches first
        latent = self.forward_encoder(take_rows(patches, order[:, :visible]), order[:, :visible])
        # Attention does not mind the order of its tokens, so the decoder runs on the shuffled sequence: no unshuffle of
        # features, and the masked patches, the only ones the loss needs, are one slice.
        pred = self.forward_decoder(latent, order)
        loss = self.forward_loss(take_rows(patches, order[:, visible:]), pred[:, visible:])
        restore = torch.argsort(order, dim=1)
        return loss, take_rows(pred, restore), (restore >= visible).to(images.dtype)

    def forward_encoder(self, patches, ids=None, drop_path=None) -> torch.Tensor:
        """Encode patches [B, K, p*p*C] at positions ids [B, K] (None: all, in image order) -> [B, 1 + K, D].

        drop_path: factors of the residual branches, [depth, B, 2] (see `drop_path_scales`), or None.
        """
        x = self.patch_embed(patches)
        positions = self.pos_embed[:, 1:]
        x = x + (positions if ids is None else F.embedding(ids, positions[0]))
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)
        for i, block in enumerate(self.blocks):
            x = block(x, None if drop_path is None else drop_path[i])
        return self.norm(x)

    def forward_decoder(self, latent: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
        """Decode [B, 1 + K, D] -> [B, L, p*p*C]; masked positions are order[:, K:], and the output follows `order`."""
        x = self.decoder_embed(latent)
        positions = self.decoder_pos_embed
        if order is not None:
            masked = self.mask_token.to(x.dtype).expand(x.shape[0], order.shape[1] + 1 - x.shape[1], -1)
            x = torch.cat([x, masked], dim=1)
            positions = F.embedding(F.pad(order + 1, (1, 0)), positions[0])  # row 0 belongs to the class token
        x = x + positions
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x)[:, 1:])

    def forward_loss(self, patches: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        """Mean squared error of pred [B, K, p*p*C] against the pixels of patches [B, K, p*p*C] in float32."""
        target = patches.float()
        if self.norm_pix_loss:
            mean, std = self.patch_statistics(target)
            target = (target - mean) / std
        return F.mse_loss(pred.float(), target)

    @staticmethod
    def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each patch [B, K, p*p*C] -> two [B, K, 1]; the variance is unbiased, plus 1e-6."""
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, mask_ratio: float = 0.75, noise: torch.Tensor | None = None):
        """Reconstruct images [B, C, H, W] -> (masked input, reconstruction), both [B, C, H, W] in the images' own units.

        Masked pixels of the input are 0 (grey, when images are normalised). The reconstruction keeps the visible patches
        and fills in predicted ones; a prediction of normalised pixels is put back by each patch's own statistics.
        """
        _, pred, mask = self(images, mask_ratio, noise)
        patches, pred, mask = patchify(images, self.patch_size).float(), pred.float(), mask[..., None]
        if self.norm_pix_loss:
            mean, std = self.patch_statistics(patches)
            pred = pred * std + mean
        masked = patches * (1 - mask)
        return tuple(unpatchify(x, self.patch_size, self.grid) for x in (masked, masked + pred * mask))

    def flops(self, mask_ratio: float = 0.75, training: bool = True) -> float:
        """Count floating-point operations per image, 2 per multiply-add, matrix products only.

        The reference formulation is counted (all patches embedded), so that rates compare with other code. The backward
        pass costs twice the forward pass, less the gradient of the input pixels.
        """

        def products(tokens: int, *parts: nn.Module) -> float:
            weights = sum(p.numel() for part in parts for p in part.parameters() if p.ndim > 1)
            attended = sum(m.proj.in_features for part in parts for m in part.modules() if isinstance(m, Attention))
            return 2 * tokens * weights + 4 * tokens**2 * attended

        L, tokens = self.num_patches, self.num_visible(mask_ratio) + 1
        embed = products(L, self.patch_embed)
        forward = embed + products(tokens, self.blocks, self.decoder_embed)
        forward += products(L + 1, self.decoder_blocks, self.decoder_pred)
        return 3 * forward - embed if training else forward


def init_weights(module: nn.Module) -> None:
    """Initialise as facebookresearch/mae does: xavier-uniform weights (the patch projection as a matrix), zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.dim() > 2 else module.weight)
        nn.init.zeros_(module.bias)


class MAESegmenter(MaskedAutoencoder):
    """The same network with masking off: the decoder's last layer predicts num_classes per pixel (the paper, section 2.1).

    With 3 classes that layer has the key and the shape of the pixel predictor, hence `fresh_keys`: prefixes of keys never
    taken from a checkpoint. head "linear" is one linear layer on the encoder's features in place of the decoder; drop_path:
    stochastic depth of the last encoder block, growing linearly from 0 at the first.
    """

    fresh_keys = ("decoder_pred.",)

    def __init__(self, num_classes: int = 3, head: str = "decoder", drop_path: float = 0.0, **sizes):
        super().__init__(**sizes)
        if head not in ("decoder", "linear"):
            raise ValueError(f"head must be decoder or linear, got {head!r}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        self.head, self.num_classes = head, num_classes
        self.register_buffer("drop_rates", torch.linspace(0, drop_path, len(self.blocks)), persistent=False)
        self.pos_embed.requires_grad = True
        if head == "linear":
            self.decoder_embed, self.decoder_blocks, self.decoder_norm = nn.Identity(), nn.ModuleList(), nn.Identity()
            self.mask_token = self.decoder_pos_embed = None
        else:
            self.decoder_pos_embed.requires_grad = True
            self.mask_token.requires_grad = False  # without masking nothing uses it; kept for its key
        features = self.norm.weight.numel() if head == "linear" else self.decoder_pred.in_features
        self.decoder_pred = nn.Linear(features, self.patch_size**2 * num_classes)
        init_weights(self.decoder_pred)

    def forward(self, images: torch.Tensor, drop_path: torch.Tensor | None = None) -> torch.Tensor:
        """Predict logits [B, num_classes, H, W]; drop_path [B, depth, 2]: uniform draws that decide what is dropped."""
        scales = None if drop_path is None else drop_path_scales(drop_path, self.drop_rates)
        x = self.forward_encoder(patchify(images, self.patch_size), drop_path=scales)
        x = self.decoder_pred(x[:, 1:]) if self.head == "linear" else self.forward_decoder(x)
        return unpatchify(x, self.patch_size, self.grid)

    def flops(self, mask_ratio: float = 0.0, training: bool = True) -> float:
        return super().flops(mask_ratio, training)


def drop_path_scales(draws: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Turn draws [B, depth, 2] into factors [depth, B, 2]: 0 with probability rates[i], else 1 / (1 - rates[i])."""
    rates = rates[None, :, None]
    return ((draws >= rates).to(draws.dtype) / (1 - rates)).transpose(0, 1)


class ResNet50Segmenter(nn.Module):
    """torchvision's ResNet-50 without its fully connected layer; features projected to classes and upsampled (section 2.2).

    Its output has a stride of 32 pixels, which bounds how fine its masks can be.
    """

    def __init__(self, num_classes: int = 3):
        super().__init__()
        from torchvision.models import resnet50  # the only use of torchvision here

        self.backbone = resnet50(weights=None)
        self.classifier = nn.Conv2d(self.backbone.fc.in_features, num_classes, kernel_size=1)
        self.backbone.fc = nn.Identity()

    def forward(self, images: torch.Tensor, drop_path: None = None) -> torch.Tensor:
        """Predict class logits [B, num_classes, H, W] of images [B, 3, H, W]; drop_path is accepted and ignored."""
        b = self.backbone
        x = b.maxpool(b.relu(b.bn1(b.conv1(images))))
        x = self.classifier(b.layer4(b.layer3(b.layer2(b.layer1(x)))))
        return F.interpolate(x.float(), size=images.shape[-2:], mode="bilinear", align_corners=False)

    def flops(self, img_size: int = 224, training: bool = True) -> float:
        """Count floating-point operations per image, as `MaskedAutoencoder.flops` does, by running on the meta device."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            copy, image = ResNet50Segmenter(self.classifier.out_channels), torch.zeros(1, 3, img_size, img_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.eval()(image)
        first = 2 * self.backbone.conv1.weight.numel() * (img_size // 2) ** 2
        return 3 * counter.get_total_flops() - first if training else counter.get_total_flops()


def build_mae(name: str = "mae_base", **overrides) -> MaskedAutoencoder:
    """Build a Masked Autoencoder of a named size; overrides are arguments of `MaskedAutoencoder`."""
    return MaskedAutoencoder(**{**MODELS[name], **overrides})


def build_segmenter(name: str = "mae_base", num_classes: int = 3, img_size: int = 224, **overrides) -> nn.Module:
    """Build a segmenter: a `MAESegmenter` of a named size, or name = "resnet50"."""
    if name == "resnet50":
        return ResNet50Segmenter(num_classes)
    return MAESegmenter(num_classes=num_classes, img_size=img_size, **{**MODELS[name], **overrides})
