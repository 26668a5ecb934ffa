"""Compiling every kernel for a GPU that is not there, and reading from the machine code what it would cost.

The host functions run on meta tensors, so that what is compiled is what is launched: the same arguments, tiles and
specialisation on strides. A driver that only names its architecture stands in for the CUDA driver.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from corrdit.kernels.inspection.disassembly import Disassembly, MainLoop, repetition, resources
from corrdit.kernels.inspection.floors import EXPONENTIALS, ISSUE_LANES, TENSOR_PRODUCTS
from corrdit.kernels.shared.configs import SHARED_BYTES, Tiles, table_of
from corrdit.kernels.shared.launch import compile_only
from corrdit.kernels.shared.primitives import INTERPRETED

# Products of tiles in triton's intermediate code: up to 8.9, on 9.0 and on 10.0.
_PRODUCTS = ("tt.dot", "warp_group_dot", "tc_gen5_mma")
# Compute capability -> multiprocessors of its largest card: A100, RTX 3090 Ti, RTX 4090, H200, B200, RTX 5090.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
ARCHITECTURES = {arch: table_of(divmod(arch, 10)) for arch in MULTIPROCESSORS}
_REGISTERS, _THREADS, _BLOCKS, _RESERVED_BYTES = 65536, {80: 2048, 90: 2048, 100: 2048}, 24, 1024


class Compiled(NamedTuple):
    """One kernel as it would be launched.

    Attributes:
        shared_bytes: shared memory of a block. spill_bytes: local memory of a thread.
        launchable: whether the chip has that much shared memory, and a block its registers.
        tensor_cores: whether every matrix product runs on tensor cores; true where there is none, as in refinement.
        serialized: whether ptxas made each wgmma wait for the one before, for lack of registers.
        main_loop: None where the kernel has no loop over score tiles.
        elements: scores of a tile over the threads of a block.
        repetition: how many threads compute each score; 1 where no work is done twice.
        resident_blocks: blocks a multiprocessor holds at once. programs: blocks of the launch.
        wave_use: share of the places for blocks that the launch fills until its last block ends.
    """

    kernel: str
    architecture: str
    tiles: Tiles
    registers: int
    spill_bytes: int
    shared_bytes: int
    launchable: bool
    tensor_cores: bool
    serialized: bool
    main_loop: MainLoop | None
    elements: int
    repetition: int
    resident_blocks: int
    programs: int
    wave_use: float

    def instructions_per_element(self, inner_turns: int = 1) -> float | None:
        """Instructions of the main loop for each score, the inner loop over head_dim turning `inner_turns` times."""
        if self.main_loop is None:
            return None
        return (self.main_loop.own + inner_turns * self.main_loop.inner) / (self.main_loop.tiles * self.elements)

    def cycles_per_element(self, inner_turns: int = 1) -> dict[str, float | None] | None:
        """Cycles of a multiprocessor that each unit is busy for a score: "issue", "exponential" and "tensor".

        At the units' full rates; the largest of them is what the loop takes if all the others hide behind it.
        """
        loop, instructions = self.main_loop, self.instructions_per_element(inner_turns)
        if loop is None or instructions is None:
            return None
        tensor = None
        if loop.products is not None and loop.inner_products is not None:
            products = (loop.products + inner_turns * loop.inner_products) / (loop.tiles * self.elements)
            tensor = products / TENSOR_PRODUCTS[self.architecture]
        return {
            "issue": instructions / ISSUE_LANES,
            "exponential": loop.exponentials / (loop.tiles * self.elements) / EXPONENTIALS,
            "tensor": tensor,
        }

    def epilogue_share(self, depth: int) -> float | None:
        """Cycles of a tile outside the product of depth `depth`, over the cycles of that product on tensor cores.

        The larger of issue and exponential cycles, at the units' rates.
        """
        if self.main_loop is None:
            return None
        scores = self.main_loop.tiles * self.elements
        issue = self.main_loop.own / scores / ISSUE_LANES
        exponential = self.main_loop.exponentials / scores / EXPONENTIALS
        return max(issue, exponential) / (depth / TENSOR_PRODUCTS[self.architecture])


class _AbsentDevice:
    """A driver that names an architecture and has no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device: one number for each architecture keeps them apart.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def absent_device(arch: int) -> Iterator[None]:
    """Within it, triton compiles for compute capability `arch` (90 for 9.0) without a device.

    Raises:
        ValueError: an architecture without tile tables.
        RuntimeError: triton interprets kernels in this process and cannot compile them.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(map(str, ARCHITECTURES))}, got {arch}")
    if INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET=1 is set, kernels cannot be compiled in this process; unset it")
    before = driver._active
    driver.set_active(_AbsentDevice(arch))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Compiled]]:
    """Within it, host functions called on meta tensors append what they would launch to the list."""
    compiled: list[Compiled] = []
    architecture = ARCHITECTURES[arch]

    seen: set[str] = set()

    def compile_launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        mocked = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in arguments]
        if "BLOCK_M" not in options:
            return  # element by element, no tiles to look at
        binary = kernel.warmup(*mocked, grid=(1,), enable_fp_fusion=True, **options)
        if binary.hash not in seen:
            seen.add(binary.hash)
            compiled.append(_inspect(binary, kernel.__name__, arch, options, math.prod(grid)))

    with absent_device(arch), compile_only(architecture, compile_launch):
        yield compiled


def resident_blocks(arch: int, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that one multiprocessor holds at once; 0 where not even one fits."""
    of_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    of_shared = (SHARED_BYTES[ARCHITECTURES[arch]] + _RESERVED_BYTES) // (shared_bytes + _RESERVED_BYTES)
    return min(of_registers, of_shared, _THREADS.get(arch, 1536) // (32 * warps), _BLOCKS)


def wave_use(programs: int, places: int) -> float:
    """Share of `places` for blocks that as many equal blocks fill until the last one ends."""
    return programs / (-(-programs // places) * places)


def _inspect(binary: Any, name: str, arch: int, options: dict[str, Any], programs: int) -> Compiled:
    cubin = binary.asm["cubin"]
    architecture = ARCHITECTURES[arch]
    registers, spill = resources(cubin)
    code = Disassembly(cubin)
    warps = options["num_warps"]
    rows, columns = options["BLOCK_M"], options["BLOCK_N"]
    elements = max(1, rows * columns // (32 * warps))
    times = repetition(binary.asm["ttgir"])
    shared = int(binary.metadata.shared)
    resident = resident_blocks(arch, registers, shared, warps)
    lines = binary.asm["ttgir"].splitlines()
    products = [line for line in lines if any(f"{operation} " in line for operation in _PRODUCTS)]
    # A product that missed the tensor cores is a tt.dot that keeps its result in a plain blocked layout.
    plain = any("tt.dot " in line and "#blocked" in line.rsplit("->", 1)[-1] for line in products)
    return Compiled(
        kernel=name.removesuffix("_kernel"),
        architecture=architecture,
        tiles=Tiles(rows, columns, options.get("BLOCK_D", 0), warps, options["num_stages"]),
        registers=registers,
        spill_bytes=spill,
        shared_bytes=shared,
        launchable=resident > 0,
        tensor_cores=not products or (code.uses_tensor_cores() and not plain),
        serialized=code.serialized(sum("warp_group_dot " in line for line in products)),
        main_loop=code.main_loop(elements * times, options.get("BLOCK_D", 1)),
        elements=elements,
        repetition=times,
        resident_blocks=resident,
        programs=programs,
        wave_use=wave_use(programs, max(1, resident) * MULTIPROCESSORS[arch]),
    )


def meta_heads(heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """`[1, H, tokens, D]` without memory, laid out `[B, tokens, H, D]` as a transformer's projections are."""
    return torch.empty(1, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
