"""The page and the README's tables say what the result file says, losses included."""

import json
import re
from pathlib import Path

import pytest
import sample

from bench import readme, report
from bench.arms import LYCORIS
from bench.cases import ROTATIONS, SETS, TABLE
from bench.result import TARGETS, Result

ROOT = Path(__file__).parents[2]
NAME = "machine.json"


@pytest.fixture
def data():
    return sample.result("quick")


@pytest.fixture
def load(tmp_path):
    def write(data):
        (tmp_path / NAME).write_text(json.dumps(data))
        return Result.load(tmp_path / NAME)

    return write


@pytest.fixture
def page():
    pytest.importorskip("matplotlib")
    from bench import page

    return page


def _entry(data, case_id, arm):
    (found,) = [row["extra_info"] for row in data["benchmarks"] if row["name"] == f"test_layer[{case_id}-{arm}]"]
    return found


def test_targets_and_quick_set_are_the_same_cases():
    assert set(TARGETS["overhead"]) == {case.id for case in SETS["quick"]}
    assert {case.id for case in TABLE} <= {case.id for case in SETS["full"]}


def test_each_set_names_a_case_once():
    for cases in SETS.values():
        assert len({case.id for case in cases}) == len(cases)


def test_the_readmes_tables_are_those_of_the_committed_result():
    assert readme.check(ROOT / "README.md", ROOT / "bench" / "results") is None


def test_a_missed_target_is_marked_and_named(data, load):
    case = TABLE[1]
    _entry(data, case.id, "fast")["overhead"]["median_of_ratios"] = 1.149
    _entry(data, case.id, "auto")["overhead"]["median_of_ratios"] = 1.26
    (line,) = [line for line in readme.block(load(data)).splitlines() if line.startswith(f"| {case.title} |")]
    assert "**1.15** ✓" in line
    assert "**1.26** ✗ (target 1.25)" in line


def test_an_arm_that_was_refused_does_not_vanish(data, load, page):
    case = TABLE[0]
    data["benchmarks"] = [row for row in data["benchmarks"] if row["name"] != f"test_layer[{case.id}-auto]"]
    _entry(data, case.id, "frozen")["refused"] = {"auto": "its error is <too large>"}
    result = load(data)
    (line,) = [line for line in readme.block(result).splitlines() if line.startswith(f"| {case.title} |")]
    assert "refused" in line
    assert "its error is &lt;too large&gt;" in page.render(result)


def test_the_tables_go_between_the_markers_and_nowhere_else(data, load, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    result = load(data)
    readme.write(result, path)
    once = path.read_text()
    readme.write(result, path)
    assert path.read_text() == once
    assert once.startswith(f"before\n{readme.BEGIN}\n") and once.endswith(f"\n{readme.END}\nafter\n")
    assert "old" not in once
    assert readme.check(path, tmp_path) is None


def test_check_notices_a_table_edited_by_hand(data, load, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    readme.write(load(data), path)
    path.write_text(path.read_text().replace("✗", "✓", 1))
    assert "are not those of" in readme.check(path, tmp_path)


def test_check_notices_a_result_that_was_never_reported(data, load, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    assert readme.check(path, tmp_path) is None
    load(data)
    assert "has no tables" in readme.check(path, tmp_path)


@pytest.mark.parametrize("text", ["none", f"{readme.END}\n{readme.BEGIN}", f"{readme.BEGIN}"])
def test_missing_markers_are_named(text, data, load, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(readme.MarkersMissing, match="must hold one line"):
        readme.write(load(data), path)
    assert path.read_text() == text


def test_a_file_without_rows_is_named(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"datetime": "2026-01-02", "benchmarks": []}))
    with pytest.raises(ValueError, match="holds no rows"):
        Result.load(path)


def test_a_result_elsewhere_leaves_the_readme_alone(data, load, page, tmp_path, capsys):
    load(data)
    path = tmp_path / "README.md"
    path.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    assert report.main([str(tmp_path / NAME), "--readme", str(path)]) == 0
    assert path.read_text() == f"{readme.BEGIN}\n{readme.END}\n"
    assert "README left alone" in capsys.readouterr().out
    assert (tmp_path / "machine.html").exists()


def test_the_page_is_one_file_with_unique_ids_and_the_same_each_time(data, load, page):
    result = load(data)
    html = page.render(result)
    assert page.render(result) == html
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", html)
    assert "@import" not in html and "url(http" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_the_page_has_every_figure_of_every_arm(data, load, page):
    case = TABLE[2]
    entry = _entry(data, case.id, "exact")
    entry["overhead"]["median_of_ratios"] = 1.777
    entry["error"]["dx"] = 7.77e-5
    entry["gain"]["0.001"] = 0.77
    html = page.render(load(data))
    for text in ("<td>1.78</td>", "<td>7.8e-05</td>", "<td>77 %</td>"):
        assert text in html


def test_the_orthogonality_of_each_option_stands_beside_its_speed(data, load, page):
    case = next(case for case in ROTATIONS if case.kind == "oft")
    entry = _entry(data, case.id, "auto-terms6")
    entry["orthogonality_error"], entry["overhead"]["median_of_ratios"] = 4.4e-6, 1.37
    result = load(data)
    (line,) = [line for line in readme.block(result).splitlines() if line.startswith("| peftkern `auto`, 6 terms |")]
    assert line.startswith("| peftkern `auto`, 6 terms | 4e-6 | 1.37 |")
    assert "<td>peftkern, auto, 6 terms</td><td>4e-6</td><td>1.37</td>" in page.render(result)


def test_the_page_says_in_what_another_convention_differs(data, load, page):
    case = next(case for case in ROTATIONS if case.kind == "oft")
    _entry(data, case.id, "lycoris")["differs"] = "it rotates <outputs>"
    assert "it rotates &lt;outputs&gt;" in page.render(load(data))


def test_a_run_without_lycoris_has_no_column_for_it_and_says_why(data, load, page):
    assert "LyCORIS" in readme.block(load(data))
    data["benchmarks"] = [row for row in data["benchmarks"] if row["extra_info"].get("arm") not in LYCORIS]
    for case in ROTATIONS:
        _entry(data, case.id, "frozen")["not_available"] = dict.fromkeys(LYCORIS, "pip has no such thing")
    result = load(data)
    assert "LyCORIS" not in readme.block(result)
    html = page.render(result)
    assert "<th>LyCORIS</th>" not in html and "pip has no such thing" in html
