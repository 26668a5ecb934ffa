"""How well the embedded model's attention finds corresponding points, on held-out generated videos with exact truth.

Measured are visible points that moved by more than 1.5 tokens from the first frame, and the share of them matched
within one token; so standing still scores 0 by construction. Compared are queries and keys (every layer and head),
features, the noisy patches themselves, and standing still on all visible points.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.analysis.capturing import reading_forward
from corrdit.integrations.diffusers.backbones.loading import backbone_of
from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline
from corrdit.integrations.embedded.world import WorldConfig, generate

MOVED_TOKENS = 1.5
NEAR_TOKENS = 1.0
SMALL_FRAME = 256
REFINED = "refined "


@dataclass(frozen=True)
class HeldOut:
    """Videos whose truth is known at the token centres of their first frame.

    latents [V, F, C, h, w]; grid of the tokens without text; xy [V, F-1, S, 2] true positions in the later frames in
    tokens (0 is the centre of the first token, as in `ops.match`); visible and moved bool [V, F-1, S].
    """

    latents: Tensor
    grid: TokenGrid
    xy: Tensor
    visible: Tensor
    moved: Tensor

    def hits(self, matches: Tensor, counted: Tensor | None = None) -> Tensor:
        """Points found within one token, for each video: int64 [V]. matches: [V, F-1, S, 2] in tokens; counted: which
        points take part, the moved ones by default."""
        near = (matches - self.xy).norm(dim=-1) <= NEAR_TOKENS
        return (near & (self.moved if counted is None else counted)).flatten(1).sum(1)


def held_out_videos(
    pipe: EmbeddedVideoPipeline, config: WorldConfig, seeds: Sequence[int], working: tuple[int, int] | None = None
) -> HeldOut:
    """Generate videos and their truth.

    working: (height, width) in pixels that the frames are shrunk to before they are encoded; None for their own size.
    """
    height, width = working or (config.height, config.width)
    stride = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size
    grid = TokenGrid(config.frames, height // stride, width // stride)
    scale = torch.tensor([config.width / width, config.height / height])
    queries = np.zeros((grid.tokens_per_frame, 3))
    queries[:, 1:] = ((grid.coordinates() + 0.5) * stride * scale).numpy()
    clips = generate(seeds, config)
    frames = torch.from_numpy(np.stack([clip.video for clip in clips])).permute(0, 1, 4, 2, 3) / 255
    if working is not None:
        small = F.interpolate(frames.flatten(0, 1), (height, width), mode="bilinear", antialias=True)
        frames = small.unflatten(0, frames.shape[:2]).clamp(0, 1)
    truth = [clip.tracks(queries) for clip in clips]
    xy = torch.from_numpy(np.stack([track.xy for track in truth])) / scale / stride - 0.5
    visible = torch.from_numpy(np.stack([track.visible for track in truth]))[:, 1:]
    moved = visible & ((xy[:, 1:] - xy[:, :1]).norm(dim=-1) > MOVED_TOKENS)
    return HeldOut(pipe.vae.encode_frames(frames), grid, xy[:, 1:], visible, moved)


def nearest(features: Tensor, grid: TokenGrid, *, cosine: bool) -> Tensor:
    """Most similar token of every later frame for each token of the first: [B, F-1, S, 2] in tokens.

    features: [B, F*S, C]; by cosine, or by the largest plain dot product.
    """
    frames = features.float().unflatten(1, (grid.frames, grid.tokens_per_frame))
    if cosine:
        frames = F.normalize(frames, dim=-1)
    best = torch.einsum("bpc,bfqc->bfpq", frames[:, 0], frames[:, 1:]).argmax(-1)
    return grid.coordinates()[best]


def nearest_patches(latents: Tensor, grid: TokenGrid) -> Tensor:
    """The same for the latent patches themselves, by the smallest squared distance. latents: [B, F, C, h, w]."""
    size = latents.shape[-1] // grid.width
    patches = latents.unflatten(-1, (grid.width, size)).unflatten(-3, (grid.height, size))
    patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
    products = torch.einsum("bpc,bfqc->bfpq", patches[:, 0], patches[:, 1:])
    distance = patches[:, 1:].square().sum(-1)[:, :, None] - 2 * products
    return grid.coordinates()[distance.argmin(-1)]


def _match_operation(
    q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None, *, refined: bool
) -> dict[str, Tensor]:
    """Matches of every reading, with {} in its name for the layer."""
    # Whole cost maps of small frames cost less than the bookkeeping of streaming over them.
    backend = "reference" if grid.tokens_per_frame <= SMALL_FRAME else "auto"
    found = {}
    for refine, kind in ((0, ""), (1, REFINED)) if refined else ((0, ""),):
        match = partial(ops.match, q, k, grid, key_mask=key_mask, backend=backend, refine=refine)
        found[f"{kind}query-key {{}} mean"] = match(heads="probabilities").xy.flatten(2, 3)
        for head, xy in enumerate(match(heads="none").xy.flatten(3, 4).unbind(1)):
            found[f"{kind}query-key {{}} head {head}"] = xy
    return found


@torch.no_grad()
def read_matches(
    pipe: EmbeddedVideoPipeline,
    latents: Tensor,
    grid: TokenGrid,
    timestep: int,
    noise: Tensor | None,
    *,
    refined: bool = False,
) -> dict[str, Tensor]:
    """Matches [B, F-1, S, 2] from the first frame by every reading: "query-key L mean", "query-key L head H",
    "attention output L", "block output L" and "patches".

    refined: also "refined query-key L mean" and "refined query-key L head H", between tokens: the mean position of the
    best token and its neighbours weighted by the cost (`ops.match` with refine=1).
    noise: what the latents [B, F, C, h, w] are noised with to the timestep; None reads the clean latents at that
    timestep.
    """
    noisy = latents
    if noise is not None:
        noisy = pipe.scheduler.add_noise(latents, noise, torch.full((len(latents),), timestep))
    matches = {"patches": nearest_patches(noisy, grid)}

    def deliver(layer: int, name: str, result: Any) -> None:
        if name == "attention":
            matches.update({reading.format(layer): xy for reading, xy in result.items()})
        elif name == "attention output":
            matches[f"{name} {layer}"] = result

    def after_block(layer: int, block: torch.nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        matches[f"block output {layer}"] = nearest(outputs[0], grid, cosine=True)

    backbone = backbone_of(pipe, name="embedded")
    with ExitStack() as stack:
        for layer, block in enumerate(pipe.transformer.transformer_blocks):
            stack.callback(block.register_forward_hook(partial(after_block, layer)).remove)
        reading_forward(
            backbone,
            noisy,
            timestep,
            layers=tuple(range(backbone.layers)),
            operation=partial(_match_operation, refined=refined),
            feature_operation=partial(nearest, cosine=False),
            deliver=deliver,
        )
    return matches


def bootstrap(hits: np.ndarray, totals: np.ndarray, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """Share hits / totals over videos [V] with its 95 % interval, by resampling whole videos."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(hits), size=(draws, len(hits)))
    shares = hits[chosen].sum(1) / np.maximum(totals[chosen].sum(1), 1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return {"share": float(hits.sum() / max(totals.sum(), 1)), "low": float(low), "high": float(high)}


def matching_table(
    pipe: EmbeddedVideoPipeline,
    config: WorldConfig,
    seeds: Sequence[int],
    timesteps: Sequence[int] = (50, 300, 600),
    *,
    working: tuple[int, int] | None = None,
    batch: int = 20,
    noisy: bool = True,
    refined: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of every reading at every timestep: {"readings": {timestep: {reading: share and interval}}, ...}.

    refined: with the readings between tokens, see `read_matches`."""
    generator = torch.Generator().manual_seed(seed)
    hits: dict[int, dict[str, list[Tensor]]] = {timestep: {} for timestep in timesteps}
    totals, still, seen = [], [], []
    for start in range(0, len(seeds), batch):
        videos = held_out_videos(pipe, config, seeds[start : start + batch], working)
        totals.append(videos.moved.flatten(1).sum(1))
        seen.append(videos.visible.flatten(1).sum(1))
        standing = videos.grid.coordinates().expand(videos.xy.shape)
        still.append(videos.hits(standing, videos.visible))
        noise = torch.randn(videos.latents.shape, generator=generator)
        for timestep in timesteps:
            matches = read_matches(
                pipe, videos.latents, videos.grid, timestep, noise if noisy else None, refined=refined
            )
            for name, xy in matches.items():
                hits[timestep].setdefault(name, []).append(videos.hits(xy))
    total = torch.cat(totals).numpy()
    readings = {
        str(timestep): {name: bootstrap(torch.cat(parts).numpy(), total) for name, parts in found.items()}
        for timestep, found in hits.items()
    }
    return {
        "videos": len(seeds),
        "points": int(total.sum()),
        "standing_still_on_all_visible_points": bootstrap(torch.cat(still).numpy(), torch.cat(seen).numpy()),
        "readings": readings,
    }


def summary(readings: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """The best head, layer and features and the patches of every timestep, from the `readings` of `matching_table`;
    where it has them, the best refined head and layer too."""

    def best(found: Mapping[str, Mapping[str, float]], begins: str, ends: str = "") -> dict[str, Any]:
        names = [name for name in found if name.startswith(begins) and ends in name]
        name = max(names, key=lambda one: found[one]["share"])
        return {"reading": name, **found[name]}

    rows = {}
    for timestep, found in readings.items():
        features = [best(found, "attention output"), best(found, "block output")]
        rows[timestep] = {
            "best head": best(found, "query-key", "head"),
            "best layer": best(found, "query-key", "mean"),
            "best features": max(features, key=lambda row: row["share"]),
            "patches": {"reading": "patches", **found["patches"]},
        }
        if any(name.startswith(REFINED) for name in found):
            rows[timestep]["best head, refined"] = best(found, REFINED, "head")
            rows[timestep]["best layer, refined"] = best(found, REFINED, "mean")
    return rows
