"""News, filings and Fed pages against a local server: shapes as recorded, failures, rate limits, resuming."""

import json
import sys
from datetime import date
from types import SimpleNamespace

import pytest
from rich.progress import Progress

from data.config import Config
from data.documents import DataError, Document, write_jsonl
from data.problems import Problems
from data.sources import fed, fetch, hf, news, sec
from data.sources.fetch import ATTEMPTS, Fetcher, html_text

ARTICLE = {
    "date": "2021-08-10T21:15:00+00:00",
    "title": "Apple and the bank",
    "content": "Prices rose in March.",
    "link": "https://example.com/1",
    "symbols": ["AAPL.US"],
    "tags": ["STOCKS"],
    "sentiment": {"polarity": 0.5, "neg": 0.0, "neu": 0.8, "pos": 0.2},
}


def open_quietly(source, config):
    return source.open_corpus(config, Progress(disable=True))


def documents(corpus, problems=None):
    return list(corpus.read(problems or Problems(strict=True)))


def test_retries_wait_longer_and_honour_retry_after(site, slept):
    site.pages["/a"] = b"content"
    site.failures["/a"] = [(500, {}), (429, {"Retry-After": "7"}), (0, {}), (503, {"Retry-After": "soon"})]
    assert Fetcher(0.0).get(f"{site.address}/a", {"api_token": "secret"}) == b"content"
    assert slept == [1.0, 7.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("failures", "message", "requests"),
    [
        ([(500, {})] * 10, "status 500, 6 times; run the same command to go on", ATTEMPTS),
        ([(0, {})] * 10, "6 times", ATTEMPTS),
        ([(401, {})], "status 401; check the API key", 1),
        ([(403, {})], "status 403; the service refuses this client", 1),
        ([(404, {})], "status 404", 1),
    ],
)
def test_failures_end_in_one_message_without_the_key(site, slept, failures, message, requests):
    site.failures["/a"] = failures
    with pytest.raises(DataError, match=message) as caught:
        Fetcher(0.0).get(f"{site.address}/a", {"api_token": "secret"})
    assert "secret" not in str(caught.value) and "secret" not in repr(caught.value.__cause__)
    assert site.counts["/a"] == requests


def test_requests_keep_their_distance(site, slept):
    site.pages["/a"] = b""
    fetcher = Fetcher(0.5, clock=lambda: 10.0)
    for _ in range(3):
        fetcher.get(f"{site.address}/a")
    assert slept == [0.5, 0.5]


def test_nobody_listening_is_an_error(slept):
    with pytest.raises(DataError, match=r"cannot fetch http://127\.0\.0\.1:9/a: ConnectionRefusedError"):
        Fetcher(0.0).get("http://127.0.0.1:9/a")


def test_a_saved_file_is_whole_or_absent_and_not_fetched_twice(site, slept, tmp_path):
    site.pages["/a"] = b"content"
    for _ in range(2):
        assert Fetcher(0.0).save(tmp_path / "x" / "a", f"{site.address}/a") == b"content"
    assert site.counts["/a"] == 1
    with pytest.raises(DataError):
        Fetcher(0.0).save(tmp_path / "x" / "b", f"{site.address}/b")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]


def test_text_of_a_page():
    page = (
        "<html><head><title>t</title><style>p{}</style></head><body><nav>Home</nav><h1>Minutes</h1>"
        "<p>The <b>Committee</b>\nmet.</p><table><tr><td>Rates</td><td>2&nbsp;%</td></tr></table>"
        "<script>var x = '<p>no</p>'</script></body></html>"
    )
    lines = [line for line in html_text(page.encode()).split("\n") if line]
    assert lines == ["Minutes", "The Committee met.", "Rates 2 %"]
    assert html_text("<p>café</p>".encode("cp1252")) == "café"


@pytest.fixture
def news_site(site, slept, monkeypatch):
    monkeypatch.setattr(news, "ADDRESS", f"{site.address}/api")
    monkeypatch.setattr(news, "PAGE", 3)
    monkeypatch.setenv(news.KEY, "secret")
    articles = [ARTICLE | {"link": f"https://example.com/{n}", "title": f"Title {n}"} for n in range(7)]
    for offset in range(0, 9, 3):
        site.pages["/api/news", str(offset)] = json.dumps(articles[offset : offset + 3]).encode()
    members = {"0": {"Code": "MSFT", "Exchange": "US"}, "1": {"Code": "AAPL", "Exchange": "US"}}
    site.pages["/api/fundamentals/GSPC.INDX"] = json.dumps(members).encode()
    return site


def test_news_pages_until_one_is_not_full(news_site, tmp_path):
    config = Config(out=tmp_path / "o", cache=tmp_path / "c", tickers=("AAPL",), since=date(2021, 1, 1))
    corpus = open_quietly(news, config)
    found = documents(corpus)
    assert [document.id for document in found] == [f"https://example.com/{n}" for n in range(7)]
    assert found[0].text == "Title 0\n\nPrices rose in March."
    assert found[0].available_at == date(2021, 8, 10)
    assert sorted(corpus.inputs) == [f"2021-01-01_last/AAPL/0000{n}.json" for n in range(3)]
    assert {query["s"] for _, query, _ in news_site.asked} == {"AAPL.US"}
    assert news_site.asked[0][1]["from"] == "2021-01-01"


