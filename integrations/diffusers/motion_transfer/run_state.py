"""Everything a run needs to go on after the last finished denoising step, in one safetensors file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corrdit.array_files import read_safetensors
from corrdit.files import written_beside
from corrdit.integrations.diffusers.motion_transfer.optimisation import LARGEST_LOSS_SCALE, OptimiserMemory
from corrdit.integrations.diffusers.motion_transfer.stored import flattened, nested

FORMAT = "corrdit transfer state 2"


@dataclass
class RunState:
    """Where a run is.

    Args:
        fingerprint: of all that decides the run's result.
        finished: denoising steps that are done.
        outputs: what the scheduler's last step returned.
        scheduler: its variables.
        generator: state of the run's random numbers.
        noise: the run's initial latents, as the transformer was given them.
        start: the latents it begins at where they are others.
        tables: optimised positional embedding that is carried on.
        memory: of the optimiser.
        losses: of each guided step so far.
        optimised: what was optimised, by guided step and name.
    """

    fingerprint: str
    finished: int = 0
    outputs: tuple[Any, ...] = ()
    scheduler: dict[str, Any] = field(default_factory=dict)
    generator: Tensor | None = None
    noise: Tensor | None = None
    start: Tensor | None = None
    tables: dict[str, Tensor] = field(default_factory=dict)
    memory: OptimiserMemory = field(default_factory=OptimiserMemory)
    losses: list[list[float]] = field(default_factory=list)
    optimised: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {f"optimised.{key}": value for key, value in flattened(self.optimised).items()}
        structure = {
            name: _packed(getattr(self, name), name, tensors)
            for name in ("outputs", "scheduler", "generator", "noise", "start", "tables", "losses", "finished")
        }
        structure["gradients"] = _packed(self.memory.gradients, "gradients", tensors)
        structure["loss_scale"] = _packed(self.memory.loss_scale, "loss_scale", tensors)
        stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint, "structure": json.dumps(structure)}
        with written_beside(path) as file:
            file.write(save(stored, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str, device: torch.device) -> RunState:
        """Read the state of the same run.

        Raises:
            ValueError: another file, or the state of a run with another reference, prompt, model or settings.
        """
        try:
            tensors, metadata = read_safetensors(path)
        except ValueError as error:
            raise ValueError(f"{error}; it held the state of a transfer, remove it to begin anew") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)} holds no state of a transfer; give another place for it")
        if metadata["fingerprint"] != fingerprint:
            raise ValueError(
                f"{os.fspath(path)} holds the state of a run with another reference, prompt, seed, model or settings; "
                "give the same ones to go on, or remove it to begin anew"
            )
        optimised = nested({k.removeprefix("optimised."): v for k, v in tensors.items() if k.startswith("optimised.")})
        structure = json.loads(metadata["structure"])
        values = {name: _unpacked(packed, tensors, device) for name, packed in structure.items()}
        memory = OptimiserMemory(values.pop("gradients"), values.pop("loss_scale", LARGEST_LOSS_SCALE))
        generator = values.pop("generator")
        return cls(
            fingerprint,
            memory=memory,
            optimised=optimised,
            generator=None if generator is None else generator.cpu(),
            **{**values, "outputs": tuple(values["outputs"])},
        )


def scheduler_variables(scheduler: Any) -> dict[str, Any]:
    """What a scheduler remembers between steps: its tensors, numbers and lists of them."""
    return {name: value for name, value in vars(scheduler).items() if name != "step" and _packable(value)}


def restore_scheduler(scheduler: Any, variables: dict[str, Any]) -> None:
    """Give a scheduler back what `scheduler_variables` took; tensors stay on the device the scheduler keeps them."""
    for name, value in variables.items():
        current = getattr(scheduler, name, None)
        if isinstance(value, Tensor) and isinstance(current, Tensor):
            value = value.to(current.device)
            if torch.equal(value, current):
                # A schedule is recognised by its tensor: another one would look like the start of another run.
                continue
        setattr(scheduler, name, value)


def _packable(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_packable(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(entry, f"{name}.{index}", tensors) for index, entry in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {str(key): _packed(entry, f"{name}.{key}", tensors) for key, entry in value.items()}}
    return {"value": value}


def _unpacked(packed: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Any:
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content].to(device)
    if kind in ("list", "tuple"):
        entries = [_unpacked(entry, tensors, device) for entry in content]
        return entries if kind == "list" else tuple(entries)
    if kind == "dict":
        return {key: _unpacked(entry, tensors, device) for key, entry in content.items()}
    return content
