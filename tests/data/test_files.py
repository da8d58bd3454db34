"""The user's files: every format, and a named place for everything that cannot be read."""

import gzip
import json
import sys
from datetime import date

import pytest

from data.documents import DataError
from data.problems import Problems
from data.sources.columns import Columns, to_day
from data.sources.files import MANY_FILES, domains_of, find_files, read_files
from data.sources.formats import CHUNK_BYTES
from data.sources.packing import MAX_BYTES, PACK_BYTES


def read(*paths, columns=None, problems=None):
    """Documents of the paths; a bad row raises unless `problems` counts it."""
    return list(read_files(list(paths), columns or Columns(), problems or Problems(strict=True)))


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


def test_pieces_of_one_text_are_a_group(tmp_path):
    """Of a file, or of what lies between two marks; what is one piece is its own."""
    long = "\n\n".join(f"Paragraph {number}. " + "word " * 60 for number in range(20))
    path = tmp_path / "a.txt"
    path.write_text(f"Short.<|endoftext|>{long}<|endoftext|>{long.replace('word', 'other')}")
    short, *pieces = read(path)
    assert short.group is None
    groups = [piece.group for piece in pieces]
    assert len(pieces) > 4 and len(set(groups)) == 2
    assert groups == sorted(groups, key=groups.index)


def test_a_file_without_text_is_counted(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n<|endoftext|>\n")
    problems = Problems()
    assert read(tmp_path / "empty.txt", problems=problems) == []
    assert problems.dropped == {"empty": {"no text": 1}}


def test_many_files_of_a_folder_are_one_domain(tmp_path):
    for folder, count in (("articles", MANY_FILES + 1), ("books", MANY_FILES)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{folder}-{number:02}.txt").write_text("Some text.")
    (tmp_path / "articles" / "named.jsonl").write_text('{"text": "t", "source": "wire"}\n{"text": "t"}\n')
    sources = [document.source for document in read(*find_files([str(tmp_path)]))]
    names = {f"books-{number:02}" for number in range(MANY_FILES)}
    assert set(sources) == {"articles", "wire"} | names
    assert sources.count("articles") == MANY_FILES + 2


def test_small_subfolders_count_in_their_folder(tmp_path):
    """Of one that was named as a whole; what is a domain already does not."""
    for day in range(MANY_FILES):
        (tmp_path / "wire" / f"2026-01-{day:02}").mkdir(parents=True)
        for number in range(2):
            (tmp_path / "wire" / f"2026-01-{day:02}" / f"{number}.txt").write_text("Some text.")
    (tmp_path / "prices.csv").write_text("text\nSome text.\n")
    paths = find_files([str(tmp_path)])
    assert set(domains_of(paths, [tmp_path]).values()) == {"wire", "prices"}
    assert set(domains_of(paths, [tmp_path / "wire"]).values()) == {"wire", "prices"}
    assert set(domains_of(paths, []).values()) == {"0", "1", "prices"}


def test_a_link_and_a_second_way_to_a_folder_make_no_domain(tmp_path):
    (tmp_path / "news").mkdir()
    (tmp_path / "blobs").mkdir()
    for number in range(MANY_FILES + 1):
        (tmp_path / "blobs" / f"{number}").write_text("Some text.")
        (tmp_path / "news" / f"{number}.txt").symlink_to(tmp_path / "blobs" / f"{number}")
    assert set(domains_of(find_files([str(tmp_path / "news")]), []).values()) == {"news"}
    (tmp_path / "news" / "0.txt").unlink()
    again = str(tmp_path / "blobs" / ".." / "news")
    assert "news" not in domains_of(find_files([str(tmp_path / "news"), again]), []).values()


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
@pytest.mark.parametrize("offset", [7, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 7])
def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(tmp_path, name, offset):
    content = bytearray(b" " * (CHUNK_BYTES + 50))
    content[:6] = b"text\n\n" if name == "a.csv" else b"  \n\n  "
    content[offset : offset + 2] = b"\xe9 "
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=rf"{name}, line 3: not UTF-8; byte 0xe9 at offset {offset};"):
        read(path)


def test_mixed_encodings_cost_a_line_each(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"Line {number}."}).encode() for number in range(6)]
    lines[1] = b'{"text": "caf\xe9"}'
    lines[4] = b'{"text": "\x80uro"}'
    path.write_bytes(b"\n".join(lines))
    problems = Problems()
    assert [document.text for document in read(path, problems=problems)] == [
        "Line 0.", "Line 2.", "Line 3.", "Line 5."
    ]  # fmt: skip
    assert problems.rows == {"not UTF-8": 2}
    assert problems.places["not UTF-8"] == [f"{path}, line 2", f"{path}, line 5"]


def test_another_encoding_throughout_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Prices rose.", encoding="utf-16")
    with pytest.raises(DataError, match="is utf-16, not UTF-8; convert it"):
        read(path)


