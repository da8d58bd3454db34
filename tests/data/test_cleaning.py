"""Cleaning, filters and near-duplicates: what stays, what goes, and that every drop is counted."""

import random

import numpy as np
import pytest

from data.cleaning import Filters, clean_document, clean_text
from data.documents import Document
from data.duplicates import THRESHOLD, UNDATED, NearDuplicates
from data.problems import Problems

ARTICLE = "Prices rose in March, and the bank said that it would wait.\n\nAnalysts agreed with the decision."


@pytest.mark.parametrize(
    "line",
    [
        "Click here to read the full report",
        "Sign up for our newsletter and get the news first.",
        "Copyright 2019 The Wire. All rights reserved.",
        "© 2019 The Wire",
        "ALL RIGHTS RESERVED.",
        "Follow us on Twitter",
        "Advertisement",
        "Read more: five charts",
        "This article was originally published on a site.",
    ],
)
def test_boilerplate_lines_go(line):
    assert clean_text(f"{line}\n{ARTICLE}\n\n\n\n{line}") == ARTICLE


@pytest.mark.parametrize(
    "text",
    [
        ARTICLE,
        "The company said all rights reserved for holders would lapse.",
        "Read more carefully, the minutes say otherwise.\nThe rest follows.",
        "Copyright law was changed in 2019.",
    ],
)
def test_prose_stays_as_it_is(text):
    assert clean_text(text) == text


def test_spaces_line_ends_and_invisible_characters():
    assert clean_text("A\u00a0 b\t c\r\nd\u200b\u00ad\ufeff \n\n\n\n e\x00") == "A b c\nd\n\ne"
    assert clean_text("cafe\u0301") == "caf\u00e9"


def test_filters_count_what_they_drop():
    problems = Problems()
    filters = Filters(min_chars=30, max_chars=200, language="en")
    german = "Die Preise stiegen im März, und die Bank wartete mit ihrer Entscheidung."
    texts = [ARTICLE, "Too short.", ARTICLE * 3, german, german]
    kept = [clean_document(Document(text, "wire", None, None), filters, problems) for text in texts]
    assert [document is not None for document in kept] == [True, False, False, False, False]
    assert problems.dropped == {"wire": {"too short": 1, "too long": 1, "not English": 2}}


def texts_of(count, words, seed=0):
    generator = random.Random(seed)
    vocabulary = [f"word{number}" for number in range(5000)]
    return [generator.choices(vocabulary, k=words) for _ in range(count)]


def find(tmp_path, texts, days=None):
    sketches = NearDuplicates(tmp_path / "scratch")
    for text in texts:
        sketches.add(text)
    found = sketches.find(np.array(days or [0] * len(texts), dtype=np.int32))
    sketches.close()
    return found.tolist()


def jaccard(first, second):
    sets = [{tuple(words[place : place + 5]) for place in range(len(words) - 4)} for words in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_copies_with_few_changes_are_found_and_others_are_not(tmp_path):
    originals = texts_of(300, 400)
    generator = random.Random(1)
    near, far = [], []
    for words in originals:
        near.append([*words])
        near[-1][generator.randrange(400)] = "changed"
        far.append([*words])
        for place in range(0, 400, 12):
            far[-1][place] = f"changed{generator.random()}"
    assert min(map(jaccard, originals, near)) > 0.95 and max(map(jaccard, originals, far)) < 0.5
    texts = [" ".join(words) for words in (*originals, *near, *far)]
    assert find(tmp_path, texts) == [False] * 300 + [True] * 300 + [False] * 300


def test_estimates_are_those_of_jaccard(tmp_path):
    """Between the threshold and 0.9 nearly all copies are found; well below it none."""
    originals = texts_of(400, 300, seed=3)
    generator = random.Random(2)
    edited = []
    for words in originals:
        edited.append([*words])
        for place in generator.sample(range(5, 295), 3):
            edited[-1][place] = f"new{generator.random()}"
    similarity = np.array(list(map(jaccard, originals, edited)))
    assert similarity.min() > THRESHOLD and similarity.max() < 0.97
    texts = [" ".join(words) for words in (*originals, *edited)]
    assert 0.93 < np.mean(find(tmp_path, texts)[400:]) <= 1.0


def test_the_first_released_stays(tmp_path):
    (words,) = texts_of(1, 100)
    text = " ".join(words)
    assert find(tmp_path, [text, text, text, text], [30, 10, UNDATED, 20]) == [True, False, True, True]
    assert find(tmp_path, ["one two", "one two", "one", ""], [5, 5, 5, 5]) == [False, True, False, False]
    assert find(tmp_path, []) == []


def test_two_processes_sketch_alike(tmp_path):
    """Python's own hash of a string differs from process to process; ours must not."""
    sketches = NearDuplicates(tmp_path / "a")
    assert sketches._shingles("the bank waited for prices to fall")[:2].tolist() == [
        sketches._shingles("the bank waited for prices")[0],
        sketches._shingles("bank waited for prices to")[0],
    ]
    assert sketches._words["bank"] == 11629350947798869288
