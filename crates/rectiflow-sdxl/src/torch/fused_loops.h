// The loops of fused.cpp, over LANES numbers at a time. Included once for each instruction set, in
// a separate namespace under its `target`, because the compiler lowers vector types function by
// function, before inlining.
//
// T is float or Half, the bits of a bf16 number. All arithmetic is fp32.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef Half Halves __attribute__((vector_size(2 * LANES)));

inline Floats all(float x) { return x - Floats{}; }

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const Half* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Rounds to the nearest bf16, ties to even; NaN stays NaN.
inline void store(Half* to, Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nothing = Words{} + 0x7fc0u;
  const Words chosen = x == x ? rounded : nothing;
  const Halves low = __builtin_convertvector(chosen, Halves);
  std::memcpy(to, &low, sizeof low);
}

// Loads the first `count` elements of a vector; the others are zero.
template <typename T>
Floats load(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T room[LANES] = {};
  std::memcpy(room, from, count * sizeof(T));
  return load(room);
}

template <typename T>
void store(T* to, Floats x, int64_t count) {
  if (count >= LANES) return store(to, x);
  T room[LANES];
  store(room, x);
  std::memcpy(to, room, count * sizeof(T));
}

inline Floats smaller(Floats a, Floats b) { return b < a ? b : a; }
inline Floats larger(Floats a, Floats b) { return b > a ? b : a; }

inline double sum(Floats x) {
  double total = 0;
  for (int64_t i = 0; i < LANES; ++i) total += x[i];
  return total;
}

// Returns e^x to two units in the last place, for results from 1e-38 to 1e38. NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats clamped = larger(smaller(x, all(88.0f)), all(-87.0f));
  const Floats shift = all(12582912.0f);  // 1.5 * 2^23: leaves whole numbers only
  const Floats shifted = clamped * 1.44269504f + shift;
  const Floats n = shifted - shift;
  const Floats r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = all(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + factor;
  const Ints power = ((Ints)shifted - 0x4b400000 + 127) << 23;
  const Floats y = p * (Floats)power;
  return x == x ? y : x;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

struct Gelu {
  Floats share;    // of the normal distribution below x
  Floats density;  // of the normal distribution at x
};

// erfc(z) e^(z^2) is a polynomial in 1 / (1 + 0.55 z) with a relative error of 2e-7, for z from 0
// to 10: fitted to erfc by weighted least squares until the largest error was minimal (2026-11-25).
// One exponential serves both results.
inline Gelu normal(Floats x) {
  const Floats size = x < 0.0f ? -x : x;
  const Floats e = exponential(-0.5f * x * x);
  const Floats t = 1.0f / (1.0f + (0.55f * 0.70710678f) * size);
  Floats p = all(0.0580438264f);
  for (const float factor : {-0.336638927f, 0.781205118f, -0.853375912f, 0.363917828f, -0.0949719548f, 0.202043042f,
                             0.258821547f, 0.310663372f, 0.310292095f})
    p = p * t + factor;
  const Floats tail = 0.5f * p * t * e;
  return {x < 0.0f ? tail : 1.0f - tail, 0.39894228f * e};
}

// Calculates value * gelu(gate) for a row [2 d] of values and gates.
template <typename T>
void gated(const T* row, int64_t d, T* out) {
  for (int64_t i = 0; i < d; i += LANES) {
    const auto count = d - i;
    const Floats value = load(row + i, count), gate = load(row + d + i, count);
    store(out + i, value * (gate * normal(gate).share), count);
  }
}

template <typename T>
void gated_backward(const T* row, const T* gradient, int64_t d, T* out) {
  for (int64_t i = 0; i < d; i += LANES) {
    const auto count = d - i;
    const Floats value = load(row + i, count), gate = load(row + d + i, count), g = load(gradient + i, count);
    const Gelu at = normal(gate);
    store(out + i, g * (gate * at.share), count);
    store(out + d + i, g * value * (at.share + gate * at.density), count);
  }
}

// Returns the sum over n numbers, in fp64 between blocks of 64 vectors.
template <typename T, typename Of>
double sum_of(const T* x, int64_t n, Of of) {
  constexpr int64_t BLOCK = 64 * LANES;
  double total = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const auto end = std::min(n, start + BLOCK);
    const auto whole = start + (end - start) / LANES * LANES;
    Floats part{};
    for (int64_t i = start; i < whole; i += LANES) part += of(load(x + i));
    total += sum(part);
    for (int64_t i = whole; i < end; ++i) {
      T room[LANES] = {x[i]};
      total += of(load(room))[0];
    }
  }
  return total;
}

// Calculates silu(weight * (x - mean) / deviation + bias) for one group of consecutive channels.
template <typename T>
void norm_silu(const Group& group, const T* x, T* out, float eps, float* mean, float* rstd) {
  const auto n = group.channels * group.pixels;
  const float middle = static_cast<float>(sum_of(x, n, [](Floats v) { return v; }) / n);
  const double squares = sum_of(x, n, [middle](Floats v) { return (v - middle) * (v - middle); });
  *mean = middle;
  *rstd = static_cast<float>(1.0 / std::sqrt(squares / n + eps));
  for (int64_t c = 0; c < group.channels; ++c) {
    const float scale = *rstd * group.weight[c], shift = group.bias[c] - middle * scale;
    for (int64_t i = 0; i < group.pixels; i += LANES) {
      const auto count = group.pixels - i;
      const auto at = c * group.pixels + i;
      const Floats y = load(x + at, count) * scale + shift;
      store(out + at, y * sigmoid(y), count);
    }
  }
}

