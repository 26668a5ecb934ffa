"""Videos made worse in a known way, to see what a tracker keeps: blur, noise and JPEG of five strengths.

Kinds and strengths are those of ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019), for frames of any size: Gaussian blur, Gaussian noise, JPEG compression.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from corrdit.arguments import choice

BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Standard deviation in pixels."""
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation, of values from 0 to 1."""
JPEG = (25, 18, 15, 10, 7)
"""Quality."""
KINDS = {"blur": BLUR, "noise": NOISE, "jpeg": JPEG}


@dataclass(frozen=True)
class Corruption:
    """A way to make frames worse.

    Args:
        kind: "blur", "noise" or "jpeg".
        strength: 1 (weak) to 5.

    Raises:
        ValueError: another kind or strength.
    """

    kind: str
    strength: int

    def __post_init__(self) -> None:
        choice("corruption", self.kind, KINDS)
        if type(self.strength) is not int or not 1 <= self.strength <= len(KINDS[self.kind]):
            raise ValueError(f"strength of {self.kind} must be a whole number from 1 to 5, got {self.strength!r}")

    @classmethod
    def from_text(cls, text: str) -> Corruption:
        """Of "KIND:STRENGTH", such as "blur:3".

        Raises:
            ValueError: another text.
        """
        kind, _, strength = text.partition(":") if isinstance(text, str) else ("", "", "")
        if kind not in KINDS or strength not in ("1", "2", "3", "4", "5"):
            raise ValueError(
                f"corruption must be KIND:STRENGTH with a kind of {', '.join(KINDS)} and a strength from 1 to 5, such"
                f" as blur:3, got {text!r}"
            )
        return cls(kind, int(strength))

    def __str__(self) -> str:
        return f"{self.kind}:{self.strength}"

    def applied(self, video: np.ndarray) -> np.ndarray:
        """The frames uint8 `[T, H, W, 3]`, each made worse by itself; noise is the same every time."""
        return np.stack([self._frame(frame, number) for number, frame in enumerate(video)])

    def _frame(self, frame: np.ndarray, number: int) -> np.ndarray:
        from PIL import Image, ImageFilter

        if self.kind == "noise":
            drawn = np.random.default_rng(number).normal(scale=NOISE[self.strength - 1], size=frame.shape)
            return np.asarray((frame / 255 + drawn).clip(0, 1) * 255).round().astype(np.uint8)
        picture = Image.fromarray(frame)
        if self.kind == "blur":
            return np.asarray(picture.filter(ImageFilter.GaussianBlur(BLUR[self.strength - 1])))
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=JPEG[self.strength - 1])
        return np.asarray(Image.open(stored).convert("RGB"))
