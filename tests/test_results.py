"""results/: the committed tables are what draw.sh makes, and the pages' links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
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


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *RESULTS.rglob("*.md")], ids=str)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http", "../../actions")):
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_each_run_has_its_arguments_and_each_experiment_its_commands():
    runs = [file.parent for file in RESULTS.glob("runs/**/eval.csv")]
    assert len(runs) > 100
    assert [run for run in runs if not (run / "config.json").exists()] == []
    experiments = {path for path in (RESULTS / "runs").iterdir() if path.is_dir()}
    assert {path for path in experiments if not (path / "run.sh").exists()} == set()
    listed = (RESULTS / "runs" / "README.md").read_text()
    assert [path.name for path in experiments if f"`{path.name}`" not in listed] == []
