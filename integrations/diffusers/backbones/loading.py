"""Finding and loading a backbone: embedded, from a folder, from the hub, or from someone else's package."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import TypedDict

import torch

from corrdit.arguments import DTYPES, dtype_name, nearest
from corrdit.integrations.components import INDEX_FILE, loaded_models, missing_package, pipeline_class, read_index
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.followers import FOLLOWERS, follower_preset
from corrdit.integrations.diffusers.backbones.presets import Preset, checked_preset
from corrdit.integrations.diffusers.backbones.published_models import PUBLISHED_MODELS, published_preset
from corrdit.integrations.diffusers.backbones.table import FAMILIES
from corrdit.integrations.diffusers.layouts import Pipeline, layout_of

ENTRY_POINT_GROUP = "corrdit.backbones"
EMBEDDED = "embedded"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_backbone(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    preset: Preset | str | os.PathLike[str] | None = None,
) -> Backbone:
    """A video diffusion model ready to be read.

    Args:
        name: "embedded"; a short name of a published model (`available_backbones` lists them); a name another package
            registered under the entry-point group `corrdit.backbones`; a folder written by a pipeline's
            `save_pretrained`, with an optional `preset.json`; or a hub id such as "THUDM/CogVideoX-2b".
        device: where to put it; None for the CPU.
        dtype: precision, as torch's type or by its name ("bfloat16", "bf16"); None for float32 on the CPU and the
            published precision (or bfloat16) elsewhere.
        preset: settings in place of the model's own ("default"): a `Preset`, a file that `corrdit calibrate` wrote, or
            "published" for DiffTrack's and DiTFlow's released procedures, with the settings that are published for a
            model of this shape, if any; or "ditracker" or "heft" for what these trackers read of this model.

    Raises:
        FileNotFoundError: no such preset file.
        ValueError: an unknown name (with what is accepted), a folder without a pipeline, a hub id that is not on this
            machine while offline or cannot be fetched, a model that is not supported, with the reason, a preset that
            is none or names a layer the model does not have, or a device or dtype that cannot be used.
    """
    chosen = checked_preset(preset)
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(
            f"name must be a string or a path, got a {type(name).__name__}; backbone_of takes a pipeline that is loaded"
        )
    precision = named_dtype(dtype)
    backbone = _loaded(
        os.fspath(name), _usable_device(device), None if precision is None else getattr(torch, precision)
    )
    if chosen is None:
        return backbone
    own = backbone.preset
    if isinstance(chosen, str) and chosen in FOLLOWERS:
        chosen = follower_preset(chosen, backbone)
    if not isinstance(chosen, Preset):
        chosen = (published_preset(backbone.family, backbone.layers, backbone.heads) or own).published()
    elif chosen.transfer is None and own.transfer is not None:
        further = tuple(chosen.moved_to_layer(settings) for settings in own.further_transfers)
        chosen = replace(chosen, transfer=chosen.moved_to_layer(own.transfer), further_transfers=further)
    return backbone_of(backbone.pipe, name=backbone.name, preset=chosen)


def named_dtype(dtype: torch.dtype | str | None) -> str | None:
    """The name of a precision, such as "bfloat16", from it, a short form of it or torch's type; None for None.

    Raises:
        ValueError: no precision of a model.
    """
    return None if dtype is None else dtype_name("dtype", dtype, (*DTYPES, "float64"))


def _loaded(text: str, device: torch.device, dtype: torch.dtype | None) -> Backbone:
    if text == EMBEDDED:
        return _embedded(device, dtype or default_dtype(text, device))
    registered = _third_party().get(text)
    if registered is not None:
        return _from_entry_point(registered, device, dtype)
    folder = pathlib.Path(text)
    if text and folder.is_dir():
        return _from_folder(folder, device, dtype)
    hub_id = PUBLISHED_MODELS[text.lower()].hub_id if text.lower() in PUBLISHED_MODELS else text
    if folder.is_absolute() or text.startswith(".") or not _HUB_ID.fullmatch(hub_id):
        raise ValueError(f"unknown model {text!r}{_nearest_model(text)}; accepted are {_accepted()}")
    return _from_hub(hub_id, device, dtype)


def _usable_device(device: str | torch.device | None) -> torch.device:
    try:
        usable = torch.device(device or "cpu")
        torch.empty(0, device=usable)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {device!r} cannot be used on this machine: {reason}") from error
    return usable


class BackboneRow(TypedDict):
    """What is known of a model before it is loaded; None for what is not."""

    name: str
    family: str | None
    layers: int | None
    heads: int | None
    preset: Preset | None
    source: str


def available_backbones() -> list[BackboneRow]:
    """What `load_backbone` takes by name, one row each: name, family, layers, heads, preset and source.

    Nothing is downloaded; `layers`, `heads` and `preset` are None where they are only known once loaded.
    """
    published = [
        BackboneRow(
            name=name,
            family=model.family,
            layers=model.layers,
            heads=model.heads,
            preset=model.preset,
            source=model.hub_id,
        )
        for name, model in PUBLISHED_MODELS.items()
    ]
    others = [_unknown(name, None, f"{point.value} (entry point)") for name, point in _third_party().items()]
    return [_embedded_row(), *published, *others]


def _unknown(name: str, family: str | None, source: str) -> BackboneRow:
    return BackboneRow(name=name, family=family, layers=None, heads=None, preset=None, source=source)


def backbone_of(pipe: Pipeline, *, name: str | None = None, preset: Preset | None = None) -> Backbone:
    """The backbone round a pipeline that is already loaded.

    Raises:
        ValueError: a pipeline without a transformer that is known, with the reason or what is known.
    """
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, torch.nn.Module):
        raise ValueError(f"{type(pipe).__name__} has no transformer; give a video pipeline of {_families()}")
    layout_of(transformer)
    for candidate in type(transformer).__mro__:
        family = FAMILIES.get(candidate.__name__)
        if family is not None:
            return family(pipe, name=name or type(pipe).__name__, preset=preset)
    raise ValueError(f"{type(transformer).__name__} can be captured but is no backbone; backbones are {_families()}")


def _embedded(device: torch.device, dtype: torch.dtype) -> Backbone:
    from corrdit.integrations.embedded import read_preset

    pipe = _embedded_pipeline(device, dtype)
    return backbone_of(pipe, name=EMBEDDED, preset=Preset.from_mapping(read_preset()))


def _embedded_pipeline(device: torch.device, dtype: torch.dtype, folder: str | None = None) -> Pipeline:
    from corrdit.integrations.embedded import load_embedded_pipeline

    with _quiet_loading():
        pipe: Pipeline = load_embedded_pipeline(folder, dtype=dtype).to(device)
    return pipe


def _embedded_row() -> BackboneRow:
    from corrdit.integrations.embedded.preset import WEIGHTS, read_preset

    row = _unknown(EMBEDDED, "cogvideox", f"missing: {WEIGHTS} holds no weights (corrdit train makes them)")
    if not (WEIGHTS / "model_index.json").is_file():
        return row
    config = json.loads((WEIGHTS / "transformer" / "config.json").read_text(encoding="utf-8"))
    row |= {"layers": config["num_layers"], "heads": config["num_attention_heads"], "source": "in the package"}
    return {**row, "preset": Preset.from_mapping(read_preset())}


def _from_entry_point(point: EntryPoint, device: torch.device, dtype: torch.dtype | None) -> Backbone:
    factory: Callable[..., object] = point.load()
    backbone = factory(device=device, dtype=dtype)
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"the entry point {point.name} = {point.value} returned {type(backbone).__name__}; it must be a function "
            "(device, dtype) -> Backbone"
        )
    return backbone


def _from_folder(folder: pathlib.Path, device: torch.device, dtype: torch.dtype | None) -> Backbone:
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        raise ValueError(
            f"{folder} holds no diffusers pipeline (no model_index.json); give a folder of save_pretrained"
        )
    pipe = _load_pipeline(folder, str(folder), device, dtype or default_dtype(folder, device))
    preset_file = folder / "preset.json"
    preset = Preset.from_file(preset_file) if preset_file.is_file() else None
    return backbone_of(pipe, name=str(folder), preset=preset)


def _from_hub(hub_id: str, device: torch.device, dtype: torch.dtype | None) -> Backbone:
    from huggingface_hub import constants, hf_hub_download

    offline = constants.HF_HUB_OFFLINE
    if not offline:
        _check_reachable(hub_id)
    try:
        index_file = pathlib.Path(hf_hub_download(hub_id, INDEX_FILE, local_files_only=offline))
        kind = pipeline_class(hub_id, str(read_index(index_file.parent)["_class_name"]))
        with _quiet_loading():
            folder = pathlib.Path(kind.download(hub_id, local_files_only=offline))
        pipe = _load_pipeline(folder, hub_id, device, dtype or default_dtype(hub_id, device))
    except OSError as error:
        reason = "offline (HF_HUB_OFFLINE is set) and it is not in the local cache" if offline else str(error)
        known = hub_id in {model.hub_id for model in PUBLISHED_MODELS.values()}
        near = "" if known else _nearest_model(hub_id)
        raise ValueError(
            f"cannot load {hub_id}: {reason}{near}; without a network there are {EMBEDDED!r} and folders of "
            "save_pretrained"
        ) from error
    return backbone_of(pipe, name=hub_id)


def _check_reachable(hub_id: str) -> None:
    """Refuses a model that is neither in the local cache nor reachable, after one request.

    Without a network a download tells so only after half a minute of retries. This request has the hub's own time
    limit (HF_HUB_ETAG_TIMEOUT); where it is answered at all, the download follows with all its retries.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(hub_id, INDEX_FILE), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, INDEX_FILE))
    except HfHubHTTPError:
        return
    # The class of the error is that of the hub's HTTP library, which differs between its versions.
    except Exception as error:
        raise ValueError(
            f"cannot load {hub_id}: it is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}: {error}); without a network there are {EMBEDDED!r} and folders of "
            "save_pretrained"
        ) from error


