// Packed attention of two images, beside plain loops:
//
//     tools/c-library --emulator /opt/trencadis
//     cc examples/c/attention.c $(PKG_CONFIG_PATH=/opt/trencadis/lib/pkgconfig pkg-config --cflags --libs trencadis) -ldl -lm
#define _DEFAULT_SOURCE
#include <math.h>

#include "memory.h"

enum { IMAGES = 2, TOKENS = 16, HEADS = 2, HEAD_DIM = 64, WIDTH = HEADS * HEAD_DIM };
static const int32_t starts[IMAGES + 1] = {0, 5, 16};

static float to_float(uint16_t bf16)
{
    uint32_t bits = (uint32_t)bf16 << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Row `i` of head `head` by the definition: softmax(q k^T / sqrt(head_dim)) v within the image.
static void attend(const uint16_t *qkv, int first, int end, int i, int head, float *out)
{
    const uint16_t *q = qkv + i * 3 * WIDTH + head * HEAD_DIM;
    double sum = 0, row[HEAD_DIM] = {0};
    for (int j = first; j < end; j++) {
        const uint16_t *k = qkv + j * 3 * WIDTH + WIDTH + head * HEAD_DIM, *v = k + WIDTH;
        double score = 0;
        for (int c = 0; c < HEAD_DIM; c++) score += to_float(q[c]) * to_float(k[c]);
        double weight = exp(score / sqrt(HEAD_DIM));
        sum += weight;
        for (int c = 0; c < HEAD_DIM; c++) row[c] += weight * to_float(v[c]);
    }
    for (int c = 0; c < HEAD_DIM; c++) out[c] = (float)(row[c] / sum);
}

int main(void)
{
    static uint16_t qkv[TOKENS * 3 * WIDTH], out[TOKENS * WIDTH];
    srand(1);
    for (int i = 0; i < TOKENS * 3 * WIDTH; i++) qkv[i] = (uint16_t)(rand() % 2 << 15 | (0x3f00 + rand() % 256));
    trencadis_kernels *kernels = open_kernels();
    trencadis_attention a = {.size = sizeof a, .tokens = TOKENS, .slots = IMAGES, .heads = HEADS, .head_dim = HEAD_DIM};
    trencadis_attention_sizes sizes = {.size = sizeof sizes};
    check(trencadis_attention_plan(kernels, &a, &sizes));

    const uint16_t *device_qkv = on_device(qkv, sizeof qkv);
    a.q = device_qkv, a.k = device_qkv + WIDTH, a.v = device_qkv + 2 * WIDTH;
    a.q_stride = a.k_stride = a.v_stride = 3 * WIDTH;
    a.cu_seqlens = on_device(starts, sizeof starts);
    a.forward_schedule = on_device(NULL, 4 * sizes.forward_schedule_words);
    a.workspace = on_device(NULL, a.workspace_bytes = sizes.forward_workspace_bytes);
    a.out = on_device(NULL, sizeof out);
    a.lse = on_device(NULL, TOKENS * HEADS * sizeof(float));
    check(trencadis_attention_schedule(kernels, NULL, &a)); // Once for all layers.
    check(trencadis_attention_forward(kernels, NULL, &a));
    to_host(out, a.out, sizeof out);
    int32_t fault;
    to_host(&fault, a.forward_schedule + sizes.forward_schedule_words - 1, sizeof fault);
    check(trencadis_attention_fault(fault));

    float expected[HEAD_DIM], worst = 0;
    for (int image = 0; image < IMAGES; image++)
        for (int i = starts[image]; i < starts[image + 1]; i++)
            for (int head = 0; head < HEADS; head++) {
                attend(qkv, starts[image], starts[image + 1], i, head, expected);
                for (int c = 0; c < HEAD_DIM; c++)
                    worst = fmaxf(worst, fabsf(to_float(out[i * WIDTH + head * HEAD_DIM + c]) - expected[c]));
            }
    printf("image 0 begins with %.3f %.3f %.3f, largest difference %.4f\n", to_float(out[0]), to_float(out[1]),
           to_float(out[2]), worst);
    check(trencadis_close(kernels));
    return worst < 0.02f ? 0 : 1;
}
