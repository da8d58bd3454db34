"""Importing this imports what steps of transformers and peft import when they first need it."""

from __future__ import annotations

import importlib

from gpt import extras

extras.peft()
importlib.import_module("transformers.models.llama.modeling_llama")
