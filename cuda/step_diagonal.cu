// SPDX-License-Identifier: MIT
// One step of a diagonal complex state that all channels share (S5, LRU, Event-SSM): `diagonal_drive` makes
// h = a h + gain (B u), `diagonal_read` makes y = scale Re(C h) + D u.
//
// Memory contract. Everything is compact but for strides of rows in elements, 0 for what rows share.
// drive reads u (rows, H) as DTYPE, the state (rows, P), a and gain (P) or (rows, P) and B (P, H)
// complex, and writes the next state (rows, P), which may be the memory of the state. Where SCHEME is
// one of discretize.cuh's, a is the continuous state matrix A (P) and decay and gain are made of dt (P)
// or (rows, P) and timesteps (rows). read reads u, the next state, C_re and C_im (H_out, P) and D (H) or
// (H_out, H), and writes y (rows, H_out) as DTYPE. Matrices are read once for ROWS rows: at 1 to 8 rows
// of H = 512, P = 256 that is 1 MB a kernel and all there is to move; u and the states are near.
//
// Launch. A warp has COLUMNS states (or outputs) of ROWS rows, its lanes share the sum over channels (or
// states) in packs of VECTOR numbers; VECTOR depends on dtype and sizes alone, so a row's result does
// not depend on the rows around it. Sums go over lanes the far half first.
//
// Compiled for ENTRY (which kernel), DTYPE, REAL, SCHEME, SPLIT, WARPS of a block, ROWS, COLUMNS and VECTOR; ROWS COLUMNS
// at most 16.
#include "discretize.cuh"
#include "step_sums.cuh"

using C = Complex<R>;
constexpr int AHEAD = ROWS == 1 ? 4 : 2;  // packs of a matrix that are under way

struct Arguments {
    const T* u;
    const C *h, *a, *gain;
    const R *dt, *timesteps;
    const C* B;
    C* next;
    const R *C_re, *C_im, *D;
    T* y;
    double scale;
    long long rows, width, states, outputs;
    long long u_row, h_row, a_row, gain_row, dt_row, timesteps_row;
    long long dense;  // D is a matrix
    long long state_only;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// The block's warp's first row and column; columns of neighbouring blocks are neighbours.
struct Task {
    long long row, column;

    __device__ __forceinline__ explicit Task(long long columns) {
        const long long blocks = (columns + WARPS * COLUMNS - 1) / (WARPS * COLUMNS);
        row = blockIdx.x / blocks * ROWS;
        column = (blockIdx.x % blocks * WARPS + threadIdx.x / 32) * COLUMNS;
    }
};

__device__ __forceinline__ long long within(long long i, long long size) {
    return i < size ? i : size - 1;
}

#if ENTRY == 0
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    diagonal_drive(const __grid_constant__ Arguments p) {
    overlap_previous();
    constexpr int N = 2 * ROWS * COLUMNS;
    const Task task(p.states);
    if (task.column >= p.states) return;
    const int lane = threadIdx.x % 32;
    const T* u[ROWS];
    const C* B[COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) u[r] = p.u + within(task.row + r, p.rows) * p.u_row;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) B[c] = p.B + within(task.column + c, p.states) * p.width;
    R sum[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = R(0);
#pragma unroll AHEAD
    for (long long k = lane * VECTOR; k < p.width; k += 32 * VECTOR) {
        Pack<C, VECTOR> b[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) b[c] = Pack<C, VECTOR>::load(B[c] + k);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Pack<T, VECTOR> x = Pack<T, VECTOR>::load(u[r] + k);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                const R value = wide(x.item[v]);
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    R* s = sum + (r * COLUMNS + c) * 2;
                    s[0] = fma(b[c].item[v].re, value, s[0]);
                    s[1] = fma(b[c].item[v].im, value, s[1]);
                }
            }
        }
    }
    sum_over_lanes<32>(sum);
    constexpr int EACH = 32 / N;  // lanes that have the same number
    C b;
    b.re = sum[0];
    b.im = __shfl_down_sync(~0u, sum[0], EACH);
    const int item = lane / EACH / 2;
    const long long row = task.row + item / COLUMNS, state = task.column + item % COLUMNS;
    if (lane % (2 * EACH) || row >= p.rows || state >= p.states) return;

    C decay = p.a[row * p.a_row + state];
    if constexpr (SCHEME != NONE) {
        R dd = p.dt[row * p.dt_row + state], di = dd;
        if (p.timesteps) {
            dd = mul(p.timesteps[row * p.timesteps_row], dd);
            if (!p.state_only) di = dd;
        }
        const Factors<C> f = Pole<C>(decay).factors(dd, di);
        decay = f.decay;
        if (GAIN) b = mul(f.gain, b);
        if (SCHEME == MAMBA) b = scale(b, di);
    } else if (p.gain) {
        b = mul(p.gain[row * p.gain_row + state], b);
    }
    p.next[row * p.states + state] = fma(decay, p.h[row * p.h_row + state], b);
}
#endif

#if ENTRY == 1
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    diagonal_read(const __grid_constant__ Arguments p) {
    overlap_previous();
    constexpr int N = ROWS * COLUMNS;
    const Task task(p.outputs);
    if (task.column >= p.outputs) return;
    const int lane = threadIdx.x % 32;
    const C* h[ROWS];
    const R *re[COLUMNS], *im[COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) h[r] = p.next + within(task.row + r, p.rows) * p.states;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        const long long start = within(task.column + c, p.outputs) * p.states;
        re[c] = p.C_re + start;
        im[c] = p.C_im + start;
    }
    R sum[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = R(0);
#pragma unroll AHEAD
    for (long long k = lane * VECTOR; k < p.states; k += 32 * VECTOR) {
        Pack<R, VECTOR> c_re[COLUMNS], c_im[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            c_re[c] = Pack<R, VECTOR>::load(re[c] + k);
            c_im[c] = Pack<R, VECTOR>::load(im[c] + k);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Pack<C, VECTOR> x = Pack<C, VECTOR>::load(h[r] + k);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    R& s = sum[r * COLUMNS + c];
                    s = fma(-c_im[c].item[v], x.item[v].im, fma(c_re[c].item[v], x.item[v].re, s));
                }
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = mul(R(p.scale), sum[i]);
    if (p.dense) {
        for (long long k = lane; k < p.width; k += 32)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const R d = p.D[within(task.column + c, p.outputs) * p.width + k];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const T x = p.u[within(task.row + r, p.rows) * p.u_row + k];
                    sum[r * COLUMNS + c] = fma(d, wide(x), sum[r * COLUMNS + c]);
                }
            }
    }
    sum_over_lanes<32>(sum);
    constexpr int EACH = 32 / N;
    const int item = lane / EACH;
    const long long row = task.row + item / COLUMNS, output = task.column + item % COLUMNS;
    if (lane % EACH || row >= p.rows || output >= p.outputs) return;
    R y = sum[0];
    if (!p.dense) y = fma(p.D[output], wide(p.u[row * p.u_row + output]), y);
    p.y[row * p.outputs + output] = stored(y);
}
#endif
