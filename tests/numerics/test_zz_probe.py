import torch, numpy as np, time
from rollout.native.engine import NativeEngine
from rlmed.core.types import *
import pytest
@pytest.mark.parametrize("family",["qwen2_vl","qwen2_5_vl","qwen2","qwen3","llama"])
def test_probe(tiny_policy, mixed_prompts, family):
    t=time.time(); pol=tiny_policy(family); print(family, "load", time.time()-t)
    t=time.time()
    eng=NativeEngine(pol, lambda t: "")
    ps=mixed_prompts(family,16)
    for i,p in enumerate(ps): eng.submit(RolloutRequest(i,p,4,SamplingParams(max_tokens=24,seed=i)))
    gs=[]
    while eng.busy: gs+=eng.step()
    L=[len(c.token_ids) for g in gs for c in g.completions]
    lp=np.concatenate([c.rollout_logprobs for g in gs for c in g.completions])
    print(family, time.time()-t, "mean len",np.mean(L), "mean logp", lp.mean(), lp.max(), pol.banned_token_ids, pol.projection.out_features, [len(p.token_ids) for p in ps])
