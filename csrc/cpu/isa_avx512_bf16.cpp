// AVX512-BF16 (vdpbf16ps): 12 × 32 tiles for both dtypes.
#if defined(__AVX512BF16__) && !defined(PEFT_FAST_ISA_UNAVAILABLE)
#include "cpu/tiles.h"

namespace peft_fast {
static constexpr Engine f32 = engine_of<F32Step<16>, 16, 12>("avx512_bf16");
static constexpr Engine bf16 = engine_of<Bf16Step, 16, 12>("avx512_bf16");
IsaEngines avx512_bf16_engines() { return {&f32, &bf16}; }
}  // namespace peft_fast
#else
#include "cpu/engine.h"
namespace peft_fast {
IsaEngines avx512_bf16_engines() { return {nullptr, nullptr}; }
}  // namespace peft_fast
#endif
