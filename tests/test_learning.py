"""Agents learn to swing up and hold a pendulum; the same agent with a broken update does not."""

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, start

# Random actions return about -1,400, the best policies about -200 on the evaluation's starts.
SOLVED = -400
OPTIONS = ["--env-id", "Pendulum-v1", "--total-timesteps", 4000, "--learning-starts", 500]
OPTIONS += ["--eval-every", 1000, "--eval-episodes", 5, "--batch-size", 100]
OPTIONS += ["--gamma", 0.95, "--tau", 0.02, "--actor-lr", 1e-3, "--critic-lr", 1e-3]
OPTIONS += ["--primary-widths", 32, 64, "--dynamic-width", 64]
ALGORITHMS = {
    "td3_hyper.py": ["--exploration-noise", 0.2],
    "sac_hyper.py": ["--alpha-lr", 1e-3],
}


def final_return(script: Path, critic: str, folder: Path) -> float:
    """Mean return of the last evaluation."""
    options = [*OPTIONS, *ALGORITHMS[script.name], "--critic", critic]
    process = start(script, *options, cwd=folder)
    _, err = process.communicate()
    assert process.returncode == 0, err
    (file,) = folder.rglob("eval.csv")
    with open(file) as stream:
        rows = [row for row in csv.DictReader(stream) if row["global_step"] == "4000"]
    return np.mean([float(row["return"]) for row in rows])


@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
@pytest.mark.parametrize("script", ALGORITHMS)
def test_agent_solves_the_pendulum(script, critic, tmp_path):
    assert final_return(ROOT / script, critic, tmp_path) > SOLVED


@pytest.mark.parametrize(
    "script, right, wrong",
    [
        ("td3_hyper.py", "loss = -q_value(", "loss = q_value("),
        ("sac_hyper.py", "* log_prob - q)", "* log_prob + q)"),
    ],
)
def test_the_wrong_sign_of_the_actor_loss_does_not(script, right, wrong, tmp_path):
    source = (ROOT / script).read_text()
    assert source.count(right) == 1
    broken = tmp_path / script
    broken.write_text(source.replace(right, wrong))
    assert final_return(broken, "mlp", tmp_path) < 2 * SOLVED
