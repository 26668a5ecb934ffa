"""Whether a capture leaves no trace: after exit, exceptions, nesting, pickling, saving, and in memory."""

from __future__ import annotations

import copy
import gc
import pathlib
import pickle
import tempfile
import weakref
from typing import Any

import torch

from corrdit.integrations.diffusers.testing.subject import Subject, small_scalar


class _Interruption(Exception):
    """What the checks throw from inside an operation."""


def check_restored_after_exit(subject: Subject) -> None:
    """Processors, hooks and attributes are the same objects as before."""
    from corrdit.integrations.diffusers.captures import capture

    before = _state(subject.transformer)
    for early_exit in (False, True):
        with capture(subject.transformer, layers=subject.layers, operation=small_scalar, early_exit=early_exit):
            subject.transformer(**subject.arguments())
        _assert_same_state(before, _state(subject.transformer), f"a capture (early_exit={early_exit})")


def check_restored_after_exception(subject: Subject) -> None:
    """The same after an exception in the operation, and it reaches the caller."""
    from corrdit.integrations.diffusers.captures import capture

    def failing(q: Any, k: Any, grid: Any, key_mask: Any) -> None:
        raise _Interruption

    before = _state(subject.transformer)
    try:
        with capture(subject.transformer, layers=subject.layers, operation=failing):
            subject.transformer(**subject.arguments())
    except _Interruption:
        _assert_same_state(before, _state(subject.transformer), "an exception in the operation")
        return
    raise AssertionError("an exception raised by the operation did not reach the caller")


def check_restored_after_nesting(subject: Subject) -> None:
    """A second capture of the same transformer is refused and does not disturb the first; a processor put in by hand
    under a capture still works, and both come off."""
    from corrdit.integrations.diffusers.captures import capture
    from corrdit.integrations.diffusers.processors import CorrespondenceProcessor

    before = _state(subject.transformer)
    read = subject.read((0,))[0]
    module = subject.modules[0]
    original = module.processor
    module.processor = CorrespondenceProcessor(original, read.grid, small_scalar)
    outer = capture(subject.transformer, layers=[0], operation=small_scalar)
    with outer:
        try:
            with capture(subject.transformer, layers=[0], operation=small_scalar):
                pass
        except ValueError:
            pass
        else:
            raise AssertionError("a second capture of the same transformer was not refused")
        subject.transformer(**subject.arguments())
    by_hand = module.processor
    module.processor = original
    assert torch.equal(outer[0, 0], by_hand.result), "a capture round a processor put in by hand reads something else"
    _assert_same_state(before, _state(subject.transformer), "nesting")


def check_pickling(subject: Subject) -> None:
    """A copy made while a capture is open, pickled or deep, has stock processors and gives the same output."""
    from corrdit.integrations.diffusers.captures import capture

    plain = subject.prediction()
    with capture(subject.transformer, layers=subject.layers, operation=small_scalar):
        pickled = pickle.dumps(subject.transformer)
        # A deep copy goes the way of a pickle, by `__reduce__`, without bytes that could run code being read.
        duplicate = copy.deepcopy(subject.transformer)
        subject.transformer(**subject.arguments())
    assert b"CorrespondenceProcessor" not in pickled, "a pickled copy has the processor of the capture in it"
    layout = subject.backbone.layout()
    kinds = {type(module.processor) for module in layout.attention_modules(duplicate)}
    own = {type(module.processor) for module in subject.modules}
    assert kinds == own, f"a pickled copy has processors {_names(kinds)} instead of {_names(own)}"
    with torch.no_grad():
        again = duplicate(**subject.arguments(), return_dict=False)[0]
    assert torch.equal(plain, again), "a pickled copy gives another output"


def check_saving(subject: Subject) -> None:
    """`save_pretrained` while a capture is open writes the same files as before it."""
    from corrdit.integrations.diffusers.captures import capture

    before = _saved(subject.transformer)
    with capture(subject.transformer, layers=subject.layers, operation=small_scalar):
        during = _saved(subject.transformer)
        subject.transformer(**subject.arguments())
    assert before.keys() == during.keys(), f"a capture changes the files saved: {before.keys() ^ during.keys()}"
    different = [name for name in before if before[name] != during[name]]
    assert not different, f"a capture changes the contents of {', '.join(different)}"
    assert _saved(subject.transformer) == before, "saving after a capture writes other files than before it"


def check_memory(subject: Subject) -> None:
    """No query or key outlives its layer, and no tensor is left behind."""
    from corrdit.integrations.diffusers.captures import capture

    alive: list[weakref.ref[torch.Tensor]] = []
    most_alive = 0

    def watching(q: torch.Tensor, k: torch.Tensor, grid: Any, key_mask: Any) -> torch.Tensor:
        nonlocal most_alive
        alive.extend((weakref.ref(q), weakref.ref(k)))
        most_alive = max(most_alive, sum(reference() is not None for reference in alive))
        return small_scalar(q, k, grid, key_mask)

    subject.prediction()
    before = _tensor_bytes()
    with torch.no_grad(), capture(subject.transformer, layers=subject.layers, operation=watching) as captured:
        subject.transformer(**subject.arguments())
    results = sum(result.untyped_storage().nbytes() for result in captured.values())
    after = _tensor_bytes() - results
    assert most_alive <= 2, f"{most_alive} queries and keys were alive at once; one layer has 2"
    left = sum(reference() is not None for reference in alive)
    assert not left, f"{left} queries and keys outlive the capture"
    assert after <= before, f"{after - before} bytes of tensors are left behind by a capture"


def _state(transformer: torch.nn.Module) -> dict[str, Any]:
    """Identity of everything a capture touches, for each module."""
    state: dict[str, Any] = {}
    for name, module in transformer.named_modules():
        attributes = {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_forward")}
        hooks = (tuple(map(id, module._forward_pre_hooks.values())), tuple(map(id, module._forward_hooks.values())))
        state[name] = (attributes, hooks, tuple((key, id(child)) for key, child in module._modules.items()))
    return state


def _assert_same_state(before: dict[str, Any], after: dict[str, Any], cause: str) -> None:
    changed = [name or "the transformer" for name in before if before[name] != after.get(name)]
    assert not changed, f"{cause} leaves {', '.join(changed[:4])} changed"
    assert before.keys() == after.keys(), f"{cause} adds or removes modules"


def _saved(transformer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


def _tensor_bytes() -> int:
    """Bytes of all tensors Python can reach, each memory once."""
    gc.collect()
    sizes: dict[int, int] = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, torch.nn.Parameter):
            storage = candidate.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))
