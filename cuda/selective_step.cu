// SPDX-License-Identifier: MIT
// One step of the selective scan, for decoding: h = A_bar h0 + gamma B u, y = (sum_n C h + D u) silu(z)
// with the real part of twice the sum for complex states.
//
// Memory contract. Everything has two batch axes (outer, inner), by strides in elements, zero for what
// the batch shares. u, dt, z, D, dt_bias, decay_dt are numbers a channel, timesteps and reset numbers a
// row; each is stored as DTYPE or, where its bit in `wide` is set, in the real type of the state. A and
// h0 are (E, N), B and C (G, N) a row. Outputs are compact: y (batch, E) as DTYPE, last (batch, E, N).
// The state is read once and written once, 2 x 16.8 MB for 64 rows of 4096 channels with 16 states in
// float32; A is read once for ROWS rows, everything else is 1/N of that or shared by channels.
//
// Launch. LANES neighbouring threads have a channel; each owns VECTOR neighbouring states out of every
// LANES * VECTOR, of ROWS rows of the batch that it works on at a time. What a channel has once a row
// (step, gate, direct path) one of the lanes computes and hands to the others. VECTOR and LANES depend
// on N and the dtypes alone and fix the order of the sum over n, first in a lane, then over lanes from
// the far ones to the near; ROWS, the block and the widths of loads change no bit.
//
// Compiled for DTYPE, STATE, B_TYPE, C_TYPE, SCHEME and SPLIT (discretize.cuh), VECTOR, LANES, ROWS,
// LOOP (more than one piece of VECTOR states a lane), and the numbers loaded at a time: STATE_WIDTH of
// A and h0, MATRIX_WIDTH of B and C. A width above 1 asks for neighbours in memory and for alignment.
// COMMON is the call of a Mamba block, without a test or a division that it does not need: softplus, D,
// z, dt_bias and h0 are given and nothing else that is optional, D and dt_bias stored as Real, u, dt and z
// as DTYPE, N = LANES * VECTOR or LOOP, one batch axis of strides below 2^28, A and each row of h0 compact, B
// and C shared by all channels, and all other channels and states neighbours. Overlaps the kernel before.
#include "discretize.cuh"
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
using State = STATE;

template <class S>
struct RealOf {
    using type = S;
};
template <class R>
struct RealOf<Complex<R>> {
    using type = R;
};
using Real = typename RealOf<State>::type;
constexpr int SPAN = LANES * VECTOR;
constexpr bool FULL = COMMON && !LOOP;  // N is SPAN
constexpr bool COMPLEX = sizeof(State) > sizeof(Real);

struct Channels {  // a number a channel, or one a row where the stride of channels is 0
    const void* data;  // null: not given
    long long outer, inner, channel;
};

struct States {  // N numbers a channel, or a group of channels
    const void* data;
    long long outer, inner, channel, state;
};

struct Arguments {
    Channels u, dt, D, z, dt_bias, decay_dt, timesteps, reset;
    States A, h0, B, C;
    T* y;
    State* last;
    long long batch, inner, channels, states;
    long long per_B, per_C;  // channels of a group
    long long blocks;        // that the channels of one row take
    long long wide;          // bit i: the i-th of the first seven is stored as Real
    long long softplus, state_only;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// ------------------------------------------------------------------------------ where things are

struct Place {
    long long outer, inner;
};

__device__ __forceinline__ Place place(long long row, const Arguments& p) {
    if (COMMON || p.inner == p.batch) return {0, row};
    const unsigned outer = unsigned(row) / unsigned(p.inner);
    return {outer, row - outer * p.inner};
}

__device__ __forceinline__ Real widened(float x) { return x; }
__device__ __forceinline__ Real widened(double x) { return Real(x); }
__device__ __forceinline__ Real widened(bfloat16 x) { return widen(x); }
__device__ __forceinline__ Real widened(float16 x) { return widen(x); }
template <class R>
__device__ __forceinline__ Complex<Real> widened(Complex<R> x) {
    return {x.re, x.im};
}

__device__ __forceinline__ Real read(const Channels& x, Place at, long long channel, bool wide) {
    const long long i = at.outer * x.outer + at.inner * x.inner + channel * x.channel;
    return wide ? static_cast<const Real*>(x.data)[i] : widened(static_cast<const T*>(x.data)[i]);
}

template <class X>
__device__ __forceinline__ const X* start(const States& x, Place at) {
    return static_cast<const X*>(x.data) + at.outer * x.outer + at.inner * x.inner;
}

// VECTOR numbers from `from`, `apart` elements from each other where they come one at a time.
template <class X, int WIDTH>
struct Piece {
    Pack<X, WIDTH> pack[VECTOR / WIDTH];

