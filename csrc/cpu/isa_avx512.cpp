// AVX512 without bfloat16: 12 × 32 tiles, 24 of 32 registers accumulate; bfloat16 is widened while it is packed.
#if defined(__AVX512F__) && !defined(PEFT_FAST_ISA_UNAVAILABLE)
#include "cpu/tiles.h"

namespace peft_fast {
static constexpr Engine f32 = engine_of<F32Step<16>, 16, 12>("avx512");
IsaEngines avx512_engines() { return {&f32, &f32}; }
}  // namespace peft_fast
#else
#include "cpu/engine.h"
namespace peft_fast {
IsaEngines avx512_engines() { return {nullptr, nullptr}; }
}  // namespace peft_fast
#endif
