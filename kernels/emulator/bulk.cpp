// Bulk copies between global and shared memory, of boxes that a tensor map describes and of plain bytes.
#include "asynchronous.h"

#include "../common/types.cuh"

#include <stdio.h>

namespace emulator {

namespace {

// A tensor map as the emulator encodes it. Mirrored in src/device/emulator/tensor_map.rs.
struct Map {
    uint64_t magic;
    uint64_t base;
    uint64_t strides[4]; // bytes, of all dimensions but the innermost
    uint32_t sizes[5];   // elements, innermost first
    uint32_t box[5];
    uint32_t rank;
    uint32_t element; // bytes: 2 of bf16, 4 of f32
    uint32_t swizzle; // bits 7 to 9 of an address that count
    uint32_t unused;
};
static_assert(sizeof(Map) <= 128, "as large as a CUtensorMap");

constexpr uint64_t magic = 0x70616d5f736e6574;

// The destination or source of a copy with a tensor map; of plain bytes it is 16.
constexpr uint32_t tensor_alignment = 128;

const Map& map_of(const void* words, uint32_t rank, Site site)
{
    const Map& map = *static_cast<const Map*>(words);
    if (reinterpret_cast<uint64_t>(words) % 64 != 0) fail(site, "a tensor map that is not aligned to 64 bytes");
    if (map.magic != magic) fail(site, "a tensor map that was not made for the emulator");
    if (rank != 0 && map.rank != rank)
        fail(site, "names %u coordinates of a tensor map of rank %u", rank, map.rank);
    return map;
}

Box box_of(const Map& map, const int* at)
{
    Box box{{}, map.element, map.swizzle};
    uint32_t count = 1;
    for (uint32_t d = 0; d < map.rank; d++) box.bytes *= map.box[d];
    for (uint32_t d = 1; d < map.rank; d++) count *= map.box[d];
    int64_t first = std::max<int64_t>(at[0], 0);
    int64_t end = std::min<int64_t>(int64_t(at[0]) + map.box[0], map.sizes[0]);
    for (uint32_t r = 0; r < count; r++) {
        uint64_t address = map.base;
        bool inside = first < end;
        for (uint32_t d = 1, rest = r; d < map.rank; rest /= map.box[d], d++) {
            int64_t i = int64_t(at[d]) + rest % map.box[d];
            inside = inside && i >= 0 && i < int64_t(map.sizes[d]);
            address += uint64_t(i) * map.strides[d - 1];
        }
        if (!inside) continue;
        box.rows.push_back({reinterpret_cast<uint8_t*>(address + uint64_t(first) * map.element),
                            r * map.box[0] * map.element + uint32_t(first - at[0]) * map.element,
                            uint32_t(end - first) * map.element});
    }
    return box;
}

Box plain_box(void* global, uint32_t bytes, Site site)
{
    if (bytes == 0 || bytes % chunk != 0)
        fail(site, "copies %u bytes at once: must be a multiple of %u", bytes, chunk);
    return {{{static_cast<uint8_t*>(global), 0, bytes}}, bytes, 0};
}

// Moves between the box in order and how it lies in shared memory from byte `offset` on.
template <class Move>
void for_chunks(const Box& box, uint32_t offset, Move move)
{
    for (uint32_t at = 0; at < box.bytes; at += chunk) {
        uint32_t address = shared_origin + offset + at;
        move(at, (address ^ (address >> 7 & box.swizzle) << 4) - shared_origin);
    }
}

std::vector<uint8_t> gather(const Box& box)
{
    std::vector<uint8_t> data(box.bytes, 0);
    for (const Box::Row& row : box.rows) memcpy(data.data() + row.offset, row.global, row.bytes);
    return data;
}

Range& row_range(const char* verb, const Box::Row& row, uint32_t alignment, Site site)
{
    return *find_range(verb, row.global, reinterpret_cast<uint64_t>(row.global), row.bytes, alignment, site);
}

// Offset of an address that a bulk copy names, in `block`.
uint32_t bulk_offset(const char* verb, const Block& block, uint32_t address, uint32_t bytes, uint32_t alignment,
                     Site site)
{
    uint32_t offset = address - shared_origin;
    if (uint64_t(offset) + bytes > block.shared_bytes || address % alignment != 0)
        fail_shared_bounds(verb, block, address, bytes, alignment, site);
    return offset;
}

// A copy of the box into shared memory of `block`, counted by an mbarrier there, is under way.
void send(Block& block, uint32_t offset, uint32_t mbarrier, const std::shared_ptr<const Box>& box,
          const std::shared_ptr<const std::vector<uint8_t>>& snapshot, Site site)
{
    if (block.ended)
        fail(site, "copies to shared memory of block rank %u of its cluster, which has ended", block.rank);
    Mbarrier& counter = mbarrier_at(block, mbarrier, "counts bytes at", site);
    if (!counter.published) {
        fail(site, "counts bytes at the mbarrier at byte %u, which no fence_mbarrier_init or fence_proxy_async "
                   "of the thread that initialised it has shown to the asynchronous proxy",
             counter.offset);
    }
    note_visit(block, site);
    claim_region(block, offset, box->bytes, site);
    memset(block.shared.data() + offset, 0xff, box->bytes);
    block.launch->loads.push_back(
        std::make_unique<BulkLoad>(BulkLoad{current, &counter, offset, box, snapshot, site}));
}

// Lands those of the newest copies, all of one snapshot, that arrive at once.
void land_early(Launch& launch, const std::shared_ptr<const std::vector<uint8_t>>& snapshot)
{
    CopyPolicy policy = launch.arguments.policy;
    if (policy == CopyPolicy::at_wait) return;
    for (size_t i = launch.loads.size(); i-- > 0;) {
        if (launch.loads[i]->snapshot != snapshot) break;
        if (policy == CopyPolicy::at_issue || launch.next_random() % 2) land_a_copy(launch, i);
    }
}

void issue_load(uint32_t destination, Box whole, uint32_t alignment, uint32_t mbarrier, uint32_t blocks, Site site)
{
    Block& own = *current->block;
    Cluster& cluster = *own.cluster;
    uint32_t offset = bulk_offset("copies to", own, destination, whole.bytes, alignment, site);
    for (const Box::Row& row : whole.rows) {
        Range& range = row_range("copies from", row, alignment == chunk ? chunk : 1, site);
        if (range.writers) note_global_read(range, reinterpret_cast<uint64_t>(row.global), row.bytes, site);
    }
    auto box = std::make_shared<const Box>(std::move(whole));
    auto snapshot = std::make_shared<const std::vector<uint8_t>>(gather(*box));
    if (blocks == 0 || blocks >> cluster.blocks.size() != 0)
        fail(site, "copies to the blocks %#x of a cluster of %zu", blocks, cluster.blocks.size());
    for (Block* block : cluster.blocks) {
        if (blocks >> block->rank & 1) send(*block, offset, mbarrier - shared_origin, box, snapshot, site);
    }
    land_early(*own.launch, snapshot);
}

} // namespace

void land_a_copy(Launch& launch, size_t which)
{
    std::unique_ptr<BulkLoad> load = std::move(launch.loads[which]);
    launch.loads.erase(launch.loads.begin() + long(which));
    const Box& box = *load->box;
    Mbarrier& mbarrier = *load->mbarrier;
    Block& block = *mbarrier.block;
    if (gather(box) != *load->snapshot)
        report(*load->thread, load->site, "the source of this asynchronous copy was overwritten before it ended");
    for_chunks(box, load->offset, [&](uint32_t at, uint32_t to) {
        memcpy(block.shared.data() + to, load->snapshot->data() + at, chunk);
    });
    mbarrier.landed.push_back({load->offset, box.bytes, launch.place(load->site)});
    mbarrier.bytes -= box.bytes;
    settle(mbarrier);
}

void tensor_load(uint32_t destination, const void* words, const int* at, uint32_t rank, uint32_t mbarrier,
                 uint32_t blocks, Site site)
{
    const Map& map = map_of(words, rank, site);
    issue_load(destination, box_of(map, at), tensor_alignment, mbarrier, blocks ? blocks : 1u << current->block->rank,
               site);
}

void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier, Site site)
{
    issue_load(destination, plain_box(const_cast<void*>(source), bytes, site), chunk, mbarrier,
               1u << current->block->rank, site);
}

