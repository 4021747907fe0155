//! Packed attention.

use half::{bf16, f16};
use trencadis::capi::*;
use trencadis::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad, backward, forward};
use trencadis::ops::{QkNormKind, Rope as Rotation};

use crate::memory::{Half, Memory, Open, alike, done, wide};
use crate::support::numbers::random;

pub const STARTS: [i32; 5] = [0, 3, 20, 20, 30];
pub const TOKENS: usize = 32;
const HEADS: usize = 2;
/// Both heads share keys and values.
const KV_HEADS: usize = 1;
const DIM: usize = 64;
const WIDTH: usize = HEADS * DIM;
const KV_WIDTH: usize = KV_HEADS * DIM;
/// Columns of a row [q | k | v].
const ROW: usize = WIDTH + 2 * KV_WIDTH;

/// An attention of these sizes, without operands.
pub fn described() -> Attention {
    Attention {
        size: size_of::<Attention>() as u64,
        tokens: TOKENS as u64,
        slots: 4,
        heads: HEADS as u64,
        kv_heads: KV_HEADS as u64,
        head_dim: DIM as u64,
        eps: 1e-6,
        norm: QkNorm::LayerNorm as u32,
        gain_per_head: 1,
        rope_kind: Rope::Halves as u32,
        ..bytemuck::Zeroable::zeroed()
    }
}

/// What it is given and what it writes.
pub struct Case<E = bf16> {
    pub call: Attention,
    pub sizes: AttentionSizes,
    qkv: Memory<E>,
    affine: [Memory<f32>; 4],
    rope: Memory<f32>,
    out: Memory<E>,
    lse: Memory<f32>,
    dout: Memory<E>,
    dqkv: Memory<E>,
    daffine: [Memory<f32>; 4],
    statistics: [Memory<f32>; 4],
    pub lists: [Memory<i32>; 2],
    _kept: (Memory<i32>, Memory<u8>),
}

impl<E: Half> Case<E> {
    pub fn new(kernels: &Open) -> Self {
        let mut call = Attention { dtype: E::DTYPE as u32, ..described() };
        let mut sizes: AttentionSizes = bytemuck::Zeroable::zeroed();
        sizes.size = size_of::<AttentionSizes>() as u64;
        // SAFETY: structs, here and below; no address is followed.
        done(unsafe { trencadis_attention_plan(kernels.0, &raw const call, &raw mut sizes) });
        let lists =
            [sizes.forward_schedule_words, sizes.backward_schedule_words].map(|n| Memory::zeros(n as usize));
        let bytes = sizes.forward_workspace_bytes.max(sizes.backward_workspace_bytes);
        let (starts, workspace) = (Memory::of(&STARTS), Memory::zeros(bytes as usize));
        let qkv = Memory::<E>::rounded(&random(TOKENS * ROW, 1));
        let column = |width: usize, seed: u64, mean: f32| {
            Memory::of(&random::<f32>(width, seed).iter().map(|x| mean + 0.2 * x).collect::<Vec<_>>())
        };
        let affine = [
            column(WIDTH, 2, 1.0),
            column(WIDTH, 3, 0.0),
            column(KV_WIDTH, 4, 1.0),
            column(KV_WIDTH, 5, 0.0),
        ];
        let turn = |x: &f32| {
            let (sin, cos) = x.sin_cos();
            [cos, sin]
        };
        let rope = Memory::of(&random::<f32>(TOKENS * DIM / 2, 7).iter().flat_map(turn).collect::<Vec<_>>());
        let (out, lse) = (Memory::zeros(TOKENS * WIDTH), Memory::zeros(TOKENS * HEADS));
        let dout = Memory::<E>::rounded(&random(TOKENS * WIDTH, 6));
        let dqkv = Memory::<E>::zeros(TOKENS * ROW);
        let daffine = [WIDTH, WIDTH, KV_WIDTH, KV_WIDTH].map(Memory::zeros);
        let statistics = [HEADS, HEADS, KV_HEADS, KV_HEADS].map(|heads| Memory::zeros(TOKENS * heads));
        let parts = [0, WIDTH, WIDTH + KV_WIDTH];
        [call.q, call.k, call.v] = parts.map(|part| qkv.at(part).cast_const().cast());
        [call.dq, call.dk, call.dv] = parts.map(|part| dqkv.at(part).cast());
        call.rope = rope.ptr();
        for stride in [
            &mut call.q_stride,
            &mut call.k_stride,
            &mut call.v_stride,
            &mut call.dq_stride,
            &mut call.dk_stride,
            &mut call.dv_stride,
        ] {
            *stride = ROW as u64;
        }
        [call.q_gain, call.q_bias, call.k_gain, call.k_bias] =
            affine.each_ref().map(|x| x.at(0).cast_const());
        [call.dq_gain, call.dq_bias, call.dk_gain, call.dk_bias] = daffine.each_ref().map(|x| x.at(0));
        [call.q_mean, call.q_rstd, call.k_mean, call.k_rstd] = statistics.each_ref().map(|x| x.at(0));
        (call.cu_seqlens, call.cu_seqlens_host) = (starts.ptr(), STARTS.as_ptr());
        [call.forward_schedule, call.backward_schedule] = lists.each_ref().map(|x| x.at(0));
        (call.workspace, call.workspace_bytes) = (workspace.ptr(), bytes);
        (call.out, call.lse, call.dout) = (out.ptr(), lse.ptr(), dout.ptr());
        let _kept = (starts, workspace);
        Self { call, sizes, qkv, affine, rope, out, lse, dout, dqkv, daffine, statistics, lists, _kept }
    }

