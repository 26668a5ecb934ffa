"""How a model is used where nothing else is asked for: calibrated, published, or a starting point that says it is one.

A preset.json holds the entries of `ReadingPreset` beside `source`, and in the sections `tracking`, `guidance` and
`transfer` what differs from the defaults of the other parts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, TypeAlias, TypeVar

from corrdit.arguments import choice, finite_number, flag
from corrdit.files import parsed_json, written_beside
from corrdit.integrations.diffusers.transfer_settings import TransferSettings, changed_settings
from corrdit.tracking.options import PUBLISHED_TRACKING, ReadingPreset, TrackerOptions, changed_options

Entries: TypeAlias = Mapping[str, Any]
"""Of a preset.json, or of one of its sections, by name."""

CALIBRATED = "calibrated: "
"""How the source of settings begins that `corrdit calibrate` chose."""

PRESET_NAMES = ("default", "published", "ditracker", "heft")
"""A model's own settings; the published procedures with settings for a model of its shape; trackers of `followers`."""

DEFAULT_RENORMALIZE = True
"""Measured on the embedded model (benchmarks/results/guidance_quality.json): removing keys before the softmax makes
videos more consistent in time, dropping weights after it less."""


@dataclass(frozen=True)
class GuidancePreset:
    """Settings of cross-attention guidance for one model.

    Args:
        layers: attention layers that lose their cross-frame attention, counted over all blocks; None for the layer that
            is read.
        scale: guidance scale.
        classifier_free_scale: guidance_scale of the pipeline the results were made with.
        renormalize: whether keys are removed before the softmax; None as DiffTrack's released code: not with
            classifier-free guidance, and without it.
        source: where the settings come from.

    Raises:
        ValueError: an entry of another type or out of range.
    """

    layers: tuple[int, ...] | None = None
    scale: float = 1.0
    classifier_free_scale: float = 6.0
    renormalize: bool | None = DEFAULT_RENORMALIZE
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("scale", "classifier_free_scale"):
            finite_number(name, getattr(self, name))
        if self.renormalize is not None:
            flag("renormalize", self.renormalize)


