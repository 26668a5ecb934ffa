"""The components of a saved diffusers pipeline, each with exactly the weights its configuration asks for.

diffusers fills tensors that a checkpoint lacks with random numbers and leaves out those it does not know, with a
line in its log; here both are errors, and a configuration that does not fit its weights is refused before memory is
taken.
"""

from __future__ import annotations

import math
import pathlib
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias, cast

import torch

from corrdit.arguments import nearest
from corrdit.files import parsed_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

INDEX_FILE = "model_index.json"

Shapes: TypeAlias = dict[str, list[int]]
Settings: TypeAlias = Mapping[str, object]

_LARGEST_NUMBER = 10**7
"""Of a component's configuration: more timesteps, tokens or pixels than any model has."""
_LARGEST_BUFFERS = 2**31
"""Bytes of tables that are computed and not stored."""
_COUNT_OF_MODULES = re.compile(r"(num|n)_.*(layers|blocks)|layers_per_block")
_SHOWN = 5

_NONSENSE = (
    *(TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError),
    *(ArithmeticError, IndexError, MemoryError),
)
"""What diffusers and transformers raise at a configuration of wrong values."""


def read_index(folder: pathlib.Path) -> dict[str, object]:
    """The model_index.json of a pipeline's folder.

    Raises:
        ValueError: not such a file, or one that names no pipeline or a component by something else than
            [library, class].
    """
    file = folder / INDEX_FILE
    index = _read_json(file, "a model index as save_pretrained writes it")
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise ValueError(
            f"{file} is not a model index as save_pretrained writes it: _class_name must be the name of a pipeline, "
            f"got {class_name!r}"
        )
    for name, entry in index.items():
        if isinstance(entry, list) and not (
            len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)
        ):
            raise ValueError(f"{file}: {name} must be [library, class], got {entry!r}")
    if "scheduler" in index and not isinstance(index["scheduler"], list):
        raise ValueError(f"{file}: scheduler must be [library, class], got {index['scheduler']!r}")
    return index


def pipeline_class(source: str, class_name: str) -> type[DiffusionPipeline]:
    """The pipeline of diffusers with this name.

    Raises:
        ValueError: there is none, or one that needs a package which is not installed.
    """
    import diffusers

    found = getattr(diffusers, class_name, None)
    try:
        usable = isinstance(found, type) and hasattr(found, "from_pretrained") and hasattr(found, "components")
    except ImportError as error:
        # A stand-in, which says so when it is asked for anything.
        raise missing_package(source, class_name, error) from error
    if not usable:
        near = nearest(class_name, (name for name in dir(diffusers) if name.endswith("Pipeline")))
        raise ValueError(
            f"{source} is a {class_name}, which this diffusers ({diffusers.__version__}) does not have as a pipeline"
            f"{near}"
        )
    return cast("type[DiffusionPipeline]", found)


def missing_package(source: str, class_name: str, error: ImportError) -> ValueError:
    """What to say where diffusers cannot make a pipeline without another package."""
    return ValueError(f"{source} is a {class_name}, for which a package is missing: {' '.join(str(error).split())}")


def loaded_models(folder: pathlib.Path, *, dtype: torch.dtype, low_cpu_mem_usage: bool) -> dict[str, torch.nn.Module]:
    """The models of a pipeline's folder by component; whatever else it has is for the pipeline to load.

    Args:
        folder: as `save_pretrained` writes it.
        dtype: precision of the weights.
        low_cpu_mem_usage: whether modules are made empty and then filled, which needs accelerate.

    Raises:
        ValueError: tensors that are missing, not known to the model or of another shape, by name; or a configuration
            that no model, or no scheduler, can be made from.
    """
    models = {}
    for name, entry in read_index(folder).items():
        if not isinstance(entry, list) or entry[0] is None or not (folder / name).is_dir():
            continue
        found = component_class(*entry)
        if found is None:
            continue
        if hasattr(found, "set_timesteps"):
            _checked_scheduler(found, folder / name)
        elif issubclass(found, torch.nn.Module):
            models[name] = _loaded_model(found, folder / name, dtype, low_cpu_mem_usage)
    return models


def component_class(library: str, class_name: str | None) -> type | None:
    """The class of a component; None in libraries that only the pipeline may import.

    Args:
        library: a library, or the package of a pipeline inside diffusers that has parts of its own.
        class_name: in it.
    """
    if library == "diffusers":
        import diffusers as module
    elif library == "transformers":
        import transformers as module
    else:
        import diffusers.pipelines

        own = getattr(diffusers.pipelines, library, None)
        module = own if isinstance(own, ModuleType) else sys.modules.get(library)
    found = getattr(module, str(class_name), None)
    if found is None and library in ("diffusers", "transformers"):
        raise ValueError(f"{INDEX_FILE} names {library}.{class_name}, which this {library} does not have")
    return found if isinstance(found, type) else None


