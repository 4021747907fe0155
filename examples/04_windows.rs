//! Attention as vision towers of today have it: windows as segments (Qwen2.5-VL), rotary positions of row and column
//! (Pixtral, Qwen2-VL), two query heads to a head of keys and values; here of an image of 6 x 4 patches.
//!
//!     cargo run --no-default-features --features kernels --example 04_windows

mod engine;

use half::bf16;
use trencadis::kernels::Rows;
use trencadis::kernels::attention::{Attention, Forward, Schedule, Windows};
use trencadis::ops::{AttentionConfig, Grid, Rope};

const GRID: Grid = Grid { rows: 6, cols: 4 };
const TOKENS: usize = GRID.rows * GRID.cols;
const HEAD_DIM: usize = 32;

/// Cosine and sine for each pair of columns of a head: half of the pairs turn with the row, half with the column.
fn angles(order: &[usize]) -> Vec<[f32; 2]> {
    let pairs = HEAD_DIM / 2;
    let angle = |token: usize, pair: usize| {
        let position = if pair < pairs / 2 { token / GRID.cols } else { token % GRID.cols };
        position as f32 * 10_000f32.powf(-((pair % (pairs / 2)) as f32) / (pairs / 2) as f32)
    };
    let all = order.iter().flat_map(|&token| (0..pairs).map(move |pair| angle(token, pair)));
    all.map(|angle| [angle.cos(), angle.sin()]).collect()
}

fn main() -> engine::Outcome {
    let Some((mut engine, device)) = engine::open()? else { return Ok(()) };
    // Windows of 4 x 4 patches, and units of 2 x 2 that a later layer merges. Rows of tokens follow `order`.
    let windows = Windows::new(&[GRID], 4, 2)?;
    println!("windows begin and end at {:?}", windows.cu_seqlens);

    let config = AttentionConfig { kv_heads: 2, rope: Rope::Halves, ..AttentionConfig::new(4, HEAD_DIM) };
    let slots = windows.cu_seqlens.len() - 1;
    let attention = Attention { config, tokens: TOKENS, slots };
    let plan = attention.plan(device.info())?;

    let row = config.qkv_width();
    let values = (0..TOKENS * row).map(|i| bf16::from_f32((i * 7 % 23) as f32 / 23.0));
    let qkv = engine.lend(&device, &values.collect::<Vec<_>>())?;
    let rope = engine.lend(&device, angles(&windows.order).as_flattened())?;
    let out = engine.lend(&device, &[bf16::ZERO; TOKENS * 4 * HEAD_DIM])?;
    let lse = engine.lend(&device, &[0f32; TOKENS * 4])?;
    let cu_seqlens = engine.lend(&device, &windows.cu_seqlens)?;
    let words = engine.lend(&device, &vec![0i32; Schedule::words_needed(plan.limits, TOKENS, slots)?])?;
    let schedule = Schedule::in_memory(words, plan.limits, TOKENS, slots)?.with_longest(windows.longest());

    // SAFETY: the engine keeps its stream.
    let stream = unsafe { device.borrow_stream(engine.stream())? };
    schedule.launch(&stream, &cu_seqlens, Some(&windows.cu_seqlens))?;
    let part = |offset: usize| Rows { buffer: &qkv, offset, stride: row };
    let forward = Forward {
        q: part(0),
        k: part(4 * HEAD_DIM),
        v: part(4 * HEAD_DIM + config.kv_width()),
        affine: [None; 4],
        rope: Some(&rope),
        cu_seqlens: &cu_seqlens,
        schedule: &schedule,
        out: Rows::dense(&out, 4 * HEAD_DIM),
        lse: &lse,
        statistics: None,
        workspace: None,
    };
    attention.forward(&stream, &plan, &forward)?;
    let out: Vec<bf16> = engine.download(out.ptr().address(), TOKENS * 4 * HEAD_DIM)?;
    println!("out is {:.2} at most", out.iter().fold(0f32, |max, x| max.max(x.to_f32().abs())));
    Ok(())
}
