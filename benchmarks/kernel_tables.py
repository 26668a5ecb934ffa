"""Tables of the kernels' machine code, from `results/kernels_two_tritons.json`, for `result_tables.py`."""

from __future__ import annotations

from collections.abc import Sequence

from experiment import Record

from corrdit.files import markdown_table


def kernel_faults(result: Record) -> str:
    """How many launches there are, spill, have products that wait for each other, and do not fit the chip."""
    groups: dict[tuple[int, str, str], list[Record]] = {}
    for row in result["rows"]:
        groups.setdefault((row["arch"], row["dtype"], row["triton"]), []).append(row)
    rows = []
    for (arch, dtype, version), group in sorted(groups.items()):
        spills = [row["spill_bytes"] for row in group if row["spill_bytes"]]
        serialised, unfit = (sum(row[name] is bad for row in group) for name, bad in
                             (("serialized_products", True), ("launchable", False)))  # fmt: skip
        counts = (len(group), len(spills), max(spills, default=0), serialised, unfit)
        rows.append([f"{arch / 10:.1f}", dtype, version, *map(str, counts)])
    head = ("capability", "dtype", "triton", "launches", "spill", "most, bytes", "serialised", "do not fit")
    return markdown_table(head, rows)


def kernel_code(result: Record) -> str:
    """The plain launches on 9.0 in bfloat16 at head_dim 64 and 128, each version of triton beside the other."""
    versions = sorted({row["triton"] for row in result["rows"]})
    found: dict[tuple[str, str, int], dict[str, Record]] = {}
    for row in result["rows"]:
        if (row["arch"], row["dtype"], row["variant"]) == (90, "bfloat16", "plain") and row["head_dim"] != 96:
            found.setdefault((row["kernel"], row["heads"], row["head_dim"]), {})[row["triton"]] = row
    names = ("registers", "instructions_per_element", "overlap", "resident_blocks")
    rows = [
        [*map(str, key), *(_both(by_version, name, versions) for name in names)] for key, by_version in found.items()
    ]
    head = ("kernel", "heads", "head_dim", "registers", "instructions a score", "overlap", "blocks at once")
    return markdown_table((*head[:3], *(f"{title}, {' and '.join(versions)}" for title in head[3:])), rows)


def kernel_shapes(result: Record) -> str:
    names = ("tile_use", "wave_use", "product", "product_pair_by_pair")
    rows = [[row["shape"], *(f"{row[name]:.3f}" for name in names)] for row in result["shapes"]]
    return markdown_table(("shape", "tile use", "wave use", "product", "product, each pair by itself"), rows)


def _both(by_version: dict[str, Record], name: str, versions: Sequence[str]) -> str:
    values = [by_version[version].get(name) if version in by_version else None for version in versions]
    return ", ".join("-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values)
