"""`tools/house.py`: what it counts, and that its tiny run tells what a step executes from what is only imported."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def house(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import house

    return house


def test_functions_and_packages_by_hand(house, tmp_path):
    package = tmp_path / "notus" / "model"
    package.mkdir(parents=True)
    (package / "a.py").write_text(
        "def f():\n    def g(): ...\n    return g\n\n@f\nclass C:\n    async def h(self): ...\n"
    )
    (tmp_path / "notus" / "b.py").write_text("x = 1\n")
    assert sorted(house.function_lengths(package / "a.py")) == [1, 1, 3]
    found = {name: house.size(files) for name, files in house.packages(tmp_path).items()}
    assert found == {
        "notus": "2, 8",
        "notus/*.py": "1, 1",
        "notus/model": "1, 7",
        "benchmarks": "0, 0",
        "tests": "0, 0",
    }


def test_two_checkouts_stand_side_by_side(house, capsys, tmp_path):
    shown = house.table([{"notus/a: files, lines": "1, 2"}, {"notus/b: files, lines": "3, 4"}], ["old", "new"])
    assert shown.splitlines()[0] == "|  | old | new |"
    assert "| notus/a: files, lines | 1, 2 |  |" in shown
    assert "| notus/b: files, lines |  | 3, 4 |" in shown
    with pytest.raises(SystemExit, match="has no train_dpo"):
        house.main([str(tmp_path)])


def test_a_step_executes_less_than_a_run_imports(house, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = house.run(ROOT)
    imported, executed = ({Path(file).relative_to(ROOT).as_posix() for file in files} for files in found.values())
    assert {"notus/config.py", "notus/losses.py", "notus/model/policy.py"} <= imported
    assert {"notus/losses.py", "notus/model/policy.py"} <= executed < imported
    assert "notus/config.py" not in executed
