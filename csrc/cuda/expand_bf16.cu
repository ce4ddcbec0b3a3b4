#include "cuda/expand.cuh"

namespace peft_fast::cuda {
template void launch_expand<Bf16>(const Expand&, Stream);
}
