"""Counting denoising steps and the calls within one, from outside the denoising loop."""

from __future__ import annotations

from typing import Any

import torch

from corrdit.integrations.diffusers.layouts import ForwardCall

GUIDANCE_PROPERTY = "do_classifier_free_guidance"
"""Of pipelines that say whether the step in progress has an unconditional branch."""


class PipelineSteps:
    """The step a pipeline is at, counted through its scheduler.

    A run begins when the scheduler has set its timesteps anew. Within a run a step is one pass of the pipeline's loop,
    which keeps its timestep as one tensor object for all calls of the transformer; so steps are told apart without
    reading a number back from the device, and second-order schedulers, which repeat a timestep, count right.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._schedule: Any = None
        self._marker: Any = None
        self.guided = False
        self.runs = 0
        self.step = -1
        self.call = -1

    def advance(self, call: ForwardCall) -> None:
        """Take note of a call of the transformer (of any of the pipeline's transformers).

        Raises:
            ValueError: the call is not the pipeline's own, so steps and branches cannot be told.
        """
        if hasattr(type(self._pipe), "current_timestep") and getattr(self._pipe, "_current_timestep", None) is None:
            raise ValueError(
                f"the transformer was called, but not by the {type(self._pipe).__name__} that was given; give "
                "the pipeline that runs (another may share its parts), or for a capture the transformer itself"
            )
        schedule = self._pipe.scheduler.timesteps
        if schedule is not self._schedule:
            self._schedule, self._marker, self.step = schedule, None, -1
            self.runs += 1
            # CogVideoX decides once and with dynamic guidance then overwrites the scale, so it is read before.
            self.guided = _uses_guidance(self._pipe)
        marker = getattr(self._pipe, "_current_timestep", None)
        if marker is None:
            marker = float(torch.as_tensor(call.timestep).max())
        if self._marker is not None and _same(marker, self._marker):
            self.call += 1
            return
        self._marker = marker
        self.step += 1
        self.call = 0
        if hasattr(type(self._pipe), GUIDANCE_PROPERTY):
            # These pipelines ask anew at every step, so that a callback can end their guidance half way.
            self.guided = bool(getattr(self._pipe, GUIDANCE_PROPERTY))

    @property
    def count(self) -> int:
        """Steps of the run in progress."""
        count = getattr(self._pipe, "_num_timesteps", None)
        return int(count) if count is not None else len(self._pipe.scheduler.timesteps)


class TransformerSteps:
    """Steps of a bare transformer: each distinct timestep, in the order of calls."""

    count: int | None = None
    runs = 1

    def __init__(self) -> None:
        self._calls: dict[float, int] = {}
        self.step = -1
        self.call = -1

    def advance(self, call: ForwardCall) -> None:
        """Take note of a call of the transformer."""
        timestep = float(torch.as_tensor(call.timestep).max())
        self.call = self._calls.get(timestep, -1) + 1
        self._calls[timestep] = self.call
        self.step = list(self._calls).index(timestep)


def _uses_guidance(pipe: Any) -> bool:
    for name in (GUIDANCE_PROPERTY, "guidance_scale"):
        value = getattr(pipe, name, None)
        if value is not None:
            return bool(value) if name == GUIDANCE_PROPERTY else value > 1
    return False


def _same(marker: Any, other: Any) -> bool:
    if isinstance(marker, float) and isinstance(other, float):
        return marker == other
    return marker is other
