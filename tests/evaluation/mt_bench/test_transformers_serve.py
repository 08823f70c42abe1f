"""The judge behind transformers' own server, `transformers serve`; needs its extra, transformers[serving]."""

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fastchat
import pytest
import torch
from ranks import free_port
from toys import toy_model, toy_tokenizer

from notus.__main__ import main
from notus.data.chat import ZEPHYR_TEMPLATE
from notus.evaluation.endpoint import Endpoint
from notus.evaluation.results import read_result

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
START = "from transformers.cli.transformers import main; main()"


def kind_judge(folder: Path) -> Path:
    """A model that answers any conversation with "[7]": the last newline is followed by "[", that by "7", and so on."""
    tokenizer = toy_tokenizer(chat_template=ZEPHYR_TEMPLATE)
    chain = [tokenizer.convert_tokens_to_ids(token) for token in ("Ċ", "[", "7", "]", "</s>")]
    model = toy_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        for axis, (token, following) in enumerate(itertools.pairwise(chain)):
            model.get_input_embeddings().weight[token, axis] = 1.0
            model.get_output_embeddings().weight[following, axis] = 10.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def served(log: Path) -> Iterator[str]:
    port = free_port()
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-c", START, *options], env={**os.environ, **own}, stdout=file, stderr=file
        ) as process,
    ):
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def test_a_judge_that_transformers_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = str(kind_judge(tmp_path / "judge"))
    answers, questions = str(fastchat.write_answers(tmp_path)), str(fastchat.write_questions(tmp_path))
    with served(tmp_path / "log") as url:
        waiting = Endpoint(url, model, max_tokens=8, retries=120, sleep=lambda _: asyncio.sleep(0.5))
        assert asyncio.run(waiting.ask([{"role": "user", "content": "hello"}])) == "[7]"
        command = ["evaluate", "--suite", "mt-bench", "--answers", answers, "--questions", questions]
        judge = ["--judge-model", model, "--judge-url", url, "--judge-prompts", str(fastchat.write_prompts(tmp_path))]
        assert main([*command, *judge, "--output", str(tmp_path / "out")]) == 0
    result = read_result(tmp_path / "out" / "result.json")
    assert (result.figures[0].value, result.figures[0].count, result.settings["unread"]) == (7.0, 8, 0)
