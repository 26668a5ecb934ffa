"""Tiny pipelines that read words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corrdit.testing import tiny_pipeline

WORDS = ("<pad>", "<unk>", "a", "red", "disc", "moves", "left", "over", "sand")


def save_with_words(name: str, folder: Path) -> None:
    """Saves a tiny pipeline with a tiny T5 and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    numbers = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = tiny_pipeline(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5EncoderModel(
            T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    type(pipe)(**{**pipe.components, "text_encoder": encoder, "tokenizer": fast}).save_pretrained(folder)


@pytest.fixture(scope="session")
def with_words(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of such a pipeline, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("words") / name
            save_with_words(name, made[name])
        return made[name]

    return folder
