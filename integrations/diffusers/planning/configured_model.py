"""A model from configurations alone: of fake tensors, without contents, or with random weights where it is to run."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from corrdit.integrations.components import INDEX_FILE, component_class, pipeline_class, read_index
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.checkpoints import Part
from corrdit.integrations.diffusers.backbones.loading import EMBEDDED, backbone_of, default_dtype
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.backbones.published_checkpoints import CHECKPOINTS, checkpoint_of

UNKNOWN = "unknown; no public file states its configuration, so it is in no figure"
ENCODERS = "text_encoder"
"""How the names of text encoders begin."""
Factory = Any
"""A class of diffusers or transformers, known by its name alone."""


@dataclass
class ConfiguredModel:
    """A model without contents, or with random ones.

    Args:
        backbone: whose pipeline has no text encoder.
        encoders: text encoders by component; none of a model that has contents.
        device: of its tensors, fake ones included.
        mode: in which it runs without contents; None for one that has some.
        dtype: of its weights.
        size: frames, height and width it was made for, where that is known.
        sources: where the configuration of each component is from, or that it is not known.
    """

    backbone: Backbone
    encoders: dict[str, nn.Module]
    device: torch.device
    mode: FakeTensorMode | None
    dtype: torch.dtype
    size: tuple[int, int, int] | None
    sources: dict[str, str]

    @property
    def parts(self) -> dict[str, nn.Module]:
        """All components with weights, in the order in which they run."""
        found = {name: part for name, part in self.backbone.pipe.components.items() if isinstance(part, nn.Module)}
        return {**self.encoders, **{name: found[name] for name in sorted(found)}}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, code runs on fake tensors, or on real ones where the model has contents."""
        with warnings.catch_warnings(), self.mode or contextlib.nullcontext():
            warnings.simplefilter("ignore")
            yield


def configured_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    preset: Preset | None = None,
    random: bool = False,
) -> ConfiguredModel:
    """A model without contents, or with random ones.

    Args:
        name: "embedded", a folder with `model_index.json` and the components' `config.json`, or a published checkpoint
            (`CHECKPOINTS`) by its short name or hub id. No weights are needed, and nothing is downloaded.
        dtype: of the weights; None for what `load_backbone` takes on the device.
        device: that is planned for, or where the random weights are put.
        preset: of the backbone; None for its own.
        random: draw weights as the classes do when they are made. Text encoders are left out.

    Raises:
        ValueError: an unknown model, or a folder whose configurations describe none.
    """
    text = os.fspath(name)
    folder = pathlib.Path(text)
    checkpoint = checkpoint_of(text)
    size: tuple[int, int, int] | None = None
    unknown: tuple[str, ...] = ()
    if text == EMBEDDED:
        from corrdit.integrations.embedded.preset import WEIGHTS, read_preset

        folder, preset = WEIGHTS, preset or Preset.from_mapping(read_preset())
    if (folder / INDEX_FILE).is_file():
        pipeline, parts, values = _parts_of_folder(folder)
        if preset is None and (folder / "preset.json").is_file():
            preset = Preset.from_file(folder / "preset.json")
    elif checkpoint is not None:
        pipeline, parts, size = checkpoint.pipeline, dict(checkpoint.parts), checkpoint.size
        values, unknown = dict(checkpoint.options), checkpoint.unknown
        dtype = dtype or (getattr(torch, checkpoint.dtype) if device.type != "cpu" else None)
    else:
        raise ValueError(
            f"unknown model {text!r}; known without weights are {EMBEDDED}, {', '.join(CHECKPOINTS)} and folders with "
            f"{INDEX_FILE} and a config.json for each component"
        )
    if pipeline == "EmbeddedVideoPipeline":
        import corrdit.integrations.embedded.pipeline  # noqa: F401  (its parts are found by their modules' names)
    chosen = dtype or default_dtype(text, device)
    mode = None if random else FakeTensorMode(allow_non_fake_inputs=True)
    place = device if random else torch.device("cpu")
    built = {
        part: _built(part, description, chosen, mode, place)
        for part, description in parts.items()
        if not (random and part.startswith(ENCODERS))
    }
    encoders = {part: built.pop(part) for part in sorted(built) if part.startswith(ENCODERS)}
    backbone = backbone_of(_assembled(pipeline, text, {**values, **built}), name=text, preset=preset)
    sources = {part: description.source for part, description in parts.items()}
    sources |= {part: UNKNOWN for part in unknown if part not in parts}
    return ConfiguredModel(backbone, encoders, place, mode, chosen, size, sources)


