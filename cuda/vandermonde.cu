// SPDX-License-Identifier: MIT
// K_t = Re sum_n v_n exp(t z_n), and its moments W0_n = sum_t g_t conj(exp(t z_n)), W1_n with t g_t.
//
// Both are matrix products: with t = t0 + SIDE i + j a tile of K is a product over n of the tables
// v exp((t0 + SIDE i) z) and exp(j z), SIDE numbers each; the moments are sums over i of
// exp((t0 + SIDE i) z) times products over j of g and (exp(j z), j exp(j z)). Tables live in shared
// memory and are products again, of LOW and HIGH exponentials, whose phases are reduced without
// rounding; nothing of size N L is anywhere.
//
// Memory contract. v (P, R, H, N), z (P, H, N), T; out and g (P, R, H, L), Real; first and second
// (tiles, P, R, H, N), T; all contiguous. Each is read or written once (z and v once a tile, g once for
// every STATES of N), but for the tiles of first and second, which sum.cu adds up where there are
// several. H 1024, N 64, L 16384, complex64: 67 MB written by the forward, 134 MB read by the moments.
//
// Launch. A block takes one row (p, r, h) and `lines` <= SIDE lines of SIDE numbers; a moments block
// STATES states of it. Forward: (SIDE / EACH)^2 threads, grid rows * tiles; moments: SIDE / EACH *
// ACROSS threads, grid rows * tiles * chunks. A row's order of operations depends on its shape alone.
#include "elementary.cuh"
#include "memory.cuh"

using T = DTYPE;

template <class S>
struct Parts {
    using type = S;
    static constexpr int count = 1;
    static __device__ __forceinline__ S of(const S* parts) { return *parts; }
};
template <class R>
struct Parts<Complex<R>> {
    using type = R;
    static constexpr int count = 2;
    static __device__ __forceinline__ Complex<R> of(const R* parts) { return {parts[0], parts[1]}; }
};
using Real = typename Parts<T>::type;
constexpr int PARTS = Parts<T>::count;
constexpr int V = 16 / int(sizeof(Real));  // numbers of one access
using Items = Pack<Real, V>;

constexpr int LOW = SIDE == 128 ? 16 : 8, HIGH = SIDE / LOW;
constexpr int FINE = 0, COARSE = LOW + HIGH, KINDS = 2 * (LOW + HIGH);
constexpr int PITCH = KINDS + 1;  // odd: neighbouring states lie in different banks

// ------------------------------------------------------------------------------ exponentials

__device__ __forceinline__ float natural(float x) { return expf(x); }
__device__ __forceinline__ double natural(double x) { return exp(x); }

// e^(x y), where the rounding of a large product would show.
template <class R>
__device__ __forceinline__ R exponential_of_product(R x, R y) {
    const R product = mul(x, y), rest = fma(x, y, -product);
    return mul(natural(product), add(R(1), rest));
}

// Multiples of an angle, in half turns within [-1, 1].
template <class R>
struct Phase;

template <>
struct Phase<float> {
    unsigned long long turns;  // in units of 2^-64: its multiples wrap around and are exact
    float absent;              // zero; not a number where the angle is not finite

    __device__ __forceinline__ explicit Phase(float angle) : absent(angle - angle) {
        const double x = mul(double(angle), 0.15915494309189535);
        turns = (unsigned long long)((long long)((x - rint(x)) * 9223372036854775808.0)) << 1;
    }
    __device__ __forceinline__ float at(long long t) const {
        const int high = int((turns * (unsigned long long)t) >> 32);
        return fma(float(high), 4.656612873077393e-10f, absent);
    }
};

template <>
struct Phase<double> {
    double turns, rest;  // their sum is exact to twice the precision

    __device__ __forceinline__ explicit Phase(double angle) {
        turns = mul(angle, 0.15915494309189535);
        rest = fma(angle, -9.839338337591243e-18, fma(angle, 0.15915494309189535, -turns));
    }
    __device__ __forceinline__ double at(long long t) const {
        const double n = double(t), x = mul(n, turns);
        const double low = fma(n, rest, fma(n, turns, -x));
        return mul(2.0, add(add(x, -rint(x)), low));
    }
};

