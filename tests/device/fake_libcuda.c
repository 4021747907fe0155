// A CUDA driver without a GPU, for the tests of the device layer: memory is host memory and zeros at first,
// everything runs at once, kernels do nothing. What would matter to a driver goes to the file FAKE_CUDA_LOG, one
// line a call; streams and events are told apart by numbers. FAKE_CUDA_VERSION, FAKE_CUDA_INIT,
// FAKE_CUDA_DEVICES, FAKE_CUDA_CAPABILITY, FAKE_CUDA_MEMORY (bytes), FAKE_CUDA_UNOWNED and FAKE_CUDA_ONE_GPU choose what it is,
// FAKE_CUDA_PTX the architecture that kernels were made for. The file FAKE_CUDA_PARAMETERS has a line `name bytes` for each kernel;
// without it, all take 24 bytes. From the launch of a graph on that FAKE_CUDA_FAIL_AFTER counts to (1: the first),
// the GPU is lost, or from the host's wait for an event on that FAKE_CUDA_FAIL_AT_WAIT counts to.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    NO_CONTEXT = 201,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
    CAPTURED = 900
};

typedef int Result;
// A stream that has waited for an event of a captured one is captured with it.
typedef struct Stream { int number; int capturing; int launches; struct Stream* origin; void* context; } Stream;
typedef struct { int number; Stream* stream; } Event;

static _Thread_local void* current;
static int captures;
static char context_of_gpu[16];
static int graph_launches, event_waits;
static int lost;
static int streams, events;
// Bytes of live allocations, and of what the memory pool has had for them: it gives nothing back.
static size_t used, reserved;

static int setting(const char* name, int otherwise)
{
    const char* value = getenv(name);
    return value ? atoi(value) : otherwise;
}

static Result note(const char* format, ...)
{
    const char* path = getenv("FAKE_CUDA_LOG");
    FILE* file = path ? fopen(path, "a") : NULL;
    if (file) {
        va_list arguments;
        va_start(arguments, format);
        vfprintf(file, format, arguments);
        va_end(arguments);
        fputc('\n', file);
        fclose(file);
    }
    return SUCCESS;
}

// Most calls need a current context.
#define IN_CONTEXT if (!current) return NO_CONTEXT
// So does everything that makes, does or waits for something, and none of it works on a lost GPU.
#define WORKING IN_CONTEXT; if (lost) return LAUNCH_FAILED

Result cuDriverGetVersion(int* version)
{
    *version = setting("FAKE_CUDA_VERSION", 13000);
    return *version == 34 ? 34 : SUCCESS;
}

Result cuInit(unsigned flags)
{
    (void)flags;
    return setting("FAKE_CUDA_INIT", SUCCESS);
}

Result cuGetErrorName(Result error, const char** name)
{
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
        : error == LAUNCH_FAILED   ? "CUDA_ERROR_LAUNCH_FAILED"
                                   : "CUDA_ERROR_FAKE";
    return SUCCESS;
}

Result cuGetErrorString(Result error, const char** text)
{
    *text = error == OUT_OF_MEMORY ? "out of memory"
        : error == LAUNCH_FAILED   ? "unspecified launch failure"
                                   : "something else";
    return SUCCESS;
}

Result cuDeviceGetCount(int* count)
{
    *count = setting("FAKE_CUDA_DEVICES", 1);
    return SUCCESS;
}

Result cuDeviceGet(int* device, int ordinal)
{
    *device = ordinal;
    return SUCCESS;
}

// All GPUs are one where FAKE_CUDA_ONE_GPU is not 0.
Result cuDeviceGetUuid_v2(unsigned char* uuid, int device)
{
    memset(uuid, setting("FAKE_CUDA_ONE_GPU", 0) ? 1 : device + 1, 16);
    return SUCCESS;
}

Result cuDeviceGetName(char* name, int length, int device)
{
    snprintf(name, (size_t)length, "Fake GPU %d", device);
    return SUCCESS;
}

static size_t total_memory(void)
{
    const char* value = getenv("FAKE_CUDA_MEMORY");
    return value ? strtoull(value, NULL, 10) : (size_t)16 << 30;
}

