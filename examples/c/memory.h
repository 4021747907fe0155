// Kernels on GPU 0 and its memory, by the CUDA driver where there is one; else on the emulator and memory of the host.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trencadis.h"

static int (*allocate)(uint64_t *address, size_t bytes);
static int (*copy_in)(uint64_t to, const void *from, size_t bytes);
static int (*copy_out)(void *to, uint64_t from, size_t bytes);

// Ends the program where `status` is not 0.
static void check(trencadis_status status)
{
    if (status == TRENCADIS_STATUS_OK) return;
    char text[1000];
    trencadis_last_error(text, sizeof text);
    fprintf(stderr, "%s\n", text);
    exit(1);
}

// GPU 0 becomes the device of this thread; 0 where there is none.
static int use_gpu(void)
{
    int (*init)(unsigned), (*device)(int *, int), (*retain)(void **, int), (*make_current)(void *);
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *context;
    if (!driver) return 0;
    *(void **)&init = dlsym(driver, "cuInit");
    *(void **)&device = dlsym(driver, "cuDeviceGet");
    *(void **)&retain = dlsym(driver, "cuDevicePrimaryCtxRetain");
    *(void **)&make_current = dlsym(driver, "cuCtxSetCurrent");
    *(void **)&allocate = dlsym(driver, "cuMemAlloc_v2");
    *(void **)&copy_in = dlsym(driver, "cuMemcpyHtoD_v2");
    *(void **)&copy_out = dlsym(driver, "cuMemcpyDtoH_v2");
    int number;
    return !init(0) && !device(&number, 0) && !retain(&context, number) && !make_current(context);
}

static trencadis_kernels *open_kernels(void)
{
    trencadis_kernels *kernels;
    int gpu = use_gpu();
    check(gpu ? trencadis_open_current(&kernels) : trencadis_open_emulator(90, &kernels));
    if (!gpu) allocate = NULL;
    return kernels;
}

// Device memory with a copy of `from`, or zeros where it is null; never freed.
static void *on_device(const void *from, size_t bytes)
{
    void *memory = aligned_alloc(256, (bytes + 256) / 256 * 256);
    uint64_t address = (uintptr_t)memory;
    if (!memory || (allocate && allocate(&address, bytes + 1))) exit(1);
    memset(memory, 0, bytes);
    if (from) memcpy(memory, from, bytes);
    if (allocate && copy_in(address, memory, bytes)) exit(1);
    return (void *)(uintptr_t)address;
}

// Waits for the kernels and copies their results to the host.
static void to_host(void *to, const void *from, size_t bytes)
{
    if (!allocate)
        memcpy(to, from, bytes);
    else if (copy_out(to, (uintptr_t)from, bytes))
        exit(1);
}
