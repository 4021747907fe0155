//! Checked launches of the position kernels.

use half::bf16;

use super::heuristics::{FOURIER_BLOCKS, Slices, TABLE_BLOCKS, slices};
use super::instances::Mode;
use super::raw::{
    BankParams, ForwardParams, FourierGradParams, GradParams, PlacesParams, Tap, fourier_grad_blocks,
    grad_blocks, launch_forward, launch_fourier_grad, launch_grad,
};
use crate::device::{Buffer, Device, DeviceInfo, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{
    Rows, check_cu_seqlens, check_extents, check_len, check_some, check_width, check_workspace,
};
use crate::ops::{
    FilterBank, MAX_RESAMPLED, PositionBasis, PositionCombination, PositionConfig, PositionCoordinate,
};

/// The resampling filters of both axes on a device; made once, they serve every batch.
pub struct Banks {
    axes: Option<[(Buffer<u32>, Buffer<Tap>); 2]>,
    longest: usize,
}

/// The filters of one axis, as [`Banks`] take them: where those of each place begin, and all taps.
pub type AxisFilters = (Vec<u32>, Vec<Tap>);

impl Banks {
    /// The filters of rows and columns for axes of up to `longest` patches, for an engine that keeps them in memory of
    /// its own; nothing where coordinates are absolute or there is no table.
    ///
    /// # Errors
    /// `longest` 0, or above 4096 where filters are needed.
    pub fn filters(config: &PositionConfig, longest: usize) -> Result<Option<[AxisFilters; 2]>> {
        if longest == 0 || i32::try_from(longest).is_err() {
            return Err(Error::usage(format!("images have at least 1 patch along an axis, not {longest}")));
        }
        let has_table = matches!(config.basis, PositionBasis::Learned | PositionBasis::Sinusoidal);
        if !has_table || config.coordinate == PositionCoordinate::Absolute {
            return Ok(None);
        }
        if longest > MAX_RESAMPLED {
            return Err(Error::usage(format!(
                "position tables cannot be resampled to {longest} patches along an axis, expected 1 to \
                 {MAX_RESAMPLED}; lower the resolution"
            )));
        }
        let filters = |bank: FilterBank| {
            let taps = bank.taps.iter().map(|&(row, weight)| Tap { row, weight }).collect();
            (bank.start, taps)
        };
        Ok(match [0, 1].map(|axis| FilterBank::new(config, axis, longest)) {
            [Some(rows), Some(columns)] => Some([filters(rows), filters(columns)]),
            _ => None,
        })
    }

    /// The same as they lie in memory of the caller, copies of what [`filters`](Self::filters) has made for `config` and
    /// `longest`.
    ///
    /// # Errors
    /// As for [`filters`](Self::filters); other lengths than those.
    pub fn in_memory(
        config: &PositionConfig,
        longest: usize,
        axes: Option<[(Buffer<u32>, Buffer<Tap>); 2]>,
    ) -> Result<Self> {
        let lengths = |filters: [AxisFilters; 2]| filters.map(|(start, taps)| (start.len(), taps.len()));
        let expected = Self::filters(config, longest)?.map(lengths);
        let given = axes.as_ref().map(|axes| axes.each_ref().map(|(start, taps)| (start.len(), taps.len())));
        if given != expected {
            return Err(Error::usage(format!(
                "filters of lengths {given:?} were given, expected {expected:?}; copy those that Banks::filters makes of \
                 the same recipe"
            )));
        }
        Ok(Self { axes, longest })
    }

    /// The filters of `config` for axes of up to `longest` patches; nothing where coordinates are absolute or
    /// there is no table.
    ///
    /// # Errors
    /// `longest` 0, or above 4096 where filters are needed; no room on the device.
    pub fn new(device: &Device, config: &PositionConfig, longest: usize) -> Result<Self> {
        let upload =
            |(start, taps): &AxisFilters| -> Result<_> { Ok((device.upload(start)?, device.upload(taps)?)) };
        let axes = match &Self::filters(config, longest)? {
            Some([rows, columns]) => Some([upload(rows)?, upload(columns)?]),
            None => None,
        };
        Ok(Self { axes, longest })
    }

    fn params(&self) -> [BankParams; 2] {
        let null = BankParams { start: Ptr::null(), taps: Ptr::null() };
        let axis =
            |(start, taps): &(Buffer<u32>, Buffer<Tap>)| BankParams { start: start.ptr(), taps: taps.ptr() };
        self.axes.as_ref().map_or([null; 2], |axes| axes.each_ref().map(axis))
    }
}

/// Where the tokens of a batch stand.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// `[T, 2]` as in a packed batch. A coordinate beyond its table reads the last row of it.
    pub positions: &'a Buffer<u16>,
    /// `[N, 2]`.
    pub grids: &'a Buffer<u16>,
    /// `[N + 1]`.
    pub cu_seqlens: &'a Buffer<i32>,
    /// The same on the host.
    pub cu_seqlens_host: &'a [i32],
    /// Filters of the same recipe.
    pub banks: &'a Banks,
}

