"""How long does one whole GRPO step take, beside TRL's GRPOTrainer?

A step is: 8 prompts with images rendered, 8 completions x 64 tokens sampled for each, rewards,
reference log-probabilities, loss with kl_coef 0.04, gradient, AdamW. The images have the tiny
model's 16 visual tokens (prompts of about 54) and 512, as the paper's have. Both sides learn from
the same questions with the same rewards in float32; TRL runs in a process of its own
(`benchmarks/trl_step.py`), and the two take their steps in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import (
    MAX_PROMPT_TOKENS,
    ROOT,
    Side,
    Timing,
    add_arguments,
    alternate,
    find_model,
    make_renderer,
    model_facts,
    never_end,
    render_prompts,
    report,
    sampling,
    spread,
    start,
    timed,
    variety_reward,
    with_visual_tokens,
    write_examples,
    write_result,
)
from learner.advantages import AdvantageEstimator
from learner.learner import PolicyLearner
from rewards.choice import choice_reward
from rewards.format import format_reward
from rewards.rubric import Rubric, WeightedReward, per_completion
from rlmed.cluster.memory import keep_freed_memory
from rlmed.controller import StepResult, train
from rlmed.core.config.composing import compose_config
from rlmed.core.tracing import Tracer
from rlmed.core.types import Example
from rlmed.data.stream import PromptStream
from rlmed.models.policy import load_policy
from rollout.buffer import GroupBuffer
from rollout.local import LocalPool
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

KL_COEF = 0.04
LEARNING_RATE = 1e-6
WARMUP = 2
"""Steps of each side that do not count."""
SETTING = ("prompts", "group_size", "max_tokens", "rounds")
"""Arguments that the result keeps."""


class OurTrainer:
    """The loop of `rlmed.controller`, one step at a time, with a tracer for its stages."""

    def __init__(self, folder: Path, name: str, examples: tuple[Example, ...], arguments: argparse.Namespace) -> None:
        """Build what `cluster=local` builds."""
        self.tracer = Tracer()
        self.done = 0
        self._arguments = arguments
        keep_freed_memory()
        policy, reference = load_policy(folder), load_policy(folder)
        never_end(policy)
        reference.model.requires_grad_(False)
        self.facts = model_facts(policy, name)
        defaults = compose_config("train", ["data=jsonl"])
        renderer = make_renderer(folder)
        self.prompt_tokens = spread([len(prompt.token_ids) for prompt in render_prompts(renderer, examples)])
        limits = EngineLimits(
            max_completions=arguments.prompts * arguments.group_size, max_prompt_tokens=MAX_PROMPT_TOKENS
        )
        self._pool = LocalPool(NativeEngine(policy, renderer.decode, limits))
        self._learner = PolicyLearner(
            policy,
            reference,
            dataclasses.replace(defaults.algo.loss, kl_coef=KL_COEF),
            dataclasses.replace(defaults.learner, lr=LEARNING_RATE, lr_schedule="constant", token_budget=2**20),
            total_steps=1000,
            max_tokens=arguments.max_tokens,
            temperature=1.0,
        )
        rubric = Rubric(
            [
                WeightedReward("format", per_completion(format_reward), 1.0),
                WeightedReward("choice", per_completion(choice_reward), 1.0),
                WeightedReward("variety", per_completion(variety_reward), 1.0),
            ]
        )
        self._stream = PromptStream(
            examples, renderer, sampling(arguments.max_tokens), defaults.data, group_size=arguments.group_size, seed=0
        )
        # the learner's stages, seen from outside: the reference's forward pass and the optimizer
        self._trace(self._stream, "request", "prompts")
        self._trace(rubric, "score", "rewards")
        self._trace(reference, "hidden", "reference")
        self._trace(reference, "logprobs_no_grad", "reference")
        self._trace(self._learner.optimizer, "step", "optimizer")
        self._buffer = GroupBuffer(self._pool, self._stream.request, rubric.score, groups_per_step=arguments.prompts)
        self._advantages = AdvantageEstimator(defaults.algo.advantage)

    def step(self) -> None:
        """One trip around the loop."""
        train(
            self._pool,
            self._learner,
            self._buffer,
            self._advantages,
            done=self.done,
            steps=self.done + 1,
            tracer=self.tracer,
            after_step=self._check,
        )

    def stages(self, last: int) -> dict[str, float]:
        """Median seconds of each stage over the last `last` steps."""
        values: dict[str, list[float]] = defaultdict(list)
        for step in range(self.done - last + 1, self.done + 1):
            spans = self.tracer.step_seconds(step)
            values["prompts"].append(spans["prompts"])
            values["rewards"].append(spans["rewards"])
            values["rollout"].append(spans["rollout"] - spans["prompts"] - spans["rewards"])
            values["reference"].append(spans["reference"])
            values["optimizer"].append(spans["optimizer"])
            values["loss_and_gradient"].append(spans["learn"] - spans["reference"] - spans["optimizer"])
        return {name: round(statistics.median(seconds), 4) for name, seconds in values.items()}

    def _trace(self, owner: Any, method: str, stage: str) -> None:
        """Put a span around a method of one object."""
        original: Callable[..., Any] = getattr(owner, method)

        def traced(*args: Any, **kwargs: Any) -> Any:
            with self.tracer.span(stage, step=self.done + 1):
                return original(*args, **kwargs)

        setattr(owner, method, traced)

    def _check(self, result: StepResult) -> None:
        self.done = result.step
        expected = self._arguments.prompts * self._arguments.group_size * self._arguments.max_tokens
        if result.metrics["completion/tokens"] != expected or not result.metrics["grad_norm"] > 0:
            raise RuntimeError(
                f"the step did not do the measured work ({expected} tokens and a gradient): {result.metrics}"
            )


class TrlTrainer:
    """TRL in a process of its own that takes a step when told to."""

    def __init__(self, python: str, module: str, setting: Mapping[str, Any]) -> None:
        """Start `module` with its setting; returns when it is ready for the first step."""
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(setting)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts: dict[str, Any] = self._answer()

    def step(self) -> dict[str, Any]:
        """What it says of its next step; `seconds` are measured there."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def finish(self) -> None:
        """Wait until it has said that its model is saved."""
        self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        """The next line that is ours; libraries may print too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"benchmark"'):
                return dict(json.loads(line))
        raise SystemExit(
            f"TRL's half ended with status {self._process.wait()} (its error is above). It needs trl: install it beside rlmed, "
            "or name a Python that has it with --trl-python"
        )


def trl_setting(folder: Path, questions: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `benchmarks/trl_step.py` is told."""
    return {
        "model": str(folder),
        "questions": str(questions),
        "prompts": arguments.prompts,
        "group_size": arguments.group_size,
        "max_tokens": arguments.max_tokens,
        "threads": arguments.threads,
        "kl_coef": KL_COEF,
        "learning_rate": LEARNING_RATE,
    }


