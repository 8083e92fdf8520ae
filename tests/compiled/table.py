"""The committed figures: reading, comparing with slack, writing."""

import fcntl
import json
from pathlib import Path

FILE = Path(__file__).with_name("table.json")
# Patch releases of a compiler differ by up to 9 registers in one kernel and pad shared memory differently. Minor
# releases differ by more (Triton 3.6 and 3.9: 24 registers, 8 KB, another number of variants), so each is held to the
# rules of cases.py, and to the table only if it wrote it.
REGISTERS, SHARED = 16, 2048


def read():
    return json.loads((FILE.exists() and FILE.read_text()) or "{}")


def minor(version):
    """ "3.9.0" -> "3.9"."""
    return ".".join(version.split(".")[:2])


def written_by(compiler, version):
    """Whether this version of a compiler wrote its part of the table."""
    return read().get("compilers", {}).get(compiler) == minor(version)


def worse(row, now):
    """What figures have lost against a row of the table, as sentences."""
    lines = []
    if now["registers"] > row["registers"] + REGISTERS:
        lines.append(f"{now['registers']} registers, the table has {row['registers']}")
    if now["shared"] > row["shared"] + SHARED:
        lines.append(f"{now['shared']} bytes of shared memory, the table has {row['shared']}")
    if now["spilled"] > row["spilled"]:
        lines.append(f"{now['spilled']} bytes spilled, the table has {row['spilled']}")
    if row["tensor"] and not now["tensor"]:
        lines.append(f"no tensor cores, the table has {' '.join(row['tensor'])}")
    if now["widest_in_loops"] < row["widest_in_loops"]:
        lines.append(f"loops move {now['widest_in_loops']} bytes per access, the table has {row['widest_in_loops']}")
    return lines


def write(compiler, version, target, name, rows):
    """Put the rows {kernel: figures} of one case into the table, whatever other processes write."""
    # The table is its own lock: a lock file that somebody removes would let two in at once.
    with open(FILE, "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = read()
        table.setdefault("compilers", {})[compiler] = minor(version)
        table.setdefault(compiler, {}).setdefault(target, {})[name] = rows
        FILE.write_text(_dumped(table))


def _dumped(value, indent=0):
    """JSON with one line per kernel."""
    if not isinstance(value, dict) or "registers" in value:
        return json.dumps(value)
    space = " " * (indent + 1)
    inner = ",\n".join(f"{space}{json.dumps(k)}: {_dumped(v, indent + 1)}" for k, v in sorted(value.items()))
    return "{\n" + inner + "\n" + " " * indent + "}" + ("\n" if indent == 0 else "")
