"""Old names of modules and attributes, which go on working for a while with one warning each."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from types import ModuleType

REMOVED_IN = "0.3"


class MovedNames(MetaPathFinder):
    """Finds modules and attributes under their old names.

    Args:
        moved: new name by old name. "package.module" is a module, and everything in it; "package.module:name" an
            attribute of a module that still exists.
    """

    def __init__(self, moved: Mapping[str, str]) -> None:
        self._modules = {old: new for old, new in moved.items() if ":" not in old}
        self._attributes: dict[str, dict[str, str]] = {}
        for old, new in moved.items():
            module, _, name = old.partition(":")
            if name:
                self._attributes.setdefault(module, {})[name] = new

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self._attributes:
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                vars(spec.loader)["exec_module"] = self._executed(spec.loader.exec_module)
            return spec
        for old, new in self._modules.items():
            if fullname == old or fullname.startswith(f"{old}."):
                return spec_from_loader(fullname, _AtNewName(new + fullname.removeprefix(old)))
        return None

    def _executed(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def exec_module(module: ModuleType) -> None:
            execute(module)
            moved = self._attributes[module.__name__]

            def attribute(name: str) -> object:
                if name not in moved:
                    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
                home, _, new_name = moved[name].partition(":")
                _warn(f"{module.__name__}.{name}", f"{home}.{new_name}")
                value: object = getattr(importlib.import_module(home), new_name)
                setattr(module, name, value)
                return value

            vars(module)["__getattr__"] = attribute

        return exec_module


class _AtNewName(Loader):
    """Gives the module of another name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._own_spec = module.__spec__
        _warn(spec.name, self._name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just written the old name's.
        module.__spec__ = self._own_spec


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes in corrdit {REMOVED_IN}", DeprecationWarning, stacklevel=3)


def install(moved: Mapping[str, str]) -> None:
    """Make the old names importable in this process."""
    sys.meta_path.insert(0, MovedNames(moved))
