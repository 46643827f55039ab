// The recurrence over whole signals in chunks, forward and back: what scan.py does with PyTorch's products, one channel
// at a time, so that all of a channel stays in the nearer caches.
//
// States are rows: a chunk of T samples u that begins in state x gives y = u direct + x outsᵀ and ends in x M + u cols,
// cols being in reverse, and M the transpose of A^T. A = rotation(decay) − a bᵀ, so each of A^j B, C A^j, A^j a and
// b rotation(decay)^j follows from the one before with O(N) work, and
//
//     A^T = rotation(decay)^T − Σ_j (A^j a) (bᵀ rotation(decay)^{T−1−j})
//
// is one product, where squaring A would take six.
//
// Shapes: B batch, L samples, H channels, N real states, [real parts, imaginary parts], each half padded with zeros to
// whole vectors; chunks of T samples, n of them a signal. Matrices are row-major.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, COLUMNS = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, COLUMNS = 2;
#elif defined(__aarch64__)
constexpr int BYTES = 16, COLUMNS = 4;
#else
constexpr int BYTES = 16, COLUMNS = 2;
#endif
constexpr int ROWS = 6;        // of a tile of a product, COLUMNS vectors wide: what fits in registers
constexpr int64_t T = 64;      // samples of a chunk
constexpr int64_t BLOCK = 60;  // chunks at a time, which with all that comes of them stay in the nearer caches
constexpr int64_t GROUP = 16;  // channels that are read and written together, at most: of float, a line of the cache

template <class F> struct Vector {
    typedef F V __attribute__((vector_size(BYTES), aligned(sizeof(F)), may_alias));
    static constexpr int64_t W = BYTES / sizeof(F);
};

template <class F> typename Vector<F>::V& at(F* x) { return *(typename Vector<F>::V*)x; }
template <class F> const typename Vector<F>::V& at(const F* x) { return *(const typename Vector<F>::V*)x; }

// --- products ------------------------------------------------------------------------------------------------------

template <class F, int R, int Q>
inline void tile(int64_t k, const F* A, int64_t row, int64_t col, const F* B, int64_t ldb, F* C, int64_t ldc,
                 bool add) {
    using V = typename Vector<F>::V;
    constexpr int64_t W = Vector<F>::W;
    V sum[R][Q];
    for (int r = 0; r < R; r++)
        for (int q = 0; q < Q; q++) sum[r][q] = add ? at(C + r * ldc + q * W) : V{};
    for (int64_t i = 0; i < k; i++) {
        V b[Q];
        for (int q = 0; q < Q; q++) b[q] = at(B + i * ldb + q * W);
        for (int r = 0; r < R; r++) {
            const F a = A[r * row + i * col];
            for (int q = 0; q < Q; q++) sum[r][q] += a * b[q];
        }
    }
    for (int r = 0; r < R; r++)
        for (int q = 0; q < Q; q++) at(C + r * ldc + q * W) = sum[r][q];
}

template <class F, int R>
void tiles(int64_t n, int64_t k, const F* A, int64_t row, int64_t col, const F* B, int64_t ldb, F* C, int64_t ldc,
           bool add) {
    constexpr int64_t W = Vector<F>::W;
    int64_t j = 0;
    for (; j + COLUMNS * W <= n; j += COLUMNS * W) tile<F, R, COLUMNS>(k, A, row, col, B + j, ldb, C + j, ldc, add);
    for (; j < n; j += W) tile<F, R, 1>(k, A, row, col, B + j, ldb, C + j, ldc, add);
}

// C = A B, or C += A B. A (m, k) lies by strides `row` and `col`; of B (k, n) and C (m, n) each row is contiguous, and
// n is a number of whole vectors.
template <class F>
void multiply(int64_t m, int64_t n, int64_t k, const F* A, int64_t row, int64_t col, const F* B, int64_t ldb, F* C,
              int64_t ldc, bool add) {
    for (; m >= ROWS; m -= ROWS, A += ROWS * row, C += ROWS * ldc)
        tiles<F, ROWS>(n, k, A, row, col, B, ldb, C, ldc, add);
    for (; m > 0; m--, A += row, C += ldc) tiles<F, 1>(n, k, A, row, col, B, ldb, C, ldc, add);
}

template <class F> F dot(const F* x, const F* y, int64_t n) {
    typename Vector<F>::V products{};
    for (int64_t i = 0; i < n; i += Vector<F>::W) products += at(x + i) * at(y + i);
    F sum = 0;
    for (int64_t i = 0; i < Vector<F>::W; i++) sum += products[i];
    return sum;
}

