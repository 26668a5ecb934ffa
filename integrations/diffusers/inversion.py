"""Clean latents brought to the noisy steps of a model along its own deterministic path, and back.

Diffusion models (CogVideoX, the embedded model) are inverted by DDIM (Song et al., "Denoising Diffusion Implicit
Models", arXiv 2010.02502, equation 12 read backwards), models of flow matching (HunyuanVideo, LTX, Mochi, Wan) by Euler
steps in reverse. Both follow the schedule of the pipeline with trailing spacing, take the empty prompt, and use no
classifier-free guidance. Whole forward passes are needed, one a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from corrdit.arguments import whole_number

RULES = ("ddim", "released")
"""How latents are inverted: as diffusers' `DDIMInverseScheduler` does, or as DiffTrack's released code."""

Path = Iterator[tuple[int, Tensor]]
"""Steps and the latents there, one after another."""

_PREDICTIONS = ("epsilon", "v_prediction")


class Scheduler(Protocol):
    """Of diffusers, its timesteps set."""

    timesteps: Tensor

    def __getattr__(self, name: str) -> Any: ...


class SteppedModel(Protocol):
    """What is asked of a backbone."""

    name: str

    def stepping_scheduler(self, inference_steps: int) -> Scheduler: ...

    def predict(self, latents: Tensor, timestep: float, *, image: Tensor | None = ...) -> Tensor: ...


class NoisePath(Protocol):
    """The levels of noise of a schedule: number i at step i, and one more for clean latents."""

    def moved(self, latents: Tensor, output: Tensor, start: int, end: int) -> Tensor:
        """Latents at level `start` brought to level `end` by the transformer's output."""

    def clean(self, latents: Tensor, output: Tensor, level: int) -> Tensor:
        """The clean latents that the output predicts for latents at a level."""


class DDIMPath:
    """Between the levels of a scheduler with `alphas_cumprod`.

    Args:
        scheduler: of diffusers, its timesteps set.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.prediction = scheduler.config.prediction_type
        clean = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0), dtype=torch.float64).reshape(1)
        alphas = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()].double()
        self.alphas = torch.cat([alphas, clean]).tolist()

    def moved(self, latents: Tensor, output: Tensor, start: int, end: int) -> Tensor:
        original, direction = self._parts(latents, output, start)
        return self.alphas[end] ** 0.5 * original + (1 - self.alphas[end]) ** 0.5 * direction

    def clean(self, latents: Tensor, output: Tensor, level: int) -> Tensor:
        return self._parts(latents, output, level)[0]

    def _parts(self, latents: Tensor, output: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Clean latents and noise."""
        signal, noise = self.alphas[level] ** 0.5, (1 - self.alphas[level]) ** 0.5
        if self.prediction == "v_prediction":
            return signal * latents - noise * output, signal * output + noise * latents
        return (latents - noise * output) / signal, output


