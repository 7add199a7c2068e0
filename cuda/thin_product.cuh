// SPDX-License-Identifier: MIT
// A tall thin matrix times a small one on tensor cores, where it is read: a tile of 16 steps x 128 channels
// at a time, by one warp and for this warp alone, in shared memory.
//
// Memory contract. x (steps, inner), neighbours in the last axis, steps at multiples of 16 bytes; w (inner,
// channels), neighbours in the last axis, four of which are read at once; both of T = bfloat16 or float16.
// inner is a multiple of 8 and DEPTH the next one of 32. Products are exact and sums float32, in an order
// that DEPTH alone fixes; a tile holds them as Kept, float or T. A block reads its 128 channels of w once,
// 24 KB for an inner of 96, each of its warps the x of its tiles, 3 KB a tile.
//
// Rows of x and of a tile are as far apart in shared memory, and `spread` has the lanes of w in such an
// order, that the lanes that are served together meet banks of their own.
#pragma once
#include "matrix_unit.cuh"
#include "memory.cuh"

template <class T, class Kept, int DEPTH>
struct ThinProduct {
    static constexpr int STEPS = 16, CHANNELS = 128;
    static constexpr int EACH = 8, CHUNK = 4 * EACH, CHUNKS = DEPTH / CHUNK;  // EACH: in 16 bytes
    static constexpr int TILES = CHANNELS / 8, GROUP = 4;  // of 8 channels; multiplied at once
    static constexpr int WEIGHTS = CHUNKS * TILES * 32;    // of 16 bytes, of a block
    static constexpr int ROW = DEPTH / EACH + 1;           // likewise, from step to step of x
    static constexpr int PITCH = CHANNELS + 8;             // from step to step of a tile
    static constexpr int SHARE = STEPS * ROW + STEPS * PITCH * int(sizeof(Kept)) / 16;  // of a warp
    static_assert(DEPTH % CHUNK == 0, "whole chunks");
    using Four = Pack<Kept, 4>;

    uint4 *weight, *rows;
    Kept* tile;
    int lane, inner;

    // The shared memory of a block: w, then what each warp has.
    __device__ __forceinline__ ThinProduct(uint4* arena, int warp, int lane, int inner)
        : weight(arena), rows(arena + WEIGHTS + warp * SHARE),
          tile(reinterpret_cast<Kept*>(rows + STEPS * ROW)), lane(lane), inner(inner) {}

    static __device__ __forceinline__ int spread(int lane) { return lane ^ (lane >> 3); }

    // By all warps of a block, with a barrier after it: `from` is the first row of w at the lane's four
    // channels, `pitch` lies between rows. The lane that multiplies by column g has of a chunk's four
    // times eight rows the t-th pair of each, in 16 bytes.
    __device__ __forceinline__ void load_weight(const T* from, long long pitch, int warp,
                                                int warps) const {
#pragma unroll 1
        for (int q = warp; q < 4 * CHUNKS; q += warps) {  // the pair t of each eight of a chunk
            const int t = q % 4, chunk = q / 4;
            Pack<T, 4> seen[EACH];
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int k = chunk * CHUNK + i / 2 * EACH + 2 * t + i % 2;
                seen[i].word = uint2{0, 0};
                if (k < inner) seen[i] = Pack<T, 4>::load(from + k * pitch);
            }
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                Pack<T, EACH> column;
#pragma unroll
                for (int i = 0; i < EACH; ++i) column.item[i] = seen[i].item[v];
                const int tile = lane / 2, g = lane % 2 * 4 + v;
                weight[(chunk * TILES + tile) * 32 + spread(4 * g + t)] = column.word;
            }
        }
    }

    // Ask for x of the next tile, the first `count` steps of which are wanted; the last stands for others.
    __device__ __forceinline__ void fetch(const T* from, long long pitch, int count) const {
        const int g = lane / 4, t = lane % 4;
        uint4* const to = rows + g * ROW + t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int step = 8 * half + g < count ? 8 * half + g : count - 1;
            const T* const row = from + step * pitch + t * EACH;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const bool there = c + 1 < CHUNKS || c * CHUNK + t * EACH < inner;
                copy_or_zero(to + 8 * half * ROW + 4 * c, there ? row + c * CHUNK : from, there);
            }
        }
    }

    // Make the tile of what was fetched.
    __device__ __forceinline__ void compute() const {
        const uint4* const x = rows + lane % 16 * ROW + lane / 16;
        const uint4* const w = weight + spread(lane);
        Kept* const to = tile + lane / 4 * PITCH + lane % 4 * 2;
        wait();
        __syncwarp();  // x is there, and no lane reads the last tile any more
#pragma unroll 1
        for (int first = 0; first < TILES; first += GROUP) {
            float sum[GROUP][4];
#pragma unroll
            for (int j = 0; j < GROUP; ++j)
#pragma unroll
                for (int k = 0; k < 4; ++k) sum[j][k] = 0.0f;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                unsigned low[4], high[4];
                load_matrix(low, x + 4 * c);
                load_matrix(high, x + 4 * c + 2);
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    const uint4 b = w[(c * TILES + first + j) * 32];
                    multiply<T>(sum[j], low[0], low[1], low[2], low[3], b.x, b.y);
                    multiply<T>(sum[j], high[0], high[1], high[2], high[3], b.z, b.w);
                }
            }
#pragma unroll
            for (int j = 0; j < GROUP; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Pack<Kept, 2> out;
#pragma unroll
                    for (int k = 0; k < 2; ++k) out.item[k] = narrow<Kept>(sum[j][2 * half + k]);
                    out.store(to + 8 * half * PITCH + 8 * (first + j));
                }
        }
        __syncwarp();  // the tile is there, and no lane reads x any more
    }

    // Four channels of a step of the tile.
    __device__ __forceinline__ Four read(int step, int channel) const {
        return Four::load(tile + step * PITCH + channel);
    }
};
