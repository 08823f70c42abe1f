"""What a run starts from, damaged: every damage is found, and told in one line that names the file."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disks import largest_file
from runs import config
from toys import toy_model

from notus.model.export import load_causal_lm
from notus.model.load import load_weights
from notus.training import dpo
from notus.training.reference import ReferenceKey


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in its header": lambda data: data[:100],
    "cut in its tensors": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "a header of noise": lambda data: data[:8] + b"\xff" * (header_length(data) - 8) + data[header_length(data) :],
    "a length of the header that is too large": lambda data: flip(data, 5),
    "a bit of the header flipped": lambda data: flip(data, data.index(b"shape")),
    "a bit of a name flipped": lambda data: flip(data, data.index(b"embed_tokens")),
    "a bit of an offset flipped": lambda data: flip(data, data.index(b"data_offsets") + len('data_offsets":[')),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_run_does_not_start_from_a_damaged_model(
    name: str, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(DAMAGES[name](weights.read_bytes()))
    with pytest.raises(ValueError, match=str(model)) as caught:
        dpo.run(config("dpo", tmp_path / "run", model, pairs_file))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=str(model)):
        load_causal_lm(model, dtype=torch.float32, device="cpu")


def test_a_flip_anywhere_in_the_header_changes_no_weight_silently(model_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    expected, told = toy_model().state_dict(), 0
    places = range(0, header_length(whole), 5)
    for place in places:
        weights.write_bytes(flip(whole, place))
        loaded = toy_model(seed=1)
        try:
            load_weights(loaded, model)
        except ValueError as error:
            told += str(model) in str(error)
            continue
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())
        told += 1  # a flip in what nobody reads, as the padding
    assert told == len(places)


def run_twice(pairs: Path, model: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """Fill the reference cache by a run, damage it, start another run on it."""
    shared = {"reference__cache_dir": str(tmp_path / "reference"), "training__max_steps": 1}
    dpo.run(config("dpo", tmp_path / "one", model, pairs, **shared))
    (cache,) = (tmp_path / "reference").glob("*.safetensors")
    damage(cache)
    dpo.run(config("dpo", tmp_path / "two", model, pairs, **shared))


@pytest.mark.parametrize("place", ["log-probs", "header", "end"])
def test_a_damaged_reference_cache_ends_the_run(
    place: str, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    def damage(cache: Path) -> None:
        data = cache.read_bytes()
        at = {"log-probs": data.index(b'"logps"'), "header": 20, "end": len(data)}[place]
        if place == "log-probs":  # the last two bits of a mantissa
            begin = int(data[data.index(b"[", data.index(b"data_offsets", at)) + 1 :].split(b",")[0])
            at = header_length(data) + begin
        cache.write_bytes(data[: at - 1] if place == "end" else flip(data, at))

    with pytest.raises(
        ValueError, match=r"reference cache .*\.safetensors is damaged .*: delete .* to compute it again"
    ):
        run_twice(pairs_file, model_folder, tmp_path, damage)


@pytest.mark.parametrize("what", ["weights", "rows"])
def test_a_reference_cache_of_another_model_or_data_is_refused(
    what: str, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if copied under the name that this run looks for: the rows cover data, tokenizer, template and truncation."""
    name = ReferenceKey.name.fget
    assert name is not None
    same_name = property(lambda key: name(ReferenceKey(**{**vars(key), what: "any"})))
    monkeypatch.setattr(ReferenceKey, "name", same_name)
    other = model_folder
    changes: dict[str, object] = {"data__max_length": 12}
    if what == "weights":
        other, changes = Path(shutil.copytree(model_folder, tmp_path / "other")), {}
        toy_model(seed=2).save_pretrained(other)
    shared = {"reference__cache_dir": str(tmp_path / "reference"), "training__max_steps": 1}
    dpo.run(config("dpo", tmp_path / "one", model_folder, pairs_file, **shared))
    with pytest.raises(ValueError, match="was made for another model, data or precision: delete "):
        dpo.run(config("dpo", tmp_path / "two", other, pairs_file, **shared, **changes))


def test_a_disk_that_is_full_while_the_model_is_exported(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    settings = config("dpo", tmp_path / "run", model_folder, pairs_file, training__max_steps=1)
    model = tmp_path / "run" / "model"
    too_small = (model_folder / "model.safetensors").stat().st_size // 2
    message = rf"{model}: cannot be written \(model.safetensors: .*\); [\d.]+ GB free in {tmp_path}/run$"
    dpo.run(settings)
    shutil.rmtree(model)  # as if the run had been killed before its export
    with largest_file(too_small), pytest.raises(OSError, match=message):
        dpo.run(settings)
    assert not list((tmp_path / "run").glob("*model*"))
    dpo.run(settings)
    assert (model / "model.safetensors").exists()
