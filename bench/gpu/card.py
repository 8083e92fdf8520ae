"""What the card is, and what it reaches: copy bandwidth, matrix products, the gap between two launches."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess

import torch

QUERY = (
    "name", "driver_version", "vbios_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "power.draw", "temperature.gpu", "ecc.mode.current", "mig.mode.current",
)  # fmt: skip
COPY_BYTES = tuple(2**power for power in (24, 26, 28, 30))
PRODUCT_SIZES = (2048, 4096, 8192)
# Name, dtype, whether fp32 products may use TF32.
PRODUCTS = (
    ("tensor_bf16", torch.bfloat16, False),
    ("tensor_fp16", torch.float16, False),
    ("tensor_tf32", torch.float32, True),
    ("fp32", torch.float32, False),
    ("fp64", torch.float64, False),
)
LONGEST_PRODUCT = 0.2  # seconds; larger sizes of a slow kind are left out


def smi(device: str = "0") -> dict[str, str]:
    """nvidia-smi's answers about one device; empty where there is no nvidia-smi or it does not answer.

    device: index or UUID. Its indices are not torch's where CUDA_VISIBLE_DEVICES is set.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    answers = {}
    for name in QUERY:
        # One by one: an unknown field of one driver must not take the others with it.
        command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader", f"--id={device}"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return answers
        if run.returncode == 0 and run.stdout.strip():
            answers[name] = run.stdout.splitlines()[0].strip()
    return answers


def properties() -> dict[str, object]:
    """Of torch's current device."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": getattr(p, "L2_cache_size", None),
    }


def describe() -> dict[str, object]:
    """Both, of torch's current device."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return smi("0" if uuid is None else f"GPU-{uuid}") | properties()


def slug(name: str) -> str:
    """The file name of a card's results."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower())) or "gpu"


def _median_seconds(device, call, repeats: int, rounds: int = 7) -> float:
    """Per call, of `repeats` calls in a row."""

    def several():
        for _ in range(repeats):
            call()

    call()
    return statistics.median(device.seconds([several], hold=2e-3)[0][0] for _ in range(rounds)) / repeats


def copy_rates(device, sizes=COPY_BYTES) -> list[dict[str, float]]:
    """Bytes read plus bytes written per second, by the size of the source."""
    rates = []
    for size in sizes:
        source = torch.ones(size // 4, dtype=torch.float32, device=device.kind)
        target = torch.empty_like(source)
        seconds = _median_seconds(device, lambda source=source, target=target: target.copy_(source), 5)
        rates.append({"bytes": size, "bytes_per_second": 2 * size / seconds})
    return rates


def product_rates(device, sizes=PRODUCT_SIZES) -> list[dict[str, object]]:
    """Flops per second of square products by torch's library, by kind and size."""
    rates = []
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for kind, dtype, tf32 in PRODUCTS:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            seconds = 0.0
            for n in sizes:
                if 8 * seconds > LONGEST_PRODUCT:
                    break
                # Random numbers: a product of zeros draws less power and runs faster.
                a, b = (torch.randn(n, n, device=device.kind).to(dtype) for _ in range(2))
                c = torch.empty_like(a)
                seconds = _median_seconds(device, lambda a=a, b=b, c=c: torch.mm(a, b, out=c), 3)
                rates.append({"kind": kind, "n": n, "flops_per_second": 2 * n**3 / seconds})
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return rates


def launch_gap(device) -> float:
    """Seconds from one tiny kernel to the next, of a queue that never runs dry."""
    one = torch.zeros(1, device=device.kind)
    return _median_seconds(device, lambda: one.add_(1), 200)


def peaks(device, copy_sizes=COPY_BYTES, product_sizes=PRODUCT_SIZES) -> dict[str, object]:
    """All of the above, with the best of each."""
    copies, products = copy_rates(device, copy_sizes), product_rates(device, product_sizes)
    best: dict[str, float] = {}
    for row in products:
        best[row["kind"]] = max(best.get(row["kind"], 0.0), row["flops_per_second"])
    # Small copies stay in the L2 cache: the largest one is the memory's.
    return {
        "copies": copies,
        "products": products,
        "copy_bytes_per_second": copies[-1]["bytes_per_second"],
        "flops_per_second": best,
        "launch_seconds": launch_gap(device),
    }
