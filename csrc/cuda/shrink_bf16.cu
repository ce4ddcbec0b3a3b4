#include "cuda/shrink.cuh"

namespace peft_fast::cuda {
template void launch_shrink<Bf16>(const Shrink&, Stream);
}
