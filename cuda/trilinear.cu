// SPDX-License-Identifier: MIT
// A trilinear form of samples t, and the gradient of its weight:
//     WIDE    out[t, c] = sum_n y[t, n] sum_a w[n, a, c] x[t, a]
//     NARROW  out[t, n] = sum_c y[t, c] sum_a w[n, a, c] x[t, a]
//     OUTER   out[n, a, c] = sum_t g[t, n] x[t, a] y[t, c]
// as matrix products w[n] x of which a tile at a time is in registers, and none in memory.
//
// Memory contract. g, x, y (samples, .) with rows that are `*_t` apart; x, and y where its axis is A or C,
// in aligned groups of four numbers, as w, whose lines lie along a (ALONG) or along c. out of WIDE and NARROW
// is contiguous; OUTER writes a partial sum for every run of `each` samples, with the strides to_*, and WIDE
// one for every group of `each` n, or adds these up itself, in the same order. A block owns a tile of 64
// WARPS_DOWN by 32 WARPS_ACROSS: of samples and outputs (WIDE), of samples and c, one c after the other, for
// `each` n (NARROW), of a and c (OUTER). What is summed (a, or samples) passes by DEPTH at a time through
// STAGES buffers: x is read once a tile of outputs and n, w once a tile of samples, from the L2 cache mostly.
// Arithmetic is what limits: samples A C N multiply-adds.
//
// A float32 product is three TF32 products on tensor cores (PASSES = 3): x = big + small, both of 11 bits or
// more, and x y = big big + big small + small big, whose rest is below a rounding of float32. Tensor cores
// cut off what they add, so SUMMED terms are added up there and these sums in float32. PASSES = 1 is one
// TF32 product; sm_75 has float32 multiply-adds. A sample's result depends on no other sample.
#include "numbers.cuh"
#include "pipeline.cuh"

constexpr int THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
constexpr int LINES = 64 * WARPS_DOWN, COLUMNS = 32 * WARPS_ACROSS;
constexpr int M = 4, ROWS = 8;  // parts of a warp's rows, rows of a thread
#if __CUDA_ARCH__ >= 800
constexpr int PRODUCTS = PASSES;
#else
constexpr int PRODUCTS = 0;
#endif

// ------------------------------------------------------------------------------ tiles in shared memory

// SIZE rows or columns by DEPTH. ALONG_DEPTH: memory is contiguous in depth, one row after the other;
// else one depth after the other. A warp's reads of either meet no bank twice.
template <bool ALONG_DEPTH, int SIZE>
struct Tile {
    static constexpr int PITCH = ALONG_DEPTH ? DEPTH + 8 : SIZE + 4;
    static constexpr int NUMBERS = PITCH * (ALONG_DEPTH ? SIZE : DEPTH);

    // Number (index, depth).
    static __device__ __forceinline__ float at(const float* tile, int index, int depth) {
        return tile[ALONG_DEPTH ? index * PITCH + depth : depth * PITCH + index];
    }
};

// What a thread copies of such tiles, four numbers at a time.
template <bool ALONG_DEPTH, int SIZE>
struct Feed {
    using To = Tile<ALONG_DEPTH, SIZE>;
    static constexpr int PIECES = (ALONG_DEPTH ? DEPTH : SIZE) / 4, HOP = THREADS / PIECES;
    static constexpr int COUNT = (ALONG_DEPTH ? SIZE : DEPTH) / HOP;
    static_assert(THREADS % PIECES == 0 && COUNT * HOP == (ALONG_DEPTH ? SIZE : DEPTH), "");

    const float* start;
    long long hop;
    int line, item;

    __device__ __forceinline__ Feed(const float* from, long long pitch)
        : hop(HOP * pitch), line(threadIdx.x / PIECES), item(threadIdx.x % PIECES * 4) {
        start = from + line * pitch + item;
    }

