"""analysis/speed.py: every table is printed, and what is called plain is the same update."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_refused

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "analysis" / "speed.py"
sys.path.append(str(ROOT / "analysis"))

import speed  # noqa: E402

TINY = ["--rounds", 1, "--primary-widths", 4, 8]


def rows_of(finished) -> list[list[str]]:
    """The cells of the table's rows, each as long as the head."""
    assert finished.code == 0, finished.err
    lines = [line for line in finished.out.replace(",", "").splitlines() if line.startswith("|")]
    head, line, *rows = [line.strip("| ").split(" | ") for line in lines]
    assert rows and all(len(row) == len(head) for row in (line, *rows))
    return rows


@pytest.mark.parametrize("script", ["td3", "sac"])
def test_updates_of_td3_and_sac(run_main, script):
    sizes = ["--critics", "mlp", "sa-hyper", "--batch-sizes", 2, 4]
    rows = rows_of(run_main(SCRIPT, script, *TINY, *sizes))
    names = [("mlp", "2"), ("mlp", "4"), ("sa-hyper", "2"), ("sa-hyper", "4")]
    assert [tuple(row[:2]) for row in rows] == names
    assert all(float(cell) > 0 for row in rows for cell in row[2:])


def test_updates_of_pearl(run_main):
    rows = rows_of(run_main(SCRIPT, "pearl", *TINY, "--num-goals", 1))
    assert [row[:2] for row in rows] == [["mlp", "1"], ["hyper", "1"]]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])


def test_the_phases_of_maml_are_nearly_the_whole_iteration(capsys, monkeypatch):
    small = {"episodes_per_goal": 2, "horizon": 5, "cg_iterations": 2}
    rows = {"hyper": small, "no adaptation": small | {"num_adapt_steps": 0}}
    monkeypatch.setattr(speed, "MAML_ROWS", rows)
    sample = speed.maml_hyper.sample
    speed.maml(num_goals=(2,), primary_widths=(4, 8), rounds=3)
    assert speed.maml_hyper.sample is sample
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line in lines:
        *phases, whole = (float(cell) for cell in line.strip("| ").split(" | ")[2:])
        assert sum(phases) <= whole + 0.4  # each is rounded to a tenth


def test_sampling(run_main):
    rows = rows_of(run_main(SCRIPT, "sampling", "--num-goals", 1, "--rounds", 1))
    assert [row[:2] for row in rows] == [["HalfCheetahVel-v0", "20"], ["AntVel-v0", "20"]]


def test_collection_and_evaluation_of_pearl(run_main):
    rows = rows_of(run_main(SCRIPT, "collection", *TINY, "--num-goals", 1))
    assert [row[0] for row in rows] == ["mlp", "mlp", "hyper", "hyper"]


def test_two_runs_on_two_cores(capsys, monkeypatch):
    monkeypatch.setattr(speed, "VARIABLES", [{"OMP_NUM_THREADS": "1"}])  # the others are slow
    speed.cores(primary_widths=(4, 8), rounds=1)
    name, *numbers = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert name == "OMP_NUM_THREADS=1" and len(numbers) == 3
    assert all(float(number.replace(",", "")) > 0 for number in numbers)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["td3", "--rounds", 0], "--rounds 0: must be at least 1"),
        (["td3", "--batch-sizes", 0], "--batch-size 0: must be at least 1"),
        (["td3", "--critics", "magic"], "invalid choice"),
        (["maml", "--num-goals", 0], "at least 1"),
        (["sampling", "--num-goals", 0], "--num-goals 0: must be at least 1"),
        (["collection", "--num-goals", 0], "--num-goals 0: must be at least 1"),
        (["everything"], "Available subcommands"),
    ],
)
def test_bad_use(run_main, arguments, message):
    assert_refused(run_main(SCRIPT, *arguments), message)


@pytest.mark.parametrize(
    "script, options",
    [
        (speed.td3_hyper, {"critic": "sa-hyper"}),
        (speed.sac_hyper, {"critic": "mlp"}),
        (speed.sac_hyper, {"critic": "sa-hyper"}),
        (speed.pearl_hyper, {"model": "mlp", "meta_batch_size": 3}),
        (speed.pearl_hyper, {"model": "hyper", "meta_batch_size": 3}),
    ],
)
def test_the_plain_update_is_the_same_update(script, options, monkeypatch):
    agents, script_agent = [], script.Agent
    monkeypatch.setattr(script, "Agent", lambda *a: agents.append(script_agent(*a)) or agents[-1])
    args = script.Args(device="cpu", batch_size=5, primary_widths=(4, 8), **options)
    for plain in (False, True):
        update, _ = speed.two_updates(script, args, plain)
        update()
    ours, theirs = (dict(agent.named_parameters()) for agent in agents)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_floor_replays_the_matrix_products():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    with speed.Products() as products:
        (a @ b).sum().backward()
    shapes = [call.keywords["out"].shape for call in products.calls]
    assert shapes == [(3, 5), (3, 4)]
    products.calls[0].func(*products.calls[0].args, **products.calls[0].keywords)
    torch.testing.assert_close(products.calls[0].keywords["out"], a.detach() @ b)
