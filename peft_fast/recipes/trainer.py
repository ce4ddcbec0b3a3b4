"""RecipeTrainer: the Hugging Face Trainer asking a task, with batches that depend on their place alone.

Nothing is drawn from the process's generators but the model's dropout: the order of an epoch is a function of (seed,
epoch), a batch's masks and crops of (seed, epoch, its first row), and an evaluation leaves the generators as they were.
So it does not matter what is fetched ahead, skipped or evaluated in between, and a run that goes on repeats no draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers.training_args import ParallelMode

from peft_fast.errors import DataError, SettingsError, UnsupportedError, fail, program
from peft_fast.recipes import optimizer as optimizers
from peft_fast.recipes import reporters
from peft_fast.recipes.batches import Collator, Order
from peft_fast.recipes.checkpoints import AtomicCheckpoints
from peft_fast.recipes.clock import Clock, Turns
from peft_fast.recipes.config import Config
from peft_fast.recipes.process import generators_kept, memory
from peft_fast.recipes.result import figures
from peft_fast.recipes.tasks import Task


def arguments(
    config: Config, task: Task, folder: Path, rows: int, device: torch.device, resuming: bool, precision: dict[str, Any]
) -> Any:
    """The TrainingArguments of a config; ``precision`` is what the method asks for its dtype."""
    every = steps_per_epoch(config, rows)
    evaluate = every if config.evaluate_every == "epoch" else config.evaluate_every
    save = {None: evaluate, "epoch": every}.get(config.save_every, config.save_every)
    metric = config.metric or task.metric
    given = dict(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size or 2 * config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        neftune_noise_alpha=config.neftune or None,
        activation_checkpointing=config.gradient_checkpointing,
        # an epoch is counted in steps: evaluation, best and checkpoint then belong to one step, and no kill parts them
        eval_strategy="steps",
        eval_steps=evaluate,
        save_strategy="steps",
        save_steps=save,
        save_total_limit=config.keep,
        eval_on_start=not resuming,
        metric_for_best_model=metric,
        greater_is_better=task.judged_by[metric],
        load_best_model_at_end=False,  # asks that all evaluations be saved; run.py loads the best
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is gone must show
        report_to=reporters.named(config),
        run_name=config.name or config.out.name,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="passive",
        predict_with_generate=task.generates,
        restore_callback_states_from_checkpoint=True,
    )
    if names := getattr(task, "label_names", None):
        given["label_names"] = list(names)
    try:
        made = Seq2SeqTrainingArguments(**given | precision | config.training_arguments)
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        fail(SettingsError, f"training_arguments: {reason}", "what TrainingArguments takes", "mend these", error)
    if made.parallel_mode == ParallelMode.DISTRIBUTED:
        fail(UnsupportedError, "a distributed launch", "one process", f"start `{program()} train` without a launcher")
    made._n_gpu = min(made.n_gpu, 1)  # DataParallel would copy the adapters at every step
    return made


def steps_per_epoch(config: Config, rows: int) -> int:
    """Optimizer steps of a pass over the training features."""
    return max(1, math.ceil(math.ceil(rows / config.batch_size) / config.gradient_accumulation))


class RecipeTrainer(AtomicCheckpoints, Seq2SeqTrainer):
    """A Trainer that asks ``task`` for batches, losses and metrics, and counts what it does."""

    # compute_loss weighs a batch by its share of the step's labels
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        config: Config,
        task: Task,
        model: Any,
        features: dict[str, Any],
        args: Any,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config, self.task = config, task
        self.clock = Clock()
        self.resumed_at: list[int] = []
        self.judged: Any = None  # the features that an evaluation is about
        self.tally = [0.0, 0]  # of an evaluation: loss times labels, labels
        self.order = Order(task, features.get("train"), config)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(task, config.seed),
            train_dataset=features.get("train"),
            eval_dataset=features.get("validation"),
            processing_class=task.processor,
            compute_metrics=lambda prediction: task.metrics(prediction, self.judged),
            preprocess_logits_for_metrics=task.keep_logits,
            callbacks=[Turns(self.clock), *callbacks],
        )
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)

    # ---- batches

    def get_train_dataloader(self) -> Any:
        """Trainer's, with a collator that knows the epoch."""
        theirs = self.data_collator
        self.data_collator = Collator(self.task, self.config.seed, self.order)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = theirs

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return self.order

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, int | None]:
        """The batches of one step, cut or scaled to the size in force, and how many labels they have."""
        self.clock.mark("other")
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if size := self.size(self.state.global_step):
            batches = [self.task.resize(batch, size) for batch in batches]
        self.clock.units += sum(self.task.count(batch) for batch in batches)
        counts = [self.labels_in(batch) for batch in batches]
        self.clock.mark("data")
        return batches, sum(counts) if len(batches) > 1 and None not in counts else None

    def size(self, step: int) -> int:
        """Of progressive resizing, the size at a step; 0 without. A function of the step alone."""
        sizes = self.config.progressive
        return sizes[min(step * len(sizes) // max(1, self.state.max_steps), len(sizes) - 1)] if sizes else 0

    def labels_in(self, batch: dict[str, Any]) -> int | None:
        """Labels of a batch that count; None where they are no tensor of them."""
        labels = batch.get("labels")
        if not torch.is_tensor(labels):
            return None
        return int((labels[..., 1:] if self._loss_shifts_labels else labels).ne(-100).sum())

    # ---- learning

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss or the model's; in training times the batch's share of its step."""
        outputs = model(**self.task.inputs(inputs))
        loss = self.task.loss(outputs, inputs)
        if loss is None:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        if model.training:
            # a mean over a step's labels is the mean of its batches' means, each by its labels
            share = 1 / self.current_gradient_accumulation_steps
            if num_items_in_batch:
                share = self.labels_in(inputs) / num_items_in_batch
            loss = loss if share == 1 else loss * share
        else:
            count = self.labels_in(inputs) or len(next(iter(inputs.values())))
            self.tally = [self.tally[0] + loss.item() * count, self.tally[1] + count]
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """The config's optimizer."""
        if self.optimizer is None:
            self.optimizer = optimizers.build(self.model, self.task, self.config, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The config's schedule."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = optimizers.schedule(optimizer, self.config, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's entry, with speed and memory in those of training."""
        if "loss" in logs:
            self.clock.mark("step")
            logs |= {"per_second": self.clock.since_last(), "memory_bytes": memory(self.args.device)}
        super().log(logs, start_time)
        if "loss" in logs and not math.isfinite(logs["loss"]):
            given = f"a loss of {logs['loss']} at step {self.state.global_step}"
            do = f"a lower learning_rate than {self.config.rate:g}, more warmup, max_grad_norm 1, or dtype fp32"
            fail(DataError, given, "a loss that is a number", do)

    # ---- judging

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, with the config's generation, timed."""
        self.clock.mark("step" if self.is_in_train else "other")
        result = super().evaluate(eval_dataset, *args, **self._generation() | kwargs)
        self.clock.mark("evaluate")
        if self.is_in_train:
            self._has_metric(result)
        return result

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's; the weights that the run begins with may stay the best, and are kept until better ones come."""
        metrics = super()._evaluate(trial, *args, **kwargs)
        if not self.state.global_step and self._determine_best_metric(metrics, trial) and self.config.keep_best:
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return metrics

    def _has_metric(self, metrics: dict[str, float]) -> None:
        """Refuses validation rows that the metric says nothing of: which checkpoint is best would not be known."""
        name = self.args.metric_for_best_model
        if f"eval_{name}" in metrics:
            return
        there = sorted(figures(metrics, "eval_").keys() & self.task.judged_by.keys())
        rows = len(set(self.eval_dataset["row"])) if "row" in self.eval_dataset.column_names else len(self.eval_dataset)
        given = f"metric: {name}, which {rows:,} validation row{'s' * (rows != 1)} of this data do not have"
        given += ": all alike, of one class, or of another kind than it judges"
        do = f"metric: {' or '.join(there)}; or other validation rows, or more (validation_share)"
        fail(DataError, given, "a metric that the validation rows have", do)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the config's generation."""
        return super().predict(test_dataset, *args, **self._generation() | kwargs)

    def _generation(self) -> dict[str, int]:
        if not self.args.predict_with_generate:
            return {}
        return {"max_new_tokens": self.config.max_new_tokens, "num_beams": self.config.beams}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The task's loop, or Trainer's with a loss that is the mean over labels, whatever the batches."""
        self.judged, self.tally = dataloader.dataset, [0.0, 0]
        with generators_kept():
            self.model.eval()
            own = self.task.evaluation_loop(self, dataloader, metric_key_prefix)
            if own is not None:
                return own
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self.tally[1]:
            output.metrics[f"{metric_key_prefix}_loss"] = self.tally[0] / self.tally[1]
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **more: Any
    ) -> tuple:
        """Trainer's; what is generated is generated without the answer, and the loss is compute_loss's."""
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **more)
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        answer = ("labels", "decoder_input_ids", "decoder_attention_mask")
        asked = {name: value for name, value in inputs.items() if name not in answer}
        _, tokens, _ = super().prediction_step(model, asked, False, ignore_keys, **more)
        return loss, tokens, self._prepare_input(inputs.get("labels"))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best, state = super()._determine_best_metric(metrics, trial), self.state
        # of equals, what has learnt: the metric may be too coarse to show it
        if state.global_step and state.best_global_step == 0:
            if metrics[f"eval_{self.args.metric_for_best_model}"] == state.best_metric:
                state.best_global_step, best = state.global_step, True
        if best and self.config.keep_best:
            self.control.should_save = True
        return best

    # ---- going on

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark("step")
        super()._save_checkpoint(*args, **kwargs)
        self.clock.mark("save")

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        return {**self.clock.state(), "resumed_at": self.resumed_at}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The counters of the checkpoint that training goes on from."""
        self.resumed_at = [*state.get("resumed_at", []), self.state.global_step]
        self.clock.load(state)
