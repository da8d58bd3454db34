"""Libraries of the extras, imported when they are needed; without one, a sentence that names its extra."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

from gpt.cli import UserError


def _load(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"this needs {name}: pip install -e '.[{extra}]'") from error


def transformers() -> ModuleType:
    """transformers without its progress bars and advice, which would bury a run's own lines."""
    quiet_bitsandbytes()
    library = _load("transformers", "llama")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def quiet_bitsandbytes() -> None:
    """Importing it warns of kernels that it could download; peft imports it, too."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def tokenizers() -> ModuleType:
    """It comes with transformers."""
    return _load("tokenizers", "llama")


def peft() -> ModuleType:
    transformers()
    return _load("peft", "llama")


def bitsandbytes() -> ModuleType:
    transformers()
    return _load("bitsandbytes", "llama")


def gguf() -> ModuleType:
    return _load("gguf", "llama")


def unsloth() -> ModuleType:
    """To be imported before transformers, parts of which it replaces."""
    return _load("unsloth", "unsloth")