void peer_copy(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t mbarrier, Site site)
{
    Block& own = *current->block;
    uint32_t from = bulk_offset("copies from", own, source, bytes, chunk, site);
    // The box lies in shared memory here; what the copy is to find there is compared when it lands.
    Box whole = plain_box(own.shared.data() + from, bytes, site);
    examine_asynchronous_read(own, from, bytes, current->warp->clock, true, site);
    Block& block = block_of(destination, "copies to", site);
    if (&block_of(mbarrier, "counts bytes at an mbarrier in", site) != &block)
        fail(site, "copies to block rank %u of its cluster and counts the bytes in another block", block.rank);
    uint32_t offset = bulk_offset("copies to", block, destination, bytes, chunk, site);
    auto box = std::make_shared<const Box>(std::move(whole));
    auto snapshot = std::make_shared<const std::vector<uint8_t>>(gather(*box));
    send(block, offset, mbarrier - shared_origin, box, snapshot, site);
    land_early(*own.launch, snapshot);
}

void tensor_prefetch(const void* words, Site site)
{
    map_of(words, 0, site);
}

namespace {

// Writes what a store has read to global memory.
void write_out(BulkStore& store)
{
    if (store.written) return;
    store.written = true;
    for (const Box::Row& row : store.box.rows) {
        const uint8_t* from = store.data.data() + row.offset;
        switch (store.kind) {
        case BulkKind::store: memcpy(row.global, from, row.bytes); break;
        case BulkKind::add_f32:
            for (uint32_t i = 0; i < row.bytes; i += 4) {
                float sum, x;
                memcpy(&sum, row.global + i, 4);
                memcpy(&x, from + i, 4);
                sum += x;
                memcpy(row.global + i, &sum, 4);
            }
            break;
        case BulkKind::add_bf16:
            for (uint32_t i = 0; i < row.bytes; i += 2) {
                bf16 sum, x;
                memcpy(&sum, row.global + i, 2);
                memcpy(&x, from + i, 2);
                sum = to_bf16(to_float(sum) + to_float(x));
                memcpy(row.global + i, &sum, 2);
            }
        }
    }
    current->block->launch->changes++;
}

void issue_store(uint32_t source, Box box, uint32_t alignment, BulkKind kind, Site site)
{
    Thread& thread = *current;
    Block& block = *thread.block;
    Launch& launch = *block.launch;
    uint32_t offset = bulk_offset("copies from", block, source, box.bytes, alignment, site);
    examine_asynchronous_read(block, offset, box.bytes, thread.warp->clock, true, site);
    std::vector<uint8_t> data(box.bytes);
    for_chunks(box, offset, [&](uint32_t at, uint32_t from) {
        memcpy(data.data() + at, block.shared.data() + from, chunk);
        begin_reading(block, from / chunk);
    });
    for (const Box::Row& row : box.rows) {
        Range& range = row_range("copies to", row, alignment == chunk ? chunk : 1, site);
        // Blocks may add to the same place.
        const void* value = kind == BulkKind::store ? data.data() + row.offset : row.global;
        note_global_write(range, reinterpret_cast<uint64_t>(row.global), row.bytes, value, site);
    }
    auto store = new BulkStore{kind, thread.store_groups + 1, offset, std::move(box), std::move(data)};
    store->site = site;
    thread.stores.push_back(store);
    CopyPolicy policy = launch.arguments.policy;
    bool early = policy == CopyPolicy::at_issue || (policy == CopyPolicy::random && launch.next_random() % 2);
    if (early) write_out(*store);
}

} // namespace

