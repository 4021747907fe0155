// The warpgroup that copies, Hopper's backward pass of attention: key blocks and queries into shared memory, short
// images normalised there and their delta made; one warp of it takes dq of long images to global memory.
//
// Each of its warps goes its own way: it asks for its part of the next slot or stage as soon as that is empty, and then
// finishes the one before, which has arrived meanwhile.
#pragma once

#include "hopper_backward_memory.cuh"

namespace hopper_backward {

// Warps that copy beside the one that moves dq.
constexpr int COPIERS_OF_LONG = 3;

// An (image, head), two heads of an image, or a key block of a long image.
struct alignas(16) Item {
    int kind;
    int start;
    int length;
    int head;
    int heads; // that share slots and stages
    int key;   // first key
    int first; // query tile it begins with
    int tiles; // stages
    int slots; // key blocks
    int number;
    int unused[6];
};

DEVICE Item long_item(const AttentionBackward& p, const Schedule& schedule, int number)
{
    const HeadTile at = schedule.head_tile(number, p.cu_seqlens, KEYS_OF_BLOCK);
    const Head head = head_of(p, at.image, at.head);
    const int tiles = ceil_div(head.length, QUERIES_OF_STAGE);
    const Window window(at.tile, at.tiles, gridDim.x, tiles);
    const int key = at.tile * KEYS_OF_BLOCK;
    return Item{LONG, head.start, head.length, at.head, 1, key, window.first(), tiles, 1, number, {}};
}

DEVICE Item short_item(const AttentionBackward& p, const Schedule& schedule, int number)
{
    const ShortItem at = schedule.short_item(number);
    const Head head = head_of(p, at.image, at.head);
    if (at.heads == 1) {
        const int tiles = ceil_div(head.length, QUERIES_OF_STAGE);
        const int slots = ceil_div(head.length, KEYS_OF_BLOCK);
        return Item{WHOLE, head.start, head.length, at.head, 1, 0, 0, tiles, slots, number, {}};
    }
    const int heads = p.heads - at.head < 2 ? 1 : 2;
    return Item{PAIR, head.start, head.length, at.head, heads, 0, 0, heads, 1, number, {}};
}

// What is asked for at a time: a slot or a stage.
struct alignas(16) Unit {
    int keys; // whether it is a slot
    uint32_t place;
    int token; // first row
    int valid; // rows that exist
    int head;
    int heads; // that a slot is for; 0: there is nothing to copy
    int unused[2];
};

// How far a warp has come.
template <int SLOTS, int STAGES>
struct alignas(16) Progress {
    HopperRing<SLOTS> slot;
    HopperRing<STAGES> stage;
    int step;    // of the item
    int turn;    // of the two units that are noted
    int pending; // whether the unit before is to be finished
    int unused;
};

// What a warp keeps in shared memory and reads of it what it needs, when it needs it: its registers are few.
struct Notes {
    Item now;
    Item next;
    Unit units[2];
    Progress<1, 1> progress;
};

// Writes what all lanes of a warp have come to. Collective.
template <class T>
DEVICE void note(Shared<T> at, const T& x)
{
    ptx::warp_sync();
    if (ptx::unknown(threadIdx.x) % 32 == 0) at.store(0, x);
    ptx::warp_sync();
}

template <int D>
DEVICE auto state_of_warp(const Memory<D>& memory)
{
    using State = Progress<Memory<D>::SLOTS, Memory<D>::STAGES>;
    const uint32_t notes = memory.notes(ptx::unknown(threadIdx.x) / 32);
    return Shared<State>(notes + 2 * sizeof(Item) + 2 * sizeof(Unit));
}

// Copies what the items of this block need, one after another: of long images, by COPIERS_OF_LONG warps, or of short
// ones, by all four.
template <int D, bool OF_LONG>
struct Copier {
    using Layout = Memory<D>;
    using Keys = typename Layout::Keys;
    using Queries = typename Layout::Queries;
    static constexpr int COPIERS = OF_LONG ? COPIERS_OF_LONG : 4;
    // Rows that a thread normalises at a time, and queries of which it makes delta: as registers allow.
    static constexpr int ROWS_AT_ONCE = D == 64 ? 2 : 1;
    static constexpr int DELTAS_AT_ONCE = D <= 96 ? 2 : 1;
    static_assert(sizeof(Notes) <= Layout::NOTES_BYTES, "the notes of a warp have room");