// x (m, n), whose rows begin `row` apart -> y (n, m).
template <class F> void transpose(const F* x, int64_t m, int64_t n, int64_t row, F* y) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) y[j * m + i] = x[i * row + j];
}

// --- one channel ---------------------------------------------------------------------------------------------------

// A x = rotation(re, im) x − a (b · x), or the gradients of its parts.
template <class F> struct System {
    using V = typename Vector<F>::V;
    static constexpr int64_t W = Vector<F>::W;
    int64_t P;  // modes: N/2, padded
    std::vector<F> re, im, a, b;

    explicit System(int64_t P) : P(P), re(P), im(P), a(2 * P), b(2 * P) {}

    void step(const F* x, F* y) const {
        const F w = dot(&b[0], x, 2 * P);
        for (int64_t i = 0; i < P; i += W) {
            const V x_re = at(x + i), x_im = at(x + P + i), c = at(&re[i]), s = at(&im[i]);
            at(y + i) = c * x_re - s * x_im - at(&a[i]) * w;
            at(y + P + i) = c * x_im + s * x_re - at(&a[P + i]) * w;
        }
    }
    // Back from y = A x: adds to d_x, and to the gradients of the parts of A.
    void step_gradient(const F* x, const F* d_y, F* d_x, System& d) const {
        const F w = dot(&b[0], x, 2 * P), v = dot(&a[0], d_y, 2 * P);
        for (int64_t i = 0; i < P; i += W) {
            const V x_re = at(x + i), x_im = at(x + P + i), d_re = at(d_y + i), d_im = at(d_y + P + i);
            const V c = at(&re[i]), s = at(&im[i]);
            at(&d.re[i]) += d_re * x_re + d_im * x_im;
            at(&d.im[i]) += d_im * x_re - d_re * x_im;
            at(&d.a[i]) -= d_re * w;
            at(&d.a[P + i]) -= d_im * w;
            at(&d.b[i]) -= x_re * v;
            at(&d.b[P + i]) -= x_im * v;
            at(d_x + i) += c * d_re + s * d_im - at(&b[i]) * v;
            at(d_x + P + i) += c * d_im - s * d_re - at(&b[P + i]) * v;
        }
    }
};

// A channel's matrices, made from its parameters.
template <class F> struct Channel {
    int64_t P, N;
    System<F> system, transposed, diagonal;     // diagonal: `transposed` without a and b
    std::vector<F> C, cols, outs, reach, feed;  // (N), then (T, N): A^j B, C A^(j+1), −A^j a, b rotation(decay)^j
    std::vector<F> kernel, M;                   // (T), K with D in its first place; (N, N)

    // parameters: decay's real and imaginary parts, a, b, B, C, D: 5 N + 1.
    Channel(const F* p, int64_t P)
        : P(P), N(2 * P), system(P), transposed(P), diagonal(P), C(p + 4 * N, p + 5 * N), cols(T * N), outs(T * N),
          reach(T * N), feed(T * N), kernel(T), M(N * N) {
        for (int64_t i = 0; i < P; i++) {
            system.re[i] = transposed.re[i] = diagonal.re[i] = p[i];
            system.im[i] = p[P + i];
            transposed.im[i] = diagonal.im[i] = -p[P + i];
        }
        for (int64_t i = 0; i < N; i++) {
            system.a[i] = transposed.b[i] = p[N + i];
            system.b[i] = transposed.a[i] = feed[i] = p[2 * N + i];
            reach[i] = -p[N + i];
            cols[i] = p[3 * N + i];
        }
        transposed.step(&C[0], &outs[0]);
        for (int64_t j = 0; j < (T - 1) * N; j += N) {  // side by side, as each step waits for the sum of its own
            system.step(&cols[j], &cols[j + N]);
            transposed.step(&outs[j], &outs[j + N]);
            system.step(&reach[j], &reach[j + N]);
            diagonal.step(&feed[j], &feed[j + N]);
        }
        for (int64_t j = 0; j < T; j++) kernel[j] = dot(&C[0], &cols[j * N], N);
        kernel[0] += p[5 * N];
        for (int64_t i = 0; i < P; i++) {
            F re = p[i], im = p[P + i];
            for (int64_t k = 1; k < T; k *= 2) {
                const F square = re * re - im * im;
                im = 2 * re * im;
                re = square;
            }
            M[i * N + i] = M[(P + i) * N + P + i] = re;
            M[i * N + P + i] = im;
            M[(P + i) * N + i] = -im;
        }
        multiply<F>(N, N, T, &feed[(T - 1) * N], 1, -N, &reach[0], N, &M[0], N, true);
    }

    // direct (T, T): u direct is the part of a chunk's output that its own samples make.
    std::vector<F> toeplitz() const {
        std::vector<F> matrix(T * T);
        for (int64_t i = 0; i < T; i++) std::copy_n(&kernel[0], T - i, &matrix[i * T + i]);
        return matrix;
    }
};

