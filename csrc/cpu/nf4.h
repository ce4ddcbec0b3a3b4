// W[i] = code[nibble i]·absmax[i // block] on the CPU; shapes and dtypes as in peft_fast/ops/nf4.py.
#pragma once
#include "common/tensor.h"

namespace peft_fast {

// data (⌈N·K/2⌉,) uint8 with the earlier value in the high half, scales (⌈N·K/block⌉,) and code (16,) float32
// -> W (N, K) in float32 or bfloat16: float32 products, rounded once
Tensor nf4(const Tensor& data, const Tensor& scales, const Tensor& code, int64_t block, int64_t N, int64_t K,
           bool bf16);

// absmax (blocks,) uint8, code (256,), outer (⌈blocks/block⌉,) and offset () float32 -> scales (blocks,) float32
// = code[absmax[j]]·outer[j // block] + offset, the product rounded before the sum
Tensor nf4_scales(const Tensor& absmax, const Tensor& code, const Tensor& outer, const Tensor& offset, int64_t block);

// N·K values in 4 bits, of which `meaning` (16,) says what they are; or in int8, less the zeros (blocks,) int8 of their
// blocks; or unsigned in planes, less the zeros (blocks,) float32; to be decoded to bfloat16 or to float32. The
// tensors must outlive what is returned
Codes codes_of(const Tensor& data, const Tensor& scales, const std::optional<Tensor>& meaning,
               const std::optional<Tensor>& zeros, int64_t block, int64_t N, int64_t K, bool bf16);

}  // namespace peft_fast
