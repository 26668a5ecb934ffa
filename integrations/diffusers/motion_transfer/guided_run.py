"""Steering one run of an unmodified pipeline from its transformer's forward and its scheduler's step.

The pipeline's own loop denoises. Before the first call of the transformer in a guided step the latents or the
positional embedding are optimised; the optimised latents then go into the transformer's calls and into the scheduler's
step in place of the loop's. A resumed run walks through the loop with the stored state instead of computing the
finished steps.
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
    frozen,
    replaced_forward,
    transformers_of,
    weights_kept_for_backward,
)
from corrdit.integrations.diffusers.host.steps import PipelineSteps, branches_of, rows_of
from corrdit.integrations.diffusers.layouts import ForwardCall, forward_arguments
from corrdit.integrations.diffusers.motion_transfer.attention_editing import KeysValues, injected, keys_values_of
from corrdit.integrations.diffusers.motion_transfer.embeddings import PositionalTables, positional_tables
from corrdit.integrations.diffusers.motion_transfer.methods import method_of
from corrdit.integrations.diffusers.motion_transfer.observation import (
    attention_observed,
    features_observed,
    gradient_checkpointing,
)
from corrdit.integrations.diffusers.motion_transfer.optimisation import DivergedError, Leaves, optimised
from corrdit.integrations.diffusers.motion_transfer.reference import ReferenceMotion, codec_latents
from corrdit.integrations.diffusers.motion_transfer.run_state import (
    RunState,
    restore_scheduler,
    scheduler_variables,
)
from corrdit.integrations.diffusers.motion_transfer.stored import StoredMotion
from corrdit.integrations.diffusers.transfer_settings import TransferSettings

StepReport = Callable[[int, int, list[float]], None]
"""`report(finished steps, steps, losses of the step)`."""


class GuidedRun:
    """One run of a pipeline under guidance.

    Args:
        backbone: whose pipeline runs.
        settings: with blocks counted from 0.
        reference: its motion; None where nothing of it is needed (stored motion without injection, plain generation).
        state: where the run begins; changed as it goes.
        generator: of the pipeline's random numbers.
        stored: latents or embeddings to inject instead of optimising.
        finished_step: called with the state after every denoising step.
        report: called after every denoising step.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: TransferSettings,
        reference: ReferenceMotion | None,
        state: RunState,
        generator: torch.Generator,
        *,
        stored: StoredMotion | None = None,
        finished_step: Callable[[RunState], None] | None = None,
        report: StepReport | None = None,
    ) -> None:
        self._backbone, self._settings, self._reference = backbone, settings, reference
        self.state = state
        self._generator, self._stored = generator, stored
        self._finished_step, self._report = finished_step, report
        self._layout = backbone.layout()
        self._method = method_of(settings)
        # Stored motion goes in at the steps it was made at, whatever the settings would optimise.
        self._guided_steps = settings.guided_steps if stored is None else max(stored.tensors, default=-1) + 1
        self._counter = PipelineSteps(backbone.pipe)
        self._inside = False
        self._shift: Tensor | None = None
        self._loop_dtype: torch.dtype | None = None
        self._unshifted: Tensor | None = None
        self._keys_values: KeysValues = {}
        self._positions: PositionalTables | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Steer the pipeline inside the block; it is as it was afterwards."""
        pipe = self._backbone.pipe
        scheduler, own = self._scheduler(), pipe.scheduler
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, pipe, "scheduler", own)
            pipe.scheduler = scheduler
            stack.enter_context(weights_kept_for_backward(pipe))
            for transformer in transformers_of(pipe):
                stack.enter_context(frozen(transformer))
                through = functools.partial(self._forward, transformer)
                stack.enter_context(replaced_forward(transformer, through, round_hooks=True))
            yield

    def _scheduler(self) -> Any:
        """A scheduler of the settings' kind whose step takes the optimised latents."""
        import diffusers

        own = self._backbone.pipe.scheduler
        kind: Any = type(own)
        if self._settings.scheduler is not None:
            kind = getattr(diffusers, self._settings.scheduler, None)
            if kind is None:
                raise ValueError(f"diffusers has no scheduler {self._settings.scheduler!r}")
        spaced = "timestep_spacing" in own.config
        scheduler = kind.from_config(
            own.config, **({"timestep_spacing": self._settings.timestep_spacing} if spaced else {})
        )
        step = scheduler.step
        scheduler.step = functools.wraps(step)(functools.partial(self._scheduler_step, scheduler, step))
        return scheduler

    def _forward(self, transformer: Module, own: Forward, args: tuple[object, ...], kwargs: Arguments) -> object:
        if self._inside:
            return own(*args, **kwargs)
        arguments = forward_arguments(transformer, args, kwargs)
        call = self._layout.read_call(transformer, arguments)
        self._counter.advance(call)
        step = self._counter.step
        if step < self.state.finished:
            return (torch.zeros_like(arguments["hidden_states"]),)
        self._inside = True
        try:
            if self._counter.call == 0:
                self._begin_step(transformer, arguments, call, step)
            if self._shift is not None:
                hidden = arguments["hidden_states"]
                latents, condition = self._split(hidden)
                arguments["hidden_states"] = self._joined((latents.float() + self._shift).to(hidden.dtype), condition)
            with self._guided_model(transformer, call):
                return own(**arguments)
        finally:
            self._inside = False

    def _begin_step(self, transformer: Module, arguments: Arguments, call: ForwardCall, step: int) -> None:
        self._shift, self._keys_values = None, {}
        conditional = rows_of(arguments, self._conditional_rows(call), call.batch)
        latents, condition = self._split(conditional["hidden_states"])
        if step == 0:
            self.state.noise = latents.detach().clone()
        if step >= self._guided_steps:
            self.state.tables = {}
            return
        self._unshifted = latents.detach()
        if self._settings.injection_blocks and self._settings.method != "backbone":
            self._keys_values = self._reference_keys_values(transformer, conditional, call, condition)
        if self._stored is not None:
            self._take_stored(transformer, conditional, call, step)
        elif self._settings.optimises:
            with gradient_checkpointing(transformer, self._settings.gradient_checkpointing):
                self._optimise(transformer, conditional, call, step)

    def _optimise(self, transformer: Module, conditional: Arguments, call: ForwardCall, step: int) -> None:
        self._check_reference(call)
        latents, condition = self._split(conditional["hidden_states"])

        if self._settings.optimise == "latent":
            start: Mapping[str, Tensor] = {"latent": latents}
        else:
            positions = self._positional(transformer, conditional, call)
            start = self.state.tables or positions.original
            self.state.tables = dict(start)

        def loss_of(leaves: Leaves) -> Tensor:
            given = dict(conditional)
            if self._settings.optimise == "latent":
                given["hidden_states"] = self._joined(leaves["latent"].to(latents.dtype), condition)
            else:
                self.state.tables.update(leaves)
            return self._loss(transformer, given, call)

        half = latents.dtype == torch.float16
        try:
            # Gradient checkpointing runs blocks again in the backward pass, so the model stays guided until it is done.
            with self._guided_model(transformer, call):
                found, losses = optimised(start, loss_of, self._settings, step, self.state.memory, half_precision=half)
        except DivergedError as error:
            error.losses = [*self.state.losses, *error.losses]
            raise
        self.state.losses.append(losses)
        self.state.optimised[step] = {name: value.float().cpu() for name, value in found.items()}
        self._use(found)

    def _use(self, found: Mapping[str, Tensor]) -> None:
        if "latent" in found:
            assert self._unshifted is not None
            self._shift = found["latent"].to(self._unshifted.device).float() - self._unshifted.float()
        else:
            self.state.tables = dict(found)

    def _take_stored(self, transformer: Module, conditional: Arguments, call: ForwardCall, step: int) -> None:
        assert self._stored is not None
        found = self._stored.tensors.get(step)
        if found is None:
            return
        if self._stored.kind == "latent":
            expected = {"latent": self._split(conditional["hidden_states"])[0].shape}
        else:
            originals = self._positional(transformer, conditional, call).original
            expected = {name: table.shape for name, table in originals.items()}
        given = {name: tensor.shape for name, tensor in found.items()}
        if given != expected:
            raise ValueError(
                f"the stored {self._stored.kind} of step {step} has shapes {_shapes(given)}, this model and size need "
                f"{_shapes(expected)}; generate with the model and size it was made with"
            )
        device = conditional["hidden_states"].device
        self._use({name: tensor.to(device) for name, tensor in found.items()})

    def _loss(self, transformer: Module, arguments: Arguments, call: ForwardCall) -> Tensor:
        method, reference, blocks = self._method, self._reference, self._settings.blocks
        assert method is not None
        assert reference is not None
        if method.reads == "attention":
            operations = {
                block: {"loss": functools.partial(method.loss_of_attention, reference=reference.wanted[block])}
                for block in blocks
            }
            observed = attention_observed(transformer, arguments, operations)
            losses = [observed[block]["loss"] for block in blocks]
        else:
            features = features_observed(transformer, self._layout, arguments, call.grid, lambda maps: maps, blocks)
            losses = [method.loss_of_features(features[block], reference.wanted[block]) for block in blocks]
        return torch.stack(losses).mean()

    def _reference_keys_values(
        self, transformer: Module, conditional: Arguments, call: ForwardCall, condition: Tensor | None
    ) -> KeysValues:
        self._check_reference(call)
        assert self._reference is not None
        assert self.state.noise is not None
        backbone = self._backbone
        timestep = float(torch.as_tensor(call.timestep).max())
        clean = backbone.call_arguments(codec_latents(backbone, self._reference.latents), timestep, {})
        latents, _ = self._split(clean["hidden_states"])
        noise = self.state.noise.to(latents)
        noisy = backbone.add_noise(latents, noise, timestep).to(latents.dtype)
        given = {**conditional, "hidden_states": self._joined(noisy, condition)}
        return keys_values_of(transformer, self._layout, given, call.grid, self._settings.injection_blocks)

    @contextlib.contextmanager
    def _guided_model(self, transformer: Module, call: ForwardCall) -> Iterator[None]:
        """The transformer with the optimised positional embedding and the injected keys and values of the step."""
        with contextlib.ExitStack() as stack:
            if self.state.tables and self._positions is not None:
                stack.enter_context(self._positions.applied(transformer, self.state.tables))
            if self._keys_values:
                stack.enter_context(injected(transformer, self._layout, call.grid, self._keys_values))
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
        if self._shift is not None:
            bound = inspect.signature(own).bind(*args, **kwargs)
            sample = bound.arguments["sample"]
            self._check_same_latents(sample)
            # Float32 through the step, as in the released code: bfloat16 would round changes of a thousandth away.
            self._loop_dtype = sample.dtype
            wide = torch.promote_types(sample.dtype, torch.float32)
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
        if index + 1 >= self._guided_steps:
            self.state.tables = {}
        if self._finished_step is not None:
            self._finished_step(self.state)
        if self._report is not None:
            losses = self.state.losses[index] if index < len(self.state.losses) else []
            self._report(index + 1, self._counter.count, losses)
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

    def _check_reference(self, call: ForwardCall) -> None:
        assert self._reference is not None
        given, needed = self._reference.grid.without_text(), call.grid.without_text()
        if given != needed:
            raise ValueError(
                f"the reference has {given.frames} frames of {given.height} x {given.width} tokens and the new video "
                f"{needed.frames} of {needed.height} x {needed.width}; generate at the reference's length and size"
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

    def _split(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Noisy latents, and the image condition of a model that has one beside them."""
        if not getattr(self._backbone, "takes_image", False):
            return hidden, None
        axis = self._backbone.channel_axis
        latents, condition = hidden.tensor_split([self._backbone.latent_channels], dim=axis)
        return latents, condition

    def _joined(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        return latents if condition is None else torch.cat([latents, condition], dim=self._backbone.channel_axis)


def _shapes(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
