"""Reading a compiled kernel: resources, and the instructions of its main loop, by the tools in the triton package."""

from __future__ import annotations

import math
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "QGMMA", "IMMA", "IGMMA", "DMMA")


class Instruction(NamedTuple):
    name: str
    operands: str

    @property
    def family(self) -> str:
        """The name without its modifiers."""
        return self.name.split(".")[0]


class Loop(NamedTuple):
    """A loop of the machine code: instructions `first` to `last`, both included."""

    first: int
    last: int


class MainLoop(NamedTuple):
    """Instructions a thread issues in one turn of the loop that walks the score tiles.

    Attributes:
        own: those outside inner loops.
        inner: those of all inner loops, each counted for one turn.
        exponentials: how many of all are EX2.
        tiles: score tiles a turn handles (above 1 where the compiler unrolled).
        products, inner_products: multiply-adds of matrix products a thread's share of the tensor cores does in `own`
            and in one turn of the inner loops; None where the machine code does not say (10.0).
        overlap: share of the exponentials taken while a matrix product is under way; None where that is not seen.
    """

    own: int
    inner: int
    exponentials: int
    tiles: int
    products: float | None
    inner_products: float | None
    overlap: float | None


def _run(name: str, *options: str, cubin: bytes) -> str:
    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"the triton package has no {name} at {path}; install a triton wheel for Linux")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(path), *options, file.name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} cannot read the compiled kernel: {done.stderr.strip()}")
    return done.stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread: what does not fit registers)."""
    usage = _run("cuobjdump", "-res-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage.strip()}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def repetition(ttgir: str) -> int:
    """How many threads compute each score of a tile: above 1 where the warps outnumber the rows of a product.

    A layout of four warps along the rows of a product covers 64 of them; of a tile of 32 rows every score is then
    computed twice, and every exponential after it. Read from the layouts of the products `[rows, columns]` that
    exponentials are taken of, or of all products where there are none.
    """
    layouts = {}
    for name, warps, shape in re.findall(
        r"^(#\w+) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[(\d+, \d+)\].*?instrShape = \[([\d, ]+)\]",
        ttgir,
        re.MULTILINE,
    ):
        size = [int(number) for number in shape.split(",")]
        covered = [int(count) * one for count, one in zip(warps.split(","), size, strict=False)]
        layouts[name] = covered
    tiles = re.findall(r"math\.exp2 .*?tensor<(\d+)x(\d+)xf32, (#\w+)>", ttgir)
    tiles = tiles or re.findall(r"(?:tt\.dot|warp_group_dot) .*-> tensor<(\d+)x(\d+)xf32, (#\w+)>", ttgir)
    times = [
        max(1, layouts[layout][0] // int(rows)) * max(1, layouts[layout][1] // int(columns))
        for rows, columns, layout in tiles
        if layout in layouts
    ]
    return max(times, default=1)


class Disassembly:
    """The machine code of one kernel."""

    def __init__(self, cubin: bytes) -> None:
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in _run("nvdisasm", "-c", cubin=cubin).splitlines():
            if label := _LABEL.match(line):
                labels[label.group(1)] = len(self.instructions)
            elif found := _INSTRUCTION.match(line):
                self.instructions.append(Instruction(*found.groups()))
        ends: dict[int, int] = {}
        for index, instruction in enumerate(self.instructions):
            target = re.search(r"\.L_\w+", instruction.operands) if instruction.family == "BRA" else None
            if target and labels.get(target.group(0), index + 1) < index:
                start = labels[target.group(0)]
                ends[start] = max(ends.get(start, 0), index)
        self.loops = sorted(Loop(start, end) for start, end in ends.items())

    def count(self, family: str, loop: Loop | None = None) -> int:
        """Instructions of one family (a name, with modifiers if given) in a loop, or in the whole kernel."""
        part = self.instructions if loop is None else self.instructions[loop.first : loop.last + 1]
        return sum(family in (i.name, i.family) for i in part)

    def uses_tensor_cores(self) -> bool:
        return any(instruction.family in _TENSOR_CORE for instruction in self.instructions)

    def serialized(self, products: int) -> bool:
        """Whether every wgmma is waited for by itself, where `products` matrix products would be waited for."""
        steps = [instruction for instruction in self.instructions if instruction.family == "HGMMA"]
        return len(steps) > 2 * products and all("gsb0" in step.operands for step in steps)

    def overlapped(self, loop: Loop) -> float | None:
        """Share of the exponentials of a loop that are taken while a product is under way; None without wgmma.

        A group of wgmma is under way from its last instruction until it is waited for.
        """
        under_way, during, total = 0, 0, 0
        # Twice round: what the last turn left under way is so at the start of the next.
        for turn in range(2):
            for instruction in self.instructions[loop.first : loop.last + 1]:
                if instruction.family == "HGMMA" and "gsb0" in instruction.operands:
                    under_way += 1
                elif instruction.name.startswith("WARPGROUP.DEPBAR"):
                    left = re.search(r"gsb0,\s*(0x[0-9a-f]+)", instruction.operands)
                    under_way = min(under_way, int(left.group(1), 16) if left else 0)
                elif instruction.name == "MUFU.EX2" and turn:
                    total += 1
                    during += under_way > 0
        return during / total if total and self.count("HGMMA", loop) else None

    def multiply_adds(self, indices: Iterable[int]) -> float | None:
        """Multiply-adds of the matrix products at these instructions, for each thread that takes part in them."""
        total = 0.0
        for index in indices:
            instruction = self.instructions[index]
            if instruction.family not in _TENSOR_CORE:
                continue
            text = instruction.name + instruction.operands
            if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", text):
                total += math.prod(map(int, found.groups())) / 128
            elif found := re.match(r"HMMA\.(16)(8)(\d+)", text):
                total += math.prod(map(int, found.groups())) / 32
            else:
                return None
        return total

    def main_loop(self, elements: int, depth: int) -> MainLoop | None:
        """The loop over score tiles, for `elements` scores of a tile that each thread computes.

        It is the shortest loop that handles that many scores: by exponentials, one a score, or by comparisons where the
        kernel takes none. The loop over ragged or masked tiles is longer and does not win. None if there is no loop.

        Args:
            depth: of one matrix product of a tile, which tells how many tiles a turn handles where it takes several
                comparisons for each score.
        """
        for measure in ("MUFU.EX2", "FSETP", "FMNMX"):
            candidates = [loop for loop in self.loops if self.count(measure, loop) >= 0.9 * elements]
            if candidates:
                loop = min(candidates, key=lambda found: found.last - found.first)
                within = [x for x in self.loops if x != loop and loop.first <= x.first and x.last <= loop.last]
                inner = {index for x in within for index in range(x.first, x.last + 1)}
                own = set(range(loop.first, loop.last + 1)) - inner
                exponentials = self.count("MUFU.EX2", loop)
                of_own, of_inner = self.multiply_adds(own), self.multiply_adds(inner)
                scores = exponentials if exponentials else ((of_own or 0) + (of_inner or 0)) / depth
                return MainLoop(
                    len(own), len(inner), exponentials, max(1, round(scores / elements)), of_own, of_inner,
                    self.overlapped(loop),
                )  # fmt: skip
        return None
