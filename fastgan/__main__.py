"""The `fastgan` command: `fastgan train ...` is `python -m fastgan.train ...`."""

import sys
from importlib import import_module

COMMANDS = {  # each is the module of its name
    "train": "train a GAN, or resume a run",
    "prepare": "make images one file that training maps",
    "generate": "make pictures, movies and data sets; walk through the latent space",
    "evaluate": "judge a generator: FID, KID and others",
    "report": "write a page on a run, or one that compares several",
    "convert": "read networks of public implementations",
    "export": "write a generator as ONNX or an AOTInductor package",
    "profile": "measure a training step here, or estimate it for another device",
    "traffic": "count the kernels and bytes that fusion saves",
    "doctor": "print the environment and verify every operation on this device",
}


def main() -> int:
    """Hand the arguments to the command that they name; returns its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        return import_module(f"fastgan.{name}").main(sys.argv[2:])
    asked = name in ("-h", "--help")
    if name and not asked:
        print(f"fastgan: there is no command {name}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    lines = ["usage: fastgan COMMAND ...; fastgan COMMAND --help lists its options", ""]
    lines += [f"  {name:9} {about}" for name, about in COMMANDS.items()]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
