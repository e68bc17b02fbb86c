"""The `fastgan` command: `fastgan train ...` is `python -m fastgan.train ...`."""

import sys

from fastgan import convert, doctor, evaluate, export, generate, prepare, profile, report, train

COMMANDS = {
    "train": train.main,
    "prepare": prepare.main,
    "generate": generate.main,
    "evaluate": evaluate.main,
    "convert": convert.main,
    "profile": profile.main,
    "doctor": doctor.main,
    "report": report.main,
    "export": export.main,
}


def main() -> int:
    """Hand the arguments to the command that they name; returns its exit code."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        return COMMANDS[sys.argv[1]](sys.argv[2:])
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    asked = wanted in ("-h", "--help")
    print(f"usage: fastgan {{{','.join(COMMANDS)}}} ...", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
