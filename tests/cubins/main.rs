//! The compiled kernels, read from the fatbins that the build made, with no GPU: every kernel of the
//! registry is there for every promised architecture, keeps to its registers and blocks, spills nothing,
//! holds matrix instructions where it promises them, waits for enough memory at a time where it passes that through, rounds
//! products one by one where it promises that; size and build time stay within their budgets.
//!
//! Needs a build with kernels and `cuobjdump` beside its nvcc; says `skipped` otherwise, or fails where
//! `TRENCADIS_REQUIRE_KERNELS=1` is set. It prints the table of all kernels (with `--nocapture`), and writes it to
//! `target/tmp/kernels.txt`.

mod allowed;
mod dump;
mod flight;
#[path = "../../src/hash.rs"]
#[allow(dead_code)] // The build's own modules, of which only the units are needed.
mod hash;
mod hopper;
#[path = "../../build/planted.rs"]
mod planted;
mod report;
#[path = "../../build/units.rs"]
#[allow(dead_code)]
mod units;

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use allowed::Exception;
use dump::{Dump, Instructions, Resources};
use rayon::prelude::*;
use registry::{Kernel, Source, Tier, sources};
use report::{Fatbin, Report};
use trencadis::kernels::registry;

/// Processor time of nvcc for all sources, in that for those of [`UNIT`]. Seconds would judge the machine: one takes 871
/// for what another takes 1,181, which are 32.5 units. These leave the room that ten minutes on two cores left on the first.
const BUILD_UNITS: f64 = 45.0;
/// Sources of middling length, which every build compiles.
const UNIT: [&str; 5] =
    ["sm80_loss", "sm80_norm", "sm80_norm_backward", "sm80_position_grad", "sm80_pool_attention_backward"];

/// Bytes of all fatbins together. The release binary stays under 40 MB, of which 10 are not kernels.
const FATBIN_BYTES: u64 = 30_000_000;

/// Families whose kernels pass memory through, and do little with it.
const STREAMING: [&str; 9] =
    ["collective", "elementwise", "loss", "norm", "optim", "patch", "pool", "position", "residual"];

/// Bytes that a multiprocessor must wait for at one time to keep the memory of an H200 busy: 4.8 TB/s, and 700 ns from the
/// load to what it brings, of 132 multiprocessors (Little's law).
const WAITING: u32 = 25 << 10;

/// What the fatbins of a tier hold.
fn promised(tier: Tier) -> &'static [&'static str] {
    match tier {
        Tier::Sm80 => &["sm_80", "sm_90", "compute_80"],
        Tier::Sm90 => &["sm_90a"],
    }
}

/// Blocks of `threads` threads that fit on a multiprocessor of sm_80 and sm_90, as far as registers, warps and
/// the number of blocks go. A warp takes registers by 256, and each of the four schedulers has a fourth of them.
fn blocks(registers: u32, threads: u32) -> u32 {
    let a_warp = (registers.max(1) * 32).next_multiple_of(256);
    let warps = (65_536 / 4 / a_warp * 4).min(64);
    (warps / threads.div_ceil(32)).min(32)
}

/// Bytes that the threads of a multiprocessor wait for at one time at most.
fn in_flight(kernel: &Kernel, uses: Resources, code: Instructions) -> u32 {
    code.in_flight * kernel.threads * blocks(uses.registers, kernel.threads)
}

/// What is wrong with the compiled code of `kernel`, each with the word that allowed.txt has for it. `streams`: memory is to
/// be kept busy.
fn faults(
    kernel: &Kernel,
    uses: Resources,
    code: Instructions,
    streams: bool,
) -> Vec<(&'static str, String)> {
    let (registers, limit) = (uses.registers, kernel.register_limit());
    let (fit, must) = (blocks(registers, kernel.threads), kernel.min_blocks);
    let (stack, waiting) = (uses.stack + uses.local, in_flight(kernel, uses, code));
    let checks = [
        ("registers", registers > limit, format!("{registers} registers, at most {limit} are allowed")),
        ("blocks", fit < must, format!("{fit} blocks of {} threads fit, {must} must", kernel.threads)),
        (
            "stack",
            stack > 0 || code.local > 0,
            format!("{stack} bytes of local memory a thread, {} instructions that use it", code.local),
        ),
        (
            "shared",
            uses.shared > 0,
            format!("{} bytes of static shared memory, none is allowed", uses.shared),
        ),
        ("matrix", kernel.tensor_cores && code.matrix == 0, "no matrix instruction".into()),
        (
            "waiting",
            streams && waiting < WAITING,
            format!(
                "a multiprocessor waits for {waiting} bytes at a time, at least {WAITING} keep memory busy"
            ),
        ),
        // Its pixels are the host's, which rounds products and sums one by one.
        (
            "fused",
            kernel.name.starts_with("view_mean") && code.fused > 0,
            format!("{} products fused with sums, none is allowed", code.fused),
        ),
    ];
    checks.into_iter().filter(|(_, wrong, _)| *wrong).map(|(what, _, text)| (what, text)).collect()
}

