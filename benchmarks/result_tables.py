"""The tables and run times in README.md and docs, from the result files.

    python benchmarks/result_tables.py            # writes them into the pages, between their marks
    python benchmarks/result_tables.py --check    # exit status 1 and the names of tables that are not as the files say

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. How long a command takes by the
clock stands behind it, as in `make demo  # 40 s`, wherever a page shows a command that `run_times.json` has, measured
while nobody else was at work.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from experiment import RESULTS, Record, new_parser, read_json

from corrdit.files import markdown_table, written_beside

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "install.md")
RUN_TIMES = "run_times.json"
QUIET_LOAD = 3.0
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

MATCHING = {
    "best layer": "best layer, query-key",
    "best layer, refined": "the same between tokens",
    "best head": "best head",
    "best head, refined": "the same between tokens",
    "best features": "best features",
    "patches": "noisy patches",
}
TRACKERS = {
    "default": "corrdit, default",
    "mean of softmaxes over its heads": "mean of the softmaxes of all heads of the layer, not two",
    "no crops": "without looking again at enlarged crops",
    "no sub-token refinement": "without sub-token refinement",
    "one direction": "without the backward softmax",
    "every frame by itself": "every frame by itself",
    "low-pass 0.4": "low-pass filtered queries and keys",
    "inverted latents": "inverted latents",
    "noisy latents": "noisy latents",
    "features, attention output": "features instead of queries and keys",
    "published procedure": "DiffTrack's published procedure, same model",
    "nearest patch of 7 x 7": "nearest patch of 7 x 7 pixels",
    "Lucas-Kanade": "Lucas-Kanade (OpenCV, pyramidal)",
    "standing still": "standing still",
}
TRACKER_FIGURES = ("average_jaccard", "average_pts_within_thresh", "pts_within_1", "pts_within_2", "occlusion_accuracy")
ANNOTATED = {
    "default": "corrdit, default",
    "finer tokens": "32 x 32 tokens, temperature 2, spread 2, one crop",
    "standing still": "standing still",
    "Lucas-Kanade": "Lucas-Kanade (OpenCV, pyramidal)",
    "DIS flow": "DIS flow (OpenCV)",
    "XFeat": "XFeat, the nearest descriptor, no tracker",
}
ANNOTATED_FIGURES = ("average_pts_within_thresh", "pts_within_1", "pts_within_2", "pts_within_8")
METHODS = {
    "backbone": "no transfer",
    "injection": "injection",
    "query injection": "injection of queries",
    "smm": "SMM, the paper's formula",
    "smm released": "SMM as released",
    "moft": "MOFT",
    "motionclone": "MotionClone",
    "ditflow embeddings": "DiTFlow on positional embeddings",
    "ditflow latents": "DiTFlow on latents",
    "fastvmt": "DiTFlow with FastVMT's settings",
    "flowmotion": "FlowMotion",
}
TRANSFER_PARTS = {
    "ablations": {
        "fidelity above block 4": ("fidelity_above_default", "+", 2),
        "seconds": ("seconds", "", 1),
    },
    "zero-shot": {
        "fidelity above optimising for its prompt": ("fidelity_above_optimised", "+", 2),
        "adherence above it": ("adherence_above_optimised", "+", 2),
    },
    "appendix-d": {"agreement": ("agreement", "", 2)},
    "steady": {
        "warped residual": ("residual", "", 3),
        "track survival": ("survival", "", 3),
        "motion, px a frame": ("motion", "", 2),
    },
}
"""Columns of parts of the measurements of motion transfer: name, sign and digits of the figure."""
PERTURBED = {
    "centre": "layer {centre}, the one that matches, scale 1",
    **{f"layer {layer}": f"layer {layer}" for layer in range(6)},
    "all layers": "all layers",
    "scale 0.5": "layer {centre}, scale 0.5",
    "scale 2": "layer {centre}, scale 2",
    "first half of the steps": "layer {centre}, first half of the steps",
    "second half of the steps": "layer {centre}, second half of the steps",
    "zeroed": "layer {centre}, zeroed after the softmax",
    "span 1": "layer {centre}, attention to the next frames kept",
    "identity": "layer {centre}, identity attention (PAG)",
    "skip": "layer {centre} skipped (STG)",
}


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def interval(row: Mapping[str, float] | Sequence[float], sign: str = "", digits: int = 2) -> str:
    """A mean with its 95 % interval, given by name or in this order."""
    parts = [row["mean"], row["low"], row["high"]] if isinstance(row, Mapping) else list(row)
    mean, low, high = (f"{part:{sign}.{digits}f}" for part in parts)
    return f"{mean} ({low} to {high})"


def matching(result: Record) -> str:
    found = result["training_size"]["summary"]
    kinds = [kind for kind in MATCHING if all(kind in row for row in found.values())]
    rows = ([timestep, *(percent(row[kind]["share"]) for kind in kinds)] for timestep, row in found.items())
    return markdown_table(["timestep", *(MATCHING[kind] for kind in kinds)], rows)


def tracking(result: Record, variants: Iterable[str] = TRACKERS) -> str:
    head = ["tracker", "average Jaccard", "points within thresholds", "within 1 px", "within 2 px", "visibility"]
    measured = {row["variant"]: row for row in result["rows"]}
    rows = (
        [TRACKERS[variant], *(f"{100 * measured[variant][figure][0]:.1f}" for figure in TRACKER_FIGURES)]
        for variant in variants
    )
    return markdown_table(head, rows)


def summary(result: Record) -> str:
    return tracking(result, ("default", "published procedure", "Lucas-Kanade", "standing still"))


def annotated(result: Record) -> str:
    head = ["clip", "tracker", "points within thresholds", "over points", "within 1 px", "within 2 px", "within 8 px"]
    rows = []
    for row in result["rows"]:
        figures = [f"{100 * row['figures'][name]:.1f}" for name in ANNOTATED_FIGURES]
        low, high = (f"{100 * end:.1f}" for end in row["points_interval"])
        rows.append([row["clip"], ANNOTATED[row["tracker"]], figures[0], f"{low} to {high}", *figures[1:]])
    return markdown_table(head, rows)


def transfer(result: Record) -> str:
    measured, memory = result["tables"].get("main", {}), result["tables"].get("memory", {})
    head = ["method", "videos", "motion fidelity", "above no transfer", "direction error", "adherence", "seconds"]
    rows = []
    for key, name in METHODS.items():
        if key not in measured:
            continue
        row = measured[key]
        cells = [name, str(row["fidelity"]["count"]), interval(row["fidelity"])]
        cells += [interval(row["fidelity_above_backbone"], "+") if "fidelity_above_backbone" in row else ""]
        # Results of earlier versions have fewer columns.
        cells += [interval(row["direction_error"], digits=0)]
        cells += [interval(row["adherence"]) if "adherence" in row else "", f"{row['seconds']['mean']:.1f}"]
        rows.append([*cells, f"{memory[key]['peak_megabytes']['mean']:.0f}" if key in memory else ""])
    return markdown_table([*head, "peak memory, MB"], rows) + _weights_of(result)


def transfer_region(result: Record) -> str:
    measured = result["tables"].get("region", {})
    head = ["method", "inside, everywhere", "inside, in the mask", "share kept", "outside, above no transfer"]
    rows = []
    for key, name in METHODS.items():
        masked = measured.get(f"{key}, in the mask")
        if masked is None or key not in measured:
            continue
        inside = [interval(row["inside"]) for row in (measured[key], masked)]
        share = masked["inside"]["mean"] / measured[key]["inside"]["mean"]
        rows.append([name, *inside, f"{share:.2f}", interval(masked["outside_above_backbone"], "+")])
    return _or_not_yet(head, rows)


def transfer_part(part: str) -> Callable[[Record], str]:
    """The table of a part of the measurements of motion transfer, of its columns in `TRANSFER_PARTS`."""

    def table(result: Record) -> str:
        columns = TRANSFER_PARTS[part]
        rows = [
            [name, *(interval(row[key], sign, digits) if key in row else "" for key, sign, digits in columns.values())]
            for name, row in result["tables"].get(part, {}).items()
            if any(key in row for key, *_ in columns.values())
        ]
        return _or_not_yet(["setting", *columns], rows)

    return table


def _or_not_yet(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(head, rows) if rows else "Not measured with these weights yet.\n"


def _weights_of(result: Record) -> str:
    if "weights" not in result:
        return "\nOf earlier weights than those shipped.\n"
    return f"\nWeights {result['weights']}, commits {', '.join(result['commits_of_rows'])}.\n"


def guidance(result: Record) -> str:
    measured, centre = result["settings"], result["centre_layer"]
    plain = {name: measured["none"][name]["mean"][0] for name in ("residual", "survival", "motion", "adherence")}
    head = [
        "perturbed",
        f"warped residual (unguided {plain['residual']:.3f})",
        f"track survival ({plain['survival']:.3f})",
        f"motion, px ({plain['motion']:.2f})",
        f"adherence ({plain['adherence']:.3f})",
    ]
    rows = []
    for key, name in PERTURBED.items():
        if key not in measured:  # the centre's own layer has no second row
            continue
        change = {part: measured[key][part]["difference"] for part in plain}
        rows.append(
            [
                name.format(centre=centre),
                interval(change["residual"], "+", 3),
                interval(change["survival"], "+", 3),
                f"{change['motion'][0]:+.2f}",
                f"{change['adherence'][0]:+.3f}",
            ]
        )
    return markdown_table(head, rows)


def planned_peaks(result: Record) -> str:
    rows = []
    for row in result["rows"]:
        options = ", ".join(f"{name} {value}" for name, value in row["settings"].items()) or "-"
        sizes = [f"{row[name] / 1e6:.2f}" for name in ("measured_bytes", "planned_bytes")]
        rows.append([row["model"], row["task"], options, *sizes, f"{100 * row['error']:+.1f} %", row["phase"]])
    return markdown_table(("model", "task", "options", "measured, MB", "planned, MB", "error", "largest phase"), rows)


def planned_checkpoints(result: Record) -> str:
    rows = []
    for plan in result["checkpoints"]:
        checkpointing = "on" if plan["options"]["gradient_checkpointing"] else "off"
        peaks = {phase["name"]: f"{phase['peak_bytes'] / 2**30:.1f}" for phase in plan["phases"]}
        shown = [peaks[name] for name in ("encoding the reference", "guided step", "denoising step", "decoding")]
        fits = [_fit(plan["fits"].get(f"{size} GB")) for size in (16, 24, 48)]
        rows.append([plan["model"], checkpointing, *shown, *fits, f"{plan['flop'] / 1e15:.0f}"])
    head = ("checkpoint", "gradient checkpointing", "encoding", "guided step", "denoising step", "decoding")
    return markdown_table((*head, "16 GB card", "24 GB card", "48 GB card", "PFLOP"), rows)


def accelerated(result: Record) -> str:
    families: Record = result["families"]
    names = dict.fromkeys(name for found in families.values() for name in found)
    rows = []
    for name in names:
        found = {family: outcomes[name] for family, outcomes in families.items() if name in outcomes}
        alike = [family for family, said in found.items() if said in ("identical", "equal")]
        not_made = [family for family, said in found.items() if said.startswith("not made")]
        others = [family for family in found if family not in (*alike, *not_made)]
        whole = [f"all {len(families)}"] if len(alike) == len(families) else alike
        rows.append([name, *(", ".join(listed) or "-" for listed in (whole, not_made, others))])
    return markdown_table(("run", "identical", "not made", "fails"), rows)


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
    """The plain launches on 9.0 in bfloat16, each version of triton beside the other."""
    versions = sorted({row["triton"] for row in result["rows"]})
    found: dict[tuple[str, str, int], dict[str, Record]] = {}
    for row in result["rows"]:
        if (row["arch"], row["dtype"], row["variant"]) == (90, "bfloat16", "plain"):
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
    values = [by_version[version][name] if version in by_version else None for version in versions]
    return ", ".join("-" if value is None else f"{value:.3g}" for value in values)


def _fit(found: Record | None) -> str:
    if found is None:
        return "-"
    options = found["options"]
    words = "all on the card" if options["parts"] == "device" else options["parts"].replace("_", " ")
    tiles = ", codec in tiles" if options["codec_tiling"] else ""
    return f"{found['peak_bytes'] / 2**30:.1f}: {words}{tiles}"


def run_times(result: Record) -> str:
    rows = []
    for row in result["rows"].values():
        seconds = duration(row["seconds"]) if quiet(row) else f"not known: load {float(row['load_average'][0]):.0f}"
        rows.append([f"`{row['shown']}`", row["what"], seconds, duration(row["processor_seconds"])])
    return markdown_table(("command", "does", "by the clock", "processor time"), rows)


def quiet(row: Record) -> bool:
    """Whether nobody but the run before can have been at work when it began, on two cores."""
    return float(row["load_average"][0]) < QUIET_LOAD


def duration(seconds: float) -> str:
    """Two figures at most: 8 s, 45 s, 3 min, 12 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "matching": ("embedded_matching.json", matching),
    "tracking": ("tracking.json", tracking),
    "annotated": ("annotated_clips.json", annotated),
    "summary": ("tracking.json", summary),
    "transfer": ("transfer_quality.json", transfer),
    "transfer_region": ("transfer_quality.json", transfer_region),
    "transfer_steady": ("transfer_quality.json", transfer_part("steady")),
    "transfer_ablations": ("transfer_quality.json", transfer_part("ablations")),
    "transfer_zero_shot": ("transfer_quality.json", transfer_part("zero-shot")),
    "transfer_moved_picture": ("transfer_quality.json", transfer_part("appendix-d")),
    "guidance": ("guidance_quality.json", guidance),
    "planned_peaks": ("plan_memory.json", planned_peaks),
    "kernel_faults": ("kernels_two_tritons.json", kernel_faults),
    "kernel_code": ("kernels_two_tritons.json", kernel_code),
    "kernel_shapes": ("kernels_two_tritons.json", kernel_shapes),
    "accelerated": ("accelerated.json", accelerated),
    "planned_checkpoints": ("plan_memory.json", planned_checkpoints),
    "run_times": (RUN_TIMES, run_times),
}


