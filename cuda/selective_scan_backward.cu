// SPDX-License-Identifier: MIT
// The selective scan, backward: all gradients in one pass from the end of time.
//
// With gy the gradient before the gate, lam_t = gy_t conj(C_t) + conj(decay_{t+1}) lam_{t+1} (2 gy for
// complex states), and from lam_t, h_{t-1}: the gradients of decay and gain, chained through
// discretize.cuh to A, dt, decay_dt and timesteps; those of u, B, C, D, z follow directly.
//
// Memory contract. Inputs as in selective_scan.cu, with the states `kept` before every 32nd step and
// gy, g_last. du, ddt, dz, ddecay (batch, L, E) contiguous, but for a gap after each row of ddt and dz;
// g_last (batch, segments, E, pitch) is the adjoint after each segment of time; dh0 (batch, E, pitch); dA
// (batch, segments, E, pitch), dD, dbias, down (batch, segments, E): to be summed over segments and the
// batch elements of one A. dB, dC: (blocks of a batch element, batch, L, states), to be summed over the
// blocks of a group, or where the matrix is constant (batch, segments, E, states); dtau (blocks, batch,
// L). Each element of u, dt, z, gy is read once. No atomics: every sum has a fixed order.
//
// Launch as the forward's. Chunks of 32 steps from the last to the first. A lane prepares and finishes
// elements of its own, V neighbouring channels of one of SUB steps: it copies them to shared memory ahead of
// time for itself, and no other thread waits for it. B and C are the block's, a chunk ahead. From the kept
// state a chunk is run through once to get the state before each SUB steps; then, from the last SUB steps to
// the first, these are run again with all states (and decays) in registers, and backwards. dB_t and dC_t are
// summed over the channels of a warp by exchanging halves, then over the warps in shared memory: after each
// chunk, or where ROW_SLOTS is 1 or 2 after each SUB steps.
#include "selective_backward_sums.cuh"
#include "selective_backward_totals.cuh"

