"""Cleaning of prose and the filters on it. Every document that is dropped is counted under its reason.

The English filter is the stop-word rule of Gopher (Rae et al. 2021, appendix A): prose without two of eight
function words is not English prose. It is applied where --language en asks for it.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal

from data.documents import END_OF_TEXT, Document, is_unicode
from data.problems import Problems

FUNCTION_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
ENGLISH_SAMPLE = 4000  # characters
# What browsers and terminals do not show, other than line ends and tabs; and soft hyphens.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
SPACES = re.compile(r"[^\S\n]+")
BLANK_LINES = re.compile(r"\n{3,}")
# Lines that news pages put around an article. Whole lines only: a sentence that quotes one stays.
BOILERPLATE = re.compile(
    r"^(?:"
    r"(?:click|tap) (?:here|to) .{0,120}"
    r"|(?:read|see|learn) more(?:(?: at| on| here|:).{0,120})?"
    r"|(?:sign up|subscribe|register) (?:for|to|now|here|today)\b.{0,160}"
    r"|(?:follow|like|find|join) us on .{0,120}"
    r"|(?:copyright )?(?:©|\(c\)) ?(?:copyright )?(?:19|20)\d\d\b.{0,160}"
    r"|copyright (?:19|20)\d\d\b.{0,160}"
    r"|all rights reserved\.?"
    r"|(?:advertisement|sponsored content|share this article|related articles?|story continues)[.:]?"
    r"|photo(?: credit)?: .{0,120}"
    r"|this (?:article|content) (?:was )?(?:originally )?(?:appeared|published) .{0,160}"
    r"|(?:view source version on|source:) \S{1,160}"
    r"|to view the original version .{0,160}"
    r")$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Filters:
    """What a document of prose must be.

    min_chars, max_chars: of the cleaned text. language: "any", or "en" for English only. reserved: text that
    is a tokenizer's, besides END_OF_TEXT.
    """

    min_chars: int = 1
    max_chars: int = 10_000_000
    language: Literal["any", "en"] = "any"
    reserved: tuple[str, ...] = ()


def clean_text(text: str) -> str:
    """Composed characters, plain spaces and line ends, no invisible characters, no boilerplate lines."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = SPACES.sub(" ", INVISIBLE.sub("", text)).replace(" \n", "\n").replace("\n ", "\n")
    return BLANK_LINES.sub("\n\n", BOILERPLATE.sub("", text)).strip()


def is_english(text: str) -> bool:
    """Whether two different function words of English stand in the beginning of the text."""
    words = text[:ENGLISH_SAMPLE].lower().split()
    return len(FUNCTION_WORDS.intersection(words)) >= 2


def clean_document(document: Document, filters: Filters, problems: Problems) -> Document | None:
    """The document with its text cleaned; None, and counted, when a filter drops it."""
    text = clean_text(document.text)
    reason = None
    if not all(map(is_unicode, (text, document.source, document.id or ""))):
        reason = "lone surrogate"
    elif END_OF_TEXT in text:
        reason = f"{END_OF_TEXT} in the text"
    elif any(mark in text for mark in filters.reserved):
        reason = "a special token of the tokenizer in the text"
    elif len(text) < filters.min_chars:
        reason = "too short"
    elif len(text) > filters.max_chars:
        reason = "too long"
    elif filters.language == "en" and not is_english(text):
        reason = "not English"
    if reason is not None:
        problems.drop(document.source if is_unicode(document.source) else "?", reason)
        return None
    return document if text == document.text else replace(document, text=text)
