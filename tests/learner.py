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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


def kill_an_actor():
    os.kill(next(child.pid for child in mp.active_children() if child.name.startswith("actor")), signal.SIGKILL)


DEEDS = {
    "kill an actor": kill_an_actor,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
}


def as_by_learners(args, columns):
    """The order of the rows of a whole batch in which each minibatch has those of two learners, each in its order."""

    def permutation(rows):
        steps = rows // columns
        order = torch.arange(rows).view(steps, 2, columns // 2)  # time-major: the second learner's are the last columns
        parts = [order[:, rank].flatten().tensor_split(args.num_minibatches) for rank in (0, 1)]
        return torch.cat([part for pair in zip(*parts, strict=True) for part in pair])

    return permutation


def main():
    script, options, published = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2]), []
    args = script.Args(**options["flags"])
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    publish = script.PolicyStore.publish

    def recorded_publish(self, agent, version):
        published.append({name: tensor.clone() for name, tensor in agent.state_dict().items()})
        publish(self, agent, version)
        if options.get("deed") and version == 4 and script.RANK == 1 and first:
            DEEDS[options["deed"]]()

    script.PolicyStore.publish = recorded_publish
    if options.get("in_order"):
        torch.randperm = torch.arange
    try:
        script.train(args)
    except script.RunError as error:
        sys.exit(f"error of learner {script.RANK}: {error}")
    finally:
        torch.save(published, f"learner{script.RANK}.pt")


if __name__ == "__main__":
    main()