def _checked_scheduler(kind: type[SchedulerMixin], folder: pathlib.Path) -> None:
    _check_numbers(folder / "scheduler_config.json")
    try:
        kind.from_pretrained(str(folder))
    except _NONSENSE as error:
        raise ValueError(f"{folder} holds no settings of a {kind.__name__}: {_first_line(error)}") from error


def _loaded_model(
    kind: type[ModelMixin], folder: pathlib.Path, dtype: torch.dtype, low_cpu_mem_usage: bool
) -> torch.nn.Module:
    stored = _stored_shapes(folder)
    if stored:
        _check_configuration(kind, folder, stored)
    try:
        model, info = kind.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            local_files_only=True,
            low_cpu_mem_usage=low_cpu_mem_usage,
            output_loading_info=True,
            **({} if list(folder.glob("*.bin")) and not stored else {"use_safetensors": True}),
        )
    except _NONSENSE as error:
        raise ValueError(f"{folder} cannot be loaded as a {kind.__name__}: {_first_line(error)}") from error
    _check_complete(folder, kind, info)
    return model


def _check_complete(folder: pathlib.Path, kind: type, info: Mapping[str, Iterable[object]]) -> None:
    faults = [
        f"{what} {_named(sorted(_key(entry) for entry in names))}"
        for what, found in (
            ("it lacks", "missing_keys"),
            ("it holds unknown", "unexpected_keys"),
            ("of another shape are", "mismatched_keys"),
        )
        if (names := list(info.get(found, ())))
    ]
    if faults:
        raise ValueError(
            f"the weights in {folder} are not those of the {kind.__name__} in its config.json: {'; '.join(faults)}; "
            "save or download the whole folder again"
        )


def _key(entry: object) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _stored_shapes(folder: pathlib.Path) -> Shapes:
    """Shapes in the safetensors files of a model, read from their headers; empty where there is no such file.

    Raises:
        ValueError: a file that is damaged or cut off.
    """
    shapes: Shapes = {}
    files = [
        file
        for file in folder.glob("*.safetensors")
        if re.fullmatch(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?", file.stem)
    ]
    for file in sorted(files):
        try:
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                if length > file.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = parsed_json(opened.read(length).decode())
            shapes |= {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not a safetensors file, or a damaged one: {error}") from error
    return shapes


def _check_configuration(kind: type[ModelMixin], folder: pathlib.Path, stored: Shapes) -> None:
    """Build the model without memory and compare what both know; names alone are for the loading, which may rename."""
    file = folder / "config.json"
    settings = _check_numbers(file)
    for name, value in settings.items():
        if isinstance(value, int) and _COUNT_OF_MODULES.fullmatch(name) and value > max(1000, len(stored)):
            raise ValueError(f"{file}: {name} is {value}, but the weights beside it are {len(stored)} tensors")
    if settings.get("quantization_config"):
        return
    try:
        with torch.device("meta"):
            if hasattr(kind, "config_class") and kind.config_class is not None:
                model = kind(kind.config_class.from_pretrained(str(folder)))
            else:
                model = kind.from_config(dict(settings))
    except _NONSENSE as error:
        raise ValueError(f"{file} describes no {kind.__name__} that can be built: {_first_line(error)}") from error
    wrong = [
        f"{name} is {stored[name]} and should be {list(tensor.shape)}"
        for name, tensor in model.state_dict().items()
        if name in stored and stored[name] != list(tensor.shape)
    ]
    if wrong:
        raise ValueError(
            f"the weights in {folder} are not those of the {kind.__name__} in its config.json: {_named(wrong)}"
        )
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if tables > max(_LARGEST_BUFFERS, 4 * sum(math.prod(shape) for shape in stored.values())):
        raise ValueError(
            f"{file} asks for tables of {tables / 1e9:.0f} GB beside the weights; its sizes are no sensible values"
        )


def _check_numbers(file: pathlib.Path) -> dict[str, object]:
    settings = _read_json(file, "a configuration as save_pretrained writes it")
    for name, value in _numbers(settings):
        if not math.isfinite(value):
            raise ValueError(f"{file}: {name} is {value}, which is no sensible value")
        if isinstance(value, int) and abs(value) > _LARGEST_NUMBER and "token" not in name:
            raise ValueError(f"{file}: {name} is {value}, which is no sensible value (at most {_LARGEST_NUMBER})")
    return settings


def _numbers(entries: object, name: str = "an entry") -> Iterator[tuple[str, float]]:
    if isinstance(entries, Mapping):
        for key, value in entries.items():
            yield from _numbers(value, str(key))
    elif isinstance(entries, list):
        for value in entries:
            yield from _numbers(value, name)
    elif isinstance(entries, (int, float)):
        yield name, entries


def _read_json(file: pathlib.Path, what: str) -> dict[str, object]:
    try:
        contents = parsed_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not {what}: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} is not {what}: it holds a {type(contents).__name__}")
    return contents


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
