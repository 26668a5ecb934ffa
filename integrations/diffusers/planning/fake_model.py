"""A model of fake tensors, from configurations alone: no weights are read, and none are made."""

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
Factory = Any
"""A class of diffusers or transformers, known by its name alone."""


@dataclass
class FakeModel:
    """A model without contents.

    Args:
        backbone: whose pipeline has no text encoder.
        encoders: text encoders by component.
        mode: in which it runs.
        dtype: of its weights.
        size: frames, height and width it was made for, where that is known.
        sources: where the configuration of each component is from, or that it is not known.
    """

    backbone: Backbone
    encoders: dict[str, nn.Module]
    mode: FakeTensorMode
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
        """Inside, code runs on fake tensors."""
        with warnings.catch_warnings(), self.mode:
            warnings.simplefilter("ignore")
            yield


def fake_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    preset: Preset | None = None,
) -> FakeModel:
    """A model without contents.

    Args:
        name: "embedded", a folder with `model_index.json` and the components' `config.json`, or a published checkpoint
            (`CHECKPOINTS`) by its short name or hub id. No weights are needed, and nothing is downloaded.
        dtype: of the weights; None for what `load_backbone` takes on the device.
        device: that is planned for.
        preset: of the backbone; None for its own.

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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    built = {part: _built(part, description, chosen, mode) for part, description in parts.items()}
    encoders = {part: built.pop(part) for part in sorted(built) if part.startswith("text_encoder")}
    backbone = backbone_of(_assembled(pipeline, text, {**values, **built}), name=text, preset=preset)
    sources = {part: description.source for part, description in parts.items()}
    sources |= {part: UNKNOWN for part in unknown if part not in parts}
    return FakeModel(backbone, encoders, mode, chosen, size, sources)


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


def _built(name: str, part: Part, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    """A component; modules with fake weights of the type."""
    kind: Factory = component_class(part.library, part.kind)
    if kind is None:
        raise ValueError(f"{part.source}: the {name} is a {part.library}.{part.kind}, which is not known here")
    if not issubclass(kind, nn.Module):
        return kind.from_config(dict(part.config)) if hasattr(kind, "from_config") else None
    try:
        # Fake as well, for a device mode that something left behind would have its way before this one's.
        with mode, torch.device("meta"):
            if getattr(kind, "config_class", None) is not None:
                model = kind(kind.config_class(**part.config))
            else:
                model = kind.from_config(dict(part.config))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{part.source} describes no {part.kind} that can be built: {error}") from error
    model.requires_grad_(False).eval()
    _fill(model, dtype, mode)
    return model


def _fill(model: nn.Module, dtype: torch.dtype, mode: FakeTensorMode) -> None:
    """Fake tensors in place of those without storage; what is shared stays shared."""
    made: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        kind = dtype if tensor.is_floating_point() else tensor.dtype
                        fake = torch.empty(tensor.shape, dtype=kind)
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
