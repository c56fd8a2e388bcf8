"""A recorded backward pass, with a stand-in for CUDA's graphs: it runs what was recorded again, on the recorded memory.

What real graphs do is tested in test_gpu.py.
"""

import contextlib

import pytest
import torch
from torch import nn

from cuda_graph import WARM_UP, RecordedBackward


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def recorded(monkeypatch):
    """A recorded pass over a network with BatchNorm, and the batches that it was really called with."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    seen = []

    def backward(batch):
        seen.append(batch["x"].clone())
        loss = (network(batch["x"]) ** 3).mean()
        loss.backward()
        return loss

    made = RecordedBackward(backward, network)

    class Graph:
        def replay(self):
            network.zero_grad(set_to_none=True)
            made.loss.copy_(backward(made.batch).detach())

    @contextlib.contextmanager
    def recording(graph, **options):
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        yield
        network.zero_grad(set_to_none=True)
        for name, buffer in network.named_buffers():  # nothing is computed while a graph is recorded
            buffer.copy_(before[name])
        seen.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made, seen


def test_warming_up_leaves_statistics_and_gradients_as_one_pass_makes_them(recorded):
    made, _ = recorded
    batch = {"x": torch.randn(5, 3)}
    expected = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    expected.load_state_dict(made.network.state_dict())
    (expected(batch["x"]) ** 3).mean().backward()
    made(batch)
    for ours, theirs in zip(made.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(made.network.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_batch_is_copied_into_the_memory_that_was_recorded(recorded):
    made, seen = recorded
    batches = [torch.randn(5, 3) for _ in range(3)]
    for batch in batches:
        made({"x": batch})
    assert len(seen) == WARM_UP + len(batches)
    for found, given in zip(seen[WARM_UP:], batches, strict=True):
        assert torch.equal(found, given)
    assert made.batch["x"] is not batches[0]
