"""Run `rlmed COMMAND …` or `python -m rlmed COMMAND …` as `python -m rlmed.COMMAND …`."""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import version

from rlmed.core.spelling import closest

COMMANDS = {
    "launch": "train a policy by reinforcement learning",
    "sft": "fine-tune on answers, for alignment or as a baseline",
    "evaluate": "measure a model's accuracy, with controls",
    "reliability": "measure calibration, consistency and reliance on the image",
    "reproduce": "compare base, SFT and RL over several seeds in one table",
    "ask": "ask one question about an image",
    "prepare": "convert published data, or your own, to rlmed's format",
    "leakage": "find test rows that are in the training data too",
    "report": "write the HTML report of a run folder",
    "studio": "show run folders in a browser, while they run",
    "export": "write a run's model as a folder for transformers and vLLM, with its card",
    "init": "write a configuration of your own, for your data, model and GPU",
    "doctor": "check what this machine can run",
}


def main() -> None:
    """Run the command that the first argument names, list all without one, or print `--version`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"rlmed {name}"]
        runpy.run_module(f"rlmed.{name}", run_name="__main__", alter_sys=True)
        return
    if name == "--version":
        sys.stdout.write(f"rlmed {version('rlmed')}\n")
        return
    listed = "\n".join(f"  {command:11} {what}" for command, what in COMMANDS.items())
    usage = f"usage: rlmed COMMAND ...\n\n{listed}\n\n`rlmed COMMAND --help` shows a command's arguments.\n"
    if name in ("-h", "--help"):
        sys.stdout.write(usage)
        return
    near = closest(name, COMMANDS)
    meant = f"did you mean {near}? " if near else ""
    sys.stderr.write(f"error: rlmed {name}: unknown command; {meant}choose one of {', '.join(COMMANDS)}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