class EulerPath:
    """Between the levels of a scheduler of flow matching, whose transformer gives the derivative by sigma.

    Args:
        scheduler: of diffusers, its timesteps set.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.sigmas = scheduler.sigmas.double().tolist()

    def moved(self, latents: Tensor, output: Tensor, start: int, end: int) -> Tensor:
        return latents + (self.sigmas[end] - self.sigmas[start]) * output

    def clean(self, latents: Tensor, output: Tensor, level: int) -> Tensor:
        return latents + (self.sigmas[-1] - self.sigmas[level]) * output


def noise_path(scheduler: Scheduler, *, name: str) -> NoisePath:
    """The path of a scheduler whose timesteps are set.

    Args:
        scheduler: of diffusers.
        name: of the model, for the message.

    Raises:
        ValueError: a scheduler without a known path.
    """
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction == "flow_prediction" and hasattr(scheduler, "sigmas"):
        return EulerPath(scheduler)
    if prediction in _PREDICTIONS and hasattr(scheduler, "alphas_cumprod"):
        return DDIMPath(scheduler)
    raise ValueError(
        f"{name} has a {type(scheduler).__name__} with predictions of {prediction}, for which no inversion is known; "
        f"known are schedulers with alphas_cumprod ({', '.join(_PREDICTIONS)}) and of flow matching"
    )


def inverted_latents(
    backbone: SteppedModel,
    latents: Tensor,
    steps: Sequence[int],
    inference_steps: int,
    *,
    rule: str = "ddim",
    image: Tensor | None = None,
) -> Path:
    """Clean latents at denoising steps, from the cleanest of them to the noisiest.

    At the step i it arrives at, the transformer is asked at the timestep of i. With "ddim" it is given the latents of
    step i + 1 (the clean ones first) and their move is from that level to that of i, as diffusers'
    `DDIMInverseScheduler` does. DiffTrack's released code moves from the level of i to that of i - 1 instead, so that
    latents end up one step noisier than what they are read as; its model for inversion is always CogVideoX-2B, here it
    is the model itself.

    Args:
        backbone: of `load_backbone`.
        latents: clean, `[F, C, h, w]` or `[B, F, C, h, w]`.
        steps: non-negative.
        inference_steps: of the schedule.
        rule: one of `RULES`.
        image: as `Backbone.forward` takes it.

    Yields:
        (step, latents in float32).

    Raises:
        ValueError: a step outside the schedule, a rule that does not exist or is not for this model, a scheduler
            without a known path, or latents that become NaN or infinite.
    """
    path, timesteps = _path(backbone, inference_steps)
    wanted = _checked(steps, inference_steps)
    shift = _shift(rule, path, min(wanted), backbone.name)
    moving = latents.float()
    for step in range(inference_steps - 1, min(wanted) - 1, -1):
        output = backbone.predict(moving, timesteps[step], image=image)
        moving = path.moved(moving.to(output), output, step + 1 - shift, step - shift)
        _check_finite(moving, f"inverted to step {step}", backbone.name)
        if step in wanted:
            yield step, moving


def denoised_latents(
    backbone: SteppedModel,
    latents: Tensor,
    start: int,
    steps: Sequence[int],
    inference_steps: int,
    *,
    image: Tensor | None = None,
) -> Path:
    """Latents at step `start` denoised to later steps, deterministically.

    Args:
        backbone, inference_steps, image: as for `inverted_latents`.
        latents: as they are at `start`.
        start: a step, non-negative.
        steps: none before it.

    Yields:
        (step, latents in float32), from the noisiest on.

    Raises:
        ValueError: as `inverted_latents`, or a step before `start`.
    """
    path, timesteps = _path(backbone, inference_steps)
    wanted = _checked([start, *steps], inference_steps)
    if min(wanted) < start:
        raise ValueError(f"step {min(wanted)} is noisier than step {start}, where denoising begins; begin there")
    moving = latents.float()
    for step in range(start, max(wanted) + 1):
        if step in steps:
            yield step, moving
        if step < max(wanted):
            output = backbone.predict(moving, timesteps[step], image=image)
            moving = path.moved(moving.to(output), output, step, step + 1)
            _check_finite(moving, f"denoised to step {step + 1}", backbone.name)


def _path(backbone: SteppedModel, inference_steps: int) -> tuple[NoisePath, list[float]]:
    scheduler = backbone.stepping_scheduler(inference_steps)
    return noise_path(scheduler, name=backbone.name), [float(timestep) for timestep in scheduler.timesteps]


def _checked(steps: Sequence[int], inference_steps: int) -> set[int]:
    wanted = {whole_number("step", step, 0) for step in steps}
    if not wanted or max(wanted) >= inference_steps:
        raise ValueError(f"steps must be from 0 to {inference_steps - 1}, at least one, got {sorted(wanted)}")
    return wanted


def _shift(rule: str, path: NoisePath, first: int, name: str) -> int:
    """Levels by which moves end noisier than the step they are for."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    if rule == "ddim":
        return 0
    if not isinstance(path, DDIMPath):
        raise ValueError(
            f"DiffTrack's released inversion is by DDIM, and {name} is a model of flow matching; use 'ddim'"
        )
    if first == 0:
        raise ValueError(
            "DiffTrack's released inversion ends a step noisier than it is read; step 0 has none before it"
        )
    return 1


def _check_finite(latents: Tensor, what: str, name: str) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(f"latents {what} by {name} are NaN or infinite; load the model in bfloat16 or float32")
