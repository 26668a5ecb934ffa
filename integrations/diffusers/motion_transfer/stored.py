"""What was optimised, kept to be injected into other generations (zero-shot transfer)."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
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

    @property
    def window(self) -> range:
        """The denoising steps from the first to the last that something is stored for."""
        return range(min(self.tensors), max(self.tensors) + 1) if self.tensors else range(0)

    def at(self, step: int, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of a step, where the run's own tensors are.

        Args:
            step: one that something is stored for.
            own: what of the run it takes the place of, by name.

        Raises:
            ValueError: other names or shapes than the run's.
        """
        found = self.tensors[step]
        given, expected = ({name: tensor.shape for name, tensor in one.items()} for one in (found, own))
        if given != expected:
            raise ValueError(
                f"the stored {self.kind} of step {step} has shapes {_shapes(given)}, this model and size need "
                f"{_shapes(expected)}; generate with the model and size it was made with"
            )
        return {name: tensor.to(own[name].device) for name, tensor in found.items()}

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


def composed(inside: StoredMotion, outside: StoredMotion, tokens: Tensor, latents: Tensor) -> StoredMotion:
    """The motion of one video in a region and that of another outside it.

    Args:
        inside: stored for the region.
        outside: stored for what is outside, by a run of the same kind, model, steps, size and seed.
        tokens: bool `[F, h, w]`, the region.
        latents: the region as the transformer's latents, 1 inside.

    Returns:
        At the steps of both, the one's optimised latents or embeddings inside and the other's outside.

    Raises:
        ValueError: two that do not go together.
    """
    facts = [{"kind": one.kind, "steps": one.steps, **one.size, "at": one.window} for one in (inside, outside)]
    differing = [name for name in facts[0] if facts[0][name] != facts[1][name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"the two stored motions do not go together: {name} is {facts[0][name]} and {facts[1][name]}; store both "
            "with the same settings, size and seed"
        )
    outside.check_fits(inside.model, inside.steps)
    tensors = {step: mixed(by_name, outside.tensors[step], tokens, latents) for step, by_name in inside.tensors.items()}
    return dataclasses.replace(inside, tensors=tensors)


def mixed(
    inside: Mapping[str, Tensor], outside: Mapping[str, Tensor], tokens: Tensor, latents: Tensor
) -> dict[str, Tensor]:
    """Latents or embeddings of one step, by name, those of a region from one and the others from another.

    Args:
        inside, outside: the same names and shapes.
        tokens: bool `[F, h, w]`, the region.
        latents: the region as the transformer's latents, 1 inside.
    """
    chosen = {}
    for name, own in inside.items():
        if name == "latent":
            share = latents.to(own)
        else:
            # A table has one axis of all video tokens.
            axis = next(axis for axis, length in enumerate(own.shape) if length == tokens.numel())
            share = tokens.flatten().to(own).reshape([-1 if at == axis else 1 for at in range(own.ndim)])
        chosen[name] = torch.where(share > 0, own, outside[name].to(own))
    return chosen


def _shapes(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


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
