"""One LoRA fine-tuning of a text classifier or a language model on the Hugging Face Trainer, with or without us."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft_fast.demo.data import Task
from peft_fast.errors import DataError, UnsupportedError, fail

DTYPES = ("bf16", "fp32")
STOCK, FAST = "stock", "peft_fast"


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a run; two runs of one recipe differ only in who computes the adapters.

    The frozen model's own dropout is off unless ``keep_dropout``: with it, two runs of MiniLM that differ by their
    masks alone disagree on 6 % of the held-out rows (accuracy 0.77 points apart by chance), without it on 2 % (0.45).
    """

    model: str
    dtype: str = "fp32"
    epochs: float = 1.0
    max_steps: int = -1
    batch: int = 32
    lr: float = 1e-3
    warmup: float = 0.06
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    keep_dropout: bool = False
    seed: int = 0
    max_length: int = 128
    device: str = "auto"
    threads: int = 0
    network: bool = True


@dataclass
class Meter:
    """Times one run from inside: the open turn's phases in seconds, the losses and tokens of its steps."""

    sync: Callable[[], None]
    phases: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    last: float = 0.0

    def mark(self, phase: str) -> None:
        """Give the time since the previous mark to ``phase``."""
        self.sync()
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def open(self) -> None:
        self.phases, self.losses, self.tokens = {}, [], 0
        self.sync()
        self.last = time.perf_counter()


def load_model(recipe: Recipe, n_labels: int) -> tuple[Any, Any]:
    """The PEFT model (adapters in fp32, PEFT's default) and its tokenizer; without labels a language model."""
    import torch
    import transformers as tf
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoConfig, AutoTokenizer, set_seed

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.dtype]
    # nothing is generated: a cache would only hold keys and values a second time
    own = {"num_labels": n_labels} if n_labels else {"use_cache": False}
    set_seed(recipe.seed)
    local = {"local_files_only": not recipe.network}
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model, **local)
        config = AutoConfig.from_pretrained(recipe.model, **own, **local)
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float) and not recipe.keep_dropout:
                setattr(config, name, 0.0)
        auto = tf.AutoModelForSequenceClassification if n_labels else tf.AutoModelForCausalLM
        model = auto.from_pretrained(recipe.model, config=config, dtype=dtype, **local)
    except Exception as error:  # a missing hub id, a damaged file and an unknown class have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        need = "a folder with config.json, weights and tokenizer, or a hub id of a text model"
        fail(
            DataError,
            f"--model {recipe.model}: {reason}",
            need,
            "check the path or id, and the network",
            error,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS if n_labels else TaskType.CAUSAL_LM,
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
    )
    try:
        return get_peft_model(model, lora), tokenizer
    except ValueError as error:
        do = "choose a model of nn.Linear or Conv1D layers"
        fail(
            UnsupportedError,
            f"--model {recipe.model}: {error}",
            "a model that PEFT's LoRA can adapt",
            do,
            error,
        )


def encode(tokenizer: Any, rows: list[tuple[str, int]], max_length: int) -> list[dict[str, Any]]:
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, (_, label) in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]


def blocks(tokenizer: Any, rows: list[tuple[str, int]], length: int) -> list[dict[str, Any]]:
    """All texts in one row, an end token after each, cut into blocks of ``length`` tokens; a rest is left out."""
    end = tokenizer.eos_token_id
    stream = [token for ids in tokenizer([text for text, _ in rows])["input_ids"] for token in (*ids, end)]
    cut = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    return [{"input_ids": ids, "attention_mask": [1] * length, "labels": ids} for ids in cut]


def trainer(
    recipe: Recipe, task: Task, folder: str, meter: Meter, on_step: Callable[[int, int], None], fast: bool
) -> Any:
    """A Trainer ready to train; calls ``on_step(step, last)`` before the first step (0) and after each."""
    import torch
    import transformers as tf
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler

    model, tokenizer = load_model(recipe, len(task.names))
    if fast:
        import peft_fast

        peft_fast.accelerate(model)

    class Turns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step(0, state.max_steps)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.mark("data")

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.mark("backward")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.mark("optimizer")
            on_step(state.global_step, state.max_steps)

    class Metered(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> torch.Tensor:
            meter.mark("data")
            if not model.training:
                return super().compute_loss(model, inputs, **kwargs)
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            meter.mark("forward")
            exact = loss.detach()
            if task.names:  # for the curves only: a classifier's own loss has bf16's three digits
                exact = torch.nn.functional.cross_entropy(outputs.logits.detach().float(), inputs["labels"])
            meter.losses.append(exact.item())
            meter.tokens += int(inputs["attention_mask"].sum())
            meter.mark("data")
            return loss

        def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
            # train_sampling_strategy="group_by_length" with a generator of its own: by the second epoch the
            # global one has drawn other masks in the two runs, and they would see other batches
            lengths = [len(row["input_ids"]) for row in self.train_dataset]
            return LengthGroupedSampler(
                recipe.batch, lengths=lengths, generator=torch.Generator().manual_seed(recipe.seed)
            )

    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=2 * recipe.batch,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup,
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    rows = encode if task.names else blocks
    return Metered(
        model=model,
        args=arguments,
        train_dataset=rows(tokenizer, task.train, recipe.max_length),
        # by length: least padding
        eval_dataset=sorted(rows(tokenizer, task.test, recipe.max_length), key=lambda row: len(row["input_ids"])),
        processing_class=tokenizer,
        data_collator=tf.DataCollatorWithPadding(tokenizer) if task.names else tf.default_data_collator,
        callbacks=[Turns()],
    )
