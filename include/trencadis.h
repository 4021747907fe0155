/*
 * Kernels of Vision Transformers on images of any shape, as functions of C. Made from src/capi by
 *
 *     TRENCADIS_WRITE_HEADER=1 cargo test --features emulator,capi --test capi_header
 *
 * and explained in docs/c-api.md.
 */

#ifndef TRENCADIS_H
#define TRENCADIS_H

#include <stddef.h>
#include <stdint.h>

// Version of this interface. Within one version nothing that works stops working: functions, numbers and fields keep
// their meaning, structs grow at their end alone, and a new field that is 0 means what was there before. A program
// that was compiled with an older header of the same version runs with a newer library as it is.
#define TRENCADIS_ABI_VERSION 1

// What a function returns: 0, or why it did nothing. `trencadis_last_error` has the sentence.
typedef enum {
    // Done, or queued.
    TRENCADIS_STATUS_OK = 0,
    // An argument is not as its documentation says.
    TRENCADIS_STATUS_INVALID_ARGUMENT = 1,
    // What was asked for makes sense, but neither this library nor this device has a kernel for it.
    TRENCADIS_STATUS_UNSUPPORTED = 2,
    // No driver, no GPU, no current context, or no kernels for it.
    TRENCADIS_STATUS_NO_DEVICE = 3,
    // The device refuses a launch, or has failed.
    TRENCADIS_STATUS_DEVICE_FAILURE = 4,
    // A mistake in the library; nothing is known about what was written.
    TRENCADIS_STATUS_PANIC = 5,
} trencadis_status;

// Elements of activations: `dtype` of an operation.
typedef enum {
    // bfloat16.
    TRENCADIS_DTYPE_BF16 = 0,
    // IEEE 754 binary16. Of attention alone.
    TRENCADIS_DTYPE_F16 = 1,
    // IEEE 754 binary32. Of the query of attention pooling alone.
    TRENCADIS_DTYPE_F32 = 2,
} trencadis_dtype;

// Gaussian error linear unit.
typedef enum {
    // None.
    TRENCADIS_GELU_NONE = 0,
    // Exact.
    TRENCADIS_GELU_ERF = 1,
    // By the hyperbolic tangent.
    TRENCADIS_GELU_TANH = 2,
} trencadis_gelu;

// What becomes of a product.
typedef enum {
    // v = a b + bias; pre = v; v = gelu(v); out = residual + `keep[row]` * `gamma[column]` * v; steps without an operand are
    // left out.
    TRENCADIS_GEMM_EPILOGUE_STORE = 0,
    // out = (a b) * gelu'(pre), and its column sums.
    TRENCADIS_GEMM_EPILOGUE_GELU_GRAD = 1,
    // out = a b in f32, or out += a b.
    TRENCADIS_GEMM_EPILOGUE_SUM = 2,
} trencadis_gemm_epilogue;

// How the operands of a product lie.
typedef enum {
    // a[m, k] b[n, k]^T: a linear layer forward.
    TRENCADIS_GEMM_LAYOUT_NT = 0,
    // a[m, k] b[k, n]: gradient of its input.
    TRENCADIS_GEMM_LAYOUT_NN = 1,
    // a[k, m]^T b[k, n]: gradient of its weight.
    TRENCADIS_GEMM_LAYOUT_TN = 2,
} trencadis_gemm_layout;

// Which norm.
typedef enum {
    // Centred, divided by the standard deviation.
    TRENCADIS_NORM_KIND_LAYER_NORM = 0,
    // Divided by the root mean square.
    TRENCADIS_NORM_KIND_RMS = 1,
} trencadis_norm_kind;

// Normalisation of queries and keys over the columns of a head: `norm` of an operation.
typedef enum {
    // None; gains and biases are ignored.
    TRENCADIS_QK_NORM_NONE = 0,
    // Root mean square.
    TRENCADIS_QK_NORM_RMS = 1,
    // LayerNorm.
    TRENCADIS_QK_NORM_LAYER_NORM = 2,
} trencadis_qk_norm;

