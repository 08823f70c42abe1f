"""What docs/python.md and the notebook show works, on a tiny model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from toys import toy_model, toy_tokenizer

import notus

ROOT = Path(__file__).resolve().parents[1]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }}{% if message.role == 'assistant' %}</s>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat-model")
    toy_model("llama").save_pretrained(folder)
    toy_tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def test_the_documented_python_runs(tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code.replace(HUB_ID, str(chat_model)), "docs/python.md", "exec"), names)
    assert names["scores"].margins.shape == (4,)
    for name in re.findall(r'"(runs/python[\w-]*)"', text):
        assert notus.load_result(name).finished
    assert notus.load_result("runs/python-eval").evaluations
    documented = set(re.findall(r"notus\.(\w+)\(", text)) | {"Callback", "Config"}
    assert documented <= set(notus.__all__)


def test_the_notebook_runs(tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    notebook = json.loads((ROOT / "examples" / "dpo_in_python.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names["MODEL"] == HUB_ID
            names |= {"MODEL": str(chat_model), "EPOCHS": 1}
    assert names["result"].finished
    assert len(names["scores"].margins) == len(names["eval_rows"])
    out = capsys.readouterr().out
    assert "held-out accuracy" in out
    assert "before:" in out
    assert re.search(r"^accuracy \d+%$", out, re.MULTILINE)


def test_the_notebook_says_nothing_of_the_machine_it_ran_on() -> None:
    text = (ROOT / "examples" / "dpo_in_python.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/(work|home|root|tmp|Users)/", text)
    assert '"output_type": "error"' not in text