def _load_pipeline(folder: pathlib.Path, source: str, device: torch.device, dtype: torch.dtype) -> Pipeline:
    index = read_index(folder)
    class_name = str(index["_class_name"])
    if class_name == "EmbeddedVideoPipeline":
        return _embedded_pipeline(device, dtype, str(folder))
    kind = pipeline_class(source, class_name)
    absent = {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    low_memory = importlib.util.find_spec("accelerate") is not None
    try:
        with _quiet_loading():
            pipe = kind.from_pretrained(
                str(folder),
                torch_dtype=dtype,
                local_files_only=True,
                **loaded_models(folder, dtype=dtype, low_cpu_mem_usage=low_memory),
                **absent,
            )
    except ImportError as error:
        raise missing_package(source, class_name, error) from error
    pipe.set_progress_bar_config(disable=True)
    placed: Pipeline = pipe.to(device)
    return placed


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars for a pipeline's components and their weights; and newer versions of diffusers warn about
    `torch_dtype`, the only name the older ones know."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def default_dtype(name: str | os.PathLike[str], device: torch.device) -> torch.dtype:
    """The precision a model is loaded with where none is asked for; `name` and `device` as for `load_backbone`."""
    if device.type == "cpu" or name == EMBEDDED:
        return torch.float32
    published = {known: model.dtype for short, model in PUBLISHED_MODELS.items() for known in (short, model.hub_id)}
    text = os.fspath(name)
    return getattr(torch, published.get(text, published.get(text.lower(), "bfloat16")))


def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _families() -> str:
    return ", ".join(sorted(FAMILIES))


def _names() -> list[str]:
    return [EMBEDDED, *PUBLISHED_MODELS, *_third_party()]


def _nearest_model(text: str) -> str:
    """The end of a message, by names and hub ids."""
    return nearest(text, [*_names(), *(model.hub_id for model in PUBLISHED_MODELS.values())])


def _accepted() -> str:
    return f"{', '.join(_names())}, a folder written by save_pretrained, or a hub id such as THUDM/CogVideoX-2b"
