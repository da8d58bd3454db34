"""Wordings of the tape's notes, computed from the positions given and the ones before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date, timedelta

from data.series import Series
from data.words import DAYS, Voice, day_words, month_of, number, signed


def _title(series: Series) -> str:
    return series.entity[0].upper() + series.entity[1:]


def _level(series: Series, position: int) -> str:
    return f"{number(series.values[position])} {series.unit.words}"


def week_note(series: Series, first: int, last: int, day: date) -> str:
    """Level, change over 1, 5 and 20 rows, each day of the week, trailing volatility, place in the year."""
    voice = Voice(f"week|{series.entity}|{day}")
    unit = series.unit
    sentences = [f"{_title(series)}, week to {day_words(day)}."]
    since = "a week earlier" if last - first == 4 else f"{day_words(series.dates[first - 1])}"
    moved = voice.moved(series.change(last, last - first + 1), unit)
    at = DAYS[series.dates[last].weekday()]
    if unit.hidden:
        sentences.append(
            voice.pick(f"It ended {at} {moved} from {since}.", f"From {since} to {at} it was {moved}.")
        )
    else:
        level = _level(series, last)
        sentences.append(
            voice.pick(
                f"It ended {at} at {level}, {moved} from {since}.",
                f"{at}'s level was {level}, {moved} against {since}.",
                f"At {level} on {at} it was {moved} compared with {since}.",
            )
        )
    one, twenty = voice.moved(series.change(last, 1), unit), voice.moved(series.change(last, 20), unit)
    sentences.append(
        voice.pick(
            f"On the day it was {one}, and over twenty trading days {twenty}.",
            f"The last day's move: {one}. Over twenty trading days: {twenty}.",
        )
    )
    sentences.append(
        voice.pick("Day by day:", "The days were:", "Daily record:") + " " + _days(series, first, last)
    )
    sentences += _ranges(series, first, last, voice)
    sentences += [_volatility(series, last, voice), _year(series, last, voice)]
    return " ".join(sentences)


def _days(series: Series, first: int, last: int) -> str:
    """As in "Mon 1.1915, Tue 1.1914" or, where the level is hidden, "Mon +0.3%"."""
    days = []
    for position in range(first, last + 1):
        name = DAYS[series.dates[position].weekday()][:3]
        told = (
            f"{signed(100 * series.change(position, 1))}%"
            if series.unit.hidden
            else number(series.values[position])
        )
        days.append(f"{name} {told}")
    return ", ".join(days) + "."


def _ranges(series: Series, first: int, last: int, voice: Voice) -> list[str]:
    """Intraday range and turnover of the period, where the rows have them."""
    sentences = []
    days = series.dates[first : last + 1]
    highs = [series.extras["high"][day] for day in days if day in series.extras.get("high", {})]
    lows = [series.extras["low"][day] for day in days if day in series.extras.get("low", {})]
    if highs and lows:
        low, high = number(min(lows)), number(max(highs))
        sentences.append(
            voice.pick(
                f"It traded between {low} and {high}.", f"The intraday low was {low} and the high {high}."
            )
        )
    volumes = series.extras.get("volume", {})
    turnover = [volumes[day] for day in days if day in volumes]
    earlier = [volumes[day] for day in series.dates[max(0, last - 19) : last + 1] if day in volumes]
    if turnover and earlier:
        mean, usual = math.fsum(turnover) / len(turnover), math.fsum(earlier) / len(earlier)
        scale, word = (1e9, "billion") if usual >= 1e8 else (1e6, "million")
        average = f"{mean / scale:.2f} {word} shares a day"
        sentences.append(f"Turnover averaged {average}, the twenty-day mean {usual / scale:.2f}.")
    return sentences


def _volatility(series: Series, last: int, voice: Voice) -> str:
    now = series.volatility(last)
    words = (
        f"{now:.1f} percent a year"
        if series.unit.change == "percent"
        else f"{now:.2f} {series.unit.change} a day"
    )
    if last < 41:
        return f"Volatility over twenty days was {words}."
    before = series.volatility(last - 20)
    verb = (
        "unchanged from" if f"{now:.2f}" == f"{before:.2f}" else ("up from" if now > before else "down from")
    )
    earlier = f"{before:.1f}" if series.unit.change == "percent" else f"{before:.2f}"
    return voice.pick(
        f"Volatility over twenty days was {words}, {verb} {earlier} in the twenty before.",
        f"Twenty-day volatility stood at {words}, {verb} {earlier}.",
    )


def _year(series: Series, last: int, voice: Voice) -> str:
    """Place between the lowest and highest value of the trailing 52 weeks."""
    if series.dates[last] - series.dates[0] < timedelta(days=364):
        return f"The record here goes back to {day_words(series.dates[0], weekday=False)}."
    start = series.year_start(last)
    window = series.values[start : last + 1]
    lowest, highest = min(window), max(window)
    low, high = start + window.index(lowest), start + window.index(highest)
    place = 100 * (series.values[last] - lowest) / (highest - lowest) if highest > lowest else 50.0
    if high == last:
        return voice.pick("This is the highest level in 52 weeks.", "No day in the past 52 weeks was higher.")
    if low == last:
        return voice.pick("This is the lowest level in 52 weeks.", "No day in the past 52 weeks was lower.")
    low_day, high_day = (
        day_words(series.dates[low], weekday=False),
        day_words(series.dates[high], weekday=False),
    )
    if series.unit.hidden:
        below = 100 * (1 - series.values[last] / highest)
        return f"It is {below:.1f} percent below its 52-week high of {high_day}; the low was on {low_day}."
    return voice.pick(
        f"The 52-week range is {number(lowest)} ({low_day}) to {number(highest)} ({high_day}); "
        f"it stands {place:.0f} percent of the way up.",
        f"Of the way from its 52-week low of {number(lowest)} on {low_day} to the high of {number(highest)} "
        f"on {high_day} it stands at {place:.0f} percent.",
    )


def month_note(series: Series, first: int, last: int, day: date) -> str:
    """A month of daily rows: its change, best and worst day, longer changes, each day's move."""
    voice = Voice(f"month|{series.entity}|{day}")
    unit = series.unit
    sentences = [f"{_title(series)}, {month_of(day)} {day.year}."]
    moved = voice.moved(series.change(last, last - first + 1), unit)
    level = "" if unit.hidden else f" at {_level(series, last)}"
    sentences.append(
        voice.pick(
            f"The month ended{level} {moved}.",
            f"It closed the month{level} {moved} from the last close before it.",
        )
    )
    moves = [series.change(position, 1) for position in range(first, last + 1)]
    up, down = sum(move > 0 for move in moves), sum(move < 0 for move in moves)
    best = max(range(len(moves)), key=moves.__getitem__)
    worst = min(range(len(moves)), key=moves.__getitem__)
    sentences.append(
        voice.pick(
            f"It rose on {up} days and fell on {down}.",
            f"There were {up} days of gains and {down} of losses.",
        )
    )
    told = [f"{signed(100 * move)}%" if unit.change == "percent" else signed(move, 2) for move in moves]
    best_day, worst_day = (day_words(series.dates[first + index]) for index in (best, worst))
    sentences.append(
        voice.pick(
            f"The best day was {best_day} ({told[best]}), the worst {worst_day} ({told[worst]}).",
            f"{best_day} was its best day ({told[best]}), {worst_day} its weakest ({told[worst]}).",
        )
    )
    for days, name in ((63, "three months"), (252, "twelve months")):
        if last >= days:
            sentences.append(f"Over {name} it was {voice.moved(series.change(last, days), unit)}.")
    daily = ", ".join(
        f"{series.dates[first + index].day} {month_of(day)[:3]} {move}" for index, move in enumerate(told)
    )
    sentences.append(f"{voice.pick('Daily moves', 'Day by day', 'The daily record')}: {daily}.")
    sentences += _ranges(series, first, last, voice)
    sentences += [_volatility(series, last, voice), _year(series, last, voice)]
    return " ".join(sentences)


