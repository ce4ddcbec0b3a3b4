"""Answers of a model that writes: greedy or by beams, in batches of like length, the same text alone or in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from peft_fast.recipes.config import Config
from peft_fast.recipes.tasks import text

# of a model's own settings, those that belong to its architecture and vocabulary; lengths, penalties and sampling are
# somebody's choice for some data, and here the config's
OWN = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "bos_token_id", "eos_token_id")
OWN += ("pad_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")


def settings(config: Config, tokenizer: Any, model: Any, stops: Sequence[int] = ()) -> Any:
    """A GenerationConfig of `beams` and `max_new_tokens`; ends at any of ``stops``, or where the model says."""
    from transformers import GenerationConfig

    own = {name: value for name in OWN if (value := getattr(model.generation_config, name, None)) is not None}
    own["pad_token_id"] = tokenizer.pad_token_id
    if stops:
        known = own.get("eos_token_id", [])
        own["eos_token_id"] = list(dict.fromkeys([*stops, *(known if isinstance(known, list) else [known])]))
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens, num_beams=config.beams, do_sample=False, use_cache=True, **own
    )


def wide(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head(model: Any) -> list[str]:
    """The name of what turns the last hidden state into scores of tokens."""
    table = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is table]


def batches(lengths: Sequence[int], size: int) -> Iterable[list[int]]:
    """Places of rows by length, the longest first, ``size`` at a time."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[start : start + size] for start in range(0, len(order), size))


def continued(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], size: int, how: Any) -> list[list[int]]:
    """What a decoder writes after each prompt, up to where it stops and without that token.

    Prompts end at the same place: the padding is on their left, and positions are counted without it.
    """
    device = next(model.parameters()).device
    written: list[list[int]] = [[]] * len(prompts)
    with text.evaluating(model), torch.no_grad():
        for places in batches([len(prompt) for prompt in prompts], size):
            longest = len(prompts[places[0]])
            fill = [longest - len(prompts[i]) for i in places]
            ids = [[tokenizer.pad_token_id] * n + list(prompts[i]) for n, i in zip(fill, places, strict=True)]
            mask = torch.tensor([[0] * n + [1] * (longest - n) for n in fill], device=device)
            out = model.generate(input_ids=torch.tensor(ids, device=device), attention_mask=mask, generation_config=how)
            for place, row in zip(places, out[:, longest:].tolist(), strict=True):
                written[place] = until(row, how.eos_token_id)
    return written


def until(ids: Sequence[int], stops: int | Sequence[int] | None) -> list[int]:
    """Ids before the first stop."""
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    return list(ids[: next((i for i, one in enumerate(ids) if one in stops), len(ids))])
