// Products of matrices, and their transposes, for what the nearer caches hold: a channel's state space, rows of layers.
//
// Matrices are row-major. Where no more is said, a row is a number of whole vectors and begins at a multiple of BYTES.
// Written for gcc's and clang's vector extensions, so for any instruction set.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
constexpr int BYTES = 64, COLUMNS = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, COLUMNS = 2;
#elif defined(__aarch64__)
constexpr int BYTES = 16, COLUMNS = 4;
#else
constexpr int BYTES = 16, COLUMNS = 2;
#endif
constexpr int ROWS = 6;  // of a tile of a product, COLUMNS vectors wide: what fits in registers

template <class F> struct Vector {
    typedef F V __attribute__((vector_size(BYTES), may_alias));
    typedef std::conditional_t<sizeof(F) == 4, int32_t, int64_t> Place __attribute__((vector_size(BYTES)));
    static constexpr int64_t W = BYTES / sizeof(F);
};

// The vector that begins at a multiple of BYTES.
template <class F> typename Vector<F>::V& at(F* x) { return *(typename Vector<F>::V*)x; }
template <class F> const typename Vector<F>::V& at(const F* x) { return *(const typename Vector<F>::V*)x; }

// Memory that begins where a line of the cache does, with whatever is there, unless it is told what.
template <class F> struct Aligned {
    using value_type = F;
    Aligned() = default;
    template <class G> Aligned(const Aligned<G>&) {}
    F* allocate(size_t n) { return (F*)::operator new(n * sizeof(F), std::align_val_t(64)); }
    template <class G> void construct(G* place) { ::new (place) G; }
    void deallocate(F* memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
template <class F> using Numbers = std::vector<F, Aligned<F>>;

// Unrolled before anything else is done, the sums are in registers from the first to the last.
#define UNROLLED _Pragma("GCC unroll 8")

template <class F, int R, int Q>
inline void tile(int64_t k, const F* A, int64_t row, int64_t col, const F* B, int64_t ldb, F* C, int64_t ldc,
                 const F* plus, int64_t ldp) {
    using V = typename Vector<F>::V;
    constexpr int64_t W = Vector<F>::W;
    V sum[R][Q];
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int q = 0; q < Q; q++) sum[r][q] = V{};
    for (int64_t i = 0; i < k; i++) {
        V b[Q];
        UNROLLED for (int q = 0; q < Q; q++) b[q] = at(B + i * ldb + q * W);
        UNROLLED for (int r = 0; r < R; r++) {
            const F a = A[r * row + i * col];
            UNROLLED for (int q = 0; q < Q; q++) sum[r][q] += a * b[q];
        }
    }
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int q = 0; q < Q; q++)
            at(C + r * ldc + q * W) = plus ? at(plus + r * ldp + q * W) + sum[r][q] : sum[r][q];
}

template <class F, int R>
void tiles(int64_t n, int64_t k, const F* A, int64_t row, int64_t col, const F* B, int64_t ldb, F* C, int64_t ldc,
           const F* plus, int64_t ldp) {
    const auto columns = [&](auto count, int64_t j) {
        tile<F, R, count.value>(k, A, row, col, B + j, ldb, C + j, ldc, plus ? plus + j : nullptr, ldp);
        return j + count.value * Vector<F>::W;
    };
    int64_t j = 0;
    while (j + COLUMNS * Vector<F>::W <= n) j = columns(std::integral_constant<int, COLUMNS>(), j);
    while (j + 2 * Vector<F>::W <= n) j = columns(std::integral_constant<int, 2>(), j);
    while (j < n) j = columns(std::integral_constant<int, 1>(), j);
}

// C = A B + plus, rows of which begin `ldp` apart: it may be C, or one row, with 0; or null. A (m, k) lies anywhere, by
// strides `row` and `col`.
template <class F>
void multiply(int64_t m, int64_t n, int64_t k, const F* A, int64_t row, int64_t col, const F* B, int64_t ldb, F* C,
              int64_t ldc, const F* plus, int64_t ldp) {
    const auto rows = [&](auto count) {
        tiles<F, count.value>(n, k, A, row, col, B, ldb, C, ldc, plus, ldp);
        m -= count.value, A += count.value * row, C += count.value * ldc, plus += plus ? count.value * ldp : 0;
    };
    while (m >= ROWS) rows(std::integral_constant<int, ROWS>());
    while (m >= 2) rows(std::integral_constant<int, 2>());
    if (m == 1) rows(std::integral_constant<int, 1>());
}

// C = A B, or C += A B.
template <class F>
void multiply(int64_t m, int64_t n, int64_t k, const F* A, int64_t row, int64_t col, const F* B, int64_t ldb, F* C,
              int64_t ldc, bool add) {
    multiply<F>(m, n, k, A, row, col, B, ldb, C, ldc, add ? C : nullptr, ldc);
}

template <class F> F dot(const F* x, const F* y, int64_t n) {
    typename Vector<F>::V products{};
    for (int64_t i = 0; i < n; i += Vector<F>::W) products += at(x + i) * at(y + i);
    F sum = 0;
    for (int64_t i = 0; i < Vector<F>::W; i++) sum += products[i];
    return sum;
}

#if defined(__clang__)
#define SHUFFLE(F, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(F, a, b, ...) __builtin_shuffle(a, b, typename Vector<F>::Place{__VA_ARGS__})
#endif

// Columns of W rows of W numbers become rows: of the first and second halves of the rows, the upper right and the lower
// left quarter change places, then likewise within each quarter, and so on.
template <class F, int64_t STEP, int... J>
inline void exchange(typename Vector<F>::V* v, std::integer_sequence<int, J...>) {
    using V = typename Vector<F>::V;
    constexpr int W = Vector<F>::W;
    for (int64_t i = 0; i < W; i++)
        if (!(i & STEP)) {
            const V upper = v[i], lower = v[i + STEP];
            v[i] = SHUFFLE(F, upper, lower, (J & STEP ? W + J - STEP : J)...);
            v[i + STEP] = SHUFFLE(F, upper, lower, (J & STEP ? W + J : J + STEP)...);
        }
    if constexpr (STEP > 1) exchange<F, STEP / 2>(v, std::integer_sequence<int, J...>());
}

// x (m, n), whose rows begin `row` apart -> y (n, m), whose rows begin `col` apart; wherever they lie.
template <class F> void transpose(const F* x, int64_t m, int64_t n, int64_t row, F* y, int64_t col) {
    constexpr int64_t W = Vector<F>::W;
    for (int64_t i = 0; i < m; i += W)
        for (int64_t j = 0; j < n; j += W) {
            if (i + W <= m && j + W <= n) {
                typename Vector<F>::V block[W];
                for (int64_t k = 0; k < W; k++) std::memcpy(&block[k], x + (i + k) * row + j, BYTES);
                exchange<F, W / 2>(block, std::make_integer_sequence<int, W>());
                for (int64_t k = 0; k < W; k++) std::memcpy(y + (j + k) * col + i, &block[k], BYTES);
            } else {
                for (int64_t k = i; k < std::min(i + W, m); k++)
                    for (int64_t l = j; l < std::min(j + W, n); l++) y[l * col + k] = x[k * row + l];
            }
        }
}
