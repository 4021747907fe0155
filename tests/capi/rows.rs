//! Products, norms and pooling.

use std::ptr::null_mut;

use bytemuck::Zeroable;
use half::bf16;
use trencadis::capi::*;
use trencadis::cpu::attention::{AttentionConfig, QkAffine};
use trencadis::cpu::pool::{attention_backward, attention_forward};
use trencadis::ops::{QkNormKind, Rope};

use crate::memory::{Memory, Open, alike, done, wide};
use crate::support::numbers::random;

/// A product of these extents without operands.
pub fn product(layout: GemmLayout, epilogue: GemmEpilogue, [m, n, k]: [usize; 3]) -> Gemm {
    Gemm {
        size: size_of::<Gemm>() as u64,
        m: m as u64,
        n: n as u64,
        k: k as u64,
        layout: layout as u32,
        epilogue: epilogue as u32,
        ..Gemm::zeroed()
    }
}

fn launch(kernels: &Open, gemm: &Gemm) {
    let (mut gemm, mut bytes) = (*gemm, 0);
    // SAFETY: structs and memory that live until the kernels have run: they have.
    unsafe {
        done(trencadis_gemm_plan(kernels.0, &raw const gemm, &raw mut bytes));
        let workspace = Memory::<u8>::zeros(bytes as usize);
        (gemm.workspace, gemm.workspace_bytes) = (workspace.ptr(), bytes);
        done(trencadis_gemm_launch(kernels.0, null_mut(), &raw const gemm));
    }
}

/// `[rows, columns]` of the product of what `a(i, l)` and `b(l, j)` read.
fn multiply(
    [m, n, k]: [usize; 3],
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    (0..m * n).map(|i| (0..k).map(|l| a(i / n, l) * b(l, i % n)).sum()).collect()
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt()))
}

#[test]
fn products_and_what_becomes_of_them() {
    let kernels = Open::new(90);
    let sizes @ [m, n, k] = [40, 16, 24];
    let (x, w) = (random::<f64>(m * k, 1), random::<f64>(n * k, 2));
    let (a, b) = (Memory::<bf16>::rounded(&x), Memory::<bf16>::rounded(&w));
    let (x, w) = (wide(a.slice()), wide(b.slice()));
    let column = |seed| Memory::of(&random::<f32>(n, seed));
    let (bias, gamma, keep) = (column(3), column(4), Memory::of(&random::<f32>(m, 5)));
    let residual = Memory::<bf16>::rounded(&random(m * n, 6));
    let (out, pre) = (Memory::<bf16>::zeros(m * (n + 8)), Memory::<bf16>::zeros(m * n));
    // Rows of an image and a half.
    let (starts, live) = (Memory::of(&[0, 20, 36]), 36);

    let mut gemm = product(GemmLayout::Nt, GemmEpilogue::Store, sizes);
    (gemm.a, gemm.b, gemm.out, gemm.out_stride) = (a.ptr(), b.ptr(), out.ptr(), n as u64 + 8);
    (gemm.bias, gemm.gamma, gemm.keep) = (bias.ptr(), gamma.ptr(), keep.ptr());
    (gemm.gelu, gemm.pre, gemm.residual) = (Gelu::Erf as u32, pre.ptr(), residual.ptr());
    (gemm.cu_seqlens, gemm.slots) = (starts.ptr(), 2);
    launch(&kernels, &gemm);
    let before: Vec<f64> = (multiply(sizes, |i, l| x[i * k + l], |l, j| w[j * k + l]).iter().enumerate())
        .map(|(i, x)| x + f64::from(bias.slice()[i % n]))
        .collect();
    alike("pre", &wide(&pre.slice()[..live * n]), &before[..live * n], 1e-5, 1e-2);
    let wanted: Vec<f64> = (before.iter().enumerate().take(live * n))
        .map(|(i, &x)| {
            let factor = f64::from(gamma.slice()[i % n]) * f64::from(keep.slice()[i / n]);
            residual.slice()[i].to_f64() + factor * gelu(x)
        })
        .collect();
    let rows: Vec<f64> = out.slice().chunks(n + 8).flat_map(|row| wide(&row[..n])).collect();
    alike("out", &rows[..live * n], &wanted, 1e-5, 1e-2);
    assert!(rows[live * n..].iter().all(|&x| x == 0.0), "rows of no image");
    assert!(
        out.slice().chunks(n + 8).all(|row| row[n..].iter().all(|x| x.to_bits() == 0)),
        "foreign columns"
    );

    // dh = (dy w) * gelu'(pre), whose operands are y[m, k] and w[k, n] here.
    let (dh, column_sums) = (Memory::<bf16>::zeros(m * n), Memory::<f32>::zeros(n));
    let mut gemm = product(GemmLayout::Nn, GemmEpilogue::GeluGrad, sizes);
    (gemm.a, gemm.b, gemm.out, gemm.pre) = (a.ptr(), b.ptr(), dh.ptr(), pre.ptr());
    (gemm.gelu, gemm.bias_grad) = (Gelu::Erf as u32, column_sums.ptr());
    launch(&kernels, &gemm);
    let slope = |x: f64| (gelu(x + 1e-6) - gelu(x - 1e-6)) / 2e-6;
    let plain = multiply(sizes, |i, l| x[i * k + l], |l, j| w[l * n + j]);
    let wanted: Vec<f64> = plain.iter().zip(pre.slice()).map(|(x, pre)| x * slope(pre.to_f64())).collect();
    alike("dh", &wide(dh.slice()), &wanted, 1e-5, 1e-2);
    let sums: Vec<f64> = (0..n).map(|j| wanted.iter().skip(j).step_by(n).sum()).collect();
    alike("column sums", &wide(column_sums.slice()), &sums, 1e-5, 1e-2);

    // dw += a[k, m]^T b[k, n] in f32.
    let sizes @ [m, n, _] = [24, 16, 24];
    let (sum, flag) = (Memory::<f32>::of(&vec![1.0; m * n]), Memory::of(&[1]));
    let mut gemm = product(GemmLayout::Tn, GemmEpilogue::Sum, sizes);
    (gemm.a, gemm.b, gemm.out, gemm.accumulate) = (a.ptr(), b.ptr(), sum.ptr(), flag.ptr());
    launch(&kernels, &gemm);
    let wanted: Vec<f64> =
        multiply(sizes, |i, l| x[l * m + i], |l, j| w[l * n + j]).iter().map(|x| x + 1.0).collect();
    alike("dw", &wide(sum.slice()), &wanted, 1e-7, 1e-4);
}

