// AMX-BF16: 32 × 32 tiles from four accumulator, two A and two B tile registers; float32 stays on AVX512.
//
// PEFT_FAST_EMULATE_AMX replaces the tile instructions by loops, so that the index logic runs anywhere.
#if (defined(__AMX_BF16__) && defined(__AVX512BF16__) && !defined(PEFT_FAST_ISA_UNAVAILABLE)) || \
    defined(PEFT_FAST_EMULATE_AMX)
#include "cpu/tiles.h"
#if defined(PEFT_FAST_EMULATE_AMX)
#include "cpu/amx_emulation.h"
#endif

namespace peft_fast {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

#if defined(PEFT_FAST_EMULATE_AMX)
void load_config(const TileConfig*) {}
void store_config(TileConfig*) {}
#else
// GCC's _tile_loadconfig says that it reads 8 bytes of the 64: stores to the others may then be dropped as dead, and
// the first tile instruction is an illegal one. These say all 64
void load_config(const TileConfig* config) { __asm__ volatile("ldtilecfg %0" ::"m"(*config)); }
void store_config(TileConfig* config) { __asm__ volatile("sttilecfg %0" : "=m"(*config)); }
#endif

// every tile register as 16 rows of 64 bytes
constexpr TileConfig whole_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  return config;
}
alignas(64) constexpr TileConfig configured = whole_tiles();

// oneDNN keeps a configuration of its own on the same thread and may believe that it still holds: it is put back
void enter(void* saved) {
  store_config((TileConfig*)saved);
  load_config(&configured);
}
void leave(const void* saved) { load_config((const TileConfig*)saved); }

