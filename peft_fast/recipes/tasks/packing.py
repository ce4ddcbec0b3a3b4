"""Packing: several short sequences in one row, none of which sees another.

A row's position_ids begin at 0 with every sequence. Given these and no attention_mask, transformers makes causal masks
that are block-diagonal, sliding windows and chunks included. Not every model asks for its masks there, or for
position_ids at all: `refusal` runs the model itself and says whether a packed sequence comes out as it does alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# of the logits' spread: what rounding may change when a sequence lies elsewhere in a row
CLOSE, CLOSE_HALF = 1e-3, 0.5
LEAK = 1e-5  # the same, when only its neighbours change: masked exactly, these add zeros
MOST_FLOAT32 = 3e9  # parameters; above, a half-precision model is asked as it is, not in float32
FLATTENED = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


def bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """First-fit decreasing: places of ``lengths`` by row, each row of ``room`` or less. Ties keep their order."""
    size = 1 << max(0, len(lengths) - 1).bit_length()
    tree = [room] * (2 * size)  # of each node the most room of a row below it
    rows: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert 0 < lengths[place] <= room
        node = 1
        while node < size:
            node = 2 * node if tree[2 * node] >= lengths[place] else 2 * node + 1
        if node - size == len(rows):
            rows.append([])
        rows[node - size].append(place)
        tree[node] -= lengths[place]
        while node := node // 2:
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return rows


def join(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several sequences. A first token is nobody's next: its label would be learnt from another sequence."""
    row: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": []}
    for feature in features:
        row["input_ids"] += feature["input_ids"]
        row["labels"] += [-100, *feature["labels"][1:]]
        row["position_ids"] += range(len(feature["input_ids"]))
    return row | {"row": features[0]["row"]}


def refusal(model: Any) -> str | None:
    """Why this model cannot have packed rows; None where packed sequences come out as they do alone."""
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation in FLATTENED:
        return f"{implementation} takes packed sequences only in batches of one row"
    held = {parameter: parameter.dtype for parameter in model.parameters()}
    half = any(dtype in (torch.bfloat16, torch.float16) for dtype in held.values())
    widened = half and model.num_parameters() <= MOST_FLOAT32
    training = model.training
    model.eval()
    try:
        if widened:
            for parameter in held:
                parameter.data = parameter.data.float()
        with torch.no_grad():
            return _refusal(model, CLOSE_HALF if half and not widened else CLOSE)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return f"its forward does not take packed rows: {reason}"
    finally:
        for parameter, dtype in held.items():
            parameter.data = parameter.data.to(dtype)
        model.train(training)


def _refusal(model: Any, close: float) -> str | None:
    """Two rows of three sequences each: a sequence must not change with its neighbours, nor with its place."""
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, other, asked, last = (
        torch.randint(vocabulary, (length,), generator=draw).to(device) for length in (5, 9, 12, 3)
    )

    def packed(*rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        ids = torch.stack([torch.cat(list(row)) for row in rows])
        positions = torch.stack([torch.cat([torch.arange(len(one), device=device) for one in row]) for row in rows])
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        starts = [next(at for at in range(ids.shape[1]) if torch.equal(row[at : at + 12], asked)) for row in ids]
        return [logits[i, at : at + 12] for i, at in enumerate(starts)]

    alone = model(input_ids=asked[None], use_cache=False).logits[0]
    scale = float(alone.float().std()) or 1.0

    def apart(one: torch.Tensor, two: torch.Tensor, close: float) -> bool:
        return not float((one - two).abs().max()) <= close * scale

    if apart(packed([asked])[0], alone, close):
        return "a text does not come out with position_ids as it does without"
    before, after = packed([first, asked, last, other], [other, asked, last, first])
    others = packed([first.flip(0), asked, last, other], [other.flip(0), asked, last, first])
    if apart(before, others[0], LEAK) or apart(after, others[1], LEAK):
        return "a sequence sees what lies before it in its row"
    if apart(before, alone, close) or apart(after, alone, close):
        return "a sequence does not come out as it does alone: the model does not count its positions from 0"
    return None