/// A norm of these sizes without operands.
pub fn norm(kind: NormKind, tokens: usize, width: usize) -> Norm {
    Norm {
        size: size_of::<Norm>() as u64,
        tokens: tokens as u64,
        width: width as u64,
        kind: kind as u32,
        eps: 1e-6,
        ..Norm::zeroed()
    }
}

#[test]
fn norms_forward_and_backward() {
    let kernels = Open::new(80);
    let (tokens, live, width) = (9, 7, 48);
    let x = Memory::<bf16>::rounded(
        &random::<f64>(tokens * width, 1).iter().map(|x| x + 0.5).collect::<Vec<_>>(),
    );
    let (dy, dresidual) = (
        Memory::<bf16>::rounded(&random(tokens * width, 2)),
        Memory::<bf16>::rounded(&random(tokens * width, 3)),
    );
    let (gain, bias) = (Memory::of(&random::<f32>(width, 4)), Memory::of(&random::<f32>(width, 5)));
    let starts = Memory::of(&[0, 3, 7]);
    for kind in [NormKind::LayerNorm, NormKind::Rms] {
        let (y, dx) = (Memory::<bf16>::zeros(tokens * width), Memory::<bf16>::zeros(tokens * width));
        let stats = Memory::<f32>::zeros(2 * tokens);
        let (dgain, dbias) = (Memory::<f32>::zeros(width), Memory::<f32>::zeros(width));
        let (mut call, mut bytes) = (norm(kind, tokens, width), 0);
        (call.x, call.gain, call.bias, call.y, call.stats) =
            (x.ptr(), gain.ptr(), bias.ptr(), y.ptr(), stats.ptr());
        (call.dy, call.dresidual, call.dx) = (dy.ptr(), dresidual.ptr(), dx.ptr());
        (call.dgain, call.dbias, call.cu_seqlens, call.slots) = (dgain.ptr(), dbias.ptr(), starts.ptr(), 2);
        // SAFETY: structs and memory that live until the kernels have run: they have.
        unsafe {
            done(trencadis_norm_plan(kernels.0, &raw const call, &raw mut bytes));
            let workspace = Memory::<u8>::zeros(bytes as usize);
            (call.workspace, call.workspace_bytes) = (workspace.ptr(), bytes);
            done(trencadis_norm_forward(kernels.0, null_mut(), &raw const call));
            done(trencadis_norm_backward(kernels.0, null_mut(), &raw const call));
        }
        let mut wanted = [const { Vec::new() }; 2];
        let (mut gains, mut biases) = (vec![0.0; width], vec![0.0; width]);
        for row in 0..live {
            let of = |x: &Memory<bf16>| wide(&x.slice()[row * width..][..width]);
            let (x, dy, dresidual) = (of(&x), of(&dy), of(&dresidual));
            let mean = |f: &dyn Fn(usize) -> f64| (0..width).map(f).sum::<f64>() / width as f64;
            let centre = if kind == NormKind::Rms { 0.0 } else { mean(&|i| x[i]) };
            let rstd = 1.0 / (mean(&|i| (x[i] - centre).powi(2)) + 1e-6).sqrt();
            let (hat, gain) = (|i: usize| (x[i] - centre) * rstd, |i: usize| f64::from(gain.slice()[i]));
            let along = mean(&|i| dy[i] * gain(i) * hat(i));
            let across = if kind == NormKind::Rms { 0.0 } else { mean(&|i| dy[i] * gain(i)) };
            for i in 0..width {
                wanted[0].push(gain(i) * hat(i) + f64::from(bias.slice()[i]));
                wanted[1].push(rstd * (dy[i] * gain(i) - across - hat(i) * along) + dresidual[i]);
                gains[i] += dy[i] * hat(i);
                biases[i] += dy[i];
            }
        }
        alike("y", &wide(&y.slice()[..live * width]), &wanted[0], 1e-5, 1e-2);
        alike("dx", &wide(&dx.slice()[..live * width]), &wanted[1], 1e-5, 1e-2);
        alike("dgain", &wide(dgain.slice()), &gains, 1e-5, 1e-2);
        alike("dbias", &wide(dbias.slice()), &biases, 1e-5, 1e-2);
        assert!(
            y.slice()[live * width..].iter().chain(&dx.slice()[live * width..]).all(|x| x.to_bits() == 0)
        );
    }
}