/// The position embedding of a recipe for batches of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct Position {
    config: PositionConfig,
    mode: Mode,
    tokens: usize,
    images: usize,
    width: usize,
}

/// Operands of the forward pass.
#[derive(Clone, Copy)]
pub struct Forward<'a> {
    /// The tokens.
    pub places: Places<'a>,
    /// As many as [`Position::table_shapes`] says.
    pub tables: [Option<&'a Buffer<f32>>; 2],
    /// `[T, D]`, what the embedding is added to; none: zeros.
    pub x: Option<Rows<'a, bf16>>,
    /// `[T, D]`, all rows written; may be `x`.
    pub out: Rows<'a, bf16>,
}

/// Operands of the backward pass: the gradient of `x` is `dout` itself.
#[derive(Clone, Copy)]
pub struct Backward<'a> {
    /// The tokens.
    pub places: Places<'a>,
    /// As in the forward pass.
    pub tables: [Option<&'a Buffer<f32>>; 2],
    /// `[T, D]`.
    pub dout: Rows<'a, bf16>,
    /// The tables' gradients, as far as they are wanted.
    pub dtables: [Option<&'a Buffer<f32>>; 2],
    /// One number: the gradients are added to where it is not 0, else written.
    pub accumulate: Option<&'a Buffer<i32>>,
    /// Of [`Position::workspace_bytes`].
    pub workspace: &'a Buffer<u8>,
}

impl Position {
    /// The embedding of `config` at width `width` for batches of `tokens` rows and `images` slots.
    ///
    /// # Errors
    /// A recipe without position embedding, flat tables with fractional coordinates, a width that the kernels
    /// have no columns for.
    pub fn new(config: &PositionConfig, tokens: usize, images: usize, width: usize) -> Result<Self> {
        let mode = match (config.basis, config.combination) {
            (PositionBasis::None, _) => {
                return Err(Error::usage(
                    "model.position.basis = \"none\" has nothing to add to the tokens; leave the launch out",
                ));
            }
            (PositionBasis::Fourier, _) => Mode::Fourier,
            (_, PositionCombination::Flat | PositionCombination::Joint) => Mode::Single,
            (_, PositionCombination::Sum) => Mode::Sum,
            (_, PositionCombination::Stack) => Mode::Stack,
            (_, PositionCombination::Product) => Mode::Product,
        };
        let flat = mode == Mode::Single && config.combination == PositionCombination::Flat;
        if flat && config.coordinate != PositionCoordinate::Absolute {
            return Err(Error::usage(
                "model.position.combination = \"flat\" has no fractional coordinates: set \
                 model.position.coordinate = \"absolute\", or combination = \"joint\"",
            ));
        }
        check_extents("position embedding", &[tokens, images])?;
        if mode != Mode::Fourier {
            check_extents("position table", &[config.rows, config.columns, config.rows * config.columns])?;
        }
        check_width(
            "position embedding",
            width,
            if matches!(mode, Mode::Stack | Mode::Fourier) { 16 } else { 8 },
        )?;
        Ok(Self { config: config.clone(), mode, tokens, images, width })
    }

    /// How rows and columns are combined.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Rows and columns of the tables: one of both axes, or those of the rows and of the columns; the Fourier map.
    pub fn table_shapes(&self) -> Vec<[usize; 2]> {
        let PositionConfig { rows, columns, .. } = self.config;
        match self.mode {
            Mode::Single => vec![[rows * columns, self.width]],
            Mode::Sum | Mode::Product => vec![[rows, self.width], [columns, self.width]],
            Mode::Stack => vec![[rows, self.width / 2], [columns, self.width / 2]],
            Mode::Fourier => vec![[self.width / 2, 2]],
        }
    }

    fn slices(&self, info: &DeviceInfo, [rows, columns]: [usize; 2]) -> Slices {
        let (blocks, wanted) = match self.mode {
            Mode::Fourier => (fourier_grad_blocks(self.width), FOURIER_BLOCKS),
            _ => (grad_blocks(rows, columns), TABLE_BLOCKS),
        };
        slices(self.tokens, blocks, info.multiprocessors as usize, wanted)
    }

    /// Bytes of workspace of the backward pass on a device: the tables take turns.
    pub fn workspace_bytes(&self, info: &DeviceInfo) -> usize {
        let bytes = |&[rows, columns]: &[usize; 2]| {
            self.slices(info, [rows, columns]).count * rows * columns * size_of::<f32>()
        };
        self.table_shapes().iter().map(bytes).max().unwrap_or(0)
    }

    fn places(&self, places: &Places<'_>) -> Result<PlacesParams> {
        let Self { config, tokens, images, .. } = self;
        check_cu_seqlens(places.cu_seqlens_host, *images, *tokens)?;
        let resampled = self.mode != Mode::Fourier && config.coordinate != PositionCoordinate::Absolute;
        if resampled && places.banks.axes.is_none() {
            return Err(Error::usage(
                "fractional positions need the filters of their tables; make them with Banks::new of the same \
                 recipe",
            ));
        }
        Ok(PlacesParams {
            positions: check_len("positions", places.positions, &[*tokens, 2])?,
            grids: check_len("grids", places.grids, &[*images, 2])?,
            cu_seqlens: check_len("cu_seqlens", places.cu_seqlens, &[*images + 1])?,
            bank: if resampled { places.banks.params() } else { Banks { axes: None, longest: 1 }.params() },
            tokens: *tokens as i32,
            images: *images as i32,
            rows: config.rows as i32,
            columns: config.columns as i32,
            longest: places.banks.longest as i32,
            aspect: i32::from(config.coordinate == PositionCoordinate::FractionalAspect),
            flat: i32::from(self.mode == Mode::Single && config.combination == PositionCombination::Flat),
        })
    }

    fn fractional(&self) -> i32 {
        i32::from(self.config.coordinate != PositionCoordinate::Absolute)
    }

    fn tables(&self, tables: [Option<&Buffer<f32>>; 2]) -> Result<[Ptr<f32>; 2]> {
        let shapes = self.table_shapes();
        let mut ptrs = [Ptr::null(); 2];
        for (i, (ptr, table)) in ptrs.iter_mut().zip(tables).enumerate() {
            *ptr = match (shapes.get(i), table) {
                (Some(shape), Some(table)) => check_len("position table", table, shape)?,
                (None, None) => Ptr::null(),
                _ => {
                    return Err(Error::usage(format!(
                        "position embedding: expected {} table(s); give those of table_shapes",
                        shapes.len()
                    )));
                }
            };
        }
        Ok(ptrs)
    }

    /// Queues `out = x + embedding`: prefix tokens keep `x`, rows from `cu_seqlens[N]` on become zeros.
    ///
    /// # Errors
    /// Sizes that do not fit together, rows that are not aligned, `cu_seqlens` decreasing or overrunning, filters
    /// that are missing, a launch that the device refuses.
    pub fn forward(&self, stream: &Stream, forward: &Forward<'_>) -> Result<()> {
        let x = forward.x.map(|x| x.check("x", self.tokens, self.width)).transpose()?;
        let params = ForwardParams {
            out: forward.out.check("out", self.tokens, self.width)?,
            x: x.unwrap_or(Ptr::null()),
            table: self.tables(forward.tables)?,
            out_stride: forward.out.stride as i64,
            x_stride: forward.x.map_or(0, |x| x.stride as i64),
            places: self.places(&forward.places)?,
            width: self.width as i32,
            fractional: self.fractional(),
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_forward(stream.device().kernels(), stream.raw(), self.mode, &params) }
    }

    /// Queues the gradients of the tables.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn backward(&self, stream: &Stream, backward: &Backward<'_>) -> Result<()> {
        let device = stream.device();
        let (kernels, stream) = (device.kernels(), stream.raw());
        let dout = backward.dout.check("dout", self.tokens, self.width)?;
        let tables = self.tables(backward.tables)?;
        let places = self.places(&backward.places)?;
        let accumulate = check_some("accumulate", backward.accumulate, &[1])?;
        let partial = check_workspace(backward.workspace, self.workspace_bytes(device.info()))?.cast();
        for (i, (shape, dtable)) in self.table_shapes().into_iter().zip(backward.dtables).enumerate() {
            let Some(dtable) = dtable else { continue };
            let dtable = check_len("gradient of a position table", dtable, &shape)?;
            let slice = self.slices(device.info(), shape).tokens as i32;
            if self.mode == Mode::Fourier {
                let params = FourierGradParams {
                    partial,
                    dout,
                    map: tables[0],
                    dout_stride: backward.dout.stride as i64,
                    places,
                    width: self.width as i32,
                    fractional: self.fractional(),
                    slice,
                };
                // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
                unsafe { launch_fourier_grad(kernels, stream, &params, dtable, accumulate)? };
                continue;
            }
            let params = GradParams {
                partial,
                dout: if self.mode == Mode::Stack { dout.offset(i * shape[1]) } else { dout },
                other: if self.mode == Mode::Product { tables[1 - i] } else { Ptr::null() },
                dout_stride: backward.dout.stride as i64,
                places,
                axis: if self.mode == Mode::Single { 2 } else { i as i32 },
                table_rows: shape[0] as i32,
                columns: shape[1] as i32,
                slice,
            };
            // SAFETY: as above.
            unsafe { launch_grad(kernels, stream, &params, dtable, accumulate)? };
        }
        Ok(())
    }
}
