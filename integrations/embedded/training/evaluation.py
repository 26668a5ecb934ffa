"""How well the embedded model's attention finds corresponding points, on held-out generated videos with exact truth.

Measured are visible points that moved by more than 1.5 tokens from the first frame, and the share of them matched
within one token; so standing still scores 0 by construction. Compared are queries and keys (every layer and head),
features, the noisy patches themselves, and standing still on all visible points.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.captures import capture
from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline
from corrdit.integrations.embedded.world import WorldConfig, generate

HELD_OUT_SEEDS = 1_000_000_000
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


def encode(pipe: EmbeddedVideoPipeline, video: Tensor) -> Tensor:
    """Latents [B, T, C, h, w] of videos [B, T, 3, H, W] in 0..1, every frame by itself."""
    latents = pipe.vae.encode((2 * video - 1).transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    return latents * pipe.vae.config.scaling_factor


def held_out_videos(
    pipe: EmbeddedVideoPipeline,
    config: WorldConfig,
    seeds: Sequence[int],
    working: tuple[int, int] | None = None,
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
    return HeldOut(encode(pipe, frames), grid, xy[:, 1:], visible, moved)


@contextmanager
def _recorded_features(transformer: Any, records: dict[str, Tensor]) -> Iterator[None]:
    """Attention outputs (heads joined, before the projection) and block outputs of every layer, video tokens only."""

    def before_projection(layer: int, text: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            records[f"attention output {layer}"] = inputs[0][:, text:]

        return hook

    def after_block(layer: int) -> Any:
        def hook(module: Any, inputs: Any, outputs: Any) -> None:
            records[f"block output {layer}"] = outputs[0]

        return hook

    text = transformer.config.max_text_seq_length
    with ExitStack() as stack:
        for layer, block in enumerate(transformer.transformer_blocks):
            projection = block.attn1.to_out[0].register_forward_pre_hook(before_projection(layer, text))
            stack.callback(projection.remove)
            stack.callback(block.register_forward_hook(after_block(layer)).remove)
        yield


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
    q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None, refine: int = 0
) -> dict[str, Tensor]:
    """Matches of every reading, with {} in its name for the layer."""
    # Whole cost maps of small frames cost less than the bookkeeping of streaming over them.
    backend = "reference" if grid.tokens_per_frame <= SMALL_FRAME else "auto"
    options: dict[str, Any] = {"key_mask": key_mask, "backend": backend, "refine": refine}
    single = ops.match(q, k, grid, heads="none", **options).xy.flatten(3, 4)
    mean = ops.match(q, k, grid, heads="probabilities", **options).xy.flatten(2, 3)
    kind = REFINED if refine else ""
    heads = {f"{kind}query-key {{}} head {head}": single[:, head] for head in range(single.shape[1])}
    return {f"{kind}query-key {{}} mean": mean, **heads}


def _refined_operation(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> dict[str, Tensor]:
    return _match_operation(q, k, grid, key_mask) | _match_operation(q, k, grid, key_mask, refine=1)


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
    transformer = pipe.transformer
    batch = len(latents)
    moment = torch.full((batch,), timestep)
    noisy = latents if noise is None else pipe.scheduler.add_noise(latents, noise, moment)
    prompt = pipe._get_t5_prompt_embeds("").expand(batch, -1, -1)
    height, width = (side * pipe.vae_scale_factor_spatial for side in latents.shape[-2:])
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(height, width, grid.frames, latents.device)
    records: dict[str, Tensor] = {}
    layers = len(transformer.transformer_blocks)
    operation = _refined_operation if refined else _match_operation
    with (
        _recorded_features(transformer, records),
        capture(transformer, layers=range(layers), operation=operation) as captured,
    ):
        transformer(
            hidden_states=noisy.to(transformer.dtype),
            encoder_hidden_states=prompt,
            timestep=moment,
            image_rotary_emb=rotary,
            return_dict=False,
        )
    matches = {name.format(layer): xy for layer in range(layers) for name, xy in captured[0, layer].items()}
    for name, features in records.items():
        matches[name] = nearest(features, grid, cosine=name.startswith("block"))
    matches["patches"] = nearest_patches(noisy, grid)
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