// Pairs of columns that a rotary embedding rotates: `rope_kind` of an operation.
typedef enum {
    // None.
    TRENCADIS_ROPE_NONE = 0,
    // Columns 2 c and 2 c + 1.
    TRENCADIS_ROPE_INTERLEAVED = 1,
    // Columns c and c + head_dim / 2.
    TRENCADIS_ROPE_HALVES = 2,
} trencadis_rope;

// Open kernels of a device. A pointer to it is a number and no address: one that is closed, or never was open, is
// refused. It may be used from any number of threads at once.
typedef struct trencadis_kernels trencadis_kernels;

// Attention of packed images, each of which attends to itself: images lie one after another in the rows of q, k and v,
// and `cu_seqlens` says where each begins. `softmax(scale * norm(q) norm(k)^T) v` for each head.
//
// Head h of row t begins at element `t * stride + h * head_dim`, so q, k and v may be parts of one tensor. A stride of 0
// means that rows follow one another; others are multiples of 8. Addresses are those of device memory and multiples of 16
// bytes, which stay valid until the kernels have run. Rows of no image are written as zeros. What a
// function does not need may be null.
typedef struct {
    // sizeof(trencadis_attention).
    uint64_t size;
    // Rows of q, k, v and out, those of no image at the end included.
    uint64_t tokens;
    // Images that `cu_seqlens` has room for; unused ones are empty.
    uint64_t slots;
    // Most rows that an image has, which saves launches and workspace where it is small; 0: `tokens`. A longer image is
    // refused as a bad `cu_seqlens` is.
    uint64_t longest;
    // Heads of q and out.
    uint64_t heads;
    // Heads of k and v, a divisor of `heads`, each for `heads / kv_heads` neighbouring heads of q; 0: `heads`.
    uint64_t kv_heads;
    // Columns of a head, a multiple of 8 to 128.
    uint64_t head_dim;
    // Factor on the scores; 0: 1 / sqrt(head_dim).
    double scale;
    // Added to the variance by the norm of q and k.
    double eps;
    // Elements of q, k, v, out and their gradients: a trencadis_dtype.
    uint32_t dtype;
    // Normalisation of q and k: a trencadis_qk_norm.
    uint32_t norm;
    // 1: gains and biases are [heads, head_dim], those of k [kv_heads, head_dim]; 0: `[head_dim]`.
    uint32_t gain_per_head;
    // How rows are rotated by `rope`: a trencadis_rope.
    uint32_t rope_kind;
    // Queries, [tokens, heads * head_dim].
    const void *q;
    // Keys, [tokens, kv_heads * head_dim].
    const void *k;
    // Values, likewise.
    const void *v;
    // Elements from row to row of q.
    uint64_t q_stride;
    // Elements from row to row of k.
    uint64_t k_stride;
    // Elements from row to row of v.
    uint64_t v_stride;
    // Gain of the norm of q; null is 1.
    const float *q_gain;
    // Bias of the norm of q; null is 0.
    const float *q_bias;
    // Gain of the norm of k; null is 1.
    const float *k_gain;
    // Bias of the norm of k; null is 0.
    const float *k_bias;
    // Cosine and sine by which pairs of columns of q and k are rotated after the norm, [tokens, head_dim / 2, 2]; null:
    // none are.
    const float *rope;
    // Starts of the images, ascending from 0, and the end of the last one, [slots + 1].
    const int32_t *cu_seqlens;
    // The same in memory of the host, checked before the schedule is launched; may be null.
    const int32_t *cu_seqlens_host;
    // Work lists of the forward pass, of `forward_schedule_words` numbers, zeros before they are first made. The last
    // number is where the device tells that it refuses `cu_seqlens`, see trencadis_attention_fault; results are then
    // zeros.
    int32_t *forward_schedule;
    // Work lists of the backward pass, of `backward_schedule_words` numbers; likewise.
    int32_t *backward_schedule;
    // Workspace of either pass.
    void *workspace;
    // Its bytes.
    uint64_t workspace_bytes;
    // Result, [tokens, heads * head_dim]; apart from the operands.
    void *out;
    // Elements from row to row of out.
    uint64_t out_stride;
    // Natural logarithm of the sum of the exponentials of the scaled scores, [tokens, heads].
    float *lse;
    // Means of the rows of q, [tokens, heads], written by the forward pass where all four of these are given.
    float *q_mean;
    // Reciprocal standard deviations of the rows of q, [tokens, heads].
    float *q_rstd;
    // Means of the rows of k, [tokens, kv_heads].
    float *k_mean;
    // Reciprocal standard deviations of the rows of k, [tokens, kv_heads].
    float *k_rstd;
    // Gradient of out, of its shape.
    const void *dout;
    // Elements from row to row of dout.
    uint64_t dout_stride;
    // Gradient of q, of its shape; apart from the operands, as dk and dv are.
    void *dq;
    // Gradient of k.
    void *dk;
    // Gradient of v.
    void *dv;
    // Elements from row to row of dq.
    uint64_t dq_stride;
    // Elements from row to row of dk.
    uint64_t dk_stride;
    // Elements from row to row of dv.
    uint64_t dv_stride;
    // Gradient of `q_gain`; null: not wanted, here and below.
    float *dq_gain;
    // Gradient of `q_bias`.
    float *dq_bias;
    // Gradient of `k_gain`.
    float *dk_gain;
    // Gradient of `k_bias`.
    float *dk_bias;
    // One number: where it is not 0, gradients of gains and biases are added to. Null: they are written.
    const int32_t *accumulate;
} trencadis_attention;