// What runs forward over a channel's signals, a block of chunks at a time.
template <class F> struct Forward : Channel<F> {
    using Channel<F>::N;
    std::vector<F> outs_T, direct;

    Forward(const F* p, int64_t P) : Channel<F>(p, P), outs_T(N * T), direct(this->toeplitz()) {
        transpose(&this->outs[0], T, N, N, &outs_T[0]);
    }

    // y (m, T) from u (m, T) and the state before, states[0], to which those after each chunk are added: (m + 1, N).
    void block(int64_t m, const F* u, F* states, F* y) const {
        multiply<F>(m, N, T, u, T, 1, &this->cols[(T - 1) * N], -N, states + N, N, false);
        for (F* x = states; x < states + m * N; x += N) multiply<F>(1, N, N, x, N, 1, &this->M[0], N, x + N, N, true);
        multiply<F>(m, T, T, u, T, 1, &direct[0], T, y, T, false);
        multiply<F>(m, T, N, states, N, 1, &outs_T[0], T, y, T, true);
    }
};

// What runs back over them, the last block first, and adds up the gradients of the channel's matrices.
template <class F> struct Backward : Channel<F> {
    using Channel<F>::N;
    using Channel<F>::P;
    std::vector<F> M_T, cols_T, direct_T;          // transposed; of cols the last row first
    std::vector<F> d_M, d_cols, d_outs, d_direct;  // of cols the last row first
    std::vector<F> d_states;                       // (BLOCK + 1, N): before each chunk of a block, and after the last

    Backward(const F* p, int64_t P)
        : Channel<F>(p, P), M_T(N * N), cols_T(N * T), direct_T(T * T), d_M(N * N), d_cols(T * N), d_outs(T * N),
          d_direct(T * T), d_states((BLOCK + 1) * N) {
        transpose(&this->M[0], N, N, N, &M_T[0]);
        transpose(&this->cols[(T - 1) * N], T, N, -N, &cols_T[0]);
        transpose(&this->toeplitz()[0], T, T, T, &direct_T[0]);
    }

    // d_u (m, T) from d_y (m, T), u (m, T), states (m, N), and what d_states begins with of the block that follows.
    void block(int64_t m, const F* u, const F* states, const F* d_y, F* d_u) {
        F *d = &d_states[0], *after = d + N;
        std::copy(d, d + N, d + m * N);
        multiply<F>(m, N, T, d_y, T, 1, &this->outs[0], N, d, N, false);
        for (int64_t k = m - 1; k >= 0; k--) multiply<F>(1, N, N, after + k * N, N, 1, &M_T[0], N, d + k * N, N, true);
        multiply<F>(m, T, T, d_y, T, 1, &direct_T[0], T, d_u, T, false);
        multiply<F>(m, T, N, after, N, 1, &cols_T[0], T, d_u, T, true);
        multiply<F>(N, N, m, states, 1, N, after, N, &d_M[0], N, true);
        multiply<F>(T, N, m, u, 1, T, after, N, &d_cols[0], N, true);
        multiply<F>(T, N, m, d_y, 1, T, states, N, &d_outs[0], N, true);
        multiply<F>(T, T, m, u, 1, T, d_y, T, &d_direct[0], T, true);
    }

    // The parameters' gradients, as the parameters lie. Once, at the end.
    void parameters(F* p) {
        System<F> d(P), d_transposed(P), d_diagonal(P);
        std::vector<F> d_C(N), d_reach(T * N), d_feed(T * N), d_M_T(N * N), d_powers(T * N);
        for (int64_t l = 0; l < T; l++) {
            F d_kernel = 0;
            for (int64_t i = 0; i + l < T; i++) d_kernel += d_direct[i * T + i + l];
            if (l == 0) p[5 * N] = d_kernel;
            for (int64_t i = 0; i < N; i += Vector<F>::W) {
                at(&d_powers[l * N + i]) = at(&d_cols[(T - 1 - l) * N + i]) + d_kernel * at(&this->C[i]);
                at(&d_C[i]) += d_kernel * at(&this->cols[l * N + i]);
            }
        }
        multiply<F>(T, N, N, &this->feed[(T - 1) * N], -N, 1, &d_M[0], N, &d_reach[0], N, false);
        transpose(&d_M[0], N, N, N, &d_M_T[0]);
        multiply<F>(T, N, N, &this->reach[0], N, 1, &d_M_T[0], N, &d_feed[(T - 1) * N], -N, false);
        for (int64_t j = (T - 2) * N; j >= 0; j -= N) {
            this->system.step_gradient(&this->cols[j], &d_powers[j + N], &d_powers[j], d);
            this->transposed.step_gradient(&this->outs[j], &d_outs[j + N], &d_outs[j], d_transposed);
            this->system.step_gradient(&this->reach[j], &d_reach[j + N], &d_reach[j], d);
            this->diagonal.step_gradient(&this->feed[j], &d_feed[j + N], &d_feed[j], d_diagonal);
        }
        this->transposed.step_gradient(&this->C[0], &d_outs[0], &d_C[0], d_transposed);
        for (int64_t i = 0; i < P; i++) {
            F re = this->system.re[i], im = this->system.im[i], power_re = 1, power_im = 0;
            for (int64_t k = 1; k < T; k *= 2) {  // decay^(T − 1) = decay decay² decay⁴ …
                const F product = power_re * re - power_im * im, square = re * re - im * im;
                power_im = power_re * im + power_im * re;
                power_re = product;
                im = 2 * re * im;
                re = square;
            }
            const F d_re = d_M[i * N + i] + d_M[(P + i) * N + P + i], d_im = d_M[i * N + P + i] - d_M[(P + i) * N + i];
            p[i] = d.re[i] + d_transposed.re[i] + d_diagonal.re[i] + T * (power_re * d_re + power_im * d_im);
            p[P + i] = d.im[i] - d_transposed.im[i] - d_diagonal.im[i] + T * (power_re * d_im - power_im * d_re);
        }
        for (int64_t i = 0; i < N; i++) {
            p[N + i] = d.a[i] + d_transposed.b[i] - d_reach[i];
            p[2 * N + i] = d.b[i] + d_transposed.a[i] + d_feed[i];
            p[3 * N + i] = d_powers[i];
            p[4 * N + i] = d_C[i];
        }
    }
};