    /// Makes the schedules and runs both passes.
    pub fn run(&self, kernels: &Open) {
        // SAFETY: addresses of memory as large as the fields say, which lives until the kernels have run: they have.
        unsafe {
            done(trencadis_attention_schedule(kernels.0, std::ptr::null_mut(), &raw const self.call));
            done(trencadis_attention_forward(kernels.0, std::ptr::null_mut(), &raw const self.call));
            done(trencadis_attention_backward(kernels.0, std::ptr::null_mut(), &raw const self.call));
        }
    }

    /// Everything that was written, as bits.
    pub fn written(&self) -> Vec<u32> {
        let halves =
            [&self.out, &self.dqkv].into_iter().flat_map(|x| bytemuck::cast_slice::<E, u16>(x.slice()));
        let halves = halves.map(|&x| u32::from(x));
        let words = [&self.lse].into_iter().chain(&self.daffine).chain(&self.statistics);
        halves.chain(words.flat_map(|x| x.slice()).map(|x| x.to_bits())).collect()
    }

    /// Compares with the CPU device.
    pub fn check(&self) {
        let used = STARTS[4] as usize;
        let dense = |x: &Memory<E>, columns: usize| wide(&x.slice()[..used * columns]);
        let config = AttentionConfig {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: DIM,
            scale: 1.0 / (DIM as f64).sqrt(),
            norm: QkNormKind::LayerNormBias,
            eps: 1e-6,
            gain_per_head: true,
            rope: Rotation::Halves,
        };
        let qkv = dense(&self.qkv, ROW);
        let rope = wide(self.rope.slice());
        let rope = Some(&rope[..]);
        let affine = self.affine.each_ref().map(|x| wide(x.slice()));
        let [q_gain, q_bias, k_gain, k_bias] = affine.each_ref().map(|x| Some(&x[..]));
        let affine = QkAffine { q_gain, k_gain, q_bias, k_bias };
        let (mut out, mut lse) = (vec![0.0; used * WIDTH], vec![0.0; used * HEADS]);
        forward(&config, &mut out, &mut lse, &qkv, affine, rope, &STARTS);
        alike("out", &dense(&self.out, WIDTH), &out, 2e-5, 1e-2);
        alike("lse", &wide(&self.lse.slice()[..used * HEADS]), &lse, 1e-5, 1e-2);
        let mut dqkv = vec![0.0; used * ROW];
        let mut daffine = self.daffine.each_ref().map(|x| vec![0.0; x.slice().len()]);
        let [q_gain, q_bias, k_gain, k_bias] = daffine.each_mut().map(|x| Some(&mut x[..]));
        let grads = QkAffineGrad { q_gain, k_gain, q_bias, k_bias };
        backward(
            &config,
            &mut dqkv,
            grads,
            &dense(&self.dout, WIDTH),
            &out,
            &lse,
            &qkv,
            affine,
            rope,
            &STARTS,
        );
        alike("dqkv", &dense(&self.dqkv, ROW), &dqkv, 1e-4, 3e-2);
        for (i, name) in ["dq_gain", "dq_bias", "dk_gain"].iter().enumerate() {
            alike(name, &wide(self.daffine[i].slice()), &daffine[i], 1e-3, 5e-2);
        }
        // Statistics are of whole rows: mean and deviation of the first of q.
        let row = &qkv[..DIM];
        let mean = row.iter().sum::<f64>() / DIM as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / DIM as f64;
        let found = [&self.statistics[0], &self.statistics[1]].map(|x| f64::from(x.slice()[0]));
        alike("statistics", &found, &[mean, 1.0 / (variance + 1e-6).sqrt()], 1e-9, 1e-5);
        // Rows of no image are zeros.
        let behind =
            wide(&self.out.slice()[used * WIDTH..]).into_iter().chain(wide(&self.dqkv.slice()[used * ROW..]));
        assert_eq!(behind.map(f64::abs).sum::<f64>(), 0.0);
    }
}

