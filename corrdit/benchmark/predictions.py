"""Times that were predicted of the kernels before any GPU had run them, to be held against measured ones.

`predicted_times.json` beside this module is written by `benchmarks/predict_times.py`, which has the reasoning.
"""

from __future__ import annotations

import functools
import pathlib

from corrdit.files import parsed_json

FILE = pathlib.Path(__file__).with_name("predicted_times.json")


@functools.cache
def _predictions() -> tuple[str, dict[tuple[str, str, str], float]]:
    """(device they are of, milliseconds by operation, pass and name of the shape)."""
    held = parsed_json(FILE.read_text(encoding="utf-8"))
    times = {(row["operation"], row["pass"], row["shape"]): row["milliseconds"] for row in held["rows"]}
    return held["device"], times


def predicted_milliseconds(operation: str, passes: str, shape: str, device: str, dtype: str) -> float | None:
    """The predicted time of the kernels; None where there is none, as on another device or in another precision.

    Args:
        operation, passes, shape: as in the rows of a benchmark. device: its name. dtype: "bfloat16" or "float16".
    """
    of_device, times = _predictions()
    if of_device not in device or dtype not in ("bfloat16", "float16"):
        return None
    return times.get((operation, passes, shape))
