"""The training step of most public Masked Autoencoder code, for bench.py --peers: what this project's step is faster than.

Written for the comparison, after the description of facebookresearch/mae's step (its code is not copied): eager, fp16 with
loss scaling on GPUs, all patches embedded by a convolution, attention in three operations, tokens put back in image order
before the decoder, the loss of every patch masked afterwards, AdamW without fusion, the gradient's norm at every step, and
two waits for the device in each step.
"""

import contextlib
import math

import torch
from torch import Tensor, nn

import models
from bench_choices import explicit_attention, gathered_rows
from models import MaskedAutoencoder


class EagerAttention(models.Attention):
    """Multi-head self-attention in separate operations."""

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Attend from all tokens to all tokens of x [B, N, D]; first is not used."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attended = explicit_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(B, N, D))


class EagerMaskedAutoencoder(MaskedAutoencoder):
    """The network of this project, computed in the usual order of operations."""

    def __init__(self, **sizes: object) -> None:
        super().__init__(**sizes)
        for block in [*self.blocks, *self.decoder_blocks]:
            dim = block.norm1.weight.numel()
            block.attn = EagerAttention(dim, block.attn.num_heads)

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> Tensor:
        """Compute the loss of images [B, C, H, W]; noise [B, L]: the patches of lowest noise stay visible."""
        visible = self.num_visible(mask_ratio)
        order = torch.argsort(noise, dim=1)
        restore = torch.argsort(order, dim=1)
        latent = self.encode_visible(images, order[:, :visible])
        pred = self.decode_in_image_order(latent, restore)
        target = models.patchify(images, self.patch_size)
        if self.norm_pix_loss:
            mean, std = self.patch_statistics(target)
            target = (target - mean) / std
        mask = (restore >= visible).float()
        loss = (pred - target).square().mean(dim=-1)
        return (loss * mask).sum() / mask.sum()

    def encode_visible(self, images: Tensor, ids: Tensor) -> Tensor:
        """Embed all patches of images [B, C, H, W], keep those of ids [B, K] and encode them -> [B, 1 + K, D]."""
        embedded = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = gathered_rows(embedded + self.pos_embed[:, 1:], ids)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode_in_image_order(self, latent: Tensor, restore: Tensor) -> Tensor:
        """Decode [B, 1 + K, D] with tokens in image order, by the ranks restore [B, L] -> [B, L, p*p*C]."""
        x = self.decoder_embed(latent)
        hidden = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        shuffled = torch.cat([x[:, 1:], hidden.to(x.dtype)], dim=1)
        x = torch.cat([x[:, :1], gathered_rows(shuffled, restore)], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


class EagerStep:
    """Trains an EagerMaskedAutoencoder on one batch, again and again."""

    def __init__(self, network: EagerMaskedAutoencoder, batch: dict[str, Tensor], mask_ratio: float, lr: float):
        self.network = network
        self.batch = batch
        self.mask_ratio = mask_ratio
        self.device = batch["images"].device
        self.on_gpu = self.device.type == "cuda"
        self.params = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.on_gpu)

    def __call__(self) -> None:
        """Do one update; raises FloatingPointError for a loss that is not finite."""
        with self.autocast():
            loss = self.network(self.batch["images"], self.mask_ratio, self.batch["noise"])
        if not math.isfinite(loss.item()):  # waits for the device
            raise FloatingPointError("the loss of the eager step is not finite")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.get_total_norm([p.grad for p in self.params])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.on_gpu:
            torch.cuda.synchronize()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of the forward pass: fp16 on GPUs, float32 on CPUs."""
        if self.on_gpu:
            return torch.autocast("cuda", torch.float16)
        return contextlib.nullcontext()


def eager_step(model: MaskedAutoencoder, batch: dict[str, Tensor], mask_ratio: float) -> EagerStep:
    """Make the eager step of a network with the weights of a model, on the model's device."""
    sizes = {
        "img_size": model.img_size,
        "patch_size": model.patch_size,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "decoder_embed_dim": model.mask_token.shape[-1],
        "decoder_depth": len(model.decoder_blocks),
        "decoder_num_heads": model.decoder_blocks[0].attn.num_heads,
        "norm_pix_loss": model.norm_pix_loss,
    }
    network = EagerMaskedAutoencoder(**sizes)
    network.load_state_dict(model.state_dict())
    network.to(batch["images"].device)
    return EagerStep(network, batch, mask_ratio, lr=1e-4)
