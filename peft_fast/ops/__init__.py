"""Public operators: adapters fused with the frozen layers they adapt, as autograd functions."""

from peft_fast.ops.dora_decode import dora_decode
from peft_fast.ops.dora_embedding import dora_embedding
from peft_fast.ops.dora_linear import dora_linear
from peft_fast.ops.dora_norm import dora_norm
from peft_fast.ops.dropout import draw_seed, dropout_mask
from peft_fast.ops.lora_add import lora_add
from peft_fast.ops.lora_decode import lora_decode
from peft_fast.ops.lora_embedding import lora_embedding
from peft_fast.ops.lora_experts import combine_experts, lora_experts, route_experts
from peft_fast.ops.lora_group import lora_group
from peft_fast.ops.lora_linear import lora_linear
from peft_fast.ops.lora_mixed import lora_mixed
from peft_fast.ops.lora_mlp import lora_mlp
from peft_fast.ops.lora_quantized import lora_quantized
from peft_fast.ops.nf4 import dequantize
from peft_fast.ops.prepare import fast_calls
from peft_fast.ops.spec import ACTIVATIONS, Adapter, Routing, Sibling

__all__ = [
    "ACTIVATIONS",
    "Adapter",
    "Routing",
    "Sibling",
    "combine_experts",
    "dequantize",
    "dora_decode",
    "dora_embedding",
    "dora_linear",
    "dora_norm",
    "draw_seed",
    "dropout_mask",
    "fast_calls",
    "lora_add",
    "lora_decode",
    "lora_embedding",
    "lora_experts",
    "lora_group",
    "lora_linear",
    "lora_mixed",
    "lora_mlp",
    "lora_quantized",
    "route_experts",
]
