//! Launches under another engine's graph capture: they become part of its graph, which runs them as often as it likes.
//!
//!     cargo run --no-default-features --features kernels --example 03_captured

mod engine;

use half::bf16;
use trencadis::device::{Buffer, Ptr};
use trencadis::kernels::elementwise::{Add, Addend};

const ROWS: usize = 4;
const WIDTH: usize = 8;

fn main() -> engine::Outcome {
    let Some((mut engine, device)) = engine::open()? else { return Ok(()) };
    // A capture need not allow that code is loaded, as a first launch would.
    device.kernels().preload(|name| name.starts_with("elementwise_"))?;

    let address = engine.upload(&[bf16::ZERO; ROWS * WIDTH])?;
    let row = engine.upload(&[1.5f32; WIDTH])?;
    // SAFETY: the engine keeps stream and memory, and waits for its graph before it ends.
    let (stream, sum, row) = unsafe {
        (
            device.borrow_stream(engine.stream())?,
            Buffer::<bf16>::from_raw(&device, Ptr::from_raw(address), ROWS * WIDTH)?,
            Buffer::<f32>::from_raw(&device, Ptr::from_raw(row), WIDTH)?,
        )
    };

    // Three launches a replay, and two replays: 1.5 is added six times.
    let add = Add { rows: ROWS, width: WIDTH };
    engine
        .capture(2, || (0..3).try_for_each(|_| add.launch(&stream, None, &sum, Addend::Row(&row), None)))?;
    println!("6 x 1.5 = {}", engine.download::<bf16>(address, 1)?[0]);
    Ok(())
}
