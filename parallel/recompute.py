"""Selective recomputation: some tensors are dropped after the forward, and computed again just before the backward.

V3 does it for RMSNorms, the up-projections of latent attention and SwiGLU (report, section 3.2.3): cheap to compute,
large to keep. The model marks such pieces as *regions*, `self.region(fn, *inputs)`; a hole whose default just calls
`fn`. Filled by `Regions`, autograd is told to keep a region's inputs only. What the region would have saved, and what
others save of its outputs, becomes a note of where to find it; `Tape.rerun` computes all regions of a phase again - a
step of its own, which needs no gradient and so can stand wherever the order wants it - and the notes are then followed.

A replay runs the same operations on the same numbers, so the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Inside(NamedTuple):
    """The `nth` tensor that the region saved."""

    region: _Region
    nth: int


class _Output(NamedTuple):
    """A view of the region's `nth` output."""

    region: _Region
    nth: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Region:
    """One call of a marked piece: the function, its inputs, and - after `rerun` - all that was dropped."""

    def __init__(self, fn: Callable, inputs: tuple[Tensor, ...]):
        self.fn, self.inputs = fn, inputs
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self._num_inside = 0
        self._inside: list[Tensor] | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def run(self) -> Any:
        with saved_tensors_hooks(self._pack, _follow):
            return self.fn(*self.inputs)

    def rerun(self) -> None:
        inside: list[Tensor] = []

        def catch(tensor: Tensor) -> None:
            """Notes the tensor; nothing is packed, for this graph is never walked, and a node that held its own output
            through a hook would live for ever."""
            if not self._is_kept(tensor):
                inside.append(tensor.detach())

        again = (tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.inputs)
        with torch.enable_grad(), saved_tensors_hooks(catch, lambda tensor: tensor):
            outputs = _as_tuple(self.fn(*again))
        self._inside, self._outputs = inside, tuple(output.detach() for output in outputs)

    def release(self) -> None:
        self.inputs, self._inside, self._outputs = (), None, ()

    def inside(self, index: int) -> Tensor:
        if self._inside is None:
            self.rerun()
        assert self._inside is not None
        return self._inside[index]

    def output(self, note: _Output) -> Tensor:
        if self._inside is None:
            self.rerun()
        return self._outputs[note.nth].as_strided(note.size, note.stride, note.offset)

    def _is_kept(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._kept

    def _pack(self, tensor: Tensor) -> Tensor | _Inside:
        if self._is_kept(tensor):
            return tensor
        self._num_inside += 1
        return _Inside(self, self._num_inside - 1)


def _note(region: _Region, index: int, view: Tensor) -> _Output:
    return _Output(region, index, view.size(), view.stride(), int(view.storage_offset()))


class Tape:
    """The regions of one phase of one microbatch."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []
        # Outputs by where they lie; they are held while the phase runs, so that no other tensor can lie there.
        self.outputs: dict[int, tuple[_Region, int, Tensor]] = {}

    def rerun(self) -> None:
        """Computes what all regions dropped, in their order."""
        for region in self.regions:
            region.rerun()

    def release(self) -> None:
        """Lets go of everything, after the backward: regions and autograd's nodes hold each other."""
        for region in self.regions:
            region.release()
        self.regions.clear()

    def pack(self, tensor: Tensor) -> Tensor | _Output:
        found = self.outputs.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        return _note(found[0], found[1], tensor)


class Regions:
    """Fills the hole `region` of a stage's layers: regions are recorded while `recording`, and otherwise just
    called."""

    def __init__(self) -> None:
        self._tape: Tape | None = None

    def __call__(self, fn: Callable, *inputs: Tensor) -> Any:
        if self._tape is None:
            return fn(*inputs)
        region = _Region(fn, inputs)
        outputs = region.run()
        self._tape.regions.append(region)
        for index, output in enumerate(_as_tuple(outputs)):
            if not output.numel():
                continue  # all empty tensors lie at address 0
            self._tape.outputs[output.untyped_storage().data_ptr()] = (region, index, output)
            # for who would keep a copy of it in a form of their own (infra/fp8/linear.py)
            output.again = partial(region.output, _note(region, index, output))  # type: ignore[attr-defined]
        return outputs

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Records the regions that run inside, on the tape that it yields."""
        self._tape = tape = Tape()
        try:
            with saved_tensors_hooks(tape.pack, _follow):
                yield tape
        finally:
            self._tape = None
            tape.outputs.clear()


def _follow(packed: Tensor | _Inside | _Output) -> Tensor:
    if isinstance(packed, _Inside):
        return packed.region.inside(packed.nth)
    if isinstance(packed, _Output):
        return packed.region.output(packed)
    return packed


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