// What a caller allocates for attention, before any pass.
typedef struct {
    // sizeof(trencadis_attention_sizes).
    uint64_t size;
    // Numbers of 4 bytes.
    uint64_t forward_schedule_words;
    // Numbers of 4 bytes.
    uint64_t backward_schedule_words;
    // Bytes of workspace of the forward pass; may be 0.
    uint64_t forward_workspace_bytes;
    // Bytes of workspace of the backward pass, with gradients of gains and biases.
    uint64_t backward_workspace_bytes;
} trencadis_attention_sizes;

// A product of two matrices and what becomes of it. Matrices are row-major, with strides in elements that are multiples
// of 8 (4 where they are f32), 0 where rows follow one another; vectors are f32. Addresses are those of device memory and
// multiples of 16 bytes, which stay valid until the kernels have run.
typedef struct {
    // sizeof(trencadis_gemm).
    uint64_t size;
    // Rows of the result; a multiple of 8 where the layout is TN.
    uint64_t m;
    // Columns of the result, a multiple of 8.
    uint64_t n;
    // Extent that is summed over; a multiple of 8 where the layout is not TN.
    uint64_t k;
    // How a and b lie: a trencadis_gemm_layout.
    uint32_t layout;
    // What becomes of the product: a trencadis_gemm_epilogue.
    uint32_t epilogue;
    // Which GELU: a trencadis_gelu.
    uint32_t gelu;
    // Elements of all matrices but `out` of a sum: a trencadis_dtype, TRENCADIS_DTYPE_BF16.
    uint32_t dtype;
    // First operand.
    const void *a;
    // Elements from row to row of a.
    uint64_t a_stride;
    // Second operand.
    const void *b;
    // Elements from row to row of b.
    uint64_t b_stride;
    // Starts of packed images and the end of the last one, [slots + 1]: rows of a from that end on (TN: of both operands)
    // are not read, and the result's are zeros (NT and NN). Null: all rows are used.
    const int32_t *cu_seqlens;
    // Images that `cu_seqlens` has room for.
    uint64_t slots;
    // Result, [m, n]; f32 where the epilogue is a sum.
    void *out;
    // Elements from row to row of out.
    uint64_t out_stride;
    // STORE: `[n]`, or null.
    const float *bias;
    // STORE: result before GELU, [m, n], written; may be null. GELU_GRAD: what GELU was taken of, [m, n], read.
    void *pre;
    // Elements from row to row of pre.
    uint64_t pre_stride;
    // STORE: what is added, [m, n]; may be `out`, or null.
    const void *residual;
    // Elements from row to row of residual.
    uint64_t residual_stride;
    // STORE: factor of each column before the residual is added (LayerScale), `[n]`, or null.
    const float *gamma;
    // STORE: factor of each row before the residual is added (drop path), `[m]`, or null.
    const float *keep;
    // GELU_GRAD: column sums of the result, `[n]`, or null.
    float *bias_grad;
    // One number: where it is not 0, `bias_grad`, or `out` of a sum, is added to. Null: it is written.
    const int32_t *accumulate;
    // Workspace; may be null where none is needed.
    void *workspace;
    // Its bytes.
    uint64_t workspace_bytes;
} trencadis_gemm;

