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
// whole vectors; chunks of T samples, n of them a signal. Signals here are (H, B, n T); those that are read end in zeros.

#include "products.h"

namespace {

constexpr int64_t T = 64;      // samples of a chunk
constexpr int64_t BLOCK = 60;  // chunks of each of ROWS signals at a time: what comes of them stays in the nearer caches

// --- one channel ---------------------------------------------------------------------------------------------------

// A x = rotation(re, im) x − a (b · x), or the gradients of its parts.
template <class F> struct System {
    using V = typename Vector<F>::V;
    static constexpr int64_t W = Vector<F>::W;
    int64_t P;  // modes: N/2, padded
    Numbers<F> re, im, a, b;

    explicit System(int64_t P) : P(P), re(P, 0), im(P, 0), a(2 * P, 0), b(2 * P, 0) {}

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
    System<F> system, transposed, diagonal;  // diagonal: `transposed` without a and b
    Numbers<F> C, cols, outs, reach, feed;   // (N), then (T, N): A^j B, C A^(j+1), −A^j a, b rotation(decay)^j
    Numbers<F> kernel, M;                    // (T), K with D in its first place; (N, N)

    // parameters: decay's real and imaginary parts, a, b, B, C, D: 5 N + 1.
    Channel(const F* p, int64_t P)
        : P(P), N(2 * P), system(P), transposed(P), diagonal(P), C(p + 4 * N, p + 5 * N), cols(T * N), outs(T * N),
          reach(T * N), feed(T * N), kernel(T), M(N * N, 0) {
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

    // direct (T, T): u direct is the part of a chunk's output that its own samples make. Or its transpose.
    Numbers<F> toeplitz(bool transposed) const {
        Numbers<F> matrix(T * T), band(2 * T, 0);
        if (transposed) std::reverse_copy(kernel.begin(), kernel.end(), band.begin());
        else std::copy(kernel.begin(), kernel.end(), band.begin() + T);
        const F* first = &band[transposed ? T - 1 : T];
        for (int64_t i = 0; i < T; i++) std::copy_n(first - i, T, &matrix[i * T]);
        return matrix;
    }
};

// What runs forward over a channel's signals, a block of chunks at a time.
template <class F> struct Forward : Channel<F> {
    using Channel<F>::N;
    Numbers<F> outs_T, direct;

    Forward(const F* p, int64_t P) : Channel<F>(p, P), outs_T(N * T), direct(this->toeplitz(false)) {
        transpose(&this->outs[0], T, N, N, &outs_T[0], T);
    }

    // y (B, m, T) from u (B, m, T), or from silence, and the state before each signal, states (B, m + 1, N), where those
    // after each chunk follow it. Signals begin `length` apart, their states `size`.
    void block(int64_t B, int64_t m, int64_t length, int64_t size, const F* u, F* states, F* y) const {
        for (int64_t b = 0; u && b < B; b++)
            multiply<F>(m, N, T, u + b * length, T, 1, &this->cols[(T - 1) * N], -N, states + b * size + N, N, false);
        for (F* x = states; x < states + m * N; x += N)
            multiply<F>(B, N, N, x, size, 1, &this->M[0], N, x + N, size, u != nullptr);
        for (int64_t b = 0; b < B; b++) {
            if (u) multiply<F>(m, T, T, u + b * length, T, 1, &direct[0], T, y + b * length, T, false);
            multiply<F>(m, T, N, states + b * size, N, 1, &outs_T[0], T, y + b * length, T, u != nullptr);
        }
    }
};

// What runs back over them, the last block first, and adds up the gradients of the channel's matrices.
template <class F> struct Backward : Channel<F> {
    using Channel<F>::N;
    using Channel<F>::P;
    Numbers<F> M_T, cols_T, direct_T;          // transposed; of cols the last row first
    Numbers<F> d_M, d_cols, d_outs, d_direct;  // of cols the last row first
    Numbers<F> d_states;                       // (ROWS, BLOCK + 1, N): before each chunk of a block, and after the last

    Backward(const F* p, int64_t P)
        : Channel<F>(p, P), M_T(N * N), cols_T(N * T), direct_T(this->toeplitz(true)), d_M(N * N, 0), d_cols(T * N, 0),
          d_outs(T * N, 0), d_direct(T * T, 0), d_states(ROWS * (BLOCK + 1) * N) {
        transpose(&this->M[0], N, N, N, &M_T[0], N);
        transpose(&this->cols[(T - 1) * N], T, N, -N, &cols_T[0], T);
    }

    // d_u (B, m, T) from d_y (B, m, T), u (B, m, T), both of them or neither, states (B, m, N), and what d_states begins
    // with of the block that follows.
    void block(int64_t B, int64_t m, int64_t length, int64_t size, const F* u, const F* states, const F* d_y, F* d_u) {
        const int64_t own = (BLOCK + 1) * N;
        F *d = &d_states[0], *after = d + N;
        for (int64_t b = 0; b < B; b++) {
            std::copy_n(d + b * own, N, d + b * own + m * N);
            multiply<F>(m, N, T, d_y + b * length, T, 1, &this->outs[0], N, d + b * own, N, false);
        }
        for (int64_t k = (m - 1) * N; k >= 0; k -= N)
            multiply<F>(B, N, N, after + k, own, 1, &M_T[0], N, d + k, own, true);
        for (int64_t b = 0; b < B; b++, d_y += length, states += size, after += own) {
            multiply<F>(N, N, m, states, 1, N, after, N, &d_M[0], N, true);
            multiply<F>(T, N, m, d_y, 1, T, states, N, &d_outs[0], N, true);
            if (!u) continue;
            multiply<F>(m, T, T, d_y, T, 1, &direct_T[0], T, d_u + b * length, T, false);
            multiply<F>(m, T, N, after, N, 1, &cols_T[0], T, d_u + b * length, T, true);
            multiply<F>(T, N, m, u + b * length, 1, T, after, N, &d_cols[0], N, true);
            multiply<F>(T, T, m, u + b * length, 1, T, d_y, T, &d_direct[0], T, true);
        }
    }

    // The parameters' gradients, as the parameters lie. Once, at the end.
    void parameters(F* p) {
        System<F> d(P), d_transposed(P), d_diagonal(P);
        Numbers<F> d_C(N, 0), d_reach(T * N), d_feed(T * N), d_M_T(N * N), d_powers(T * N), d_kernel(T, 0);
        for (int64_t i = 0; i < T; i++)
            for (int64_t l = 0; i + l < T; l++) d_kernel[l] += d_direct[i * T + i + l];
        p[5 * N] = d_kernel[0];
        for (int64_t l = 0; l < T; l++)
            for (int64_t i = 0; i < N; i += Vector<F>::W) {
                at(&d_powers[l * N + i]) = at(&d_cols[(T - 1 - l) * N + i]) + d_kernel[l] * at(&this->C[i]);
                at(&d_C[i]) += d_kernel[l] * at(&this->cols[l * N + i]);
            }
        multiply<F>(T, N, N, &this->feed[(T - 1) * N], -N, 1, &d_M[0], N, &d_reach[0], N, false);
        transpose(&d_M[0], N, N, N, &d_M_T[0], N);
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

constexpr int64_t LINE = 16;    // of float, a line of the cache
constexpr int64_t STRIP = 256;  // samples of a signal that are copied at a time

// (B, L, H) -> (H, B, n T), and back. All functions return whether there was enough memory.
template <class F> int to_signals(int64_t B, int64_t L, int64_t H, int64_t threads, const F* x, F* y) {
    const int64_t length = (L + T - 1) / T * T;
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t b = 0; b < B; b++)
        for (int64_t first = 0; first < length; first += STRIP) {
            for (int64_t t = first; t < std::min(first + STRIP, L); t += LINE)
                transpose(x + (b * L + t) * H, std::min(LINE, L - t), H, H, y + b * length + t, B * length);
            for (int64_t h = 0; h < H && first + STRIP >= length; h++)
                std::fill(y + (h * B + b) * length + L, y + (h * B + b + 1) * length, 0);
        }
    return 1;
}
template <class F> int from_signals(int64_t B, int64_t L, int64_t H, int64_t threads, const F* x, F* y) {
    const int64_t length = (L + T - 1) / T * T;
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < L; t += STRIP)
            for (int64_t h = 0; h < H; h += LINE)
                transpose(x + (h * B + b) * length + t, std::min(LINE, H - h), std::min(STRIP, L - t), B * length,
                          y + (b * L + t) * H + h, H);
    return 1;
}

// Does each channel, on any thread. Returns whether there was memory for all of them.
template <class Do> int for_channels(int64_t H, int64_t threads, Do channel) {
    int whole = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : whole)
    for (int64_t h = 0; h < H; h++) {
        try {
            channel(h);
        } catch (const std::bad_alloc&) {
            whole = 0;
        }
    }
    return whole;
}

// params (H, 5 N + 1), u or null, x (B, H, N) -> states (H, B, n + 1, N), y, and with u last (B, H, N).
template <class F>
int forward(int64_t B, int64_t L, int64_t H, int64_t P, int64_t threads, const F* params, const F* u, const F* x,
            F* states, F* y, F* last) {
    const int64_t N = 2 * P, n = (L + T - 1) / T, length = n * T, size = (n + 1) * N;
    return for_channels(H, threads, [=](int64_t h) {
        const Forward<F> channel(params + h * (5 * N + 1), P);
        for (int64_t b = 0; b < B; b++) std::copy_n(x + (b * H + h) * N, N, states + (h * B + b) * size);
        for (int64_t b = 0; b < B; b += ROWS) {
            const int64_t place = (h * B + b) * length, state = (h * B + b) * size;
            for (int64_t k = 0; k < n; k += BLOCK)
                channel.block(std::min<int64_t>(ROWS, B - b), std::min(BLOCK, n - k), length, size,
                              u ? u + place + k * T : nullptr, states + state + k * N, y + place + k * T);
        }
        // The last chunk may be filled up: from the last whole one on, sample by sample.
        for (int64_t b = 0; u && b < B; b++) {
            const F* end = states + (h * B + b) * size + L / T * N;
            Numbers<F> state(end, end + N), next(N);
            for (int64_t t = L / T * T; t < L; t++, std::swap(state, next)) {
                channel.system.step(&state[0], &next[0]);
                for (int64_t i = 0; i < N; i++) next[i] += channel.cols[i] * u[(h * B + b) * length + t];
            }
            std::copy(state.begin(), state.end(), last + (b * H + h) * N);
        }
    });
}

// And d_y -> d_u, if there is u, d_x (B, H, N), d_params (H, 5 N + 1).
template <class F>
int backward(int64_t B, int64_t L, int64_t H, int64_t P, int64_t threads, const F* params, const F* u, const F* states,
             const F* d_y, F* d_u, F* d_x, F* d_params) {
    const int64_t N = 2 * P, n = (L + T - 1) / T, length = n * T, size = (n + 1) * N;
    return for_channels(H, threads, [=](int64_t h) {
        Backward<F> channel(params + h * (5 * N + 1), P);
        for (int64_t b = 0; b < B; b += ROWS) {
            const int64_t rows = std::min<int64_t>(ROWS, B - b), place = (h * B + b) * length;
            for (int64_t r = 0; r < rows; r++) std::fill_n(&channel.d_states[r * (BLOCK + 1) * N], N, 0);
            for (int64_t k = (n - 1) / BLOCK * BLOCK; k >= 0; k -= BLOCK)
                channel.block(rows, std::min(BLOCK, n - k), length, size, u ? u + place + k * T : nullptr,
                              states + (h * B + b) * size + k * N, d_y + place + k * T,
                              u ? d_u + place + k * T : nullptr);
            for (int64_t r = 0; r < rows; r++)
                std::copy_n(&channel.d_states[r * (BLOCK + 1) * N], N, d_x + ((b + r) * H + h) * N);
        }
        channel.parameters(d_params + h * (5 * N + 1));
    });
}

}  // namespace

