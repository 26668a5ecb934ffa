"""`check_backbone`: whether a backbone hands over the queries and keys its model really uses, and leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.testing import reading_checks, restoring_checks
from corrdit.integrations.diffusers.testing.accelerated_checks import ACCELERATED_CHECKS
from corrdit.integrations.diffusers.testing.subject import Check, Skipped, Subject

CHECKS: dict[str, Check] = {
    "grid": reading_checks.check_grid,
    "output unchanged": reading_checks.check_output_unchanged,
    "attention reproduced": reading_checks.check_attention_reproduced,
    "token order": reading_checks.check_token_order,
    "text position": reading_checks.check_text_position,
    "masks": reading_checks.check_masks,
    "early exit": reading_checks.check_early_exit,
    "gradient checkpointing": reading_checks.check_gradient_checkpointing,
    "restored after exit": restoring_checks.check_restored_after_exit,
    "restored after an exception": restoring_checks.check_restored_after_exception,
    "restored after nesting": restoring_checks.check_restored_after_nesting,
    "pickling": restoring_checks.check_pickling,
    "saving": restoring_checks.check_saving,
    "memory": restoring_checks.check_memory,
    **ACCELERATED_CHECKS,
}
"""Checks of a backbone by name, in the order they run."""

GENERATION_CHECK = "steps and branches"


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check; `problem` is empty if it passed, `skipped` says why it was not made."""

    name: str
    problem: str
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether it was made, and nothing was wrong."""
        return not self.problem and not self.skipped


def check_backbone(
    backbone: Backbone,
    *,
    frames: int = 3,
    batch: int = 2,
    seed: int = 0,
    generation: Mapping[str, Any] | None = None,
    only: tuple[str, ...] | None = None,
) -> list[CheckResult]:
    """Run the conformance checks on a backbone, best on a tiny random model on the CPU.

    Random weights are wanted: constant or zero-initialised position tables hide mistakes (randomise Mochi's
    `pos_frequencies`).

    Args:
        backbone: under test; its model is left as it was.
        frames: latent frames of the random video.
        batch: samples of it, at least 2.
        seed: of the random video and prompt.
        generation: keyword arguments for a guided call of `backbone.pipe` with `prompt_embeds`,
            `negative_prompt_embeds` and `output_type="latent"`; with them, steps and branches are checked in a whole
            generation too.
        only: names of checks to run; None for all.

    Returns:
        One result for each check.

    Raises:
        AssertionError: some checks failed; the message names each with what was found.
        ValueError: an unknown name in `only`.
    """
    checks = dict(CHECKS)
    if generation is not None:
        checks[GENERATION_CHECK] = lambda subject: reading_checks.check_generation(subject.backbone, generation)
    unknown = set(only or ()) - set(CHECKS) - {GENERATION_CHECK}
    if unknown:
        raise ValueError(f"unknown checks {sorted(unknown)}; there are {', '.join([*CHECKS, GENERATION_CHECK])}")
    subject = Subject.random(backbone, frames=frames, batch=max(2, batch), seed=seed)
    results = [_checked(name, check, subject) for name, check in checks.items() if only is None or name in only]
    failed = [result for result in results if result.problem]
    if failed:
        listed = "\n".join(f"- {result.name}: {result.problem}" for result in failed)
        raise AssertionError(f"{backbone.name} fails {len(failed)} of {len(results)} checks:\n{listed}")
    return results


def _checked(name: str, check: Check, subject: Subject) -> CheckResult:
    try:
        check(subject)
    except Skipped as reason:
        return CheckResult(name, "", skipped=f"{reason}")
    except (AssertionError, ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        return CheckResult(
            name, f"{error}" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        )
    return CheckResult(name, "")
