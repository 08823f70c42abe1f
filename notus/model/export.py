"""Write trained weights as a Hugging Face folder or a PEFT adapter, and load any such folder to generate.

A folder appears on disk whole or not at all: rank 0 writes it under another name, every rank reads its own rows back
and compares them, and only then the folder gets its name.
"""

import copy
import datetime
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from notus.model.buffers import rebuild_attributes
from notus.model.conversion import Stored, plan_export, write_code
from notus.model.load import (
    INDEX,
    WEIGHTS,
    check_dtypes,
    converted_rows,
    find_folder,
    match_tensors,
    open_tensors,
    resolve_model_folder,
    stored_tensors,
    weight_files,
    write_json,
)
from notus.model.lora import lora_layers
from notus.model.make import auto_class_of, forget_attention, read_config
from notus.model.new_tokens import grow
from notus.model.peft_format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    adapter_settings,
    adapter_tensors,
    merge_adapter,
    read_adapter,
    stacked,
)
from notus.model.sharded_tensors import gather, is_rank_zero, local, local_rows
from notus.model.structure import text_config
from notus.model.usage import (
    ends_of,
    generation_config_to_write,
    tokenizer_difference,
    with_learned_end,
    write_generation_config,
    write_plain_text,
    write_tokenizer,
)
from notus.runtime.files import disk_error, sync
from notus.runtime.process import first_line, tell

_PATIENCE = datetime.timedelta(hours=6)


def export_model(
    causal_lm: PreTrainedModel,
    folder: str | Path,
    *,
    hf_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
    plain_text: bool = False,
) -> None:
    """Write a Hugging Face folder: weights in `dtype`, config, tokenizer and generation config. All ranks call this.

    Rank 0 gathers the tensors of one file at a time (at most `max_shard_bytes`, or the tensors that have to be
    converted together, such as a layer's experts), so no rank ever holds the model. The names are the published ones,
    as `save_pretrained` writes them, and what transformers keeps in fp32 stays fp32. Tied tensors are stored once.
    Without `generation_config`, that of `causal_lm` is written. Both configs also name the tokenizer's EOS, at which
    training teaches to stop. `plain_text`: the model learned plain text only, so a string prompt is not a user's turn,
    although the tokenizer may have a chat template. An earlier export in `folder` is replaced, whole. FSDP modules
    must be resharded before.

    Raises:
        ValueError: `folder` holds something other than a model, the model has LoRA layers, or what was read back
            differs from it.
        OSError: the disk fails; both on every rank.
    """
    if lora_layers(causal_lm):
        raise ValueError("the model has LoRA layers: export its adapter, or merge it into the base first")
    tensors = _published_tensors(causal_lm)
    kinds = {isinstance(tensor, DTensor) for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}
    assert len(kinds) == 1, "some parameters are gathered in the dtype of the computation: reshard first"
    dtypes = _export_dtypes(causal_lm, tensors, dtype)
    files = _plan_files(plan_export(causal_lm, tensors, dtypes), max_shard_bytes)
    new = NewFolder(folder, markers={"config.json", ADAPTER_CONFIG})
    for file, parts in files.items():
        new.write_published(file, parts, causal_lm, tensors, dtypes)
    config = _config_to_write(hf_config, causal_lm, dtype, tokenizer)

    def write_rest(partial: Path) -> None:
        if len(files) > 1:
            weight_map = {name: file for file, parts in files.items() for part in parts for name in part.sizes}
            total = sum(size for parts in files.values() for part in parts for size in part.sizes.values())
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_code(causal_lm, partial, config)
        config.save_pretrained(partial)
        own = generation_config or causal_lm.generation_config
        write_generation_config(generation_config_to_write(own, text_config(hf_config), tokenizer), partial)
        _write_usage(tokenizer, partial, plain_text)

    def check(partial: Path) -> None:
        paths = weight_files(partial)
        if [path.name for path in paths] != sorted(files):
            raise _not_as_written(partial / INDEX, "weight_map")
        _check_weights(partial, paths, causal_lm, tensors, dtypes)
        _check_loads(partial, tokenizer, config)

    new.write(write_rest)
    new.publish(check)


def _published_tensors(causal_lm: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of a model by its name, without those that transformers leaves out of files and computes anew."""
    left_out = set(causal_lm._keys_to_ignore_on_save or [])
    return {name: tensor for name, tensor in stored_tensors(causal_lm).items() if name not in left_out}


def _export_dtypes(
    causal_lm: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Name -> the dtype to store: `dtype`, but for what transformers keeps in fp32 and what is no floating point."""
    plan = causal_lm._get_dtype_plan(dtype)
    kept = re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in plan)) if plan else None
    found = {}
    for name, tensor in tensors.items():
        wide = torch.float32 if kept is not None and kept.search(name) else dtype
        found[name] = wide if tensor.is_floating_point() else tensor.dtype
    return found


