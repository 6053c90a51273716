// The entry of paged attention, and the kernels of caches that are not quantized.

#include "attention_kernel.h"

namespace hf_paged {

int64_t attend_quantized(const Args& args);  // attention_quantized.cpp

}  // namespace hf_paged

// Writes the new keys and values, then attends. Returns 0, or 8 times the sequence or token at fault plus an Error.
HF_PAGED_EXPORT int64_t hf_paged_attention(const void* packed) {
  hf_paged::Args args;
  std::memcpy(&args, packed, sizeof args);
  switch (args.cache_dtype) {
    case hf_paged::kFloat32: return hf_paged::attend<float>(args);
    case hf_paged::kBFloat16: return hf_paged::attend<c10::BFloat16>(args);
    case hf_paged::kFloat16: return hf_paged::attend<c10::Half>(args);
    default: return hf_paged::attend_quantized(args);
  }
}
