"""The filter in TRL's trainer keeps what tv_filter keeps, and its loss is VACO's."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import REPOSITORY

import vaco_async_llm as llm

pytest.importorskip("trl", reason="benchmark/requirements-trl.txt has it, for those who train with it")
sys.path.insert(0, str(REPOSITORY / "benchmark"))
import trl_filter

FLAGS = llm.Args(warm_start_batches=80, eval_size=8)


@pytest.mark.slow
def test_the_loss_in_trl_is_vacos(monkeypatch):
    """Over two generations, with log-probabilities by our own script, and the kept tokens by hand."""
    monkeypatch.setattr(llm, "Args", lambda **flags: replace(FLAGS, **flags))
    trainer, _ = trl_filter.make_trainer(trl_filter.Args(steps=16, learning_rate=1e-3, tv_threshold=0.004))
    agent = llm.Agent(trainer.model.config, trainer.model.generation_config, trainer.processing_class, FLAGS)
    agent.model = trainer.model
    kept = []
    compute_loss = trainer._compute_loss

    def recorded_loss(model, inputs):
        loss = compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        rows = (inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs["completion_ids"], mask)
        logprobs = agent.get_logprobs(1, *rows)
        old = inputs.get("old_per_token_logps", logprobs)
        ratios = (logprobs - old)[mask].exp().double().numpy()
        advantages = np.broadcast_to(inputs["advantages"].numpy()[:, None], mask.shape)[mask.numpy()]
        tv = 0.5 * np.abs(ratios - 1).mean()
        keep = (tv <= 0.004) | (advantages * (ratios - 1) <= 0)
        kept.append(keep.mean())
        assert loss.item() == pytest.approx(-(keep * ratios * advantages).mean(), abs=2e-5)
        return loss

    monkeypatch.setattr(trainer, "_compute_loss", recorded_loss)
    trainer.train()
    filtered = [share < 1 for share in kept]
    assert len(kept) == 16 and 0 < sum(filtered) < 16 and not filtered[0]