// exp(t z) for integers t >= 0.
template <class S>
struct Exponential {
    S z;
    __device__ __forceinline__ explicit Exponential(S z) : z(z) {}
    __device__ __forceinline__ S at(long long t) const { return exponential_of_product(z, S(t)); }
};
template <class R>
struct Exponential<Complex<R>> {
    R rate;
    Phase<R> phase;
    __device__ __forceinline__ explicit Exponential(Complex<R> z) : rate(z.re), phase(z.im) {}
    __device__ __forceinline__ Complex<R> at(long long t) const {
        const R modulus = exponential_of_product(rate, R(t));
        R s, c;
        sine_cosine_of_turns(phase.at(t), s, c);
        return {mul(modulus, c), mul(modulus, s)};
    }
};

// The number of steps that entry `kind` of a state's exponentials stands for: low and high factors of
// the fine table, then of the coarse one, which begins at t0.
__device__ __forceinline__ long long steps_of(int kind, long long t0) {
    if (kind < LOW) return kind;
    if (kind < COARSE) return (kind - LOW) * LOW;
    if (kind < COARSE + LOW) return (kind - COARSE) * SIDE;
    return t0 + (long long)(kind - COARSE - LOW) * (LOW * SIDE);
}

__device__ __forceinline__ T entry(const T* exponentials, int table, int i) {
    return mul(exponentials[table + i % LOW], exponentials[table + LOW + i / LOW]);
}

__device__ __forceinline__ float part(float x, int) { return x; }
__device__ __forceinline__ double part(double x, int) { return x; }
template <class R>
__device__ __forceinline__ R part(Complex<R> x, int i) {
    return i ? x.im : x.re;
}

// Seat of a thread in a grid of `across` columns: a warp is as square as its reads ask for.
struct Seat {
    int line, column;

    __device__ __forceinline__ explicit Seat(int across) {
        const int wide = min(across, 8), warps = across / wide;
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        column = warp % warps * wide + lane % wide;
        line = warp / warps * (32 / wide) + lane / wide;
    }
};

__device__ __forceinline__ int lines_within(long long length, long long t0, long long lines) {
    return int(min(lines, (length - t0 + SIDE - 1) / SIDE));
}

// ------------------------------------------------------------------------------ forward

