// Attention, which libtorch 2.13 calculates on a CPU with MKL's products (at half the speed on processors that MKL
// does not know, and at a tenth in bf16). Products are oneDNN's here; they sum in fp32. kernels.rs decides where it is
// used. A C interface without exceptions.

#include "fused.h"
#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <cstring>
#include <exception>
#include <tuple>
#include <type_traits>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr int64_t even(int64_t n) { return n + n % 2; }

// A matrix [rows, columns] of T whose rows are `stride` elements apart.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;
};

// Packs the right side of a product in the kernel's layout: consecutive rows in fp32, pairs of rows
// interleaved in bf16, with zeros after an odd last row.
void pack(Matrix<float> in, float* out) {
  for (int64_t r = 0; r < in.rows; ++r) std::memcpy(out + r * in.columns, in.data + r * in.stride, 4 * in.columns);
}

void pack(Matrix<at::BFloat16> in, at::BFloat16* out) {
  for (int64_t r = 0; r < in.rows; r += 2) {
    at::BFloat16* to = out + r * in.columns;
    const at::BFloat16* from = in.data + r * in.stride;
    const int64_t next = r + 1 < in.rows ? in.stride : 0;
    for (int64_t c = 0; c < in.columns; ++c) {
      to[2 * c] = from[c];
      to[2 * c + 1] = next ? from[next + c] : at::BFloat16(0);
    }
  }
}

// As `pack`, for the transposed matrix [columns, rows]. `Unit` is the part that is moved as a
// whole: one number, or two in bf16. Rows are processed in blocks that fit the first-level cache.
template <typename Unit, typename T>
void turn(Matrix<T> in, T* out) {
  constexpr int64_t BLOCK = 16, EACH = sizeof(Unit) / sizeof(T);
  for (int64_t start = 0; start < in.rows; start += BLOCK) {
    const auto end = std::min(in.rows, start + BLOCK);
    for (int64_t c = 0; c < in.columns / EACH; ++c)
      for (int64_t r = start; r < end; ++r)
        std::memcpy(out + (c * in.rows + r) * EACH, in.data + r * in.stride + c * EACH, sizeof(Unit));
  }
}

void pack_transposed(Matrix<float> in, float* out) { turn<float>(in, out); }

// The number of columns must be even.
void pack_transposed(Matrix<at::BFloat16> in, at::BFloat16* out) { turn<uint32_t>(in, out); }

// A matrix in memory whose rows are `stride` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// Calculates out [m, n] = a [m, k] b [k, n] in fp32, or adds it to `out`. In bf16 `b` is packed and `k` is
// even.
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, Rows<const T> a, Rows<const T> b, Rows<float> out, bool adds = false) {
  const bool interleaved = !std::is_same_v<T, float>;
  at::native::cpublas::brgemm(m, n, k, a.stride, b.stride, out.stride, adds, a.data, b.data, out.data, interleaved);
}

// As above, for a `b` and an `out` without gaps between rows.
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b, float* out) {
  multiply<T>(m, n, k, {a, a_stride}, {b, n}, {out, n});
}

constexpr int64_t BLOCK_ELEMENTS = 1 << 17;  // 512 KiB of fp32: a second-level cache holds 2 or 3

int64_t block_rows(int64_t rows, int64_t columns) {
  return std::min(rows, std::max<int64_t>(16, BLOCK_ELEMENTS / columns / 16 * 16));
}

Tensor room(std::initializer_list<int64_t> size) { return at::empty(size, at::kFloat); }

float* numbers(const Tensor& x) { return x.mutable_data_ptr<float>(); }

template <typename T>
const T* elements(const Tensor& x) {
  return x.const_data_ptr<T>();
}

template <typename T>
constexpr int64_t width(int64_t n) {
  return std::is_same_v<T, float> ? n : even(n);
}

// The type of a number in the loops of fused.h.
template <typename T>
using Plain = std::conditional_t<std::is_same_v<T, float>, float, fused::Half>;

template <typename T>
Plain<T>* plain(T* numbers) {
  return reinterpret_cast<Plain<T>*>(numbers);
}

