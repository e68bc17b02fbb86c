"""What the commands share: bad usage is one line on stderr and exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from fastgan.config import UsageError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists the options")


def run(body: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """The exit code of `body(argv)`."""
    try:
        return body(argv)
    except UsageError as error:
        print(f"fastgan: {error}", file=sys.stderr)
        return 2