// --- all channels --------------------------------------------------------------------------------------------------

constexpr int64_t TILE = BLOCK * T;  // samples of a block

// `count` samples of some channels from or to (L, H), for or of a block: each (TILE) by itself, filled up with zeros.
template <class F> void gather(const F* x, int64_t H, int64_t channels, int64_t count, F* tile) {
    for (int64_t first = 0; first < count; first += GROUP)
        for (int64_t h = 0; h < channels; h++)
            for (int64_t t = first; t < std::min(first + GROUP, count); t++) tile[h * TILE + t] = x[t * H + h];
    for (int64_t h = 0; h < channels; h++) std::fill(tile + h * TILE + count, tile + (h + 1) * TILE, 0);
}
template <class F> void scatter(const F* tile, int64_t H, int64_t channels, int64_t count, F* x) {
    for (int64_t first = 0; first < count; first += GROUP)
        for (int64_t t = first; t < std::min(first + GROUP, count); t++)
            for (int64_t h = 0; h < channels; h++) x[t * H + h] = tile[h * TILE + t];
}

// Does each group of channels, on any thread; each thread has some, if there are enough. Returns whether there was
// memory for all of them.
template <class Do> int for_groups(int64_t H, int64_t threads, Do group) {
    const int64_t size = std::min((H + threads - 1) / threads, GROUP);
    int whole = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : whole)
    for (int64_t first = 0; first < H; first += size) {
        try {
            group(first, std::min(size, H - first));
        } catch (const std::bad_alloc&) {
            whole = 0;
        }
    }
    return whole;
}

