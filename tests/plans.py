"""Plans of decode steps that a CPU can run, those of a GPU without its graphs among them."""

from __future__ import annotations

from rollout.native.slots import StepPlan

PLANS = {
    "exact": StepPlan(page_tokens=None, buckets=False, lag=0, graphs=False, kernels=False),
    "static": StepPlan(page_tokens=4, buckets=True, lag=0, graphs=False, kernels=False),
    "compiled": StepPlan(page_tokens=None, buckets=False, lag=0, graphs=False, kernels=True),
    "compiled_pages": StepPlan(page_tokens=32, buckets=True, lag=0, graphs=False, kernels=True),
    "behind": StepPlan(page_tokens=4, buckets=True, lag=1, graphs=False, kernels=False),
}
"""`compiled` is that of a CPU, which without a compiler is `exact`; `behind` that of a GPU with
smaller pages.
"""
