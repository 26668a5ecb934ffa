"""How the gradient of averaged logits is cut into chunks of dlogit, each of two plain matrix products.

A chunk holds some tokens of query frames against some tokens of key frames. Without a window it is some queries of one
frame against all keys of several. With windows round the queries' own places most of that is zeros; then it is a band
of token rows of several query frames against the token rows that their windows reach.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from corrdit.kernels.shared.launch import tile_count

# Elements of a row's stride: cuBLAS has fast tiles where rows begin on 16 bytes, and its largest on 128.
ALIGNMENT = 64
_ROWS_OF_TILE = 128
# Rows of a band: fewer would leave multiprocessors without a tile of the product.
_ROWS_OF_BAND = 1024
# Elements of dlogit that both products multiply while one token of a band is copied, and its float32 sums are added:
# 20 bytes for each of W at 4.3 TB/s, against 4 W operations at 650 TFLOP/s.
_ELEMENTS_OF_TOKEN = 750


class Stretches(NamedTuple):
    """Tokens of a tensor's token axis: `pieces` stretches of `tokens` each, one every `step` from `first` on."""

    first: int
    pieces: int
    tokens: int
    step: int

    @property
    def total(self) -> int:
        return self.pieces * self.tokens

    def of(self, matrix: Tensor) -> Tensor:
        """`[pieces, tokens, W]` of `[N, W]`, a view."""
        stride, start = matrix.stride(0), matrix.storage_offset() + self.first * matrix.stride(0)
        shape = (self.pieces, self.tokens, matrix.shape[1])
        return matrix.as_strided(shape, (self.step * stride, stride, matrix.stride(1)), start)


class Chunk(NamedTuple):
    """dlogit of some tokens of query frames against some tokens of key frames.

    Attributes:
        first_pair, pair_step: the pair of query frame a and key frame b of the chunk is first_pair + a * pair_step + b.
        key_frames: how many there are. first_row: token of every query frame. first_key, stop_key: of every key frame,
            as far as k holds them.
        first_column: place in k of the first key frame's first held token. skipped: tokens of a key frame left out.
        queries, keys: the rows and columns of dlogit in q and in k.
    """

    first_pair: int
    pair_step: int
    key_frames: int
    first_row: int
    first_key: int
    stop_key: int
    first_column: int
    skipped: int
    queries: Stretches
    keys: Stretches

    @property
    def elements(self) -> int:
        """What it takes of a workspace."""
        return self.queries.total * aligned(self.keys.total)


class _KeyRun(NamedTuple):
    """Pairs of one query frame, next to each other in the list, whose keys follow each other in k.

    Attributes:
        first_query, queries: place of the query frame's first held token in q, and how many there are.
        first_token: its number in the frame.
        first_key, keys: the same of the keys of all pairs in k.
    """

    first_pair: int
    length: int
    query_frame: int
    first_query: int
    queries: int
    first_token: int
    first_key: int
    keys: int


def key_runs(pairs: Sequence[int], queries: Sequence[int], keys: Sequence[int]) -> list[list[_KeyRun]]:
    """The pairs (i0, j0, i1, j1, ...) in runs, each a list of its pairs.

    Args:
        queries, keys: what q and k hold of every frame, see `TokenAxis.places`. Pairs without any are left out.
    """
    runs: list[list[_KeyRun]] = []
    for index, (i, j) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        (place, first, stop), (k_place, k_first, k_stop) = queries[3 * i : 3 * i + 3], keys[3 * j : 3 * j + 3]
        if first == stop or k_first == k_stop:
            continue
        one = _KeyRun(index, 1, i, place + first, stop - first, first, k_place + k_first, k_stop - k_first)
        last = runs[-1][-1] if runs else None
        follows = last and (last.query_frame, last.first_pair + 1, last.first_key + last.keys) == (
            i, index, one.first_key,
        )  # fmt: skip
        if follows:
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


