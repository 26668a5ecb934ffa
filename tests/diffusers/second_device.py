"""A second device made of the CPU, and tasks on it: what fails only where a model is not on the CPU fails here too.

    python second_device.py TASK:MODEL [TASK:MODEL ...]

prints a JSON object with what was wrong with each, "" if nothing. The device is called `elsewhere`. Its tensors have
contents, and as those of a GPU they may not meet tensors of the CPU in an operation, but for single numbers, indices
and copies. A process of its own has it, for a device once known to torch stays known.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing

from corrdit import (
    CrossAttentionGuidance,
    MotionTransfer,
    PointTracker,
    TokenGrid,
    backbone_of,
    capture,
    load_backbone,
    ops,
)
from corrdit.integrations.diffusers.analysis.exploration import Setting, explore
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.transfer_settings import METHODS
from corrdit.testing import tiny_generation, tiny_pipeline

NAME = "elsewhere"
EMBEDDING, INJECTIONS, WORDED = "embedding", ("injection", "query-injection"), ("path",)
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Module(backend_registration._DummyBackendModule):
    """What autocast asks of a device."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class There(Tensor):
    """A tensor of the device.

    Args:
        held: its contents.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: object, **__: object) -> Any:
        raise TypeError(f"a tensor of {NAME} has no array")

    __array__ = numpy

    def __repr__(self, **_: object) -> str:
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def is_there(device: object) -> bool:
    return device is not None and torch.device(device).type == NAME


def dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation with a tensor of the device, or that makes one."""
    if torch.is_inference_mode_enabled() and func._can_decompose():
        with Device():
            return func.decompose(*args, **kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    if there and func not in COPIES:
        indices = args[1] if func in INDEXED and isinstance(args[0], There) else ()
        here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.ndim]
        if any(all(tensor is not index for index in indices) for tensor in here):
            raise RuntimeError(f"{func} of tensors on two devices: {[(t.device.type, *t.shape) for t in tensors]}")
    plain, options = pytree.tree_map_only(There, lambda tensor: tensor.held, (args, kwargs))
    device = options.get("device")
    if device is not None:
        options["device"] = torch.device("cpu")
    with _disable_current_modes():
        result = func(*plain, **options)
    if func is aten.copy_.default:
        return args[0]
    if not (there if device is None else is_there(device)):
        return result
    copied = func is aten._to_copy.default
    made = pytree.tree_map_only(Tensor, lambda t: There(t.clone() if copied and t is plain[0] else t), result)
    return made if copied or not there else return_and_correct_aliasing(func, args, kwargs, made)


class Device(TorchDispatchMode):
    """Makes tensors on the device, and brings those of the CPU there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is aten.to.device and is_there(args[1]) and not isinstance(args[0], There):
            return There(args[0].to(args[2]).clone())
        leaves = pytree.tree_leaves((args, options))
        if is_there(options.get("device")) or any(isinstance(leaf, There) for leaf in leaves):
            return dispatched(func, args, options)
        return func(*args, **options)


class Literals(TorchFunctionMode):
    """Brings lists and numbers there, which torch does beneath all modes of dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device, value = options.pop("device", None), args[0]
            if func is torch.as_tensor and isinstance(value, Tensor):
                return value.to(device or value.device, options.get("dtype") or value.dtype)
            value = [part.item() if isinstance(part, Tensor) else part for part in value] if _listed(value) else value
            made = func(value, *args[1:], **options)
            return made if device is None else made.to(device)
        if func is Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(args[1], dtype=options.get("dtype", args[0].dtype)).to(NAME)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            place = args[1] if isinstance(args[1], tuple) else (args[1],)
            place = tuple(torch.tensor(part) if isinstance(part, list) else part for part in place)
            args = (args[0], place, *args[2:])
        return func(*args, **options)


def _listed(value: object) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value)


@contextlib.contextmanager
def second_device() -> Iterator[None]:
    with Literals(), Device():
        yield