#[test]
fn pooling_forward_and_backward() {
    let kernels = Open::new(80);
    let (starts, tokens, [heads, dim, queries]) = ([0, 5, 5, 17], 20, [2, 32, 1]);
    let (width, slots, used) = (heads * dim, 3, 17);
    let (q, kv) = (
        Memory::of(&random::<f32>(queries * width, 1)),
        Memory::<bf16>::rounded(&random(tokens * 2 * width, 2)),
    );
    let dout = Memory::<bf16>::rounded(&random(slots * queries * width, 3));
    let (out, lse) =
        (Memory::<bf16>::zeros(slots * queries * width), Memory::<f32>::zeros(slots * queries * heads));
    let (dq, dkv) = (Memory::<f32>::zeros(queries * width), Memory::<bf16>::zeros(tokens * 2 * width));
    let (cu_seqlens, fault) = (Memory::of(&starts), Memory::<i32>::zeros(1));
    let mut call = Pool {
        size: size_of::<Pool>() as u64,
        tokens: tokens as u64,
        slots: slots as u64,
        queries: queries as u64,
        heads: heads as u64,
        head_dim: dim as u64,
        query_dtype: Dtype::F32 as u32,
        ..Pool::zeroed()
    };
    (call.q, call.k, call.v) = (q.ptr(), kv.ptr(), kv.at(width).cast());
    (call.dk, call.dv, call.dq) = (dkv.ptr(), dkv.at(width).cast(), dq.ptr());
    for stride in [&mut call.k_stride, &mut call.v_stride, &mut call.dk_stride, &mut call.dv_stride] {
        *stride = 2 * width as u64;
    }
    (call.cu_seqlens, call.fault, call.out, call.lse) = (cu_seqlens.ptr(), fault.ptr(), out.ptr(), lse.ptr());
    call.dout = dout.ptr();
    let mut sizes = PoolSizes { size: size_of::<PoolSizes>() as u64, ..PoolSizes::zeroed() };
    // SAFETY: structs and memory that live until the kernels have run: they have.
    unsafe {
        done(trencadis_pool_plan(kernels.0, &raw const call, &raw mut sizes));
        let bytes = sizes.forward_workspace_bytes.max(sizes.backward_workspace_bytes);
        let workspace = Memory::<u8>::zeros(bytes as usize);
        (call.workspace, call.workspace_bytes) = (workspace.ptr(), bytes);
        done(trencadis_pool_forward(kernels.0, null_mut(), &raw const call));
        done(trencadis_pool_backward(kernels.0, null_mut(), &raw const call));
    }
    assert_eq!(trencadis_pool_fault(fault.slice()[0]), Status::Ok);
    let config = AttentionConfig {
        heads,
        kv_heads: heads,
        head_dim: dim,
        scale: 1.0 / (dim as f64).sqrt(),
        norm: QkNormKind::None,
        eps: 0.0,
        gain_per_head: false,
        rope: Rope::None,
    };
    let (q, kv) = (wide(q.slice()), wide(&kv.slice()[..used * 2 * width]));
    let (mut wanted, mut sums) = (vec![0.0; slots * queries * width], vec![0.0; slots * queries * heads]);
    attention_forward(&config, &mut wanted, &mut sums, &q, &kv, QkAffine::default(), &starts, 0);
    alike("out", &wide(out.slice()), &wanted, 1e-5, 1e-2);
    let (mut wanted_q, mut wanted_kv) = (vec![0.0; queries * width], vec![0.0; used * 2 * width]);
    let (none, grads) = (QkAffine::default(), trencadis::cpu::attention::QkAffineGrad::default());
    let dout = wide(dout.slice());
    attention_backward(
        &config,
        &mut wanted_q,
        &mut wanted_kv,
        grads,
        &dout,
        &wanted,
        &sums,
        &q,
        &kv,
        none,
        &starts,
        0,
    );
    alike("dq", &wide(dq.slice()), &wanted_q, 1e-4, 2e-2);
    alike("dkv", &wide(&dkv.slice()[..used * 2 * width]), &wanted_kv, 1e-4, 2e-2);
    assert!(dkv.slice()[used * 2 * width..].iter().all(|x| x.to_bits() == 0));

    // What only the device sees of a bad cu_seqlens, and what the host sees before.
    let (bad, host) = (Memory::of(&[0, 9, 5, 17]), [0, 5, 5, 21]);
    let workspace = Memory::<u8>::zeros(sizes.forward_workspace_bytes as usize);
    (call.workspace, call.workspace_bytes) = (workspace.ptr(), sizes.forward_workspace_bytes);
    let told = Pool { cu_seqlens_host: host.as_ptr(), ..call };
    call.cu_seqlens = bad.ptr();
    // SAFETY: as above.
    unsafe {
        let found = trencadis_pool_forward(kernels.0, null_mut(), &raw const told);
        crate::memory::refused(found, Status::InvalidArgument, "beyond the 20 token rows");
        done(trencadis_pool_forward(kernels.0, null_mut(), &raw const call));
    }
    let found = trencadis_pool_fault(fault.slice()[0]);
    crate::memory::refused(found, Status::InvalidArgument, "cu_seqlens on the device decreases");
}