def measure(folder: Path, name: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Steps of both in turn."""
    examples = write_examples(scratch / "questions", arguments.prompts)
    ours = OurTrainer(folder, name, examples, arguments)
    setting = trl_setting(folder, scratch / "questions" / "benchmark.jsonl", arguments)
    theirs = TrlTrainer(arguments.trl_python, "benchmarks.trl_step", setting)
    try:
        if theirs.facts["prompt_tokens"] != ours.prompt_tokens:
            raise RuntimeError(
                f"the prompts differ: {ours.prompt_tokens} tokens here, {theirs.facts['prompt_tokens']} in TRL"
            )
        sides: dict[str, Side] = {"rlmed": timed(ours.step), "trl": lambda: float(theirs.step()["seconds"])}
        timings = alternate(sides, rounds=arguments.rounds, warmup=WARMUP)
    finally:
        theirs.close()
    stages = {"rlmed_stages_s": ours.stages(arguments.rounds)}
    return {
        "model": ours.facts,
        "prompt_tokens": ours.prompt_tokens,
        "trl": theirs.facts,
        **summarise(timings),
        **stages,
    }


def summarise(timings: dict[str, Timing]) -> dict[str, Any]:
    """Seconds of both and the ratio of their medians."""
    ratio = timings["trl"].median / timings["rlmed"].median
    return {"steps": {name: one.summary() for name, one in timings.items()}, "ratio": round(ratio, 3)}


def measure_all(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Measure with each number of visual tokens."""
    folder, name = find_model(arguments.model, scratch)
    cases = []
    for count in arguments.visual_tokens:
        model = with_visual_tokens(folder, count, scratch / f"model_{count}")
        measured = measure(model, name, arguments, scratch / str(count))
        cases.append({"visual_tokens": count, **measured})
        ours, theirs = (measured["steps"][side]["median_s"] for side in ("rlmed", "trl"))
        report(f"stages of a step of rlmed in seconds: {measured['rlmed_stages_s']}")
        report(
            f"prompts of {measured['prompt_tokens']['max']} tokens: a step of rlmed {ours:.2f} s, of TRL {theirs:.2f} s; "
            f"TRL / rlmed = {measured['ratio']:.2f}"
        )
    return cases


def main() -> None:
    """Measure and write `grpo_step.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=5)
    parser.add_argument("--trl-python", default=sys.executable, help="a Python with trl (default: this one)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[16, 512], help="of an image (default 16 512)")
    arguments = parser.parse_args()
    start(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        cases = measure_all(arguments, Path(scratch))
    setting = {key: value for key, value in vars(arguments).items() if key in SETTING}
    setting |= {"kl_coef": KL_COEF, "warmup_steps": WARMUP}
    report(f"written to {write_result('grpo_step', {'setting': setting, 'cases': cases}, arguments.out)}")


if __name__ == "__main__":
    main()
