"""results/: the committed tables are what draw.sh makes."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

RESULTS = ROOT / "results"


def test_the_committed_tables_are_redrawn_byte_for_byte(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run([RESULTS / "draw.sh", tmp_path], env=os.environ | {"PATH": path}, check=True)
    made = {file.relative_to(tmp_path): file for file in tmp_path.rglob("*.*")}
    committed = {file.relative_to(RESULTS / "figures") for file in RESULTS.glob("figures/**/*.*")}
    assert made.keys() == committed
    for name, file in made.items():
        if name.suffix == ".csv":
            assert file.read_bytes() == (RESULTS / "figures" / name).read_bytes(), name