// What a device is.
typedef struct {
    // sizeof(trencadis_device_info), set by the caller.
    uint64_t size;
    // Device memory in bytes.
    uint64_t memory_bytes;
    // Shared memory that a block can have, in bytes.
    uint64_t shared_bytes_per_block;
    // Compute capability, such as 90 for 9.0.
    uint32_t compute_capability;
    // Streaming multiprocessors.
    uint32_t multiprocessors;
    // 1 where the kernels of Hopper are used, 0 where those of every GPU are.
    uint32_t hopper;
    // 1 where it is the emulator.
    uint32_t emulated;
    // Its name in UTF-8, cut where it is too long, with a 0 behind it.
    char name[64];
} trencadis_device_info;

// LayerNorm or RMSNorm of rows, `y = gain * (x - mean) / sqrt(variance + eps) + bias`. Strides are in elements and multiples
// of 8, 0 where rows follow one another. Addresses are those of device memory and multiples of 16 bytes, which stay valid
// until the kernels have run.
typedef struct {
    // sizeof(trencadis_norm).
    uint64_t size;
    // Rows.
    uint64_t tokens;
    // Columns, a multiple of 8 to 8192.
    uint64_t width;
    // Which norm: a trencadis_norm_kind.
    uint32_t kind;
    // Elements of x, y and their gradients: a trencadis_dtype, TRENCADIS_DTYPE_BF16.
    uint32_t dtype;
    // Added to the variance.
    double eps;
    // [tokens, width].
    const void *x;
    // Elements from row to row of x.
    uint64_t x_stride;
    // `[width]`; null is 1.
    const float *gain;
    // `[width]`; null is 0.
    const float *bias;
    // Starts of packed images and the end of the last one, [slots + 1]: rows from that end on are not read, and zeros are
    // written. Null: all rows are used.
    const int32_t *cu_seqlens;
    // Images that `cu_seqlens` has room for.
    uint64_t slots;
    // Result of the forward pass, [tokens, width].
    void *y;
    // Elements from row to row of y.
    uint64_t y_stride;
    // Mean (0 for RMSNorm) and reciprocal standard deviation of each row, [tokens, 2]: written by the forward pass, read by
    // the backward pass.
    float *stats;
    // Gradient of y, [tokens, width].
    const void *dy;
    // Elements from row to row of dy.
    uint64_t dy_stride;
    // What else is added to the gradient of x, such as that of a residual connection around the norm, [tokens, width]; may
    // be null.
    const void *dresidual;
    // Elements from row to row of dresidual.
    uint64_t dresidual_stride;
    // Gradient of x, [tokens, width]; may be `dy` or `dresidual`.
    void *dx;
    // Elements from row to row of dx.
    uint64_t dx_stride;
    // Gradient of `gain`, `[width]`; null: not wanted.
    float *dgain;
    // Gradient of `bias`, `[width]`; null: not wanted.
    float *dbias;
    // One number: where it is not 0, `dgain` and `dbias` are added to. Null: they are written.
    const int32_t *accumulate;
    // Workspace of the backward pass.
    void *workspace;
    // Its bytes.
    uint64_t workspace_bytes;
} trencadis_norm;

