//! From bytes to pixels.

use image::{DynamicImage, GrayAlphaImage, GrayImage, ImageBuffer, ImageFormat, Luma, Rgb, RgbaImage};
use trencadis::data::source::Image;
use trencadis::data::source::decode::{convert, decode, size};
use trencadis::rng::{Purpose, Stream};

use super::{assert_refused, encode, picture};

const FORMATS: [ImageFormat; 3] = [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP];

fn close(actual: &[u8], expected: &[u8], tolerance: u8) -> bool {
    actual.len() == expected.len() && actual.iter().zip(expected).all(|(a, b)| a.abs_diff(*b) <= tolerance)
}

#[test]
fn every_format_and_odd_size() {
    for format in FORMATS {
        for (width, height) in [(1, 1), (1, 7), (9, 1), (13, 5), (17, 33)] {
            let source = picture(width, height);
            let bytes = encode(&source.clone().into(), format);
            let image = decode(&bytes, "x", 3).unwrap();
            assert_eq!((image.height, image.width, image.channels), (height as usize, width as usize, 3));
            assert_eq!(image.pixels.len(), (width * height * 3) as usize);
            assert_eq!(size(&bytes, "x").unwrap(), (image.height, image.width));
            // The image crate writes lossless WebP.
            if format != ImageFormat::Jpeg {
                assert_eq!(image.pixels, source.into_raw(), "{format:?} {width}x{height}");
            }
        }
    }
}

#[test]
fn jpeg_colours_survive() {
    let flat = image::RgbImage::from_pixel(16, 16, Rgb([200, 100, 50]));
    let image = decode(&encode(&flat.clone().into(), ImageFormat::Jpeg), "x", 3).unwrap();
    assert!(close(&image.pixels, flat.as_raw(), 3), "{:?}", &image.pixels[..3]);
}

#[test]
fn grey_becomes_rgb_and_rgb_becomes_luma() {
    let grey = GrayImage::from_fn(5, 3, |x, y| Luma([(x * 50 + y) as u8]));
    let bytes = encode(&grey.clone().into(), ImageFormat::Png);
    assert_eq!(decode(&bytes, "x", 1).unwrap().pixels, *grey.as_raw());
    let rgb: Vec<u8> = grey.as_raw().iter().flat_map(|&v| [v, v, v]).collect();
    assert_eq!(decode(&bytes, "x", 3).unwrap().pixels, rgb);

    // Pillow: Image.new("RGB", (1, 1), c).convert("L") for each of these.
    for (colour, luma) in [
        ([255, 0, 0], 76),
        ([0, 255, 0], 150),
        ([0, 0, 255], 29),
        ([255, 255, 255], 255),
        ([10, 200, 90], 131),
    ] {
        let bytes = encode(&image::RgbImage::from_pixel(1, 1, Rgb(colour)).into(), ImageFormat::Png);
        assert_eq!(decode(&bytes, "x", 1).unwrap().pixels, [luma], "{colour:?}");
    }
    let same = Image { height: 1, width: 1, channels: 3, pixels: vec![1, 2, 3] };
    assert_eq!(convert(same.clone(), 3), same);
}

#[test]
fn alpha_is_composited_on_white() {
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        let rgba = RgbaImage::from_raw(3, 1, vec![9, 9, 9, 0, 0, 100, 200, 128, 1, 2, 3, 255]).unwrap();
        let image = decode(&encode(&rgba.into(), format), "x", 3).unwrap();
        assert_eq!(image.pixels, [255, 255, 255, 127, 177, 227, 1, 2, 3], "{format:?}");
    }
    let grey = GrayAlphaImage::from_raw(2, 1, vec![0, 0, 7, 255]).unwrap();
    assert_eq!(decode(&encode(&grey.into(), ImageFormat::Png), "x", 1).unwrap().pixels, [255, 7]);
}