/// Gathers what is found, source by source.
struct Findings {
    table: Vec<String>,
    faults: Vec<String>,
    /// Exceptions, and whether anything needed them.
    allowed: Vec<(Exception, bool)>,
    bytes: u64,
    seconds: f64,
    /// Of the sources of [`UNIT`].
    unit: f64,
}

impl Findings {
    fn new(allowed: Vec<Exception>) -> Self {
        let head = format!(
            "{:<48} {:<6} {:>7} {:>6} {:>6} {:>6} {:>6} {:>7} {:>7}",
            "kernel", "arch", "regs", "stack", "static", "blocks", "matrix", "bytes", "waiting"
        );
        let allowed = allowed.into_iter().map(|line| (line, false)).collect();
        Self { table: vec![head], faults: Vec::new(), allowed, bytes: 0, seconds: 0.0, unit: 0.0 }
    }

    /// The fatbin of `source`, of `bytes` bytes.
    fn source(&mut self, source: &Source, fatbin: &Fatbin, bytes: u64, dump: &Dump) {
        for kernel in &source.kernels {
            for arch in &fatbin.targets {
                let place = (kernel.name.clone(), arch.clone());
                let missing = if arch.starts_with("compute_") {
                    !dump.ptx.contains(&place)
                } else {
                    match (dump.resources.get(&place), dump.instructions.get(&place)) {
                        (Some(uses), Some(code)) => {
                            let family = source.file.split('/').next().unwrap_or("");
                            let streams = arch == "sm_90" && STREAMING.contains(&family);
                            self.kernel(kernel, arch, (*uses, *code), streams);
                            false
                        }
                        _ => true,
                    }
                };
                if missing {
                    self.faults.push(format!("{} {arch}: not in the fatbin of {}", kernel.name, source.file));
                }
            }
        }
        self.table.push(format!("{:<48} {bytes} bytes, {:.1} s of nvcc", source.file, fatbin.seconds));
        self.bytes += bytes;
        self.seconds += fatbin.seconds;
        if UNIT.contains(&fatbin.stem.as_str()) {
            self.unit += fatbin.seconds;
        }
    }

    fn kernel(
        &mut self,
        kernel: &Kernel,
        arch: &str,
        (uses, code): (Resources, Instructions),
        streams: bool,
    ) {
        self.table.push(format!(
            "{:<48} {arch:<6} {:>7} {:>6} {:>6} {:>6} {:>6} {:>7} {:>7}",
            kernel.name,
            match code.roles {
                [0, 0] => uses.registers.to_string(),
                [kept, taken] => format!("{kept}/{taken}"),
            },
            uses.stack + uses.local,
            uses.shared,
            blocks(uses.registers, kernel.threads),
            code.matrix,
            code.bytes,
            in_flight(kernel, uses, code),
        ));
        for (what, text) in faults(kernel, uses, code, streams) {
            let excuse = self
                .allowed
                .iter_mut()
                .find(|(e, _)| e.kernel == kernel.name && e.arch == arch && e.what == what);
            match excuse {
                Some((exception, used)) => {
                    *used = true;
                    self.table.push(format!("    allowed: {text} ({})", exception.reason));
                }
                None => self.faults.push(format!("{} {arch}: {text}", kernel.name)),
            }
        }
    }

    /// After the last source: budgets, and exceptions that are none.
    fn finish(&mut self) {
        let (bytes, seconds, units) = (self.bytes, self.seconds, self.seconds / self.unit);
        self.table.push(format!("{:<48} {bytes} bytes, {seconds:.1} s of nvcc ({units:.1} units)", "all"));
        if bytes > FATBIN_BYTES {
            self.faults.push(format!("the fatbins are {bytes} bytes, at most {FATBIN_BYTES} are allowed"));
        }
        if units > BUILD_UNITS {
            self.faults.push(format!(
                "nvcc took {units:.1} times as long as for {}, at most {BUILD_UNITS} times are allowed",
                UNIT.join(", ")
            ));
        }
        for (line, _) in self.allowed.iter().filter(|(_, used)| !used) {
            self.faults.push(format!(
                "allowed.txt: {} {} {} excuses nothing; remove the line",
                line.kernel, line.arch, line.what
            ));
        }
    }
}

