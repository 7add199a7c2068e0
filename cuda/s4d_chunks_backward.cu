// SPDX-License-Identifier: MIT
// The gradients of the scan of S4D in chunks of time on tensor cores; the method stands in s4d_chunks.cuh.
//
// In reverse alone, as s4d_scan_backward.cu, and in its notation. j counts the steps of a chunk from its end, m and
// r stand for those before it, and
//
//     F = sum_j a^j u_j,  c_d = sum_j u_j g_(j-d)
//     sum_j u_j m_j = a m F + sum_d a^d c_d
//
// whose derivative by a, with r = dm / da, is sum_j u_j r_j. c_d has no states: it is summed over all pieces of a
// block and all chunks before it meets a^d, and is added to the partial sums of the block's first piece.
//
// Memory contract. As s4d_scan_backward; a and v complex64, nothing reset. What the gradient of the last state adds
// is left to s4d_scan_free. grad_y and u are read and du is written once; da, dv, dD as there.
#include "s4d_chunks.cuh"

constexpr int FLUSH = 128;  // steps: sums over time have two levels
static_assert(FLUSH % SPAN == 0, "");

struct Backward {
    const Block& block;
    const Matrices& matrices;
    State m[TILES], r[TILES], by_m[TILES], by_r[TILES];
    float lags[BLOCKS_OF_LAGS][4];

    __device__ __forceinline__ void clear_sums() {
#pragma unroll
        for (int i = 0; i < TILES; ++i) by_m[i] = by_r[i] = Constant<State>::zero();
#pragma unroll
        for (int n = 0; n < BLOCKS_OF_LAGS; ++n) clear(lags[n]);
    }

    // Move what is summed in registers to shared memory, or add it there.
    __device__ __forceinline__ void flush(bool first) {
        int n = 0;
        const auto move = [&](float x) {
            float& to = block.shared.totals[n++][threadIdx.x];
            to = first ? x : add(to, x);
        };
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            move(by_m[i].re);
            move(by_m[i].im);
            move(by_r[i].re);
            move(by_r[i].im);
        }
        if (block.at.part == 0)
#pragma unroll
            for (int i = 0; i < 4 * BLOCKS_OF_LAGS; ++i) move(lags[i / 4][i % 4]);
        clear_sums();
    }

    __device__ __forceinline__ void enter(int k) {
        if (k % FLUSH == 0) flush(k == 0);
    }

    // Sums over pieces of u_j times the cotangent's step i <= j of the same chunk. The 16 rows of the A operand are
    // both parts of eight steps of u.
    __device__ __forceinline__ void correlate(const T* from) {
        const Place& at = block.at;
        const auto number = [&](int input, int chunk, int n, int half) {
            return widen(from[(input * PIECES + at.t + 4 * half) * ROW + (chunk * TIMES + 8 * n + at.g) * GROUP]);
        };
        unsigned hi[2][2][KT][2], lo[2][2][KT][2];  // (input, chunk, eight steps, half)
#pragma unroll
        for (int input = 0; input < 2; ++input)
#pragma unroll
            for (int chunk = 0; chunk < 2; ++chunk)
#pragma unroll
                for (int n = 0; n < KT; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float x = number(input, chunk, n, half);
                        float rest = 0;
                        if (EXACT)
                            hi[input][chunk][n][half] = __float_as_uint(x);
                        else
                            split(x, hi[input][chunk][n][half], rest);
                        lo[input][chunk][n][half] = __float_as_uint(rest);
                    }
#pragma unroll
        for (int n = 0; n < KT; ++n)
#pragma unroll
            for (int i = 0; i <= n; ++i) {
                float part[4];
                clear(part);
#pragma unroll
                for (int chunk = 0; chunk < 2; ++chunk) {
                    const unsigned both[4] = {hi[1][chunk][n][0], lo[1][chunk][n][0], hi[1][chunk][n][1],
                                              lo[1][chunk][n][1]};
                    if (!EXACT) multiply(part, both, lo[0][chunk][i][0], lo[0][chunk][i][1]);
                    multiply(part, both, hi[0][chunk][i][0], hi[0][chunk][i][1]);
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) lags[n * (n + 1) / 2 + i][k] = add(lags[n * (n + 1) / 2 + i][k], part[k]);
            }
    }

    __device__ __forceinline__ void step(const T* from, float* du) {
        Left g[KT], u[KT];
        float sum[KT][4], total[KT][4];
        operand(g, from, block.at, false);
        operand(u, from + PIECES * ROW, block.at, true);
        if (block.at.part == 0) correlate(from);
#pragma unroll
        for (int first = 0; first < TILES; first += BATCH) {
            if (first % FOUR == 0) direct_path(sum, block, g, first / FOUR);
            Left states[BATCH];
            float e[BATCH][4], d[BATCH][4], f[BATCH][4], h[BATCH][4];
            products(e, g, matrices.in, first);
            products(d, g, matrices.slopes, first);
            products(f, u, matrices.in, first);
            products(h, u, matrices.slopes, first);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int i = first + b;
                const Over over(block, matrices, i);
                const Pack<float, 2> loaded = Pack<float, 2>::load(block.shared.slope[block.warp][i][block.at.t]);
                const State slope{loaded.item[0], loaded.item[1]};
                const State m0 = m[i], r0 = r[i], m1 = fma(over.a, m0, State{e[b][0], e[b][1]});
                states[b].template set<false>(m0.re, m1.re, m0.im, m1.im);
                m[i] = fma(over.a, m1, fma(over.rest, m0, State{e[b][2], e[b][3]}));
                const State r1 = fma(over.a, r0, fma(slope, m0, State{d[b][0], d[b][1]}));
                r[i] = fma(over.a, r1, fma(slope, m1, fma(over.rest, r0, State{d[b][2], d[b][3]})));
                by_m[i] = fma(m0, State{f[b][0], f[b][1]}, fma(m1, State{f[b][2], f[b][3]}, by_m[i]));
                by_r[i] = fma(r0, State{f[b][0], f[b][1]}, fma(m0, State{h[b][0], h[b][1]}, by_r[i]));
                by_r[i] = fma(r1, State{f[b][2], f[b][3]}, fma(m1, State{h[b][2], h[b][3]}, by_r[i]));
            }
            read_out(sum, matrices, states, first);
            if ((first + BATCH) % FOUR == 0) add_to(total, sum, first < FOUR);
        }
        put(du, total);
    }

    // Sums by lag, of all pieces.
    __device__ __forceinline__ void sum_lags() const {
        const Place& at = block.at;
        float* const room = block.shared.out[0][0] + at.local * TIMES * (TIMES + 1);
        float(*const table)[TIMES + 1] = reinterpret_cast<float(*)[TIMES + 1]>(room);
        if (at.part == 0) {
#pragma unroll
            for (int n = 0; n < KT; ++n)
#pragma unroll
                for (int i = 0; i <= n; ++i)
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        const float* x = &block.shared.totals[4 * TILES + 4 * (n * (n + 1) / 2 + i)][threadIdx.x];
                        table[8 * n + at.g][8 * i + 2 * at.t + k] = add(x[k * THREADS], x[(k + 2) * THREADS]);
                    }
            __syncwarp();
            if (at.lane < TIMES) {
                double sum = 0;
#pragma unroll 1
                for (int j = at.lane; j < TIMES; ++j) sum = add(sum, double(table[j][j - at.lane]));
                block.shared.lags[at.local][at.lane] = sum;
            }
        }
        __syncthreads();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    s4d_chunks_backward(const __grid_constant__ Arguments p) {
    const Size& size = p.size;
    const Block block(p);
    Loader loaders[] = {Loader(p.in[0]), Loader(p.in[1])};
    begin(p, block, loaders);
    const Place& at = block.at;
    const Matrices matrices(p, at, reinterpret_cast<double*>(block.shared.out[0]),
                            block.shared.direct[block.at.local]);
    Over::save(block, matrices);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        Pack<float, 2> x;
        x.item[0] = matrices.slope[i].re;
        x.item[1] = matrices.slope[i].im;
        if (at.g == 0) x.store(block.shared.slope[block.warp][i][at.t]);
    }
    __syncwarp();
    const Piece& mine = block.mine();
    Backward body{block, matrices};
    body.clear_sums();
