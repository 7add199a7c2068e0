// SPDX-License-Identifier: MIT
// y = x W^T + b for some rows of x, for decoding: tiles of y, the inputs split over the warps of a block.
//
// Memory contract. x is (rows, inputs) and W (outputs, inputs) with neighbours in the last axis and any
// stride of the other, b (outputs) or null, y (rows, outputs) compact; all stored as DTYPE, summed in
// float32 or wider. Each tile of y reads its rows of x and of W once, past the L1 cache: W is read
// ceil(rows / ROWS) times, x ceil(outputs / OUTPUTS) times, from the L2 cache but for the first.
//
// Launch. A block has ROWS rows and OUTPUTS outputs, and each of its SHARES warps all of them: a lane the
// rows lane / 8 + 4 i and the outputs lane % 8 + 8 j, as a table of sums. A warp owns CHUNK neighbouring
// inputs out of every SHARES * CHUNK, copies them into shared memory of its own, STAGES chunks under
// way, and waits for no other warp before the end. CHUNK, SHARES and LONG depend on the number of inputs
// and the dtype alone and fix the order of a sum: along a warp's inputs, then over the warps in order.
// The longer a sum in a row the more it errs, so that a warp with many chunks (LONG) adds sums of RUN
// chunks. All else changes no bit. Grid: tiles of rows (p.tiles) x tiles of outputs, the former next to
// each other. Dynamic shared memory: SHARES * REGION pieces of 16 bytes.
//
// Compiled for DTYPE, LANE_ROWS and LANE_OUTPUTS (of a lane), SHARES, LONG, PIECES (of 16 bytes, in a
// chunk; 2, 4 or 8), STAGES, COPIED (numbers copied at a time, which divide inputs, strides and
// addresses), UNROLL (pieces of a chunk) and BLOCKS (of a multiprocessor, at least). Overlaps the kernel
// before; where no kernel in flight writes the weight (p.settled), it is asked for ahead of the wait.
#include "memory.cuh"
#include "numbers.cuh"
#include "pipeline.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;

