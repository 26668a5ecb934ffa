"""Where the shipped checkpoint lies, and its preset: where reading correspondence is best."""

import json
import pathlib
from typing import Any

WEIGHTS = pathlib.Path(__file__).parent / "weights"
PRESET_FILE = "preset.json"


def read_preset(folder: str | pathlib.Path | None = None) -> dict[str, Any]:
    """Where the embedded model's correspondence is best: layer, head, step and the sizes it was trained on."""
    path = (WEIGHTS if folder is None else pathlib.Path(folder)) / PRESET_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `corrdit analyze --calibrate` makes a preset")
    return json.loads(path.read_text(encoding="utf-8"))