#pragma unroll
    for (int i = 0; i < TILES; ++i) body.m[i] = body.r[i] = Constant<State>::zero();
    if (p.starts) {
        const long long all = p.pieces;
        block.read(body.m, p.starts, size, mine.index);
        block.read(body.r, p.starts, size, all + mine.index);
    }
    walk(p, block, loaders, body);
    body.flush(block.longest == 0);
    __syncthreads();
    body.sum_lags();
    block.fill_rest(size);
    if (!block.exists()) return;
    const double* lags = block.shared.lags[at.local];
    const bool first = at.g == 0;  // what belongs to no piece goes to the first
    const long long to = (mine.index * size.channels + at.channel) * size.states;
#pragma unroll 1
    for (int i = 0; i < TILES; ++i) {
        const long long pair = at.pair(i);
        if (pair >= size.states) break;
        const Wide a = at.read(p.a, size, pair), v = at.read(p.v, size, pair);
        const float* x = &block.shared.totals[4 * i][threadIdx.x];
        const Wide by_m{x[0], x[THREADS]}, by_r{x[2 * THREADS], x[3 * THREADS]};
        Wide sum = mul(a, by_m), slope = fma(a, by_r, by_m), x0 = Constant<Wide>::one();
        if (first)
#pragma unroll 1
            for (int d = 0; d < TIMES; ++d) {
                sum = {fma(lags[d], x0.re, sum.re), fma(lags[d], x0.im, sum.im)};
                const double c = d + 1 < TIMES ? mul(double(d + 1), lags[d + 1]) : 0.0;
                slope = {fma(c, x0.re, slope.re), fma(c, x0.im, slope.im)};
                x0 = mul(x0, a);
            }
        slope = mul(v, slope);
        p.dv[to + pair] = {float(sum.re), float(-sum.im)};
        p.da[to + pair] = {float(slope.re), float(-slope.im)};
    }
    if (p.dD && at.t == 0 && at.part == 0)
        p.dD[mine.index * size.channels + at.channel] = first ? float(lags[0]) : 0.0f;
}
