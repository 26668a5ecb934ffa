"""Which weights lie on the card while a phase runs: by the placement, as diffusers and accelerate move them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.diffusers.planning.memory_trace import MemoryTrace

Bytes = dict[str, int]
"""Of weights, by component."""

Move = tuple[nn.Module, str, torch.dtype]
"""A weight that is on the card while a module runs: its holder, its name, and the type it comes in."""


def bytes_of(parts: Mapping[str, nn.Module], placement: Placement) -> Bytes:
    """Bytes of the weights as they are kept, wherever that is."""
    found = {}
    for name, part in parts.items():
        tensors = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if name.startswith("transformer"):
            packed = [weight for _, holder in _packed(part, placement) for weight in holder.parameters(recurse=False)]
            size -= sum(weight.numel() * (weight.element_size() - 1) for weight in packed)
        found[name] = size
    return found


def resident(order: Sequence[str], parts: Bytes, placement: Placement) -> list[Bytes]:
    """What lies on the card for the whole of each phase.

    Args:
        order: the component that runs in each phase, one after the other; "" where all are sent back between two.
        parts: bytes by component, in the order in which diffusers' model offloading chains them.
        placement: of the model.
    """
    if placement.parts == "device":
        return [dict(parts) for _ in order]
    if placement.parts == "offload_groups":
        return [{"vae": parts["vae"]} if "vae" in parts else {} for _ in order]
    if placement.parts == "offload_layers":
        return [{} for _ in order]
    chain, there, found = list(parts), list[str](), []
    for component in order:
        if not component:
            there = []
        elif component not in there:
            # A model that is brought in sends away the one before it in the chain, and no other.
            place = chain.index(component)
            there = [name for name in there if place == 0 or name != chain[place - 1]] + [component]
        found.append({name: parts[name] for name in there})
    return found


@contextlib.contextmanager
def moving(parts: Mapping[str, nn.Module], placement: Placement, trace: MemoryTrace) -> Iterator[None]:
    """Inside, modules take the weights that the placement brings for each of their forwards, and give them back."""
    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            for module, moves in _moves(name, part, placement):
                Bringing(module, moves, trace).attach(stack)
        yield


def _moves(name: str, part: nn.Module, placement: Placement) -> Iterable[tuple[nn.Module, list[Move]]]:
    transformer = name.startswith("transformer")
    packed = _packed(part, placement) if transformer else []
    stored = {id(holder) for _, holder in packed}
    if placement.parts == "offload_groups" and transformer:
        blocks = [
            block for list_ in layout_of(part).block_lists(part) for block in part.get_submodule(list_).children()
        ]
        inside = {id(module) for block in blocks for module in block.modules()}
        for block in blocks:
            yield block, _weights(block.modules(), stored)
        yield part, _weights((module for module in part.modules() if id(module) not in inside), stored)
    elif placement.parts == "offload_layers" or (placement.parts == "offload_groups" and name != "vae"):
        for module in part.modules():
            if moves := _weights([module], stored):
                yield module, moves
    for compute, holder in packed:
        yield holder, [(holder, key, compute) for key, weight in holder._parameters.items() if weight is not None]


def _weights(modules: Iterable[nn.Module], packed: set[int]) -> list[Move]:
    return [
        (module, key, torch.int8 if id(module) in packed else weight.dtype)
        for module in modules
        for key, weight in module._parameters.items()
        if weight is not None
    ]


def _packed(part: nn.Module, placement: Placement) -> list[tuple[torch.dtype, nn.Module]]:
    """Modules whose weights are kept in 8 bits, with the type they compute in."""
    if placement.weights == "own":
        return []
    if placement.weights == "int8":
        return [(module.weight.dtype, module) for module in part.modules() if isinstance(module, nn.Linear)]
    from diffusers.hooks import layerwise_casting

    patterns = set(layerwise_casting.DEFAULT_SKIP_MODULES_PATTERN)
    for name in ("_keep_in_fp32_modules", "_skip_layerwise_casting_patterns"):
        patterns |= set(getattr(part, name, None) or ())
    supported = layerwise_casting._GO_LC_SUPPORTED_PYTORCH_LAYERS
    return [
        (next(module.parameters(recurse=False)).dtype, module)
        for name, module in part.named_modules()
        if isinstance(module, supported)
        and not any(re.search(pattern, name) for pattern in patterns)
        and list(module.parameters(recurse=False))
    ]


class Bringing:
    """Weights that come for a forward of a module and go behind it; what autograd saved of them stays."""

    def __init__(self, module: nn.Module, moves: list[Move], trace: MemoryTrace) -> None:
        self._module, self._moves, self._trace = module, moves, trace
        self._own: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._bytes: list[torch.Tensor] = []

    def attach(self, stack: contextlib.ExitStack) -> None:
        stack.callback(self._module.register_forward_pre_hook(self._bring).remove)
        stack.callback(self._module.register_forward_hook(self._send_back, always_call=True).remove)

    def described(self) -> tuple[object, ...]:
        """What it brings, and whether that is there."""
        return (bool(self._own), *((key, dtype) for _, key, dtype in self._moves))

    def _bring(self, *_: object) -> None:
        if self._own:
            return
        for holder, key, dtype in self._moves:
            weight = holder._parameters[key]
            assert weight is not None
            self._own.append((holder, key, weight))
            with self._trace.kind("weights"):
                # Kept in 8 bits they come in bytes; the copy that computes has the type of the model.
                came = torch.empty_like(weight, dtype=dtype)
            if dtype == torch.int8:
                self._bytes.append(came)
                continue
            holder._parameters[key] = nn.Parameter(came, requires_grad=False)

    def _send_back(self, *_: object) -> None:
        for holder, key, weight in self._own:
            holder._parameters[key] = weight
        self._own, self._bytes = [], []