def test_news_go_on_where_they_stopped(news_site, tmp_path):
    config = Config(out=tmp_path / "o", cache=tmp_path / "c", tickers=("AAPL",))
    news_site.failures["/api/news"] = [(429, {"Retry-After": "2"})] + [(503, {})] * 2
    whole = documents(open_quietly(news, config))
    (tmp_path / "c" / "news" / "first_last" / "AAPL" / "00002.json").unlink()
    news_site.asked.clear()
    assert documents(open_quietly(news, config)) == whole
    assert [query["offset"] for _, query, _ in news_site.asked] == ["6"]


def test_news_of_the_members_of_the_index(news_site, tmp_path):
    corpus = open_quietly(news, Config(out=tmp_path / "o", cache=tmp_path / "c"))
    assert len(documents(corpus)) == 14
    assert "chosen with hindsight" in corpus.origins["news"].what


def test_news_without_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv(news.KEY, raising=False)
    with pytest.raises(DataError, match="EODHD_API_KEY"):
        open_quietly(news, Config(out=tmp_path / "o", cache=tmp_path / "c"))


def test_bad_articles_are_counted(news_site, tmp_path):
    bad = [ARTICLE | {"content": "  "}, ARTICLE | {"date": "yesterday"}, {"title": "x"}, "text", ARTICLE]
    monkey = json.dumps(bad).encode()
    news_site.pages["/api/news", "0"] = monkey
    news_site.pages["/api/news", "3"] = b'{"error": "limit"}'
    problems = Problems()
    config = Config(out=tmp_path / "o", cache=tmp_path / "c", tickers=("AAPL",))
    assert len(documents(open_quietly(news, config), problems)) == 1
    assert problems.rows == {"no article": 3, "date is not ISO": 1, "not a list of articles": 1}
    assert problems.places["date is not ISO"][0].endswith("00000.json, article 1")
    assert "Prices rose" not in json.dumps(problems.entry())


def test_the_plain_corpus_has_train_news_alone(tmp_path):
    texts = [Document("One.\n\nTwo.", "news", None, None), Document("Rates.", "cpi", None, None)]
    write_jsonl(tmp_path / "train.jsonl", texts)
    news.write_plain(tmp_path / "train.jsonl", tmp_path / "finance_corpus.txt")
    assert (tmp_path / "finance_corpus.txt").read_text() == "One.\n\nTwo.\n<|endoftext|>\n"


@pytest.fixture
def sec_site(site, slept, monkeypatch):
    monkeypatch.setattr(sec, "FILES", site.address)
    monkeypatch.setattr(sec, "DATA", site.address)
    tickers = {"0": {"cik_str": 320193, "ticker": "AAPL", "title": "Apple Inc."}}
    site.pages["/files/company_tickers.json"] = json.dumps(tickers).encode()
    recent = {
        "accessionNumber": ["0000320193-15-000001", "0000320193-15-000002", "0000320193-15-000003"],
        "form": ["10-Q", "4", "8-K"],
        "filingDate": ["2015-01-28", "2015-01-29", "2015-02-02"],
        "acceptanceDateTime": ["2015-01-27T21:32:00.000Z", "2015-01-29T18:00:00.000Z", ""],
        "reportDate": ["2014-12-27", "", ""],
        "primaryDocument": ["q1.htm", "xslF345X03/form4.xml", "event.txt"],
    }
    older = {name: values[:1] for name, values in recent.items()} | {
        "accessionNumber": ["0000320193-10-000009"], "form": ["10-K"], "acceptanceDateTime": [""],
        "filingDate": ["2010-10-27"], "reportDate": ["2010-09-25"],
    }  # fmt: skip
    name = "CIK0000320193-submissions-001.json"
    listing = {"filings": {"recent": recent, "files": [{"name": name}]}}
    site.pages["/submissions/CIK0000320193.json"] = json.dumps(listing).encode()
    site.pages[f"/submissions/{name}"] = json.dumps(older).encode()
    archive = "/Archives/edgar/data/320193"
    site.pages[f"{archive}/000032019315000001/q1.htm"] = b"<html><body><p>Quarterly report.</p></body></html>"
    site.pages[f"{archive}/000032019310000009/q1.htm"] = b"<html><body><p>Annual report.</p></body></html>"
    site.pages[f"{archive}/000032019315000003/event.txt"] = b"An event."
    return site


