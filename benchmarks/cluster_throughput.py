"""How much faster do more rollout workers make a run, and by which law?

The loop, the buffer and the worker pool are those of `cluster=ray`. Workers and learner are
simulated (`benchmarks/simulation.py`): they take the time that engine and learner take on this
machine, on a clock that jumps from event to event, so four workers need no more cores than one. A
step of B groups over N workers should take

    rollout(B / N) + learner + push          algo.max_staleness=0: nothing overlaps
    max(rollout(B / N), learner + push)      above 0: the slower of the two is the pace

where rollout(n) = n * prompt + tokens * (step + n * G * row) on a worker. `efficiency` is the law's
seconds over those of the loop. It is below 1 where workers wait for the longest completion or
groups cannot be divided evenly, and may be above 1 where two batches share an engine's steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    add_arguments,
    alternate,
    find_model,
    fit,
    make_renderer,
    model_facts,
    never_end,
    render_prompts,
    report,
    start,
    timed,
    write_examples,
    write_result,
)
from benchmarks.grpo_step import OurTrainer
from benchmarks.rollout_sides import native_side
from benchmarks.simulation import Clock, Costs, Load, SimulatedLearner, score, start_pool
from learner.advantages import AdvantageEstimator
from rlmed.controller import StepResult, train
from rlmed.core.tracing import Tracer
from rlmed.models.policy import load_policy
from rollout.buffer import GroupBuffer

WARMUP = 4
"""Steps until the pipeline is full."""
ENGINE_TOKENS = (8, 32, 64)
"""Tokens per completion at which the engine's costs are measured."""


def law_s(costs: Costs, load: Load, workers: int, max_staleness: int) -> float:
    """Return the seconds of a step by the law of the module docstring."""
    groups = load.groups / workers
    mean_share = (max(1, round(load.shortest * load.max_tokens)) / load.max_tokens + 1) / 2
    rows = groups * load.group_size * mean_share
    rollout = groups * costs.prompt_s + load.max_tokens * (costs.step_s + rows * costs.row_s)
    rest = costs.learn_s + costs.push_s
    return rollout + rest if max_staleness == 0 else max(rollout, rest)


def simulate(costs: Costs, load: Load, *, workers: int, max_staleness: int, steps: int) -> dict[str, Any]:
    """Run the loop and return its pace over `steps` steps in the middle of the run."""
    clock = Clock()
    pool, simulated = start_pool(clock, costs, load, workers)
    channel = pool.channel()
    ends: list[tuple[float, float, float]] = []

    def after_step(result: StepResult) -> None:
        busy_s = sum(worker.busy_s for worker in simulated)
        ends.append((clock.now, result.metrics["completion/tokens"], busy_s))

    buffer = GroupBuffer(channel, load.request, score, groups_per_step=load.groups, max_staleness=max_staleness)
    # the last steps admit nothing new
    last = WARMUP + steps + max_staleness
    try:
        train(
            channel,
            SimulatedLearner(clock, costs),
            buffer,
            AdvantageEstimator("grpo"),
            done=0,
            steps=last,
            tracer=Tracer(),
            after_step=after_step,
        )
    finally:
        channel.close()
    counted = ends[WARMUP - 1 : WARMUP + steps]
    seconds = counted[-1][0] - counted[0][0]
    tokens = sum(entry[1] for entry in counted[1:])
    law = law_s(costs, load, workers, max_staleness)
    return {
        "workers": workers,
        "max_staleness": max_staleness,
        "shortest": load.shortest,
        "step_s": seconds / steps,
        "law_s": law,
        "efficiency": law * steps / seconds,
        "steps_per_s": steps / seconds,
        "tokens_per_s": tokens / seconds,
        "busy_share": (counted[-1][2] - counted[0][2]) / (seconds * workers),
    }