def equal_parts(count: int, most: int) -> list[slice]:
    """0 to `count` in the fewest parts of at most `most`, as equal as can be."""
    parts = tile_count(count, most)
    bounds = [part * count // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def aligned(columns: int) -> int:
    """The stride of rows of so many columns."""
    return tile_count(columns, ALIGNMENT) * ALIGNMENT


def chunk_rows(frame_tokens: int, columns: int, room: int) -> int:
    """Query rows of one chunk: whole tiles, as equal as can be, of what `room` elements of `columns` columns hold."""
    most = max(1, min(frame_tokens, room // aligned(columns)))
    equal = tile_count(frame_tokens, tile_count(frame_tokens, most))
    return min(most, tile_count(equal, _ROWS_OF_TILE) * _ROWS_OF_TILE)


def whole_key_chunks(runs: list[list[_KeyRun]], longest: int, frame_tokens: int, room: int) -> list[Chunk]:
    """Some queries of one frame against all keys of several frames.

    A chunk as square as may be is added to the fewest rows of dq and dk together: all rows of a frame, if they fit.

    Args:
        longest: the most tokens that are held of a frame. frame_tokens: of a whole one. room: elements of a chunk.
    """
    together = max(1, room // aligned(longest) // max(longest, _ROWS_OF_TILE))
    cut = [
        part[0]._replace(length=len(part), keys=sum(one.keys for one in part))
        for run in runs
        for part in (run[bounds] for bounds in equal_parts(len(run), together))
    ]
    widest = max((run.keys for run in cut), default=1)
    steps = chunk_rows(max((run.queries for run in cut), default=1), widest, room)
    chunks = []
    for run in cut:
        keys = Stretches(run.first_key, 1, run.keys, run.keys)
        for first in range(0, run.queries, steps):
            rows = min(steps, run.queries - first)
            queries = Stretches(run.first_query + first, 1, rows, rows)
            chunks.append(
                Chunk(run.first_pair, 0, run.length, run.first_token + first, 0, frame_tokens, run.first_key, 0,
                      queries, keys)
            )  # fmt: skip
    return chunks


def band_chunks(runs: list[list[_KeyRun]], height: int, width: int, radius: int, room: int) -> list[Chunk]:
    """Bands of token rows of the query frames of alike runs, against the token rows within `radius` of them.

    Every frame is whole. The height of a band is the least that gives a product rows enough, for its reach is read
    beside it; only a part of the frames is taken at once where a band of all would not fit.
    """
    chunks = []
    for group in _alike(runs):
        query_frames, key_frames, down = len(group), len(group[0]), 1

        def fits(down: int, query_frames: int, key_frames: int) -> bool:
            reach = min(height, down + 2 * radius)
            return query_frames * down * width * aligned(key_frames * reach * width) <= room

        while not fits(down, query_frames, key_frames) and query_frames * key_frames > 1:
            if query_frames * down >= key_frames * min(height, down + 2 * radius) or key_frames == 1:
                query_frames = -(-query_frames // 2)
            else:
                key_frames = -(-key_frames // 2)
        while (
            down < height and query_frames * down * width < _ROWS_OF_BAND and fits(down + 1, query_frames, key_frames)
        ):
            down += 1
        for of_queries, of_keys, rows in itertools.product(
            equal_parts(len(group), query_frames), equal_parts(len(group[0]), key_frames), equal_parts(height, down)
        ):
            some = [run[of_keys] for run in group[of_queries]]
            chunks.append(_band(some, len(group[0]), height * width, width, radius, rows))
    return chunks


def _alike(runs: list[list[_KeyRun]]) -> list[list[list[_KeyRun]]]:
    """The runs in groups of the same keys, whose query frames and pairs follow each other."""
    groups: list[list[list[_KeyRun]]] = []
    for run in runs:
        before = groups[-1][-1] if groups else None
        follows = before and (
            before[0].query_frame + 1, before[-1].first_pair + 1, before[0].first_key, len(before),
        ) == (run[0].query_frame, run[0].first_pair, run[0].first_key, len(run))  # fmt: skip
        if follows:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _band(
    runs: list[list[_KeyRun]], pair_step: int, frame_tokens: int, width: int, radius: int, rows: slice
) -> Chunk:  # fmt: skip
    """The chunk of the token rows `rows` of whole frames."""
    first, stop = rows.start * width, rows.stop * width
    first_key, stop_key = max(0, first - radius * width), min(frame_tokens, stop + radius * width)
    start, key_frames = runs[0][0], len(runs[0])
    return Chunk(
        start.first_pair, pair_step, key_frames, first, first_key, stop_key, start.first_key,
        frame_tokens - (stop_key - first_key),
        Stretches(start.first_query + first, len(runs), stop - first, frame_tokens),
        Stretches(start.first_key + first_key, key_frames, stop_key - first_key, frame_tokens),
    )  # fmt: skip


def gradient_chunks(
    pairs: Sequence[int], queries: Sequence[int], keys: Sequence[int], longest: int, height: int, width: int,
    radius: int, room: int,
) -> list[Chunk]:  # fmt: skip
    """All chunks of the pairs (i0, j0, i1, j1, ...), in the way whose products cost least.

    Args:
        longest: the most tokens that are held of a frame. radius: of windows round the queries' own places in whole
            frames, -1 for anything else. room: elements that a chunk may take.
    """
    runs = key_runs(pairs, queries, keys)
    chunks = whole_key_chunks(runs, longest, height * width, room)
    if radius >= 0:
        bands = band_chunks(runs, height, width, radius, room)
        ways = [way for way in (chunks, bands) if max((chunk.elements for chunk in way), default=0) <= room]
        return min(ways, key=lambda way: sum(map(_cost, way)))
    return chunks


def _cost(chunk: Chunk) -> int:
    """What the two products of a chunk take, in elements of dlogit."""
    apart = max(chunk.queries.pieces, chunk.keys.pieces) > 1
    added = _ELEMENTS_OF_TOKEN * (chunk.queries.total + chunk.keys.total) if apart else 0
    return chunk.queries.total * chunk.keys.total + added