// params (H, 5 N + 1), u (B, L, H), x (B, H, N) -> states (H, B, n + 1, N), y (B, L, H), last (B, H, N).
template <class F>
int forward(int64_t B, int64_t L, int64_t H, int64_t P, int64_t threads, const F* params, const F* u, const F* x,
            F* states, F* y, F* last) {
    const int64_t N = 2 * P, n = (L + T - 1) / T;
    return for_groups(H, threads, [=](int64_t group, int64_t channels) {
        std::vector<Forward<F>> all;
        for (int64_t h = group; h < group + channels; h++) all.emplace_back(params + h * (5 * N + 1), P);
        std::vector<F> input(channels * TILE), output(channels * TILE);
        for (int64_t b = 0; b < B; b++) {
            for (int64_t first = 0; first < n; first += BLOCK) {
                const int64_t m = std::min(n - first, BLOCK), count = std::min(TILE, L - first * T);
                const int64_t place = (b * L + first * T) * H + group;
                gather(u + place, H, channels, count, &input[0]);
                for (int64_t h = 0; h < channels; h++) {
                    F* own = states + (((group + h) * B + b) * (n + 1) + first) * N;
                    if (first == 0) std::copy(x + (b * H + group + h) * N, x + (b * H + group + h + 1) * N, own);
                    all[h].block(m, &input[h * TILE], own, &output[h * TILE]);
                }
                scatter(&output[0], H, channels, count, y + place);
            }
            // The last chunk may be filled up: from the last whole one on, sample by sample.
            for (int64_t h = 0; h < channels; h++) {
                const F* own = states + (((group + h) * B + b) * (n + 1) + L / T) * N;
                std::vector<F> state(own, own + N), next(N);
                for (int64_t t = L / T * T; t < L; t++, std::swap(state, next)) {
                    all[h].system.step(&state[0], &next[0]);
                    for (int64_t i = 0; i < N; i++) next[i] += all[h].cols[i] * u[(b * L + t) * H + group + h];
                }
                std::copy(state.begin(), state.end(), last + (b * H + group + h) * N);
            }
        }
    });
}

// And d_y (B, L, H) -> d_u (B, L, H), d_x (B, H, N), d_params (H, 5 N + 1).
template <class F>
int backward(int64_t B, int64_t L, int64_t H, int64_t P, int64_t threads, const F* params, const F* u, const F* states,
             const F* d_y, F* d_u, F* d_x, F* d_params) {
    const int64_t N = 2 * P, n = (L + T - 1) / T;
    return for_groups(H, threads, [=](int64_t group, int64_t channels) {
        std::vector<Backward<F>> all;
        for (int64_t h = group; h < group + channels; h++) all.emplace_back(params + h * (5 * N + 1), P);
        std::vector<F> input(channels * TILE), gradient(channels * TILE), output(channels * TILE);
        for (int64_t b = 0; b < B; b++) {
            for (Backward<F>& channel : all) std::fill_n(channel.d_states.begin(), N, 0);
            for (int64_t first = (n - 1) / BLOCK * BLOCK; first >= 0; first -= BLOCK) {
                const int64_t m = std::min(n - first, BLOCK), count = std::min(TILE, L - first * T);
                const int64_t place = (b * L + first * T) * H + group;
                gather(u + place, H, channels, count, &input[0]);
                gather(d_y + place, H, channels, count, &gradient[0]);
                for (int64_t h = 0; h < channels; h++)
                    all[h].block(m, &input[h * TILE], states + (((group + h) * B + b) * (n + 1) + first) * N,
                                 &gradient[h * TILE], &output[h * TILE]);
                scatter(&output[0], H, channels, count, d_u + place);
            }
            for (int64_t h = 0; h < channels; h++) std::copy_n(&all[h].d_states[0], N, d_x + (b * H + group + h) * N);
        }
        for (int64_t h = 0; h < channels; h++) all[h].parameters(d_params + (group + h) * (5 * N + 1));
    });
}

}  // namespace

#define FORWARD(F) \
    int64_t B, int64_t L, int64_t H, int64_t P, int64_t threads, const F *params, const F *u, const F *x, F *states, \
        F *y, F *last
#define BACKWARD(F) \
    int64_t B, int64_t L, int64_t H, int64_t P, int64_t threads, const F *params, const F *u, const F *states, \
        const F *d_y, F *d_u, F *d_x, F *d_params

extern "C" {
int64_t vector_bytes() { return BYTES; }
int forward_float(FORWARD(float)) { return forward(B, L, H, P, threads, params, u, x, states, y, last); }
int forward_double(FORWARD(double)) { return forward(B, L, H, P, threads, params, u, x, states, y, last); }
int backward_float(BACKWARD(float)) {
    return backward(B, L, H, P, threads, params, u, states, d_y, d_u, d_x, d_params);
}
int backward_double(BACKWARD(double)) {
    return backward(B, L, H, P, threads, params, u, states, d_y, d_u, d_x, d_params);
}
}