// Attention pooling of packed images: the same few queries ask the tokens of each image, so that an image becomes one
// vector for each of them. Head h of row t begins at element `t * stride + h * head_dim`. Strides are in elements and
// multiples of 8, 0 where rows follow one another. Addresses are those of device memory and multiples of 16 bytes, which
// stay valid until the kernels have run.
typedef struct {
    // sizeof(trencadis_pool).
    uint64_t size;
    // Rows of k and v, those of no image at the end included.
    uint64_t tokens;
    // Images that `cu_seqlens` has room for; unused ones are empty.
    uint64_t slots;
    // Tokens at the beginning of every image that are left out.
    uint64_t skip;
    // Queries, 1 to 8.
    uint64_t queries;
    // Heads, 1 to 4096.
    uint64_t heads;
    // Columns of a head, a multiple of 8 to 256.
    uint64_t head_dim;
    // Factor on the scores; 0: 1 / sqrt(head_dim).
    double scale;
    // Added to the variance by the norm of queries and keys.
    double eps;
    // Elements of k, v, out and their gradients: a trencadis_dtype, TRENCADIS_DTYPE_BF16.
    uint32_t dtype;
    // Elements of q and dq: TRENCADIS_DTYPE_BF16 or TRENCADIS_DTYPE_F32.
    uint32_t query_dtype;
    // Normalisation of queries and keys: a trencadis_qk_norm.
    uint32_t norm;
    // 1: gains and biases are [heads, head_dim]; 0: `[head_dim]`.
    uint32_t gain_per_head;
    // [queries, heads * head_dim].
    const void *q;
    // [tokens, heads * head_dim].
    const void *k;
    // [tokens, heads * head_dim].
    const void *v;
    // Elements from row to row of k.
    uint64_t k_stride;
    // Elements from row to row of v.
    uint64_t v_stride;
    // Gain of the norm of q; null is 1.
    const float *q_gain;
    // Bias of the norm of q; null is 0.
    const float *q_bias;
    // Gain of the norm of k; null is 1.
    const float *k_gain;
    // Bias of the norm of k; null is 0.
    const float *k_bias;
    // Starts of the images, ascending from 0, and the end of the last one, [slots + 1].
    const int32_t *cu_seqlens;
    // The same in memory of the host, checked before a launch; may be null.
    const int32_t *cu_seqlens_host;
    // One number, 0 before, where the device tells that it refuses `cu_seqlens`, see trencadis_pool_fault; results then
    // mean nothing. May be null.
    int32_t *fault;
    // Result, [slots, queries, heads * head_dim].
    void *out;
    // Natural logarithm of the sum of the exponentials of the scaled scores, [slots, queries, heads].
    float *lse;
    // Workspace of either pass.
    void *workspace;
    // Its bytes.
    uint64_t workspace_bytes;
    // Gradient of out, of its shape.
    const void *dout;
    // Gradient of k, of its shape.
    void *dk;
    // Gradient of v, of its shape.
    void *dv;
    // Elements from row to row of dk.
    uint64_t dk_stride;
    // Elements from row to row of dv.
    uint64_t dv_stride;
    // Gradient of q, of its shape; null: not wanted, here and below.
    void *dq;
    // Gradient of `q_gain`.
    float *dq_gain;
    // Gradient of `q_bias`.
    float *dq_bias;
    // Gradient of `k_gain`.
    float *dk_gain;
    // Gradient of `k_bias`.
    float *dk_bias;
    // One number: where it is not 0, gradients in f32 are added to. Null: they are written.
    const int32_t *accumulate;
} trencadis_pool;

