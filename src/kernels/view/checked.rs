//! The checked launch of the kernels of views.

use half::bf16;

use super::picture::{MOST_OPS, Picture, Record, Shares};
use super::raw::{PatchesParams, ResizeParams, launch_patches, launch_resize};
use crate::device::{Buffer, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{Rows, check_extents, check_len, check_wide, check_workspace};

/// Widest patch: in f32 it lies in shared memory that every kernel may have.
const MOST_VALUES: usize = 12 << 10;

/// Views of a batch: what memory is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Views {
    /// Token rows T.
    pub tokens: usize,
    /// 1 or 3.
    pub channels: usize,
    /// Pixels along a side of a patch.
    pub side: usize,
    /// Most pictures.
    pub pictures: usize,
    /// Most bytes of all pictures.
    pub bytes: usize,
    /// Most bytes of all targets.
    pub pixels: usize,
}

/// Where a batch lies in device memory.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// `[pictures]`, see [`records`](super::records).
    pub records: &'a Buffer<Record>,
    /// `[2]`: the numbers of pictures and of tiles.
    pub counts: &'a Buffer<i32>,
    /// `[tokens, 3]`: of each token row the picture, counted from 1, and row and column of the patch's first pixel there;
    /// picture 0: none.
    pub rows: &'a Buffer<i32>,
    /// The bytes of all pictures.
    pub data: &'a Buffer<u8>,
    /// `[channels, 2]`, see [`factors`](crate::kernels::patch::factors).
    pub factors: &'a Buffer<f32>,
}

impl Views {
    /// Those of batches of `tokens` token rows and `slots` images in patches of `side` pixels a side; `mixed`: each may be
    /// mixed with another.
    pub fn new(tokens: usize, slots: usize, channels: usize, side: usize, mixed: bool) -> Self {
        let Shares { bytes, pixels } = Shares::of_token(side, channels, mixed).of(tokens);
        let pictures = if mixed { 2 * slots } else { slots };
        Self { tokens, channels, side, pictures, bytes, pixels }
    }

    /// Whether there are kernels for them.
    ///
    /// # Errors
    /// Sizes that are not possible; other channels than 1 and 3, patches that exceed shared memory.
    pub fn supported(&self) -> Result<()> {
        let Self { tokens, channels, side, pictures, .. } = *self;
        check_extents("views", &[tokens, side, pictures])?;
        if matches!(channels, 1 | 3) && side <= MOST_VALUES && channels * side * side <= MOST_VALUES {
            return Ok(());
        }
        Err(Error::usage(format!(
            "patches of {channels}x{side}x{side} values have no kernel that makes them of pictures, expected 1 or 3 channels \
             and up to {MOST_VALUES} values; set data.views=\"host\""
        )))
    }

    /// Bytes of workspace of [`launch`](Self::launch).
    pub fn workspace_bytes(&self) -> usize {
        self.pixels.next_multiple_of(16) + self.pictures * MOST_OPS * size_of::<i32>()
    }

    /// Whether `pictures` and `rows` are of such a batch, and lead nowhere outside of it.
    ///
    /// # Errors
    /// They are not: a bug of who made them.
    pub fn check(&self, pictures: &[Picture], rows: &[[i32; 3]]) -> Result<()> {
        let total = |of: &dyn Fn(&Picture) -> usize| pictures.iter().map(of).sum::<usize>();
        let (bytes, pixels) = (total(&|p| p.bytes().len()), total(&Picture::target_bytes));
        if pictures.len() > self.pictures || bytes > self.bytes || pixels > self.pixels {
            return Err(Error::failure(format!(
                "{} pictures of {bytes} bytes and {pixels} pixels do not fit memory made for {self:?}",
                pictures.len()
            )));
        }
        if let Some(other) = pictures.iter().find(|picture| picture.channels() != self.channels) {
            return Err(Error::failure(format!(
                "a picture of {} channels in a batch of {}",
                other.channels(),
                self.channels
            )));
        }
        let partnered = |(i, picture): (usize, &Picture)| {
            !picture.has_partner() || pictures.get(i + 1).is_some_and(|other| other.size() == picture.size())
        };
        let inside = |picture: &Picture, [top, left]: [i32; 2]| {
            let (height, width) = picture.size();
            let fits = |at: i32, of: usize| usize::try_from(at).is_ok_and(|at| at + self.side <= of);
            fits(top, height) && fits(left, width)
        };
        let leads = |&[picture, top, left]: &[i32; 3]| match usize::try_from(picture) {
            Ok(0) => true,
            Ok(picture) => pictures.get(picture - 1).is_some_and(|picture| inside(picture, [top, left])),
            Err(_) => false,
        };
        if rows.len() == self.tokens && rows.iter().all(leads) && pictures.iter().enumerate().all(partnered) {
            return Ok(());
        }
        Err(Error::failure("token rows, or partners of pictures, lead outside of their batch"))
    }

    /// Queues `out` (all rows, all of the stride written) from the pictures of a batch, which [`check`](Self::check) has
    /// passed.
    ///
    /// # Errors
    /// Sizes that do not fit together, rows that are not aligned, a launch that the device refuses.
    pub fn launch(
        &self,
        stream: &Stream,
        out: Rows<'_, bf16>,
        of: Operands<'_>,
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        self.supported()?;
        let Self { tokens, channels, side, pictures, bytes, pixels } = *self;
        let width = channels * side * side;
        let workspace = check_workspace(workspace, self.workspace_bytes())?;
        let device = stream.device();
        let resize = ResizeParams {
            records: check_wide("records", of.records, &[pictures])?,
            counts: check_len("counts", of.counts, &[2])?,
            data: check_wide("data", of.data, &[bytes])?,
            pixels: workspace,
        };
        let patches = PatchesParams {
            records: resize.records,
            counts: resize.counts,
            rows: check_len("rows", of.rows, &[tokens, 3])?,
            pixels: workspace,
            means: workspace.offset(pixels.next_multiple_of(16)).cast(),
            factors: check_len("factors", of.factors, &[channels, 2])?,
            out: out.check("out", tokens, out.stride.max(width))?,
            out_stride: out.stride as i64,
            side: side as i32,
        };
        let (kernels, raw) = (device.kernels(), stream.raw());
        // SAFETY: the operands are live buffers of the checked sizes, and the records lead nowhere else; the stream orders
        // their later use.
        unsafe {
            launch_resize(kernels, raw, &resize, channels, device.info().multiprocessors)?;
            launch_patches(kernels, raw, &patches, channels, tokens, pictures)
        }
    }
}