/// The build's report and cuobjdump; an error is why one of them is missing.
fn built() -> Result<(Report, PathBuf), String> {
    let text =
        std::fs::read_to_string(concat!(env!("OUT_DIR"), "/fatbins.tsv")).map_err(|e| e.to_string())?;
    if text.is_empty() {
        return Err("this build has no kernels; tools/install-cuda fetches the compiler".into());
    }
    let report = Report::parse(&text)?;
    let cuobjdump = report
        .cuobjdump()
        .ok_or_else(|| format!("there is no cuobjdump beside {} or on the PATH", report.nvcc.display()))?;
    Ok((report, cuobjdump))
}

#[test]
fn compiled_kernels_keep_their_limits() {
    let (report, cuobjdump) = match built() {
        Ok(built) => built,
        Err(reason) => {
            assert!(std::env::var_os("TRENCADIS_REQUIRE_KERNELS").is_none_or(|v| v != "1"), "{reason}");
            // The harness does not capture this.
            let _ = writeln!(std::io::stderr(), "skipped: compiled kernels ({reason})");
            return;
        }
    };
    let narrowed = std::env::var_os("CUDA_COMPUTE_CAP").is_some();
    let mut findings = Findings::new(allowed::parse(include_str!("allowed.txt")).unwrap());
    let read = |fatbin: &Fatbin| (fatbin.stem.clone(), Dump::read(&cuobjdump, &fatbin.file).unwrap());
    let dumps: HashMap<String, Dump> = report.fatbins.par_iter().map(read).collect();
    for source in sources() {
        let Some(fatbin) = report.fatbins.iter().find(|f| f.stem == source.stem()) else {
            findings.faults.push(format!("{}: the build compiled no fatbin of it", source.file));
            continue;
        };
        for arch in promised(source.tier) {
            if !narrowed && !fatbin.targets.iter().any(|target| target == arch) {
                findings.faults.push(format!("{}: its fatbin is not built for {arch}", source.file));
            }
        }
        let bytes = std::fs::metadata(&fatbin.file).unwrap().len();
        findings.source(&source, fatbin, bytes, &dumps[&fatbin.stem]);
    }
    findings.finish();
    let table = findings.table.join("\n") + "\n";
    print!("{table}");
    std::fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels.txt"), table).unwrap();
    assert!(findings.faults.is_empty(), "\n{}\n", findings.faults.join("\n"));
}

#[test]
fn the_name_of_a_source_tells_its_tier() {
    for source in sources() {
        let prefix = match source.tier {
            Tier::Sm80 => "sm80_",
            Tier::Sm90 => "sm90_",
        };
        assert!(source.stem().starts_with(prefix), "{}", source.file);
    }
}

#[test]
fn counts_blocks() {
    assert_eq!(blocks(255, 256), 1);
    assert_eq!(blocks(128, 128), 4);
    assert_eq!(blocks(129, 128), 3);
    assert_eq!(blocks(32, 1024), 2);
    assert_eq!(blocks(16, 32), 32);
}

#[test]
fn finds_faults_and_idle_exceptions() {
    let kernel = Kernel {
        name: "gemm_bf16".into(),
        body: "gemm<1>".into(),
        params: "Params",
        threads: 256,
        min_blocks: 2,
        tensor_cores: true,
    };
    let good = Resources { registers: 128, ..Default::default() };
    let code = Instructions { bytes: 16, matrix: 1, ..Default::default() };
    assert_eq!(faults(&kernel, good, code, false), []);
    let words = |uses, code, streams| -> Vec<&str> {
        faults(&kernel, uses, code, streams).into_iter().map(|(what, _)| what).collect()
    };
    let what = |uses, code| words(uses, code, false);
    // Two blocks of 256 threads.
    for (in_flight, faults) in [(48, &["waiting"][..]), (50, &[])] {
        assert_eq!(words(good, Instructions { in_flight, ..code }, true), faults);
    }
    assert_eq!(what(Resources { registers: 136, ..good }, code), ["registers", "blocks"]);
    assert_eq!(what(Resources { stack: 8, ..good }, Instructions { local: 1, ..code }), ["stack"]);
    assert_eq!(
        what(Resources { shared: 64, ..good }, Instructions { matrix: 0, ..code }),
        ["shared", "matrix"]
    );

    let line = |what: &str| format!("gemm_bf16 sm_80 {what} because\n");
    let mut findings = Findings::new(allowed::parse(&(line("shared") + &line("stack"))).unwrap());
    findings.kernel(&kernel, "sm_80", (Resources { shared: 64, ..good }, code), false);
    findings.finish();
    assert_eq!(findings.faults, ["allowed.txt: gemm_bf16 sm_80 stack excuses nothing; remove the line"]);
}
