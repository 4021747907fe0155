//! The build script's own tests, and its units.

#![allow(dead_code)]

#[path = "../src/hash.rs"]
mod hash;
#[path = "../build/nvcc/mod.rs"]
mod nvcc;
#[path = "../src/kernels/registry.rs"]
mod registry;
#[path = "../build/reuse.rs"]
mod reuse;
#[path = "../build/units.rs"]
mod units;

use std::fs;
use std::path::Path;

use registry::{Kernel, Source, Tier};
use tempfile::tempdir;

fn source() -> Source {
    let kernel = |name: &str, body: &str| Kernel {
        name: name.into(),
        body: body.into(),
        params: "ScaleParams",
        threads: 128,
        min_blocks: 2,
        tensor_cores: false,
    };
    let kernels = vec![kernel("scale_2", "scale<2>"), kernel("scale_3", "scale<3, 1>")];
    Source { file: "scale/sm80_scale.cu", tier: Tier::Sm80, kernels }
}

fn write(root: &Path, name: &str, text: &str) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn a_unit_includes_its_file_and_declares_its_kernels() {
    assert_eq!(source().stem(), "sm80_scale");
    assert_eq!(
        units::unit(&source()).lines().collect::<Vec<_>>(),
        [
            "#include \"scale/sm80_scale.cu\"",
            "",
            "TRENCADIS_KERNEL(scale_2, 128, 2, ScaleParams, scale<2>)",
            "TRENCADIS_KERNEL(scale_3, 128, 2, ScaleParams, scale<3, 1>)",
        ]
    );
}

#[test]
fn the_hash_follows_everything_that_is_included_and_nothing_else() {
    // The checkout itself may lie below a folder of this name.
    let place = tempdir().unwrap();
    let kernels = &place.path().join("emulator/kernels");
    write(kernels, "scale/sm80_scale.cu", "#include \"../common/view.cuh\"\n#include <stdint.h>\n");
    write(
        kernels,
        "common/view.cuh",
        "#pragma once\n  #  include \"ptx.cuh\"\n#include \"../emulator/view.h\"\n",
    );
    write(kernels, "common/ptx.cuh", "#include \"view.cuh\"\n#include \"not_there.cuh\"\n");
    write(kernels, "emulator/view.h", "host\n");
    write(kernels, "other/sm80_other.cu", "other\n");
    let found = units::headers(&units::unit(&source()), kernels).unwrap();
    let names: Vec<_> = found.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["sm80_scale.cu", "view.cuh", "ptx.cuh", "view.h"]);

    let hash = || units::hash_of(&[source()], kernels).unwrap();
    let mut last = hash();
    for (name, changes) in [
        ("other/sm80_other.cu", false),
        ("emulator/view.h", false),
        ("scale/sm80_scale.cu", true),
        ("common/view.cuh", true),
        ("common/ptx.cuh", true),
    ] {
        let text = fs::read_to_string(kernels.join(name)).unwrap();
        write(kernels, name, &format!("{text}// changed\n"));
        assert_eq!(hash() != last, changes, "{name}");
        last = hash();
    }
    let mut more = source();
    more.kernels[0].threads = 256;
    assert_ne!(units::hash_of(&[more], kernels).unwrap(), last);
}