    const AttentionBackwardHopper& hopper;
    const AttentionBackward& p;
    const Layout memory;
    const Schedule schedule;

    DEVICE explicit Copier(const AttentionBackwardHopper& hopper)
        : hopper(hopper), p(hopper.all), schedule{p.schedule, p.slots, p.heads}
    {
    }

    static DEVICE int thread()
    {
        return ptx::unknown(threadIdx.x);
    }

    template <class Tile>
    static DEVICE OwnRows<Tile> own()
    {
        return OwnRows<Tile>(thread(), 32 * COPIERS);
    }

    DEVICE uint32_t notes() const
    {
        return memory.notes(thread() / 32);
    }

    DEVICE Shared<Item> now() const
    {
        return Shared<Item>(notes());
    }

    DEVICE Shared<Item> next() const
    {
        return Shared<Item>(notes() + sizeof(Item));
    }

    // Of the unit that is asked for and the one before, by turns.
    DEVICE Shared<Unit> unit(int turn) const
    {
        return Shared<Unit>(notes() + 2 * sizeof(Item) + turn * sizeof(Unit));
    }

    using State = Progress<Layout::SLOTS, Layout::STAGES>;

    DEVICE Shared<State> state() const
    {
        return state_of_warp<D>(memory);
    }

    // Of a head of queries, or of the keys that it has.
    DEVICE HeadNorm norm_of(bool keys, int head) const
    {
        const float* const gain = ptx::unknown(keys ? p.norm.k_gain : p.norm.q_gain);
        const float* const bias = ptx::unknown(keys ? p.norm.k_bias : p.norm.q_bias);
        return head_norm(p.norm, gain, bias, keys ? kv_head(p, head) : head, p.head_dim);
    }

    DEVICE Rows rows(const Element* x, int64_t stride, int head, int token) const
    {
        return Rows{ptx::unknown(x) + token * stride + head * p.head_dim, stride};
    }

    DEVICE void start(int turn) const
    {
        const Unit unit = this->unit(turn).load(0);
        if (uniform(unit.keys)) {
            const int room = round_up(unit.valid, KEYS_OF_GROUP);
            for (int h = 0; h < uniform(unit.heads); h++) {
                const uint32_t below = h * KEYS_OF_GROUP * Keys::ROW_BYTES;
                const int head = kv_head(p, unit.head + h);
                const Rows k = OF_LONG ? rows(hopper.k_norm, hopper.k_norm_stride, head, unit.token)
                                       : rows(p.k, p.k_stride, head, unit.token);
                const Keys first(memory.keys(unit.place).base + below);
                own<Keys>().copy(first, k.p, k.stride, room, unit.valid, p.head_dim);
                const Rows v = rows(p.v, p.v_stride, head, unit.token);
                const Keys second(memory.values(unit.place).base + below);
                own<Keys>().copy(second, v.p, v.stride, room, unit.valid, p.head_dim);
            }
            return;
        }
        const int room = round_up(unit.valid, 16);
        const Rows q = OF_LONG ? rows(hopper.q_norm, hopper.q_norm_stride, unit.head, unit.token)
                               : rows(p.q, p.q_stride, unit.head, unit.token);
        own<Queries>().copy(memory.queries(unit.place), q.p, q.stride, room, unit.valid, p.head_dim);
        const Rows dout = rows(p.dout, p.dout_stride, unit.head, unit.token);
        own<Queries>().copy(memory.dout(unit.place), dout.p, dout.stride, room, unit.valid, p.head_dim);
        if (OF_LONG) return;
        // Read when dout has arrived.
        const Rows out = rows(p.out, p.out_stride, unit.head, unit.token);
        if (thread() < unit.valid) ptx::prefetch_l2(Global<const Element>(out.p).at(thread() * out.stride));
    }

    // Waits for this thread's copies, where `more` but for those that it has asked for last.
    DEVICE static void wait(bool more)
    {
        if (more)
            ptx::cp_async_wait<1>();
        else
            ptx::cp_async_wait<0>();
    }

