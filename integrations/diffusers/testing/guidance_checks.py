"""Whether steps and branches are told apart in a whole guided generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from corrdit.integrations.diffusers.host.forwards import transformers_of
from corrdit.integrations.diffusers.testing.subject import copy_of_inputs

if TYPE_CHECKING:
    from corrdit.integrations.diffusers.backbones.base import Backbone


@dataclass(frozen=True)
class RecordedCall:
    """One forward of a generation, with its transformer, arguments and loop iteration."""

    transformer: torch.nn.Module
    arguments: dict[str, Any]
    step: int


def check_generation(backbone: Backbone, generation: Mapping[str, Any]) -> None:
    """First and last step, both branches: the queries read are those of the sample with that branch's prompt.

    The branch is recognised independently of the capture, by comparing the prompt each forward was given with
    `prompt_embeds` and `negative_prompt_embeds`; the queries are compared with those of the same forward repeated.
    """
    from corrdit.integrations.diffusers.captures import capture

    plain, calls, last = _recorded_generation(backbone, generation)
    layer = backbone.layers - 1
    with capture(backbone.pipe, layers=[layer], steps=[0, -1], operation=copy_of_inputs, branch="both") as captured:
        again = _generated(backbone, generation)
    assert torch.equal(plain, again), "capturing changes the generated latents"
    assert set(captured) == {(0, layer), (last, layer)}, (
        f"steps [0, -1] of a run of {last + 1} steps are kept as {sorted(captured)}"
    )
    for step, _ in captured:
        for branch, name in (("cond", "prompt_embeds"), ("uncond", "negative_prompt_embeds")):
            expected = _queries_of_prompt(backbone, calls, step, layer, generation[name])
            given = captured[step, layer].get(branch)
            assert given is not None, f"step {step} has no {branch!r} result"
            assert given.q.shape == expected.shape, (
                f"step {step}: {branch!r} has queries {tuple(given.q.shape)}, the model {tuple(expected.shape)}"
            )
            assert torch.equal(given.q, expected), f"step {step}: {branch!r} is not the sample that was given {name}"


def _recorded_generation(
    backbone: Backbone, generation: Mapping[str, Any]
) -> tuple[torch.Tensor, list[RecordedCall], int]:
    """The generated latents, all forwards, and the last step's number."""
    calls: list[RecordedCall] = []
    iteration = 0

    def count(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal iteration
        iteration = step + 1
        return tensors

    def record(transformer: torch.nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        calls.append(RecordedCall(transformer, kept, iteration))

    hooks = [
        transformer.register_forward_pre_hook(record, with_kwargs=True)
        for transformer in transformers_of(backbone.pipe)
    ]
    try:
        plain = _generated(backbone, generation, callback_on_step_end=count)
    finally:
        for hook in hooks:
            hook.remove()
    return plain, calls, iteration - 1


def _generated(backbone: Backbone, generation: Mapping[str, Any], **further: Any) -> torch.Tensor:
    """The latents of one generation; a generator among the arguments starts anew."""
    arguments = dict(generation)
    source = arguments.get("generator")
    if source is not None:
        arguments["generator"] = torch.Generator(source.device).manual_seed(source.initial_seed())
    return backbone.pipe(**arguments, **further).frames


@torch.no_grad()
def _queries_of_prompt(
    backbone: Backbone, calls: list[RecordedCall], step: int, layer: int, prompt: torch.Tensor
) -> torch.Tensor:
    """Queries `[1, H, N, D]` of the sample of this step that was given this prompt."""
    from corrdit.integrations.diffusers.captures import capture

    for call in calls:
        if call.step != step:
            continue
        given = call.arguments["encoder_hidden_states"].float()
        rows = [row for row in range(len(given)) if torch.equal(given[row], prompt[0].float())]
        if rows:
            with capture(call.transformer, layers=[layer], operation=copy_of_inputs) as captured:
                call.transformer(**call.arguments)
            return captured[0, layer].q[rows[:1]]
    raise AssertionError(f"no forward of step {step} was given one of the two prompts; was the generation guided?")
