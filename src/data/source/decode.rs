//! From the bytes of a JPEG, PNG or WebP file to an [`Image`].
//!
//! The format is guessed from the content. EXIF orientation is applied. 16-bit samples are rounded
//! to 8 bits, palettes are expanded, CMYK becomes RGB. Transparent pixels are composited on white:
//! pictures with an alpha channel are mostly drawings and product shots that were made to be seen
//! on a white page. Colour becomes grey by the ITU-R BT.601 luma that Pillow and torchvision use.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation};

use super::Image;
use crate::error::{Error, Result};
use crate::recipe::MAX_SIDE;

/// Largest accepted area in pixels.
pub const MAX_AREA: usize = 256_000_000;

/// Bytes that nearly always hold a header; a header that does not fit makes [`size_by`] read everything.
const HEADER: u64 = 64 << 10;
/// Bound on what a decoder may allocate: the largest accepted image with four 16-bit channels, and some.
const MAX_ALLOC: u64 = 3 << 30;

/// Decodes `bytes` to `channels` (1 or 3). `name` is what an error calls the sample.
///
/// Fails on anything but a whole JPEG, PNG or WebP image within [`MAX_SIDE`] and [`MAX_AREA`].
pub fn decode(bytes: &[u8], name: &str, channels: usize) -> Result<Image> {
    let format = guess(bytes, name)?;
    let mut decoder = decoder(bytes, format, name)?;
    check_size(decoder.dimensions(), name)?;
    if format == ImageFormat::Jpeg && !jpeg_is_whole(bytes) {
        return Err(Error::usage(format!(
            "{name}: the JPEG data stops before its end-of-image marker; the file was cut, fetch it again"
        )));
    }
    let orientation = orientation(&mut decoder);
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| undecodable(name, e))?;
    image.apply_orientation(orientation);
    Ok(convert(flatten(image), channels))
}

/// (height, width) as [`decode`] will return it, read from the header alone.
pub fn size(bytes: &[u8], name: &str) -> Result<(usize, usize)> {
    let format = guess(bytes, name)?;
    let mut decoder = decoder(bytes, format, name)?;
    check_size(decoder.dimensions(), name)?;
    let (width, height) = decoder.dimensions();
    let (height, width) = (height as usize, width as usize);
    Ok(match orientation(&mut decoder) {
        Orientation::Rotate90
        | Orientation::Rotate270
        | Orientation::Rotate90FlipH
        | Orientation::Rotate270FlipH => (width, height),
        _ => (height, width),
    })
}

/// [`size`] of a sample of `length` bytes of which `read(n)` gives the first n, reading no more
/// than the header needs.
pub(super) fn size_by(
    name: &str,
    length: u64,
    read: impl Fn(u64) -> Result<Vec<u8>>,
) -> Result<(usize, usize)> {
    let head = read(length.min(HEADER))?;
    // WebP keeps its EXIF block behind the pixels.
    let complete = length <= HEADER;
    if complete || !matches!(image::guess_format(&head), Ok(ImageFormat::WebP)) {
        let answer = size(&head, name);
        if complete || answer.is_ok() {
            return answer;
        }
    }
    size(&read(length)?, name)
}

/// The image with `channels` (1 or 3): grey is repeated, RGB becomes BT.601 luma.
pub fn convert(image: Image, channels: usize) -> Image {
    let pixels = match (image.channels, channels) {
        (3, 1) => image.pixels.as_chunks::<3>().0.iter().copied().map(luma).collect(),
        (1, 3) => image.pixels.iter().flat_map(|&v| [v; 3]).collect(),
        _ => return image,
    };
    Image { pixels, channels, ..image }
}

/// BT.601 luma, as Pillow rounds it.
pub(crate) fn luma([r, g, b]: [u8; 3]) -> u8 {
    // Weights .299, .587, .114 in 16-bit fixed point; they sum to 65536, so white stays 255.
    ((19595 * u32::from(r) + 38470 * u32::from(g) + 7471 * u32::from(b) + 0x8000) >> 16) as u8
}

fn guess(bytes: &[u8], name: &str) -> Result<ImageFormat> {
    if bytes.is_empty() {
        return Err(Error::usage(format!(
            "{name}: the file is empty; a JPEG, PNG or WebP image was expected"
        )));
    }
    match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP)) => Ok(format),
        Ok(other) => Err(Error::usage(format!(
            "{name}: this is a {} image, and only JPEG, PNG and WebP are read; convert it",
            format!("{other:?}").to_uppercase()
        ))),
        Err(_) => Err(Error::usage(format!(
            "{name}: this is not a JPEG, PNG or WebP image; remove the file or replace it"
        ))),
    }
}

fn decoder<'a>(bytes: &'a [u8], format: ImageFormat, name: &str) -> Result<impl ImageDecoder + 'a> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_ALLOC);
    reader.limits(limits);
    reader.into_decoder().map_err(|e| undecodable(name, e))
}

fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    // A damaged EXIF block says nothing about the pixels.
    decoder.orientation().unwrap_or(Orientation::NoTransforms)
}

fn undecodable(name: &str, cause: impl std::fmt::Display) -> Error {
    // Some decoders explain themselves over several lines.
    let cause = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    Error::usage(format!("{name}: the image cannot be decoded ({cause}); replace or remove it"))
}

fn check_size((width, height): (u32, u32), name: &str) -> Result<()> {
    let (width, height) = (width as usize, height as usize);
    let refused =
        |why: String| Err(Error::usage(format!("{name}: {width}x{height} pixels (width x height) {why}")));
    if width == 0 || height == 0 {
        refused("is no image; replace or remove it".into())
    } else if width > MAX_SIDE || height > MAX_SIDE {
        refused(format!("is beyond the limit of {MAX_SIDE} pixels a side; scale it down"))
    } else if width * height > MAX_AREA {
        refused(format!("is beyond the limit of {} megapixels; scale it down", MAX_AREA / 1_000_000))
    } else {
        Ok(())
    }
}

/// To 1 or 3 channels of 8 bits, whichever the file has, alpha composited on white.
fn flatten(image: DynamicImage) -> Image {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let colour = image.color();
    let (channels, pixels) = match (colour.has_color(), colour.has_alpha()) {
        (false, false) => (1, image.into_luma8().into_raw()),
        (true, false) => (3, image.into_rgb8().into_raw()),
        (false, true) => (1, on_white(&image.into_luma_alpha8().into_raw(), 1)),
        (true, true) => (3, on_white(&image.into_rgba8().into_raw(), 3)),
    };
    Image { height, width, channels, pixels }
}

fn on_white(pixels: &[u8], channels: usize) -> Vec<u8> {
    let blend = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    pixels
        .chunks_exact(channels + 1)
        .flat_map(|pixel| pixel[..channels].iter().map(move |&value| blend(value, pixel[channels])))
        .collect()
}

/// Whether the stream reaches its EOI marker. The decoder paints what is missing grey and says
/// nothing, which would train on half an image.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(found) = bytes.get(at..).and_then(|rest| rest.iter().position(|&b| b == 0xFF)) {
        at += found + 1;
        match bytes.get(at) {
            Some(0xD9) => return true,
            // Stuffed zeros, restart markers and fill bytes belong to the entropy-coded data.
            Some(0x00 | 0x01 | 0xD0..=0xD7) => at += 1,
            Some(0xFF) => {}
            Some(_) => {
                let Some(length) = bytes.get(at + 1..at + 3) else { return false };
                at += 1 + usize::from(u16::from_be_bytes([length[0], length[1]]));
            }
            None => return false,
        }
    }
    false
}
