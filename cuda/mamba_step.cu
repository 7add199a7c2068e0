// SPDX-License-Identifier: MIT
// A Mamba block's decode step, second half: delta = dt_scale softplus(dt_proj r + dt_bias),
// h = A_bar h + gain B v, y = (sum_n C h + D v) silu(z), and what the convolution has seen last.
//
// Memory contract: `Arguments` in mamba_step.cuh. The state is read once and written once, 2 x 6.3 MB for
// 64 rows of 1536 channels with 16 states; A and dt_proj once for ROWS rows. next may be h and tail may
// be conv: every number is read before it is written, h by the thread that writes it, conv by its warp.
//
// Launch. LANES neighbouring threads have a channel; each owns VECTOR neighbouring states out of every
// LANES * VECTOR, and RANK_VECTOR neighbours of r out of every LANES * RANK_VECTOR, of ROWS rows of the
// batch (ROWS <= LANES). What a channel has once a row (v, step, gate) some lanes compute and hand to the
// others. Grid: tiles of channels (p.tiles) x tiles of rows. VECTOR, LANES and RANK_VECTOR depend on the
// numbers of states and of r and on dtypes alone and fix the order of sums, first in a lane, then over
// lanes from the far ones to the near; ROWS and the block change no bit.
//
// Compiled for DTYPE, TAPS, SCHEME and SPLIT (discretize.cuh), VECTOR, LANES, ROWS, RANK_VECTOR, LOOP
// (more than one piece of VECTOR states a lane), RANK_UNROLL, THREADS and BLOCKS. Overlaps the kernel
// before.
#include "mamba_step.cuh"
#include "discretize.cuh"

constexpr int SHARE = LANES / ROWS;  // lanes that have the same row's `Once`

// Numbers of type State, 16 bytes at a time where they are that many.
template <int COUNT>
struct Wide {
    static constexpr int EACH = COUNT * int(sizeof(State)) > 16 ? 16 / int(sizeof(State)) : COUNT;
    Pack<State, EACH> pack[COUNT / EACH];

    __device__ __forceinline__ void load(const State* from) {
#pragma unroll
        for (int i = 0; i < COUNT / EACH; ++i)
            pack[i] = Pack<State, EACH>::load(from + i * EACH);
    }
    __device__ __forceinline__ State operator[](int i) const {
        return pack[i / EACH].item[i % EACH];
    }
};

// Sum each of ROWS numbers over the lanes of a channel; a lane gets that of its row.
__device__ __forceinline__ State over_lanes(State (&sum)[ROWS], int lane) {
#pragma unroll
    for (int apart = LANES / 2, held = ROWS; apart > 0; apart /= 2) {
        if (held > 1) {
            held /= 2;
            const bool upper = lane & apart;
#pragma unroll
            for (int r = 0; r < ROWS / 2; ++r) {
                if (r >= held) break;
                const State keep = upper ? sum[r + held] : sum[r];
                const State give = upper ? sum[r] : sum[r + held];
                sum[r] = add(keep, __shfl_xor_sync(~0u, give, apart));
            }
        } else {
            sum[0] = add(sum[0], __shfl_xor_sync(~0u, sum[0], apart));
        }
    }
    return sum[0];
}

struct Numbers {  // VECTOR neighbouring states of ROWS rows
    Pack<State, VECTOR> A, h[ROWS];

