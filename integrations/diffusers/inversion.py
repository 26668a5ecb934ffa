"""Clean latents brought to the noisy steps of a model along its own deterministic path, and back.

Diffusion models (CogVideoX, the embedded model) are inverted by DDIM (Song et al., "Denoising Diffusion Implicit
Models", arXiv 2010.02502, equation 12 read backwards), models of flow matching (HunyuanVideo, LTX, Mochi, Wan) by Euler
steps in reverse. Both follow the schedule of the pipeline with trailing spacing, take the empty prompt, and use no
classifier-free guidance. Whole forward passes are needed, one a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from corrdit.arguments import choice, whole_number

RULES = ("ddim", "released")
"""How latents are inverted: as diffusers' `DDIMInverseScheduler` does, or as DiffTrack's released code."""

Path = Iterator[tuple[int, Tensor]]
"""Steps and the latents there, one after another."""

Move = Callable[[Tensor, Tensor, int], Tensor]
"""Latents brought to a step by the transformer's output."""

_PREDICTIONS = ("epsilon", "v_prediction")


class Scheduler(Protocol):
    """Of diffusers, its timesteps set."""

    timesteps: Tensor
    sigmas: Tensor

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
        # Adding noise leaves this table of the scheduler, alone, on the latents' device.
        self.of_timesteps = scheduler.alphas_cumprod.double().tolist()
        clean = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        self.alphas = [*(self.of_timesteps[int(timestep)] for timestep in scheduler.timesteps), clean]

    def moved(self, latents: Tensor, output: Tensor, start: int, end: int) -> Tensor:
        original, direction = self._parts(latents, output, self.alphas[start])
        return self.alphas[end] ** 0.5 * original + (1 - self.alphas[end]) ** 0.5 * direction

    def between_timesteps(self, latents: Tensor, output: Tensor, start: int, end: int) -> Tensor:
        """Latents of a timestep of the training schedule brought to another by the transformer's output."""
        original, direction = self._parts(latents, output, self.of_timesteps[start])
        return self.of_timesteps[end] ** 0.5 * original + (1 - self.of_timesteps[end]) ** 0.5 * direction

    def clean(self, latents: Tensor, output: Tensor, level: int) -> Tensor:
        return self._parts(latents, output, self.alphas[level])[0]

    def _parts(self, latents: Tensor, output: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Clean latents and noise, of latents whose signal has the variance `alpha`."""
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
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
    `DDIMInverseScheduler` does. "released" asks and moves as DiffTrack's code does, see `released_moves`.

    The released code guides by 6 with the empty prompt in both branches, which are then the same: the guided output is
    the plain one at twice the cost, so one branch is run here. It always inverts by CogVideoX-2B; here the model itself
    is asked.

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
    asked, move = _inverse_steps(rule, path, timesteps, backbone.name)
    moving = latents.float()
    for step in range(inference_steps - 1, min(wanted) - 1, -1):
        output = backbone.predict(moving, asked[step], image=image)
        moving = move(moving.to(output), output, step)
        _check_finite(moving, f"inverted to step {step}", backbone.name)
        if step in wanted:
            yield step, moving


def released_moves(timesteps: Sequence[float], training_steps: int = 1000) -> list[tuple[int, int]]:
    """The (asked, reached) timesteps of the calls of DiffTrack's released inversion, from clean latents on.

    It asks at 0 and then at the timesteps of the schedule from the cleanest on, and every call takes its latents for
    those of the timestep it asks at and brings them `training_steps // N` further. What is given to step s comes from
    N - s calls. With N = 50 these are 0 to 20, 19 to 39, ..., 979 to 999: step s is reached at its own timestep, step
    49 alone at 20 in place of 19. Plain DDIM asks at the timestep it arrives at instead of the one it leaves.

    Args:
        timesteps: of the schedule, N, from the noisiest to the cleanest, trailing spacing.
        training_steps: timesteps the model was trained with.
    """
    ascending = [0, *(int(timestep) for timestep in reversed(timesteps))]
    interval = training_steps // len(timesteps)
    return [(asked, min(asked + interval, training_steps - 1)) for asked in ascending[: len(timesteps)]]


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
        steps: none before it; number `inference_steps` is the clean end.

    Yields:
        (step, latents in float32), from the noisiest on.

    Raises:
        ValueError: as `inverted_latents`, or a step before `start`.
    """
    path, timesteps = _path(backbone, inference_steps)
    wanted = _checked([start, *steps], inference_steps + 1)
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


def _inverse_steps(rule: str, path: NoisePath, timesteps: list[float], name: str) -> tuple[list[float], Move]:
    """The timestep asked at on the way to each step, and the move there by the output."""
    if choice("rule", rule, RULES) == "ddim":
        return timesteps, lambda latents, output, step: path.moved(latents, output, step + 1, step)
    if not isinstance(path, DDIMPath):
        raise ValueError(
            f"DiffTrack's released inversion is by DDIM, and {name} is a model of flow matching; use 'ddim'"
        )
    moves = released_moves(timesteps, len(path.of_timesteps))[::-1]
    asked = [float(timestep) for timestep, _ in moves]
    return asked, lambda latents, output, step: path.between_timesteps(latents, output, *moves[step])


def _check_finite(latents: Tensor, what: str, name: str) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(f"latents {what} by {name} are NaN or infinite; load the model in bfloat16 or float32")
