// AVX2 + FMA: 6 × 16 tiles, 12 of 16 registers accumulate; bfloat16 operands are widened while they are packed.
#if defined(__AVX2__) && defined(__FMA__) && !defined(PEFT_FAST_ISA_UNAVAILABLE)
#include "cpu/tiles.h"

namespace peft_fast {
static constexpr Engine f32 = engine_of<F32Step<8>, 8, 6>("avx2");
IsaEngines avx2_engines() { return {&f32, &f32}; }
}  // namespace peft_fast
#else
#include "cpu/engine.h"
namespace peft_fast {
IsaEngines avx2_engines() { return {nullptr, nullptr}; }
}  // namespace peft_fast
#endif
