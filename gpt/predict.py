"""Forecast from a tape of numbers: python -m gpt.predict --checkpoint RUN --data DIR [--horizon 5]

For each entity, the distribution of its next daily log-return (of its difference, where the tape has those)
after the last row in the data directory, or of the sum over the next days, beside the EWMA forecast. A day of
a weekly or monthly series is its next week or month. Rows count in whatever split they are, and where they
are in none. A single day is exact: the model's probabilities of the bins, turned into changes as gpt.evaluate
does it. The sum over several days is that of sampled paths, see gpt.paths; EWMA's is normal with the variance
of one day times their number.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import dataclasses
import difflib
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from data.corpus import progress_on_terminal
from data.documents import DataError
from data.numbers import TAPE, Tape, is_of_numbers
from data.series import spacing_of
from gpt.baselines import TRAIN, in_train
from gpt.checkpoint import load_model
from gpt.cli import UserError, parse_options, prepare_output, run_program, write_atomically
from gpt.corpus import no_data, open_tokenizer
from gpt.evaluate import check_same_tape, check_same_tokenizer
from gpt.forecast import CHANCE, bin_probabilities, sides
from gpt.hardware import fingerprint, pick_device, set_threads
from gpt.model import GPT
from gpt.paths import Continued, continued, sample_paths
from gpt.prediction_table import print_predictions
from tapelm import Tokenizer

LEVELS = (2.5, 10.0, 25.0, 50.0, 75.0, 90.0, 97.5)  # of the quantiles, in percent
FEWEST_SAMPLES = 100


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Forecasts the returns of the next days from a model of a tape of numbers."""

    checkpoint: Path
    """A run directory or one of its checkpoints."""
    data: Path
    """Directory of the tape it was trained on, or of one with later rows but the same bins and entities."""
    entity: tuple[str, ...] = ()
    """Names of entities as the tape has them; without any, all that train has rows of."""
    horizon: int = 1
    """Days whose changes are summed: rows to come, not calendar days."""
    samples: int = 1000
    """Paths of each entity where the horizon is more than a day; four times as many halve their error."""
    seed: int = 0
    """Of the paths. An entity's are the same whichever others are asked for."""
    as_of: date | None = None
    """Use rows released up to this day alone (YYYY-MM-DD); default: all."""
    json: Path | None = None
    """Also write the forecasts to this file, changes as fractions (0.01 is 1%) or in the entity's units."""
    batch_size: int = 256
    """Paths, or entities, in one forward pass; paths are the same with another up to rounding."""
    kernels: Literal["auto", "plain", "optimized"] = "auto"
    """auto takes the table of ops the model was trained with."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""

    def __post_init__(self) -> None:
        for name, least in (("horizon", 1), ("samples", FEWEST_SAMPLES), ("batch_size", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be in [0, 2**63), got {self.seed}")


def predict(config: PredictConfig) -> dict[str, Any]:
    """The result that main() writes: {"checkpoint", "horizon", ..., "forecasts": [of_entity, ...]}."""
    device = pick_device(config.device)
    model, checkpoint, state = load_model(config.checkpoint, kernels=config.kernels, device=str(device))
    tokenizer = open_tokenizer(checkpoint / "tokenizer.json")
    if not is_of_numbers(tokenizer):
        raise UserError(
            f"{checkpoint} is a model of text, with which python -m gpt.generate --checkpoint "
            f"{config.checkpoint} writes; forecasts need one of a tape of numbers, see data.prepare --view"
        )
    tape = open_tape(config.data, checkpoint, state)
    options = {name: getattr(config, name) for name in ("horizon", "samples", "seed", "batch_size")}
    made = forecast(model, tokenizer, tape, config.entity, as_of=config.as_of, **options)
    return {
        "checkpoint": str(checkpoint),
        "step": state["step"],
        "data": str(config.data),
        "tape_sha256": Tape.sha256(config.data),
        "trained_on_rows_until": _iso(tape.rows["released"][tape.rows["split"] == TRAIN].max()),
        **made,
        "machine": fingerprint(device),
    }


def open_tape(data: Path, checkpoint: Path, state: dict[str, Any]) -> Tape:
    """The tape in `data`. Raises UserError unless it has the bins and entities that the model learned."""
    if not data.is_dir():
        raise UserError(no_data(data))
    if not (data / TAPE).is_file():
        raise UserError(f"{data} holds no tape of numbers: use {state['config']['data']}, as in training")
    check_same_tokenizer(checkpoint / "tokenizer.json", data / "tokenizer.json")
    try:
        check_same_tape(checkpoint, state, data)
    except UserError as error:
        learned = Path(state["config"]["data"])
        kept = state.get("tape_sha256") is not None and Tape.sha256(learned) == state["tape_sha256"]
        if not kept or (learned / TAPE).read_bytes() != (data / TAPE).read_bytes():
            raise UserError(
                f"{error} (later rows are fine where bins and entities are the same, as comparing with the "
                "tape that it was trained on has to show: keep that one, and its cuts)"
            ) from error
    try:
        return Tape.load(data)
    except DataError as error:
        raise UserError(str(error)) from error


def forecast(
    model: GPT,
    tokenizer: Tokenizer,
    tape: Tape,
    names: Sequence[str] = (),
    *,
    horizon: int = 1,
    samples: int = 1000,
    seed: int = 0,
    batch_size: int = 256,
    as_of: date | None = None,
) -> dict[str, Any]:
    """Forecasts of the entities called `names`, all if none is. Raises UserError for one that cannot be had.

    Where all are asked for, those without train rows or without any by `as_of` are left out and named.
    """
    entities = chosen_entities(tape, names)
    known = in_train(tape)
    origins = {e: continued(tape, e, horizon, as_of or date.max) for e in entities if known[e]}
    found = {entity: of for entity, of in origins.items() if of is not None}
    missing = [tape.entities[entity][0] for entity in entities if entity not in found]
    if missing and (names or not found):
        when = f" released by {as_of}" if as_of else ""
        raise UserError(f"{', '.join(missing)}: no train rows, from which the model knows it, or none{when}")
    chances = first_day(model, tokenizer, tape, list(found.values()), batch_size)
    forecasts = []
    with progress_on_terminal() as progress:
        task = progress.add_task("entities", total=len(found), visible=horizon > 1)
        for (entity, of), probabilities in zip(found.items(), chances, strict=True):
            if horizon == 1:
                model_says = exactly(tape, of, probabilities)
            else:
                levels = np.random.default_rng([seed, entity]).random((samples, horizon))
                parts = [levels[start : start + batch_size] for start in range(0, samples, batch_size)]
                paths = [sample_paths(model, tokenizer, of, probabilities, part) for part in parts]
                model_says = from_samples(np.concatenate(paths).sum(axis=1))
            forecasts.append(described(of, horizon) | {"model": model_says, "ewma": ewma(of, horizon)})
            progress.advance(task)
    return {
        "horizon": horizon,
        "samples": samples if horizon > 1 else None,
        "seed": seed if horizon > 1 else None,
        "context_rows": tape.context,
        "left_out": missing,
        "direction_note": CHANCE,
        "forecasts": forecasts,
    }


def chosen_entities(tape: Tape, names: Sequence[str]) -> list[int]:
    """Numbers of the entities called `names`, once each; all of them if none is."""
    numbers = {name: number for number, (name, _) in enumerate(tape.entities)}
    for name in names:
        if name not in numbers:
            folded = {known.lower(): known for known in numbers}
            near = [known for known in numbers if name.lower() in known.lower()]
            near = near or [folded[key] for key in difflib.get_close_matches(name.lower(), folded, 3, 0.4)]
            hint = f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else "it has no name like it"
            raise UserError(
                f"no entity {name!r} among the {len(numbers)} of the tape: {hint} (without --entity, all are "
                "forecast)"
            )
    return list(dict.fromkeys(numbers[name] for name in names)) or list(numbers.values())


def first_day(
    model: GPT, tokenizer: Tokenizer, tape: Tape, origins: list[Continued], batch_size: int
) -> np.ndarray:
    """(n, BINS) probabilities of the bin of each one's first day to come, from a full context."""
    lengths = np.cumsum([0, *(of.tape.rows.size for of in origins)])[:-1]
    rows = lengths + np.array([of.last + 1 for of in origins])
    together = dataclasses.replace(tape, rows=np.concatenate([of.tape.rows for of in origins]))
    return bin_probabilities(model, tokenizer, together, rows, batch_size)


