//! What operands of 16 bits are made of.

use std::fmt::Debug;

use bytemuck::Pod;
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}

    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// Elements that packed attention has kernels for: [`bf16`](struct@half::bf16) and [`f16`](struct@half::f16).
pub trait Element: Pod + Debug + sealed::Sealed {
    /// As the names of the kernels have it.
    const NAME: &'static str;
}

impl Element for bf16 {
    const NAME: &'static str = "bf16";
}

impl Element for f16 {
    const NAME: &'static str = "f16";
}
