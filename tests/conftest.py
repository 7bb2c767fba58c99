"""Shared by the tests: where runs write to, how their curves are read, and how processes are looked for."""

import os
import shutil
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: tests recompute on the CPU what runs computed

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).parent.parent
has_compiler = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="--compile needs g++ or CXX")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so runs/ of the repository stays clean."""
    monkeypatch.chdir(tmp_path)


def read_curves(folder, field="value"):
    """The only run under `folder`/runs as {tag: [values in order]}; field="step" gives their places on the x-axis."""
    (run,) = (Path(folder) / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [getattr(event, field) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def processes_of_session(session):
    """Process ids of the session `session` that are alive (not zombies), from /proc."""
    alive = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                alive.append(int(entry))
    return alive


@pytest.fixture
def tracked(monkeypatch):
    """Weights & Biases without a network; a function that waits until texts are in the record of the only run."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it would go on writing to the folder of the first run in this process
    monkeypatch.setenv("WANDB_MODE", "offline")

    def wait_for(*texts):
        (record,) = Path("wandb").glob("offline-run-*/*.wandb")
        deadline = time.monotonic() + 60
        while missing := [text for text in texts if text not in record.read_bytes()]:  # written in the background
            assert time.monotonic() < deadline, missing
            time.sleep(0.2)

    return wait_for
