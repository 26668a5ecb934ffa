"""Where the parts of a model lie and in what form: by what diffusers, accelerate and torchao have.

All that loads a model takes a `Placement`: `load`-like functions, the Lightning modules and, as --placement,
--codec-tiling, --codec-slicing and --weights, the command line.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from corrdit.arguments import choice, flag
from corrdit.integrations.diffusers.backbones import loading
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.presets import Preset, checked_preset
from corrdit.integrations.diffusers.backbones.published_models import PUBLISHED_MODELS
from corrdit.integrations.diffusers.host.forwards import transformers_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PLACEMENTS = ("device", "offload", "offload_groups", "offload_layers", "shards")
WEIGHTS = ("own", "float8", "int8")


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model lie, and in what form.

    Args:
        parts: "device": everything on the process's device. "offload": diffusers' model offloading, which keeps text
            encoder, transformer and codec in the computer's memory and moves each to the device while it runs.
            "offload_groups": diffusers' group offloading, which keeps the transformer there block by block and the
            text encoder layer by layer; slower, and the weights take next to nothing. "offload_layers": diffusers'
            sequential offloading, the same for every layer; slowest, and needs the least. "shards": accelerate spreads
            the transformer's blocks over all GPUs that one process sees (one process a machine: `--processes 1`).
        codec_tiling: the codec encodes and decodes tiles of a frame and blends them, so that its memory does not grow
            with the frame. Its results differ a little from those without.
        codec_slicing: the codec takes the videos of a batch one by one. Results are the same.
        weights: of the transformer. "own": in its precision. "float8": stored as float8_e4m3fn and cast to its
            precision layer by layer as they are used (diffusers' layerwise casting); norms and embeddings stay. "int8":
            linear layers as int8 with a scale for each output channel (torchao). The last two change results a little.

    Raises:
        ValueError: a word that is not known, or parts and weights that do not go together.
    """

    parts: str = "device"
    codec_tiling: bool = False
    codec_slicing: bool = False
    weights: str = "own"

    def __post_init__(self) -> None:
        choice("placement", self.parts, PLACEMENTS)
        choice("weights", self.weights, WEIGHTS)
        flag("codec_tiling", self.codec_tiling)
        flag("codec_slicing", self.codec_slicing)
        if self.weights != "own" and self.parts in ("offload_layers", "shards"):
            raise ValueError(
                f'weights="{self.weights}" does not go with placement="{self.parts}", for which accelerate replaces '
                'the weights one by one; take weights="own", or placement="offload" or "offload_groups"'
            )

    def described(self) -> dict[str, object]:
        """What of it can change results, by name; None for what does not."""
        weights = None if self.weights == "own" else self.weights
        return {"codec_tiling": self.codec_tiling or None, "weights_as": weights}


def placement_of(given: Placement | str) -> Placement:
    """A placement from itself, or from the word for its `parts`.

    Raises:
        ValueError: anything else.
    """
    if isinstance(given, Placement):
        return given
    if not isinstance(given, str):
        raise ValueError(f"placement must be a Placement or one of {', '.join(PLACEMENTS)}, got {given!r}")
    return Placement(given)


def released_placement(model: str | os.PathLike[str] | Backbone, device: torch.device | None) -> Placement:
    """How DiTFlow's released code runs a model for motion transfer: parts offloaded, the codec in tiles and slices.

    Everything on the device for all other models, for those that are loaded already, and without a GPU.
    """
    published = PUBLISHED_MODELS.get(os.fspath(model).lower()) if isinstance(model, (str, os.PathLike)) else None
    names = {known.hub_id: known for known in PUBLISHED_MODELS.values()}
    if isinstance(model, str):
        published = published or names.get(model)
    on_gpu = device is not None and device.type != "cpu"
    if published is None or published.preset.transfer is None or not on_gpu:
        return Placement()
    return Placement("offload", codec_tiling=True, codec_slicing=True)


