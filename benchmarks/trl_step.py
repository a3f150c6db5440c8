"""TRL's half of `grpo_step.py`: a GRPOTrainer that takes one step per line of standard input.

Needs trl. It reads its setting as JSON from the command line and answers on standard output, one
JSON line each.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from PIL import Image
from transformers import Qwen2VLProcessor, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import spread, variety_reward
from rewards.base import Reward
from rewards.rubric import REWARDS
from rlmed.core.types import Completion, Example
from rlmed.data.examples import read_examples
from rlmed.data.prompts import load_processor
from rlmed.data.templates import PROMPT_SUFFIX

MAX_STEPS = 10_000


class ImageProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its video part, which needs torchvision.

    transformers reads the parts that a processor has from the parameters of its constructor.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        """Bind an image processor and a tokenizer."""
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        super(Qwen2VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


class Turns(TrainerCallback):
    """Waits for the word before each step and reports its seconds after it.

    The clock runs from `on_step_begin` to `on_step_end`, which holds sampling, rewards, loss,
    gradient and optimizer, but not the reading of the data set.
    """

    def __init__(self, max_tokens: int) -> None:
        """Nothing has been timed yet."""
        self.trainer: GRPOTrainer | None = None
        self._max_tokens = max_tokens
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait; the end of the input ends the process."""
        if not sys.stdin.readline():
            sys.exit(0)
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report."""
        seconds = time.perf_counter() - self._start
        assert self.trainer is not None
        metrics = self.trainer._metrics["train"]
        shortest = metrics["completions/min_length"][-1]
        if shortest != self._max_tokens:
            raise RuntimeError(f"TRL sampled a completion of {shortest} tokens: it did not do the measured work")
        answer({"seconds": seconds, "kl": metrics["kl"][-1]})


def answer(content: dict[str, Any]) -> None:
    """Print one line for the process that started this."""
    sys.stdout.write(json.dumps({"benchmark": "trl", **content}) + "\n")
    sys.stdout.flush()


def as_row(example: Example) -> dict[str, Any]:
    """A row of TRL's data set: the same text and image as our renderer gives the model."""
    content = f"{example.question_text}\n{PROMPT_SUFFIX}"
    assert example.image is not None
    image = Image.open(example.image).convert("RGB")
    return {"prompt": [{"role": "user", "content": content}], "image": image, "place": int(example.id[-5:])}


def reward_functions(examples: Sequence[Example], rewards: Mapping[str, Reward]) -> list[Any]:
    """Our rewards in TRL's signature; `place` is a row's index in `examples`."""

    def wrap(name: str, reward: Reward) -> Any:
        def score(completions: list[Any], place: list[int], **kwargs: Any) -> list[float]:
            texts = [messages[0]["content"] for messages in completions]
            return [reward(examples[at], _completion(text)) for at, text in zip(place, texts, strict=True)]

        score.__name__ = name
        return score

    return [wrap(name, reward) for name, reward in rewards.items()]


def _completion(text: str) -> Completion:
    nothing = torch.zeros(0).numpy()
    return Completion(nothing.astype("int64"), nothing, text, "length")


def grpo_config(setting: dict[str, Any], output: str, **more: Any) -> GRPOConfig:
    """What all our comparisons with TRL have in common, and `more`."""
    return GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_generations=setting["group_size"],
        max_completion_length=setting["max_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=setting["kl_coef"],
        use_bias_correction_kl=False,
        loss_type="grpo",
        learning_rate=setting["learning_rate"],
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        **more,
    )


def build(setting: dict[str, Any], output: str) -> GRPOTrainer:
    """The trainer with the settings of our step; what they leave open is TRL's default."""
    completions = setting["prompts"] * setting["group_size"]
    args = grpo_config(
        setting,
        output,
        per_device_train_batch_size=completions,
        gradient_accumulation_steps=1,
        max_steps=MAX_STEPS,
    )
    tokenizer, pictures = load_processor(setting["model"])
    examples = read_examples(Path(setting["questions"])).examples
    turns = Turns(setting["max_tokens"])
    trainer = GRPOTrainer(
        model=setting["model"],
        reward_funcs=reward_functions(examples, {**REWARDS, "variety": variety_reward}),
        args=args,
        train_dataset=datasets.Dataset.from_list([as_row(example) for example in examples]),
        processing_class=ImageProcessor(pictures.image_processor, tokenizer, chat_template=tokenizer.chat_template),
        callbacks=[turns],
    )
    turns.trainer = trainer
    # the end token ends nothing, as on our side
    trainer.eos_token_ids = [-1]
    trainer.generation_config.eos_token_id = None
    trainer.generation_kwargs["eos_token_id"] = None
    # what follows an end token may be padding, which TRL would take for the end of the completion
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    trainer.generation_config.suppress_tokens = [*(trainer.generation_config.suppress_tokens or []), *ends]
    return trainer


def main() -> None:
    """Build the trainer, say so, and take steps until the input ends."""
    setting = json.loads(sys.argv[1])
    torch.set_num_threads(setting["threads"])
    with tempfile.TemporaryDirectory() as output:
        trainer = build(setting, output)
        lengths = prompt_lengths(trainer)
        versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
        answer({**versions, "threads": torch.get_num_threads(), "prompt_tokens": lengths, "images": True})
        trainer.train()


def prompt_lengths(trainer: GRPOTrainer) -> dict[str, int]:
    """Shortest and longest prompt as TRL tokenizes them."""
    rows = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": row["image"]},
                    {"type": "text", "text": row["prompt"][0]["content"]},
                ],
            }
        ]
        for row in trainer.train_dataset
    ]
    return spread([len(ids) for ids in trainer._tokenize_prompts(rows)[0]])


if __name__ == "__main__":
    main()
