"""Transformers whose tokens are spread over processes by diffusers' context parallelism.

Each process has a contiguous part of the tokens in every layer, in the order of its rank, and so of queries and keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F

from corrdit.integrations.diffusers.block_layouts import TransformerLayout

KEPT_GRAPH_IS_SPREAD = (
    "keep_graph=True cannot be had under context parallelism, where queries and keys are joined from several processes "
    "without their graph; load the model on one device"
)


def token_group(holder: object) -> dist.ProcessGroup | None:
    """The processes among which the tokens of a transformer, or of an attention processor, are spread; None for one."""
    context = getattr(getattr(holder, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(context, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


def output_options(transformer: torch.nn.Module) -> dict[str, bool]:
    """Arguments of a forward by which it gives a tuple where its tokens are spread: the hooks know no other output."""
    return {} if token_group(transformer) is None else {"return_dict": False}


def gathered(part: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """The parts of all processes of the group, joined in the order of their ranks, on each of them; without gradients.

    Args:
        part: of this process; of equal size to the others' but in `dim`.
        group: of processes, all of which have to call this.
        dim: which is joined.
    """
    part = part.detach()
    own = torch.tensor([part.shape[dim]], device=part.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    lengths = [int(size) for size in sizes]
    room = max(lengths)
    padding = [0, 0] * (part.ndim - 1 - dim % part.ndim) + [0, room - part.shape[dim]]
    padded = F.pad(part, padding).contiguous()
    others = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(others, padded, group=group)
    return torch.cat([other.narrow(dim, 0, length) for other, length in zip(others, lengths, strict=True)], dim=dim)


def check_agreed(group: dist.ProcessGroup, settings: Mapping[str, object]) -> None:
    """Compares settings among the processes of a group, each of which has to call this.

    Where they differ, one process would wait for others in a layer that those do not stop at.

    Args:
        group: of processes.
        settings: by name; numbers, words and lists of them.

    Raises:
        ValueError: in every process, where some differ, with what each has.
    """
    accelerator = torch.accelerator.current_accelerator()
    on_cpu = accelerator is None or "gloo" in str(dist.get_backend(group))
    device = torch.device("cpu") if on_cpu else accelerator
    said = bytearray(json.dumps(settings, sort_keys=True).encode() + b"\n")
    every = gathered(torch.frombuffer(said, dtype=torch.uint8).to(device), group, 0)
    found = [json.loads(line) for line in bytes(every.tolist()).splitlines()]
    differing = {
        name: [each.get(name) for each in found]
        for name in settings
        if any(each.get(name) != found[0].get(name) for each in found)
    }
    if differing:
        listed = "; ".join(
            f"{name} is {', '.join(f'{value!r} in process {rank}' for rank, value in enumerate(values))}"
            for name, values in differing.items()
        )
        raise ValueError(
            f"the processes among which the tokens of this transformer are spread ask for different things: {listed}; "
            "open the same capture in each of them"
        )


def check_spread(transformer: torch.nn.Module, layout: TransformerLayout, settings: Mapping[str, object]) -> None:
    """Refuses a capture that cannot read a transformer whose tokens are spread over processes.

    Args:
        transformer: to be captured.
        layout: of its family.
        settings: of the capture, by name.

    Raises:
        ValueError: settings that are not those of the other processes, or cannot be had; text among the tokens.
    """
    group = token_group(transformer)
    if group is None:
        return
    check_agreed(group, settings)
    if layout.text is not None:
        raise ValueError(
            f"{type(transformer).__name__} runs under context parallelism and has its text among the tokens of "
            "self-attention, of which every process has a part of its own, so that they cannot be joined; load it on "
            "one device"
        )
    if settings["keep_graph"]:
        raise ValueError(KEPT_GRAPH_IS_SPREAD)
    if settings["on_skip"] == "compute":
        raise ValueError(
            'on_skip="compute" runs the model without the hooks round it, which spread its tokens under context '
            'parallelism; switch the cache off, or capture with on_skip="error"'
        )