#[test]
fn both_passes_agree_with_the_cpu() {
    for capability in [80, 90] {
        let kernels = Open::new(capability);
        let case = Case::<bf16>::new(&kernels);
        case.run(&kernels);
        case.check();
        let of_f16 = Case::<f16>::new(&kernels);
        of_f16.run(&kernels);
        of_f16.check();
        for list in &case.lists {
            assert_eq!(trencadis_attention_fault(*list.slice().last().unwrap()), Status::Ok);
        }
        // Gradients of gains are added to where a flag says so.
        let (before, flag) = (wide(case.daffine[0].slice()), Memory::of(&[1]));
        let adds = Attention { accumulate: flag.ptr(), ..case.call };
        // SAFETY: as for the other passes.
        done(unsafe { trencadis_attention_backward(kernels.0, std::ptr::null_mut(), &raw const adds) });
        let doubled: Vec<f64> = before.iter().map(|x| 2.0 * x).collect();
        alike("dq_gain, added", &wide(case.daffine[0].slice()), &doubled, 1e-9, 1e-5);
    }
}

#[test]
fn what_a_device_is_can_be_asked() {
    let mut info: DeviceInfo = bytemuck::Zeroable::zeroed();
    info.size = size_of::<DeviceInfo>() as u64;
    for (capability, found, hopper) in [(0, 90, 1), (86, 86, 0)] {
        let kernels = Open::new(capability);
        // SAFETY: a struct.
        done(unsafe { trencadis_device(kernels.0, &raw mut info) });
        assert_eq!((info.compute_capability, info.hopper, info.emulated), (found, hopper, 1));
        assert!(info.multiprocessors > 0 && info.shared_bytes_per_block > 0 && info.memory_bytes > 0);
        let name: Vec<u8> = info.name.iter().map(|x| x.cast_unsigned()).take_while(|&x| x != 0).collect();
        assert_eq!(name, b"emulator");
    }
    assert_eq!(trencadis_abi_version(), TRENCADIS_ABI_VERSION);
    // SAFETY: a constant that ends with 0.
    let version = unsafe { std::ffi::CStr::from_ptr(trencadis_version()) };
    assert_eq!(version.to_str().unwrap(), env!("CARGO_PKG_VERSION"));
}
