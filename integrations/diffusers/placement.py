"""Where the parts of a model go that does not fit one GPU: by what diffusers and accelerate have.

`"device"`: everything on the process's device. `"offload"`: diffusers' model offloading, which keeps text encoder,
transformer and codec in the computer's memory and moves each to the device while it runs. `"offload_layers"`:
diffusers' sequential offloading, the same for every layer; slow, and needs the least. `"shards"`: accelerate spreads
the transformer's blocks over all GPUs that one process sees (one process a machine: `--processes 1`).

And how the codec, whose memory grows with the size of the frames, works in parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline

from corrdit.integrations.diffusers.backbones import loading
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.presets import Preset, checked_preset

PLACEMENTS = ("device", "offload", "offload_layers", "shards")


def placed_backbone(
    model: str | os.PathLike[str] | Backbone,
    *,
    device: torch.device,
    dtype: torch.dtype | str | None,
    placement: str,
    tiled: bool = False,
    preset: Preset | str | None = None,
    on_loaded: Callable[[Backbone], None] | None = None,
) -> Backbone:
    """A backbone, loaded where it is not loaded already, with its parts where they run.

    Args:
        model: for `corrdit.load_backbone`, or a backbone, which is left where it is.
        device: of the process.
        dtype: a type of torch or its name; None for the model's own (bfloat16 where parts are offloaded or spread).
        placement: one of `PLACEMENTS`.
        tiled: whether the codec works in tiles and slices, which takes less memory and gives slightly other values.
        preset: for `corrdit.load_backbone`.
        on_loaded: called with the backbone while all its weights are in memory.

    Raises:
        ValueError: what `load_backbone` refuses, a placement that needs a GPU where there is none, or a backbone that
            is loaded already and should be placed.
    """
    name = loading.named_dtype(dtype)
    precision: torch.dtype | None = None if name is None else getattr(torch, name)
    if not isinstance(model, (str, os.PathLike)):
        if placement != "device":
            raise ValueError(
                f"placement={placement!r} is for a model that is loaded by name; this one is loaded already"
            )
        backbone = model
    elif placement == "device":
        backbone = loading.load_backbone(model, device=device, dtype=precision, preset=preset)
    elif device.type == "cpu":
        raise ValueError(f"placement={placement!r} moves parts of the model to a GPU, and this process has none")
    else:
        backbone = loading.load_backbone(model, device="cpu", dtype=precision or torch.bfloat16, preset=preset)
    if on_loaded is not None:
        on_loaded(backbone)
    if placement != "device":
        place(backbone.pipe, placement, device)
    if tiled:
        tile(backbone.pipe)
    return backbone


def tile(pipe: DiffusionPipeline) -> None:
    """Have the codec of a pipeline work in tiles and slices, as DiffTrack's released scripts do.

    Raises:
        ValueError: a codec that cannot.
    """
    missing = [name for name in ("enable_tiling", "enable_slicing") if not hasattr(pipe.vae, name)]
    if missing:
        raise ValueError(f"the codec {type(pipe.vae).__name__} has no {missing[0]}; leave tiled out")
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()


def preset_for_loading(
    model: str | os.PathLike[str] | Backbone, preset: Preset | str | os.PathLike[str] | None
) -> Preset | str | None:
    """What `load_backbone` is given to load a model with: a `Preset`, "published", or None for the model's own.

    Raises:
        FileNotFoundError, ValueError: a file that is not there or holds no preset, or a model that is loaded already.
    """
    if preset is None:
        return None
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            "model_preset is for a model that is loaded by name; give corrdit.load_backbone the preset of this one"
        )
    return checked_preset(preset)


def place(pipe: DiffusionPipeline, placement: str, device: torch.device) -> None:
    """Put the parts of a pipeline that lies in the computer's memory where they run."""
    if placement == "offload":
        pipe.enable_model_cpu_offload(device=device)
    elif placement == "offload_layers":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        transformer, pipe.transformer = pipe.transformer, None
        pipe.to(device)
        pipe.transformer = transformer
        spread(transformer, available_memory())


def spread(transformer: torch.nn.Module, memory: dict[int | str, int]) -> None:
    """Put the blocks of a transformer, none of them divided, on devices that have so many bytes each."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(getattr(transformer, "_no_split_modules", None) or [])
    kept = {"no_split_module_classes": whole, "dtype": next(transformer.parameters()).dtype}
    balanced = get_balanced_memory(transformer, max_memory=memory, **kept)
    dispatch_model(transformer, infer_auto_device_map(transformer, max_memory=balanced, **kept))


def available_memory() -> dict[int | str, int]:
    """Free bytes of every GPU this process sees."""
    return {index: torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}
