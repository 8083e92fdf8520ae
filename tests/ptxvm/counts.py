"""What a launch did, counted per instruction of the compiled code."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .program import Program

# Same layout as OpCount in engine/vm.h.
_COUNTS = ("warps", "lanes", "bytes", "sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts")
COUNTER = np.dtype([(name, "u8") for name in _COUNTS])
_READS = ("ld", "ldu", "cp", "atom", "red")
_WRITES = ("st", "atom", "red")


@dataclass(frozen=True)
class Line:
    """One PTX instruction that touched memory."""

    line: int
    text: str
    source: tuple[str, int] | None
    requests: int  # executions by a warp
    bytes: int
    sectors: int  # of 32 bytes, in global memory
    ideal_sectors: int  # for the same bytes without gaps
    extra_wavefronts: int  # passes over shared memory beyond the conflict-free ones

    def __str__(self):
        where = f"  ({self.source[0]}:{self.source[1]})" if self.source else ""
        return (
            f"line {self.line}: {self.text}{where}: {self.requests} requests, {self.bytes} bytes, {self.sectors} "
            f"sectors (least {self.ideal_sectors}), {self.extra_wavefronts} bank conflicts"
        )


@dataclass(frozen=True)
class Traffic:
    """What a launch moved of one tensor, in bytes. `unique`: counted in 32-byte sectors, each once."""

    name: str
    size: int
    read: int
    written: int
    sectors_read: int
    sectors_written: int
    unique_read: int
    unique_written: int


class Counts:
    """Counters of one launch.

    instructions          executed by warps (thread_instructions: by threads)
    global_bytes_read     requested by threads; global_bytes_written likewise. Atomics count in both.
    global_sectors_read   32-byte sectors that the warps' requests touched, global_sectors_written likewise
    global_requests       global accesses by warps; sectors_per_request their mean number of sectors
    bank_conflicts        extra wavefronts of shared-memory accesses; shared_wavefronts all of them
    barriers              block barriers, counted once per block that passes
    flops                 by kind: fp32, fp16, bf16, fp64, special, tensor_bf16, tensor_fp16, tensor_tf32, tensor_int8,
                          tensor_fp8, tensor_fp64; an fma counts 2
    opcodes               warp executions by opcode with modifiers
    tensors               Traffic per tensor argument
    """

    def __init__(self, program: Program, raw: np.ndarray, tensors: list[Traffic], warps: int):
        self._program, self._raw = program, raw
        self.tensors = {t.name: t for t in tensors}
        kinds = np.array([i.opcode for i in program.instructions])
        self.instructions = int(raw["warps"].sum())
        self.thread_instructions = int(raw["lanes"].sum())
        self.global_bytes_read = int(raw["bytes"][np.isin(kinds, _READS)].sum())
        self.global_bytes_written = int(raw["bytes"][np.isin(kinds, _WRITES)].sum())
        self.global_sectors_read = int(raw["sectors"][np.isin(kinds, _READS)].sum())
        self.global_sectors_written = int(raw["sectors"][np.isin(kinds, _WRITES)].sum())
        self.global_requests = int(raw["warps"][raw["bytes"] > 0].sum())
        self.shared_wavefronts = int(raw["wavefronts"].sum())
        self.bank_conflicts = int((raw["wavefronts"] - raw["ideal_wavefronts"]).sum())
        barrier = np.array([i.opcode in ("bar", "barrier") and "warp" not in i.modifiers for i in program.instructions])
        self.barriers = int(raw["warps"][barrier].sum()) // max(warps, 1)
        self.flops: Counter[str] = Counter()
        self.opcodes: Counter[str] = Counter()
        for instruction, flops, count in zip(program.instructions, program.flops, raw, strict=True):
            if count["warps"]:
                self.opcodes[instruction.name] += int(count["warps"])
            if flops and count["lanes"]:
                self.flops[flops[0]] += flops[1] * int(count["lanes"])

    @property
    def global_bytes(self) -> int:
        """Bytes read and written."""
        return self.global_bytes_read + self.global_bytes_written

    @property
    def unique_bytes(self) -> int:
        """Bytes of distinct sectors read plus those written: the least that must cross the memory bus."""
        return sum(t.unique_read + t.unique_written for t in self.tensors.values())

    @property
    def sectors_per_request(self) -> float:
        return (self.global_sectors_read + self.global_sectors_written) / max(self.global_requests, 1)

    @property
    def uncoalesced(self) -> float:
        """Sectors moved over the least number for the same bytes: 1 is perfect."""
        return int(self._raw["sectors"].sum()) / max(int(self._raw["ideal_sectors"].sum()), 1)

    def lines(self, worst: str | None = None) -> list[Line]:
        """Every instruction that touched global or shared memory; `worst`: only those with an excess of that kind
        ("sectors" or "conflicts"), the greatest first."""
        found = []
        for instruction, count in zip(self._program.instructions, self._raw, strict=True):
            if count["bytes"] or count["wavefronts"]:
                warps, bytes_, sectors, ideal = (int(count[k]) for k in ("warps", "bytes", "sectors", "ideal_sectors"))
                extra = int(count["wavefronts"]) - int(count["ideal_wavefronts"])
                place = (instruction.line, instruction.text, instruction.source)
                found.append(Line(*place, warps, bytes_, sectors, ideal, extra))
        if worst == "sectors":
            return sorted((x for x in found if x.sectors > x.ideal_sectors), key=lambda x: x.ideal_sectors - x.sectors)
        if worst == "conflicts":
            return sorted((x for x in found if x.extra_wavefronts), key=lambda x: -x.extra_wavefronts)
        return found

    def __str__(self):
        flops = ", ".join(f"{k} {v:,}" for k, v in sorted(self.flops.items())) or "none"
        tensors = "".join(
            f"\n  {t.name}: {t.size:,} bytes; read {t.read:,} (distinct {t.unique_read:,}), written {t.written:,} "
            f"(distinct {t.unique_written:,})"
            for t in self.tensors.values()
        )
        return (
            f"{self.instructions:,} warp instructions, {self.barriers} barriers; flops: {flops}\n"
            f"global: {self.global_bytes_read:,} bytes read, {self.global_bytes_written:,} written, "
            f"{self.sectors_per_request:.1f} sectors per request, {self.uncoalesced:.2f} x the least sectors\n"
            f"shared: {self.shared_wavefronts:,} wavefronts, {self.bank_conflicts:,} of them bank conflicts{tensors}"
        )
