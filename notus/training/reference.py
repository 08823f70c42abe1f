"""The reference log-prob cache: one safetensors file per (reference weights, tokenised rows, precision, kernel).

It is filled before training by the policy itself, which still has the reference's weights, with the forward, kernels
and precision of training: a new LoRA adapter adds nothing yet, and one that is trained further belongs to the
reference. Batch size, seed and the number of ranks are not part of the key, so a sweep over β or the learning rate
fills it once.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from notus.data.dataset import TokenizedDataset
from notus.model.export import write_tensors
from notus.runtime.distributed import on_main
from notus.runtime.files import check_regular, replacing
from notus.runtime.process import tell

FORMAT = 4  # another one for every change of how log-probs round
PART_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class ReferenceKey:
    """All that decides a reference log-prob.

    Attributes:
        weights: digest of the reference's weights and configuration.
        rows: digest of the tokenised rows, which covers tokenizer, template and truncation.
        precision: "bf16" or "fp32".
        kernel: name of the attention kernel.
        public: whether the cache also holds sums up to the length of each pair's shorter completion, for LD-DPO.
    """

    weights: str
    rows: str
    precision: str
    kernel: str
    public: bool = False

    def described(self) -> dict[str, str | bool]:
        """Return what decides the log-probs; `public` only if it is true, so that other caches keep one name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "public" or value}

    @property
    def name(self) -> str:
        """The cache's file name, without suffix."""
        described = json.dumps({**self.described(), "format": FORMAT}, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:32]


def digest_of_rows(digests: np.ndarray) -> str:
    """One digest for a whole dataset from its rows' digests, uint8 [n, 16]."""
    return hashlib.sha256(digests.tobytes()).hexdigest()


def reference_logps(
    score: Callable[[np.ndarray], Tensor],
    rows: TokenizedDataset,
    *,
    key: ReferenceKey,
    digests: np.ndarray,
    folder: Path,
) -> tuple[Tensor, bool]:
    """Read the cache, or fill it; collective.

    An interrupted pass continues after its last whole part.

    Args:
        score: the collective pass over some dataset rows (int64 [m] -> fp32 [m, K] on the host; with `key.public`
            [m, 2 K], the public sums last).
        rows: the tokenised dataset.
        key: identifies the cache.
        digests: uint8 [n, 16], a digest per row.
        folder: where caches are kept; shared by all ranks of a run, and by as many runs as like.

    Returns:
        (fp32 [n, K] in nats, or [n, 2 K]; whether it was read rather than computed).

    Raises:
        ValueError: the cache file is damaged or of other rows, or a log-prob is not finite.
        OSError: the cache cannot be written; whole parts stay, and the next pass continues after them.
    """
    path = folder / f"{key.name}.safetensors"
    parts = folder / f"{key.name}.parts"
    hit = on_main(lambda: _read(path, rows, key, digests) if path.exists() else None)
    if hit is not None:
        return hit, True
    found = [
        _part(score, rows, np.arange(start, min(start + PART_SIZE, len(rows))), parts, digests, key.precision)
        for start in range(0, len(rows), PART_SIZE)
    ]
    logps = torch.cat(found)

    def publish() -> Tensor:
        # Another run may have filled the same cache meanwhile. Its log-probs may differ by rounding, and they are what
        # this run will read when it is resumed, so it learns from them, too.
        kept = _read(path, rows, key, digests) if path.exists() else logps
        if kept is logps:
            _write_cache(path, logps, rows, key, digests)
        shutil.rmtree(parts, ignore_errors=True)  # a run that is still computing writes its parts again
        return kept

    return on_main(publish), False


def content_digest(logps: Tensor) -> str:
    """A digest of log-probs as `reference_logps` returns them."""
    return _digest({"logps": logps.contiguous()})


