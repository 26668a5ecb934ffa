"""The model card that goes with exported weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from corrdit.files import markdown_table

Json = Mapping[str, Any]
"""What a JSON or YAML file holds."""
_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# Embedded video diffusion transformer of corrdit

A small text-to-video diffusion transformer of CogVideoX's architecture (diffusers' `CogVideoXTransformer3DModel`,
{parameters:.1f} M parameters, {layers} layers, {heads} heads of {head_dim}, {positions} positions), trained on
videos that are generated while it trains. It is there so that reading correspondence from attention can be used,
tested and studied without downloading anything. It has seen no video of the real world.

- **Data**: the generated world of `corrdit.integrations.embedded.world`: one to five textured sprites on their own
  paths over a textured background under a moving camera. {photographs} Training videos follow from seeds below
  10^9, held-out ones from seeds of 10^9 and above.
- **Latents**: a fixed, invertible Haar transform of 2 x 2 pixels; a token spans 4 x 4 pixels of one frame.
- **Text**: a fixed word encoder; words outside of the world's vocabulary get a place by a hash and carry no meaning.
- **Objective**: v-prediction at uniform timesteps, with CogVideoX's noise schedule without its shift towards noise.
- **Weights**: exponential moving average after {steps} steps, rounded to float16.

## Recipe

`corrdit train --recipe FILE.yaml --processes 2 --threads 1 --output DIR` with

```yaml
{recipe}```
{notes}
## Measured
{quality}
"""

_PHOTOGRAPHED = (
    "In {videos:.0%} of the videos {pictures:.0%} of\n  backgrounds and sprites are crops of the photographs that "
    "`benchmarks/photographs.py` fetches (digest {digest}), which\n  are moved like everything else. No recorded video."
)

_UNMEASURED = """
Not measured yet; `python benchmarks/embedded_matching.py --pipeline FOLDER --output FILE.json` does it.
"""
_KINDS = ("best head", "best head, refined", "best layer", "best layer, refined", "best features", "patches")
"""Columns of a table of quality, where they were measured."""
_REFINED = """Refined is the position between tokens: the mean of the best token and its neighbours, weighted by
the cost (`ops.match` with refine=1).
"""


def model_card(config: Json, steps: int, parameters: int, *, measured: Json | None = None, notes: str = "") -> str:
    """Markdown for the weights' folder.

    config: the recipe; steps: training steps done; parameters: of the transformer; measured: what
    benchmarks/embedded_matching.py wrote; notes: anything about the run that the recipe does not say.
    """
    shares = {"videos": config["videos"], "pictures": config["pictures"], "digest": config["photographs"]}
    return _CARD.format(
        **{name: config[name] for name in ("layers", "heads", "head_dim", "positions")},
        photographs=_PHOTOGRAPHED.format(**shares) if shares["pictures"] else "No recorded or collected data.",
        parameters=parameters / 1e6,
        steps=steps,
        recipe=yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None),
        notes=f"\n{notes}\n" if notes else "",
        quality=_UNMEASURED if measured is None else _quality(measured),
    )


def _quality(measured: Json) -> str:
    sizes = {
        "training_size": "8 frames of 32 x 32, as in half of the training",
        "large": "24 frames of 480 x 720 at a working grid of 20 x 30 tokens",
    }
    parts = [_table(title, measured[key]) for key, title in sizes.items() if key in measured]
    made = measured["environment"]
    versions = f"torch {made['torch']} and diffusers {made['diffusers']}"
    parts.append(f"\nMeasured by `{made['command']}` at commit {made['commit']} with {versions}.")
    return "\n".join(parts)


def _table(title: str, table: Json) -> str:
    found = set.intersection(*(set(rows) for rows in table["summary"].values()))
    kinds = [kind for kind in _KINDS if kind in found]
    lines = [
        f"\n{title}:",
        "share of visible points that moved by more than 1.5 tokens which are matched within one token, from the first",
        f"frame to all others, {table['videos']} held-out videos, 95 % bootstrap interval over videos. Standing still",
        "scores 0 on these points.\n",
        *([_REFINED] if any("refined" in kind for kind in kinds) else []),
    ]
    body = []
    for timestep, rows in table["summary"].items():
        cells = [str(timestep)]
        for row in (rows[kind] for kind in kinds):
            where = "" if row["reading"] == "patches" else f"<br>{row['reading'].split('query-key ')[-1]}"
            cells.append(f"{row['share']:.3f} ({row['low']:.3f} to {row['high']:.3f}){where}")
        body.append(cells)
    return "\n".join([*lines, markdown_table(["t of 1000", *kinds], body).rstrip("\n")])