struct Arguments {
    const T *x, *weight, *bias;  // bias null: none
    T* y;
    long long rows, inputs, outputs;
    long long x_row, weight_row;  // strides in elements
    long long tiles;              // of rows
    long long settled;            // whether no kernel before this one may write the weight
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr int VECTOR = 16 / sizeof(T);  // numbers of a piece
constexpr int CHUNK = PIECES * VECTOR, ROWS = 4 * LANE_ROWS, OUTPUTS = 8 * LANE_OUTPUTS;
constexpr int RUN = 2;  // chunks that a warp sums in a row where it has many
constexpr int STAGE = (ROWS + OUTPUTS) * PIECES;  // in pieces, as all of these
constexpr int PARTIAL = LANE_ROWS * LANE_OUTPUTS * 32 * sizeof(State) / 16;
constexpr int REGION = STAGES * STAGE > PARTIAL ? STAGES * STAGE : PARTIAL;
using Piece = Pack<T, VECTOR>;

extern __shared__ uint4 arena[];

// Where piece k of row r lies: eight rows' k-th pieces fill the banks.
__device__ __forceinline__ int place(int r, int k) {
    return r * PIECES + (k ^ (r / (8 / PIECES) % PIECES));
}

// Ask for a chunk, which begins at input `start`, of COUNT rows of `from`, of which `rows` exist. What
// lies past the inputs becomes zeros, what lies past the rows is left alone.
template <int COUNT>
__device__ __forceinline__ void ask(uint4* to, const T* from, long long row, long long rows,
                                    long long start, long long inputs) {
    constexpr int ACROSS = CHUNK / COPIED, AT_ONCE = ACROSS < 32 ? 32 / ACROSS : 1;
    const int lane = threadIdx.x % 32;
    Pack<T, COPIED> nothing;
#pragma unroll
    for (int v = 0; v < COPIED; ++v) nothing.item[v] = T{};
#pragma unroll
    for (int c = 0; c < ACROSS; c += 32) {
        const int unit = ACROSS < 32 ? lane % ACROSS : c + lane;
        const long long k = start + unit * COPIED;
        const T* source = from + k;
#pragma unroll
        for (int first = 0; first < COUNT; first += AT_ONCE) {
            const int r = first + (ACROSS < 32 ? lane / ACROSS : 0);
            if (r >= rows || (COUNT % AT_ONCE && r >= COUNT)) continue;
            T* target = reinterpret_cast<T*>(to + place(r, unit * COPIED / VECTOR)) +
                        unit * COPIED % VECTOR;
            if (k < inputs)
                copy_async<int(sizeof(T)) * COPIED>(target, source + r * row);
            else
                nothing.store(target);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * SHARES, BLOCKS)
    linear_tile(const __grid_constant__ Arguments p) {
    let_next_begin();
    const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const int my_row = lane / 8, my_output = lane % 8;
    const long long tile = blockIdx.x / unsigned(p.tiles);
    const long long row = (blockIdx.x - tile * p.tiles) * ROWS, output = tile * OUTPUTS;
    const long long rows = p.rows - row, outputs = p.outputs - output;
    const T *x = p.x + row * p.x_row, *weight = p.weight + output * p.weight_row;
    uint4* const mine = arena + slice * REGION;

    auto ask_x = [&](long long start, int stage) {
        ask<ROWS>(mine + stage * STAGE, x, p.x_row, rows, start, p.inputs);
    };
    auto ask_weight = [&](long long start, int stage) {
        ask<OUTPUTS>(mine + stage * STAGE + ROWS * PIECES, weight, p.weight_row, outputs, start,
                     p.inputs);
    };
    constexpr int HOP = SHARES * CHUNK;
    long long ahead = slice * CHUNK;
    if (p.settled) {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage)
            if (ahead + stage * HOP < p.inputs) ask_weight(ahead + stage * HOP, stage);
    }
    await_previous();
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
        if (ahead < p.inputs) {
            if (!p.settled) ask_weight(ahead, stage);
            ask_x(ahead, stage);
        }
        commit();
        ahead += HOP;
    }

    State sum[LANE_ROWS][LANE_OUTPUTS];
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
        for (int j = 0; j < LANE_OUTPUTS; ++j) sum[i][j] = State(0);

    State total[LONG ? LANE_ROWS : 1][LONG ? LANE_OUTPUTS : 1];
    const auto gather = [&] {
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
            for (int j = 0; j < LANE_OUTPUTS; ++j) {
                total[i][j] = add(total[i][j], sum[i][j]);
                sum[i][j] = State(0);
            }
    };
    if constexpr (LONG) {
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
            for (int j = 0; j < LANE_OUTPUTS; ++j) total[i][j] = State(0);
    }

    int stage = 0, in_a_row = 0;
#pragma unroll 1
    for (long long start = slice * CHUNK; start < p.inputs; start += HOP) {
        wait_for<STAGES - 1>();
        __syncwarp();
        const uint4* in = mine + stage * STAGE;
#pragma unroll UNROLL
        for (int k = 0; k < PIECES; ++k) {
            Piece a[LANE_ROWS];
#pragma unroll
            for (int i = 0; i < LANE_ROWS; ++i) a[i].word = in[place(my_row + 4 * i, k)];
#pragma unroll
            for (int j = 0; j < LANE_OUTPUTS; ++j) {
                Piece b;
                b.word = in[ROWS * PIECES + place(my_output + 8 * j, k)];
#pragma unroll
                for (int v = 0; v < VECTOR; ++v)
#pragma unroll
                    for (int i = 0; i < LANE_ROWS; ++i)
                        sum[i][j] = fma(State(widen(a[i].item[v])), State(widen(b.item[v])), sum[i][j]);
            }
        }
        if (ahead < p.inputs) {
            __syncwarp();  // all lanes have read
            ask_weight(ahead, stage);
            ask_x(ahead, stage);
        }
        commit();
        ahead += HOP;
        stage = stage + 1 < STAGES ? stage + 1 : 0;
        if constexpr (LONG) {
            if (++in_a_row == RUN) {
                gather();
                in_a_row = 0;
            }
        }
    }
    if constexpr (LONG) {
        gather();
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
            for (int j = 0; j < LANE_OUTPUTS; ++j) sum[i][j] = total[i][j];
    }

    auto store = [&](int e, State total) {
        const int r = my_row + e / LANE_OUTPUTS * 4, o = my_output + e % LANE_OUTPUTS * 8;
        if (r >= rows || o >= outputs) return;
        if (p.bias) total = add(total, State(widen(p.bias[output + o])));
        p.y[(row + r) * p.outputs + output + o] = narrow<T>(total);
    };
    if constexpr (SHARES == 1) {
#pragma unroll
        for (int e = 0; e < LANE_ROWS * LANE_OUTPUTS; ++e)
            store(e, sum[e / LANE_OUTPUTS][e % LANE_OUTPUTS]);
    } else {
        __syncwarp();
        State* const partial = reinterpret_cast<State*>(mine);
#pragma unroll
        for (int e = 0; e < LANE_ROWS * LANE_OUTPUTS; ++e)
            partial[e * 32 + lane] = sum[e / LANE_OUTPUTS][e % LANE_OUTPUTS];
        __syncthreads();
        for (int e = slice; e < LANE_ROWS * LANE_OUTPUTS; e += SHARES) {
            State total = reinterpret_cast<State*>(arena)[e * 32 + lane];
#pragma unroll
            for (int s = 1; s < SHARES; ++s)
                total = add(total, reinterpret_cast<State*>(arena + s * REGION)[e * 32 + lane]);
            store(e, total);
        }
    }
}
