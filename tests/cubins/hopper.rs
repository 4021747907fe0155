//! The wrappers for Hopper are what nvcc takes: the emulator's own test kernels that do nothing wrong, compiled for
//! sm_90a, have its instructions.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use rayon::prelude::*;
use trencadis::kernels::registry::attention::{HOPPER_INSTANCES, Schedule};
use trencadis::kernels::registry::{Source, Tier};

use crate::dump::Dump;
use crate::report::Report;
use crate::{built, planted, units};

/// Every form of these must be in the code of a source: bulk copies, matrix instructions, mbarriers, registers that
/// move, barriers of a cluster.
const INSTRUCTIONS: [(&str, &[&str]); 4] = [
    (
        "hopper_copies",
        &[
            "UTMALDG.1D",
            "UTMALDG.5D",
            "UTMASTG.2D",
            "UTMAREDG.2D.ADD",
            "UBLKCP",
            "UBLKRED",
            "SYNCS.PHASECHK",
            "UTMACCTL.PF",
        ],
    ),
    (
        "hopper_meetings",
        &[
            "SYNCS.ARRIVE",
            "USETMAXREG",
            "UCGABAR_ARV",
            "UCGABAR_WAIT",
            "STSM.16.M88.4",
            "STSM.16.MT88.2",
            "ELECT",
        ],
    ),
    (
        "hopper_wgmma",
        &[
            "HGMMA.64x8x16.F32.BF16",
            "HGMMA.64x136x16.F32.BF16",
            "HGMMA.64x256x16.F32.BF16",
            // Of f16.
            "HGMMA.64x64x16.F32 ",
        ],
    ),
    ("hopper_gemm", &["UTMALDG.2D.MULTICAST", "HGMMA.64x128x16.F32.BF16", "USETMAXREG", "UTMASTG.2D"]),
];

/// Kernels without a bug; what is wrong on purpose may well be what ptxas warns of.
fn right(mut source: Source) -> Source {
    source.kernels.retain(|kernel| {
        let of = |what: &str, good: &str| !kernel.body.contains(what) || kernel.body.contains(good);
        of("Bug::", "Bug::none")
            && of("Shift::", "Shift::good")
            && of("Peer::", "Peer::good")
            && of("Swap::", "Swap::good")
    });
    source
}

/// What ptxas says of the source, and its machine code.
fn compile(nvcc: &Path, cuobjdump: &Path, source: &Source, folder: &Path) -> (String, String) {
    let unit = folder.join(source.stem()).with_extension("cu");
    let cubin = unit.with_extension("cubin");
    std::fs::write(&unit, units::unit(source)).unwrap();
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let done = Command::new(nvcc)
        .args(["-cubin", "-std=c++17", "-O3", "-arch=sm_90a", "-Xptxas", "--warn-on-spills", "-I"])
        .arg(kernels)
        .arg("-o")
        .args([&cubin, &unit])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{}: {said}", source.file);
    let code = Command::new(cuobjdump).arg("-sass").arg(&cubin).output().unwrap();
    (said, String::from_utf8_lossy(&code.stdout).into_owned())
}

/// What the build has left, or a line that says why it has nothing.
fn compiled() -> Option<(Report, PathBuf)> {
    match built() {
        Ok(built) => Some(built),
        Err(reason) => {
            assert!(std::env::var_os("TRENCADIS_REQUIRE_KERNELS").is_none_or(|v| v != "1"), "{reason}");
            let _ = writeln!(std::io::stderr(), "skipped: compiled kernels ({reason})");
            None
        }
    }
}

#[test]
fn wrappers_for_hopper_compile_to_its_instructions() {
    let Some((report, cuobjdump)) = compiled() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sources: Vec<Source> =
        planted::sources().into_iter().filter(|source| source.tier == Tier::Sm90).map(right).collect();
    assert_eq!(sources.len(), INSTRUCTIONS.len());
    sources.par_iter().for_each(|source| {
        let (said, code) = compile(&report.nvcc, &cuobjdump, source, folder.path());
        for word in ["serialized", "setmaxnreg", "spill"] {
            assert!(!said.contains(word), "{}: {said}", source.file);
        }
        let (_, instructions) =
            INSTRUCTIONS.iter().find(|(stem, _)| *stem == source.stem()).expect("what it is made of");
        for instruction in *instructions {
            assert!(code.contains(instruction), "{}: no {instruction}", source.file);
        }
    });
}

