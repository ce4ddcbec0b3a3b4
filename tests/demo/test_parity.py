"""Twenty training steps at dropout 0: peft_fast's losses are as near to float64's as stock PEFT's."""

import dataclasses

import pytest
import torch

import peft_fast
from peft_fast import ops
from peft_fast.demo import data
from peft_fast.demo.finetune import Recipe, encode, load_model
from peft_fast.recipes import fetch

from .conftest import sentences

STEPS, BATCH = 20, 8
# the numeric contract's f (mean square) and F (worst element), in units of the dtype's eps
SLACK = {torch.float32: (4.0, 8.0), torch.bfloat16: (1 / 64, 1 / 4)}


def losses(recipe, rows, n_labels, kind) -> torch.Tensor:
    """(STEPS,) float64; kind: stock, fast, or truth = the same start in float64."""
    model, tokenizer = load_model(recipe, n_labels)
    if kind == "truth":
        model.double()
    if kind == "fast":
        peft_fast.accelerate(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr)
    encoded = encode(tokenizer, rows, 24)
    found = []
    for step in range(STEPS):
        at = step * BATCH % len(encoded)
        batch = tokenizer.pad(encoded[at : at + BATCH], return_tensors="pt")
        y = batch.pop("labels")
        logits = model(**batch).logits
        # double: the loss's own rounding in bf16 would hide what is compared
        loss = torch.nn.functional.cross_entropy(logits.double(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def rms(v: torch.Tensor) -> torch.Tensor:
    return v.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", ["tiny", "minilm"])
def test_loss_parity_with_stock(which, dtype, tiny_bert, pinned):
    folder, rows = tiny_bert, [(text, int(label == "positive")) for text, label in sentences(STEPS * BATCH)]
    if which == "minilm":
        folder = pinned(fetch.MINILM)
        rows = data.movie_reviews(pinned(fetch.MOVIES) / "movie-reviews.tsv").train[: STEPS * BATCH]
    recipe = Recipe(str(folder), dtype="bf16" if dtype == torch.bfloat16 else "fp32", dropout=0.0, network=False)
    seeds = (0, 1, 2) if which == "tiny" else (0,)
    e, e0, truths = [], [], []
    for seed in seeds:
        each = dataclasses.replace(recipe, seed=seed)
        before = ops.fast_calls()
        truth, stock = (losses(each, rows, 2, kind) for kind in ("truth", "stock"))
        assert ops.fast_calls() == before
        fast = losses(each, rows, 2, "fast")
        assert ops.fast_calls() > before
        e, e0, truths = [*e, fast - truth], [*e0, stock - truth], [*truths, truth]
    e, e0, truth = torch.cat(e), torch.cat(e0), torch.cat(truths)
    # rounding feeds back through the optimizer, so single steps differ: the contract's bound for the worst
    # element, and its factor 2 for the mean square too, which at 1.05 needs far more samples than 20 steps
    f, F = (c * torch.finfo(dtype).eps for c in SLACK[dtype])
    assert e.abs().max() <= 2 * e0.abs().max() + F * truth.abs().max()
    assert rms(e) <= 2 * rms(e0) + f * rms(truth)


def test_a_wrong_scale_would_be_seen(tiny_bert):
    """The bound above is worth something: adapters scaled by 1.01 leave it within 20 steps in fp32."""
    rows = [(text, int(label == "positive")) for text, label in sentences(STEPS * BATCH)]
    recipe = Recipe(tiny_bert, dtype="fp32", dropout=0.0, network=False)
    truth, stock = (losses(recipe, rows, 2, kind) for kind in ("truth", "stock"))
    wrong = losses(dataclasses.replace(recipe, alpha=32 * 1.01), rows, 2, "fast")
    F = SLACK[torch.float32][1] * torch.finfo(torch.float32).eps
    assert (wrong - truth).abs().max() > 2 * (stock - truth).abs().max() + F * truth.abs().max()
