"""What the packaging files say of versions agrees, and the files of .github are what GitHub expects."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import yaml
from runs import settings, write_pairs
from toys import toy_model_folder

import notus

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
MATRIX = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]


def test_the_matrix_has_every_supported_python() -> None:
    pythons = [text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if "Python :: 3." in text]
    assert MATRIX["python"] == pythons
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    low, high = (version.replace(".", ", ") for version in (pythons[0], pythons[-1]))
    assert f"({low}) <= sys.version_info[:2] <= ({high})" in script


def test_the_matrix_has_the_lowest_and_the_pinned_torch() -> None:
    (bound,) = (text for text in PROJECT["dependencies"] if re.match(r"torch\W", text))
    pinned = re.search(r"^torch==(\d+\.\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert MATRIX["torch"] == [f"{bound.removeprefix('torch>=')}.*", f"{pinned[1]}.*"]


def test_the_workflow_runs_what_a_developer_runs() -> None:
    commands = [step["run"] for step in WORKFLOW["jobs"]["tests"]["steps"] if "run" in step]
    assert commands == [".ci/run"]


def test_every_dependency_is_pinned_for_the_tests() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert pinned == {re.split(r"[<>=]", text)[0] for text in PROJECT["dependencies"]}


def test_version_and_name_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == notus.__version__
    released = re.findall(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == (notus.__version__, citation["date-released"])
    assert PROJECT["name"] == "notus-dpo"
    assert PROJECT["scripts"] == {"notus": "notus.__main__:entry"}
    assert (ROOT / "notus" / "py.typed").is_file()


def test_issue_forms_parse_and_ask_for_something() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "feature"]
    for form in forms:
        tree = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(tree)
        assert all({"id", "type", "attributes"} <= set(question) for question in tree["body"])


def test_a_wheel_can_train(tmp_path: Path) -> None:
    """Built, unpacked and called by its entry point, away from the repository."""
    source, place = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "notus", source / "notus", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "-w", tmp_path, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place)
    (path,) = place.glob("*.dist-info/entry_points.txt")
    points = configparser.ConfigParser()
    points.read(path)
    module, function = points["console_scripts"]["notus"].split(":")

    model, pairs = toy_model_folder(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 4)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path / "run", model, pairs)))
    script = tmp_path / "notus"  # as pip writes it
    script.write_text(f"from {module} import {function}\nif __name__ == '__main__':\n    {function}()\n")
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, "dpo", config]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
