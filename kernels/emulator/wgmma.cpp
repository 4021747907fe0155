// The matrix instructions of a warpgroup: descriptors, operands in shared memory, and accumulators under way.
#include "asynchronous.h"

#include "../common/types.cuh"

namespace emulator {

namespace {

constexpr uint32_t rows = 64;  // of a and d
constexpr uint32_t depth = 16; // k
constexpr uint32_t group_threads = 32 * warps_of_a_group;

Warpgroup& own_group()
{
    return *current->block->warpgroups[current->warp->id / warps_of_a_group];
}

// What thread `t` of the warpgroup brought to the meeting under way.
template <class T>
const T& brought(uint32_t t)
{
    const Warp& warp = *current->warp;
    uint32_t first = warp.id / warps_of_a_group * warps_of_a_group;
    return *static_cast<const T*>(warp.block->warps[first + t / 32].arguments[t % 32]);
}

const Thread& thread_of_group(uint32_t t)
{
    const Warp& warp = *current->warp;
    return warp.block->threads[warp.id / warps_of_a_group * group_threads + t];
}

// A matrix in shared memory, as 64 bits: address, leading and stride byte offsets in units of 16 bytes, base offset
// and swizzle.
struct Descriptor {
    uint32_t start, leading, stride;
    uint32_t row;     // bytes of a row of the swizzle's atom of 8 rows; 16: not swizzled
    uint32_t swizzle; // bits 7 to 9 of an address that count

    Descriptor(uint64_t bits, Site site)
    {
        start = uint32_t(bits & 0x3fff) << 4;
        leading = uint32_t(bits >> 16 & 0x3fff) << 4;
        stride = uint32_t(bits >> 32 & 0x3fff) << 4;
        uint32_t base = uint32_t(bits >> 49 & 7);
        constexpr uint32_t widths[4] = {16, 128, 64, 32};
        row = widths[bits >> 62];
        swizzle = row / 16 - 1;
        if (bits & ~0xc00e3fff3fff3fffu) fail(site, "a wgmma descriptor with bits set that mean nothing");
        if (base != 0) fail(site, "a wgmma descriptor with a base offset: the emulator has none");
        if ((start >> 7 & swizzle) != 0) {
            fail(site, "a wgmma descriptor of byte %lld, swizzled by %u bytes: must begin where the pattern does, a "
                       "multiple of %u",
                 (long long)start - shared_origin, row, 8 * row);
        }
    }

