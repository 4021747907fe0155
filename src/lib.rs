//! Trains Vision Transformers on images of any shape, on kernels written by hand.

#![warn(missing_docs)]

pub mod autograd;
pub mod cli;
pub mod cpu;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
pub mod files;
pub mod models;
pub mod nn;
pub mod rng;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