    DEVICE void keep(const Unit& unit, int row, float lse, float delta) const
    {
        Shared<float>(memory.lse(unit.place)).store(row, row < unit.valid ? lse * -LOG2_E : -infinity());
        Shared<float>(memory.delta(unit.place)).store(row, -delta);
    }

    // lse and delta that were made before.
    DEVICE void finish_long(const Unit& unit, bool more) const
    {
        if (!unit.keys && thread() < QUERIES_OF_STAGE) {
            const int64_t at = int64_t(unit.token + thread()) * p.heads + unit.head;
            const bool exists = thread() < unit.valid;
            keep(unit, thread(), exists ? Global<const float>(p.lse).load(at) : 0.0f,
                 exists ? Global<const float>(p.delta).load(at) : 0.0f);
        }
        wait(more);
    }

    DEVICE void finish_keys(const Unit& unit, bool more) const
    {
        wait(more);
        if (!makes_rows(p)) return;
        for (int h = 0; h < uniform(unit.heads); h++) {
            const Keys tile(memory.keys(unit.place).base + h * KEYS_OF_GROUP * Keys::ROW_BYTES);
            normalise(tile, norm_of(true, unit.head + h), unit);
        }
    }

    // Normalises and rotates the rows of a unit in place. Collective.
    template <class Tile>
    DEVICE void normalise(Tile tile, const HeadNorm& norm, const Unit& unit) const
    {
        if (p.rope)
            own<Tile>().rotate(tile, norm, rope_of(p).from(unit.token), unit.valid, nullptr, nullptr, 0);
        else
            own<Tile>().template normalise<ROWS_AT_ONCE>(tile, norm, unit.valid, p.head_dim, nullptr, nullptr, 0);
    }

    // Normalised, and with delta, for which out comes while they arrive.
    DEVICE void finish_queries(const Unit& unit, bool more) const
    {
        constexpr int ROWS = QUERIES_OF_STAGE / 32; // of a thread
        constexpr int R = DELTAS_AT_ONCE;
        constexpr int N = OwnRows<Queries>::N;
        ROLLED
        for (int first = 0; first < ROWS; first += R) {
            const Rows out = rows(p.out, p.out_stride, unit.head, unit.token);
            const auto own_rows = own<Queries>();
            Vec16 x[R][N];
            float lse[R];
            UNROLL
            for (int r = 0; r < R; r++) {
                const int row = own_rows.row + (first + r) * own_rows.step;
                UNROLL
                for (int i = 0; i < N; i++) {
                    const int column = 8 * own_rows.chunk(i);
                    const bool inside = row < unit.valid && column < p.head_dim;
                    x[r][i] = inside ? Global<const Element>(out.p).load_16(row * out.stride + column) : Vec16{};
                }
                const int64_t at = int64_t(unit.token + row) * p.heads + unit.head;
                lse[r] = row < unit.valid ? Global<const float>(p.lse).load(at) : 0.0f;
            }
            if (first == 0) wait(more);
            float delta[R];
            UNROLL
            for (int r = 0; r < R; r++) {
                delta[r] = 0.0f;
                const int row = own_rows.row + (first + r) * own_rows.step;
                const uint32_t at = memory.dout(unit.place).base + (first + r) * own_rows.step * Queries::ROW_BYTES;
                UNROLL
                for (int i = 0; i < N; i++) {
                    if (row >= unit.valid || own_rows.chunk(i) >= Queries::CHUNKS) continue;
                    const Vec16 y = Shared<Element>(at + own_rows.place[i]).load_16(0);
                    UNROLL
                    for (int w = 0; w < 4; w++) {
                        delta[r] = ptx::fused_multiply_add(low(x[r][i].word[w]), low(y.word[w]), delta[r]);
                        delta[r] = ptx::fused_multiply_add(high(x[r][i].word[w]), high(y.word[w]), delta[r]);
                    }
                }
            }
            sums_of_lanes<OwnRows<Queries>::LANES>(delta);
            UNROLL
            for (int r = 0; r < R; r++) {
                if (own_rows.j == 0) keep(unit, own_rows.row + (first + r) * own_rows.step, lse[r], delta[r]);
            }
        }
        if (!makes_rows(p)) return;
        normalise(memory.queries(unit.place), norm_of(false, unit.head), unit);
    }