// Returns uninitialised memory for the left side of a product.
template <typename T>
Tensor left_side(int64_t rows, int64_t columns) {
  return at::empty({rows, width<T>(columns)}, c10::CppTypeToScalarType<T>::value);
}

// Sizes of queries [b, n, h, d] and keys [b, m, h, d]; consecutive rows of a head are h d elements
// apart.
struct Shape {
  int64_t b, h, n, m, d;
  int64_t stride() const { return h * d; }
};

Shape shape_of(const Tensor& q, const Tensor& k, int64_t heads) {
  return {q.size(0), heads, q.size(1), k.size(1), q.size(2) / heads};
}

template <typename T>
const T* head(const Tensor& x, const Shape& s, int64_t index) {
  return x.const_data_ptr<T>() + index / s.h * x.size(1) * s.stride() + index % s.h * s.d;
}

// 1 / sqrt(d) in two factors: a power of two, which multiplies bf16 numbers without rounding, and
// the rest (1 for a d of 16, 64 or 256), which multiplies fp32 sums.
struct Scale {
  float power, rest;
  explicit Scale(int64_t d) {
    const float whole = 1.0f / std::sqrt(static_cast<float>(d));
    power = std::exp2(std::floor(std::log2(whole)));
    rest = whole / power;
  }
};

// Returns the queries of a head, multiplied by the scale's power of two.
template <typename T>
Tensor scaled(Matrix<T> q) {
  const float scale = Scale(q.columns).power;
  const auto out = at::empty({q.rows, q.columns}, c10::CppTypeToScalarType<T>::value);
  T* to = const_cast<T*>(elements<T>(out));
  for (int64_t r = 0; r < q.rows; ++r)
    for (int64_t c = 0; c < q.columns; ++c)
      to[r * q.columns + c] = static_cast<T>(static_cast<float>(q.data[r * q.stride + c]) * scale);
  return out;
}

template <typename T>
Tensor packed(Matrix<T> in, bool on_its_side) {
  auto out = at::empty({even(in.rows) * even(in.columns)}, c10::CppTypeToScalarType<T>::value);
  T* to = const_cast<T*>(elements<T>(out));
  on_its_side ? pack_transposed(in, to) : pack(in, to);
  return out;
}

// Copies an fp32 block [rows, d], multiplied by `factor`, to the rows of a head.
template <typename T>
void store(const float* from, int64_t rows, int64_t d, float factor, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < d; ++c) to[r * stride + c] = static_cast<T>(from[r * d + c] * factor);
}

template <typename T>
void attend_head(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out, float* log_sums,
                 int64_t index) {
  const auto queries = scaled<T>({head<T>(q, s, index), s.n, s.d, s.stride()});
  const auto keys = packed<T>({head<T>(k, s, index), s.m, s.d, s.stride()}, true);
  const auto values = packed<T>({head<T>(v, s, index), s.m, s.d, s.stride()}, false);
  const auto rows = block_rows(s.n, s.m);
  auto scores = room({rows, s.m}), mixed = room({rows, s.d}), weights = left_side<T>(rows, s.m);
  const auto& loops = fused::loops<Plain<T>>();
  T* left = weights.template mutable_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>() + (head<T>(out, s, index) - out.const_data_ptr<T>());
  for (int64_t at = 0; at < s.n; at += rows) {
    const auto some = std::min(rows, s.n - at);
    multiply(some, s.m, s.d, elements<T>(queries) + at * s.d, s.d, elements<T>(keys), numbers(scores));
    for (int64_t r = 0; r < some; ++r)
      log_sums[at + r] =
          loops.softmax(numbers(scores) + r * s.m, s.m, Scale(s.d).rest, plain(left + r * width<T>(s.m)), width<T>(s.m));
    multiply(some, s.d, width<T>(s.m), left, width<T>(s.m), elements<T>(values), numbers(mixed));
    store(numbers(mixed), some, s.d, 1.0f, to + at * s.stride(), s.stride());
  }
}

struct Gradients {
  Tensor q, k, v;
};

