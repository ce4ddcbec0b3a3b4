// The AMX instructions isa_amx.cpp uses, as loops over eight 16 × 64-byte registers (a test build only).
#pragma once
#include <cstdint>
#include <cstring>

namespace peft_fast {
namespace {

thread_local uint8_t tile_registers[8][16][64];

inline void emulated_tile_zero(int t) { std::memset(tile_registers[t], 0, sizeof tile_registers[t]); }
inline void emulated_tile_loadd(int t, const void* base, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(tile_registers[t][i], (const char*)base + i * stride, 64);
}
inline void emulated_tile_stored(int t, void* base, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy((char*)base + i * stride, tile_registers[t][i], 64);
}
inline void emulated_tile_dpbf16ps(int c, int a, int b) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j)
        for (int pair = 0; pair < 2; ++pair) {
          uint16_t x, y;
          float z;
          std::memcpy(&x, &tile_registers[a][i][4 * k + 2 * pair], 2);
          std::memcpy(&y, &tile_registers[b][k][4 * j + 2 * pair], 2);
          std::memcpy(&z, &tile_registers[c][i][4 * j], 4);
          z += from_bf16(x) * from_bf16(y);
          std::memcpy(&tile_registers[c][i][4 * j], &z, 4);
        }
}

}  // namespace
}  // namespace peft_fast

// the compiler's own names are macros in one build type and functions in another
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero emulated_tile_zero
#define _tile_loadd emulated_tile_loadd
#define _tile_stream_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_dpbf16ps emulated_tile_dpbf16ps