    // The tile that begins `offset` numbers from the first one; what lies past `size` and `depth` becomes
    // zeros. Four neighbours exist or do not.
    __device__ __forceinline__ void copy(float* tile, long long offset, int size, int depth) const {
        const float* from = start + offset;
        float* to = tile + line * To::PITCH + item;
        const bool item_exists = item < (ALONG_DEPTH ? depth : size);
        const int lines = item_exists ? (ALONG_DEPTH ? size : depth) - line : 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            copy_if(to + i * HOP * To::PITCH, from, i * HOP < lines);
            from += hop;
        }
    }

   private:
    static __device__ __forceinline__ void copy_if(float* to, const float* from, bool there) {
#if __CUDA_ARCH__ >= 800
        const unsigned shared = unsigned(__cvta_generic_to_shared(to));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                     "r"(there ? 16 : 0)
                     : "memory");
#else
        *reinterpret_cast<uint4*>(to) =
            there ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
    }
};

// Which of a warp's rows is thread `group`'s i-th, and which of its 32 columns are those of
// part `part`: what a thread reads of a tile is contiguous.
template <bool ALONG_DEPTH>
__device__ __forceinline__ int row_of(int i, int group) {
    return ALONG_DEPTH ? 8 * i + group : i / 4 * 32 + 4 * group + i % 4;
}
template <bool ALONG_DEPTH>
__device__ __forceinline__ int column_of(int part, int place) {
    return ALONG_DEPTH ? 8 * part + place : 4 * place + part;
}

struct Seat {
    int group, place, row, column;  // lane = 4 group + place; the warp's first row and column

    __device__ __forceinline__ Seat() {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        group = lane >> 2;
        place = lane & 3;
        row = warp % WARPS_DOWN * 64;
        column = warp / WARPS_DOWN * 32;
    }
};

// ------------------------------------------------------------------------------ products

// The thread's sums: its rows 2 m and 2 m + 1, columns 2 place and 2 place + 1 of part n, stand in
// [m][n][0 ... 3].
using Sums = float[M][4][4];

// x to 11 bits, in the upper bits that tensor cores read: the conversion of PTX minds infinities, which
// takes two instructions more; where there is a small part, that is not a number then.
__device__ __forceinline__ unsigned rounded(float x) {
    if (PRODUCTS == 3) return __float_as_uint(x) + 0x1000u;
    unsigned y = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#endif
    return y;
}

__device__ __forceinline__ unsigned remainder_of(float x, unsigned big) {
    return __float_as_uint(add(x, -__uint_as_float(big & 0xffffe000u)));
}

// c (16, 8) += a (16, 8) b (8, 8), which the lanes of a warp hold together.
__device__ __forceinline__ void multiply_add(float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Numbers (index, k) and (index, k + 1) of a tile for a thread's COUNT rows or columns from `first` on.
template <class T, bool ALONG_DEPTH, int COUNT>
__device__ __forceinline__ void read(const float* tile, int first, int group, int k,
                                     float (&to)[COUNT][2]) {
    if constexpr (ALONG_DEPTH) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const auto pair = Pack<float, 2>::load(tile + (first + 8 * i + group) * T::PITCH + k);
            to[i][0] = pair.item[0];
            to[i][1] = pair.item[1];
        }
    } else {
#pragma unroll
        for (int u = 0; u < COUNT; u += 4)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const auto four =
                    Pack<float, 4>::load(tile + (k + e) * T::PITCH + first + 8 * u + 4 * group);
#pragma unroll
                for (int i = 0; i < 4; ++i) to[u + i][e] = four.item[i];
            }
    }
}