Result cuDeviceTotalMem_v2(size_t* bytes, int device)
{
    (void)device;
    *bytes = total_memory();
    return SUCCESS;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device)
{
    (void)device;
    int capability = setting("FAKE_CUDA_CAPABILITY", 90);
    switch (attribute) {
    case 13: *value = 1980000; break;          // clock rate
    case 16: *value = 132; break;              // multiprocessors
    case 38: *value = 50 << 20; break;         // L2 cache
    case 75: *value = capability / 10; break;  // major
    case 76: *value = capability % 10; break;  // minor
    case 81: *value = 228 << 10; break;        // shared memory of a multiprocessor
    case 97: *value = 227 << 10; break;        // of a block
    case 115: *value = 1; break;               // memory pools
    default: return INVALID;
    }
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(void** context, int device)
{
    *context = &context_of_gpu[device];
    return note("retain %d", device);
}

Result cuDevicePrimaryCtxRelease_v2(int device)
{
    return note("release %d", device);
}

Result cuCtxGetCurrent(void** context)
{
    *context = current;
    return SUCCESS;
}

Result cuCtxSetCurrent(void* context)
{
    current = context;
    return SUCCESS;
}

static _Thread_local void* pushed;

Result cuCtxPushCurrent_v2(void* context)
{
    pushed = current;
    current = context;
    return SUCCESS;
}

Result cuCtxPopCurrent_v2(void** context)
{
    *context = current;
    current = pushed;
    return SUCCESS;
}

Result cuCtxGetDevice(int* device)
{
    IN_CONTEXT;
    *device = (int)((char*)current - context_of_gpu);
    return SUCCESS;
}

Result cuCtxSynchronize(void)
{
    WORKING;
    note("host waits for everything");
    return captures ? CAPTURED : SUCCESS;
}

Result cuDeviceGetDefaultMemPool(void** pool, int device)
{
    (void)device;
    *pool = &context_of_gpu[0];
    return SUCCESS;
}

Result cuMemPoolSetAttribute(void* pool, int attribute, void* value)
{
    (void)pool;
    return attribute == 4 && *(uint64_t*)value == UINT64_MAX ? SUCCESS : INVALID;
}

Result cuMemPoolGetAttribute(void* pool, int attribute, void* value)
{
    (void)pool;
    *(uint64_t*)value = attribute == 5 ? reserved : used;
    return attribute == 5 || attribute == 7 ? SUCCESS : INVALID;
}

Result cuMemGetInfo_v2(size_t* left, size_t* total)
{
    WORKING;
    *total = total_memory();
    *left = *total - reserved;
    return SUCCESS;
}

// What is allocated, newest first.
typedef struct Range { uint64_t start; size_t bytes; void* context; struct Range* next; } Range;
static Range* ranges;
static pthread_mutex_t ranges_lock = PTHREAD_MUTEX_INITIALIZER;

static void add_range(uint64_t start, size_t bytes)
{
    Range* range = malloc(sizeof(Range));
    pthread_mutex_lock(&ranges_lock);
    *range = (Range){start, bytes, current, ranges};
    ranges = range;
    pthread_mutex_unlock(&ranges_lock);
}

static void remove_range(uint64_t start)
{
    pthread_mutex_lock(&ranges_lock);
    Range** at = &ranges;
    while (*at && (*at)->start != start) at = &(*at)->next;
    Range* range = *at;
    if (range) *at = range->next;
    pthread_mutex_unlock(&ranges_lock);
    free(range);
}

// With FAKE_CUDA_UNOWNED memory belongs to a GPU and no context.
Result cuPointerGetAttribute(void* value, int attribute, uint64_t address)
{
    IN_CONTEXT;
    pthread_mutex_lock(&ranges_lock);
    const Range* range = ranges;
    while (range && (address < range->start || address >= range->start + range->bytes)) range = range->next;
    Result result = range ? SUCCESS : INVALID;
    if (range && attribute == 1) *(void**)value = setting("FAKE_CUDA_UNOWNED", 0) ? NULL : range->context;
    else if (range && attribute == 9) *(int*)value = (int)((char*)range->context - context_of_gpu);
    else if (range && attribute == 11) *(uint64_t*)value = range->start;
    else if (range && attribute == 12) *(size_t*)value = range->bytes;
    else result = INVALID;
    pthread_mutex_unlock(&ranges_lock);
    return result;
}

Result cuMemAllocAsync(uint64_t* address, size_t bytes, Stream* stream)
{
    WORKING;
    if (!stream) return INVALID;
    if (bytes > total_memory() - used) return OUT_OF_MEMORY;
    used += bytes;
    if (reserved < used) reserved = used;
    size_t room = 256 + (bytes + 255) / 256 * 256;
    size_t* memory = aligned_alloc(256, room);
    memset(memory, 0, room);
    *memory = bytes;
    *address = (uint64_t)(uintptr_t)memory + 256;
    add_range(*address, bytes);
    return note("alloc %zu", bytes);
}

Result cuMemFreeAsync(uint64_t address, Stream* stream)
{
    WORKING;
    if (!stream) return INVALID;
    size_t* memory = (void*)(uintptr_t)(address - 256);
    size_t bytes = *memory;
    remove_range(address);
    used -= bytes;
    free(memory);
    return note("free %zu", bytes);
}

Result cuMemAlloc_v2(uint64_t* address, size_t bytes)
{
    Stream none = {0};
    return cuMemAllocAsync(address, bytes, &none);
}

Result cuMemFree_v2(uint64_t address)
{
    Stream none = {0};
    return cuMemFreeAsync(address, &none);
}

Result cuMemcpyHtoD_v2(uint64_t target, const void* source, size_t bytes)
{
    WORKING;
    memcpy((void*)(uintptr_t)target, source, bytes);
    return SUCCESS;
}

Result cuMemcpyDtoH_v2(void* target, uint64_t source, size_t bytes)
{
    WORKING;
    memcpy(target, (const void*)(uintptr_t)source, bytes);
    return SUCCESS;
}

Result cuMemHostAlloc(void** memory, size_t bytes, unsigned flags)
{
    WORKING;
    *memory = malloc(bytes);
    return note("pin %zu, flags %u", bytes, flags);
}

Result cuMemFreeHost(void* memory)
{
    IN_CONTEXT;
    free(memory);
    return note("unpin");
}

Result cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, Stream* stream)
{
    WORKING;
    if (!stream) return INVALID;
    memset((void*)(uintptr_t)address, value, bytes);
    return SUCCESS;
}

