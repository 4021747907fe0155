//! Packed attention of two images, forward and backward, on memory of another engine (`engine.lend` shows how it is lent).
//!
//!     cargo run --no-default-features --features kernels --example 02_attention

mod engine;

use engine::Outcome;
use half::bf16;
use trencadis::kernels::Rows;
use trencadis::kernels::attention::{Attention, Backward, Forward, Schedule};
use trencadis::ops::{AttentionConfig, QkNormKind};

const HEADS: usize = 2;
const WIDTH: usize = HEADS * 64;
/// Images of 3 and 5 tokens.
const STARTS: [i32; 3] = [0, 3, 8];
const TOKENS: usize = 8;

fn main() -> Outcome {
    let Some((mut engine, device)) = engine::open()? else { return Ok(()) };
    let config = AttentionConfig { norm: QkNormKind::Rms, ..AttentionConfig::new(HEADS, 64) };
    let attention = Attention { config, tokens: TOKENS, slots: STARTS.len() - 1 };
    let (plan, back) = (attention.plan(device.info())?, attention.backward_plan(device.info())?);

    let values = (0..3 * TOKENS * WIDTH).map(|i| bf16::from_f32((i * 7 % 23) as f32 / 23.0));
    let values: Vec<bf16> = values.collect();
    let qkv = engine.lend(&device, &values)?;
    let dout = engine.lend(&device, &values[..TOKENS * WIDTH])?;
    let [out, dq, dk, dv] = [(); 4].map(|()| engine.lend(&device, &[bf16::ZERO; TOKENS * WIDTH]));
    let (out, dq, dk, dv) = (out?, dq?, dk?, dv?);
    let lse = engine.lend(&device, &[0f32; TOKENS * HEADS])?;
    let cu_seqlens = engine.lend(&device, &STARTS)?;
    // Work lists and workspaces, of sizes that are told beforehand.
    let words = [plan.limits, back.limits].map(|limits| Schedule::words_needed(limits, TOKENS, 2));
    let [lists, back_lists] = words.map(|n| engine.lend(&device, &vec![0i32; n?]));
    let lists = Schedule::in_memory(lists?, plan.limits, TOKENS, 2)?;
    let back_lists = Schedule::in_memory(back_lists?, back.limits, TOKENS, 2)?;
    let forward_bytes = attention.forward_workspace_bytes(&plan, TOKENS);
    let bytes = attention.backward_workspace_bytes(&back, TOKENS, false);
    let [workspace, back_workspace] = [forward_bytes, bytes].map(|n| engine.lend(&device, &vec![0u8; n]));
    let (workspace, back_workspace) = (workspace?, back_workspace?);
    // SAFETY: the engine keeps its stream.
    let stream = unsafe { device.borrow_stream(engine.stream())? };
    let part = |at: usize| Rows { buffer: &qkv, offset: at * WIDTH, stride: 3 * WIDTH };
    let (q, k, v) = (part(0), part(1), part(2));
    let (affine, rope, statistics) = ([None; 4], None, None);
    let [out, dout, dq, dk, dv] = [&out, &dout, &dq, &dk, &dv].map(|buffer| Rows::dense(buffer, WIDTH));
    let (cu_seqlens, lse) = (&cu_seqlens, &lse);
    lists.launch(&stream, cu_seqlens, Some(&STARTS))?;
    let (schedule, workspace) = (&lists, Some(&workspace));
    let forward = Forward { q, k, v, affine, rope, cu_seqlens, schedule, out, lse, statistics, workspace };
    attention.forward(&stream, &plan, &forward)?;
    back_lists.launch(&stream, cu_seqlens, Some(&STARTS))?;
    let (schedule, daffine, accumulate, workspace) = (&back_lists, [None; 4], None, &back_workspace);
    let backward = Backward {
        q,
        k,
        v,
        out,
        lse,
        dout,
        affine,
        rope,
        cu_seqlens,
        schedule,
        dq,
        dk,
        dv,
        daffine,
        accumulate,
        workspace,
    };
    attention.backward(&stream, &back, &backward)?;
    for (name, rows) in [("out", out), ("dq", dq), ("dk", dk), ("dv", dv)] {
        let values: Vec<bf16> = engine.download(rows.buffer.ptr().address(), TOKENS * WIDTH)?;
        println!("{name:<4} {:.2} at most", values.iter().fold(0f32, |max, x| max.max(x.to_f32().abs())));
    }
    Ok(())
}