def export_adapter(
    causal_lm: PreTrainedModel,
    folder: str | Path,
    *,
    base_model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    plain_text: bool = False,
    below: Adapter | None = None,
) -> None:
    """Write the LoRA layers' A and B (fp32) as a PEFT adapter folder, with the tokenizer. All ranks call this.

    With them goes what is trained in full beside them. `below` is an adapter that was merged into the base before: what
    is written is both together, as one adapter of the base without it, see `stacked`.

    The base is recorded under the given name, a local folder under its absolute path. `generation_config` and
    `plain_text` are as in `export_model`. PEFT and transformers generate by the generation config of the base, not by
    the one that is written here; where the base does not stop at the EOS that was learned, a line says what to do.

    Raises:
        ValueError: `folder` holds something other than an adapter, or what was read back differs from the layers.
        OSError: the disk fails; both on every rank.
    """
    base = Path(base_model_name_or_path).expanduser()
    name = str(base.resolve()) if base.is_dir() else base_model_name_or_path
    if below is None:
        settings, tensors = adapter_settings(causal_lm, name), adapter_tensors(causal_lm)
        full = gather(tensors, torch.float32)
    else:
        settings, full = stacked(causal_lm, below, base=name)
        tensors = full
    of_base = generation_config or causal_lm.generation_config
    generation = generation_config_to_write(of_base, causal_lm.config, tokenizer)
    new = NewFolder(folder, markers={ADAPTER_CONFIG})
    # a tied tensor, which PEFT has under two names, must not lie in one place
    new.write(lambda partial: write_tensors(partial / ADAPTER_WEIGHTS, {key: full[key].clone() for key in full}))

    def write_rest(partial: Path) -> None:
        write_json(partial / ADAPTER_CONFIG, settings)
        write_generation_config(generation, partial)
        _write_usage(tokenizer, partial, plain_text)

    def check(partial: Path) -> None:
        if tensors:  # of a stacked adapter, the first rank alone has them
            check_tensors(partial / ADAPTER_WEIGHTS, tensors, torch.float32)
        _check_loads(partial, tokenizer)
        read_adapter(partial)

    new.write(write_rest)
    new.publish(check)
    ends = ends_of(of_base, causal_lm.config)
    if generation.eos_token_id != ends and is_rank_zero():
        tell(_unknown_end(tokenizer, ends, folder))


def _write_usage(tokenizer: PreTrainedTokenizerBase, folder: Path, plain_text: bool) -> None:
    write_tokenizer(tokenizer, folder)
    if plain_text and tokenizer.chat_template:  # without a template, no string is taken for a turn
        write_plain_text(folder)


def _unknown_end(tokenizer: PreTrainedTokenizerBase, ends: object, folder: str | Path) -> str:
    """What a user of an adapter must know if its base does not stop where the adapter learned to."""
    return (
        f"note: the adapter learned to stop at {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), but its base's "
        f"generation config stops at {ends}, and PEFT and transformers read that one: give their `generate` "
        f"generation_config=GenerationConfig.from_pretrained({str(folder)!r}), or merge the adapter with `notus export "
        "--merge`"
    )


def _plan_files(parts: list[Stored], limit: int) -> dict[str, list[Stored]]:
    """File name -> what it holds, in order: at most `limit` bytes, or one larger part."""
    groups: list[list[Stored]] = [[]]
    filled = 0
    for part in parts:
        size = sum(part.sizes.values())
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": each for i, each in enumerate(groups, 1)}


