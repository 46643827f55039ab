// GELU, its slope, and the logistic function, on vectors; in float32 by what activations.py fits.

#pragma once

#include <cmath>
#include <cstdint>

// A register of AVX-512, two of AVX. Unaligned, as numbers lie in tensors.
typedef float V32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef double V64 __attribute__((vector_size(64), aligned(8), may_alias));

constexpr float END = 5.75;  // from here on GELU is x, and before -END it is 0, in float32

// Highest power first: (Φ(x) - 1/2) / x for |x| <= END is above / below, in x^2; exp(r) for |r| <= ln(2) / 2.
struct Tables { float above[6], below[6], exp[7]; };

inline V32 clamp(V32 x, float low, float high) {
    const V32 a = low - V32{}, b = high - V32{};
    x = x < a ? a : x;
    return x > b ? b : x;
}

template <int N> inline V32 polynomial(const float (&coefficients)[N], V32 x) {
    V32 p = coefficients[0] - V32{};
#pragma GCC unroll 32
    for (int i = 1; i < N; i++) p = p * x + coefficients[i];
    return p;
}

inline V32 exp(V32 x, const Tables& t) {  // |x| <= 87
    const I32 n = __builtin_convertvector(x * 1.44269504f + (x < 0 ? -0.5f - V32{} : 0.5f - V32{}), I32);
    const V32 whole = __builtin_convertvector(n, V32), r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    const I32 power = (n + 127) << 23;
    return polynomial(t.exp, r) * (V32)power;
}

inline V32 sigmoid(V32 x, const Tables& t) { return 1 / (1 + exp(clamp(-x, -87, 87), t)); }

struct Gelu { V32 value, slope; };  // x Φ(x), and Φ(x) + x φ(x)

inline Gelu gelu_and_slope(V32 x, const Tables& t) {
    const V32 c = clamp(x, -END, END), square = c * c;
    V32 normal = 0.5f + c * polynomial(t.above, square) / polynomial(t.below, square);
    V32 density = 0.39894228f * exp(-0.5f * square, t);
    normal = x < -END ? V32{} : normal;  // else large numbers times what is left of it
    density = c != x ? V32{} : density;
    return {x * normal, normal + c * density};
}

inline V32 gelu(V32 x, const Tables& t) { return gelu_and_slope(x, t).value; }

inline V64 gelu(V64 x, const Tables&) {
    for (int i = 0; i < 8; i++) x[i] = 0.5 * x[i] * (1 + std::erf(x[i] * 0.70710678118654752440));
    return x;
}

inline V64 sigmoid(V64 x, const Tables&) {
    for (int i = 0; i < 8; i++) x[i] = 1 / (1 + std::exp(-x[i]));
    return x;
}
