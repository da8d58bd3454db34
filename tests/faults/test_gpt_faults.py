"""What the gpt programs do when they are interrupted, when the disk is full and when the input is bad."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import gpt.evaluate
import gpt.generate
import gpt.train
import tapelm
from data.documents import DataError
from data.prepare import Config, prepare
from gpt import checkpoint
from gpt.cli import run_program

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--batch-size", "4"]
QUICK = [*SMALL, "--threads", "1", "--device", "cpu", "--eval-batches", "1", "--eval-interval", "1000"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The programs pin threads for their process; measuring the GEMM ceiling takes too long here."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("gpt.session.gemm_peak_flops", lambda device, precision: 1e11)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards and a tokenizer of random words."""
    directory = tmp_path_factory.mktemp("data")
    chosen = random.Random(0)
    texts = [" ".join(chosen.choices(["rates", "rose", "fell", "by", "half"], k=60)) for _ in range(100)]
    tokenizer = tapelm.Tokenizer.train(texts, 270)
    tokenizer.save(directory / "tokenizer.json")
    end = tokenizer.special_tokens["<|endoftext|>"]
    for split in ("train", "val"):
        documents = [np.append(tokenizer.encode(text), np.uint32(end)) for text in texts]
        tapelm.write_shards(documents, directory / split, vocab_size=tokenizer.vocab_size, end_of_text=end)
    return directory


def command(corpus: Path, out: Path, *options: str) -> list[str]:
    program = [sys.executable, "-m", "gpt.train", "--kernels", "plain", *QUICK]
    return [*program, "--data", str(corpus), "--out", str(out), *options]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def wait_for_steps(metrics: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") >= 3:
            return
        time.sleep(0.05)
    pytest.fail(f"no training steps: {process.communicate()}")


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_signal_saves_a_checkpoint_that_resume_goes_on_from(
    number: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    arguments = command(corpus, tmp_path, "--max-steps", "1000000")
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    wait_for_steps(tmp_path / "metrics.jsonl", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if "--resume auto" in line]
    assert len(lines) == 1 and "python -m gpt.train" in lines[0] and str(corpus) in lines[0]

    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    step = checkpoint.read_state(saved)["step"]
    taken = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(taken[-1])["step"] == step and f"stopped after step {step}," in lines[0]

    options = ["--kernels", "plain", "--max-steps", "1000000", "--stop-after", "2", "--resume", "auto"]
    assert gpt.train.main(training(corpus, tmp_path, *options)) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 3))


