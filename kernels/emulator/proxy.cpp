// The asynchronous proxy: what copies and matrix instructions that read or write shared memory by themselves must
// wait for, and what must wait for them.
#include "asynchronous.h"

#include <stdio.h>

namespace emulator {

namespace {

// Whether a write may be seen by the asynchronous proxy without asking further: nobody made it, that proxy itself
// made it, or somebody who knew of it has fenced.
bool is_visible(const Block& block, uint32_t word, const Clock& clock)
{
    uint32_t epoch = word >> owner_bits, party = party_of(word);
    return epoch <= block.start || party >= block.cluster->warp_count || epoch <= clock.fenced[party];
}

// Tests that the writes to 16 bytes are visible to the asynchronous proxy.
void examine_fences(const char* verb, const Block& block, uint32_t offset, const Clock& clock, Site site)
{
    if (!block.launch_races()) return;
    const Cluster& cluster = *block.cluster;
    for (uint32_t g = offset / granule; g < (offset + chunk) / granule; g++) {
        if (is_visible(block, block.writers[g], clock)) continue;
        uint32_t epoch = block.writers[g] >> owner_bits, owner = block.writers[g] & owner_mask;
        uint32_t threads = cluster.launch->arguments.threads;
        const Thread& writer = cluster.blocks[owner / threads]->threads[owner % threads];
        // The writer's own fence, if it is known to be over.
        auto fence = std::lower_bound(writer.fences.begin(), writer.fences.end(), epoch);
        if (fence != writer.fences.end() && (owner == current->owner || *fence < clock.known(owner))) continue;
        Site place = block.launch->site_of(block.places[g]);
        fail(site, "%s byte %u of shared memory by the asynchronous proxy, which %s wrote (%s:%u) with no "
                   "fence_proxy_async in between",
             verb, g * granule, Owner(cluster, owner).text, place.file, place.line);
    }
}

} // namespace

void proxy_fence()
{
    Thread& thread = *current;
    Warp& warp = *thread.warp;
    Block& block = *thread.block;
    mbarrier_publish();
    if (!block.launch_races()) return;
    uint32_t parties = block.cluster->parties;
    for (uint32_t u = 0; u < parties; u++) warp.clock.fenced[u] = std::max(warp.clock.fenced[u], warp.clock.seen[u]);
    thread.fences.push_back(warp.epoch);
    block.tick(warp);
}

void claim_region(Block& block, uint32_t offset, uint32_t bytes, Site site)
{
    const Thread& thread = *current;
    const Clock& clock = thread.warp->clock;
    uint32_t first = offset / granule, count = bytes / granule;
    uint32_t* writers = block.writers.data() + first;
    for (uint32_t g = 0; g < count; g += chunk / granule) {
        uint32_t word = writers[g];
        bool same = true;
        for (uint32_t i = 1; i < chunk / granule; i++) same = same && writers[g + i] == word;
        bool suspect = !same || (word >> owner_bits) > clock.seen[party_of(word)]
            || (!block.reading.empty() && block.reading[(offset + g * granule) / chunk] != 0);
        if (suspect) examine_write(block, offset + g * granule, chunk, nullptr, site);
        if (!same || !is_visible(block, word, clock))
            examine_fences("writes", block, offset + g * granule, clock, site);
    }
    if (block.launch_races()) {
        bool suspect = block.read_by_peers;
        for (uint32_t r = 0; r < block.rows; r++) {
            const uint32_t* readers = block.reader_row(r) + first;
            uint32_t newest = 0;
            for (uint32_t g = 0; g < count; g++) newest = std::max(newest, readers[g]);
            suspect |= (newest >> owner_bits) > clock.seen[block.row_party[r]];
        }
        if (suspect) examine_write(block, offset, bytes, nullptr, site);
        std::fill_n(block.places.begin() + first, count, block.launch->place(site));
    }
    std::fill_n(writers, count, pending << owner_bits | thread.owner);
}


void examine_asynchronous_read(const Block& block, uint32_t offset, uint32_t bytes, const Clock& clock, bool alone,
                               Site site)
{
    for (uint32_t at = offset; at < offset + bytes; at += chunk) {
        const uint32_t* writers = block.writers.data() + at / granule;
        uint32_t word = writers[0], epoch = word >> owner_bits;
        bool same = true;
        for (uint32_t i = 1; i < chunk / granule; i++) same = same && writers[i] == word;
        bool ordered = epoch > block.start && epoch <= clock.seen[party_of(word)];
        if (same && ordered && is_visible(block, word, clock)) continue;
        for (uint32_t i = 0; i < chunk / granule; i++) {
            uint32_t owner = writers[i] & owner_mask;
            epoch = writers[i] >> owner_bits;
            if (epoch > block.start && (epoch <= clock.known(owner) || (alone && owner == current->owner))) continue;
            // Says what is wrong, as for a plain read; the other warps of a warpgroup may know less than this one.
            examine_read(block, at + i * granule, granule, !alone, site);
            fail(site, "race: reads byte %u of shared memory, which %s wrote with no barrier of the whole warpgroup "
                       "in between",
                 at + i * granule, Owner(*block.cluster, owner).text);
        }
        examine_fences("reads", block, at, clock, site);
    }
}

void begin_reading(Block& block, uint32_t chunk_number)
{
    if (block.reading.empty()) block.reading.assign(block.shared_bytes / chunk + 1, 0);
    block.reading[chunk_number]++;
}

void fail_reading(const Block& block, uint32_t offset, Site site)
{
    for (const auto& group : block.warpgroups) {
        if (!group) continue;
        for (const WgmmaRead& read : group->reads) {
            if (std::find(read.chunks.begin(), read.chunks.end(), offset / chunk) == read.chunks.end()) continue;
            fail(site, "writes byte %u of shared memory while a wgmma (%s:%u) reads it: wgmma_wait first", offset,
                 read.site.file, read.site.line);
        }
    }
    for (const Thread& thread : block.threads) {
        for (const BulkStore* store : thread.stores) {
            if (!store->reading || offset < store->offset || offset >= store->offset + store->box.bytes) continue;
            fail(site, "writes byte %u of shared memory while a copy of thread %u out of it (%s:%u) reads it: "
                       "bulk_wait_read first",
                 offset, thread.id, store->site.file, store->site.line);
        }
    }
    fail(site, "writes byte %u of shared memory while an asynchronous operation reads it", offset);
}

} // namespace emulator
