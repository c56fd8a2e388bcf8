"""The choices in this project's pre-training step, each undone in turn, so that bench.py can say what each one pays.

Every alternative computes the same loss from the same parameters (tests/test_bench.py holds them to it).
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import models
from models import MaskedAutoencoder

FORWARD = MaskedAutoencoder.forward


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention on [B, heads, N, D] as three operations instead of one fused kernel."""
    scaled = q * q.shape[-1] ** -0.5
    weights = (scaled @ k.transpose(-2, -1)).softmax(dim=-1)
    return weights @ v


def permuted_attention(self: models.Attention, x: Tensor, first: int = 0) -> Tensor:
    """Do Attention.forward with q, k and v as one permuted view [3, B, heads, N, D], as most public ViTs have it."""
    B, N, D = x.shape
    qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    attended = F.scaled_dot_product_attention(q[:, :, first:], k, v)
    return self.proj(attended.transpose(1, 2).reshape(B, N - first, D))


def gathered_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Do take_rows with torch.gather and an expanded index."""
    index = ids[..., None].expand(-1, -1, x.shape[-1])
    return torch.gather(x, 1, index)


def all_patches_embedded(
    self: MaskedAutoencoder, images: Tensor, mask_ratio: float, noise: Tensor, loss_only: bool
) -> Tensor:
    """Do MaskedAutoencoder.forward with the convolution over all patches, most of which are then dropped."""
    patches = models.patchify(images, self.patch_size)
    visible = self.num_visible(mask_ratio)
    order = torch.argsort(noise, dim=1, stable=True)
    embedded = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = models.take_rows(embedded + self.pos_embed[:, 1:], order[:, :visible])
    cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls_token.to(x.dtype), x], dim=1)
    for block in self.blocks:
        x = block(x)
    pred = self.forward_decoder(self.norm(x), order, masked_only=True)
    return self.forward_loss(models.take_rows(patches, order[:, visible:]), pred)


def all_tokens_in_last_block(
    self: MaskedAutoencoder, images: Tensor, mask_ratio: float, noise: Tensor, loss_only: bool
) -> Tensor:
    """Do MaskedAutoencoder.forward with a last decoder block that computes the visible patches' tokens too."""
    loss, _, _ = FORWARD(self, images, mask_ratio, noise)
    return loss


def unshuffled_decoder(
    self: MaskedAutoencoder, images: Tensor, mask_ratio: float, noise: Tensor, loss_only: bool
) -> Tensor:
    """Do MaskedAutoencoder.forward with tokens in image order and a masked mean over the loss of all patches."""
    patches = models.patchify(images, self.patch_size)
    visible = self.num_visible(mask_ratio)
    order = torch.argsort(noise, dim=1, stable=True)
    restore = torch.argsort(order, dim=1)
    visible_ids = order[:, :visible]
    x = self.decoder_embed(self.forward_encoder(models.take_rows(patches, visible_ids), visible_ids))
    hidden = self.mask_token.to(x.dtype).expand(len(x), order.shape[1] - visible, -1)
    shuffled = torch.cat([x[:, 1:], hidden], dim=1)
    tokens = models.take_rows(shuffled, restore)
    x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
    for block in self.decoder_blocks:
        x = block(x)
    pred = self.decoder_pred(self.decoder_norm(x)[:, 1:])
    mask = (restore >= visible).float()
    target = patches.float()
    mean, std = self.patch_statistics(target)
    loss = (pred.float() - (target - mean) / std).square().mean(-1)
    return (loss * mask).sum() / mask.sum()


class Patch(NamedTuple):
    """What takes the place of an attribute."""

    owner: Any
    attribute: str
    replacement: Callable


PATCHES = {
    "attention without a fused kernel": Patch(F, "scaled_dot_product_attention", explicit_attention),
    "q, k, v as one permuted view": Patch(models.Attention, "forward", permuted_attention),
    "rows picked by torch.gather": Patch(models, "take_rows", gathered_rows),
    "all patches embedded by the convolution": Patch(MaskedAutoencoder, "forward", all_patches_embedded),
    "last decoder block on all tokens": Patch(MaskedAutoencoder, "forward", all_tokens_in_last_block),
    "tokens unshuffled, loss of all patches": Patch(MaskedAutoencoder, "forward", unshuffled_decoder),
}
# Settings of torch.optim.AdamW, which the training loop runs fused.
OPTIMIZERS = {
    "AdamW, foreach": {"fused": False, "foreach": True},
    "AdamW, one tensor at a time": {"fused": False, "foreach": False},
}
# Kernels that torch chooses among for attention; of those that a GPU and a precision have.
KERNELS = {
    "attention by FlashAttention": SDPBackend.FLASH_ATTENTION,
    "attention by the memory-efficient kernel": SDPBackend.EFFICIENT_ATTENTION,
    "attention by cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def has_kernel(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a GPU has an attention kernel of KERNELS, for heads as wide as those of encoder and decoder."""
    if device.type != "cuda":
        return False
    try:
        for width in (64, 32):
            # Strided, and with fewer queries than keys, as in the last block of the decoder.
            q, k, v = torch.zeros(3, 1, 9, 1, width, device=device, dtype=dtype, requires_grad=True).transpose(2, 3)
            with_kernel(name, F.scaled_dot_product_attention)(q[:, :, 2:], k, v).sum().backward()
    except RuntimeError:
        return False
    return True


def with_kernel(name: str, function: Callable) -> Callable:
    """Make a function that runs with the attention kernel `name` of KERNELS alone."""

    def run(*args: Any) -> Any:
        with sdpa_kernel(KERNELS[name]):
            return function(*args)

    return run


def undone(name: str, function: Callable) -> Callable:
    """Make a function that runs with the alternative `name` of PATCHES in place."""
    patch = PATCHES[name]

    def run(*args: Any) -> Any:
        with mock.patch.object(patch.owner, patch.attribute, patch.replacement):
            return function(*args)

    return run


def other_optimizer(name: str, optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """Make an AdamW over the parameter groups of another one, with the settings `name` of OPTIMIZERS."""
    groups = []
    for group in optimizer.param_groups:
        kept = {key: group[key] for key in ("params", "lr_scale", "weight_decay")}
        groups.append(kept)
    return torch.optim.AdamW(groups, lr=optimizer.defaults["lr"], betas=optimizer.defaults["betas"], **OPTIMIZERS[name])