    __device__ __forceinline__ void load(const X* from, long long apart) {
#pragma unroll
        for (int i = 0; i < VECTOR / WIDTH; ++i)
            pack[i] = Pack<X, WIDTH>::load(WIDTH == 1 ? from + i * apart : from + i * WIDTH);
    }

    __device__ __forceinline__ const X& operator[](int v) const {
        return pack[v / WIDTH].item[v % WIDTH];
    }
};

// ------------------------------------------------------------------------------ arithmetic

__device__ __forceinline__ Real times(Real x, Real y) { return mul(x, y); }
__device__ __forceinline__ Complex<Real> times(Real x, Complex<Real> y) { return scale(y, x); }
__device__ __forceinline__ Complex<Real> times(Complex<Real> x, Real y) { return scale(x, y); }
__device__ __forceinline__ Complex<Real> times(Complex<Real> x, Complex<Real> y) {
    return mul(x, y);
}

// decay h + drive
__device__ __forceinline__ Real step(Real decay, Real h, Real drive) { return fma(decay, h, drive); }
__device__ __forceinline__ Complex<Real> step(Complex<Real> decay, Complex<Real> h, Real drive) {
    return fma(decay, h, Complex<Real>{drive, Real(0)});
}
__device__ __forceinline__ Complex<Real> step(Complex<Real> decay, Complex<Real> h,
                                              Complex<Real> drive) {
    return fma(decay, h, drive);
}

// sum + Re(c h)
template <class S>
__device__ __forceinline__ Real read_out(Real c, S h, Real sum) {
    return fma(c, real(h), sum);
}
__device__ __forceinline__ Real read_out(Complex<Real> c, Complex<Real> h, Real sum) {
    return fma(-c.im, h.im, fma(c.re, h.re, sum));
}

// What a channel has once a row.
struct Once {
    Real u, dd, di;            // input, with MAMBA's gain; steps of decay and input
    Real input, direct, gate;  // u, D, z
    bool cleared;

    // A Mamba block's, of the row `mine` after the first one.
    __device__ __forceinline__ void load(const Arguments& p, long long row, int mine, int channel) {
        const auto of_row = [&](const Channels& x) {
            const T* from = static_cast<const T*>(x.data) + row * x.inner;
            return from[mine * int(x.inner) + channel];
        };
        const T u_read = of_row(p.u), dt_read = of_row(p.dt), z_read = of_row(p.z);
        direct = static_cast<const Real*>(p.D.data)[channel];
        const Real bias = static_cast<const Real*>(p.dt_bias.data)[channel];
        __syncwarp();  // the compiler moves no load across
        u = input = widened(u_read);
        gate = widened(z_read);
        dd = di = softplus(add(widened(dt_read), bias));
        if (SCHEME == MAMBA) u = mul(di, u);
        cleared = false;
    }

