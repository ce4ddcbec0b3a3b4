"""Public operators: adapters fused with the frozen layer they adapt, as autograd functions."""

from peft_fast.ops.dropout import draw_seed, dropout_mask
from peft_fast.ops.lora_linear import Adapter, fast_calls, lora_linear

__all__ = ["Adapter", "draw_seed", "dropout_mask", "fast_calls", "lora_linear"]
