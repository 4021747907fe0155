// Clusters: blocks that meet at a barrier of theirs and reach each other's shared memory; and how threads end.
#include "asynchronous.h"

namespace emulator {

namespace {

// Ends the phase of the cluster's barrier once every warp has arrived or ended.
bool everyone_arrived(const Cluster& cluster)
{
    for (const Block* block : cluster.blocks) {
        for (const Warp& warp : block->warps) {
            if (!cluster.arrived[warp.party] && warp.state.alive != 0) return false;
        }
    }
    return true;
}

// What those knew that came to the cluster's barrier.
void learn_of_cluster(Warp& warp)
{
    const Cluster& cluster = *warp.block->cluster;
    if (warp.block->launch_races()) warp.clock.join(*cluster.complete, cluster.parties);
}

} // namespace

void settle_cluster(Cluster& cluster)
{
    bool any = std::find(cluster.arrived.begin(), cluster.arrived.end(), true) != cluster.arrived.end();
    if (!any || !everyone_arrived(cluster)) return;
    cluster.launch->changes++;
    if (cluster.complete) cluster.complete->join(*cluster.gathering, cluster.parties);
    // Everyone knows what the first does once it knows what everyone does.
    for (const Block* block : cluster.blocks) tell_of_global(*block, *cluster.blocks[0]);
    for (const Block* block : cluster.blocks) tell_of_global(*cluster.blocks[0], *block);
    for (Block* block : cluster.blocks) {
        for (Warp& warp : block->warps) {
            if (!cluster.waiting[warp.party]) continue;
            cluster.waiting[warp.party] = false;
            learn_of_cluster(warp);
            end_meeting(warp);
        }
    }
    cluster.arrived.assign(cluster.warp_count, false);
}

void cluster_arrive(Site site)
{
    if (!meet(Collective::cluster_arrive, nullptr, site)) return;
    Warp& warp = *current->warp;
    Block& block = *warp.block;
    Cluster& cluster = *block.cluster;
    if (warp.at_cluster_barrier) fail(site, "arrives at the cluster's barrier twice without waiting in between");
    warp.at_cluster_barrier = true;
    if (block.launch_races()) {
        if (!cluster.gathering) {
            cluster.gathering = std::make_unique<Clock>();
            cluster.gathering->set(0, most_parties);
            cluster.complete = std::make_unique<Clock>();
            cluster.complete->set(0, most_parties);
        }
        cluster.gathering->join(warp.clock, cluster.parties);
        cluster.gathering->seen[warp.party] = warp.epoch;
    }
    block.advance(warp);
    cluster.arrived[warp.party] = true;
    part();
    settle_cluster(cluster);
}

void cluster_wait(Site site)
{
    if (!meet(Collective::cluster_wait, nullptr, site)) return;
    Warp& warp = *current->warp;
    Block& block = *warp.block;
    Cluster& cluster = *block.cluster;
    if (!warp.at_cluster_barrier) fail(site, "waits at the cluster's barrier, where it has not arrived");
    warp.at_cluster_barrier = false;
    if (cluster.arrived[warp.party]) {
        cluster.waiting[warp.party] = true;
        rest();
    } else {
        // No other phase can have ended: this warp has not arrived at it.
        learn_of_cluster(warp);
        part();
    }
}

Block& block_of(uint32_t& address, const char* verb, Site site)
{
    Block& own = *current->block;
    uint32_t rank = address >> rank_shift;
    if (rank == 0) return own;
    address &= (1u << rank_shift) - 1;
    Cluster& cluster = *own.cluster;
    if (rank > cluster.blocks.size())
        fail(site, "%s block rank %u of a cluster of %zu", verb, rank - 1, cluster.blocks.size());
    Block& block = *cluster.blocks[rank - 1];
    if (block.ended)
        fail(site, "%s shared memory of block rank %u of its cluster, which has ended", verb, rank - 1);
    return block;
}

void note_visit(Block& block, Site site)
{
    const Thread& thread = *current;
    if (&block == thread.block || !block.launch_races()) return;
    for (Block::Visit& visit : block.visits) {
        if (visit.owner != thread.owner) continue;
        visit = {thread.owner, thread.warp->epoch, site};
        return;
    }
    block.visits.push_back({thread.owner, thread.warp->epoch, site});
}

uint32_t peer_address(uint32_t address, uint32_t rank, Site site)
{
    const Cluster& cluster = *current->block->cluster;
    if (rank >= cluster.blocks.size())
        fail(site, "block rank %u of a cluster of %zu has no shared memory", rank, cluster.blocks.size());
    if (address >> rank_shift != 0) fail(site, "the address is one of the cluster already");
    return (rank + 1) << rank_shift | address;
}

namespace {

Block& peer(const char* verb, uint32_t& address, uint32_t bytes, Site site)
{
    Block& block = block_of(address, verb, site);
    uint32_t offset = address - shared_origin;
    if (uint64_t(offset) + bytes > block.shared_bytes || address % bytes != 0)
        fail_shared_bounds(verb, block, address, bytes, bytes, site);
    note_visit(block, site);
    address = offset;
    return block;
}

} // namespace

void read_peer(void* value, uint32_t address, uint32_t bytes, Site site)
{
    Block& block = peer("reads", address, bytes, site);
    block.read_by_peers |= &block != current->block;
    if (bytes == 16) {
        read_block<16>(block, value, address, false, site);
    } else {
        read_block<4>(block, value, address, false, site);
    }
}

void write_peer(const void* value, uint32_t address, uint32_t bytes, Site site)
{
    Block& block = peer("writes", address, bytes, site);
    if (bytes == 16) {
        claim_shared<16>(block, address, current->warp->epoch, value, site);
    } else {
        claim_shared<4>(block, address, current->warp->epoch, value, site);
    }
    memcpy(block.shared.data() + address, value, bytes);
    block.launch->changes++;
}

void thread_ends(Thread& thread)
{
    for (const BulkStore* store : thread.stores) {
        if (store->reading) {
            fail(store->site, "ends while this copy out of shared memory may still read it: bulk_wait_read first");
        }
    }
    bulk_wait(0, false);
}

void warp_ends(Warp& warp)
{
    Block& block = *warp.block;
    Cluster& cluster = *block.cluster;
    if (block.launch_races()) {
        if (!block.ended_clock) {
            block.ended_clock = std::make_unique<Clock>();
            block.ended_clock->set(0, most_parties);
        }
        block.ended_clock->join(warp.clock, cluster.parties);
    }
    bool last = std::all_of(block.warps.begin(), block.warps.end(),
                            [](const Warp& other) { return other.state.alive == 0; });
    if (last) {
        block.ended = true;
        for (const auto& load : block.launch->loads) {
            if (load->mbarrier->block != &block) continue;
            blamed = load->thread;
            fail(load->site, "block rank %u ends while this copy into its shared memory is under way", block.rank);
        }
        for (const auto& group : block.warpgroups) {
            if (!group || group->reads.empty()) continue;
            fail(group->reads[0].site, "ends while this wgmma is under way: wgmma_wait first");
        }
        for (const auto& mbarrier : block.mbarriers) {
            uint32_t landed = mbarrier->complete.seen[mbarrier->party];
            bool unseen = block.launch_races() && landed > block.ended_clock->seen[mbarrier->party];
            if (unseen || !mbarrier->landed.empty()) {
                fail(mbarrier->site, "ends without having waited for the copies that the mbarrier at byte %u counts",
                     mbarrier->offset);
            }
        }
        for (const Block::Visit& visit : block.visits) {
            if (visit.epoch <= block.ended_clock->known(visit.owner)) continue;
            fail(visit.site, "block rank %u may have ended before %s comes to its shared memory here: a barrier of "
                             "the cluster must come between",
                 block.rank, Owner(cluster, visit.owner).text);
        }
    }
    settle_cluster(cluster);
}

} // namespace emulator
