// SPDX-License-Identifier: MIT
// One step of a diagonal state for each channel, with a low-rank part or without (S4D, S4):
// h = a h - sum_r U_r 2 Re(V_r . h) + B u, y = scale Re(C . h) + D u.
//
// Memory contract. Everything is compact but for strides of rows in elements, 0 for what rows share.
// u (rows, H) is DTYPE; the state (rows, H, M), a and B (H, M) or (rows, H, M), U and V (RANK, H, M) or
// (rows, RANK, H, M) are STATE, complex or real; C_re and C_im (Ch, H, M), C_im null for zeros, and D
// (Ch, H) or null are REAL. Written are the next state (rows, H, M), which may be the memory of the
// state, and y (rows, Ch, H) as DTYPE. The state is read once and written once, 2 x 8.4 MB for 64 rows
// of 512 channels with 32 complex states; the parameters are read once for ROWS rows.
//
// Launch. LANES neighbouring threads have a channel of ROWS rows; each owns VECTOR neighbouring states
// out of every LANES VECTOR. Both depend on M and the dtype alone and fix the order of the sums over
// states: first in a lane, then over lanes from the far ones to the near.
//
// Compiled for DTYPE, REAL, STATE, LANES, VECTOR, ROWS and RANK; ROWS at most LANES, and above 1 where
// rows share a, B, U and V.
#include "step_sums.cuh"

using S = STATE;
constexpr int THREADS = 128;
constexpr bool COMPLEX = sizeof(S) > sizeof(R);

struct Arguments {
    const T* u;
    const S *h, *a, *B, *U, *V;
    const R *C_re, *C_im, *D;
    T* y;
    S* next;
    double scale;
    long long rows, width, states, channels;
    long long u_row, h_row, a_row, B_row, low_row;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

__device__ __forceinline__ R scaled(R x, R y) { return mul(x, y); }
__device__ __forceinline__ Complex<R> scaled(Complex<R> x, R y) {
    return {mul(x.re, y), mul(x.im, y)};
}
__device__ __forceinline__ R less(R x, R y, R z) { return fma(-x, y, z); }  // z - x y
__device__ __forceinline__ Complex<R> less(Complex<R> x, R y, Complex<R> z) {
    return {fma(-x.re, y, z.re), fma(-x.im, y, z.im)};
}
// sum + Re(x y)
__device__ __forceinline__ R real_part(R x, R y, R sum) { return fma(x, y, sum); }
__device__ __forceinline__ R real_part(Complex<R> x, Complex<R> y, R sum) {
    return fma(-x.im, y.im, fma(x.re, y.re, sum));
}
__device__ __forceinline__ R read_out(R re, R im, R h, R sum) { return fma(re, h, sum); }
__device__ __forceinline__ R read_out(R re, R im, Complex<R> h, R sum) {
    return fma(-im, h.im, fma(re, h.re, sum));
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    siso_step(const __grid_constant__ Arguments p) {
    overlap_previous();
    constexpr int GROUPS = THREADS / LANES;
    using States = Pack<S, VECTOR>;
    using Reals = Pack<R, VECTOR>;
    const int lane = threadIdx.x % LANES;
    const long long blocks = (p.width + GROUPS - 1) / GROUPS;
    const long long first = blockIdx.x / blocks * ROWS;
    const long long found = blockIdx.x % blocks * GROUPS + threadIdx.x / LANES;
    const bool live = found < p.width;
    const long long i = live ? found : p.width - 1;
    const int rows = p.rows - first < ROWS ? int(p.rows - first) : ROWS;
    const long long size = p.width * p.states, at = i * p.states;

    R u[ROWS];
    const S* before[ROWS];
    S* after[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const long long row = first + (r < rows ? r : 0);
        u[r] = wide(p.u[row * p.u_row + i]);
        before[r] = p.h + row * p.h_row + at;
        after[r] = p.next + row * size + at;
    }

    R feedback[RANK ? RANK : 1][ROWS];
    if constexpr (RANK > 0) {
#pragma unroll
        for (int k = 0; k < RANK; ++k) {
            R sum[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sum[r] = R(0);
#pragma unroll 1
            for (long long n = lane * VECTOR; n < p.states; n += LANES * VECTOR) {
                const States v = States::load(p.V + first * p.low_row + k * size + at + n);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const States h = States::load(before[r] + n);
#pragma unroll
                    for (int j = 0; j < VECTOR; ++j) sum[r] = real_part(v.item[j], h.item[j], sum[r]);
                }
            }
            sum_over_lanes<LANES>(sum);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const R whole = __shfl_sync(~0u, sum[0], r * (LANES / ROWS), LANES);
                feedback[k][r] = add(whole, whole);
            }
        }
    }

    R sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = R(0);
#pragma unroll 1
    for (long long n = lane * VECTOR; n < p.states; n += LANES * VECTOR) {
        const Reals re = Reals::load(p.C_re + at + n);
        Reals im;
        if (COMPLEX && p.C_im) im = Reals::load(p.C_im + at + n);
        const States a = States::load(p.a + first * p.a_row + at + n);
        const States B = States::load(p.B + first * p.B_row + at + n);
        States low[RANK ? RANK : 1], h[ROWS];
#pragma unroll
        for (int k = 0; k < RANK; ++k)
            low[k] = States::load(p.U + first * p.low_row + k * size + at + n);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) h[r] = States::load(before[r] + n);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                S& x = h[r].item[j];
                x = fma(a.item[j], x, scaled(B.item[j], u[r]));
#pragma unroll
                for (int k = 0; k < RANK; ++k) x = less(low[k].item[j], feedback[k][r], x);
                sum[r] = read_out(re.item[j], COMPLEX && p.C_im ? im.item[j] : R(0), x, sum[r]);
            }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (live && r < rows) h[r].store(after[r] + n);
    }

    for (long long c = 0;;) {
        sum_over_lanes<LANES>(sum);
        const int mine = lane / (LANES / ROWS);
        if (live && mine < rows && lane % (LANES / ROWS) == 0) {
            const long long row = first + mine, spot = c * p.width + i;
            R y = mul(R(p.scale), sum[0]);
            if (p.D) y = fma(p.D[spot], wide(p.u[row * p.u_row + i]), y);
            p.y[row * p.channels * p.width + spot] = stored(y);
        }
        if (++c == p.channels) return;
        // The other outputs of the channel read what this very lane has stored.
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[r] = R(0);
        const long long from = c * size + at;
#pragma unroll 1
        for (long long n = lane * VECTOR; n < p.states; n += LANES * VECTOR) {
            const Reals re = Reals::load(p.C_re + from + n);
            Reals im;
            if (COMPLEX && p.C_im) im = Reals::load(p.C_im + from + n);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (r >= rows) break;
                const States h = States::load(after[r] + n);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j)
                    sum[r] = read_out(re.item[j], COMPLEX && p.C_im ? im.item[j] : R(0), h.item[j],
                                      sum[r]);
            }
        }
    }
}