/// The code of a source of attention, of bf16 and of f16.
fn of_elements(report: &Report, cuobjdump: &Path, stem: &str) -> [(&'static str, Dump); 2] {
    [("bf16", stem.to_owned()), ("f16", format!("{stem}_f16"))].map(|(element, stem)| {
        let fatbin = report.fatbins.iter().find(|fatbin| fatbin.stem == stem).expect("it was built");
        (element, Dump::read(cuobjdump, &fatbin.file).unwrap())
    })
}

/// Warpgroups share the registers of the launch out by role; what multiplies waits for its own products alone.
#[test]
fn the_attention_for_hopper_keeps_its_roles() {
    let Some((report, cuobjdump)) = compiled() else { return };
    let dumps = of_elements(&report, &cuobjdump, "sm90_attention_forward");
    for (instance, (element, dump)) in HOPPER_INSTANCES.iter().flat_map(|i| dumps.iter().map(move |d| (i, d)))
    {
        let place = (instance.forward(Schedule::Short, element), "sm_90a".to_owned());
        let (code, uses) = (dump.instructions[&place], dump.resources[&place]);
        let warpgroups = instance.hopper.unwrap() as u32;
        let [copies, multiplies] = code.roles;
        assert_eq!(copies + warpgroups * multiplies, (warpgroups + 1) * uses.registers, "{}", place.0);
        // First keys, a loop, and last keys of 16 to 64 without and with others before them; scores are begun together
        // with the values of the keys before.
        assert_eq!(code.meetings, [18, 23], "{}: matrix instructions wait for one another", place.0);
        assert_eq!((code.fences, code.local), (0, 0), "{}", place.0);
        // Of 64 keys in the loop, and of the last 16 to 64; two more to shrink what was added up before.
        assert_eq!(code.beside, 34 + 10 + 18 + 26 + 34, "{}: exponentials wait for values", place.0);
        // Scores ten times, values of 64 keys five times, of 16 to 64 twice; all and some of 16 keys by mma.
        let chunks = instance.width as u32 / 8;
        let steps = chunks.div_ceil(2);
        let (wgmma, mma) = (10 * steps + 5 * 4 + 2 * (1 + 2 + 3 + 4), 2 * (2 * steps + chunks));
        assert_eq!(code.matrix, wgmma + mma, "{}", place.0);
    }
}

/// The warpgroup that copies keeps 24 registers, those that multiply take 240, and these wait for nothing but stages.
#[test]
fn the_gemm_for_hopper_keeps_its_roles() {
    let Some((report, cuobjdump)) = compiled() else { return };
    let fatbin = report.fatbins.iter().find(|fatbin| fatbin.stem == "sm90_gemm").expect("it was built");
    let dump = Dump::read(&cuobjdump, &fatbin.file).unwrap();
    for ((name, arch), code) in &dump.instructions {
        // What the launch gives all three warpgroups is what they take then: with less, the takers would wait for ever.
        let registers = dump.resources[&(name.clone(), arch.clone())].registers;
        assert_eq!((code.roles, 3 * registers), ([24, 240], 24 + 2 * 240), "{name} {arch}");
        // Begun once a step; waited for once a step and once at the end.
        assert_eq!(code.meetings, [1, 2], "{name} {arch}: matrix instructions wait for one another");
        assert_eq!(code.fences, 0, "{name} {arch}: fences in the main loop");
        // Four steps of 16 k, for one or two times 64 rows, by one main loop.
        assert!(matches!(code.matrix, 4 | 8), "{name} {arch}: {} matrix instructions", code.matrix);
    }
    assert!(!dump.instructions.is_empty());
}

/// As its launch bounds have it, and with what takes the sums of dq to global memory.
#[test]
fn attention_backward_for_hopper_keeps_its_roles() {
    let Some((report, cuobjdump)) = compiled() else { return };
    let dumps = of_elements(&report, &cuobjdump, "sm90_attention_backward");
    for (dump, ((name, arch), code)) in
        dumps.iter().flat_map(|(_, dump)| dump.instructions.iter().map(move |code| (dump, code)))
    {
        let registers = dump.resources[&(name.clone(), arch.clone())].registers;
        assert_eq!((code.roles, 3 * registers), ([88, 208], 88 + 2 * 208), "{name} {arch}");
        // Spills are found among all kernels, but for those that allowed.txt excuses.
        assert!(code.matrix > 0, "{name} {arch}");
        // Whether its turn has come, and again while it has not.
        assert_eq!(code.polls, 2, "{name} {arch}: nobody waits for a turn");
    }
    assert!(dumps.iter().all(|(_, dump)| !dump.instructions.is_empty()));
}
