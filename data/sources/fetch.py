"""Polite downloads: a rate limit, retries that honour Retry-After, files that are whole or absent, resumable.

No message names more of an address than its path: queries hold keys.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from data.documents import DataError

TIMEOUT = 60.0  # seconds
ATTEMPTS = 6
LONGEST_WAIT = 120.0
RETRIED = (408, 425, 429, 500, 502, 503, 504)


@dataclass
class Fetcher:
    """Downloads from one service.

    interval: seconds between the beginnings of two requests. headers: of every request.
    """

    interval: float
    headers: Mapping[str, str] = field(default_factory=dict)
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _last: float = -1e9

    def get(self, address: str, query: Mapping[str, str] | None = None) -> bytes:
        """The body of a page, after as many attempts as it takes.

        Raises DataError for an address that is refused (401, 403), is not there (404) or keeps failing.
        """
        url = f"{address}?{urllib.parse.urlencode(query)}" if query else address
        reason = ""
        for attempt in range(ATTEMPTS):
            self._wait()
            wait = min(2.0**attempt, LONGEST_WAIT)
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(url, headers=dict(self.headers)), timeout=TIMEOUT
                ) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                error.close()
                if error.code not in RETRIED:
                    raise DataError(f"cannot fetch {address}: {reason}{_advice(error.code)}") from None
                wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                reason = type(getattr(error, "reason", error)).__name__
            if attempt + 1 < ATTEMPTS:
                self.sleep(wait)
        raise DataError(
            f"cannot fetch {address}: {reason}, {ATTEMPTS} times; run the same command to go on from here"
        )

    def save(self, path: Path, address: str, query: Mapping[str, str] | None = None) -> bytes:
        """The content of `path`, downloaded where there is none yet."""
        if path.is_file():
            return path.read_bytes()
        content = self.get(address, query)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return content

    def _wait(self) -> None:
        left = self._last + self.interval - self.clock()
        if left > 0:
            self.sleep(left)
        self._last = self.clock()


def _advice(status: int) -> str:
    if status == 401:
        return "; check the API key"
    return "; the service refuses this client: check key, plan and --user-agent" if status == 403 else ""


def _retry_after(value: str | None, otherwise: float) -> float:
    return min(float(value), LONGEST_WAIT) if value and value.isdigit() else otherwise


class _Text(HTMLParser):
    """Collects what a page shows: blocks end lines, scripts and navigation are left out."""

    HIDDEN = ("script", "style", "nav", "header", "footer", "title", "ix:header", "noscript")
    BLOCKS = ("p", "div", "br", "tr", "li", "h1", "h2", "h3", "h4", "h5", "h6", "table", "section")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self._hidden.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n" if tag in ("br", "tr", "li") else "\n\n")
        elif tag == "td":
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._hidden and tag == self._hidden[-1]:
            self._hidden.pop()
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data.replace("\n", " "))


def html_text(page: bytes) -> str:
    """What an HTML page says, in lines; bytes that are not UTF-8 count as Windows-1252, as browsers do."""
    try:
        text = page.decode()
    except UnicodeDecodeError:
        text = page.decode("cp1252", errors="replace")
    parser = _Text()
    parser.feed(text)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(lines).strip()