Result cuMemcpyHtoDAsync_v2(uint64_t target, const void* source, size_t bytes, Stream* stream)
{
    WORKING;
    if (!stream || stream->capturing) return INVALID;
    memcpy((void*)(uintptr_t)target, source, bytes);
    return note("copy in of %zu on %d", bytes, stream->number);
}

Result cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t bytes, Stream* stream)
{
    WORKING;
    if (!stream || stream->capturing) return INVALID;
    memcpy(target, (const void*)(uintptr_t)source, bytes);
    return note("copy out of %zu on %d", bytes, stream->number);
}

Result cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, Stream* stream)
{
    WORKING;
    if (!stream) return INVALID;
    if (!stream->capturing) memcpy((void*)(uintptr_t)target, (const void*)(uintptr_t)source, bytes);
    return note("copy of %zu on %d", bytes, stream->number);
}

Result cuStreamCreate(Stream** stream, unsigned flags)
{
    WORKING;
    *stream = calloc(1, sizeof(Stream));
    (*stream)->number = ++streams;
    (*stream)->context = current;
    return note("stream, flags %u, number %d", flags, streams);
}

Result cuStreamCreateWithPriority(Stream** stream, unsigned flags, int priority)
{
    return priority ? INVALID : cuStreamCreate(stream, flags);
}

Result cuStreamGetCtx(Stream* stream, void** context)
{
    IN_CONTEXT;
    *context = stream ? stream->context : current;
    return SUCCESS;
}

Result cuStreamDestroy_v2(Stream* stream)
{
    IN_CONTEXT;
    free(stream);
    return note("end of stream");
}

Result cuStreamSynchronize(Stream* stream)
{
    WORKING;
    note("host waits for stream %d", stream->number);
    return stream->capturing ? INVALID : SUCCESS;
}

