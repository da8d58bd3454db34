"""Benchmarks: python -m benchmarks SUBJECT [OPTIONS]; --help tells the subjects, SUBJECT --help its options.

What a subject needs is imported only when it runs: before that the process may have to start anew, and Ctrl-C
is to end it without a traceback.
"""

from __future__ import annotations

import sys

from benchmarks import kept_memory
from gpt.cli import UserError, parse_options, run_program

KEPT = {"ops", "train", "ladder", "scaling", "peers", "generate", "llama", "hf", "all"}
"""Subjects that are measured with memory that the C library keeps."""


def main(arguments: list[str]) -> int:
    from benchmarks.commands import COMMANDS, AnyCommand

    prog = "python -m benchmarks"
    if command := COMMANDS.get(next(iter(arguments), "")):
        return parse_options(command, arguments[1:], prog=f"{prog} {arguments[0]}").run()
    if arguments and arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments):
        raise UserError(f"the subject comes before its options: {prog} SUBJECT [OPTIONS]; see {prog} --help")
    return parse_options(AnyCommand, arguments, prog=prog).run()


if __name__ == "__main__":
    if KEPT & set(sys.argv[1:2]):
        kept_memory.restart()
    run_program(main)