def test_full_disk_is_one_line_and_leaves_the_older_checkpoint(corpus: Path, tmp_path: Path) -> None:
    options = ["--kernels", "plain", "--max-steps", "20"]
    assert gpt.train.main(training(corpus, tmp_path, *options, "--stop-after", "2")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    largest = max(map(len, before.values()))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    failed = subprocess.run(
        command(corpus, tmp_path, "--max-steps", "20", "--resume", "auto"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        preexec_fn=limit,
        check=False,
    )
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "large" in errors[0].lower() and "safetensors" in errors[0]
    after = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert after == before

    assert gpt.train.main(training(corpus, tmp_path, *options, "--resume", "auto")) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


def fails(
    main, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The error line of a program that has to end with status 2 and nothing but that line."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


def training(data: Path, out: Path, *options: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), *QUICK, *options]


def copy_of(corpus: Path, target: Path) -> Path:
    for path in corpus.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(corpus)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def test_missing_data_names_the_command_that_makes_it(
    corpus: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    main, out = gpt.train.main, tmp_path / "out"
    assert "data.prepare" in fails(main, training(tmp_path / "none", out), monkeypatch, capsys)
    for part in ("train", "val"):
        data = copy_of(corpus, tmp_path / f"without-{part}")
        (data / part / "manifest.json").unlink()
        said = fails(main, training(data, out), monkeypatch, capsys)
        assert "no token shards" in said and "data.prepare" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "huge"], "unknown preset 'huge'; choose one of: demo, seed, finance, tape, gpt2"),
        (["--kernels", "plain", "--precision", "bf16"], "fp32 master"),
        (["--n-head", "3"], "n_embd (32) must be a multiple of n_head (3)"),
        (["--vocab-size", "5"], "vocab_size 5 is smaller than the tokenizer's"),
        (["--block-size", "1000000"], "smaller than one block"),
        (["--device", "nonsense"], "unknown device 'nonsense'"),
        (["--resume", "nowhere"], "nowhere"),
        (["--threads", "-1"], "threads must not be negative"),
        (["--seed", str(2**63)], "seed must be in [0, 2**63)"),
        (["--preset"], "'--preset'"),
        (["--max-step", "3"], "--max-step"),
        (["--learning-rate", "1e30", "--warmup-steps", "0", "--max-steps", "3"], "became"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], message: str, corpus: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    arguments = training(corpus, tmp_path / "out", "--kernels", "plain")
    monkeypatch.setattr(sys, "argv", ["program", *arguments, *options])
    with pytest.raises(SystemExit) as ended:
        run_program(gpt.train.main)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines[-1].startswith("error: ") and message in lines[-1]
    assert sum(line.startswith("error") for line in lines) == 1
    assert not (tmp_path / "out" / "summary.json").exists()


def test_shards_of_another_tokenizer_and_damaged_ones(
    corpus: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    for split in ("train", "val"):
        data = copy_of(corpus, tmp_path / f"damaged-{split}")
        shard = data / split / "shard-00000.bin"
        content = bytearray(shard.read_bytes())
        content[100] ^= 1
        shard.write_bytes(content)
        said = fails(gpt.train.main, training(data, tmp_path / "out"), monkeypatch, capsys)
        assert "is damaged" in said and split in said
    data = copy_of(corpus, tmp_path / "other")
    tapelm.Tokenizer.train(["other words altogether"], 260).save(data / "tokenizer.json")
    said = fails(gpt.train.main, training(data, tmp_path / "out"), monkeypatch, capsys)
    assert "token ids, but" in said and "data.prepare" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", (b"", b"{", b'{"model": {"type": "Unigram"}}', b"\xff\xfe", b"[]"))
def test_tokenizer_of_another_kind(content: bytes, corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    data = copy_of(corpus, tmp_path / "data")
    (data / "tokenizer.json").write_bytes(content)
    said = fails(gpt.train.main, training(data, tmp_path / "out"), monkeypatch, capsys)
    assert "tokenizer.json" in said
    assert not (tmp_path / "out").exists()


def test_resume_on_other_data_is_refused(corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    assert gpt.train.main(training(corpus, out, "--kernels", "plain", "--max-steps", "3")) == 0
    data = copy_of(corpus, tmp_path / "data")
    tokenizer = tapelm.Tokenizer.load(data / "tokenizer.json")
    end = tokenizer.special_tokens["<|endoftext|>"]
    other = [np.append(tokenizer.encode("rates fell " * 400), np.uint32(end))]
    tapelm.write_shards(other, data / "train", vocab_size=tokenizer.vocab_size, end_of_text=end)
    options = ["--kernels", "plain", "--max-steps", "6", "--resume", "auto"]
    said = fails(gpt.train.main, training(data, out, *options), monkeypatch, capsys)
    assert "cannot resume" in said and "shards" in said


def test_evaluate_and_generate_refuse_what_they_cannot_read(
    corpus: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"
    gpt.train.main(training(corpus, out, "--kernels", "plain", "--max-steps", "2"))
    evaluation = ["--checkpoint", str(out), "--data", str(corpus), "--json", str(tmp_path / "e.json")]
    assert "val.jsonl" in fails(gpt.evaluate.main, evaluation, monkeypatch, capsys)
    other = copy_of(corpus, tmp_path / "other")
    tapelm.Tokenizer.train(["other words altogether"], 260).save(other / "tokenizer.json")
    said = fails(gpt.evaluate.main, [*evaluation, "--data", str(other)], monkeypatch, capsys)
    assert "different tokenizers" in said and str(other / "tokenizer.json") in said and str(out) in said
    for option, value in (("--batch-size", "0"), ("--max-bytes", "-1"), ("--threads", "-1")):
        assert option in fails(gpt.evaluate.main, [*evaluation, option, value], monkeypatch, capsys)
    missing = ["--checkpoint", str(tmp_path / "none")]
    for option, value in (("--max-new-tokens", "-1"), ("--temperature", "nan"), ("--seed", "9" * 20)):
        said = fails(gpt.generate.main, [*missing, option, value], monkeypatch, capsys)
        assert option.strip("-").replace("-", "_") in said
    assert "no checkpoint" in fails(gpt.generate.main, missing, monkeypatch, capsys)
    model = out / "checkpoints" / "step-00000002" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    damaged = ["--checkpoint", str(model.parent)]
    assert "model.safetensors does not match" in fails(gpt.generate.main, damaged, monkeypatch, capsys)
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize("days", (-1, 36_501, 10**12))
def test_absurd_embargo_is_refused(days: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"embargo_days must not be negative or above 36500, got {days}"):
        prepare(Config(out=tmp_path / "data", embargo_days=days))
    assert not (tmp_path / "data").exists()