    __device__ __forceinline__ void compute(const Arguments& p, Place at, long long channel) {
        u = input = read(p.u, at, channel, p.wide & 1);
        di = read(p.dt, at, channel, p.wide & 2);
        direct = p.D.data ? read(p.D, at, channel, p.wide & 4) : Real(0);
        gate = p.z.data ? read(p.z, at, channel, p.wide & 8) : Real(0);
        if (p.dt_bias.data) di = add(di, read(p.dt_bias, at, channel, p.wide & 16));
        if (p.softplus) di = softplus(di);
        dd = p.decay_dt.data ? read(p.decay_dt, at, channel, p.wide & 32) : di;
        if (p.timesteps.data) {
            const Real elapsed = read(p.timesteps, at, channel, p.wide & 64);
            dd = mul(elapsed, dd);
            if (!p.state_only) di = mul(elapsed, di);
        }
        if (SCHEME == MAMBA) u = mul(di, u);  // its gain, the same for all states
        cleared = p.reset.data && static_cast<const unsigned char*>(
                                      p.reset.data)[at.outer * p.reset.outer +
                                                    at.inner * p.reset.inner] != 0;
    }
};

// What is read ahead: VECTOR neighbouring states of ROWS rows. B and C mostly come from near caches.
struct Numbers {
    Piece<State, STATE_WIDTH> A, h[ROWS];
};

struct Matrices {
    Piece<B_TYPE, MATRIX_WIDTH> B;
    Piece<C_TYPE, MATRIX_WIDTH> C;
};

// ------------------------------------------------------------------------------ the kernel

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    selective_step(const __grid_constant__ Arguments p) {
    overlap_previous();
    constexpr int SHARE = LANES / ROWS;  // lanes that compute the same row's `Once`
    const int lane = threadIdx.x % LANES, mine = lane / SHARE;
    const unsigned group = blockIdx.x / unsigned(p.blocks);
    const unsigned first = (blockIdx.x - group * unsigned(p.blocks)) * (blockDim.x / LANES);
    const unsigned found = first + threadIdx.x / LANES;
    const bool live = found < p.channels;
    const unsigned channel = live ? found : unsigned(p.channels) - 1;
    const long long row = (long long)group * ROWS;
    const int rows = p.batch - row < ROWS ? int(p.batch - row) : ROWS;
    const long long states = FULL ? SPAN : p.states, a_row = p.channels * states;

    const long long in_A = channel * p.A.channel, in_h0 = channel * p.h0.channel;
    const long long in_B = COMMON ? 0 : channel / unsigned(p.per_B) * p.B.channel;
    const long long in_C = COMMON ? 0 : channel / unsigned(p.per_C) * p.C.channel;
    const auto load = [&](Numbers& x, long long n) {
        if constexpr (COMMON) {
            const unsigned at = channel * unsigned(states) + unsigned(n);
            const State* h0 = start<State>(p.h0, Place{0, row});
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (r < rows)
                    x.h[r].pack[0] =
                        Pack<State, STATE_WIDTH>::load_once(h0 + r * p.h0.inner + at);
            x.A.pack[0] = Pack<State, STATE_WIDTH>::load(static_cast<const State*>(p.A.data) + at);
            return;
        }
        if (p.h0.data) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (r < rows)
                    x.h[r].load(start<State>(p.h0, place(row + r, p)) + in_h0 + n * p.h0.state,
                                p.h0.state);
        }
        x.A.load(start<State>(p.A, place(row, p)) + in_A + n * p.A.state, p.A.state);
    };
    const auto load_matrices = [&](Matrices& x, int r, long long n) {
        const Place at = place(row + r, p);
        const long long B_state = COMMON ? 1 : p.B.state, C_state = COMMON ? 1 : p.C.state;
        x.B.load(start<B_TYPE>(p.B, at) + in_B + n * B_state, B_state);
        x.C.load(start<C_TYPE>(p.C, at) + in_C + n * C_state, C_state);
    };