// sums = x w over SUMMED of the tiles' depth from `begin`. With `weights`, one for each depth, w is
// multiplied by them.
template <class X, bool X_ALONG, class W, bool W_ALONG, bool WEIGHTED>
__device__ __forceinline__ void multiply(const float* x, const float* w, const float* weights,
                                         int begin, const Seat& seat, Sums& sums) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
    if constexpr (PRODUCTS == 0) {
#pragma unroll 4
        for (int k = begin; k < begin + SUMMED; ++k) {
            float a[ROWS], b[4][2];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) a[i] = X::at(x, seat.row + row_of<X_ALONG>(i, seat.group), k);
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = column_of<W_ALONG>(n, 2 * seat.place + e);
                    b[n][e] = W::at(w, seat.column + column, k);
                    if (WEIGHTED) b[n][e] = mul(b[n][e], weights[k]);
                }
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& sum = sums[i / 2][n][i % 2 * 2 + e];
                        sum = fma(a[i], b[n][e], sum);
                    }
        }
    } else {
#pragma unroll
        for (int first = 0; first < SUMMED; first += 8) {
            const int k = begin + first + 2 * seat.place;  // and k + 1: any order of depth will do
            float b[4][2], x_rows[ROWS][2];
            read<W, W_ALONG>(w, seat.column, seat.group, k, b);
            read<X, X_ALONG>(x, seat.row, seat.group, k, x_rows);
            unsigned big[4][2], small[4][2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float weight = WEIGHTED ? weights[k + e] : 1;
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    if (WEIGHTED) b[n][e] = mul(b[n][e], weight);
                    big[n][e] = rounded(b[n][e]);
                    small[n][e] = remainder_of(b[n][e], big[n][e]);
                }
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
                unsigned a[4], rest[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float value = x_rows[2 * m + i % 2][i / 2];
                    a[i] = rounded(value);
                    rest[i] = remainder_of(value, a[i]);
                }
                if (PRODUCTS == 3) {
#pragma unroll
                    for (int n = 0; n < 4; ++n) multiply_add(sums[m][n], rest, big[n][0], big[n][1]);
#pragma unroll
                    for (int n = 0; n < 4; ++n) multiply_add(sums[m][n], a, small[n][0], small[n][1]);
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply_add(sums[m][n], a, big[n][0], big[n][1]);
            }
        }
    }
}

// ------------------------------------------------------------------------------ samples

#ifndef OUTER
#ifdef NARROW
constexpr bool IS_NARROW = true;
#else
constexpr bool IS_NARROW = false;
#endif
static_assert(!IS_NARROW || ALONG, "the columns of w's tile are pairs of neighbours");

struct Arguments {
    const float *w, *x, *y;
    float* out;
    long long samples, A, C, N;
    long long w_n, w_line, x_t, y_t;
    long long tiles, groups, each;  // NARROW: tiles are runs of n. WIDE: of c; groups of n in the grid
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// Where a block is in its sum.
struct Walk {
    int n, c, a;

    __device__ __forceinline__ void step(int A, int C) {
        a += DEPTH;
        if (a < A) return;
        a = 0;
        if (IS_NARROW) {
            c += COLUMNS;
            if (c < C) return;
            c = 0;
        }
        ++n;
    }
};

using XTile = Tile<true, LINES>;
using WTile = Tile<ALONG, COLUMNS>;
constexpr int STAGE = XTile::NUMBERS + WTile::NUMBERS;

// Write four of the thread's rows of sums, added to what is there if `more`, and begin them anew.
__device__ __forceinline__ void add_rows(Sums& totals, int first, float* out, long long pitch, int rows,
                                         int columns, bool more, const Seat& seat) {
    constexpr int V = ALONG ? 2 : 4;  // neighbouring columns
    Pack<float, V> before[4][8 / V];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 8 / V; ++k) {
            const int row = seat.row + row_of<true>(first + i, seat.group);
            const int column =
                seat.column + column_of<ALONG>(ALONG ? k : 0, 2 * seat.place + (ALONG ? 0 : k));
#pragma unroll
            for (int v = 0; v < V; ++v) before[i][k].item[v] = 0;
            if (more && row < rows && column < columns)
                before[i][k] = Pack<float, V>::load(out + row * pitch + column);
        }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 8 / V; ++k) {
            const int row = seat.row + row_of<true>(first + i, seat.group);
            const int column =
                seat.column + column_of<ALONG>(ALONG ? k : 0, 2 * seat.place + (ALONG ? 0 : k));
#pragma unroll
            for (int v = 0; v < V; ++v) {
                float& total = totals[(first + i) / 2][ALONG ? k : v][i % 2 * 2 + (ALONG ? v : k)];
                before[i][k].item[v] = add(before[i][k].item[v], total);
                total = 0;
            }
            if (row < rows && column < columns) before[i][k].store(out + row * pitch + column);
        }
}

