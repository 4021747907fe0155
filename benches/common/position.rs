//! Cases of the position kernels. Throughput counts the bytes of the tokens: read and written forward, read once
//! for each table backward.

use half::bf16;
use trencadis::Result;
use trencadis::device::Stream;
use trencadis::kernels::position::{Backward, Banks, Forward, Places, Position, RopeOperands, RopeTable};
use trencadis::recipe::{
    PositionBasis, PositionCombination, PositionConfig, PositionCoordinate, PositionResample, Rope,
    RopeConfig, RopeCoordinate, RopeFrequencies,
};

use super::gpu::{Case, Gpu, Queue, Sink};
use super::shapes::Images;

/// What is measured: the paper's tables, timm's and SigLIP's resized ones, Fourier features.
fn configs() -> Vec<(&'static str, PositionConfig)> {
    let base = PositionConfig::default();
    let fractional = PositionConfig { coordinate: PositionCoordinate::Fractional, ..base.clone() };
    let joint = PositionConfig {
        combination: PositionCombination::Joint,
        resample: PositionResample::Bilinear,
        rows: 16,
        columns: 16,
        ..fractional.clone()
    };
    let fourier = PositionConfig { basis: PositionBasis::Fourier, ..fractional.clone() };
    vec![("sum", base), ("sum_fractional", fractional), ("joint_fractional", joint), ("fourier", fourier)]
}

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    for (i, (width, images)) in super::patch::shapes()?.into_iter().enumerate() {
        shape_cases(gpu, width, &images, sink)?;
        if i == 0 {
            rope_case(gpu, 64, &images, sink)?;
        }
    }
    Ok(())
}

/// Places of all patches and the grids of all images, flat.
fn places_of(images: &Images) -> (Vec<u16>, Vec<u16>) {
    let grids: Vec<[u16; 2]> = images.lengths.iter().map(|&length| grid_of(length)).collect();
    let places = (images.lengths.iter().zip(&grids))
        .flat_map(|(&length, grid)| (0..length as u16).flat_map(|i| [i / grid[1].max(1), i % grid[1].max(1)]))
        .collect();
    (places, grids.concat())
}

/// The table of rotary positions for heads of `head_dim` columns, with coordinates that need the images' grids.
///
/// # Errors
/// A head dim that the kernel does not take, a device that fails.
pub fn rope_case(gpu: &Gpu, head_dim: usize, images: &Images, sink: &mut Sink<'_>) -> Result<()> {
    let config = RopeConfig {
        kind: Rope::Halves,
        frequencies: RopeFrequencies::Turns,
        coordinate: RopeCoordinate::Centered,
        ..RopeConfig::default()
    };
    let (tokens, host) = (images.tokens(), images.cu_seqlens());
    let table = RopeTable::new(&config, tokens, images.lengths.len(), head_dim)?;
    let (places, grids) = places_of(images);
    let (positions, grids) = (gpu.device.upload(&places)?, gpu.device.upload(&grids)?);
    let (cu_seqlens, pairs) = (gpu.device.upload(&host)?, gpu.device.upload(&table.pairs())?);
    let out = gpu.device.zeros::<f32>(tokens * head_dim)?;
    let launch = |stream: &Stream, _: usize| {
        let operands = RopeOperands {
            positions: &positions,
            grids: &grids,
            cu_seqlens: &cu_seqlens,
            cu_seqlens_host: &host,
            pairs: &pairs,
            out: &out,
        };
        table.launch(stream, &operands)
    };
    sink(&Case {
        kernel: "position_rope_table".into(),
        shape: format!("{head_dim}_{}", images.name),
        operations: 0.0,
        bytes: (4 * tokens * head_dim) as f64,
        sets: 1,
        launch: &launch,
    })
}

/// The grid with so many patches that is nearest to a square.
fn grid_of(patches: usize) -> [u16; 2] {
    let rows = (1..=patches).take_while(|r| r * r <= patches).filter(|r| patches.is_multiple_of(*r)).last();
    let rows = rows.unwrap_or(1);
    // A prime number of patches would be one long row.
    if patches / rows > 64 { [8, patches.div_ceil(8) as u16] } else { [rows as u16, (patches / rows) as u16] }
}

/// The cases of one shape.
///
/// # Errors
/// A width that the kernels do not take, a device that fails.
pub fn shape_cases(gpu: &Gpu, width: usize, images: &Images, sink: &mut Sink<'_>) -> Result<()> {
    let (tokens, slots) = (images.tokens(), images.lengths.len());
    let (places, grids) = places_of(images);
    let longest = grids.iter().copied().max().unwrap_or(1).max(1);
    let positions = gpu.device.upload(&places)?;
    let grids = gpu.device.upload(&grids)?;
    let host = images.cu_seqlens();
    let cu_seqlens = gpu.device.upload(&host)?;
    let rows = 2 * tokens * width;
    let sets = gpu.sets(2 * rows);
    let (x, out) = (gpu.random(sets, tokens * width)?, gpu.room::<bf16>(sets, tokens * width)?);
    for (name, mut config) in configs() {
        if config.coordinate == PositionCoordinate::Absolute {
            // The table holds every image.
            config.rows = config.rows.max(usize::from(longest));
            config.columns = config.columns.max(usize::from(longest));
        }
        let position = Position::new(&config, tokens, slots, width)?;
        let banks = Banks::new(&gpu.device, &config, usize::from(longest))?;
        let places = Places {
            positions: &positions,
            grids: &grids,
            cu_seqlens: &cu_seqlens,
            cu_seqlens_host: &host,
            banks: &banks,
        };
        let shapes = position.table_shapes();
        let upload = |shape: &[usize; 2]| gpu.device.upload(&super::random(shape[0] * shape[1]));
        let tables = shapes.iter().map(upload).collect::<Result<Vec<_>>>()?;
        let dtables = shapes.iter().map(upload).collect::<Result<Vec<_>>>()?;
        let workspace = gpu.device.alloc::<u8>(position.workspace_bytes(gpu.device.info()))?;
        let forward = |stream: &Stream, set: usize| {
            let forward = Forward {
                places,
                tables: [tables.first(), tables.get(1)],
                x: Some(x.rows(set, 0, width)),
                out: out.rows(set, 0, width),
            };
            position.forward(stream, &forward)
        };
        let backward = |stream: &Stream, set: usize| {
            let backward = Backward {
                places,
                tables: [tables.first(), tables.get(1)],
                dout: x.rows(set, 0, width),
                dtables: [dtables.first(), dtables.get(1)],
                accumulate: None,
                workspace: &workspace,
            };
            position.backward(stream, &backward)
        };
        let mut put = |op: &str, times: usize, launch: &Queue<'_>| {
            let (kernel, shape) = (format!("position_{name}_{op}"), format!("{width}_{}", images.name));
            sink(&Case { kernel, shape, operations: 0.0, bytes: (times * rows) as f64, sets, launch })
        };
        put("forward", 2, &forward)?;
        put("backward", shapes.len(), &backward)?;
    }
    Ok(())
}
