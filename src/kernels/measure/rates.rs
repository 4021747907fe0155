//! What a device does at most, measured.

use bytemuck::Pod;
use half::bf16;

use super::{CopyParams, MMA_VALUES, MmaParams, launch_copy, launch_mma, mma_operations, mma_threads};
use crate::device::{Buffer, Stream};
use crate::error::{Error, Result};

/// Elements of 16 bits that the copy moves at a time.
const UNIT: usize = 8;
/// Most elements of the copy whose time is taken, and rounds of the matrix instructions.
const COPIED: usize = 1 << 29;
const ROUNDS: i32 = 20_000;
/// Runs, of which the best counts.
const RUNS: usize = 10;
/// Launches of the graph that tells what a launch takes.
const LAUNCHES: usize = 1000;

/// What a device does at most. On the emulator, whose times say nothing, all are those of a moment's work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Operations a second of `mma.sync` in bf16 on registers, a multiplication and an addition counted each. The
    /// instructions of Hopper's warpgroups reach more.
    pub operations: f64,
    /// Bytes a second of a copy, read and written.
    pub bytes: f64,
    /// Seconds of a launch within a graph that copies 16 bytes: what a launch takes where there is next to nothing to do.
    pub launch: f64,
}

/// Measures a device on a stream of it. `random` is what is multiplied and copied, over and over: at least
/// [`MMA_VALUES`] values, a multiple of 8.
///
/// # Errors
/// Fewer values; no room for two buffers of a sixteenth of the memory, at most 1 GiB each; a failed device.
pub fn rates(stream: &Stream, random: &[bf16]) -> Result<Rates> {
    let device = stream.device();
    let (kernels, info) = (device.kernels(), device.info());
    let real = info.driver.is_some();
    if random.len() < MMA_VALUES {
        return Err(Error::usage(format!(
            "{} random values to measure with, expected at least {MMA_VALUES}",
            random.len()
        )));
    }
    let (elements, rounds, runs, launches) = match real {
        true => ((info.memory_bytes / 32).min(COPIED) / UNIT * UNIT, ROUNDS, RUNS, LAUNCHES),
        false => (4096, 2, 2, 2),
    };
    let best = |launch: &dyn Fn() -> Result<()>| -> Result<f64> {
        let mut best = f64::INFINITY;
        for _ in 0..runs {
            best = best.min(seconds(stream, launch)?);
        }
        Ok(best)
    };
    let (x, out): (Buffer<bf16>, Buffer<bf16>) = (device.alloc(elements)?, device.zeros(elements)?);
    fill(stream, &x, &random[..random.len().min(elements) / UNIT * UNIT])?;
    let copy = CopyParams { out: out.ptr(), x: x.ptr(), size: elements as i64 };
    // SAFETY: both buffers hold so many elements, and live until the stream has been waited for.
    let copied = best(&|| unsafe { launch_copy(kernels, stream.raw(), &copy) })?;

    let values = device.upload(&random[..MMA_VALUES])?;
    let sums: Buffer<f32> = device.zeros(mma_threads(kernels))?;
    let mma = MmaParams { out: sums.ptr(), values: values.ptr(), rounds };
    // SAFETY: both buffers are of the sizes that the kernel is documented to need, and live as long.
    let multiplied = best(&|| unsafe { launch_mma(kernels, stream.raw(), &mma) })?;

    let least = CopyParams { size: UNIT as i64, ..copy };
    stream.begin_capture()?;
    // SAFETY: as for the whole copy.
    let queued = (0..launches).try_for_each(|_| unsafe { launch_copy(kernels, stream.raw(), &least) });
    let graph = stream.end_capture();
    queued?;
    let graph = graph?;
    let launched = best(&|| graph.launch(stream))?;
    Ok(Rates {
        operations: mma_operations(kernels, rounds) / multiplied,
        bytes: (2 * size_of::<bf16>() * elements) as f64 / copied,
        launch: launched / launches as f64,
    })
}

/// Seconds of what `launch` queues, by events.
///
/// # Errors
/// A launch that is refused; a failed device.
pub fn seconds(stream: &Stream, launch: &dyn Fn() -> Result<()>) -> Result<f64> {
    let start = stream.record()?;
    launch()?;
    let end = stream.record()?;
    stream.synchronize()?;
    Ok(f64::from(start.elapsed_ms(&end)?) / 1e3)
}

/// Fills a buffer of elements of 16 bits with `values`, over and over: they come from the host once, and are copied on the
/// device from there.
///
/// # Errors
/// No values, or lengths that are no multiples of 8; a failed device.
pub fn fill<T: Pod>(stream: &Stream, buffer: &Buffer<T>, values: &[T]) -> Result<()> {
    let (total, distinct) = (buffer.len(), values.len().min(buffer.len()));
    if size_of::<T>() != 2
        || total > 0 && distinct == 0
        || !total.is_multiple_of(UNIT)
        || !distinct.is_multiple_of(UNIT)
    {
        return Err(Error::usage(format!(
            "a buffer of {total} elements of {} bytes cannot be filled with {} values, expected multiples of {UNIT} \
             of 2 bytes",
            size_of::<T>(),
            values.len()
        )));
    }
    buffer.view::<T>(0..2 * distinct)?.write(stream, &values[..distinct])?;
    let mut there = distinct;
    while there < total {
        let size = there.min(total - there);
        let (out, x) = (buffer.ptr().offset(there).cast(), buffer.ptr().cast());
        let copy = CopyParams { out, x, size: size as i64 };
        // SAFETY: both parts lie in the buffer, one behind the other, and are multiples of 8 long.
        unsafe { launch_copy(stream.device().kernels(), stream.raw(), &copy)? };
        there += size;
    }
    stream.synchronize()
}
