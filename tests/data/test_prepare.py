"""python -m data.prepare: what it writes, its repeatability, and one clear line for every mistake."""

import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest

from data import prepare as program
from data import tokens
from data.card import is_complete
from data.documents import SPLITS, read_jsonl, split_by_hash
from data.prepare import Config, main, prepare
from data.problems import Problems
from data.sources.packing import read_texts
from tapelm import Tokenizer

WORDS = ["rates", "rose", "fell", "bank", "credit", "growth", "prices", "market", "demand", "yield"]


@pytest.fixture(autouse=True)
def small_splits(monkeypatch, request):
    """The corpora of these tests are small; only one test is about the warning of that."""
    if request.node.name != "test_what_is_left_out_is_printed_and_small_splits_are_warned_of":
        for name in ("FEW_DOCUMENTS", "FEW_BLOCKS", "FEW_ROWS"):
            monkeypatch.setattr(program, name, 0)


def write_corpus(path, *, documents=300, dated=True, words=60):
    generator = random.Random(5)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            record = {"text": f"Note {number}: " + " ".join(generator.choices(WORDS, k=words))}
            if dated:
                record["date"] = str(date(2010, 1, 1) + timedelta(days=7 * number))
            file.write(json.dumps(record) + "\n")
    return path


def config_for(tmp_path, **changes):
    settings = {"source": ("files",), "vocab_size": 300, "min_block": 64, "out": tmp_path / "out", **changes}
    settings.setdefault("input", (str(write_corpus(tmp_path / "news.jsonl")),))
    return Config(**settings)


