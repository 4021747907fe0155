//! Three images of different lengths attend in one sequence of candle tensors, forward and backward, on the kernels of
//! trencadis, and are compared with candle's own softmax over each image.
//!
//!     cargo run --release --features cuda        # on a GPU
//!     cargo run --release --features emulator    # anywhere

mod attention;
mod operation;
mod place;

use candle_core::{D, DType, Device, Result, Tensor, Var};

const HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const TOKENS: usize = 128;
const CU_SEQLENS: [i32; 4] = [0, 60, 77, 113];

/// Candle's own attention, image by image, in f32; token rows of no image are zeros.
fn reference(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let heads_first = |x: &Tensor| x.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous();
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let mut images = Vec::new();
    for ends in CU_SEQLENS.windows(2) {
        let (start, len) = (ends[0] as usize, (ends[1] - ends[0]) as usize);
        let of = |x: &Tensor| x.narrow(1, start, len)?.contiguous();
        let scores = (of(&q)?.matmul(&of(&k)?.t()?.contiguous()?)? / (HEAD_DIM as f64).sqrt())?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        images.push(weights.matmul(&of(&v)?)?);
    }
    let used = CU_SEQLENS[CU_SEQLENS.len() - 1] as usize;
    images.push(Tensor::zeros((HEADS, TOKENS - used, HEAD_DIM), DType::F32, q.device())?);
    Tensor::cat(&images, 1)?.transpose(0, 1)?.contiguous()
}

fn difference(name: &str, got: &Tensor, expected: &Tensor) -> Result<()> {
    let expected = expected.to_dtype(DType::F32)?;
    let apart = (got.to_dtype(DType::F32)? - &expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let largest = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    println!("{name:<4} differs by at most {apart:.4} of {largest:.4}");
    if apart.is_nan() || apart > 0.02 * largest {
        candle_core::bail!("{name} is not what candle computes");
    }
    Ok(())
}

fn main() -> Result<()> {
    let device = if cfg!(feature = "cuda") { Device::new_cuda(0)? } else { Device::Cpu };
    let shape = (TOKENS, HEADS, HEAD_DIM);
    let var = || Var::from_tensor(&Tensor::randn(0f32, 1f32, shape, &device)?.to_dtype(DType::BF16)?);
    let (q, k, v) = (var()?, var()?, var()?);
    // What the result is multiplied by, so that gradients are none of them alike.
    let weights = Tensor::randn(0f32, 1f32, shape, &device)?;

    let packed = attention::Packed::new(&device, HEADS, HEAD_DIM, TOKENS, &CU_SEQLENS)?;
    let out = packed.attend(&q, &k, &v)?;
    let expected = reference(&q, &k, &v)?;
    difference("out", &out, &expected)?;

    let grads = (out.to_dtype(DType::F32)? * &weights)?.sum_all()?.backward()?;
    let expected = (expected * &weights)?.sum_all()?.backward()?;
    for (name, x) in [("dq", &q), ("dk", &k), ("dv", &v)] {
        let (Some(got), Some(expected)) = (grads.get(x), expected.get(x)) else {
            candle_core::bail!("there is no {name}");
        };
        difference(name, got, expected)?;
    }
    Ok(())
}
