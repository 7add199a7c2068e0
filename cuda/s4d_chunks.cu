// SPDX-License-Identifier: MIT
// The scan of S4D in chunks of time on tensor cores, forward; the method stands in s4d_chunks.cuh.
//
// Memory contract. As s4d_scan.cu for u, a, v, D, lengths, starts, y and last, a and v complex64; nothing is kept
// and nothing reset. u is read and y written once: 268 MB for 8192 channels of 4096 steps in float32. Bound by the
// issue of instructions: 3 (4 M + (T + 8) / 2) multiply-adds on tensor cores a step for M states, during which
// nothing else is issued, and about 24 M / T other instructions.
#include "s4d_chunks.cuh"

// The state after a row's last steps, fewer than two chunks of them, from that before.
__device__ __forceinline__ void finish(const Arguments& p, const Place& at, const Piece& x, State* last) {
    const long long first = x.final * (2LL * TIMES);
    const T* u = x.in[0] + first * p.in[0].time + at.local * p.in[0].channel;
    const long long offset = (at.copy * p.size.channels + at.channel) * p.size.states;
#pragma unroll 1
    for (int i = 0; i < TILES; ++i) {
        const long long pair = at.pair(i);
        if (pair >= p.size.states) return;
        const State a = p.a[offset + pair];
        State s = last[pair];
        const T* from = u;
#pragma unroll 1
        for (long long k = first; k < x.count; ++k, from += p.in[0].time)
            s = {fma(a.re, s.re, fma(-a.im, s.im, widen(*from))), fma(a.re, s.im, mul(a.im, s.re))};
        last[pair] = s;
    }
}

struct Forward {
    const Block& block;
    const Matrices& matrices;
    const Size& size;
    State* last;  // of the lane's piece and channel
    int final, pair;
    State s[TILES];

    __device__ __forceinline__ void keep() const {
#pragma unroll
        for (int i = 0; i < TILES; ++i)
            if (block.at.pair(i) < size.states) last[block.at.pair(i)] = s[i];
    }

    __device__ __forceinline__ void enter(int) {}

    __device__ __forceinline__ void step(const T* u, float* y) {
        if (pair++ == final) keep();
        Left x[KT];
        float sum[KT][4], total[KT][4];
        operand(x, u, block.at, false);
#pragma unroll
        for (int first = 0; first < TILES; first += BATCH) {
            if (first % FOUR == 0) direct_path(sum, block, x, first / FOUR);
            Left states[BATCH];
            float e[BATCH][4];
            products(e, x, matrices.in, first);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int i = first + b;
                const Over over(block, matrices, i);
                const State next = fma(over.a, s[i], State{e[b][0], e[b][1]});
                states[b].template set<false>(s[i].re, next.re, s[i].im, next.im);
                s[i] = fma(over.a, next, fma(over.rest, s[i], State{e[b][2], e[b][3]}));
            }
            read_out(sum, matrices, states, first);
            if ((first + BATCH) % FOUR == 0) add_to(total, sum, first < FOUR);
        }
        put(y, total);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    s4d_chunks(const __grid_constant__ Arguments p) {
    const Block block(p);
    Loader loaders[] = {Loader(p.in[0])};
    begin(p, block, loaders);
    const Matrices matrices(p, block.at, reinterpret_cast<double*>(block.shared.out[0]),
                            block.shared.direct[block.at.local]);
    Over::save(block, matrices);
    const Piece& mine = block.mine();
    const bool exists = block.exists();
    Forward body{block, matrices, p.size,
                 p.last + ((exists ? mine.row : 0) * p.size.channels + block.at.channel) * p.size.states,
                 exists ? mine.final : -1, 0, {}};
    if (p.starts) block.read(body.s, p.starts, p.size, mine.index);
    walk(p, block, loaders, body);
    if (body.pair == body.final) body.keep();
    if (body.final >= 0 && mine.final * (2LL * TIMES) < mine.count) finish(p, block.at, mine, body.last);
    block.fill_rest(p.size);
}
