//! Weights of other programs: converted and back, described by architectures, refused with every mistake named.

mod command;
mod opened;
#[path = "../support/places.rs"]
mod places;
mod timm;

use std::path::Path;
use std::process::Command;

use places::golden;
use trencadis::eval::forward::{self, RawImage};
use trencadis::recipe::{ModelConfig, Recipe};
use trencadis::weights::Weights;

fn weights(case: &str) -> Weights {
    Weights::load(&golden(&format!("{case}/weights.safetensors"))).unwrap()
}

fn model(case: &str) -> ModelConfig {
    let path = golden(&format!("{case}/config.toml"));
    Recipe::load(path.to_str().unwrap(), &[]).unwrap().model
}

fn images() -> Vec<RawImage> {
    forward::images_of(&Weights::load(&golden("images.safetensors")).unwrap().tensors).unwrap()
}

/// Bits of all values, so that signs of zeros count.
fn assert_same(case: &str, got: &Weights, expected: &Weights) {
    let names = |w: &Weights| w.tensors.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(got), names(expected), "{case}");
    for (name, (shape, values)) in &expected.tensors {
        let (got_shape, got) = &got.tensors[name];
        assert_eq!(got_shape, shape, "{case}: {name}");
        let same = got.iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same && got.len() == values.len(), "{case}: {name}");
    }
}

fn trencadis(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(places::program()).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
