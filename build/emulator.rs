//! Compiles the kernels for the host: the same `.cu` files, as C++17 over `kernels/emulator`.
//!
//! Objects are kept from build to build and made anew when a file they include changed. With
//! `TRENCADIS_COVERAGE=1` they count which lines run (gcov).

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;
use std::{env, thread};

use crate::registry::{Kernel, Source, Tier};
use crate::units;

/// Files of the emulator itself, below `kernels/emulator`.
const RUNTIME: [&str; 4] = ["machine.cpp", "shared.cpp", "global.cpp", "collectives.cpp"];

/// Kernels of the emulator's own tests, many of them wrong on purpose: name, body, threads of a block.
#[rustfmt::skip]
const PLANTED: [(&str, &str, u32); 35] = [
    ("planted_matmul", "matmul<false>", 32),
    ("planted_matmul_wrong_fragment", "matmul<true>", 32),
    ("planted_mma_forms", "mma_forms", 32),
    ("planted_ldmatrix", "ldmatrix", 32),
    ("planted_exchanges", "exchanges", 64),
    ("planted_copy_zero_fill", "copy_zero_fill", 64),
    ("planted_copy_ring", "copy_ring", 64),
    ("planted_named_barriers", "named_barriers", 128),
    ("planted_last_block", "last_block", 32),
    ("planted_wait_for_next", "wait_for_next", 64),
    ("planted_functions", "functions", 64),
    ("planted_reverse", "reverse<false>", 64),
    ("planted_reverse_no_barrier", "reverse<true>", 64),
    ("planted_reverse_lanes", "reverse_lanes<false>", 32),
    ("planted_reverse_lanes_no_sync", "reverse_lanes<true>", 32),
    ("planted_copy_reverse", "copy_reverse<planted::CopyBug::none>", 64),
    ("planted_copy_no_wait", "copy_reverse<planted::CopyBug::no_wait>", 64),
    ("planted_copy_too_few_waited_for", "copy_reverse<planted::CopyBug::too_few_waited_for>", 64),
    ("planted_copy_no_barrier", "copy_reverse<planted::CopyBug::no_barrier>", 64),
    ("planted_copy_overwritten_source", "copy_reverse<planted::CopyBug::overwritten_source>", 64),
    ("planted_copy_overwritten_destination", "copy_reverse<planted::CopyBug::overwritten_destination>", 64),
    ("planted_write_after_read", "write_after_read<false>", 64),
    ("planted_write_after_read_race", "write_after_read<true>", 64),
    ("planted_write_after_write", "write_after_write<false>", 64),
    ("planted_write_after_write_race", "write_after_write<true>", 64),
    ("planted_one_for_all", "one_for_all<false>", 32),
    ("planted_one_for_all_race", "one_for_all<true>", 32),
    ("planted_relay", "relay<false>", 128),
    ("planted_relay_race", "relay<true>", 128),
    ("planted_access", "access", 32),
    ("planted_meeting", "meeting", 64),
    ("planted_own_place", "own_place<false>", 32),
    ("planted_own_place_race", "own_place<true>", 32),
    ("planted_read_neighbour", "read_neighbour<false>", 32),
    ("planted_read_neighbour_race", "read_neighbour<true>", 32),
];

fn planted() -> Source {
    let kernel = |&(name, body, threads): &(&str, &str, u32)| Kernel {
        name: name.into(),
        body: format!("planted::{body}"),
        params: "planted::Params",
        threads,
        min_blocks: 1,
        tensor_cores: false,
    };
    Source {
        file: "../tests/kernels/planted.cu",
        tier: Tier::Sm80,
        kernels: PLANTED.iter().map(kernel).collect(),
    }
}

/// C++ that instantiates a source's kernels and lists them in a table.
fn translation_unit(source: &Source) -> String {
    let mut text = units::unit(source);
    let _ = write!(text, "\nextern \"C\" const emulator::Kernel {}[] = {{\n", table(source));
    for kernel in &source.kernels {
        let _ = writeln!(text, "    emulator_kernel_{},", kernel.name);
    }
    text + "};\n"
}

fn table(source: &Source) -> String {
    format!("trencadis_emulator_{}", source.stem())
}

/// Rust that names the tables.
fn tables(sources: &[Source]) -> String {
    let mut text = String::from("unsafe extern \"C\" {\n");
    for source in sources {
        let _ = writeln!(text, "    static {}: [machine::Kernel; {}];", table(source), source.kernels.len());
    }
    let _ = write!(text, "}}\n\nfn tables() -> Vec<&'static [machine::Kernel]> {{\n    vec![\n");
    for source in sources {
        let _ = writeln!(text, "        // SAFETY: constant data, of this length by the same build.");
        let _ = writeln!(text, "        unsafe {{ &{} }},", table(source));
    }
    text + "    ]\n}\n"
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|metadata| metadata.modified()).ok()
}

