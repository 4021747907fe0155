//! The pooling kernels against the CPU device in f64, on inputs rounded to bf16.

use half::bf16;

use trencadis::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad};
use trencadis::cpu::pool as oracle;
use trencadis::device::Device;
use trencadis::kernels::Rows;
use trencadis::kernels::pool::{
    AttentionBackward, AttentionForward, AttentionPool, MeanForwardParams, MeanPool, PackedSizes, Query,
    TokenGather, fault, launch_mean_forward,
};
use trencadis::kernels::tolerance as to;
use trencadis::recipe::{QkNormKind, Rope};

use crate::support::devices::devices;
use crate::support::numbers::{alike, random};

/// Images of these tokens, two empty slots among them and one behind them.
const LENGTHS: [usize; 7] = [64, 0, 7, 1100, 1, 300, 0];
const KINDS: [QkNormKind; 4] =
    [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];
/// Columns that follow every row and belong to somebody else.
const FOREIGN: usize = 8;

fn rounded(x: Vec<f64>) -> Vec<bf16> {
    x.into_iter().map(bf16::from_f64).collect()
}

fn wide(x: &[bf16]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

fn wide32(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn starts(lengths: &[usize]) -> Vec<i32> {
    let mut cu_seqlens = vec![0];
    for length in lengths {
        cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + *length as i32);
    }
    cu_seqlens
}

#[derive(Clone)]
struct Case {
    pool: AttentionPool,
    cu_seqlens: Vec<i32>,
    q_f32: bool,
    present: bool,
    accumulate: bool,
    q: Vec<bf16>,
    /// `[T][k | v | foreign]`.
    kv: Vec<bf16>,
    dout: Vec<bf16>,
    /// γq, βq, γk, βk.
    affine: [Vec<f32>; 4],
}

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    out: Vec<bf16>,
    lse: Vec<f32>,
    dkv: Vec<bf16>,
    dq: Vec<bf16>,
    dq_f32: Vec<f32>,
    daffine: [Vec<f32>; 4],
}

fn case(heads: usize, head_dim: usize, norm: QkNormKind, gain_per_head: bool, queries: usize) -> Case {
    let width = heads * head_dim;
    let used: usize = LENGTHS.iter().sum();
    let sizes = PackedSizes { tokens: used + 37, images: LENGTHS.len(), skip: 0 };
    let scale = 1.3 / (head_dim as f64).sqrt();
    let rope = Rope::None;
    let config =
        AttentionConfig { heads, kv_heads: heads, head_dim, scale, norm, eps: 1e-3, gain_per_head, rope };
    let mut kv = rounded(random(sizes.tokens * (2 * width + FOREIGN), 2));
    // Rows that belong to no image hold what a neighbour may have left there.
    kv[used * (2 * width + FOREIGN)..].fill(bf16::NAN);
    let gains = if gain_per_head { width } else { head_dim };
    let affine = [1.0, 0.1, 1.0, 0.1].map(|at| {
        let x: Vec<f32> = random(gains, gains as u64);
        x.iter().map(|x| at + 0.2 * x).collect()
    });
    Case {
        pool: AttentionPool { config, sizes, queries },
        cu_seqlens: starts(&LENGTHS),
        q_f32: false,
        present: true,
        accumulate: false,
        q: rounded(random(queries * width, 1)),
        kv,
        dout: rounded(random(sizes.images * queries * width, 3)),
        affine,
    }
}

impl Case {
    /// γq, βq, γk, βk as far as the case has them: biases are LayerNorm's.
    fn given<T>(&self, all: [T; 4]) -> [Option<T>; 4] {
        let bias = self.pool.config.norm == QkNormKind::LayerNormBias;
        let mut at = 0;
        all.map(|x| {
            at += 1;
            (self.present && (bias || at % 2 == 1)).then_some(x)
        })
    }

    fn width(&self) -> usize {
        self.pool.config.heads * self.pool.config.head_dim
    }

