// SPDX-License-Identifier: MIT
// The selective scan, forward: h_t = decay_t h_{t-1} + gain_t B_t u_t, y_t = (Re C_t h_t + D u_t) silu(z_t).
//
// Memory contract. u, dt, z, decay_dt (batch, L, E), B and C (batch, L or 1, G, N) with any strides, in
// elements, states of B and C neighbours; batch is split in (outer, inner). y (batch, L, E), last (batch,
// E, pitch) and kept (batch, ceil(L / 32), E, pitch) are contiguous. Each element of u, dt, z is read
// once, y written once; B and C are read once a block (4 N bytes for 4 * CHANNELS bytes of u) and come
// from the L2 cache. kept, the state before every 32nd step, is all that is saved for the backward.
//
// Launch: one block of 32 * WARPS threads for CHANNELS channels of a batch element, all of its time or, if
// the states between are known (selective_ends.cu), a segment of it.
// Tiles of TILE steps are copied to shared memory, STAGES of them under way, by the whole block. Each
// warp prepares the steps of its own channels (softplus, times u), runs through them with the states in
// registers, and writes y through shared memory. Time is serial: what fills the chip is channels times
// lanes. Bound by exp2: N of them an element.
#include "selective.cuh"

constexpr int Q = TOGETHER;  // steps whose outputs are summed over lanes together
static_assert(TILE % Q == 0 && CHUNK % Q == 0 && (TILE % CHUNK == 0 || CHUNK % TILE == 0), "");

struct Arguments {
    Inputs in;
    T* y;
    State *last, *kept;  // kept may be null
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Stage {
    alignas(16) T u[TILE * CHANNELS];
    alignas(16) T dt[TILE * CHANNELS];
    alignas(16) T z[GATE ? TILE * CHANNELS : 1];
    alignas(16) T decay[DECAY == 2 ? TILE * CHANNELS : 1];
    alignas(16) Matrix B[B_VARIES ? TILE * N : 1];
    alignas(16) Matrix C[C_VARIES ? TILE * N : 1];
    alignas(16) Real tau[TIMED ? TILE : 1];
};

struct Shared {
    Stage stage[STAGES];
    alignas(16) State B[WIDEN && B_VARIES ? TILE * N : 1];
    alignas(16) State C[WIDEN && C_VARIES ? TILE * N : 1];
    alignas(16) Step steps[WARPS][TILE * W];
    alignas(16) Real y[WARPS][TILE * W];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launcher gives too little shared memory");

extern __shared__ uint4 arena[];

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    selective_scan(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Inputs& in = p.in;
    const Size& size = in.size;
    const Place at = locate(size);
    const Lane me = lane_of(size, at);
    clear<THREADS>(shared.stage);
    __syncthreads();

    Pole<State> pole[PACK][S];
    State h[PACK][S];
    Row<B_VARIES> B;
    Row<C_VARIES> C;
    load_states(h, in.A + states_at(size, at.shared, at, me), size, me);
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) pole[c][s] = Pole<State>(h[c][s]);
    load_states(h, in.h0 ? in.h0 + states_at(size, at.row, at, me) : nullptr, size, me);
    load_constant(B, in.B, at, me);
    load_constant(C, in.C, at, me);

    // elements of a tile that this lane prepares and finishes: always of one channel
    const Column mine(in, at, me);
    T* y = p.y + (at.batch * size.length + at.first + mine.row) * size.width + at.channel + mine.channel;
    State* kept = p.kept;
    const long long chunks = (size.length + CHUNK - 1) / CHUNK;
    const long long chunk = at.batch * chunks + at.first / CHUNK;  // the segment's first
    const Copies copies(in, at);

    const int tiles = int((at.length + TILE - 1) / TILE);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < tiles) fetch<TILE>(shared.stage[i], copies, (long long)i * TILE);
        commit();
    }
    int now = 0;
    unsigned cleared = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        const long long first = (long long)tile * TILE;
        const int ahead = tile + STAGES - 1;
        wait_for<STAGES - 2>();
        __syncthreads();  // the tile is there, and nobody needs the one before it
        if (ahead < tiles)
            fetch<TILE>(shared.stage[now == 0 ? STAGES - 1 : now - 1], copies, (long long)ahead * TILE);
        commit();
        const Stage& stage = shared.stage[now];
        now = now == STAGES - 1 ? 0 : now + 1;

        if (WIDEN && B_VARIES) widen_rows<TILE * N>(shared.B, stage.B);
        if (WIDEN && C_VARIES) widen_rows<TILE * N>(shared.C, stage.C);
        Step* steps = shared.steps[me.warp];
        Real* out = shared.y[me.warp];
        const int count = at.length - first < TILE ? int(at.length - first) : TILE;
        if (count == TILE)
            mine.prepare<TILE, true>(steps, stage, me.lane, count);
        else
            mine.prepare<TILE, false>(steps, stage, me.lane, count);
        if (WIDEN && (B_VARIES || C_VARIES))
            __syncthreads();
        else
            __syncwarp();

        const State* Bs = reinterpret_cast<const State*>(WIDEN ? (const void*)shared.B : stage.B);
        const State* Cs = reinterpret_cast<const State*>(WIDEN ? (const void*)shared.C : stage.C);
        const Step* at_lane = steps + me.lane / LANES * PACK;
#pragma unroll 1
        for (int t0 = 0; t0 < TILE; t0 += Q) {
            const long long now_at = first + t0;
            if (now_at % CHUNK == 0 && now_at < at.length) {
                if (kept)
                    store_states(kept + states_at(size, chunk + now_at / CHUNK, at, me),
                                 h, size, me);
                if (RESET) cleared = resets(in.reset, at, now_at);
            }
            Real sums[Q * PACK];
#pragma unroll
            for (int q = 0; q < Q; ++q) {
                const int t = t0 + q;
                load_row(B, Bs + t * N + me.first);
                load_row(C, Cs + t * N + me.first);
                Factors<State> factors[PACK][S];
                advance(h, factors, pole, B, at_lane + t * W, RESET && cleared >> (first + t) % CHUNK & 1);
#pragma unroll
                for (int c = 0; c < PACK; ++c) sums[q * PACK + c] = dot(C, h[c], c);
            }
            int base = 0;
            sum_lanes<1, LANES>(sums, me.lane, base);
            if (me.lane % LANES < Q * PACK) {
#pragma unroll
                for (int i = 0; i < left_of(Q * PACK, LANES); ++i) {
                    const int t = t0 + (base + i) / PACK, c = (base + i) % PACK;
                    out[t * W + me.lane / LANES * PACK + c] =
                        COMPLEX<State> ? mul(Real(2), sums[i]) : sums[i];
                }
            }
        }
        __syncwarp();
        const int from = mine.row * CHANNELS + mine.channel;
        T* to = y;
#pragma unroll
        for (int e = 0; e < (TILE + EVERY - 1) / EVERY; ++e) {
            const int i = from + e * EVERY * CHANNELS;
            if (TILE % EVERY && e * EVERY + mine.row >= TILE) break;
            Real value = fma(mine.D, widen(stage.u[i]), out[me.lane + e * 32]);
            if (GATE) {
                const Real z = widen(stage.z[i]);
                value = mul(value, mul(z, sigmoid(z)));
            }
            if (mine.exists && e * EVERY + mine.row < count) *to = narrow<T>(value);
            to += EVERY * size.width;
        }
        y += TILE * size.width;
    }
    if (at.last) store_states(p.last + states_at(size, at.batch, at, me), h, size, me);
}
