"""analysis/speed.py: every table is printed."""

import pytest
import speed
from helpers import ROOT, assert_refused

SCRIPT = ROOT / "analysis" / "speed.py"

TINY = ["--rounds", 1, "--primary-widths", 4, 8]


def rows_of(finished) -> list[list[str]]:
    """The cells of the table's rows, each as long as the head."""
    assert finished.code == 0, finished.err
    lines = [line for line in finished.out.replace(",", "").splitlines() if line.startswith("|")]
    head, line, *rows = [line.strip("| ").split(" | ") for line in lines]
    assert rows and all(len(row) == len(head) for row in (line, *rows))
    return rows


@pytest.mark.parametrize(
    "script, args, sizes",
    [
        ("td3", "--critics mlp --batch-sizes 2 4", ["mlp 2", "mlp 4"]),
        ("sac", "--critics mlp sa-hyper --batch-sizes 2", ["mlp 2", "sa-hyper 2"]),
        ("pearl", "--num-goals 1", ["mlp 1", "hyper 1"]),
    ],
)
def test_updates_of_td3_sac_and_pearl(run_main, script, args, sizes):
    rows = rows_of(run_main(SCRIPT, script, *TINY, *args.split()))
    assert [" ".join(row[:2]) for row in rows] == sizes
    assert all(float(cell) > 0 for row in rows for cell in row[2:])


def test_the_phases_of_maml(capsys, monkeypatch):
    small = {"episodes_per_goal": 2, "horizon": 5, "cg_iterations": 2}
    monkeypatch.setattr(speed, "MAML_ROWS", {"hyper": small})
    speed.maml(("hyper",), num_goals=2, primary_widths=(4, 8), rounds=1)
    row = capsys.readouterr().out.splitlines()[-1]
    assert all(float(cell) >= 0 for cell in row.strip("| ").split(" | ")[1:])


def test_bad_use(run_main):
    assert_refused(run_main(SCRIPT, "td3", "--batch-sizes", 0), "--batch-size 0: must be at least")
    assert_refused(run_main(SCRIPT, "td3", "--critics", "magic"), "invalid choice")