// c (32, width) = or += Σ a (32, k) · b (k, width); b as [k/32][width/16][16][16][2]; a is read past row m, into
// padding. Its rows go by once for each panel, which is to stay in the first-level cache: they say so (stream)
void tile_amx(const Segment* segment, int count, float* c, int64_t ldc, int m, int width, bool add) {
  const bool low = m > 16, right = width > 16;
  const int64_t c_bytes = ldc * 4;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if (right) _tile_loadd(1, c + 16, c_bytes);
    if (low) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if (low && right) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (; count > 0; --count, ++segment) {
    const auto* a = (const uint16_t*)segment->a;
    const auto* b = (const uint16_t*)segment->b;
    const auto* a_low = a + 16 * segment->lda;
    const int64_t a_bytes = segment->lda * 2;
    for (int64_t p = 0; p < segment->k; p += 32, b += 32 * width) {
      _tile_loadd(6, b, 64);
      _tile_stream_loadd(4, a + p, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (right) {
        _tile_loadd(7, b + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (low) {
        _tile_stream_loadd(5, a_low + p, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (right) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, c_bytes);
  if (right) _tile_stored(1, c + 16, c_bytes);
  if (low) _tile_stored(2, c + 16 * ldc, c_bytes);
  if (low && right) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

// c (m, n) = or += x (m, k)·wᵀ, as dots: w's rows lie as a left operand's tiles want them, so that only x is packed, and
// the tiles are those of cᵀ. What is no whole tile of w, and few tokens, which wait for w alone, go the vectors' way
void dots_tiles(const void* w_, bool bf16, int64_t row, int64_t n, const void* x_, int64_t ldx, int64_t k, int64_t m,
                float* c, int64_t ldc, bool add) {
  constexpr int64_t LEAST = 5, DEPTH = 1024;
  constexpr Dots by_vectors = dots_with<16, true>();
  const auto *w = (const uint16_t*)w_, *x = (const uint16_t*)x_;
  const int64_t whole_n = n / 16 * 16, whole_k = k / 32 * 32;
  if (m < LEAST || whole_n == 0 || whole_k < 128) return by_vectors(w, bf16, row, n, x, ldx, k, m, c, ldc, add);
  alignas(64) static thread_local uint32_t pairs[2][DEPTH / 2 * 16];
  alignas(64) float turned[32 * 32], line[16 * 16];
  alignas(64) char saved[64];
  enter(saved);
  for (int64_t t = 0; t < m; t += 32)
    for (int64_t k0 = 0; k0 < whole_k; k0 += DEPTH) {
      const int64_t depth = std::min(DEPTH, whole_k - k0), tokens = std::min<int64_t>(32, m - t);
      for (int64_t g = 0; g * 16 < tokens; ++g)
        for (int64_t p = 0; p < depth; p += 32) {
          uint32_t* to = pairs[g] + p / 2 * 16;
          const auto* from = (const uint32_t*)(x + (t + 16 * g) * ldx + k0 + p);
          if (t + 16 * g + 16 <= m) {
            transpose16(from, ldx / 2, to, 16);
            continue;
          }
          uint32_t part[16 * 16] = {};
          for (int64_t i = 0; t + 16 * g + i < m; ++i) std::memcpy(part + 16 * i, from + i * (ldx / 2), 64);
          transpose16(part, 16, to, 16);
        }
      __asm__ volatile("" ::: "memory");  // GCC does not know that tiles are read from memory
      for (int64_t i = 0; i < whole_n; i += 32) {
        const bool low = i + 16 < whole_n, right = tokens > 16;
        const auto* at = w + i * row + k0;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t p = 0; p < depth; p += 32) {
          _tile_loadd(6, pairs[0] + p / 2 * 16, 64);
          _tile_stream_loadd(4, at + p, row * 2);
          _tile_dpbf16ps(0, 4, 6);
          if (right) {
            _tile_loadd(7, pairs[1] + p / 2 * 16, 64);
            _tile_dpbf16ps(1, 4, 7);
          }
          if (low) {
            _tile_stream_loadd(5, at + 16 * row + p, row * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (right) _tile_dpbf16ps(3, 5, 7);
          }
        }
        _tile_stored(0, turned, 128);
        _tile_stored(1, turned + 16, 128);
        _tile_stored(2, turned + 16 * 32, 128);
        _tile_stored(3, turned + 16 * 32 + 16, 128);
        for (int64_t g = 0; g * 16 < tokens; ++g)
          for (int64_t b = 0; b <= low; ++b) {
            transpose16((const uint32_t*)turned + b * 16 * 32 + g * 16, 32, (uint32_t*)line, 16);
            for (int64_t j = 0; j < std::min<int64_t>(16, tokens - 16 * g); ++j) {
              float* to = c + (t + 16 * g + j) * ldc + i + 16 * b;
              const auto sum = Lanes<16>::load(line + 16 * j);
              Lanes<16>::store(to, add || k0 ? Lanes<16>::load(to) + sum : sum);
            }
          }
      }
    }
  leave(saved);
  if (whole_k < k) by_vectors(w + whole_k, bf16, row, whole_n, x + whole_k, ldx, k - whole_k, m, c, ldc, true);
  if (whole_n < n) by_vectors(w + whole_n * row, bf16, row, n - whole_n, x, ldx, k, m, c + whole_n, ldc, add);
}

}  // namespace

static constexpr Engine f32 = [] {
  Engine e = engine_of<F32Step<16>, 16, 12>("amx");
  e.block = 1 << 20;
  return e;
}();
static constexpr Engine bf16 = {
    "amx", true, 32, 32, 32, 16, rows<uint16_t, 32>, panel<uint16_t, 32, true>, tile_amx, add_masked, finish, mask_row,
    activate<16, false>, activate<16, true>, add_row<16>,
    dots_tiles, sums<16>, &column_ops<16>, decode<16>, enter, leave, 512, 8192, 1 << 20};
IsaEngines amx_engines() { return {&f32, &bf16}; }
}  // namespace peft_fast
#else
#include "cpu/engine.h"
namespace peft_fast {
IsaEngines amx_engines() { return {nullptr, nullptr}; }
}  // namespace peft_fast
#endif
