"""analysis/speed.py: every table is printed."""

from functools import partial

import speed
from helpers import ROOT, assert_refused

import sac_hyper

SCRIPT = ROOT / "analysis" / "speed.py"


def rows_of(out: str) -> list[list[str]]:
    """The cells of the tables' rows."""
    lines = [line for line in out.replace(",", "").splitlines() if line.startswith("|")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return [row for row in rows if row[-1].replace(".", "").isdigit()]


def test_updates_of_td3_sac_and_pearl(run_main, capfd, monkeypatch):
    out = run_main(SCRIPT, *"td3 --critics mlp --batch-sizes 2 4 --rounds 1".split()).out
    monkeypatch.setattr(speed, "make_args", partial(speed.make_args, primary_widths=(4, 8)))
    speed.off_policy(sac_hyper, ("mlp", "sa-hyper"), (2,), rounds=1)
    speed.pearl((1,), rounds=1)
    rows = rows_of(out + capfd.readouterr().out)
    names = ["mlp 2", "mlp 4", "mlp 2", "sa-hyper 2", "mlp 1", "hyper 1"]
    assert [" ".join(row[:2]) for row in rows] == names
    assert all(float(cell) > 0 for row in rows for cell in row[2:])
    assert_refused(run_main(SCRIPT, "td3", "--device", "no"), "--device no")


def test_the_phases_of_maml(capsys, monkeypatch):
    small = {"episodes_per_goal": 2, "eval_episodes": 2, "horizon": 5, "primary_widths": (4, 8)}
    monkeypatch.setattr(speed, "MAML_ROWS", {"hyper": small})
    speed.maml(("hyper",), rounds=1)
    (row,) = rows_of(capsys.readouterr().out)
    assert row[0] == "hyper" and all(float(cell) >= 0 for cell in row[1:])
