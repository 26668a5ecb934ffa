"""Layers that a forward went past: what is said of them, and how they are run all the same."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Sequence

import torch

from corrdit.integrations.diffusers.compatibility import is_skipping, replacement_of, what_skips
from corrdit.integrations.diffusers.host.forwards import Arguments, EarlyExit
from corrdit.integrations.diffusers.host.steps import PipelineSteps, TransformerSteps

LEFT_OUT = (
    "{}, so their queries and keys do not exist; switch it off for the capture (transformer.disable_cache() for the "
    'caches of diffusers), or have them computed beside the run (on_skip="compute")'
)
NOT_RUN = "the transformer did not run inside the block; call the pipeline or the transformer there"
UNGUIDED = "the run used no classifier-free guidance, so it has no unconditional branch; raise guidance_scale"
REPLACED = (
    "the layer ran without this processor (something replaced the attention processors inside the block, for instance "
    "fuse_qkv_projections(), or left layers out)"
)


class Firings:
    """Which layers handed over what they were to hand over, and which forwards went past.

    Args:
        layers: that are read.

    Attributes:
        calls: forwards so far.
        awaited: layers that the forward in progress has still to hand over.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self._layers = tuple(layers)
        self.calls = 0
        self.awaited: set[int] = set()
        self._fired: set[tuple[int, int]] = set()
        self._skipped: dict[tuple[int, int], str | None] = {}

    def came(self, key: tuple[int, int]) -> None:
        """A (step, layer) has been read."""
        self._fired.add(key)
        self.awaited.discard(key[1])

    @property
    def last_came(self) -> bool:
        """Whether the last of the layers is not awaited any more."""
        return max(self._layers) not in self.awaited

    def note_skipped(self, step: int, transformer: torch.nn.Module, modules: Sequence[torch.nn.Module] | None) -> None:
        """The forward has ended, with its layers' attention modules; None for one that can have skipped nothing."""
        skipped, self.awaited = self.awaited, set()
        for layer in skipped if modules is not None else ():
            assert modules is not None
            self._skipped[step, layer] = what_skips(transformer, modules[layer])

    def check(
        self, counter: PipelineSteps | TransformerSteps, *, steps: list[int] | None, branch: str | None, pipe: object
    ) -> None:
        """Raises ValueError, with what left it out where that is known, for something that never came.

        Args:
            counter: of the steps of the run.
            steps: that were to be read, or None for all.
            branch: that was to be read, or None.
            pipe: that ran, or None.
        """
        if self._skipped:
            causes = sorted({cause for cause in self._skipped.values() if cause is not None})
            reason = LEFT_OUT.format(f"{' and '.join(causes)} left them out") if causes else REPLACED
            raise ValueError(f"the capture never fired for {_shown(sorted(self._skipped))}: {reason}")
        interrupted = bool(getattr(pipe, "interrupt", False))
        ended = f"the run ended after step {counter.step}"
        ended += f"; it was interrupted after step {counter.step}" if interrupted else ""
        wanted, count = steps, counter.count
        if wanted is not None and count is not None:
            wanted = [step % count for step in wanted if -count <= step < count] if self.calls else wanted
        elif count is not None and self.calls and counter.step + 1 < count and not interrupted:
            raise ValueError(
                f"the capture never fired for steps {counter.step + 1} to {count - 1}: {ended}, before its {count} "
                "steps were done (something that calls the transformer at some steps only, for instance a step cache); "
                "give the steps that run, or switch it off for the capture"
            )
        missing = [
            (step, layer)
            for layer in self._layers
            for step in (wanted if wanted is not None else [None])
            if not any(fired == layer and step in (None, at) for at, fired in self._fired)
        ]
        if missing:
            later = any(step is not None and step > counter.step for step, _ in missing)
            reason = ended if later else UNGUIDED if branch == "uncond" else REPLACED
            reason = reason if self.calls else NOT_RUN
            raise ValueError(f"the capture never fired for {_shown(missing)}: {reason}")


def _shown(missing: Sequence[tuple[int | None, int]]) -> str:
    """Some (step, layer) for a message; of no step in particular where it is None."""
    shown = [f"layer {layer}" if step is None else f"(step {step}, layer {layer})" for step, layer in missing[:6]]
    return ", ".join(shown) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")


@torch.no_grad()
def run_whole(transformer: torch.nn.Module, arguments: Arguments) -> None:
    """A forward of the model's own class, which leaves nothing out; it may end early by `EarlyExit`.

    Hooks round the transformer do not run, caches are neither asked nor filled.

    Raises:
        ValueError: the forward of a class was replaced, so that none of the model's own is left.
    """
    with _nothing_skipped(transformer), contextlib.suppress(EarlyExit):
        type(transformer).forward(transformer, **arguments)


@contextlib.contextmanager
def _nothing_skipped(transformer: torch.nn.Module) -> Iterator[None]:
    """Inside, modules of the transformer compute what their classes say, whatever caches are attached to them."""
    with contextlib.ExitStack() as stack:
        for module in transformer.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in () if registry is None else registry.hooks.values():
                if is_skipping(hook):
                    stack.enter_context(_passed_through(hook.fn_ref))
            cause = replacement_of(module)
            if cause is None:
                continue
            if "forward" not in module.__dict__:
                raise ValueError(
                    f"{cause} for its whole class, so the layers it leaves out cannot be computed beside it; replace "
                    'the forward of this one model, or capture with on_skip="error"'
                )
            stack.callback(module.__dict__.__setitem__, "forward", module.__dict__["forward"])
            module.__dict__["forward"] = types.MethodType(type(module).forward, module)
        yield


@contextlib.contextmanager
def _passed_through(reference: object) -> Iterator[None]:
    """Inside, a hook of diffusers passes arguments and output on as they are."""
    kept = dict(vars(reference))
    changes = {
        "pre_forward": lambda module, *args, **kwargs: (args, kwargs),
        "post_forward": lambda module, output: output,
        "forward": kept.get("original_forward") or kept["forward"],
    }
    vars(reference).update(changes)
    try:
        yield
    finally:
        vars(reference).update({name: kept[name] for name in changes})
