// SPDX-License-Identifier: MIT
// Tiles of global memory brought into shared memory, several of them under way at a time.
#pragma once
#include "memory.cuh"

// Close a group of copies; `wait_for` leaves the newest `pending` groups of this thread under way.
__device__ __forceinline__ void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int pending>
__device__ __forceinline__ void wait_for() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Copy a rectangle to `to` (ROWS, COLUMNS): element (i, j) from `from` + i * row + j * column. What lies
// past (rows, columns) becomes zeros. All threads of the block take part.
template <int ROWS, int COLUMNS, int THREADS, class T>
__device__ __forceinline__ void copy_tile(T* to, const T* from, long long row, long long column,
                                          long long rows, int columns) {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
        const int r = i / COLUMNS, c = i % COLUMNS;
        T* target = to + i;
        if (r < rows && c < columns)
            copy_async<sizeof(T)>(target, from + r * row + c * column);
        else
            *target = T{};
    }
}

// What a thread copies of tiles of aligned rows (column = 1), 16 bytes at a time: fixed once, so that a tile
// costs no test and no division a piece. Columns that do not exist are left alone.
template <int COLUMNS, int THREADS, class T>
struct TileCopy {
    static constexpr int PIECE = 16 / sizeof(T), WIDTH = COLUMNS;
    static constexpr bool POSSIBLE = COLUMNS % PIECE == 0 && COLUMNS / PIECE <= THREADS;
    static constexpr int ACROSS = POSSIBLE ? COLUMNS / PIECE : 1;
    static constexpr int HOP = THREADS / ACROSS;
    static_assert(THREADS % ACROSS == 0, "threads fill whole rows");

    const T* start;  // of the block's first row and column
    long long row;

    __device__ __forceinline__ TileCopy(const T* from, long long row_stride)
        : start(from), row(row_stride) {}

    template <int ROWS>
    __device__ __forceinline__ void run(T* tile, long long first, int columns) const {
        const int r = threadIdx.x / ACROSS, c = threadIdx.x % ACROSS * PIECE;
        if (c >= columns) return;
        const T* p = start + (first + r) * row + c;
        T* to = tile + r * COLUMNS + c;
#pragma unroll
        for (int i = 0; i < ROWS; i += HOP) {
            if (ROWS % HOP == 0 || i + r < ROWS) copy_async<16>(to + i * COLUMNS, p);
            p += HOP * row;
        }
    }
};

// Fill with zeros, by all threads of the block.
template <int THREADS, class X>
__device__ __forceinline__ void clear(X& x) {
    uint4* p = reinterpret_cast<uint4*>(&x);
    for (int i = threadIdx.x; i < int(sizeof(X) / 16); i += THREADS) p[i] = uint4{0, 0, 0, 0};
}