// Copies the transposed of a block [d, rows], multiplied by `factor`, to the rows of a head.
void store_transposed(const float* from, int64_t rows, int64_t d, float factor, float* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < d; ++c) to[r * stride + c] = from[c * rows + r] * factor;
}

// Tiles of the backward pass in fp32: two of scores, and what is multiplied with them, fit a second-level cache.
constexpr int64_t TILE_QUERIES = 128, TILE_KEYS = 512;

// Calculates the gradients of one head in fp32 with five products a tile. Those of keys and values are made
// transposed: then a tile of weights is the right side of their products, and need not be transposed itself.
void attend_head_backward(const Shape& s, const variable_list& saved, const Tensor& g, Gradients& to, int64_t index) {
  const auto& [q, k, v, out, all_log_sums] = std::tie(saved[0], saved[1], saved[2], saved[3], saved[4]);
  const auto rows_of = [&](const Tensor& x, int64_t rows) {
    return Matrix<float>{head<float>(x, s, index), rows, s.d, s.stride()};
  };
  const auto target = [&](Tensor& x, int64_t row) {
    return x.mutable_data_ptr<float>() + (head<float>(x, s, index) - x.const_data_ptr<float>()) + row * s.stride();
  };
  // Pack the four inputs, and sum the gradients of each query's weights.
  const Scale scale(s.d);
  const auto queries = scaled<float>(rows_of(q, s.n));
  const auto queries_t = packed(Matrix<float>{elements<float>(queries), s.n, s.d, s.d}, true);
  const auto keys = packed(rows_of(k, s.m), false), keys_t = packed(rows_of(k, s.m), true);
  const auto values_t = packed(rows_of(v, s.m), true), g_t = packed(rows_of(g, s.n), true);
  const auto item = [&](const Tensor& x) { return x.select(0, index / s.h).narrow(1, index % s.h * s.d, s.d); };
  const auto delta = (item(g) * item(out)).sum(1);  // [n]
  const float* log_sums = elements<float>(all_log_sums) + index * s.n;
  // Add up the gradients: of keys and values over the queries, of queries over the tiles of keys.
  auto of_queries = room({s.n, s.d}), p = room({TILE_QUERIES, TILE_KEYS}), dp = room({TILE_QUERIES, TILE_KEYS});
  auto of_keys = room({s.d, TILE_KEYS}), of_values = room({s.d, TILE_KEYS});
  const auto& loops = fused::loops<float>();
  for (int64_t key = 0; key < s.m; key += TILE_KEYS) {
    const auto width = std::min(TILE_KEYS, s.m - key);
    const Rows<float> weights{numbers(p), width}, of_scores{numbers(dp), width};
    const auto readable = [](Rows<float> x) { return Rows<const float>{x.data, x.stride}; };
    for (int64_t at = 0; at < s.n; at += TILE_QUERIES) {
      const auto some = std::min(TILE_QUERIES, s.n - at);
      const auto g_rows = rows_of(g, s.n).data + at * s.stride();
      multiply<float>(some, width, s.d, {elements<float>(queries) + at * s.d, s.d},
                      {elements<float>(keys_t) + key, s.m}, weights);
      multiply<float>(some, width, s.d, {g_rows, s.stride()}, {elements<float>(values_t) + key, s.m}, of_scores);
      for (int64_t r = 0; r < some; ++r)
        loops.weights_and_gradients(weights.data + r * width, of_scores.data + r * width, width, scale.rest,
                                    log_sums[at + r], elements<float>(delta)[at + r]);
      const Rows<float> of_values_t{numbers(of_values), width}, of_keys_t{numbers(of_keys), width};
      multiply<float>(s.d, width, some, {elements<float>(g_t) + at, s.n}, readable(weights), of_values_t, at > 0);
      multiply<float>(s.d, width, some, {elements<float>(queries_t) + at, s.n}, readable(of_scores), of_keys_t, at > 0);
      multiply<float>(some, s.d, width, readable(of_scores), {elements<float>(keys) + key * s.d, s.d},
                      {numbers(of_queries) + at * s.d, s.d}, key > 0);
    }
    store_transposed(numbers(of_values), width, s.d, 1.0f, target(to.v, key), s.stride());
    store_transposed(numbers(of_keys), width, s.d, scale.rest, target(to.k, key), s.stride());
  }
  store(numbers(of_queries), s.n, s.d, scale.power * scale.rest, target(to.q, 0), s.stride());
}