__device__ __forceinline__ void run(const Arguments& p) {
    extern __shared__ uint4 arena[];
    __shared__ float narrow_sums[IS_NARROW ? WARPS_ACROSS : 1][IS_NARROW ? LINES : 1];
    float* stages = reinterpret_cast<float*>(arena);
    // tiles of samples, then of c, then groups of n
    const long long here = blockIdx.x / p.tiles, part = blockIdx.x - here * p.tiles;
    const long long tile = IS_NARROW ? here : here / p.groups, group = IS_NARROW ? part : here % p.groups;
    const long long t0 = tile * LINES;
    const int A = int(p.A), C = int(p.C), each = int(p.each);
    const int begin = int(group) * each;
    const int end = IS_NARROW || p.groups > 1 ? int(min(p.N, (long long)begin + each)) : int(p.N);
    const int rows = int(min((long long)LINES, p.samples - t0));
    const Feed<true, LINES> x_feed(p.x + t0 * p.x_t, p.x_t);
    const Feed<ALONG, COLUMNS> w_feed(p.w, p.w_line);
    Walk now{begin, IS_NARROW ? 0 : int(part) * COLUMNS, 0}, ahead = now;
    auto bring = [&](int stage) {
        if (ahead.n < end) {
            float* to = stages + stage * STAGE;
            x_feed.copy(to, ahead.a, rows, A - ahead.a);
            const long long at = ahead.n * p.w_n + (ALONG ? ahead.c * p.w_line + ahead.a
                                                          : ahead.a * p.w_line + ahead.c);
            w_feed.copy(to + XTile::NUMBERS, at, C - ahead.c, A - ahead.a);
            ahead.step(A, C);
        }
        commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) bring(i);

    const Seat seat;
    Sums totals;
    float y[ROWS];
#pragma unroll
    for (int i = 0; i < 16 * M; ++i) totals[i / 16][i / 4 % 4][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) y[i] = 0;
    float* const out = p.out + (IS_NARROW ? 0 : group * p.samples * p.C);
#pragma unroll 1
    for (int stage = 0; now.n < end; stage = stage + 1 == STAGES ? 0 : stage + 1) {
        wait_for<STAGES - 2>();
        __syncthreads();  // this stage is there, the one before it has been read
        bring(stage == 0 ? STAGES - 1 : stage - 1);
        if (!IS_NARROW && now.a == 0) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const int row = seat.row + row_of<true>(i, seat.group);
                y[i] = row < rows ? p.y[(t0 + row) * p.y_t + now.n] : 0;
            }
        }
        const float* from = stages + stage * STAGE;
#pragma unroll UNROLL
        for (int first = 0; first < DEPTH; first += SUMMED) {
            Sums sums;
            multiply<XTile, true, WTile, ALONG, false>(from, from + XTile::NUMBERS, nullptr, first,
                                                       seat, sums);
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& total = totals[i / 2][n][i % 2 * 2 + e];
                        const float sum = sums[i / 2][n][i % 2 * 2 + e];
                        total = IS_NARROW ? add(total, sum) : fma(y[i], sum, total);
                    }
        }
        const Walk done = now;
        now.step(A, C);
        if (now.a != 0) continue;
        if (!IS_NARROW) {
            if (now.n != end && now.n % each != 0) continue;
            // a group of n is complete
#pragma unroll
            for (int first = 0; first < ROWS; first += 4)
                add_rows(totals, first, out + t0 * p.C + now.c, p.C, rows, C - now.c,
                         done.n >= begin + each, seat);
            continue;
        }
        // the matrix is complete for these columns
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int row = seat.row + row_of<true>(i, seat.group);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int c = done.c + seat.column + column_of<true>(n, 2 * seat.place);
                Pack<float, 2> pair;
                pair.item[0] = pair.item[1] = 0;
                if (row < rows && c < C) pair = Pack<float, 2>::load(p.y + (t0 + row) * p.y_t + c);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& total = totals[i / 2][n][i % 2 * 2 + e];
                    y[i] = fma(pair.item[e], total, y[i]);
                    total = 0;
                }
            }
        }
        if (now.c != 0) continue;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            y[i] = add(y[i], __shfl_xor_sync(~0u, y[i], 1));
            y[i] = add(y[i], __shfl_xor_sync(~0u, y[i], 2));
            if (seat.place == 0)
                narrow_sums[seat.column / 32][seat.row + row_of<true>(i, seat.group)] = y[i];
            y[i] = 0;
        }
        __syncthreads();  // the sums of every warp are there
        for (int i = threadIdx.x; i < rows; i += THREADS) {
            float sum = narrow_sums[0][i];
#pragma unroll
            for (int k = 1; k < (IS_NARROW ? WARPS_ACROSS : 1); ++k) sum = add(sum, narrow_sums[k][i]);
            out[(t0 + i) * p.N + done.n] = sum;
        }
    }
}

