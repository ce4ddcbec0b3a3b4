"""Public operators: adapters fused with the frozen layers they adapt, as autograd functions."""

from peft_fast.ops.dropout import draw_seed, dropout_mask
from peft_fast.ops.lora_embedding import lora_embedding
from peft_fast.ops.lora_group import lora_group
from peft_fast.ops.lora_linear import lora_linear
from peft_fast.ops.lora_mlp import lora_mlp
from peft_fast.ops.prepare import fast_calls
from peft_fast.ops.spec import ACTIVATIONS, Adapter, Sibling

__all__ = [
    "ACTIVATIONS",
    "Adapter",
    "Sibling",
    "draw_seed",
    "dropout_mask",
    "fast_calls",
    "lora_embedding",
    "lora_group",
    "lora_linear",
    "lora_mlp",
]