    // Makes this thread's part ready and says so. Collective.
    DEVICE void finish(int turn, bool more) const
    {
        const Unit unit = this->unit(turn).load(0);
        const bool keys = uniform(unit.keys);
        if (OF_LONG)
            finish_long(unit, more);
        else if (keys)
            finish_keys(unit, more);
        else
            finish_queries(unit, more);
        ptx::fence_proxy_async();
        ptx::warp_sync();
        const uint32_t filled = keys ? memory.slot_filled(unit.place) : memory.stage_filled(unit.place);
        if (thread() % 32 == 0) ptx::mbarrier_arrive(filled, Layout::FILLS / COPIERS);
    }

    // Looks up the item behind that of `number`.
    DEVICE void look_up(int number) const
    {
        const int items = OF_LONG ? schedule.long_items() : schedule.short_items();
        if (number >= items)
            note(next(), Item{END, 0, 0, 0, 0, 0, 0, 0, 1, number, {}});
        else
            note(next(), OF_LONG ? long_item(p, schedule, number) : short_item(p, schedule, number));
    }

    // Notes the next unit of the item; false behind the end, where nothing is asked for. Collective.
    DEVICE bool note_unit(const State& at) const
    {
        const Item item = now().load(0);
        const int tiles = uniform(item.tiles);
        const int units = item.kind != END ? tiles + item.slots : OF_LONG ? 0 : 1;
        const bool keys = at.step == 0 || at.step > tiles;
        const int turned = item.first + at.step - 1;
        const int tile = turned < tiles ? turned : turned - tiles;
        const bool pair = item.kind == PAIR;
        const int row = keys ? key_of(item, at.step) : pair ? 0 : tile * QUERIES_OF_STAGE;
        const int most = keys ? KEYS_OF_BLOCK : QUERIES_OF_STAGE;
        const int left = item.length - row;
        note(unit(at.turn), Unit{keys, keys ? at.slot.stage : at.stage.stage, item.start + row,
                                 left < most ? left : most, item.head + (pair && !keys ? at.step - 1 : 0),
                                 item.heads, {}});
        return at.step != uniform(units);
    }

    static DEVICE int key_of(const Item& item, int step)
    {
        return item.key + (step == 0 ? 0 : step - item.tiles) * KEYS_OF_BLOCK;
    }

    // Tells those who multiply what the slot is.
    DEVICE void note_block(const State& at) const
    {
        if (thread() != 0) return;
        const Item item = now().load(0);
        const int key = key_of(item, at.step);
        memory.block(at.slot.stage)
            .store(0, KeyBlock{item.kind, item.start, item.length, item.head, item.heads, key, item.first, 0});
    }

    // Goes on to the next unit, or the next item.
    DEVICE void go_on(bool keys) const
    {
        // It is known by the time that it is wanted. Nothing else is kept in registers meanwhile, not even gridDim.x.
        if (uniform(state().load(0).step) == 0 && uniform(now().load(0).kind) != END)
            look_up(now().load(0).number + hopper.blocks);
        State at = state().load(0);
        const Item item = now().load(0);
        const bool end = uniform(item.kind) == END;
        if (keys)
            at.slot.next();
        else
            at.stage.next();
        at.turn ^= 1;
        at.pending = true;
        at.step++;
        if (!end && uniform(at.step) == uniform(item.tiles + item.slots)) {
            note(now(), next().load(0));
            at.step = 0;
        }
        note(state(), at);
    }

    // Long images come first, and leave the rings where they are.
    DEVICE void run() const
    {
        // The first item that is not long is that of the block whose turn it is.
        int first = blockIdx.x;
        if (!OF_LONG) {
            const int long_items = schedule.long_items();
            if (first < long_items) first += ceil_div(long_items - first, int(gridDim.x)) * int(gridDim.x);
            first -= long_items;
        }
        look_up(first);
        note(now(), next().load(0));
        State begin{};
        if (!OF_LONG) {
            begin.slot = state().load(0).slot;
            begin.stage = state().load(0).stage;
        }
        note(state(), begin);
        for (;;) {
            const State at = state().load(0);
            const bool more = note_unit(at);
            const bool keys = uniform(unit(at.turn).load(0).keys);
            const uint32_t empty = keys ? memory.slot_empty(at.slot.stage) : memory.stage_empty(at.stage.stage);
            const uint32_t parity = (keys ? at.slot.parity : at.stage.parity) ^ 1;
            bool pending = uniform(at.pending);
            // Until it is empty there is time to finish the one before, and others may wait for that.
            const bool at_once = more && ptx::ballot(ptx::mbarrier_peek(empty, parity)) == 0xffffffffu;
            bool asked = false;
            do {
                if (more && (at_once || !pending)) {
                    ptx::mbarrier_wait(empty, parity);
                    if (keys) note_block(state().load(0));
                    start(uniform(state().load(0).turn));
                    ptx::cp_async_commit();
                    asked = true;
                }
                if (pending) finish(uniform(state().load(0).turn) ^ 1, asked);
                pending = false;
            } while (more && !asked);
            if (!more) return;
            go_on(keys);
        }
    }
};

// Takes dq of the long images to global memory, in the turns of the key blocks. One warp, which counts how far the rings
// of the others have come.
template <int D>
struct Mover {
    using Layout = Memory<D>;

