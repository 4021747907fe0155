//! What is refused, with which status, and what survives it.

use std::ptr::{null, null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::Zeroable;
use half::bf16;
use trencadis::capi::*;

use crate::attention::{Case, described};
use crate::memory::{Memory, Open, message, refused};
use crate::rows::{norm, product};

fn sizes() -> AttentionSizes {
    AttentionSizes { size: size_of::<AttentionSizes>() as u64, ..AttentionSizes::zeroed() }
}

/// SAFETY of all calls here: structs and memory of this process; what is wrong is refused before it is followed.
fn plan(kernels: *const Handle, call: &Attention) -> Status {
    unsafe { trencadis_attention_plan(kernels, call, &mut sizes()) }
}

fn forward(kernels: &Open, call: &Attention) -> Status {
    unsafe { trencadis_attention_forward(kernels.0, null_mut(), call) }
}

fn backward(kernels: &Open, call: &Attention) -> Status {
    unsafe { trencadis_attention_backward(kernels.0, null_mut(), call) }
}

#[test]
fn handles_that_are_not_open() {
    let kernels = Open::new(90);
    let open = kernels.0;
    let wrong: [*mut Handle; 3] =
        [null_mut(), without_provenance_mut(open.addr() + 1_000_000), (&raw const kernels).cast_mut().cast()];
    for handle in wrong {
        refused(plan(handle, &described()), Status::InvalidArgument, "are not open");
        refused(trencadis_close(handle), Status::InvalidArgument, "are not open");
        refused(trencadis_preload(handle), Status::InvalidArgument, "are not open");
        unsafe {
            let mut info = DeviceInfo { size: size_of::<DeviceInfo>() as u64, ..DeviceInfo::zeroed() };
            refused(trencadis_device(handle, &raw mut info), Status::InvalidArgument, "are not open");
            let gemm = product(GemmLayout::Nt, GemmEpilogue::Store, [8; 3]);
            refused(
                trencadis_gemm_launch(handle, null_mut(), &raw const gemm),
                Status::InvalidArgument,
                "not open",
            );
            let norm = norm(NormKind::Rms, 8, 8);
            refused(
                trencadis_norm_forward(handle, null_mut(), &raw const norm),
                Status::InvalidArgument,
                "not open",
            );
            let pool = Pool::zeroed();
            refused(
                trencadis_pool_forward(handle, null_mut(), &raw const pool),
                Status::InvalidArgument,
                "not open",
            );
        }
    }
    assert_eq!(plan(open, &described()), Status::Ok);
    assert_eq!(trencadis_preload(open), Status::Ok);
    // Closed twice, and used after it.
    drop(kernels);
    refused(trencadis_close(open), Status::InvalidArgument, "are not open");
    refused(plan(open, &described()), Status::InvalidArgument, "they were closed, or never opened");
    let another = Open::new(90);
    assert_ne!(another.0, open, "a number is never used twice");

    unsafe {
        refused(trencadis_open_emulator(90, null_mut()), Status::InvalidArgument, "kernels is 0x0");
        let mut handle = another.0;
        refused(
            trencadis_open_emulator(75, &raw mut handle),
            Status::Unsupported,
            "choose 80, 86, 87, 89 or 90",
        );
        assert!(handle.is_null());
    }
}

#[test]
fn structs_that_are_none() {
    let kernels = Open::new(90);
    let call = described();
    unsafe {
        let found = trencadis_attention_plan(kernels.0, null(), &mut sizes());
        refused(found, Status::InvalidArgument, "no address of a trencadis_attention");
        let found = trencadis_attention_plan(kernels.0, &raw const call, null_mut());
        refused(found, Status::InvalidArgument, "no address of a trencadis_attention_sizes");
        let found = trencadis_attention_plan(kernels.0, &raw const call, &mut AttentionSizes::zeroed());
        refused(found, Status::InvalidArgument, "sizeof(trencadis_attention_sizes), which is 40");
        for found in [
            trencadis_gemm_launch(kernels.0, null_mut(), null()),
            trencadis_gemm_plan(kernels.0, null(), &mut 0),
            trencadis_norm_backward(kernels.0, null_mut(), null()),
            trencadis_pool_backward(kernels.0, null_mut(), null()),
            trencadis_device(kernels.0, null_mut()),
            trencadis_attention_schedule(kernels.0, null_mut(), null()),
        ] {
            refused(found, Status::InvalidArgument, "is no address of a trencadis_");
        }
        let gemm = product(GemmLayout::Nt, GemmEpilogue::Store, [8; 3]);
        refused(
            trencadis_gemm_plan(kernels.0, &raw const gemm, null_mut()),
            Status::InvalidArgument,
            "workspace_bytes",
        );
    }
    for size in [0, 8, call.size - 1, 1 << 40] {
        let found = plan(kernels.0, &Attention { size, ..call });
        refused(found, Status::InvalidArgument, "set its field size to sizeof(trencadis_attention)");
    }
    // What a newer header may have behind, which this library does not know.
    let mut newer = vec![0u64; size_of::<Attention>() / 8 + 2];
    let longer = Attention { size: newer.len() as u64 * 8, ..call };
    unsafe { newer.as_mut_ptr().cast::<Attention>().write(longer) };
    let ask =
        |newer: &[u64]| unsafe { trencadis_attention_plan(kernels.0, newer.as_ptr().cast(), &mut sizes()) };
    assert_eq!(ask(&newer), Status::Ok, "{}", message());
    *newer.last_mut().unwrap() = 1;
    refused(ask(&newer), Status::Unsupported, "fields that this library does not know");
}

#[test]
fn numbers_that_no_kernel_takes() {
    let kernels = Open::new(90);
    let call = described();
    let (invalid, unsupported) = (Status::InvalidArgument, Status::Unsupported);
    for (wrong, status, part) in [
        (Attention { head_dim: 12, ..call }, unsupported, "head dim of 12"),
        (Attention { head_dim: 256, ..call }, unsupported, "head dim of 256"),
        (Attention { head_dim: 0, ..call }, unsupported, "head dim of 0"),
        (Attention { head_dim: u64::MAX, ..call }, unsupported, "head dim of"),
        (Attention { heads: 0, ..call }, invalid, "0 heads"),
        (Attention { heads: u64::MAX, ..call }, invalid, "heads"),
        (Attention { tokens: u64::MAX, ..call }, invalid, "token rows"),
        (Attention { slots: u64::MAX, ..call }, invalid, "image slots"),
        (Attention { scale: -1.0, ..call }, invalid, "scale of -1"),
        (Attention { scale: f64::NAN, ..call }, invalid, "scale of NaN"),
        (Attention { eps: 0.0, ..call }, invalid, "epsilon of 0"),
        (Attention { norm: 3, ..call }, invalid, "3 is no trencadis_qk_norm"),
        (Attention { dtype: Dtype::F32 as u32, ..call }, unsupported, "dtype"),
        (Attention { kv_heads: 3, ..call }, invalid, "3 of keys and values"),
        (Attention { rope_kind: 9, ..call }, invalid, "9 is no trencadis_rope"),
    ] {
        refused(plan(kernels.0, &wrong), status, part);
    }
    let gemm = product(GemmLayout::Nt, GemmEpilogue::Store, [8, 16, 24]);
    for (wrong, status, part) in [
        (Gemm { m: 0, ..gemm }, invalid, "m is 0"),
        (Gemm { k: u64::MAX, ..gemm }, invalid, "k is 18446744073709551615"),
        (Gemm { layout: 3, ..gemm }, invalid, "3 is no trencadis_gemm_layout"),
        (Gemm { gelu: 4, ..gemm }, invalid, "4 is no trencadis_gelu"),
        (Gemm { epilogue: 5, ..gemm }, invalid, "5 is no trencadis_gemm_epilogue"),
        (Gemm { dtype: 1, ..gemm }, unsupported, "dtype"),
        (Gemm { epilogue: GemmEpilogue::GeluGrad as u32, ..gemm }, invalid, "slope of one"),
        (Gemm { n: 12, b_stride: 24, out_stride: 16, ..gemm }, invalid, "n is 12"),
        (Gemm { a_stride: 20, ..gemm }, invalid, "multiple of 8"),
        (Gemm { a_stride: u64::MAX, ..gemm }, invalid, "which no memory holds"),
    ] {
        let memory = Memory::<u16>::zeros(1000);
        let wrong = Gemm { a: memory.ptr(), b: memory.ptr(), out: memory.ptr(), ..wrong };
        refused(unsafe { trencadis_gemm_launch(kernels.0, null_mut(), &raw const wrong) }, status, part);
    }
    let rows = norm(NormKind::LayerNorm, 8, 64);
    for (wrong, status, part) in [
        (Norm { width: 12, ..rows }, unsupported, "rows of 12"),
        (Norm { width: 1 << 20, ..rows }, unsupported, "rows of 1048576"),
        (Norm { tokens: 0, ..rows }, invalid, "0 rows"),
        (Norm { kind: 2, ..rows }, invalid, "2 is no trencadis_norm_kind"),
        (Norm { dtype: 1, ..rows }, unsupported, "dtype"),
    ] {
        refused(unsafe { trencadis_norm_plan(kernels.0, &raw const wrong, &mut 0) }, status, part);
    }
    let pool = Pool {
        size: size_of::<Pool>() as u64,
        tokens: 8,
        slots: 1,
        queries: 1,
        heads: 1,
        head_dim: 64,
        ..Pool::zeroed()
    };
    for (wrong, status, part) in [
        (Pool { head_dim: 264, ..pool }, unsupported, "head dim of 264"),
        (Pool { queries: 9, ..pool }, unsupported, "9 queries"),
        (Pool { slots: 0, ..pool }, invalid, "at least one"),
        (Pool { slots: u64::MAX, ..pool }, invalid, "no number above"),
        (Pool { heads: u64::MAX, ..pool }, invalid, "heads"),
        (Pool { query_dtype: 1, ..pool }, unsupported, "query_dtype"),
        (Pool { norm: 7, ..pool }, invalid, "7 is no trencadis_qk_norm"),
    ] {
        let mut sizes = PoolSizes { size: size_of::<PoolSizes>() as u64, ..PoolSizes::zeroed() };
        refused(unsafe { trencadis_pool_plan(kernels.0, &raw const wrong, &raw mut sizes) }, status, part);
    }
}

#[test]
fn addresses_that_are_none() {
    let kernels = Open::new(90);
    let case = Case::<bf16>::new(&kernels);
    case.run(&kernels);
    let before = case.written();
    let call = case.call;
    let invalid = Status::InvalidArgument;
    let shifted = |at: *const std::ffi::c_void| at.wrapping_byte_add(2);
    for (wrong, part) in [
        (Attention { q: null(), ..call }, "attention: q: the address of"),
        (Attention { k: shifted(call.k), ..call }, "attention: k: the address"),
        (Attention { v: null(), ..call }, "attention: v: "),
        (Attention { out: null_mut(), ..call }, "attention: out: "),
        (Attention { lse: null_mut(), ..call }, "attention: lse: "),
        (Attention { cu_seqlens: null(), ..call }, "attention: cu_seqlens: "),
        (Attention { forward_schedule: null_mut(), ..call }, "attention: forward_schedule: "),
        (Attention { rope: null(), ..call }, "needs their table"),
        (Attention { rope_kind: 0, ..call }, "has no rotation"),
        (Attention { q_gain: call.q_gain.wrapping_add(1), ..call }, "attention: q_gain: "),
        (Attention { q_mean: null_mut(), ..call }, "attention: q_mean: "),
        (Attention { q_stride: 4, ..call }, "multiples of 8"),
        (Attention { q_stride: 64, ..call }, "at a stride of 64"),
        (Attention { q_stride: u64::MAX, ..call }, "which no memory holds"),
    ] {
        refused(forward(&kernels, &wrong), invalid, part);
    }
    for (wrong, part) in [
        (Attention { dout: null(), ..call }, "attention: dout: "),
        (Attention { dk: call.dk.wrapping_byte_add(8), ..call }, "attention: dk: "),
        (Attention { backward_schedule: null_mut(), ..call }, "attention: backward_schedule: "),
        (Attention { workspace_bytes: case.sizes.backward_workspace_bytes - 1, ..call }, "and must have"),
        (Attention { workspace: null_mut(), ..call }, "attention: workspace: "),
        (Attention { accumulate: call.cu_seqlens.wrapping_add(1), ..call }, "attention: accumulate: "),
    ] {
        refused(backward(&kernels, &wrong), invalid, part);
    }
    let none = Attention { forward_schedule: null_mut(), backward_schedule: null_mut(), ..call };
    let schedule = |call: &Attention| unsafe { trencadis_attention_schedule(kernels.0, null_mut(), call) };
    refused(schedule(&none), invalid, "give the lists that are to be made");
    for (host, part) in
        [([0, 3, 2, 20, 30], "decreases from 3 to 2"), ([0, 3, 20, 20, 33], "beyond the 32 token rows")]
    {
        refused(schedule(&Attention { cu_seqlens_host: host.as_ptr(), ..call }), invalid, part);
    }
    assert!(before == case.written(), "what is refused writes nothing");
    let stream = without_provenance_mut(0x1000);
    refused(
        unsafe { trencadis_attention_forward(kernels.0, stream, &raw const call) },
        invalid,
        "none of this emulator",
    );

    // Without the host's copy the device tells.
    let bad = Memory::of(&[0, 3, 2, 20, 30]);
    let told = Attention { cu_seqlens: bad.ptr(), cu_seqlens_host: null(), ..call };
    assert_eq!(schedule(&told), Status::Ok, "{}", message());
    let fault = *case.lists[0].slice().last().unwrap();
    refused(trencadis_attention_fault(fault), invalid, "cu_seqlens on the device decreases");
}

/// Messages are of the thread that failed; one handle serves many threads, and one that is closed meanwhile harms none.
#[test]
fn many_threads() {
    let (kernels, others) = (Open::new(90), AtomicBool::new(false));
    let wanted = {
        let case = Case::<bf16>::new(&kernels);
        case.run(&kernels);
        case.written()
    };
    let (shared, wanted, others) = (&kernels, &wanted, &others);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            scope.spawn(move || {
                // One of its own, and the one that all use.
                let own = Open::new(90);
                for kernels in [shared, &own] {
                    let case = Case::<bf16>::new(kernels);
                    case.run(kernels);
                    assert!(case.written() == *wanted);
                    let head_dim = 136 + 8 * thread;
                    refused(
                        plan(kernels.0, &Attention { head_dim, ..described() }),
                        Status::Unsupported,
                        &head_dim.to_string(),
                    );
                }
                others.store(true, Ordering::Relaxed);
            });
        }
        scope.spawn(move || {
            while !others.load(Ordering::Relaxed) {
                let closed = Open::new(80);
                std::thread::scope(|inner| {
                    inner.spawn(|| {
                        let status = plan(closed.handle(), &described());
                        assert!(matches!(status, Status::Ok | Status::InvalidArgument));
                    });
                    assert_eq!(trencadis_close(closed.handle()), Status::Ok);
                });
                std::mem::forget(closed);
            }
        });
    });
}

#[test]
fn without_a_gpu_that_is_told() {
    let mut kernels = without_provenance_mut(7);
    // Nothing makes a context current here, where there is a GPU.
    let found = unsafe { trencadis_open_current(&raw mut kernels) };
    assert!(kernels.is_null());
    assert_eq!(found, Status::NoDevice, "{}", message());
    assert!(message().contains("CUDA") || message().contains("driver"), "{}", message());
}
