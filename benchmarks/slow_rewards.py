"""What does a reward of two seconds cost the loop, on-policy and at `algo.max_staleness=1`?

The real loop, engine and learner in one process learn from the same questions with a reward that
takes no time, and with one that waits `--seconds` for each completion, as a judge on another
machine does: in threads, all of a step's calls at a time. Of each side, the seconds of a step, and
those in which the loop waited for rewards. The sides take turns by several steps, of which the
first do not count: their rewards have come while other sides worked.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    MAX_PROMPT_TOKENS,
    Timing,
    add_arguments,
    alternate,
    find_model,
    make_renderer,
    model_facts,
    never_end,
    report,
    sampling,
    start,
    timed,
    variety_reward,
    write_examples,
    write_result,
)
from learner.advantages import AdvantageEstimator
from learner.learner import PolicyLearner
from rewards.base import GroupReward
from rewards.rubric import Rubric, WeightedReward, per_completion
from rewards.slow import Limits, in_thread
from rewards.slow_reward import SlowReward
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

WARMUP = 2
"""Steps of each turn that do not count."""
LONG = 1000
"""Steps that a run still has."""
SETTING = ("seconds", "prompts", "group_size", "max_tokens", "turns", "rounds")
"""Arguments that the result keeps."""


class Trainer:
    """The loop of `rlmed.controller`, one step at a time."""

    def __init__(
        self,
        folder: Path,
        name: str,
        examples: tuple[Example, ...],
        arguments: argparse.Namespace,
        *,
        slow: bool,
        ahead: int,
    ) -> None:
        """Build what `cluster=local` builds, with `algo.max_staleness=ahead`."""
        keep_freed_memory()
        policy = load_policy(folder)
        never_end(policy)
        self.facts = model_facts(policy, name)
        self.done, self.waited = 0, list[float]()
        defaults = compose_config("train", ["data=jsonl"])
        renderer = make_renderer(folder)
        completions = arguments.prompts * arguments.group_size
        limits = EngineLimits(max_completions=completions, max_prompt_tokens=MAX_PROMPT_TOKENS)
        self._pool = LocalPool(NativeEngine(policy, renderer.decode, limits))
        self._learner = PolicyLearner(
            policy, None, dataclasses.replace(defaults.algo.loss, kl_coef=0.0), defaults.learner,
            total_steps=1000, max_tokens=arguments.max_tokens, temperature=1.0,
        )  # fmt: skip
        reward = slow_reward(arguments.seconds, completions) if slow else per_completion(variety_reward)
        self.rubric = Rubric([WeightedReward("variety", reward, 1.0)])
        stream = PromptStream(
            examples, renderer, sampling(arguments.max_tokens), defaults.data, group_size=arguments.group_size, seed=0
        )
        self._buffer = Endless(
            self._pool,
            stream.request,
            self.rubric.score,
            groups_per_step=arguments.prompts,
            max_staleness=ahead,
            begin=self.rubric.begin if self.rubric.is_slow else None,
        )
        self._advantages = AdvantageEstimator(defaults.algo.advantage)

    def step(self) -> None:
        """One trip around the loop, which knows that others follow and samples for them."""
        train(
            self._pool,
            self._learner,
            self._buffer,
            self._advantages,
            done=self.done,
            steps=self.done + 1,
            tracer=Tracer(),
            after_step=self._note,
        )

    def _note(self, result: StepResult) -> None:
        self.done = result.step
        self.waited.append(result.metrics["seconds/reward"])


class Endless(GroupBuffer):
    """A buffer that is told of one step, and admits prompts as in the middle of a long run."""

    def next_batch(self, step: int, *, steps: int, version: int) -> Any:
        """See `GroupBuffer`."""
        return super().next_batch(step, steps=steps + LONG, version=version)


def slow_reward(seconds: float, concurrency: int) -> GroupReward:
    """The variety of a text, known after some seconds; nothing is cached, so each call waits."""

    def variety(examples: Any, completions: Any) -> list[float]:
        time.sleep(seconds)
        return [variety_reward(*pair) for pair in zip(examples, completions, strict=True)]

    limits = Limits(
        batch_size=None, concurrency=concurrency, timeout_s=60 + 2 * seconds, retries=0, wait_s=1.0,
        max_calls=None, max_seconds=None, on_failure="stop",
    )  # fmt: skip
    keys = {"timeout_s": "reward.timeout_s", "on_failure": "reward.slow.on_failure"}
    return SlowReward("variety", in_thread(variety), limits, None, settings={}, keys=keys)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each side, and the share that slow rewards add."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = find_model(arguments.model, Path(scratch))
        examples = write_examples(Path(scratch) / "questions", 8 * arguments.prompts)
        trainers = {
            f"max_staleness={ahead}, {'slow' if slow else 'fast'}": Trainer(
                folder, name, examples, arguments, slow=slow, ahead=ahead
            )
            for ahead in (0, 1)
            for slow in (False, True)
        }
        seconds: dict[str, list[float]] = {side: [] for side in trainers}
        waited: dict[str, list[float]] = {side: [] for side in trainers}
        for _ in range(arguments.turns):
            for side, trainer in trainers.items():
                # no pause between steps, in which rewards would come for nothing
                (timing,) = alternate(
                    {side: timed(trainer.step)}, rounds=arguments.rounds, warmup=WARMUP, settle_s=0.0
                ).values()
                seconds[side] += timing.seconds
                waited[side] += trainer.waited[-arguments.rounds :]
        for trainer in trainers.values():
            trainer.rubric.close()
    timings = {side: Timing(tuple(values)) for side, values in seconds.items()}
    result: dict[str, Any] = {
        "setting": {key: getattr(arguments, key) for key in SETTING},
        "model": trainers["max_staleness=1, slow"].facts,
        "sides": {
            side: timing.summary() | {"waited_median_s": round(statistics.median(waited[side]), 4)}
            for side, timing in timings.items()
        },
    }
    for ahead in (0, 1):
        fast, slow = (timings[f"max_staleness={ahead}, {kind}"].median for kind in ("fast", "slow"))
        result[f"added_share_max_staleness_{ahead}"] = round(slow / fast - 1, 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=4)
    parser.add_argument(
        "--turns", type=int, default=3, help="turns of each side, of --rounds counted steps (default 3)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="that a reward takes (default 2)")
    parser.add_argument("--prompts", type=int, default=16, help="groups of a step (default 16)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a group (default 8)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each completion (default 128)")
    arguments = parser.parse_args()
    start(arguments)
    result = measure(arguments)
    for side, timing in result["sides"].items():
        report(f"{side}: {timing['median_s']:.2f} s a step, of which {timing['waited_median_s']:.2f} s for rewards")
    for ahead in (0, 1):
        share = result[f"added_share_max_staleness_{ahead}"]
        report(f"rewards of {arguments.seconds:g} s add {share:.1%} to a step at max_staleness={ahead}")
    report(str(write_result("slow_rewards", result, arguments.out)))


if __name__ == "__main__":
    main()
