"""What the commands share: bad usage is one line on stderr and exit code 2."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastgan.config import PRESETS, Config, UsageError, applies, flag

Prose = argparse.RawDescriptionHelpFormatter  # for a description that is a module's docstring


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        """UsageError instead of an exit."""
        raise UsageError(f"{message}; {self.prog} --help lists the options")

    def add_config(self, **types: Callable[[str], Any]) -> None:
        """--arch and a flag for every field of Config; a flag that is not given leaves no attribute.

        `types` convert the flags that take more than their field does.
        """
        self.add_argument(
            "--arch", required=True, metavar="ARCH", help=f"what to train: {', '.join(PRESETS)}"
        )
        for field in dataclasses.fields(Config):
            if field.name in ("arch", "classes"):  # the data says how many classes there are
                continue
            values = {arch: preset.get(field.name, field.default) for arch, preset in PRESETS.items()}
            shown = {str(v) or "none" for arch, v in values.items() if applies(field, arch)}
            default = shown.pop() if len(shown) == 1 else "by --arch"
            options: dict[str, Any] = {"help": f"{field.metadata['help']} (default: {default})"}
            if field.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["type"] = types.get(field.name, field.type)
                options["metavar"] = field.name.upper() if not field.metadata["choices"] else None
                options["choices"] = field.metadata["choices"]
            self.add_argument(flag(field.name), default=argparse.SUPPRESS, **options)


def run(body: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """The exit code of `body(argv)`: 2 for a UsageError, 130 for Ctrl-C."""
    try:
        return body(argv)
    except UsageError as error:
        print(f"fastgan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfastgan: stopped", file=sys.stderr)
        return 130


def duration(seconds: float) -> str:
    """3m05s, 12s below a minute, or 11h06m from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
