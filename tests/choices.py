"""The choices in this project's training steps, each undone in turn, so that bench.py can say what each one pays.

Every alternative computes the same loss from the same parameters (tests/test_bench.py holds them to it).
"""

from unittest import mock

import torch
import torch.nn.functional as F

import models


def explicit_attention(q, k, v):
    """Attention as three operations instead of one fused kernel, on [B, heads, N, D]."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def permuted_attention(self, x):
    """Attention.forward with q, k and v as one permuted view [3, B, heads, N, D], as most public ViTs have it."""
    B, N, D = x.shape
    q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


def gathered_rows(x, ids):
    """take_rows with torch.gather and an expanded index."""
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))


def all_patches_embedded(self, images, mask_ratio, noise):
    """MaskedAutoencoder.forward with the convolution over all patches, of which most are then dropped."""
    patches, visible = models.patchify(images, self.patch_size), self.num_visible(mask_ratio)
    order = torch.argsort(noise, dim=1, stable=True)
    embedded = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
    with mock.patch.object(type(self.patch_embed), "forward", lambda _, x: x):
        latent = self.forward_encoder(models.take_rows(embedded, order[:, :visible]), order[:, :visible])
    pred = self.forward_decoder(latent, order)[:, visible:]
    return self.forward_loss(models.take_rows(patches, order[:, visible:]), pred), pred, None


def unshuffled_decoder(self, images, mask_ratio, noise):
    """MaskedAutoencoder.forward with the tokens put back in image order and a masked mean over the loss of all patches."""
    patches, visible = models.patchify(images, self.patch_size), self.num_visible(mask_ratio)
    order = torch.argsort(noise, dim=1, stable=True)
    restore = torch.argsort(order, dim=1)
    x = self.decoder_embed(self.forward_encoder(models.take_rows(patches, order[:, :visible]), order[:, :visible]))
    hidden = self.mask_token.to(x.dtype).expand(len(x), order.shape[1] - visible, -1)
    tokens = models.take_rows(torch.cat([x[:, 1:], hidden], dim=1), restore)
    x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
    for block in self.decoder_blocks:
        x = block(x)
    pred, mask = self.decoder_pred(self.decoder_norm(x)[:, 1:]), (restore >= visible).float()
    mean, std = self.patch_statistics(patches.float())
    loss = (pred.float() - (patches.float() - mean) / std).square().mean(-1)
    return (loss * mask).sum() / mask.sum(), pred, mask


MAE = models.MaskedAutoencoder
# name -> what takes the place of what
PATCHES = {
    "attention without a fused kernel": lambda: mock.patch.object(
        F, "scaled_dot_product_attention", explicit_attention
    ),
    "q, k, v as one permuted view": lambda: mock.patch.object(models.Attention, "forward", permuted_attention),
    "rows picked by torch.gather": lambda: mock.patch.object(models, "take_rows", gathered_rows),
    "all patches embedded by the convolution": lambda: mock.patch.object(MAE, "forward", all_patches_embedded),
    "tokens unshuffled, loss of all patches": lambda: mock.patch.object(MAE, "forward", unshuffled_decoder),
}
# name -> settings of torch.optim.AdamW
OPTIMIZERS = {
    "AdamW, foreach": {"fused": False, "foreach": True},
    "AdamW, one tensor at a time": {"fused": False, "foreach": False},
}


def undone(name: str, function):
    """Let function run with the alternative `name` in place."""

    def run(*args):
        with PATCHES[name]():
            return function(*args)

    return run
