"""Level 5: everything on a real GPU, in ten minutes. `python -m bench.gpu --help`."""
