//! Runs a recorded step on a device, through the same graph as on the CPU.
//!
//! Memory is laid out once: activations in one arena from the liveness of the record ([`layout`]), parameters,
//! their copy in bf16 and their gradients in arenas of one layout ([`params`]), and one workspace that every
//! launch shares. Each op is asked once, by [`Op::prepare`](super::Op::prepare), for what it launches; a step
//! runs these launches in order and allocates nothing.
//!
//! What the device does in one launch is one node: [`fused`] rewrites the record before it is planned.
//!
//! Activations are bf16 in rows whose length is rounded up to 8 elements, the padding zeros; statistics and
//! losses are f32 and dense. A weight whose sides are no multiples of 8 is padded with zeros on the device, see
//! [`row_stride`](crate::kernels::patch::row_stride), and dense everywhere else.

pub mod batch;
pub mod layout;
pub mod params;
pub mod pieces;

mod exec;
mod fuse;
mod gathered;
mod memory;
mod shape;
mod site;

pub use batch::DeviceBatch;
pub use exec::DeviceExecutor;
pub use fuse::fused;
pub use gathered::MeshAxes;
pub use layout::{ArenaPlan, Element};
pub use params::{DeviceParams, ParamLayout};
pub use pieces::{PieceLayout, PieceParams, Segment};
pub use shape::{BatchShape, TextShape};
pub use site::{Launch, Live, LiveRows, Matrix, Site, Step};