def _config_to_write(
    config: PreTrainedConfig, causal_lm: PreTrainedModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The configuration of what is written: of the model, where that is the language part of a larger one alone."""
    whole = type(causal_lm.config) is type(config)
    config = copy.deepcopy(config if whole else causal_lm.config)
    forget_attention(config)
    for each in {id(part): part for part in (config, text_config(config))}.values():
        each.dtype = dtype
        if each is text_config(config) or getattr(each, "eos_token_id", None) is not None:
            each.eos_token_id = with_learned_end(ends_of(None, each), tokenizer)
    # FSDP puts a class of its own in front of a module that it manages.
    classes = type(causal_lm).__mro__
    config.architectures = [next(base.__name__ for base in classes if not issubclass(base, FSDPModule))]
    return config


class NewFolder:
    """A folder that rank 0 writes under another name, and renames over an earlier one when it is whole and on disk.

    The other ranks write nothing, but learn of a failure, so that none waits for a rank that has given up.
    """

    def __init__(self, folder: str | Path, *, markers: set[str]) -> None:
        """Begin `folder`; what is there is replaced if it is empty or has a file named in `markers`.

        Raises:
            ValueError: something else is there.
            OSError: the disk fails; both on every rank.
        """
        self.folder = Path(folder).absolute()
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._old = self.folder.with_name(f".{self.folder.name}.old")
        self._failure: Exception | None = None
        # The other ranks wait in this group while rank 0 writes and syncs: longer than for an exchange between ranks.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.is_initialized() else None
        self.write(lambda _: self._prepare(markers))
        self._share_failure()

    def write(self, action: Callable[[Path], object]) -> None:
        """Call `action` with the unfinished folder, on rank 0 only, and only if nothing failed before."""
        if self._failure is not None or not is_rank_zero():
            return
        try:
            action(self._partial)
        except OSError as error:
            self._failure = disk_error(self.folder, error)
            shutil.rmtree(self._partial, ignore_errors=True)  # room for what else is to be written
        except ValueError as error:
            self._failure = error

    def write_gathered(self, file: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Gather the tensors, cast to `dtype`, and write them as a safetensors file."""
        full = gather(tensors, dtype)
        self.write(lambda partial: write_tensors(partial / file, full))

    def write_published(
        self,
        file: str,
        parts: Sequence[Stored],
        causal_lm: PreTrainedModel,
        tensors: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Gather parts of a model, one by one, convert them to what is published, and write that as one file."""
        published: dict[str, Tensor] = {}
        for part in parts:
            full: dict[str, Tensor] = {}
            for name in part.names:
                full |= gather({name: tensors[name]}, dtypes[name])
            if is_rank_zero():
                published |= part.publish(causal_lm, full)
        self.write(lambda partial: write_tensors(partial / file, published))

    def publish(self, check: Callable[[Path], None] | None = None) -> None:
        """Give the folder its name; or raise on every rank what failed on one of them, and change nothing.

        `check` is called first, on every rank, with the whole folder; it raises ValueError if something is wrong.
        """
        self._share_failure()
        if check is not None:
            try:
                check(self._partial)
            except ValueError as error:
                self._failure = error
            self._share_failure()
        self.write(lambda _: self._rename())
        self._share_failure()

    def _prepare(self, markers: set[str]) -> None:
        if self._old.exists() and not self.folder.exists():
            self._old.rename(self.folder)  # an earlier run ended between the two renames
        present = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        if present and not present & markers:
            raise ValueError(f"{self.folder}: holds files of another kind; name a new or empty folder")
        for leftover in (self._partial, self._old):
            _remove(leftover)
        self._partial.mkdir(parents=True)

    def _rename(self) -> None:
        for path in [*self._partial.rglob("*"), self._partial]:
            sync(path)
        if self.folder.exists():
            self.folder.rename(self._old)
        self._partial.rename(self.folder)
        sync(self.folder.parent)
        _remove(self._old)

    def _share_failure(self) -> None:
        failures = [self._failure]
        if dist.is_initialized():
            failures *= dist.get_world_size()
            dist.all_gather_object(failures, self._failure, group=self._group)
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is not None:
            raise failure


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the permissions that any new file gets. Raises OSError; see `disk_error`."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(mode)  # safetensors makes files that nobody but their owner can read


def check_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Compare a safetensors file with what it was written from, bit by bit; each rank reads its own rows alone.

    Args:
        path: the file.
        tensors: name -> plain tensor, or DTensor sharded on dim 0 or replicated: all that the file must hold.
        dtype: what floating-point tensors were cast to.

    Raises:
        ValueError: naming the file, and the tensor that differs.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            differing = sorted(set(handle.keys()) ^ set(tensors))
            if not differing:
                differing = [n for n, t in tensors.items() if not _same(t, handle.get_slice(n), dtype)]
    except (SafetensorError, OSError) as error:
        raise _not_as_written(path, f"it cannot be read ({error})") from error
    if differing:
        raise _not_as_written(path, differing[0])


def _check_weights(
    folder: Path,
    paths: list[Path],
    causal_lm: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Load a written folder as `load_weights` does, and compare with the model, bit by bit; each rank its own rows.

    Raises:
        ValueError: naming the file, and a tensor that differs.
    """
    try:
        with open_tensors(paths) as found:
            match = match_tensors(causal_lm, found, folder)
            names = {id(tensor): name for name, tensor in tensors.items()}
            for key, tensor in match.direct.items():
                if not _same(tensor, found[key][1].get_slice(key), dtypes[names[id(tensor)]]):
                    raise _not_as_written(found[key][0], key)
            for conversion in match.conversions:
                for name, rows in converted_rows(conversion, causal_lm, match.targets, found).items():
                    if not _same_rows(match.targets[name], rows, dtypes[name]):
                        raise _not_as_written(found[conversion.keys[0]][0], name)
    except (SafetensorError, OSError) as error:
        raise _not_as_written(folder, f"it cannot be read ({error})") from error


def _same(tensor: Tensor, source: Any, dtype: torch.dtype) -> bool:
    """Whether this rank's rows of a safetensors slice are those of `tensor`, to the bit."""
    if list(source.get_shape()) != list(tensor.shape):
        return False
    start, stop = local_rows(tensor) if tensor.dim() else (0, 1)
    return start == stop or _same_rows(tensor, source[start:stop] if tensor.dim() else source[...], dtype)


@torch.no_grad()
def _same_rows(tensor: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether this rank's rows of `tensor` are those that were found in a file, to the bit."""
    mine = local(tensor)
    expected = (mine.to(dtype) if mine.is_floating_point() else mine).cpu()
    # As bytes, since not-a-number is unequal to itself, and -0.0 equal to 0.0.
    return found.dtype == expected.dtype and torch.equal(_bytes(found), _bytes(expected))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _check_loads(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None = None) -> None:
    """Load tokenizer and config on rank 0. Raises ValueError, naming the file, if that fails, or one of them differs.

    A tokenizer is loaded as users load it. If code came with it or with the model, its own class loads it, as the
    config's does the config, so that nobody is asked to trust such code once more.
    """
    if not is_rank_zero():
        return
    if config is not None:
        again = _load(folder, type(config))
        sizes = [text_config(each).vocab_size for each in (again, config)]
        if again.model_type != config.model_type or sizes[0] != sizes[1]:
            raise _not_as_written(folder / "config.json", "model_type or vocab_size")
    custom = not type(tokenizer).__module__.startswith("transformers.") or "auto_map" in tokenizer.init_kwargs
    custom = custom or bool(getattr(config, "auto_map", None))
    differing = tokenizer_difference(tokenizer, _load(folder, type(tokenizer) if custom else AutoTokenizer))
    if differing:
        raise _not_as_written(folder / "tokenizer.json", differing)


def _load(folder: Path, loader: Any) -> Any:
    try:
        return loader.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise errors of every kind for damaged files
        reason = first_line(error)
        raise _not_as_written(folder, f"{loader.__name__} cannot load it ({reason})") from error


def _not_as_written(path: Path, what: str) -> ValueError:
    """Return what to raise where `what` in `path` differs from what was written there."""
    return ValueError(
        f"{path}: read again after writing, it is not what was written: {what}. Nothing was put in place; look at the "
        "disk, and run the same command again"
    )


def load_causal_lm(
    model: str | Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an ordinary transformers model in evaluation mode, and its tokenizer.

    `model` is a model folder, a PEFT adapter folder (it is merged into its base), a run's folder (its `model/` is
    loaded), or a hub id. Raises ValueError, naming the folder, if it is none of them or the weights do not fit.
    """
    folder = find_folder(model)
    if not _is_model(folder) and _is_model(folder / "model"):
        folder = folder / "model"
    if not _is_model(folder):
        raise ValueError(f"{folder}: no model, no adapter, and no run that has ended: it has no config.json")
    load = _load_merged if (folder / ADAPTER_CONFIG).is_file() else _load_full
    causal_lm = load(folder, dtype, trust_remote_code)
    torch.nn.Module.to(causal_lm, device)
    return causal_lm.eval(), load_tokenizer(folder, trust_remote_code)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def _load_full(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    weight_files(folder)  # refuses what is no safetensors, and an index that leads out of the folder
    disable_progress_bar()  # transformers shows one per model, of file handles: over before it can be read
    config = read_config(folder, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = auto_class_of(config, trust_remote_code=trust_remote_code).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be loaded as a causal language model ({error})") from error
    causal_lm, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:  # transformers makes up values for these, with a warning
        raise ValueError(f"{folder}: the weights lack {absent[0]}; do they belong to this config.json?")
    if getattr(causal_lm, "hf_quantizer", None) is None:
        check_dtypes(causal_lm, folder)
    rebuild_attributes(causal_lm, "cpu")
    return causal_lm


def _load_merged(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    adapter = read_adapter(folder)
    causal_lm = _load_full(resolve_model_folder(adapter.base), dtype, trust_remote_code)
    grow(causal_lm, adapter.vocabulary)
    merge_adapter(causal_lm, adapter)
    return causal_lm


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. Raises ValueError, naming the folder, if there is none that loads."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise errors of every kind for damaged files
        reason = first_line(error)
        raise ValueError(
            f"{folder}: no tokenizer can be loaded from it ({reason}); copy the model's tokenizer files there"
        ) from error


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Read how a model folder says to generate, with all its end-of-sequence ids; None if it does not say."""
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder)