#define SIGNALS(F) int64_t B, int64_t L, int64_t H, int64_t threads, const F *x, F *y
#define FORWARD(F) \
    int64_t B, int64_t L, int64_t H, int64_t P, int64_t threads, const F *params, const F *u, const F *x, F *states, \
        F *y, F *last
#define BACKWARD(F) \
    int64_t B, int64_t L, int64_t H, int64_t P, int64_t threads, const F *params, const F *u, const F *states, \
        const F *d_y, F *d_u, F *d_x, F *d_params

extern "C" {
int64_t vector_bytes() { return BYTES; }
int to_signals_float(SIGNALS(float)) { return to_signals(B, L, H, threads, x, y); }
int to_signals_double(SIGNALS(double)) { return to_signals(B, L, H, threads, x, y); }
int from_signals_float(SIGNALS(float)) { return from_signals(B, L, H, threads, x, y); }
int from_signals_double(SIGNALS(double)) { return from_signals(B, L, H, threads, x, y); }
int forward_float(FORWARD(float)) { return forward(B, L, H, P, threads, params, u, x, states, y, last); }
int forward_double(FORWARD(double)) { return forward(B, L, H, P, threads, params, u, x, states, y, last); }
int backward_float(BACKWARD(float)) {
    return backward(B, L, H, P, threads, params, u, states, d_y, d_u, d_x, d_params);
}
int backward_double(BACKWARD(double)) {
    return backward(B, L, H, P, threads, params, u, states, d_y, d_u, d_x, d_params);
}
}
