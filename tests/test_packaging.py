"""What the packaging files say of versions agrees, and the files of .github are what GitHub expects."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

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
