// What lora_decode computes, in plain memory: what decode.cpp makes of tensors, and call.h of a layer's. It needs no
// header of torch's.
#pragma once
#include <cstdint>

namespace peft_fast {

struct FewTokens {
  // a matrix whose rows' elements are neighbours, `row` elements from one to the next
  struct Rows {
    const void* data;
    bool bf16;
    int64_t row;
  };
  // a vector (N,); null: none
  struct Line {
    const void* data;
    bool bf16;
    int64_t step;
  };
  // a (r, K), b (N, r)
  struct Low {
    Rows a, b;
    Line bias;
    int64_t r;
    double scaling;
    int64_t tokens;  // its own, where the tokens have an order
  };

  int64_t M, K, N;
  Rows x;           // (M, K)
  const void* w;    // (N, K), two strides
  bool w_bf16;
  int64_t w_row, w_col;
  Line bias;
  const Low* lows;  // n_lows of them
  int64_t n_lows;
  void* y;  // (M, N) in x's dtype
  // rows of x as its first dimension counts them, each M / n_order tokens: those of the first adapter, then the
  // second's, ..., and last those of none; null: every adapter has all tokens
  const int64_t* order;
  int64_t n_order;
  // of DoRA, whose sums are multiplied by m/norm, both (N,), before the bias; null: of LoRA
  const float* norm;
  Line m;
  // one token more, (K,), beside the M of x: what it gives before m, norm and bias goes to `check` (N,), whose bits
  // tell whether W + Σ s·B·A is what it was; null: none
  const float* probe;
  float* check;

  int64_t tokens() const { return M + (probe ? 1 : 0); }
};

// y = m/norm∘(x·Wᵀ + Σ s·(x·Aᵀ·Bᵀ + b_B)) + bias, rounded once; of shapes that fit, and M, N > 0. With an order there
// is no probe
void few_tokens(const FewTokens&);

}  // namespace peft_fast

// few_tokens() for who does not link this library and knows a FewTokens of `size` bytes, unless all B are zero, which
// lora_decode answers: 1 if it ran
extern "C" int peft_fast_few_tokens(const peft_fast::FewTokens*, int64_t size);
