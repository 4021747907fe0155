// An NCCL for ranks that are threads of one process, over the memory of fake_libcuda.c, which is that of the host. An
// operation is done when its call returns, for the ranks wait for one another in it; sums are taken in their order. On
// a stream that is captured nothing is done. What would matter to NCCL goes to the file FAKE_NCCL_LOG, one line a call.
// FAKE_NCCL_VERSION is its version. FAKE_NCCL_FAIL names what fails: id, init, or an operation of rank 1;
// FAKE_NCCL_BREAK is the operation of rank 1 that never ends, for the network breaks.
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, CUDA_ERROR = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };
enum { UINT8 = 1, FLOAT32 = 7, BFLOAT16 = 9 };
enum { MOST = 16 };

typedef int Result;
typedef struct { char internal[128]; } UniqueId;
// As in fake_libcuda.c.
typedef struct { int number; int capturing; } Stream;
typedef struct { int sends; int peer; const void* from; void* to; size_t bytes; } Message;

typedef struct {
    char id[128];
    int size, joined, arrived, generation;
    const void* data[MOST];
    const Message* messages[MOST];
    int message_count[MOST];
} Ring;

typedef struct { Ring* ring; int rank; int aborted; int broken; } Comm;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Ring* rings[64];
static int ring_count, id_count;
static _Thread_local int depth, queued;
static _Thread_local Message queue[MOST];
static _Thread_local Comm* queue_comm;
static _Thread_local Stream* queue_stream;

static Result note(const char* format, ...)
{
    const char* path = getenv("FAKE_NCCL_LOG");
    FILE* file = path ? fopen(path, "a") : NULL;
    if (file) {
        char line[256];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(line, sizeof line, format, arguments);
        va_end(arguments);
        fprintf(file, "%s\n", line);
        fclose(file);
    }
    return SUCCESS;
}

static int asked(const char* variable, const char* what)
{
    const char* value = getenv(variable);
    return value && !strcmp(value, what);
}

static void wait_a_little(void)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 10000000;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_cond_timedwait(&changed, &lock, &until);
}

// Returns when all ranks have come, or this one was aborted.
static Result meet(Comm* comm)
{
    Ring* ring = comm->ring;
    pthread_mutex_lock(&lock);
    int generation = ring->generation;
    if (++ring->arrived == ring->size) {
        ring->arrived = 0;
        ring->generation++;
        pthread_cond_broadcast(&changed);
    }
    while (generation == ring->generation && !comm->aborted) wait_a_little();
    Result result = generation == ring->generation ? REMOTE_ERROR : SUCCESS;
    pthread_mutex_unlock(&lock);
    return result;
}

Result ncclGetVersion(int* version)
{
    const char* value = getenv("FAKE_NCCL_VERSION");
    *version = value ? atoi(value) : 23007;
    return SUCCESS;
}

const char* ncclGetErrorString(Result result)
{
    switch (result) {
    case SUCCESS: return "no error";
    case CUDA_ERROR: return "unhandled cuda error";
    case SYSTEM_ERROR: return "unhandled system error";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    default: return "invalid";
    }
}

const char* ncclGetLastError(Comm* comm)
{
    (void)comm;
    return getenv("FAKE_NCCL_FAIL") ? "the last words\n" : "";
}

Result ncclGetUniqueId(UniqueId* id)
{
    if (asked("FAKE_NCCL_FAIL", "id")) return SYSTEM_ERROR;
    memset(id, 0x5a, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "ring %d", ++id_count);
    return note("id of %s", id->internal);
}

typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, cluster, least_blocks, most_blocks;
    const char* network;
    int share_split;
} Config;