def test_a_file_that_ends_inside_a_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xc3")
    with pytest.raises(DataError, match="offset 3;"):
        read(path)


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "news.jsonl.zst"
    packed = zstandard.compress(b'{"text": "One."}\n{"text": "Two."}\n' * 1000)
    path.write_bytes(packed)
    documents = read(path)
    assert len(documents) == 2000 and documents[1].text == "Two." and documents[0].source == "news"
    path.write_bytes(packed[: len(packed) // 2] + b"xxxx")
    with pytest.raises(DataError, match="broken zst file"):
        read(path)


def test_jsonl_columns_and_dates(tmp_path):
    path = tmp_path / "news.jsonl"
    records = [
        {"body": " One. ", "when": "2015-01-02T10:00:00Z", "available_at": "2015-01-05", "source": "wire"},
        {"body": "Two.", "when": "2015-01-03"},
        {"body": "Three.", "when": None},
        {"body": "   "},
        {"body": None, "id": 7},
        {"body": "Four.", "id": 8},
    ]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    problems = Problems(strict=True)
    columns = Columns(text=("body",), date=("when",))
    first, second, third, fourth = read(path, columns=columns, problems=problems)
    assert problems.dropped == {"news": {"no text": 2}}
    assert (first.id, fourth.id) == (None, "8")
    assert (first.text, first.source) == ("One.", "wire")
    assert (first.date, first.available_at) == (date(2015, 1, 2), date(2015, 1, 5))
    assert (second.source, second.date, second.available_at) == ("news", date(2015, 1, 3), date(2015, 1, 3))
    assert (third.date, third.available_at) == (None, None)


@pytest.mark.parametrize(
    ("stamp", "day"),
    [
        ("2015-01-31", 31),
        ("2015-01-31T23:59:59", 31),
        ("2015-01-31 17:03:00+00:00", 31),
        ("2015-01-30T23:00:00-05:00", 31),
        ("2015-02-01T05:00:00.000+09:00", 31),
        ("2015-01-31T22:15:00Z", 31),
    ],
)
def test_days_are_those_of_utc(stamp, day):
    """Releases of all time zones are compared with one cut."""
    assert to_day(stamp) == date(2015, 1, day)


@pytest.mark.parametrize("stamp", ["2015-01-31x", "31.01.2015", "0001-01-01T00:00+14:00", "2015-13-01", 2015])
def test_other_dates_are_refused(stamp):
    with pytest.raises(ValueError, match=r".+"):
        to_day(stamp)


def test_csv_with_quoted_newlines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('date,text\n2015-01-02,"two\n\nlines, one ""field"""\n2015-01-03,plain\n')
    assert [(d.text, d.date) for d in read(path)] == [
        ('two\n\nlines, one "field"', date(2015, 1, 2)),
        ("plain", date(2015, 1, 3)),
    ]


def test_a_bad_byte_costs_one_row_of_a_csv_whatever_its_lines(tmp_path):
    rows = [f'2015-01-02,"START{n}\n\nmiddle of {n}\nTAIL{n}"\n'.encode() for n in range(6)]
    rows[1] = rows[1].replace(b"middle", b"mi\xe9dle")
    rows[3] = rows[3].replace(b"TAIL", b"T\xc4IL")
    rows.append(b"3 May,x\n")
    path = tmp_path / "a.csv"
    path.write_bytes(b"date,text\n" + b"".join(rows))
    problems = Problems()
    texts = [document.text for document in read(path, problems=problems)]
    assert texts == [f"START{n}\n\nmiddle of {n}\nTAIL{n}" for n in (0, 2, 4, 5)]
    assert problems.places["not UTF-8"] == [f"{path}, line 8", f"{path}, line 17"]
    assert problems.places["date is not ISO"] == [f"{path}, line 26"]
    path.write_bytes("date,text,größe\n2015-01-02,x,y\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 1: not UTF-8; .*iconv"):
        read(path)


BAD_ROWS = [
    ("a.jsonl", '{"text": "x"}\n{"text": \n{"text": "y"}\n', "not JSON", 2),
    ("a.jsonl", '{"text": "x"}\n[1]\n{"text": "y"}\n', "not a JSON object", 2),
    ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000 + '\n{"text": "y"}\n', "not JSON", 2),
    ("a.jsonl", '{"text": "x"}\n{"body": "x"}\n{"text": "y"}\n', "no column 'text'", 2),
    ("a.jsonl", '{"text": 3}\n{"text": "x"}\n{"text": "y"}\n', "text is int", 1),
    ("a.jsonl", '{"text": "x"}\n{"text": "x", "date": "3 May"}\n{"text": "y"}\n', "date is not ISO", 2),
    ("a.jsonl", '{"text": "x"}\n{"text": "x", "date": "2015-01-02, revised"}\n{"text": "y"}\n', "date is", 2),
    ("a.jsonl", '{"text": "x", "date": 20150102}\n{"text": "x"}\n{"text": "y"}\n', "date is not ISO", 1),
    ("a.jsonl", '{"text": "a<|endoftext|>b"}\n{"text": "x"}\n{"text": "y"}\n', "text contains the res", 1),
    ("a.jsonl", '{"text": "\\ud800"}\n{"text": "x"}\n{"text": "y"}\n', "lone surrogate", 1),
    ("a.csv", "date,text\n2015-01-02,x\n2015-01-02,x,z\n2015-01-02\n2015-01-02,y\n", "another number", 3),
    ("a.csv", 'text\nx\n"a"b\ny\n', "broken CSV", 3),
]


@pytest.mark.parametrize(("name", "content", "kind", "line"), BAD_ROWS)
def test_bad_rows_are_counted_and_named_or_fatal(tmp_path, name, content, kind, line):
    path = tmp_path / name
    path.write_text(content)
    problems = Problems()
    assert [document.text for document in read(path, problems=problems)] == ["x", "y"]
    (found, count), *others = problems.rows.items()
    assert found.startswith(kind) and not others and count in (1, 2)
    assert problems.places[found][0] == f"{path}, line {line}"
    with pytest.raises(DataError, match=f"{name}, line {line}: {kind}"):
        read(path)


def test_an_open_quote_at_the_end_of_a_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\nx\n"open\n')
    problems = Problems()
    assert [document.text for document in read(path, problems=problems)] == ["x"]
    assert problems.rows == {"broken CSV": 1}


@pytest.mark.parametrize("content", ['{"body": "x"}\n', "body\nx\n"])
def test_a_file_without_the_column_is_an_error(tmp_path, content):
    path = tmp_path / ("a.jsonl" if content.startswith("{") else "a.csv")
    path.write_text(content)
    with pytest.raises(DataError, match=r"no column 'text' \(found: body; pass --text-column\)"):
        read(path, problems=Problems())


RECORDS = [{"body": f"Article {n}.", "id": n, "published": f"2015-01-{n % 28 + 1:02}"} for n in range(40)]


def table_of(tmp_path, suffix, records):
    path = tmp_path / f"desk{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif suffix == ".csv":
        lines = [",".join(map(str, record.values())) for record in records]
        path.write_text("\n".join([",".join(records[0]), *lines]) + "\n")
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_dates_under_another_name_are_an_error(tmp_path, suffix):
    """A random split in place of one by date would be a leak that nothing else sees."""
    path = table_of(tmp_path, suffix, RECORDS)
    message = "desk{}: no column 'date', but 'published' holds dates: pass --date-column published, or "
    with pytest.raises(DataError, match=message.format(suffix) + "--date-column none for undated text"):
        read(path, columns=Columns(text=("body",)))
    assert {d.available_at for d in read(path, columns=Columns(("body",), undated=True))} == {None}
    dated = read(path, columns=Columns(("text", "body"), ("when", "published")))
    assert len(dated) == 40 and dated[1].available_at == date(2015, 1, 2)
    with pytest.raises(DataError, match=r"no column 'when', but .* pass --date-column when published"):
        read(path, columns=Columns(("body",), ("when",)))


@pytest.mark.parametrize("stamp", ["31.01.2015", "1/31/2015 10:00", "Sat, 31 Jan 2015 10:00:00 GMT"])
def test_dates_of_another_form_are_an_error(tmp_path, stamp):
    path = table_of(tmp_path, ".jsonl", [record | {"published": stamp} for record in RECORDS])
    with pytest.raises(DataError, match="'published' holds dates that are not ISO: write them as 2015-01-31"):
        read(path, columns=Columns(("body",)))


def test_a_table_where_nothing_looks_like_a_date_is_named_with_its_columns(tmp_path):
    first = table_of(tmp_path, ".jsonl", [{"body": "Rates rose.", "id": 20150102, "n": "12345678"}] * 3)
    second = table_of(tmp_path, ".csv", [{"body": "10-K", "id": 3, "n": 0.5}] * 3)
    problems = Problems()
    read(first, second, columns=Columns(("body",), ("date",)), problems=problems)
    assert problems.warnings() == [
        f"{second}: no column 'date' (found: body, id, n), so its documents have no date (and 1 more)"
    ]
    with pytest.raises(DataError, match=r"no column 'day' \(found: body, id, n; pass --date-column, or"):
        read(second, columns=Columns(("body",), ("day",)))


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
        read(path, columns=Columns(text=("body",)))
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
        ("*.csv", "matches no file"),
        ("empty", "has no .txt"),
        ("a.md", "unknown kind"),
    ],
)
def test_find_files_errors(tmp_path, pattern, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match=message):
        find_files([str(tmp_path / pattern)])
