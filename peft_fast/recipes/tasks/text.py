"""What tasks of text share: the tokenizer and its limit, padding, cutting, and batches of answers."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft_fast.errors import SettingsError, UnsupportedError, fail
from peft_fast.recipes import tasks
from peft_fast.recipes.config import Config
from peft_fast.recipes.tasks import loading

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST = 512  # tokens of a row, where a model takes more and the user says nothing
# positions of these start behind the padding's
OFFSET = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "mpnet", "longformer"}
OFFSET |= {"luke", "data2vec-text", "ibert", "xmod", "flaubert", "mluke"}
# these have no table of positions to run out of
RELATIVE = {"t5", "mt5", "umt5", "longt5", "switch_transformers", "xlnet", "deberta", "deberta-v2", "funnel"}
RELATIVE |= {"bloom", "mpt", "mamba", "mamba2", "rwkv", "reformer"}
# the value of each feature where there is none
PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": -100, "special_tokens_mask": 1}


class TextTask(tasks.Task):
    """Rows of text through a tokenizer to `input_ids` of at most `limit` tokens."""

    modality = "text"
    unit = "tokens"
    label_names = ("labels",)

    def __init__(self, config: Config, facts: dict[str, Any] | None = None) -> None:
        super().__init__(config, facts)
        self.limit = 0
        self.fresh: set[str] = set()  # parameters that the checkpoint did not have

    def load_processor(self) -> None:
        self.processor, self.limit = load_tokenizer(self.config)
        if self.config.progressive and self.config.progressive[-1] > self.limit:
            given = f"progressive: {self.config.progressive}; rows have {self.limit} tokens at most"
            fail(SettingsError, given, f"sizes up to {self.limit}", "leave the larger ones out, or raise max_length")

    def load(self, dtype: torch.dtype, **fields: Any) -> Any:
        """The model of ``auto``, its configuration with ``fields``."""
        model_config = loading.load_config(self.config, **fields)
        if getattr(model_config, "pad_token_id", None) is None:
            model_config.pad_token_id = self.processor.pad_token_id
        if hasattr(model_config, "use_cache") and not self.generates:
            model_config.use_cache = False
        model, self.fresh = loading.load_model(self.config, self.auto, dtype, model_config)
        check_vocabulary(self.config, self.processor, model)
        return model

    def head(self, model: Any) -> list[str]:
        return loading.new_modules(model, self.fresh)

    def questions(self, rows: Dataset) -> Dataset:
        """The rows without what is to be answered."""
        asked = {column.role for column in self.columns if column.holds in ("text", "tokens")}
        return rows.remove_columns([name for name in rows.column_names if name not in asked])

    def tokenize(self, texts: list[str], pairs: list[str] | None = None, **options: Any) -> Mapping[str, list]:
        """Ids cut to `limit`; no mask, which the collator makes."""
        options = {"truncation": True, "max_length": self.limit, "return_attention_mask": False} | options
        return self.processor(texts, pairs, **options)

    def too_long(self, rows: Dataset) -> tuple[Sequence[float], float] | None:
        """Tokens of each row, uncut, and the limit."""
        texts = rows["text"][:]
        pairs = rows["text_pair"][:] if "text_pair" in rows.column_names else None
        return lengths(self.processor, texts, pairs, self.limit), self.limit

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return pad(self.processor, features)

    def resize(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        return cut(batch, size, self.processor)

    def ends_small(self, features: Dataset) -> str:
        last, parts = self.config.progressive[-1], features.select_columns(["input_ids"]).iter(1000)
        sizes = [len(ids) for part in parts for ids in part["input_ids"]]
        longer = sum(size > last for size in sizes)
        said = f"progressive ends at {last:,} tokens: {longer:,} of {len(sizes):,} training rows are longer and never "
        said += f"train whole, though evaluation reads them so; let it end at {max(sizes):,} or more"
        return said if longer else ""

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the truth: every text task computes its loss itself."""
        return {name: value for name, value in batch.items() if name not in self.label_names}

    def forward(self, model: Any, features: Dataset) -> Iterator[tuple[list[int], dict[str, Any], Any]]:
        """(places, batch, output) of all features, batches of like length; the model as it was afterwards."""
        size = self.config.eval_batch_size or 2 * self.config.batch_size
        order = sorted(range(len(features)), key=lambda i: -self.length(features[i]))
        device = next(model.parameters()).device
        with evaluating(model), torch.no_grad():
            for start in range(0, len(order), size):
                places = order[start : start + size]
                batch = self.collate([features[i] for i in places])
                batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
                yield places, batch, model(**self.inputs(batch))


def lengths(tokenizer: Any, texts: list[str], pairs: list[str] | None, most: int) -> list[int]:
    """Tokens of each text or pair, uncut; what cannot be above ``most`` is not counted and stays 0.

    No tokenizer makes more tokens of ASCII than it has characters, a mark at the beginning of a word aside.
    """
    room = most - tokenizer.num_special_tokens_to_add(pair=pairs is not None) - 2
    whole = texts if pairs is None else [a + b for a, b in zip(texts, pairs, strict=True)]
    places = [place for place, text in enumerate(whole) if len(text) > room or not text.isascii()]
    found = [0] * len(texts)
    for start in range(0, len(places), 1000):
        part = places[start : start + 1000]
        firsts, seconds = [texts[place] for place in part], [pairs[place] for place in part] if pairs else None
        ids = tokenizer(firsts, seconds, truncation=False, verbose=False)["input_ids"]
        for place, row in zip(part, ids, strict=True):
            found[place] = len(row)
    return found


