"""The scripts are single files on purpose: what has one name in several of them is the same code, and each is short
enough to be read whole."""

import ast
import difflib
from itertools import combinations

import pytest
from conftest import REPOSITORY

SCRIPTS = sorted(REPOSITORY.glob("*.py"))
OWN = {"Args", "train"}  # what every script has for itself
EVERYWHERE = {"PolicyStore", "Actors", "ticket", "check_finite"}
MOST_LINES = {
    "vaco_async_mujoco": 700,
    "vaco_async_atari": 700,
    "impala_baseline": 800,  # two domains
    "ppo_async_baseline": 800,
    "vaco_async_llm": 850,  # a model, tasks and a warm start, too
}
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


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
    assert shared >= EVERYWHERE
    drift = []
    for name in sorted(shared):
        drift += difflib.unified_diff(first[name], second[name], f"{one.name}:{name}", f"{other.name}:{name}")
    assert not drift, "".join(drift)


@each_script
def test_a_script_is_short_enough_to_be_read_whole(script):
    assert len(script.read_text().splitlines()) <= MOST_LINES[script.stem]


@each_script
def test_one_statement_assigns_one_thing(script):
    """Tuple assignments like `S, T = a, b` stay rare: they save lines, not reading."""
    nodes = ast.walk(ast.parse(script.read_text()))
    assignments = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)]
    pairs = [node for node in assignments if isinstance(node.targets[0], ast.Tuple)]
    assert len(pairs) <= 12, [ast.unparse(node) for node in pairs]
