"""A model behind transformers' own server, `transformers serve`; needs its extra, transformers[serving]."""

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from ranks import free_port
from toys import toy_model, toy_tokenizer

from notus.data.chat import ZEPHYR_TEMPLATE
from notus.evaluation.endpoint import Endpoint

START = "from transformers.cli.transformers import main; main()"


def saying(folder: Path, *words: str, added: Sequence[str] = ()) -> Path:
    """A model that answers any conversation with `words`, tokens that must differ: each leads to the next one.

    `added` are words that its tokenizer gets as tokens of their own.
    """
    tokenizer = toy_tokenizer(chat_template=ZEPHYR_TEMPLATE)
    tokenizer.add_tokens(list(added))
    chain = [tokenizer.convert_tokens_to_ids(token) for token in ("Ċ", *words, "</s>")]
    model = toy_model()
    model.resize_token_embeddings(len(tokenizer))
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
    """Start the server, which loads any model that a request names, and yield its address."""
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


def wait_for(url: str, model: str, max_tokens: int = 8) -> str:
    """Wait until the server has loaded a model, and return what this says."""
    waiting = Endpoint(url, model, max_tokens=max_tokens, retries=120, sleep=lambda _: asyncio.sleep(0.5))
    return asyncio.run(waiting.ask([{"role": "user", "content": "hello"}]))
