"""Householder reflection adapters: one adapted layer against its frozen base layer."""

import pytest


def test_layer(row, arm, benchmark, replay, surroundings):
    if arm in row.absent:
        pytest.skip(f"not available: {row.absent[arm]}")
    if arm in row.refused:
        pytest.fail(row.refused[arm], pytrace=False)
    benchmark.group = row.case.id
    benchmark.extra_info.update(case=row.case.fields(), arm=arm, **row.info[arm], **surroundings)
    if arm == "frozen":
        benchmark.extra_info.update(not_available=row.absent, refused=row.refused)
    replay(benchmark, list(row.times[arm].values()))