    fn run(&self, device: &Device) -> Answer {
        let Self { pool, q, kv, dout, .. } = self;
        let (width, tokens) = (self.width(), pool.sizes.tokens);
        let slots = pool.sizes.images * pool.queries;
        let shape = pool.shape().unwrap();
        let stream = device.stream().unwrap();
        let (q_bf16, q_f32) = (
            device.upload(q).unwrap(),
            device.upload(&q.iter().map(|x| x.to_f32()).collect::<Vec<_>>()).unwrap(),
        );
        let kv = device.upload(kv).unwrap();
        let dkv = device.upload(&vec![bf16::MAX; self.kv.len()]).unwrap();
        let rows = |buffer, offset| Rows { buffer, offset, stride: self.kv.len() / tokens };
        let affine = self.affine.each_ref().map(|x| device.upload(x).unwrap());
        let daffine = self.affine.each_ref().map(|x| device.upload(&vec![1.0f32; x.len()]).unwrap());
        let cu_seqlens = device.upload(&self.cu_seqlens).unwrap();
        let out = device.alloc::<bf16>(slots * width).unwrap();
        let lse = device.alloc::<f32>(slots * pool.config.heads).unwrap();
        let forward = AttentionForward {
            q: if self.q_f32 { Query::F32(&q_f32) } else { Query::Bf16(&q_bf16) },
            k: rows(&kv, 0),
            v: rows(&kv, width),
            affine: self.given(affine.each_ref()),
            cu_seqlens: &cu_seqlens,
            cu_seqlens_host: Some(&self.cu_seqlens),
            error: None,
            out: &out,
            lse: &lse,
        };
        let workspace = device.alloc::<u8>(shape.forward_workspace_bytes()).unwrap();
        pool.forward(&stream, &forward, &workspace).unwrap();
        let workspace = device.alloc::<u8>(shape.backward_workspace_bytes()).unwrap();
        let dout = device.upload(dout).unwrap();
        let dq = device.alloc::<bf16>(q.len()).unwrap();
        let dq_f32 = device.upload(&vec![1.0f32; q.len()]).unwrap();
        let flag = device.upload(&[i32::from(self.accumulate)]).unwrap();
        let backward = AttentionBackward {
            dout: &dout,
            dk: rows(&dkv, 0),
            dv: rows(&dkv, width),
            dq: Some(&dq),
            dq_f32: Some(&dq_f32),
            daffine: self.given(daffine.each_ref()),
            accumulate: Some(&flag),
        };
        pool.backward(&stream, &forward, &backward, &workspace).unwrap();
        stream.synchronize().unwrap();
        Answer {
            out: out.download().unwrap(),
            lse: lse.download().unwrap(),
            dkv: dkv.download().unwrap(),
            dq: dq.download().unwrap(),
            dq_f32: dq_f32.download().unwrap(),
            daffine: daffine.map(|x| x.download().unwrap()),
        }
    }

    /// The gradients start from 1 where they are added to.
    fn start(&self) -> f64 {
        if self.accumulate { 1.0 } else { 0.0 }
    }

