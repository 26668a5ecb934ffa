"""Small models, videos and tables for the tests of the analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corrdit.analysis.table import AnalysisTable


@pytest.fixture(scope="session")
def moving_video() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random blocks of 8 pixels that move right by 8 a frame: video uint8 [5, 64, 64, 3], xy [5, 9, 2], visible."""
    wide = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    video = np.stack([wide[:, 64 - 8 * frame : 128 - 8 * frame] for frame in range(5)])
    x, y = np.meshgrid([12.0, 28.0, 52.0], [12.0, 28.0, 52.0])
    start = np.stack((x.ravel(), y.ravel()), -1).astype(np.float32)
    xy = start + 8 * np.arange(5, dtype=np.float32)[:, None, None] * [1, 0]
    return video, xy.astype(np.float32), xy[..., 0] < 64


@pytest.fixture(scope="session")
def tiny() -> Any:
    """A tiny random CogVideoX with rotary positions."""
    from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone

    return tiny_backbone("cogvideox-rotary")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CogVideoX that reads words, saved to a folder as `save_pretrained` does."""
    return saved_with_words("cogvideox-rotary", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for an image-to-video model."""
    return saved_with_words("cogvideox-image", tmp_path_factory.mktemp("model"))


def saved_with_words(name: str, folder: Path) -> Path:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from corrdit.testing import tiny_pipeline

    words = ["<pad>", "</s>", "<unk>", "a", "dog", "runs", "boat", "drifts"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = transformers.T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    pipe = tiny_pipeline(name)
    pipe.register_modules(
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special),
        text_encoder=transformers.T5EncoderModel(config).eval(),
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def make_table() -> Any:
    """Builds tables of two steps and three layers with hits of each (step, layer, reading) set by a function."""

    def build(
        hit_share: Any,
        *,
        heads: int = 2,
        cases: int = 100,
        moving: int = 50,
        seed: int = 0,
        low_pass: tuple[float, ...] = (),
    ) -> AnalysisTable:
        table = AnalysisTable(
            steps=(3, 9),
            layers=(0, 1, 2),
            timesteps=(600.0, 19.0),
            heads=heads,
            features=True,
            thresholds=(2.0, 4.0),
            stride=(4, 4),
            low_pass=low_pass,
        )
        random = np.random.default_rng(seed)
        for (s, n, r), _ in np.ndenumerate(table.cases):
            share = hit_share(s, n, r)
            table.hits[s, n, r] = (share * cases / 2, share * cases)
            table.moving_hits[s, n, r] = (share * moving / 2, share * moving)
        table.cases[:], table.moving_cases[:] = cases, moving
        for name in ("confidence", "confidence_text", "confidence_own", "text", "own", "cross"):
            getattr(table, name)[:] = random.random(getattr(table, name).shape) * 10
        table.confidence_cases[:], table.point_cases[:], table.attention_cases[:] = 40, 25, 20
        return table

    return build


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)
