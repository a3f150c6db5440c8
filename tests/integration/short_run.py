"""Overrides of a six-step run on the embedded model that takes seconds, to kill and compare."""

from __future__ import annotations

STEPS = 6
SHORT_RUN = (
    "+experiment=medvqa_600",
    "profile=tiny",
    f"steps={STEPS}",
    "algo.groups_per_step=4",
    "algo.group_size=4",
    "learner.lr=1e-3",
    "checkpoint.every=2",
    "preflight.enabled=false",
    "eval.at_start=false",
    "eval.at_end=false",
    "rollout.max_tokens=40",
    "data.limit=40",
    # reading and comparing what is not evaluated takes half of the time
    "data.eval=[outputs/phantom-0/test_mri.jsonl]",
    "data.leakage=off",
    "cluster.threads=1",
)
