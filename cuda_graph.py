"""Forward and backward pass as one CUDA graph: recorded once, then replayed with a single launch.

A step of a ViT launches about a thousand kernels. Where the host cannot launch them as fast as the GPU runs them, the GPU
waits; a graph is launched as a whole. The kernels and their results are the same. Copy this one file to use it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 2  # passes before the recording: they compile, and choose algorithms and work space


class RecordedBackward:
    """Calls backward(batch), which fills the gradients of a network and returns the loss, by a CUDA graph.

    The graph is recorded at the first call. backward may depend on the batch, on parameters and on buffers, but on nothing
    that Python changes between calls; batches must keep their shapes. Gradients stay in the memory of the graph: every
    call replaces them, so they must not be set to None between calls. DistributedDataParallel is not supported.
    """

    def __init__(self, backward: Callable[[dict[str, Tensor]], Tensor], network: nn.Module):
        self.backward = backward
        self.network = network
        self.batch: dict[str, Tensor] = {}  # the memory that the graph reads
        self.loss: Tensor | None = None  # and that it writes
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Fill the gradients and give the loss of a batch; the loss is replaced by the next call."""
        if self.graph is None:
            self._record(batch)
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.loss

    def _record(self, batch: dict[str, Tensor]) -> None:
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        self._warm_up()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may allocate page-locked memory for the next batches meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = self.backward(self.batch).detach()

    def _warm_up(self) -> None:
        """Run the passes whose results are thrown away: gradients, and what BatchNorm keeps in buffers."""
        kept = [buffer.clone() for buffer in self.network.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.backward(self.batch)
                self.network.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in zip(self.network.buffers(), kept, strict=True):
            buffer.copy_(value)
