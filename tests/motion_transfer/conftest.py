import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone, tiny_generation

CALL_ARGUMENTS = ("num_inference_steps", "generator", "output_type")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models run fastest on one thread; that an empty prompt is zeros without a text encoder is known."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no text encoder.*")
        yield
    torch.set_num_threads(threads)


def moving_video(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of random colours that move right by five pixels a frame."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = blocks.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(picture, 5 * frame, axis=1) for frame in range(frames)])


def tiny_case(name: str, *, guided: bool = True) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """A tiny backbone, a reference it takes, and the arguments of a transfer with it."""
    generation = tiny_generation(name, guided=guided)
    arguments = {key: value for key, value in generation.items() if key not in CALL_ARGUMENTS}
    video = moving_video(arguments.pop("num_frames"), arguments["height"], arguments["width"])
    return tiny_backbone(name), video, arguments


@pytest.fixture
def case() -> Any:
    """The function `tiny_case`."""
    return tiny_case