    fn check(&self, got: &Answer) {
        let Self { pool, cu_seqlens, .. } = self;
        let (config, width, queries) = (pool.config, self.width(), pool.queries);
        let (heads, images) = (config.heads, pool.sizes.images);
        let used = cu_seqlens[images] as usize;
        let pitch = 2 * width + FOREIGN;
        let kv: Vec<f64> =
            (self.kv[..used * pitch].chunks_exact(pitch)).flat_map(|row| wide(&row[..2 * width])).collect();
        let affine = self.given(self.affine.each_ref()).map(|x| x.map(|x| wide32(x)));
        let [q_gain, q_bias, k_gain, k_bias] = affine.each_ref().map(Option::as_deref);
        let affine = QkAffine { q_gain, k_gain, q_bias, k_bias };
        // The bias of k adds the same to all scores of a softmax, so the kernels leave it out of the gradients;
        // in the oracle it takes part with the sum of dS, which is not 0 where `out` was rounded.
        let within = if k_bias.is_some() && config.norm != QkNormKind::None {
            to::POOL_GRAD_BIASED
        } else {
            to::POOL_GRAD
        };
        let mut want_dkv = vec![0.0; kv.len()];
        let mut want_daffine = self.affine.each_ref().map(|x| vec![0.0; x.len()]);
        for query in 0..queries {
            let of = |x: &[f64], width: usize| -> Vec<f64> {
                x.chunks_exact(queries * width).flat_map(|x| &x[query * width..][..width]).copied().collect()
            };
            let q = wide(&self.q[query * width..][..width]);
            let (mut out, mut lse) = (vec![0.0; images * width], vec![0.0; images * heads]);
            let skip = pool.sizes.skip;
            oracle::attention_forward(&config, &mut out, &mut lse, &q, &kv, affine, cu_seqlens, skip);
            let (got_out, got_lse) = (of(&wide(&got.out), width), of(&wide32(&got.lse), heads));
            alike("out", &got_out, &out, to::ROUNDED);
            alike("lse", &got_lse, &lse, to::SUMMED);

            let (mut dq, mut dkv) = (vec![0.0; width], vec![0.0; kv.len()]);
            let [q_gain, q_bias, k_gain, k_bias] = want_daffine.each_mut().map(|x| Some(x.as_mut_slice()));
            let daffine = QkAffineGrad { q_gain, k_gain, q_bias, k_bias };
            let dout = of(&wide(&self.dout), width);
            // What the kernel read: its own results.
            oracle::attention_backward(
                &config, &mut dq, &mut dkv, daffine, &dout, &got_out, &got_lse, &q, &kv, affine, cu_seqlens,
                skip,
            );
            for (sum, x) in want_dkv.iter_mut().zip(dkv) {
                *sum += x;
            }
            alike("dq", &wide(&got.dq[query * width..][..width]), &dq, to::ROUNDED);
            dq.iter_mut().for_each(|x| *x += self.start());
            alike("dq f32", &wide32(&got.dq_f32[query * width..][..width]), &dq, within);
        }
        let rows = || got.dkv.chunks_exact(pitch);
        let got_dkv: Vec<f64> = rows().take(used).flat_map(|row| wide(&row[..2 * width])).collect();
        alike("dkv", &got_dkv, &want_dkv, to::ROUNDED);
        assert!(rows().skip(used).all(|row| row[..2 * width].iter().all(|x| x.to_bits() == 0)), "rows after");
        assert!(rows().all(|row| row[2 * width..].iter().all(|&x| x == bf16::MAX)), "foreign columns");
        let normed = config.norm != QkNormKind::None;
        for (i, want) in want_daffine.iter().enumerate() {
            let name = ["dq_gain", "dq_bias", "dk_gain", "dk_bias"][i];
            if !normed || self.given([(); 4])[i].is_none() {
                assert!(got.daffine[i].iter().all(|&x| x == 1.0), "{name}: no gradient of what is not there");
            } else if i == 3 {
                assert!(got.daffine[i].iter().all(|&x| f64::from(x) == self.start()), "{name}");
            } else {
                let want: Vec<f64> = want.iter().map(|x| x + self.start()).collect();
                alike(name, &wide32(&got.daffine[i]), &want, within);
            }
        }
    }
}

#[test]
fn attention_pooling_of_every_kind() {
    for device in devices() {
        for (i, norm) in KINDS.into_iter().enumerate() {
            for (queries, skip) in [(1, [0, 1, 5, 70][i]), (3, 1)] {
                let mut case = case(2, 64, norm, i % 2 == 0, queries);
                case.pool.sizes.skip = skip;
                case.q_f32 = queries == 3;
                case.accumulate = i > 1;
                case.present = (i, queries) != (1, 3);
                case.check(&case.run(&device));
            }
        }
    }
}

#[test]
fn attention_pooling_of_every_head_dim() {
    for device in devices() {
        for (i, head_dim) in (8..=128).step_by(8).chain([136, 200, 248, 256]).enumerate() {
            let mut case = case(1 + i % 2, head_dim, KINDS[1 + i % 2], i % 3 == 0, 1 + i % 2);
            case.pool.sizes.skip = 1;
            // A short batch: the images before the long one.
            case.cu_seqlens = starts(&[64, 0, 7, 40, 1, 0, 0]);
            case.check(&case.run(&device));
        }
    }
}

/// The bits of an image, whatever it is packed with and wherever it lies.
#[test]
fn packing_and_order_change_no_bit() {
    let mut case = case(2, 72, QkNormKind::LayerNormBias, true, 2);
    case.pool.sizes.skip = 2;
    let width = case.width();
    let pitch = 2 * width + FOREIGN;
    let per_slot = 2 * width;
    let mut first: Option<Answer> = None;
    for device in devices() {
        let all = case.run(&device);
        if device.info().driver.is_none() {
            // Every order of threads and every time at which copies arrive.
            assert_eq!(first.get_or_insert_with(|| all.clone()), &all);
        } else {
            assert_eq!(case.run(&device), all);
        }
        for image in [0, 2, 3] {
            let range = case.cu_seqlens[image] as usize..case.cu_seqlens[image + 1] as usize;
            let before = 5;
            let mut alone = case.clone();
            alone.pool.sizes.tokens = before + range.len() + 3;
            alone.pool.sizes.images = 2;
            alone.cu_seqlens = starts(&[before, range.len()]);
            alone.kv = case.kv[..before * pitch].to_vec();
            alone.kv.extend(&case.kv[range.start * pitch..range.end * pitch]);
            alone.kv.extend(&case.kv[..3 * pitch]);
            alone.dout = case.dout[..per_slot].to_vec();
            alone.dout.extend(&case.dout[image * per_slot..][..per_slot]);
            let alone = alone.run(&device);
            assert_eq!(alone.out[per_slot..], all.out[image * per_slot..][..per_slot]);
            let lses = 2 * case.pool.config.heads;
            assert_eq!(alone.lse[lses..], all.lse[image * lses..][..lses]);
            let dkv = &alone.dkv[before * pitch..][..range.len() * pitch];
            assert_eq!(dkv, &all.dkv[range.start * pitch..range.end * pitch]);
        }
    }
}

