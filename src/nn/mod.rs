//! Layers: each registers its parameters in the graph under a dotted name and records its ops.

pub mod attention;
pub mod block;
pub mod init;
pub mod linear;
pub mod mlp;
pub mod norm;
pub mod patch_embed;
pub mod pool;
pub mod position;
pub mod shard;
