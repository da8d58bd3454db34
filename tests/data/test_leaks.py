"""A planted future document, a planted copy across the cut, a repeated id: each fails the build."""

import json
import random
import shutil
from datetime import date

import numpy as np
import pytest

from data import leaks
from data.documents import DataError, Document, SplitDates, read_jsonl, write_jsonl
from data.leaks import GRAM, check
from data.prepare import Config, prepare
from gpt.cli import UserError
from tapelm import Tokenizer, write_shards

DATES = SplitDates(date(2015, 1, 1), date(2017, 1, 1), date(2019, 1, 1), embargo_days=31)
WORDS = [
    f"{a}{b}" for a in ("in", "de", "re", "pro", "con") for b in ("flate", "duce", "mand", "sist", "cede")
]


def documents(split, count=40):
    generator = random.Random(split)
    year = {"train": 2012, "val": 2015, "test": 2018}[split]
    return [
        Document(
            " ".join(generator.choices(WORDS, k=80)),
            "news",
            day := date(year, 1 + n % 12, 3),
            day,
            f"{split}{n}",
        )
        for n in range(count)
    ]


@pytest.fixture
def directory(tmp_path):
    """A sound directory, as prepare leaves it."""
    (tmp_path / "documents").mkdir()
    tokenizer = Tokenizer.train([document.text for document in documents("train")], 300, ("<|endoftext|>",))
    tokenizer.save(tmp_path / "tokenizer.json")
    for split in ("train", "val", "test"):
        rewrite(tmp_path, split, documents(split))
    return tmp_path


def rewrite(directory, split, replaced):
    """Put other documents and their shards into a split."""
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    write_jsonl(directory / "documents" / f"{split}.jsonl", replaced)
    shutil.rmtree(directory / split, ignore_errors=True)
    end = tokenizer.special_tokens["<|endoftext|>"]
    tokens = (tokenizer.encode(document.text) for document in replaced)
    write_shards(tokens, directory / split, vocab_size=tokenizer.vocab_size, end_of_text=end)


def test_a_sound_directory_passes(directory):
    found = check(directory, DATES)
    assert found["share_compared"] == 1.0
    assert found["val"]["grams"] > 1000 and found["val"]["highest_overlap"] < 0.2


@pytest.mark.parametrize(
    ("split", "day"),
    [
        ("train", date(2016, 5, 1)),
        ("train", date(2014, 12, 31)),  # inside the embargo
        ("train", date(2018, 1, 1)),
        ("val", date(2014, 12, 31)),
        ("val", date(2017, 1, 1)),
        ("test", date(2019, 1, 1)),
    ],
)
def test_a_planted_future_document(directory, split, day):
    planted = documents(split)
    planted[17] = Document("A new text about nothing at all.", "news", day, day, "planted")
    rewrite(directory, split, planted)
    with pytest.raises(DataError, match=rf"leak: .*{split}\.jsonl, line 18: released {day}.*embargo 31 days"):
        check(directory, DATES)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_planted_copy_across_the_cut(directory, split):
    planted = documents(split)
    old = documents("train")[7].text
    day = planted[5].available_at
    planted[5] = Document("Reprinted " + old[: len(old) - 8], "news", day, day, "planted")
    rewrite(directory, split, planted)
    with pytest.raises(
        DataError, match=rf"leak: .*{split}\.jsonl, line 6: 9\d% .* {GRAM}-grams are in train"
    ):
        check(directory, DATES)


def test_a_repeated_id(directory):
    planted = documents("val")
    planted[3] = Document("Something else entirely.", "news", date(2015, 5, 5), date(2015, 5, 5), "train8")
    rewrite(directory, "val", planted)
    with pytest.raises(DataError, match=r"train\.jsonl, line 9, and .*val\.jsonl, line 4, have the same id"):
        check(directory, DATES)


