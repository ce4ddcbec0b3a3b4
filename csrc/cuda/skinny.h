// What the launchers of the skinny kernels take: plain structs, no torch and no CUDA headers.
//
// R rank columns are cut into chunks which never span adapters, since each adapter has its own mask and scaling.
#pragma once
#include <cstdint>

namespace peft_fast::cuda {

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int ROWS = WARPS * 16;    // tokens a block takes at a time
constexpr int GROUP = 128;          // columns that share the 16 Philox counters of a token
constexpr int CHUNK = 64;           // most rank columns of a chunk
constexpr int MAX_CHUNKS = 32;      // of one launch
constexpr int MOST_GROUPS = 4;      // column groups of one block of shrink_outer
constexpr int64_t GRID_Y = 65535;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a small operand in any strides and dtype; element (i, j) at data[i * row + j * col]
struct Operand {
  const void* data;
  int64_t row, col;
  int32_t dtype;
};

// up to CHUNK neighbouring rank columns of one adapter
struct Chunk {
  int32_t begin, count;
  float scale;         // of what is summed: s/(1 − p) for H, 1/(1 − p) for dA and dx, 1 for dB
  float outer_scale;   // shrink_outer only: of dB, while scale is D's
  uint32_t threshold;  // dropped where a 16-bit word is below; 0 = no dropout
  int32_t adapter;     // whose seed
};

struct Chunks {
  int32_t n, widest;
  Chunk at[MAX_CHUNKS];
};

// a big operand of tokens: row-major, columns next to each other
struct Tokens {
  const void* data;
  int64_t ld, M, C;
  bool aligned;  // base and rows on 16 bytes
};

// where sums go: the result itself, or one float32 slab for each split
struct Sums {
  void* data;
  int32_t dtype;
  int64_t row, col, split;  // strides in elements
};

// out (M, R) = scale·drop(x)·opᵀ, op (R, C); a block takes `range` columns, a multiple of GROUP
struct Shrink {
  Tokens x;
  Operand op;
  int64_t range;
  const int64_t* seeds;
  Sums out;
  Chunks chunks;
};

// out (R, C) = scale·dᵀ·drop(x), d (M, R); a block takes `rows` tokens and `groups` column groups
struct Outer {
  Tokens x, d;
  int64_t rows;
  int32_t groups;
  const int64_t* seeds;
  Sums out;
  // shrink_outer: out_d (M, R) = scale·x·opᵀ as well, one split for each block of columns
  Operand op;
  Sums out_d;
  Chunks chunks;
};

// out (M, C) = Σ mask∘(p·q)·scale + bias, p (M, R), q (R, C), bias (1, C) or null
struct Expand {
  Tokens p;
  Operand q, bias;
  const int64_t* seeds;
  void* out;
  int64_t ld, C;
  bool aligned;
  Chunks chunks;
};

using Stream = void*;

// the columns of x a block of shrink can hold the operand of
constexpr int64_t most_range(int widest) { return widest <= 16 ? 1024 : 512; }

// dtype: of the tokens; all of them raise std::runtime_error with CUDA's own words where a launch fails
void shrink(Dtype dtype, const Shrink& job, Stream stream);
void outer(Dtype dtype, const Outer& job, Stream stream);
void shrink_outer(Dtype dtype, const Outer& job, Stream stream);  // widest <= 16, no dropout
void expand(Dtype dtype, const Expand& job, Stream stream);

// out[i] = Σ_s parts[s * n + i] in the order of s
void finalize(const float* parts, int64_t splits, int64_t n, void* out, Dtype dtype, Stream stream);
void mask(const int64_t* seed, int64_t M, int64_t K, uint32_t threshold, bool* out, Stream stream);

int multiprocessors(int device);
void use_device(int device);
bool is_capturing(Stream stream);  // into a CUDA graph
const char* no_device();  // why CUDA finds none; empty when there is one

}  // namespace peft_fast::cuda