#[test]
fn sixteen_bits_are_rounded_to_eight() {
    let deep =
        ImageBuffer::<Rgb<u16>, _>::from_raw(2, 1, vec![0, 65535, 257 * 100, 128, 129, 32768]).unwrap();
    let bytes = encode(&DynamicImage::ImageRgb16(deep), ImageFormat::Png);
    assert_eq!(decode(&bytes, "x", 3).unwrap().pixels, [0, 255, 100, 0, 1, 128]);
    let deep = ImageBuffer::<Luma<u16>, _>::from_raw(2, 1, vec![257 * 7, 65535]).unwrap();
    let bytes = encode(&DynamicImage::ImageLuma16(deep), ImageFormat::Png);
    assert_eq!(decode(&bytes, "x", 1).unwrap().pixels, [7, 255]);
}

/// 3x2, palette red, green (transparent), blue. Pillow: `im = Image.new("P", (3, 2));
/// im.putpalette([255,0,0, 0,255,0, 0,0,255]); im.putdata([0,1,2,2,1,0]); im.save(f, "PNG", transparency=1)`
const PALETTE_PNG: &str = "\
    89504e470d0a1a0a0000000d4948445200000003000000020203000000e01a8e8900000009504c5445ff000000ff000000ff\
    2d4acd8a0000000274524e53ff00e5b7304a0000000c49444154789c63906098000000dc00a96ce7c0230000000049454e44\
    ae426082";

/// 16x8, left half CMYK (0, 255, 255, 0), right half (255, 0, 0, 64). Pillow 12: `im.save(f, "JPEG",
/// quality=95, subsampling=0)`, which decodes to RGB (255, 0, 0) and (0, 191, 191).
const CMYK_JPEG: &[u8] = include_bytes!("cmyk.jpg");

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn palettes_are_expanded() {
    let image = decode(&unhex(PALETTE_PNG), "x", 3).unwrap();
    assert_eq!((image.height, image.width), (2, 3));
    let (red, white, blue) = ([255, 0, 0], [255, 255, 255], [0, 0, 255]);
    assert_eq!(image.pixels, [red, white, blue, blue, white, red].concat());
}

#[test]
fn cmyk_becomes_rgb() {
    let image = decode(CMYK_JPEG, "x", 3).unwrap();
    assert_eq!((image.height, image.width), (8, 16));
    for (column, expected) in [(2, [255, 0, 0]), (13, [0, 191, 191])] {
        let pixel = &image.pixels[3 * (4 * 16 + column)..][..3];
        assert!(close(pixel, &expected, 3), "column {column}: {pixel:?}");
    }
}

/// An EXIF segment that says nothing but the orientation.
fn with_orientation(jpeg: &[u8], orientation: u8, big_endian: bool) -> Vec<u8> {
    let mut exif = b"Exif\0\0".to_vec();
    if big_endian {
        exif.extend(b"MM\0\x2A\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01");
        exif.extend([0, orientation, 0, 0, 0, 0, 0, 0]);
    } else {
        exif.extend(b"II\x2A\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0");
        exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
    }
    let mut bytes = vec![0xFF, 0xD8, 0xFF, 0xE1];
    bytes.extend((exif.len() as u16 + 2).to_be_bytes());
    bytes.extend(exif);
    bytes.extend(&jpeg[2..]);
    bytes
}

