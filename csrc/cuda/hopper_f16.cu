#include "cuda/hopper.cuh"

namespace peft_fast::cuda {
template void launch_hopper<Half, false>(const HopperJob&, bool, bool, int64_t, Stream);
}