def load_tokenizer(config: Config) -> tuple[Any, int]:
    """The model's tokenizer, able to pad, and how many tokens a row may have."""
    tokenizer = loading.load_processor(config, "AutoTokenizer")
    able_to_pad(tokenizer, config)
    return tokenizer, limit(config, tokenizer, loading.load_config(config))


def able_to_pad(tokenizer: Any, config: Config) -> None:
    """A token to fill batches with, for a tokenizer that has none of its own."""
    for other in ("pad_token", "eos_token", "unk_token"):
        if getattr(tokenizer, other, None) is not None:
            tokenizer.pad_token = getattr(tokenizer, other)
            return
    given = f"model: {config.model}, whose tokenizer has no padding, end or unknown token"
    fail(UnsupportedError, given, "a token to fill batches with", "give the tokenizer a pad_token and save it")


def limit(config: Config, tokenizer: Any, model_config: Any) -> int:
    """`max_length`, if the model has so many positions; else what it takes, 512 at most."""
    inner = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    positions = getattr(inner, "max_position_embeddings", None) or 0
    if model_config.model_type in RELATIVE or positions < 1:
        positions = 0
    elif model_config.model_type in OFFSET:
        positions -= (getattr(inner, "pad_token_id", None) or 0) + 1
    if positions and config.max_length > positions:
        given = f"max_length: {config.max_length}; {config.model} has {positions} positions"
        fail(SettingsError, given, f"{positions} tokens at most", "lower max_length, or take a model for longer texts")
    default = min(LONGEST, positions or LONGEST, max(1, tokenizer.model_max_length))
    chosen = config.max_length or default
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if chosen <= special:
        given = f"max_length: {chosen}; {special} of them are special tokens"
        fail(SettingsError, given, f"more than {special} tokens", "raise max_length")
    return chosen


def check_vocabulary(config: Config, tokenizer: Any, model: Any) -> None:
    """A tokenizer of another model gives ids that its embeddings do not have."""
    table = model.get_input_embeddings()
    have, need = getattr(table, "num_embeddings", 0), len(tokenizer)
    if have and max(tokenizer.get_vocab().values(), default=0) >= have:
        given = f"model: {config.model}: {need} tokens in its tokenizer, {have} in its embeddings"
        fail(UnsupportedError, given, "a tokenizer that fits the model", "check the files in that folder")


def pad(tokenizer: Any, features: Sequence[dict[str, Any]], leave: Sequence[str] = ("row",)) -> dict[str, torch.Tensor]:
    """Features to one batch: lists filled up to the longest on the tokenizer's side, numbers stacked."""
    longest = max(len(feature["input_ids"]) for feature in features)
    left = tokenizer.padding_side == "left"
    batch: dict[str, torch.Tensor] = {}
    for name in features[0]:
        if name in leave:
            continue
        values = [feature[name] for feature in features]
        # floats are a vector of the row, not a value for each token
        if isinstance(values[0], list) and isinstance(values[0][0], int):
            fill = tokenizer.pad_token_id if name == "input_ids" else PADDING.get(name, 0)
            batch[name] = torch.tensor([_fill(value, longest, fill, left) for value in values])
        else:
            batch[name] = torch.tensor(values)
    if "attention_mask" not in batch:
        ones = [[1] * len(feature["input_ids"]) for feature in features]
        batch["attention_mask"] = torch.tensor([_fill(value, longest, 0, left) for value in ones])
    return batch


def _fill(values: list, size: int, fill: int, left: bool) -> list:
    padding = [fill] * (size - len(values))
    return padding + values if left else values + padding


def cut(batch: dict[str, Any], size: int, tokenizer: Any) -> dict[str, Any]:
    """The batch's first ``size`` tokens; a row that is cut keeps its closing special token, as truncation does."""
    ids = batch["input_ids"]
    if ids.shape[1] <= size:
        return batch
    if tokenizer.padding_side == "left":  # bring the rows to the left edge, cut, and leave them there
        batch = {name: _flush(value, batch["attention_mask"]) for name, value in batch.items()}
        ids = batch["input_ids"]
    whole = {name: value for name, value in batch.items() if torch.is_tensor(value) and value.shape[:2] == ids.shape}
    short = {name: value[:, :size].clone() for name, value in whole.items()}
    lengths = batch["attention_mask"].sum(1)
    for row in (lengths > size).nonzero().flatten().tolist():
        last = int(lengths[row]) - 1
        if size > 1 and int(ids[row, last]) in (tokenizer.sep_token_id, tokenizer.eos_token_id):
            for name, value in short.items():
                value[row, -1] = whole[name][row, last]
    return batch | short


def _flush(value: Any, mask: torch.Tensor) -> Any:
    """Left padding to right padding, each row rolled by its padding."""
    if not torch.is_tensor(value) or value.shape[:2] != mask.shape:
        return value
    shift = mask.shape[1] - mask.sum(1, keepdim=True)
    places = (torch.arange(mask.shape[1], device=mask.device) + shift) % mask.shape[1]
    return value.gather(1, places)


def mapped(rows: Dataset, function: Callable[[dict[str, list], list[int]], dict[str, list]]) -> Dataset:
    """``function(columns, places)`` over all rows, batch by batch; only what it returns stays."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # a fingerprint of its own: hashing a tokenizer takes longer than most sets
        return rows.map(
            function,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,
        )
    finally:
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside, the mode there was outside."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def first(logits: Any) -> Any:
    """Logits of a model that returns more than these."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def shown(text: str, most: int = 240) -> str:
    """A text as the report shows it: one line, not too long."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"