def moved(value: Any, device: str) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def model(name: str, device: str) -> tuple[Backbone, dict[str, Any]]:
    """A model with the arguments of its call."""
    if name == "embedded":
        call = {"prompt": "a red disc", "num_frames": 8, "height": 32, "width": 32, "num_inference_steps": 2}
        backbone = load_backbone("embedded")
    else:
        call = tiny_generation(name, steps=2)
        backbone = backbone_of(tiny_pipeline(name))
    backbone.pipe.to(device)
    call = {**moved(call, device), "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return backbone, call


def clip(call: dict[str, Any]) -> np.ndarray:
    size = (call["num_frames"], call["height"], call["width"], 3)
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def captured(name: str, device: str) -> list[Tensor]:
    backbone, call = model(name, device)

    def motion(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        return ops.soft_displacement(q, k, grid, key_mask=key_mask)

    with capture(backbone.pipe, layers=[0, -1], steps=[-1], operation=motion) as found:
        frames = backbone.pipe(**call).frames
    assert {result.device.type for result in found.values()} == {device}
    return [*found.values(), frames]


def guided(name: str, device: str) -> list[Tensor]:
    backbone, call = model(name, device)
    results = []
    for renormalize in (True, False):
        with CrossAttentionGuidance(backbone, layers=[0], renormalize=renormalize):
            call["generator"].manual_seed(0)
            results.append(backbone.pipe(**call).frames)
    return results


def explored(name: str, device: str) -> list[Tensor]:
    backbone, call = model(name, device)
    found = explore(backbone, clip(call), layers=[0], prompt="a red disc" if name == "embedded" else "")
    answer = found.ask(0, 10, 10, Setting(0, found.steps[0]))
    return [answer.costs, torch.as_tensor(answer.xy), answer.words, answer.frames]


def tracked(name: str, device: str) -> list[Tensor]:
    backbone, call = model(name, device)
    tracks = PointTracker(backbone).track(clip(call), [(0, 10.0, 10.0), (3, 20.0, 5.0)])
    return [torch.as_tensor(tracks.xy), torch.as_tensor(tracks.score)]


def transferred(method: str, name: str, device: str) -> list[Tensor]:
    backbone, call = model(name, device)
    way: dict[str, Any] = {"optimise": EMBEDDING} if method == EMBEDDING else {"method": method}
    if method in INJECTIONS:
        way["injection_blocks"] = (0,)
    transfer = MotionTransfer(backbone, steps=2, guided_share=0.5, optimisation_steps=1, **way)
    of_transfer = {"num_frames", "height", "width", "num_inference_steps", "generator", "output_type"}
    found = transfer(clip(call), **{key: value for key, value in call.items() if key not in of_transfer})
    return [torch.from_numpy(found.losses)]


def planted(name: str, device: str) -> list[Tensor]:
    """A mistake that the CPU forgives: a table made there."""
    backbone, call = model(name, device)

    def motion(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        return ops.soft_displacement(q, k, grid) + torch.arange(2.0)

    with capture(backbone.pipe, layers=[0], steps=[-1], operation=motion) as found:
        backbone.pipe(**call)
    return list(found.values())


TASKS: dict[str, Callable[[str, str], list[Tensor]]] = {
    "capture": captured,
    "guidance": guided,
    "tracking": tracked,
    "explore": explored,
    "planted": planted,
    **{method: functools.partial(transferred, method) for method in (*METHODS, EMBEDDING) if method not in WORDED},
}


def difference(case: str) -> str:
    """What is wrong with a task on the device: an error, or that its results are not those of the CPU."""
    task, name = case.split(":")
    expected = TASKS[task](name, "cpu")
    try:
        with second_device():
            found = moved(TASKS[task](name, NAME), "cpu")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    except Exception as error:
        ours = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        return f"{type(error).__name__}: {error} in {' '.join(place for place in ours if '/corrdit/' in place)}"
    return ""


def main(*cases: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    print(json.dumps({case: difference(case) for case in cases}))


if __name__ == "__main__":
    main(*sys.argv[1:])