def figure_note(series: Series, last: int) -> str:
    """One monthly figure: changes over 1, 3 and 12 months, the last half-year, the place in ten years."""
    voice = Voice(f"figure|{series.entity}|{series.dates[last]}")
    unit = series.unit
    month = f"{month_of(series.dates[last])} {series.dates[last].year}"
    sentences = [f"{_title(series)}, {month}."]
    one, three, twelve = (voice.moved(series.change(last, months), unit) for months in (1, 3, 12))
    level = f"{series.values[last]:,.2f} {unit.words}"
    sentences.append(
        voice.pick(
            f"The figure was {level}, {one} on the month before.",
            f"It came to {level}: {one} from {month_of(series.dates[last - 1])}.",
            f"At {level} it was {one} over the month.",
        )
    )
    sentences.append(
        voice.pick(
            f"Over three months it was {three}, over twelve months {twelve}.",
            f"Against a year earlier: {twelve}; against three months earlier: {three}.",
        )
    )
    percent = unit.change == "percent"
    moves = []
    for position in range(last - 5, last + 1):
        move = series.change(position, 1)
        told = signed(100 * move) if percent else signed(move, 2)
        moves.append(f"{month_of(series.dates[position])[:3]} {told}")
    sentences.append(
        f"{voice.pick('Last six monthly changes', 'Six months of changes')}: {', '.join(moves)}."
    )
    sentences.append(_decade(series, last, voice))
    return " ".join(sentences)