Result ncclCommInitRankConfig(Comm** comm, int size, UniqueId id, int rank, Config* config)
{
    if (config->size != sizeof *config || config->magic != 0xcafebeef || config->version != 21800) return INVALID_ARGUMENT;
    if (config->most_blocks != INT_MIN && config->most_blocks < 1) return INVALID_ARGUMENT;
    if (asked("FAKE_NCCL_FAIL", "init") && rank == 1) return SYSTEM_ERROR;
    if (size < 1 || size > MOST || rank < 0 || rank >= size || id.internal[127] != 0x5a) return INVALID_ARGUMENT;
    note("rank %d of %d joins %s", rank, size, id.internal);
    pthread_mutex_lock(&lock);
    Ring* ring = NULL;
    for (int i = 0; i < ring_count; i++) {
        if (!memcmp(rings[i]->id, id.internal, sizeof id.internal)) ring = rings[i];
    }
    if (!ring) {
        ring = rings[ring_count++] = calloc(1, sizeof(Ring));
        memcpy(ring->id, id.internal, sizeof id.internal);
        ring->size = size;
    }
    ring->joined++;
    pthread_cond_broadcast(&changed);
    while (ring->joined < size) wait_a_little();
    pthread_mutex_unlock(&lock);
    *comm = calloc(1, sizeof(Comm));
    (*comm)->ring = ring;
    (*comm)->rank = rank;
    return SUCCESS;
}

Result ncclCommDestroy(Comm* comm)
{
    return comm ? note("rank %d leaves %s", comm->rank, comm->ring->id) : INVALID_ARGUMENT;
}

Result ncclCommAbort(Comm* comm)
{
    pthread_mutex_lock(&lock);
    comm->aborted = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return note("rank %d aborts %s", comm->rank, comm->ring->id);
}