/// 4 x 6 patches in windows of 4, then nothing, then 2 x 2.
#[test]
fn windows_of_images() {
    let grids = [4u32, 6, 0, 3, 2, 2];
    let mut call = Windows {
        size: size_of::<Windows>() as u64,
        images: 3,
        grids: grids.as_ptr(),
        window: 4,
        merge: 1,
        ..Windows::zeroed()
    };
    // SAFETY: a struct, and arrays as large as is said, here and below.
    done(unsafe { trencadis_windows_make(&raw mut call) });
    assert_eq!((call.rows, call.segments, call.longest), (28, 3, 16));
    let (mut order, mut inverse, mut cu_seqlens) = ([0; 28], [0; 28], [0; 4]);
    (call.order, call.inverse) = (order.as_mut_ptr(), inverse.as_mut_ptr());
    call.cu_seqlens = cu_seqlens.as_mut_ptr();
    let mut small = Windows { segments: 2, ..call };
    let found = unsafe { trencadis_windows_make(&raw mut small) };
    crate::memory::refused(found, Status::InvalidArgument, "28 rows in 3 windows");
    assert_eq!(order, [0; 28]);
    done(unsafe { trencadis_windows_make(&raw mut call) });
    assert_eq!(cu_seqlens, [0, 16, 24, 28]);
    assert_eq!(order[..8], [0, 1, 2, 3, 6, 7, 8, 9]);
    assert_eq!(order[16..20], [4, 5, 10, 11]);
    assert!((0..28).all(|i| inverse[order[i] as usize] == i as i32));
    // Questions alone: of no row, however long one side is, and of as many rows as there may be.
    let asked = Windows { images: 1, order: null_mut(), inverse: null_mut(), cu_seqlens: null_mut(), ..call };
    for (grid, sizes) in [([u32::MAX, 0], (0, 0, 0)), ([1 << 15, 1 << 15], (1 << 30, 1 << 26, 16))] {
        let mut asked = Windows { grids: grid.as_ptr(), ..asked };
        done(unsafe { trencadis_windows_make(&raw mut asked) });
        assert_eq!((asked.rows, asked.segments, asked.longest), sizes);
    }
    let large = [46_340u32; 2];
    for (wrong, part) in [
        (Windows { merge: 3, ..call }, "multiple of the merge unit"),
        (Windows { grids: std::ptr::null(), ..call }, "grids lie at 0x0"),
        (Windows { images: u64::MAX, ..call }, "for 18446744073709551615 images"),
        (Windows { images: 1, grids: large.as_ptr(), ..call }, "ends beyond 2^30 rows"),
    ] {
        let mut wrong = wrong;
        let found = unsafe { trencadis_windows_make(&raw mut wrong) };
        crate::memory::refused(found, Status::InvalidArgument, part);
    }
}
