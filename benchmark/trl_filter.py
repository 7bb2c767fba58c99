"""VACO's filter in TRL's GRPOTrainer: copy the class and `tv_filter`, and use it in the place of TRL's.

    pip install -r benchmark/requirements-trl.txt && python benchmark/trl_filter.py

Here it trains the tiny model of vaco_async_llm.py on sums, on the CPU, with eight gradient steps per generation. `tv`
is the total variation between the policy and the one that generated, over the tokens of a step; `dropped` is the share
of tokens whose gradient the filter drops.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vaco_async_llm as llm


class FilteredGRPOTrainer(GRPOTrainer):
    """GRPO without clipping. When the total variation of a step's tokens is over `tv_threshold` (the 1/2 included), the
    gradients that would raise it are dropped (arXiv 2603.01365). Of GRPOConfig's loss settings none is used."""

    tv_threshold = 0.005

    def _compute_loss(self, model, inputs):
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()  # [M, L]
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logprobs, *_ = self._get_per_token_logps_and_entropies(model, tokens, attention, mask.shape[1])
        ratios = (logprobs - inputs.get("old_per_token_logps", logprobs.detach()))[mask].exp()  # [K]
        advantages = inputs["advantages"].unsqueeze(1).expand_as(mask)[mask]
        keep, tv = llm.tv_filter(ratios.detach(), advantages, self.tv_threshold)
        self._metrics["train"]["tv"].append(tv.item())
        self._metrics["train"]["dropped"].append(1 - keep.float().mean().item())
        return -torch.where(keep, ratios * advantages, 0).mean() / self.current_gradient_accumulation_steps


@dataclass
class Args:
    steps: int = 400  # gradient steps
    learning_rate: float = 1e-4  # the learning rate of Adam
    tv_threshold: float = 0.005  # the budget on 1/2 mean |pi/beta - 1|; 1: no filter
    seed: int = 1  # seed of the model, the problems and the sampling


def make_trainer(args):
    """The trainer, and what measures the share of held-out problems that its model solves."""
    flags = llm.Args(seed=args.seed)
    problems = llm.Problems(flags)
    torch.manual_seed(args.seed)
    model, tokenizer = llm.load_language_model(flags, problems)
    agent = llm.Agent(model.config, model.generation_config, tokenizer, flags)
    llm.warm_start(flags, agent, problems)
    entries = [problems.find(number) for number in range(8 * args.steps)]
    rows = [{"prompt": [{"role": "user", "content": entry["question"]}], "entry": i} for i, entry in enumerate(entries)]

    def reward(completions, entry, **_):
        pairs = zip(completions, entry, strict=True)
        return [problems.score(message["content"], entries[number]) for (message,), number in pairs]

    # 256 completions per generation, four to a problem, in four minibatches, each of which is used twice
    sizes = {"per_device_train_batch_size": 64, "num_generations": 4, "steps_per_generation": 4, "num_iterations": 2}
    sizes |= {"max_completion_length": flags.max_new_tokens, "max_steps": args.steps, "warmup_steps": 20}
    output = {"logging_steps": 40, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    config = GRPOConfig("runs/trl", learning_rate=args.learning_rate, seed=args.seed, **sizes, **output, **cpu)
    trainer = FilteredGRPOTrainer(agent.model, reward, config, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.tv_threshold = args.tv_threshold
    return trainer, lambda: llm.accuracy(agent, problems, "cpu")


if __name__ == "__main__":
    trainer, accuracy = make_trainer(tyro.cli(Args, description=__doc__))
    print(f"held-out problems solved before: {accuracy():.1%}")
    trainer.train()
    print(f"held-out problems solved after: {accuracy():.1%}")
