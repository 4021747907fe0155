//! Each operation on a colour and on a grey picture.

use safetensors::SafeTensors;
use trencadis::data::augment::Op;
use trencadis::data::source::Image;

use super::{goldens, image};

/// The operation that the script calls `name`.
fn op(name: &str, parameter: &str) -> Option<Op> {
    let number: f64 = parameter.parse().ok()?;
    Some(match name {
        "grayscale" => Op::Grayscale,
        "solarize" => Op::Solarize(number as u16),
        "gaussian_blur" => Op::GaussianBlur(number),
        "brightness" => Op::Brightness(number),
        "contrast" => Op::Contrast(number),
        "saturation" => Op::Saturation(number),
        "sharpness" => Op::Sharpness(number),
        "autocontrast" => Op::AutoContrast,
        "equalize" => Op::Equalize,
        "invert" => Op::Invert,
        "posterize" => Op::Posterize(number as u32),
        "solarize_add" => Op::SolarizeAdd(number as u8),
        "rotate" => Op::Rotate(number),
        "shear_x" => Op::ShearX(number),
        "shear_y" => Op::ShearY(number),
        "translate_x" => Op::TranslateX(number),
        "translate_y" => Op::TranslateY(number),
        _ => return None,
    })
}

/// To the bit.
#[test]
fn every_operation_gives_the_pixels_of_the_reference() {
    let bytes = goldens();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut different = Vec::new();
    let mut seen = [0; 2];
    for name in tensors.names() {
        let parts: Vec<&str> = name.split('/').collect();
        let [picture @ ("rgb" | "grey"), operation, parameter] = parts[..] else { continue };
        let Some(op) = op(operation, parameter) else { continue };
        let mut got = image(&tensors, picture);
        op.apply(&mut got, if picture == "rgb" { &[124, 116, 104] } else { &[124] });
        let want = image(&tensors, name);
        let off = |(a, b): (&u8, &u8)| a.abs_diff(*b);
        let worst = got.pixels.iter().zip(&want.pixels).map(off).max().unwrap();
        if got != want {
            different.push(format!("{name} by up to {worst}"));
        }
        seen[usize::from(picture == "grey")] += 1;
    }
    assert!(different.is_empty(), "{different:#?}");
    assert_eq!(seen, [57, 57]);
}

#[test]
fn degenerate_images_survive_every_operation() {
    let ops = [
        Op::Grayscale,
        Op::Solarize(128),
        Op::GaussianBlur(2.0),
        Op::Brightness(1.9),
        Op::Contrast(0.1),
        Op::Saturation(1.9),
        Op::Sharpness(1.9),
        Op::AutoContrast,
        Op::Equalize,
        Op::Invert,
        Op::Posterize(0),
        Op::SolarizeAdd(110),
        Op::Rotate(-30.0),
        Op::ShearX(0.3),
        Op::ShearY(-0.3),
        Op::TranslateX(0.45),
        Op::TranslateY(-0.45),
    ];
    for (height, width) in [(1, 1), (1, 9), (9, 1), (2, 2), (3, 2)] {
        for channels in [1, 3] {
            for op in ops {
                let mut image =
                    Image { height, width, channels, pixels: vec![90; height * width * channels] };
                op.apply(&mut image, &[90]);
                assert_eq!(image.pixels.len(), height * width * channels, "{op:?}");
                // What mixes neighbours leaves a constant as it is; what stretches, too.
                let keeps = matches!(
                    op,
                    Op::Grayscale
                        | Op::GaussianBlur(_)
                        | Op::Contrast(_)
                        | Op::Saturation(_)
                        | Op::Sharpness(_)
                ) || matches!(
                    op,
                    Op::AutoContrast | Op::Equalize | Op::Rotate(_) | Op::ShearX(_) | Op::ShearY(_)
                );
                let moves = matches!(op, Op::TranslateX(_) | Op::TranslateY(_));
                if keeps || moves {
                    assert!(image.pixels.iter().all(|&value| value == 90), "{op:?} at {height}x{width}");
                }
            }
        }
    }
    let mut black = Image { height: 1, width: 2, channels: 1, pixels: vec![7, 255] };
    Op::Posterize(0).apply(&mut black, &[0]);
    assert_eq!(black.pixels, [0, 0]);
    Op::Posterize(8).apply(&mut black, &[0]);
    assert_eq!(black.pixels, [0, 0]);
}
