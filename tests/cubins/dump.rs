//! What `cuobjdump` prints of a fatbin, as numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use super::flight::Flight;

/// Where code stands: the kernel's name and its architecture, such as `sm_90`.
pub type Place = (String, String);

/// What the compiled code of one kernel takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of stack a thread: spilled registers, and arrays indexed by what is known at run time alone.
    pub stack: u32,
    /// Bytes of local memory a thread beside the stack.
    pub local: u32,
    /// Bytes of static shared memory a block.
    pub shared: u32,
}

/// What the instructions of one kernel are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instructions {
    /// Bytes of code.
    pub bytes: u32,
    /// Matrix instructions of the tensor cores.
    pub matrix: u32,
    /// Loads and stores of local memory.
    pub local: u32,
    /// Products of f32 that are fused with a sum.
    pub fused: u32,
    /// Registers of a thread that a warpgroup keeps when it gives up some, and has when it takes some; 0 where none
    /// does.
    pub roles: [u32; 2],
    /// Where a warpgroup begins a row of matrix instructions, and where it waits for some.
    pub meetings: [u32; 2],
    /// Fences between the first matrix instruction and the last: what waits for memory in a main loop.
    pub fences: u32,
    /// Fences since the last matrix instruction.
    pub trailing: u32,
    /// Exponentials between a wait for all but one group of matrix instructions and the wait for that one: computed
    /// beside it.
    pub beside: u32,
    /// Whether the code is between such waits.
    pub waiting: bool,
    /// Loads that see what other blocks have written, of whoever polls.
    pub polls: u32,
    /// Bytes that a thread waits for at one time at most.
    pub in_flight: u32,
}

/// The dumps of one fatbin.
#[derive(Debug, Default)]
pub struct Dump {
    /// Of every kernel and architecture that has machine code.
    pub resources: BTreeMap<Place, Resources>,
    /// The same places.
    pub instructions: BTreeMap<Place, Instructions>,
    /// Kernels in PTX; the architecture is written `compute_80`.
    pub ptx: BTreeSet<Place>,
}

impl Dump {
    /// Reads the fatbin `file`; an error is a sentence.
    pub fn read(cuobjdump: &Path, file: &Path) -> Result<Self, String> {
        let run = |option: &str| {
            let output = Command::new(cuobjdump)
                .args([option.as_ref(), file.as_os_str()])
                .output()
                .map_err(|e| format!("{} does not start: {e}", cuobjdump.display()))?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(format!("{} {option} failed: {}", cuobjdump.display(), said.trim()));
            }
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        Ok(Self {
            resources: resources(&run("--dump-resource-usage")?)?,
            instructions: instructions(&run("--dump-sass")?),
            ptx: entries(&run("--dump-ptx")?),
        })
    }
}

/// Which section of the dump a line belongs to.
#[derive(Default)]
struct Section {
    ptx: bool,
    arch: String,
}

impl Section {
    /// Takes in a line of a section's head, and says whether it was one.
    fn head(&mut self, line: &str) -> bool {
        match line {
            "Fatbin elf code:" => self.ptx = false,
            "Fatbin ptx code:" => self.ptx = true,
            _ => match line.strip_prefix("arch = ") {
                Some(arch) if self.ptx => self.arch = arch.replace("sm_", "compute_"),
                Some(arch) => self.arch = arch.into(),
                None => return false,
            },
        }
        true
    }
}

/// Shared memory that the driver keeps for itself in every block since sm_90. It is counted as the
/// kernel's wherever that uses any.
const RESERVED_SHARED: u32 = 1024;

fn resources(text: &str) -> Result<BTreeMap<Place, Resources>, String> {
    let mut all = BTreeMap::new();
    let (mut section, mut kernel) = (Section::default(), None);
    for line in text.lines().map(str::trim) {
        if section.head(line) {
            kernel = None;
        } else if let Some(name) = line.strip_prefix("Function ").and_then(|l| l.strip_suffix(':')) {
            kernel = Some(name.to_owned());
        } else if let Some(name) = kernel.take() {
            let number = |key: &str| {
                line.split_whitespace()
                    .find_map(|word| word.strip_prefix(key)?.strip_prefix(':')?.parse::<u32>().ok())
                    .ok_or_else(|| format!("cuobjdump tells no {key} of {name}: {line}"))
            };
            let mut found = Resources {
                registers: number("REG")?,
                stack: number("STACK")?,
                local: number("LOCAL")?,
                shared: number("SHARED")?,
            };
            if section.arch != "sm_80" {
                found.shared = found.shared.saturating_sub(RESERVED_SHARED);
            }
            all.insert((name, section.arch.clone()), found);
        }
    }
    Ok(all)
}