def _parts_of_folder(folder: pathlib.Path) -> tuple[str, dict[str, Part], dict[str, Any]]:
    """Class of the pipeline, components with a configuration, and other values of the model index."""
    parts, values = {}, {}
    index = read_index(folder)
    for name, entry in index.items():
        files = [folder / name / file for file in ("config.json", "scheduler_config.json")]
        found = next((file for file in files if file.is_file()), None)
        if not isinstance(entry, list):
            if not name.startswith("_"):
                values[name] = entry
        elif entry[0] is not None and found is not None:
            config = json.loads(found.read_text(encoding="utf-8"))
            parts[name] = Part(entry[0], entry[1], config, str(found))
    for needed in ("transformer", "scheduler"):
        if needed not in parts:
            raise ValueError(f"{folder} has no configuration of a {needed}, so nothing can be said of it")
    return str(index["_class_name"]), parts, values


def _built(name: str, part: Part, dtype: torch.dtype, mode: FakeTensorMode | None, device: torch.device) -> Any:
    """A component; modules with fake or random weights of the type."""
    kind: Factory = component_class(part.library, part.kind)
    if kind is None:
        raise ValueError(f"{part.source}: the {name} is a {part.library}.{part.kind}, which is not known here")
    if not issubclass(kind, nn.Module):
        return kind.from_config(dict(part.config)) if hasattr(kind, "from_config") else None
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Fake as well, for a device mode that something left behind would have its way before this one's.
        with mode or contextlib.nullcontext(), torch.device("meta" if mode else device):
            if getattr(kind, "config_class", None) is not None:
                model = kind(kind.config_class(**part.config))
            else:
                model = kind.from_config(dict(part.config))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{part.source} describes no {part.kind} that can be built: {error}") from error
    finally:
        torch.set_default_dtype(default)
    model.requires_grad_(False).eval()
    for place, parameter in model.named_parameters():
        if _stays_single(model, place, dtype):
            parameter.data = parameter.data.float()
    if mode:
        _fill(model, mode)
    return model


def _stays_single(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether the libraries load a weight in float32 though another type is asked for."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if hasattr(model, "_keep_in_fp32_modules_strict"):
        # Of transformers, which has the others in float32 for the range of float16 alone.
        strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        kept = (kept if dtype == torch.float16 else set()).union(strict)
    return not kept.isdisjoint(name.split("."))


def _fill(model: nn.Module, mode: FakeTensorMode) -> None:
    """Fake tensors in place of those without storage; what is shared stays shared."""
    made: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        # Before a model's worth of memory is taken.
                        assert isinstance(fake, FakeTensor), "the mode of fake tensors is not at work"
                        is_weight = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_weight else fake
                    held[key] = made[id(tensor)]  # type: ignore[assignment]


class _NoSafetyChecker:
    """In place of NVIDIA's, without which a pipeline of Cosmos asks for its package; no task runs it."""


def _assembled(class_name: str, source: str, parts: Mapping[str, Any]) -> Any:
    if class_name == "EmbeddedVideoPipeline":
        from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline

        kind: Factory = EmbeddedVideoPipeline
    else:
        kind = pipeline_class(source, class_name)
    wanted = inspect.signature(kind.__init__).parameters
    given = {
        name: parts.get(name)
        for name, parameter in wanted.items()
        if name != "self" and (name in parts or parameter.default is inspect.Parameter.empty)
    }
    if "safety_checker" in wanted and given.get("safety_checker") is None:
        given["safety_checker"] = _NoSafetyChecker()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**given)
