"""What was optimised, kept to be injected into other generations (zero-shot transfer)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from corrdit.array_files import read_safetensors
from corrdit.files import parsed_json, written_beside

FORMAT = "corrdit motion 1"


@dataclass
class StoredMotion:
    """Optimised latents or positional embeddings of every guided step.

    Args:
        kind: "latent" or "embedding".
        model: name of the backbone.
        steps: denoising steps of the run.
        num_frames: video frames.
        height: pixels.
        width: pixels.
        tensors: float32 on the CPU by guided step and name.
    """

    kind: str
    model: str
    steps: int
    num_frames: int
    height: int
    width: int
    tensors: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def size(self) -> dict[str, int | None]:
        """Frames, height and width by name."""
        return {"num_frames": self.num_frames, "height": self.height, "width": self.width}

    def check_fits(
        self,
        model: str,
        steps: int,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Compare with the run it is wanted for; another model is warned of, because names of the same one can differ.

        Args:
            model: name of the backbone.
            steps: denoising steps.
            num_frames, height, width: that were asked for; None for the stored ones.

        Raises:
            ValueError: another number of steps or another size, with the one it was made for.
        """
        wanted = {"steps": steps, "num_frames": num_frames, "height": height, "width": width}
        for name, value in wanted.items():
            own = getattr(self, name)
            if value not in (None, own):
                raise ValueError(f"the stored motion was made with {name} {own}, not {value}; give {name}={own}")
        if model != self.model:
            warnings.warn(
                f"the stored motion was made with the model {self.model} and is given to {model}", stacklevel=3
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save

        flat = flattened(self.tensors)
        facts = {"kind": self.kind, "model": self.model, "steps": self.steps, **self.size}
        with written_beside(path) as file:
            file.write(save(flat, metadata={"format": FORMAT, "facts": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StoredMotion:
        """Read a file that `save` wrote.

        Raises:
            ValueError: another file.
            FileNotFoundError: no file.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} holds no stored motion of a transfer; give a file that a transfer saved")
        try:
            return cls(**parsed_json(metadata["facts"]), tensors=nested(tensors))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}; give a file that a transfer saved") from error


def flattened(tensors: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`{step: {name: tensor}}` as `{"step.name": tensor}`."""
    return {f"{step}.{name}": t.contiguous() for step, by_name in tensors.items() for name, t in by_name.items()}


def nested(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The reverse of `flattened`."""
    result: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        step, _, name = key.partition(".")
        result.setdefault(int(step), {})[name] = tensor
    return result