/// Whether `object` is newer than all that its dependency file names.
fn is_fresh(object: &Path, dependencies: &Path) -> bool {
    let (Some(made), Ok(text)) = (modified(object), fs::read_to_string(dependencies)) else {
        return false;
    };
    let files = text.split_once(": ").map_or("", |(_, files)| files);
    files
        .split_whitespace()
        .filter(|&file| file != "\\")
        .all(|file| modified(Path::new(file)).is_some_and(|changed| changed < made))
}

/// Writes `text` unless the file says so already, so that its time tells when it changed.
fn write_if_changed(path: &Path, text: &str) -> Result<(), String> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// Compiles all sources and links them into the crate.
///
/// # Errors
/// What the compiler says, or why there is none.
pub fn build(sources: &[Source]) -> Result<(), String> {
    println!("cargo::rerun-if-changed=tests/kernels");
    println!("cargo::rerun-if-env-changed=TRENCADIS_COVERAGE");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let folder = out.join("emulator");
    fs::create_dir_all(&folder).map_err(|e| format!("cannot make {}: {e}", folder.display()))?;

    let mut sources: Vec<Source> = sources.to_vec();
    sources.push(planted());
    sources.retain(|source| !source.kernels.is_empty());
    write_if_changed(&out.join("emulator.rs"), &tables(&sources))?;
    let mut units: Vec<(PathBuf, PathBuf)> = RUNTIME
        .iter()
        .map(|name| (root.join("kernels/emulator").join(name), folder.join(name).with_extension("o")))
        .collect();
    for source in &sources {
        let unit = folder.join(source.stem()).with_extension("cpp");
        write_if_changed(&unit, &translation_unit(source))?;
        units.push((unit.clone(), unit.with_extension("o")));
    }

    let coverage = env::var_os("TRENCADIS_COVERAGE").is_some_and(|value| value == "1");
    let mut compiler = cc::Build::new();
    compiler
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .warnings(true)
        .define("TRENCADIS_EMULATOR", None)
        .include(root.join("kernels"))
        // Faults name `kernels/...`, wherever the checkout stands.
        .flag(format!("-fmacro-prefix-map={}/=", root.display()))
        .flag("-fno-exceptions")
        .flag("-ffp-contract=off")
        .flag("-Wno-unused-parameter");
    if coverage {
        // Counters come after early inlining, which would take whole functions out of the count.
        compiler.flag("--coverage").flag("-fno-early-inlining");
    }
    let no_compiler = |e| format!("the emulator needs a C++17 compiler (CXX names it): {e}");
    let tool = compiler.try_get_compiler().map_err(no_compiler)?;
    let signature = format!("{:?}", tool.to_command());
    let stamp = folder.join("command");
    let same_command = fs::read_to_string(&stamp).is_ok_and(|old| old == signature);
    let stale: Vec<_> = units
        .iter()
        .filter(|(_, object)| !same_command || !is_fresh(object, &object.with_extension("d")))
        .collect();
    if !same_command {
        // Written again when all objects are of this command.
        let _ = fs::remove_file(&stamp);
    }

    let queue = Mutex::new(stale);
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let work = || -> Result<(), String> {
        while let Some((source, object)) = queue.lock().ok().and_then(|mut queue| queue.pop()) {
            compile(tool.to_command(), source, object)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        let died = |_| Err("a thread of the emulator build died".to_owned());
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(died))
    })?;
    write_if_changed(&stamp, &signature)?;

    let mut archive = cc::Build::new();
    archive.cpp(true);
    for (_, object) in &units {
        archive.object(object);
    }
    let failed = |e| format!("the emulator's objects cannot be put together: {e}");
    archive.try_compile("trencadis_emulator").map_err(failed)?;
    if coverage {
        println!("cargo::rustc-link-lib=gcov");
    }
    Ok(())
}

fn compile(mut command: Command, source: &Path, object: &Path) -> Result<(), String> {
    let dependencies = object.with_extension("d");
    command.arg("-MMD").arg("-MF").arg(dependencies).arg("-c").arg(source).arg("-o").arg(object);
    let program = command.get_program().to_owned();
    let output = command.output().map_err(|e| {
        format!("the emulator needs a C++17 compiler, but {} cannot be run: {e}", program.display())
    })?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{} does not compile for the emulator:\n{text}", source.display()));
    }
    for line in text.lines() {
        println!("cargo::warning={line}");
    }
    Ok(())
}
