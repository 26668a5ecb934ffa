"""Choose the layer, denoising step and head of a model from an analysis, as a preset.

reads   the folder --analysis that `corrdit analyze` wrote
writes  --output, a preset.json: put into the folder of a local model, `corrdit.load_backbone` reads it there, and
        tracking, guidance and analysis then begin from it; for models that lie elsewhere the option --preset FILE of
        `corrdit track`, `evaluate`, `generate`, `transfer` and `analyze` takes it, as
        `corrdit.load_backbone(name, preset=FILE)` does
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.analysis.results import AnalysisResults

HELP = "choose layer, step and head of a model from an analysis, as a preset"
USAGE = "--analysis DIR --output FILE [--threshold PIXELS]"
EXAMPLES = (
    "corrdit calibrate --analysis analysis --output preset.json",
    "corrdit track my_video.mp4 --output tracks --preset preset.json",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--analysis", required=True, metavar="DIR", help="folder that `corrdit analyze` wrote")
    parser.add_argument("--output", required=True, metavar="FILE", help="preset.json to write")
    parser.add_argument(
        "--threshold", type=float | None, default=None, help="pixels of the encoded frames; nearest to a token"
    )


def run(arguments: Namespace) -> int:
    from corrdit.analysis.results import read_results

    results = read_results(arguments.analysis)
    path = write_calibration(results, Path(arguments.output), threshold=arguments.threshold)
    print(path.read_text(encoding="utf-8"), end="")
    print(f"  {path}")
    return 0


def write_calibration(results: AnalysisResults, path: Path, *, threshold: float | None = None) -> Path:
    """Write the preset that an analysis recommends."""
    from corrdit.analysis.calibration import preset_values, write_preset

    write_preset(path, preset_values(results.calibration(threshold=threshold), results.settings))
    return path
