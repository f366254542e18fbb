"""What several scripts need stands in each of them, word for word, in the same order."""

import ast

import pytest
from helpers import CRITICS, ROOT

SCRIPTS = ["td3_hyper.py", "sac_hyper.py", "maml_hyper.py", "pearl_hyper.py"]
BANNER = "# The method ends here. What follows is the same in all four scripts, to the letter"


def source(script: str) -> str:
    return (ROOT / script).read_text()


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_below_the_banner_all_scripts_are_the_same(script):
    _, expected = source("td3_hyper.py").split(BANNER)
    _, shared = source(script).split(BANNER)
    assert shared == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_spin_count_is_set_before_torch_is_imported(script):
    lines = source(script).splitlines()
    spin_count = [line.startswith('os.environ.setdefault("GOMP_SPINCOUNT"') for line in lines]
    assert spin_count.index(True) < lines.index("import torch")


def test_the_choices_of_critic_are_the_cases_of_make_critic():
    nodes = ast.walk(ast.parse(source("hypernet.py")))
    cases = [node.value.value for node in nodes if isinstance(node, ast.MatchValue)]
    assert cases == list(CRITICS)


def top_level(script: str) -> dict[str, str]:
    """Source of every top-level function and class, comments and decorators included."""
    lines, parts = source(script).splitlines(), {}
    for node in ast.parse(source(script)).body:
        if name := getattr(node, "name", None):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            parts[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return parts


def test_td3_and_sac_differ_in_the_algorithm_alone():
    td3, sac = top_level("td3_hyper.py"), top_level("sac_hyper.py")
    algorithm = {"Args", "Actor", "Agent", "critic_loss", "actor_loss", "train"}
    algorithm |= {"update_actor_and_targets"}
    for name in (td3.keys() & sac.keys()) - algorithm:
        assert td3[name] == sac[name], name
    assert td3.keys() ^ sac.keys() == {"explore", "alpha_loss"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_used(script):
    text = source(script)
    body = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "Args").body
    names = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    assert len(names) > 20
    assert [name for name in names if f"args.{name}" not in text] == []


def test_the_arguments_that_td3_and_sac_both_have_read_the_same():
    def fields(script: str) -> dict[str, tuple[str, str]]:
        body = next(n for n in ast.parse(source(script)).body if getattr(n, "name", "") == "Args")
        pairs = zip(body.body[0:-1:2], body.body[1:-1:2])
        return {f.target.id: (ast.unparse(f), doc.value.value) for f, doc in pairs}

    td3, sac = fields("td3_hyper.py"), fields("sac_hyper.py")
    differ = {name for name in td3.keys() & sac.keys() if td3[name] != sac[name]}
    assert differ == {"exp_name", "batch_size", "tau"}
