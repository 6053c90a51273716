// The small operations between the linears: RMS norms, gated activations, rotary embedding.
//
// Activations are fp32, bf16 or fp16. Arithmetic is fp32, and `rounded<T>` stands wherever the eager modules of
// transformers store a tensor of the activation's dtype in between. Every row (element, head) is computed alone.

#include "common.h"

#include <algorithm>
#include <cmath>

namespace hf_paged {
namespace {

// A thread gets at least this many elements: handing out less costs more than it saves.
constexpr int64_t kGrain = 16384;

int64_t grain_rows(int64_t row_length) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(row_length, 1)); }

// All lanes of v as T (for 16-bit types: `store` converts one element at a time).
template <class T>
inline void store_all(T* p, const Vec& v) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto narrow = at::vec::cvtfp32_bf16(v);
    std::memcpy(p, &narrow, sizeof(narrow));
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    const auto narrow = at::vec::cvtfp32_fp16(v);
    std::memcpy(p, &narrow, sizeof(narrow));
  } else {
    v.store(p);
  }
#else
  store(p, v, kLanes);
#endif
}

template <class T>
inline void write(T* p, const Vec& v, int64_t count) {
  if (count == kLanes)
    store_all(p, v);
  else
    store(p, v, count);
}

// To T and back.
template <class T>
inline Vec rounded(const Vec& v) {
  if constexpr (std::is_same_v<T, float>) return v;
  alignas(64) T lanes[kLanes];
  store_all(lanes, v);
  return load(lanes);
}

// body(i, count) for 0 <= i < length in steps of a vector; count is what is left of the last one.
template <class Body>
inline void for_vectors(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) body(i, kLanes);
  if (i < length) body(i, length - i);
}

// ---------------------------------------------------------------------------------------------- RMS norm

template <class T>
struct Norm {
  const T* weight;  // or null: no scale
  int64_t H;
  float eps, offset;
  bool round_first;  // weight * (x * r).to(T); else (weight * (x * r)).to(T)
};

// `row` holds the H inputs; `out` may be the same memory.
template <class T>
inline void norm_row(const Norm<T>& p, const T* row, T* out) {
  Vec squares[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= p.H; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const Vec x = load(row + i + j * kLanes);
      squares[j] = fma(x, x, squares[j]);
    }
  for_vectors(p.H - i, [&](int64_t j, int64_t count) {
    const Vec x = load(row + i + j, count);
    squares[0] = fma(x, x, squares[0]);
  });
  const float sum = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const Vec scale(1.0f / std::sqrt(sum / static_cast<float>(p.H) + p.eps));
  const Vec offset(p.offset);
  for_vectors(p.H, [&](int64_t i, int64_t count) {
    Vec y = load(row + i, count) * scale;
    if (p.round_first) y = rounded<T>(y);
    if (p.weight) {
      Vec w = load(p.weight + i, count);
      if (p.offset != 0.f) {
        w = offset + w;
        if (p.round_first) w = rounded<T>(w);
      }
      y = y * w;
    }
    write(out + i, y, count);
  });
}

// x [A, B, H] by its two row strides -> out [A, B, H] contiguous
template <class T>
void rms_norm(const T* x, int64_t stride_a, int64_t stride_b, int64_t A, int64_t B, const Norm<T>& p, T* out) {
  at::parallel_for(0, A * B, grain_rows(p.H), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      norm_row(p, x + row / B * stride_a + row % B * stride_b, out + row * p.H);
  });
}

// ---------------------------------------------------------------------------------------------- activations

enum Activation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

template <int64_t ACTIVATION>
inline Vec activate(const Vec& x) {
  const Vec one(1.f), half(0.5f);
  if constexpr (ACTIVATION == kSilu) {
    return x / (one + x.neg().exp());
  } else if constexpr (ACTIVATION == kGelu) {
    return x * half * (one + (x * Vec(float(M_SQRT1_2))).erf());
  } else {
    const Vec inner = Vec(float(M_SQRT2 * M_2_SQRTPI * 0.5)) * (x + Vec(0.044715f) * (x * x * x));
    return half * x * (one + inner.tanh());
  }
}

