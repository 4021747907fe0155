//! What other engines get with the feature `kernels`, and what is said of it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").unwrap().into()
}

/// Names of the crates that a set of features builds into a program, ours left out.
fn crates(features: &str) -> BTreeSet<String> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args([
        "tree",
        "--locked",
        "--offline",
        "--edges",
        "normal",
        "--prefix",
        "none",
    ]);
    let done = command.args(["--no-default-features", "--features", features]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout).unwrap();
    let lines = text.lines().map(|line| line.split_once(" (").map_or(line, |(name, _)| name));
    lines.map(str::to_owned).filter(|line| !line.starts_with("trencadis ")).collect()
}

#[test]
fn the_kernels_need_a_handful_of_crates() {
    let all = crates("kernels");
    let names: BTreeSet<_> = all.iter().map(|line| line.split(' ').next().unwrap()).collect();
    assert!(all.len() <= 15, "{all:#?}");
    for wanted in ["cudarc", "half", "bytemuck"] {
        assert!(names.contains(wanted), "{names:?}");
    }
    for heavy in ["serde", "rayon", "clap", "toml", "image", "gemm", "rand"] {
        assert!(!names.contains(heavy), "{names:?}");
    }
    assert_eq!(crates("capi"), all);
    let page = std::fs::read_to_string(root().join("docs/embedding.md")).unwrap();
    assert!(
        page.contains(&format!("| {}: at run time cudarc", all.len())),
        "docs/embedding.md counts otherwise"
    );
}

#[test]
fn features_add_to_one_another() {
    let kernels = crates("kernels");
    for more in ["emulator", "train"] {
        assert!(crates(more).is_superset(&kernels), "{more}");
        assert!(crates(more).len() > kernels.len(), "{more}");
    }
}

#[test]
fn the_table_of_the_kernels_is_that_of_the_registry() {
    let page = std::fs::read_to_string(root().join("docs/kernels-support.md")).unwrap();
    let start = page.find("| operation |").expect("docs/kernels-support.md has the table");
    let table = trencadis::kernels::matrix::markdown();
    assert_eq!(page[start..], table, "replace the table by what `trencadis kernels --matrix` prints");
}
