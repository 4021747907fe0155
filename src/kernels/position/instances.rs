//! What the position kernels are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block of the forward kernels, and its tokens.
pub const THREADS: u32 = 256;
/// Threads of a block of the gradients: a warp.
pub const GRAD_THREADS: u32 = 32;

/// Threads of a block of the rotary table, each for two pairs of a token.
pub const ROPE_THREADS: u32 = 256;
/// The kernel of the rotary table.
pub const ROPE_TABLE: &str = "rope_table_f32";

/// How what a token reads becomes one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One table, flat or joint.
    Single,
    /// Row vector plus column vector.
    Sum,
    /// Row vector beside column vector, half the width each.
    Stack,
    /// Row vector times column vector.
    Product,
    /// Sines and cosines of a linear map of the coordinates.
    Fourier,
}

/// Every mode.
pub const MODES: [Mode; 5] = [Mode::Single, Mode::Sum, Mode::Stack, Mode::Product, Mode::Fourier];

impl Mode {
    /// As the kernels call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Sum => "sum",
            Self::Stack => "stack",
            Self::Product => "product",
            Self::Fourier => "fourier",
        }
    }
}

/// The forward kernel of a mode.
pub fn forward_name(mode: Mode) -> String {
    format!("position_{}_bf16", mode.name())
}

/// The kernel of a table's gradient, of a product's or of any other.
pub fn grad_name(product: bool) -> &'static str {
    if product { "position_product_grad_f32" } else { "position_table_grad_f32" }
}

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name: String, body: String, params, threads, min_blocks| Kernel {
        name,
        body,
        params,
        threads,
        min_blocks,
        tensor_cores: false,
    };
    let forward = MODES.map(|mode| {
        let body = format!("position::forward<position::{}>", mode.name());
        kernel(forward_name(mode), body, "PositionForward", THREADS, 4)
    });
    let grads = [false, true].map(|product| {
        let body = format!("position::grad<{product}>");
        kernel(grad_name(product).into(), body, "PositionGrad", GRAD_THREADS, 7)
    });
    let fourier = kernel(
        "position_fourier_grad_f32".into(),
        "position::fourier_grad".into(),
        "PositionFourierGrad",
        GRAD_THREADS,
        16,
    );
    let rope = kernel(ROPE_TABLE.into(), "position::rope_table".into(), "RopeTable", ROPE_THREADS, 6);
    let source = |file, kernels| Source { file, tier: Tier::Sm80, kernels };
    vec![
        source("position/sm80_position.cu", forward.to_vec()),
        source("position/sm80_position_grad.cu", grads.into_iter().chain([fourier]).collect()),
        source("position/sm80_rope.cu", vec![rope]),
    ]
}
