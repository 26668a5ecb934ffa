"""Every figure of the embedded model's correspondence, from its checkpoint, into docs/figures.

    python benchmarks/embedded_figures.py

Measures matching accuracy of every layer and head at eleven timesteps on 200 held-out videos (the same videos and noise
as embedded_matching.py, so the same figures at its timesteps) unless the table of these weights is there, generates the
samples, and draws. Two tables are taken from where other commands leave them: embedded_matching.py's, for single heads
and bars where it holds more videos and for the large ones, and the training run of embedded_emergence.py, which needs
the run's checkpoints. --draw-only draws again from the tables alone.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator

import numpy as np
from embedded_drawings import draw_bars, draw_emergence, draw_heads, draw_layers, draw_loss, draw_samples
from experiment import RESULTS, Record, facts_apart, new_parser, read_json, sampled, weights_digest, write_json
from matplotlib.figure import Figure

from corrdit.files import written_beside
from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline
from corrdit.integrations.embedded.training.evaluation import matching_table, summary
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, WorldConfig, generate

PICTURES = pathlib.Path(__file__).parent.parent / "docs" / "figures"
TIMESTEPS = (10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900)
SHOWN = (50, 300, 600)
SAMPLE_SEEDS = (1_000_700_003, 1_000_700_007, 1_000_700_013, 1_000_700_022, 1_000_700_034, 1_000_700_035)
"""Chosen by their rendered videos, before any was generated."""
DOTS = 150


def measure_layers(pipe: EmbeddedVideoPipeline, path: pathlib.Path, videos: int) -> None:
    """Write every reading at every timestep, unless the file holds them for these weights and this many videos."""
    weights = weights_digest(pipe.transformer)
    if path.is_file():
        known = read_table(path)
        if known["weights"] == weights and known["videos"] == videos:
            return
    table = matching_table(pipe, WorldConfig(), range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + videos), TIMESTEPS)
    table["readings"] = {
        timestep: {name: {key: round(value, 5) for key, value in row.items()} for name, row in found.items()}
        for timestep, found in table["readings"].items()
    }
    write_json(path, {**facts_apart(), "weights": weights, "first_seed": HELD_OUT_SEEDS, **table})


def samples(pipe: EmbeddedVideoPipeline, steps: int, guidance: float) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Captions of held-out scenes with their rendered and their generated videos, uint8 [T, H, W, 3]."""
    clips = generate(SAMPLE_SEEDS, WorldConfig(sprites=(1, 2)))
    prompts = [clip.prompt for clip in clips]
    generated = sampled(pipe, prompts, SAMPLE_SEEDS, num_inference_steps=steps, guidance_scale=guidance)
    return [(clip.prompt, clip.video, video) for clip, video in zip(clips, generated, strict=True)]


def read_table(path: pathlib.Path) -> Record:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; leave out --draw-only, or give the right --tables")
    return read_json(path)


def drawn(tables: pathlib.Path) -> Iterator[tuple[str, Figure]]:
    """Names and figures of all tables."""
    layers = read_table(tables / "embedded_layers.json")
    yield "layers_timesteps", draw_layers(layers["readings"], layers["videos"])
    matching = tables / "embedded_matching.json"
    others = read_table(matching) if matching.is_file() else {}
    most = max((layers, others.get("training_size", layers)), key=lambda table: table["videos"])
    yield "heads", draw_heads(most["readings"], SHOWN)
    shown = {str(timestep): most["readings"][str(timestep)] for timestep in SHOWN}
    panels = {f"{most['videos']} videos of 8 frames of 32 x 32": summary(shown)}
    if "large" in others:
        large = others["large"]
        panels[f"{large['videos']} videos of 24 frames of 480 x 720, at 20 x 30 tokens"] = large["summary"]
    yield "bars", draw_bars(panels)
    run = read_table(tables / "embedded_emergence.json")
    yield "emergence", draw_emergence(run["checkpoints"])
    yield "loss", draw_loss(run["loss"])


def write_picture(figure: Figure, path: pathlib.Path) -> None:
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=DOTS, metadata={"Software": None})
    with written_beside(path) as file:
        file.write(encoded.getvalue())
    print(path)


def main(words: list[str] | None = None) -> None:
    parser = new_parser(__doc__, output=False, pipeline=True)
    parser.add_argument("--output", type=pathlib.Path, default=PICTURES, help="folder for the pictures")
    parser.add_argument("--tables", type=pathlib.Path, default=RESULTS, help="folder of the JSON tables")
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50, help="inference steps of the samples")
    parser.add_argument("--guidance", type=float, default=6.0, help="guidance scale of the samples")
    parser.add_argument("--draw-only", action="store_true", help="measure and generate nothing")
    arguments = parser.parse_args(words)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.draw_only:
        pipe = load_embedded_pipeline(arguments.pipeline)
        measure_layers(pipe, arguments.tables / "embedded_layers.json", arguments.videos)
        sheet = draw_samples(samples(pipe, arguments.steps, arguments.guidance))
        write_picture(sheet, arguments.output / "samples.png")
    for name, figure in drawn(arguments.tables):
        write_picture(figure, arguments.output / f"{name}.png")


if __name__ == "__main__":
    main()
