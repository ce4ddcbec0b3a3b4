// An engine is one instruction set's way to do  C += A·B  on packed operands, and the copies around it.
//
// A is a block of rows, k contiguous, padded with zeros to a multiple of kpad and to a stride that avoids cache
// aliasing. B is cut into panels of nr columns (the last may be nr/2 wide), each panel one contiguous stream in the
// order the tile kernel reads it. C is always float32.
#pragma once
#include <cstdint>

namespace peft_fast {

// frozen values in few bits, one after another: value i is what its code means times scales[i / block]
struct Codes {
  int bits;              // 4: two a byte, the earlier in the high half; 8: an int8
  const void* data;
  const float* scales;
  const float* meaning;  // of the 16 nibbles
  const int8_t* zeros;   // of each block, the int8 that means zero; null = 0
  int64_t block;
  // of each block, the number that means zero: value i is unsigned, in byte i % plane, the planes from its high bits
  // down. null: as above
  const float* shifts = nullptr;
  int64_t plane = 0;
  bool round = false;    // to bfloat16 between the difference and the product
};

// a matrix as it lies in memory; element (i, j) is data[i * row + j * col]
struct Source {
  const void* data;
  bool bf16;            // else float32
  int64_t row, col;     // strides in elements
  bool round = false;   // float32 that must be rounded to bfloat16 before use
  const uint8_t* mask = nullptr;  // bit (i, j) set = keep, rows mask_row bytes apart; null = keep all
  int64_t mask_row = 0;
  const Codes* codes = nullptr;   // a Right's b: element (i, j) is value i * row + j * col of these, not of data
};

// where a finished tile goes: out = scale·c·column_scale + bias, element (i, j) at data[i * row + j * col]
struct Target {
  void* data;
  bool bf16;
  int64_t row, col;
  float scale = 1.0f;
  const float* column_scale = nullptr;
  const float* bias = nullptr;
  void* raw = nullptr;  // where scale·c alone goes as well, in the same order
  bool raw_bf16 = false;
};

// one stretch of a tile's k: a (m, k) rows lda elements apart, b a panel (k, width); k a multiple of kpad
struct Segment {
  int64_t k;
  const void* a;
  int64_t lda;
  const void* b;
};

enum class Activation : int { silu, gelu, gelu_tanh, quick_gelu, relu, relu2, count };

// n neighbouring elements of one row of h = act(gate)·up, bfloat16 or float32; gate null: h = act(up)
struct ActLine {
  Activation kind;
  bool bf16;
  int64_t n;
  const void *gate, *up;
  void* h;         // what the forward writes, and the backward too unless null
  const void* dh;  // what the backward reads
  void *dgate, *dup;
  const uint8_t* bits;  // keep bits of the row, null = keep all
  float keep_scale;     // 1/(1 − p)
};

// columns.h, where each is explained
struct ColumnOps {
  double (*widen)(const void* w, bool bf16, int64_t n, float* out);
  void (*panel_squares)(const float* panel, int64_t k, int width, float* sums);
  double (*dot)(const float* a, const float* b, int64_t n);
  void (*mix)(const float* u, const float* left, const float* low, float keep, const float* c, const float* bias,
              int64_t n, bool y_bf16, void* y, bool z_bf16, void* z);
  void (*put)(const float* c, const float* low, int64_t n, const uint8_t* bits, int64_t j0, bool bf16, void* out);
  void (*scale)(const void* g, bool g_bf16, const void* z, bool z_bf16, const float* by, int64_t n, void* out,
                float* dm, float* db);
  void (*lines)(const Source& w, int64_t k0, int64_t k, int64_t j0, int64_t n, uint16_t* out, int64_t ld);
  void (*spread)(const void* panel, int kpad, int width, const int32_t* at, const void* x, int64_t count, float* out);
  void (*collect)(const void* panel, bool bf16, int64_t stride, int64_t ld, int panels, const int32_t* at,
                  int64_t count, const void* g, float* out);
  bool (*norm_row)(const double* gram, int64_t r, const float* b, const float* p, double squares, double s,
                   double* scratch, double* whole);
  void (*add_wide)(double f, const float* a, int64_t n, double* line);
};

struct Engine {
  const char* isa;
  bool half;  // packed operands are bfloat16, else float32
  int mr, nr, kpad;
  int row_step;  // tile() writes whole steps of this many rows, m rounded up
  // rows [i0, i0+m) × columns [k0, k0+k) of an A operand -> out, ld elements a row, zero up to kpad
  void (*rows)(const Source&, int64_t i0, int64_t m, int64_t k0, int64_t k, void* out, int64_t ld);
  // rows [k0, k0+k) × columns [j0, j0+n), n <= nr, of a B operand -> one panel of `width` columns, zero-padded
  void (*panel)(const Source&, int64_t k0, int64_t k, int64_t j0, int64_t n, int width, void* out);
  // c (m, width) = or += Σ a·b over `count` segments; m <= mr, c has room for mr × width
  void (*tile)(const Segment*, int count, float* c, int64_t ldc, int m, int width, bool add);
  // c (m, n) += scale · bit(i0 + i, j0 + j) · z (m, n)
  void (*add_masked)(float* c, int64_t ldc, const float* z, int64_t ldz, int m, int n, const Source& mask, int64_t i0,
                     int64_t j0, float scale);
  void (*finish)(const float* c, int64_t ldc, int m, int n, int64_t i0, int64_t j0, const Target&);
  // keep bits of one row of K elements, in whole groups of 16 bytes
  void (*mask_row)(uint64_t seed, uint64_t row, int64_t K, uint32_t threshold, uint8_t* out);
  void (*activate)(const ActLine&);           // h
  void (*activate_backward)(const ActLine&);  // dgate, dup and, where there is room, h
  // n neighbouring elements: y = w_scale·w, rounded to y's type, + c_scale·c; c is read up to a multiple of nr
  void (*add_row)(const void* w, bool bf16, float w_scale, const float* c, float c_scale, int64_t n, void* y);
  // c (m, n) = or += x (m, k)·wᵀ, w (n, k) as it lies in memory, its k neighbours and its rows `row` elements apart; x in
  // packed elements, rows ldx apart and zero up to the next 32 of k. Where `half`, w must be bfloat16
  void (*dots)(const void* w, bool bf16, int64_t row, int64_t n, const void* x, int64_t ldx, int64_t k, int64_t m,
               float* c, int64_t ldc, bool add);
  // c (m, n) = x (m, k)·w, w (k, n) as it lies in memory, its n neighbours; c has room for n rounded up to 256
  void (*sums)(const void* w, bool bf16, int64_t row, int64_t n, const float* x, int64_t ldx, int64_t k, int64_t m,
               float* c, int64_t ldc);
  const ColumnOps* columns;
  // values [first, first + n) -> float32 or bfloat16, rounded once
  void (*decode)(const Codes&, int64_t first, int64_t n, bool bf16, void* out);
  // around the tiles of one task: what the processor's tile state needs, 64 bytes keep the caller's; null = nothing
  void (*enter)(void* saved) = nullptr;
  void (*leave)(const void* saved) = nullptr;
  // what fits the caches: k of a tile's call, so that a panel stays in the first level for all rows of a block; bytes of
  // a row of A in one pass over K, so that a panel stays in the second; bytes of A that a task works on, which stay there
  int64_t depth = INT64_MAX / 2;
  int64_t pass = 4096;
  int64_t block = 256 << 10;

  int64_t element() const { return half ? 2 : 4; }
  int64_t padded(int64_t k) const { return (k + kpad - 1) / kpad * kpad; }
  int width(int64_t n) const { return n > nr / 2 ? nr : nr / 2; }
};

// the engine in use for float32 or bfloat16 arithmetic
const Engine& engine(bool bf16);

// instruction sets, weakest first; select() caps the choice ("auto" = the best the machine has)
const char* select_isa(const char* name);
const char* current_isa();

// one pair of engines per instruction set; null where the file was built without it
struct IsaEngines {
  const Engine* f32;
  const Engine* bf16;
};
IsaEngines portable_engines();
IsaEngines avx2_engines();
IsaEngines avx512_engines();
IsaEngines avx512_bf16_engines();
IsaEngines amx_engines();

}  // namespace peft_fast
