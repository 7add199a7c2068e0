// SPDX-License-Identifier: MIT
// What a segment of time makes of the state before it: s -> product s + end, for the selective scan's states,
// or where ADJOINT for its adjoint, from the last step to the first. A linear scan over segments then gives
// the state before each of them.
//
// Memory contract. Inputs as in selective_scan.cu; for ADJOINT u is gy and B is C. product, end (batch,
// segments, E, pitch). Each element of u, dt (z where ADJOINT) is read once.
//
// Launch as the forward's. An exponential's product is the exponential of a sum: one number a channel.
#include "selective.cuh"

struct Arguments {
    Inputs in;
    State *product, *end;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Stage {
    alignas(16) T u[TILE * CHANNELS];
    alignas(16) T dt[TILE * CHANNELS];
    alignas(16) T z[GATE ? TILE * CHANNELS : 1];
    alignas(16) T decay[DECAY == 2 ? TILE * CHANNELS : 1];
    alignas(16) Matrix B[B_VARIES ? TILE * N : 1];
    alignas(16) Matrix C[1];
    alignas(16) Real tau[TIMED ? TILE : 1];
};

struct Shared {
    Stage stage[STAGES];
    alignas(16) State B[WIDEN && B_VARIES ? TILE * N : 1];
    alignas(16) Step steps[WARPS][TILE * W];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launcher gives too little shared memory");

extern __shared__ uint4 arena[];

// Put the adjoint's drive, the gradient before the gate, in place of the input's.
__device__ __forceinline__ void gate(Step* steps, const Stage& stage, const Column& mine, int lane,
                                     int count) {
    const int from = mine.row * CHANNELS + mine.channel;
#pragma unroll
    for (int e = 0; e < (TILE + EVERY - 1) / EVERY; ++e) {
        const int t = e * EVERY + mine.row, i = from + e * EVERY * CHANNELS;
        if (TILE % EVERY && t >= TILE) break;
        const Real z = GATE ? Real(widen(stage.z[i])) : Real(1);
        Real g = widen(stage.u[i]);
        if (GATE) g = mul(g, mul(z, sigmoid(z)));
        if (COMPLEX<State>) g = mul(Real(2), g);
        steps[lane + e * 32].x = t < count ? g : Real(0);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    selective_ends(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Inputs& in = p.in;
    const Size& size = in.size;
    const Place at = locate(size);
    const Lane me = lane_of(size, at);
    clear<THREADS>(shared.stage);
    __syncthreads();

    Pole<State> pole[PACK][S];
    State h[PACK][S], product[PACK][S];
    Sum<Real> time[PACK];
    Row<B_VARIES> B;
    load_states(h, in.A + states_at(size, at.shared, at, me), size, me);
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) {
            pole[c][s] = Pole<State>(h[c][s]);
            h[c][s] = Number::zero();
            product[c][s] = Number::one();
        }
    load_constant(B, in.B, at, me);
    const Column mine(in, at, me);
    const Copies copies(in, at);
    bool forgets = false;

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
        __syncthreads();
        if (ahead < tiles)
            fetch<TILE>(shared.stage[now == 0 ? STAGES - 1 : now - 1], copies, (long long)ahead * TILE);
        commit();
        const Stage& stage = shared.stage[now];
        now = now == STAGES - 1 ? 0 : now + 1;
        if (WIDEN && B_VARIES) widen_rows<TILE * N>(shared.B, stage.B);
        Step* steps = shared.steps[me.warp];
        const int count = at.length - first < TILE ? int(at.length - first) : TILE;
        if (count == TILE)
            mine.prepare<TILE, true>(steps, stage, me.lane, count);
        else
            mine.prepare<TILE, false>(steps, stage, me.lane, count);
        if (ADJOINT) gate(steps, stage, mine, me.lane, count);
        if (WIDEN && B_VARIES)
            __syncthreads();
        else
            __syncwarp();
        const State* Bs = reinterpret_cast<const State*>(WIDEN ? (const void*)shared.B : stage.B);
        const Step* at_lane = steps + me.lane / LANES * PACK;
#pragma unroll 1
        for (int t0 = 0; t0 < TILE; t0 += 8) {
            if (RESET && (first + t0) % CHUNK == 0) cleared = resets(in.reset, at, first + t0);
#pragma unroll
            for (int q = 0; q < 8; ++q) {
                const int t = t0 + q;
                load_row(B, Bs + t * N + me.first);
                const bool cut = RESET && cleared >> (first + t) % CHUNK & 1;
                forgets |= cut;
#pragma unroll
                for (int c = 0; c < PACK; ++c) {
                    const Step step = at_lane[t * W + c];
                    time[c].chunk = add(time[c].chunk, step.dd);
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        const Factors<State> f = pole[c][s].factors(step.dd, step.di());
                        if (ADJOINT) {
                            const State lam = scale_add(conj(B.at(c, s)), step.x, h[c][s]);
                            h[c][s] = cut ? Number::zero() : mul(conj(f.decay), lam);
                        } else {
                            if (cut) h[c][s] = Number::zero();
                            h[c][s] = fma(f.decay, h[c][s], drive(f, B.at(c, s), step.x));
                        }
                        if (SCHEME == BILINEAR) product[c][s] = mul(product[c][s], f.decay);
                    }
                }
            }
        }
#pragma unroll
        for (int c = 0; c < PACK; ++c) time[c].close();
        __syncwarp();
    }
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (SCHEME != BILINEAR)
                product[c][s] = pole[c][s].factors(time[c].total, time[c].total).decay;
            if (forgets) product[c][s] = Number::zero();
            if (ADJOINT) product[c][s] = conj(product[c][s]);
        }
    const long long states = states_at(size, at.row, at, me);
    store_states(p.product + states, product, size, me);
    store_states(p.end + states, h, size, me);
}
