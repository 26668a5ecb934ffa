"""Reading the shipped checkpoint and its preset from package data, offline."""

import json
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline

WEIGHTS = pathlib.Path(__file__).parent / "weights"
PRESET_FILE = "preset.json"


def load_embedded_pipeline(
    folder: str | pathlib.Path | None = None, dtype: torch.dtype = torch.float32
) -> "EmbeddedVideoPipeline":
    """The embedded pipeline from the package, or from a folder written by its `save_pretrained`. Never uses a network.

    Raises FileNotFoundError if the folder holds no pipeline or not all of one, weights as safetensors included.
    """
    from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline
    from corrdit.integrations.embedded.text import VOCABULARY_FILE

    source = WEIGHTS if folder is None else pathlib.Path(folder)
    if not (source / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{source} holds no diffusers pipeline (no model_index.json); give a folder written by save_pretrained"
        )
    # Without its file the tokenizer would take the world's own words, whatever the pipeline was saved with.
    words = source / "tokenizer" / VOCABULARY_FILE
    if not words.is_file():
        raise FileNotFoundError(f"{words} does not exist; give a folder as save_pretrained wrote it")
    # The keyword for a precision changed its name between releases of diffusers; converting afterwards needs none.
    with _quiet_loading():
        pipe = EmbeddedVideoPipeline.from_pretrained(
            str(source), local_files_only=True, low_cpu_mem_usage=False, use_safetensors=True
        )
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bar for reading five small files."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_preset(folder: str | pathlib.Path | None = None) -> dict[str, Any]:
    """Where the embedded model's correspondence is best: layer, head, step and the sizes it was trained on."""
    path = (WEIGHTS if folder is None else pathlib.Path(folder)) / PRESET_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `corrdit analyze --calibrate` makes a preset")
    return json.loads(path.read_text(encoding="utf-8"))