def _decade(series: Series, last: int, voice: Voice) -> str:
    """The twelve-month change (prices) or the level (yields) against its trailing ten years or less."""
    percent = series.unit.change == "percent"
    window = range(max(12, last - 119), last + 1)
    history = [
        series.change(position, 12) * 100 if percent else series.values[position] for position in window
    ]
    now, mean = history[-1], math.fsum(history) / len(history)
    what = "twelve-month change" if percent else "level"
    higher = [position for position, value in zip(window, history, strict=True) if value > now]
    lower = [position for position, value in zip(window, history, strict=True) if value < now]
    side, others = ("highest", higher) if now >= mean else ("lowest", lower)
    years = f"{len(window) / 12:.0f} years" if len(window) >= 24 else f"{len(window)} months"
    compared = f"The {what} of {now:.2f} percent compares with an average of {mean:.2f} over {years}"
    if not others:
        return f"{compared}, and is the {side} of that time."
    since = f"{month_of(series.dates[others[-1]])} {series.dates[others[-1]].year}"
    extreme = "higher" if side == "highest" else "lower"
    return voice.pick(
        f"{compared}; it was last {extreme} in {since}.",
        f"{compared}. A {extreme} one was last seen in {since}.",
    )


def wrap_note(moves: Sequence[tuple[float, float, str]], group: str, day: date) -> str:
    """A ranking. moves: (week's change, twenty days' change, entity), fractions, best week first."""
    voice = Voice(f"wrap|{group}|{day}")
    up, down = sum(move[0] > 0 for move in moves), sum(move[0] < 0 for move in moves)
    mean = math.fsum(move[0] for move in moves) / len(moves)
    sentences = [f"The week in {group}, to {day_words(day)}."]
    sentences.append(
        voice.pick(
            f"Of {len(moves)}, {up} rose and {down} fell; the average change was {signed(100 * mean)}%.",
            f"{up} gained and {down} lost out of {len(moves)}, for an average of {signed(100 * mean)}%.",
        )
    )
    spread = 100 * (moves[0][0] - moves[-1][0])
    sentences.append(f"{voice.pick('Best to worst', 'The ranking', 'In order')}: ")
    sentences[-1] += ", ".join(f"{entity} {signed(100 * change)}%" for change, _, entity in moves) + "."
    best = max((move[1], move[2]) for move in moves)
    worst = min((move[1], move[2]) for move in moves)
    lead, lag = f"{signed(100 * best[0])}%", f"{signed(100 * worst[0])}%"
    sentences.append(f"The gap between first and last was {spread:.1f} percentage points.")
    sentences.append(
        voice.pick(
            f"Over twenty days {best[1]} led ({lead}) and {worst[1]} trailed ({lag}).",
            f"The twenty-day leader is {best[1]} with {lead}, the last {worst[1]} with {lag}.",
        )
    )
    return " ".join(sentences)
