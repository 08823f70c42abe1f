"""Scores of texts: dealt to the ranks row by row, each row kept as soon as it is done."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from notus.evaluation.kept import keep, read_kept
from notus.evaluation.open_llm.rows import Group, Row, Text, collate_texts, plan_rows, share, texts_of
from notus.model.flops import Dimensions, dimensions, forward_flops
from notus.model.policy import Policy
from notus.runtime.distributed import gather_objects, is_main, on_main, rank, say, world_size

DEFAULT_TOKENS_PER_ROW = 4096

Score = tuple[float, bool]  # log-prob of the scored tokens in nats; whether each is the likeliest


class KeptScores:
    """Scores by the digest of their text, in one file per rank of a folder that all ranks see."""

    def __init__(self, folder: Path, identity: str) -> None:
        """`identity` says which weights, in which precision, gave the scores; others' are not found."""
        self.folder, self.identity = folder, identity.encode()

    def key(self, text: Text) -> str:
        """What tells a text, and the model, from others."""
        head = f"{text.scored} {len(text.ids)} ".encode()
        return hashlib.sha256(self.identity + head + text.ids.tobytes()).hexdigest()

    def find(self) -> dict[str, Score]:
        """All scores. Raises ValueError, naming the file, if one holds something else."""
        found = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for number, record in enumerate(read_kept(path), start=1):
                if [type(record.get(name)) for name in ("key", "logp", "greedy")] != [str, float, bool]:
                    raise ValueError(f"{path}, line {number}: not a kept log-likelihood; remove the file")
                found[record["key"]] = (record["logp"], record["greedy"])
        return found

    def add(self, scores: dict[str, Score]) -> None:
        """Keep some. Raises OSError."""
        records = ({"key": key, "logp": logp, "greedy": greedy} for key, (logp, greedy) in scores.items())
        keep(self.folder / f"rank-{rank()}.jsonl", records)


def score_texts(policy: Policy, texts: Sequence[Text], *, tokens_per_row: int | None, kept: KeptScores) -> list[Score]:
    """Score texts, those that were not scored before; collective.

    Rows are planned from all texts, kept or not: what a resumed pass computes is what an undisturbed one would have.

    Args:
        policy: whole on every rank.
        texts: the same on every rank, repeats allowed.
        tokens_per_row: the most tokens of a row; None: 4096, or the longest text's.
        kept: where scores are found and kept.

    Raises:
        ValueError: a text is longer than `tokens_per_row`, or its score is not finite.
    """
    keys = [kept.key(text) for text in texts]
    _check_same(keys)
    unique = dict(zip(keys, texts, strict=True))
    names, different = list(unique), list(unique.values())
    rows = plan_rows(different, _room(different, tokens_per_row))
    done = on_main(lambda: {key: score for key, score in kept.find().items() if key in unique})
    open_rows = [row for row in rows if any(names[text] not in done for text in texts_of(row))]
    say(_describe(len(texts), different, rows, len(done)))
    costs = [_cost(dimensions(policy.causal_lm), row) for row in open_rows]
    new: dict[str, Score] = {}
    for number in tqdm(share(costs, rank(), world_size()), disable=None if is_main() else True):
        scored = _score_row(policy, open_rows[number], different)
        found = {names[text]: score for text, score in scored.items()}
        kept.add(found)
        new.update(found)
    for part in gather_objects(new):
        done.update(part)
    return [done[key] for key in keys]


def _score_row(policy: Policy, row: Row, texts: Sequence[Text]) -> dict[int, Score]:
    batch = collate_texts(row, texts)
    logps, greedy = policy.token_scores(batch.to(policy.causal_lm.device))
    lengths = batch.lengths.flatten()
    sums = torch.segment_reduce(logps.cpu(), "sum", lengths=lengths)
    all_greedy = torch.segment_reduce(greedy.float().cpu(), "min", lengths=lengths)
    if not torch.isfinite(sums).all():
        raise ValueError("log-likelihoods are not finite; check the weights, or use --precision fp32")
    columns = zip(batch.indices.tolist(), sums.tolist(), all_greedy.tolist(), strict=True)
    return {text: (logp, bool(hit)) for text, logp, hit in columns}


def _room(texts: Sequence[Text], given: int | None) -> int:
    longest = max((len(text.ids) - 1 for text in texts), default=0)
    if given is not None and given < longest:
        raise ValueError(
            f"--tokens-per-row {given} is less than the longest text ({longest} tokens): raise it, "
            "or lower --max-length"
        )
    return given or max(DEFAULT_TOKENS_PER_ROW, longest)


def _check_same(keys: list[str]) -> None:
    """Ranks make the requests each for itself; were they different, scores would be mixed up."""
    digest = hashlib.sha256("".join(keys).encode()).hexdigest()
    if len(set(gather_objects(digest))) > 1:
        raise ValueError(
            "the ranks have different requests or weights: their data or files differ, or a task draws its examples "
            "at random without a seed; run in one process"
        )


def _cost(size: Dimensions, row: Row) -> float:
    return float(sum(_group_cost(size, group) for group in row))


def _group_cost(size: Dimensions, group: Group) -> int:
    branches = np.array([[len(ids) - group.trunk for ids in group.inputs]])
    # the head computes little, and nearly the same for every group
    return int(forward_flops(size, np.array([group.trunk]), branches, np.zeros(1))[0])


def _describe(requests: int, texts: Sequence[Text], rows: Sequence[Row], kept: int) -> str:
    read = sum(len(text.ids) - 1 for text in texts)
    computed = sum(group.tokens for row in rows for group in row)
    return (
        f"{requests} log-likelihoods of {len(texts)} texts: {read} tokens, {computed} with shared prefixes computed "
        f"once, in {len(rows)} rows; {kept} texts are done already"
    )
