#include "cuda/outer.cuh"

namespace peft_fast::cuda {
template void launch_outer<Half>(const Outer&, Stream);
template void launch_shrink_outer<Half>(const Outer&, Stream);
}
