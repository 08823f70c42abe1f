"""Real pairs as plain strings that both sides read alike: `python real_pairs.py SOURCE COUNT MODEL MAX_LENGTH OUTPUT`.

The source is a file or a folder in any form that `data.train` takes.
Conversations are rendered with the tokenizer's chat template (Zephyr's where it has none) and cut where the answer
begins and behind its end-of-sequence token: what a template writes after that, TRL would learn, and Notus does not. BOS
is left to the tokenizer where it puts one itself.

Left out are pairs that are longer than MAX_LENGTH, that have several answers, an empty one or twice the same, or whose
prompt ends in the middle of a token: there the libraries differ in what they learn.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder, Rendered
from notus.data.formats import normalize
from notus.data.sources import open_source, read_rows

Pair = dict[str, str]


def usable_pairs(source: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Pair | str]:
    """Yield each pair of the source in its order, or why it is left out.

    Raises:
        ValueError: a row is of no form that Notus reads.
    """
    encoder, opened = ChatEncoder(tokenizer), open_source(source)
    for start in range(0, len(opened.rows), 100):
        indices = range(start, min(start + 100, len(opened.rows)))
        for _, row in read_rows(opened, opened.rows[indices.start : indices.stop], indices):
            record = normalize(row, "dpo")
            if not all(map(encoder.has_text, record.completions)):
                yield "empty answer"
                continue
            pair = _split([encoder.render(record.prompt, completion) for completion in record.completions])
            if isinstance(pair, dict):
                pair = _without_bos(pair, tokenizer)
                pair = _fault(pair, tokenizer, max_length) or pair
            yield pair


def _split(rendered: list[Rendered]) -> Pair | str:
    """Return prompt, chosen and rejected as text, or why the pair cannot be cut so."""
    if any(len(item.spans) != 1 for item in rendered):
        return "several answers"
    (chosen, start), (rejected, other) = ((item.text, item.spans[0][0]) for item in rendered)
    if chosen[:start] != rejected[:other]:
        return "prompts rendered differently"
    return {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[other:]}


def _without_bos(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Cut the BOS that the template wrote if the tokenizer puts one in front of any text: else TRL would have two."""
    bos = tokenizer.bos_token
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return {**pair, "prompt": pair["prompt"].removeprefix(bos)}
    return pair


def _fault(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str | None:
    prompt = tokenizer(pair["prompt"])["input_ids"]
    wholes = [tokenizer(pair["prompt"] + pair[answer])["input_ids"] for answer in ("chosen", "rejected")]
    if max(map(len, wholes)) > max_length:
        return f"longer than {max_length} tokens"
    if any(whole[: len(prompt)] != prompt for whole in wholes):
        return "prompt ends in the middle of a token"
    return "chosen and rejected identical" if wholes[0] == wholes[1] else None


def main(source: str, count: int, model: str, max_length: int, output: Path) -> None:
    """Write the first `count` pairs that can be used; the process ends with an error if there are fewer."""
    found: list[Pair] = []
    left_out: Counter[str] = Counter()
    for pair in usable_pairs(source, AutoTokenizer.from_pretrained(model), max_length):
        if isinstance(pair, str):
            left_out[pair] += 1
        else:
            found.append(pair)
        if len(found) == count:
            break
    reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "none"
    if len(found) < count:
        sys.exit(f"{source} has {len(found)} pairs that can be used (left out: {reasons}): lower --num-pairs {count}")
    output.write_text("".join(json.dumps(pair) + "\n" for pair in found))
    print(f"pairs left out: {reasons}")


if __name__ == "__main__":
    source, count, model, max_length, output = sys.argv[1:]
    main(source, int(count), model, int(max_length), Path(output))