def exactly(tape: Tape, of: Continued, probabilities: np.ndarray) -> dict[str, Any]:
    """What is said of the first day, from probabilities (BINS,) of its bin."""
    volatility = float(of.tape.rows["volatility"][of.last + 1])
    levels = np.array(LEVELS)[None] / 100
    quantiles = volatility * tape.bins.quantiles(probabilities[None], levels)[0]
    mean, square = (float(probabilities @ moment) for moment in tape.bins.moments())
    deviation = volatility * (square - mean**2) ** 0.5
    return said(quantiles, volatility * mean, deviation, float(probabilities @ sides(tape)[0]))


def from_samples(changes: np.ndarray) -> dict[str, Any]:
    """What is said of changes (paths,)."""
    quantiles = np.quantile(changes, np.array(LEVELS) / 100)
    return said(quantiles, float(changes.mean()), float(changes.std()), float(np.mean(changes > 0)))


def ewma(of: Continued, horizon: int) -> dict[str, Any]:
    """Normal, mean 0, with the trailing volatility of the first day, and its variance on each day."""
    normal = NormalDist(0, float(of.tape.rows["volatility"][of.last + 1]) * horizon**0.5)
    return said(np.array([normal.inv_cdf(level / 100) for level in LEVELS]), 0.0, normal.stdev, 0.5)


def said(quantiles: np.ndarray, mean: float, deviation: float, gain: float) -> dict[str, Any]:
    named = {f"{level:g}": float(value) for level, value in zip(LEVELS, quantiles, strict=True)}
    return {
        "quantiles": named,
        "mean": mean,
        "standard_deviation": deviation,
        "probability_of_gain": gain,
    }


def described(of: Continued, horizon: int) -> dict[str, Any]:
    """Who is forecast, after which row and for which days."""
    rows, last = of.tape.rows, of.last
    name, domain = of.tape.entities[rows["entity"][last]]
    return {
        "entity": name,
        "domain": domain,
        "change": "difference" if of.tape.differences[rows["entity"][last]] else "log-return",
        "rows": spacing_of(rows["day"].tolist()).name,
        "as_of": _iso(rows["day"][last]),
        "released": _iso(rows["released"][last]),
        "first_day": _iso(rows["day"][last + 1]),
        "last_day": _iso(rows["day"][last + horizon]),
        "context_rows": min(last + 1, of.tape.context - 1),
        "level": float(rows["level"][last]),
        "volatility": float(rows["volatility"][last + 1]),
    }


def _iso(ordinal: Any) -> str:
    return date.fromordinal(int(ordinal)).isoformat()


def main(arguments: list[str]) -> int:
    config = parse_options(PredictConfig, arguments, prog="python -m gpt.predict")
    set_threads(config.threads)
    if config.json is not None:
        prepare_output(config.json)
    result = predict(config)
    if config.json is not None:
        write_atomically(config.json, json.dumps(result, indent=1) + "\n")
    print_predictions(result)
    return 0


if __name__ == "__main__":
    run_program(main)
