// SPDX-License-Identifier: MIT
// y = x W^T + b on tensor cores for 5 to some 128 rows of x, for decoding: in little more time than it takes
// to be launched behind the kernel that writes x.
//
// Memory contract. x is (rows, inputs), compact, W (outputs, inputs) with neighbours in the last axis and
// any stride of the other, b (outputs) or null, y (rows, outputs) compact; all stored as DTYPE, products
// exact and sums float32. Rows of x and W begin at multiples of 16 bytes. W is read once a tile of rows,
// 4.7 MB for 3072 x 768, from the L2 cache but for the first time, x once a tile of outputs.
//
// Launch. A block has a tile of HEIGHT rows and OUTPUTS outputs; grid = tiles of outputs x tiles of rows
// (p.row_tiles, neighbours). Its WARPS warps divide the inputs: each has CHUNKS neighbouring chunks of 32 of
// them, and nothing is read by two warps of a block. W goes to shared memory, every thread copies what it
// reads itself; x goes to registers, AHEAD chunks under way at a time. The warps' sums meet in shared
// memory once, at the end, where W was.
//
// The order of a sum depends on WARPS and CHUNKS, which the launcher chooses by the number of inputs alone:
// chunk after chunk in a warp, within a chunk as the matrix unit has it, then over warps in order. HEIGHT,
// OUTPUTS and AHEAD change no bit.
//
// The weight comes before the kernel before this one has ended where the launcher says that nothing in
// flight writes it (p.settled). Compiled for DTYPE (bfloat16, float16) and the names above; sm_80 and
// above. Overlaps the kernel before.
#include "matrix_unit.cuh"
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;

struct Arguments {
    const T *x, *weight, *bias;  // bias null: none
    T* y;
    long long rows, inputs, outputs;
    long long weight_row;  // stride in elements
    long long row_tiles, settled;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr int THREADS = 32 * WARPS;
constexpr int TILES = OUTPUTS / 8, BANDS = HEIGHT / 16;  // of 8 outputs, of 16 rows
constexpr int EACH = 8, CHUNK = 4 * EACH;  // numbers of 16 bytes, and of the 4 lanes of a row
constexpr int SUMS = BANDS * TILES;        // of 16 bytes of a lane
constexpr int WEIGHTS = CHUNKS * TILES;    // likewise
constexpr int SHARE = 32 * (SUMS > WEIGHTS ? SUMS : WEIGHTS);  // of a warp, likewise
constexpr int TASKS = (32 * SUMS + THREADS - 1) / THREADS;     // that a thread ends
static_assert(OUTPUTS % 8 == 0 && HEIGHT % 16 == 0 && AHEAD <= CHUNKS, "whole tiles");

extern __shared__ uint4 arena[];  // (WARPS, SHARE)

// With one block asked for, the compiler leaves all loads of x under way.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_mma(const __grid_constant__ Arguments p) {
    let_next_begin();
    if (!p.settled) await_previous();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const unsigned row_tiles = unsigned(p.row_tiles), row_tile = blockIdx.x % row_tiles;
    const long long first_row = (long long)row_tile * HEIGHT;
    const long long first_output = (long long)(blockIdx.x / row_tiles) * OUTPUTS;
    const long long first_input = (long long)warp * (CHUNKS * CHUNK) + t * EACH;
    uint4* const mine = arena + warp * SHARE + lane;  // every 32nd from here on

    // Inputs 8 t to 8 t + 7 of a chunk: which is the k-th of a product is whatever x and W agree on.
    const T* const weight = p.weight + (first_output + g) * p.weight_row + first_input;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const bool there = first_output + 8 * j + g < p.outputs &&
                               first_input + c * CHUNK < p.inputs;
            const T* const from = weight + 8 * j * p.weight_row + c * CHUNK;
            copy_or_zero(mine + (c * TILES + j) * 32, there ? from : p.weight, there);
        }
    await_previous();

    const T* const x = p.x + (first_row + g) * p.inputs + first_input;
    uint4 a[AHEAD][2 * BANDS];
    const auto fetch = [&](int c) {
#pragma unroll
        for (int i = 0; i < 2 * BANDS; ++i) {
            const bool there = first_row + 8 * i + g < p.rows && first_input + c * CHUNK < p.inputs;
            a[c % AHEAD][i] = uint4{0, 0, 0, 0};
            if (there)
                a[c % AHEAD][i] =
                    *reinterpret_cast<const uint4*>(x + 8 * i * p.inputs + c * CHUNK);
        }
    };
#pragma unroll
    for (int c = 0; c < AHEAD; ++c) fetch(c);
    T bias[TASKS][2];
#pragma unroll
    for (int i = 0; i < TASKS; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int n = (i * THREADS + threadIdx.x) / 32 % TILES * 8 + 2 * t + k;
            const bool there = p.bias && first_output + n < p.outputs;
            bias[i][k] = there ? p.bias[first_output + n] : T{0};
        }

    float sum[BANDS][TILES][4];
#pragma unroll
    for (int i = 0; i < BANDS; ++i)
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[i][j][k] = 0.0f;
    wait();
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const auto& in = a[c % AHEAD];
        uint4 b[TILES];
#pragma unroll
        for (int j = 0; j < TILES; ++j) b[j] = mine[(c * TILES + j) * 32];
#pragma unroll
        for (int i = 0; i < BANDS; ++i)
#pragma unroll
            for (int j = 0; j < TILES; ++j)
                multiply<T>(sum[i][j], in[2 * i].x, in[2 * i + 1].x, in[2 * i].y, in[2 * i + 1].y,
                            b[j].x, b[j].y);
#pragma unroll
        for (int i = 0; i < BANDS; ++i)
#pragma unroll
            for (int j = 0; j < TILES; ++j)
                multiply<T>(sum[i][j], in[2 * i].z, in[2 * i + 1].z, in[2 * i].w, in[2 * i + 1].w,
                            b[j].z, b[j].w);
        if (c + AHEAD < CHUNKS) fetch(c + AHEAD);
    }

#pragma unroll
    for (int i = 0; i < BANDS; ++i)
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            Pack<float, 4> out;
#pragma unroll
            for (int k = 0; k < 4; ++k) out.item[k] = sum[i][j][k];
            mine[(i * TILES + j) * 32] = out.word;
        }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TASKS; ++i) {
        const int task = i * THREADS + threadIdx.x;
        if (32 * SUMS % THREADS && task >= 32 * SUMS) break;
        Pack<float, 4> total, more;
        total.word = arena[task];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) {
            more.word = arena[w * SHARE + task];
#pragma unroll
            for (int k = 0; k < 4; ++k) total.item[k] = add(total.item[k], more.item[k]);
        }
        const int tile = task / 32 % TILES, band = task / 32 / TILES;
        const long long n = first_output + tile * 8 + 2 * t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const long long r = first_row + band * 16 + half * 8 + g;
            if (r >= p.rows) continue;
            T* const to = p.y + r * p.outputs + n;
            Pack<T, 2> y;
#pragma unroll
            for (int k = 0; k < 2; ++k)
                y.item[k] = narrow<T>(add(total.item[2 * half + k], widen(bias[i][k])));
            if (p.outputs % 2 == 0) {
                if (n < p.outputs) y.store(to);
            } else {
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    if (n + k < p.outputs) to[k] = y.item[k];
            }
        }
    }
}
