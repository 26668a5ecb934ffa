"""Reading the shipped checkpoint from package data, offline."""

import pathlib
from typing import TYPE_CHECKING

import torch

from corrdit.integrations.components import INDEX_FILE, loaded_models, read_index
from corrdit.integrations.embedded.preset import WEIGHTS

if TYPE_CHECKING:
    from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline


def load_embedded_pipeline(
    folder: str | pathlib.Path | None = None, dtype: torch.dtype = torch.float32
) -> "EmbeddedVideoPipeline":
    """The embedded pipeline from the package, or from a folder written by its `save_pretrained`. Never uses a network.

    Raises FileNotFoundError if the folder holds no pipeline or not all of one, weights as safetensors included, and
    ValueError for a pipeline of another class, and if weights are missing, unknown or of another shape than its
    configuration says.
    """
    from diffusers.utils import logging

    from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline
    from corrdit.integrations.embedded.text import VOCABULARY_FILE

    source = WEIGHTS if folder is None else pathlib.Path(folder)
    if not (source / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"{source} holds no diffusers pipeline (no model_index.json); give a folder written by save_pretrained"
        )
    found = read_index(source)["_class_name"]
    if found != EmbeddedVideoPipeline.__name__:
        raise ValueError(
            f"{source} holds a {found}, not the embedded model; give a folder that `corrdit train` exported, or that "
            "save_pretrained wrote of the embedded pipeline"
        )
    # Without its file the tokenizer would take the world's own words, whatever the pipeline was saved with.
    words = source / "tokenizer" / VOCABULARY_FILE
    if not words.is_file():
        raise FileNotFoundError(f"{words} does not exist; give a folder as save_pretrained wrote it")
    # Five small files need no progress bar.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipe = EmbeddedVideoPipeline.from_pretrained(
            str(source),
            local_files_only=True,
            use_safetensors=True,
            **loaded_models(source, dtype=torch.float32, low_cpu_mem_usage=False),
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
