"""One learner of the tests of torchrun: a script, whose `train` it calls, with something done to it on the way.

    torchrun ... learner.py SCRIPT '{"flags": {...}, "deed": "...", "in_order": ...}'

Every learner leaves what it published: learner{rank}.pt, a list of state dicts, one per version.
"""

import importlib
import json
import multiprocessing as mp
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


def kill_an_actor():
    os.kill(next(child.pid for child in mp.active_children() if child.name == "actor 0"), signal.SIGKILL)


DEEDS = {
    "kill an actor": kill_an_actor,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
}
RANDPERM = torch.randperm
AT_FIRST = "kill at first"  # before `train`; the other deeds, at version 4


class AsByLearners:
    """Instead of torch.randperm, for one process with the data of two learners: minibatches that have the rows of both,
    each learner's in order, as many of each. `valid` [T, N] gives the valid steps of the batch in hand; the second half
    of its columns is the second learner's."""

    def __init__(self, valid):
        self.valid, self.passes = valid, 0

    def __call__(self, rows, **options):
        if options:  # torch.compile's own patterns, which it traces at its first compilation in a process
            return RANDPERM(rows, **options)
        self.passes += 1
        valid = self.valid()
        second = (torch.arange(valid.shape[1]) >= valid.shape[1] // 2).expand(valid.shape)
        second = second[valid] if rows > valid.shape[1] else second[0]  # IMPALA's minibatches are of columns
        fewest = min(second.sum(), (~second).sum())
        self.learners = [(second == learner).nonzero().squeeze(-1)[:fewest] for learner in (False, True)]
        return self

    def __getitem__(self, rows):
        return self

    def to(self, device):
        return self

    def tensor_split(self, number):
        return [torch.cat(parts) for parts in zip(*(rows.tensor_split(number) for rows in self.learners), strict=True)]

    chunk = tensor_split


def actor_of_two_learners(args, index, *others):
    """Actor `index` of one learner draws what actor `index` mod 2 of learner `index` // 2 draws."""
    script = importlib.import_module(args.exp_name)
    script.RANK, index = divmod(index, 2)
    script.actor(args, index, *others)


def main():
    script, options, published = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2]), []
    args = script.Args(**options["flags"])
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if not first and script.RANK == 0:
        time.sleep(4)  # so that the other one comes first, and could find what those before have left
    deed = options.get("deed") if script.RANK == 1 and first else None
    if deed == AT_FIRST:
        time.sleep(5)  # the other one waits for this one by now
        DEEDS["kill"]()
    publish = script.PolicyStore.publish

    def recorded_publish(self, agent, version):
        published.append({name: tensor.clone() for name, tensor in agent.state_dict().items()})
        publish(self, agent, version)
        if deed in DEEDS and version == 4:
            DEEDS[deed]()

    script.PolicyStore.publish = recorded_publish
    if options.get("in_order"):
        torch.randperm = torch.arange
    try:
        script.train(args)
    finally:
        torch.save(published, f"learner{script.RANK}.pt")


if __name__ == "__main__":
    main()
