//! Trains Vision Transformers on images of any shape: images keep their aspect ratio and share one
//! sequence, padded only at its end (NaViT, Dehghani et al. 2023).
//!
//! Most people use the program, `trencadis train`; see the README. This page is for those who call
//! the library.
//!
//! Everything meets in one data layout, the [`PackedBatch`](data::batch::PackedBatch): the patches
//! of all images one after another, and `cu_seqlens` to say where each begins. A model is described
//! by a [`Recipe`](recipe::Recipe), recorded once as a [`Graph`](autograd::Graph) and run
//! batch after batch. An image's result does not depend on what it is packed with:
//!
//! ```
//! use trencadis::data::batch::{PackedBatch, Patches, Targets};
//! use trencadis::eval::model::{Keep, Model};
//! use trencadis::recipe::Recipe;
//! use trencadis::nn::init::initialise;
//!
//! // A grey image of 2 x 3 patches and one of 4 x 1, in a budget of 128 tokens.
//! let recipe = Recipe::load("digits", &["model.depth=2".into()])?;
//! let (grids, tokens) = ([[2, 3], [4, 1]], 128);
//! let patch_dim = recipe.model.patch_dim();
//! let mut positions: Vec<[u16; 2]> = Vec::new();
//! let mut cu_seqlens = vec![0];
//! for [rows, columns] in grids {
//!     positions.extend((0..rows).flat_map(|row| (0..columns).map(move |column| [row, column])));
//!     cu_seqlens.push(positions.len() as i32);
//! }
//! let mut pixels: Vec<u8> = (0..positions.len() * patch_dim).map(|i| (i * 7 % 256) as u8).collect();
//! positions.resize(tokens, [0, 0]);
//! pixels.resize(tokens * patch_dim, 0);
//! let batch = PackedBatch {
//!     patches: Patches::U8(pixels),
//!     patch_dim,
//!     cu_seqlens,
//!     positions,
//!     grids: grids.to_vec(),
//!     targets: Targets::Classes(vec![0; 2]),
//!     weights: vec![1.0; 2],
//!     sample_ids: vec![0, 1],
//!     epochs: vec![0; 2],
//!     images: 2,
//!     texts: None,
//! };
//!
//! let classes = 10;
//! let mut model = Model::new(&recipe, classes, batch.tokens(), batch.slots(), Keep::Logits)?;
//! let params = initialise(model.params(), 0);
//! let logits = model.run(&params, &batch); // [2, 10]
//! assert_eq!(logits.len(), 2 * classes);
//! assert_ne!(logits[..classes], logits[classes..]);
//! # Ok::<(), trencadis::Error>(())
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`data`] | sources of images, resolution sampling, packing, the loader |
//! | [`models`], [`nn`] | recipes, the Vision Transformer and its layers |
//! | [`autograd`] | the recorded graph: one file per family of operations, forward beside backward |
//! | [`cpu`] | every operation in f32 and f64 |
//! | [`train`], [`eval`], [`report`] | training loop, checkpoints, metrics, the page that compares runs |
//! | [`parallel`] | several ranks: process groups, meshes, sharded linear layers |
//! | [`device`], [`kernels`] | the GPU: memory, streams, graphs, and the compiled kernels |
//! | [`ops`] | what single operations are told |
//! | `capi` | the kernels as functions of C (feature `capi`) |
//! | [`weights`] | safetensors, and the weights of other libraries |
//!
//! Bad input is [`Error::Usage`], anything else that fails is [`Error::Failure`].
//!
//! [`device`], [`kernels`] and [`ops`] are all that other engines need, and all that the feature `kernels` has; the rest is of
//! the feature `train`. [`kernels`] tells how they are called.

#![warn(missing_docs)]
// What is said above of the other modules.
#![cfg_attr(not(feature = "train"), allow(rustdoc::broken_intra_doc_links))]

#[cfg(feature = "train")]
pub mod autograd;
#[cfg(feature = "capi")]
pub mod capi;
#[cfg(feature = "train")]
pub mod cli;
#[cfg(feature = "train")]
pub mod cpu;
#[cfg(feature = "train")]
pub mod data;
pub mod device;
pub mod error;
#[cfg(feature = "train")]
pub mod eval;
pub mod files;
pub mod hash;
pub mod kernels;
#[cfg(feature = "train")]
pub mod models;
#[cfg(feature = "train")]
pub mod nn;
#[macro_use]
pub mod ops;
#[cfg(feature = "train")]
pub mod parallel;
#[cfg(feature = "train")]
pub mod recipe;
#[cfg(feature = "train")]
pub mod report;
#[cfg(feature = "train")]
pub mod rng;
#[cfg(feature = "train")]
pub mod train;
#[cfg(feature = "train")]
pub mod weights;

pub use error::{Error, Result};
