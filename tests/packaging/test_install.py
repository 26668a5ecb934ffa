"""Wheel, sdist and editable install hold the same packages under one import root and nothing beside it."""

from __future__ import annotations

import email
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml

import corrdit

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = (
    "corrdit",
    "kernels",
    "integrations",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def build(kind: str, source: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """Calls the build backend of pyproject.toml without an isolated environment (which would need the network)."""
    script = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(output)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return output / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """An sdist of a clean copy of the sources, a wheel of that copy, and a wheel of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    (folder / "wheel").mkdir()
    (folder / "from_sdist").mkdir()
    sdist = build("sdist", source, folder)
    # Early releases of Python 3.10 and 3.11 have no filters.
    filtered = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", **filtered)
    (unpacked,) = (folder / "unpacked").iterdir()
    return {
        "wheel": build("wheel", source, folder / "wheel"),
        "sdist wheel": build("wheel", unpacked, folder / "from_sdist"),
    }


def source_files() -> set[str]:
    """Every file of the library, under the name it has when installed."""
    names = set()
    for folder, installed in (
        ("corrdit", "corrdit"),
        ("kernels", "corrdit/kernels"),
        ("integrations", "corrdit/integrations"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                names.add(f"{installed}/{path.relative_to(ROOT / folder).as_posix()}")
    return names


@pytest.mark.parametrize("kind", ["wheel", "sdist wheel"])
def test_archive_holds_every_file_of_the_library_and_no_other_package(archives, kind):
    with zipfile.ZipFile(archives[kind]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        requirements = [
            line for line in archive.read(metadata).decode().splitlines() if line.startswith("Requires-Dist")
        ]
    assert names == source_files()
    assert all("<" in line for line in requirements), "every dependency has an upper bound"
    lightning = next(line for line in requirements if "lightning" in line)
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning


def test_metadata_is_whole_and_names_nothing_that_a_registry_has_not(archives):
    with zipfile.ZipFile(archives["wheel"]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Author"] == "corrdit maintainers"
    assert "point tracking" in metadata["Keywords"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Programming Language :: Python :: 3.11" in metadata.get_all("Classifier", [])
    assert not {"Home-page", "Project-URL", "Author-email"} & set(metadata)
    text = metadata.get_payload()
    assert "corrdit track my_video.mp4" in text
    # no picture, comment or link into the checkout
    assert not re.findall(r"!\[|<!--|\]\((?!https?:)|^## Read on", text, re.MULTILINE)


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "corrdit"
    assert citation["version"] == corrdit.__version__
    assert citation["license"] == "Apache-2.0"
    assert {entry["identifiers"][0]["value"] for entry in citation["references"]} == {
        "arXiv:2506.17220",
        "arXiv:2412.07776",
    }


def test_wheel_imports_from_where_it_is_installed(archives, tmp_path):
    with zipfile.ZipFile(archives["wheel"]) as archive:
        archive.extractall(tmp_path)
    script = (
        "import corrdit, corrdit.kernels, corrdit.integrations, importlib.util as u\n"
        "print(corrdit.__file__, corrdit.kernels.__file__, corrdit.integrations.__file__)\n"
        "specs = [u.find_spec(name) for name in ('kernels', 'integrations')]\n"
        "print([spec is not None and 'corrdit' in str(spec.origin) for spec in specs])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    files, collisions = done.stdout.splitlines()
    assert all(file.startswith(str(tmp_path / "corrdit")) for file in files.split())
    assert collisions == "[False, False]"


def test_installed_environment_has_no_top_level_kernels_or_integrations():
    assert importlib.util.find_spec("integrations") is None
    found = importlib.util.find_spec("kernels")
    assert found is None or not str(found.origin).startswith(str(ROOT))


def test_subpackages_of_the_editable_install_resolve_to_the_folders():
    import corrdit.integrations
    import corrdit.kernels

    for module in (corrdit.kernels, corrdit.integrations):
        assert pathlib.Path(module.__file__ or "").name == "__init__.py"