    // Address of the chunk of 8 elements that holds element k of row r, or for MN-major of 8 rows r to r + 7 at k.
    uint32_t address(uint32_t r, uint32_t k, bool transposed) const
    {
        uint32_t at = start;
        if (!transposed) {
            at += r / 8 * stride + r % 8 * row + (row == 16 ? k / 8 * leading : 2 * k);
        } else if (row == 16) {
            at += r / 8 * stride + k % 8 * row + k / 8 * leading;
        } else {
            at += r / (row / 2) * leading + 2 * r % row + k % 8 * row + k / 8 * stride;
        }
        return at ^ (at >> 7 & swizzle) << 4;
    }
};

// What all four warps know.
const Clock& common_clock()
{
    static thread_local Clock common;
    const Warp& warp = *current->warp;
    const Block& block = *warp.block;
    const Warp* warps = &block.warps[warp.id / warps_of_a_group * warps_of_a_group];
    common.threads.clear();
    if (!block.launch_races()) return warps[0].clock;
    for (uint32_t u = 0; u < block.cluster->parties; u++) {
        common.seen[u] = common.fenced[u] = last_epoch;
        for (uint32_t w = 0; w < warps_of_a_group; w++) {
            common.seen[u] = std::min(common.seen[u], warps[w].clock.seen[u]);
            common.fenced[u] = std::min(common.fenced[u], warps[w].clock.fenced[u]);
        }
    }
    for (const ThreadTime& thread : warps[0].clock.threads) {
        uint32_t epoch = thread.epoch;
        for (uint32_t w = 1; w < warps_of_a_group; w++) epoch = std::min(epoch, warps[w].clock.known(thread.owner));
        common.threads.push_back({thread.owner, epoch});
    }
    return common;
}

// Loads [count, 16] of E from shared memory as f32, element (r, k) to out[r * by_row + k * by_k].
template <class E>
void load_operand(float* out, const Descriptor& matrix, bool transposed, uint32_t count, uint32_t by_row,
                  uint32_t by_k, const Clock& clock, WgmmaRead& read, Site site)
{
    Block& block = *current->block;
    uint32_t step_r = transposed ? 8 : 1, step_k = transposed ? 1 : 8;
    uint32_t by_element = transposed ? by_row : by_k;
    for (uint32_t r = 0; r < count; r += step_r) {
        for (uint32_t k = 0; k < depth; k += step_k) {
            uint32_t offset = matrix.address(r, k, transposed) - shared_origin;
            if (uint64_t(offset) + chunk > block.shared_bytes)
                fail_shared_bounds("wgmma reads", block, offset + shared_origin, chunk, chunk, site);
            examine_asynchronous_read(block, offset, chunk, clock, false, site);
            begin_reading(block, offset / chunk);
            read.chunks.push_back(uint16_t(offset / chunk));
            E elements[8];
            memcpy(elements, block.shared.data() + offset, chunk);
            float* to = out + r * by_row + k * by_k;
            for (uint32_t i = 0; i < 8; i++) to[i * by_element] = to_float(elements[i]);
        }
    }
}

// Row and column in d of register i of thread t, i even: the next is one column on.
uint32_t place_in_d(uint32_t t, uint32_t i, uint32_t n)
{
    uint32_t row = 16 * (t / 32) + t % 32 / 4 + 8 * (i >> 1 & 1);
    return row * n + 8 * (i >> 2) + 2 * (t % 4);
}

// Whether the registers are as the emulator has left them.
void examine_registers(const Accumulator& accumulator, const char* when)
{
    static const float nan = bits_to_float(0xffffffffu);
    for (uint32_t t = 0; t < group_threads; t++) {
        const float* values = accumulator.values.data() + t * accumulator.count;
        const float* registers = accumulator.registers[t];
        bool same = true;
        if (accumulator.shown) {
            same = memcmp(registers, values, accumulator.count * sizeof(float)) == 0;
        } else {
            for (uint32_t i = 0; i < accumulator.count; i++) same = same && memcmp(&registers[i], &nan, 4) == 0;
        }
        if (same) continue;
        blamed = &thread_of_group(t);
        fail(accumulator.site, "the accumulator of this wgmma was written before %s", when);
    }
}

void show(Accumulator& accumulator, bool values)
{
    accumulator.shown = values;
    for (uint32_t t = 0; t < group_threads; t++) {
        size_t bytes = accumulator.count * sizeof(float);
        if (values) {
            memcpy(accumulator.registers[t], accumulator.values.data() + t * accumulator.count, bytes);
        } else {
            memset(accumulator.registers[t], 0xff, bytes);
        }
    }
}

// The accumulator that the lanes name: the one under way, or a new one.
uint32_t find_accumulator(Warpgroup& group, uint32_t count, Site site)
{
    uint32_t free = uint32_t(group.accumulators.size());
    for (uint32_t i = 0; i < group.accumulators.size(); i++) {
        Accumulator& candidate = group.accumulators[i];
        const float* first = brought<WarpgroupProduct>(0).d;
        bool overlaps = first < candidate.registers[0] + candidate.count && candidate.registers[0] < first + count;
        if (candidate.flights != 0 && overlaps) {
            if (first != candidate.registers[0] || count != candidate.count) {
                fail(site, "a wgmma of another shape (%s:%u) is under way with this accumulator: wgmma_wait first",
                     candidate.site.file, candidate.site.line);
            }
            examine_registers(candidate, "the next one to it");
            return i;
        }
        if (candidate.flights == 0 && (overlaps || free == group.accumulators.size())) free = i;
    }
    if (free == group.accumulators.size()) group.accumulators.emplace_back();
    Accumulator& accumulator = group.accumulators[free];
    bool untouched = accumulator.count == count;
    for (uint32_t t = 0; t < group_threads && untouched; t++) {
        const float* d = brought<WarpgroupProduct>(t).d;
        untouched = d == accumulator.registers[t]
            && memcmp(d, accumulator.values.data() + t * count, count * sizeof(float)) == 0;
    }
    if (!untouched && !group.fenced) {
        fail(site, "a wgmma whose registers were touched since the last one, with no wgmma_fence in between");
    }
    accumulator.count = count;
    accumulator.values.resize(size_t(group_threads) * count);
    accumulator.shown = true;
    for (uint32_t t = 0; t < group_threads; t++) {
        accumulator.registers[t] = brought<WarpgroupProduct>(t).d;
        memcpy(accumulator.values.data() + t * count, accumulator.registers[t], count * sizeof(float));
    }
    return free;
}

// The operands as f32: a [64, 16], b [16, n].
template <class E>
void gather_operands(float* a, float* b, const WarpgroupProduct& own, WgmmaRead& read, Site site)
{
    const Clock& clock = common_clock();
    if (own.a) {
        for (uint32_t t = 0; t < group_threads; t++) {
            const uint32_t* fragment = brought<WarpgroupProduct>(t).a;
            for (uint32_t i = 0; i < 4; i++) {
                uint32_t row = 16 * (t / 32) + t % 32 / 4 + 8 * (i & 1), k = 2 * (t % 4) + 8 * (i >> 1);
                a[row * depth + k] = to_float(E{uint16_t(fragment[i])});
                a[row * depth + k + 1] = to_float(E{uint16_t(fragment[i] >> 16)});
            }
        }
    } else {
        load_operand<E>(a, Descriptor(own.a_matrix, site), own.a_transposed, rows, depth, 1, clock, read, site);
    }
    load_operand<E>(b, Descriptor(own.b_matrix, site), own.b_transposed, own.n, 1, own.n, clock, read, site);
}

void examine_agreement(const WarpgroupProduct& own, Site site)
{
    for (uint32_t t = 0; t < group_threads; t++) {
        const WarpgroupProduct& other = brought<WarpgroupProduct>(t);
        bool same = other.b_matrix == own.b_matrix && other.accumulate == own.accumulate
            && (own.a || other.a_matrix == own.a_matrix);
        if (same) continue;
        blamed = &thread_of_group(t);
        fail(site, "the lanes of a warpgroup bring different descriptors to a wgmma");
    }
}

} // namespace

void wgmma_fence(Site site)
{
    if (!meet_group(Collective::wgmma_fence, nullptr, site)) return;
    own_group().fenced = true;
    part_group();
}

void wgmma_multiply(WarpgroupProduct own, Site site)
{
    if (!meet_group(Collective::wgmma, &own, site)) return;
    Block& block = *current->block;
    Launch& launch = *block.launch;
    Warpgroup& group = own_group();
    examine_agreement(own, site);
    if (own.a && !group.fenced) {
        fail(site, "a wgmma whose registers were touched since the last one, with no wgmma_fence in between");
    }
    uint32_t n = own.n, count = n / 2;
    uint32_t which = find_accumulator(group, count, site);
    Accumulator& accumulator = group.accumulators[which];
    accumulator.site = site;

    size_t floats = rows * depth + size_t(n) * depth + size_t(rows) * n;
    if (launch.scratch.size() < floats) launch.scratch.resize(floats);
    float* a = launch.scratch.data();
    float* b = a + rows * depth;
    float* p = b + n * depth;
    group.reads.push_back({group.groups + 1, {}, which, site});
    WgmmaRead& read = group.reads.back();
    read.chunks.reserve((own.a ? 0 : rows * depth / 8) + n * depth / 8);
    (own.f16 ? gather_operands<f16> : gather_operands<bf16>)(a, b, own, read, site);
    product(p, a, b, rows, int(n));
    for (uint32_t t = 0; t < group_threads; t++) {
        float* values = accumulator.values.data() + t * count;
        for (uint32_t i = 0; i < count; i += 2) {
            const float* at = p + place_in_d(t, i, n);
            values[i] = own.accumulate ? values[i] + at[0] : at[0];
            values[i + 1] = own.accumulate ? values[i + 1] + at[1] : at[1];
        }
    }
    accumulator.flights++;
    CopyPolicy policy = launch.arguments.policy;
    show(accumulator, policy == CopyPolicy::at_issue || (policy == CopyPolicy::random && launch.next_random() % 2));
    part_group();
}

void wgmma_commit(Site site)
{
    if (!meet_group(Collective::wgmma_commit, nullptr, site)) return;
    own_group().groups++;
    part_group();
}

namespace {

// Fails unless every lane has named the accumulator to the wait.
void examine_named(const Accumulator& accumulator, Site site)
{
    for (uint32_t t = 0; t < group_threads; t++) {
        const WarpgroupWait& wait = brought<WarpgroupWait>(t);
        bool named = false;
        for (uint32_t i = 0; i < wait.count; i++)
            named = named || wait.accumulators[i].first == accumulator.registers[t];
        if (named) continue;
        blamed = &thread_of_group(t);
        fail(site, "waits for a wgmma (%s:%u) without naming its accumulator, which the compiler may then read too "
                   "early",
             accumulator.site.file, accumulator.site.line);
    }
}

// The operands of a wgmma have been read.
void end_reading(const WgmmaRead& read, uint32_t epoch)
{
    Block& block = *current->block;
    uint32_t row = block.warp_count + current->warp->id / warps_of_a_group;
    for (uint16_t number : read.chunks) {
        block.reading[number]--;
        if (!block.launch_races()) continue;
        uint32_t first = uint32_t(number) * chunk / granule;
        std::fill_n(block.reader_row(row) + first, chunk / granule, epoch << owner_bits);
    }
}

} // namespace

void wgmma_wait(WarpgroupWait own, Site site)
{
    if (!meet_group(Collective::wgmma_wait, &own, site)) return;
    Block& block = *current->block;
    Cluster& cluster = *block.cluster;
    Warpgroup& group = own_group();
    uint32_t newest = group.groups > own.pending ? group.groups - own.pending : 0;
    if (cluster.time >= last_epoch) cluster.restart_time();
    uint32_t epoch = ++cluster.time;
    size_t kept = 0;
    for (WgmmaRead& read : group.reads) {
        if (read.group > newest) {
            if (&group.reads[kept] != &read) group.reads[kept] = std::move(read);
            kept++;
            continue;
        }
        end_reading(read, epoch);
        Accumulator& accumulator = group.accumulators[read.accumulator];
        if (--accumulator.flights != 0) continue;
        examine_named(accumulator, site);
        examine_registers(accumulator, "it was waited for");
        show(accumulator, true);
    }
    group.reads.resize(kept);
    group.fenced = false;
    if (block.launch_races()) {
        uint32_t first = current->warp->id / warps_of_a_group * warps_of_a_group;
        uint32_t party = block.row_party[block.warp_count + first / warps_of_a_group];
        for (uint32_t w = 0; w < warps_of_a_group; w++) block.warps[first + w].clock.seen[party] = epoch;
    }
    part_group();
}

void set_registers(uint32_t wanted, bool more, Site site)
{
    if (!meet_group(Collective::set_registers, nullptr, site)) return;
    Block& block = *current->block;
    Warpgroup& group = own_group();
    uint32_t start = block.launch->arguments.registers;
    uint32_t now = group.registers ? group.registers : start;
    if (wanted % 8 != 0 || wanted < 24 || wanted > 256)
        fail(site, "wants %u registers: must be a multiple of 8 from 24 to 256", wanted);
    if (more ? wanted < now : wanted > now) {
        fail(site, "%s the registers of a thread to %u, but has %u", more ? "increases" : "decreases", wanted, now);
    }
    if (more) {
        // As on a GPU, it waits until other warpgroups have given some up.
        while (block.registers < wanted - now) {
            group.wanted = wanted;
            group.worker = current;
            rest();
        }
        block.registers -= wanted - now;
        group.wanted = 0;
    } else {
        block.registers += now - wanted;
        for (const auto& other : block.warpgroups) {
            if (!other || other->wanted == 0) continue;
            // It tries again.
            other->worker->warp->state.runnable |= 1u << other->worker->lane;
        }
    }
    group.registers = wanted;
    part_group();
}

} // namespace emulator
