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
// Overlaps the kernel before, and does not wait to read what that has not written. The kernel before is
// mamba_step_mixed or mamba_step_many: it writes nothing but `mixed`, and it waits before it lets this one
// begin, so that all that came before it has ended. What this kernel writes that one may still read
// (conv), so it writes after its wait.
//
// Compiled for DTYPE, TAPS, SCHEME and SPLIT (discretize.cuh), VECTOR, LANES, ROWS, RANK_VECTOR, RANK_HELD
// (pieces of dt_proj that a lane reads before the wait), FULL_RANK (the rank if that is RANK_HELD such pieces
// of every lane, otherwise 0), FULL (N is LANES * VECTOR), LOOP (more than one piece of VECTOR states a
// lane), THREADS and BLOCKS.
#include "mamba_step.cuh"
#include "discretize.cuh"

constexpr int SHARE = LANES / ROWS;  // lanes that have the same row's numbers

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

constexpr int RANK_STEP = LANES * RANK_VECTOR, SPAN = LANES * VECTOR;

struct Numbers {  // VECTOR neighbouring states of ROWS rows
    Pack<State, VECTOR> A, h[ROWS];

    __device__ __forceinline__ void load(const Arguments& p, const State* h_from, long long apart,
                                         int rows, int at) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (r < rows) h[r] = Pack<State, VECTOR>::load_once(h_from + r * apart + at);
        A = Pack<State, VECTOR>::load(p.A + at);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    mamba_step(const __grid_constant__ Arguments p) {
    let_next_begin();
    const int lane = threadIdx.x % LANES, mine = lane / SHARE;
    const int channels = int(p.channels);
    const int states = FULL ? SPAN : int(p.states), rank = FULL_RANK ? FULL_RANK : int(p.rank);
    const unsigned tile = blockIdx.x / unsigned(p.tiles);
    const long long row = (long long)tile * ROWS, apart = (long long)channels * states;
    const int found = int(blockIdx.x - tile * unsigned(p.tiles)) * (THREADS / LANES) +
                      int(threadIdx.x) / LANES;
    const bool live = found < channels;
    const int channel = live ? found : channels - 1;
    const int rows = p.batch - row < ROWS ? int(p.batch - row) : ROWS;
    const int own_row = mine < rows ? mine : 0;

    // Everything that is read from far away is asked for first.
    const State* h = p.h + row * apart;
    Numbers numbers;
    int n = lane * VECTOR;
    if (FULL || n < states) numbers.load(p, h, apart, rows, channel * states + n);
    __syncwarp();  // the compiler moves no load across
    Taps<1> taps;
    taps.load(p, channel);
    const T* dt_proj = p.dt_proj + channel * rank;
    Pack<T, RANK_VECTOR> held[RANK_HELD];
#pragma unroll
    for (int k = 0; k < RANK_HELD; ++k) {
        const int i = lane * RANK_VECTOR + k * RANK_STEP;
        if (FULL_RANK || i < rank) held[k] = Pack<T, RANK_VECTOR>::load(dt_proj + i);
    }
    Pack<T, 1> seen[TAPS];
    const T* xz = p.xz + row * 2 * channels + own_row * 2 * channels + channel;
    load_samples(p.conv + row * (TAPS - 1) * channels + own_row * (TAPS - 1) * channels + channel, xz,
                 channels, seen);
    const T z_read = xz[channels];
    const State direct = p.D[channel], dt_bias = p.dt_bias[channel];
    const State decay_dt = p.decay_dt ? p.decay_dt[channel] : State(0);
    const State elapsed = p.timesteps ? p.timesteps[row + own_row] : State(0);
    __syncwarp();
    const State z = widen(z_read);
    // Kept in shared memory, so that it is there before the wait: the compiler would rather compute it
    // behind it.
    __shared__ State kept[2][THREADS];
    kept[0][threadIdx.x] = taps.output(seen, 0);
    kept[1][threadIdx.x] = mul(z, sigmoid(z));

    await_previous();
    const State v = kept[0][threadIdx.x], gate = kept[1][threadIdx.x];
    const State* mixed = p.mixed + row * p.pitch;
    const int pitch = int(p.pitch);
    State sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = State(0);
    const auto product = [&](const Pack<T, RANK_VECTOR>& w, int i) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            Wide<RANK_VECTOR> in;
            in.load(mixed + (r < rows ? r : 0) * pitch + i);
#pragma unroll
            for (int k = 0; k < RANK_VECTOR; ++k)
                sum[r] = fma(State(widen(w.item[k])), in[k], sum[r]);
        }
    };
#pragma unroll
    for (int k = 0; k < RANK_HELD; ++k) {
        const int i = lane * RANK_VECTOR + k * RANK_STEP;
        if (FULL_RANK || i < rank) product(held[k], i);
    }
    if constexpr (!FULL_RANK) {
#pragma unroll 2
        for (int i = lane * RANK_VECTOR + RANK_HELD * RANK_STEP; i < rank; i += RANK_STEP)
            product(Pack<T, RANK_VECTOR>::load(dt_proj + i), i);
    }
    State di = softplus(add(over_lanes(sum, lane), dt_bias));
    di = mul(di, State(p.dt_scale));
    State dd = p.decay_dt ? decay_dt : di;
    if (p.timesteps) {
        dd = mul(elapsed, dd);
        if (!p.state_only) di = mul(elapsed, di);
    }
    const State drive = SCHEME == MAMBA ? mul(di, v) : v;  // its gain, the same for all states

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
        T* tail = p.tail + row * (TAPS - 1) * channels + mine * (TAPS - 1) * channels + channel;
#pragma unroll
        for (int k = 0; k < TAPS - 1; ++k) seen[k + 1].store(tail + k * channels);
    }

    State* next = p.next + row * apart;
    const int B_at = int(p.B_at), C_at = int(p.C_at);
    const auto work = [&](Numbers& x) {
        Pole<State> pole[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) pole[i] = Pole<State>(x.A.item[i]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {  // those from `rows` on for nothing: no branch
            const int there = r < rows ? r : 0;
            const auto B = Pack<State, VECTOR>::load(mixed + there * pitch + B_at + n);
            const auto C = Pack<State, VECTOR>::load(mixed + there * pitch + C_at + n);
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
            if (live && r < rows) x.h[r].put(next + r * apart + channel * states + n);
    };
    if constexpr (LOOP) {
#pragma unroll 1
        for (; n < states; n += SPAN) {
            Numbers now = numbers;
            if (n + SPAN < states) numbers.load(p, h, apart, rows, channel * states + n + SPAN);
            work(now);
        }
    } else {
        if (FULL || n < states) work(numbers);
    }

    const State read = over_lanes(sum, lane);
    if (!live || mine >= rows || lane % SHARE) return;
    p.y[row * channels + mine * channels + channel] =
        narrow<T>(mul(fma(direct, v, read), gate));
}