def made(name: str, results: pathlib.Path) -> str:
    """The table of a name, from its file in a folder of results."""
    if name not in TABLES:
        raise ValueError(f"no table is called {name!r}; known are {', '.join(TABLES)}")
    file, make = TABLES[name]
    return make(read_json(results / file))


def filled(text: str, results: pathlib.Path) -> tuple[str, list[str]]:
    """A text with its marked tables and its run times made anew, and the names of those that were different."""
    changed = []

    def replacement(match: re.Match[str]) -> str:
        whole = match[1] + made(match[2], results) + match[3]
        if whole != match[0]:
            changed.append(match[2])
        return whole

    text = MARKED.sub(replacement, text)
    measured = read_json(results / RUN_TIMES)["rows"]
    for name, row in ((name, row) for name, row in measured.items() if quiet(row)):
        timed = re.sub(
            rf"^({re.escape(row['shown'])} +# )\d+ (?:s|min)\b",
            lambda line, row=row: line[1] + duration(row["seconds"]),
            text,
            flags=re.MULTILINE,
        )
        if timed != text:
            changed.append(f"run time of {name}")
        text = timed
    return text, changed


def main(words: list[str] | None = None) -> int:
    parser = new_parser(__doc__, output=False)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--page", type=pathlib.Path, nargs="+", default=list(PAGES))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args(words)
    different = []
    for page in arguments.page:
        text, changed = filled(page.read_text(encoding="utf-8"), arguments.results)
        if changed and not arguments.check:
            with written_beside(page, "w") as file:
                file.write(text)
        different += changed
    print("\n".join(different) or "every table is as its file says")
    return int(bool(different) and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
