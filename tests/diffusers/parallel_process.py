"""One of two processes among which a tiny model's tokens are spread; what it reads is compared with the model alone.

Arguments: the rank, a file the processes meet at, and the names of cases. Prints a line for each: its name, and "equal"
or what is not.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from corrdit import CrossAttentionGuidance, MotionTransfer, PointTracker, capture, ops
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.processors import CorrespondenceProcessor
from corrdit.integrations.diffusers.testing.subject import Subject, copy_of_inputs
from corrdit.testing import tiny_backbone, tiny_generation, tiny_pipeline

ULYSSES = {"ulysses_degree": 2}
UNEVEN = {"ulysses_degree": 2, "ulysses_anything": True}
RING = {"ring_degree": 2}


def attention_with_lse(context, query, key, value, mask, dropout_p, is_causal, scale, *further: Any, **options: Any):
    """Attention of `[B, N, H, D]` written out, with the logarithm of its sums, which native attention has not."""
    logits = torch.einsum("bqhd,bkhd->bqhk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bqhk,bkhd->bqhd", logits.softmax(-1), value), logits.logsumexp(-1)


def ring_attention(query, key, value, scale=None, _parallel_config=None):
    """A backend that knows rings, as flash attention does on a GPU."""
    if _parallel_config is None:
        return attention_with_lse(None, query, key, value, None, 0.0, False, scale)[0]
    options = {"forward_op": attention_with_lse, "backward_op": None, "_parallel_config": _parallel_config}
    return attention_dispatch._templated_context_parallel_attention(
        query, key, value, None, 0.0, False, scale, False, False, **options
    )


def use_ring_backend(transformer: torch.nn.Module) -> None:
    name = AttentionBackendName.FLASH
    arguments = {"query", "key", "value", "scale", "_parallel_config"}
    _AttentionBackendRegistry._backends[name] = ring_attention
    _AttentionBackendRegistry._supported_arg_names[name] = arguments
    _AttentionBackendRegistry._constraints[name] = []
    for module in transformer.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = name


def subject(family: str, frames: int = 4) -> Subject:
    found = Subject.random(tiny_backbone(family), frames=frames, batch=2, seed=0)
    # diffusers' LTX gives its attention to text a mask for each head, which does not fit the heads of a process.
    found.text.pop("encoder_attention_mask", None)
    return found


def spread(transformer: torch.nn.Module, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer.enable_parallelism(config=diffusers.ContextParallelConfig(**options))


def reads(found: Subject, **options: Any) -> dict[tuple[int, int], Any]:
    layers = options.pop("layers", range(len(found.modules)))
    arguments = {**found.arguments(), "return_dict": False}
    arguments.setdefault("encoder_attention_mask", None)
    if "Wan" in type(found.transformer).__name__:
        del arguments["encoder_attention_mask"]
    with torch.no_grad(), capture(found.transformer, layers=layers, operation=copy_of_inputs, **options) as captured:
        found.transformer(**arguments)
    return dict(captured)


def same(one: dict[Any, Any], other: dict[Any, Any]) -> str:
    if one.keys() != other.keys():
        return f"keys {sorted(one)} and {sorted(other)}"
    for key, own in one.items():
        for name in ("q", "k", "key_mask"):
            a, b = getattr(own, name), getattr(other[key], name)
            if (a is None) != (b is None):
                return f"{name} of {key} is None in one"
            if a is not None and (a.shape != b.shape or not torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6)):
                return f"{name} of {key}: {tuple(a.shape)} and {tuple(b.shape)}"
        if own.grid != other[key].grid:
            return f"grid of {key}"
    return "equal"


def captured_alike(family: str, options: dict[str, Any], frames: int = 4, **further: Any) -> str:
    found = subject(family, frames)
    if "ring_degree" in options:
        use_ring_backend(found.transformer)
    alone = reads(found, **further)
    spread(found.transformer, options)
    return same(reads(found, **further), alone)


def pipeline_alike() -> str:
    pipe = tiny_pipeline("wan")

    def run() -> tuple[dict[Any, Any], torch.Tensor]:
        flow = lambda q, k, grid, mask: ops.soft_displacement(q, k, grid)  # noqa: E731
        with capture(pipe, layers=[0, 2], steps=[0, -1], branch="both", operation=flow) as captured:
            output = pipe(**tiny_generation("wan", steps=2)).frames
        return dict(captured), output

    alone, frames = run()
    spread(pipe.transformer, ULYSSES)
    plain = pipe(**tiny_generation("wan", steps=2)).frames
    parts, output = run()
    if not torch.equal(plain, output):
        return "capturing changes the video"
    if not torch.allclose(output, frames, atol=1e-5):
        return "the video differs from one process's"
    for key, branch in itertools.product(alone, ("cond", "uncond")):
        if not torch.allclose(alone[key][branch], parts[key][branch], atol=1e-4):
            return f"{branch} of {key}"
    return "equal"


def by_hand() -> str:
    found = subject("wan")
    grid = layout_of(found.transformer).read_call(found.transformer, found.arguments()).grid
    module = found.modules[1]
    alone = reads(found, layers=[1])[0, 1]
    spread(found.transformer, ULYSSES)
    module.processor = CorrespondenceProcessor(module.processor, grid, copy_of_inputs)
    with torch.no_grad():
        found.transformer(**found.arguments(), return_dict=False)
    return same({0: module.processor.result}, {0: alone})


def compiled() -> str:
    found = subject("wan")
    alone = reads(found, layers=[0, 1], early_exit=True)
    spread(found.transformer, ULYSSES)
    for block in found.transformer.blocks:
        block.compile(backend="eager")
    return same(reads(found, layers=[0, 1], early_exit=True), alone)


def tracked() -> str:
    import numpy as np

    backbone = tiny_backbone("wan")
    video = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    tracks = []
    for options in (None, ULYSSES):
        if options is not None:
            spread(backbone.transformer, options)
        tracks.append(PointTracker(backbone).track(video, "grid:4"))
    return "equal" if np.allclose(tracks[0].xy, tracks[1].xy, atol=1e-3) else "tracks differ"


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return "not refused"


def other_settings(rank: int) -> str:
    found = subject("wan")
    spread(found.transformer, ULYSSES)
    return refused(lambda: reads(found, layers=[0, 1 + rank]))


def kept_graph() -> str:
    found = subject("wan")
    spread(found.transformer, ULYSSES)
    return refused(lambda: reads(found, keep_graph=True))


def computed() -> str:
    found = subject("wan")
    spread(found.transformer, ULYSSES)
    return refused(lambda: reads(found, on_skip="compute"))


def joint() -> str:
    found = subject("hunyuanvideo")
    found.transformer._parallel_config = subject_config()
    return refused(lambda: capture(found.transformer, layers=0, operation=copy_of_inputs).__enter__())


def subject_config() -> Any:
    found = subject("wan")
    spread(found.transformer, ULYSSES)
    return found.transformer._parallel_config


def guided() -> str:
    pipe = tiny_pipeline("wan")
    spread(pipe.transformer, ULYSSES)
    return refused(lambda: CrossAttentionGuidance(pipe, layers=[1]).__enter__())


def transferred() -> str:
    import numpy as np

    backbone = tiny_backbone("wan")
    spread(backbone.transformer, ULYSSES)
    video = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    generation = tiny_generation("wan")
    prompts = {name: generation[name] for name in ("prompt_embeds", "negative_prompt_embeds")}
    transfer = MotionTransfer(backbone, block=1, steps=2, guided_share=0.5, optimisation_steps=1)
    return refused(lambda: transfer(video, height=64, width=64, **prompts))


CASES: dict[str, Callable[[int], str]] = {
    "wan": lambda rank: captured_alike("wan", ULYSSES),
    "wan-early": lambda rank: captured_alike("wan", ULYSSES, layers=[0, 1], early_exit=True),
    "wan-uneven": lambda rank: captured_alike("wan", UNEVEN, 3, layers=[0, 2]),
    "wan-ring": lambda rank: captured_alike("wan", RING),
    "wan-cross": lambda rank: captured_alike("wan", ULYSSES, attention="cross"),
    "wan-pipeline": lambda rank: pipeline_alike(),
    "wan-by-hand": lambda rank: by_hand(),
    "wan-compiled": lambda rank: compiled(),
    "wan-tracked": lambda rank: tracked(),
    "ltx": lambda rank: captured_alike("ltx", ULYSSES),
    "ltx-early": lambda rank: captured_alike("ltx", ULYSSES, layers=[0], early_exit=True),
    "ltx-ring": lambda rank: captured_alike("ltx", RING),
    "ltx-cross": lambda rank: captured_alike("ltx", ULYSSES, attention="cross"),
    "ltx2": lambda rank: captured_alike("ltx2", ULYSSES),
    "ltx2-ring": lambda rank: captured_alike("ltx2", RING),
    "other-settings": other_settings,
    "keep-graph": lambda rank: kept_graph(),
    "compute": lambda rank: computed(),
    "joint": lambda rank: joint(),
    "guidance": lambda rank: guided(),
    "transfer": lambda rank: transferred(),
}


def main() -> None:
    rank, meeting, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    # What diffusers asks before it spreads tokens; the rest of it runs on CPUs.
    torch.accelerator.device_count = lambda: 1
    for name in names:
        try:
            found = CASES[name](rank)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(f"{name}: {found}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
