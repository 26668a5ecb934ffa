"""How well a video shows its prompt: the raw cosine between frames and text in CLIP's space.

DiTFlow's "image quality" (CLIP ViT-B/32; published values lie round 0.318). torchmetrics' CLIPScore is 100 times this
cosine, cut at 0, and takes another model unless told.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

PUBLISHED_MODEL = "openai/clip-vit-base-patch32"
_FRAMES_AT_ONCE = 32


class PromptSimilarity:
    """Mean cosine between the frames of a video and a prompt.

    Args:
        model: a folder written by `save_pretrained`, or a hub id.
        device: where it runs; None for the CPU.

    Raises:
        ValueError: a model that is not on this machine while offline, or cannot be loaded.
        ImportError: transformers is missing.
    """

    def __init__(
        self, model: str | os.PathLike[str] = PUBLISHED_MODEL, device: str | torch.device | None = None
    ) -> None:
        from transformers import CLIPModel, CLIPProcessor

        name = os.fspath(model)
        try:
            self._model = CLIPModel.from_pretrained(name).to(device or "cpu").eval()
            self._processor = CLIPProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot load the CLIP model {name}: {' '.join(str(error).split())[:200]}; give a folder that holds "
                f"{PUBLISHED_MODEL} (written by save_pretrained), or connect to the hub"
            ) from error

    @torch.no_grad()
    def __call__(self, video: np.ndarray, prompt: str) -> float:
        """The similarity of one video.

        Args:
            video: uint8 `[T, H, W, 3]`.
            prompt: of the video; cut at the text encoder's length.

        Returns:
            Mean cosine over the frames, -1 to 1.

        Raises:
            ValueError: not such a video.
        """
        video = np.asarray(video)
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
            raise ValueError(f"video must be uint8 [T, H, W, 3], got {video.dtype} {video.shape}")
        device = self._model.device
        words = self._processor(text=[prompt], return_tensors="pt", truncation=True).to(device)
        text = _unit(self._model.get_text_features(**words))
        cosines = []
        for start in range(0, len(video), _FRAMES_AT_ONCE):
            frames = list(video[start : start + _FRAMES_AT_ONCE])
            pixels = self._processor(images=frames, return_tensors="pt").to(device)
            cosines.append(_unit(self._model.get_image_features(**pixels)) @ text[0])
        return float(torch.cat(cosines).mean())


def _unit(features: Any) -> torch.Tensor:
    """Feature vectors at length 1; newer versions of transformers hand them back inside an output object."""
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return tensor / tensor.norm(dim=-1, keepdim=True)
