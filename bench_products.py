"""The matrix products of a training step, alone: how fast this machine multiplies matrices of exactly these shapes.

A step cannot be faster than its products. The step's time beside theirs says how much is left to gain by anything but
better products; their rate says what the machine can do with shapes like these.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operator -> the place of its first factor among the arguments.
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}


class Factor(NamedTuple):
    """The layout of a matrix or a batch of matrices in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Factor":
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def random(self, device: torch.device) -> Tensor:
        """Make a tensor of this layout with random content."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return tensor.normal_()


class Product(NamedTuple):
    """A product of two matrices, or of two batches of matrices."""

    left: Factor
    right: Factor

    @property
    def flops(self) -> int:
        """Count its floating-point operations, 2 per multiply-add."""
        operations = 2 * self.right.shape[-1]
        for size in self.left.shape:
            operations *= size
        return operations


class Recorder(TorchDispatchMode):
    """Counts the products that run inside, by layout."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in PRODUCTS:
            place = PRODUCTS[func]
            self.counts[Product(Factor.of(args[place]), Factor.of(args[place + 1]))] += 1
        return func(*args, **(kwargs or {}))


class ProductsAlone:
    """Runs recorded products on random matrices, as often as a step does."""

    def __init__(self, counts: Counter[Product], device: torch.device):
        self.flops = sum(product.flops * count for product, count in counts.items())
        self.pairs = []
        for product, count in counts.items():
            pair = (product.left.random(device), product.right.random(device), count)
            self.pairs.append(pair)

    def __call__(self) -> None:
        """Run every product."""
        for left, right, count in self.pairs:
            for _ in range(count):
                torch.matmul(left, right)
