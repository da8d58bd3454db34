"""The cleaning and deduplication of `data.prepare` on many processes or machines, as a datatrove pipeline.

    python -m data.cluster --input raw/ --out clean/ --executor local --tasks 8 --workers 4
    python -m data.prepare --source files --input 'clean/documents/*.gz' --no-deduplicate --out runs/data

Input are folders of .jsonl files, plain, .gz or .zst, with text and, where known, id, source, date and
available_at. Five stages, each for itself resumable: clean and filter, MinHash signatures, buckets, clusters,
and the documents that stay. One document of a cluster of copies stays, whichever, so that no two copies can
sit on the two sides of a cut. Splits, tokens and the leak check stay with data.prepare. Needs the extra
tapelm[cluster]; the executor slurm submits jobs, ray starts tasks.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from data.cleaning import Filters, clean_document
from data.documents import Document
from data.problems import Problems
from gpt.cli import UserError, parse_options, run_program

SHINGLE_WORDS = 5
BUCKETS, HASHES = 16, 8  # as in data.duplicates


@dataclass(frozen=True)
class ClusterConfig:
    """Cleans and deduplicates .jsonl files in many processes, for data.prepare to split and encode."""

    input: Path
    """Folder of .jsonl files, searched recursively."""
    out: Path
    """documents/, dropped.json of each task, and what the stages hand to each other."""
    executor: Literal["local", "slurm", "ray"] = "local"
    tasks: int = 4
    """Pieces of the input; more than there are files does not help."""
    workers: int = 2
    """Tasks that run at a time."""
    language: Literal["any", "en"] = "any"
    min_chars: int = 1
    partition: str = "cpu"
    """Slurm's partition."""
    hours: int = 24
    """Slurm's time limit of a stage."""

    def __post_init__(self) -> None:
        for name in ("tasks", "workers", "min_chars", "hours"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not any(self.input.rglob("*.jsonl*")):
            raise UserError(f"--input {self.input} has no .jsonl file")


@dataclass(frozen=True)
class Clean:
    """A step for datatrove: our cleaning and filters; every task writes what it dropped."""

    filters: Filters
    counts: Path

    def __call__(self, data: Iterator[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        problems = Problems()
        for document in data:
            source = str(document.metadata.get("source") or "unknown")
            cleaned = clean_document(Document(document.text, source, None, None), self.filters, problems)
            if cleaned is not None:
                document.text = cleaned.text
                yield document
        self.counts.mkdir(parents=True, exist_ok=True)
        (self.counts / f"{rank:05}.json").write_text(json.dumps(problems.entry()["dropped_documents"]))


def record(_: Any, document: Any) -> dict[str, Any]:
    """A document as data.prepare reads it."""
    known = {name: document.metadata.get(name) for name in ("source", "date", "available_at")}
    return {"id": document.id, "text": document.text, **known}


def split_words(kind: Any) -> Any:
    """A datatrove WordTokenizer that splits at white space, as data.duplicates does, and needs no model."""

    class Words(kind):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    return Words()


def stages(config: ClusterConfig) -> list[tuple[str, list[Any], int]]:
    """(name, pipeline, tasks) of each stage. Raises UserError where datatrove is missing."""
    try:
        reader, writer = (
            import_module(f"datatrove.pipeline.{name}.jsonl") for name in ("readers", "writers")
        )
        minhash = import_module("datatrove.pipeline.dedup.minhash")
        tokenizer: Any = import_module("datatrove.utils.word_tokenizers").WordTokenizer
    except ImportError as error:
        raise UserError(f"data.cluster needs datatrove: pip install 'tapelm[cluster]' ({error})") from error
    folders = {name: str(config.out / name) for name in ("cleaned", "signatures", "buckets", "clusters")}
    settings = minhash.MinhashConfig(n_grams=SHINGLE_WORDS, num_buckets=BUCKETS, hashes_per_bucket=HASHES)
    filters = Filters(min_chars=config.min_chars, language=config.language)

    def read(folder: str) -> Any:
        return reader.JsonlReader(folder, glob_pattern="**/*.jsonl*")

    def write(folder: str) -> Any:
        return writer.JsonlWriter(folder, adapter=record)

    clean = Clean(filters, config.out / "dropped")
    signature = minhash.MinhashDedupSignature(
        folders["signatures"], config=settings, language=split_words(tokenizer)
    )
    bucket = minhash.MinhashDedupBuckets(folders["signatures"], folders["buckets"], config=settings)
    cluster = minhash.MinhashDedupCluster(folders["buckets"], folders["clusters"], config=settings)
    keep = minhash.MinhashDedupFilter(folders["clusters"])
    cleaned = folders["cleaned"]
    return [
        ("clean", [read(str(config.input)), clean, write(cleaned)], config.tasks),
        ("signatures", [read(cleaned), signature], config.tasks),
        ("buckets", [bucket], BUCKETS),
        ("clusters", [cluster], 1),
        ("documents", [read(cleaned), keep, write(str(config.out / "documents"))], config.tasks),
    ]


def executors(config: ClusterConfig) -> list[Any]:
    """The stages, each depending on the one before it."""
    module = import_module(f"datatrove.executor.{config.executor}")
    kind: Callable[..., Any] = getattr(module, f"{config.executor.title()}PipelineExecutor")
    chain: list[Any] = []
    for name, pipeline, tasks in stages(config):
        settings: dict[str, Any] = {"tasks": tasks, "workers": config.workers}
        settings |= {"logging_dir": str(config.out / "logs" / name), "depends": chain[-1] if chain else None}
        if config.executor == "slurm":
            settings |= {"job_name": f"tapelm-{name}", "time": f"{config.hours}:00:00"}
            settings["partition"] = config.partition
        chain.append(kind(pipeline=pipeline, **settings))
    return chain


def main(arguments: list[str]) -> int:
    config = parse_options(ClusterConfig, arguments, prog="python -m data.cluster", description=__doc__)
    executors(config)[-1].run()
    return 0


if __name__ == "__main__":
    run_program(main)
