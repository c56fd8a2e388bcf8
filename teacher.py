"""A teacher: a copy of a network that follows it slowly, as an exponential moving average of its weights.

    teacher = Teacher(encoder)                                      # a copy, outside what DDP and the optimizer see
    wanted = teacher(images)                                        # without gradients
    teacher.update(model, momentum_at(step, total_steps, 0.996))    # after each step of the optimizer

Used by self-distillation (Caron et al. 2021, DINO; Assran et al. 2023, I-JEPA). Copy this file alone.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def momentum_at(step: int, total_steps: int, start: float, end: float = 1.0, shape: str = "linear") -> float:
    """Compute the momentum of an update, step from 1 to total_steps: `start` at the first one, and towards `end`.

    shape: "linear" as in I-JEPA, or "cosine" as in DINO. ValueError for another shape.
    """
    progress = (step - 1) / total_steps
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    elif shape != "linear":
        raise ValueError(f"shape must be linear or cosine, got {shape!r}")
    return start + (end - start) * progress


class Teacher:
    """A copy of a network whose weights follow another one that has the same names, and maybe more.

    Weights that are not trained, such as fixed position embeddings, stay as they are copied.
    """

    def __init__(self, network: nn.Module):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.compiled: Callable | None = None
        self.training_size: int | None = None  # images of a call in training
        self.leader: nn.Module | None = None  # the network that was followed last
        self.followed = [name for name, parameter in network.named_parameters() if parameter.requires_grad]

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the copy to a device."""
        self.network.to(device)
        return self

    def compile(self) -> None:
        """Compile the copy for the number of images that training calls it with; others are not worth the time."""
        self.compiled = torch.compile(self.network, dynamic=False)

    def __call__(self, images: Tensor, *others: Any, **options: Any) -> Any:
        """Call the copy on images [B, ...], without gradients."""
        if torch.is_grad_enabled():
            self.training_size = len(images)
        network = self.network
        if self.compiled is not None and len(images) == self.training_size:
            network = self.compiled
        with torch.no_grad():
            return network(images, *others, **options)

    @torch.no_grad()
    def update(self, network: nn.Module, momentum: float) -> None:
        """Move every followed weight: momentum times its value plus (1 - momentum) times that of the network."""
        if network is not self.leader:
            self._follow(network)
        torch._foreach_mul_(self.weights, momentum)
        torch._foreach_add_(self.weights, self.news, alpha=1 - momentum)

    def _follow(self, network: nn.Module) -> None:
        """Look up the weights that follow, and those of the network; it takes longer than an update on a GPU."""
        own = dict(self.network.named_parameters())
        theirs = dict(network.named_parameters())
        self.weights = [own[name] for name in self.followed]
        self.news = [theirs[name] for name in self.followed]
        self.leader = network

    def state(self) -> dict[str, torch.Tensor]:
        """Give what a checkpoint must hold."""
        return self.network.state_dict()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what state() gave."""
        self.network.load_state_dict(state)