// Calculates the gradients of one head in bf16: those of the queries over blocks of queries, then those of
// keys and values over blocks of keys. The second part recomputes the transposed weights: the right side of a
// product in bf16 would have to be interleaved, which costs more.
template <typename T>
void attend_head_backward_low(const Shape& s, const variable_list& saved, const Tensor& g, Gradients& to,
                              int64_t index) {
  const auto& [q, k, v, out] = std::tie(saved[0], saved[1], saved[2], saved[3]);
  const auto rows_of = [&](const Tensor& x, int64_t rows) {
    return Matrix<T>{head<T>(x, s, index), rows, s.d, s.stride()};
  };
  const auto target = [&](Tensor& x) { return x.mutable_data_ptr<T>() + (head<T>(x, s, index) - x.const_data_ptr<T>()); };
  const Scale scale(s.d);
  const auto queries = scaled<T>(rows_of(q, s.n));
  const Matrix<T> scaled_rows{elements<T>(queries), s.n, s.d, s.d};
  const auto& loops = fused::loops<Plain<T>>();
  auto log_sums = room({s.n});
  const auto item = [&](const Tensor& x) { return x.select(0, index / s.h).narrow(1, index % s.h * s.d, s.d); };
  auto delta = (item(g).to(at::kFloat) * item(out).to(at::kFloat)).sum(1);  // [n]
  {
    const auto keys = packed(rows_of(k, s.m), true), values = packed(rows_of(v, s.m), true);
    const auto key_rows = packed(rows_of(k, s.m), false);
    const auto rows = block_rows(s.n, s.m);
    auto p = room({rows, s.m}), dp = room({rows, s.m}), block = room({rows, s.d}), of_scores = left_side<T>(rows, s.m);
    T* left = of_scores.template mutable_data_ptr<T>();
    for (int64_t at = 0; at < s.n; at += rows) {
      const auto some = std::min(rows, s.n - at);
      multiply(some, s.m, s.d, scaled_rows.data + at * s.d, s.d, elements<T>(keys), numbers(p));
      multiply(some, s.m, s.d, rows_of(g, s.n).data + at * s.stride(), s.stride(), elements<T>(values), numbers(dp));
      for (int64_t r = 0; r < some; ++r)
        numbers(log_sums)[at + r] =
            loops.softmax_backward(numbers(p) + r * s.m, numbers(dp) + r * s.m, s.m, scale.rest, numbers(delta)[at + r],
                                   plain(left + r * width<T>(s.m)), width<T>(s.m));
      multiply(some, s.d, width<T>(s.m), left, width<T>(s.m), elements<T>(key_rows), numbers(block));
      store(numbers(block), some, s.d, scale.power * scale.rest, target(to.q) + at * s.stride(), s.stride());
    }
  }
  const auto queries_t = packed(scaled_rows, true), g_t = packed(rows_of(g, s.n), true);
  const auto query_rows = packed(scaled_rows, false), g_rows = packed(rows_of(g, s.n), false);
  const auto rows = block_rows(s.m, s.n);
  auto p = room({rows, s.n}), dp = room({rows, s.n}), block = room({rows, s.d});
  auto weights = left_side<T>(rows, s.n), of_scores = left_side<T>(rows, s.n);
  T* left = weights.template mutable_data_ptr<T>();
  T* left_of_scores = of_scores.template mutable_data_ptr<T>();
  for (int64_t at = 0; at < s.m; at += rows) {
    const auto some = std::min(rows, s.m - at);
    multiply(some, s.n, s.d, rows_of(k, s.m).data + at * s.stride(), s.stride(), elements<T>(queries_t), numbers(p));
    multiply(some, s.n, s.d, rows_of(v, s.m).data + at * s.stride(), s.stride(), elements<T>(g_t), numbers(dp));
    for (int64_t r = 0; r < some; ++r) {
      const auto place = r * width<T>(s.n);
      loops.weights_on_their_side(numbers(p) + r * s.n, numbers(dp) + r * s.n, s.n, scale.rest, numbers(log_sums),
                                  numbers(delta), plain(left + place), plain(left_of_scores + place), width<T>(s.n));
    }
    multiply(some, s.d, width<T>(s.n), left, width<T>(s.n), elements<T>(g_rows), numbers(block));
    store(numbers(block), some, s.d, 1.0f, target(to.v) + at * s.stride(), s.stride());
    multiply(some, s.d, width<T>(s.n), left_of_scores, width<T>(s.n), elements<T>(query_rows), numbers(block));
    store(numbers(block), some, s.d, scale.rest, target(to.k) + at * s.stride(), s.stride());
  }
}

