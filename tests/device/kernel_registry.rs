//! What the registry promises about itself.

use std::collections::HashSet;

use trencadis::kernels::registry::sources;

use crate::support::places;

#[test]
fn names_are_unique_and_files_are_there() {
    let root = places::root().join("kernels");
    let (mut stems, mut names) = (HashSet::new(), HashSet::new());
    for source in sources() {
        assert!(root.join(source.file).is_file(), "kernels/{} is missing", source.file);
        assert!(stems.insert(source.stem()), "two sources are called {}", source.stem());
        assert!(!source.kernels.is_empty(), "{} has no kernels", source.file);
        for kernel in source.kernels {
            assert!(names.insert(kernel.name.clone()), "two kernels are called {}", kernel.name);
        }
    }
}

#[test]
fn every_kernel_can_be_launched() {
    for source in sources() {
        for kernel in source.kernels {
            let name = &kernel.name;
            let symbol = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(name.chars().all(symbol) && !name.starts_with(|c: char| c.is_ascii_digit()), "{name}");
            assert!(kernel.threads.is_multiple_of(32), "{name}: whole warps");
            assert!((32..=1024).contains(&kernel.threads), "{name}: {} threads", kernel.threads);
            assert!((1..=16).contains(&kernel.min_blocks), "{name}: {} blocks", kernel.min_blocks);
            assert!(
                kernel.threads * kernel.min_blocks <= 2048,
                "{name}: more threads than a multiprocessor has"
            );
            assert!(kernel.register_limit() >= 24, "{name}: {} registers", kernel.register_limit());
        }
    }
}
