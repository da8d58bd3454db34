"""The user's files: every format, and a named place for everything that cannot be read."""

import gzip
import json
import sys
from datetime import date

import pytest

from data.documents import DataError
from data.sources.files import CHUNK_BYTES, MAX_BYTES, PACK_BYTES, Columns, find_files, read_files


def read(*paths, columns=None):
    return list(read_files(list(paths), columns or Columns()))


def test_text_is_packed_by_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {number}. " + "word " * 60 for number in range(60)]
    path = tmp_path / "finance_corpus.txt"
    path.write_bytes("\r\n\r\n".join(paragraphs).encode())
    documents = read(path)
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(p.strip() for p in paragraphs)
    assert all(PACK_BYTES <= len(document.text.encode()) <= MAX_BYTES for document in documents[:-1])
    assert {document.source for document in documents} == {"finance_corpus"}
    assert {document.available_at for document in documents} == {None}


def test_long_paragraphs_and_lines_are_cut_at_spaces(tmp_path):
    path = tmp_path / "a.txt"
    words = [f"word{number}" for number in range(300_000)]
    path.write_text(" ".join(words))
    assert path.stat().st_size > 2 * CHUNK_BYTES
    documents = read(path)
    assert " ".join(document.text.replace("\n", " ") for document in documents).split() == words
    assert max(len(document.text.encode()) for document in documents) <= MAX_BYTES


def test_lines_without_blank_lines_are_cut_between_lines(tmp_path):
    path = tmp_path / "a.txt"
    lines = [f"Article {number}. " + "word " * 100 for number in range(200)]
    path.write_text("\n".join(lines))
    documents = read(path)
    assert len(documents) > 10
    assert all(document.text.startswith("Article") for document in documents)


def test_end_of_text_marks_separate_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("First.<|endoftext|>Second,\n\nstill second.\n<|endoftext|>\n\nThird.<|endoftext|>")
    assert [document.text for document in read(path)] == ["First.", "Second,\n\nstill second.", "Third."]


def test_byte_order_mark_and_gzip(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfCaf\xc3\xa9."))
    documents = read(path)
    assert [document.text for document in documents] == ["Café."]
    assert documents[0].source == "a"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="broken gzip"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
@pytest.mark.parametrize("offset", [5, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 7])
def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path, name, offset):
    content = bytearray(b" " * (CHUNK_BYTES + 50))
    content[offset : offset + 2] = b"\xe9 "
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=rf"{name}: not UTF-8 at byte offset {offset} .*0xe9"):
        read(path)


def test_a_file_that_ends_inside_a_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xc3")
    with pytest.raises(DataError, match="byte offset 3 "):
        read(path)


def test_jsonl_columns_and_dates(tmp_path):
    path = tmp_path / "news.jsonl"
    records = [
        {"body": " One. ", "when": "2015-01-02T10:00:00Z", "available_at": "2015-01-05", "source": "wire"},
        {"body": "Two.", "when": "2015-01-03"},
        {"body": "Three.", "when": None},
        {"body": "   "},
        {"body": None},
    ]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    first, second, third = read(path, columns=Columns(text="body", date="when"))
    assert (first.text, first.source) == ("One.", "wire")
    assert (first.date, first.available_at) == (date(2015, 1, 2), date(2015, 1, 5))
    assert (second.source, second.date, second.available_at) == ("news", date(2015, 1, 3), date(2015, 1, 3))
    assert (third.date, third.available_at) == (None, None)


def test_csv_with_quoted_newlines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('date,text\n2015-01-02,"two\n\nlines, one ""field"""\n2015-01-03,plain\n')
    assert [(d.text, d.date) for d in read(path)] == [
        ('two\n\nlines, one "field"', date(2015, 1, 2)),
        ("plain", date(2015, 1, 3)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object, got list"),
        ("a.jsonl", '{"body": "x"}\n', r"no column 'text' \(found: body\); pass --text-column"),
        ("a.jsonl", '{"text": 3}\n', "holds int, expected text"),
        ("a.jsonl", '{"text": "x", "date": "3 May"}\n', "date '3 May' is not an ISO date"),
        ("a.jsonl", '{"text": "x", "date": 20150102}\n', "not an ISO date"),
        ("a.jsonl", '{"text": "a<|endoftext|>b"}\n', "reserved mark"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "lone surrogate"),
        ("a.csv", 'text\n"open\n', r"a\.csv, line \d: broken CSV"),
        ("a.csv", "body\nx\n", "no column 'text'"),
    ],
)
def test_unusable_records_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = {
        "text": ["One.", None, "Two."],
        "date": [date(2015, 1, 2), None, date(2016, 1, 2)],
        "other": [1, 2, 3],
    }
    parquet.write_table(arrow.table(table), path)
    assert [(d.text, d.available_at) for d in read(path)] == [
        ("One.", date(2015, 1, 2)),
        ("Two.", date(2016, 1, 2)),
    ]
    with pytest.raises(DataError, match="no column 'body'"):
        read(path, columns=Columns(text="body"))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")


def test_find_files(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.jsonl.gz", "deep/c.csv", "deep/readme.md"):
        (tmp_path / name).write_text("x")
    everything = [tmp_path / "a.jsonl.gz", tmp_path / "b.txt", tmp_path / "deep" / "c.csv"]
    assert find_files([str(tmp_path)]) == everything
    assert find_files([str(tmp_path / "**" / "*.csv"), str(tmp_path / "b.txt"), str(tmp_path / "b.txt")]) == [
        tmp_path / "b.txt",
        tmp_path / "deep" / "c.csv",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gone.txt", "does not exist"),
        ("*.csv", "does not exist"),
        ("empty", "has no .txt"),
        ("a.md", "unknown kind"),
    ],
)
def test_find_files_errors(tmp_path, pattern, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match=message):
        find_files([str(tmp_path / pattern)])