template <typename Act>
void for_each_head(const Shape& s, at::ScalarType type, Act act) {
  at::parallel_for(0, s.b * s.h, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_graph;
    for (int64_t index = begin; index < end; ++index) {
      if (type == at::kFloat) {
        act(index, float{});
      } else {
        act(index, at::BFloat16{});
      }
    }
  });
}

// softmax(q k^T / sqrt(d)) v for [b, n, h d], [b, m, h d]. `widens` calculates in fp32 what is stored in bf16.
struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* context, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                        int64_t heads, bool widens) {
    const auto q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous();
    const auto s = shape_of(q, k, heads);
    const auto type = widens ? at::kFloat : q.scalar_type();
    const auto queries = q.to(type), keys = k.to(type), values = v.to(type);
    auto mixed = at::empty_like(queries), log_sums = room({s.b * s.h, s.n});
    for_each_head(s, type, [&](int64_t index, auto number) {
      attend_head<decltype(number)>(s, queries, keys, values, mixed, numbers(log_sums) + index * s.n, index);
    });
    const auto out = mixed.to(q.scalar_type());
    context->saved_data["heads"] = heads;
    context->saved_data["widens"] = widens;
    context->save_for_backward({q, k, v, out, type == at::kFloat ? log_sums : Tensor()});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    const auto stored = saved[0].scalar_type();
    const auto type = context->saved_data["widens"].toBool() ? at::kFloat : stored;
    const auto s = shape_of(saved[0], saved[1], context->saved_data["heads"].toInt());
    for (int i = 0; i < 4; ++i) saved[i] = saved[i].to(type);
    const auto g = gradients[0].contiguous().to(type);
    Gradients to{at::empty_like(saved[0]), at::empty_like(saved[1]), at::empty_like(saved[2])};
    for_each_head(s, type, [&](int64_t index, auto number) {
      if constexpr (std::is_same_v<decltype(number), float>) {
        attend_head_backward(s, saved, g, to, index);
      } else {
        attend_head_backward_low<decltype(number)>(s, saved, g, to, index);
      }
    });
    return {to.q.to(stored), to.k.to(stored), to.v.to(stored), Tensor(), Tensor()};
  }
};

// Returns true if this processor has the kernel and the kernel behaves as described above.
template <typename T>
bool probe() {
  try {
    const T a[4] = {T(1), T(2), T(3), T(4)};
    T b[4];
    pack(Matrix<T>{a, 2, 2, 2}, b);
    float out[4] = {};
    multiply(2, 2, 2, a, 2, b, out);
    return out[0] == 7 && out[1] == 10 && out[2] == 15 && out[3] == 22;
  } catch (...) {
    return false;
  }
}

}  // namespace

extern "C" {

int rectiflow_has_attention(int low) {
  static const bool in_fp32 = probe<float>(), in_bf16 = probe<at::BFloat16>();
  return low ? in_bf16 : in_fp32;
}

char* rectiflow_attention(const Tensor* q, const Tensor* k, const Tensor* v, int64_t heads, int widens, Tensor** out) {
  return guarded([&] { *out = new Tensor(Attention::apply(*q, *k, *v, heads, widens != 0)); });
}

}  // extern "C"
