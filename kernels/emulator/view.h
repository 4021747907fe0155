// Twin of common/view.cuh: the same views, every access checked.
#pragma once

#include "memory.h"

#include <type_traits>

// Global memory from `p` on.
template <class T>
struct Global {
    T* p;

    explicit Global(T* p) : p(p) {}

    T load(int64_t i, emulator::Site site = emulator::Site::here()) const
    {
        return read<std::remove_const_t<T>>(i, site);
    }

    void store(int64_t i, T x, emulator::Site site = emulator::Site::here()) const
    {
        write(i, x, site);
    }

    uint32_t load_pair(int64_t i, emulator::Site site = emulator::Site::here()) const
    {
        static_assert(sizeof(T) == 2, "a pair is of 16-bit elements");
        return read<uint32_t>(i, site);
    }

    void store_pair(int64_t i, uint32_t x, emulator::Site site = emulator::Site::here()) const
    {
        static_assert(sizeof(T) == 2, "a pair is of 16-bit elements");
        write(i, x, site);
    }

    Vec16 load_16(int64_t i, emulator::Site site = emulator::Site::here()) const
    {
        return read<Vec16>(i, site);
    }

    void store_16(int64_t i, Vec16 x, emulator::Site site = emulator::Site::here()) const
    {
        write(i, x, site);
    }

    // A thread that loads the same address again is spinning: the others run first.
    T load_coherent(int64_t i, emulator::Site site = emulator::Site::here()) const
    {
        const void* address = at(i);
        range = emulator::global_range<sizeof(T)>(range, "reads", p, address, sizeof(T), site);
        if (emulator::current->polled == address) emulator::give_way(site);
        emulator::current->polled = address;
        if (range->writers) emulator::note_coherent_read(*range, uint64_t(address));
        std::remove_const_t<T> x;
        memcpy(&x, address, sizeof(T));
        return x;
    }

    T load_system(int64_t i, emulator::Site site = emulator::Site::here()) const
    {
        return load_coherent(i, site);
    }

    // Not dereferenced here, so it may lie outside: a copy checks it where it reads.
    T* at(int64_t i) const
    {
        return reinterpret_cast<T*>(reinterpret_cast<uint64_t>(p) + uint64_t(i) * sizeof(T));
    }

private:
    mutable emulator::Range* range = nullptr;

    template <class V>
    V read(int64_t i, emulator::Site site) const
    {
        const void* address = at(i);
        range = emulator::global_range<sizeof(V)>(range, "reads", p, address, sizeof(V), site);
        if (range->writers) emulator::note_global_read(*range, uint64_t(address), sizeof(V), site);
        std::remove_const_t<V> x;
        memcpy(&x, address, sizeof(V));
        return x;
    }

    template <class V>
    void write(int64_t i, V x, emulator::Site site) const
    {
        void* address = at(i);
        range = emulator::global_range<sizeof(V)>(range, "writes", p, address, sizeof(V), site);
        emulator::note_global_write(*range, uint64_t(address), sizeof(V), &x, site);
        memcpy(address, &x, sizeof(V));
    }
};

// Shared memory from byte `address` on.
template <class T>
struct Shared {
    static_assert(sizeof(T) >= emulator::granule, "the emulator follows shared memory by two bytes");

    uint32_t address;

    explicit Shared(uint32_t address) : address(address) {}

    T load(uint32_t i, emulator::Site site = emulator::Site::here()) const
    {
        return read<T>(i, site);
    }

    void store(uint32_t i, T x, emulator::Site site = emulator::Site::here()) const
    {
        write(i, x, site);
    }

    uint32_t load_pair(uint32_t i, emulator::Site site = emulator::Site::here()) const
    {
        static_assert(sizeof(T) == 2, "a pair is of 16-bit elements");
        return read<uint32_t>(i, site);
    }

    void store_pair(uint32_t i, uint32_t x, emulator::Site site = emulator::Site::here()) const
    {
        static_assert(sizeof(T) == 2, "a pair is of 16-bit elements");
        write(i, x, site);
    }

    Vec16 load_16(uint32_t i, emulator::Site site = emulator::Site::here()) const
    {
        return read<Vec16>(i, site);
    }

    void store_16(uint32_t i, Vec16 x, emulator::Site site = emulator::Site::here()) const
    {
        write(i, x, site);
    }

private:
    template <class V>
    V read(uint32_t i, emulator::Site site) const
    {
        std::remove_const_t<V> x;
        emulator::read_shared<sizeof(V)>(&x, address + i * uint32_t(sizeof(T)), sizeof(V), false, site);
        return x;
    }

    template <class V>
    void write(uint32_t i, V x, emulator::Site site) const
    {
        emulator::write_shared<sizeof(V)>(address + i * uint32_t(sizeof(T)), &x, sizeof(V), site);
    }
};