def placed_backbone(
    model: str | os.PathLike[str] | Backbone,
    *,
    device: torch.device | None,
    dtype: torch.dtype | str | None,
    placement: Placement | str = "device",
    preset: Preset | str | None = None,
) -> Backbone:
    """A backbone, loaded where it is not loaded already, with its parts where they run.

    Args:
        model: for `corrdit.load_backbone`, or a backbone, which is left where it is.
        device: of the process; None for the CPU.
        dtype: a type of torch or its name; None for the model's own on the device.
        placement: or the word for its `parts`.
        preset: for `corrdit.load_backbone`.

    Raises:
        ValueError: what `load_backbone` refuses, a placement that needs a GPU where there is none, or a backbone that
            is loaded already and should be placed.
        ImportError: weights that need a package which is not installed.
    """
    wanted, device = placement_of(placement), device or torch.device("cpu")
    name = loading.named_dtype(dtype)
    precision: torch.dtype | None = None if name is None else getattr(torch, name)
    if wanted.weights == "int8" and importlib.util.find_spec("torchao") is None:
        raise ImportError('weights="int8" needs torchao, which is not installed; pip install torchao')
    if not isinstance(model, (str, os.PathLike)):
        if wanted != Placement():
            raise ValueError(f"placement={wanted} is for a model that is loaded by name; this one is loaded already")
        backbone = model
    elif wanted.parts == "device":
        backbone = loading.load_backbone(model, device=device, dtype=precision, preset=preset)
    elif device.type == "cpu":
        raise ValueError(f"placement={wanted.parts!r} moves parts of the model to a GPU, and this process has none")
    else:
        precision = precision or loading.default_dtype(model, device)
        backbone = loading.load_backbone(model, device="cpu", dtype=precision, preset=preset)
    if wanted != Placement():
        # Behind it weights may lie elsewhere or in another form.
        backbone.keep_fingerprint()
        place(backbone.pipe, wanted, device)
    return backbone


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


def place(pipe: DiffusionPipeline, placement: Placement | str, device: torch.device) -> None:
    """Put the parts of a pipeline where they run, from the computer's memory where they are not all on the device.

    Raises:
        ValueError: a codec that cannot do what is asked.
    """
    wanted = placement_of(placement)
    _set_codec(pipe, wanted)
    for transformer in transformers_of(pipe) if wanted.weights != "own" else ():
        _pack_weights(transformer, wanted.weights)
    if wanted.parts == "offload":
        pipe.enable_model_cpu_offload(device=device)
    elif wanted.parts == "offload_groups":
        _offload_groups(pipe, device)
    elif wanted.parts == "offload_layers":
        pipe.enable_sequential_cpu_offload(device=device)
    elif wanted.parts == "shards":
        _place_in_shards(pipe, device)


def _place_in_shards(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Transformers over all GPUs, one after another; the rest on the device."""
    known = transformers_of(pipe)
    spread_out = {
        name: part for name, part in pipe.components.items() if any(part is transformer for transformer in known)
    }
    try:
        for name in spread_out:
            setattr(pipe, name, None)
        pipe.to(device)
    finally:
        for name, transformer in spread_out.items():
            setattr(pipe, name, transformer)
    for transformer in spread_out.values():
        spread(transformer, available_memory())


def _set_codec(pipe: DiffusionPipeline, placement: Placement) -> None:
    for name, wanted in (("tiling", placement.codec_tiling), ("slicing", placement.codec_slicing)):
        if not wanted:
            continue
        enable = getattr(pipe.vae, f"enable_{name}", None)
        if enable is None:
            raise ValueError(f"codec_{name}: the codec {type(pipe.vae).__name__} has no {name}; leave it out")
        enable()


def _pack_weights(transformer: Any, weights: str) -> None:
    if weights == "float8":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)
        return
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig())


def _offload_groups(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Blocks of the transformers and layers of the rest; the codec, which is small, stays on the device.

    A codec's `encode` and `decode` are no forwards, so hooks round these do not see them.
    """
    from diffusers.hooks import apply_group_offloading

    resting, blocks = torch.device("cpu"), transformers_of(pipe)
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if name == "vae":
            part.to(device)
        elif any(part is block for block in blocks):
            apply_group_offloading(part, device, resting, offload_type="block_level", num_blocks_per_group=1)
        else:
            apply_group_offloading(part, device, resting, offload_type="leaf_level")


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