@dataclass(frozen=True, init=False)
class Preset:
    """Settings of a model, which every class that takes a backbone reads.

    Args:
        reading: where queries and keys are read.
        tracking: options of `corrdit.PointTracker`. If they name layers they are for these, and do not count where
            others are asked for.
        guidance: of `corrdit.CrossAttentionGuidance`.
        transfer: of `corrdit.MotionTransfer`; None for those of a model of this shape.
        source: where the settings come from.
        further_transfers: settings of `corrdit.MotionTransfer` for other methods than that of `transfer`, one each.
        flat: entries of a preset.json by name in place of the parts (deprecated).
    """

    reading: ReadingPreset
    tracking: TrackerOptions
    guidance: GuidancePreset
    transfer: TransferSettings | None
    source: str
    further_transfers: tuple[TransferSettings, ...]

    def __init__(
        self,
        reading: ReadingPreset | int | None = None,
        tracking: TrackerOptions | Entries | None = None,
        guidance: GuidancePreset | None = None,
        transfer: TransferSettings | None = None,
        source: str = "given",
        further_transfers: tuple[TransferSettings, ...] = (),
        **flat: Any,
    ) -> None:
        if not isinstance(reading, (ReadingPreset, int)) and not (reading is None and "layer" in flat):
            raise ValueError(f"reading must be a ReadingPreset, such as ReadingPreset(layer=17), got {reading!r}")
        if flat or not isinstance(reading, ReadingPreset):
            _warn(f"Preset({', '.join(flat) or 'layer'})", "Preset(ReadingPreset(...), ...)")
            for name in flat:
                choice("an argument of a Preset", name, (*_READING, "guidance_layers"))
            known = {} if not isinstance(reading, ReadingPreset) else dataclasses.asdict(reading)
            given = {"layer": reading, **flat} if isinstance(reading, int) else {**known, **flat}
            if "guidance_layers" in given:
                guidance = dataclasses.replace(guidance or GuidancePreset(), layers=given.pop("guidance_layers"))
            reading = ReadingPreset(**given)
        if isinstance(tracking, Mapping):
            # Options without layers were chosen for the one that is read, in files of earlier versions too.
            named = not tracking or {"layer", "layers"} & tracking.keys()
            tracking = changed_options(TrackerOptions(layers=() if named else (reading.layer,)), tracking)
        further = tuple(further_transfers)
        if not all(isinstance(settings, TransferSettings) for settings in further) or (further and transfer is None):
            raise ValueError(f"further_transfers must be TransferSettings beside transfer, got {further_transfers!r}")
        parts = (reading, tracking or TrackerOptions(), guidance or GuidancePreset(), transfer, source, further)
        kinds: list[tuple[type, ...]]
        kinds = [(ReadingPreset,), (TrackerOptions,), (GuidancePreset,), (TransferSettings, NoneType), (str,), (tuple,)]
        for field, part, kind in zip(fields(self), parts, kinds, strict=True):
            if not isinstance(part, kind):
                hint = "; as in Preset(ReadingPreset(layer=17, step=-3))"
                raise ValueError(f"{field.name} of a Preset must be {field.type}, got {part!r}{hint}")
            object.__setattr__(self, field.name, part)

    def __getattr__(self, name: str) -> object:
        if name == "guidance_layers":
            part, attribute = "guidance", "layers"
        elif name in _READING:
            part, attribute = "reading", name
        else:
            raise AttributeError(f"a Preset has no {name!r}")
        _warn(f"Preset.{name}", f"Preset.{part}.{attribute}")
        return getattr(getattr(self, part), attribute)

    @property
    def calibrated(self) -> bool:
        """Whether the settings were chosen by an analysis of this very model."""
        return self.source.startswith(CALIBRATED)

    def transfer_of(self, method: object) -> TransferSettings | None:
        """Settings of motion transfer for a method, by its name: its own, or those of `transfer`."""
        own = (settings for settings in self.further_transfers if settings.method == method)
        return next(own, self.transfer)

    def moved_to_layer(self, transfer: TransferSettings) -> TransferSettings:
        """Settings of motion transfer for the layer of this preset, if that was calibrated."""
        if not self.calibrated:
            return transfer
        return dataclasses.replace(transfer, blocks=(self.reading.layer,), source=self.source)

    def published(self) -> Preset:
        """With DiffTrack's released procedures of tracking and guidance."""
        guidance = dataclasses.replace(self.guidance, renormalize=None)
        return dataclasses.replace(self, tracking=PUBLISHED_TRACKING, guidance=guidance)

    def described(self) -> dict[str, Any]:
        """The contents of a preset.json."""
        tracking = _changes(self.tracking, TrackerOptions())
        sections: dict[str, object] = {
            "tracking": tracking and {"layers": self.tracking.layers, **tracking},
            "guidance": _changes(self.guidance, GuidancePreset()),
        }
        if self.transfer is not None:
            blocks = self.transfer.blocks
            own = {"blocks": blocks, **_changes(self.transfer, TransferSettings(blocks))}
            methods = {
                str(settings.method): {
                    name: value for name, value in _changes(settings, self.transfer).items() if name != "method"
                }
                for settings in self.further_transfers
            }
            sections["transfer"] = {**own, "methods": methods} if methods else own
        values = {**dataclasses.asdict(self.reading), "source": self.source, **sections}
        return dict(json.loads(json.dumps(values)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a preset.json, beside and then renamed."""
        with written_beside(path, "w") as file:
            file.write(json.dumps(self.described(), indent=2) + "\n")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Preset:
        """From a preset.json.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a preset.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(
                f"a preset is a Preset or the path of a preset.json, got {path!r}; see Preset.from_mapping"
            )
        try:
            values = parsed_json(pathlib.Path(path).read_text(encoding="utf-8"))
        except IsADirectoryError as error:
            raise ValueError(f"{os.fspath(path)} is a folder; give the preset.json in it") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"there is no preset file {os.fspath(path)}; `corrdit calibrate` writes one"
            ) from error
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a preset as `corrdit calibrate` writes it: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{os.fspath(path)} is not a preset; it holds a {type(values).__name__}")
        try:
            return cls.from_mapping(values)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a preset that can be used: {error}") from error

    @classmethod
    def from_mapping(cls, values: Entries) -> Preset:
        """From the contents of a preset.json.

        Raises:
            ValueError: no layer in it, an entry that is not known, or one of another type or out of range.
        """
        for name in values:
            choice("an entry of a preset", name, _ENTRIES)
        if "layer" not in values:
            raise ValueError(f"a preset needs a layer; it holds {', '.join(values) or 'nothing'}")
        for name in ("tracking", "guidance", "transfer"):
            if not isinstance(values.get(name) or {}, Mapping):
                owner = "the tracker" if name == "tracking" else name
                raise ValueError(f"{name} must be options of {owner} by name, got {values[name]!r}")
        if not isinstance(source := values.get("source", "given"), str):
            raise ValueError(f"source must be a text, got {source!r}")
        reading = ReadingPreset(**{name: value for name, value in values.items() if name in _READING})
        transfer, further = _transfers(values.get("transfer"), reading.layer)
        return cls(reading, values.get("tracking"), _guidance(values), transfer, source, further)


_READING = tuple(field.name for field in fields(ReadingPreset))
_FIGURES = ("timestep", "layers_by_accuracy", "validation_share_within_one_token")
"""Of a preset.json, for people; nothing reads them."""
_ENTRIES = (*_READING, "guidance_layers", "tracking", "guidance", "transfer", "source", *_FIGURES)


def _warn(old: str, new: str) -> None:
    message = f"{old} is now {new}; the old spelling goes in corrdit 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


Part = TypeVar("Part", TrackerOptions, GuidancePreset, TransferSettings)


def _changes(part: Part, default: Part) -> dict[str, object]:
    values, defaults = dataclasses.asdict(part), dataclasses.asdict(default)
    return {name: value for name, value in values.items() if value != defaults[name]}


def _transfers(given: Entries | None, layer: int) -> tuple[TransferSettings | None, tuple[TransferSettings, ...]]:
    """The section `transfer`: settings, and those for other methods, which say what they change."""
    if not given:
        return None, ()
    methods = given.get("methods", {})
    if not isinstance(methods, Mapping) or not all(isinstance(changes, Mapping) for changes in methods.values()):
        raise ValueError(f"methods of transfer must be changed settings by method, got {methods!r}")
    own = {name: value for name, value in given.items() if name != "methods"}
    settings = changed_settings(TransferSettings((layer,)), own)
    further = (changed_settings(settings, {**changes, "method": method}) for method, changes in methods.items())
    return settings, tuple(further)


def _guidance(values: Entries) -> GuidancePreset:
    given = {"layers": values.get("guidance_layers"), **(values.get("guidance") or {})}
    layers = given["layers"]
    whole = isinstance(layers, (list, tuple)) and layers and all(type(layer) is int for layer in layers)
    if layers is not None and not whole:
        raise ValueError(f"guidance_layers must be a list of whole numbers, got {layers!r}")
    unknown = given.keys() - {field.name for field in fields(GuidancePreset)}
    if unknown:
        raise ValueError(f"guidance has an unknown entry {sorted(unknown)[0]!r}")
    return GuidancePreset(**{**given, "layers": None if layers is None else tuple(layers)})


def checked_preset(given: Preset | str | os.PathLike[str] | None) -> Preset | str | None:
    """What `load_backbone` takes as a preset, files read: a `Preset`, a name, or None for the model's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a preset.
    """
    if given is None or given == "default":
        return None
    return given if isinstance(given, Preset) or given in PRESET_NAMES else Preset.from_file(given)
