"""analysis/speed.py: every table is printed."""

import pytest
import speed
from helpers import ROOT

SCRIPT = ROOT / "analysis" / "speed.py"
TINY = ["--rounds", 1, "--primary-widths", 4, 8]


def rows_of(out: str) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = [line for line in out.replace(",", "").splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.mark.parametrize(
    "script, args, sizes",
    [
        ("td3", "--critics mlp --batch-sizes 2 4", ["mlp 2", "mlp 4"]),
        ("sac", "--critics mlp sa-hyper --batch-sizes 2", ["mlp 2", "sa-hyper 2"]),
        ("pearl", "--num-goals 1", ["mlp 1", "hyper 1"]),
    ],
)
def test_updates_of_td3_sac_and_pearl(run_main, script, args, sizes):
    finished = run_main(SCRIPT, script, *TINY, *args.split())
    assert finished.code == 0, finished.err
    rows = rows_of(finished.out)
    assert [" ".join(row[:2]) for row in rows] == sizes
    assert all(float(cell) > 0 for row in rows for cell in row[2:])


def test_the_phases_of_maml(capsys, monkeypatch):
    small = {"episodes_per_goal": 2, "horizon": 5, "cg_iterations": 2}
    monkeypatch.setattr(speed, "MAML_ROWS", {"hyper": small})
    speed.maml(("hyper",), num_goals=2, primary_widths=(4, 8), rounds=1)
    (row,) = rows_of(capsys.readouterr().out)
    assert row[0] == "hyper" and all(float(cell) >= 0 for cell in row[1:])