static int captured(const Stream* stream)
{
    return stream->capturing || (stream->origin && stream->origin->capturing);
}

Result cuStreamWaitEvent(Stream* stream, Event* event, unsigned flags)
{
    WORKING;
    if (stream && event && event->stream->capturing) stream->origin = event->stream;
    return stream && event && !flags ? note("wait of %d for event %d", stream->number, event->number) : INVALID;
}

Result cuStreamWriteValue32_v2(Stream* stream, uint64_t word, unsigned value, unsigned flags)
{
    WORKING;
    if (!stream || word % 4 || flags) return INVALID;
    if (!stream->capturing) *(unsigned*)(uintptr_t)word = value;
    return note("flag on %d", stream->number);
}

// No kernel runs that would raise what is waited for.
Result cuStreamWaitValue32_v2(Stream* stream, uint64_t word, unsigned value, unsigned flags)
{
    WORKING;
    return stream && word % 4 == 0 && flags == 0 && value ? note("wait of %d for a flag", stream->number) : INVALID;
}

Result cuStreamIsCapturing(Stream* stream, int* status)
{
    IN_CONTEXT;
    *status = captured(stream);
    return SUCCESS;
}

Result cuStreamBeginCapture_v2(Stream* stream, int mode)
{
    WORKING;
    stream->capturing = 1;
    captures++;
    stream->launches = 0;
    return note("capture, mode %d", mode);
}

Result cuStreamEndCapture(Stream* stream, int** graph)
{
    IN_CONTEXT;
    if (!stream->capturing) return CAPTURED;
    stream->capturing = 0;
    captures--;
    *graph = malloc(sizeof(int));
    **graph = stream->launches;
    return note("captured %d launches", stream->launches);
}

Result cuGraphInstantiateWithFlags(int** executable, int* graph, unsigned long long flags)
{
    WORKING;
    *executable = malloc(sizeof(int));
    **executable = *graph;
    return flags ? INVALID : SUCCESS;
}

// A node for each launch.
Result cuGraphGetNodes(int* graph, void** nodes, size_t* count)
{
    WORKING;
    *count = *graph;
    return nodes ? INVALID : SUCCESS;
}

Result cuGraphLaunch(int* executable, Stream* stream)
{
    IN_CONTEXT;
    int last = setting("FAKE_CUDA_FAIL_AFTER", 0);
    if (last && ++graph_launches >= last) lost = 1;
    if (lost) return LAUNCH_FAILED;
    return stream ? note("graph of %d launches on %d", *executable, stream->number) : INVALID;
}

Result cuGraphExecDestroy(int* executable)
{
    IN_CONTEXT;
    free(executable);
    return SUCCESS;
}

Result cuGraphDestroy(int* graph)
{
    IN_CONTEXT;
    free(graph);
    return note("end of graph");
}

Result cuEventCreate(Event** event, unsigned flags)
{
    WORKING;
    *event = calloc(1, sizeof(Event));
    (*event)->number = ++events;
    return flags ? INVALID : SUCCESS;
}

Result cuEventDestroy_v2(void* event)
{
    IN_CONTEXT;
    free(event);
    return SUCCESS;
}

Result cuEventRecord(Event* event, Stream* stream)
{
    WORKING;
    if (!event || !stream) return INVALID;
    event->stream = stream;
    return note("event %d on %d", event->number, stream->number);
}

Result cuEventSynchronize(Event* event)
{
    if (++event_waits == setting("FAKE_CUDA_FAIL_AT_WAIT", 0)) lost = 1;
    WORKING;
    return event ? note("host waits for event %d", event->number) : INVALID;
}

Result cuEventElapsedTime_v2(float* milliseconds, void* start, void* end)
{
    WORKING;
    *milliseconds = 0.5f;
    return start && end ? SUCCESS : INVALID;
}

Result cuModuleLoadData(void** module, const void* image)
{
    WORKING;
    *module = strdup(image);
    return note("load %s", (const char*)image);
}

Result cuModuleUnload(void* module)
{
    IN_CONTEXT;
    note("unload %s", (const char*)module);
    free(module);
    return SUCCESS;
}