// Calculates the gradients of the group's input and of its channels' weights and biases. `room` has
// one float per number of the group.
template <typename T>
void norm_silu_backward(const Group& group, const T* x, const T* gradient, float mean, float rstd, T* out,
                        float* weight_gradient, float* bias_gradient, float* room) {
  double of_mean = 0, of_deviation = 0;
  for (int64_t c = 0; c < group.channels; ++c) {
    const float weight = group.weight[c], bias = group.bias[c];
    double sum_g = 0, sum_gx = 0;
    for (int64_t start = 0; start < group.pixels; start += 64 * LANES) {
      Floats part_g{}, part_gx{};
      const auto end = std::min(group.pixels, start + 64 * LANES);
      for (int64_t i = start; i < end; i += LANES) {
        const auto count = end - i;
        const auto at = c * group.pixels + i;
        const Floats normed = (load(x + at, count) - mean) * rstd;
        const Floats y = normed * weight + bias, s = sigmoid(y);
        const Floats g = load(gradient + at, count) * (s * (1.0f + y * (1.0f - s)));  // 0 beyond the end
        store(room + at, g, count);
        part_g += g;
        part_gx += g * normed;
      }
      sum_g += sum(part_g);
      sum_gx += sum(part_gx);
    }
    weight_gradient[c] = static_cast<float>(sum_gx);
    bias_gradient[c] = static_cast<float>(sum_g);
    of_mean += weight * sum_g;
    of_deviation += weight * sum_gx;
  }
  const auto n = static_cast<double>(group.channels * group.pixels);
  const float a = static_cast<float>(of_mean / n), b = static_cast<float>(of_deviation / n);
  for (int64_t c = 0; c < group.channels; ++c) {
    const float weight = group.weight[c];
    for (int64_t i = 0; i < group.pixels; i += LANES) {
      const auto count = group.pixels - i;
      const auto at = c * group.pixels + i;
      const Floats normed = (load(x + at, count) - mean) * rstd;
      store(out + at, rstd * (load(room + at, count) * weight - a - normed * b), count);
    }
  }
}

// For attention: replaces a row of scores [m] by exp(score * scale - top), and returns their sum.
inline double exponentials(float* row, int64_t m, float scale, float top) {
  double total = 0;
  Floats part{};
  for (int64_t i = 0; i < m; i += LANES) {
    const Floats e = exponential(load(row + i, m - i) * scale - top);
    store(row + i, e, m - i);
    if (m - i >= LANES) {
      part += e;
    } else {
      for (int64_t j = 0; j < m - i; ++j) total += e[j];
    }
  }
  return total + sum(part);
}

// Calculates the softmax of a row of scores [m], multiplied by `scale` first. `out` has `width` >=
// m numbers, zero beyond m, and can be the row itself. Returns the logarithm of the row's sum, from
// which the weights can be recomputed.
template <typename T>
float softmax(float* row, int64_t m, float scale, T* out, int64_t width) {
  Floats most = all(-INFINITY);
  for (int64_t i = 0; i < m; i += LANES) {
    const Floats x = load(row + i, m - i) * scale;
    if (m - i >= LANES) {
      most = larger(most, x);
    } else {
      for (int64_t j = 0; j < m - i; ++j) most[j] = std::max(most[j], x[j]);
    }
  }
  float top = most[0];
  for (int64_t i = 1; i < LANES; ++i) top = std::max(top, most[i]);
  const double total = exponentials(row, m, scale, top);
  const float factor = static_cast<float>(1.0 / total);
  for (int64_t i = 0; i < m; i += LANES) store(out + i, load(row + i, m - i) * factor, m - i);
  for (int64_t i = m; i < width; ++i) out[i] = T(0);
  return top + static_cast<float>(std::log(total));
}

// Replaces a row of scores [m] by its weights, and the gradients of the weights by those of the scores:
// weight * (gradient - delta).
inline void weights_and_gradients(float* row, float* gradient, int64_t m, float scale, float log_sum, float delta) {
  for (int64_t i = 0; i < m; i += LANES) {
    const auto count = m - i;
    const Floats weight = exponential(load(row + i, count) * scale - log_sum);
    store(gradient + i, weight * (load(gradient + i, count) - delta), count);
    store(row + i, weight, count);
  }
}

// As `softmax`, followed by the gradient of the scores from that of the weights: weight * (gradient
// - delta).
template <typename T>
float softmax_backward(float* row, const float* gradient, int64_t m, float scale, float delta, T* out, int64_t width) {
  float top = -INFINITY;
  for (int64_t i = 0; i < m; ++i) top = std::max(top, row[i] * scale);
  const double total = exponentials(row, m, scale, top);
  const float factor = static_cast<float>(1.0 / total);
  for (int64_t i = 0; i < m; i += LANES)
    store(out + i, load(row + i, m - i) * factor * (load(gradient + i, m - i) - delta), m - i);
  for (int64_t i = m; i < width; ++i) out[i] = T(0);
  return top + static_cast<float>(std::log(total));
}

// The same for the transposed matrix: a row has one key's scores for all queries [n], each of which
// has its own sum and delta. Calculates both the weights and the gradients.
template <typename T>
void weights_on_their_side(const float* row, const float* gradient, int64_t n, float scale, const float* log_sums,
                           const float* delta, T* weights, T* gradients, int64_t width) {
  for (int64_t i = 0; i < n; i += LANES) {
    const auto count = n - i;
    const Floats weight = exponential(load(row + i, count) * scale - load(log_sums + i, count));
    const Floats of_score = weight * (load(gradient + i, count) - load(delta + i, count));
    store(weights + i, weight, count);
    store(gradients + i, of_score, count);
  }
  for (int64_t i = n; i < width; ++i) weights[i] = gradients[i] = T(0);
}
