"""A run from its config to everything that stands before the first step; then training, and the model's export."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from notus.config import Config, TrainingConfig, loss_name
from notus.data.batching import StepPlan, packing_report
from notus.data.chat import check_vocabulary
from notus.data.dataset import TokenizedDataset
from notus.data.display import describe_example
from notus.data.packing import check_fits
from notus.model.export import export_adapter, export_model, load_tokenizer, read_generation_config
from notus.model.load import weight_files
from notus.model.new_tokens import add_tokens, check_saved_vocabulary, enlarge
from notus.model.peft_format import Adapter, adapter_digest, read_adapter
from notus.model.policy import Policy
from notus.model.routers import asks_for_own_loss, check_routers
from notus.model.structure import text_config
from notus.model.supported import check_context
from notus.model.verify import PathChoice
from notus.runtime import distributed
from notus.runtime.determinism import deterministic
from notus.runtime.preemption import Stop
from notus.runtime.process import STOPPED
from notus.training.best_model import check_best_metric
from notus.training.callbacks import COMMAND_LINE, CallbackLogger, Caller
from notus.training.checkpoint import (
    DamagedCheckpointError,
    Progress,
    check_contents,
    check_newest,
    check_whole,
    load_checkpoint,
    load_newest,
    step_folder,
)
from notus.training.checkpoint_writer import Checkpoints
from notus.training.data_files import read_stamps, stamps
from notus.training.dataloader import row_costs
from notus.training.int8_states import check_torchao
from notus.training.memory_estimate import checkpointing_of
from notus.training.model_folders import ModelFolders, resolve_model, starting_digest
from notus.training.objective import check_ratings, objective_of
from notus.training.optimizers import PiecewiseOptimizer, build_optimizer, without_decay
from notus.training.own_files import check_folder, reads_own_inputs
from notus.training.parallelize import (
    COMPUTE_DTYPES,
    build_policy,
    check_adapters,
    find_path,
    read_model_config,
    reshard,
)
from notus.training.reference import digest_of_rows
from notus.training.reference_model import OtherReference, Reference, find_reference, kernel_of
from notus.training.run_data import Inputs, check_rows, date_notice, load_inputs
from notus.training.run_folder import (
    CHECKPOINTS,
    MODEL,
    Opening,
    check_shared,
    end_extension,
    hold_folder,
    open_folder,
    template_date,
)
from notus.training.sampling import Sampler, build_sampler
from notus.training.throughput import Meter
from notus.training.tracking import Tracker, hardware, open_tracker
from notus.training.trainer import Ending, Trainer, warmup_steps
from notus.training.trainer import Task as LoopTask
from notus.training.warnings import plain_text_notice


@dataclasses.dataclass
class Run:
    """Everything that stands before the first step.

    Attributes:
        config: the run's settings.
        device: this rank's device.
        folder: the run's folder.
        model_folders: the model it starts from, on this machine, and an adapter of it.
        new_rows: rows of the vocabulary that this model does not have.
        model_config, tokenizer: that model's, with the run's new tokens.
        path: how its log-probs are computed.
        make_policy: builds it, sharded, with the starting weights; collective.
        named_reference: what `reference.model` names, if that is set.
        inputs: tokenised data, and what became of it on the way.
        plan: which examples each step takes.
        checkpoints: where to resume: the first that is whole, the newest first.
        extended: whether this launch raises the number of steps.
        stop: requests to end before the last step.
        hardware: the job's devices.
        caller: who started it.
    """

    config: Config
    device: torch.device
    folder: Path
    model_folders: ModelFolders
    new_rows: int
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    path: PathChoice
    make_policy: Callable[[], Policy]
    named_reference: OtherReference | None
    inputs: Inputs
    plan: StepPlan
    checkpoints: list[Path]
    extended: bool
    stop: Stop
    hardware: str
    caller: Caller

    @property
    def train_rows(self) -> TokenizedDataset:
        """What the model learns from."""
        return self.inputs.train

    @property
    def eval_rows(self) -> TokenizedDataset | None:
        """What it is evaluated on."""
        return self.inputs.eval

    @functools.cached_property
    def policy(self) -> Policy:
        """The policy, sharded. The first use loads it, after another reference was freed; collective."""
        return self.make_policy()

    @property
    def kernel(self) -> str:
        """Name of the attention kernel in use, of what computes the rest of the blocks, and of their quantization."""
        return kernel_of(self.policy, self.path, self.device, self.config.training)

    @functools.cached_property
    def other_reference(self) -> OtherReference | None:
        """`reference.model`, if its weights are not those that the policy starts with; collective."""
        named = self.named_reference
        return None if named is None or named.weights == self.weights_digest else named

    @contextlib.contextmanager
    def reference(self) -> Iterator[Reference]:
        """Hold the reference as long as the block runs: the policy as it starts, or another model; collective."""
        if self.other_reference is None:
            yield Reference(self.weights_digest, self.kernel, lambda: self.policy)
        else:
            with self.other_reference.opened() as found:
                yield found

    @functools.cached_property
    def weights_digest(self) -> str:
        """Digest of the starting weights' content; read on rank 0."""
        continues = self.config.lora.continue_
        return distributed.on_main(
            lambda: starting_digest(self.model_folders, continues=continues, new_rows=self.new_rows)
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        training = self.config.training
        steps = self.plan.steps_per_epoch * training.epochs
        return steps if training.max_steps is None else min(steps, training.max_steps)

    def train(self, task: LoopTask) -> int:
        """Train to the end and export the model, or until the run is to stop; returns the exit code. Collective."""
        training = self.config.training
        optimizer = build_optimizer(
            self.policy.parameters(),
            name=training.optimizer,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            undecayed=self._undecayed(),
            state_dtype=training.optimizer_dtype,
        )
        progress = self._progress(optimizer)
        tracker = distributed.main_first(lambda: self._tracker(progress))
        if notice := _warmup_notice(training, self.total_steps):
            distributed.say(notice)
        checkpoints = Checkpoints(
            self.folder / CHECKPOINTS,
            self.device,
            background=training.async_checkpoints,
            keep=training.keep_checkpoints,
            keep_every=training.keep_every,
        )
        with tracker:
            ending = Trainer(
                self.policy,
                optimizer,
                task,
                training,
                total_steps=self.total_steps,
                progress=progress,
                tracker=tracker,
                checkpoints=checkpoints,
                stop=self.stop,
                meter=Meter(self.policy, self.train_rows, self.plan, device=self.device, precision=training.precision),
                sample=self._sampler(),
                device=self.device,
            ).run()
        if ending in (Ending.FINISHED, Ending.EARLY):
            self._choose_best(progress)
            self._export()
            distributed.on_main(lambda: end_extension(self.folder))
            return 0
        reason = "a callback" if self.stop.requested and ending is Ending.BUDGET else ending.value
        distributed.say(
            f"stopped by {reason} after step {progress.step} of {self.total_steps}; everything is saved, "
            "and the same command resumes the run"
        )
        return STOPPED if ending is Ending.SIGNAL else 0

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Digests of the data and of the starting weights, by the config key that names them."""
        found = {"data.train": digest_of_rows(self.train_rows.digests())}
        found |= self._judgements("data.train", self.train_rows)
        adapter = self.model_folders.adapter
        if adapter is not None:
            found["model.adapter"] = distributed.on_main(lambda: adapter_digest(adapter))
        found["model.name_or_path"] = self.weights_digest
        if self.other_reference is not None:
            found["reference.model"] = self.other_reference.weights
        if self.eval_rows is not None:
            found["data.eval"] = digest_of_rows(self.eval_rows.digests())
            found |= self._judgements("data.eval", self.eval_rows)
        return found

    def _judgements(self, key: str, rows: TokenizedDataset) -> dict[str, str]:
        """Digests of the ratings and labels that the run learns from; they are no part of the rows' own."""
        if self.config.rows == "sft":
            return {}
        used = {
            "labels": self.config.rows == "labels",
            "ratings": self.config.rows == "lists" or objective_of(self.config.dpo).ratings,
        }
        columns = {name: getattr(rows, name) for name, needed in used.items() if needed}
        return {
            f"{key} ({name})": hashlib.sha256(b"" if column is None else column.tobytes()).hexdigest()
            for name, column in columns.items()
        }

    def _undecayed(self) -> list[nn.Parameter]:
        """The trained parameters without weight decay. Raises ValueError for a word that excludes none of them."""
        training = self.config.training
        if not training.weight_decay:
            return []
        found = without_decay(self.policy, training.weight_decay_exclude)
        usual = TrainingConfig(output_dir="-").weight_decay_exclude  # Llama, say, has no biases
        for word, parameters in found.items():
            if word not in usual and not any(each.requires_grad for each in parameters):
                raise ValueError(
                    f"training.weight_decay_exclude: no trained parameter has {word!r} in its name: remove it"
                )
        return [parameter for parameters in found.values() for parameter in parameters]

    def _progress(self, optimizer: PiecewiseOptimizer) -> Progress:
        """Load the newest whole checkpoint, if there is one, into the policy and the optimizer; else start at 0."""
        if not self.checkpoints:
            return Progress(identity=self.identity)
        path, progress = load_newest(
            self.checkpoints, self.folder / CHECKPOINTS, self.policy.named_parameters(), optimizer
        )
        check_contents(path, progress.identity, self.identity)
        if progress.step > self.total_steps:
            raise ValueError(f"{path} is at step {progress.step}, beyond the run's {self.total_steps}")
        progress.identity = self.identity
        # What the run will export is not read again before its end. Better to know now that it is damaged.
        if progress.best_step not in (0, progress.step):
            with self._naming_best(path):
                check_whole(self._best(progress))
        if progress.total_steps and progress.total_steps != self.total_steps:
            progress.evaluations_since_best = 0  # of the run before it was extended
        elif self.extended and progress.total_steps:
            # the limit that was not raised
            key = "max_steps" if self.total_steps == self.config.training.max_steps else "epochs"
            distributed.say(
                f"warning: training.extend has no effect: the run still ends after {self.total_steps} steps; "
                f"raise training.{key}"
            )
        distributed.say(f"resuming from {path} (step {progress.step} of {self.total_steps})")
        return progress

    def _best(self, progress: Progress) -> Path:
        """The checkpoint of the best evaluation so far."""
        return self.folder / CHECKPOINTS / step_folder(progress.best_step)

    @contextlib.contextmanager
    def _naming_best(self, newest: Path) -> Iterator[None]:
        """Say what to do if the checkpoint of the best evaluation is damaged or gone; `newest`: the last one."""
        try:
            yield
        except DamagedCheckpointError as error:
            raise ValueError(
                f"the best model by {self.config.training.best_metric} cannot be read: {error}. Restore it and run the "
                "same command again. Without it, train on in another training.output_dir with "
                f"training.resume={newest}: the best of its own evaluations is exported. Or start over with "
                "training.resume=never"
            ) from error

    def _choose_best(self, progress: Progress) -> None:
        """Load the model to export, that of the best evaluation, if training.best_metric asks for it. Collective."""
        training, step = self.config.training, progress.best_step
        if progress.step < self.total_steps:
            distributed.say(
                f"stopped early after step {progress.step} of {self.total_steps}: {progress.evaluations_since_best} "
                f"evaluations without a better {training.best_metric}"
            )
        if training.best_metric is None:
            return
        if not step:
            distributed.say(f"warning: no evaluation had a finite {training.best_metric}: the last model is exported")
            return
        if step != progress.step:
            reshard(self.policy)
            with self._naming_best(self.folder / CHECKPOINTS / step_folder(progress.step)):
                load_checkpoint(self._best(progress), self.policy.named_parameters(), None)
        best = f"{training.best_metric} {progress.best_value:.6g}"
        distributed.say(f"the model of step {step} is exported, the best one: {best}")

    def _sampler(self) -> Sampler | None:
        return build_sampler(
            self.policy,
            self.tokenizer,
            self.train_rows if self.eval_rows is None else self.eval_rows,
            count=self.config.tracking.samples,
            max_new_tokens=self.config.tracking.sample_tokens,
            tokens_per_row=self.config.training.tokens_per_row,
            generation_config=read_generation_config(self.model_folders.base),
            device=self.device,
        )

    def _tracker(self, progress: Progress) -> Tracker:
        if not distributed.is_main():
            return Tracker([])
        return open_tracker(
            self.folder,
            self.config,
            progress,
            total_steps=self.total_steps,
            hardware=self.hardware,
            data=self.inputs.summary(),
            files=stamps(self.config, read_stamps(self.folder)),
            more=[CallbackLogger(self.caller.callbacks, self.stop)],
        )

    def _merged_adapter(self) -> Adapter | None:
        """The adapter that was merged into the base, if there is one."""
        folder = None if self.config.lora.continue_ else self.model_folders.adapter
        return None if folder is None else read_adapter(folder)

    def _export(self) -> None:
        """Write the final model, or the adapter, to the run's folder."""
        target = self.folder / MODEL
        if self.config.lora.rank:
            export_adapter(
                self.policy.causal_lm,
                target,
                base_model_name_or_path=self.model_folders.name,
                tokenizer=self.tokenizer,
                generation_config=read_generation_config(self.model_folders.base),
                plain_text=self.inputs.plain_text,
                below=self._merged_adapter(),
            )
        else:
            export_model(
                self.policy.causal_lm,
                target,
                hf_config=self.model_config,
                tokenizer=self.tokenizer,
                generation_config=read_generation_config(self.model_folders.base),
                dtype=COMPUTE_DTYPES[self.config.training.precision],
                plain_text=self.inputs.plain_text,
            )
        distributed.say(f"finished: the model is in {target}")


@contextlib.contextmanager
def start(config: Config, caller: Caller = COMMAND_LINE, *, train: bool = True) -> Iterator[Run | None]:
    """Join the process group and build a run up to its first step; yields None if it is finished already.

    Args:
        config: the run's settings.
        caller: who starts it.
        train: False: claim no folder and build a frozen policy, for scoring alone.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    stop, training = Stop(config.training.max_hours), config.training
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening() if caller.owns_process else stop.asking())
        stack.enter_context(deterministic(training.deterministic))
        device = stack.enter_context(distributed.process_group(timedelta(minutes=training.timeout_minutes)))
        if training.optimizer_dtype == "int8" and train:
            check_torchao()
        if train:
            check_best_metric(config)
        if training.cpu_offload and device.type == "cpu":
            raise ValueError("training.cpu_offload has no effect without a GPU: set training.cpu_offload=false")
        if training.sharding == "hybrid":
            distributed.ranks_per_node()  # raises now what would stop the run after hours of tokenising
        opening = Opening(finished=False, checkpoints=[])
        given_date = config.data.template_date
        today = distributed.on_main(lambda: template_date(config))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=today))
        if train:

            def claim() -> Opening:
                written = [] if caller.inputs is None else caller.inputs.paths
                check_folder(config, written=written)
                stack.enter_context(hold_folder(config))
                opening = open_folder(config, keep_inputs=not written and reads_own_inputs(config))
                if caller.inputs is not None:
                    caller.inputs.write()
                return opening

            opening = distributed.on_main(claim)
            check_shared(Path(config.training.output_dir))
            if opening.finished:
                distributed.say(f"finished already: the model is in {Path(config.training.output_dir) / MODEL}")
                yield None
                return
        job = _build(config, device, opening, train, stop, caller)
        if notice := date_notice(given_date, job.inputs):
            distributed.say(notice)
        check_newest(opening.checkpoints, job.identity if opening.checkpoints else {})
        yield job


def _warmup_notice(training: TrainingConfig, total_steps: int) -> str | None:
    """Return a warning if warm-up takes all of the run, else None."""
    warmup = warmup_steps(training, total_steps)
    if warmup < total_steps:
        return None
    key = "warmup_ratio" if training.warmup_steps is None else "warmup_steps"
    if total_steps == 1:
        return f"warning: the only step is at learning rate 0, where warm-up begins; set training.{key}=0"
    return (
        f"warning: warm-up takes {warmup} steps and the run {total_steps}: the learning rate does not reach its peak; "
        f"lower training.{key}"
    )


def _check_router_loss(config: Config, model_config: PreTrainedConfig) -> None:
    """Raise ValueError if training.router_aux_loss_coef cannot apply; say if the model's own router loss does not."""
    coefficient = config.training.router_aux_loss_coef
    if coefficient:
        check_routers(model_config, trust_remote_code=config.model.trust_remote_code)
    if asks_for_own_loss(model_config):
        distributed.say(
            "the model's config sets output_router_logits: its own router loss is not added, "
            f"training.router_aux_loss_coef={coefficient:g} is"
        )


def _build(config: Config, device: torch.device, opening: Opening, train: bool, stop: Stop, caller: Caller) -> Run:
    """Load data and model. Mistakes in the config and the data are found before the weights are read. Collective."""
    training, model = config.training, config.model
    folders = distributed.main_first(lambda: resolve_model(model.name_or_path, model.adapter))
    if config.lora.continue_ and folders.adapter is None:
        raise ValueError("lora.continue has no effect without an adapter: name the one to train further, model.adapter")
    _note_base(folders)
    model_config = read_model_config(folders.base, trust_remote_code=model.trust_remote_code)
    weight_files(folders.base)  # none, or not all: better known before any data is read
    path = _path(config, model_config, device)
    if train:
        _check_router_loss(config, model_config)
    tokenizer = load_tokenizer(folders.tokenizer, model.trust_remote_code)
    new_rows = _new_rows(config, folders, model_config, tokenizer)
    check_vocabulary(tokenizer, text_config(model_config).vocab_size)
    lora = config.lora if config.lora.rank and (train or config.lora.continue_) else None
    check_adapters(
        model_config,
        path,
        precision=training.precision,
        lora=lora,
        adapter=folders.adapter,
        continue_adapter=config.lora.continue_,
        new_tokens=new_rows,
        quantization=model.quantization,
        unquantized=config.lora.modules_to_save,
        trust_remote_code=model.trust_remote_code,
    )
    reference = find_reference(config, device, tokenizer)
    inputs = _load_data(config, model_config, tokenizer)
    train_rows = inputs.train
    if reference is not None:
        reference.check_inputs(inputs)
    if train:
        _show_first(train_rows, tokenizer, is_list=config.rows == "lists")
    plan = StepPlan(len(train_rows), training.batch_size, seed=training.seed, shuffle=config.data.shuffle)

    def make_policy() -> Policy:
        policy = build_policy(
            folders.base,
            model_config,
            device=device,
            precision=training.precision,
            activation_checkpointing=checkpointing_of(training, train_rows, device) if train else "none",
            compile=training.compile,
            cpu_offload=training.cpu_offload,
            lora=lora,
            adapter=folders.adapter,
            continue_adapter=config.lora.continue_,
            new_tokens=new_rows,
            trainable=train,
            seed=training.seed,
            sharding=training.sharding,
            trust_remote_code=model.trust_remote_code,
            path=path,
            quantization=model.quantization,
            unquantized=config.lora.modules_to_save,
        )
        distributed.say(_plain_notice(path.reason, train_rows) if path.reason else f"model.path: {path.name}")
        costs, ranks, room = row_costs(policy, train_rows), distributed.world_size(), training.tokens_per_row
        distributed.say(packing_report(train_rows, plan, costs, world_size=ranks, tokens_per_row=room))
        return policy

    found = Run(
        config, device, Path(training.output_dir), folders, new_rows, model_config, tokenizer, path, make_policy,
        reference, inputs, plan, opening.checkpoints, opening.extended, stop, hardware(device), caller,
    )  # fmt: skip
    if reference is None:  # else the policy is loaded after that has been scored
        _ = found.policy
    return found


def _show_first(rows: TokenizedDataset, tokenizer: PreTrainedTokenizerBase, *, is_list: bool) -> None:
    """Print the first row as the model sees it."""
    shown = describe_example(rows(np.arange(1))[0], tokenizer, is_list=is_list)
    distributed.say(f"first training row; the model learns what is ⟦marked⟧:\n{shown}")


def _load_data(config: Config, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Tokenize the rows. Raises ValueError if one has a token that the model lacks, or is too long for it or a row."""
    inputs = load_inputs(config.data, tokenizer, task=config.rows, seed=config.training.seed)
    every = [rows for rows in (inputs.train, inputs.eval) if rows is not None]
    for rows in every:
        check_rows(rows, tokenizer, text_config(model_config).vocab_size)
    check_context(model_config, max(rows.longest_sequence for rows in every), "data.max_length")
    if notice := plain_text_notice(inputs.reports["train"], tokenizer, config.data.chat_template):
        distributed.say(notice)
    for rows in every:
        check_fits(int(rows.lengths.max()), config.training.tokens_per_row)
    for name, part in (("train", inputs.train), ("eval", inputs.eval)):
        if part is not None:
            _check_ratings(config, name, part)
    return inputs


def _check_ratings(config: Config, name: str, rows: TokenizedDataset) -> None:
    """Raise ValueError, naming the data and the loss, if the loss needs ratings that a row does not have."""
    if config.task == "dpo" and objective_of(config.dpo).ratings:
        key = f"data.{name}: dpo.loss_type {loss_name(config.dpo)} needs ratings"
        check_ratings(rows.ratings, rows.loss_tokens, lambda index: rows.info(index).place, key)


def _path(config: Config, model_config: PreTrainedConfig, device: torch.device) -> PathChoice:
    """Choose how log-probs are computed. Raises ValueError if that cannot be, or cannot be compiled."""
    model, training = config.model, config.training
    path = find_path(
        model_config,
        model.path,
        longest=config.data.max_length,
        device=device,
        trust_remote_code=model.trust_remote_code,
    )
    if path.name == "plain" and training.compile:
        raise ValueError(
            f"training.compile has no effect on the plain path, which is taken: {path.reason}; set "
            "training.compile=false"
        )
    if training.router_aux_loss_coef:  # which is of each example's tokens, and padding would be among them
        return dataclasses.replace(path, padded=False)
    return path


def _note_base(folders: ModelFolders) -> None:
    """Say so if an adapter's config names another base: weights of the same shapes would be merged without an error."""
    if folders.adapter is None:
        return
    named = read_adapter(folders.adapter).base
    same = named == folders.name or (Path(named).is_dir() and Path(named).resolve() == folders.base.resolve())
    if not same:
        distributed.say(f"note: the adapter {folders.adapter} names {named} as its base; here it is {folders.name}")


def _new_rows(
    config: Config, folders: ModelFolders, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Add the run's new tokens to the tokenizer; return how many rows the base lacks for them, and for the adapter's.

    Raises ValueError: a token is there already; or LoRA does not train the new rows.
    """
    ids = add_tokens(tokenizer, config.data.new_tokens)
    held = 0 if folders.adapter is None else read_adapter(folders.adapter).vocabulary
    added = enlarge(model_config, max([held, *(each + 1 for each in ids)]))
    if ids and config.lora.rank:
        check_saved_vocabulary(
            model_config, config.lora.modules_to_save, trust_remote_code=config.model.trust_remote_code
        )
    return added


def _plain_notice(reason: str, rows: TokenizedDataset) -> str:
    """Say that the plain path is taken, why, and how many more tokens it computes."""
    more = int(rows.separate_lengths(np.arange(len(rows))).sum()) / int(rows.lengths.sum())
    return (
        f"model.path: plain, because the packed path is not what this model computes: {reason}. Prompts are not shared "
        f"({more:.2f}x the tokens), and sequences are not packed; docs/models.md has the speed"
    )
