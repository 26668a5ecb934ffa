"""What was optimised, kept to be injected into other generations (zero-shot transfer)."""

from __future__ import annotations

import dataclasses
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

    @property
    def window(self) -> range:
        """The denoising steps from the first to the last that something is stored for."""
        return range(min(self.tensors), max(self.tensors) + 1) if self.tensors else range(0)

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
    by_token = tokens.flatten().float()

    def mixed(one: Tensor, other: Tensor) -> Tensor:
        share = latents.to(one)
        if inside.kind != "latent":
            axis = next(axis for axis, length in enumerate(one.shape) if length == len(by_token))
            share = by_token.to(one).reshape([-1 if at == axis else 1 for at in range(one.ndim)])
        return share * one + (1 - share) * other

    tensors = {
        step: {name: mixed(tensor, outside.tensors[step][name]) for name, tensor in by_name.items()}
        for step, by_name in inside.tensors.items()
    }
    return dataclasses.replace(inside, tensors=tensors)


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
