"""Does cross-attention guidance help the embedded model? One factor at a time, over prompts and seeds, paired.

    python benchmarks/guidance_quality.py --output benchmarks/results/guidance_quality.json --shards FOLDER

Prompts are the captions of held-out scenes of the generated world; each has a seed of its own, the same in every
setting, so differences to no guidance are paired. Measures are those of video_measures.py and two of prompt adherence
by the model as a diffusion classifier (arXiv 2303.16203): the denoising error under the video's own prompt against that
under other prompts of the set. Rendered videos of the same prompts stand beside. Feature extractors for subject and
background consistency are not available offline; `corrdit generate --vbench` lays videos out for the tool that has
them. One shard for each setting and group of prompts; shards that are there are not made again, so a run may be stopped
at any time, and the summary holds what is there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import sys
import time

import numpy as np
import torch
from experiment import Record, facts, interval, kept, new_parser, weights_digest, write_json
from video_measures import measures

from corrdit import CrossAttentionGuidance, load_backbone
from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline
from corrdit.integrations.embedded.world import WorldConfig, describe, render

HELD_OUT = 10**9 + 40_000
GROUP = 16
WORLD = WorldConfig()
CLASSIFIER_TIMESTEPS = (300, 700)
OTHER_PROMPTS = 2
BASELINE, RENDERED = "none", "rendered"


def settings(layers: int, matching: int) -> dict[str, Record | None]:
    """Arguments of the guidance by name of the setting; the matching layer at scale 1, masked, is the centre."""
    centre = {"layers": (matching,), "scale": 1.0, "renormalize": True}
    found: dict[str, Record | None] = {RENDERED: None, BASELINE: None, "centre": centre}
    for layer in range(layers):
        if layer != matching:
            found[f"layer {layer}"] = {**centre, "layers": (layer,)}
    for scale in (0.25, 0.5, 2.0, 4.0):
        found[f"scale {scale:g}"] = {**centre, "scale": scale}
    found["zeroed"] = {**centre, "renormalize": False}
    found["zeroed, scale 0.5"] = {**centre, "renormalize": False, "scale": 0.5}
    found["zeroed, scale 2"] = {**centre, "renormalize": False, "scale": 2.0}
    found["first half of the steps"] = {**centre, "stop": 0.5}
    found["second half of the steps"] = {**centre, "start": 0.5}
    found["all layers"] = {**centre, "layers": tuple(range(layers))}
    found["span 1"] = {**centre, "span": 1}
    for perturbation in ("identity", "skip"):
        found[perturbation] = {"layers": (matching,), "scale": 1.0, "perturbation": perturbation}
    return found


@torch.no_grad()
def videos_of(
    pipe: EmbeddedVideoPipeline, name: str, guidance: Record | None, group: int, call: Record
) -> torch.Tensor:
    """Float videos `[GROUP, T, 3, H, W]` in 0..1 of one group of prompts."""
    scenes = [WORLD.scene(HELD_OUT + number) for number in numbers(group)]
    if name == RENDERED:
        return render(scenes, WORLD)
    generators = [torch.Generator().manual_seed(number) for number in numbers(group)]
    size = {"num_frames": WORLD.frames, "height": WORLD.height, "width": WORLD.width}
    context = contextlib.nullcontext() if guidance is None else CrossAttentionGuidance(pipe, **guidance)
    with context:
        prompts = [describe(scene) for scene in scenes]
        return pipe(prompts, generator=generators, output_type="pt", **size, **call).frames.float()


def numbers(group: int) -> range:
    return range(GROUP * group, GROUP * (group + 1))


@torch.no_grad()
def adherence(pipe: EmbeddedVideoPipeline, videos: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """By the model itself: whether a video's own prompt explains it better than others do, and by how much.

    - adherence: share of other prompts with a larger denoising error.
    - margin: by how much their error is larger, relative to that under the own prompt.
    """
    prompts = [describe(WORLD.scene(HELD_OUT + number)) for number in numbers(group)]
    text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    latents = pipe.vae.encode_frames(videos)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(group))
    frames, height, width = WORLD.frames, WORLD.height, WORLD.width
    rotary = pipe._prepare_rotary_positional_embeddings(height, width, frames, latents.device)
    errors = []
    for shift in range(OTHER_PROMPTS + 1):
        total = torch.zeros(len(videos))
        for timestep in CLASSIFIER_TIMESTEPS:
            times = torch.full((len(videos),), timestep)
            noisy = pipe.scheduler.add_noise(latents, noise, times)
            target = pipe.scheduler.get_velocity(latents, noise, times)
            predicted = pipe.transformer(noisy, text.roll(shift, 0), times, image_rotary_emb=rotary, return_dict=False)
            total += (predicted[0] - target).square().mean(dim=(1, 2, 3, 4))
        errors.append(total)
    own, others = errors[0], torch.stack(errors[1:])
    return {"adherence": (others > own).float().mean(dim=0), "margin": ((others - own) / own).mean(dim=0)}


def made_shard(
    pipe: EmbeddedVideoPipeline, name: str, guidance: Record | None, group: int, call: Record, weights: str
) -> Record:
    began = time.process_time()
    videos = videos_of(pipe, name, guidance, group, call)
    seconds = time.process_time() - began
    values = {**measures(videos), **adherence(pipe, videos, group)}
    print(f"{name}, group {group}: done", file=sys.stderr, flush=True)
    return {
        "setting": name,
        "guidance": guidance,
        "group": group,
        "call": call,
        "weights": weights,
        "processor_seconds": seconds,
        "values": {key: value.tolist() for key, value in values.items()},
    }


def summarised(shards: dict[tuple[str, int], Record], names: list[str]) -> Record:
    """By setting and measure: mean with interval, and the paired difference to no guidance with interval."""

    def joined(name: str, groups: list[int], measure: str) -> np.ndarray:
        return np.concatenate([shards[name, group]["values"][measure] for group in groups])

    summary: Record = {}
    for name in names:
        groups = sorted(group for setting, group in shards if setting == name)
        if not groups:
            continue
        paired = [group for group in groups if (BASELINE, group) in shards]
        first = shards[name, groups[0]]
        row: Record = {"videos": GROUP * len(groups), "guidance": first["guidance"]}
        for measure in first["values"]:
            row[measure] = {"mean": interval(joined(name, groups, measure))}
            if paired and name != BASELINE:
                difference = joined(name, paired, measure) - joined(BASELINE, paired, measure)
                row[measure]["difference"] = interval(difference)
        summary[name] = row
    return summary


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shards", type=pathlib.Path, required=True, help="folder for shards, made if need be")
    parser.add_argument("--model", default="embedded", help="for load_backbone")
    parser.add_argument("--videos", type=int, default=64, help=f"prompts, a multiple of {GROUP}")
    parser.add_argument("--layer", type=int, default=None, help="centre; the matching layer if left out")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of classifier-free guidance")
    parser.add_argument("--settings", nargs="*", default=None, help="only these; all if left out")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no shard after so many")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    backbone = load_backbone(arguments.model)
    call = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    weights = weights_digest(backbone.transformer)
    centre = backbone.preset.reading.layer if arguments.layer is None else arguments.layer
    chosen = settings(backbone.layers, centre)
    if arguments.settings is not None:
        chosen = {name: chosen[name] for name in arguments.settings}
    arguments.shards.mkdir(parents=True, exist_ok=True)
    shards = {}
    for group in range(arguments.videos // GROUP):
        for name, guidance in chosen.items():
            path = arguments.shards / f"{name.replace(' ', '_').replace(',', '')}-{group}.json"
            make = functools.partial(made_shard, backbone.pipe, name, guidance, group, call, weights)
            shard = kept(path, make, begin=time.monotonic() < deadline)
            if shard is None:
                continue
            expected = json.loads(json.dumps([call, weights, guidance]))
            if [shard["call"], shard["weights"], shard["guidance"]] != expected:
                raise SystemExit(f"{path} was made with other settings; give another folder for shards")
            shards[name, group] = shard
    result = {
        **facts(),
        "model": backbone.name,
        "weights": weights,
        "matching_layer": backbone.preset.reading.layer,
        "centre_layer": centre,
        "call": call,
        "settings": summarised(shards, list(chosen)),
    }
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
