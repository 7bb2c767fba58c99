"""The scripts are single files on purpose: what has one name in several of them must be the same code."""

import ast
import difflib
from itertools import combinations

import pytest
from conftest import REPOSITORY

SCRIPTS = sorted(REPOSITORY.glob("*.py"))
OWN = {"Args", "validate", "Agent", "train"}  # what every script has for itself


def definitions(script):
    """The source text, comments included, of every function and class at the top level of a script."""
    text = script.read_text()
    lines = text.splitlines(keepends=True)
    sources = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            sources[node.name] = lines[first - 1 : node.end_lineno]
    return sources


@pytest.mark.parametrize(("one", "other"), list(combinations(SCRIPTS, 2)), ids=lambda script: script.stem)
def test_same_name_same_code(one, other):
    first, second = definitions(one), definitions(other)
    shared = first.keys() & second.keys()
    everywhere = {"PolicyStore", "Actors", "ticket_version", "check", "save_checkpoint", "restore"}
    with_environments = {"Rollouts", "actor", "actor_seed"}  # language models have none
    assert everywhere | (set() if "vaco_async_llm" in (one.stem, other.stem) else with_environments) <= shared
    drift = []
    for name in sorted(shared):
        drift += difflib.unified_diff(first[name], second[name], f"{one.name}:{name}", f"{other.name}:{name}")
    assert not drift, "".join(drift)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_reader_meets_the_whole_method_first_and_briefly(script):
    nodes = {node.name: node for node in ast.parse(script.read_text()).body if hasattr(node, "name")}
    services = [node for node in nodes.values() if node.lineno > nodes["train"].end_lineno]
    assert {"Actors", "validate", "connect", "save_checkpoint", "check_finite"} <= {node.name for node in services}
    # Two domains, or a model, tasks and a warm start, take more lines
    assert nodes["train"].end_lineno <= (700 if script.stem in ("vaco_async_mujoco", "vaco_async_atari") else 800)
