"""Bounds, YAML numbers and duplicate keys: what every section of the config rests on."""

import re
from pathlib import Path

import pytest

from notus.schema import Bounds, dump_yaml, nearest, read_yaml


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        (Bounds(1), [1, 1e9], [0.99, float("inf"), float("nan")], "at least 1"),
        (Bounds(0, open_low=True), [1e-12], [0, -1], "above 0"),
        (Bounds(0, 1), [0, 0.5, 1], [-0.1, 1.1], "at least 0 and at most 1"),
        (Bounds(0, 1, open_high=True), [0, 0.99], [1], "at least 0 and below 1"),
    ],
)
def test_bounds(bounds: Bounds, inside: list[float], outside: list[float], words: str) -> None:
    assert all(bounds.hold(value) for value in inside)
    assert not any(bounds.hold(value) for value in outside)
    assert str(bounds) == words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # a text in YAML 1.1
        ("5E-7", 5e-7),
        ("-2.e3", -2000.0),
        (".5e1", 5.0),
        ("1e", "1e"),
        ("e5", "e5"),
        ('"1e-6"', "1e-6"),
        ("1.5", 1.5),
        ("3", 3),
        ("null", None),
        ("true", True),
        ("[a, 1e2]", ["a", 100.0]),
    ],
)
def test_yaml_values_and_their_way_back(text: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "value.yaml"
    path.write_text(text)
    found = read_yaml(path)
    assert found == value
    assert type(found) is type(value)
    path.write_text(dump_yaml(found))
    assert read_yaml(path) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: not valid YAML: 'a' is given twice"),
        ("a: 1\nb: [2\n", "line 3: not valid YAML"),
        ("a: !!python/object:os.system {}", "line 1: not valid YAML: could not determine a constructor"),
    ],
)
def test_broken_yaml_names_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_yaml(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot read the config file: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="cannot read the config file: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.yaml: not UTF-8 text"):
        read_yaml(tmp_path / "binary.yaml")


def test_nearest_name() -> None:
    assert nearest("bata", ["alpha", "beta"]) == "; did you mean 'beta'?"
    assert nearest("xyz", ["alpha", "beta"]) == "; valid: alpha, beta"
