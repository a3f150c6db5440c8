"""TRL's half of `trl_curves.py`: a GRPOTrainer on text that takes one step a line of its input.

Needs trl. It reads its setting as JSON from the command line and answers on standard output, one
JSON line each.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from benchmarks.trl_step import answer, grpo_config, reward_functions
from rewards.rubric import REWARDS
from rlmed.data.examples import read_examples


class Turns(TrainerCallback):
    """Waits for the word before each step, and reports its seconds and rewards after it."""

    def __init__(self) -> None:
        """Nothing has been timed yet."""
        self.trainer: GRPOTrainer | None = None
        self._wall = self._cpu = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait; the end of the input ends the process."""
        if not sys.stdin.readline():
            sys.exit(0)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report."""
        seconds, cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu
        assert self.trainer is not None
        metrics = self.trainer._metrics["train"]
        rewards = {name: metrics[f"rewards/{name}/mean"][-1] for name in self.trainer.reward_func_names}
        figures = {"reward": metrics["reward"][-1], "kl": metrics["kl"][-1], **rewards}
        answer(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "length": metrics["completions/mean_length"][-1],
                **figures,
            }
        )


def build(setting: dict[str, Any], output: str) -> GRPOTrainer:
    """The trainer with our settings; what they leave open is TRL's default."""
    args = grpo_config(
        setting,
        output,
        seed=setting["seed"],
        # a group at a time, which bounds TRL's memory: the gradient is that of the whole batch
        per_device_train_batch_size=setting["group_size"],
        gradient_accumulation_steps=setting["prompts"],
        epsilon=setting["clip_ratio"],
        adam_beta1=setting["betas"][0],
        adam_beta2=setting["betas"][1],
        weight_decay=setting["weight_decay"],
        max_grad_norm=setting["max_grad_norm"],
        max_steps=setting["steps"],
        # the rows come in our order already
        shuffle_dataset=False,
    )
    examples = read_examples(Path(setting["questions"])).examples
    rows = [
        {
            "prompt": [{"role": "user", "content": setting["template"].replace("{question}", example.question_text)}],
            "place": at,
        }
        for at, example in enumerate(examples)
    ]
    turns = Turns()
    trainer = GRPOTrainer(
        model=setting["model"],
        reward_funcs=reward_functions(examples, {name: REWARDS[name] for name in setting["rewards"]}),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(setting["model"]),
        callbacks=[turns],
    )
    turns.trainer = trainer
    # completions end with the same tokens as on our side
    trainer.eos_token_ids = setting["end_token_ids"]
    trainer.generation_config.eos_token_id = setting["end_token_ids"]
    trainer.generation_kwargs["eos_token_id"] = setting["end_token_ids"]
    return trainer


def main() -> None:
    """Build the trainer, say so, take the steps, and save the model."""
    setting = json.loads(sys.argv[1])
    torch.set_num_threads(setting["threads"])
    with tempfile.TemporaryDirectory() as output:
        trainer = build(setting, output)
        prompts = trainer._tokenize_prompts([row["prompt"] for row in trainer.train_dataset])[0]
        versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
        answer({**versions, "threads": torch.get_num_threads(), "prompts": [list(ids) for ids in prompts]})
        trainer.train()
        trainer.save_model(setting["out"])
        answer({"saved": True})


if __name__ == "__main__":
    main()
