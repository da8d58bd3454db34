"""What `python -m benchmarks` can do: the options of each subject, a dataclass, with run() -> exit status."""

from typing import Annotated, Any, Union

import tyro

from benchmarks.commands import everything, hf, ladder, timed, untimed

COMMANDS: dict[str, type[Any]] = {
    "ops": timed.Ops,
    "train": timed.Train,
    "ladder": ladder.Ladder,
    "tokenizer": timed.Tokenizer,
    "loader": timed.Loader,
    "generate": timed.Generate,
    "llama": timed.Llama,
    "hf": hf.Hf,
    "peers": timed.Peers,
    "all": everything.All,
    "scaling": timed.Scaling,
    "plan": untimed.Plan,
    "models": untimed.Models,
    "compare": untimed.Compare,
    "static": untimed.Static,
    "tune": untimed.Tune,
    "gpu-check": untimed.GpuCheck,
}

AnyCommand: Any = Union[  # noqa: UP007
    tuple(Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in COMMANDS.items())
]
"""All of them, as tyro reads them."""