def test_filings_with_the_day_they_were_accepted(sec_site, tmp_path):
    config = Config(
        out=tmp_path / "o", cache=tmp_path / "c", tickers=("aapl",), user_agent="A Name a@example.com"
    )
    sec_site.failures["/submissions/CIK0000320193.json"] = [(429, {"Retry-After": "1"})]
    found = {document.id: document for document in documents(open_quietly(sec, config))}
    assert {name: (d.text, d.date, d.available_at) for name, d in found.items()} == {
        "0000320193-15-000001": ("Quarterly report.", date(2014, 12, 27), date(2015, 1, 27)),
        "0000320193-15-000003": ("An event.", date(2015, 2, 2), date(2015, 2, 2)),
        "0000320193-10-000009": ("Annual report.", date(2010, 9, 25), date(2010, 10, 27)),
    }
    assert {headers["User-Agent"] for _, _, headers in sec_site.asked} == {"A Name a@example.com"}
    asked = len(sec_site.asked)
    config.since = date(2015, 1, 1)
    assert len(documents(open_quietly(sec, config))) == 2
    assert len(sec_site.asked) == asked  # everything was in the cache


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_agent": "me"}, "needs --user-agent"),
        ({"tickers": ()}, "needs --tickers"),
        ({"tickers": ("XYZ",)}, "--tickers XYZ: EDGAR lists no such company"),
    ],
)
def test_mistakes_with_filings(sec_site, tmp_path, changes, message):
    settings = {"tickers": ("AAPL",), "user_agent": "A Name a@example.com"} | changes
    with pytest.raises(DataError, match=message):
        open_quietly(sec, Config(out=tmp_path / "o", cache=tmp_path / "c", **settings))


@pytest.fixture
def fed_site(site, slept, monkeypatch):
    monkeypatch.setattr(fed, "ADDRESS", site.address)
    pages = {
        "/monetarypolicy/fomchistorical2015.htm": '<a href="/monetarypolicy/fomcminutes20150128.htm">HTML</a>'
        " (Released February 18, 2015)<p>"
        '<a href="/monetarypolicy/fomcminutes20150318.htm">HTML</a> and more',
        "/monetarypolicy/fomchistorical2003.htm": '<a href="/fomc/minutes/20030129.htm">Minutes</a>',
        "/monetarypolicy/beigebook2015.htm": '<a href="/monetarypolicy/beigebook201501.htm">HTML</a>'
        '<a href="/monetarypolicy/beigebook201503.htm">HTML</a>',
        "/monetarypolicy/fomcminutes20150128.htm": "<body><p>The Committee met.</p></body>",
        "/monetarypolicy/fomcminutes20150318.htm": "<body><p>The Committee met again.</p></body>",
        "/fomc/minutes/20030129.htm": "<body><p>An older meeting.</p></body>",
        "/monetarypolicy/beigebook201501.htm": "<p>January 14, 2015</p><p>Growth was modest.</p>",
        "/monetarypolicy/beigebook201503.htm": "<body><p>Growth went on.</p></body>",
    }
    site.pages |= {path: content.encode() for path, content in pages.items()}
    return site


def test_fed_pages_and_when_they_were_released(fed_site, tmp_path):
    config = Config(out=tmp_path / "o", cache=tmp_path / "c", since=date(2003, 1, 1), to=date(2015, 12, 31))
    corpus = open_quietly(fed, config)
    found = {document.id: (document.text, document.available_at) for document in documents(corpus)}
    assert found == {
        "fomcminutes20150128": ("The Committee met.", date(2015, 2, 18)),
        "fomcminutes20150318": ("The Committee met again.", date(2015, 4, 8)),
        "fomcminutes20030129": ("An older meeting.", date(2003, 3, 30)),
        "beigebook201501": ("January 14, 2015\n\n\nGrowth was modest.", date(2015, 1, 14)),
        "beigebook201503": ("Growth went on.", date(2015, 3, 31)),
    }
    assert set(corpus.inputs) == {f"{name}.htm" for name in found}
    config.since = date(2016, 1, 1)
    config.to = date(2016, 2, 1)
    with pytest.raises(DataError, match="no minutes and no Beige Book found"):
        open_quietly(fed, config)


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, **settings):
        asked.append((name, settings))
        if name == "owner/gone":
            raise FileNotFoundError(name)
        rows = [("One.", "2015-01-02"), (3, None), ("Two.", None)]
        return [{"body": body, "when": when} for body, when in rows]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    config = Config(out=tmp_path / "o", dataset="owner/name", text_column=("body",), date_column=("when",))
    problems = Problems()
    found = documents(open_quietly(hf, config), problems)
    assert [(d.text, d.source, d.available_at) for d in found] == [
        ("One.", "name", date(2015, 1, 2)),
        ("Two.", "name", None),
    ]
    assert problems.places == {"text is int": ["owner/name, row 1"]}
    assert asked == [("owner/name", {"split": "train", "streaming": True, "revision": "main"})]
    with pytest.raises(DataError, match="cannot load dataset owner/gone at main: FileNotFoundError"):
        open_quietly(hf, Config(out=tmp_path / "o", dataset="owner/gone"))
    with pytest.raises(DataError, match="needs --dataset"):
        open_quietly(hf, Config(out=tmp_path / "o"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        open_quietly(hf, config)


def test_a_time_limit_is_set():
    assert 0 < fetch.TIMEOUT < 600