    const AttentionBackwardHopper& hopper;
    const AttentionBackward& p;
    const Layout memory;
    const Schedule schedule;

    DEVICE explicit Mover(const AttentionBackwardHopper& hopper)
        : hopper(hopper), p(hopper.all), schedule{p.schedule, p.slots, p.heads}
    {
    }

    // Waits until all but PENDING of the additions are there, and tells the others of the one to tile `told`, if there is
    // one that they do not know of. Waits for no turn.
    template <int PENDING>
    DEVICE void tell(int64_t& told) const
    {
        if (told < 0) return;
        ptx::bulk_wait<PENDING>();
        ptx::fence_proxy_async_global();
        ptx::atomic_add_release(hopper.turns + told, 1);
        told = -1;
    }

    // Adds room `tile` to tile `at` of dq_sum once `turn` others have, and leaves it to the next one to tell of it, so
    // that it lands meanwhile. But nobody is told late: not after a wait for a turn.
    DEVICE void add(uint32_t tile, int64_t at, int turn, int64_t& told) const
    {
        const Global<int32_t> turns(hopper.turns);
        float* const target = hopper.dq_sum + at * (QUERIES_OF_STAGE * D);
        if (turn == 0) {
            ptx::bulk_store(target, memory.room(tile), FragmentTile<D>::BYTES);
        } else {
            if (turns.load_coherent(at) != turn) {
                tell<0>(told);
                while (turns.load_coherent(at) != turn) {}
            }
            // What they wrote asynchronously is there for what this thread writes so.
            ptx::fence_proxy_async_global();
            ptx::bulk_add(target, memory.room(tile), FragmentTile<D>::BYTES);
        }
        ptx::bulk_commit();
        tell<1>(told);
        told = at;
        ptx::bulk_wait_read<0>();
        ptx::mbarrier_arrive(memory.room_empty(tile));
    }

    DEVICE void run() const
    {
        const int items = schedule.long_items();
        uint32_t slots = 0;
        uint32_t stages = 0;
        HopperRing<Layout::ROOM> room;
        int64_t told = -1; // tile whose addition is under way
        for (int number = blockIdx.x; number < items; number += gridDim.x) {
            const HeadTile at = schedule.head_tile(number, p.cu_seqlens, KEYS_OF_BLOCK);
            const int tiles = ceil_div(head_of(p, at.image, at.head).length, QUERIES_OF_STAGE);
            const Window window(at.tile, at.tiles, gridDim.x, tiles);
            const int64_t first = 2 * int64_t(at.first);
            int tile = window.first();
            for (int i = 0; i < tiles; i++, room.next()) {
                if (ptx::lane_id() == 0) {
                    const uint32_t filled = memory.room_filled(room.stage);
                    if (!ptx::mbarrier_peek(filled, room.parity)) tell<0>(told);
                    ptx::mbarrier_wait(filled, room.parity);
                    add(room.stage, (first + tile) * p.heads + at.head, window.turn(tile), told);
                }
                tile = tile + 1 == tiles ? 0 : tile + 1;
            }
            slots++;
            stages += tiles;
        }
        tell<0>(told);
        Progress<Layout::SLOTS, Layout::STAGES> reached{};
        reached.slot.skip(slots);
        reached.stage.skip(stages);
        note(state_of_warp<D>(memory), reached);
    }
};

} // namespace hopper_backward