#[test]
fn exif_orientation_is_applied() {
    // Four flat quarters survive compression: as stored, bright at the top left.
    let quarters: [[u8; 2]; 2] = [[240, 160], [80, 10]];
    let stored = GrayImage::from_fn(32, 16, |x, y| Luma([quarters[(y / 8) as usize][(x / 16) as usize]]));
    let jpeg = encode(&stored.into(), ImageFormat::Jpeg);
    // Corners (top left, top right, bottom left, bottom right) that a viewer shows, TIFF 6.0 page 36.
    let shown = [
        [240, 160, 80, 10],
        [160, 240, 10, 80],
        [10, 80, 160, 240],
        [80, 10, 240, 160],
        [240, 80, 160, 10],
        [80, 240, 10, 160],
        [10, 160, 80, 240],
        [160, 10, 240, 80],
    ];
    for (orientation, corners) in (1u8..).zip(shown) {
        for big_endian in [false, true] {
            let bytes = with_orientation(&jpeg, orientation, big_endian);
            let image = decode(&bytes, "x", 1).unwrap();
            let expected = if orientation < 5 { (16, 32) } else { (32, 16) };
            assert_eq!((image.height, image.width), expected, "orientation {orientation}");
            assert_eq!(size(&bytes, "x").unwrap(), expected, "orientation {orientation}");
            let (w, last) = (image.width, image.pixels.len() - 1);
            let actual =
                [image.pixels[0], image.pixels[w - 1], image.pixels[last + 1 - w], image.pixels[last]];
            assert!(close(&actual, &corners, 4), "orientation {orientation}: {actual:?}");
        }
    }
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    assert_refused(decode(b"", "a/b.jpg", 3), &["a/b.jpg", "empty"]);
    assert_refused(decode(b"just some text", "a/b.jpg", 3), &["a/b.jpg", "not a JPEG, PNG or WebP"]);
    assert_refused(size(b"just some text", "a/b.jpg"), &["a/b.jpg", "not a JPEG, PNG or WebP"]);
    assert_refused(decode(b"GIF89a\x01\0\x01\0", "a/b.png", 3), &["a/b.png", "GIF", "convert it"]);
}

#[test]
fn cut_files_are_refused_at_every_length() {
    for format in FORMATS {
        let bytes = encode(&picture(19, 23).into(), format);
        for length in 0..bytes.len() {
            let part = &bytes[..length];
            // PNG ends in checksums and an end chunk of 16 bytes that hold no pixels.
            if format == ImageFormat::Png && length + 16 >= bytes.len() {
                continue;
            }
            assert_refused(decode(part, "cut.img", 3), &["cut.img"]);
            // A header that is whole must not be misread.
            if let Ok(found) = size(part, "cut.img") {
                assert_eq!(found, (23, 19), "{format:?} cut to {length}");
            }
        }
    }
    let jpeg = encode(&picture(40, 40).into(), ImageFormat::Jpeg);
    assert_refused(decode(&jpeg[..jpeg.len() - 20], "cut.jpg", 3), &["cut.jpg", "cut", "fetch it again"]);
}

#[test]
fn damaged_files_never_panic() {
    let mut dice = Stream::new(7, 0, 0, Purpose::Augment);
    let mut refused = 0;
    for format in FORMATS {
        let good = encode(&picture(21, 14).into(), format);
        for _ in 0..2000 {
            let mut bytes = good.clone();
            for _ in 0..1 + dice.bits() % 4 {
                let at = dice.bits() as usize % bytes.len();
                bytes[at] = dice.bits() as u8;
            }
            let _ = size(&bytes, "x");
            match decode(&bytes, "x", 3) {
                Ok(image) => assert_eq!(image.pixels.len(), image.height * image.width * 3),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn sizes_are_limited() {
    let long = encode(&GrayImage::new(30_000, 20).into(), ImageFormat::Png);
    assert_eq!(size(&long, "x").unwrap(), (20, 30_000));
    assert_eq!(decode(&long, "x", 1).unwrap().width, 30_000);
    let too_long = encode(&GrayImage::new(30_001, 1).into(), ImageFormat::Png);
    assert_refused(size(&too_long, "x.png"), &["x.png", "30001x1", "30000 pixels a side", "scale it down"]);
    assert_refused(decode(&too_long, "x.png", 3), &["30000 pixels a side"]);

    // A header alone: 16,001 x 16,000 pixels, refused before anything is allocated.
    let mut vast = encode(&GrayImage::new(1, 1).into(), ImageFormat::Png);
    vast[16..20].copy_from_slice(&16_001u32.to_be_bytes());
    vast[20..24].copy_from_slice(&16_000u32.to_be_bytes());
    let checksum = {
        let mut crc = flate2::Crc::new();
        crc.update(&vast[12..29]);
        crc.sum()
    };
    vast[29..33].copy_from_slice(&checksum.to_be_bytes());
    assert_refused(decode(&vast, "x.png", 3), &["x.png", "16001x16000", "256 megapixels"]);
}