#[test]
fn mean_pooling_and_its_gradient() {
    for device in devices() {
        for (width, skip) in [(8, 0), (72, 1), (200, 70)] {
            let used: usize = LENGTHS.iter().sum();
            let sizes = PackedSizes { tokens: used + 600, images: LENGTHS.len(), skip };
            let pool = MeanPool { sizes, width };
            let pitch = width + FOREIGN;
            let mut x = rounded(random(sizes.tokens * pitch, 5));
            x[used * pitch..].fill(bf16::NAN);
            let dout = rounded(random(sizes.images * width, 6));
            let host = starts(&LENGTHS);

            let stream = device.stream().unwrap();
            let cu_seqlens = device.upload(&host).unwrap();
            let (x_device, dx) =
                (device.upload(&x).unwrap(), device.upload(&vec![bf16::MAX; x.len()]).unwrap());
            let out = device.alloc::<bf16>(dout.len()).unwrap();
            let workspace = device.alloc::<u8>(pool.workspace_bytes()).unwrap();
            let rows = |buffer| Rows { buffer, offset: 0, stride: pitch };
            pool.forward(&stream, &out, rows(&x_device), &cu_seqlens, &host, &workspace).unwrap();
            let dout_device = device.upload(&dout).unwrap();
            pool.backward(&stream, rows(&dx), &dout_device, &cu_seqlens, &host).unwrap();

            let dense: Vec<f64> =
                x[..used * pitch].chunks_exact(pitch).flat_map(|row| wide(&row[..width])).collect();
            let mut want = vec![0.0; dout.len()];
            oracle::mean_forward(&mut want, &dense, &host, skip, width);
            alike("out", &wide(&out.download().unwrap()), &want, to::ROUNDED);
            let mut want = vec![0.0; dense.len()];
            oracle::mean_backward(&mut want, &wide(&dout), &host, skip, width);
            want.resize(sizes.tokens * width, 0.0);
            let dx = dx.download().unwrap();
            let got: Vec<f64> = dx.chunks_exact(pitch).flat_map(|row| wide(&row[..width])).collect();
            alike("dx", &got, &want, to::ROUNDED);
            assert!(dx.chunks_exact(pitch).all(|row| row[width..].iter().all(|&x| x == bf16::MAX)));
        }
    }
}

/// Where only the device knows `cu_seqlens`, the kernels report a bad one and touch nothing beyond the rows.
#[test]
fn a_bad_cu_seqlens_is_reported() {
    let (tokens, images, width) = (40, 3, 64);
    for device in devices() {
        let pool = MeanPool { sizes: PackedSizes { tokens, images, skip: 0 }, width };
        let x = device.upload(&rounded(random(tokens * width, 7))).unwrap();
        let out = device.alloc::<bf16>(images * width).unwrap();
        let workspace = device.alloc::<u8>(pool.workspace_bytes()).unwrap();
        let cases = [
            ([0, 8, 8, 40], 0),
            ([-5, 8, 16, 40], 1),
            ([0, 30, 20, 40], 2),
            ([0, 1, i32::MAX, 40], 2),
            ([0, 8, 16, 41], 3),
        ];
        for (host, expected) in cases {
            let stream = device.stream().unwrap();
            let (cu_seqlens, error) = (device.upload(&host).unwrap(), device.zeros::<i32>(1).unwrap());
            let params = MeanForwardParams {
                out: out.ptr(),
                partial: workspace.ptr().cast(),
                x: x.ptr(),
                cu_seqlens: cu_seqlens.ptr(),
                error: error.ptr(),
                x_stride: width as i64,
                tokens: tokens as i32,
                images: images as i32,
                width: width as i32,
                skip: 0,
            };
            unsafe { launch_mean_forward(device.kernels(), stream.raw(), &params).unwrap() };
            stream.synchronize().unwrap();
            assert_eq!(error.download().unwrap(), [expected], "{host:?}");
            let checked = pool.forward(&stream, &out, Rows::dense(&x, width), &cu_seqlens, &host, &workspace);
            assert_eq!(checked.is_err(), expected != 0, "{host:?}");
            assert_eq!(fault(expected).is_err(), expected != 0);
        }
    }
}

