"""Whether a capture leaves no trace: after exit, exceptions, nesting, pickling, saving, and in memory."""

from __future__ import annotations

import copy
import gc
import pathlib
import pickle
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.processors import CorrespondenceProcessor
from corrdit.integrations.diffusers.testing.subject import Subject, small_scalar


class _Interruption(Exception):
    """What the checks throw from inside an operation."""


def check_restored_after_exit(subject: Subject) -> None:
    """Processors, hooks and attributes are the same objects as before."""
    for early_exit in (False, True):
        cause = f"a capture (early_exit={early_exit})"
        with unchanged(subject.transformer, cause), subject.captured(early_exit=early_exit):
            subject.run()


def check_restored_after_exception(subject: Subject) -> None:
    """The same after an exception in the operation, and it reaches the caller."""

    def failing(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None) -> None:
        raise _Interruption

    with unchanged(subject.transformer, "an exception in the operation"):
        try:
            with subject.captured(failing):
                subject.run()
        except _Interruption:
            return
        raise AssertionError("an exception raised by the operation did not reach the caller")


def check_restored_after_nesting(subject: Subject) -> None:
    """A second capture of the same transformer is refused and does not disturb the first; a processor put in by hand
    under a capture still works, and both come off."""
    grid = subject.read((0,))[0].grid
    module: Any = subject.modules[0]
    with unchanged(subject.transformer, "nesting"):
        original = module.processor
        module.processor = CorrespondenceProcessor(original, grid, small_scalar)
        with subject.captured(layers=[0]) as outer:
            try:
                with subject.captured(layers=[0]):
                    pass
            except ValueError:
                pass
            else:
                raise AssertionError("a second capture of the same transformer was not refused")
            subject.run()
        by_hand, module.processor = module.processor, original
        assert torch.equal(outer[0, 0], by_hand.result), (
            "a capture round a processor put in by hand reads something else"
        )


def check_pickling(subject: Subject) -> None:
    """A copy made while a capture is open, pickled or deep, has stock processors and gives the same output."""
    plain = subject.prediction()
    with subject.captured():
        pickled = pickle.dumps(subject.transformer)
        # A deep copy goes the way of a pickle, by `__reduce__`, without bytes that could run code being read.
        duplicate = copy.deepcopy(subject.transformer)
        subject.run()
    assert b"CorrespondenceProcessor" not in pickled, "a pickled copy has the processor of the capture in it"
    copied = subject.backbone.layout().attention_modules(duplicate)
    kinds, own = ({type(module.processor).__name__ for module in modules} for modules in (copied, subject.modules))
    assert kinds == own, f"a pickled copy has processors {sorted(kinds)} instead of {sorted(own)}"
    with torch.no_grad():
        again = duplicate(**subject.arguments())[0]
    assert torch.equal(plain, again), "a pickled copy gives another output"


def check_saving(subject: Subject) -> None:
    """`save_pretrained` while a capture is open writes the same files as before it."""
    before = _saved(subject.transformer)
    with subject.captured():
        during = _saved(subject.transformer)
        subject.run()
    assert before.keys() == during.keys(), f"a capture changes the files saved: {before.keys() ^ during.keys()}"
    different = [name for name in before if before[name] != during[name]]
    assert not different, f"a capture changes the contents of {', '.join(different)}"
    assert _saved(subject.transformer) == before, "saving after a capture writes other files than before it"


def check_memory(subject: Subject) -> None:
    """No query or key outlives its layer, and no tensor is left behind."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most_alive = 0

    def watching(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None) -> torch.Tensor:
        nonlocal most_alive
        alive.extend((weakref.ref(q), weakref.ref(k)))
        most_alive = max(most_alive, sum(reference() is not None for reference in alive))
        return small_scalar(q, k, grid, key_mask)

    subject.prediction()
    before = _tensor_bytes()
    with torch.no_grad(), subject.captured(watching) as captured:
        subject.run()
    results = sum(result.untyped_storage().nbytes() for result in captured.values())
    after = _tensor_bytes() - results
    assert most_alive <= 2, f"{most_alive} queries and keys were alive at once; one layer has 2"
    left = sum(reference() is not None for reference in alive)
    assert not left, f"{left} queries and keys outlive the capture"
    assert after <= before, f"{after - before} bytes of tensors are left behind by a capture"


@contextmanager
def unchanged(transformer: torch.nn.Module, cause: str) -> Iterator[None]:
    """Afterwards everything a capture touches must be the same objects as before, in each module."""
    before = _state(transformer)
    yield
    after = _state(transformer)
    changed = [name or "the transformer" for name in before if before[name] != after.get(name)]
    assert not changed, f"{cause} leaves {', '.join(changed[:4])} changed"
    assert before.keys() == after.keys(), f"{cause} adds or removes modules"


def _state(transformer: torch.nn.Module) -> dict[str, tuple[dict[str, int], list[list[int]], list[tuple[str, int]]]]:
    """Identity of attributes, hooks and children of each module."""
    return {
        name: (
            {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_forward")},
            [list(map(id, hooks.values())) for hooks in (module._forward_pre_hooks, module._forward_hooks)],
            [(key, id(child)) for key, child in module._modules.items()],
        )
        for name, module in transformer.named_modules()
    }


def _saved(transformer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


def _tensor_bytes() -> int:
    """Bytes of all tensors Python can reach, each memory once."""
    gc.collect()
    sizes: dict[int, int] = {}
    for candidate in gc.get_objects():
        # Sparse tensors, which the caller may hold, have no storage to ask for.
        if type(candidate) in (torch.Tensor, torch.nn.Parameter) and candidate.layout == torch.strided:
            storage = candidate.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