// gate_up [rows, 2 I] -> out [rows, I] = activation(first half) * second half
template <class T, int64_t ACTIVATION>
void act_and_mul(const T* gate_up, int64_t stride, int64_t rows, int64_t I, T* out) {
  at::parallel_for(0, rows, grain_rows(4 * I), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = gate_up + row * stride;
      for_vectors(I, [&](int64_t i, int64_t count) {
        const Vec act = rounded<T>(activate<ACTIVATION>(load(gate + i, count)));
        write(out + row * I + i, act * load(gate + I + i, count), count);
      });
    }
  });
}

// ---------------------------------------------------------------------------------------------- rotary embedding

template <class T>
struct Heads {
  const T* in;  // [rows, num_heads, D] by two strides
  int64_t row_stride, head_stride, num_heads;
  T* out;  // [rows, num_heads, D] contiguous
};

// x * cos + rotate_half(x) * sin on the first R of D, the rest as it is: two products and one sum, each rounded.
template <class T>
inline void rotate_heads(const Heads<T>& heads, int64_t row, int64_t D, int64_t R, const T* cos, const T* sin) {
  const int64_t half = R / 2;
  for (int64_t h = 0; h < heads.num_heads; ++h) {
    const T* x = heads.in + row * heads.row_stride + h * heads.head_stride;
    T* out = heads.out + (row * heads.num_heads + h) * D;
    for_vectors(half, [&](int64_t i, int64_t count) {
      const Vec a = load(x + i, count), b = load(x + half + i, count);
      const Vec low = rounded<T>(a * load(cos + i, count)) - rounded<T>(b * load(sin + i, count));
      const Vec high = rounded<T>(b * load(cos + half + i, count)) + rounded<T>(a * load(sin + half + i, count));
      write(out + i, low, count);
      write(out + half + i, high, count);
    });
    std::copy(x + R, x + D, out + R);
  }
}

template <class T>
void rotary(
    const Heads<T>& q, const Heads<T>& k, const T* cos, int64_t cos_stride, const T* sin, int64_t sin_stride,
    int64_t rows, int64_t D, int64_t R) {
  at::parallel_for(0, rows, grain_rows((q.num_heads + k.num_heads) * D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      rotate_heads(q, row, D, R, cos + row * cos_stride, sin + row * sin_stride);
      rotate_heads(k, row, D, R, cos + row * cos_stride, sin + row * sin_stride);
    }
  });
}

template <class Body>
void for_dtype(int64_t dtype, const Body& body) {
  if (dtype == kFloat32)
    body(float{});
  else if (dtype == kBFloat16)
    body(c10::BFloat16{});
  else
    body(c10::Half{});
}

}  // namespace
}  // namespace hf_paged

using namespace hf_paged;

// Strides count elements; the last dimension is contiguous everywhere.

HF_PAGED_EXPORT void hf_paged_rms_norm(
    int64_t dtype, const void* x, int64_t stride_a, int64_t stride_b, int64_t A, int64_t B, int64_t H,
    const void* weight, float eps, float offset, int64_t round_first, void* out) {
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Norm<T> norm{static_cast<const T*>(weight), H, eps, offset, round_first != 0};
    rms_norm(static_cast<const T*>(x), stride_a, stride_b, A, B, norm, static_cast<T*>(out));
  });
}

HF_PAGED_EXPORT void hf_paged_act_and_mul(
    int64_t dtype, int64_t activation, const void* gate_up, int64_t stride, int64_t rows, int64_t I, void* out) {
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = activation == kSilu ? act_and_mul<T, kSilu>
        : activation == kGelu            ? act_and_mul<T, kGelu>
                                         : act_and_mul<T, kGeluTanh>;
    run(static_cast<const T*>(gate_up), stride, rows, I, static_cast<T*>(out));
  });
}

HF_PAGED_EXPORT void hf_paged_rotary(
    int64_t dtype, const void* q, int64_t q_row_stride, int64_t q_head_stride, int64_t q_heads, void* q_out,
    const void* k, int64_t k_row_stride, int64_t k_head_stride, int64_t k_heads, void* k_out, const void* cos,
    int64_t cos_stride, const void* sin, int64_t sin_stride, int64_t rows, int64_t D, int64_t R) {
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Heads<T> queries{static_cast<const T*>(q), q_row_stride, q_head_stride, q_heads, static_cast<T*>(q_out)};
    const Heads<T> keys{static_cast<const T*>(k), k_row_stride, k_head_stride, k_heads, static_cast<T*>(k_out)};
    rotary(
        queries, keys, static_cast<const T*>(cos), cos_stride, static_cast<const T*>(sin), sin_stride, rows, D, R);
  });
}
