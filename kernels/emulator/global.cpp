// Global memory: bounds, and blocks of a launch that get in each other's way.
#include "asynchronous.h"

#include <algorithm>
#include <iterator>
#include <stdlib.h>

namespace emulator {

namespace {

template <class R>
R* containing(R* ranges, size_t count, uint64_t address, bool with_end)
{
    R* after = std::upper_bound(ranges, ranges + count, address,
                                [](uint64_t at, const R& range) { return at < range.low; });
    if (after == ranges) return nullptr;
    R* range = after - 1;
    return address < range->high || (with_end && address == range->high) ? range : nullptr;
}

} // namespace

Range* find_range(const char* verb, const void* base, uint64_t address, uint32_t bytes, uint32_t alignment,
                  Site site)
{
    Launch& launch = *current->block->launch;
    const LaunchArguments& arguments = launch.arguments;
    if (!is_behind(*current)) {
        fail(site, "%s %u bytes of global memory before dependency_wait: the launch before this one may still run",
             verb, bytes);
    }
    if (!base) fail(site, "%s %u bytes through a null pointer", verb, bytes);
    uint64_t begin = reinterpret_cast<uint64_t>(base);
    Range* range = nullptr;
    for (Range* recent : launch.recent) {
        if (recent && begin >= recent->low && begin < recent->high) range = recent;
    }
    if (!range) {
        range = containing(arguments.ranges, arguments.range_count, begin, true);
        launch.recent[launch.next_recent++ % std::size(launch.recent)] = range;
    }
    if (!range) range = containing(arguments.ranges, arguments.range_count, address, false);
    if (!range) {
        const FreedRange* freed = nullptr;
        for (size_t i = 0; i < arguments.freed_count; i++) {
            const FreedRange& candidate = arguments.freed[i];
            if (address >= candidate.low && address < candidate.high) freed = &candidate;
        }
        if (freed) {
            fail(site, "%s %u bytes in global memory that was freed, at byte %llu of an allocation of %llu", verb,
                 bytes, (unsigned long long)(address - freed->low),
                 (unsigned long long)(freed->high - freed->low));
        }
        fail(site, "%s %u bytes at address 0x%llx, which lies in no allocation of global memory", verb, bytes,
             (unsigned long long)address);
    }
    if (address < range->low || address + bytes > range->high) {
        fail(site, "%s %u bytes at byte %lld of an allocation of %llu bytes of global memory", verb, bytes,
             (long long)(address - range->low), (unsigned long long)(range->high - range->low));
    }
    if (address % alignment != 0) {
        fail(site, "%s %u bytes at address 0x%llx of global memory, which is not aligned to %u", verb, bytes,
             (unsigned long long)address, alignment);
    }
    return range;
}

namespace {

// Blocks whose writes block `number` may count on: those that it learned of through an atomic or a coherent
// load, and those that they had learned of.
std::vector<bool>& known_to(Launch& launch, uint32_t number)
{
    std::vector<bool>& known = launch.known[number];
    const Index& grid = launch.arguments.grid;
    if (known.empty()) {
        known.resize(size_t(grid.x) * grid.y * grid.z + 1);
        known[number] = true;
    }
    return known;
}

void learn(std::vector<bool>& known, const std::vector<bool>& news)
{
    if (known.size() < news.size()) known.resize(news.size());
    for (size_t i = 0; i < news.size(); i++) known[i] = known[i] || news[i];
}

bool is_known(const Launch& launch, uint32_t number, uint32_t writer)
{
    auto known = launch.known.find(number);
    return known != launch.known.end() && known->second[writer];
}

} // namespace

void note_global_write(Range& range, uint64_t address, uint32_t bytes, const void* value, Site site)
{
    Launch& launch = *current->block->launch;
    launch.changes++;
    if (!launch.arguments.global_races || bytes < granule) return;
    if (!range.writers) {
        range.writers = static_cast<uint32_t*>(calloc((range.high - range.low) / granule + 1, sizeof(uint32_t)));
        if (!range.writers) return;
    }
    uint32_t* writers = range.writers + (address - range.low) / granule;
    uint32_t own = current->block->number;
    for (uint32_t i = 0; i < bytes / granule; i++) {
        const char* old = reinterpret_cast<const char*>(address) + i * granule;
        if (writers[i] != 0 && writers[i] != own && !is_known(launch, own, writers[i])
            && memcmp(old, static_cast<const char*>(value) + i * granule, granule) != 0) {
            fail(site, "race: writes byte %llu of an allocation of global memory, where block %u of this launch "
                       "wrote something else",
                 (unsigned long long)(address - range.low + i * granule), writers[i] - 1);
        }
        writers[i] = own;
    }
}

void note_global_read(const Range& range, uint64_t address, uint32_t bytes, Site site)
{
    const uint32_t* writers = range.writers + (address - range.low) / granule;
    uint32_t own = current->block->number;
    for (uint32_t i = 0; i < bytes / granule; i++) {
        if (writers[i] == 0 || writers[i] == own) continue;
        if (is_known(*current->block->launch, own, writers[i])) continue;
        fail(site, "race: reads byte %llu of an allocation of global memory, which block %u of this launch wrote, "
                   "perhaps from a stale cache: load_coherent is for that",
             (unsigned long long)(address - range.low + i * granule), writers[i] - 1);
    }
}

void note_coherent_read(const Range& range, uint64_t address)
{
    uint32_t writer = range.writers[(address - range.low) / granule];
    uint32_t own = current->block->number;
    if (writer == 0 || writer == own) return;
    Launch& launch = *current->block->launch;
    if (is_known(launch, own, writer)) return;
    learn(known_to(launch, own), known_to(launch, writer));
}

void tell_of_global(const Block& from, const Block& to)
{
    Launch& launch = *from.launch;
    if (!launch.arguments.global_races || &from == &to) return;
    learn(known_to(launch, to.number), known_to(launch, from.number));
}

int add_to_global(int* counter, int x, Site site)
{
    global_range<sizeof(int)>(nullptr, "adds to", counter, counter, alignof(int), site);
    Thread& thread = *current;
    Launch& launch = *thread.block->launch;
    if (x == 0) {
        if (thread.polled == counter) give_way(site);
        thread.polled = counter;
    } else {
        launch.changes++;
    }
    if (launch.arguments.global_races) {
        std::vector<bool>& known = known_to(launch, thread.block->number);
        std::vector<bool>& passed_on = launch.passed_on[counter];
        learn(known, passed_on);
        learn(passed_on, known);
    }
    int old = *counter;
    *counter = int(uint32_t(old) + uint32_t(x));
    return old;
}

} // namespace emulator