Result ncclCommGetAsyncError(Comm* comm, Result* error)
{
    pthread_mutex_lock(&lock);
    *error = comm->broken ? REMOTE_ERROR : SUCCESS;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

// Whether the operation is done, and with which result.
static int begins(Comm* comm, const char* name, size_t count, int type, Stream* stream, Result* result)
{
    *result = SUCCESS;
    if (!comm || !stream || (type != UINT8 && type != FLOAT32 && type != BFLOAT16)) {
        *result = INVALID_ARGUMENT;
        return 1;
    }
    if (comm->rank == 1 && asked("FAKE_NCCL_FAIL", name)) {
        *result = CUDA_ERROR;
        return 1;
    }
    note("rank %d %s %s: %zu of type %d on %d", comm->rank, stream->capturing ? "captures" : "does", name, count, type,
         stream->number);
    if (stream->capturing) return 1;
    if (comm->rank == 1 && asked("FAKE_NCCL_BREAK", name)) {
        pthread_mutex_lock(&lock);
        comm->broken = 1;
        while (!comm->aborted) wait_a_little();
        pthread_mutex_unlock(&lock);
        *result = REMOTE_ERROR;
        return 1;
    }
    return 0;
}

static float from_bf16(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}

static uint16_t to_bf16(float x)
{
    uint32_t word;
    memcpy(&word, &x, 4);
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// The sum over all ranks of `count` elements from element `first`, rounded at every rank on the way.
static void* sum(const Ring* ring, size_t first, size_t count, int type)
{
    size_t width = type == FLOAT32 ? 4 : 2;
    void* total = malloc(count * width + 1);
    memcpy(total, (const char*)ring->data[0] + first * width, count * width);
    for (int rank = 1; rank < ring->size; rank++) {
        for (size_t i = 0; i < count; i++) {
            if (type == FLOAT32) {
                ((float*)total)[i] += ((const float*)ring->data[rank])[first + i];
            } else {
                uint16_t* x = (uint16_t*)total + i;
                *x = to_bf16(from_bf16(*x) + from_bf16(((const uint16_t*)ring->data[rank])[first + i]));
            }
        }
    }
    return total;
}

Result ncclAllGather(const void* send, void* receive, size_t count, int type, Comm* comm, Stream* stream)
{
    Result result;
    if (begins(comm, "all-gather", count, type, stream, &result)) return result;
    if (type != UINT8) return INVALID_ARGUMENT;
    comm->ring->data[comm->rank] = send;
    if ((result = meet(comm))) return result;
    for (int rank = 0; rank < comm->ring->size; rank++) {
        memmove((char*)receive + (size_t)rank * count, comm->ring->data[rank], count);
    }
    return meet(comm);
}

// `count` elements from that of number `first`, of the sum over all ranks.
static Result reduce(const void* send, void* receive, size_t first, size_t count, int type, int op, Comm* comm)
{
    if (op != 0 || type == UINT8) return INVALID_ARGUMENT;
    comm->ring->data[comm->rank] = send;
    Result result = meet(comm);
    if (result) return result;
    void* total = sum(comm->ring, first, count, type);
    result = meet(comm);
    if (!result) memcpy(receive, total, count * (type == FLOAT32 ? 4 : 2));
    free(total);
    return result;
}

Result ncclReduceScatter(const void* send, void* receive, size_t count, int type, int op, Comm* comm, Stream* stream)
{
    Result result;
    if (begins(comm, "reduce-scatter", count, type, stream, &result)) return result;
    return reduce(send, receive, (size_t)comm->rank * count, count, type, op, comm);
}

Result ncclAllReduce(const void* send, void* receive, size_t count, int type, int op, Comm* comm, Stream* stream)
{
    Result result;
    if (begins(comm, "all-reduce", count, type, stream, &result)) return result;
    return reduce(send, receive, 0, count, type, op, comm);
}

Result ncclBroadcast(const void* send, void* receive, size_t count, int type, int root, Comm* comm, Stream* stream)
{
    Result result;
    if (begins(comm, "broadcast", count, type, stream, &result)) return result;
    if (type != UINT8 || root < 0 || root >= comm->ring->size) return INVALID_ARGUMENT;
    comm->ring->data[comm->rank] = send;
    if ((result = meet(comm))) return result;
    memmove(receive, comm->ring->data[root], count);
    return meet(comm);
}

Result ncclGroupStart(void)
{
    if (depth++ == 0) queued = 0;
    return SUCCESS;
}

static Result put(Message message, Comm* comm, Stream* stream)
{
    // Outside of a group a rank would wait for a receiver that sends itself.
    if (!depth) return INVALID_USAGE;
    if (!comm || message.peer < 0 || message.peer >= comm->ring->size || queued == MOST) return INVALID_ARGUMENT;
    queue_comm = comm;
    queue_stream = stream;
    queue[queued++] = message;
    return SUCCESS;
}

Result ncclSend(const void* from, size_t count, int type, int peer, Comm* comm, Stream* stream)
{
    if (type != UINT8) return INVALID_ARGUMENT;
    return put((Message){1, peer, from, NULL, count}, comm, stream);
}

Result ncclRecv(void* to, size_t count, int type, int peer, Comm* comm, Stream* stream)
{
    if (type != UINT8) return INVALID_ARGUMENT;
    return put((Message){0, peer, NULL, to, count}, comm, stream);
}

Result ncclGroupEnd(void)
{
    if (depth-- != 1 || !queued) return depth < 0 ? INVALID_USAGE : SUCCESS;
    Comm* comm = queue_comm;
    Result result;
    if (begins(comm, "exchange", (size_t)queued, UINT8, queue_stream, &result)) return result;
    Ring* ring = comm->ring;
    ring->messages[comm->rank] = queue;
    ring->message_count[comm->rank] = queued;
    if ((result = meet(comm))) return result;
    // The n-th that is taken from a rank is the n-th that it sends here.
    int taken[MOST] = {0};
    for (int i = 0; i < queued; i++) {
        if (queue[i].sends) continue;
        int peer = queue[i].peer, nth = taken[peer]++;
        const Message* sent = NULL;
        for (int j = 0; j < ring->message_count[peer]; j++) {
            const Message* one = ring->messages[peer] + j;
            if (one->sends && one->peer == comm->rank && nth-- == 0) sent = one;
        }
        if (!sent || sent->bytes != queue[i].bytes) {
            result = INVALID_USAGE;
            continue;
        }
        memcpy(queue[i].to, sent->from, sent->bytes);
    }
    Result ended = meet(comm);
    return result ? result : ended;
}
