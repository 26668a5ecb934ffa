"""Counting denoising steps and the calls within one from outside the loop; which samples of a call are conditional."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch

from corrdit.arguments import finite_number
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout

GUIDANCE_PROPERTY = "do_classifier_free_guidance"
"""Of pipelines that say whether the step in progress has an unconditional branch."""


class PipelineSteps:
    """The step a pipeline is at, counted through its scheduler.

    A run begins when the scheduler has set its timesteps anew. Within a run a step is one pass of the pipeline's loop,
    which keeps its timestep as one tensor object for all calls of the transformer; so steps are told apart without
    reading a number back from the device, and second-order schedulers, which repeat a timestep, count right. Of a
    pipeline that keeps none, the timestep and the scheduler's place in its schedule tell them apart.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._schedule: object = None
        self._marker: object = None
        self.guided = False
        self.step = -1
        self.call = -1

    def advance(self, call: ForwardCall) -> None:
        """Take note of a call of the transformer (of any of the pipeline's transformers).

        Raises:
            ValueError: the call is not the pipeline's own, so steps and branches cannot be told; or its guidance_scale
                is NaN or infinite.
        """
        if hasattr(type(self._pipe), "current_timestep") and getattr(self._pipe, "_current_timestep", None) is None:
            raise ValueError(
                f"the transformer was called, but not by the {type(self._pipe).__name__} that was given: leave the "
                "guidance or the capture before the model is used by a tracker or by anything else, or give the "
                "pipeline that runs (another may share its parts), or for a capture the transformer itself"
            )
        schedule = self._pipe.scheduler.timesteps
        if schedule is not self._schedule:
            self._schedule, self._marker, self.step = schedule, None, -1
            _check_scale(self._pipe)
            # CogVideoX decides once and with dynamic guidance then overwrites the scale, so it is read before.
            self.guided = _uses_guidance(self._pipe)
        marker = getattr(self._pipe, "_current_timestep", None)
        if marker is None:
            # A schedule of second order has a timestep twice, and its place in it tells them apart.
            place = getattr(self._pipe.scheduler, "_step_index", None)
            marker = (place, float(torch.as_tensor(call.timestep).max()))
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
    guided = True

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


def branches_of(
    layout: TransformerLayout, call: ForwardCall, steps: PipelineSteps | TransformerSteps
) -> dict[str, slice]:
    """Where in the batch of a call the samples of each branch of classifier-free guidance are.

    Args:
        layout: of the transformer's family.
        call: in progress.
        steps: which have counted it.

    Returns:
        "cond" and "uncond", one of them, or none in further calls within a step.

    Raises:
        ValueError: an odd batch which should hold both.
    """
    whole = slice(0, call.batch)
    if layout.guidance == "separate":
        return {0: {"cond": whole}, 1: {"uncond": whole}}.get(steps.call, {})
    if isinstance(steps, PipelineSteps) and steps.call > 0:
        return {}
    if not steps.guided:
        return {"cond": whole}
    if call.batch % 2:
        raise ValueError(
            "classifier-free guidance is on, so a batch is [unconditional, conditional], but the batch has "
            f"{call.batch} samples; to capture it whole, give the transformer and leave branch out"
        )
    return {"cond": slice(call.batch // 2, call.batch), "uncond": slice(0, call.batch // 2)}


SHARED_ARGUMENTS = frozenset({"image_rotary_emb", "ofs", "rope_interpolation_scale", "attention_kwargs", "return_dict"})
"""Arguments of transformers that all samples of a batch share."""


def rows_of(arguments: Mapping[str, object], rows: slice, batch: int) -> dict[str, Any]:
    """The arguments of a transformer's forward of `batch` samples for some of them."""

    def chosen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows] if tensor.ndim and tensor.shape[0] == batch else tensor

    return {
        name: value if name in SHARED_ARGUMENTS else map_tensors(value, chosen) for name, value in arguments.items()
    }


def map_tensors(value: object, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`function` of every tensor in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(part, function) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(part, function) for part in value)
    return value


def _uses_guidance(pipe: object) -> bool:
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        return bool(guider.num_conditions > 1)
    for name in (GUIDANCE_PROPERTY, "guidance_scale"):
        value = getattr(pipe, name, None)
        if value is not None:
            return bool(value) if name == GUIDANCE_PROPERTY else value > 1
    return False


def _check_scale(pipe: object) -> None:
    """NaN is neither above 1 nor at most 1: most pipelines would leave their guidance out in silence."""
    scale = getattr(pipe, "guidance_scale", None)
    if isinstance(scale, numbers.Real):
        finite_number("guidance_scale", scale)


def _same(marker: object, other: object) -> bool:
    if isinstance(marker, tuple) and isinstance(other, tuple):
        return marker == other
    return marker is other
