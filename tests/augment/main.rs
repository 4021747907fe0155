//! Cropping and augmentation against Pillow, torchvision and timm (`tools/augment_goldens.py`).

mod draws;
mod frames;
mod ops;
mod recipes;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;

use safetensors::SafeTensors;
use trencadis::data::source::Image;

/// The bytes of the file with the references' results.
fn goldens() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/augment/goldens.safetensors")).unwrap()
}

/// A tensor `[height, width, channels]` of bytes.
fn image(tensors: &SafeTensors<'_>, name: &str) -> Image {
    let tensor = tensors.tensor(name).unwrap();
    let &[height, width, channels] = tensor.shape() else { panic!("{name}: {:?}", tensor.shape()) };
    Image { height, width, channels, pixels: tensor.data().to_vec() }
}

/// A tensor of 64-bit floats, as it lies in memory.
fn numbers(tensors: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let (values, rest) = tensors.tensor(name).unwrap().data().as_chunks::<8>();
    assert!(rest.is_empty());
    values.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect()
}

/// Mean and standard deviation.
fn moments(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    (mean, (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt())
}
