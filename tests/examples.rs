//! The examples run on this machine and say what they should. `cargo test` has built them.

use std::path::PathBuf;
use std::process::Command;

/// What an example says: what it computes where there is something to compute it on, else what it would need.
fn says(name: &str, expected: &str) {
    let folder = std::env::current_exe().unwrap().parent().unwrap().with_file_name("examples");
    let program: PathBuf = folder.join(name);
    assert!(
        program.exists(),
        "{} is not built: run `cargo build --examples` with the same features",
        program.display()
    );
    let done = Command::new(program).output().unwrap();
    let out = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{out}\n{}", String::from_utf8_lossy(&done.stderr));
    let somewhere = cfg!(feature = "emulator") || trencadis::device::Device::cuda(0).is_ok();
    if somewhere {
        assert_eq!(out, expected);
    } else {
        let lines: Vec<_> = out.lines().collect();
        assert!(matches!(lines[..], [line] if line.starts_with("nothing was run: ")), "{out}");
        assert!(out.contains("build with --features emulator"), "{out}");
    }
}

#[test]
fn a_raw_launch() {
    let sums: Vec<_> = (0..16).map(|i| i as f32 + 0.5).collect();
    says("01_raw_launch", &format!("a + b = {sums:?}\n"));
}

#[test]
fn attention_on_memory_of_another_engine() {
    let expected = "out  0.91 at most\ndq   0.29 at most\ndk   0.49 at most\ndv   1.11 at most\n";
    says("02_attention", expected);
}

#[test]
fn windows_shared_heads_and_rotary_positions() {
    says("04_windows", "windows begin and end at [0, 16, 24]\nout is 0.71 at most\n");
}

#[test]
fn launches_in_a_capture_of_another_engine() {
    says("03_captured", "6 x 1.5 = 9\n");
}

/// Short enough to be read at a glance.
#[test]
fn examples_have_less_than_80_lines() {
    let folder = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("examples");
    let mut numbered = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            assert!(lines < 80, "{name} has {lines} lines");
            numbered += 1;
        }
    }
    assert!(numbered >= 4);
}
