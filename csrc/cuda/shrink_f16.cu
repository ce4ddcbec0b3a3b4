#include "cuda/shrink.cuh"

namespace peft_fast::cuda {
template void launch_shrink<Half>(const Shrink&, Stream);
}