// Start to copy B, C and timesteps of the chunk that begins with step `first`.
__device__ __forceinline__ void fetch(Coming& to, const Copies& copies, const Size& size, long long first) {
    copies.times<CHUNK>(to.tau, first);
    constexpr long long BITS = (B_VARIES ? WIDE_B : 0) | (C_VARIES ? WIDE_C : 0);
    const int states = int(size.states);
    if (Copies::Rows::POSSIBLE && copies.whole<CHUNK>(first, BITS)) {
        if (B_VARIES) copies.run<CHUNK, Copies::Rows::POSSIBLE>(to.B, copies.B, 1, states, first);
        if (C_VARIES) copies.run<CHUNK, Copies::Rows::POSSIBLE>(to.C, copies.C, 1, states, first);
    } else {
        if (B_VARIES) copies.run<CHUNK, false>(to.B, copies.B, 1, states, first);
        if (C_VARIES) copies.run<CHUNK, false>(to.C, copies.C, 1, states, first);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    selective_scan_backward(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Inputs& in = p.in;
    const Size& size = in.size;
    const Place at = locate(size);
    const Lane me = lane_of(size, at);
    const Elements mine(at, me);
    const long long length = at.length, chunks = (length + CHUNK - 1) / CHUNK;  // of the segment
    const long long kept = at.batch * ((size.length + CHUNK - 1) / CHUNK) + at.first / CHUNK;
    clear<THREADS>(shared.own);
    clear<THREADS>(shared.coming);
    for (int i = threadIdx.x; i < CHANNELS; i += THREADS) {
        const long long parameter = at.shared * size.width + at.channel + i;
        const bool exists = i < at.live;
        shared.parameters[0][i] = exists && in.D ? in.D[parameter] : Real(0);
        shared.parameters[1][i] = exists && in.bias ? in.bias[parameter] : Real(0);
        if (DECAY == 1)
            shared.parameters[DECAY == 1 ? 2 : 0][i] = exists ? constant_decay(in.decay_dt, at, i) : Real(0);
    }
    for (Real(&total)[SLOT] : shared.over_time)
        for (int v = 0; v < V; ++v) total[mine.slot + v] = Real(0);
    for (State(&total)[PACK * S][THREADS] : shared.totals)
#pragma unroll
        for (int i = 0; i < PACK * S; ++i) total[i][threadIdx.x] = Number::zero();
    __syncthreads();

    Pole<State> pole[PACK][S];
    State carry[PACK][S];
    Row<B_VARIES> B;
    Row<C_VARIES> C;
    load_states(carry, in.A + states_at(size, at.shared, at, me), size, me);
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) pole[c][s] = Pole<State>(carry[c][s]);
    load_states(carry, p.g_last + states_at(size, at.row, at, me), size, me);
    load_constant(B, in.B, at, me);
    load_constant(C, in.C, at, me);

    Totals totals;
    Sums over;
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s)
            totals.A[c][s] = totals.B[c][s] = totals.C[c][s] = Number::zero();
#pragma unroll
    for (int v = 0; v < V; ++v) over.D[v] = over.bias[v] = over.own[v] = Real(0);

    const Sequences sequences(p, at, mine);
    const Copies copies(in, at);
    // slot of the SUB steps j of a chunk
    const auto slot_of = [](long long chunk, int j) { return j ? j : chunk % 2 ? SUBS : 0; };

    fetch(shared.coming, copies, size, (chunks - 1) * CHUNK);
#pragma unroll 1
    for (int j = 0; j < SUBS; ++j)
        sequences.copy_steps(shared.own, slot_of(chunks - 1, j), mine,
                             (chunks - 1) * CHUNK + j * SUB, length);
    sequences.copy_outputs(shared.own, (SUBS - 1) % 2, mine, chunks * CHUNK - SUB, length);
    commit();

    const long long blocks = size.width / size.piece * size.parts;
    const long long batches = gridDim.x / (blocks * size.segments);
    const long long row_at = (at.part * batches + at.batch) * size.length + at.first;
    const long long row = at.batch * size.length + at.first;
    const bool even = in_whole_elements(size) && p.gap % V == 0;
#pragma unroll 1
    for (long long chunk = chunks - 1;; --chunk) {
        const long long first = chunk * CHUNK;
        State h[PACK][S];
        if (chunk >= 0) load_states(h, p.kept + states_at(size, kept + chunk, at, me), size, me);
        wait_for<0>();
        __syncthreads();  // B and C are there, and nobody needs the ones before or writes rows
        if (chunk + 1 < chunks)
            write_rows<ROW_SLOTS == SUBS ? CHUNK : SUB>(shared, p, at, first + CHUNK, length, row_at, 0);
        if (chunk < 0) break;
        const int count = length - first < CHUNK ? int(length - first) : CHUNK;
        const unsigned cleared = RESET ? resets(in.reset, at, first) : 0;
        if (B_VARIES) widen_rows<CHUNK * N>(shared.B, shared.coming.B);
        if (C_VARIES) widen_rows<CHUNK * N>(shared.C, shared.coming.C);
        if (TIMED) {
            for (int t = threadIdx.x; t < CHUNK; t += THREADS) shared.tau[t] = shared.coming.tau[t];
            __syncthreads();
        }
        {
            Loaded x[SUBS];
#pragma unroll
            for (int j = 0; j < SUBS; ++j) x[j].load(shared, j, slot_of(chunk, j), mine);
#pragma unroll
            for (int j = 0; j < SUBS; ++j)
                prepare(shared, j, slot_of(chunk, j), x[j], mine, count - j * SUB);
        }
        __syncthreads();
        if (chunk > 0) fetch(shared.coming, copies, size, first - CHUNK);
        commit();

        const Steps at_lane(shared, me);
        const State* Bs = shared.B + (B_VARIES ? me.first : 0);
        const State* Cs = shared.C + (C_VARIES ? me.first : 0);
        // the state before each SUB steps
#pragma unroll 1
        for (int j = 0; j < SUBS; ++j) {
#pragma unroll
            for (int i = 0; i < PACK * S; ++i) shared.starts[j][i][threadIdx.x] = h[i / S][i % S];
            if (j == SUBS - 1) break;
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const int t = j * SUB + i;
                load_row(B, Bs + t * N);
                Step step[PACK];
                at_lane.load(step, t);
                Factors<State> factors[PACK][S];
                find_factors(factors, pole, step);
                follow(h, factors, B, step, RESET && cleared >> t & 1);
            }
        }
#pragma unroll 1
        for (int j = SUBS - 1; j >= 0; --j) {
            // SUB steps ahead: gy and z, and the coming chunk's u and dt in place of what is done
            const int slot = slot_of(chunk, j), next = j == SUBS - 1 ? 0 : j + 1;
            if (j > 0 || chunk > 0)
                sequences.copy_outputs(shared.own, (j + 1) % 2, mine, first + (j - 1) * SUB, length);
            if (chunk > 0)
                sequences.copy_steps(shared.own, slot_of(chunk - 1, next), mine,
                                     first - CHUNK + next * SUB, length);
            commit();
            if (j * SUB >= count) continue;
            wait_for<1>();
            gate(shared, j, mine);
            State start[PACK][S], hs[SUB][PACK][S];
            Factors<State> factors[SUB][PACK][S];
#pragma unroll
            for (int i = 0; i < PACK * S; ++i)
                h[i / S][i % S] = start[i / S][i % S] = shared.starts[j][i][threadIdx.x];
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const int t = j * SUB + i;
                load_row(B, Bs + t * N);
                Step step[PACK];
                at_lane.load(step, t);
                find_factors(factors[i], pole, step);
                follow(h, factors[i], B, step, RESET && cleared >> t & 1);
#pragma unroll
                for (int c = 0; c < PACK; ++c)
#pragma unroll
                    for (int s = 0; s < S; ++s) hs[i][c][s] = h[c][s];
            }
            __syncwarp();  // the gated gradients are there
            const State *B_at = Bs + j * SUB * N, *C_at = Cs + j * SUB * N;
            const Steps steps_at = at_lane.from(j * SUB);
            const Real* gy_at = shared.gy[me.warp] + me.lane / LANES * PACK;
            Real* const sums_to = shared.sums[me.warp] + me.lane / LANES * PACK;
            Real* const rows_to =
                shared.rows +
                (MATRICES ? (me.warp * ROW_STEPS + j % ROW_SLOTS * SUB) * ROW + me.first * WORDS : 0);
            // what a step takes is loaded a step ahead, before the stores that it must not pass
            Taken ahead;
            ahead.load(B_at, C_at, steps_at, gy_at, SUB - 1);
#pragma unroll
            for (int i = SUB - 1; i >= 0; --i) {
                const int t = j * SUB + i;
                const Taken taken = ahead;
                if (i) ahead.load(B_at, C_at, steps_at, gy_at, i - 1);
                Real sums[PACK * VALUES], row[REST ? S * REST : 1];
                back(pole, carry, B_VARIES ? taken.B : B, C_VARIES ? taken.C : C, hs[i],
                     i ? hs[i ? i - 1 : 0] : start, factors[i], taken.steps, taken.gy,
                     RESET && cleared >> t & 1, totals, sums, row);
                int to[PACK * VALUES];
#pragma unroll
                for (int v = 0; v < PACK * VALUES; ++v) to[v] = v % VALUES * PLANE + v / VALUES;
                sum_values<1, PACK * VALUES>(sums, to, me.lane,
                                             [&](int k, Real x) { sums_to[i * W + k] = x; });
                if constexpr (MATRICES > 0)
                    sum_rows<0, S, REST>(row, me.lane, 0, 0, true, [&](int s, int k, Real x) {
                        rows_to[i * ROW + s * WORDS + k] = x;
                    });
            }
            __syncwarp();
            Real g_tau = finish(shared, p, j, slot, mine, over, even, length - first - j * SUB,
                                row + first + j * SUB, at.channel);
            if (TIMED) {
#pragma unroll
                for (int mask = 1; mask < Q; mask *= 2)
                    g_tau = add(g_tau, __shfl_xor_sync(~0u, g_tau, mask));
                if (me.lane % Q == 0 && mine.works())
                    shared.dtau[me.warp * ROW_STEPS + j % ROW_SLOTS * SUB + mine.row] = g_tau;
            }
            __syncwarp();
            if (ROW_SLOTS < SUBS && j > 0) {
                __syncthreads();
                write_rows<SUB>(shared, p, at, first + j * SUB, length, row_at, j % ROW_SLOTS);
                if (ROW_SLOTS == 1) __syncthreads();
            }
        }
        add_up(shared, totals, over, mine);
    }

    write_totals(shared, p, at, me, mine, carry);
}
