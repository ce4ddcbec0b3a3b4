// Dropout masks as bits, regenerated from (seed, row, column): see peft_fast/reference/dropout.py.
#pragma once
#include <cmath>
#include <memory>

#include "common/tensor.h"

namespace peft_fast {

inline int64_t mask_stride(int64_t K) { return (K + 127) / 128 * 16; }  // bytes

// one bit an element, M rows
class MaskBits {
 public:
  MaskBits() = default;
  MaskBits(const Engine& e, uint64_t seed, int64_t M, int64_t K, double p) : stride_(mask_stride(K)) {
    bits_.reset(new uint8_t[M * stride_]);
    const uint32_t threshold = uint32_t(std::lrint(p * 65536));
    torch::stable::parallel_for(0, M, 64, [&](int64_t m0, int64_t m1) {
      for (int64_t m = m0; m < m1; ++m) e.mask_row(seed, uint64_t(m), K, threshold, bits_.get() + m * stride_);
    });
  }
  explicit operator bool() const { return stride_ > 0; }
  // the same matrix seen through the mask
  Source over(Source s) const {
    s.mask = bits_.get();
    s.mask_row = stride_;
    return s;
  }

 private:
  int64_t stride_ = 0;
  std::unique_ptr<uint8_t[]> bits_;
};

}  // namespace peft_fast