#[test]
fn unsupported_shapes_are_told() {
    let says = |change: &dyn Fn(&mut AttentionPool)| {
        let mut pool = case(2, 64, QkNormKind::Rms, true, 1).pool;
        change(&mut pool);
        pool.shape().unwrap_err().to_string()
    };
    assert!(says(&|pool| pool.config.head_dim = 60).contains("head dim of 60"));
    assert!(says(&|pool| pool.config.head_dim = 264).contains("multiple of 8 to 256"));
    assert!(says(&|pool| pool.queries = 9).contains("9 queries, expected 1 to 8"));
    assert!(says(&|pool| pool.config.heads = 0).contains("0 heads"));
    for device in devices() {
        let short = device.alloc::<bf16>(100).unwrap();
        let pool = MeanPool { sizes: PackedSizes { tokens: 13, images: 1, skip: 0 }, width: 8 };
        let (stream, cu) = (device.stream().unwrap(), device.upload(&[0, 13]).unwrap());
        let out = device.alloc::<bf16>(8).unwrap();
        let dx = |offset, stride| Rows { buffer: &short, offset, stride };
        let says = |rows| pool.backward(&stream, rows, &out, &cu, &[0, 13]).unwrap_err().to_string();
        assert!(says(dx(0, 8)).contains("do not fit a buffer of 100"));
        assert!(says(dx(4, 8)).contains("multiples of 8"));
        assert!(says(dx(0, 12)).contains("multiples of 8"));
        assert!(says(dx(0, 0)).contains("overlap"));
    }
}

#[test]
fn token_gather_and_its_gradient() {
    for device in devices() {
        for (width, skip) in [(8, 0), (72, 1), (200, 70)] {
            let used: usize = LENGTHS.iter().sum();
            let sizes = PackedSizes { tokens: used + 600, images: LENGTHS.len(), skip };
            let gather = TokenGather { sizes, width };
            let pitch = width + FOREIGN;
            let mut x = rounded(random(sizes.tokens * pitch, 5));
            x[used * pitch..].fill(bf16::NAN);
            let dout = rounded(random(sizes.images * width, 6));
            let host = starts(&LENGTHS);
            let stream = device.stream().unwrap();
            let cu_seqlens = device.upload(&host).unwrap();
            let (x_device, dx) =
                (device.upload(&x).unwrap(), device.upload(&vec![bf16::MAX; x.len()]).unwrap());
            let out = device.upload(&vec![bf16::NAN; dout.len()]).unwrap();
            let dout_device = device.upload(&dout).unwrap();
            let rows = |buffer| Rows { buffer, offset: 0, stride: pitch };
            gather.forward(&stream, &out, rows(&x_device), &cu_seqlens, &host).unwrap();
            gather.backward(&stream, rows(&dx), &dout_device, &cu_seqlens, &host).unwrap();
            stream.synchronize().unwrap();

            // The images that have such a token, and its row.
            let there: Vec<usize> = (0..sizes.images).filter(|&i| LENGTHS[i] > skip).collect();
            let at: Vec<u32> = there.iter().map(|&i| host[i] as u32 + skip as u32).collect();
            let dense: Vec<f64> =
                x[..used * pitch].chunks_exact(pitch).flat_map(|row| wide(&row[..width])).collect();
            let mut gathered = vec![0.0; there.len() * width];
            oracle::gather(&mut gathered, &dense, &at, width);
            let mut want = vec![0.0; sizes.images * width];
            let mut dgathered = Vec::new();
            for (&image, row) in there.iter().zip(gathered.chunks_exact(width)) {
                want[image * width..][..width].copy_from_slice(row);
                dgathered.extend(wide(&dout[image * width..][..width]));
            }
            assert_eq!(wide(&out.download().unwrap()), want);
            let mut want = vec![0.0; sizes.tokens * width];
            oracle::gather_grad(&mut want[..used * width], &dgathered, &at, width);
            let dx = dx.download().unwrap();
            let got: Vec<f64> = dx.chunks_exact(pitch).flat_map(|row| wide(&row[..width])).collect();
            assert_eq!(got, want);
            assert!(dx.chunks_exact(pitch).all(|row| row[width..].iter().all(|&x| x == bf16::MAX)));
        }
    }
}