def measure_costs(
    folder: Path, name: str, arguments: argparse.Namespace, scratch: Path
) -> tuple[Costs, dict[str, Any]]:
    """Measure engine and learner here; return their costs and how they were found."""
    policy, renderer = load_policy(folder), make_renderer(folder)
    never_end(policy)
    facts = model_facts(policy, name)
    prompts = render_prompts(renderer, write_examples(scratch / "questions", arguments.groups))
    points = [
        (count, tokens)
        for count in sorted({1, max(1, arguments.groups // 2), arguments.groups})
        for tokens in ENGINE_TOKENS
    ]
    sides = {
        f"{count} x {tokens}": timed(
            native_side(policy, prompts[:count], renderer.decode, arguments.group_size, tokens)
        )
        for count, tokens in points
    }
    timings = alternate(sides, rounds=arguments.rounds, settle_s=0.05)
    engine = fit(
        {
            "prompt_s": [count for count, _ in points],
            "step_s": [tokens for _, tokens in points],
            "row_s": [count * arguments.group_size * tokens for count, tokens in points],
        },
        [timing.median for timing in timings.values()],
    )
    trainer = OurTrainer(folder, name, write_examples(scratch / "learner", arguments.groups), arguments)
    for _ in range(2 + arguments.rounds):
        trainer.step()
    stages = trainer.stages(arguments.rounds)
    learn_s = sum(seconds for stage, seconds in stages.items() if stage != "rollout")
    costs = Costs(*(max(0.0, engine[key]) for key in ("prompt_s", "step_s", "row_s")), learn_s, arguments.push_s)
    return costs, {"model": facts, "engine_fit": engine, "stages_s": stages}


def table(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line a case; the lead is on one worker of the same setting."""
    alone = {(case["max_staleness"], case["shortest"]): case["step_s"] for case in cases if case["workers"] == 1}
    lines = [
        "staleness  lengths from  workers  step s  law s  efficiency  steps/s  tokens/s  workers busy  x one worker"
    ]
    for case in cases:
        lead = alone.get((case["max_staleness"], case["shortest"]), float("nan")) / case["step_s"]
        lines.append(
            f"{case['max_staleness']:9d}  {100 * case['shortest']:10.0f} %  {case['workers']:7d}  {case['step_s']:6.3f}  "
            f"{case['law_s']:5.3f}  {case['efficiency']:10.3f}  {case['steps_per_s']:7.3f}  {case['tokens_per_s']:8.0f}  "
            f"{100 * case['busy_share']:10.0f} %  {lead:12.2f}"
        )
    return lines


def main() -> None:
    """Measure or take the costs, simulate every case and write `cluster_throughput.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1], help="algo.max_staleness (default 0 1)")
    parser.add_argument(
        "--shortest", type=float, nargs="+", default=[1.0, 0.25], help="share of --max-tokens, see Load"
    )
    parser.add_argument("--groups", type=int, default=8, help="groups per step (default 8)")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each case")
    parser.add_argument("--push-s", type=float, default=0.05, help="seconds of a push (benchmarks.weight_push)")
    keys = [entry.name for entry in dataclasses.fields(Costs) if entry.name != "push_s"]
    parser.add_argument("--costs", type=float, nargs=4, metavar=tuple(keys), help="seconds, instead of measuring them")
    arguments = parser.parse_args()
    arguments.prompts = arguments.groups  # the name that `OurTrainer` knows
    start(arguments)
    if arguments.costs:
        costs, facts = Costs(*arguments.costs, arguments.push_s), {}
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder, name = find_model(arguments.model, Path(scratch))
            costs, facts = measure_costs(folder, name, arguments, Path(scratch))
    report(f"costs in seconds: {dataclasses.asdict(costs)}")
    cases = [
        simulate(
            costs,
            Load(arguments.groups, arguments.group_size, arguments.max_tokens, shortest),
            workers=workers,
            max_staleness=max_staleness,
            steps=arguments.steps,
        )
        for max_staleness in arguments.staleness
        for shortest in arguments.shortest
        for workers in arguments.workers
    ]
    report("\n".join(table(cases)))
    setting = {key: vars(arguments)[key] for key in ("groups", "group_size", "max_tokens", "steps", "rounds")}
    result = {"setting": setting, "costs": dataclasses.asdict(costs), **facts, "cases": cases}
    report(f"written to {write_result('cluster_throughput', result, arguments.out)}")


if __name__ == "__main__":
    main()
