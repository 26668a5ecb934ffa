"""Build description: three top-level folders, one import root.

`corrdit/` is the library; `kernels/` and `integrations/` are its subpackages `corrdit.kernels` and
`corrdit.integrations`, by two links in `corrdit/`, so that the source tree imports as the installed package does. No
other top-level import package is installed: one named `kernels` would collide with the package of that name which
diffusers looks for.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
REQUIREMENTS = [
    "torch>=2.11,<2.14",
    "triton>=3.6,<3.10; platform_system == 'Linux'",
    "diffusers>=0.36,<0.43",
    "transformers>=4.57.1,<6",
    "accelerate>=1.0,<2",
    "lightning>=2.5,!=2.6.2,!=2.6.3,<2.7",
    "einops>=0.8,<0.9",
    "numpy>=1.26,<3",
    "jsonargparse[signatures]>=4.40,<5",
    "rich>=13,<16",
    "imageio>=2.35,<3",
    "av>=13,<19",
    "matplotlib>=3.8,<4",
    "safetensors>=0.5,<1",
    "pillow>=10,<14",
    "tqdm>=4.64,<5",
]
EXTRAS = {
    "metrics": ["torchmetrics>=1.4,<2"],
    "tensorboard": ["tensorboard>=2.16,<3"],
    "parquet": ["pyarrow>=15,<27"],
    "opencv": ["opencv-python-headless>=4.9,<6"],
    "explore": ["nicegui>=3.4,<4"],
    "completion": ["shtab>=1.7,<2"],
    "rerun": ["rerun-sdk>=0.24,<0.50"],
    "docs": ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27,<2"],
    "test": [
        "pytest>=8,<10",
        "pytest-xdist>=3.5,<4",
        "hypothesis>=6.100,<7",
        "peft>=0.15,<1",
        "torchmetrics>=1.4,<2",
        "tensorboard>=2.16,<3",
        "nicegui>=3.4,<4",
        "setuptools>=77,<90",
        "shtab>=1.7,<2",
        "pyarrow>=15,<27",
    ],
    "lint": ["ruff>=0.9,<1", "mypy>=1.14,<3", "pre-commit>=4,<5"],
}


def version() -> str:
    text = (ROOT / "corrdit" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('corrdit/version.py has no line __version__ = "..."')
    return match.group(1)


def long_description() -> str:
    """The README without pictures and links into the checkout, whose files a registry has not."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*\n\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"^<!--.*-->\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^## Read on\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\s\(\[more\]\(docs/[^)]*\)\)", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    name="corrdit",
    version=version(),
    description="Point correspondence, guidance and motion transfer from the attention of video diffusion transformers",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="corrdit maintainers",
    keywords=[
        *("video diffusion", "diffusion transformer", "diffusers", "attention", "correspondence", "point tracking"),
        *("motion transfer", "cross-attention guidance", "triton", "pytorch lightning"),
    ],
    # What the suite was run on; the ranges above say what should work.
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Multimedia :: Video",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(str(ROOT), include=["corrdit", "corrdit.*"]),
    # Named, so that an editable install maps this one folder and leaves the root off the path.
    package_dir={"corrdit": "corrdit"},
    package_data={
        "corrdit": ["py.typed", "**/*.json", "**/*.yaml"],
        "corrdit.integrations": ["**/*.json", "**/*.yaml", "**/*.safetensors", "**/*.md"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["corrdit=corrdit.cli:entry_point"]},
)
