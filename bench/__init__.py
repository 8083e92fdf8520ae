"""Benchmarks of peftkern: what an adapted layer costs beyond its frozen base layer."""