// What a caller allocates for attention pooling.
typedef struct {
    // sizeof(trencadis_pool_sizes).
    uint64_t size;
    // Bytes of workspace of the forward pass.
    uint64_t forward_workspace_bytes;
    // Bytes of workspace of the backward pass.
    uint64_t backward_workspace_bytes;
} trencadis_pool_sizes;

// Images cut into windows, each of which is a segment of attention (Qwen2.5-VL): the order in which the token rows of a
// window follow one another, and the `cu_seqlens` of the windows. Memory of the host; no device takes part.
typedef struct {
    // sizeof(trencadis_windows).
    uint64_t size;
    // Images.
    uint64_t images;
    // Rows and columns of patches of each image, [images, 2].
    const uint32_t *grids;
    // Side of a window in patches, a multiple of `merge`. Windows at the right and lower edges are smaller.
    uint64_t window;
    // Side of the units that are merged later, and whose patches stay together, in patches; 1: there are none.
    uint64_t merge;
    // Written, `[rows]`: row i of the new order is row `order[i]` of the old one, where patches of an image follow row by row;
    // null asks for the sizes below alone, as it does for the two below.
    int32_t *order;
    // Written, `[rows]`: row i of the old order is row `inverse[i]` of the new one.
    int32_t *inverse;
    // Written, [segments + 1]: starts of the windows in the new order, and the end of the last one.
    int32_t *cu_seqlens;
    // Rows that `order` and `inverse` have room for; becomes those that there are.
    uint64_t rows;
    // Windows that `cu_seqlens` has room for; becomes those that there are.
    uint64_t segments;
    // Becomes the rows of the largest window.
    uint64_t longest;
} trencadis_windows;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The interface that the library has: compare it with `TRENCADIS_ABI_VERSION` of the header.
uint32_t trencadis_abi_version(void);

// Version of the library, such as "0.1.0"; never freed.
const char *trencadis_version(void);

// Tells what to allocate: it reads the numbers of `attention` and none of its addresses.
//
// Both structs have their `size` set.
trencadis_status trencadis_attention_plan(const trencadis_kernels *kernels,
                                          const trencadis_attention *attention,
                                          trencadis_attention_sizes *sizes);

// Queues the making of the work lists whose addresses are given, from `cu_seqlens`: once for each batch, before all
// layers. Passes over them take the same `cu_seqlens`, `tokens`, `slots`, `longest`, `head_dim` and `dtype`.
//
// Addresses are as their fields say until the kernels have run.
trencadis_status trencadis_attention_schedule(const trencadis_kernels *kernels,
                                              void *stream,
                                              const trencadis_attention *attention);

// Queues the forward pass, over `forward_schedule`: writes `out`, `lse` and the statistics.
//
// Addresses are as their fields say until the kernels have run; the work lists are made, or queued before on the stream.
trencadis_status trencadis_attention_forward(const trencadis_kernels *kernels,
                                             void *stream,
                                             const trencadis_attention *attention);

// Queues the backward pass, over `backward_schedule`: writes `dq`, `dk`, `dv` and the gradients of gains and biases from
// `dout` and what the forward pass took and wrote.
//
// As for `trencadis_attention_forward`.
trencadis_status trencadis_attention_backward(const trencadis_kernels *kernels,
                                              void *stream,
                                              const trencadis_attention *attention);

// What the last number of a schedule says, once it has been copied to the host: 0 is fine, others are an invalid argument with a
// sentence.
trencadis_status trencadis_attention_fault(int32_t fault);

// Tells how much workspace a product needs. It follows no address; which of them are null counts.
//
// `gemm` is a struct whose `size` is set, `workspace_bytes` an address to write to.
trencadis_status trencadis_gemm_plan(const trencadis_kernels *kernels,
                                     const trencadis_gemm *gemm,
                                     uint64_t *workspace_bytes);

// Queues a product.
//
// Addresses are as their fields say until the kernels have run.
trencadis_status trencadis_gemm_launch(const trencadis_kernels *kernels,
                                       void *stream,
                                       const trencadis_gemm *gemm);

