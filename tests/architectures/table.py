"""The page peft_fast/patch/README.md, from what the tests assert: `python -m tests.architectures.table`."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.architectures.architecture import Architecture
from tests.architectures.structure import lora_layers
from tests.architectures.zoo import KINDS

PAGE = Path(__file__).resolve().parents[2] / "peft_fast" / "patch" / "README.md"
HEAD = """\
# Which layers are fast, in which models

Nothing here is a list of names that the package knows. `accelerate(model)` recognises, in any model:

- **layers**: every `lora.Linear` of PEFT around an `nn.Linear` or a `Conv1D`, and every `lora.Embedding`. A subclass of
  `nn.Linear` counts as one if its forward is the same by its source, as Falcon's is;
- **groups**: layers of one module that are called with one and the same tensor, as q, k and v are. They are learned
  while the model runs: after the next optimizer step the first of them computes all of them in one operator.
  Every call is checked, so that a group that stops holding costs time and never a result, and is dissolved;
- **blocks**: modules whose forward is `down(drop(act(gate(x))·up(x)))`, `fc2(drop(act(fc1(x))))`, or the same with gate
  and up in one layer. They are found by tracing that one module's forward with its children as leaves; for backward
  they keep x, gate and up, and compute the activation again.

What is not recognised stays as it is, and `report(model)` says why. `PEFT_FAST_GROUPS=0` and `PEFT_FAST_BLOCKS=0`
switch the two off.

The table is what `tests/architectures` asserts, name by name, for real classes of transformers {version} with small
random configs: five training steps lie as near to float64 as stock's do; gradients under checkpointing with all
dropouts on are those without; bfloat16, autocast, the Trainer and generation are tested too. Counts are those of the
small models, of two layers a tower (ALBERT calls one layer three times); LoRA is on every linear layer but the output
head, and on the embeddings of tokens.
"""
NOTES = """\
## Why some have neither

- BERT, RoBERTa and DeBERTa split the MLP over two modules; OPT, BART, Marian, Whisper, ALBERT and the time-series
  transformer compute it in the layer's own forward: no module is the MLP and nothing else.
- BLOOM's and MPT's MLP take the residual and add it themselves.
- Experts (Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss) are three-dimensional parameters: where PEFT adapts those
  (`target_parameters`), their products, adapters and gate are one op, which is neither a group nor a block.
- GPT-J, Phi and Falcon call the MLP's first layer with the tensor that q, k and v get, and T5's decoder layers all get
  k and v from one; a group never reaches past its module.
- In DETR positions are added to what q and k read, not to what v reads.
"""
TITLES = ["architecture", "class", "LoRA layers", "fast", "groups", "blocks", "embeddings"]


def page() -> str:
    """The whole page."""
    parts = [HEAD.format(version=".".join(transformers.__version__.split(".")[:2]))]
    for kind, architectures in KINDS.items():
        rows = [TITLES, ["---"] * len(TITLES), *map(row, architectures)]
        parts.append(f"## {kind.capitalize()}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows))
    parts.append(NOTES)
    return "\n".join(parts)


def row(architecture: Architecture) -> list[str]:
    """One line of the table."""
    with torch.device("meta"):
        model = architecture.adapted()
    layers, slow = lora_layers(model), architecture.expected_slow(model)
    return [
        architecture.name,
        f"`{architecture.cls}`",
        str(len(layers)),
        str(len(set(layers) - slow)),
        _cells(architecture.groups, lambda group: architecture._replace(groups=(group,)).expected_groups(model)),
        _cells(architecture.blocks, lambda block: architecture._replace(blocks=(block,)).expected_blocks(model)),
        str(len(architecture.embeddings) or ""),
    ]


def _cells(patterns: tuple[str, ...], found) -> str:
    """`path: what` -> how many and what; equal ones added up."""
    counts: dict[str, int] = {}
    for pattern in patterns:
        what = pattern.partition(": ")[2]
        counts[what] = counts.get(what, 0) + len(found(pattern))
    return "<br>".join(f"{count} × `{what}`" for what, count in counts.items())


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