def hashes(directory):
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(monkeypatch, capsys, *arguments):
    """Exit code, standard output, and the lines of standard error that begin a message."""
    monkeypatch.setattr(sys, "argv", ["data.prepare", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    marks = ("error:", "warning:", "interrupted", "Traceback")
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith(marks)]


def test_dated_documents(tmp_path):
    config = config_for(tmp_path)
    card = prepare(config)
    out = config.out
    documents = {split: list(read_jsonl(out / "documents" / f"{split}.jsonl")) for split in SPLITS}
    days = {split: [document.available_at for document in documents[split]] for split in SPLITS}
    assert max(days["train"]) < min(days["val"]) <= max(days["val"]) < min(days["test"])
    assert (min(days["val"]) - max(days["train"])).days > config.embargo_days
    assert sum(map(len, documents.values())) + card["left_out_documents"] == 300
    assert card["split_dates"]["validation_from"] == str(min(days["val"]))

    tokenizer = Tokenizer.load(out / "tokenizer.json")
    for split in SPLITS:
        manifest = json.loads((out / split / "manifest.json").read_text())
        tally = card["splits"][split]["news"]
        tokens = sum(len(tokenizer.encode(document.text)) + 1 for document in documents[split])
        assert manifest["tokens"] == tally["tokens"] == tokens
        assert manifest["documents"] == tally["documents"] == len(documents[split])
        assert manifest["end_of_text"] == tokenizer.special_tokens["<|endoftext|>"]
        assert tally["bytes"] == sum(len(document.text.encode()) for document in documents[split])
        assert (tally["first"], tally["last"]) == (str(days[split][0]), str(days[split][-1]))

    assert is_complete(out, card)
    assert {name: entry["sha256"] for name, entry in card["outputs"].items()} == {
        name: digest for name, digest in hashes(out).items() if not name.startswith("data_card")
    }
    assert json.loads((out / "data_card.json").read_text()) == card
    assert card["warnings"] == []


def test_the_tokenizer_sees_nothing_but_train(tmp_path):
    config = config_for(tmp_path)
    path = Path(config.input[0])
    lines = path.read_text().splitlines()
    lines[-15:] = [line.replace('"Note', '"' + "Zqzqzqzqzq" * 50) for line in lines[-15:]]
    path.write_text("\n".join(lines))
    prepare(config)
    train = [document.text for document in read_jsonl(config.out / "documents" / "train.jsonl")]
    expected = Tokenizer.train(train, 300)
    expected.save(tmp_path / "expected.json")
    assert (config.out / "tokenizer.json").read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert "qzq" not in (config.out / "tokenizer.json").read_text()


def test_two_runs_give_the_same_bytes(tmp_path):
    first = config_for(tmp_path)
    second = config_for(tmp_path, out=tmp_path / "again")
    assert prepare(first) == prepare(second)
    assert hashes(first.out) == hashes(second.out)


def test_rerun_is_up_to_date_and_other_settings_need_force(tmp_path, monkeypatch, capsys):
    config = config_for(tmp_path)
    arguments = ["--source", "files", "--input", config.input[0], "--out", config.out, "--min-block", "64"]
    code, out, messages = run(monkeypatch, capsys, *arguments, "--vocab-size", "300")
    assert (code, messages) == (0, []) and "news" in out
    before = hashes(config.out)
    stamp = (config.out / "data_card.json").stat().st_mtime_ns

    monkeypatch.setattr(sys, "argv", ["data.prepare", *map(str, arguments), "--vocab-size", "300"])
    main()
    assert "up to date" in capsys.readouterr().err
    assert (config.out / "data_card.json").stat().st_mtime_ns == stamp

    code, _, messages = run(monkeypatch, capsys, *arguments, "--vocab-size", "310")
    assert code == 2 and len(messages) == 1
    assert "vocab_size was 300, now 310" in messages[0] and "--force" in messages[0]
    assert hashes(config.out) == before

    code, _, messages = run(monkeypatch, capsys, *arguments, "--vocab-size", "310", "--force")
    assert code == 0 and hashes(config.out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["news.jsonl", "out"]


def test_changed_input_needs_force_and_a_damaged_directory_is_rebuilt(tmp_path):
    config = config_for(tmp_path)
    prepare(config)
    before = hashes(config.out)
    (config.out / "tokenizer.json").unlink()
    prepare(config)
    assert hashes(config.out) == before
    shard = config.out / "train" / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    prepare(config)
    assert hashes(config.out) == before
    with open(config.input[0], "a") as file:
        file.write('{"text": "one more", "date": "2016-01-01"}\n')
    with pytest.raises(program.DataError, match="its inputs differ"):
        prepare(config)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device", "shard")])
def test_a_run_that_stops_leaves_the_old_data(tmp_path, monkeypatch, capsys, failure):
    config = config_for(tmp_path)
    prepare(config)
    before = hashes(config.out)

    def stop(*_, **__):
        raise failure

    monkeypatch.setattr(tokens, "write_shards", stop)
    arguments = ["--source", "files", "--input", config.input[0], "--out", config.out, "--force"]
    code, _, messages = run(monkeypatch, capsys, *arguments, "--vocab-size", "290")
    assert code == (130 if failure is KeyboardInterrupt else 2)
    assert len(messages) == 1 and "nothing was replaced" in messages[0]
    assert hashes(config.out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["news.jsonl", "out"]


SLOW = """
import signal, sys, time
from data import prepare, tokens

def write_shards(*_, **__):
    print("writing", flush=True)
    time.sleep(60)

tokens.write_shards = write_shards
prepare.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_old_data(tmp_path, number):
    config = config_for(tmp_path)
    prepare(config)
    before = hashes(config.out)
    arguments = ["--source", "files", "--input", config.input[0], "--out", config.out, "--force"]
    command = [sys.executable, "-c", SLOW, *map(str, arguments), "--vocab-size", "290", "--min-block", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        messages = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted: nothing was replaced" in messages
    assert "Traceback" not in messages
    assert hashes(config.out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["news.jsonl", "out"]


def test_what_comes_into_the_data_meanwhile_is_not_lost(tmp_path, monkeypatch):
    config = config_for(tmp_path)
    prepare(config)
    write = tokens.write_shards

    def slow(*arguments, **options):
        (config.out / "notes.txt").write_text("years of work")
        return write(*arguments, **options)

    monkeypatch.setattr(tokens, "write_shards", slow)
    with pytest.raises(program.DataError, match=r"holds notes\.txt, which would be lost"):
        prepare(replace(config, force=True))
    assert (config.out / "notes.txt").read_text() == "years of work"
    other = replace(config, out=tmp_path / "other")
    monkeypatch.setattr(
        tokens,
        "write_shards",
        lambda *a, **o: (shutil.copytree(config.out, other.out, dirs_exist_ok=True), write(*a, **o))[1],
    )
    with pytest.raises(program.DataError, match="filled by another process meanwhile"):
        prepare(other)


def test_an_interruption_after_the_new_data_is_in_place_says_so(tmp_path, monkeypatch, capsys):
    config = config_for(tmp_path)
    prepare(config)
    remove = shutil.rmtree

    def interrupted(path, **options):
        if ".old-" in Path(path).name:
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    arguments = ["--source", "files", "--input", config.input[0], "--out", config.out, "--force"]
    code, _, messages = run(monkeypatch, capsys, *arguments, "--vocab-size", "290", "--min-block", "64")
    assert code == 130 and len(messages) == 1
    assert "holds the new data" in messages[0] and ".old-" in messages[0]
    assert Tokenizer.load(config.out / "tokenizer.json").vocab_size == 290


def test_marks_and_surrogates_that_cleaning_brings_to_light_are_bad_rows(tmp_path):
    path = write_corpus(tmp_path / "wire.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        for record in (
            {"text": "a <|endof\u00adtext|> b"},
            {"text": "x", "source": "\ud800x"},
            {"text": "y", "source": "s", "id": "\udfff"},
        ):
            file.write(json.dumps(record | {"date": "2013-01-01"}) + "\n")
    config = config_for(tmp_path, input=(str(path),))
    rows = prepare(config)["bad_rows"]
    assert rows["text contains the reserved mark <|endoftext|>"]["first"] == [f"{path}, line 301"]
    assert rows["lone surrogate"] == {"count": 2, "first": [f"{path}, line 302", f"{path}, line 303"]}
    with pytest.raises(program.DataError, match="line 301: text contains the reserved mark"):
        prepare(replace(config, strict=True, force=True))


def test_what_was_lost_is_told_when_nothing_is_left(tmp_path):
    path = tmp_path / "news.csv"
    path.write_bytes(b"date,text\n" + b"2015-01-02,caf\xe9\n" * 50)
    with pytest.raises(program.DataError, match=r"50 not UTF-8; the first: .*news\.csv, line 2"):
        prepare(config_for(tmp_path, input=(str(path),)))


def test_dates_that_are_still_to_come_are_warned_of_every_time(tmp_path, monkeypatch, capsys):
    path = write_corpus(tmp_path / "news.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        for number in range(40):
            file.write(
                json.dumps({"text": f"Later {number} " * 60, "date": f"2199-01-{1 + number % 28:02}"}) + "\n"
            )
    arguments = ["--source", "files", "--input", path, "--out", tmp_path / "out", "--min-block", "64"]
    arguments += ["--validation-from", "2014-01-01", "--test-from", "2015-01-01"]
    for _ in range(2):
        code, _, messages = run(monkeypatch, capsys, *arguments, "--vocab-size", "300")
        assert code == 0 and "dated up to 2199-01-28, after today" in messages[0]


def test_files_of_the_user_in_the_data_are_not_lost(tmp_path):
    config = config_for(tmp_path)
    prepare(config)
    (config.out / "documents" / "thesis.txt").write_text("years of work")
    with pytest.raises(program.DataError, match=r"holds documents/thesis\.txt, which would be lost"):
        prepare(replace(config, force=True))
    assert (config.out / "documents" / "thesis.txt").read_text() == "years of work"
    (config.out / "documents" / "thesis.txt").unlink()
    prepare(replace(config, force=True))


def test_outputs_are_not_read_as_inputs(tmp_path):
    config = config_for(tmp_path)
    prepare(config)
    shutil.copytree(config.out, tmp_path / "out.tmp-0a1b2c3d")
    shutil.copytree(config.out, tmp_path / "out.old-0a1b2c3d")
    made = prepare(replace(config, input=(str(tmp_path),), force=True))
    assert list(made["inputs"]) == list(map(str, config.input))


def test_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    config = config_for(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code, _, messages = run(
            monkeypatch, capsys, "--source", "files", "--input", config.input[0], "--out", config.out
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and len(messages) == 1 and "File too large" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["news.jsonl"]


def test_undated_documents_are_split_by_hash_with_a_warning(tmp_path, monkeypatch, capsys):
    path = tmp_path / "finance_corpus.txt"
    generator = random.Random(1)
    path.write_text("\n\n".join(" ".join(generator.choices(WORDS, k=400)) for _ in range(300)))
    code, out, messages = run(
        monkeypatch,
        capsys,
        "--source",
        "files",
        "--input",
        path,
        "--out",
        tmp_path / "out",
        "--min-block",
        "64",
    )
    assert code == 0 and "finance_corpus" in out and "no dates" in out
    assert len(messages) == 1 and messages[0].startswith("warning: 300 of 300 documents have no date")
    assert next(read_jsonl(tmp_path / "out" / "documents" / "val.jsonl")).available_at is None


def test_the_page_of_many_domains_has_a_legend_that_fits(tmp_path):
    for number in range(15):
        path = write_corpus(tmp_path / f"desk{number:02}.jsonl", documents=30)
        path.write_text(path.read_text().replace("Note", f"Of {number}, note"))
    inputs = (str(tmp_path / "desk*.jsonl"),)
    card = prepare(config_for(tmp_path, input=inputs, deduplicate=False, embargo_days=0))
    assert len(card["splits"]["train"]) == 15
    page = (tmp_path / "out" / "data_card.html").read_text()
    plot = page[page.index("<svg") : page.index("</svg>")]
    assert plot.count("desk") == 10 and plot.count("other domains") == 1


def write_articles(folder, *, files, pieces=5):
    """Text files, every piece of which ends with the number of its file."""
    folder.mkdir()
    generator = random.Random(2)
    for number in range(files):
        paragraphs = (" ".join(generator.choices(WORDS, k=400)) for _ in range(pieces))
        (folder / f"{number}.txt").write_text("\n\n".join(f"{text} of{number}" for text in paragraphs))
    return folder


def test_an_undated_text_lies_in_one_split(tmp_path, monkeypatch, capsys):
    """Unless they are so few that a split might get none, which is told."""
    options = ("--source", "files", "--min-block", "64", "--out")
    many = write_articles(tmp_path / "many", files=150)
    code, out, messages = run(monkeypatch, capsys, *options, tmp_path / "data", "--input", many)
    assert code == 0 and "pieces" not in messages[0] and "many" in out
    splits = {}
    for split in SPLITS:
        for document in read_jsonl(tmp_path / "data" / "documents" / f"{split}.jsonl"):
            splits.setdefault(document.text.split()[-1], set()).add(split)
    assert len(splits) == 150 and all(len(found) == 1 for found in splits.values())
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.txt").write_text(
        "\n\n".join((many / f"{number}.txt").read_text() for number in range(50))
    )
    code, _, messages = run(monkeypatch, capsys, *options, tmp_path / "few-data", "--input", tmp_path / "few")
    assert code == 0
    assert "; pieces of 1 text lie in more than one split, as fewer than 90" in messages[0]


def test_texts_with_one_beginning_are_divided_and_a_large_one_is_torn(tmp_path, monkeypatch, capsys):
    """A header that all files share is no reason to keep them together, nor may one file fill a split."""
    options = ("--source", "files", "--min-block", "64", "--no-deduplicate", "--out")
    same = write_articles(tmp_path / "same", files=120)
    for path in same.iterdir():
        path.write_text("rates " * 500 + "\n\n" + path.read_text())
    code, _, messages = run(monkeypatch, capsys, *options, tmp_path / "a", "--input", same)
    assert code == 0 and "pieces" not in messages[0]
    card = json.loads((tmp_path / "a" / "data_card.json").read_text())
    assert 0.8 < card["splits"]["train"]["same"]["documents"] / (5 * 120) < 0.98
    path = write_articles(tmp_path / "book", files=1, pieces=260) / "0.txt"
    text = path.read_text()
    for number in range(200):  # until its hash would put it into a held-out split
        path.write_text(f"{text}\n\nEdition {number}")
        if split_by_hash(next(read_texts(path, Problems()))[1]) != "train":
            break
    inputs = ("--input", same, path.parent, "--split", "hash")
    code, _, messages = run(monkeypatch, capsys, *options, tmp_path / "b", *inputs)
    assert code == 0 and messages[0].startswith("warning: split by hash as asked")
    assert "lie in more than one split" in messages[0]


def test_cuts_are_told_where_they_split_or_leave_out_something(tmp_path, monkeypatch, capsys):
    undated, dated = tmp_path / "undated.jsonl", tmp_path / "dated.jsonl"
    write_corpus(undated, dated=False)
    dated.write_text(json.dumps({"text": "A note of late.", "date": "2024-06-20"}) + "\n")
    options = ("--source", "files", "--min-block", "64", "--date-column", "date", "none", "--out")
    cuts = ("--validation-from", "2024-01-01", "--test-from", "2024-03-01", "--until", "2024-06-01")
    _, out, _ = run(monkeypatch, capsys, *options, tmp_path / "a", "--input", undated, *cuts)
    assert "validation from" not in out
    code, out, _ = run(monkeypatch, capsys, *options, tmp_path / "b", "--input", undated, dated, *cuts)
    assert code == 0 and "1 left out" in out and "validation from 2024-01-01" in out


def test_a_vocabulary_that_text_does_not_fill_is_told(tmp_path, monkeypatch, capsys):
    arguments = ("--source", "files", "--input", write_corpus(tmp_path / "news.jsonl"), "--min-block", "64")
    _, out, _ = run(monkeypatch, capsys, *arguments, "--out", tmp_path / "a", "--vocab-size", "60000")
    size = Tokenizer.load(tmp_path / "a" / "tokenizer.json").vocab_size
    assert f"vocabulary {size:,} of at most 60,000; tokens" in out
    _, out, _ = run(monkeypatch, capsys, *arguments, "--out", tmp_path / "b", "--vocab-size", "300")
    assert "vocabulary 300; tokens" in out


def test_dates_on_the_command_line(tmp_path, monkeypatch, capsys):
    path = write_corpus(tmp_path / "news.jsonl")
    code, _, messages = run(
        monkeypatch,
        capsys,
        *("--source", "files", "--input", path, "--out", tmp_path / "out", "--min-block", "64"),
        *("--validation-from", "2014-01-01", "--test-from", "2014-08-01", "--until", "2015-01-01"),
    )
    assert (code, messages) == (0, [])
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())
    assert card["split_dates"] == {
        "validation_from": "2014-01-01",
        "test_from": "2014-08-01",
        "until": "2015-01-01",
        "embargo_days": 31,
    }
    assert card["splits"]["test"]["news"]["last"] < "2015-01-01"
    assert card["left_out_documents"] > 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--source files --input gone.txt", "gone.txt does not exist"),
        ("--source files", "needs --input"),
        ("--source files --input empty.txt", "the corpus is empty"),
        ("--source files --input blank.jsonl", "the corpus is empty"),
        ("--source files --input latin1.txt", "the corpus is empty"),
        (
            "--source files --input latin1.txt --strict",
            "latin1.txt, line 1: not UTF-8; byte 0xe9 at offset 3",
        ),
        ("--source files --input news.jsonl --weights news", "--weights takes DOMAIN=NUMBER"),
        ("--source files --input news.jsonl --weights news=-1", "--weights takes DOMAIN=NUMBER"),
        ("--source files --input news.jsonl --weights press=2", "train has no domain 'press'; it has news"),
        ("--source files files --input news.jsonl", "one or more different sources"),
        ("--source files --input news.jsonl --language en", "the corpus is empty"),
        ("--source files --input small.txt", "split is empty: the corpus has"),
        ("--source files --input news.jsonl --min-block 5000", "a block of 5000 needs 5001"),
        ("--source files --input news.jsonl --vocab-size 100", "--vocab-size must be at least 257"),
        ("--source files --input news.jsonl --min-block 0", "--min-block must be at least 1"),
        ("--source files --input news.jsonl --test-from 2012-01-01", "go together"),
        (
            "--source files --input news.jsonl --until 2001-01-01",
            "no document was released before --until 2001-01-01",
        ),
        ("--source files --input news.jsonl --split hash --until 2015-01-01", "go with --split date"),
        ("--source files --input news.jsonl --embargo-days -1", "embargo_days must not be negative"),
        (
            "--source files --input news.jsonl --until 2005",
            "--until: expected a date as YYYY-MM-DD, got '2005';",
        ),
        ("--source files --input news.jsonl --embargo-days 200", "split is empty: move --validation-from"),
        ("--source packages --input news.jsonl", "--input goes with --source files"),
        ("--source files --input news.jsonl --out small.txt", "is a file"),
        ("--source files --input news.jsonl --out .", "holds other files"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "news.jsonl")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n\n')
    (tmp_path / "latin1.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "small.txt").write_text("A short corpus.")
    before = hashes(tmp_path)
    code, _, messages = run(monkeypatch, capsys, "--out", "out", *arguments.split())
    assert code == 2
    assert len(messages) == 1 and messages[0].startswith("error: ") and message in messages[0]
    assert hashes(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_misnamed_date_column_is_no_random_split(tmp_path, monkeypatch, capsys):
    path = write_corpus(tmp_path / "desk.jsonl")
    path.write_text(path.read_text().replace('"date"', '"published"').replace('"text"', '"body"'))
    arguments = ("--source", "files", "--input", path, "--out", tmp_path / "out", "--min-block", "64")
    arguments += ("--text-column", "text", "body")
    code, _, messages = run(monkeypatch, capsys, *arguments)
    assert code == 2 and len(messages) == 1
    assert messages[0].startswith(f"error: {path}: no column 'date', but 'published' holds dates: pass")
    code, _, messages = run(monkeypatch, capsys, *arguments, "--date-column", "none")
    assert code == 0 and messages[0].startswith("warning: 300 of 300 documents have no date")
    write_corpus(tmp_path / "wire.jsonl")
    arguments += ("--input", path, tmp_path / "wire.jsonl", "--date-column", "date", "published", "--force")
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())
    assert card["undated_documents"] == 0 and card["settings"]["date_column"] == "date published"


def test_what_is_left_out_is_printed_and_small_splits_are_warned_of(tmp_path, monkeypatch, capsys):
    path = write_corpus(tmp_path / "news.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *lines[10:15]]))
    arguments = ("--source", "files", "--input", path, "--out", tmp_path / "out", "--min-block", "64")
    code, out, messages = run(monkeypatch, capsys, *arguments, "--until", "2015-06-01")
    assert code == 0
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())
    cuts = card["split_dates"]
    assert (
        f"validation from {cuts['validation_from']}, test from {cuts['test_from']}, until 2015-06-01" in out
    )
    left_out = f"{card['left_out_documents']} left out (31 days before a cut or from 2015-06-01 on)"
    assert f"documents: {left_out}, 5 dropped (same text)" in out
    tally = card["splits"]["val"]["news"]
    few = f"the val split has only {tally['documents']} documents of {tally['tokens']:,} tokens"
    assert messages[0] == f"warning: {few}: what is measured on it will be rough"
    page = (tmp_path / "out" / "data_card.html").read_text()
    assert left_out.split(" left")[0] + " documents belong to no split (31 days before a cut" in page
    assert "<h2>Bad rows</h2><p>none</p>" in page


def test_the_tokenizer_of_earlier_data_reads_later_text(tmp_path, monkeypatch, capsys):
    earlier = config_for(tmp_path)
    prepare(earlier)
    path = write_corpus(tmp_path / "later.jsonl", documents=200)
    with open(path, "a") as file:
        file.write(json.dumps({"text": "a <|im_end|> b", "date": "2012-01-01"}) + "\n")
    later = replace(earlier, out=tmp_path / "later", input=(str(path),), vocab_size=Config.vocab_size)
    given = replace(later, tokenizer=earlier.out)
    card = prepare(given)
    used = (earlier.out / "tokenizer.json").read_bytes()
    assert (given.out / "tokenizer.json").read_bytes() == used
    digest = hashlib.sha256(used).hexdigest()
    assert card["settings"]["tokenizer"] == card["inputs"][str(earlier.out)] == digest
    assert card["settings"]["vocab_size"] == 300
    assert prepare(given) == card  # up to date
    with pytest.raises(program.DataError, match=r"tokenizer was \w+, now None"):
        prepare(later)

    Tokenizer.train(["bank rates"] * 9, 280, ("<|endoftext|>", "<|im_end|>")).save(tmp_path / "chat.json")
    card = prepare(replace(given, tokenizer=tmp_path / "chat.json", force=True))
    assert card["dropped_documents"]["later"]["a special token of the tokenizer in the text"] == 1
    Tokenizer.train(["bank rates"], 270, ("<|end|>",)).save(tmp_path / "other.json")
    arguments = ("--source", "files", "--input", path, "--out", tmp_path / "new", "--tokenizer")
    for wrong, message in (
        (["gone.json"], "--tokenizer gone.json: there is nothing here"),
        ([path], "later.jsonl"),
        ([tmp_path / "other.json"], "other.json has no <|endoftext|>, which ends every document"),
        (
            [tmp_path / "chat.json", "--vocab-size", "300"],
            "--vocab-size goes with a tokenizer that is trained",
        ),
    ):
        code, _, messages = run(monkeypatch, capsys, *arguments, *wrong)
        assert code == 2 and len(messages) == 1 and message in messages[0], messages
    code, _, messages = run(
        monkeypatch, capsys, *arguments, earlier.out, "--view", "numbers", "--source", "rows"
    )
    assert code == 2 and "leave out --tokenizer" in messages[0]
