"""Whether models are read as they are under attention backends, caches and parallelism, and run otherwise.

For each family a tiny random model goes through the checks of `corrdit.testing.check_backbone` that change how it runs,
through attention backends and through caches. In each the output with a capture has to be the output without it to the
bit. In the last rows two processes share the tokens, and what they read is compared with what one process reads. Checks
that cannot be made say why.

    python benchmarks/accelerated.py --output benchmarks/results/accelerated.json [--families wan ltx]
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from experiment import Record, facts_apart, new_parser, write_json

from corrdit import capture
from corrdit.integrations.diffusers.testing.accelerated_checks import ACCELERATED_CHECKS
from corrdit.integrations.diffusers.testing.plain_attention import plain_backend, use_backend
from corrdit.integrations.diffusers.testing.reading_checks import check_output_unchanged
from corrdit.integrations.diffusers.testing.subject import Skipped, Subject, copy_of_inputs
from corrdit.testing import TINY_MODELS, tiny_backbone, tiny_generation, tiny_pipeline

PROCESS = pathlib.Path(__file__).parents[1] / "tests" / "diffusers" / "parallel_process.py"
STEPS = 6
BACKENDS = ("native", "_native_math", "flex")
STAND_INS = ("flash", "sage", "xformers")
PARALLEL = {
    "wan": ("wan", "wan-early", "wan-uneven", "wan-ring", "wan-cross", "wan-pipeline", "wan-compiled", "wan-tracked"),
    "ltx": ("ltx", "ltx-early", "ltx-ring", "ltx-cross"),
    "ltx2": ("ltx2", "ltx2-ring"),
}
"""Cases of two processes by family."""


def outcome(check: Callable[[], object]) -> str:
    """ "identical", why a check was not made, or what was wrong."""
    try:
        check()
    except AssertionError as error:
        return str(error)
    except (Skipped, ValueError, RuntimeError, AttributeError, TypeError) as error:
        return f"not made: {error}"
    return "identical"


def outcomes_of_checks(family: str) -> dict[str, str]:
    """By check of `check_backbone`."""
    subject = Subject.random(tiny_backbone(family), frames=3, batch=2, seed=0)
    return {name: outcome(functools.partial(check, subject)) for name, check in ACCELERATED_CHECKS.items()}


def outcomes_of_backends(family: str) -> dict[str, str]:
    """By attention backend, those that are not installed written out under their names."""

    def under(name: str) -> None:
        model = copy.deepcopy(subject.transformer)
        if not use_backend(model, AttentionBackendName(name)):
            raise Skipped("its processors do not choose an attention backend")
        with plain_backend(AttentionBackendName(name)) if name in STAND_INS else contextlib.nullcontext():
            check_output_unchanged(replace(subject, model=model))

    subject = Subject.random(tiny_backbone(family), frames=3, batch=2, seed=0)
    return {f"backend {name}": outcome(functools.partial(under, name)) for name in (*BACKENDS, *STAND_INS)}


def outcomes_of_caches(family: str) -> dict[str, str]:
    """By cache of diffusers: whether the video is that of the cached run where what is skipped is computed beside."""

    def run(pipe: Any) -> torch.Tensor:
        return pipe(**tiny_generation(family, steps=STEPS)).frames

    def under(config: object) -> None:
        pipe = tiny_pipeline(family)
        uncached = run(pipe)
        pipe.transformer.enable_cache(config)
        cached = run(pipe)
        if torch.equal(cached, uncached):
            raise Skipped("the cache leaves nothing out")
        with capture(pipe, layers=[0, -1], operation=copy_of_inputs, on_skip="compute"):
            assert torch.equal(run(pipe), cached), "capturing changes the video"

    caches = {
        "FirstBlockCache": diffusers.FirstBlockCacheConfig(threshold=1e6),
        "MagCache": diffusers.MagCacheConfig(
            mag_ratios=[1.0] * 2 * STEPS, num_inference_steps=STEPS, retention_ratio=0.2, threshold=9.0
        ),
        "PyramidAttentionBroadcast": diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    }
    return {f"cache {name}": outcome(functools.partial(under, config)) for name, config in caches.items()}


def outcomes_of_two_processes(family: str) -> dict[str, str]:
    """The same by case, of the first process."""
    names = PARALLEL.get(family, ())
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(PROCESS)]
        processes = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/meeting", *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            for rank in range(2)
        ]
        outputs = [process.communicate()[0].decode() for process in processes]
    found = dict(line.split(": ", 1) for line in outputs[0].splitlines())
    return {f"two processes, {name}": found.get(name, "did not end") for name in names}


def main() -> None:
    parser = new_parser(__doc__)
    families = [name for name, model in TINY_MODELS.items() if "-" not in name and not model.variant]
    parser.add_argument("--families", nargs="+", default=families, help="names of tiny models; every family otherwise")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, Record] = {}
    for family in arguments.families:
        rows[family] = outcomes_of_checks(family) | outcomes_of_backends(family) | outcomes_of_caches(family)
        rows[family] |= outcomes_of_two_processes(family)
        print(family, rows[family], flush=True)
    write_json(arguments.output, {**facts_apart(), "families": rows})


if __name__ == "__main__":
    main()