def stored_logps(paths: Sequence[Path], digests: np.ndarray, num_branches: int) -> Tensor | None:
    """Look rows up in caches that `reference_logps` wrote, by the digest of each.

    Args:
        paths: the caches, of one reference; those that do not exist are passed over.
        digests: uint8 [n, 16], a digest per row.
        num_branches: K of these rows. The caches may have another K, since the longest list of each decides.

    Returns:
        fp32 [n, K] in nats; None if any of the rows is in none of the caches.

    Raises:
        ValueError: a cache file is damaged.
    """
    known: dict[bytes, Tensor] = {}
    for path in paths:
        if path.exists():
            try:
                tensors, _ = _open(path)
            except ValueError as error:
                raise ValueError(f"the reference cache {path} is damaged ({error}): delete it") from error
            rows = map(np.ndarray.tobytes, tensors["digests"].numpy())
            known |= dict(zip(rows, _with_columns(tensors["logps"], num_branches), strict=True))
    found = [known.get(row.tobytes()) for row in digests]
    there = [row for row in found if row is not None]
    return torch.stack(there) if len(there) == len(found) else None


def _with_columns(logps: Tensor, count: int) -> Tensor:
    """Log-probs [n, K] as [n, count]: a row with at most `count` completions has 0 beyond them, and keeps the rest."""
    return pad(logps[:, :count], (0, max(0, count - logps.shape[1])))


def _part(
    score: Callable[[np.ndarray], Tensor],
    rows: TokenizedDataset,
    indices: np.ndarray,
    folder: Path,
    digests: np.ndarray,
    precision: str,
) -> Tensor:
    path = folder / f"{indices[0]:09d}.safetensors"
    expected = torch.from_numpy(digests[indices])
    done = on_main(lambda: _read_part(path, expected) if path.exists() else None)
    if done is not None:
        return done
    logps = score(indices)
    bad = indices[~torch.isfinite(logps).all(dim=1).numpy()]
    if len(bad):
        instead = "" if precision == "fp32" else ", or use training.precision=fp32"
        raise ValueError(
            f"the reference model gives log-probs that are not finite for rows ({rows.places(bad.tolist())}): check "
            f"its weights{instead}"
        )
    on_main(lambda: _write(path, {"logps": logps, "digests": expected}, {}))
    return logps


def _read_part(path: Path, expected: Tensor) -> Tensor | None:
    """A part's log-probs, or None if the part is not whole or of other rows (it is then computed again)."""
    try:
        tensors, _ = _open(path)
    except ValueError as error:
        tell(f"computing a part of the reference cache again: {path} is damaged ({error})")
        return None
    return tensors["logps"] if torch.equal(tensors["digests"], expected) else None


def _write_cache(path: Path, logps: Tensor, rows: TokenizedDataset, key: ReferenceKey, digests: np.ndarray) -> None:
    count = rows.num_branches
    tensors = {
        "logps": logps[:, :count],
        **({"public_logps": logps[:, count:]} if key.public else {}),
        "token_counts": torch.from_numpy(rows.loss_tokens),
        "digests": torch.from_numpy(digests),
    }
    _write(path, tensors, {"key": json.dumps(key.described()), "format": str(FORMAT)})


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file atomically, with a digest of its content. Raises OSError; see `disk_error`."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "digest": _digest(tensors)}
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path) as temporary:
                write_tensors(temporary, tensors, metadata)
            return
        except OSError as error:
            # another run, done with the same cache, removes the parts, folder and all: then write this one again
            if path.parent.is_dir() and not isinstance(error.__cause__, FileNotFoundError):
                raise


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `_write` wrote. ValueError if it is not as it was written."""
    try:
        with safe_open(check_regular(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
    if metadata.get("digest") != _digest(tensors):
        raise ValueError("its content is not what was written")
    return tensors, metadata


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def _read(path: Path, rows: TokenizedDataset, key: ReferenceKey, digests: np.ndarray) -> Tensor:
    remedy = f"delete {path} to compute it again"
    try:
        tensors, metadata = _open(path)
        made_for = json.loads(metadata["key"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"the reference cache {path} is damaged ({error}): {remedy}") from error
    if made_for != key.described():
        raise ValueError(f"the reference cache {path} was made for another model, data or precision: {remedy}")
    if not torch.equal(tensors["digests"], torch.from_numpy(digests)):
        raise ValueError(f"the reference cache {path} holds other rows than the data: {remedy}")
    if not torch.equal(tensors["token_counts"], torch.from_numpy(rows.loss_tokens)):
        raise ValueError(f"the reference cache {path} counts other completion tokens than the data: {remedy}")
    return torch.cat([tensors["logps"], tensors["public_logps"]], dim=1) if key.public else tensors["logps"]
