"""Steering one run of an unmodified pipeline from its transformer's forward and its scheduler's step.

The pipeline's own loop denoises. Before the first call of the transformer in a guided step the latents or the
positional embedding are optimised; the optimised latents then go into the transformer's calls and into the scheduler's
step in place of the loop's. An objective that reads the model's prediction is minimised behind the calls, where that is
known, and the prediction is made again for the latents that come of it. A resumed run walks through the loop with the
stored state instead of computing the finished steps.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.host.forwards import (
    Arguments,
    Forward,
    OneThread,
    frozen,
    replaced_forward,
    transformers_of,
    weights_kept_for_backward,
)
from corrdit.integrations.diffusers.host.steps import PipelineSteps, branches_of, rows_of
from corrdit.integrations.diffusers.layouts import ForwardCall, forward_arguments
from corrdit.integrations.diffusers.motion_transfer.attention_editing import (
    AttentionParts,
    injected,
)
from corrdit.integrations.diffusers.motion_transfer.embeddings import PositionalTables, positional_tables
from corrdit.integrations.diffusers.motion_transfer.latents import LatentLayout, SkippedOutput
from corrdit.integrations.diffusers.motion_transfer.objectives import MotionObjective
from corrdit.integrations.diffusers.motion_transfer.observation import Reader, gradient_checkpointing
from corrdit.integrations.diffusers.motion_transfer.optimisation import (
    DivergedError,
    Leaves,
    LossFunction,
    optimised,
)
from corrdit.integrations.diffusers.motion_transfer.predicted import StepCalls
from corrdit.integrations.diffusers.motion_transfer.prediction_loss import prediction_loss
from corrdit.integrations.diffusers.motion_transfer.reference import ReferenceMotion
from corrdit.integrations.diffusers.motion_transfer.run_state import (
    RunState,
    restore_scheduler,
    scheduler_variables,
)
from corrdit.integrations.diffusers.motion_transfer.schedule import SteeredStep, run_scheduler
from corrdit.integrations.diffusers.motion_transfer.step_reference import StepReference
from corrdit.integrations.diffusers.motion_transfer.stored import StoredMotion, mixed
from corrdit.integrations.diffusers.transfer_settings import TransferSettings

StepReport = Callable[[int, int, list[float]], None]
"""`report(finished steps, steps, losses of the step)`."""


class GuidedRun:
    """One run of a pipeline under guidance.

    Args:
        backbone: whose pipeline runs.
        settings: with blocks counted from 0.
        objective: what is optimised or injected.
        reference: its motion; None where nothing of it is needed.
        state: where the run begins; changed as it goes.
        generator: of the pipeline's random numbers.
        reader: makes the objective's readings of the new video.
        stored: latents or embeddings to inject instead of optimising.
        finished_step: called with the state after every denoising step.
        report: called after every denoising step.

    Attributes:
        window: the denoising steps that are guided.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: TransferSettings,
        objective: MotionObjective,
        reference: ReferenceMotion | None,
        state: RunState,
        generator: torch.Generator,
        reader: Reader,
        *,
        stored: StoredMotion | None = None,
        finished_step: Callable[[RunState], None] | None = None,
        report: StepReport | None = None,
    ) -> None:
        self._backbone, self._settings, self._reference = backbone, settings, reference
        self._objective, self._reader = objective, reader
        self.state = state
        self._generator, self._stored = generator, stored
        self._finished_step, self._report = finished_step, report
        self._layout, self._latents = backbone.layout(), LatentLayout(backbone)
        # Stored motion goes in at the steps it was made at, whatever the settings would optimise.
        self.window = settings.guided_window if stored is None else stored.window
        self._counter = PipelineSteps(backbone.pipe)
        self._inside = False
        self._shift: Tensor | None = None
        self._loop_dtype: torch.dtype | None = None
        self._unshifted: Tensor | None = None
        self._injected: AttentionParts = {}
        self._positions: PositionalTables | None = None
        self._calls = StepCalls()
        self._minimise: Callable[[Tensor, Tensor], Tensor] | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Steer the pipeline inside the block; it is as it was afterwards."""
        pipe = self._backbone.pipe
        scheduler, own = run_scheduler(self._backbone, self._settings), pipe.scheduler
        scheduler.step = SteeredStep(scheduler, functools.partial(self._scheduler_step, scheduler, scheduler.step))
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, pipe, "scheduler", own)
            pipe.scheduler = scheduler
            stack.enter_context(weights_kept_for_backward(pipe))
            for transformer in transformers_of(pipe):
                thread = stack.enter_context(OneThread(transformer))
                stack.enter_context(frozen(transformer))
                through = functools.partial(self._forward, transformer, thread)
                stack.enter_context(replaced_forward(transformer, through, round_hooks=True))
            yield

    def _forward(
        self,
        transformer: Module,
        thread: OneThread,
        own: Forward,
        args: tuple[object, ...],
        kwargs: Arguments,
    ) -> object:
        thread.check()
        if self._inside:
            return own(*args, **kwargs)
        arguments = forward_arguments(transformer, args, kwargs)
        call = self._layout.read_call(transformer, arguments)
        self._counter.advance(call)
        step = self._counter.step
        if step < self.state.finished:
            return SkippedOutput(arguments, self._latents.split(arguments["hidden_states"])[0])
        self._inside = True
        try:
            if self._counter.call == 0:
                self._begin_step(transformer, arguments, call, step)
            output = self._shifted(transformer, own, arguments, call)
            if self._minimise is not None:
                self._calls.outputs.append(output[0])
                self._calls.forwards.append(functools.partial(self._again, transformer, own, arguments, call))
                self._calls.batched = self._layout.guidance == "batched" and self._counter.guided
            return output
        finally:
            self._inside = False

    def _shifted(self, transformer: Module, own: Forward, arguments: Arguments, call: ForwardCall) -> Any:
        """The transformer's output for the latents that were shifted."""
        if self._shift is not None:
            hidden = arguments["hidden_states"]
            latents, condition = self._latents.split(hidden)
            moved = (latents.float() + self._shift).to(hidden.dtype)
            arguments = {**arguments, "hidden_states": self._latents.joined(moved, condition)}
        with self._guided_model(transformer, call):
            return own(**arguments)

    def _again(
        self, transformer: Module, own: Forward, arguments: Arguments, call: ForwardCall, latents: Tensor
    ) -> Tensor:
        """The transformer's output for other latents."""
        self._use({"latent": latents})
        self._inside = True
        try:
            output: Tensor = self._shifted(transformer, own, arguments, call)[0]
        finally:
            self._inside = False
        return output

    def _begin_step(self, transformer: Module, arguments: Arguments, call: ForwardCall, step: int) -> None:
        self._shift, self._injected, self._calls, self._minimise = None, {}, StepCalls(), None
        conditional = rows_of(arguments, self._conditional_rows(call), call.batch)
        latents, condition = self._latents.split(conditional["hidden_states"])
        self._unshifted = latents.detach()
        if step == 0:
            self.state.noise = latents.detach().clone()
            if self._settings.strength < 1:
                self.state.start = self._source().noised(call, self.state.noise).to(latents.dtype)
                self._use({"latent": self.state.start})
                conditional["hidden_states"] = self._latents.joined(self.state.start, condition)
        if step not in self.window:
            self.state.tables = {}
            return
        if self._settings.injection_blocks and self._objective.injects:
            self._injected = self._source().parts(transformer, conditional, call, condition, self.state.noise)
        if self._stored is not None:
            self._take_stored(transformer, conditional, call, step)
        elif self._objective.reads == "prediction":
            wanted = self._wanted(transformer, call, step)
            self._minimise = functools.partial(self._optimise_prediction, call, step, wanted)
        elif self._objective.reads is not None:
            with gradient_checkpointing(transformer, self._settings.gradient_checkpointing):
                self._optimise(transformer, conditional, call, step)

    def _optimise(self, transformer: Module, conditional: Arguments, call: ForwardCall, step: int) -> None:
        latents, condition = self._latents.split(conditional["hidden_states"])
        wanted = self._wanted(transformer, call, step)

        if self._settings.optimise == "latent":
            start: Mapping[str, Tensor] = {"latent": latents}
        else:
            positions = self._positional(transformer, conditional, call)
            start = self.state.tables or positions.original
            self.state.tables = dict(start)

        def loss_of(leaves: Leaves) -> Tensor:
            given = dict(conditional)
            if self._settings.optimise == "latent":
                given["hidden_states"] = self._latents.joined(leaves["latent"].to(latents.dtype), condition)
            else:
                self.state.tables.update(leaves)
            return self._loss(transformer, given, call, wanted)

        # Gradient checkpointing runs blocks again in the backward pass, so the model stays guided until it is done.
        with self._guided_model(transformer, call):
            self._use(self._minimised(start, loss_of, step, half=latents.dtype == torch.float16))

    def _minimised(self, start: Mapping[str, Tensor], loss_of: LossFunction, step: int, *, half: bool) -> Leaves:
        """What the optimiser makes of a step's start; noted in the state."""
        within = None
        if self._reader.region is not None and self._settings.optimise == "latent":
            within = self._latents.region(self._reader.region)
        try:
            found, losses = optimised(
                start, loss_of, self._settings, step, self.state.memory, half_precision=half, within=within
            )
        except DivergedError as error:
            error.losses = [*self.state.losses, *error.losses]
            raise
        self.state.losses.append(losses)
        self.state.optimised[step] = {name: value.float().cpu() for name, value in found.items()}
        return found

    def _optimise_prediction(
        self, call: ForwardCall, step: int, wanted: Any, sample: Tensor, prediction: Tensor
    ) -> Tensor:
        """Move the latents to the objective, and return the prediction there.

        Args:
            call: the first of the step.
            step: of the denoising.
            wanted: of the reference.
            sample: the latents of the step.
            prediction: of the pipeline for them.
        """
        predicted = self._calls.combined(prediction)
        begun = self.state.noise if self.state.start is None else self.state.start
        assert begun is not None
        loss_of = prediction_loss(
            self._backbone, self._objective, self._reader, call, step,
            begun=begun, known=(sample, prediction), predicted=predicted, wanted=wanted,
        )  # fmt: skip
        found = self._minimised({"latent": sample}, loss_of, step, half=False)
        result = predicted(found["latent"])
        self._use(found)
        return result.to(prediction.dtype)

    def _wanted(self, transformer: Module, call: ForwardCall, step: int) -> Any:
        """What the loss compares with: by block, or of the prediction."""
        if not self._objective.needs_reference:
            return {}
        return self._source().wanted(transformer, call, step, self.state.noise)

    def _source(self) -> StepReference:
        assert self._reference is not None
        region = self._reader.region
        return StepReference(self._backbone, self._settings, self._objective, self._reference, region)

    def _use(self, found: Mapping[str, Tensor]) -> None:
        if "latent" in found:
            assert self._unshifted is not None
            self._shift = found["latent"].to(self._unshifted.device).float() - self._unshifted.float()
        else:
            self.state.tables = dict(found)

    def _take_stored(self, transformer: Module, conditional: Arguments, call: ForwardCall, step: int) -> None:
        assert self._stored is not None
        if step not in self._stored.tensors:
            return
        if self._stored.kind == "latent":
            own: Mapping[str, Tensor] = {"latent": self._latents.split(conditional["hidden_states"])[0]}
        else:
            own = self._positional(transformer, conditional, call).original
        found, region = self._stored.at(step, own), self._reader.region
        self._use(found if region is None else mixed(found, own, region, self._latents.region(region)))

    def _loss(self, transformer: Module, arguments: Arguments, call: ForwardCall, wanted: Mapping[int, Any]) -> Tensor:
        assert self._objective.reads is not None

        def loss(block: int, read: Any) -> Tensor:
            return self._objective.loss(read, wanted.get(block))

        losses = self._reader.blocks(self._objective.reads, transformer, self._layout, arguments, call.grid, loss)
        return torch.stack([losses[block] for block in self._settings.blocks]).mean()

    @contextlib.contextmanager
    def _guided_model(self, transformer: Module, call: ForwardCall) -> Iterator[None]:
        """The transformer with the optimised positional embedding and the injected keys and values of the step."""
        with contextlib.ExitStack() as stack:
            if self.state.tables and self._positions is not None:
                stack.enter_context(self._positions.applied(transformer, self.state.tables))
            if self._injected:
                region = self._reader.region
                stack.enter_context(injected(transformer, self._layout, call.grid, self._injected, region))
            yield

    def _positional(self, transformer: Module, conditional: Arguments, call: ForwardCall) -> PositionalTables:
        if self._positions is None:
            self._positions = positional_tables(self._backbone, transformer, conditional, call.grid)
        return self._positions

    def _scheduler_step(self, scheduler: Any, own: Forward, *args: object, **kwargs: object) -> object:
        index = self._counter.step
        if index < self.state.finished:
            if index == self.state.finished - 1:
                restore_scheduler(scheduler, self.state.scheduler)
                if self.state.generator is not None:
                    self._generator.set_state(self.state.generator)
            return self.state.outputs
        if self._shift is not None or self._minimise is not None:
            bound = inspect.signature(own).bind(*args, **kwargs)
            sample = bound.arguments["sample"]
            self._check_same_latents(sample)
            # Float32 through the step, as in the released code: bfloat16 would round changes of a thousandth away.
            self._loop_dtype = sample.dtype
            wide = torch.promote_types(sample.dtype, torch.float32)
            if self._minimise is not None:
                begun = sample if self._shift is None else sample.to(wide) + self._shift.to(sample.device, wide)
                bound.arguments["model_output"] = self._minimise(begun, bound.arguments["model_output"])
            assert self._shift is not None
            bound.arguments["sample"] = sample.to(wide) + self._shift.to(sample.device, wide)
            args, kwargs = bound.args, bound.kwargs
        outputs: Any = own(*args, **kwargs)
        if self._loop_dtype is not None:
            # Schedulers of several steps keep the wide sample for the next one.
            outputs = (outputs[0].to(self._loop_dtype), *outputs[1:])
        self.state.finished = index + 1
        self.state.outputs = tuple(outputs)
        self.state.scheduler = scheduler_variables(scheduler)
        self.state.generator = self._generator.get_state()
        if index + 1 not in self.window:
            self.state.tables = {}
        if self._finished_step is not None:
            self._finished_step(self.state)
        if self._report is not None:
            guided = self.state.losses and index in self.window
            self._report(index + 1, self._counter.count, self.state.losses[-1] if guided else [])
        return outputs

    def _check_same_latents(self, sample: Tensor) -> None:
        assert self._unshifted is not None
        given = sample.to(self._unshifted)
        if given.shape != self._unshifted.shape or not torch.allclose(given, self._unshifted, rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(self._backbone.pipe.scheduler).__name__} scales the latents before the transformer sees them, "
                "so optimised latents cannot be given back to it; take a DDIM, DPM or flow-matching scheduler, or "
                'optimise="embedding"'
            )

    def _conditional_rows(self, call: ForwardCall) -> slice:
        """The sample with the conditional prompt."""
        rows = branches_of(self._layout, call, self._counter)["cond"]
        videos = len(range(*rows.indices(call.batch)))
        if videos != 1:
            raise ValueError(
                f"motion is transferred to one video at a time, but the pipeline denoises {videos}; give one prompt"
            )
        return rows