fn instructions(text: &str) -> BTreeMap<Place, Instructions> {
    let mut all: BTreeMap<Place, Instructions> = BTreeMap::new();
    let (mut section, mut place) = (Section::default(), None);
    let mut flight = Flight::default();
    for line in text.lines().map(str::trim) {
        if section.head(line) {
            place = None;
        } else if let Some(name) = line.strip_prefix("Function : ") {
            place = Some((name.to_owned(), section.arch.clone()));
            flight = Flight::default();
        } else if let Some(place) = &place
            && let Some((address, rest)) = line.strip_prefix("/*").and_then(|l| l.split_once("*/"))
            && let Ok(address) = u32::from_str_radix(address, 16)
        {
            let found = all.entry(place.clone()).or_default();
            found.bytes = address + 16;
            // A predicate such as `@!P0` may stand before the operation, its encoding behind it.
            let rest = rest.split_once("/*").map_or(rest, |(code, _)| code).trim();
            let rest = if rest.starts_with('@') {
                rest.split_once(' ').map_or("", |(_, code)| code.trim())
            } else {
                rest
            };
            let operation = rest.split_whitespace().next().unwrap_or("");
            found.in_flight = found.in_flight.max(flight.take(rest));
            match operation.split('.').next().unwrap_or("") {
                "HMMA" | "HGMMA" => {
                    if found.matrix > 0 {
                        found.fences += found.trailing;
                    }
                    (found.matrix, found.trailing) = (found.matrix + 1, 0);
                }
                "LDL" | "STL" => found.local += 1,
                "FFMA" => found.fused += 1,
                "WARPGROUP" => {
                    let waits = operation.contains("DEPBAR");
                    found.meetings[usize::from(waits)] += 1;
                    if waits {
                        found.waiting = rest.contains("0x1 ");
                    }
                }
                "MUFU" => found.beside += u32::from(found.waiting && operation.contains("EX2")),
                "LDG" => found.polls += u32::from(operation.contains("STRONG.GPU")),
                "MEMBAR" => found.trailing += 1,
                // `USETMAXREG.DEALLOC.CTAPOOL 0x18`, `USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0`
                "USETMAXREG" => {
                    let words = rest.split_whitespace();
                    let count = words.filter_map(|word| word.strip_prefix("0x")).next();
                    let count = count.and_then(|count| u32::from_str_radix(count, 16).ok()).unwrap_or(0);
                    found.roles[usize::from(operation.contains("TRY_ALLOC"))] = count;
                }
                _ => {}
            }
        }
    }
    all
}

fn entries(text: &str) -> BTreeSet<Place> {
    let mut all = BTreeSet::new();
    let mut section = Section::default();
    for line in text.lines().map(str::trim) {
        if !section.head(line)
            && section.ptx
            && let Some((_, name)) = line.split_once(".entry ")
        {
            let name = name.split('(').next().unwrap_or(name).trim();
            all.insert((name.into(), section.arch.clone()));
        }
    }
    all
}

#[test]
fn reads_resources() {
    let text = "
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function norm_bf16:
  REG:64 STACK:1384 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0
 Function norm_bf16:
  REG:12 STACK:0 SHARED:1280 LOCAL:8 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
";
    let place = |arch: &str| ("norm_bf16".to_owned(), arch.to_owned());
    let expected = BTreeMap::from([
        (place("sm_80"), Resources { registers: 64, stack: 1384, local: 0, shared: 0 }),
        (place("sm_90"), Resources { registers: 12, stack: 0, local: 8, shared: 256 }),
    ]);
    assert_eq!(resources(text), Ok(expected));
    assert!(resources(" Function a:\n  REGS:1").is_err());
}

#[test]
fn reads_instructions() {
    let text = "
Fatbin elf code:
================
arch = sm_80

\tcode for sm_80
\t\tFunction : gemm_bf16
\t.headerflags\t@\"EF_CUDA_SM80\"
        /*0000*/                   HFMA2.MMA R5, -RZ, RZ, 0, 2.38e-07 ;   /* 0x00000004ff057435 */
                                                                          /* 0x000fe200000001ff */
        /*0010*/                   HMMA.16816.F32.BF16 R16, R4, R14, RZ ; /* 0x0000000e0410723c */
        /*0020*/              @!P0 STL.64 [R1], R2 ;                      /* 0x0000580004027625 */
        /*0030*/               @P1 LDL R2, [R1] ;                         /* 0x0000580004027625 */
        /*0038*/                   FFMA R2, R3, R4, R5 ;                  /* 0x0000580004027625 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64] ;    /* 0x0000000002077fae */
        /*0050*/                   MEMBAR.ALL.GPU ;                       /* 0x0000000000007992 */
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ; /* 0x03e000000c187df0 */
        /*0070*/                   MEMBAR.ALL.GPU ;                       /* 0x0000000000007992 */
        /*0080*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;      /* 0x00000018000079c8 */
        /*0090*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ; /* 0x000000f0000079c8 */
        /*00a0*/                   WARPGROUP.ARRIVE ;                     /* 0x0000000000007992 */
        /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;        /* 0x0000000000007992 */
        /*00c0*/                   MUFU.EX2 R2, R3 ;                      /* 0x0000000000007992 */
        /*00d0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;        /* 0x0000000000007992 */
        /*00e0*/                   MUFU.EX2 R2, R3 ;                      /* 0x0000000000007992 */
        /*00f0*/                   LDG.E.STRONG.GPU R2, desc[UR28][R4.64] ; /* 0x0000000000007992 */
\t\t..........


\t\tFunction : empty
\t\t..........
";
    let place = ("gemm_bf16".to_owned(), "sm_80".to_owned());
    let found = Instructions {
        bytes: 0x100,
        matrix: 2,
        local: 2,
        fused: 1,
        roles: [24, 240],
        meetings: [1, 2],
        fences: 1,
        trailing: 1,
        beside: 1,
        waiting: false,
        polls: 1,
        in_flight: 4,
    };
    let expected = BTreeMap::from([(place, found)]);
    assert_eq!(instructions(text), expected);
}

#[test]
fn reads_ptx() {
    let text = "
Fatbin ptx code:
================
arch = sm_80
code version = [9,0]

.version 9.0
.target sm_80

.visible .entry gemm_bf16(
.param .align 8 .b8 gemm_bf16_param_0[24]
)

Fatbin elf code:
================
arch = sm_90
";
    assert_eq!(entries(text), BTreeSet::from([("gemm_bf16".into(), "compute_80".into())]));
}