void tensor_store(uint32_t source, const void* words, const int* at, uint32_t rank, bool add, Site site)
{
    const Map& map = map_of(words, rank, site);
    BulkKind kind = !add ? BulkKind::store : map.element == 4 ? BulkKind::add_f32 : BulkKind::add_bf16;
    issue_store(source, box_of(map, at), tensor_alignment, kind, site);
}

void bulk_store(void* destination, uint32_t source, uint32_t bytes, bool add, Site site)
{
    issue_store(source, plain_box(destination, bytes, site), chunk, add ? BulkKind::add_f32 : BulkKind::store, site);
}

void bulk_commit()
{
    current->store_groups++;
}

void bulk_wait(uint32_t pending_groups, bool read_only)
{
    Thread& thread = *current;
    Block& block = *thread.block;
    uint32_t newest = thread.store_groups > pending_groups ? thread.store_groups - pending_groups : 0;
    size_t kept = 0;
    for (BulkStore* store : thread.stores) {
        bool done = store->group <= newest;
        if (done && store->reading) {
            store->reading = false;
            for_chunks(store->box, store->offset, [&](uint32_t, uint32_t at) { block.reading[at / chunk]--; });
            if (block.launch_races()) {
                uint32_t* readers = block.reader_row(thread.warp->id) + store->offset / granule;
                std::fill_n(readers, store->box.bytes / granule, thread.warp->epoch << owner_bits | thread.lane);
            }
        }
        if (done && !read_only) {
            write_out(*store);
            delete store;
        } else {
            thread.stores[kept++] = store;
        }
    }
    thread.stores.resize(kept);
}

} // namespace emulator
