// The kernels of quantized caches: compiled by themselves, since what the compiler inlines of the others must not depend
// on them.

#include "attention_kernel.h"

namespace hf_paged {

int64_t attend_quantized(const Args& args) {
  return args.cache_dtype == kInt8Cache ? attend<int8_t>(args) : attend<E4m3>(args);
}

}  // namespace hf_paged