#ifdef FORWARD
struct Arguments {
    const T *v, *z;
    Real* out;
    long long rows, heads, states, length, tiles, lines;  // rows: R
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr int ACROSS = SIDE / EACH, THREADS = ACROSS * ACROSS;
constexpr int STATES = 32 / PARTS;  // of a chunk
static_assert(THREADS % STATES == 0 && EACH % V == 0 && LOW % V == 0 && ACROSS % 8 == 0, "");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    vandermonde(const __grid_constant__ Arguments p) {
    alignas(16) __shared__ Real coarse[STATES * PARTS][SIDE];
    alignas(16) __shared__ Real fine[STATES * PARTS][SIDE];
    __shared__ T exponentials[STATES][PITCH];
    const long long row = blockIdx.x / p.tiles, tile = blockIdx.x - row * p.tiles;
    const long long nodes = row / (p.rows * p.heads) * p.heads + row % p.heads;
    const long long t0 = tile * p.lines * SIDE;
    const int lines = lines_within(p.length, t0, p.lines);
    const Seat seat(ACROSS);
    const bool busy = seat.line * EACH < lines;
    Real sums[EACH][EACH];
#pragma unroll
    for (int a = 0; a < EACH; ++a)
#pragma unroll
        for (int b = 0; b < EACH; ++b) sums[a][b] = 0;
#pragma unroll 1
    for (long long first = 0; first < p.states; first += STATES) {
        const int count = int(min((long long)STATES, p.states - first));
        const int state = threadIdx.x % STATES;
        if (state < count) {
            const Exponential<T> power(p.z[nodes * p.states + first + state]);
            const T v = p.v[row * p.states + first + state];
#pragma unroll 1
            for (int kind = threadIdx.x / STATES; kind < KINDS; kind += THREADS / STATES) {
                const T x = power.at(steps_of(kind, t0));
                exponentials[state][kind] = kind < COARSE + LOW ? x : mul(v, x);
            }
        }
        __syncthreads();  // the exponentials are there, the tables have been read
#pragma unroll 2
        for (int k = threadIdx.x; k < count * (SIDE / V); k += THREADS) {
            const int n = k / (SIDE / V), i = k % (SIDE / V) * V;
            const T high = exponentials[n][FINE + LOW + i / LOW];
            const T far = exponentials[n][COARSE + LOW + i / LOW];
            Items x[PARTS], y[PARTS];
#pragma unroll
            for (int b = 0; b < V; ++b) {
                const T near = mul(exponentials[n][FINE + i % LOW + b], high);
                const T line = conj(mul(exponentials[n][COARSE + i % LOW + b], far));
#pragma unroll
                for (int c = 0; c < PARTS; ++c) {
                    x[c].item[b] = part(near, c);
                    y[c].item[b] = part(line, c);
                }
            }
#pragma unroll
            for (int c = 0; c < PARTS; ++c) {
                x[c].store(fine[n * PARTS + c] + i);
                y[c].store(coarse[n * PARTS + c] + i);
            }
        }
        __syncthreads();  // the tables are there
        if (!busy) continue;
#pragma unroll UNROLL
        for (int k = 0; k < count * PARTS; ++k) {
            Items x[EACH / V], y[EACH / V];
#pragma unroll
            for (int g = 0; g < EACH / V; ++g) {
                x[g] = Items::load(coarse[k] + seat.line * EACH + g * V);
                y[g] = Items::load(fine[k] + (g * ACROSS + seat.column) * V);
            }
#pragma unroll
            for (int a = 0; a < EACH; ++a)
#pragma unroll
                for (int b = 0; b < EACH; ++b)
                    sums[a][b] = fma(x[a / V].item[a % V], y[b / V].item[b % V], sums[a][b]);
        }
    }
    const bool wide = p.length % V == 0;
    Real* out = p.out + row * p.length;
#pragma unroll
    for (int a = 0; a < EACH; ++a) {
        const int line = seat.line * EACH + a;
        if (line >= lines) break;
#pragma unroll
        for (int g = 0; g < EACH / V; ++g) {
            const long long t = t0 + line * SIDE + (g * ACROSS + seat.column) * V;
            if (wide && t < p.length) {
                Items x;
#pragma unroll
                for (int b = 0; b < V; ++b) x.item[b] = sums[a][g * V + b];
                x.put(out + t);
            } else {
#pragma unroll
                for (int b = 0; b < V; ++b)
                    if (t + b < p.length) out[t + b] = sums[a][g * V + b];
            }
        }
    }
}
#endif

// ------------------------------------------------------------------------------ moments

#ifdef MOMENTS
struct Arguments {
    const Real* g;
    const T* z;
    T *first, *second;
    long long rows, heads, states, length, tiles, lines, chunks;  // rows: R; chunks of the states
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr int NUMBERS = 2 * PARTS;    // of a state: exp(j z) and j exp(j z)
constexpr int UNITS = 8 / NUMBERS;    // states of a thread
constexpr int STATES = UNITS * ACROSS;
constexpr int DOWN = SIDE / EACH, THREADS = DOWN * ACROSS;
constexpr int WIDE = NUMBERS < V ? NUMBERS : V;
using Unit = Pack<Real, WIDE>;
static_assert(THREADS % STATES == 0 && EACH % V == 0 && DOWN <= DEPTH && SIDE % DEPTH == 0, "");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    vandermonde_moments(const __grid_constant__ Arguments p) {
    alignas(16) __shared__ Real signal[DEPTH][SIDE + V];
    alignas(16) __shared__ Real table[DEPTH][STATES * NUMBERS];
    __shared__ T exponentials[STATES][PITCH];
    const long long chunk = blockIdx.x % p.chunks, where = blockIdx.x / p.chunks;
    const long long row = where / p.tiles, tile = where - row * p.tiles;
    const long long nodes = row / (p.rows * p.heads) * p.heads + row % p.heads;
    const long long t0 = tile * p.lines * SIDE, first = chunk * STATES;
    const int lines = lines_within(p.length, t0, p.lines);
    const int count = int(min((long long)STATES, p.states - first));
    const Seat seat(ACROSS);
    const bool busy = seat.line * EACH < lines;
    {
        const int state = threadIdx.x % STATES;
        // beyond the last state stand copies of it
        const Exponential<T> power(p.z[nodes * p.states + first + min(state, count - 1)]);
#pragma unroll 1
        for (int kind = threadIdx.x / STATES; kind < KINDS; kind += THREADS / STATES)
            exponentials[state][kind] = power.at(steps_of(kind, t0));
    }
    const Real* g = p.g + row * p.length + t0;
    const long long rest = p.length - t0;
    const bool wide = p.length % V == 0;
    Real sums[EACH][UNITS][NUMBERS];
#pragma unroll
    for (int a = 0; a < EACH; ++a)
#pragma unroll
        for (int u = 0; u < UNITS; ++u)
#pragma unroll
            for (int c = 0; c < NUMBERS; ++c) sums[a][u][c] = 0;
#pragma unroll 1
    for (int j0 = 0; j0 < SIDE && j0 < p.length; j0 += DEPTH) {
        __syncthreads();  // the tables have been read; the first time: the exponentials are there
#pragma unroll 2
        for (int k = threadIdx.x; k < SIDE * (DEPTH / V); k += THREADS) {
            const int line = k / (DEPTH / V), j = k % (DEPTH / V) * V;
            const long long t = (long long)line * SIDE + j0 + j;
            Items x;
#pragma unroll
            for (int b = 0; b < V; ++b) x.item[b] = 0;
            if (line < lines) {
                if (wide && t < rest) {
                    x = Items::load(g + t);
                } else {
#pragma unroll
                    for (int b = 0; b < V; ++b)
                        if (t + b < rest) x.item[b] = g[t + b];
                }
            }
#pragma unroll
            for (int b = 0; b < V; ++b) signal[j + b][line] = x.item[b];
        }
#pragma unroll 2
        for (int k = threadIdx.x; k < DEPTH * STATES; k += THREADS) {
            const int n = k % STATES, j = k / STATES;
            const T x = entry(exponentials[n], FINE, j0 + j);
            const bool there = j0 + j < p.length;  // a growing exponential may overflow beyond
            Unit numbers[NUMBERS / WIDE];
#pragma unroll
            for (int c = 0; c < NUMBERS; ++c) {
                const Real number = there ? part(x, c % PARTS) : Real(0);
                numbers[c / WIDE].item[c % WIDE] = c < PARTS ? number : mul(Real(j0 + j), number);
            }
#pragma unroll
            for (int c = 0; c < NUMBERS / WIDE; ++c)
                numbers[c].store(table[j] + n * NUMBERS + c * WIDE);
        }
        __syncthreads();  // the tables are there
        if (!busy) continue;
#pragma unroll UNROLL
        for (int j = 0; j < DEPTH; ++j) {
            Items x[EACH / V];
            Unit y[UNITS][NUMBERS / WIDE];
#pragma unroll
            for (int i = 0; i < EACH / V; ++i)
                x[i] = Items::load(signal[j] + seat.line * EACH + i * V);
#pragma unroll
            for (int u = 0; u < UNITS; ++u)
#pragma unroll
                for (int c = 0; c < NUMBERS / WIDE; ++c)
                    y[u][c] = Unit::load(
                        table[j] + (u * ACROSS + seat.column) * NUMBERS + c * WIDE);
#pragma unroll
            for (int a = 0; a < EACH; ++a)
#pragma unroll
                for (int u = 0; u < UNITS; ++u)
#pragma unroll
                    for (int c = 0; c < NUMBERS; ++c)
                        sums[a][u][c] = fma(x[a / V].item[a % V], y[u][c / WIDE].item[c % WIDE],
                                            sums[a][u][c]);
        }
    }
    T totals[UNITS][2];
#pragma unroll
    for (int u = 0; u < UNITS; ++u) totals[u][0] = totals[u][1] = Constant<T>::zero();
#pragma unroll
    for (int a = 0; a < EACH; ++a) {
        const int line = seat.line * EACH + a;
        if (line >= lines) break;
        const Real t = Real(t0 + line * SIDE);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            Real* pair = sums[a][u];
#pragma unroll
            for (int c = 0; c < PARTS; ++c) pair[PARTS + c] = fma(t, pair[c], pair[PARTS + c]);
            const T power = entry(exponentials[u * ACROSS + seat.column], COARSE, line);
#pragma unroll
            for (int m = 0; m < 2; ++m)
                totals[u][m] = fma(power, Parts<T>::of(pair + m * PARTS), totals[u][m]);
        }
    }
    __syncthreads();  // the tables have been read
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int c = 0; c < PARTS; ++c)
                table[seat.line][(u * ACROSS + seat.column) * NUMBERS + m * PARTS + c] =
                    part(totals[u][m], c);
    __syncthreads();  // the sums of every thread are there
    const long long all = gridDim.x / (p.chunks * p.tiles);
    for (int n = threadIdx.x; n < count; n += THREADS) {
        const long long to = (tile * all + row) * p.states + first + n;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            T total = Constant<T>::zero();
#pragma unroll
            for (int i = 0; i < DOWN; ++i)
                total = add(total, Parts<T>::of(table[i] + n * NUMBERS + m * PARTS));
            (m ? p.second : p.first)[to] = conj(total);
        }
    }
}
#endif
