"""What `corrdit plan` says, beside what runs of small models took, and what it says of published checkpoints.

    python benchmarks/plan_memory.py --output benchmarks/results/plan_memory.json

The embedded model and tiny models of other families run each task on one thread of a CPU; torch's allocator tells the
peak, weights included. The bar is 10 % of the peak. Transfers with published checkpoints are planned for a GPU at the
sizes these were made for, with DiTFlow's released settings.
"""

from __future__ import annotations

import gc
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import torch
from experiment import CPU, Record, facts, new_parser, write_json

from corrdit import CrossAttentionGuidance, MotionTransfer, PointTracker, capture, load_backbone, ops
from corrdit.benchmark.measure import peak_extra_bytes
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.loading import backbone_of
from corrdit.integrations.diffusers.backbones.published_checkpoints import CHECKPOINTS
from corrdit.integrations.diffusers.planning.plan import Plan, plan
from corrdit.integrations.diffusers.testing.tiny_models import tiny_generation, tiny_pipeline

BAR = 0.1
STEPS = 2
SHORT = {"guided_share": 0.5, "optimisation_steps": 1}
"""Of a transfer that is measured: one guided step and one that is not."""
TRANSFERS: tuple[Record, ...] = ({}, {"gradient_checkpointing": True}, {"method": "smm"}, {"optimise": "embedding"})
TASKS = ("track", "capture", "generate", "cag")
TINY = ("cogvideox-rotary", "wan", "hunyuanvideo")


def configured(pipe: object, folder: pathlib.Path) -> pathlib.Path:
    """A folder with the pipeline's configurations, without a weight."""
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if part is not None:
            part.save_config(folder / name)
    return folder


def planned(model: str | pathlib.Path, task: str, size: Sequence[int], layer: int, settings: Record) -> Plan:
    frames, height, width = size
    given = {**SHORT, **settings} if task == "transfer" else None
    name = "generate" if task == "cag" else task
    return plan(
        model, name, frames=frames, height=height, width=width, device="cpu", steps=STEPS, layers=(layer,),
        cag=task == "cag", settings=given, guided=True,
    )  # fmt: skip


def measured(backbone: Backbone, task: str, size: Sequence[int], layer: int, settings: Record, call: Record) -> int:
    """Bytes of the allocator's peak during a task, with the weights."""
    frames, height, width = size
    pipe = backbone.pipe
    video = np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    shape = {"num_frames": frames, "height": height, "width": width}

    def motion(q, k, grid, key_mask):
        return ops.soft_displacement(q, k, grid, key_mask=key_mask)

    def generated() -> None:
        pipe(**call, **shape, num_inference_steps=STEPS)

    def work() -> Sequence[torch.Tensor]:
        if task == "transfer":
            transfer = MotionTransfer(backbone, steps=STEPS, **{**SHORT, **settings})
            prompts = {name: value for name, value in call.items() if name != "output_type"}
            transfer(video, prompts.pop("prompt", ""), **shape, **prompts)
        elif task == "track":
            PointTracker(backbone, height=height, width=width, crops=()).track(video, "grid:16")
        elif task == "capture":
            with capture(pipe, layers=[layer], operation=motion):
                generated()
        elif task == "cag":
            with CrossAttentionGuidance(pipe, layers=(layer,)):
                generated()
        else:
            generated()
        return ()

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = {id(t): t.numel() * t.element_size() for part in parts for t in (*part.parameters(), *part.buffers())}
    gc.collect()
    return sum(weights.values()) + peak_extra_bytes(work, CPU)


def compared(
    name: str,
    model: str | pathlib.Path,
    backbone: Callable[[], Backbone],
    size: Sequence[int],
    layer: int,
    call: Record,
    wanted: Sequence[tuple[str, Record]],
) -> list[Record]:
    """Rows of planned and measured peaks of one model."""
    rows = []
    for task, settings in wanted:
        expected = planned(model, task, size, layer, settings)
        taken = measured(backbone(), task, size, layer, settings, dict(call))
        rows.append(
            {
                "model": name,
                "task": task,
                "settings": settings,
                "size": list(size),
                "measured_bytes": taken,
                "planned_bytes": expected.peak,
                "error": expected.peak / taken - 1,
                "phase": expected.largest.name,
                "parts": expected.largest.parts,
            }
        )
        print(rows[-1], flush=True)
    return rows


def every_task() -> list[tuple[str, Record]]:
    return [*(("transfer", settings) for settings in TRANSFERS), *((task, {}) for task in TASKS)]


def small_models() -> list[Record]:
    call = {"prompt": "a red disc", "output_type": "np", "guidance_scale": 5.0}
    rows = compared("embedded", "embedded", lambda: load_backbone("embedded"), (3, 48, 64), 4, call, every_task())
    for name in TINY:
        generation = tiny_generation(name)
        call = {key: value for key, value in generation.items() if "prompt" in key or key == "max_sequence_length"}
        with tempfile.TemporaryDirectory() as folder:
            place = configured(tiny_pipeline(name), pathlib.Path(folder))
            fresh = lambda name=name: backbone_of(tiny_pipeline(name))  # noqa: E731
            tasks = [("transfer", {}), *((task, {}) for task in TASKS)]
            rows += compared(f"tiny {name}", place, fresh, (9, 64, 64), 1, {**call, "guidance_scale": 5.0}, tasks)
    return rows


def checkpoints(names: Sequence[str]) -> list[Record]:
    """Transfers as released, and CogVideoX-5B's without checkpointing of gradients."""
    rows = []
    for name in names:
        rows.append(plan(name, "transfer", settings={"gradient_checkpointing": True}).described())
        print(name, rows[-1]["peak_bytes"], flush=True)
    rows.append(plan("cogvideox-5b", settings={"gradient_checkpointing": False}, search=False).described())
    return rows


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--checkpoints", nargs="*", default=["cogvideox-2b", "cogvideox-5b"], choices=list(CHECKPOINTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = small_models()
    worst = max(abs(row["error"]) for row in rows)
    result = {**facts(), "rows": rows, "checks": {"worst_error": worst, "bar_met": worst <= BAR}}
    write_json(arguments.output, {**result, "checkpoints": checkpoints(arguments.checkpoints)})


if __name__ == "__main__":
    main()
