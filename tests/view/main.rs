//! Patches that the device makes of pictures against those of the host: single pictures, whole batches, whole steps.
//! `data::view` and what follows it are the oracle, and the pixels are the same.

mod batches;
mod kernels;
mod step;
#[path = "../support/mod.rs"]
mod support;

use half::bf16;
use trencadis::Result;
use trencadis::data::batch::Pictures;
use trencadis::device::{Device, Stream};
use trencadis::kernels::Rows;
use trencadis::kernels::patch::row_stride;
use trencadis::kernels::view::{Operands, Record, records};

/// Scales pixels by `factors`, in memory whose every byte that is not filled is foreign; all of the stride.
fn launch(device: &Device, stream: &Stream, pictures: &Pictures, factors: &[f32]) -> Result<Vec<bf16>> {
    let shape = pictures.shape;
    shape.check(&pictures.pictures, &pictures.rows)?;
    let (mut described, counts) = records(&pictures.pictures);
    described.resize(shape.pictures, bytemuck::pod_read_unaligned(&[0xff; size_of::<Record>()]));
    let mut data: Vec<u8> = pictures.pictures.iter().flat_map(|picture| picture.bytes()).copied().collect();
    data.resize(shape.bytes, 0xa5);
    let rows: Vec<i32> = pictures.rows.iter().flatten().copied().collect();
    let stride = row_stride(shape.channels * shape.side * shape.side);
    let out = device.upload(&vec![bf16::NAN; shape.tokens * stride])?;
    let of = Operands {
        records: &device.upload(&described)?,
        counts: &device.upload(&counts)?,
        rows: &device.upload(&rows)?,
        data: &device.upload(&data)?,
        factors: &device.upload(factors)?,
    };
    let workspace = device.upload(&vec![0xa5u8; shape.workspace_bytes()])?;
    shape.launch(stream, Rows::dense(&out, stride), of, &workspace)?;
    stream.synchronize()?;
    out.download()
}

/// The pixels of patches `[T, patch_dim]`; zeros where there is none.
fn patches(device: &Device, pictures: &Pictures) -> Vec<u8> {
    let shape = pictures.shape;
    let width = shape.channels * shape.side * shape.side;
    let stream = device.stream().unwrap();
    let out = launch(device, &stream, pictures, &[1.0, 0.0].repeat(shape.channels)).unwrap();
    let rows = out.chunks_exact(row_stride(width));
    rows.flat_map(|row| {
        assert!(row[width..].iter().all(|x| x.to_bits() == 0), "columns after the patch");
        row[..width].iter().map(|x| x.to_f32() as u8)
    })
    .collect()
}
