"""Motion transfer: a new video, from a prompt, with the motion of a reference."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from corrdit.arguments import whole_number
from corrdit.array_files import content_digest
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.loading import backbone_of
from corrdit.integrations.diffusers.backbones.published_transfers import published_transfer
from corrdit.integrations.diffusers.compatibility import check_takes_prompt, check_transformer, embeds_given
from corrdit.integrations.diffusers.host.forwards import Arguments, transformers_of
from corrdit.integrations.diffusers.layouts import Pipeline
from corrdit.integrations.diffusers.motion_transfer.guided_run import GuidedRun, StepReport
from corrdit.integrations.diffusers.motion_transfer.latents import LatentLayout
from corrdit.integrations.diffusers.motion_transfer.methods import objective_of
from corrdit.integrations.diffusers.motion_transfer.observation import Reader
from corrdit.integrations.diffusers.motion_transfer.plan import TransferPlan, transfer_plan
from corrdit.integrations.diffusers.motion_transfer.reference import (
    ReferenceMotion,
    clean_timestep,
    prepared_frames,
    reference_motion,
)
from corrdit.integrations.diffusers.motion_transfer.region import Region, region_tokens
from corrdit.integrations.diffusers.motion_transfer.result import TransferResult, as_uint8
from corrdit.integrations.diffusers.motion_transfer.run_state import RunState
from corrdit.integrations.diffusers.motion_transfer.stored import StoredMotion, composed
from corrdit.integrations.diffusers.motion_transfer.words import PromptWords
from corrdit.integrations.diffusers.transfer_settings import (
    TransferSettings,
    changed_settings,
    resolved_blocks,
)
from corrdit.surroundings import ordinary_defaults
from corrdit.video.frames import VideoLike

Reference: TypeAlias = VideoLike
"""A reference video, as `corrdit.video.as_frames` takes it."""

Announce: TypeAlias = Callable[[str, TransferPlan], None]
"""`announce(phase, plan)` as a phase begins."""


def settings_for(backbone: Backbone, method: object = None) -> TransferSettings:
    """The settings of the backbone's preset, those published for a model of its shape, or a starting point that says it
    is one.

    Where there are some for several methods, they are those for `method`, by its name. A preset that was calibrated
    on this very model brings its layer along.
    """
    preset = backbone.preset
    own = preset.transfer_of(method)
    if own is not None:
        return own
    settings = published_transfer(backbone.family, backbone.layers, backbone.heads, method)
    if settings is None:
        source = "a starting point at the published depth; nothing is published for this model"
        settings = TransferSettings(blocks=(backbone.layers // 2,), source=source)
    return preset.moved_to_layer(settings)


@dataclass(frozen=True)
class _Given:
    """What a call works on: frames of the reference, stored motion to inject, frames, height and width, and the tokens
    of the region."""

    frames: np.ndarray | None
    motion: StoredMotion | None
    size: tuple[int, int, int]
    region: Tensor | None


class MotionTransfer:
    """Gives new videos the motion of a reference, by optimisation in the denoising steps of an unmodified pipeline.

    ```python
    result = MotionTransfer(load_backbone("embedded"))(reference_video, "a red disc over sand")
    result.video, result.losses, result.flow
    ```

    Source: DiTFlow, "Video Motion Transfer with Diffusion Transformers" (arXiv 2412.07776).

    Args:
        backbone: as `corrdit.load_backbone` gives it, or a pipeline that is loaded.
        block: attention layer, or several, whose motion is compared; None for the settings'.
        settings: to start from; None for the published ones of a model of this shape, or a starting point.
        changes: settings to change, by name; see `TransferSettings`.

    Attributes:
        settings: in use, blocks counted from 0.
        objective: what is optimised or injected.

    Raises:
        ValueError: an unknown setting, a value out of range, a block the model does not have, or a model whose
            pipeline nothing can be transferred through.
        TypeError: a method that is neither a name nor a `MotionObjective`.
    """

    def __init__(
        self,
        backbone: Backbone | Pipeline,
        *,
        block: int | Iterable[int] | None = None,
        settings: TransferSettings | None = None,
        **changes: Any,
    ) -> None:
        if not isinstance(backbone, Backbone) and hasattr(backbone, "transformer"):
            backbone = backbone_of(backbone)
        if not isinstance(backbone, Backbone):
            raise ValueError(f"MotionTransfer needs a backbone of corrdit.load_backbone, got {type(backbone).__name__}")
        if block is not None:
            changes["blocks"] = block
        backbone.check_use("transfer")
        chosen = changed_settings(settings or settings_for(backbone, changes.get("method")), changes)
        resolved = {
            name: resolved_blocks(name, getattr(chosen, name), backbone.layers, backbone.name)
            for name in ("blocks", "injection_blocks")
        }
        self.backbone = backbone
        self.settings = changed_settings(chosen, resolved)
        self.objective = objective_of(self.settings)
        if self.settings.strength < 1 and clean_timestep(backbone) != 0:
            raise ValueError(
                f"strength is {self.settings.strength}, but time of {backbone.name} runs from noise to clean, where "
                "a later beginning is not known; give strength=1"
            )

    @ordinary_defaults()
    def __call__(
        self,
        reference: Reference | None,
        prompt: str = "",
        *,
        stored: StoredMotion | str | os.PathLike[str] | None = None,
        region: Region | None = None,
        elsewhere: StoredMotion | str | os.PathLike[str] | None = None,
        seed: int = 0,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        state_file: str | os.PathLike[str] | None = None,
        keep_state: bool = False,
        report: StepReport | None = None,
        announce: Announce | None = None,
        **pipeline_arguments: Any,
    ) -> TransferResult:
        """Generate one video.

        Args:
            reference: a path, a list of PIL images, or uint8 or floating-point (0 to 1) frames `[T, H, W, 3]` or
                `[T, 3, H, W]`; None with `stored`, or for an objective that needs none.
            prompt: for the new video.
            stored: motion optimised in an earlier run (`TransferResult.optimised` or the file it was saved to),
                injected at its steps and at its size; nothing is optimised.
            region: where the motion is wanted: a mask `[T, H, W]` or `[H, W]`, a box (left, top, right, bottom) in
                shares of the frame, or such boxes with their times in front, (time, left, top, right, bottom) each.
                Losses count its tokens alone, and latents change inside alone. None for everywhere.
            elsewhere: with `stored` and `region`, the stored motion that goes in outside the region, of a run with the
                same seed; None leaves what is outside as it comes.
            seed: of the initial noise.
            num_frames: None for as many as the reference has, the codec can stand for and the model's token budget
                holds, which is that of one chunk of its preset.
            height, width: in pixels; None for the settings', or the nearest to the reference's within the preset's
                tokens of a frame.
            state_file: keeps the run's state after each denoising step. A run that was killed goes on from there, with
                the same result; the file is removed once the video is there.
            keep_state: leave the file where it is, for a caller that removes it when the video is in safety.
            report: `report(finished steps, steps, losses of the step)`.
            announce: `announce(phase, plan)` as each phase begins, "reading the reference" and "denoising".
            pipeline_arguments: further arguments of the pipeline's call, for instance `image` or `prompt_embeds`.

        Raises:
            ValueError: a reference, prompt, size or stored motion that does not fit, with what is accepted; or a video
                that comes out as NaN.
            DivergedError: the loss became NaN or infinite; names the step, and `state_file` keeps the one before.
        """
        self._check_prompts(prompt, pipeline_arguments)
        sizes = {"num_frames": num_frames, "height": height, "width": width}
        given = self._given(reference, _loaded(stored), region, _loaded(elsewhere), sizes)
        begins = self._announcer(announce, given.size, optimises=given.motion is None, reads=given.frames is not None)
        prepared = self._read(given, begins)
        arguments = self._pipeline_arguments(prompt, given.size, pipeline_arguments)
        state = self._state(state_file, prepared, prompt, seed, given, pipeline_arguments)
        begun = state.finished
        if begun:
            warnings.warn(f"the run goes on after denoising step {begun} of {self.settings.steps}", stacklevel=3)
        generator = torch.Generator().manual_seed(seed)
        save: Callable[[RunState], None] | None = None if state_file is None else lambda state: state.save(state_file)
        words = PromptWords(prompt, getattr(self.backbone.pipe, "tokenizer", None), embeds_given(arguments))
        run = GuidedRun(
            self.backbone, self.settings, self.objective, prepared, state, generator,
            Reader(self.settings, given.region, words), stored=given.motion, finished_step=save, report=report,
        )  # fmt: skip
        begins("denoising")
        # Lightning predicts in inference mode, whose tensors can have no gradients.
        with torch.inference_mode(False), torch.no_grad(), run.attached():
            output = self.backbone.pipe(generator=generator, **arguments)
        result = self._result(as_uint8(output.frames[0]), run.state, prepared, given.size, seed)
        result.region, result.resumed_after, result.guided = given.region, begun, run.window
        if state_file is not None and not keep_state and os.path.exists(state_file):
            os.remove(state_file)
        return result

    def _given(
        self,
        reference: Reference | None,
        motion: StoredMotion | None,
        region: Region | None,
        elsewhere: StoredMotion | None,
        sizes: Mapping[str, int | None],
    ) -> _Given:
        """What a call was given, checked and as the model takes it."""
        for name, value in sizes.items():
            if value is not None:
                whole_number(name, value, 1)
        if motion is not None:
            motion.check_fits(self.backbone.name, self.settings.steps, **sizes)
        wanted = sizes if motion is None else motion.size
        frames = None
        if reference is not None:
            frames = self._prepared_frames(reference, **wanted)
        else:
            self._check_no_reference(motion, sizes["num_frames"])
        size = self._size(frames, **wanted)
        tokens = None if region is None else region_tokens(self.backbone, region, size)
        if elsewhere is not None:
            motion, tokens = self._composed(motion, elsewhere, tokens), None
        return _Given(frames, motion, size, tokens)

    def _read(self, given: _Given, begins: Callable[[str], None]) -> ReferenceMotion | None:
        """The motion of the reference, where there is one."""
        if given.frames is None:
            return None
        begins("reading the reference")
        with torch.inference_mode(False):
            prepared = reference_motion(self.backbone, given.frames, self.settings, region=given.region)
        # Parts that are offloaded lie on the device until another comes; the pipeline begins with its text encoder.
        getattr(self.backbone.pipe, "maybe_free_model_hooks", bool)()
        return prepared

    @ordinary_defaults()
    def _announcer(
        self, announce: Announce | None, size: tuple[int, int, int], *, optimises: bool, reads: bool
    ) -> Callable[[str], None]:
        """`begins(phase)` for the phases of a run."""
        if announce is None:
            return lambda phase: None
        plan = transfer_plan(self.backbone, self.settings, size, optimises=optimises, reads=reads)
        return lambda phase: announce(phase, plan)

    def reference_motion(
        self,
        reference: Reference,
        *,
        region: Region | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> ReferenceMotion:
        """The motion of a reference at the settings' blocks, without a generation; arguments as for a call."""
        frames = self._prepared_frames(reference, num_frames=num_frames, height=height, width=width)
        tokens = None if region is None else region_tokens(self.backbone, region, frames.shape[:3])
        with torch.inference_mode(False):
            return reference_motion(self.backbone, frames, self.settings, region=tokens)

    def _prepared_frames(
        self, reference: Reference, *, num_frames: int | None, height: int | None, width: int | None
    ) -> np.ndarray:
        rows, columns = self.settings.size or (None, None)
        return prepared_frames(
            self.backbone, reference, num_frames=num_frames, height=height or rows, width=width or columns
        )

    def _check_no_reference(self, motion: StoredMotion | None, num_frames: int | None) -> None:
        if self.settings.injection_blocks and self.objective.injects:
            raise ValueError(
                f"injection_blocks {self.settings.injection_blocks} need a reference for their keys and values; give "
                "the reference, or injection_blocks=()"
            )
        if self.settings.strength < 1:
            raise ValueError(f"strength {self.settings.strength} begins at a reference; give one, or strength=1")
        if motion is None and self.objective.needs_reference:
            raise ValueError('give a reference video, stored motion, or method="backbone" for plain generation')
        if motion is None and num_frames is None:
            raise ValueError("without a reference or stored motion, num_frames has to be given")

    def _composed(self, motion: StoredMotion | None, other: StoredMotion | None, tokens: Tensor | None) -> StoredMotion:
        """Stored motion inside a region and another one outside."""
        if motion is None or other is None or tokens is None:
            raise ValueError("elsewhere goes with stored and region: that inside the region, the other one outside it")
        return composed(motion, other, tokens, LatentLayout(self.backbone).region(tokens))

    def _check_prompts(self, prompt: str, further: Arguments) -> None:
        """Pipelines cut prompts that are too long without an error."""
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt must be one string, got {type(prompt).__name__}")
        for transformer in transformers_of(self.backbone.pipe):
            check_transformer(transformer, caches=True)
        check_takes_prompt(self.backbone.pipe, further)
        tokenizer = getattr(self.backbone.pipe, "tokenizer", None)
        negative = further.get("negative_prompt", self.settings.negative_prompt)
        for name, text in (("prompt", prompt), ("negative prompt", negative)):
            if tokenizer is None or not text or not isinstance(text, str):
                continue
            tokens = len(tokenizer(text).input_ids)
            limit = self.backbone.empty_prompt()["encoder_hidden_states"].shape[1]
            if tokens > limit:
                raise ValueError(
                    f"the {name} has {tokens} tokens, but the text encoder of {self.backbone.name} takes {limit}; "
                    "shorten it"
                )

    def _size(
        self, reference: np.ndarray | None, num_frames: int | None, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """Frames, rows and columns of the new video."""
        if reference is not None:
            frames, rows, columns, _ = reference.shape
            return (frames, rows, columns)
        default = self.settings.size or (None, None)
        rows, columns = height or default[0], width or default[1]
        if rows is None or columns is None:
            raise ValueError("without a reference or stored motion, height and width have to be given")
        assert num_frames is not None
        return (num_frames, rows, columns)

    def _pipeline_arguments(self, prompt: str, size: tuple[int, int, int], further: Arguments) -> Arguments:
        settings = self.settings
        chosen: Arguments = {"prompt": prompt, "num_inference_steps": settings.steps, "output_type": "np"}
        taken = inspect.signature(type(self.backbone.pipe).__call__).parameters
        # HunyuanVideo 1.5's image-to-video pipeline takes the size of its image, and no other.
        sizes = zip(("num_frames", "height", "width"), size, strict=True)
        chosen |= {name: value for name, value in sizes if name in taken}
        if settings.guidance_scale is not None:
            chosen["guidance_scale"] = settings.guidance_scale
        if settings.negative_prompt is not None:
            chosen["negative_prompt"] = settings.negative_prompt
        for name in ("prompt", "negative_prompt"):
            if embeds_given(further, name):
                chosen.pop(name, None)
                # Some pipelines want a prompt, or have "" for one, and refuse it beside embeddings.
                if name in taken and taken[name].default is not None:
                    chosen[name] = None
        refused = [name for name in further if name in _OWN_ARGUMENTS]
        if refused:
            raise ValueError(f"{', '.join(refused)} cannot be given to the pipeline: seed and settings say how it runs")
        return {**chosen, **self.backbone.call_options, **dict(settings.pipeline_options), **further}

    def _state(
        self,
        file: str | os.PathLike[str] | None,
        prepared: ReferenceMotion | None,
        prompt: str,
        seed: int,
        given: _Given,
        further: Arguments,
    ) -> RunState:
        """The state a run begins at: that of the file, or a new one."""
        model = (self.backbone.name, self.backbone.fingerprint())
        frames = None if prepared is None else prepared.frames
        stored = None if given.motion is None else (given.motion.kind, given.motion.tensors)
        made_with = (self.settings.described(), self.objective.described())
        own = content_digest(model, prompt, seed, given.size, made_with, frames, stored, given.region, further)
        if file is None or not os.path.exists(file):
            return RunState(own)
        return RunState.load(file, own, self.backbone.device)

    def _result(
        self,
        video: np.ndarray,
        state: RunState,
        prepared: ReferenceMotion | None,
        size: tuple[int, int, int],
        seed: int,
    ) -> TransferResult:
        optimised = None
        if state.optimised:
            optimised = StoredMotion(
                self.settings.optimise, self.backbone.name, self.settings.steps, *size, tensors=state.optimised
            )
        return TransferResult(
            video=video,
            losses=np.array(state.losses or np.empty((0, 0)), dtype=np.float64),
            flows={} if prepared is None else prepared.flows,
            reference=None if prepared is None else prepared.frames,
            optimised=optimised,
            seed=seed,
        )


def _loaded(stored: StoredMotion | str | os.PathLike[str] | None) -> StoredMotion | None:
    return StoredMotion.load(stored) if isinstance(stored, (str, os.PathLike)) else stored


_OWN_ARGUMENTS = ("generator", "latents", "output_type", "num_inference_steps", "return_dict")
