//! The emulator itself: instructions with known answers, and kernels with planted bugs that it must catch.
#![cfg(feature = "emulator")]

mod answers;
mod beside;
mod hopper;
mod hopper_copies;
mod hopper_gemm;
mod hopper_meetings;
mod hopper_wgmma;
mod launches;
mod meetings;
mod memory;
mod races;

use bytemuck::{Pod, Zeroable};
use trencadis::device::Launch;
use trencadis::device::emulator::{CopyPolicy, Emulator, EmulatorOptions, Fault};

/// `planted::Params`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Params {
    a: u64,
    b: u64,
    c: u64,
    n: i32,
    variant: i32,
}

/// A planted kernel and how it is launched: arrays that it reads, and elements of what it writes.
#[derive(Clone, Default)]
struct Case {
    kernel: &'static str,
    blocks: u32,
    threads: u32,
    shared_bytes: u32,
    a: Vec<u8>,
    b: Vec<u8>,
    /// What `c` holds before.
    c: Vec<u8>,
    n: i32,
    variant: i32,
    /// See [`Launch::dependent`].
    dependent: bool,
}

impl Case {
    /// One block of `threads` threads that writes `outputs` words.
    fn new(kernel: &'static str, threads: u32, outputs: usize) -> Self {
        let c = vec![0xff; 4 * outputs];
        Self { kernel, blocks: 1, threads, shared_bytes: 0, c, ..Self::default() }
    }

    fn shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }

    fn blocks(self, blocks: u32) -> Self {
        Self { blocks, ..self }
    }

    fn a<T: Pod>(self, a: &[T]) -> Self {
        Self { a: bytemuck::cast_slice(a).to_vec(), ..self }
    }

    fn b<T: Pod>(self, b: &[T]) -> Self {
        Self { b: bytemuck::cast_slice(b).to_vec(), ..self }
    }

    fn n(self, n: i32) -> Self {
        Self { n, ..self }
    }

    fn variant(self, variant: i32) -> Self {
        Self { variant, ..self }
    }

    /// What the kernel leaves in `c`.
    fn run<T: Pod>(&self, options: EmulatorOptions) -> Result<Vec<T>, Fault> {
        let emulator = Emulator::new(options);
        let upload = |bytes: &[u8]| {
            let address = if bytes.is_empty() { 0 } else { emulator.alloc(bytes.len()) };
            // SAFETY: just allocated, this long.
            unsafe { (address as *mut u8).copy_from(bytes.as_ptr(), bytes.len()) };
            address
        };
        let params = Params {
            a: upload(&self.a),
            b: upload(&self.b),
            c: upload(&self.c),
            n: self.n,
            variant: self.variant,
        };
        let dependent = self.dependent;
        let launch =
            Launch { dependent, ..Launch::new([self.blocks, 1, 1], self.threads, self.shared_bytes) };
        // SAFETY: the parameters are the kernel's, and nobody else uses the memory.
        unsafe {
            emulator.launch(self.kernel, launch, bytemuck::bytes_of(&params))?;
            let c = std::slice::from_raw_parts(params.c as *const u8, self.c.len());
            Ok(bytemuck::pod_collect_to_vec(c))
        }
    }

    /// The same under every policy and several orders, which must agree.
    fn answer<T: Pod + PartialEq + std::fmt::Debug>(&self) -> Vec<T> {
        let results: Vec<Vec<T>> = everywhere()
            .map(|options| {
                let told = format!("{options:?}");
                self.run(options).unwrap_or_else(|fault| panic!("{fault}\nwith {told}"))
            })
            .collect();
        for result in &results[1..] {
            assert_eq!(*result, results[0], "{} depends on the order", self.kernel);
        }
        results.into_iter().next().expect("there are options")
    }

    /// The report, which every policy and order must give; it must say `expected`.
    fn fault(&self, expected: &str) -> Fault {
        let faults: Vec<Fault> = everywhere()
            .map(|options| {
                let told = format!("{options:?}");
                match self.run::<u8>(options) {
                    Ok(_) => panic!("{} {} was not caught with {told}", self.kernel, self.variant),
                    Err(fault) => fault,
                }
            })
            .collect();
        for fault in &faults {
            assert!(fault.what.contains(expected), "{fault}\nshould say: {expected}");
        }
        faults.into_iter().next().expect("there are options")
    }
}

/// Every policy, in the natural order and in others.
fn everywhere() -> impl Iterator<Item = EmulatorOptions> {
    [CopyPolicy::AtIssue, CopyPolicy::AtWait, CopyPolicy::Random].into_iter().flat_map(|policy| {
        (0..6).map(move |seed| EmulatorOptions { seed, policy, ..EmulatorOptions::default() })
    })
}

/// Numbers that are no two alike.
fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32 + 0.5).collect()
}

/// The line of `tests/kernels/planted.cu` that `fault` names.
fn line_of(fault: &Fault) -> String {
    let (file, line) = fault.site.as_ref().expect("the site is known");
    assert_eq!(file, "tests/kernels/planted.cu");
    let source = include_str!("../kernels/planted.cu");
    source.lines().nth(*line as usize - 1).expect("the line exists").trim().to_owned()
}
