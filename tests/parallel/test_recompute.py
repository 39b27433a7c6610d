"""Dropped tensors come back as they were: the same gradients to the bit, less memory in between."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from parallel.config import ParallelConfig
from parallel.recompute import Regions
from tests.parallel.layouts import begin, build, tiny


def _network(regions, x, w1, w2):
    normed = regions(lambda x: F.rms_norm(x, (8,)), x)
    gate, up = (normed @ w1).chunk(2, dim=-1)
    inner = regions(lambda gate, up: F.silu(gate) * up, gate, up)
    return (inner.transpose(0, 1).transpose(0, 1) @ w2).square().sum()


def _inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 8), (8, 24), (12, 8)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def _gradients(rerun_first: bool, recording: bool):
    regions, inputs = Regions(), _inputs()
    if recording:
        with regions.recording() as tape:
            loss = _network(regions, *inputs)
        if rerun_first:
            tape.rerun()
    else:
        loss = _network(regions, *inputs)
    loss.backward()
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("rerun_first", [True, False])
def test_the_same_gradients_to_the_bit(rerun_first):
    for got, want in zip(_gradients(rerun_first, True), _gradients(False, False), strict=True):
        assert torch.equal(got, want)


def test_a_region_keeps_only_its_inputs(monkeypatch):
    """Autograd is offered the dropped tensors and keeps none of them: the pack hooks return notes."""
    regions, inputs = Regions(), _inputs()
    with regions.recording() as tape:
        kept = []
        pack = tape.pack
        monkeypatch.setattr(tape, "pack", lambda tensor: kept.append(pack(tensor)) or kept[-1])
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, lambda packed: packed):
            _network(regions, *inputs)
    dropped = [note for note in kept if not isinstance(note, torch.Tensor)]
    assert dropped, "the matmuls save the regions' outputs"
    assert {note.nth for note in dropped} == {0}


def test_a_reused_address_is_not_mistaken_for_an_output():
    """Outputs are held while the phase runs, so that another tensor cannot lie where one lay."""
    regions = Regions()
    x, w = torch.randn(64, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def forward():
        y = regions(torch.tanh, x).sum(0, keepdim=True)  # the region's output is dead from here on
        for _ in range(20):
            y = (torch.randn(64, 8) * y @ w).mean(0, keepdim=True)
        return y.sum()

    torch.manual_seed(1)
    with regions.recording():
        loss = forward()
    loss.backward()
    got = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    torch.manual_seed(1)
    forward().backward()
    assert torch.equal(got[0], x.grad)
    assert torch.equal(got[1], w.grad)


def test_an_empty_output_is_not_mistaken_for_another_empty_tensor():
    """Experts without tokens: rows and the indices of rows all lie at address 0."""
    regions = Regions()
    x = torch.empty(0, 8, requires_grad=True)
    with regions.recording() as tape:
        y = regions(torch.tanh, x).index_select(0, torch.empty(0, dtype=torch.int64))
    tape.rerun()
    y.sum().backward()
    assert x.grad.shape == (0, 8)


@pytest.mark.parametrize("rerun_first", [True, False])
def test_nothing_outlives_the_backward(rerun_first):
    """Regions and autograd's nodes hold each other where Python's collector cannot see it."""
    regions, inputs = Regions(), _inputs()
    with regions.recording() as tape:
        loss = _network(regions, *inputs)
    if rerun_first:
        tape.rerun()
    loss.backward()
    left = [weakref.ref(region) for region in tape.regions]
    assert left
    tape.release()
    del tape, loss
    gc.collect()
    assert [region() for region in left] == [None] * len(left)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_of_training_leaves_nothing_behind(recompute):
    """A region that survives its step is a leak of activations: one such made a run grow by 70 MB a step."""

    def num_regions() -> int:
        gc.collect()
        return sum(type(held).__name__ in ("_Region", "Tape") for held in gc.get_objects())

    config, before = tiny(), num_regions()
    replica, executor, mesh = build(config, ParallelConfig(recompute=recompute), 1, 2)
    for _ in range(2):
        begin(config, replica, mesh, 2)
        executor.step()
    assert num_regions() == before