    Numbers numbers;
    long long n = lane * VECTOR;
    if (FULL || n < states) load(numbers, n);
    Matrices ahead[ROWS];  // FULL
    if constexpr (FULL) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            load_matrices(ahead[r], r < rows ? r : 0, n);
    }

    const long long my_row = row + (mine < rows ? mine : 0);
    const Place my_place = place(my_row, p);
    Once once;
    if constexpr (COMMON)
        once.load(p, row, mine < rows ? mine : 0, int(channel));
    else
        once.compute(p, my_place, channel);
    const unsigned cleared = COMMON ? 0 : __ballot_sync(~0u, once.cleared);
    // The other row's number of the same channel, from the lane that has it.
    const auto of_row = [&](Real x, int r) {
        return ROWS == 1 ? x : __shfl_sync(~0u, x, r * SHARE, LANES);
    };
    Real u[ROWS], dd[ROWS], di[ROWS], sum[ROWS], lost[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        u[r] = of_row(once.u, r);
        dd[r] = of_row(once.dd, r);
        di[r] = SPLIT ? of_row(once.di, r) : dd[r];
        sum[r] = lost[r] = Real(0);
    }

    State* last = p.last + row * a_row + channel * unsigned(states);
    const auto work = [&](const Numbers& x, long long n) {
        Pole<State> pole[VECTOR];
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) pole[v] = Pole<State>(x.A[v]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (!COMMON && r >= rows) break;  // a COMMON call has no branch
            Matrices own;
            if constexpr (!FULL) load_matrices(own, r < rows ? r : 0, n);
            const Matrices& matrices = FULL ? ahead[r] : own;
            const auto& B = matrices.B;
            const auto& C = matrices.C;
            Real piece = 0;
            const bool empty = !COMMON && (!p.h0.data || (cleared >> (r * SHARE) & 1));
            Pack<State, VECTOR> h;
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                const Factors<State> f = pole[v].factors(dd[r], di[r]);
                const State before = empty ? Constant<State>::zero() : x.h[r][v];
                if constexpr (GAIN)
                    h.item[v] = step(f.decay, before,
                                     times(times(f.gain, u[r]), widened(B[v])));
                else
                    h.item[v] = step(f.decay, before, times(u[r], widened(B[v])));
                piece = read_out(widened(C[v]), h.item[v], piece);
            }
            if (LOOP) {  // what each addition rounds away is kept: many states lose no digits
                const Real total = add(sum[r], piece), part = add(total, -sum[r]);
                lost[r] = add(lost[r], add(add(sum[r], -add(total, -part)), add(piece, -part)));
                sum[r] = total;
            } else {
                sum[r] = piece;
            }
            if (live && r < rows) h.put(last + r * a_row + n);
        }
    };
    if constexpr (LOOP) {
#pragma unroll 1
        for (; n < states; n += SPAN) {
            const Numbers now = numbers;
            if (n + SPAN < states) load(numbers, n + SPAN);
            work(now, n);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[r] = add(sum[r], lost[r]);
    } else {
        if (FULL || n < states) work(numbers, n);
    }

    // Sum over lanes, the far half first. While a lane holds several rows it gives half of them away.
#pragma unroll
    for (int apart = LANES / 2, held = ROWS; apart > 0; apart /= 2) {
        if (held > 1) {
            held /= 2;
            const bool upper = lane & apart;
#pragma unroll
            for (int r = 0; r < ROWS / 2; ++r) {
                if (r >= held) break;
                const Real keep = upper ? sum[r + held] : sum[r];
                const Real give = upper ? sum[r] : sum[r + held];
                sum[r] = add(keep, __shfl_xor_sync(~0u, give, apart));
            }
        } else {
            sum[0] = add(sum[0], __shfl_xor_sync(~0u, sum[0], apart));
        }
    }
    if (!live || mine >= rows || lane % SHARE) return;
    Real y = COMPLEX ? add(sum[0], sum[0]) : sum[0];
    if (COMMON || p.D.data) y = fma(once.direct, once.input, y);
    if (COMMON || p.z.data) y = mul(y, mul(once.gate, sigmoid(once.gate)));
    p.y[my_row * p.channels + channel] = narrow<T>(typename StateOf<T>::type(y));
}
