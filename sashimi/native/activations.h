// GELU, its slope, and the logistic function, on vectors; in float32 by polynomials, which activations.py fits.

#pragma once

#include <cmath>
#include <cstdint>

constexpr int BYTES = 64;  // of a vector: a register of AVX-512, two of AVX

// Unaligned, as numbers lie in tensors.
typedef float V32 __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t I32 __attribute__((vector_size(BYTES)));
typedef double V64 __attribute__((vector_size(BYTES), aligned(8), may_alias));

constexpr float ERF_END = 4;    // erf is 1 from here on, in float32
constexpr float SLOPE_END = 6;  // so is GELU's slope

// Highest power first: erf(z) / z for |z| <= ERF_END in s = 2 (z / ERF_END)^2 - 1; exp(r) for |r| <= ln(2) / 2 in r;
// (GELU'(x) - 1/2) / x for |x| <= SLOPE_END in s = 2 (x / SLOPE_END)^2 - 1.
struct Tables { float erf[19], exp[8], slope[22]; };

inline V32 clamp(V32 x, float low, float high) {
    const V32 a = low - V32{}, b = high - V32{};
    x = x < a ? a : x;
    return x > b ? b : x;
}

template <int N> inline V32 polynomial(const float (&coefficients)[N], V32 s) {
    V32 p = coefficients[0] - V32{};
#pragma GCC unroll 32
    for (int i = 1; i < N; i++) p = p * s + coefficients[i];
    return p;
}

inline V32 gelu(V32 x, const Tables& t) {
    const V32 z = clamp(x * 0.70710678118654752f, -ERF_END, ERF_END), s = z * z * (2 / (ERF_END * ERF_END)) - 1;
    return 0.5f * x * (1 + clamp(polynomial(t.erf, s) * z, -1, 1));
}

inline V32 gelu_slope(V32 x, const Tables& t) {
    const V32 z = clamp(x, -SLOPE_END, SLOPE_END), s = z * z * (2 / (SLOPE_END * SLOPE_END)) - 1;
    return 0.5f + polynomial(t.slope, s) * z;
}

inline V32 sigmoid(V32 x, const Tables& t) {
    const V32 y = clamp(-x, -87, 87);
    const I32 n = __builtin_convertvector(y * 1.44269504f + (y < 0 ? -0.5f - V32{} : 0.5f - V32{}), I32);
    const V32 whole = __builtin_convertvector(n, V32), r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
    const I32 bits = (n + 127) << 23;
    return 1 / (1 + polynomial(t.exp, r) * (V32)bits);
}

inline V64 gelu(V64 x, const Tables&) {
    for (int i = 0; i < 8; i++) x[i] = 0.5 * x[i] * (1 + std::erf(x[i] * 0.70710678118654752440));
    return x;
}

inline V64 sigmoid(V64 x, const Tables&) {
    for (int i = 0; i < 8; i++) x[i] = 1 / (1 + std::exp(-x[i]));
    return x;
}
