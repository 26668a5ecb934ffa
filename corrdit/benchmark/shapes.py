"""The shapes that are timed: those of published video transformers, and smaller ones for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from corrdit.grid import TokenGrid


@dataclass(frozen=True)
class Shape:
    """Attention of one layer of a model on one clip.

    Attributes:
        name: model and clip.
        heads: attention heads.
        head_dim: width of a head.
        frames, height, width: the token grid.
        text_tokens: text tokens in the same axis, before the video; 0 where text enters by cross-attention.
    """

    name: str
    heads: int
    head_dim: int
    frames: int
    height: int
    width: int
    text_tokens: int

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(self.frames, self.height, self.width, text_tokens=self.text_tokens, text_first=True)

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def label(self) -> str:
        text = f" + {self.text_tokens} text" if self.text_tokens else ""
        return f"{self.heads} x {self.head_dim}, {self.frames} x {self.height} x {self.width}{text}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("cogvideox-2b", 30, 64, 13, 30, 45, 226),
        Shape("cogvideox-5b", 48, 64, 13, 30, 45, 226),
        Shape("cogvideox-1.5-5b", 48, 64, 11, 48, 85, 226),
        Shape("wan-1.3b-480p", 12, 128, 21, 30, 52, 0),
        Shape("wan-14b-480p", 40, 128, 21, 30, 52, 0),
        Shape("wan-14b-720p", 40, 128, 21, 45, 80, 0),
        Shape("hunyuanvideo-720p", 24, 128, 33, 45, 80, 256),
        # Shorter clips of one model, so that a line can be drawn against the number of tokens.
        Shape("cogvideox-5b-3-frames", 48, 64, 3, 30, 45, 226),
        Shape("cogvideox-5b-6-frames", 48, 64, 6, 30, 45, 226),
        # For a CPU: clips of 320 x 480 pixels on a layer of 12 heads.
        Shape("small-2-frames", 12, 64, 2, 20, 30, 64),
        Shape("small-4-frames", 12, 64, 4, 20, 30, 64),
        Shape("small-8-frames", 12, 64, 8, 20, 30, 64),
        Shape("tiny", 4, 32, 3, 12, 16, 8),
    )
}
# The shapes that matter most come first: a run that is cut short has measured those.
DEFAULT_SHAPES = {
    "cuda": (
        "cogvideox-5b",
        "hunyuanvideo-720p",
        "cogvideox-2b",
        "wan-14b-480p",
        "cogvideox-5b-3-frames",
        "cogvideox-5b-6-frames",
        "cogvideox-1.5-5b",
        "wan-14b-720p",
    ),
    "cpu": ("small-2-frames", "small-4-frames", "small-8-frames"),
}


def default_shapes(device_type: str) -> tuple[str, ...]:
    """The shapes timed on a kind of device where none are asked for."""
    return DEFAULT_SHAPES.get(device_type, DEFAULT_SHAPES["cpu"])
