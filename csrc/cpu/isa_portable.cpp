// Any processor: four-float vectors, whatever the compiler makes of them.
#include "cpu/tiles.h"

namespace peft_fast {
static constexpr Engine f32 = engine_of<F32Step<4>, 4, 4>("portable");
IsaEngines portable_engines() { return {&f32, &f32}; }
}  // namespace peft_fast
