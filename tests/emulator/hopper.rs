//! How the kernels for Hopper are launched: tensors, and a device to make their maps.

use std::cell::RefCell;

use bytemuck::Pod;
use half::bf16;
use trencadis::device::emulator::{Emulator, EmulatorOptions, Fault};
use trencadis::device::{Launch, TensorBoxes, TensorElement, TensorMap, TensorSwizzle};

use crate::everywhere;

/// A matrix in row-major order, or several, and the boxes of it that the kernel copies.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub element: TensorElement,
    pub bytes: Vec<u8>,
    /// Innermost first.
    pub sizes: Vec<u32>,
    pub tile: Vec<u32>,
    pub swizzle: TensorSwizzle,
}

impl Tensor {
    /// bf16, in boxes of `tile` elements, a row being what `swizzle` says.
    pub fn bf16(values: &[bf16], sizes: &[u32], tile: &[u32], swizzle: TensorSwizzle) -> Self {
        let bytes = bytemuck::cast_slice(values).to_vec();
        Self { element: TensorElement::Bf16, bytes, sizes: sizes.into(), tile: tile.into(), swizzle }
    }

    pub fn f32(values: &[f32], sizes: &[u32], tile: &[u32], swizzle: TensorSwizzle) -> Self {
        let bytes = bytemuck::cast_slice(values).to_vec();
        Self { element: TensorElement::F32, bytes, sizes: sizes.into(), tile: tile.into(), swizzle }
    }
}

/// An emulator with what a test has put into its memory.
pub struct Machine {
    pub emulator: Emulator,
    results: RefCell<Option<(u64, usize)>>,
}

impl Machine {
    pub fn new(options: EmulatorOptions) -> Self {
        Self { emulator: Emulator::new(options), results: RefCell::default() }
    }

    /// Address of a copy of `bytes`.
    pub fn upload(&self, bytes: &[u8]) -> u64 {
        let address = self.emulator.alloc(bytes.len().max(1));
        // SAFETY: just allocated, this long.
        unsafe { (address as *mut u8).copy_from(bytes.as_ptr(), bytes.len()) };
        address
    }

    /// The same, and it is what [`run`] returns.
    pub fn result(&self, bytes: &[u8]) -> u64 {
        let address = self.upload(bytes);
        *self.results.borrow_mut() = Some((address, bytes.len()));
        address
    }

    /// A copy of the tensor, whose rows lie one after the other.
    pub fn tensor(&self, tensor: &Tensor) -> TensorMap {
        self.map(tensor, self.upload(&tensor.bytes))
    }

    /// The same, and it is what [`run`] returns.
    pub fn result_tensor(&self, tensor: &Tensor) -> TensorMap {
        self.map(tensor, self.result(&tensor.bytes))
    }

    pub fn map(&self, tensor: &Tensor, address: u64) -> TensorMap {
        let mut strides = Vec::new();
        let mut bytes = u64::from(tensor.element.bytes());
        for &size in &tensor.sizes[..tensor.sizes.len() - 1] {
            bytes *= u64::from(size);
            strides.push(bytes);
        }
        self.emulator.tensor_map(&TensorBoxes {
            element: tensor.element,
            address,
            sizes: &tensor.sizes,
            strides: &strides,
            tile: &tensor.tile,
            swizzle: tensor.swizzle,
        })
    }
}

/// Runs `kernel` with the parameters that `prepare` makes, and returns what it leaves in the result.
pub fn run<P: Pod, T: Pod>(
    options: EmulatorOptions,
    kernel: &str,
    launch: Launch,
    prepare: impl FnOnce(&Machine) -> P,
) -> Result<Vec<T>, Fault> {
    let machine = Machine::new(options);
    let params = prepare(&machine);
    // SAFETY: the parameters are the kernel's, and nobody else uses the memory.
    unsafe { machine.emulator.launch(kernel, launch, bytemuck::bytes_of(&params))? };
    let Some((address, bytes)) = machine.results.take() else { return Ok(Vec::new()) };
    // SAFETY: allocated, this long, and nothing runs any more.
    Ok(bytemuck::pod_collect_to_vec(unsafe { std::slice::from_raw_parts(address as *const u8, bytes) }))
}

/// The result, which every policy and order must agree on.
pub fn answer<P: Pod, T: Pod + PartialEq + std::fmt::Debug>(
    kernel: &str,
    launch: Launch,
    prepare: impl Fn(&Machine) -> P,
) -> Vec<T> {
    let results: Vec<Vec<T>> = everywhere()
        .map(|options| {
            let told = format!("{options:?}");
            run(options, kernel, launch, &prepare).unwrap_or_else(|fault| panic!("{fault}\nwith {told}"))
        })
        .collect();
    for result in &results[1..] {
        assert!(*result == results[0], "{kernel} depends on the order");
    }
    results.into_iter().next().expect("there are options")
}

/// The report of a launch, which every policy and order must give; it must say one of `expected`.
pub fn fault<P: Pod>(
    kernel: &str,
    launch: Launch,
    expected: &[&str],
    prepare: impl Fn(&Machine) -> P,
) -> Fault {
    let mut last = None;
    for options in everywhere() {
        let told = format!("{options:?}");
        match run::<P, u8>(options, kernel, launch, &prepare) {
            Ok(_) => panic!("{kernel} was not caught with {told}"),
            Err(fault) => {
                let said = expected.iter().any(|what| fault.what.contains(what));
                assert!(said, "{fault}\nshould say one of {expected:?}\nwith {told}");
                last = Some(fault);
            }
        }
    }
    last.expect("there are options")
}

/// The line of `source` that `fault` names.
pub fn line_of<'a>(fault: &Fault, file: &str, source: &'a str) -> &'a str {
    let (named, line) = fault.site.as_ref().expect("the site is known");
    assert_eq!(named, file, "{fault}");
    source.lines().nth(*line as usize - 1).expect("the line exists").trim()
}

/// Small integers, exact in bf16 and in every sum of the tests.
pub fn integers(n: usize, step: usize, modulus: usize) -> Vec<bf16> {
    (0..n).map(|i| bf16::from_f32((i * step % modulus) as f32 - (modulus / 2) as f32)).collect()
}
