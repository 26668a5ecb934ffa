"""Imports point down only, and no two files import each other by any way round.

Read from the source, imports inside functions and under TYPE_CHECKING included, and the strings that name modules: they
may stand in the places of `NAMED_BY_STRING` only, and count as imports of them.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]

FLOORS = (
    (
        "corrdit.arguments",
        "corrdit.display",
        "corrdit.files",
        "corrdit.memory",
        "corrdit.moved",
        "corrdit.pipelines",
        "corrdit.progress",
        "corrdit.surroundings",
        "corrdit.version",
    ),
    ("corrdit.grid", "corrdit.geometry", "corrdit.array_files"),
    ("corrdit.problem", "corrdit.runs"),
    ("corrdit.reference", "corrdit.streaming", "corrdit.kernels"),
    ("corrdit.ops",),
    ("corrdit.metrics", "corrdit.motion", "corrdit.video"),
    ("corrdit.visualization",),
    ("corrdit.tracking",),
    ("corrdit.data",),
    ("corrdit.analysis", "corrdit.evaluation", "corrdit.benchmark"),
    ("corrdit.integrations.components",),
    ("corrdit.integrations", "corrdit.integrations.embedded"),
    ("corrdit.integrations.diffusers",),
    ("corrdit.integrations.diffusers.testing",),
    ("corrdit.testing", "corrdit.integrations.lightning"),
    ("corrdit.integrations.embedded.training",),
    ("corrdit.cli",),
    ("corrdit", "corrdit.__main__"),
)
"""Rooms from the ground up; a file belongs to the longest name it begins with. A room imports from its own floor's
rooms only itself."""

PACKAGES_ALONE = ("corrdit", "corrdit.integrations")
"""Rooms of one `__init__`; what lies below has a floor of its own."""

NAMED_BY_STRING = ("corrdit", "corrdit.testing", "corrdit.integrations.diffusers.backbones.table")
"""Files that may name modules in strings."""

BY_NAME = "an import by name"
"""Stands for a call of `import_module` whose argument is not a plain string."""


@functools.cache
def sources() -> dict[str, tuple[pathlib.Path, ast.Module]]:
    """Path and syntax tree of every file of the library by module name."""
    found = {}
    for folder, package in (
        ("corrdit", "corrdit"),
        ("kernels", "corrdit.kernels"),
        ("integrations", "corrdit.integrations"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if relative.parts[0] in ("kernels", "integrations") and folder == "corrdit":
                continue
            parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
            found[".".join([package, *parts])] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def nearest_module(name: str) -> str | None:
    """The file that a dotted name stands in, None outside the library."""
    while name not in sources():
        name, _, _ = name.rpartition(".")
        if not name:
            return None
    return name


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they point"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named_in_strings(tree: ast.Module) -> set[str]:
    """Modules named by a string constant that holds nothing else (an attribute after ":" or "." apart)."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if re.fullmatch(r"corrdit(\.\w+)+(:\w+)?", node.value) and nearest_module(name) != "corrdit":
                found.add(name)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(("import_module", "__import__")):
                found.add(BY_NAME)
    return found


@functools.cache
def arrows() -> dict[str, set[str]]:
    """The files each file imports."""
    found: dict[str, set[str]] = {}
    for module, (_, tree) in sources().items():
        names = set(imported(tree))
        if module in NAMED_BY_STRING:
            names |= named_in_strings(tree)
        targets = {nearest_module(name) for name in names - {BY_NAME} if name.split(".")[0] == "corrdit"}
        found[module] = {target for target in targets if target is not None} - {module}
    return found


def room(module: str) -> tuple[int, str]:
    """Floor and name of the room of a file."""
    fits = [
        (floor, name)
        for floor, names in enumerate(FLOORS)
        for name in names
        if module == name or (name != "corrdit" and module.startswith(f"{name}."))
    ]
    assert fits, f"{module} stands in no room; give its room a floor"
    return max(fits, key=lambda entry: len(entry[1]))


def test_every_module_that_is_imported_exists():
    missing = {
        (module, node.module)
        for module, (_, tree) in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("corrdit.")
        if node.module not in sources()
    }
    assert not missing


def test_every_import_points_down():
    upward = set()
    for module, targets in arrows().items():
        floor, name = room(module)
        for target in targets:
            target_floor, target_name = room(target)
            if target_name != name and target_floor >= floor:
                upward.add((module, target))
    assert not upward


def test_no_files_import_each_other():
    assert not [sorted(circle) for circle in circles() if len(circle) > 1]


def test_modules_are_named_by_strings_in_three_places_only():
    naming = {
        module
        for module, (_, tree) in sources().items()
        if module not in NAMED_BY_STRING and module != "corrdit.moved" and named_in_strings(tree)
    }
    assert not naming


def circles() -> list[frozenset[str]]:
    """Strongly connected files (Tarjan), a package that its own modules import not counted as such."""
    graph = arrows()
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[frozenset[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            circle = set()
            while module not in circle:
                circle.add(stack.pop())
            found.append(frozenset(circle))

    for module in graph:
        if module not in index:
            visit(module)
    return found
