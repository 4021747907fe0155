// Checked views: the only way to memory in a kernel. On a GPU they are bare accesses; on the emulator each
// access is checked for bounds, alignment, and reads of what nobody wrote.
#pragma once

#include "launch.cuh"

#ifdef TRENCADIS_EMULATOR
#include "../emulator/view.h"
#else

// Global memory from `p` on.
template <class T>
struct Global {
    T* p;

    DEVICE explicit Global(T* p) : p(p) {}

    DEVICE T load(int64_t i) const
    {
        return p[i];
    }

    DEVICE void store(int64_t i, T x) const
    {
        p[i] = x;
    }

    // A pair of 16-bit elements from the even index `i`.
    DEVICE uint32_t load_pair(int64_t i) const
    {
        return *reinterpret_cast<const uint32_t*>(p + i);
    }

    DEVICE void store_pair(int64_t i, uint32_t x) const
    {
        *reinterpret_cast<uint32_t*>(p + i) = x;
    }

    // 16 bytes from element `i`, which is 16-byte aligned.
    DEVICE Vec16 load_16(int64_t i) const
    {
        return *reinterpret_cast<const Vec16*>(p + i);
    }

    DEVICE void store_16(int64_t i, Vec16 x) const
    {
        *reinterpret_cast<Vec16*>(p + i) = x;
    }

    // A value that another block of this launch may have written, and with it what that block wrote before it told of
    // it by an atomic: an acquire at the scope of the device. The compiler may take a loop of weaker loads for one that
    // ends, and leave it out. Elements of 4 bytes.
    DEVICE T load_coherent(int64_t i) const
    {
        static_assert(sizeof(T) == 4, "one register");
        uint32_t bits;
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
                     : "=r"(bits)
                     : "l"(__cvta_generic_to_global(p + i))
                     : "memory");
        T x;
        memcpy(&x, &bits, 4);
        return x;
    }

    // The same for what no kernel of this device has written, but a copy, an operation of a stream on memory or another
    // device: at the scope of the system.
    DEVICE T load_system(int64_t i) const
    {
        static_assert(sizeof(T) == 4, "one register");
        uint32_t bits;
        asm volatile("ld.acquire.sys.global.b32 %0, [%1];"
                     : "=r"(bits)
                     : "l"(__cvta_generic_to_global(p + i))
                     : "memory");
        T x;
        memcpy(&x, &bits, 4);
        return x;
    }

    // Address of element `i`, for asynchronous copies.
    DEVICE T* at(int64_t i) const
    {
        return p + i;
    }
};

// Shared memory from byte `address` on.
template <class T>
struct Shared {
    uint32_t address;

    DEVICE explicit Shared(uint32_t address) : address(address) {}

    DEVICE T* pointer(uint32_t bytes) const
    {
        return reinterpret_cast<T*>(__cvta_shared_to_generic(address + bytes));
    }

    DEVICE T load(uint32_t i) const
    {
        return *pointer(i * sizeof(T));
    }

    DEVICE void store(uint32_t i, T x) const
    {
        *pointer(i * sizeof(T)) = x;
    }

    DEVICE uint32_t load_pair(uint32_t i) const
    {
        return *reinterpret_cast<const uint32_t*>(pointer(i * sizeof(T)));
    }

    DEVICE void store_pair(uint32_t i, uint32_t x) const
    {
        *reinterpret_cast<uint32_t*>(pointer(i * sizeof(T))) = x;
    }

    DEVICE Vec16 load_16(uint32_t i) const
    {
        return *reinterpret_cast<const Vec16*>(pointer(i * sizeof(T)));
    }

    DEVICE void store_16(uint32_t i, Vec16 x) const
    {
        *reinterpret_cast<Vec16*>(pointer(i * sizeof(T))) = x;
    }
};

#endif