#ifdef NARROW
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    trilinear_narrow(const __grid_constant__ Arguments p) {
    run(p);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    trilinear_wide(const __grid_constant__ Arguments p) {
    run(p);
}
#endif
#endif

// ------------------------------------------------------------------------------ weights

#ifdef OUTER
struct Arguments {
    const float *g, *x, *y;
    float* out;
    long long samples, A, C, N;
    long long g_t, x_t, y_t, to_n, to_a, to_c;
    long long tiles_a, tiles_c, each, size;  // each: samples of a run; size: numbers of the weight
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

using XTile = Tile<false, LINES>;
using YTile = Tile<false, COLUMNS>;
constexpr int STAGE = XTile::NUMBERS + YTile::NUMBERS + DEPTH;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    trilinear_outer(const __grid_constant__ Arguments p) {
    extern __shared__ uint4 arena[];
    float* stages = reinterpret_cast<float*>(arena);
    const long long across = blockIdx.x % p.tiles_c, down = blockIdx.x / p.tiles_c % p.tiles_a;
    const long long rest = blockIdx.x / p.tiles_c / p.tiles_a, n = rest % p.N, run = rest / p.N;
    const long long a0 = down * LINES, c0 = across * COLUMNS, t0 = run * p.each;
    const int count = int(min(p.samples - t0, p.each));
    const int rows = int(min((long long)LINES, p.A - a0)), columns = int(min((long long)COLUMNS, p.C - c0));
    const Feed<false, LINES> x_feed(p.x + t0 * p.x_t + a0, p.x_t);
    const Feed<false, COLUMNS> y_feed(p.y + t0 * p.y_t + c0, p.y_t);
    int ahead = 0;
    auto bring = [&](int stage) {
        if (ahead < count) {
            float* to = stages + stage * STAGE;
            x_feed.copy(to, ahead * p.x_t, rows, count - ahead);
            y_feed.copy(to + XTile::NUMBERS, ahead * p.y_t, columns, count - ahead);
            if (threadIdx.x < DEPTH) {
                const int t = ahead + threadIdx.x;
                float* weight = to + XTile::NUMBERS + YTile::NUMBERS + threadIdx.x;
                if (t < count)
                    copy_async<4>(weight, p.g + (t0 + t) * p.g_t + n);
                else
                    *weight = 0;
            }
            ahead += DEPTH;
        }
        commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) bring(i);

    const Seat seat;
    Sums totals;
#pragma unroll
    for (int i = 0; i < 16 * M; ++i) totals[i / 16][i / 4 % 4][i % 4] = 0;
    int stage = 0;
#pragma unroll 1
    for (int done = 0; done < count; done += DEPTH) {
        wait_for<STAGES - 2>();
        __syncthreads();  // these samples are there, those before them have been read
        bring(stage == 0 ? STAGES - 1 : stage - 1);
        const float* from = stages + stage * STAGE;
        const float* weights = from + XTile::NUMBERS + YTile::NUMBERS;
#pragma unroll UNROLL
        for (int first = 0; first < DEPTH; first += SUMMED) {
            Sums sums;
            multiply<XTile, false, YTile, false, true>(from, from + XTile::NUMBERS, weights, first, seat,
                                                       sums);
#pragma unroll
            for (int i = 0; i < 16 * M; ++i) {
                float& total = totals[i / 16][i / 4 % 4][i % 4];
                total = add(total, sums[i / 16][i / 4 % 4][i % 4]);
            }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    float* out = p.out + run * p.size + n * p.to_n;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = seat.row + row_of<false>(i, seat.group);
        if (row >= rows) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int column = seat.column + column_of<false>(0, 2 * seat.place + e);
            if (column >= columns) continue;
            float* to = out + (a0 + row) * p.to_a + (c0 + column) * p.to_c;
            Pack<float, 4> four;
#pragma unroll
            for (int k = 0; k < 4; ++k) four.item[k] = totals[i / 2][k][i % 2 * 2 + e];
            if (p.to_c == 1) {
                four.store(to);
            } else {
#pragma unroll
                for (int k = 0; k < 4; ++k) to[k * p.to_c] = four.item[k];
            }
        }
    }
}
#endif
