"""What two scripts both need stands in both, word for word."""

import ast
import difflib

import pytest
from conftest import ROOT

# What is meant to differ: the algorithm.
ALGORITHM = {"Args", "AT_LEAST", "Actor", "Agent", "critic_loss", "actor_loss", "update"}


def top_level(script: str) -> dict[str, str]:
    """Source of every top-level function, class and constant, comments and decorators included."""
    source = (ROOT / script).read_text()
    parts = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
        if name:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            lines = source.splitlines()
            while lines[first - 2].startswith("#"):
                first -= 1
            parts[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return parts


@pytest.mark.parametrize("one, other", [("td3_hyper.py", "sac_hyper.py")])
def test_shared_blocks_are_equal_to_the_letter(one, other):
    a, b = top_level(one), top_level(other)
    shared = (a.keys() & b.keys()) - ALGORITHM
    assert len(shared) >= 14
    for name in shared:
        assert a[name] == b[name], name
    only = (a.keys() | b.keys()) - (a.keys() & b.keys())
    assert only == {"explore", "alpha_loss"}


# Of the blocks of td3 and sac, those that an on-policy meta-RL script needs word for word.
RUN_DIRECTORY = ("stop", "fast_matmul", "FREE_ARGS", "track", "git_commit", "write")
RUN_DIRECTORY += ("thread_failed", "save_checkpoint", "LOAD_ERRORS", "load_checkpoint")


@pytest.mark.parametrize("script", ["maml_hyper.py"])
def test_the_run_directory_is_the_same_in_all_scripts(script):
    a, b = top_level("td3_hyper.py"), top_level(script)
    for name in RUN_DIRECTORY:
        assert a[name] == b[name], name
    claim = a["claim_run"].replace("args.critic", "args.model")
    assert claim.replace("total_timesteps", "num_iterations") == b["claim_run"]


def test_main_blocks_differ_in_the_algorithm_alone():
    mains = [
        (ROOT / script).read_text().split('if __name__ == "__main__":')[1].splitlines()
        for script in ("td3_hyper.py", "sac_hyper.py")
    ]
    changed = [line for line in difflib.ndiff(*mains) if line[0] in "+-"]
    assert len(changed) <= 16, "\n".join(changed)
    words = (
        "alpha_optimizer",
        "# Act",
        "# Learn",
        "epsilon",
        "action",
        "noise",
        "delayed",
        "update(",
    )
    for line in changed:
        assert any(word in line for word in words), line


def test_the_arguments_that_both_have_read_the_same():
    def fields(script):
        source = (ROOT / script).read_text()
        body = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args").body[1:]
        return {
            field.target.id: (ast.unparse(field), doc.value.value)
            for field, doc in zip(body[::2], body[1::2])
        }

    td3, sac = fields("td3_hyper.py"), fields("sac_hyper.py")
    differ = {name for name in td3.keys() & sac.keys() if td3[name] != sac[name]}
    assert differ == {"exp_name", "batch_size", "tau", "learning_starts"}