    __device__ __forceinline__ void load(const Arguments& p, const State* A_from, long long at,
                                         int rows, long long n) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (r < rows)
                h[r] = Pack<State, VECTOR>::load(p.h + at + r * p.channels * p.states + n);
        A = Pack<State, VECTOR>::load(A_from + n);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    mamba_step(const __grid_constant__ Arguments p) {
    overlap_previous();
    const int lane = threadIdx.x % LANES, mine = lane / SHARE;
    const long long tile = blockIdx.x / unsigned(p.tiles), row = tile * ROWS;
    const long long found = (blockIdx.x - tile * p.tiles) * (THREADS / LANES) + threadIdx.x / LANES;
    const bool live = found < p.channels;
    const long long channel = live ? found : p.channels - 1;
    const int rows = p.batch - row < ROWS ? int(p.batch - row) : ROWS;
    const long long my_row = row + (mine < rows ? mine : 0);

    const State* mixed = p.mixed + row * p.pitch;

    // Everything that is read from far away is asked for first.
    const State* A = p.A + channel * p.states;
    const long long at = (row * p.channels + channel) * p.states;
    Numbers numbers;
    long long n = lane * VECTOR;
    if (n < p.states) numbers.load(p, A, at, rows, n);
    Pack<T, 1> weight[TAPS], bias, seen[TAPS];
    load_weights(p, channel, weight, bias);
    State v[1];
    convolve(p, my_row, channel, weight, bias, seen, v);
    const State z = widen(p.xz[(my_row * 2 + 1) * p.channels + channel]);
    const State direct = p.D[channel];

    State sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = State(0);
#pragma unroll RANK_UNROLL
    for (long long i = lane * RANK_VECTOR; i < p.rank; i += LANES * RANK_VECTOR) {
        const auto w = Pack<T, RANK_VECTOR>::load(p.dt_proj + channel * p.rank + i);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            Wide<RANK_VECTOR> in;
            in.load(mixed + (r < rows ? r : 0) * p.pitch + i);
#pragma unroll
            for (int k = 0; k < RANK_VECTOR; ++k)
                sum[r] = fma(State(widen(w.item[k])), in[k], sum[r]);
        }
    }
    State di = softplus(add(over_lanes(sum, lane), p.dt_bias[channel]));
    di = mul(di, State(p.dt_scale));
    State dd = p.decay_dt ? p.decay_dt[channel] : di;
    if (p.timesteps) {
        const State elapsed = p.timesteps[my_row];
        dd = mul(elapsed, dd);
        if (!p.state_only) di = mul(elapsed, di);
    }
    const State drive = SCHEME == MAMBA ? mul(di, v[0]) : v[0];  // its gain, the same for all states

    // Another row's number of the same channel, from the lane that has it.
    const auto of_row = [&](State x, int r) {
        return ROWS == 1 ? x : __shfl_sync(~0u, x, r * SHARE, LANES);
    };
    State u[ROWS], decay_step[ROWS], input_step[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        u[r] = of_row(drive, r);
        decay_step[r] = of_row(dd, r);
        input_step[r] = SPLIT ? of_row(di, r) : decay_step[r];
        sum[r] = State(0);
    }
    __syncwarp();  // the whole warp has read conv
    if (live && mine < rows && lane % SHARE == 0) {
        T* tail = p.tail + my_row * (TAPS - 1) * p.channels + channel;
#pragma unroll
        for (int k = 0; k < TAPS - 1; ++k) seen[k + 1].store(tail + k * p.channels);
    }

    const auto work = [&](Numbers& x) {
        Pole<State> pole[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) pole[i] = Pole<State>(x.A.item[i]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (r >= rows) break;
            const auto B = Pack<State, VECTOR>::load(mixed + r * p.pitch + p.B_at + n);
            const auto C = Pack<State, VECTOR>::load(mixed + r * p.pitch + p.C_at + n);
            State piece = State(0);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                const Factors<State> f = pole[i].factors(decay_step[r], input_step[r]);
                State input = mul(u[r], B.item[i]);
                if constexpr (GAIN) input = mul(f.gain, input);
                x.h[r].item[i] = fma(f.decay, x.h[r].item[i], input);
                piece = fma(C.item[i], x.h[r].item[i], piece);
            }
            sum[r] = LOOP ? add(sum[r], piece) : piece;
        }
        // Stores come last: for all the compiler knows they might change what is still to be loaded.
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (live && r < rows) x.h[r].store(p.next + at + r * p.channels * p.states + n);
    };
    if constexpr (LOOP) {
#pragma unroll 1
        for (; n < p.states; n += LANES * VECTOR) {
            Numbers now = numbers;
            const long long ahead = n + LANES * VECTOR;
            if (ahead < p.states) numbers.load(p, A, at, rows, ahead);
            work(now);
        }
    } else {
        if (n < p.states) work(numbers);
    }

    const State read = over_lanes(sum, lane);
    if (!live || mine >= rows || lane % SHARE) return;
    const State y = mul(fma(direct, v[0], read), mul(z, sigmoid(z)));
    p.y[my_row * p.channels + channel] = narrow<T>(y);
}