// Opens the kernels for the CUDA context that is current on this thread: launches go to the caller's streams and
// memory. Code is loaded when a kernel is first launched. Close them before the context is destroyed.
//
// `kernels` is where the handle is written; null where there is none.
trencadis_status trencadis_open_current(trencadis_kernels **kernels);

// Opens the kernels on an emulated GPU of this compute capability, such as 90 for Hopper; 0 is 90. They run on the
// calling thread, on memory of the host, on the stream null, and are done when a function returns. For tests: it is
// slow, and unsupported unless the library was built with it.
//
// As for `trencadis_open_current`.
trencadis_status trencadis_open_emulator(uint32_t compute_capability,
                                         trencadis_kernels **kernels);

// Loads the code of every kernel for this device, which the first launch of a kernel otherwise does: not while the
// stream is being captured, where CUDA's default mode forbids it. It takes time and device memory, and once is enough.
trencadis_status trencadis_preload(const trencadis_kernels *kernels);

// Closes kernels. What another thread is queuing with them is queued; what is queued runs on. Closing twice, or closing
// null, is refused and harms nothing.
trencadis_status trencadis_close(trencadis_kernels *kernels);

// Tells what the device of open kernels is.
//
// `info` is a struct whose `size` is set.
trencadis_status trencadis_device(const trencadis_kernels *kernels, trencadis_device_info *info);

// Tells how much workspace the backward pass needs; the forward pass needs none.
//
// `norm` is a struct whose `size` is set, `workspace_bytes` an address to write to.
trencadis_status trencadis_norm_plan(const trencadis_kernels *kernels,
                                     const trencadis_norm *norm,
                                     uint64_t *workspace_bytes);

// Queues the forward pass: writes `y` and `stats`.
//
// Addresses are as their fields say until the kernels have run.
trencadis_status trencadis_norm_forward(const trencadis_kernels *kernels,
                                        void *stream,
                                        const trencadis_norm *norm);

// Queues the backward pass: writes `dx`, `dgain` and `dbias` from `dy`, `x` and `stats`.
//
// As for `trencadis_norm_forward`.
trencadis_status trencadis_norm_backward(const trencadis_kernels *kernels,
                                         void *stream,
                                         const trencadis_norm *norm);

// Tells what to allocate: it reads the numbers of `pool` and none of its addresses.
//
// Both structs have their `size` set.
trencadis_status trencadis_pool_plan(const trencadis_kernels *kernels,
                                     const trencadis_pool *pool,
                                     trencadis_pool_sizes *sizes);

// Queues the forward pass: writes `out` and `lse`.
//
// Addresses are as their fields say until the kernels have run.
trencadis_status trencadis_pool_forward(const trencadis_kernels *kernels,
                                        void *stream,
                                        const trencadis_pool *pool);

// Queues the backward pass: writes `dk`, `dv`, `dq` and the gradients of gains and biases from `dout` and what the
// forward pass took and wrote.
//
// As for `trencadis_pool_forward`.
trencadis_status trencadis_pool_backward(const trencadis_kernels *kernels,
                                         void *stream,
                                         const trencadis_pool *pool);

// What the number at `fault` says, once it has been copied to the host: 0 is fine, others are an invalid argument with a
// sentence.
trencadis_status trencadis_pool_fault(int32_t number);

// Copies why the last function on this thread failed that did, as UTF-8, and returns its length in bytes without the
// 0 behind it. `text` has room for `capacity` bytes; what does not fit with a 0 behind it is left out. Null asks for
// the length alone.
//
// `text` is null or has room for `capacity` bytes.
size_t trencadis_last_error(char *text,
                            size_t capacity);

// Makes the order of windows. Where arrays are null or too small nothing but the sizes is written, and too small is an
// invalid argument.
//
// `windows` is a struct whose `size` is set, its arrays null or as large as its numbers say.
trencadis_status trencadis_windows_make(trencadis_windows *windows);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TRENCADIS_H */