def test_grams_do_not_cross_documents_and_chunks_do_not_matter(directory, monkeypatch):
    end = Tokenizer.load(directory / "tokenizer.json").special_tokens["<|endoftext|>"]
    whole = leaks._grams(directory / "val", end, 1)
    texts = [
        np.append(Tokenizer.load(directory / "tokenizer.json").encode(d.text), end) for d in documents("val")
    ]
    assert whole[0].size == sum(max(0, len(ids) - 1 - GRAM + 1) for ids in texts)
    assert np.array_equal(np.bincount(whole[1]), [len(ids) - GRAM for ids in texts])
    monkeypatch.setattr(leaks, "CHUNK", 37)
    parts = leaks._grams(directory / "val", end, 1)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_share_of_the_grams_finds_a_copy_too(directory, monkeypatch):
    planted = documents("val")
    planted[5] = Document(documents("train")[7].text, "news", date(2015, 5, 5), date(2015, 5, 5), "planted")
    rewrite(directory, "val", planted)
    tokens = len(Tokenizer.load(directory / "tokenizer.json").encode(documents("val")[0].text))
    monkeypatch.setattr(leaks, "MOST_GRAMS", 80 * tokens // 4)
    monkeypatch.setattr(leaks, "FEWEST_SAMPLED", 4)
    with pytest.raises(DataError, match=r"line 6: 100% "):
        check(directory, DATES)


def test_undated_documents_have_no_cut(directory):
    planted = documents("train")
    planted[0] = Document("Undated words of no consequence.", "news", None, None, "planted")
    rewrite(directory, "train", planted)
    check(directory, DATES)
    check(directory, None)


def test_prepare_drops_the_later_copy_and_the_program_checks(tmp_path, capsys):
    generator = random.Random(0)
    path = tmp_path / "news.jsonl"
    rows = []
    for number in range(240):
        text = f"Note {number}: " + " ".join(generator.choices(WORDS, k=60))
        rows.append({"id": number, "text": text, "date": str(date(2000 + number // 12, number % 12 + 1, 1))})
    rows += [rows[3] | {"id": 999, "date": "2019-11-15"}, rows[4] | {"text": "Another text of some words."}]
    rows.append(rows[200] | {"id": 998, "date": "2001-02-03"})  # released first, though it comes last
    path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    card = prepare(Config(out=out, source=("files",), input=(str(path),), vocab_size=300, min_block=64))
    assert card["dropped_documents"] == {"news": {"same id": 1, "same text": 2}}
    ids = [
        d.id for split in ("train", "val", "test") for d in read_jsonl(out / "documents" / f"{split}.jsonl")
    ]
    assert "999" not in ids and ids.count("4") == 1
    assert "998" in ids and "200" not in ids

    assert leaks.main([str(out)]) == 0
    assert "no leak" in capsys.readouterr().out
    train = out / "documents" / "train.jsonl"
    train.write_text(train.read_text().replace("2001-05-01", "2019-05-01"))
    with pytest.raises(UserError, match=r"leak: .*released 2019-05-01"):
        leaks.main([str(out)])
    with pytest.raises(UserError, match=r"holds no data_card\.json"):
        leaks.main([str(tmp_path)])
    with pytest.raises(UserError, match=r"Missing .*python -m data\.leaks --help"):
        leaks.main([])
    with pytest.raises(SystemExit) as ended:
        leaks.main(["--help"])
    assert not ended.value.code and "What data.prepare has written" in capsys.readouterr().out


def test_what_is_mostly_in_train_is_left_out_and_counted(tmp_path):
    """Two texts of train in one: no copy of either, but nothing that a model has not seen."""
    everything = {split: documents(split, 60) for split in ("train", "val", "test")}
    day = date(2015, 7, 7)
    text = " ".join(document.text for document in everything["train"][:2])
    everything["val"].append(Document(text, "news", day, day, "planted"))
    source = tmp_path / "news.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for document in (document for split in everything.values() for document in split):
            file.write(document.to_json() + "\n")
    out = tmp_path / "out"
    config = Config(
        source=("files",), input=(str(source),), out=out, vocab_size=300, min_block=64,
        validation_from=DATES.validation_from, test_from=DATES.test_from,
    )  # fmt: skip
    made = prepare(config)
    assert made["dropped_documents"]["news"]["mostly in train"] == 1
    kept = list(read_jsonl(out / "documents" / "val.jsonl"))
    assert len(kept) == made["splits"]["val"]["news"]["documents"] == 60
    assert "planted" not in {document.id for document in kept}
    encoded = Tokenizer.load(out / "tokenizer.json").encode_batch([document.text for document in kept])
    assert made["splits"]["val"]["news"]["tokens"] == sum(len(ids) + 1 for ids in encoded)
    assert leaks.main([str(out)]) == 0
