"""Kernels compiled for real architectures without a driver, and what their machine code says: level 3 of the tests.

`launches(target, call)` runs a call of the package on CPU tensors with Triton's driver replaced by a stand-in: every
launch compiles what a device of that architecture would run, options and specializations included, and executes
nothing. `machine_code.py` reads registers, spills, shared memory, tensor-core instructions and the widest access to
global memory inside loops out of the binary. `table.json` holds these figures for the calls of `cases.py`;
`pytest tests/compiled --write-compiled` writes it.
"""