// A function is its name.
Result cuModuleGetFunction(void** function, void* module, const char* name)
{
    IN_CONTEXT;
    if (!module || strstr(name, getenv("FAKE_CUDA_MISSING") ? getenv("FAKE_CUDA_MISSING") : "\n")) return NOT_FOUND;
    *function = strdup(name);
    return SUCCESS;
}

Result cuFuncGetAttribute(int* value, int attribute, void* function)
{
    *value = attribute == 5 ? setting("FAKE_CUDA_PTX", 90) : 0;
    return function && (attribute == 1 || attribute == 5) ? SUCCESS : INVALID;
}

Result cuFuncSetAttribute(void* function, int attribute, int value)
{
    IN_CONTEXT;
    return attribute == 8 ? note("%s may have %d bytes", (char*)function, value) : INVALID;
}

static size_t parameters_of(const char* function)
{
    const char* path = getenv("FAKE_CUDA_PARAMETERS");
    FILE* file = path ? fopen(path, "r") : NULL;
    if (!file) return 24;
    char name[256];
    size_t bytes = 0;
    while (fscanf(file, "%255s %zu", name, &bytes) == 2 && strcmp(name, function)) bytes = 0;
    fclose(file);
    return bytes;
}

Result cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* bytes)
{
    if (!function || index) return INVALID;
    *offset = 0;
    *bytes = parameters_of(function);
    return *bytes ? SUCCESS : NOT_FOUND;
}

typedef struct {
    int id;
    char pad[4];
    union {
        char pad[64];
        struct { unsigned x, y, z; } cluster;
        int dependent;
    } value;
} Attribute;

typedef struct {
    unsigned grid[3], block[3], shared;
    Stream* stream;
    Attribute* attributes;
    unsigned count;
} Config;

Result cuLaunchKernelEx(const Config* config, void* function, void** params, void** extra)
{
    WORKING;
    if (extra) return INVALID;
    char more[64] = "";
    for (unsigned i = 0; i < config->count; i++) {
        const Attribute* a = &config->attributes[i];
        size_t used = strlen(more);
        if (a->id == 4)
            snprintf(more + used, sizeof more - used, " cluster %u,%u,%u", a->value.cluster.x, a->value.cluster.y,
                     a->value.cluster.z);
        else if (a->id == 6)
            snprintf(more + used, sizeof more - used, " dependent %d", a->value.dependent);
        else if (a->id == 2)
            snprintf(more + used, sizeof more - used, " resident %d", a->value.dependent);
        else
            return INVALID;
    }
    if (config->stream) config->stream->launches++;
    uint64_t first;
    memcpy(&first, params[0], 8);
    return note("launch %s grid %u,%u,%u block %u,%u,%u shared %u%s on %d, first parameter %llu", (char*)function,
                config->grid[0], config->grid[1], config->grid[2], config->block[0], config->block[1],
                config->block[2], config->shared, more, config->stream ? config->stream->number : 0,
                (unsigned long long)first);
}

Result cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                              const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave,
                              int swizzle, int promotion, int fill)
{
    if (rank == 0 || rank > 5) return INVALID;
    char text[4][80] = {"", "", "", ""};
    for (unsigned i = 0; i < rank; i++) {
        size_t used = strlen(text[0]);
        snprintf(text[0] + used, sizeof text[0] - used, " %llu", (unsigned long long)sizes[i]);
        used = strlen(text[1]);
        if (i + 1 < rank) snprintf(text[1] + used, sizeof text[1] - used, " %llu", (unsigned long long)strides[i]);
        used = strlen(text[2]);
        snprintf(text[2] + used, sizeof text[2] - used, " %u", box[i]);
        used = strlen(text[3]);
        snprintf(text[3] + used, sizeof text[3] - used, " %u", steps[i]);
    }
    memset(map, 0xab, 128);
    return note("tensor map of %d at %p: sizes%s strides%s box%s steps%s, interleave %d swizzle %d L2 %d fill %d", type,
                address, text[0], text[1], text[2], text[3], interleave, swizzle, promotion, fill);
}
