"""The build backend: setuptools', which builds with the release of torch that the environment has.

pip builds in an environment of its own. Were torch among the requirements in pyproject.toml, it would be the
newest in the range there, and kernels that are built with one release cannot be loaded beside another.
"""

from __future__ import annotations

import site
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """The torch to build with: the installed release if it is in the project's range, else that range, from
    which the newest is taken both here and to run with."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = [each for each in map(Requirement, project["dependencies"]) if each.name == "torch"]
    # Isolation hides these folders from imports; they are those of the environment all the same.
    folders = [*([site.getusersitepackages()] if site.ENABLE_USER_SITE else []), *site.getsitepackages()]
    for installed in distributions(name="torch", path=folders):
        if installed.version in torch.specifier:
            return [f"torch=={Version(installed.version).public}"]
    return [str(torch)]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
